"""ECREATE, EADD, EEXTEND: what each does, and every check of the manual."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import signing
from sgx_guest import (
    BASE,
    EPC,
    GENERAL_PROTECTION,
    PAGEINFO,
    SECINFO,
    SIZE,
    SOURCE,
    TCS_CONTENT,
    SgxGuest,
    epc_fault,
)
from signing import (
    DEBUG,
    EINITTOKENKEY,
    MODE64BIT,
    PAGE,
    REG_R,
    REG_RX,
    TCS,
    Page,
)

from lasskvm.sgx.enumeration import with_epc
from lasskvm.state import CR4
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.registers import CR4_LA57
from lasskvm.x86.sgx import EnclsLeaf, PageType

ECREATE, EADD, EEXTEND, EINIT = EnclsLeaf.ECREATE, EnclsLeaf.EADD, EnclsLeaf.EEXTEND, EnclsLeaf.EINIT
CODE = Page(0x1000, REG_RX, bytes(range(256)) * 16)
SECS, FIRST = EPC, EPC + PAGE

# --------------------------------------------------------------------------------------------------------- ECREATE


def test_ecreate_makes_an_secs_page_without_identity(guest: SgxGuest) -> None:
    guest.create(attributes=MODE64BIT | DEBUG)
    entry = guest.epc.entry(guest.gpa(SECS))
    assert entry is not None
    assert (entry.page_type, entry.permissions, entry.secs, entry.linear_address) == (
        PageType.SECS,
        0,
        None,
        0,
    )
    secs = guest.epc.secs(guest.gpa(SECS))
    assert (secs.base, secs.size, secs.is_initialized, secs.is_debug) == (BASE, SIZE, False, True)
    assert (secs.mrsigner, secs.isvprodid, secs.isvsvn) == (bytes(32), 0, 0)


def test_two_enclaves_have_different_identifiers(guest: SgxGuest) -> None:
    guest.create()
    guest.put_create()
    guest.done(ECREATE, PAGEINFO, FIRST)
    assert guest.epc.secs(guest.gpa(SECS)).eid != guest.epc.secs(guest.gpa(FIRST)).eid


def test_what_software_says_of_the_identity_does_not_count(guest: SgxGuest) -> None:
    guest.put_create()
    for offset in (64, 128):
        guest.write(SOURCE + offset, b"\xaa" * 32)
    guest.write(SOURCE + 256, b"\x01\x00\x02\x00")
    guest.done(ECREATE, PAGEINFO, SECS)
    secs = guest.epc.secs(guest.gpa(SECS))
    assert (secs.mrsigner, secs.isvprodid, secs.isvsvn) == (bytes(32), 0, 0)


def test_ecreate_into_a_valid_page_is_a_page_fault(guest: SgxGuest) -> None:
    guest.version_array(0)
    guest.put_create()
    assert guest.fault(ECREATE, PAGEINFO, EPC) == epc_fault(EPC)


@pytest.mark.parametrize("field", ({"linear_address": PAGE}, {"secs": EPC}))
def test_ecreate_wants_unused_fields_of_pageinfo_to_be_zero(guest: SgxGuest, field: dict[str, int]) -> None:
    guest.put_create()
    guest.put_pageinfo(**field)
    assert guest.fault(ECREATE, PAGEINFO, SECS) == GENERAL_PROTECTION


@pytest.mark.parametrize("flags", (REG_R, TCS, 0x300, 0xFF00, 1 << 6, 1 << 16, 1 << 63))
def test_ecreate_wants_the_secinfo_of_an_secs(guest: SgxGuest, flags: int) -> None:
    guest.put_create()
    guest.write(SECINFO, signing.secinfo(flags))
    assert guest.fault(ECREATE, PAGEINFO, SECS) == GENERAL_PROTECTION


@pytest.mark.parametrize("offset", (8, 63))
def test_the_reserved_bytes_of_a_secinfo_are_zero(guest: SgxGuest, offset: int) -> None:
    guest.put_create()
    guest.write(SECINFO + offset, b"\x01")
    assert guest.fault(ECREATE, PAGEINFO, SECS) == GENERAL_PROTECTION


@pytest.mark.parametrize(
    "fields",
    (
        {"xfrm": 1},
        {"xfrm": 2},
        {"xfrm": 0},
        {"xfrm": 0b111},
        {"xfrm": 1 << 63 | 3},
        {"miscselect": 1},
        {"miscselect": 1 << 31},
        {"attributes": MODE64BIT | 1},
        {"attributes": MODE64BIT | 1 << 3},
        {"attributes": MODE64BIT | 1 << 6},
        {"attributes": MODE64BIT | 1 << 7},
        {"attributes": MODE64BIT | 1 << 63},
        {"ssa_frame_size": 0},
        {"size": 0, "base": 0},
        {"size": PAGE},
        {"size": 3 * PAGE},
        {"size": SIZE + 1},
        {"size": 1 << 36, "base": 0},
        {"size": 1 << 63, "base": 0},
        {"base": BASE + PAGE},
        {"base": 1 << 47},
        {"base": 1 << 62},
        {"attributes": 0, "base": 1 << 32},
        {"attributes": 0, "base": 0, "size": 1 << 31},
    ),
    ids=str,
)
def test_ecreate_refuses_a_secs_that_no_enclave_can_have(guest: SgxGuest, fields: dict[str, int]) -> None:
    guest.put_create(**fields)
    assert guest.fault(ECREATE, PAGEINFO, SECS) == GENERAL_PROTECTION


@pytest.mark.parametrize(
    "fields",
    (
        {"size": 2 * PAGE},
        {"size": 1 << 35, "base": 0},
        {"attributes": 0, "base": 0x7000_0000},
        {"attributes": 0, "base": 0, "size": 1 << 30},
        {"xfrm": 1 << 9 | 3},
        {"base": 0xFFFF_8000_0000_0000},
        {"attributes": MODE64BIT | DEBUG | EINITTOKENKEY | signing.PROVISIONKEY},
        {"ssa_frame_size": 0xFFFFFFFF},
    ),
    ids=str,
)
def test_ecreate_accepts_what_cpuid_offers(guest: SgxGuest, fields: dict[str, int]) -> None:
    guest.put_create(**fields)
    guest.done(ECREATE, PAGEINFO, SECS)


@pytest.mark.parametrize("offset", (24, 47, 96, 127, 160, 255, 260, 4095))
def test_reserved_bytes_of_the_secs_are_zero(guest: SgxGuest, offset: int) -> None:
    guest.put_create()
    guest.write(SOURCE + offset, b"\x80")
    assert guest.fault(ECREATE, PAGEINFO, SECS) == GENERAL_PROTECTION


def test_an_enclaves_base_is_canonical_for_the_paging_mode(guest: SgxGuest) -> None:
    guest.put_create(base=1 << 55)
    assert guest.fault(ECREATE, PAGEINFO, SECS) == GENERAL_PROTECTION


def test_pkru_in_xfrm_makes_the_ssa_frame_larger_than_without() -> None:
    """The XSAVE area ends behind PKRU; the frame still fits into a page, which is the least that can be."""
    guest = SgxGuest()
    assert guest.cpuid.xsave_bytes(3) + 184 < guest.cpuid.xsave_bytes(1 << 9 | 3) + 184 < PAGE


def test_without_pku_xfrm_has_no_pkru() -> None:
    guest = SgxGuest("max,+sgx,-pku")
    guest.put_create(xfrm=1 << 9 | 3)
    assert guest.fault(ECREATE, PAGEINFO, SECS) == GENERAL_PROTECTION


def test_without_xsave_xfrm_is_x87_and_sse() -> None:
    guest = SgxGuest("max,+sgx,-xsave")
    guest.put_create(xfrm=1 << 9 | 3)
    assert guest.fault(ECREATE, PAGEINFO, SECS) == GENERAL_PROTECTION
    guest.put_create()
    guest.done(ECREATE, PAGEINFO, SECS)


def test_the_vmms_cpuid_says_what_an_enclave_can_be(guest: SgxGuest) -> None:
    """EXINFO, and no PROVISIONKEY."""
    entries = [
        replace(entry, ebx=1)
        if (entry.function, entry.index) == (0x12, 0)
        else replace(entry, eax=entry.eax & ~signing.PROVISIONKEY)
        if (entry.function, entry.index) == (0x12, 1)
        else entry
        for entry in with_epc(guest.cpuid.entries, guest.epc)
    ]
    guest.ctx.cpuid = CpuidTable(entries)
    guest.put_create(attributes=MODE64BIT | signing.PROVISIONKEY)
    assert guest.fault(ECREATE, PAGEINFO, SECS) == GENERAL_PROTECTION
    guest.put_create(miscselect=1)
    guest.done(ECREATE, PAGEINFO, SECS)


def test_la57_makes_more_bases_canonical() -> None:
    guest = SgxGuest("max,+sgx,+la57")
    guest.words[CR4] |= CR4_LA57
    guest.use_five_levels()
    guest.put_create(base=1 << 55)
    guest.done(ECREATE, PAGEINFO, SECS)


# ------------------------------------------------------------------------------------------------------------ EADD


def test_eadd_copies_a_page_and_notes_what_it_is(guest: SgxGuest) -> None:
    guest.create()
    guest.add(1, CODE)
    entry = guest.epc.entry(guest.gpa(FIRST))
    assert entry is not None
    assert (entry.page_type, entry.permissions, entry.secs, entry.linear_address) == (
        PageType.REG, REG_RX & 7, guest.gpa(SECS), BASE + CODE.offset,
    )  # fmt: skip
    assert (entry.blocked, entry.pending, entry.modified) == (False, False, False)
    assert guest.epc.read(guest.gpa(FIRST)) == CODE.content


def test_eadd_clears_the_processors_fields_of_a_tcs(guest: SgxGuest) -> None:
    """State, FLAGS.DBGOPTIN, CSSA and AEP; a TCS has no permissions."""
    content = bytearray(TCS_CONTENT)
    struct.pack_into("<QQQIIQQ", content, 0, 1, 1, 0x3000, 5, 2, 0x40, 0xAAAA)
    guest.create()
    guest.add(1, Page(0, TCS | 7, bytes(content), is_measured=False))
    entry = guest.epc.entry(guest.gpa(FIRST))
    assert entry is not None
    assert (entry.page_type, entry.permissions) == (PageType.TCS, 0)
    tcs = struct.unpack_from("<QQQIIQQ", guest.epc.read(guest.gpa(FIRST)))
    assert tcs == (0, 0, 0x3000, 0, 2, 0x40, 0)


@pytest.mark.parametrize("offset", (8, 15, 72, 4095))
def test_reserved_bits_of_a_tcs_are_zero(guest: SgxGuest, offset: int) -> None:
    content = bytearray(TCS_CONTENT)
    content[offset] |= 0x80
    guest.create()
    guest.put_add(Page(0, TCS, bytes(content)))
    assert guest.fault(EADD, PAGEINFO, FIRST) == GENERAL_PROTECTION


@pytest.mark.parametrize("offset", (64, 68))
def test_segment_limits_of_a_tcs_are_whole_pages_outside_64_bit_mode(guest: SgxGuest, offset: int) -> None:
    base = 0x7000_0000
    content = bytearray(TCS_CONTENT)
    content[offset] = 0xFE
    guest.create(base=base, attributes=0)
    guest.put_add(Page(0, TCS, bytes(content)), base=base)
    assert guest.fault(EADD, PAGEINFO, FIRST) == GENERAL_PROTECTION
    guest.put_add(Page(0, TCS, TCS_CONTENT), base=base)
    guest.done(EADD, PAGEINFO, FIRST)


def test_segment_limits_of_a_tcs_do_not_matter_in_64_bit_mode(guest: SgxGuest) -> None:
    guest.create()
    guest.put_add(Page(0, TCS, bytes(PAGE)))
    guest.done(EADD, PAGEINFO, FIRST)


def test_a_page_that_can_be_written_can_be_read(guest: SgxGuest) -> None:
    guest.create()
    guest.put_add(Page(0, 0x202))
    assert guest.fault(EADD, PAGEINFO, FIRST) == GENERAL_PROTECTION


@pytest.mark.parametrize("flags", (0x000, 0x300, 0x400, 0x500, 0xFF00, REG_R | 1 << 6, REG_R | 1 << 63))
def test_only_regular_pages_and_tcs_can_be_added(guest: SgxGuest, flags: int) -> None:
    guest.create()
    guest.put_add(Page(0, flags))
    assert guest.fault(EADD, PAGEINFO, FIRST) == GENERAL_PROTECTION


@pytest.mark.parametrize("address", (BASE - PAGE, BASE + SIZE, 0, 0xFFFF_FFFF_FFFF_F000))
def test_a_page_lies_in_the_range_of_the_enclave(guest: SgxGuest, address: int) -> None:
    guest.create()
    guest.put_add(CODE)
    guest.put_pageinfo(linear_address=address, secs=SECS)
    assert guest.fault(EADD, PAGEINFO, FIRST) == GENERAL_PROTECTION


@pytest.mark.parametrize("address", (BASE, BASE + SIZE - PAGE))
def test_the_first_and_the_last_page_are_in_the_range(guest: SgxGuest, address: int) -> None:
    guest.create()
    guest.put_add(CODE)
    guest.put_pageinfo(linear_address=address, secs=SECS)
    guest.done(EADD, PAGEINFO, FIRST)


def test_the_enclaves_linear_address_is_named_and_not_accessed(guest: SgxGuest) -> None:
    """It is in the user's half and mapped nowhere, and RFLAGS.AC is clear."""
    guest.create()
    guest.put_add(CODE)
    guest.done(EADD, PAGEINFO, FIRST)


def test_eadd_into_a_valid_page_is_a_page_fault(guest: SgxGuest) -> None:
    guest.create()
    guest.put_add(CODE)
    assert guest.fault(EADD, PAGEINFO, SECS) == epc_fault(SECS)


def test_eadd_wants_a_valid_secs(guest: SgxGuest) -> None:
    guest.create()
    guest.version_array(2)
    for secs in (guest.page(2), guest.page(3)):
        guest.put_add(CODE, secs=secs)
        assert guest.fault(EADD, PAGEINFO, FIRST) == epc_fault(secs)


def test_no_page_is_added_to_an_initialized_enclave(guest: SgxGuest) -> None:
    guest.initialized([CODE])
    guest.put_add(Page(0x5000, REG_R))
    assert guest.fault(EADD, PAGEINFO, guest.page(5)) == GENERAL_PROTECTION


# --------------------------------------------------------------------------------------------------------- EEXTEND


def test_eextend_wants_the_secs_of_the_page(guest: SgxGuest) -> None:
    guest.create()
    guest.add(1, CODE)
    guest.put_create()
    guest.done(ECREATE, PAGEINFO, guest.page(2))
    for other in (guest.page(2), FIRST, guest.page(7)):
        assert guest.fault(EEXTEND, other, FIRST) == GENERAL_PROTECTION


def test_eextend_wants_a_regular_page_or_a_tcs(guest: SgxGuest) -> None:
    guest.create()
    guest.version_array(2)
    for page in (SECS, guest.page(2), guest.page(3)):
        assert guest.fault(EEXTEND, SECS, page) == epc_fault(page, is_write=False)


def test_a_tcs_can_be_measured(guest: SgxGuest) -> None:
    guest.create()
    before = guest.epc.secs(guest.gpa(SECS)).mrenclave
    guest.add(1, Page(0, TCS, TCS_CONTENT))
    assert guest.epc.secs(guest.gpa(SECS)).mrenclave != before


def test_nothing_is_measured_in_an_initialized_enclave(guest: SgxGuest) -> None:
    guest.initialized([CODE])
    assert guest.fault(EEXTEND, SECS, FIRST) == GENERAL_PROTECTION


def test_the_secs_is_looked_for_before_the_chunk(guest: SgxGuest) -> None:
    assert guest.fault(EEXTEND, SOURCE, FIRST + 1) == epc_fault(SOURCE)
