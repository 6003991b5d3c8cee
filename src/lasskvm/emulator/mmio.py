"""Memory-mapped I/O of emulated instructions: accesses to guest-physical addresses where no memory is.

A device on the VM's own bus answers at once. For anything else the VMM has to be asked, which an instruction cannot
wait for: a read ends it by :class:`MmioReadNeeded` with nothing changed, and once the answer is there the instruction
is executed again from its start, its reads answered from what they got the first time. Writes are collected and leave
when the instruction is complete. Both as in KVM (``emulator_read_write()``, ``vcpu_mmio_read()``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Mmio", "MmioReadNeeded", "MmioWrite"]

#: ``read(gpa, size)`` gives the value, or None when no device is there.
BusRead = Callable[[int, int], int | None]
#: ``write(gpa, size, value)`` tells whether a device has taken it.
BusWrite = Callable[[int, int, int], bool]


class MmioReadNeeded(Exception):
    """The instruction reads *size* bytes at *gpa*, and only the VMM can say what is there."""

    def __init__(self, gpa: int, size: int) -> None:
        self.gpa = gpa
        self.size = size
        super().__init__(f"MMIO read of {size} bytes at {gpa:#x}")


@dataclass(frozen=True, slots=True)
class MmioWrite:
    """A write for the VMM."""

    gpa: int
    size: int
    value: int


def _no_device_reads(gpa: int, size: int) -> int | None:
    return None


def _no_device_writes(gpa: int, size: int, value: int) -> bool:
    return False


class Mmio:
    """The memory-mapped I/O of the instruction in progress."""

    def __init__(self, read: BusRead = _no_device_reads, write: BusWrite = _no_device_writes) -> None:
        self._bus_read, self._bus_write = read, write
        self._answers: list[int] = []
        self._position = 0
        self.writes: list[MmioWrite] = []

    def begin(self) -> None:
        """An instruction begins, for the first time or once more: its reads start with the first answer."""
        self._position = 0

    def commit(self) -> None:
        """The instruction, or an element of a string instruction, is complete or has faulted: forget the answers."""
        self._answers.clear()
        self._position = 0

    def answer(self, value: int) -> None:
        """The VMM's answer to the last :class:`MmioReadNeeded`."""
        self._answers.append(value)

    def read(self, gpa: int, size: int) -> int:
        """Read 1 to 8 bytes at *gpa*; raises :class:`MmioReadNeeded`."""
        if self._position == len(self._answers):
            value = self._bus_read(gpa, size)
            if value is None:
                raise MmioReadNeeded(gpa, size)
            self._answers.append(value)
        value = self._answers[self._position]
        self._position += 1
        return value

    def write(self, gpa: int, size: int, value: int) -> None:
        """Write 1 to 8 bytes at *gpa*, now or when the instruction is complete."""
        if not self._bus_write(gpa, size, value):
            self.writes.append(MmioWrite(gpa, size, value))
