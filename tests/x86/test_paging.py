"""The page walk in every mode, over real tables in guest memory."""

from __future__ import annotations

import itertools
import mmap
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasskvm.lass import FETCH, IMPLICIT, STACK, WRITE
from lasskvm.memory import GuestMemory
from lasskvm.x86.exceptions import PF_I, PF_P, PF_PK, PF_RSVD, PF_U, PF_W
from lasskvm.x86.paging import (
    PERM_R,
    PERM_W,
    PERM_X,
    PTE_A,
    PTE_D,
    PTE_G,
    PTE_KEY_SHIFT,
    PTE_P,
    PTE_PS,
    PTE_U,
    PTE_W,
    PTE_XD,
    pdpte_reserved,
    walk,
)
from lasskvm.x86.registers import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PKE,
    CR4_PKS,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    MASK32,
)

MEMORY_BYTES = 1 << 16
MAXPHYADDR = 46
FIRST_TABLE = 0x1000
HOLE = 0x100000
READ = 0
LONG_MODE = EFER_LME | EFER_LMA


def plain_walk(*arguments: Any, **named: Any) -> tuple[int, int, int]:
    """The walk without EPT."""
    gpa, permissions, error_code, outcome = walk(*arguments, **named, eptp=0)
    assert outcome == 0
    return gpa, permissions, error_code


@dataclass(frozen=True)
class Mode:
    """One paging mode: the control bits that select it, and the shifts of its levels from the top."""

    name: str
    cr4: int
    efer: int
    shifts: tuple[int, ...]
    entry_bytes: int
    address: int

    @property
    def is_wide(self) -> bool:
        return self.entry_bytes == 8


LEGACY = Mode("32-bit", CR4_PSE, 0, (22, 12), 4, 0x9ABCDEF7)
PAE = Mode("pae", CR4_PAE, 0, (21, 12), 8, 0x9ABCDEF7)
FOUR_LEVEL = Mode("4-level", CR4_PAE, LONG_MODE, (39, 30, 21, 12), 8, 0xFFFF_8123_4567_89AB)
FIVE_LEVEL = Mode("5-level", CR4_PAE | CR4_LA57, LONG_MODE, (48, 39, 30, 21, 12), 8, 0xFF23_4567_89AB_CDEF)

#: Every mode with every page size (as a shift) it has.
PAGES = [
    (LEGACY, 12), (LEGACY, 22), (PAE, 12), (PAE, 21), (FOUR_LEVEL, 12), (FOUR_LEVEL, 21), (FOUR_LEVEL, 30),
    (FIVE_LEVEL, 12), (FIVE_LEVEL, 21), (FIVE_LEVEL, 30),
]  # fmt: skip
every_page = pytest.mark.parametrize(
    ("mode", "page_shift"), PAGES, ids=[f"{mode.name}-{1 << shift >> 10}K" for mode, shift in PAGES]
)
#: The same, with every level of the walk (0 is the top one).
LEVELS = [(mode, shift, level) for mode, shift in PAGES for level in range(mode.shifts.index(shift) + 1)]
every_level = pytest.mark.parametrize(
    ("mode", "page_shift", "level"),
    LEVELS,
    ids=[f"{mode.name}-{1 << shift >> 10}K-level{level}" for mode, shift, level in LEVELS],
)


class CountingMemory(GuestMemory):
    """Guest memory that counts the stores of a walk."""

    stores = 0

    def store(self, gpa: int, size: int, value: int) -> None:
        self.stores += 1
        super().store(gpa, size, value)


class Tables:
    """Tables that map one page: user, writable, executable, neither accessed nor dirty."""

    def __init__(self, mode: Mode, page_shift: int) -> None:
        self.mode = mode
        self.memory = CountingMemory()
        self.memory.set_slot(0, 0, mmap.mmap(-1, MEMORY_BYTES))
        self.address = mode.address
        self.offset = mode.address & ((1 << page_shift) - 1)
        self.cr3 = FIRST_TABLE
        self.pdpte = FIRST_TABLE | PTE_P if mode is PAE else 0
        self.shifts = mode.shifts[: mode.shifts.index(page_shift) + 1]
        index_bits = 9 if mode.is_wide else 10
        self.entry_gpas = []
        for level, shift in enumerate(self.shifts):
            index = mode.address >> shift & ((1 << index_bits) - 1)
            self.entry_gpas.append(FIRST_TABLE + level * 0x1000 + index * mode.entry_bytes)
        for level in range(self.leaf):
            self.set(level, FIRST_TABLE + (level + 1) * 0x1000 | PTE_P | PTE_W | PTE_U)
        if mode.is_wide:
            self.frame = 0x2A54_7320_F000 & ~((1 << page_shift) - 1)
            entry = self.frame
        elif page_shift == 22:
            self.frame = 0xA5_8740_0000
            entry = self.frame & 0xFFFFFFFF | (self.frame >> 32) << 13
        else:
            entry = self.frame = 0x8765_4000
        self.set(self.leaf, entry | PTE_P | PTE_W | PTE_U | (PTE_PS if page_shift != 12 else 0))
        self.memory.stores = 0

    @property
    def leaf(self) -> int:
        """The level that maps the page."""
        return len(self.shifts) - 1

    @property
    def gpa(self) -> int:
        """Where the mapped address must lead."""
        return self.frame | self.offset

    def get(self, level: int) -> int:
        return self.memory.load(self.entry_gpas[level], self.mode.entry_bytes)

    def set(self, level: int, value: int) -> None:
        self.memory.store(self.entry_gpas[level], self.mode.entry_bytes, value)

    def change(self, level: int, *, on: int = 0, off: int = 0) -> None:
        self.set(level, self.get(level) & ~off | on)

    def entries(self) -> list[int]:
        return [self.get(level) for level in range(len(self.shifts))]

    def walk(
        self,
        flags: int = READ,
        *,
        user: bool = False,
        ac: bool = False,
        cr0: int = CR0_WP,
        cr4: int = 0,
        efer: int = EFER_NXE,
        maxphyaddr: int = MAXPHYADDR,
        pkru: int = 0,
        pkrs: int = 0,
    ) -> tuple[int, int, int]:
        """Walk for the mapped address; *cr0*, *cr4* and *efer* are what comes on top of the mode's bits."""
        return plain_walk(
            self.memory,
            self.address,
            flags,
            user,
            cr0 | CR0_PG | CR0_PE,
            self.cr3,
            cr4 | self.mode.cr4,
            efer | self.mode.efer,
            ac,
            maxphyaddr,
            self.pdpte,
            pkru,
            pkrs,
        )


# ------------------------------------------------------------------------------------------- modes and sizes


@every_page
def test_a_mapped_address_translates(mode: Mode, page_shift: int) -> None:
    tables = Tables(mode, page_shift)
    assert tables.walk(user=True) == (tables.gpa, PERM_R | PERM_X, 0)
    assert tables.walk(WRITE, user=True) == (tables.gpa, PERM_R | PERM_W | PERM_X, 0)


@every_page
def test_the_first_and_the_last_byte_of_a_page_translate(mode: Mode, page_shift: int) -> None:
    tables = Tables(mode, page_shift)
    last = (1 << page_shift) - 1
    tables.address = mode.address & ~last
    assert tables.walk()[0] == tables.frame
    tables.address = mode.address | last
    assert tables.walk()[0] == tables.frame | last


@every_page
def test_the_next_page_is_another_translation(mode: Mode, page_shift: int) -> None:
    tables = Tables(mode, page_shift)
    tables.address = mode.address + (1 << page_shift)
    assert tables.walk()[1:] == (0, 0)


def test_without_paging_a_linear_address_is_a_physical_one() -> None:
    memory = GuestMemory()
    assert plain_walk(memory, 0x12345678, WRITE, True, CR0_PE, 0, 0, 0, False, MAXPHYADDR, 0, 0, 0) == (
        0x12345678,
        PERM_R | PERM_W | PERM_X,
        0,
    )
    assert plain_walk(memory, 0x1_0000_0000, READ, False, 0, 0, 0, 0, False, MAXPHYADDR, 0, 0, 0)[0] == 0


def test_without_pse_the_page_size_bit_is_ignored() -> None:
    mode = Mode("no PSE", 0, 0, (22, 12), 4, LEGACY.address)
    tables = Tables(mode, 12)
    tables.change(0, on=PTE_PS)
    assert tables.walk(user=True)[0] == tables.gpa


def test_pcid_and_cache_bits_of_cr3_are_not_part_of_the_address() -> None:
    tables = Tables(FOUR_LEVEL, 12)
    tables.cr3 |= 0xFFF
    assert tables.walk()[0] == tables.gpa


def test_lam_bits_of_cr3_are_not_part_of_the_address() -> None:
    tables = Tables(FOUR_LEVEL, 12)
    tables.cr3 |= 3 << 61
    assert tables.walk()[0] == tables.gpa


def test_outside_long_mode_cr3_has_32_bits() -> None:
    tables = Tables(LEGACY, 12)
    tables.cr3 |= 0xFFFF_FFFF_0000_0000
    assert tables.walk()[0] == tables.gpa


def test_a_pdpte_that_is_not_present_is_a_page_fault() -> None:
    tables = Tables(PAE, 12)
    tables.pdpte = FIRST_TABLE
    assert tables.walk(WRITE, user=True) == (0, 0, PF_W | PF_U)


@pytest.mark.parametrize("bit", [1, 2, 5, 6, 7, 8, *range(MAXPHYADDR, 64)])
def test_a_reserved_bit_of_a_pdpte(bit: int) -> None:
    assert pdpte_reserved(1 << bit | PTE_P, MAXPHYADDR)
    assert not pdpte_reserved(1 << bit, MAXPHYADDR)


@pytest.mark.parametrize("bit", [0, 3, 4, 9, 10, 11, *range(12, MAXPHYADDR)])
def test_the_other_bits_of_a_pdpte_are_not_reserved(bit: int) -> None:
    assert not pdpte_reserved(1 << bit | PTE_P, MAXPHYADDR)


# ------------------------------------------------------------------------------------------------ permissions


def is_allowed(
    kind: int,
    user: bool,
    user_page: bool,
    writable: bool,
    xd: bool,
    wp: bool,
    smep: bool,
    smap: bool,
    ac: bool,
) -> bool:
    """SDM 4.6.1, one return for each of its sentences."""
    if user:
        if not user_page:
            return False
        if kind == READ:
            return True
        if kind == WRITE:
            return writable
        return not xd
    if kind == FETCH:
        if user_page and smep:
            return False
        return not xd
    if user_page and smap and not ac:
        return False
    if kind == READ:
        return True
    if wp:
        return writable
    return True


def access_bits(kind: int, user: bool, fetch_is_told: bool) -> int:
    """The bits of an error code that describe the access."""
    code = PF_U if user else 0
    if kind == WRITE:
        code |= PF_W
    if kind == FETCH and fetch_is_told:
        code |= PF_I
    return code


#: Every combination of five switches.
SWITCHES = list(itertools.product((False, True), repeat=5))


@every_level
def test_every_combination_of_permissions(mode: Mode, page_shift: int, level: int) -> None:
    """U/S, R/W and XD are withheld at one level; all others grant everything."""
    tables = Tables(mode, page_shift)
    before = tables.entries()
    for user_page, writable, xd, dirty in itertools.product((False, True), repeat=4):
        if xd and not mode.is_wide:
            continue
        for place, entry in enumerate(before):
            tables.set(place, entry)
        tables.change(
            level,
            off=(0 if user_page else PTE_U) | (0 if writable else PTE_W),
            on=PTE_XD if xd else 0,
        )
        if dirty:
            tables.change(tables.leaf, on=PTE_D)
        leaf = tables.get(tables.leaf)
        for kind, (user, wp, smep, smap, ac) in itertools.product((READ, WRITE, FETCH), SWITCHES):
            tables.set(tables.leaf, leaf)
            page = (user, user_page, writable, xd, wp, smep, smap, ac)
            result = tables.walk(
                kind,
                user=user,
                ac=ac,
                cr0=CR0_WP if wp else 0,
                cr4=(CR4_SMEP if smep else 0) | (CR4_SMAP if smap else 0),
            )
            if is_allowed(kind, *page):
                permissions = PERM_R if is_allowed(READ, *page) else 0
                permissions |= PERM_X if is_allowed(FETCH, *page) else 0
                if is_allowed(WRITE, *page) and (dirty or kind == WRITE):
                    permissions |= PERM_W
                assert result == (tables.gpa, permissions, 0), (kind, *page)
            else:
                code = PF_P | access_bits(kind, user, smep or mode.is_wide)
                assert result == (0, 0, code), (kind, *page)


@every_page
@pytest.mark.parametrize("flag", [IMPLICIT, STACK])
def test_other_access_flags_make_no_difference(mode: Mode, page_shift: int, flag: int) -> None:
    tables = Tables(mode, page_shift)
    for kind in (READ, WRITE, FETCH):
        assert tables.walk(kind | flag) == tables.walk(kind)


# ------------------------------------------------------------------------------------------------ error codes


@every_level
@pytest.mark.parametrize("kind", [READ, WRITE, FETCH])
@pytest.mark.parametrize("user", [False, True])
def test_an_entry_that_is_not_present(mode: Mode, page_shift: int, level: int, kind: int, user: bool) -> None:
    tables = Tables(mode, page_shift)
    tables.set(level, 0)
    assert tables.walk(kind, user=user) == (0, 0, access_bits(kind, user, mode.is_wide))


@every_level
def test_an_entry_that_is_not_present_has_no_reserved_bits(mode: Mode, page_shift: int, level: int) -> None:
    tables = Tables(mode, page_shift)
    tables.set(level, (1 << 8 * mode.entry_bytes) - 1 & ~PTE_P)
    assert tables.walk(efer=0) == (0, 0, 0)


@every_page
def test_an_instruction_fetch_is_told_only_with_smep_or_nx(mode: Mode, page_shift: int) -> None:
    tables = Tables(mode, page_shift)
    tables.set(tables.leaf, 0)
    assert tables.walk(FETCH, efer=0) == (0, 0, 0)
    assert tables.walk(FETCH, efer=0, cr4=CR4_SMEP) == (0, 0, PF_I)
    assert tables.walk(FETCH, efer=EFER_NXE) == (0, 0, PF_I if mode.is_wide else 0)


# 4 KiB pages of 32-bit paging have no reserved bits.
@pytest.mark.parametrize(("mode", "page_shift"), [page for page in PAGES if page != (LEGACY, 12)])
@pytest.mark.parametrize("kind", [READ, WRITE, FETCH])
@pytest.mark.parametrize("user", [False, True])
def test_a_reserved_bit_comes_before_the_access_rights(
    mode: Mode, page_shift: int, kind: int, user: bool
) -> None:
    tables = Tables(mode, page_shift)
    tables.change(tables.leaf, off=PTE_U | PTE_W, on=1 << (50 if mode.is_wide else 21))
    assert tables.walk(kind, user=user) == (0, 0, PF_P | PF_RSVD | access_bits(kind, user, mode.is_wide))


# ---------------------------------------------------------------------------------------------- reserved bits


def faulting_bits(tables: Tables, level: int, bits: range, efer: int, maxphyaddr: int) -> set[int]:
    """The bits of an entry that make a walk fault when they are flipped on, all as reserved bits."""
    entry, faulting = tables.get(level), set()
    for bit in bits:
        tables.set(level, entry | 1 << bit)
        gpa, permissions, code = tables.walk(efer=efer, maxphyaddr=maxphyaddr)
        tables.set(level, entry)
        if permissions == 0:
            assert (gpa, code) == (0, PF_P | PF_RSVD)
            faulting.add(bit)
    return faulting


@pytest.mark.parametrize("maxphyaddr", [36, 40, 46, 52])
@pytest.mark.parametrize("efer", [0, EFER_NXE], ids=["no-nx", "nx"])
@pytest.mark.parametrize(("mode", "page_shift", "level"), [place for place in LEVELS if place[0].is_wide])
def test_exactly_the_high_bits_of_the_manual_are_reserved(
    mode: Mode, page_shift: int, level: int, efer: int, maxphyaddr: int
) -> None:
    """Bits from MAXPHYADDR on: to 51 in long mode, to 62 with PAE; and XD without EFER.NXE."""
    tables = Tables(mode, page_shift)
    tables.frame &= (1 << 36) - 1
    tables.set(tables.leaf, tables.get(tables.leaf) & (1 << 36) - 1)
    expected = set(range(maxphyaddr, 63 if mode is PAE else 52)) | (set() if efer else {63})
    assert faulting_bits(tables, level, range(maxphyaddr, 64), efer, maxphyaddr) == expected


@every_level
def test_the_bits_left_to_software_are_not_reserved(mode: Mode, page_shift: int, level: int) -> None:
    tables = Tables(mode, page_shift)
    assert faulting_bits(tables, level, range(8, 12), EFER_NXE, MAXPHYADDR) == set()
    assert faulting_bits(tables, level, range(1, 7), EFER_NXE, MAXPHYADDR) == set()


@pytest.mark.parametrize(("mode", "page_shift"), [page for page in PAGES if page[0].is_wide and page[1] > 12])
def test_the_low_address_bits_of_a_large_page_are_reserved_but_pat_is_not(
    mode: Mode, page_shift: int
) -> None:
    tables = Tables(mode, page_shift)
    expected = set(range(13, page_shift))
    assert faulting_bits(tables, tables.leaf, range(12, page_shift), EFER_NXE, MAXPHYADDR) == expected


@pytest.mark.parametrize(
    ("mode", "level"),
    [(FOUR_LEVEL, 0), (FIVE_LEVEL, 0), (FIVE_LEVEL, 1)],
    ids=["PML4E", "PML5E", "PML4E of 5"],
)
def test_the_page_size_bit_above_1_gib_is_reserved(mode: Mode, level: int) -> None:
    tables = Tables(mode, 12)
    tables.set(level, PTE_P | PTE_W | PTE_U | PTE_PS)
    assert tables.walk() == (0, 0, PF_P | PF_RSVD)


def test_bit_7_of_a_4_kib_entry_is_pat_and_not_a_page_size() -> None:
    for mode in (LEGACY, PAE, FOUR_LEVEL, FIVE_LEVEL):
        tables = Tables(mode, 12)
        tables.change(tables.leaf, on=PTE_PS)
        assert tables.walk()[0] == tables.gpa


@pytest.mark.parametrize(
    ("maxphyaddr", "expected"),
    [(32, set(range(13, 22))), (36, set(range(17, 22))), (39, {20, 21}), (40, {21}), (46, {21}), (52, {21})],
)
def test_a_4_mib_page_has_at_most_40_physical_address_bits(maxphyaddr: int, expected: set[int]) -> None:
    tables = Tables(LEGACY, 22)
    tables.set(0, 0x8740_0000 | PTE_P | PTE_W | PTE_U | PTE_PS)
    assert faulting_bits(tables, 0, range(13, 22), 0, maxphyaddr) == expected


def test_a_4_mib_page_takes_its_upper_address_bits_from_bits_20_to_13() -> None:
    tables = Tables(LEGACY, 22)
    tables.set(0, 0x8740_0000 | 0x81 << 13 | PTE_P | PTE_PS)
    assert tables.walk()[0] == 0x81_8740_0000 | tables.offset


def test_without_nx_an_xd_bit_is_reserved_and_not_a_permission() -> None:
    tables = Tables(FOUR_LEVEL, 12)
    tables.change(2, on=PTE_XD)
    assert tables.walk(READ, efer=0) == (0, 0, PF_P | PF_RSVD)
    assert tables.walk(READ)[1] == PERM_R


# ------------------------------------------------------------------------------------ accessed and dirty bits


@every_page
def test_a_read_sets_the_accessed_bit_at_every_level(mode: Mode, page_shift: int) -> None:
    tables = Tables(mode, page_shift)
    before = tables.entries()
    tables.walk()
    assert tables.entries() == [entry | PTE_A for entry in before]


@every_page
def test_a_write_sets_the_dirty_bit_of_the_last_level_only(mode: Mode, page_shift: int) -> None:
    tables = Tables(mode, page_shift)
    before = tables.entries()
    tables.walk(WRITE)
    assert tables.entries() == [*(entry | PTE_A for entry in before[:-1]), before[-1] | PTE_A | PTE_D]


@every_page
def test_a_fetch_does_not_set_the_dirty_bit(mode: Mode, page_shift: int) -> None:
    tables = Tables(mode, page_shift)
    tables.walk(FETCH)
    assert tables.get(tables.leaf) & (PTE_A | PTE_D) == PTE_A


@every_page
def test_a_clean_page_is_not_writable_until_it_is_written(mode: Mode, page_shift: int) -> None:
    tables = Tables(mode, page_shift)
    assert not tables.walk()[1] & PERM_W
    assert tables.walk(WRITE)[1] & PERM_W
    assert tables.walk()[1] & PERM_W


@every_page
def test_entries_that_need_no_change_are_not_written(mode: Mode, page_shift: int) -> None:
    tables = Tables(mode, page_shift)
    tables.walk(WRITE)
    assert tables.memory.stores == len(tables.shifts)
    tables.memory.stores = 0
    for kind in (READ, WRITE, FETCH):
        tables.walk(kind)
    assert tables.memory.stores == 0


@every_page
def test_a_refused_access_leaves_the_last_level_alone(mode: Mode, page_shift: int) -> None:
    tables = Tables(mode, page_shift)
    tables.change(tables.leaf, off=PTE_W)
    leaf = tables.get(tables.leaf)
    assert tables.walk(WRITE, user=True)[2] == PF_P | PF_W | PF_U
    assert tables.get(tables.leaf) == leaf
    assert all(entry & PTE_A for entry in tables.entries()[:-1])


@every_level
def test_a_walk_that_ends_early_marks_what_it_used(mode: Mode, page_shift: int, level: int) -> None:
    tables = Tables(mode, page_shift)
    tables.change(level, off=PTE_P)
    before = tables.entries()
    tables.walk(WRITE)
    assert tables.entries() == [
        entry | PTE_A if place < level else entry for place, entry in enumerate(before)
    ]


def test_an_entry_with_a_reserved_bit_is_not_marked() -> None:
    tables = Tables(FOUR_LEVEL, 12)
    tables.change(1, on=1 << 50)
    tables.walk()
    assert [bool(entry & PTE_A) for entry in tables.entries()] == [True, False, False, False]


def test_the_other_bits_of_an_entry_survive_marking() -> None:
    tables = Tables(FOUR_LEVEL, 12)
    kept = PTE_G | 7 << 9 | 0x7FF << 52 | PTE_XD
    tables.change(3, on=kept)
    before = tables.get(3)
    tables.walk(WRITE)
    assert tables.get(3) == before | PTE_A | PTE_D


# -------------------------------------------------------------------------------------------- protection keys

KEY = 5
ACCESS_DISABLE, WRITE_DISABLE = 1 << 2 * KEY, 2 << 2 * KEY
every_ia32e_page = pytest.mark.parametrize(
    ("mode", "page_shift"),
    [(mode, shift) for mode, shift in PAGES if mode.efer],
    ids=[f"{mode.name}-{1 << shift >> 10}K" for mode, shift in PAGES if mode.efer],
)


def keyed(mode: Mode, page_shift: int, *, user_page: bool) -> Tables:
    """Tables whose page has protection key ``KEY``, is dirty, and belongs to user mode or not."""
    tables = Tables(mode, page_shift)
    tables.change(tables.leaf, on=KEY << PTE_KEY_SHIFT | PTE_D, off=0 if user_page else PTE_U)
    return tables


def key_denies(kind: int, user: bool, wp: bool, rights: int) -> bool:
    """SDM 4.6.2 in words: AD stops data accesses, WD writes, those of the supervisor only with CR0.WP."""
    if kind == FETCH:
        return False
    return bool(rights & ACCESS_DISABLE) or (kind == WRITE and bool(rights & WRITE_DISABLE) and (user or wp))


@every_ia32e_page
def test_keys_of_user_pages_follow_pkru(mode: Mode, page_shift: int) -> None:
    tables = keyed(mode, page_shift, user_page=True)
    for kind, user, wp, rights in itertools.product(
        (READ, WRITE, FETCH), (False, True), (False, True), (0, ACCESS_DISABLE, WRITE_DISABLE)
    ):
        _, permissions, code = tables.walk(
            kind, user=user, cr0=CR0_WP if wp else 0, cr4=CR4_PKE | CR4_PKS, pkru=rights
        )
        if key_denies(kind, user, wp, rights):
            assert (permissions, code) == (0, PF_P | PF_PK | access_bits(kind, user, True))
        else:
            assert bool(permissions & PERM_R) == (not key_denies(READ, user, wp, rights))
            assert bool(permissions & PERM_W) == (not key_denies(WRITE, user, wp, rights))
            assert permissions & PERM_X


@every_ia32e_page
def test_keys_of_supervisor_pages_follow_pkrs(mode: Mode, page_shift: int) -> None:
    tables = keyed(mode, page_shift, user_page=False)
    for kind, wp, rights in itertools.product(
        (READ, WRITE, FETCH), (False, True), (0, ACCESS_DISABLE, WRITE_DISABLE)
    ):
        _, permissions, code = tables.walk(
            kind, cr0=CR0_WP if wp else 0, cr4=CR4_PKE | CR4_PKS, pkru=MASK32, pkrs=rights
        )
        denied = key_denies(kind, False, wp, rights)
        assert code == (PF_P | PF_PK | access_bits(kind, False, True) if denied else 0)
        assert bool(permissions) != denied


@pytest.mark.parametrize(("user_page", "cr4"), [(True, 0), (True, CR4_PKS), (False, 0), (False, CR4_PKE)])
def test_keys_mean_nothing_without_their_cr4_bit(user_page: bool, cr4: int) -> None:
    tables = keyed(FOUR_LEVEL, 12, user_page=user_page)
    assert tables.walk(WRITE, cr4=cr4, pkru=MASK32, pkrs=MASK32)[1] == PERM_R | PERM_W | PERM_X


def test_keys_exist_in_ia32e_mode_only() -> None:
    """With PAE paging the bits of the key are reserved."""
    tables = Tables(PAE, 12)
    tables.change(tables.leaf, on=PTE_D)
    assert tables.walk(WRITE, cr4=CR4_PKE, pkru=MASK32)[1] == PERM_R | PERM_W | PERM_X
    tables.change(tables.leaf, on=1 << PTE_KEY_SHIFT)
    assert tables.walk(WRITE, cr4=CR4_PKE) == (0, 0, PF_P | PF_RSVD | PF_W)


def test_rights_of_other_keys_do_not_matter() -> None:
    tables = keyed(FOUR_LEVEL, 12, user_page=True)
    others = MASK32 & ~(ACCESS_DISABLE | WRITE_DISABLE)
    assert tables.walk(WRITE, user=True, cr4=CR4_PKE, pkru=others)[1] & PERM_W


def test_the_key_is_that_of_the_entry_that_maps_the_page() -> None:
    tables = keyed(FOUR_LEVEL, 12, user_page=True)
    tables.change(0, on=1 << PTE_KEY_SHIFT)
    assert tables.walk(user=True, cr4=CR4_PKE, pkru=1 << 2)[1] & PERM_R
    assert tables.walk(user=True, cr4=CR4_PKE, pkru=ACCESS_DISABLE)[2] == PF_P | PF_U | PF_PK


def test_a_key_is_reported_beside_another_cause() -> None:
    """A write to a read-only page whose key denies it too: the error code says so."""
    tables = keyed(FOUR_LEVEL, 12, user_page=True)
    tables.change(tables.leaf, off=PTE_W)
    assert tables.walk(WRITE, user=True, cr4=CR4_PKE, pkru=0)[2] == PF_P | PF_W | PF_U
    assert tables.walk(WRITE, user=True, cr4=CR4_PKE, pkru=WRITE_DISABLE)[2] == PF_P | PF_W | PF_U | PF_PK


def test_an_access_that_a_key_denies_sets_no_bits_in_the_page_entry() -> None:
    tables = keyed(FOUR_LEVEL, 12, user_page=True)
    before = tables.get(tables.leaf)
    assert tables.walk(user=True, cr4=CR4_PKE, pkru=ACCESS_DISABLE)[1] == 0
    assert tables.get(tables.leaf) == before


def test_a_missing_page_has_no_key() -> None:
    tables = keyed(FOUR_LEVEL, 12, user_page=True)
    tables.change(tables.leaf, off=PTE_P)
    assert tables.walk(user=True, cr4=CR4_PKE, pkru=MASK32)[2] == PF_U


# ------------------------------------------------------------------------------------------------------ holes


@pytest.mark.parametrize("maxphyaddr", [36, 46, 52])
def test_a_top_table_in_a_hole_has_reserved_bits(maxphyaddr: int) -> None:
    """A hole loads as all ones: with 52 address bits it is still the page-size bit that is reserved."""
    for mode in (FOUR_LEVEL, FIVE_LEVEL):
        tables = Tables(mode, 12)
        tables.cr3 = HOLE
        assert tables.walk(WRITE, maxphyaddr=maxphyaddr) == (0, 0, PF_P | PF_RSVD | PF_W)


@pytest.mark.parametrize("level", range(3))
def test_a_lower_table_in_a_hole_has_reserved_bits(level: int) -> None:
    tables = Tables(FOUR_LEVEL, 12)
    tables.set(level, HOLE | PTE_P | PTE_W | PTE_U)
    assert tables.walk(user=True) == (0, 0, PF_P | PF_RSVD | PF_U)


def test_a_page_directory_in_a_hole_has_reserved_bits() -> None:
    tables = Tables(LEGACY, 22)
    tables.cr3 = HOLE
    assert tables.walk() == (0, 0, PF_P | PF_RSVD)
    tables = Tables(PAE, 12)
    tables.pdpte = HOLE | PTE_P
    assert tables.walk() == (0, 0, PF_P | PF_RSVD)


def test_a_32_bit_page_table_in_a_hole_maps_the_last_page() -> None:
    tables = Tables(LEGACY, 12)
    tables.set(0, HOLE | PTE_P | PTE_W | PTE_U)
    assert tables.walk()[0] == 0xFFFFF000 | tables.offset


def test_tables_in_read_only_memory_are_walked_but_not_marked() -> None:
    tables = Tables(FOUR_LEVEL, 12)
    before = tables.entries()
    slot = tables.memory.find(0)
    assert slot is not None
    tables.memory.set_slot(0, 0, slot.buffer, flags=1 << 1)
    assert tables.walk(WRITE)[0] == tables.gpa
    assert tables.entries() == before


# -------------------------------------------------------------------------------------------------- any table

addresses = st.integers(0, (1 << 64) - 1)
#: Entries that look like entries: some random, most present and pointing into memory.
entries = st.one_of(
    addresses,
    st.builds(
        lambda table, low, extra: table << 12 | low | PTE_P | extra,
        st.integers(0, (MEMORY_BYTES >> 12) - 1),
        st.integers(0, 0xFFF),
        st.sampled_from([0, 0, 0, PTE_XD, 1 << 51, 1 << 60]),
    ),
)
controls = st.fixed_dictionaries(
    {
        "user": st.booleans(),
        "cr0": st.integers(0, (1 << 32) - 1).map(lambda value: value | CR0_PG),
        "cr3": st.one_of(addresses, st.integers(0, 15).map(lambda page: page << 12)),
        "cr4": st.integers(0, (1 << 29) - 1),
        "efer": st.sampled_from([0, EFER_NXE, LONG_MODE, LONG_MODE | EFER_NXE]),
        "ac": st.booleans(),
        "maxphyaddr": st.integers(32, 52),
        "pdpte": entries,
        "pkru": st.integers(0, MASK32),
        "pkrs": st.integers(0, MASK32),
    }
)


def random_memory(words: list[int]) -> GuestMemory:
    memory = GuestMemory()
    memory.set_slot(0, 0, mmap.mmap(-1, MEMORY_BYTES))
    page = b"".join(word.to_bytes(8, "little") for word in words)
    memory.write(0, (page * (MEMORY_BYTES // len(page) + 1))[:MEMORY_BYTES])
    return memory


@settings(max_examples=300)
@given(st.lists(entries, min_size=1, max_size=64), addresses, st.sampled_from([READ, WRITE, FETCH]), controls)
def test_whatever_the_tables_hold_a_walk_translates_or_faults(
    words: list[int], address: int, kind: int, control: dict[str, int]
) -> None:
    gpa, permissions, code = plain_walk(random_memory(words), address, kind, **control)  # type: ignore[arg-type]
    needed = {READ: PERM_R, WRITE: PERM_W, FETCH: PERM_X}[kind]
    if permissions:
        assert permissions & needed
        assert 0 <= gpa < 1 << 52
        assert gpa & 0xFFF == address & 0xFFF
        assert code == 0
    else:
        assert gpa == 0
        assert bool(code & PF_U) == control["user"]
        assert bool(code & PF_W) == (kind == WRITE)
        assert code & ~(PF_P | PF_W | PF_U | PF_RSVD | PF_I | PF_PK) == 0
        assert not code & PF_RSVD or code & PF_P
        assert not code & PF_PK or (code & PF_P and not code & PF_RSVD and kind != FETCH)


@settings(max_examples=200)
@given(st.lists(entries, min_size=1, max_size=64), addresses, st.sampled_from([READ, WRITE, FETCH]), controls)
def test_a_second_walk_gives_the_same_answer(
    words: list[int], address: int, kind: int, control: dict[str, int]
) -> None:
    """Accessed and dirty bits do not change where a walk leads, even in tables that map themselves."""
    memory = random_memory(words)
    first = plain_walk(memory, address, kind, **control)  # type: ignore[arg-type]
    marked = memory.read(0, MEMORY_BYTES)
    second = plain_walk(memory, address, kind, **control)  # type: ignore[arg-type]
    assert first == second
    assert memory.read(0, MEMORY_BYTES) == marked
