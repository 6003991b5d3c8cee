"""Guest memory as a case finds it: system tables, page tables, code and data.

For each kind of paging there is a pristine image, made once; :func:`case_image` copies it and adds what the case says.
Images are plain bytes in guest-physical order, so both paths get the same one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from lasskvm.fuzz import layout
from lasskvm.fuzz.case import Case, Mode, Paging
from lasskvm.x86 import descriptors as d
from lasskvm.x86.registers import (
    AR_ACCESSED,
    AR_CODE32,
    AR_CODE64,
    AR_CONFORMING,
    AR_DATA,
    AR_DB,
    AR_DPL_SHIFT,
    AR_EXPAND_DOWN,
    AR_G,
    AR_LDT,
    AR_P,
    AR_READABLE,
    AR_TSS64_BUSY,
    AR_WRITABLE,
    MASK32,
)

__all__ = ["FORCED_EMULATION_PREFIX", "case_image", "page_table_root"]

Image = NDArray[np.uint8]

#: UD2 and the letters "kvm". It lies in front of every case's code, where only one kind of path starts.
FORCED_EMULATION_PREFIX = b"\x0f\x0bkvm"

_KERNEL = layout.PAGE_PRESENT | layout.PAGE_WRITABLE
_PARENT = _KERNEL | layout.PAGE_USER
#: Some of the tables that lead to pages have been used before.
_USED_PARENT = _PARENT | layout.PAGE_ACCESSED
_IDENTITY_PAGES = layout.MEMORY_BYTES // layout.PAGE
_TABLE_MASK = ~(layout.PAGE - 1)
_SHIFTS = {
    Paging.LEVEL5: (48, 39, 30, 21, 12),
    Paging.LEVEL4: (39, 30, 21, 12),
    Paging.PAE: (30, 21, 12),
    Paging.BITS32: (22, 12),
}
_INDEX_BITS = {Paging.BITS32: 10}
_PDPTES = 4
_PARAGRAPH_SHIFT = 4
_POOL_BYTES = 0x8000
_CHUNK = 16
#: RDTSC, whose result depends on the path.
_RDTSC = b"\x0f\x31"


def page_table_root(paging: Paging) -> int:
    """CR3 for *paging*."""
    return 0 if paging is Paging.NONE else layout.TABLES_GPA


def case_image(case: Case) -> Image:
    """A new image for *case*."""
    paging = case.paging
    pristine = _pristine(paging, case.mode is Mode.VIRTUAL8086, case.mode.is_ia32e)
    image = pristine.image.copy()
    entry_bytes = 4 if paging is Paging.BITS32 else 8
    gvas = layout.data_pages(paging)
    for number, slot in enumerate(pristine.entries):
        entry = layout.page_entry(number, gvas[number], case.pages[number], entry_bytes)
        _put(image, slot, entry.to_bytes(entry_bytes, "little"))
    if case.data_seed:
        _fill_data(image, case)
    _place_code(image, case)
    return image


def _place_code(image: Image, case: Case) -> None:
    image[layout.CODE_GPA : layout.CODE_GPA + layout.CODE_BYTES] = case.filler
    start = layout.CODE_GPA + layout.code_offset(case)
    _put(image, start, case.code[: layout.CODE_GPA + layout.CODE_BYTES - start])
    prefix = len(FORCED_EMULATION_PREFIX)
    if start - prefix >= layout.CODE_GPA:
        _put(image, start - prefix, FORCED_EMULATION_PREFIX)


def _fill_data(image: Image, case: Case) -> None:
    pool = _data_pool(case.mode)
    for number in range(len(layout.data_pages(case.paging))):
        # Any sequence without a pattern will do: every page begins elsewhere in the pool.
        start = (case.data_seed * 0x9E37 + number * 0x1F3D) % (_POOL_BYTES - layout.PAGE) & -_CHUNK
        gpa = layout.frame_of(number)
        image[gpa : gpa + layout.PAGE] = pool[start : start + layout.PAGE]


@cache
def _data_pool(mode: Mode) -> Image:
    """What data pages are cut from: values that instructions can make something of, and random ones."""
    rng = random.Random(mode.value)
    code = layout.code_base(mode, Paging.LEVEL4, user=True, upper=False)
    targets = [code, layout.UPPER + layout.CODE_GPA, layout.handlers_base(mode), layout.USER_CODE + 8]
    pointers = [gva for paging in Paging for gva in layout.data_pages(paging)]
    pool = b""
    while len(pool) < _POOL_BYTES:
        kind = rng.randrange(8)
        if kind == 0:
            # Far pointers, of all three sizes.
            size = rng.choice((2, 4, 8))
            target = rng.choice(targets) % (1 << 8 * size)
            chunk = target.to_bytes(size, "little") + rng.choice(layout.SELECTORS).to_bytes(2, "little")
        elif kind == 1:
            chunk = (rng.choice(pointers) + rng.randrange(-8, 64)).to_bytes(16, "little", signed=True)[:8]
        elif kind == 2:
            # What LGDT, INVPCID, BOUND and CMPXCHG find harmless.
            chunk = rng.choice((0xFFF, 0, 1, 0x7FFF_FFFF)).to_bytes(8, "little") + bytes(8)
        elif kind == 3:
            chunk = bytes([rng.choice((0, 0xFF, 0x80, 0x7F))]) * 8
        else:
            chunk = rng.randbytes(_CHUNK)
        pool += chunk.ljust(_CHUNK, b"\0")[:_CHUNK]
    return np.frombuffer(pool.replace(_RDTSC, b"\x90\x90"), np.uint8)


# ------------------------------------------------------------------------------------------------ pristine images


@dataclass(frozen=True)
class _Pristine:
    """``entries`` are the guest-physical addresses of the data pages' last-level entries."""

    image: Image
    entries: tuple[int, ...]


@cache
def _pristine(paging: Paging, user_identity: bool, is_ia32e: bool) -> _Pristine:
    image = np.zeros(layout.MEMORY_BYTES, np.uint8)
    # Wherever a case jumps to, it ends soon.
    image[layout.HANDLERS_GPA : layout.TABLES_GPA] = layout.FREE_MEMORY
    _write_vectors(image)
    _write_gates(image)
    _write_descriptors(image, layout.GDT_GPA, is_long=True)
    _write_descriptors(image, layout.LEGACY_GDT_GPA, is_long=False)
    _write_local_descriptors(image, is_ia32e)
    _write_task_states(image)
    entries: list[int] = []
    if paging is not Paging.NONE:
        tables = _Tables(image, paging)
        tables.map_layout(user_identity)
        entries = [tables.entry(gva, layout.is_large(gva)) for gva in layout.data_pages(paging)]
    return _Pristine(image, tuple(entries))


def _put(image: Image, gpa: int, data: bytes) -> None:
    image[gpa : gpa + len(data)] = np.frombuffer(data, np.uint8)


def _store(image: Image, gpa: int, size: int, value: int) -> None:
    _put(image, gpa, (value % (1 << 8 * size)).to_bytes(size, "little"))


def _load(image: Image, gpa: int, size: int) -> int:
    return int.from_bytes(image[gpa : gpa + size].tobytes(), "little")


def _write_vectors(image: Image) -> None:
    """The interrupt vectors of real mode: segment and offset."""
    for vector in range(layout.VECTORS):
        _store(image, layout.IVT_GPA + 4 * vector, 2, vector * layout.HANDLER_BYTES)
        _store(image, layout.IVT_GPA + 4 * vector + 2, 2, layout.HANDLERS_GPA >> _PARAGRAPH_SHIFT)


def _write_gates(image: Image) -> None:
    for vector in range(layout.VECTORS):
        offset = layout.HANDLERS_GPA + vector * layout.HANDLER_BYTES
        attributes = AR_P | (3 << AR_DPL_SHIFT if vector in layout.SOFTWARE_VECTORS else 0)
        attributes |= d.SYS_TRAP_GATE if vector == layout.TRAP_GATE else d.SYS_INTERRUPT_GATE
        if vector == layout.ABSENT_GATE:
            attributes &= ~AR_P
        if vector == layout.NOT_A_GATE:
            attributes ^= d.SYS_INTERRUPT_GATE ^ d.SYS_LDT
        is_user = vector == layout.USER_CODE_GATE
        for table, ist in ((layout.IDT_GPA, 1), (layout.SHARED_STACK_IDT_GPA, 0)):
            selector = layout.USER_CS if is_user else layout.KERNEL_CS
            gate = d.make_gate(layout.UPPER + offset, selector, attributes, ist)
            _store(image, table + 16 * vector, 8, gate)
            _store(image, table + 16 * vector + 8, 8, layout.UPPER + offset >> 32)
        selector = layout.USER_CS32 if is_user else layout.KERNEL_CS32
        _store(image, layout.LEGACY_IDT_GPA + 8 * vector, 8, d.make_gate(offset, selector, attributes, 0))


def _write_descriptors(image: Image, table: int, *, is_long: bool) -> None:
    """One of the two GDTs: system descriptors of IA-32e mode have 16 bytes, 64-bit code exists there only."""
    sixteen = ~(AR_DB | AR_G)
    code64 = AR_CODE64 if is_long else AR_CODE32
    user = 3 << AR_DPL_SHIFT
    plain = {
        layout.KERNEL_CS: code64, layout.KERNEL_SS: AR_DATA, layout.USER_CS32: AR_CODE32 | user,
        layout.USER_SS: AR_DATA | user, layout.USER_CS: code64 | user, layout.KERNEL_CS32: AR_CODE32,
        layout.KERNEL_CS16: AR_CODE32 & sixteen, layout.RING1_CS: code64 | 1 << AR_DPL_SHIFT,
        layout.RING1_SS: AR_DATA | 1 << AR_DPL_SHIFT, layout.RING2_CS: code64 | 2 << AR_DPL_SHIFT,
        layout.RING2_SS: AR_DATA | 2 << AR_DPL_SHIFT, layout.USER_CS16: AR_CODE32 & sixteen | user,
        layout.USER_SS16: AR_DATA & sixteen | user, layout.KERNEL_SS16: AR_DATA & sixteen,
        layout.CONFORMING_CS: code64 | AR_CONFORMING,
        layout.EXECUTE_ONLY_CS: (code64 | user) & ~AR_READABLE,
        layout.READ_ONLY_DATA: (AR_DATA | user) & ~AR_WRITABLE,
        layout.EXPAND_DOWN_DATA: AR_DATA | AR_EXPAND_DOWN | user, layout.ABSENT_DATA: (AR_DATA | user) & ~AR_P,
        layout.UNTOUCHED_DATA: (AR_DATA | user) & ~AR_ACCESSED, layout.SMALL_DATA: (AR_DATA | user) & ~AR_G,
    }  # fmt: skip
    limits = {layout.EXPAND_DOWN_DATA: 0xFFF, layout.SMALL_DATA: 0x7F}
    for selector, attributes in plain.items():
        limit = limits.get(selector, MASK32 if attributes & AR_G else 0xFFFF)
        _store(image, table + (selector & d.SELECTOR_OFFSET), 8, d.make_segment(0, limit, attributes))
    base = layout.UPPER if is_long else 0
    tss_gpa = layout.TSS64_GPA if is_long else layout.TSS32_GPA
    handler = base + layout.HANDLERS_GPA + 0x85 * layout.HANDLER_BYTES
    tss_limit = d.TSS64_BYTES + layout.IO_BITMAP_BYTES - 1
    code = layout.KERNEL_CS if is_long else layout.KERNEL_CS32
    gate = AR_P | d.SYS_CALL_GATE
    system = {
        layout.TSS_SELECTOR: (d.make_segment(base + tss_gpa & MASK32, tss_limit, AR_TSS64_BUSY), base),
        layout.LDT_SELECTOR: (
            d.make_segment(base + layout.LDT_GPA & MASK32, layout.LDT_BYTES - 1, AR_LDT), base,
        ),
        layout.CALL_GATE: (d.make_gate(handler, code, gate | user, 0 if is_long else 2), handler),
        layout.KERNEL_CALL_GATE: (d.make_gate(handler, code, gate, 0), handler),
        layout.AVAILABLE_TSS: (
            d.make_segment(base + tss_gpa & MASK32, tss_limit, AR_P | d.SYS_TSS_AVAILABLE), base,
        ),
    }  # fmt: skip
    for selector, (low, high) in system.items():
        gpa = table + (selector & d.SELECTOR_OFFSET)
        _store(image, gpa, 8, low)
        if is_long:
            _store(image, gpa + 8, 8, high >> 32)
    for selector, attributes, target in (
        (layout.CALL_GATE16, AR_P | d.SYS_CALL_GATE16 | user, layout.KERNEL_CS16),
        (layout.TASK_GATE, AR_P | d.SYS_TASK_GATE | user, layout.AVAILABLE_TSS),
    ):
        _store(image, table + (selector & d.SELECTOR_OFFSET), 8, d.make_gate(handler, target, attributes, 0))


def _write_local_descriptors(image: Image, is_ia32e: bool) -> None:
    user = 3 << AR_DPL_SHIFT
    code = (AR_CODE64 if is_ia32e else AR_CODE32) | user
    for selector, attributes in ((layout.LDT_DATA, AR_DATA | user), (layout.LDT_CODE, code)):
        gpa = layout.LDT_GPA + (selector & d.SELECTOR_OFFSET)
        _store(image, gpa, 8, d.make_segment(0, MASK32, attributes & ~AR_ACCESSED))


def _write_task_states(image: Image) -> None:
    ring0 = layout.RING0_STACK_GPA + layout.STACK_BYTES
    for level in range(3):
        offset = layout.TSS64_GPA + d.TSS64_RSP0 + level * d.TSS64_STACK_BYTES
        _store(image, offset, 8, layout.UPPER + ring0)
        selector = (layout.KERNEL_SS, layout.RING1_SS, layout.RING2_SS)[level]
        offset = layout.TSS32_GPA + d.TSS32_ESP0 + level * d.TSS32_STACK_BYTES
        _store(image, offset, 4, ring0)
        _store(image, offset + d.TSS32_STACK_SS, 2, selector)
    ist = layout.UPPER + layout.IST_STACK_GPA + layout.STACK_BYTES
    _store(image, layout.TSS64_GPA + d.TSS64_IST1, 8, ist)
    for tss, map_base, bitmap in (
        (layout.TSS64_GPA, d.TSS64_IO_MAP_BASE, d.TSS64_BYTES),
        (layout.TSS32_GPA, d.TSS32_IO_MAP_BASE, d.TSS32_BYTES),
    ):
        _store(image, tss + map_base, 2, bitmap)
        pattern = layout.IO_BITMAP_PATTERN
        content = (pattern * (layout.IO_BITMAP_BYTES // len(pattern) + 1))[: layout.IO_BITMAP_BYTES]
        _put(image, tss + bitmap, content)


class _Tables:
    """Page tables of one kind, in an image."""

    def __init__(self, image: Image, paging: Paging) -> None:
        self._image = image
        self._shifts = _SHIFTS[paging]
        self._index_bits = _INDEX_BITS.get(paging, 9)
        self._entry_bytes = 4 if paging is Paging.BITS32 else 8
        self._next_free = layout.TABLES_GPA + layout.PAGE
        self._is_pae = paging is Paging.PAE
        self._is_ia32e = paging in (Paging.LEVEL4, Paging.LEVEL5)
        if self._is_pae:
            # The PDPTE registers are loaded with CR3, so all four tables have to be there.
            for number in range(_PDPTES):
                _store(image, layout.TABLES_GPA + 8 * number, 8, self._new_table() | layout.PAGE_PRESENT)

    def map_layout(self, user_identity: bool) -> None:
        """Map everything but the data pages."""
        kernel = layout.UPPER if self._is_ia32e else 0
        for page in range(_IDENTITY_PAGES):
            if kernel or page:
                self._map(
                    kernel + page * layout.PAGE, page * layout.PAGE, _PARENT if user_identity else _KERNEL
                )
        for gva, gpa, size, flags in (
            (layout.USER_CODE, layout.CODE_GPA, layout.CODE_BYTES, _PARENT),
            (layout.LOW_KERNEL_CODE, layout.CODE_GPA, layout.CODE_BYTES, _KERNEL),
            (layout.USER_STACK, layout.USER_STACK_GPA, layout.STACK_BYTES, _PARENT),
        ):
            for offset in range(0, size, layout.PAGE):
                self._map(gva + offset, gpa + offset, flags)

    def _map(self, gva: int, gpa: int, flags: int) -> None:
        _store(self._image, self.entry(gva), self._entry_bytes, gpa | flags)

    def entry(self, gva: int, large: bool = False) -> int:
        """Where the entry is that maps *gva*; tables on the way are made."""
        table = layout.TABLES_GPA
        *parents, last = self._shifts[:-1] if large else self._shifts
        for level, shift in enumerate(parents):
            slot = self._slot(table, gva, shift)
            entry = _load(self._image, slot, self._entry_bytes)
            if not entry & layout.PAGE_PRESENT:
                # Of the entries that lead to tables, every other one has been used.
                flags = _USED_PARENT if (slot // self._entry_bytes + level) % 2 else _PARENT
                entry = self._new_table() | flags
                _store(self._image, slot, self._entry_bytes, entry)
            table = entry & _TABLE_MASK
        return self._slot(table, gva, last)

    def _slot(self, table: int, gva: int, shift: int) -> int:
        return table + (gva >> shift & (1 << self._index_bits) - 1) * self._entry_bytes

    def _new_table(self) -> int:
        table, self._next_free = self._next_free, self._next_free + layout.PAGE
        if self._next_free > layout.MEMORY_BYTES:
            raise ValueError("the fuzzed guest has no room for its page tables; enlarge its memory")
        return table
