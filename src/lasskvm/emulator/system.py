"""The instructions that exit from direct execution, as one table, and the way to execute one of them.

:data:`HANDLERS` maps ``iced_x86.Mnemonic`` to a handler; a fuller emulator adds to it.
"""

from __future__ import annotations

from lasskvm.emulator import system_control, system_registers, system_tables
from lasskvm.emulator.completion import Handler
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded, fetch_instruction
from lasskvm.emulator.events import Event, deliver_event
from lasskvm.emulator.faults import GuestFault, Unhandleable

__all__ = ["HANDLERS", "emulate_instruction", "execute"]

#: Every instruction that can be executed on the state words.
HANDLERS: dict[int, Handler] = {
    **system_registers.HANDLERS,
    **system_tables.HANDLERS,
    **system_control.HANDLERS,
}


def execute(ctx: Emulation, decoded: Decoded) -> None:
    """Execute *decoded*, the instruction at CS:RIP.

    Raises :class:`GuestFault` when it faults or traps, and :class:`Unhandleable` when there is no handler for
    it.
    """
    handler = HANDLERS.get(decoded.instruction.mnemonic)
    if handler is None:
        raise Unhandleable(f'the instruction "{decoded.instruction}" is not implemented by the emulator')
    handler(ctx, decoded)


def emulate_instruction(ctx: Emulation) -> None:
    """Fetch, decode and execute the instruction at CS:RIP, and deliver the event it raises, if any.

    KVM's ``x86_emulate_instruction()``. Raises :class:`TripleFault` and :class:`Unhandleable`.
    """
    try:
        execute(ctx, fetch_instruction(ctx))
    except GuestFault as fault:
        deliver_event(ctx.words, ctx.memory, Event.of_fault(fault))
