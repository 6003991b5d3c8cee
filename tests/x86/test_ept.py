"""The EPT walk, over real tables; what the manual says is written down once more, in words and sets of bits."""

from __future__ import annotations

import itertools
import mmap
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasskvm.lass import FETCH, IMPLICIT, STACK, WRITE
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
    GPA_OF_PDPTES,
    GPA_OF_TABLE,
    ept_walk,
    exit_qualification,
    exit_reason,
)
from lasskvm.x86.physical import PERM_ALL, PERM_R, PERM_W, PERM_X
from lasskvm.x86.vmx import MEMORY_TYPE_UC, MEMORY_TYPE_WB, VMX_EPTP_AD_ENABLE_BIT, VMX_EPTP_PWL_4
from lasskvm.x86.vmx_exits import EptViolation, ExitReason

MEMORY_BYTES = 1 << 16
MAXPHYADDR = 46
FIRST_TABLE = 0x1000
HOLE = 0x100000
READ = 0
RWX = EPT_R | EPT_W | EPT_X
WB = MEMORY_TYPE_WB << EPT_TYPE_SHIFT
SHIFTS = (39, 30, 21, 12)
GPA = 0x8123_4567_89AB
KINDS = (READ, WRITE, FETCH)
PURPOSES = (GPA_OF_LINEAR, GPA_OF_TABLE, GPA_OF_PDPTES)

every_page = pytest.mark.parametrize("page_shift", [12, 21, 30], ids=["4K", "2M", "1G"])
LEVELS = [(shift, level) for shift in (12, 21, 30) for level in range(SHIFTS.index(shift) + 1)]
every_level = pytest.mark.parametrize(
    ("page_shift", "level"), LEVELS, ids=[f"{1 << shift >> 10}K-level{level}" for shift, level in LEVELS]
)
with_and_without_flags = pytest.mark.parametrize("ad", [False, True], ids=["no A/D", "A/D"])


class CountingMemory(GuestMemory):
    """Guest memory that counts what a walk does."""

    loads = 0
    stores = 0

    def load(self, gpa: int, size: int) -> int:
        self.loads += 1
        return super().load(gpa, size)

    def store(self, gpa: int, size: int, value: int) -> None:
        self.stores += 1
        super().store(gpa, size, value)


class Ept:
    """EPT tables that map one page with all rights, write-back, neither accessed nor dirty."""

    def __init__(self, page_shift: int = 12, *, ad: bool = False) -> None:
        self.memory = CountingMemory()
        self.memory.set_slot(0, 0, mmap.mmap(-1, MEMORY_BYTES))
        self.eptp = FIRST_TABLE | MEMORY_TYPE_WB | VMX_EPTP_PWL_4 | (VMX_EPTP_AD_ENABLE_BIT if ad else 0)
        self.leaf = SHIFTS.index(page_shift)
        self.frame = 0x2A54_7320_F000 & ~((1 << page_shift) - 1)
        self.hpa = self.frame | GPA & ((1 << page_shift) - 1)
        self.entry_hpas = [
            FIRST_TABLE + level * 0x1000 + (GPA >> SHIFTS[level] & 0x1FF) * 8
            for level in range(self.leaf + 1)
        ]
        for level in range(self.leaf):
            self.set(level, FIRST_TABLE + (level + 1) * 0x1000 | RWX)
        self.set(self.leaf, self.frame | RWX | WB | (EPT_PS if page_shift != 12 else 0))
        self.memory.stores = 0

    def get(self, level: int) -> int:
        return self.memory.load(self.entry_hpas[level], 8)

    def set(self, level: int, value: int) -> None:
        self.memory.store(self.entry_hpas[level], 8, value)

    def change(self, level: int, *, on: int = 0, off: int = 0) -> None:
        self.set(level, self.get(level) & ~off | on)

    def entries(self) -> list[int]:
        return [self.get(level) for level in range(self.leaf + 1)]

    def walk(
        self, flags: int = READ, purpose: int = GPA_OF_LINEAR, *, gpa: int = GPA, maxphyaddr: int = MAXPHYADDR
    ) -> tuple[int, int, int]:
        return ept_walk(self.memory, gpa, flags, self.eptp, maxphyaddr, purpose)


def refused(outcome: int) -> tuple[int, int, int]:
    return 0, 0, outcome


def violation(*bits: int) -> tuple[int, int, int]:
    """A violation by an access on behalf of a linear address, with more *bits* of the qualification."""
    qualification = GPA_OF_LINEAR
    for bit in bits:
        qualification |= bit
    return refused(EPT_VIOLATION | qualification)


MISCONFIGURATION = refused(EPT_MISCONFIGURATION)
ACC_READ, ACC_WRITE, ACC_INSTR = EptViolation.ACC_READ, EptViolation.ACC_WRITE, EptViolation.ACC_INSTR
PROT_READ, PROT_WRITE, PROT_EXEC = EptViolation.PROT_READ, EptViolation.PROT_WRITE, EptViolation.PROT_EXEC
ACCESS_BITS = {READ: ACC_READ, WRITE: ACC_WRITE, FETCH: ACC_INSTR}


# ------------------------------------------------------------------------------------------------- what it maps


@every_page
@with_and_without_flags
def test_a_mapped_address_translates(page_shift: int, ad: bool) -> None:
    ept = Ept(page_shift, ad=ad)
    for kind in (WRITE, READ, FETCH):
        assert ept.walk(kind) == (ept.hpa, PERM_ALL, 0)


@every_page
def test_the_first_and_the_last_byte_of_a_page_translate(page_shift: int) -> None:
    ept = Ept(page_shift)
    last = (1 << page_shift) - 1
    assert ept.walk(gpa=GPA & ~last)[0] == ept.frame
    assert ept.walk(gpa=GPA | last)[0] == ept.frame | last


@every_page
def test_the_next_page_is_another_translation(page_shift: int) -> None:
    ept = Ept(page_shift)
    assert ept.walk(gpa=GPA + (1 << page_shift)) == violation(ACC_READ)


def test_the_other_bits_of_the_eptp_are_not_part_of_the_address() -> None:
    ept = Ept()
    ept.eptp |= 0xFFF & ~VMX_EPTP_AD_ENABLE_BIT
    assert ept.walk()[0] == ept.hpa


@pytest.mark.parametrize("bit", range(48, 52))
def test_a_gpa_of_more_than_48_bits_is_a_violation_for_which_nothing_is_read(bit: int) -> None:
    ept = Ept()
    ept.memory.loads = 0
    for kind in KINDS:
        assert ept.walk(kind, gpa=GPA | 1 << bit, maxphyaddr=52) == violation(ACCESS_BITS[kind])
    assert ept.memory.loads == 0


@pytest.mark.parametrize("flag", [IMPLICIT, STACK, IMPLICIT | STACK])
@with_and_without_flags
def test_other_access_flags_make_no_difference(flag: int, ad: bool) -> None:
    for kind, allowed in itertools.product(KINDS, (RWX, EPT_R, EPT_X, 0)):
        results = []
        for flags in (kind, kind | flag):
            ept = Ept(ad=ad)
            ept.change(3, off=RWX & ~allowed)
            results.append((ept.walk(flags), ept.entries()))
        assert results[0] == results[1]


def test_an_outcome_tells_exit_reason_and_qualification() -> None:
    assert (exit_reason(0), exit_qualification(0)) == (0, 0)
    assert exit_reason(EPT_MISCONFIGURATION) == ExitReason.EPT_MISCONFIG
    assert exit_qualification(EPT_MISCONFIGURATION) == 0
    outcome = Ept().walk(WRITE, gpa=0)[2]
    assert exit_reason(outcome) == ExitReason.EPT_VIOLATION
    assert exit_qualification(outcome) == EptViolation.GVA_IS_VALID | EptViolation.GVA_TRANSLATED | ACC_WRITE


# -------------------------------------------------------------------------------------------------- permissions


def access_of(kind: int, purpose: int, ad: bool) -> set[str]:
    """What an access counts as: the letters of the rights it needs, which the qualification reports."""
    if purpose == GPA_OF_TABLE and (ad or kind == WRITE):
        return {"r", "w"}
    return {{READ: "r", WRITE: "w", FETCH: "x"}[kind]}


def letters(entry: int) -> set[str]:
    return {letter for bit, letter in enumerate("rwx") if entry >> bit & 1}


def bits_of(rights: set[str]) -> int:
    return sum(1 << bit for bit, letter in enumerate("rwx") if letter in rights)


def verdict(rights_by_level: tuple[int, ...], access: set[str]) -> str | set[str]:
    """SDM 29.3.3, level by level: "misconfigured", "absent", "allowed", or the rights that do not suffice."""
    together = set("rwx")
    for entry in rights_by_level:
        own = letters(entry)
        if not own:
            return "absent"
        if "w" in own and "r" not in own:
            return "misconfigured"
        together &= own
    return "allowed" if access <= together else together


@every_page
@with_and_without_flags
def test_every_combination_of_rights_of_all_levels(page_shift: int, ad: bool) -> None:
    ept = Ept(page_shift, ad=ad)
    fresh = ept.entries()
    # Below 1 GiB pages there are 64 combinations, for 4 KiB pages 4096.
    for rights in itertools.product(range(8), repeat=len(fresh)):
        for kind, purpose in itertools.product(KINDS, PURPOSES[:2]):
            if kind == FETCH and purpose == GPA_OF_TABLE:
                continue
            for level, entry in enumerate(fresh):
                ept.set(level, entry & ~RWX | rights[level])
            access = access_of(kind, purpose, ad)
            expected = verdict(rights, access)
            result = ept.walk(kind, purpose)
            if expected == "misconfigured":
                assert result == MISCONFIGURATION, rights
            elif expected == "absent":
                assert result == refused(EPT_VIOLATION | purpose | bits_of(access)), rights
            elif expected == "allowed":
                allowed = set.intersection(*map(letters, rights))
                if ad and "w" not in access:
                    allowed.discard("w")
                assert result == (ept.hpa, bits_of(allowed), 0), rights
            else:
                assert isinstance(expected, set)
                qualification = purpose | bits_of(access) | bits_of(expected) << 3
                assert result == refused(EPT_VIOLATION | qualification), rights


def test_an_execute_only_page_can_be_fetched_from_and_nothing_else() -> None:
    ept = Ept()
    ept.change(3, off=EPT_R | EPT_W)
    assert ept.walk(FETCH) == (ept.hpa, PERM_X, 0)
    assert ept.walk(READ) == violation(ACC_READ, PROT_EXEC)
    assert ept.walk(WRITE) == violation(ACC_WRITE, PROT_EXEC)


def test_bits_5_to_3_are_what_all_levels_allow_and_not_what_the_last_does() -> None:
    ept = Ept()
    ept.change(0, off=EPT_W)
    ept.change(1, off=EPT_X)
    assert ept.walk(WRITE) == violation(ACC_WRITE, PROT_READ)
    assert ept.walk(FETCH) == violation(ACC_INSTR, PROT_READ)


def test_rights_of_an_entry_and_of_a_translation_and_of_the_qualification_are_the_same_bits() -> None:
    assert (EPT_R, EPT_W, EPT_X) == (PERM_R, PERM_W, PERM_X) == (ACC_READ, ACC_WRITE, ACC_INSTR)
    assert tuple(bit << 3 for bit in (EPT_R, EPT_W, EPT_X)) == (PROT_READ, PROT_WRITE, PROT_EXEC)


# ---------------------------------------------------------------------------------- absent and malformed entries


@every_level
@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_that_is_not_present_has_no_reserved_bits(page_shift: int, level: int, kind: int) -> None:
    ept = Ept(page_shift)
    for entry in (0, (1 << 64) - 1 & ~RWX, EPT_A | EPT_D | WB):
        ept.set(level, entry)
        assert ept.walk(kind) == violation(ACCESS_BITS[kind])


def misconfiguring_bits(ept: Ept, level: int, bits: set[int], maxphyaddr: int) -> set[int]:
    """Those of *bits* that make a misconfiguration of an entry when they are set, for every kind of access."""
    entry, found = ept.get(level), set()
    for bit in bits:
        ept.set(level, entry | 1 << bit)
        results = {ept.walk(kind, maxphyaddr=maxphyaddr)[2] for kind in KINDS}
        if EPT_MISCONFIGURATION in results:
            assert results == {EPT_MISCONFIGURATION}
            found.add(bit)
        ept.set(level, entry)
    return found


@every_level
@pytest.mark.parametrize("maxphyaddr", [36, 40, 46, 52])
def test_exactly_the_bits_of_the_manual_are_reserved(page_shift: int, level: int, maxphyaddr: int) -> None:
    """Tables 29-1 to 29-7; rights, memory types and bit 7 of a PDPTE or PDE have tests of their own."""
    ept = Ept(page_shift)
    ept.set(ept.leaf, ept.get(ept.leaf) & ~((1 << 52) - (1 << 36)))
    expected = set(range(maxphyaddr, 52))
    if level == ept.leaf:
        expected |= set(range(12, page_shift))
        left_out = set(range(6))
    elif level == 0:
        expected |= {3, 4, 5, 6, 7}
        left_out = set(range(3)) | set(range(12, maxphyaddr))
    else:
        expected |= {3, 4, 5, 6}
        left_out = set(range(3)) | {7} | set(range(12, maxphyaddr))
    assert misconfiguring_bits(ept, level, set(range(64)) - left_out, maxphyaddr) == expected


@pytest.mark.parametrize("level", [1, 2])
def test_bit_7_makes_a_page_of_an_entry_that_leads_to_a_table(level: int) -> None:
    """The table's address is not aligned as a page must be."""
    ept = Ept()
    ept.change(level, on=EPT_PS)
    assert ept.walk() == MISCONFIGURATION
    ept.set(level, RWX | EPT_PS | WB)
    assert ept.walk()[0] == GPA & ((1 << SHIFTS[level]) - 1)


def test_bit_7_of_a_pte_is_ignored() -> None:
    ept = Ept()
    ept.change(3, on=EPT_PS)
    assert ept.walk()[0] == ept.hpa


@every_page
@pytest.mark.parametrize("memory_type", range(8))
def test_memory_types_2_3_and_7_are_reserved(page_shift: int, memory_type: int) -> None:
    ept = Ept(page_shift)
    ept.change(ept.leaf, off=7 << EPT_TYPE_SHIFT, on=memory_type << EPT_TYPE_SHIFT)
    for kind in KINDS:
        if memory_type in (2, 3, 7):
            assert ept.walk(kind) == MISCONFIGURATION
        else:
            assert ept.walk(kind)[0] == ept.hpa
    assert MEMORY_TYPE_UC not in (2, 3, 7)


@every_level
@pytest.mark.parametrize("rights", [EPT_W, EPT_W | EPT_X], ids=["-w-", "-wx"])
def test_writable_without_readable_is_a_misconfiguration(page_shift: int, level: int, rights: int) -> None:
    ept = Ept(page_shift)
    ept.change(level, off=RWX & ~rights)
    for kind in KINDS:
        assert ept.walk(kind) == MISCONFIGURATION


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_misconfiguration_comes_before_what_a_level_above_denies(level: int) -> None:
    ept = Ept()
    ept.change(level - 1, off=EPT_W)
    ept.change(level, on=1 << MAXPHYADDR)
    assert ept.walk(WRITE) == MISCONFIGURATION


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_first_entry_that_is_absent_or_malformed_decides(level: int) -> None:
    ept = Ept()
    ept.change(level, on=1 << MAXPHYADDR)
    ept.set(level + 1, 0)
    assert ept.walk() == MISCONFIGURATION
    ept.set(level, 0)
    ept.set(level + 1, 1 << MAXPHYADDR | RWX)
    assert ept.walk() == violation(ACC_READ)


# -------------------------------------------------------------------------------------- what an access is made for


def test_an_access_to_a_table_is_no_translation_of_a_linear_address() -> None:
    ept = Ept()
    ept.set(3, 0)
    assert ept.walk(READ, GPA_OF_TABLE) == refused(EPT_VIOLATION | EptViolation.GVA_IS_VALID | ACC_READ)


def test_a_load_of_pdptes_has_no_linear_address() -> None:
    ept = Ept()
    ept.set(3, 0)
    assert ept.walk(READ, GPA_OF_PDPTES) == refused(EPT_VIOLATION | ACC_READ)


def test_marking_a_table_entry_is_a_read_and_a_write() -> None:
    ept = Ept()
    ept.change(3, off=EPT_W)
    qualification = EptViolation.GVA_IS_VALID | ACC_READ | ACC_WRITE | PROT_READ | PROT_EXEC
    assert ept.walk(WRITE, GPA_OF_TABLE) == refused(EPT_VIOLATION | qualification)
    assert ept.walk(READ, GPA_OF_TABLE)[0] == ept.hpa


def test_with_dirty_flags_reading_a_table_entry_is_a_write() -> None:
    ept = Ept(ad=True)
    ept.change(3, off=EPT_W)
    qualification = EptViolation.GVA_IS_VALID | ACC_READ | ACC_WRITE | PROT_READ | PROT_EXEC
    assert ept.walk(READ, GPA_OF_TABLE) == refused(EPT_VIOLATION | qualification)
    ept.change(3, on=EPT_W)
    assert ept.walk(READ, GPA_OF_TABLE) == (ept.hpa, PERM_ALL, 0)
    assert ept.get(3) & EPT_D


def test_with_dirty_flags_a_load_of_pdptes_is_still_a_read() -> None:
    ept = Ept(ad=True)
    ept.change(3, off=EPT_W)
    assert ept.walk(READ, GPA_OF_PDPTES)[0] == ept.hpa
    assert ept.get(3) & (EPT_A | EPT_D) == EPT_A


# ------------------------------------------------------------------------------------- accessed and dirty flags


@every_page
def test_without_the_bit_in_the_eptp_no_entry_is_written(page_shift: int) -> None:
    ept = Ept(page_shift)
    for kind, purpose in itertools.product(KINDS, PURPOSES):
        assert ept.walk(kind, purpose)[1] == PERM_ALL
    assert ept.memory.stores == 0


@every_page
@pytest.mark.parametrize("kind", [READ, FETCH])
def test_a_read_or_fetch_sets_the_accessed_flag_at_every_level(page_shift: int, kind: int) -> None:
    ept = Ept(page_shift, ad=True)
    before = ept.entries()
    ept.walk(kind)
    assert ept.entries() == [entry | EPT_A for entry in before]


@every_page
def test_a_write_sets_the_dirty_flag_of_the_last_level_only(page_shift: int) -> None:
    ept = Ept(page_shift, ad=True)
    before = ept.entries()
    ept.walk(WRITE)
    assert ept.entries() == [*(entry | EPT_A for entry in before[:-1]), before[-1] | EPT_A | EPT_D]


@every_page
def test_a_clean_page_is_not_writable_until_it_is_written(page_shift: int) -> None:
    ept = Ept(page_shift, ad=True)
    assert ept.walk()[1] == PERM_R | PERM_X
    assert ept.walk(WRITE)[1] == PERM_ALL
    assert ept.walk()[1] == PERM_ALL


@every_page
def test_entries_that_need_no_change_are_not_written(page_shift: int) -> None:
    ept = Ept(page_shift, ad=True)
    ept.walk(WRITE)
    assert ept.memory.stores == ept.leaf + 1
    ept.memory.stores = 0
    for kind in KINDS:
        ept.walk(kind)
    assert ept.memory.stores == 0


@every_page
def test_a_refused_access_leaves_the_last_level_alone(page_shift: int) -> None:
    ept = Ept(page_shift, ad=True)
    ept.change(ept.leaf, off=EPT_W)
    before = ept.entries()
    assert ept.walk(WRITE) == violation(ACC_WRITE, PROT_READ, PROT_EXEC)
    assert ept.entries() == [*(entry | EPT_A for entry in before[:-1]), before[-1]]


@every_level
@pytest.mark.parametrize("bad", [0, 1 << MAXPHYADDR | RWX], ids=["absent", "malformed"])
def test_a_walk_that_ends_early_marks_what_it_used(page_shift: int, level: int, bad: int) -> None:
    ept = Ept(page_shift, ad=True)
    ept.set(level, bad)
    before = ept.entries()
    ept.walk(WRITE)
    assert ept.entries() == [entry | EPT_A if place < level else entry for place, entry in enumerate(before)]


def test_the_other_bits_of_an_entry_survive_marking() -> None:
    ept = Ept(ad=True)
    kept = 0xFFF << 52 | 1 << 11 | 1 << 10 | 1 << 6
    ept.change(3, on=kept)
    before = ept.get(3)
    ept.walk(WRITE)
    assert ept.get(3) == before | EPT_A | EPT_D


# ---------------------------------------------------------------------------------------------- holes and loops


@pytest.mark.parametrize("maxphyaddr", [36, 46, 52])
@pytest.mark.parametrize("level", range(4))
@with_and_without_flags
def test_a_table_where_there_is_no_memory_is_a_misconfiguration(
    level: int, maxphyaddr: int, ad: bool
) -> None:
    ept = Ept(ad=ad)
    if level == 0:
        ept.eptp = ept.eptp & 0xFFF | HOLE
    else:
        ept.set(level - 1, HOLE | RWX)
    for kind in KINDS:
        assert ept.walk(kind, maxphyaddr=maxphyaddr) == MISCONFIGURATION


@with_and_without_flags
def test_a_table_that_leads_to_itself_ends_after_four_entries(ad: bool) -> None:
    """At the fourth entry it is taken for a page, as all self-mapping tables are."""
    ept = Ept(ad=ad)
    ept.memory.store(FIRST_TABLE, 8, FIRST_TABLE | RWX)
    ept.memory.loads = 0
    hpa, permissions, outcome = ept.walk(WRITE, gpa=0x123)
    assert (hpa, permissions, outcome) == (FIRST_TABLE | 0x123, PERM_ALL, 0)
    assert ept.memory.loads == 4
    assert ept.memory.load(FIRST_TABLE, 8) == FIRST_TABLE | RWX | (EPT_A | EPT_D if ad else 0)


# ------------------------------------------------------------------------------------------------ random tables

PAGES = MEMORY_BYTES >> 12
PAGES_PER_LEVEL = PAGES // len(SHIFTS)
#: Where the tables have entries and the walks look.
INDICES = (0, 1, 511)


def random_entry(rng: random.Random, level: int) -> int:
    """An entry that mostly is as it should be, *level* (0 is the top) taken from where it stands."""
    if rng.random() < 0.03:
        return rng.getrandbits(64)
    entry = rng.choice((RWX, RWX, RWX, RWX, RWX, EPT_R, EPT_R | EPT_W, EPT_R | EPT_X, EPT_X))
    entry |= rng.choice((0, 0, EPT_A, EPT_A | EPT_D))
    if rng.random() < 0.1:
        entry ^= rng.choice((RWX, EPT_R, WB, 7 << EPT_TYPE_SHIFT, EPT_PS, 1 << 40, 1 << 50))
    if level == 3 or (level and rng.random() < 0.1):
        return entry | rng.randrange(PAGES) << SHIFTS[level] | rng.choice((0, WB)) | EPT_PS
    table = (level + 1) * PAGES_PER_LEVEL + rng.randrange(PAGES_PER_LEVEL)
    if rng.random() < 0.1:
        table = rng.randrange(PAGES + 1)
    return entry | table << 12


def memory_with(content: bytes | bytearray) -> CountingMemory:
    memory = CountingMemory()
    memory.set_slot(0, 0, mmap.mmap(-1, MEMORY_BYTES))
    memory.write(0, content)
    return memory


def gpas() -> st.SearchStrategy[int]:
    index = st.sampled_from(INDICES)
    near = st.builds(
        lambda a, b, c, d, offset: a << 39 | b << 30 | c << 21 | d << 12 | offset,
        index, index, index, index, st.integers(0, 0xFFF),
    )  # fmt: skip
    return st.one_of(near, near, near, st.integers(0, (1 << 52) - 1))


def steps(memory: GuestMemory, eptp: int, gpa: int) -> Iterator[tuple[int, int, int]]:
    """The entries that a walk would read if nothing stopped it: ``(level from 4 to 1, hpa, entry)``."""
    table = eptp
    for level in (4, 3, 2, 1):
        hpa = table & 0xF_FFFF_FFFF_F000 | (gpa >> 3 + 9 * level & 0x1FF) << 3
        entry = memory.load(hpa, 8)
        yield level, hpa, entry
        table = entry


def by_the_manual(
    memory: GuestMemory, gpa: int, kind: int, eptp: int, maxphyaddr: int, purpose: int
) -> tuple[int, int, int]:
    """The walk once more, as the manual's tables and lists tell it, on memory it may mark."""
    ad = bool(eptp >> 6 & 1)
    access = access_of(kind, purpose, ad)
    if gpa >> 48:
        return refused(48 << 16 | purpose | bits_of(access))
    together = set("rwx")
    for level, hpa, entry in steps(memory, eptp, gpa):
        ones = {bit for bit in range(64) if entry >> bit & 1}
        own = letters(entry)
        if not own:
            return refused(48 << 16 | purpose | bits_of(access))
        is_last = level == 1 or (level in (2, 3) and 7 in ones)
        reserved = set(range(maxphyaddr, 52))
        reserved |= set(range(12, 3 + 9 * level)) if is_last else {3, 4, 5, 6, 7}
        if own & {"r", "w"} == {"w"} or ones & reserved or (is_last and entry >> 3 & 7 in (2, 3, 7)):
            return refused(49 << 16)
        together &= own
        if not is_last:
            if ad:
                memory.store(hpa, 8, entry | 1 << 8)
            continue
        if not access <= together:
            return refused(48 << 16 | purpose | bits_of(access) | bits_of(together) << 3)
        if ad:
            entry |= 1 << 8 | ("w" in access) << 9
            memory.store(hpa, 8, entry)
            if not entry >> 9 & 1:
                together -= {"w"}
        page = (1 << 3 + 9 * level) - 1
        return entry & 0xF_FFFF_FFFF_F000 & ~page | gpa & page, bits_of(together), 0
    raise AssertionError("the last level maps a page")


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    accesses=st.lists(
        st.tuples(gpas(), st.sampled_from(KINDS), st.sampled_from(PURPOSES)), min_size=1, max_size=12
    ),
    root=st.sampled_from((0, 1, 2, 3, PAGES - 1, PAGES)),
    ad=st.booleans(),
    maxphyaddr=st.sampled_from((32, 39, 46, 52)),
)
def test_random_tables_give_what_the_manual_says_and_never_an_exception(
    seed: int, accesses: list[tuple[int, int, int]], root: int, ad: bool, maxphyaddr: int
) -> None:
    rng = random.Random(seed)
    content = bytearray(MEMORY_BYTES)
    for page, index in itertools.product(range(PAGES), INDICES):
        entry_hpa = page << 12 | index * 8
        content[entry_hpa : entry_hpa + 8] = random_entry(rng, page // PAGES_PER_LEVEL).to_bytes(8, "little")
    memory, model = memory_with(content), memory_with(content)
    eptp = root << 12 | MEMORY_TYPE_WB | VMX_EPTP_PWL_4 | ad << 6
    for gpa, kind, purpose in accesses:
        memory.loads = memory.stores = 0
        result = ept_walk(memory, gpa, kind, eptp, maxphyaddr, purpose)
        assert result == by_the_manual(model, gpa, kind, eptp, maxphyaddr, purpose)
        assert memory.loads <= 4
        assert memory.stores <= (4 if ad else 0)
    assert memory.read(0, MEMORY_BYTES) == model.read(0, MEMORY_BYTES)
