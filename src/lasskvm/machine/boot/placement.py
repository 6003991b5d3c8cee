"""What is to be written where, collected before anything is written: a refused image leaves memory alone.

An image, its modules and the structures for it are :class:`Placement` objects until all of them have passed their
checks; :func:`write_all` then puts them into guest memory, the same way each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lasskvm.errors import ImageError
from lasskvm.machine.boot.e820 import E820Map
from lasskvm.machine.boot.layout import (
    BOOT_BLOCK_ADDRESS,
    BOOT_DATA_START,
    FOUR_GIB,
    LEGACY_HOLE_END,
    LEGACY_HOLE_START,
    MIB,
)
from lasskvm.memory import PAGE_SIZE, GuestMemory

__all__ = ["Arena", "Placement", "find_high_room", "find_low_room", "page_aligned", "write_all"]

_ZEROS = bytes(MIB)
_ALIGNMENT = 8


@dataclass(frozen=True)
class Placement:
    """*data* at gpa *start*, then zeros up to, not including, *end*."""

    start: int
    end: int
    data: bytes

    @classmethod
    def of(cls, start: int, data: bytes) -> Placement:
        """*data* at gpa *start*, and nothing behind it."""
        return cls(start, start + len(data), data)


def write_all(placements: Iterable[Placement], memory: GuestMemory) -> None:
    """Write *placements* into *memory*; raises :class:`~lasskvm.errors.MemoryLayoutError` for a hole in it."""
    for placement in placements:
        memory.write(placement.start, placement.data)
        for gpa in range(placement.start + len(placement.data), placement.end, len(_ZEROS)):
            memory.write(gpa, memoryview(_ZEROS)[: placement.end - gpa])


class Arena:
    """Structures one behind the other from gpa *base* on, each on an 8-byte boundary, with addresses as they come.

    >>> arena = Arena(0x9000)
    >>> hex(arena.add(b"name")), hex(arena.add(b"value")), len(arena.data)
    ('0x9000', '0x9008', 13)
    """

    def __init__(self, base: int) -> None:
        self.base = base
        self.data = bytearray()

    def add(self, data: bytes) -> int:
        """Append *data*; the gpa where it will lie."""
        self.data += bytes(-len(self.data) % _ALIGNMENT)
        gpa = self.base + len(self.data)
        self.data += data
        return gpa

    def add_text(self, text: str) -> int:
        """Append *text* with a zero byte behind it; the gpa where it will lie.

        Raises :class:`ImageError` when it has a zero byte of its own.
        """
        encoded = text.encode("utf-8", "surrogateescape")
        if b"\0" in encoded:
            raise ImageError("the command line holds a zero byte, which would end it there; remove it")
        return self.add(encoded + b"\0")

    def placement(self) -> Placement:
        """All that was added."""
        return Placement.of(self.base, bytes(self.data))


def page_aligned(gpa: int) -> int:
    """*gpa*, or the next page boundary above it."""
    return -(-gpa // PAGE_SIZE) * PAGE_SIZE


def find_low_room(size: int, e820: E820Map, taken: Sequence[Placement]) -> int:
    """A page boundary with *size* bytes of RAM below 640 KiB that none of *taken* needs, where QEMU has it if possible.

    Raises :class:`ImageError` when there is none.
    """
    candidates = [BOOT_BLOCK_ADDRESS, BOOT_DATA_START, *(page_aligned(placement.end) for placement in taken)]
    for gpa in candidates:
        is_free = all(gpa + size <= placement.start or placement.end <= gpa for placement in taken)
        is_low = gpa >= BOOT_DATA_START and gpa + size <= LEGACY_HOLE_START
        if is_free and is_low and e820.is_ram(gpa, size):
            return gpa
    raise ImageError(
        f"there is no room below 640 KiB for the {size} bytes that the image has to be told; "
        "shorten the command line or link the image to load at 1 MiB or above"
    )


def find_high_room(size: int, e820: E820Map, behind: int) -> int | None:
    """The first page boundary from *behind* and 1 MiB on with *size* bytes of RAM below 4 GiB, None when there is
    none."""
    for ram in e820.ram:
        gpa = page_aligned(max(ram.start, behind, LEGACY_HOLE_END))
        if gpa + size <= min(ram.end, FOUR_GIB):
            return gpa
    return None
