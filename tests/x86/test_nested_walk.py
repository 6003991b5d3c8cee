"""The page walk under EPT: page tables at guest-physical addresses that lie elsewhere in memory."""

from __future__ import annotations

import itertools
import mmap
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nested_tables import EPT_ROOTS, GUEST_PAGES, INDICES, PAGES, nested_tables

from lasskvm.lass import FETCH, WRITE
from lasskvm.memory import GuestMemory
from lasskvm.x86.ept import (
    EPT_A,
    EPT_D,
    EPT_MISCONFIGURATION,
    EPT_PS,
    EPT_R,
    EPT_TYPE_SHIFT,
    EPT_VIOLATION,
    EPT_W,
    EPT_X,
    GPA_OF_LINEAR,
    GPA_OF_TABLE,
    ept_walk,
)
from lasskvm.x86.exceptions import PF_P, PF_RSVD, PF_U, PF_W
from lasskvm.x86.paging import (
    PERM_GLOBAL,
    PTE_A,
    PTE_D,
    PTE_G,
    PTE_P,
    PTE_PS,
    PTE_U,
    PTE_W,
    PTE_XD,
    walk,
)
from lasskvm.x86.physical import PERM_ALL, PERM_R, PERM_W, PERM_X
from lasskvm.x86.registers import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
)
from lasskvm.x86.vmx import MEMORY_TYPE_WB, VMX_EPTP_AD_ENABLE_BIT, VMX_EPTP_PWL_4
from lasskvm.x86.vmx_exits import EptViolation

MEMORY_BYTES = 1 << 17
MAXPHYADDR = 46
READ = 0
KINDS = (READ, WRITE, FETCH)
RWX = EPT_R | EPT_W | EPT_X
WB = MEMORY_TYPE_WB << EPT_TYPE_SHIFT
PTE_ALL = PTE_P | PTE_W | PTE_U
CR0 = CR0_PE | CR0_PG | CR0_WP

#: Guest-physical pages 0 to 15 lie at these pages of memory; the EPT tables follow them.
PLACES = [7, 12, 3, 9, 14, 1, 5, 11, 0, 13, 6, 2, 15, 8, 4, 10]
EPT_TABLES = 0x10000
EPT_PTES = EPT_TABLES + 0x3000
#: The guest's tables, from the top, and its page: guest-physical.
TABLES = (0x1000, 0x2000, 0x3000, 0x4000, 0x5000)
PAGE = 0xA000
OFFSET = 0x9A8

MODES = {
    "32-bit": (CR4_PSE, 0, (22, 12), 4),
    "PAE": (CR4_PAE, EFER_NXE, (21, 12), 8),
    "4-level": (CR4_PAE, EFER_LME | EFER_LMA | EFER_NXE, (39, 30, 21, 12), 8),
    "5-level": (CR4_PAE | CR4_LA57, EFER_LME | EFER_LMA | EFER_NXE, (48, 39, 30, 21, 12), 8),
}
every_mode = pytest.mark.parametrize("mode", MODES)
with_and_without_flags = pytest.mark.parametrize("ad", [False, True], ids=["no A/D", "A/D"])
#: Every mode with every level of its tables.
LEVELS = [(mode, level) for mode, (_, _, shifts, _) in MODES.items() for level in range(len(shifts))]
every_level = pytest.mark.parametrize(
    ("mode", "level"), LEVELS, ids=[f"{mode}-level{level}" for mode, level in LEVELS]
)


def place(gpa: int) -> int:
    """Where a guest-physical address lies."""
    return PLACES[gpa >> 12] << 12 | gpa & 0xFFF


class Nested:
    """A nested guest with tables for one page (user, writable, marked nowhere), and EPT for its memory."""

    def __init__(self, mode: str = "4-level", *, ad: bool = False) -> None:
        self.cr4, self.efer, self.shifts, self.entry_bytes = MODES[mode]
        self.memory = GuestMemory()
        self.memory.set_slot(0, 0, mmap.mmap(-1, MEMORY_BYTES))
        self.cr0 = CR0
        self.eptp = EPT_TABLES | MEMORY_TYPE_WB | VMX_EPTP_PWL_4 | (VMX_EPTP_AD_ENABLE_BIT if ad else 0)
        for level in range(3):
            self.memory.store(EPT_TABLES + level * 0x1000, 8, EPT_TABLES + (level + 1) * 0x1000 | RWX)
        for page, frame in enumerate(PLACES):
            self.memory.store(EPT_PTES + page * 8, 8, frame << 12 | RWX | WB)
        self.address = 0x1234_5678_9000 & (1 << 32) - 1 | OFFSET
        self.pdpte = TABLES[0] | PTE_P
        index_mask = 0x1FF if self.entry_bytes == 8 else 0x3FF
        self.entry_gpas = [
            table + (self.address >> shift & index_mask) * self.entry_bytes
            for table, shift in zip(TABLES, self.shifts, strict=False)
        ]
        self.leaf = len(self.shifts) - 1
        for level in range(self.leaf):
            self.set(level, TABLES[level + 1] | PTE_ALL)
        self.set(self.leaf, PAGE | PTE_ALL)

    def get(self, level: int) -> int:
        return self.memory.load(place(self.entry_gpas[level]), self.entry_bytes)

    def set(self, level: int, entry: int) -> None:
        self.memory.store(place(self.entry_gpas[level]), self.entry_bytes, entry)

    def mark(self, bits: int) -> None:
        """Set accessed, and in the last level perhaps dirty, bits at all levels."""
        for level in range(self.leaf):
            self.set(level, self.get(level) | bits & PTE_A)
        self.set(self.leaf, self.get(self.leaf) | bits)

    def ept(self, gpa: int) -> int:
        """The EPT entry of the page of *gpa*."""
        return self.memory.load(EPT_PTES + (gpa >> 12) * 8, 8)

    def set_ept(self, gpa: int, *, rights: int | None = None, entry: int = 0) -> None:
        """Change the *rights* that EPT gives to the page of *gpa*, or its whole *entry*."""
        if rights is not None:
            entry = self.ept(gpa) & ~RWX | rights
        self.memory.store(EPT_PTES + (gpa >> 12) * 8, 8, entry)

    def walk(self, flags: int = READ, *, user: bool = True) -> tuple[int, int, int, int]:
        return walk(
            self.memory, self.address, flags, user, self.cr0, TABLES[0], self.cr4, self.efer, False, MAXPHYADDR,
            self.pdpte, 0, 0, self.eptp,
        )  # fmt: skip

    def guest_entries(self) -> list[int]:
        return [self.get(level) for level in range(self.leaf + 1)]


def ept_exit(gpa: int, outcome: int) -> tuple[int, int, int, int]:
    return gpa, 0, 0, outcome


def page_fault(code: int) -> tuple[int, int, int, int]:
    return 0, 0, code, 0


ACC = {READ: EptViolation.ACC_READ, WRITE: EptViolation.ACC_WRITE, FETCH: EptViolation.ACC_INSTR}
#: What processors report for an entry that cannot be marked.
MARKING = EPT_VIOLATION | GPA_OF_TABLE | EptViolation.ACC_READ | EptViolation.ACC_WRITE


# --------------------------------------------------------------------------------------------------- translation


@every_mode
@with_and_without_flags
def test_tables_and_page_are_found_where_ept_puts_them(mode: str, ad: bool) -> None:
    nested = Nested(mode, ad=ad)
    assert nested.walk(WRITE) == (place(PAGE) | OFFSET, PERM_ALL, 0, 0)


@every_mode
def test_marks_are_made_in_the_guests_tables(mode: str) -> None:
    nested = Nested(mode)
    before = nested.guest_entries()
    nested.walk(WRITE)
    expected = [entry | PTE_A for entry in before]
    expected[-1] |= PTE_D
    assert nested.guest_entries() == expected


def test_without_paging_a_linear_address_is_a_guest_physical_one() -> None:
    nested = Nested()
    nested.cr0, nested.efer, nested.address = CR0_PE, 0, PAGE | OFFSET
    assert nested.walk() == (place(PAGE) | OFFSET, PERM_ALL, 0, 0)
    nested.set_ept(PAGE, rights=EPT_R)
    assert nested.walk() == (place(PAGE) | OFFSET, PERM_R, 0, 0)
    outcome = EPT_VIOLATION | GPA_OF_LINEAR | EptViolation.ACC_WRITE | EptViolation.PROT_READ
    assert nested.walk(WRITE) == ept_exit(PAGE | OFFSET, outcome)


def test_a_large_page_of_the_guest_may_consist_of_small_ones_of_ept() -> None:
    nested = Nested()
    nested.set(2, PTE_ALL | PTE_PS)
    nested.address = nested.address & ~0x1F_FFFF | 0x4123
    assert nested.walk(WRITE) == (place(0x4123), PERM_ALL, 0, 0)


def test_a_large_page_of_ept_serves_small_ones_of_the_guest() -> None:
    nested = Nested()
    nested.memory.store(EPT_TABLES + 0x2000, 8, RWX | WB | EPT_PS)
    for level, table in enumerate(TABLES[:4]):
        following = TABLES[level + 1] if level < 3 else PAGE
        nested.memory.store(nested.entry_gpas[level], 8, following | PTE_ALL)
        assert table == nested.entry_gpas[level] & ~0xFFF
    assert nested.walk(WRITE) == (PAGE | OFFSET, PERM_ALL, 0, 0)


def test_a_global_page_stays_global() -> None:
    nested = Nested()
    nested.cr4 |= CR4_PGE
    nested.set(nested.leaf, nested.get(nested.leaf) | PTE_G)
    assert nested.walk()[1] == PERM_R | PERM_X | PERM_GLOBAL


# -------------------------------------------------------------------------------------------------- permissions


@with_and_without_flags
def test_an_access_needs_the_rights_of_page_tables_and_of_ept(ad: bool) -> None:
    ept_rights = (EPT_R, EPT_R | EPT_W, EPT_R | EPT_X, EPT_X, RWX)
    for writable, executable, rights, kind in itertools.product(
        (False, True), (False, True), ept_rights, KINDS
    ):
        nested = Nested(ad=ad)
        nested.set(
            nested.leaf, PAGE | PTE_P | PTE_U | (PTE_W if writable else 0) | (0 if executable else PTE_XD)
        )
        nested.set_ept(PAGE, rights=rights)
        result = nested.walk(kind)
        by_tables = {READ: True, WRITE: writable, FETCH: executable}
        by_ept = {READ: rights & EPT_R, WRITE: rights & EPT_W, FETCH: rights & EPT_X}
        if not by_tables[kind]:
            assert result[:2] == (0, 0)
            assert result[2] & PF_P
            assert result[3] == 0
        elif not by_ept[kind]:
            assert result == ept_exit(PAGE | OFFSET, EPT_VIOLATION | GPA_OF_LINEAR | ACC[kind] | rights << 3)
        else:
            expected = (PERM_R if rights & EPT_R else 0) | (PERM_X if executable and rights & EPT_X else 0)
            # The page is clean before a write, so that writes must come back.
            expected |= PERM_W if kind == WRITE else 0
            assert result == (place(PAGE) | OFFSET, expected, 0, 0)


def test_a_page_that_is_clean_in_ept_alone_is_not_writable_yet() -> None:
    nested = Nested(ad=True)
    nested.mark(PTE_A | PTE_D)
    assert nested.walk()[1] == PERM_R | PERM_X
    assert nested.walk(WRITE)[1] == PERM_ALL
    assert nested.ept(PAGE) & (EPT_A | EPT_D) == EPT_A | EPT_D


# ---------------------------------------------------------------------------------- the guest's tables under EPT


@every_level
@pytest.mark.parametrize("kind", KINDS)
def test_a_table_that_is_absent_in_ept_is_a_violation_by_a_read(mode: str, level: int, kind: int) -> None:
    nested = Nested(mode)
    nested.set_ept(TABLES[level], entry=0)
    outcome = EPT_VIOLATION | GPA_OF_TABLE | EptViolation.ACC_READ
    assert nested.walk(kind) == ept_exit(nested.entry_gpas[level], outcome)


@every_level
@pytest.mark.parametrize("kind", KINDS)
def test_with_dirty_flags_it_is_a_violation_by_a_read_and_write(mode: str, level: int, kind: int) -> None:
    nested = Nested(mode, ad=True)
    nested.set_ept(TABLES[level], entry=0)
    assert nested.walk(kind) == ept_exit(nested.entry_gpas[level], MARKING)


@every_level
@pytest.mark.parametrize("rights", [EPT_R, EPT_R | EPT_X], ids=["r--", "r-x"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_unmarked_entry_in_a_read_only_table_cannot_be_used(
    mode: str, level: int, rights: int, kind: int
) -> None:
    nested = Nested(mode)
    nested.set_ept(TABLES[level], rights=rights)
    assert nested.walk(kind) == ept_exit(nested.entry_gpas[level], MARKING | rights << 3)


@every_level
@pytest.mark.parametrize("kind", KINDS)
def test_an_accessed_entry_in_a_read_only_table_serves_all_but_the_first_write(
    mode: str, level: int, kind: int
) -> None:
    nested = Nested(mode)
    nested.mark(PTE_A)
    nested.set_ept(TABLES[level], rights=EPT_R)
    if kind == WRITE and level == nested.leaf:
        assert nested.walk(kind) == ept_exit(nested.entry_gpas[level], MARKING | EptViolation.PROT_READ)
        nested.mark(PTE_A | PTE_D)
    assert nested.walk(kind)[0] == place(PAGE) | OFFSET


@every_level
@pytest.mark.parametrize("marks", [0, PTE_A, PTE_A | PTE_D], ids=["unmarked", "accessed", "dirty"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_dirty_flags_a_read_only_table_cannot_be_used_at_all(
    mode: str, level: int, marks: int, kind: int
) -> None:
    nested = Nested(mode, ad=True)
    nested.mark(marks)
    nested.set_ept(TABLES[level], rights=EPT_R)
    outcome = MARKING | EptViolation.PROT_READ
    assert nested.walk(kind) == ept_exit(nested.entry_gpas[level], outcome)


@every_mode
def test_with_dirty_flags_tables_become_dirty_and_the_page_only_by_a_write(mode: str) -> None:
    nested = Nested(mode, ad=True)
    nested.walk(READ)
    for table in TABLES[: len(nested.shifts)]:
        assert nested.ept(table) & (EPT_A | EPT_D) == EPT_A | EPT_D
    assert nested.ept(PAGE) & (EPT_A | EPT_D) == EPT_A


@every_level
def test_a_malformed_ept_entry_is_a_misconfiguration_for_a_table_too(mode: str, level: int) -> None:
    nested = Nested(mode)
    nested.set_ept(TABLES[level], rights=EPT_W)
    assert nested.walk() == ept_exit(nested.entry_gpas[level], EPT_MISCONFIGURATION)


def test_a_table_that_ept_puts_where_no_memory_is_has_reserved_bits() -> None:
    nested = Nested()
    nested.set_ept(TABLES[1], entry=0x4000_0000 | RWX | WB)
    assert nested.walk() == page_fault(PF_P | PF_RSVD | PF_U)


# ---------------------------------------------------------------------------------------------- what comes first


def test_a_page_fault_comes_before_ept_for_the_page() -> None:
    nested = Nested()
    nested.set_ept(PAGE, entry=0)
    nested.set(nested.leaf, PAGE | PTE_P | PTE_U)
    assert nested.walk(WRITE) == page_fault(PF_P | PF_W | PF_U)
    nested.set(nested.leaf, PAGE)
    assert nested.walk(WRITE) == page_fault(PF_W | PF_U)


def test_a_page_fault_comes_before_ept_for_the_accessed_bit_of_the_last_entry() -> None:
    nested = Nested()
    nested.set_ept(TABLES[nested.leaf], rights=EPT_R)
    nested.set(nested.leaf, PAGE | PTE_P | PTE_U)
    assert nested.walk(WRITE) == page_fault(PF_P | PF_W | PF_U)


@every_level
def test_ept_for_a_table_comes_before_what_its_entry_says(mode: str, level: int) -> None:
    nested = Nested(mode)
    nested.set(level, 0)
    nested.set_ept(TABLES[level], entry=0)
    outcome = EPT_VIOLATION | GPA_OF_TABLE | EptViolation.ACC_READ
    assert nested.walk() == ept_exit(nested.entry_gpas[level], outcome)
    nested.set_ept(TABLES[level], entry=place(TABLES[level]) | EPT_R | WB)
    assert nested.walk() == page_fault(PF_U)


def test_a_page_beyond_48_bits_is_a_violation() -> None:
    nested = Nested()
    nested.set(nested.leaf, 1 << 50 | PTE_ALL)
    result = walk(
        nested.memory, nested.address, READ, True, CR0, TABLES[0], nested.cr4, nested.efer, False, 52, 0, 0, 0,
        nested.eptp,
    )  # fmt: skip
    assert result == ept_exit(1 << 50 | OFFSET, EPT_VIOLATION | GPA_OF_LINEAR | EptViolation.ACC_READ)


# --------------------------------------------------------------------------------------------------- random tables


class EptExitError(Exception):
    """An access through EPT that did not happen: its guest-physical address, and the outcome."""


class MemoryUnderEpt:
    """Guest-physical memory as the nested guest sees it: every load and store goes through EPT by itself."""

    def __init__(self, memory: GuestMemory, eptp: int) -> None:
        self.memory, self.eptp = memory, eptp

    def load(self, gpa: int, size: int) -> int:
        return self.memory.load(self._translate(gpa, READ), size)

    def store(self, gpa: int, size: int, value: int) -> None:
        self.memory.store(self._translate(gpa, WRITE), size, value)

    def _translate(self, gpa: int, kind: int) -> int:
        hpa, _, outcome = ept_walk(self.memory, gpa, kind, self.eptp, MAXPHYADDR, GPA_OF_TABLE)
        if outcome:
            raise EptExitError(gpa, outcome)
        return hpa


def composed(memory: GuestMemory, arguments: Any, eptp: int) -> tuple[int, int, int, int]:
    """The nested walk as the plain one over memory that translates by itself."""
    try:
        gpa, permissions, code, _ = walk(MemoryUnderEpt(memory, eptp), *arguments, 0)
    except EptExitError as stop:
        gpa, outcome = stop.args
        return ept_exit(gpa, outcome)
    if not permissions:
        return page_fault(code)
    hpa, rights, outcome = ept_walk(memory, gpa, arguments[1], eptp, MAXPHYADDR, GPA_OF_LINEAR)
    if outcome:
        return ept_exit(gpa, outcome)
    return hpa, permissions & (rights | PERM_GLOBAL), 0, 0


def memory_with(content: bytes) -> GuestMemory:
    memory = GuestMemory()
    memory.set_slot(0, 0, mmap.mmap(-1, len(content)))
    memory.write(0, content)
    return memory


def random_memories(seed: int) -> tuple[GuestMemory, GuestMemory]:
    content = nested_tables(random.Random(seed))
    return memory_with(content), memory_with(content)


addresses = st.builds(
    lambda a, b, c, d, e, offset: a << 48 | b << 39 | c << 30 | d << 21 | e << 12 | offset,
    *(st.sampled_from(INDICES) for _ in range(5)), st.integers(0, 0xFFF),
)  # fmt: skip
accesses = st.lists(
    st.tuples(addresses, st.sampled_from(KINDS), st.booleans(), st.sampled_from(sorted(MODES)), st.booleans()),
    min_size=1, max_size=8,
)  # fmt: skip


#: Mostly a real root of the EPT tables.
roots = st.sampled_from((*EPT_ROOTS, *EPT_ROOTS, 0, PAGES - 1, PAGES))


def arguments_of(access: tuple[int, int, bool, str, bool], root: int) -> Any:
    address, kind, user, mode, pages = access
    cr4, efer, _, _ = MODES[mode]
    cr0 = CR0 if pages or efer & EFER_LMA else CR0_PE
    pdpte = (address >> 30 & 3) << 12 | PTE_P
    return address, kind, user, cr0, root << 12, cr4 | CR4_PGE, efer, False, MAXPHYADDR, pdpte, 0, 0


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 32), accesses, st.integers(0, GUEST_PAGES), roots, st.booleans())
def test_one_walk_does_what_the_plain_walk_does_over_memory_that_translates_itself(
    seed: int, steps: list[tuple[int, int, bool, str, bool]], root: int, ept_root: int, ad: bool
) -> None:
    memory, model = random_memories(seed)
    eptp = ept_root << 12 | MEMORY_TYPE_WB | VMX_EPTP_PWL_4 | ad << 6
    for step in steps:
        arguments = arguments_of(step, root)
        nested: Any = (*arguments, eptp)
        assert walk(memory, *nested) == composed(model, arguments, eptp)
    assert memory.read(0, PAGES << 12) == model.read(0, PAGES << 12)
