"""HLT, caches, MONITOR, INVLPG, software interrupts and the fast system calls.

Each function is a :data:`~lasskvm.emulator.completion.Handler`.

Source: Intel SDM volume 2, the instructions by name; KVM's ``kvm_emulate_halt()``, ``kvm_emulate_invlpg()``,
``kvm_emulate_mwait()``.
"""

from __future__ import annotations

from iced_x86 import Code, Mnemonic, Register

from lasskvm.emulator.completion import Handler, complete, next_rip, require_cpl0, trap_if_single_stepping
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import load
from lasskvm.emulator.decode import SEGMENT_NUMBERS, Decoded
from lasskvm.emulator.events import Event, EventKind, deliver_event
from lasskvm.emulator.faults import GuestFault, Unhandleable, general_protection, invalid_opcode
from lasskvm.emulator.modes import in_virtual_8086_mode
from lasskvm.emulator.operands import load_memory_operand, read_register
from lasskvm.emulator.syscalls import syscall64, sysenter, sysexit, sysret
from lasskvm.state import CPL, CR4, RCX, RFLAGS, TLB_FLUSH
from lasskvm.x86.exceptions import BP, DB, GP, OF
from lasskvm.x86.registers import (
    CR4_VME,
    DS,
    MASK32,
    RFLAGS_IOPL,
    RFLAGS_OF,
)

__all__ = ["HANDLERS"]

#: MWAIT's extension "treat interrupts as break events even if masked".
_MWAIT_INTERRUPT_BREAK = 1 << 0
#: MONITOR's implied address register, by address size.
_MONITOR_ADDRESSES: dict[int, int] = {
    Code.MONITORQ: Register.RAX,
    Code.MONITORD: Register.EAX,
    Code.MONITORW: Register.AX,
}
_CACHE_LINE_FEATURES = {
    Mnemonic.CLFLUSH: "clflush",
    Mnemonic.CLFLUSHOPT: "clflushopt",
    Mnemonic.CLWB: "clwb",
}


def _hlt(ctx: Emulation, decoded: Decoded) -> None:
    require_cpl0(ctx.words)
    # A single-step trap comes first: it would end the halt at once.
    complete(ctx, decoded)
    ctx.halted = True


def _invalidate_caches(ctx: Emulation, decoded: Decoded) -> None:
    """INVD and WBINVD: there are no caches to write back."""
    require_cpl0(ctx.words)
    complete(ctx, decoded)


def _invlpg(ctx: Emulation, decoded: Decoded) -> None:
    """The address is only named, so neither LASS nor the canonical rule applies. All translations go."""
    require_cpl0(ctx.words)
    ctx.words[TLB_FLUSH] = 1
    complete(ctx, decoded)


def _flush_cache_line(ctx: Emulation, decoded: Decoded) -> None:
    """CLFLUSH, CLFLUSHOPT and CLWB are data reads of one byte, to paging as well as to LASS."""
    if not ctx.cpuid.has(_CACHE_LINE_FEATURES[decoded.instruction.mnemonic]):
        raise invalid_opcode()
    load_memory_operand(ctx, decoded, 1)
    complete(ctx, decoded)


def _monitor(ctx: Emulation, decoded: Decoded) -> None:
    """MONITOR reads one byte at DS:RAX, or through the overriding segment; what it arms nobody triggers."""
    words, instruction = ctx.words, decoded.instruction
    if words[CPL] or not ctx.cpuid.has("monitor"):
        raise invalid_opcode()
    if words[RCX] & MASK32:
        raise general_protection()
    segment = SEGMENT_NUMBERS.get(instruction.segment_prefix, DS)
    load(ctx, segment, read_register(words, _MONITOR_ADDRESSES[instruction.code]), 1)
    complete(ctx, decoded)


def _mwait(ctx: Emulation, decoded: Decoded) -> None:
    """MWAIT may return at any time, and does so at once."""
    words = ctx.words
    if words[CPL] or not ctx.cpuid.has("monitor"):
        raise invalid_opcode()
    if words[RCX] & MASK32 & ~_MWAIT_INTERRUPT_BREAK:
        raise general_protection()
    complete(ctx, decoded)


def _int(ctx: Emulation, decoded: Decoded) -> None:
    """INT n. In virtual-8086 mode it needs IOPL 3 (SDM volume 3A, 21.2.5)."""
    words = ctx.words
    if in_virtual_8086_mode(words) and words[RFLAGS] & RFLAGS_IOPL != RFLAGS_IOPL:
        if words[CR4] & CR4_VME:
            raise Unhandleable("INT n with CR4.VME: interrupt redirection is not implemented")
        raise general_protection()
    _deliver_software_event(ctx, decoded, decoded.instruction.immediate8, EventKind.SOFTWARE)


def _int3(ctx: Emulation, decoded: Decoded) -> None:
    _deliver_software_event(ctx, decoded, BP, EventKind.SOFTWARE)


def _into(ctx: Emulation, decoded: Decoded) -> None:
    if ctx.words[RFLAGS] & RFLAGS_OF:
        _deliver_software_event(ctx, decoded, OF, EventKind.SOFTWARE)
    else:
        complete(ctx, decoded)


def _int1(ctx: Emulation, decoded: Decoded) -> None:
    """INT1 delivers #DB without the gate's DPL check, and leaves DR6 alone."""
    _deliver_software_event(ctx, decoded, DB, EventKind.EXCEPTION)


def _deliver_software_event(ctx: Emulation, decoded: Decoded, vector: int, kind: EventKind) -> None:
    event = Event(vector, kind, return_rip=next_rip(ctx.words, decoded))
    deliver_event(ctx.words, ctx.memory, event)


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
