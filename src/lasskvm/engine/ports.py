"""Port I/O from running code: permission, coalesced console output, and the way to the devices' handlers.

What no handler claims leaves the instruction undone; the run loop turns it into an exit for the VMM.
"""

from typing import Any

from lasskvm.emulator.io_permission import check_port_access
from lasskvm.engine.context import (
    COALESCED_BUFFER,
    COALESCED_BYTES,
    COALESCED_COUNT,
    COALESCED_READ_PORT,
    COALESCED_READ_VALUE,
    COALESCED_WRITE_PORT,
    ENV,
    EVENT_PORT,
    FN_PORT_READ,
    FN_PORT_WRITE,
    LEAVE_PORTS,
    LEFT_TO_EMULATOR,
    MEMORY,
    PORT_CLAIMED,
    STATE,
)
from lasskvm.engine.leaving import leave_instruction, raise_fault
from lasskvm.engine.native import callback, foreign_function, load64, store8, store64
from lasskvm.engine.native import words_at as words
from lasskvm.engine.private import guest_cpl, guest_rflags
from lasskvm.lass import IMPLICIT
from lasskvm.state import STATE_WORDS
from lasskvm.x86.registers import MASK32

__all__ = ["on_port_read", "on_port_write"]

_port_read = foreign_function(64, 32, 32)
_port_write = foreign_function(64, 32, 32, 32)


@callback(32, 64, 32, 32, 64)
def on_port_read(uc, port, size, context):  # type: ignore[no-untyped-def]
    """IN and INS, once for each element."""
    return port_read(context, port & 0xFFFF, size & 7) & MASK32


@callback(0, 64, 32, 32, 32, 64)
def on_port_write(uc, port, size, value, context):  # type: ignore[no-untyped-def]
    """OUT and OUTS, once for each element."""
    port_write(context, port & 0xFFFF, size & 7, value & MASK32)


def port_read(context: int, port: int, size: int) -> int:
    """The body of :func:`on_port_read`: the value from the bus, or an exit that leaves the instruction undone."""
    _check_port(context, port, size)
    if size == 1 and port == load64(context + 8 * COALESCED_READ_PORT):
        return load64(context + 8 * COALESCED_READ_VALUE) | PORT_CLAIMED
    answer: int = _port_read(load64(context + 8 * FN_PORT_READ), port, size)
    if answer & PORT_CLAIMED == 0:
        leave_instruction(context, EVENT_PORT, 0)
    return answer


def port_write(context: int, port: int, size: int, value: int) -> None:
    """The body of :func:`on_port_write`."""
    _check_port(context, port, size)
    if size == 1 and port == load64(context + 8 * COALESCED_WRITE_PORT):
        count = load64(context + 8 * COALESCED_COUNT)
        if count < COALESCED_BYTES:
            store8(load64(context + 8 * COALESCED_BUFFER) + count, value)
            store64(context + 8 * COALESCED_COUNT, count + 1)
            return
    answer = _port_write(load64(context + 8 * FN_PORT_WRITE), port, size, value)
    if answer & PORT_CLAIMED == 0:
        leave_instruction(context, EVENT_PORT, 0)


def _check_port(context: int, port: int, size: int) -> None:
    """Raise the fault of an I/O access that IOPL and the TSS forbid, from within the instruction."""
    if load64(context + 8 * LEFT_TO_EMULATOR) & LEAVE_PORTS != 0:
        leave_instruction(context, EVENT_PORT, 0)
    env = load64(context + 8 * ENV)
    state = words(load64(context + 8 * STATE), STATE_WORDS)
    memory: Any = load64(context + 8 * MEMORY)
    vector, error_code, address = check_port_access(
        state, memory, port, size, guest_cpl(env), guest_rflags(env)
    )
    if vector != 0:
        raise_fault(context, vector, error_code, address, IMPLICIT, 0)
