"""The port through which a guest's /init hands over the exit status of the program that it ran.

The debug-exit port cannot: its encoding has no even status.
"""

from __future__ import annotations

from collections.abc import Callable

from lasskvm.machine.boot.linux import PROGRAM_STATUS_PORT

__all__ = ["ProgramStatus"]


class ProgramStatus:
    """The port. ``end`` is called with the status."""

    ports = (range(PROGRAM_STATUS_PORT, PROGRAM_STATUS_PORT + 1),)
    register_size = 1
    __slots__ = ("_end",)

    def __init__(self, end: Callable[[int], None]) -> None:
        self._end = end

    def reset(self) -> None:
        """Do nothing: there is no state."""

    def read_port(self, port: int, size: int) -> int:
        """Return all ones."""
        return 0xFF

    def write_port(self, port: int, size: int, value: int) -> None:
        """End the machine."""
        self._end(value)
