"""EWB, ELDB, ELDU: pages leave the EPC sealed, and come back unchanged or not at all."""

from __future__ import annotations

import struct

import pytest
import signing
from sgx_guest import (
    BASE,
    CARRY,
    EPC,
    GENERAL_PROTECTION,
    NONE,
    OUTSIDE,
    PAGEINFO,
    PCMD,
    SECRET,
    SIZE,
    SOURCE,
    UNMAPPED,
    ZERO,
    Left,
    SgxGuest,
    epc_fault,
)
from signing import PAGE, REG_RW, REG_RX, SIGNER, TCS, Page, Signing
from two_pages import (
    CODE,
    DATA,
    EBLOCK,
    ELDB,
    ELDU,
    EREMOVE,
    ETRACK,
    EWB,
    FIRST,
    OTHER_SLOT,
    SECOND,
    SECS,
    SLOT,
    VA,
    entry_of,
)  # fmt: skip

from lasskvm.x86.exceptions import PF, PF_P, PF_W
from lasskvm.x86.sgx import EnclsLeaf, PageType, SgxError


def put_ewb(guest: SgxGuest, destination: int = OUTSIDE, pcmd: int = PCMD, **fields: int) -> None:
    guest.put_pageinfo(source=destination, secinfo=pcmd, **fields)


def evict(guest: SgxGuest, page: int, slot: int = SLOT, secs: int = SECS) -> bytes:
    """Block, track and write out *page*; gives PAGEINFO as EWB leaves it."""
    if entry_of(guest, page).secs is not None:
        guest.done(EBLOCK, rcx=page)
        guest.done(ETRACK, rcx=secs)
    put_ewb(guest)
    guest.done(EWB, PAGEINFO, page, slot)
    return guest.read(PAGEINFO, 32)


def put_eld(guest: SgxGuest, linear_address: int = BASE + CODE.offset, secs: int = SECS) -> None:
    guest.put_pageinfo(linear_address, OUTSIDE, PCMD, secs)


def test_a_page_goes_out_sealed_and_comes_back(enclave: SgxGuest) -> None:
    before = entry_of(enclave, FIRST)
    pageinfo = evict(enclave, FIRST)
    assert pageinfo == signing.pageinfo(BASE + CODE.offset, OUTSIDE, PCMD, 0)
    assert enclave.epc.entry(enclave.gpa(FIRST)) is None
    sealed = enclave.read(OUTSIDE, PAGE)
    assert len(set(sealed)) > 200
    assert CODE.content[:64] not in sealed
    put_eld(enclave)
    enclave.done(ELDU, PAGEINFO, EPC + 5 * PAGE, SLOT)
    after = entry_of(enclave, EPC + 5 * PAGE)
    assert enclave.epc.read(enclave.gpa(EPC + 5 * PAGE)) == CODE.content
    assert (after.page_type, after.permissions, after.secs, after.linear_address, after.blocked) == (
        before.page_type,
        before.permissions,
        before.secs,
        before.linear_address,
        False,
    )


def test_the_pcmd_says_what_was_written_out(enclave: SgxGuest) -> None:
    evict(enclave, FIRST)
    flags, enclave_id = struct.unpack_from("<Q56xQ", enclave.read(PCMD, 128))
    assert (flags, enclave_id) == (REG_RX, enclave.epc.secs(enclave.gpa(SECS)).eid)
    assert enclave.read(PCMD + 8, 56) == bytes(56)
    assert enclave.read(PCMD + 72, 40) == bytes(40)
    assert enclave.read(PCMD + 112, 16) != bytes(16)


def test_eldb_loads_a_page_blocked(enclave: SgxGuest) -> None:
    evict(enclave, FIRST)
    put_eld(enclave)
    enclave.done(ELDB, PAGEINFO, FIRST, SLOT)
    assert entry_of(enclave, FIRST).blocked
    assert enclave.encls(EBLOCK, rcx=FIRST) == Left(SgxError.BLKSTATE, CARRY)
    put_ewb(enclave)
    enclave.done(EWB, PAGEINFO, FIRST, SLOT)


def test_a_page_has_to_be_blocked_and_then_tracked(enclave: SgxGuest) -> None:
    put_ewb(enclave)
    enclave.done(ETRACK, rcx=SECS)
    assert enclave.encls(EWB, PAGEINFO, FIRST, SLOT) == Left(SgxError.PAGE_NOT_BLOCKED, ZERO)
    enclave.done(EBLOCK, rcx=FIRST)
    assert enclave.encls(EWB, PAGEINFO, FIRST, SLOT) == Left(SgxError.NOT_TRACKED, ZERO)
    enclave.done(ETRACK, rcx=SECS)
    enclave.done(EWB, PAGEINFO, FIRST, SLOT)


def test_an_eviction_that_is_refused_writes_nothing(enclave: SgxGuest) -> None:
    put_ewb(enclave)
    enclave.write(OUTSIDE, b"\x5a" * PAGE)
    enclave.write(PCMD, b"\xa5" * 128)
    before = enclave.epc_state()
    assert enclave.encls(EWB, PAGEINFO, FIRST, SLOT).flags == ZERO
    assert enclave.epc_state() == before
    assert enclave.read(OUTSIDE, PAGE) == b"\x5a" * PAGE
    assert enclave.read(PCMD, 128) == b"\xa5" * 128


def test_an_occupied_slot_is_noted_but_the_page_is_written_out(enclave: SgxGuest) -> None:
    evict(enclave, FIRST)
    enclave.done(EBLOCK, rcx=SECOND)
    enclave.done(ETRACK, rcx=SECS)
    put_ewb(enclave)
    assert enclave.encls(EWB, PAGEINFO, SECOND, SLOT) == Left(SgxError.VA_SLOT_OCCUPIED, CARRY)
    assert enclave.epc.entry(enclave.gpa(SECOND)) is None
    put_eld(enclave, BASE + DATA.offset)
    enclave.done(ELDU, PAGEINFO, SECOND, SLOT)


def test_an_secs_goes_out_last_and_comes_back_first(enclave: SgxGuest) -> None:
    put_ewb(enclave)
    assert enclave.encls(EWB, PAGEINFO, SECS, SLOT) == Left(SgxError.CHILD_PRESENT, ZERO)
    enclave.done(EREMOVE, rcx=SECOND)
    evict(enclave, FIRST)
    enclave.write(SOURCE, enclave.read(OUTSIDE, PAGE))
    child_pcmd = enclave.read(PCMD, 128)
    before = enclave.epc.secs(enclave.gpa(SECS))
    pageinfo = evict(enclave, SECS, OTHER_SLOT)
    assert pageinfo[:8] == bytes(8)
    new_secs = EPC + 7 * PAGE
    put_eld(enclave, 0, 0)
    enclave.done(ELDU, PAGEINFO, new_secs, OTHER_SLOT)
    assert enclave.epc.secs(enclave.gpa(new_secs)) == before
    enclave.write(OUTSIDE, enclave.read(SOURCE, PAGE))
    enclave.write(PCMD, child_pcmd)
    put_eld(enclave, secs=new_secs)
    enclave.done(ELDU, PAGEINFO, FIRST, SLOT)
    assert entry_of(enclave, FIRST).secs == enclave.gpa(new_secs)


def test_an_enclave_is_measured_across_the_eviction_of_its_secs(enclave: SgxGuest) -> None:
    guest = enclave
    for page in (FIRST, SECOND):
        guest.done(EREMOVE, rcx=page)
    evict(guest, SECS)
    put_eld(guest, 0, 0)
    guest.done(ELDU, PAGEINFO, SECS, SLOT)
    last = Page(0x3000, REG_RW, b"last" * 1024)
    guest.add(1, last)
    guest.allow_signer(SIGNER)
    expected = signing.mrenclave(SIZE, 1, [CODE, DATA, last])
    assert guest.initialize(Signing(expected, SIGNER)) == Left(0, NONE)


def test_a_version_array_goes_out_and_comes_back(enclave: SgxGuest) -> None:
    evict(enclave, FIRST)
    code, code_pcmd = enclave.read(OUTSIDE, PAGE), enclave.read(PCMD, 128)
    other = enclave.version_array(11)
    evict(enclave, VA, other)
    put_eld(enclave, 0, 0)
    enclave.done(ELDB, PAGEINFO, VA, other)
    assert not entry_of(enclave, VA).blocked
    enclave.write(OUTSIDE, code)
    enclave.write(PCMD, code_pcmd)
    put_eld(enclave)
    enclave.done(ELDU, PAGEINFO, FIRST, SLOT)


def test_a_tcs_goes_out_and_comes_back(guest: SgxGuest) -> None:
    guest.build([Page(0, TCS, is_measured=False)])
    guest.version_array(10)
    evict(guest, FIRST)
    put_eld(guest, BASE)
    guest.done(ELDU, PAGEINFO, FIRST, SLOT)
    assert entry_of(guest, FIRST).page_type == PageType.TCS


def test_the_same_page_is_sealed_differently_each_time(enclave: SgxGuest) -> None:
    evict(enclave, FIRST)
    first = enclave.read(OUTSIDE, PAGE)
    put_eld(enclave)
    enclave.done(ELDU, PAGEINFO, FIRST, SLOT)
    evict(enclave, FIRST)
    assert enclave.read(OUTSIDE, PAGE) != first


# ------------------------------------------------------------------------------------------- what ELDU does not take


@pytest.mark.parametrize(
    "where", (OUTSIDE, OUTSIDE + PAGE - 1, PCMD, PCMD + 5, PCMD + 8, PCMD + 72, PCMD + 112), ids=hex
)
def test_a_changed_page_or_pcmd_does_not_come_back(enclave: SgxGuest, where: int) -> None:
    evict(enclave, FIRST)
    enclave.write(where, bytes((enclave.read(where, 1)[0] ^ 4,)))
    put_eld(enclave)
    before = enclave.epc_state()
    assert enclave.encls(ELDU, PAGEINFO, FIRST, SLOT) == Left(SgxError.MAC_COMPARE_FAIL, ZERO)
    assert enclave.epc_state() == before


def test_what_the_pcmd_says_of_the_enclave_is_only_for_software(enclave: SgxGuest) -> None:
    evict(enclave, FIRST)
    enclave.write(PCMD + 64, b"\xff" * 8)
    put_eld(enclave)
    enclave.done(ELDU, PAGEINFO, FIRST, SLOT)


def test_a_page_does_not_come_back_elsewhere(enclave: SgxGuest) -> None:
    evict(enclave, FIRST)
    put_eld(enclave, BASE + DATA.offset)
    assert enclave.encls(ELDU, PAGEINFO, FIRST, SLOT) == Left(SgxError.MAC_COMPARE_FAIL, ZERO)


def test_a_page_does_not_come_back_to_another_enclave(enclave: SgxGuest) -> None:
    evict(enclave, FIRST)
    enclave.put_create()
    enclave.done(EnclsLeaf.ECREATE, PAGEINFO, EPC + 15 * PAGE)
    put_eld(enclave, secs=EPC + 15 * PAGE)
    assert enclave.encls(ELDU, PAGEINFO, FIRST, SLOT) == Left(SgxError.MAC_COMPARE_FAIL, ZERO)


def test_a_page_comes_back_once(enclave: SgxGuest) -> None:
    evict(enclave, FIRST)
    put_eld(enclave)
    enclave.done(ELDU, PAGEINFO, FIRST, SLOT)
    enclave.done(EREMOVE, rcx=FIRST)
    assert enclave.encls(ELDU, PAGEINFO, FIRST, SLOT) == Left(SgxError.MAC_COMPARE_FAIL, ZERO)


def test_an_old_version_does_not_come_back(enclave: SgxGuest) -> None:
    evict(enclave, FIRST)
    old = enclave.read(OUTSIDE, PAGE), enclave.read(PCMD, 128)
    put_eld(enclave)
    enclave.done(ELDU, PAGEINFO, FIRST, SLOT)
    evict(enclave, FIRST)
    enclave.write(OUTSIDE, old[0])
    enclave.write(PCMD, old[1])
    put_eld(enclave)
    assert enclave.encls(ELDU, PAGEINFO, FIRST, SLOT) == Left(SgxError.MAC_COMPARE_FAIL, ZERO)


@pytest.mark.parametrize(
    "secret, outcome",
    ((SECRET, Left(0, NONE)), (b"another's secret", Left(SgxError.MAC_COMPARE_FAIL, ZERO))),
    ids=("the same VM", "another VM"),
)
def test_a_page_comes_back_to_a_vm_with_the_same_secret(
    enclave: SgxGuest, secret: bytes, outcome: Left
) -> None:
    evict(enclave, FIRST)
    other = SgxGuest(secret=secret)
    other.build([DATA])
    other.version_array(10)
    other.epc.store_version(other.gpa(SLOT), enclave.epc.version(enclave.gpa(SLOT)))
    other.write(OUTSIDE, enclave.read(OUTSIDE, PAGE))
    other.write(PCMD, enclave.read(PCMD, 128))
    put_eld(other)
    assert other.encls(ELDU, PAGEINFO, EPC + 5 * PAGE, SLOT) == outcome


@pytest.mark.parametrize("leaf", (ELDB, ELDU))
def test_eld_wants_a_free_page_a_version_array_and_an_secs(enclave: SgxGuest, leaf: int) -> None:
    evict(enclave, FIRST)
    put_eld(enclave)
    assert enclave.fault(leaf, PAGEINFO, SECOND, SLOT) == epc_fault(SECOND)
    for slot in (SECOND + 8, EPC + 20 * PAGE + 8):
        assert enclave.fault(leaf, PAGEINFO, FIRST, slot) == epc_fault(slot)
    put_eld(enclave, secs=SECS + 8)
    assert enclave.fault(leaf, PAGEINFO, FIRST, SLOT) == GENERAL_PROTECTION
    put_eld(enclave, secs=SOURCE)
    assert enclave.fault(leaf, PAGEINFO, FIRST, SLOT) == epc_fault(SOURCE)
    for secs in (SECOND, VA, EPC + 20 * PAGE):
        put_eld(enclave, secs=secs)
        assert enclave.fault(leaf, PAGEINFO, FIRST, SLOT) == epc_fault(secs)


@pytest.mark.parametrize("page_type", (0, 3, 7, 255))
def test_pages_of_no_enclave_have_no_secs(enclave: SgxGuest, page_type: int) -> None:
    evict(enclave, FIRST)
    enclave.write(PCMD, (page_type << 8).to_bytes(8, "little"))
    put_eld(enclave)
    assert enclave.fault(ELDU, PAGEINFO, FIRST, SLOT) == GENERAL_PROTECTION
    put_eld(enclave, secs=0)
    assert enclave.encls(ELDU, PAGEINFO, FIRST, SLOT) == Left(SgxError.MAC_COMPARE_FAIL, ZERO)


# ------------------------------------------------------------------------------------------------- operands of EWB


def test_ewb_wants_unused_fields_of_pageinfo_to_be_zero(enclave: SgxGuest) -> None:
    for field in ("linear_address", "secs"):
        put_ewb(enclave, **{field: PAGE})
        assert enclave.fault(EWB, PAGEINFO, FIRST, SLOT) == GENERAL_PROTECTION


def test_the_slot_is_not_in_the_page_that_goes(enclave: SgxGuest) -> None:
    put_ewb(enclave)
    assert enclave.fault(EWB, PAGEINFO, VA, SLOT) == GENERAL_PROTECTION


def test_ewb_wants_a_valid_page_and_a_version_array(enclave: SgxGuest) -> None:
    put_ewb(enclave)
    assert enclave.fault(EWB, PAGEINFO, EPC + 20 * PAGE, SLOT) == epc_fault(EPC + 20 * PAGE)
    for slot in (SECOND + 8, EPC + 20 * PAGE + 8):
        assert enclave.fault(EWB, PAGEINFO, FIRST, slot) == epc_fault(slot)


@pytest.mark.parametrize("which", ("pageinfo", "page", "pcmd"))
def test_ewb_writes_all_of_its_results_or_none(enclave: SgxGuest, which: str) -> None:
    """Each of the three pages in turn cannot be written."""
    enclave.done(EBLOCK, rcx=FIRST)
    enclave.done(ETRACK, rcx=SECS)
    put_ewb(enclave)
    place = {"pageinfo": PAGEINFO, "page": OUTSIDE, "pcmd": PCMD}[which]
    enclave.write_protect(place)
    assert enclave.fault(EWB, PAGEINFO, FIRST, SLOT) == (PF, PF_P | PF_W, place)


def test_an_unmapped_destination_is_a_page_fault(enclave: SgxGuest) -> None:
    enclave.done(EBLOCK, rcx=FIRST)
    enclave.done(ETRACK, rcx=SECS)
    put_ewb(enclave, destination=UNMAPPED)
    assert enclave.fault(EWB, PAGEINFO, FIRST, SLOT) == (PF, PF_W, UNMAPPED)


def test_user_addresses_in_pageinfo_obey_lass(enclave: SgxGuest) -> None:
    """The destination is in the user's half: #GP without RFLAGS.AC, and with it the page is written there."""
    enclave.done(EBLOCK, rcx=FIRST)
    enclave.done(ETRACK, rcx=SECS)
    user = 0x76000
    put_ewb(enclave, destination=user)
    assert enclave.fault(EWB, PAGEINFO, FIRST, SLOT) == GENERAL_PROTECTION
    enclave.set_ac(True)
    enclave.write(user, bytes(PAGE))
    enclave.done(EWB, PAGEINFO, FIRST, SLOT)
    assert enclave.read(user, PAGE) != bytes(PAGE)


def test_a_destination_in_the_epc_gets_nothing(enclave: SgxGuest) -> None:
    enclave.done(EBLOCK, rcx=FIRST)
    enclave.done(ETRACK, rcx=SECS)
    put_ewb(enclave, destination=SECOND)
    enclave.done(EWB, PAGEINFO, FIRST, SLOT)
    assert enclave.epc.read(enclave.gpa(SECOND)) == DATA.content
