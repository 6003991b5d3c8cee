"""An enclave from ECREATE to EINIT, as a kernel builds it, measured once more by the test itself."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import signing
from emulator_guest import UPPER
from sgx_guest import (
    BASE,
    EPC,
    GENERAL_PROTECTION,
    NONE,
    PAGEINFO,
    SIZE,
    TCS_CONTENT,
    ZERO,
    Left,
    SgxGuest,
)
from signing import DEBUG, MODE64BIT, PAGE, REG_R, REG_RW, REG_RX, SIGNER, STRANGER, TCS, Page, Signing

from lasskvm.sgx.encls import Encls
from lasskvm.sgx.epc import Epc
from lasskvm.state import RAX, RBX, RCX
from lasskvm.x86.registers import MASK64
from lasskvm.x86.sgx import EnclsLeaf, SgxError

SECS = EPC
TEXT = Page(0x0000, REG_RX, bytes(range(256)) * 16)
RODATA = Page(0x1000, REG_R, hashlib.sha256(b"constants").digest() * 128)
HEAP = Page(0x8000, REG_RW, bytes(PAGE), is_measured=False)
THREAD = Page(0x9000, TCS, TCS_CONTENT)
PAGES = (TEXT, RODATA, HEAP, THREAD)

#: The kernel's PAGEINFO, under the user address that the same memory has.
USER_PAGEINFO = PAGEINFO - UPPER


def measured() -> bytes:
    """MRENCLAVE of the enclave of this module, put together from the manual's blocks by hand."""
    log = b"ECREATE\0" + struct.pack("<I", 1) + struct.pack("<Q", SIZE) + bytes(44)
    for offset, flags, content, chunks in (
        (0x0000, 0x205, TEXT.content, 16),
        (0x1000, 0x201, RODATA.content, 16),
        (0x8000, 0x203, HEAP.content, 0),
        (0x9000, 0x100, THREAD.content, 16),
    ):
        log += b"EADD\0\0\0\0" + struct.pack("<QQ", offset, flags) + bytes(40)
        for chunk in range(chunks):
            start = 256 * chunk
            log += b"EEXTEND\0" + struct.pack("<Q", offset + start) + bytes(48) + content[start : start + 256]
    return hashlib.sha256(log).digest()


def test_an_enclave_of_several_pages_has_the_measurement_that_its_developer_computed(guest: SgxGuest) -> None:
    guest.build(PAGES)
    guest.allow_signer(SIGNER)
    assert guest.initialize(Signing(measured(), SIGNER)) == Left(0, NONE)
    secs = guest.epc.secs(guest.gpa(SECS))
    assert (secs.mrenclave, secs.mrsigner, secs.is_initialized) == (measured(), SIGNER.mrsigner, True)
    assert measured() == signing.mrenclave(SIZE, 1, PAGES)


@pytest.mark.parametrize(
    "pages",
    (
        (RODATA, TEXT, HEAP, THREAD),
        (TEXT, RODATA, HEAP),
        (TEXT, Page(0x1000, REG_RW, RODATA.content), HEAP, THREAD),
        (TEXT, Page(0x2000, REG_R, RODATA.content), HEAP, THREAD),
        (TEXT, Page(0x1000, REG_R, b"\x01" + RODATA.content[1:]), HEAP, THREAD),
        (TEXT, Page(0x1000, REG_R, RODATA.content, is_measured=False), HEAP, THREAD),
    ),
    ids=("order", "page missing", "permissions", "place", "content", "not measured"),
)
def test_an_enclave_that_was_built_otherwise_is_not_initialized(
    guest: SgxGuest, pages: tuple[Page, ...]
) -> None:
    guest.build(pages)
    guest.allow_signer(SIGNER)
    assert guest.initialize(Signing(measured(), SIGNER)) == Left(SgxError.INVALID_MEASUREMENT, ZERO)


def test_what_is_not_measured_does_not_change_the_measurement(guest: SgxGuest) -> None:
    guest.build((TEXT, RODATA, Page(0x8000, REG_RW, b"\xff" * PAGE, is_measured=False), THREAD))
    guest.allow_signer(SIGNER)
    assert guest.initialize(Signing(measured(), SIGNER)) == Left(0, NONE)


def _broken(offset: int) -> bytes:
    signed = bytearray(Signing(measured(), SIGNER).sigstruct())
    signed[offset] ^= 1
    return bytes(signed)


@pytest.mark.parametrize(
    "signed, error",
    (
        (_broken(0), SgxError.INVALID_SIG_STRUCT),
        (_broken(512), SgxError.INVALID_SIG_STRUCT),
        (_broken(516), SgxError.INVALID_SIGNATURE),
        (_broken(1040), SgxError.INVALID_SIGNATURE),
        (Signing(bytes(32), SIGNER).sigstruct(), SgxError.INVALID_MEASUREMENT),
        (Signing(measured(), SIGNER, attributes=0).sigstruct(), SgxError.INVALID_ATTRIBUTE),
        (Signing(measured(), SIGNER, miscselect=1).sigstruct(), SgxError.INVALID_ATTRIBUTE),
        (Signing(measured(), STRANGER).sigstruct(), SgxError.INVALID_EINITTOKEN),
    ),
    ids=("header", "exponent", "signature", "Q1", "measurement", "attributes", "MISCSELECT", "signer"),
)
def test_each_bad_signature_has_its_error_code_and_a_good_one_still_works_behind_it(
    guest: SgxGuest, signed: bytes, error: SgxError
) -> None:
    guest.build(PAGES)
    guest.allow_signer(SIGNER)
    assert guest.initialize(signed) == Left(error, ZERO)
    assert guest.initialize(Signing(measured(), SIGNER)) == Left(0, NONE)


def test_with_lass_a_pageinfo_in_the_users_half_is_gp_without_ac_and_works_with_it(guest: SgxGuest) -> None:
    guest.put_create()
    assert guest.fault(EnclsLeaf.ECREATE, USER_PAGEINFO, SECS) == GENERAL_PROTECTION
    guest.set_ac(True)
    guest.done(EnclsLeaf.ECREATE, USER_PAGEINFO, SECS)
    guest.set_ac(False)
    guest.put_add(TEXT)
    assert guest.fault(EnclsLeaf.EADD, USER_PAGEINFO, EPC + PAGE) == GENERAL_PROTECTION
    guest.set_ac(True)
    guest.done(EnclsLeaf.EADD, USER_PAGEINFO, EPC + PAGE)


def test_two_enclaves_are_built_side_by_side(guest: SgxGuest) -> None:
    other_secs, other_base = EPC + 10 * PAGE, BASE + 16 * SIZE
    guest.create()
    guest.put_create(base=other_base, attributes=MODE64BIT | DEBUG)
    guest.done(EnclsLeaf.ECREATE, PAGEINFO, other_secs)
    for number, page in enumerate((TEXT, RODATA), 1):
        guest.add(number, page)
        guest.add(10 + number, page, other_secs, other_base)
    guest.allow_signer(SIGNER)
    expected = signing.mrenclave(SIZE, 1, (TEXT, RODATA))
    for secs in (SECS, other_secs):
        assert guest.initialize(Signing(expected, SIGNER), secs) == Left(0, NONE)


def test_an_enclave_can_be_saved_while_it_is_built(guest: SgxGuest) -> None:
    """The EPC goes through a snapshot between two pages; the secret is part of it."""
    guest.build(PAGES[:2])
    state = json.loads(json.dumps(guest.encls_unit.get_state()))
    content = bytes(guest.epc.view)
    guest.epc = Epc(guest.epc.base, guest.epc.size)
    guest.epc.view[:] = content
    loaded = Encls(guest.epc, b"another secret")
    loaded.set_state(state)
    guest.ctx.sgx = loaded
    for number, page in enumerate(PAGES[2:], 3):
        guest.add(number, page)
    guest.allow_signer(SIGNER)
    assert guest.initialize(Signing(measured(), SIGNER)) == Left(0, NONE)


def test_an_enclave_is_taken_down_page_by_page(guest: SgxGuest) -> None:
    guest.initialized([TEXT, THREAD])
    for number in (1, 2, 0):
        guest.done(EnclsLeaf.EREMOVE, rcx=guest.page(number))
    assert guest.epc.free_pages == guest.epc.size // PAGE


def test_ordinary_loads_see_all_ones_and_stores_are_dropped(guest: SgxGuest) -> None:
    guest.build(PAGES)
    text = EPC + PAGE
    guest.words[RBX], guest.words[RAX] = text, 0x1234
    guest.run("488903")  # mov [rbx], rax
    guest.run("488b0b")  # mov rcx, [rbx]
    assert guest.words[RCX] == MASK64
    assert guest.epc.read(guest.gpa(text)) == TEXT.content
