"""The debug console of Bochs and QEMU: writes are output, reading tells that it is there.

Guests expect it at port 0xe9, SeaBIOS at 0x402 (QEMU's ``-device isa-debugcon,iobase=0x402``).
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["DEBUG_CONSOLE_PORT", "SEABIOS_DEBUG_PORT", "DebugConsole"]

DEBUG_CONSOLE_PORT = 0xE9
SEABIOS_DEBUG_PORT = 0x402
#: What the port reads as, wherever it is, when there is a console behind it.
SIGNATURE = 0xE9

_BYTES = tuple(bytes((value,)) for value in range(256))


class DebugConsole:
    """One console at *port*. ``output`` is called with each byte."""

    register_size = 1
    __slots__ = ("_output", "ports")

    def __init__(self, output: Callable[[bytes], None], port: int = DEBUG_CONSOLE_PORT) -> None:
        self._output = output
        self.ports = (range(port, port + 1),)

    def reset(self) -> None:
        """Do nothing: there is no state."""

    def read_port(self, port: int, size: int) -> int:
        """Return the signature."""
        return SIGNATURE

    def write_port(self, port: int, size: int, value: int) -> None:
        """Output one byte."""
        self._output(_BYTES[value])
