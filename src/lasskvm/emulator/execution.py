"""Executing one instruction exactly: fetch, compile, breakpoints, execution, single-stepping, events.

:func:`emulate_instruction` is KVM's ``x86_emulate_instruction()``: what exit handlers call. :func:`step` is the same
for a guest that is interpreted as a whole, whose instruction breakpoints nobody else looks at.
"""

from __future__ import annotations

from functools import lru_cache, partial

from lasskvm.emulator.completion import complete
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded, fetch_instruction
from lasskvm.emulator.events import Event, deliver_event
from lasskvm.emulator.faults import GuestFault, Unhandleable, debug_trap, invalid_opcode
from lasskvm.emulator.instructions import BY_CODE, HANDLERS, PLAIN, TRANSFERS
from lasskvm.emulator.linearize import linear_address
from lasskvm.emulator.mmu import load_linear
from lasskvm.emulator.modes import instruction_pointer_mask
from lasskvm.emulator.offered import as_offered, is_offered
from lasskvm.emulator.operation import Handler, Operation
from lasskvm.emulator.watch import instruction_hit
from lasskvm.lass import FETCH
from lasskvm.state import CPL, DR7, INTERRUPT_SHADOW, RFLAGS, RIP
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.exceptions import DB, UD
from lasskvm.x86.registers import CS, DR6_BS, RFLAGS_RF

__all__ = [
    "compile_instruction",
    "deliver_breakpoint",
    "deliver_fault",
    "emulate_instruction",
    "execute",
    "is_implemented",
    "resume_instruction",
    "skip_forced_emulation_prefix",
    "step",
]

_COMPILED_INSTRUCTIONS = 1 << 15
_DR7_ENABLED = 0xFF
#: UD2, then the letters "kvm" (KVM's ``KVM_FEP``).
_FORCED_EMULATION_PREFIX = b"\x0f\x0bkvm"


def is_implemented(decoded: Decoded) -> bool:
    """Whether there is anything that executes *decoded*."""
    instruction = decoded.instruction
    mnemonic = instruction.mnemonic
    return instruction.code in BY_CODE or mnemonic in HANDLERS or mnemonic in PLAIN or mnemonic in TRANSFERS


@lru_cache(maxsize=_COMPILED_INSTRUCTIONS)
def compile_instruction(decoded: Decoded, cpuid: CpuidTable) -> Operation:
    """The operation that executes *decoded* on a processor with *cpuid*.

    An instruction that this processor does not have becomes one that raises #UD. Raises :class:`Unhandleable` for what
    is not implemented.
    """
    decoded = as_offered(decoded, cpuid)
    if not is_offered(decoded, cpuid):
        return Operation(decoded, _raise_invalid_opcode, is_plain=False)
    instruction = decoded.instruction
    handler = BY_CODE.get(instruction.code)
    mnemonic = instruction.mnemonic
    if handler is None and mnemonic in PLAIN:
        return Operation(decoded, PLAIN[mnemonic](decoded), is_plain=True)
    if handler is None and mnemonic in TRANSFERS:
        return Operation(decoded, TRANSFERS[mnemonic](decoded), is_plain=False, is_near=True)
    handler = handler or HANDLERS.get(mnemonic)
    if handler is None:
        raise Unhandleable(f'the instruction "{instruction}" is not implemented by the emulator')
    return Operation(decoded, partial(_call, handler, decoded), is_plain=False)


def _raise_invalid_opcode(ctx: Emulation) -> None:
    raise invalid_opcode()


def _call(handler: Handler, decoded: Decoded, ctx: Emulation) -> None:
    handler(ctx, decoded)


def execute(ctx: Emulation, decoded: Decoded) -> None:
    """Execute *decoded*, the instruction at CS:RIP, and complete it.

    Raises :class:`GuestFault` when it faults or traps, :class:`Unhandleable` when there is nothing that executes it,
    and :class:`~lasskvm.emulator.mmio.MmioReadNeeded` or :class:`~lasskvm.emulator.port_io.PortAccessNeeded` when it
    has to wait for the VMM. In a nested guest VM exits are raised, too.
    """
    ctx.mmio.begin()
    if ctx.non_root is not None and ctx.non_root.is_sensitive(decoded):
        ctx.non_root.before_instruction(ctx, decoded)
    operation = compile_instruction(decoded, ctx.cpuid)
    ctx.watch_hits = 0
    operation.run(ctx)
    if operation.is_plain:
        complete(ctx, decoded)
    ctx.mmio.commit()


def emulate_instruction(ctx: Emulation) -> None:
    """Fetch, decode and execute the instruction at CS:RIP, and deliver the event it raises, if any.

    Data breakpoints that it has met are reported behind it. Raises :class:`TripleFault` and what :func:`execute` does,
    but for :class:`GuestFault`.
    """
    try:
        ctx.decoded = None
        ctx.decoded = fetch_instruction(ctx)
        _execute_and_trap(ctx, ctx.decoded)
    except GuestFault as fault:
        deliver_fault(ctx, fault)


def resume_instruction(ctx: Emulation) -> None:
    """Execute the instruction at CS:RIP once more, now that the VMM has answered what it waited for.

    It is not fetched again, so what has been answered belongs to it (KVM's ``EMULTYPE_NO_DECODE``).
    """
    if ctx.decoded is None:
        emulate_instruction(ctx)
        return
    try:
        _execute_and_trap(ctx, ctx.decoded)
    except GuestFault as fault:
        deliver_fault(ctx, fault)


def _execute_and_trap(ctx: Emulation, decoded: Decoded) -> None:
    execute(ctx, decoded)
    if ctx.watch_hits:
        raise debug_trap(ctx.watch_hits)


def step(ctx: Emulation) -> None:
    """:func:`emulate_instruction`, behind the instruction breakpoints."""
    if not deliver_breakpoint(ctx):
        emulate_instruction(ctx)


def deliver_breakpoint(ctx: Emulation) -> bool:
    """Deliver the #DB of an instruction breakpoint at CS:RIP; it comes before the fetch. Whether there is one."""
    words = ctx.words
    if not words[DR7] & _DR7_ENABLED or words[RFLAGS] & RFLAGS_RF or words[INTERRUPT_SHADOW]:
        return False
    hits = instruction_hit(words, linear_address(words, CS, words[RIP]))
    if hits:
        deliver_fault(ctx, debug_trap(hits))
    return bool(hits)


def deliver_fault(ctx: Emulation, fault: GuestFault) -> None:
    """Give *fault* of the instruction in progress to the guest, or go on behind a forced emulation prefix.

    Raises :class:`~lasskvm.emulator.faults.DebugReport` when it is the VMM's.
    """
    ctx.mmio.commit()
    if fault.vector == UD and skip_forced_emulation_prefix(ctx):
        return
    dr6 = fault.dr6
    if fault.vector == DB and dr6 is not None and dr6 & DR6_BS:
        # Data breakpoints are traps: they count when the instruction has been completed.
        dr6 |= ctx.watch_hits
    if fault.vector == DB and dr6 is not None and ctx.debugger is not None:
        dr6 = ctx.debugger.filter_debug_trap(dr6)
    ctx.halted = False
    event = Event(fault.vector, error_code=fault.error_code, cr2=fault.cr2, dr6=dr6)
    deliver_event(ctx.words, ctx.memory, event, ctx.non_root)


def skip_forced_emulation_prefix(ctx: Emulation) -> bool:
    """Step over the forced emulation prefix at RIP, if that is what has raised #UD, and if the VM allows it.

    KVM's ``handle_ud()``: the instruction behind the prefix is to be emulated, with RIP on it.
    """
    if not ctx.forced_emulation:
        return False
    words = ctx.words
    prefix = ctx.prefetched[: len(_FORCED_EMULATION_PREFIX)] or _bytes_at_rip(
        ctx, len(_FORCED_EMULATION_PREFIX)
    )
    if prefix != _FORCED_EMULATION_PREFIX:
        return False
    words[RIP] = words[RIP] + len(prefix) & instruction_pointer_mask(words)
    ctx.prefetched = ctx.prefetched[len(prefix) :]
    return True


def _bytes_at_rip(ctx: Emulation, size: int) -> bytes:
    """*size* bytes at CS:RIP; none when they cannot be fetched."""
    words = ctx.words
    address = linear_address(words, CS, words[RIP])
    value, vector, *_ = load_linear(words, ctx.memory, address, size, FETCH, words[CPL], words[RFLAGS])
    return b"" if vector else value.to_bytes(size, "little")
