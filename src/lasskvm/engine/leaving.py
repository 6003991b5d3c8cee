"""Ways out of running guest code, for native callbacks: end the run, or leave the instruction that called.

A callback that leaves its instruction does not return: the translator unwinds to its main loop and calls the event
hook, where RIP is that of the instruction and nothing of it has happened.
"""

from lasskvm.engine.context import (
    COUNT_EXITS,
    CPU,
    EVENT_MEMORY_FAULT,
    EXIT_ADDRESS,
    EXIT_ERROR_CODE,
    EXIT_FLAGS,
    EXIT_REASON,
    EXIT_VECTOR,
    FAULT_ADDRESS,
    FAULT_ERROR_CODE,
    FAULT_FLAGS,
    FAULT_VECTOR,
    FN_EMU_STOP,
    FN_LOOP_EXIT_RESTORE,
)
from lasskvm.engine.native import foreign_function, load64, store64
from lasskvm.engine.private import set_exception_index
from lasskvm.lass import IMPLICIT

__all__ = ["end_run", "leave_instruction", "raise_fault", "stop"]

_emu_stop = foreign_function(32, 64)
_loop_exit_restore = foreign_function(0, 64, 64)


def end_run(context: int, reason: int, vector: int, error_code: int, address: int, flags: int) -> None:
    """Leave ``uc_emu_start`` behind the current block, with this exit record (``EXIT_*``)."""
    store64(context + 8 * COUNT_EXITS, load64(context + 8 * COUNT_EXITS) + 1)
    store64(context + 8 * EXIT_REASON, reason)
    store64(context + 8 * EXIT_VECTOR, vector)
    store64(context + 8 * EXIT_ERROR_CODE, error_code)
    store64(context + 8 * EXIT_ADDRESS, address)
    store64(context + 8 * EXIT_FLAGS, flags)
    stop(context)


def stop(context: int) -> None:
    """Leave ``uc_emu_start`` behind the current block."""
    _emu_stop(load64(context + 8 * FN_EMU_STOP), load64(context))


def leave_instruction(context: int, number: int) -> None:
    """Go on in the event hook with event *number* (``EVENT_*``)."""
    cpu = load64(context + 8 * CPU)
    set_exception_index(cpu, number)
    _loop_exit_restore(load64(context + 8 * FN_LOOP_EXIT_RESTORE), cpu, 0)


def raise_fault(context: int, vector: int, error_code: int, address: int) -> None:
    """Raise an exception that is no matter of the instruction's own operands: its vector is not reclassified."""
    store64(context + 8 * FAULT_VECTOR, vector)
    store64(context + 8 * FAULT_ERROR_CODE, error_code)
    store64(context + 8 * FAULT_ADDRESS, address)
    store64(context + 8 * FAULT_FLAGS, IMPLICIT)
    leave_instruction(context, EVENT_MEMORY_FAULT)
