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


def leave_instruction(context: int, number: int, return_address: int) -> None:
    """Go on in the event hook with event *number* (``EVENT_*``).

    *return_address* is where translated code called from, 0 where the guest's state is up to date already.
    """
    cpu = load64(context + 8 * CPU)
    set_exception_index(cpu, number)
    _loop_exit_restore(load64(context + 8 * FN_LOOP_EXIT_RESTORE), cpu, return_address)


def raise_fault(
    context: int, vector: int, error_code: int, address: int, flags: int, return_address: int
) -> None:
    """Raise an exception from within the instruction.

    *flags* describe the access (:mod:`lasskvm.lass`); with ``IMPLICIT`` the vector is final, whatever the instruction's
    own operands are. *return_address* is as for :func:`leave_instruction`.
    """
    store64(context + 8 * FAULT_VECTOR, vector)
    store64(context + 8 * FAULT_ERROR_CODE, error_code)
    store64(context + 8 * FAULT_ADDRESS, address)
    store64(context + 8 * FAULT_FLAGS, flags)
    leave_instruction(context, EVENT_MEMORY_FAULT, return_address)
