"""HLT, caches, MONITOR, INVLPG, BOUND, software interrupts and the fast system calls.

Source: Intel SDM volume 2, the instructions by name; KVM's ``kvm_emulate_halt()``, ``kvm_emulate_invlpg()``,
``kvm_emulate_mwait()``.
"""

from __future__ import annotations

from iced_x86 import Code, Mnemonic, Register

from lasskvm.emulator.accessors import memory_loader, operand_bytes, reader
from lasskvm.emulator.completion import complete, next_rip, require_cpl0, trap_if_single_stepping
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import load
from lasskvm.emulator.decode import SEGMENT_NUMBERS, Decoded
from lasskvm.emulator.events import Event, EventKind, deliver_event
from lasskvm.emulator.faults import DebugReport, GuestFault, general_protection, invalid_opcode
from lasskvm.emulator.modes import in_virtual_8086_mode
from lasskvm.emulator.operands import load_memory_operand, read_register
from lasskvm.emulator.operation import Builder, Executor, Handler
from lasskvm.emulator.syscalls import syscall64, sysenter, sysexit, sysret
from lasskvm.emulator.virtual_8086 import is_redirected
from lasskvm.state import CPL, RCX, RFLAGS, TLB_FLUSH
from lasskvm.x86.exceptions import BP, BR, DB, GP, OF
from lasskvm.x86.registers import (
    DS,
    MASK32,
    RFLAGS_IOPL,
    RFLAGS_OF,
)

__all__ = ["HANDLERS", "PLAIN"]

#: MWAIT's extension "treat interrupts as break events even if masked".
_MWAIT_INTERRUPT_BREAK = 1 << 0
#: MONITOR's implied address register, by address size.
_MONITOR_ADDRESSES: dict[int, int] = {
    Code.MONITORQ: Register.RAX,
    Code.MONITORD: Register.EAX,
    Code.MONITORW: Register.AX,
}


def _hlt(ctx: Emulation, decoded: Decoded) -> None:
    require_cpl0(ctx.words)
    # A single-step trap comes first: it would end the halt at once.
    complete(ctx, decoded)
    ctx.halted = True


def _invalidate_caches(ctx: Emulation, decoded: Decoded) -> None:
    """INVD, WBINVD and WBNOINVD: there are no caches to write back."""
    require_cpl0(ctx.words)
    complete(ctx, decoded)


def _invlpg(ctx: Emulation, decoded: Decoded) -> None:
    """The address is only named, so neither LASS nor the canonical rule applies. All translations go."""
    require_cpl0(ctx.words)
    ctx.words[TLB_FLUSH] = 1
    complete(ctx, decoded)


def _flush_cache_line(ctx: Emulation, decoded: Decoded) -> None:
    """CLFLUSH, CLFLUSHOPT and CLWB are data reads of one byte, to paging as well as to LASS."""
    load_memory_operand(ctx, decoded, 1)
    complete(ctx, decoded)


def _monitor(ctx: Emulation, decoded: Decoded) -> None:
    """MONITOR reads one byte at DS:RAX, or through the overriding segment; what it arms nobody triggers."""
    words, instruction = ctx.words, decoded.instruction
    if words[CPL]:
        raise invalid_opcode()
    if words[RCX] & MASK32:
        raise general_protection()
    segment = SEGMENT_NUMBERS.get(instruction.segment_prefix, DS)
    load(ctx, segment, read_register(words, _MONITOR_ADDRESSES[instruction.code]), 1)
    complete(ctx, decoded)


def _mwait(ctx: Emulation, decoded: Decoded) -> None:
    """MWAIT may return at any time, and does so at once."""
    words = ctx.words
    if words[CPL]:
        raise invalid_opcode()
    if words[RCX] & MASK32 & ~_MWAIT_INTERRUPT_BREAK:
        raise general_protection()
    complete(ctx, decoded)


def _int(ctx: Emulation, decoded: Decoded) -> None:
    """INT n. In virtual-8086 mode it needs IOPL 3, unless it goes to the program itself."""
    words, vector = ctx.words, decoded.instruction.immediate8
    needs_iopl = in_virtual_8086_mode(words) and not is_redirected(words, ctx.memory, vector)
    if needs_iopl and words[RFLAGS] & RFLAGS_IOPL != RFLAGS_IOPL:
        raise general_protection()
    _deliver_software_event(ctx, decoded, vector, EventKind.SOFTWARE)


def _int3(ctx: Emulation, decoded: Decoded) -> None:
    if ctx.debugger is not None and ctx.debugger.reports_int3:
        raise DebugReport(BP)
    _deliver_software_event(ctx, decoded, BP, EventKind.SOFTWARE_EXCEPTION)


def _into(ctx: Emulation, decoded: Decoded) -> None:
    if ctx.words[RFLAGS] & RFLAGS_OF:
        _deliver_software_event(ctx, decoded, OF, EventKind.SOFTWARE_EXCEPTION)
    else:
        complete(ctx, decoded)


def _int1(ctx: Emulation, decoded: Decoded) -> None:
    """INT1 delivers #DB without the gate's DPL check, and leaves DR6 alone."""
    _deliver_software_event(ctx, decoded, DB, EventKind.EXCEPTION)


def _bound(decoded: Decoded) -> Executor:
    """BOUND: #BR when the signed index lies outside the two bounds in memory. Not in 64-bit mode."""
    size = operand_bytes(decoded, 0)
    index_of, load_bounds = reader(decoded, 0), memory_loader(decoded, 2 * size)
    bits = 8 * size
    sign, mask = 1 << bits - 1, (1 << bits) - 1

    def execute(ctx: Emulation) -> None:
        bounds = load_bounds(ctx)
        # Flipping the sign bits turns the signed comparison into an unsigned one.
        index, lower, upper = index_of(ctx) ^ sign, bounds & mask ^ sign, bounds >> bits ^ sign
        if not lower <= index <= upper:
            raise GuestFault(BR)

    return execute


def _deliver_software_event(ctx: Emulation, decoded: Decoded, vector: int, kind: EventKind) -> None:
    event = Event(vector, kind, return_rip=next_rip(ctx.words, decoded))
    deliver_event(ctx.words, ctx.memory, event, ctx.non_root)


def _syscall(ctx: Emulation, decoded: Decoded) -> None:
    _raise_vector(syscall64(ctx.words, decoded.length))
    # Unless SFMASK clears TF, the trap comes before the first instruction of the handler.
    trap_if_single_stepping(ctx.words)


def _sysenter(ctx: Emulation, decoded: Decoded) -> None:
    _raise_vector(sysenter(ctx.words))
    # SYSENTER leaves TF alone, so a single-stepped one traps in the kernel.
    trap_if_single_stepping(ctx.words)


def _sysret(ctx: Emulation, decoded: Decoded) -> None:
    _raise_vector(sysret(ctx.words, int(decoded.instruction.mnemonic == Mnemonic.SYSRETQ)))


def _sysexit(ctx: Emulation, decoded: Decoded) -> None:
    _raise_vector(sysexit(ctx.words, int(decoded.instruction.mnemonic == Mnemonic.SYSEXITQ)))


def _raise_vector(vector: int) -> None:
    if vector:
        raise GuestFault(vector, 0 if vector == GP else None)


#: The handlers of this module, by ``iced_x86.Mnemonic``.
HANDLERS: dict[int, Handler] = {
    Mnemonic.HLT: _hlt,
    Mnemonic.INVD: _invalidate_caches,
    Mnemonic.WBINVD: _invalidate_caches,
    Mnemonic.WBNOINVD: _invalidate_caches,
    Mnemonic.INVLPG: _invlpg,
    Mnemonic.CLFLUSH: _flush_cache_line,
    Mnemonic.CLFLUSHOPT: _flush_cache_line,
    Mnemonic.CLWB: _flush_cache_line,
    Mnemonic.MONITOR: _monitor,
    Mnemonic.MWAIT: _mwait,
    Mnemonic.INT: _int,
    Mnemonic.INT3: _int3,
    Mnemonic.INTO: _into,
    Mnemonic.INT1: _int1,
    Mnemonic.SYSCALL: _syscall,
    Mnemonic.SYSENTER: _sysenter,
    Mnemonic.SYSRET: _sysret,
    Mnemonic.SYSRETQ: _sysret,
    Mnemonic.SYSEXIT: _sysexit,
    Mnemonic.SYSEXITQ: _sysexit,
}

#: Plain instructions, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {Mnemonic.BOUND: _bound}
