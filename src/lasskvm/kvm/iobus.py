"""The buses that emulated devices sit on: the in-process counterpart of KVM's ``kvm_io_bus``.

A device declares its ports (or its MMIO range) and gets the accesses that hit them. What nobody claims is
reported to the caller, who turns it into an ``IoExit`` or ``MmioExit``. Devices signal through an
:data:`IrqLine`.

Port accesses wider than a device's registers are cut into pieces as an ISA bus does: a 16-bit OUT to a byte
register writes the register at the next port, too. MMIO accesses reach the device as they are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from lasskvm.errors import LassKvmError

__all__ = [
    "ALL_ONES",
    "DeviceState",
    "IrqLine",
    "MmioBus",
    "MmioDevice",
    "PortBus",
    "PortDevice",
    "StatefulDevice",
]

#: An interrupt request line: called with ``True`` to raise it, ``False`` to lower it.
IrqLine = Callable[[bool], None]

#: What a device is in the middle of, for snapshots: names and values that JSON can hold.
DeviceState = dict[str, Any]

#: All-ones values by access size in bytes: the mask of an access, and what a bus reads where nothing answers.
ALL_ONES = {size: (1 << 8 * size) - 1 for size in (1, 2, 4, 8)}

_BYTE_MASK = 0xFF


class PortDevice(Protocol):
    """A device in I/O space."""

    @property
    def ports(self) -> tuple[range, ...]:
        """The ports the device answers."""

    @property
    def register_size(self) -> int:
        """The widest access, in bytes, that the device takes in one piece: 1, 2 or 4."""

    def read_port(self, port: int, size: int) -> int:
        """Return what IN reads from ``port``; ``size`` is at most ``register_size``."""

    def write_port(self, port: int, size: int, value: int) -> None:
        """Take what OUT writes to ``port``; ``value`` has no bits above ``size`` bytes."""

    def reset(self) -> None:
        """Go back to the state behind the RESET pin."""


@runtime_checkable
class StatefulDevice(Protocol):
    """What a device has beside the protocol of its bus when it has state to be saved; without, it has none."""

    def get_state(self) -> DeviceState:
        """Everything that a device made anew needs to go on as this one would."""

    def set_state(self, state: DeviceState) -> None:
        """Go on as the device that *state* comes from.

        The interrupt line is left alone: its level belongs to the state of the interrupt controller, too. Timers are
        set for the same time of the clock. Raises KeyError, TypeError or ValueError for what is no such state.
        """


class MmioDevice(Protocol):
    """A device in guest-physical memory space."""

    @property
    def base(self) -> int:
        """The guest-physical address of its first byte."""

    @property
    def size(self) -> int:
        """The length of its range in bytes."""

    def read_mmio(self, gpa: int, size: int) -> int:
        """Return what a load of ``size`` bytes at ``gpa`` reads: 1, 2, 4 or 8, or fewer at the end of a page."""

    def write_mmio(self, gpa: int, size: int, value: int) -> None:
        """Take a store of ``size`` bytes at ``gpa``; ``value`` has no bits above them."""


class PortBus:
    """The I/O space of one VM. One dictionary look-up finds the device of a byte access."""

    def __init__(self) -> None:
        self._owners: dict[int, PortDevice] = {}
        self._readers: dict[int, Callable[[int, int], int]] = {}
        self._writers: dict[int, Callable[[int, int, int], None]] = {}

    def check(self, device: PortDevice) -> None:
        """Raise :class:`LassKvmError` if one of the device's ports is taken."""
        for span in device.ports:
            for port in span:
                if port in self._owners:
                    raise LassKvmError(
                        f"I/O port {port:#x} is already used by {type(self._owners[port]).__name__}: give "
                        f"{type(device).__name__} another base port, or leave one of the two out."
                    )

    def register(self, device: PortDevice) -> None:
        """Put a device on the bus. Raises :class:`LassKvmError` if one of its ports is taken."""
        self.check(device)
        reader, writer = device.read_port, device.write_port
        for span in device.ports:
            for port in span:
                self._owners[port] = device
                self._readers[port] = reader
                self._writers[port] = writer

    def unregister(self, device: PortDevice) -> None:
        """Take a device off the bus. Does nothing if it is not on it."""
        for port in [port for port, owner in self._owners.items() if owner is device]:
            del self._owners[port], self._readers[port], self._writers[port]

    def read(self, port: int, size: int) -> int | None:
        """IN of 1, 2 or 4 bytes. Returns ``None`` when no device claims any byte of it."""
        if size == 1:
            reader = self._readers.get(port)
            return None if reader is None else reader(port, 1) & _BYTE_MASK
        return self._read_wide(port, size)

    def write(self, port: int, size: int, value: int) -> bool:
        """OUT of 1, 2 or 4 bytes. Returns ``False`` when no device claims any byte of it."""
        if size == 1:
            writer = self._writers.get(port)
            if writer is None:
                return False
            writer(port, 1, value & _BYTE_MASK)
            return True
        return self._write_wide(port, size, value)

    def _pieces(self, port: int, size: int) -> list[tuple[int, int]]:
        """Cut an access into (offset, size) pieces of one device each; leave out what nobody claims."""
        pieces = []
        offset = 0
        while offset < size:
            owner = self._owners.get(port + offset)
            piece = 1
            if owner is not None:
                piece = owner.register_size
                while piece > size - offset or self._owners.get(port + offset + piece - 1) is not owner:
                    piece >>= 1
                pieces.append((offset, piece))
            offset += piece
        return pieces

    def _read_wide(self, port: int, size: int) -> int | None:
        pieces = self._pieces(port, size)
        if not pieces:
            return None
        value = ALL_ONES[size]
        for offset, piece in pieces:
            part = self._readers[port + offset](port + offset, piece) & ALL_ONES[piece]
            value = value & ~(ALL_ONES[piece] << 8 * offset) | part << 8 * offset
        return value

    def _write_wide(self, port: int, size: int, value: int) -> bool:
        pieces = self._pieces(port, size)
        for offset, piece in pieces:
            self._writers[port + offset](port + offset, piece, value >> 8 * offset & ALL_ONES[piece])
        return bool(pieces)


class MmioBus:
    """The MMIO ranges of one VM, kept in ascending order."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._devices: list[MmioDevice] = []

    def register(self, device: MmioDevice) -> None:
        """Put a device on the bus. Raises :class:`LassKvmError` if its range overlaps another's."""
        position = bisect_right(self._bases, device.base)
        for other in self._devices[max(0, position - 1) : position + 1]:
            if device.base < other.base + other.size and other.base < device.base + device.size:
                raise LassKvmError(
                    f"The MMIO range {device.base:#x}..{device.base + device.size - 1:#x} of "
                    f"{type(device).__name__} overlaps {type(other).__name__} at {other.base:#x}: move one."
                )
        self._bases.insert(position, device.base)
        self._devices.insert(position, device)

    def unregister(self, device: MmioDevice) -> None:
        """Take a device off the bus, if it is on it. Call this before the device's base changes."""
        for position, other in enumerate(self._devices):
            if other is device:
                del self._bases[position], self._devices[position]
                return

    def read(self, gpa: int, size: int) -> int | None:
        """Load 1 to 8 bytes. Returns ``None`` unless one device claims the whole access."""
        device = self._find(gpa, size)
        return None if device is None else device.read_mmio(gpa, size) & (1 << 8 * size) - 1

    def write(self, gpa: int, size: int, value: int) -> bool:
        """Store 1 to 8 bytes. Returns ``False`` unless one device claims the whole access."""
        device = self._find(gpa, size)
        if device is None:
            return False
        device.write_mmio(gpa, size, value & (1 << 8 * size) - 1)
        return True

    def _find(self, gpa: int, size: int) -> MmioDevice | None:
        position = bisect_right(self._bases, gpa) - 1
        if position < 0:
            return None
        device = self._devices[position]
        return device if gpa + size <= self._bases[position] + device.size else None
