"""How a machine's run ends."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["STATUS_CRASHED", "STATUS_TIMEOUT", "End", "Ending"]

#: Exit statuses, beside those that the guest chooses itself.
STATUS_CRASHED = 1
STATUS_TIMEOUT = 124


class End(Enum):
    """Why a machine stopped."""

    PROGRAM = "the program ended"
    DEBUG_EXIT = "the guest wrote to the debug-exit port"
    POWER_OFF = "the guest switched the machine off"
    RESET = "the guest asked for a reset"
    HALTED = "the guest halted with interrupts off"
    TRIPLE_FAULT = "the guest triple-faulted"
    INTERNAL_ERROR = "the guest executed something that cannot be executed"
    TIMEOUT = "the time limit was reached"
    STOPPED = "the run was stopped from the console"
    SAVED = "the machine was saved"


@dataclass(frozen=True)
class Ending:
    """How a machine stopped: *status* is the exit status for a shell, *detail* says more about errors."""

    end: End
    status: int
    detail: str = ""
