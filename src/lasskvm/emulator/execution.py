"""Executing one instruction exactly: fetch, compile, breakpoints, execution, single-stepping, events.

:func:`emulate_instruction` is KVM's ``x86_emulate_instruction()``: what exit handlers call, and what the interpreter
falls back to wherever a block at once would not be exact.
"""

from __future__ import annotations

from functools import lru_cache, partial

from lasskvm.emulator.completion import complete
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded, fetch_instruction
from lasskvm.emulator.events import Event, deliver_event
from lasskvm.emulator.faults import GuestFault, Unhandleable, debug_trap
from lasskvm.emulator.instructions import BY_CODE, HANDLERS, PLAIN, TRANSFERS
from lasskvm.emulator.operation import Handler, Operation
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.exceptions import DB
from lasskvm.x86.registers import DR6_BS

__all__ = ["compile_instruction", "emulate_instruction", "execute", "is_implemented"]

_COMPILED_INSTRUCTIONS = 1 << 15


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
    instruction = decoded.instruction
    handler = BY_CODE.get(instruction.code)
    mnemonic = instruction.mnemonic
    if handler is None and mnemonic in PLAIN:
        return Operation(decoded, PLAIN[mnemonic](decoded), is_plain=True)
    if handler is None and mnemonic in TRANSFERS:
        return Operation(decoded, TRANSFERS[mnemonic](decoded), is_plain=False)
    handler = handler or HANDLERS.get(mnemonic)
    if handler is None:
        raise Unhandleable(f'the instruction "{instruction}" is not implemented by the emulator')
    return Operation(decoded, partial(_call, handler, decoded), is_plain=False)


def _call(handler: Handler, decoded: Decoded, ctx: Emulation) -> None:
    handler(ctx, decoded)


def execute(ctx: Emulation, decoded: Decoded) -> None:
    """Execute *decoded*, the instruction at CS:RIP, and complete it.

    Raises :class:`GuestFault` when it faults or traps, :class:`Unhandleable` when there is nothing that executes it,
    and :class:`~lasskvm.emulator.mmio.MmioReadNeeded` or :class:`~lasskvm.emulator.port_io.PortAccessNeeded` when it
    has to wait for the VMM.
    """
    operation = compile_instruction(decoded, ctx.cpuid)
    ctx.mmio.begin()
    operation.run(ctx)
    if operation.is_plain:
        complete(ctx, decoded)


def emulate_instruction(ctx: Emulation) -> None:
    """Fetch, decode and execute the instruction at CS:RIP, and deliver the event it raises, if any.

    Data breakpoints that it has met are reported behind it. Raises :class:`TripleFault` and what :func:`execute` does,
    but for :class:`GuestFault`.
    """
    ctx.watch_hits = 0
    try:
        execute(ctx, fetch_instruction(ctx))
        if ctx.watch_hits:
            raise debug_trap(ctx.watch_hits)
    except GuestFault as fault:
        # Data breakpoints are traps: those of an instruction that faults are forgotten.
        dr6 = fault.dr6
        if fault.vector == DB and dr6 is not None and dr6 & DR6_BS:
            dr6 |= ctx.watch_hits
        deliver_event(
            ctx.words, ctx.memory, Event(fault.vector, error_code=fault.error_code, cr2=fault.cr2, dr6=dr6)
        )
    ctx.mmio.commit()
