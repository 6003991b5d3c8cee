"""The reset control register of PC chipsets, port 0xcf9: what ACPI's reset register points to.

The port lies within the PCI configuration address register, which only answers 32-bit accesses at 0xcf8. This machine
has no PCI: that register and the data behind it are claimed here and read as all ones. So an access to the address is
not cut into bytes, the second of which would reset the machine, and who looks for all devices finds none in no time.

Source: Intel 82371SB (PIIX3) data sheet, "Reset Control Register".
"""

from __future__ import annotations

from collections.abc import Callable

from lasskvm.kvm.iobus import ALL_ONES, DeviceState

__all__ = ["RESET_CONTROL_PORT", "RESET_FULL", "ResetControl"]

RESET_CONTROL_PORT = 0xCF9
PCI_PORTS = range(0xCF8, 0xD00)
PCI_REGISTER_SIZE = 4

#: Whether a reset is a hard one; kept, and without effect here.
HARD = 1 << 1
RESET_PROCESSOR = 1 << 2
POWER_CYCLE = 1 << 3
#: What ACPI has an operating system write to restart the machine.
RESET_FULL = HARD | RESET_PROCESSOR | POWER_CYCLE


class ResetControl:
    """The register. ``reset_machine`` is called when the guest writes bit 2 as 1."""

    ports = (PCI_PORTS,)
    register_size = PCI_REGISTER_SIZE
    __slots__ = ("_reset_machine", "value")

    def __init__(self, reset_machine: Callable[[], None]) -> None:
        self._reset_machine = reset_machine
        self.reset()

    def reset(self) -> None:
        """Take RESET: the type of reset is forgotten."""
        self.value = 0

    def get_state(self) -> DeviceState:
        """The type of reset that is set."""
        return {"value": self.value}

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`."""
        self.value = int(state["value"])

    def read_port(self, port: int, size: int) -> int:
        """Return the type of reset; all ones from the other ports."""
        return self.value if port == RESET_CONTROL_PORT and size == 1 else ALL_ONES[size]

    def write_port(self, port: int, size: int, value: int) -> None:
        """Keep the type of reset, and reset the machine if asked to."""
        if port != RESET_CONTROL_PORT:
            return
        self.value = value & HARD
        if value & RESET_PROCESSOR:
            self._reset_machine()
