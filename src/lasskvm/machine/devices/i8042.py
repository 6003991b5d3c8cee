"""Ports 0x60 and 0x64 of a PC without a keyboard controller: nobody is there, except for the reset line.

Reads give all ones, which makes Linux's i8042 driver leave at once. The command that pulses the controller's
reset output is obeyed none the less: it is how kernels restart a PC.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["I8042"]

DATA_PORT = 0x60
COMMAND_PORT = 0x64
NOBODY = 0xFF

#: Commands 0xF0 to 0xFF pulse the output lines whose bits are 0; line 0 is the processor's RESET.
PULSE_COMMANDS = 0xF0
PULSE_MASK = 0xF0
PULSE_NOT_RESET = 1 << 0


class I8042:
    """The reset line. ``reset_machine`` is called when the guest pulses it."""

    ports = (range(DATA_PORT, DATA_PORT + 1), range(COMMAND_PORT, COMMAND_PORT + 1))
    register_size = 1
    __slots__ = ("_reset_machine",)

    def __init__(self, reset_machine: Callable[[], None]) -> None:
        self._reset_machine = reset_machine

    def reset(self) -> None:
        """Do nothing: there is no state."""

    def read_port(self, port: int, size: int) -> int:
        """Return all ones."""
        return NOBODY

    def write_port(self, port: int, size: int, value: int) -> None:
        """Reset the machine on command 0xFE and its aliases; ignore the rest."""
        if port == COMMAND_PORT and value & PULSE_MASK == PULSE_COMMANDS and not value & PULSE_NOT_RESET:
            self._reset_machine()
