"""EPA, EREMOVE, EBLOCK, ETRACK: version arrays, free pages, and pages on their way out."""

from __future__ import annotations

import pytest
from sgx_guest import (
    CARRY,
    EPC,
    GENERAL_PROTECTION,
    USER_EPC,
    ZERO,
    Left,
    SgxGuest,
    epc_fault,
)
from signing import PAGE
from two_pages import EBLOCK, EPA, EREMOVE, ETRACK, FIRST, SECOND, SECS, VA, entry_of

from lasskvm.x86.sgx import PageType, SgxError

# ------------------------------------------------------------------------------------------------- EPA and EREMOVE


def test_epa_makes_an_empty_version_array(guest: SgxGuest) -> None:
    guest.done(EPA, PageType.VA, VA)
    entry = entry_of(guest, VA)
    assert (entry.page_type, entry.permissions, entry.secs) == (PageType.VA, 0, None)
    assert guest.epc.read(guest.gpa(VA)) == bytes(PAGE)


@pytest.mark.parametrize("page_type", (0, 1, 2, 4, 3 | 1 << 32))
def test_epa_wants_the_page_type_in_rbx(guest: SgxGuest, page_type: int) -> None:
    assert guest.fault(EPA, page_type, VA) == GENERAL_PROTECTION


def test_epa_of_a_valid_page_is_a_page_fault(guest: SgxGuest) -> None:
    guest.version_array(10)
    assert guest.fault(EPA, PageType.VA, VA) == epc_fault(VA)


def test_a_removed_page_is_free_again_and_empty(enclave: SgxGuest) -> None:
    enclave.done(EREMOVE, rcx=FIRST)
    assert enclave.epc.entry(enclave.gpa(FIRST)) is None
    enclave.done(EPA, PageType.VA, FIRST)
    assert enclave.epc.read(enclave.gpa(FIRST)) == bytes(PAGE)


def test_an_secs_is_removed_last(enclave: SgxGuest) -> None:
    assert enclave.encls(EREMOVE, rcx=SECS) == Left(SgxError.CHILD_PRESENT, ZERO)
    enclave.done(EREMOVE, rcx=FIRST)
    assert enclave.encls(EREMOVE, rcx=SECS) == Left(SgxError.CHILD_PRESENT, ZERO)
    enclave.done(EREMOVE, rcx=SECOND)
    enclave.done(EREMOVE, rcx=SECS)


def test_removing_what_is_free_or_a_version_array_succeeds(enclave: SgxGuest) -> None:
    enclave.done(EREMOVE, rcx=VA)
    enclave.done(EREMOVE, rcx=VA)
    assert enclave.epc.entry(enclave.gpa(VA)) is None


# ------------------------------------------------------------------------------------------------ EBLOCK and ETRACK


def test_a_page_is_blocked_once(enclave: SgxGuest) -> None:
    enclave.done(EBLOCK, rcx=FIRST)
    assert entry_of(enclave, FIRST).blocked
    assert enclave.encls(EBLOCK, rcx=FIRST) == Left(SgxError.BLKSTATE, CARRY)


def test_pages_that_cannot_be_blocked_are_told_apart(enclave: SgxGuest) -> None:
    assert enclave.encls(EBLOCK, rcx=SECS) == Left(SgxError.PG_IS_SECS, CARRY)
    assert enclave.encls(EBLOCK, rcx=VA) == Left(SgxError.NOTBLOCKABLE, CARRY)
    assert enclave.encls(EBLOCK, rcx=EPC + 20 * PAGE) == Left(SgxError.PG_INVLD, ZERO)


def test_etrack_wants_an_secs(enclave: SgxGuest) -> None:
    for page in (FIRST, VA, EPC + 20 * PAGE):
        assert enclave.fault(ETRACK, rcx=page) == epc_fault(page)
    enclave.done(ETRACK, rcx=SECS)
    enclave.done(ETRACK, rcx=SECS)


def test_the_epc_can_be_named_by_user_addresses_with_ac(enclave: SgxGuest) -> None:
    user = USER_EPC + PAGE
    assert enclave.fault(EBLOCK, rcx=user) == GENERAL_PROTECTION
    enclave.set_ac(True)
    enclave.done(EBLOCK, rcx=user)
    assert entry_of(enclave, FIRST).blocked
