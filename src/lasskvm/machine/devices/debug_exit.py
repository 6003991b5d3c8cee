"""The port a bare-metal guest ends its machine with: QEMU's isa-debug-exit, usually with iobase 0xf4 and iosize 4."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["DebugExit", "exit_status"]

PORT = 0xF4
PORT_COUNT = 4
#: The width of the register: kvm-unit-tests write it with a 32-bit OUT.
REGISTER_SIZE = 4
UNREADABLE = (1 << 8 * REGISTER_SIZE) - 1


def exit_status(value: int) -> int:
    """Return the exit status for a written value: always odd, so never mistaken for success.

    >>> exit_status(0), exit_status(0x10)
    (1, 33)
    """
    return value << 1 | 1


class DebugExit:
    """The port. ``end`` is called with the exit status; only its low eight bits reach a shell.

    *iobase* and *iosize* say which I/O ports it takes.
    """

    register_size = REGISTER_SIZE
    __slots__ = ("_end", "ports")

    def __init__(
        self, end: Callable[[int], None], iobase: int | None = None, iosize: int | None = None
    ) -> None:
        self._end = end
        first = PORT if iobase is None else iobase
        self.ports = (range(first, first + (iosize or PORT_COUNT)),)

    def reset(self) -> None:
        """Do nothing: there is no state."""

    def read_port(self, port: int, size: int) -> int:
        """Return all ones."""
        return UNREADABLE

    def write_port(self, port: int, size: int, value: int) -> None:
        """End the machine."""
        self._end(exit_status(value))
