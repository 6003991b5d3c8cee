"""Instructions that read and write control, debug and model-specific registers, and CPUID.

Each function is a :data:`~lasskvm.emulator.completion.Handler`. Privilege is checked here too: direct
execution's intercepts fire before its own checks for some of them.

Source: Intel SDM volume 2, the instructions by name; KVM's ``handle_cr()``, ``handle_dr()``,
``kvm_emulate_cpuid()``, ``kvm_emulate_rdmsr()`` and ``kvm_emulate_wrmsr()``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from iced_x86 import Code, Mnemonic, Register

from lasskvm.emulator import control
from lasskvm.emulator.completion import Handler, complete, require_cpl0
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import general_protection, invalid_opcode, raise_linear_fault
from lasskvm.emulator.msrs import MsrAccessNeeded, read_msr, visible_tsc, write_msr
from lasskvm.emulator.operands import (
    read_operand,
    read_register,
    write_operand,
    write_register,
)
from lasskvm.state import (
    APIC_BASE,
    CR0,
    CR2,
    CR3,
    CR4,
    CR8,
    RAX,
    RBX,
    RCX,
    RDX,
    TSC_AUX,
    XCR0,
    Words,
)
from lasskvm.x86.msr import APIC_BASE_ENABLE
from lasskvm.x86.registers import CR0_TS, CR4_OSXSAVE, CR4_PKE, CR4_TSD, CR4_UMIP, MASK32

__all__ = ["BY_CODE", "HANDLERS", "finish_rdmsr"]

_CR_WORDS = {0: CR0, 2: CR2, 3: CR3, 4: CR4, 8: CR8}
#: Those of which a nested guest may read something else than they hold.
_SHADOWED = (0, 4, 8)
_MASK16 = 0xFFFF


def _mov(ctx: Emulation, decoded: Decoded) -> None:
    """MOV to and from control and debug registers."""
    instruction = decoded.instruction
    destination, source = instruction.op0_register, instruction.op1_register
    if Register.CR0 <= destination <= Register.CR15:
        _mov_to_cr(ctx, destination - Register.CR0, read_register(ctx.words, source))
    elif Register.CR0 <= source <= Register.CR15:
        write_register(ctx.words, destination, _mov_from_cr(ctx, source - Register.CR0))
    elif Register.DR0 <= destination <= Register.DR15:
        number = _debug_register_number(destination)
        with _guest_debug_registers(ctx):
            control.set_dr(ctx.words, number, read_register(ctx.words, source))
    else:
        number = _debug_register_number(source)
        with _guest_debug_registers(ctx):
            write_register(ctx.words, destination, control.get_dr(ctx.words, number))
    complete(ctx, decoded)


def _mov_to_cr(ctx: Emulation, number: int, value: int) -> None:
    words = ctx.words
    if number not in _CR_WORDS:
        raise invalid_opcode()
    require_cpl0(words)
    if number == 0:
        _write_cr0(ctx, value)
    elif number == 2:
        words[CR2] = value
    elif number == 3:
        raise_linear_fault(control.set_cr3(words, ctx.memory, value), 0, 0)
    elif number == 4:
        control.set_cr4(words, ctx.memory, _written(ctx, 4, value))
    elif ctx.non_root is None or not ctx.non_root.write_task_priority(value):
        control.set_cr8(words, value)
        ctx.task_priority_written()


def _write_cr0(ctx: Emulation, value: int) -> None:
    control.set_cr0(ctx.words, ctx.memory, _written(ctx, 0, value))


def _written(ctx: Emulation, number: int, value: int) -> int:
    """What is written to CR0 or CR4 when software writes *value*: in VMX operation, some bits are not software's."""
    return value if ctx.vmx is None else ctx.vmx.written_control_register(ctx.words, number, value)


def _mov_from_cr(ctx: Emulation, number: int) -> int:
    if number not in _CR_WORDS:
        raise invalid_opcode()
    require_cpl0(ctx.words)
    return _visible(ctx, number)


def _visible(ctx: Emulation, number: int) -> int:
    """What software reads from a control register."""
    if ctx.non_root is not None and number in _SHADOWED:
        return ctx.non_root.visible_control_register(ctx.words, number)
    return ctx.words[_CR_WORDS[number]]


def _guest_debug_registers(ctx: Emulation) -> AbstractContextManager[object]:
    return nullcontext() if ctx.debugger is None else ctx.debugger.guest_registers()


def _debug_register_number(register: int) -> int:
    number = register - Register.DR0
    if number > 7:
        raise invalid_opcode()
    return number


def _clts(ctx: Emulation, decoded: Decoded) -> None:
    require_cpl0(ctx.words)
    ctx.words[CR0] = _written(ctx, 0, ctx.words[CR0] & ~CR0_TS)
    complete(ctx, decoded)


def _lmsw(ctx: Emulation, decoded: Decoded) -> None:
    require_cpl0(ctx.words)
    _write_cr0(ctx, control.with_machine_status_word(ctx.words[CR0], read_operand(ctx, decoded, 0)))
    complete(ctx, decoded)


def _smsw(ctx: Emulation, decoded: Decoded) -> None:
    if ctx.words[CR4] & CR4_UMIP:
        require_cpl0(ctx.words)
    # Memory gets 16 bits, a register as much of CR0 as it holds.
    write_operand(ctx, decoded, 0, _visible(ctx, 0))
    complete(ctx, decoded)


def _rdmsr(ctx: Emulation, decoded: Decoded) -> None:
    require_cpl0(ctx.words)
    index = ctx.words[RCX] & MASK32
    if ctx.msr_permission is not None and not ctx.msr_permission(index, False):
        raise MsrAccessNeeded(decoded, index, None)
    finish_rdmsr(ctx, decoded, read_msr(ctx, index))


def finish_rdmsr(ctx: Emulation, decoded: Decoded, value: int) -> None:
    """Complete RDMSR with *value*. Raises #DB as :class:`GuestFault` when it is single-stepped."""
    _write_edx_eax(ctx.words, value)
    complete(ctx, decoded)


def _wrmsr(ctx: Emulation, decoded: Decoded) -> None:
    words = ctx.words
    require_cpl0(words)
    index, value = words[RCX] & MASK32, (words[RDX] & MASK32) << 32 | words[RAX] & MASK32
    if ctx.msr_permission is not None and not ctx.msr_permission(index, True):
        raise MsrAccessNeeded(decoded, index, value)
    write_msr(ctx, index, value)
    complete(ctx, decoded)


def _rdtsc(ctx: Emulation, decoded: Decoded) -> None:
    _check_time_stamp_disable(ctx.words)
    _write_edx_eax(ctx.words, visible_tsc(ctx))
    complete(ctx, decoded)


def _rdtscp(ctx: Emulation, decoded: Decoded) -> None:
    _check_time_stamp_disable(ctx.words)
    _write_edx_eax(ctx.words, visible_tsc(ctx))
    ctx.words[RCX] = ctx.words[TSC_AUX] & MASK32
    complete(ctx, decoded)


def _check_time_stamp_disable(words: Words) -> None:
    if words[CR4] & CR4_TSD:
        require_cpl0(words)


def _rdpmc(ctx: Emulation, decoded: Decoded) -> None:
    """There is no performance counter, so no value of ECX is valid, whatever CR4.PCE says."""
    raise general_protection()


def _cpuid(ctx: Emulation, decoded: Decoded) -> None:
    words = ctx.words
    if ctx.msrs.cpuid_faulting:
        require_cpl0(words)
    words[RAX], words[RBX], words[RCX], words[RDX] = ctx.cpuid.lookup(
        words[RAX] & MASK32,
        words[RCX] & MASK32,
        osxsave=bool(words[CR4] & CR4_OSXSAVE),
        ospke=bool(words[CR4] & CR4_PKE),
        apic_enabled=bool(words[APIC_BASE] & APIC_BASE_ENABLE),
        xcr0=words[XCR0],
    )
    complete(ctx, decoded)


def _write_edx_eax(words: Words, value: int) -> None:
    words[RAX], words[RDX] = value & MASK32, value >> 32


#: The handlers of this module, by ``iced_x86.Mnemonic``.
HANDLERS: dict[int, Handler] = {
    Mnemonic.CLTS: _clts,
    Mnemonic.LMSW: _lmsw,
    Mnemonic.SMSW: _smsw,
    Mnemonic.RDMSR: _rdmsr,
    Mnemonic.WRMSR: _wrmsr,
    Mnemonic.RDTSC: _rdtsc,
    Mnemonic.RDTSCP: _rdtscp,
    Mnemonic.RDPMC: _rdpmc,
    Mnemonic.CPUID: _cpuid,
}

_SYSTEM_REGISTER_MOVES = (
    Code.MOV_CR_R32, Code.MOV_CR_R64, Code.MOV_R32_CR, Code.MOV_R64_CR,
    Code.MOV_DR_R32, Code.MOV_DR_R64, Code.MOV_R32_DR, Code.MOV_R64_DR,
)  # fmt: skip

#: The forms of MOV that belong here, by ``iced_x86.Code``.
BY_CODE: dict[int, Handler] = dict.fromkeys(_SYSTEM_REGISTER_MOVES, _mov)
