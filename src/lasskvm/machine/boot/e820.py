"""The e820 map: what of the guest-physical address space is RAM.

It follows from the memory slots: writable slots are RAM, read-only ones (ROM) are reserved, what no slot
covers is not mentioned, so that a guest takes the hole below 4 GiB for device space. The legacy hole of a
PC, 639 KiB to 1 MiB, is reserved in any case. Types as in ACPI, "Address Range Types".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from lasskvm.machine.boot.layout import LEGACY_HOLE_END, LEGACY_HOLE_START
from lasskvm.memory import SLOT_READONLY, GuestMemory

__all__ = ["E820Entry", "E820Map", "E820Type"]

#: ``struct boot_e820_entry``: address, size, type.
_ENTRY = struct.Struct("<QQI")


class E820Type(IntEnum):
    """What an address range is."""

    RAM = 1
    RESERVED = 2


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
    def of_memory(cls, memory: GuestMemory) -> E820Map:
        """The map for the slots of *memory*; adjacent ranges of one type are merged."""
        ranges = [*_slot_ranges(memory), E820Entry(LEGACY_HOLE_START, LEGACY_HOLE_END, E820Type.RESERVED)]
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
        kind = E820Type.RESERVED if slot.flags & SLOT_READONLY else E820Type.RAM
        for start, end in (
            (slot.gpa, min(slot.end, LEGACY_HOLE_START)),
            (max(slot.gpa, LEGACY_HOLE_END), slot.end),
        ):
            if start < end:
                yield E820Entry(start, end, kind)
