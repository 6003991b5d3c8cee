"""Guest-physical memory for compiled code: the slot table of :mod:`lasskvm.memory`, read natively.

``memory`` is the host address of the table. :func:`load_physical` and :func:`store_physical` take the place of their
namesakes in :mod:`lasskvm.x86.paging` when the page walk and event delivery are compiled.
"""

from lasskvm.engine import native
from lasskvm.engine.native import load8, load16, load32, load64, store8, store16, store32, store64
from lasskvm.memory import (
    CODE_STORES_KEPT,
    PAGE_CODE,
    PAGE_DIRTY,
    SLOT_FLAGS,
    SLOT_GPA,
    SLOT_HOST,
    SLOT_PAGE_FLAGS,
    SLOT_READONLY,
    SLOT_SIZE,
    SLOT_WORDS,
    TABLE_CODE_STORES,
    TABLE_COUNT,
    TABLE_FIRST,
)
from lasskvm.x86 import paging
from lasskvm.x86.registers import MASK64

_PAGE_SHIFT = 12


def find_slot(memory: int, gpa: int) -> int:
    """The host address of the table row of the slot that holds *gpa*; 0 in a hole."""
    row = memory + 8 * TABLE_FIRST
    for _ in range(load64(memory + 8 * TABLE_COUNT)):
        start = load64(row + 8 * SLOT_GPA)
        if gpa >= start and gpa - start < load64(row + 8 * SLOT_SIZE):
            return row
        row += 8 * SLOT_WORDS
    return 0


def load_physical(memory: int, gpa: int, size: int) -> int:
    """The little-endian value of *size* (1 to 8) bytes at *gpa*; all ones where they do not lie in one slot."""
    row = find_slot(memory, gpa)
    ones = MASK64 >> (64 - 8 * size)
    if row == 0:
        return ones
    offset = gpa - load64(row + 8 * SLOT_GPA)
    if offset + size > load64(row + 8 * SLOT_SIZE):
        return ones
    host = load64(row + 8 * SLOT_HOST) + offset
    if size == 8:
        return load64(host)
    if size == 4:
        return load32(host)
    if size == 2:
        return load16(host)
    value = load8(host)
    for index in range(1, size):
        value |= load8(host + index) << (8 * index)
    return value


def store_physical(memory: int, gpa: int, size: int, value: int) -> None:
    """Store *size* (1 to 8) bytes at *gpa*; dropped where they do not lie in one writable slot.

    A store to a page with translated code is noted in the table, for :func:`lasskvm.engine.fill.forget_stored_code`.
    """
    row = find_slot(memory, gpa)
    if row == 0 or load64(row + 8 * SLOT_FLAGS) & SLOT_READONLY != 0:
        return
    offset = gpa - load64(row + 8 * SLOT_GPA)
    if offset + size > load64(row + 8 * SLOT_SIZE):
        return
    page_flags = load64(row + 8 * SLOT_PAGE_FLAGS) + (offset >> _PAGE_SHIFT)
    if load8(page_flags) & PAGE_CODE != 0:
        count = load64(memory + 8 * TABLE_CODE_STORES)
        store64(memory + 8 * TABLE_CODE_STORES, count + 1)
        if count < CODE_STORES_KEPT:
            store64(memory + 8 * (TABLE_CODE_STORES + 1 + count), gpa)
    store8(page_flags, load8(page_flags) | PAGE_DIRTY)
    host = load64(row + 8 * SLOT_HOST) + offset
    if size == 8:
        store64(host, value)
    elif size == 4:
        store32(host, value)
    elif size == 2:
        store16(host, value)
    else:
        for index in range(size):
            store8(host + index, (value >> (8 * index)) & 0xFF)


native.substitute(paging.load_physical, load_physical)
native.substitute(paging.store_physical, store_physical)
