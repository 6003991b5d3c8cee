"""The debug console of Bochs and QEMU (port 0xe9): writes are output, reading tells that it is there."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["DebugConsole"]

PORT = 0xE9
#: What the port reads as when there is a console behind it.
SIGNATURE = 0xE9

_BYTES = tuple(bytes((value,)) for value in range(256))


class DebugConsole:
    """The port. ``output`` is called with each byte."""

    ports = (range(PORT, PORT + 1),)
    register_size = 1
    __slots__ = ("_output",)

    def __init__(self, output: Callable[[bytes], None]) -> None:
        self._output = output

    def reset(self) -> None:
        """Do nothing: there is no state."""

    def read_port(self, port: int, size: int) -> int:
        """Return the signature."""
        return SIGNATURE

    def write_port(self, port: int, size: int, value: int) -> None:
        """Output one byte."""
        self._output(_BYTES[value])
