"""System control port A (0x92): fast reset and the A20 gate.

The gate bit can be written and read back; address line 20 is always on, as KVM has it.

Source: IBM PS/2 hardware interface technical reference.
"""

from __future__ import annotations

from collections.abc import Callable

from lasskvm.kvm.iobus import DeviceState

__all__ = ["Port92"]

PORT = 0x92
FAST_RESET = 1 << 0
A20_GATE = 1 << 1


class Port92:
    """The port. ``reset_machine`` is called when bit 0 goes from 0 to 1."""

    ports = (range(PORT, PORT + 1),)
    register_size = 1
    __slots__ = ("_reset_machine", "value")

    def __init__(self, reset_machine: Callable[[], None]) -> None:
        self._reset_machine = reset_machine
        self.reset()

    def reset(self) -> None:
        """Open the A20 gate, as firmware leaves it."""
        self.value = A20_GATE

    def get_state(self) -> DeviceState:
        """What was written last."""
        return {"value": self.value}

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`."""
        self.value = int(state["value"])

    def read_port(self, port: int, size: int) -> int:
        """Return what was written last."""
        return self.value

    def write_port(self, port: int, size: int, value: int) -> None:
        """Store the bits; reset the machine on a rising bit 0."""
        rises = value & ~self.value & FAST_RESET
        self.value = value
        if rises:
            self._reset_machine()
