"""The e820 map: what of the guest-physical address space is RAM.

It follows from the memory slots: writable slots are RAM, read-only ones (ROM) are reserved, what no slot
covers is not mentioned, so that a guest takes the hole below 4 GiB for device space. The legacy hole of a
PC, 639 KiB to 1 MiB, is reserved in any case, and so is any slot between the IOAPIC and 4 GiB. The machine may
reserve parts of RAM for its tables. Types as in ACPI, "Address Range Types".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from lasskvm.machine.boot.layout import (
    DEVICE_SPACE_START,
    FOUR_GIB,
    LEGACY_HOLE_END,
    LEGACY_HOLE_START,
)
from lasskvm.memory import SLOT_READONLY, GuestMemory

__all__ = ["E820Entry", "E820Map", "E820Type"]

#: ``struct boot_e820_entry``: address, size, type.
_ENTRY = struct.Struct("<QQI")


class E820Type(IntEnum):
    """What an address range is."""

    RAM = 1
    RESERVED = 2
    #: ACPI tables; RAM again for a guest that has read them.
    ACPI = 3
    #: Memory of the firmware that has to survive a sleep.
    NVS = 4


@dataclass(frozen=True)
class E820Entry:
    """One range of guest-physical addresses, from *start* up to, not including, *end*."""

    start: int
    end: int
    type: E820Type


class E820Map:
    """The ranges of one memory, in ascending order and without overlaps."""

    def __init__(self, entries: list[E820Entry]) -> None:
        self.entries = entries

    @classmethod
    def of_memory(cls, memory: GuestMemory, reserved: Iterable[E820Entry] = ()) -> E820Map:
        """The map for the slots of *memory*; adjacent ranges of one type are merged.

        *reserved* are ranges that are not RAM though a slot says so; they must not overlap each other.
        """
        own = [E820Entry(LEGACY_HOLE_START, LEGACY_HOLE_END, E820Type.RESERVED)]
        own += [entry for entry in reserved if not _lies_in(entry, own[0])]
        ranges = [*own]
        for slot in _slot_ranges(memory):
            ranges += _without(slot, own)
        entries: list[E820Entry] = []
        for entry in sorted(ranges, key=lambda entry: entry.start):
            if entries and entries[-1].end == entry.start and entries[-1].type == entry.type:
                entries[-1] = E820Entry(entries[-1].start, entry.end, entry.type)
            else:
                entries.append(entry)
        return cls(entries)

    @property
    def ram(self) -> list[E820Entry]:
        """The ranges of RAM, in ascending order."""
        return [entry for entry in self.entries if entry.type is E820Type.RAM]

    @property
    def ram_size(self) -> int:
        """Bytes of RAM."""
        return sum(entry.end - entry.start for entry in self.ram)

    def is_ram(self, start: int, size: int) -> bool:
        """Whether *size* bytes at gpa *start* are all RAM."""
        return any(entry.start <= start and start + size <= entry.end for entry in self.ram)

    def to_bytes(self) -> bytes:
        """The map as an array of ``struct boot_e820_entry``."""
        return b"".join(
            _ENTRY.pack(entry.start, entry.end - entry.start, entry.type) for entry in self.entries
        )


def _slot_ranges(memory: GuestMemory) -> Iterator[E820Entry]:
    for slot in memory:
        is_device_space = DEVICE_SPACE_START <= slot.gpa < FOUR_GIB
        is_ram = not slot.flags & SLOT_READONLY and not is_device_space
        yield E820Entry(slot.gpa, slot.end, E820Type.RAM if is_ram else E820Type.RESERVED)


def _lies_in(inner: E820Entry, outer: E820Entry) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end


def _without(entry: E820Entry, holes: Iterable[E820Entry]) -> Iterator[E820Entry]:
    """The parts of *entry* that none of *holes* covers."""
    start = entry.start
    for hole in sorted(holes, key=lambda hole: hole.start):
        if start < min(hole.start, entry.end):
            yield E820Entry(start, min(hole.start, entry.end), entry.type)
        start = max(start, hole.end)
    if start < entry.end:
        yield E820Entry(start, entry.end, entry.type)
