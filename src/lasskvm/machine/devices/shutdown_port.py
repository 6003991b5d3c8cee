"""The power-off port of Bochs: a guest that writes "Shutdown" to it, byte by byte, switches the machine off.

Source: Bochs user manual, "Features: power off".
"""

from __future__ import annotations

from collections.abc import Callable

from lasskvm.kvm.iobus import DeviceState

__all__ = ["ShutdownPort"]

PORT = 0x8900
WORD = b"Shutdown"
NOBODY = 0xFF


class ShutdownPort:
    """The port. ``power_off`` is called when the whole word has come."""

    ports = (range(PORT, PORT + 1),)
    register_size = 1
    __slots__ = ("_power_off", "matched")

    def __init__(self, power_off: Callable[[], None]) -> None:
        self._power_off = power_off
        self.reset()

    def reset(self) -> None:
        """Forget the letters that have come."""
        self.matched = 0

    def get_state(self) -> DeviceState:
        """How many letters have come."""
        return {"matched": self.matched}

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`."""
        matched = int(state["matched"])
        if not 0 <= matched < len(WORD):
            raise ValueError(f"{matched} letters of a word of {len(WORD)}")
        self.matched = matched

    def read_port(self, port: int, size: int) -> int:
        """Return all ones."""
        return NOBODY

    def write_port(self, port: int, size: int, value: int) -> None:
        """Take the next letter; a wrong one starts anew, and may itself be the first."""
        self.matched = self.matched + 1 if value == WORD[self.matched] else int(value == WORD[0])
        if self.matched == len(WORD):
            self.matched = 0
            self._power_off()
