"""The EPC: valid and free pages, the SECS, tracking, versions, and what everybody else sees of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from signing import DEBUG, MODE64BIT, REG_RW, TCS, secs_page

from lasskvm.errors import MemoryLayoutError
from lasskvm.sgx.epc import Epc, EpcmEntry
from lasskvm.sgx.secs import Secs, secs_reserved_is_zero
from lasskvm.x86 import sgx
from lasskvm.x86.sgx import PageType

BASE, SIZE, PAGE = 0x2_0000_0000, 0x10000, 0x1000
SECS, FIRST, SECOND, VA = BASE, BASE + PAGE, BASE + 2 * PAGE, BASE + 3 * PAGE
ENCLAVE = 0x7000_0000


@pytest.fixture
def epc() -> Epc:
    """An enclave with two pages, and a page of versions."""
    epc = Epc(BASE, SIZE)
    epc.add(SECS, EpcmEntry(PageType.SECS), secs_page(0x10000, ENCLAVE))
    epc.add(FIRST, EpcmEntry.from_secinfo_flags(REG_RW, ENCLAVE, SECS), b"\x11" * PAGE)
    epc.add(SECOND, EpcmEntry.from_secinfo_flags(TCS, ENCLAVE + PAGE, SECS), b"\x22" * PAGE)
    epc.add(VA, EpcmEntry(PageType.VA))
    return epc


# --------------------------------------------------------------------------------------------------------------- pages


def test_a_new_epc_has_only_free_pages():
    epc = Epc(BASE, SIZE)
    assert epc.free_pages == SIZE // PAGE
    assert all(epc.entry(gpa) is None for gpa in range(BASE, BASE + SIZE, PAGE))


def test_pages_can_be_added_until_none_is_free():
    epc = Epc(BASE, 2 * PAGE)
    epc.add(BASE, EpcmEntry(PageType.VA))
    epc.add(BASE + PAGE, EpcmEntry(PageType.VA))
    assert epc.free_pages == 0
    with pytest.raises(ValueError, match="no free page"):
        epc.add(BASE, EpcmEntry(PageType.VA))


@pytest.mark.parametrize("gpa", [BASE - PAGE, BASE + SIZE, BASE + 8])
def test_only_pages_of_the_epc_can_be_added(gpa: int):
    with pytest.raises(ValueError, match="no free page"):
        Epc(BASE, SIZE).add(gpa, EpcmEntry(PageType.VA))


def test_an_enclave_page_needs_an_secs_that_is_there(epc: Epc):
    for secs in (None, FIRST, BASE + 8 * PAGE):
        with pytest.raises(ValueError, match="no SECS page"):
            epc.add(BASE + 5 * PAGE, EpcmEntry(PageType.REG, secs=secs))
    with pytest.raises(ValueError, match="belong to no enclave"):
        epc.add(BASE + 5 * PAGE, EpcmEntry(PageType.VA, secs=SECS))


def test_an_address_inside_a_page_finds_the_page(epc: Epc):
    assert epc.entry(FIRST + 0x123) is epc.entry(FIRST)
    assert epc.read(SECOND - 1, 2) == b"\x11\x22"


def test_an_access_that_leaves_the_epc_is_not_contained(epc: Epc):
    assert epc.contains(BASE + SIZE - 8, 8)
    assert not epc.contains(BASE + SIZE - 7, 8)
    assert not epc.contains(BASE - 1, 2)
    with pytest.raises(ValueError, match="not in the EPC"):
        epc.read(BASE + SIZE - 4, 8)


def test_a_removed_page_is_free_and_holds_nothing(epc: Epc):
    epc.remove(FIRST)
    assert epc.entry(FIRST) is None
    assert epc.read(FIRST) == bytes(PAGE)
    with pytest.raises(KeyError):
        epc.remove(FIRST)


def test_an_secs_stays_as_long_as_its_enclave_has_pages(epc: Epc):
    assert epc.children(SECS) == 2
    with pytest.raises(ValueError, match="has pages in the EPC"):
        epc.remove(SECS)
    epc.remove(FIRST)
    epc.remove(SECOND)
    assert epc.children(SECS) == 0
    epc.remove(SECS)
    assert [gpa for gpa, _ in epc.entries()] == [VA]


@given(flags=st.integers(0, 63), page_type=st.sampled_from(PageType))
def test_an_epcm_entry_and_its_secinfo_flags_say_the_same(flags: int, page_type: PageType):
    secinfo = flags | page_type << sgx.SECINFO_PAGE_TYPE_SHIFT
    assert EpcmEntry.from_secinfo_flags(secinfo).secinfo_flags == secinfo


def test_page_types_beyond_sgx1_make_no_entry():
    with pytest.raises(ValueError, match="not a valid PageType"):
        EpcmEntry.from_secinfo_flags(5 << sgx.SECINFO_PAGE_TYPE_SHIFT)


@pytest.mark.parametrize(
    "base, size", [(0x800, PAGE), (0, 0), (0, PAGE + 1), ((1 << 52) - PAGE, 2 * PAGE), (0, -PAGE)]
)
def test_an_epc_that_cannot_be_is_refused_with_a_sentence(base: int, size: int):
    with pytest.raises(MemoryLayoutError, match="multiple of 4 KiB"):
        Epc(base, size)


# ---------------------------------------------------------------------------------------------------------------- SECS


def test_the_fields_of_an_secs_are_where_the_manual_has_them(epc: Epc):
    epc.write(SECS, secs_page(0x20000, 0x4000_0000, 3, MODE64BIT | DEBUG, 7, 1))
    secs = epc.secs(SECS)
    assert (secs.size, secs.base, secs.ssa_frame_size) == (0x20000, 0x4000_0000, 3)
    assert (secs.attributes, secs.xfrm, secs.miscselect) == (MODE64BIT | DEBUG, 7, 1)
    assert secs.is_debug
    assert secs.is_64bit
    assert not secs.is_initialized


def test_the_range_of_an_enclave_ends_before_base_and_size(epc: Epc):
    secs = epc.secs(SECS)
    assert [secs.covers(address) for address in (ENCLAVE - 1, ENCLAVE, ENCLAVE + 0xFFFF, ENCLAVE + 0x10000)] == [
        False, True, True, False,
    ]  # fmt: skip


def test_a_stored_secs_comes_back_with_all_its_fields(epc: Epc):
    secs = replace(
        epc.secs(SECS), mrenclave=b"\1" * 32, mrsigner=b"\2" * 32, isvprodid=3, isvsvn=4, eid=5, measured_blocks=6,
        tracking_epoch=7,
    )  # fmt: skip
    epc.store_secs(SECS, secs)
    assert epc.secs(SECS) == secs


def test_changing_an_secs_object_changes_nothing_until_it_is_stored(epc: Epc):
    epc.secs(SECS).attributes = 0
    assert epc.secs(SECS).attributes == MODE64BIT


def test_only_secs_pages_are_read_as_secs(epc: Epc):
    for gpa in (FIRST, VA, BASE + 9 * PAGE):
        with pytest.raises(ValueError, match="no SECS page"):
            epc.secs(gpa)


@pytest.mark.parametrize("offset", [24, 47, 96, 160, 192, 255, 260, 264, 287, 4095])
def test_a_byte_in_the_reserved_fields_of_an_secs_is_noticed(offset: int):
    page = bytearray(secs_page(0x10000, ENCLAVE))
    assert secs_reserved_is_zero(page)
    page[offset] = 0x80
    assert not secs_reserved_is_zero(page)


def test_a_created_enclave_has_no_identity_whatever_software_says():
    source = replace(
        Secs.parse(secs_page(0x10000, ENCLAVE)), mrsigner=b"\2" * 32, isvprodid=3, isvsvn=4
    ).pack()
    secs = Secs.created(source, eid=9)
    assert (secs.mrsigner, secs.isvprodid, secs.isvsvn, secs.eid) == (bytes(32), 0, 0, 9)
    assert (secs.size, secs.base) == (0x10000, ENCLAVE)


def test_identifiers_and_versions_are_never_zero_and_never_given_twice(epc: Epc):
    assert [epc.next_eid() for _ in range(3)] == [1, 2, 3]
    assert [epc.next_version() for _ in range(3)] == [1, 2, 3]
    epc.reset()
    assert epc.free_pages == SIZE // PAGE
    assert (epc.next_eid(), epc.next_version()) == (4, 4)


# ------------------------------------------------------------------------------------------------------------ tracking


def test_a_blocked_page_is_tracked_only_by_an_etrack_that_comes_later(epc: Epc):
    epc.track(SECS)
    epc.block(FIRST)
    assert not epc.is_tracked(FIRST)
    epc.track(SECS)
    assert epc.is_tracked(FIRST)


def test_a_page_blocked_after_etrack_waits_for_the_next(epc: Epc):
    epc.block(FIRST)
    epc.track(SECS)
    epc.block(SECOND)
    assert epc.is_tracked(FIRST)
    assert not epc.is_tracked(SECOND)


def test_a_page_that_is_not_blocked_is_never_tracked(epc: Epc):
    epc.track(SECS)
    assert not epc.is_tracked(FIRST)


def test_a_page_that_came_back_blocked_needs_no_etrack(epc: Epc):
    epc.remove(FIRST)
    epc.add(FIRST, EpcmEntry.from_secinfo_flags(REG_RW, ENCLAVE, SECS, blocked=True))
    assert epc.is_tracked(FIRST)


def test_secs_and_version_pages_are_not_blocked(epc: Epc):
    for gpa in (SECS, VA):
        with pytest.raises(ValueError, match="not of a type that can be blocked"):
            epc.block(gpa)


def test_a_version_slot_holds_eight_bytes_of_its_page(epc: Epc):
    epc.store_version(VA + 16, 0x1122_3344_5566_7788)
    assert epc.version(VA + 16) == 0x1122_3344_5566_7788
    assert (epc.version(VA + 8), epc.version(VA + 24)) == (0, 0)
    epc.store_version(VA + 16, 0)
    assert epc.read(VA) == bytes(PAGE)


# ---------------------------------------------------------------------------------------------------- everybody's view


def test_ordinary_loads_read_all_ones_and_stores_are_dropped(epc: Epc):
    assert [epc.read_mmio(FIRST + 8, size) for size in (1, 2, 4, 8)] == [
        0xFF,
        0xFFFF,
        0xFFFF_FFFF,
        (1 << 64) - 1,
    ]
    epc.write_mmio(FIRST, 8, 0)
    assert epc.read(FIRST, 8) == b"\x11" * 8


def test_cpuid_names_the_section_in_halves_of_its_base_and_size():
    assert sgx.cpuid_epc_section(0x12_3456_7000, 0x8_9ABC_D000) == (0x3456_7001, 0x12, 0x9ABC_D001, 0x8)


# -------------------------------------------------------------------------------------------------------------- states


def test_an_epc_restored_from_json_goes_on_as_the_saved_one(epc: Epc):
    epc.block(FIRST)
    epc.store_version(VA + 8, epc.next_version())
    epc.next_eid()
    other = Epc(BASE, SIZE)
    other.add(BASE + 9 * PAGE, EpcmEntry(PageType.VA))
    other.view[:] = bytes(epc.view)
    other.set_state(json.loads(json.dumps(epc.get_state())))
    assert list(other.entries()) == list(epc.entries())
    assert other.read(BASE, SIZE) == epc.read(BASE, SIZE)
    assert (other.next_eid(), other.next_version()) == (2, 2)
    other.track(SECS)
    assert other.is_tracked(FIRST)


def test_what_pages_hold_is_no_part_of_a_state(epc: Epc):
    assert len(json.dumps(Epc(0, 8 << 20).get_state())) < 200
    before = epc.get_state()
    epc.write(FIRST, b"\x33" * PAGE)
    assert epc.get_state() == before


def broken(state: dict[str, Any], index: int, **changes: object) -> dict[str, Any]:
    pages = [dict(page) for page in state["pages"]]
    pages[index].update(changes)
    return state | {"pages": pages}


def test_a_damaged_state_is_refused_and_changes_nothing(epc: Epc):
    state = epc.get_state()
    damaged = [
        {},
        state | {"base": 0},
        state | {"last_eid": None},
        broken(state, 1, secs=VA),
        broken(state, 1, secs=None),
        broken(state, 1, gpa=BASE + SIZE),
        broken(state, 1, gpa=SECS),
        broken(state, 1, gpa="x"),
        broken(state, 1, secinfo=0x901),
        state | {"pages": [1]},
    ]
    other = Epc(BASE, SIZE)
    other.add(BASE, EpcmEntry(PageType.VA))
    for bad in damaged:
        with pytest.raises((KeyError, TypeError, ValueError)):
            other.set_state(bad)
        assert [gpa for gpa, _ in other.entries()] == [BASE]
