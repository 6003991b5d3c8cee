"""Guest-physical memory: slots, as ``KVM_SET_USER_MEMORY_REGION`` makes them, and the holes between.

A slot maps a guest-physical range to host memory. What no slot covers is a hole: loads from it give all ones and
stores to it are dropped, as on a bus where nothing answers. Nothing here lets an address leave its slot.

The slot table is one flat array of 64-bit words, because compiled code (:mod:`lasskvm.engine`) reads it too; its
layout is given by the ``SLOT_*`` constants. Each slot carries a byte of flags per 4 KiB page (``PAGE_*``).
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lasskvm.errors import MemoryLayoutError

__all__ = ["MAX_SLOTS", "PAGE_SIZE", "GuestMemory", "Slot", "allocate"]

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_MASK = PAGE_SIZE - 1

#: Memory slots a VM can have.
MAX_SLOTS = 32
#: The slot table: word 0 is the number of slots, then ``SLOT_WORDS`` words for each, in ascending guest order.
TABLE_COUNT = 0
TABLE_FIRST = 1
SLOT_WORDS = 8
SLOT_GPA, SLOT_SIZE, SLOT_HOST, SLOT_FLAGS, SLOT_PAGE_FLAGS, SLOT_WRITE_EPOCHS = range(6)
#: Behind the slots: how many stores by compiled code have hit pages with translated code, and the first of them.
TABLE_CODE_STORES = TABLE_FIRST + MAX_SLOTS * SLOT_WORDS
CODE_STORES_KEPT = 8
TABLE_WORDS = TABLE_CODE_STORES + 1 + CODE_STORES_KEPT

#: Slot flags, as in KVM's ``KVM_MEM_*``.
SLOT_LOG_DIRTY_PAGES = 1 << 0
SLOT_READONLY = 1 << 1

#: Page flags: translated code of this page exists; written to since the dirty log was last taken.
PAGE_CODE = 1 << 0
PAGE_DIRTY = 1 << 1

_MAX_GPA = 1 << 52


@dataclass
class Slot:
    """One memory slot. ``page_flags`` is a byte, ``write_epochs`` a 32-bit TLB epoch for each 4 KiB page."""

    number: int
    gpa: int
    size: int
    buffer: mmap.mmap
    flags: int
    page_flags: NDArray[np.uint8] = field(repr=False)
    write_epochs: NDArray[np.uint32] = field(repr=False)
    view: memoryview = field(repr=False)
    host_address: int

    @property
    def end(self) -> int:
        """The first guest-physical address behind the slot."""
        return self.gpa + self.size


def allocate(size: int) -> mmap.mmap:
    """Zeroed host memory for a slot, *size* bytes, taken from the host as the guest touches it.

    Raises :class:`MemoryLayoutError` when the host refuses.
    """
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryLayoutError(
            f"the host cannot give {size // (1 << 20)} MiB to the guest ({error}); ask for less with --memory"
        ) from None


class GuestMemory:
    """The guest-physical address space of one VM.

    >>> memory = GuestMemory()
    >>> _ = memory.set_slot(0, 0x10000, mmap.mmap(-1, 0x2000))
    >>> memory.store(0x10008, 8, 0x1122334455667788)
    >>> hex(memory.load(0x10008, 4)), hex(memory.load(0x20000, 4))
    ('0x55667788', '0xffffffff')
    """

    def __init__(self) -> None:
        self.table: NDArray[np.uint64] = np.zeros(TABLE_WORDS, np.uint64)
        #: Called with (gpa, size) after a store through this object hits a page whose code has been translated.
        self.on_code_store: Callable[[int, int], None] | None = None
        #: Called when the slots have changed.
        self.on_layout_change: Callable[[], None] | None = None
        self._slots: list[Slot] = []
        self._starts: list[int] = []

    def set_slot(self, number: int, gpa: int, buffer: mmap.mmap, flags: int = 0) -> Slot:
        """Map *buffer* (its whole length) at guest-physical *gpa* as slot *number*, replacing a former one.

        Raises :class:`MemoryLayoutError` when the range is not page-aligned, overlaps another slot or exceeds 52 bits.
        """
        size = len(buffer)
        if gpa % PAGE_SIZE or size % PAGE_SIZE or not size:
            raise MemoryLayoutError(
                f"memory slot {number} at {gpa:#x} with {size:#x} bytes is not page-aligned"
            )
        if gpa + size > _MAX_GPA:
            raise MemoryLayoutError(
                f"memory slot {number} ends at {gpa + size:#x}, beyond 52 physical address bits"
            )
        others = [slot for slot in self._slots if slot.number != number]
        for other in others:
            if gpa < other.end and other.gpa < gpa + size:
                raise MemoryLayoutError(
                    f"memory slot {number} at {gpa:#x} overlaps slot {other.number} at {other.gpa:#x}; move one of them"
                )
        if len(others) == MAX_SLOTS:
            raise MemoryLayoutError(f"a VM has at most {MAX_SLOTS} memory slots; delete one first")
        pages = size >> PAGE_SHIFT
        slot = Slot(
            number=number,
            gpa=gpa,
            size=size,
            buffer=buffer,
            flags=flags,
            page_flags=np.zeros(pages, np.uint8),
            write_epochs=np.zeros(pages, np.uint32),
            view=memoryview(buffer),
            host_address=int(np.frombuffer(buffer, np.uint8).ctypes.data),
        )
        self._install([*others, slot])
        return slot

    def delete_slot(self, number: int) -> None:
        """Unmap slot *number*; its range becomes a hole. Unknown numbers raise :class:`MemoryLayoutError`."""
        remaining = [slot for slot in self._slots if slot.number != number]
        if len(remaining) == len(self._slots):
            raise MemoryLayoutError(f"there is no memory slot {number}")
        self._install(remaining)

    def _install(self, slots: list[Slot]) -> None:
        self._slots = sorted(slots, key=lambda slot: slot.gpa)
        self._starts = [slot.gpa for slot in self._slots]
        self.table[TABLE_COUNT] = len(self._slots)
        for index, slot in enumerate(self._slots):
            row = TABLE_FIRST + index * SLOT_WORDS
            self.table[row + SLOT_GPA] = slot.gpa
            self.table[row + SLOT_SIZE] = slot.size
            self.table[row + SLOT_HOST] = slot.host_address
            self.table[row + SLOT_FLAGS] = slot.flags
            self.table[row + SLOT_PAGE_FLAGS] = slot.page_flags.ctypes.data
            self.table[row + SLOT_WRITE_EPOCHS] = slot.write_epochs.ctypes.data
        if self.on_layout_change is not None:
            self.on_layout_change()

    def __iter__(self) -> Iterator[Slot]:
        """The slots in ascending guest-physical order."""
        return iter(self._slots)

    def find(self, gpa: int) -> Slot | None:
        """The slot that holds *gpa*, or None in a hole."""
        index = bisect_right(self._starts, gpa) - 1
        if index >= 0 and gpa < self._slots[index].end:
            return self._slots[index]
        return None

    def load(self, gpa: int, size: int) -> int:
        """The little-endian value of *size* bytes at *gpa*; all ones where the bytes do not lie in one slot."""
        slot = self.find(gpa)
        if slot is None or gpa + size > slot.end:
            return (1 << 8 * size) - 1
        offset = gpa - slot.gpa
        return int.from_bytes(slot.view[offset : offset + size], "little")

    def store(self, gpa: int, size: int, value: int) -> None:
        """Store *size* bytes at *gpa*; dropped where they do not lie in one writable slot."""
        self.store_bytes(gpa, value.to_bytes(size, "little"))

    def store_bytes(self, gpa: int, data: bytes) -> None:
        """Store *data* at *gpa* on behalf of the guest; dropped where it does not lie in one writable slot."""
        slot = self.find(gpa)
        if slot is None or gpa + len(data) > slot.end or slot.flags & SLOT_READONLY:
            return
        self._put(slot, gpa, data)

    def _put(self, slot: Slot, gpa: int, data: bytes | memoryview) -> None:
        offset = gpa - slot.gpa
        slot.view[offset : offset + len(data)] = data
        first, last = offset >> PAGE_SHIFT, offset + len(data) - 1 >> PAGE_SHIFT
        if first == last:
            # The usual case by itself: operations on slices take longer than the store.
            flags = int(slot.page_flags[first])
            slot.page_flags[first] = flags | PAGE_DIRTY
            is_code = flags & PAGE_CODE != 0
        else:
            pages = slot.page_flags[first : last + 1]
            pages |= PAGE_DIRTY
            is_code = bool((pages & PAGE_CODE).any())
        if is_code and self.on_code_store is not None:
            self.on_code_store(gpa, len(data))

    def read(self, gpa: int, size: int) -> bytes:
        """*size* bytes from *gpa*, across slots and holes (a hole reads as all ones)."""
        pieces = []
        while size:
            slot = self.find(gpa)
            if slot is None:
                length = min(size, PAGE_SIZE - gpa % PAGE_SIZE)
                pieces.append(b"\xff" * length)
            else:
                length = min(size, slot.end - gpa)
                pieces.append(bytes(slot.view[gpa - slot.gpa : gpa - slot.gpa + length]))
            gpa, size = gpa + length, size - length
        return b"".join(pieces)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write *data* at *gpa* on behalf of the VMM, read-only slots included.

        Raises :class:`MemoryLayoutError` when a byte falls into a hole: what a loader places must fit.
        """
        position, view = gpa, memoryview(data).cast("B")
        while len(view):
            slot = self.find(position)
            if slot is None:
                raise MemoryLayoutError(
                    f"{len(data):#x} bytes at {gpa:#x} do not fit into guest memory; give the guest more memory"
                )
            length = min(len(view), slot.end - position)
            self._put(slot, position, view[:length])
            position, view = position + length, view[length:]
