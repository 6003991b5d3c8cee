"""Guest-physical memory: slots, holes, and bounds that no address leaves."""

from __future__ import annotations

import mmap
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasskvm.errors import MemoryLayoutError
from lasskvm.memory import (
    MAX_SLOTS,
    PAGE_CODE,
    PAGE_DIRTY,
    PAGE_SIZE,
    SLOT_FLAGS,
    SLOT_GPA,
    SLOT_HOST,
    SLOT_PAGE_FLAGS,
    SLOT_READONLY,
    SLOT_SIZE,
    SLOT_WORDS,
    SLOT_WRITE_EPOCHS,
    TABLE_COUNT,
    TABLE_FIRST,
    GuestMemory,
    Slot,
)

RAM = 0x10000
RAM_BYTES = 4 * PAGE_SIZE
ROM = 0x40000


def buffer(pages: int) -> mmap.mmap:
    return mmap.mmap(-1, pages * PAGE_SIZE)


@pytest.fixture
def memory() -> GuestMemory:
    """16 KiB of RAM at 64 KiB, a page of ROM at 256 KiB, holes elsewhere."""
    guest = GuestMemory()
    guest.set_slot(0, RAM, buffer(4))
    guest.set_slot(1, ROM, buffer(1), flags=SLOT_READONLY)
    return guest


def slot_at(memory: GuestMemory, gpa: int) -> Slot:
    slot = memory.find(gpa)
    assert slot is not None
    return slot


# ---- loads and stores


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_value_is_little_endian(memory: GuestMemory, size: int) -> None:
    memory.write(RAM, bytes(range(1, 9)))
    assert memory.load(RAM, size) == int.from_bytes(range(1, size + 1), "little")


@given(st.integers(RAM, RAM + RAM_BYTES - 8), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1))
def test_what_is_stored_is_loaded(gpa: int, size: int, value: int) -> None:
    memory = GuestMemory()
    memory.set_slot(0, RAM, buffer(4))
    value &= (1 << 8 * size) - 1
    memory.store(gpa, size, value)
    assert memory.load(gpa, size) == value
    assert memory.read(RAM, RAM_BYTES).count(0) >= RAM_BYTES - size


@pytest.mark.parametrize("gpa", [0, RAM - 1, RAM + RAM_BYTES, ROM + PAGE_SIZE, (1 << 52) - 1, (1 << 64) - 1])
@pytest.mark.parametrize("size", [1, 4, 8])
def test_a_hole_loads_as_all_ones_and_drops_stores(memory: GuestMemory, gpa: int, size: int) -> None:
    before = memory.read(RAM, RAM_BYTES)
    memory.store(gpa, size, 0)
    assert memory.load(gpa, size) == (1 << 8 * size) - 1
    assert memory.read(RAM, RAM_BYTES) == before


@pytest.mark.parametrize("inside", range(1, 8))
def test_an_access_over_the_end_of_a_slot_does_not_touch_it(memory: GuestMemory, inside: int) -> None:
    end = RAM + RAM_BYTES
    memory.store(end - inside, 8, 0x1111111111111111)
    assert memory.read(end - inside, inside) == bytes(inside)
    assert memory.load(end - inside, 8) == (1 << 64) - 1


def test_the_last_bytes_of_a_slot_are_part_of_it(memory: GuestMemory) -> None:
    end = RAM + RAM_BYTES
    memory.store(end - 8, 8, 0x1122334455667788)
    assert memory.load(end - 8, 8) == 0x1122334455667788
    assert memory.load(end - 1, 1) == 0x11


def test_an_access_over_the_border_of_two_slots_is_in_neither(memory: GuestMemory) -> None:
    memory.set_slot(2, RAM + RAM_BYTES, buffer(1))
    memory.store(RAM + RAM_BYTES - 4, 8, 0x1111111111111111)
    assert memory.load(RAM + RAM_BYTES - 4, 8) == (1 << 64) - 1
    assert memory.read(RAM + RAM_BYTES - 4, 8) == bytes(8)


def test_a_read_only_slot_drops_the_guests_stores(memory: GuestMemory) -> None:
    memory.store(ROM, 8, 0x1234)
    assert memory.load(ROM, 8) == 0
    assert not slot_at(memory, ROM).page_flags.any()


# ---- reads and writes of the VMM


def test_a_read_crosses_slots_and_holes(memory: GuestMemory) -> None:
    memory.write(RAM, b"begin")
    memory.write(ROM, b"rom")
    everything = memory.read(RAM - 3, ROM + 3 - (RAM - 3))
    assert everything[:8] == b"\xff\xff\xffbegin"
    assert everything[-5:] == b"\xff\xffrom"
    assert len(everything) == ROM - RAM + 6


def test_a_read_of_nothing_is_empty(memory: GuestMemory) -> None:
    assert memory.read(RAM, 0) == b""


def test_the_vmm_writes_read_only_slots(memory: GuestMemory) -> None:
    memory.write(ROM + 5, b"firmware")
    assert memory.read(ROM + 5, 8) == b"firmware"


def test_a_write_crosses_neighbouring_slots(memory: GuestMemory) -> None:
    memory.set_slot(2, RAM + RAM_BYTES, buffer(1))
    memory.write(RAM + RAM_BYTES - 3, b"abcdef")
    assert memory.read(RAM + RAM_BYTES - 3, 6) == b"abcdef"


@pytest.mark.parametrize(
    "data", [b"", bytearray(b"ab"), memoryview(b"abc"), memoryview(array("I", [1, 2, 3]))]
)
def test_a_write_takes_any_buffer(memory: GuestMemory, data: bytes | bytearray | memoryview) -> None:
    memory.write(RAM, data)
    assert memory.read(RAM, memoryview(data).nbytes) == bytes(data)


@pytest.mark.parametrize("gpa", [0, RAM + RAM_BYTES - 1, ROM + PAGE_SIZE])
def test_a_write_that_does_not_fit_says_so(memory: GuestMemory, gpa: int) -> None:
    with pytest.raises(MemoryLayoutError, match="give the guest more memory"):
        memory.write(gpa, b"12")


# ---- the layout


def test_slots_are_found_by_address(memory: GuestMemory) -> None:
    assert memory.find(RAM - 1) is None
    assert slot_at(memory, RAM).number == 0
    assert slot_at(memory, RAM + RAM_BYTES - 1).number == 0
    assert memory.find(RAM + RAM_BYTES) is None
    assert slot_at(memory, ROM).number == 1


def test_slots_are_listed_in_guest_order_whatever_their_numbers() -> None:
    memory = GuestMemory()
    for number, gpa in ((0, 0x30000), (1, 0x10000), (2, 0x20000)):
        memory.set_slot(number, gpa, buffer(1))
    assert [slot.gpa for slot in memory] == [0x10000, 0x20000, 0x30000]


@pytest.mark.parametrize("gpa", [1, 0x800, RAM + 0xFFF])
def test_a_misaligned_address_is_refused(gpa: int) -> None:
    with pytest.raises(MemoryLayoutError, match="page-aligned"):
        GuestMemory().set_slot(0, gpa, buffer(1))


def test_a_misaligned_size_is_refused() -> None:
    with pytest.raises(MemoryLayoutError, match="page-aligned"):
        GuestMemory().set_slot(0, RAM, mmap.mmap(-1, PAGE_SIZE + 1))


@pytest.mark.parametrize("gpa", [RAM - PAGE_SIZE, RAM, RAM + PAGE_SIZE, RAM + 3 * PAGE_SIZE])
def test_overlapping_slots_are_refused(memory: GuestMemory, gpa: int) -> None:
    with pytest.raises(MemoryLayoutError, match="overlaps slot 0"):
        memory.set_slot(2, gpa, buffer(2))


def test_touching_slots_do_not_overlap(memory: GuestMemory) -> None:
    memory.set_slot(2, RAM - PAGE_SIZE, buffer(1))
    memory.set_slot(3, RAM + RAM_BYTES, buffer(1))
    assert len(list(memory)) == 4


def test_a_slot_may_end_at_2_to_the_52_but_not_behind() -> None:
    memory = GuestMemory()
    memory.set_slot(0, (1 << 52) - PAGE_SIZE, buffer(1))
    with pytest.raises(MemoryLayoutError, match="52"):
        memory.set_slot(1, 1 << 52, buffer(1))


def test_there_is_a_last_slot() -> None:
    memory = GuestMemory()
    for number in range(MAX_SLOTS):
        memory.set_slot(number, number * PAGE_SIZE, buffer(1))
    with pytest.raises(MemoryLayoutError, match=str(MAX_SLOTS)):
        memory.set_slot(MAX_SLOTS, MAX_SLOTS * PAGE_SIZE, buffer(1))
    memory.set_slot(0, 0, buffer(1))


def test_a_slot_can_be_moved(memory: GuestMemory) -> None:
    slot = slot_at(memory, RAM)
    memory.store(RAM, 4, 0xABCD)
    memory.set_slot(0, RAM + PAGE_SIZE, slot.buffer)
    assert memory.load(RAM, 4) == 0xFFFFFFFF
    assert memory.load(RAM + PAGE_SIZE, 4) == 0xABCD


def test_a_deleted_slot_is_a_hole(memory: GuestMemory) -> None:
    memory.delete_slot(0)
    assert memory.load(RAM, 1) == 0xFF
    with pytest.raises(MemoryLayoutError, match="no memory slot 0"):
        memory.delete_slot(0)


def test_a_refused_change_changes_nothing(memory: GuestMemory) -> None:
    before = memory.table.copy()
    with pytest.raises(MemoryLayoutError):
        memory.set_slot(2, RAM, buffer(1))
    assert np.array_equal(memory.table, before)
    assert len(list(memory)) == 2


def test_changes_of_the_layout_are_announced(memory: GuestMemory) -> None:
    calls: list[int] = []
    memory.on_layout_change = lambda: calls.append(int(memory.table[TABLE_COUNT]))
    memory.set_slot(2, 0, buffer(1))
    memory.delete_slot(2)
    assert calls == [3, 2]


def test_the_slot_table_describes_the_slots(memory: GuestMemory) -> None:
    assert int(memory.table[TABLE_COUNT]) == 2
    for index, slot in enumerate(memory):
        row = memory.table[TABLE_FIRST + index * SLOT_WORDS :][:SLOT_WORDS].tolist()
        assert row[SLOT_GPA] == slot.gpa
        assert row[SLOT_SIZE] == slot.size
        assert row[SLOT_FLAGS] == slot.flags
        assert row[SLOT_HOST] == np.frombuffer(slot.buffer, np.uint8).ctypes.data
        assert row[SLOT_PAGE_FLAGS] == slot.page_flags.ctypes.data
        assert row[SLOT_WRITE_EPOCHS] == slot.write_epochs.ctypes.data


# ---- page flags


def test_a_store_marks_its_page_dirty(memory: GuestMemory) -> None:
    memory.store(RAM + PAGE_SIZE + 5, 4, 1)
    assert slot_at(memory, RAM).page_flags.tolist() == [0, PAGE_DIRTY, 0, 0]


def test_a_store_up_to_a_page_end_marks_that_page_only(memory: GuestMemory) -> None:
    memory.store(RAM + PAGE_SIZE - 8, 8, 1)
    assert slot_at(memory, RAM).page_flags.tolist() == [PAGE_DIRTY, 0, 0, 0]


def test_a_store_across_a_page_end_marks_both_pages(memory: GuestMemory) -> None:
    memory.store(RAM + PAGE_SIZE - 1, 2, 1)
    assert slot_at(memory, RAM).page_flags.tolist() == [PAGE_DIRTY, PAGE_DIRTY, 0, 0]


def test_a_load_marks_nothing(memory: GuestMemory) -> None:
    memory.load(RAM, 8)
    memory.read(RAM, RAM_BYTES)
    assert not slot_at(memory, RAM).page_flags.any()


def test_a_write_marks_every_page_it_touches(memory: GuestMemory) -> None:
    memory.write(RAM + 1, bytes(2 * PAGE_SIZE))
    assert slot_at(memory, RAM).page_flags.tolist() == [PAGE_DIRTY, PAGE_DIRTY, PAGE_DIRTY, 0]


def test_a_store_into_translated_code_is_announced(memory: GuestMemory) -> None:
    calls: list[tuple[int, int]] = []
    memory.on_code_store = lambda gpa, size: calls.append((gpa, size))
    slot_at(memory, RAM).page_flags[1] |= PAGE_CODE
    memory.store(RAM, 8, 1)
    assert calls == []
    memory.store(RAM + PAGE_SIZE - 4, 8, 1)
    memory.write(RAM + PAGE_SIZE, b"abc")
    assert calls == [(RAM + PAGE_SIZE - 4, 8), (RAM + PAGE_SIZE, 3)]
    assert slot_at(memory, RAM).page_flags[1] == PAGE_CODE | PAGE_DIRTY


def test_a_dropped_store_is_not_announced(memory: GuestMemory) -> None:
    calls: list[int] = []
    memory.on_code_store = lambda gpa, size: calls.append(gpa)
    slot_at(memory, ROM).page_flags[0] |= PAGE_CODE
    memory.store(ROM, 4, 1)
    memory.store(0, 4, 1)
    assert calls == []


# ---- any access


@given(st.integers(0, (1 << 64) - 1), st.integers(1, 8))
def test_no_address_leaves_the_slots(gpa: int, size: int) -> None:
    memory = GuestMemory()
    memory.set_slot(0, RAM, buffer(1))
    memory.store(gpa, size, (1 << 8 * size) - 1)
    assert memory.load(gpa, size) == (1 << 8 * size) - 1


@given(st.integers(RAM - 20, RAM + PAGE_SIZE + 20), st.integers(0, 40))
def test_a_read_is_the_bytes_one_by_one(gpa: int, size: int) -> None:
    memory = GuestMemory()
    memory.set_slot(0, RAM, buffer(1))
    memory.write(RAM, bytes(byte & 0xFF for byte in range(PAGE_SIZE)))
    assert memory.read(gpa, size) == bytes(memory.load(gpa + index, 1) for index in range(size))
