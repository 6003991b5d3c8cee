"""Launch control: which initialized enclaves there can be, and the code for each that cannot."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signing import (
    DEBUG,
    EINITTOKENKEY,
    MODE64BIT,
    NO_TOKEN,
    PROVISIONKEY,
    REG_RX,
    SIGNER,
    STRANGER,
    XFRM_X87_SSE,
    Page,
    Signing,
    mrenclave,
    secinfo,
    secs_page,
)

from lasskvm.sgx import measurement
from lasskvm.sgx.launch import EinitToken, LaunchControl, hash_of_msrs, initialize
from lasskvm.sgx.secs import Secs
from lasskvm.sgx.sigstruct import Sigstruct
from lasskvm.x86.sgx import SgxError

BASE, SIZE = 0x7000_0000, 0x10000
PAGES = (Page(0, REG_RX, is_measured=False),)
SIGNING = Signing(enclave_hash=mrenclave(SIZE, 1, PAGES), key=SIGNER)
CONTROL = LaunchControl(b"one machine")
VALID, CPUSVN, MASKED_ATTRIBUTES, MAC = 0, 192, 240, 288


def enclave(attributes: int = MODE64BIT, xfrm: int = XFRM_X87_SSE, miscselect: int = 0) -> Secs:
    secs = Secs.created(secs_page(SIZE, BASE, 1, attributes, xfrm, miscselect), eid=1)
    measurement.measure_create(secs)
    for page in PAGES:
        measurement.measure_add(secs, page.offset, secinfo(page.flags))
    return secs


def check(
    secs: Secs, signing: Signing = SIGNING, token: bytes = NO_TOKEN, key_hash: bytes = SIGNER.mrsigner
) -> SgxError:
    sigstruct = Sigstruct.parse(signing.sigstruct())
    assert sigstruct.check() == SgxError.SUCCESS
    return CONTROL.check(secs, sigstruct, EinitToken.parse(token), key_hash)


# -------------------------------------------------------------------------------------------------------- without token


def test_an_enclave_signed_with_the_key_of_the_msrs_may_be_launched():
    assert check(enclave()) == SgxError.SUCCESS


def test_an_enclave_of_another_signer_needs_a_token():
    assert check(enclave(), SIGNING.replace(key=STRANGER)) == SgxError.INVALID_EINITTOKEN


def test_the_msrs_decide_who_the_signer_is():
    msrs = struct.unpack("<4Q", STRANGER.mrsigner)
    assert check(enclave(), SIGNING.replace(key=STRANGER), key_hash=hash_of_msrs(msrs)) == SgxError.SUCCESS
    assert check(enclave(), key_hash=hash_of_msrs(msrs)) == SgxError.INVALID_EINITTOKEN


def test_an_enclave_that_was_built_differently_is_refused():
    secs = enclave()
    measurement.measure_add(secs, 0x1000, secinfo(REG_RX))
    assert check(secs) == SgxError.INVALID_MEASUREMENT


@pytest.mark.parametrize(
    "secs",
    [enclave(MODE64BIT | PROVISIONKEY), enclave(0), enclave(xfrm=7), enclave(miscselect=1)],
    ids=["attribute too many", "attribute missing", "xfrm", "miscselect"],
)
def test_what_the_signer_enforces_has_to_be_so(secs: Secs):
    assert check(secs) == SgxError.INVALID_ATTRIBUTE


@pytest.mark.parametrize(
    "secs, signing",
    [
        (
            enclave(MODE64BIT | PROVISIONKEY),
            SIGNING.replace(attribute_mask=~PROVISIONKEY & 0xFFFF_FFFF_FFFF_FFFF),
        ),
        (enclave(MODE64BIT | DEBUG), SIGNING),
        (enclave(xfrm=7), SIGNING.replace(xfrm_mask=3)),
        (enclave(miscselect=1), SIGNING.replace(miscmask=0)),
        (enclave(), SIGNING.replace(attributes=0, attribute_mask=0, xfrm=0, xfrm_mask=0)),
    ],
    ids=["attribute", "debug", "xfrm", "miscselect", "nothing enforced"],
)
def test_what_the_signer_leaves_open_may_be_anyhow(secs: Secs, signing: Signing):
    assert check(secs, signing) == SgxError.SUCCESS


def test_only_the_signer_of_the_msrs_gets_the_controlled_attributes():
    secs = enclave(MODE64BIT | EINITTOKENKEY)
    signing = SIGNING.replace(attributes=MODE64BIT | EINITTOKENKEY)
    assert check(secs, signing) == SgxError.SUCCESS
    assert check(secs, signing, key_hash=STRANGER.mrsigner) == SgxError.INVALID_ATTRIBUTE


def test_the_measurement_is_checked_before_attributes_and_token():
    wrong = SIGNING.replace(enclave_hash=bytes(32), attributes=0, key=STRANGER)
    assert check(enclave(), wrong) == SgxError.INVALID_MEASUREMENT


def test_attributes_are_checked_before_the_token():
    assert check(enclave(), SIGNING.replace(attributes=0, key=STRANGER)) == SgxError.INVALID_ATTRIBUTE


# ----------------------------------------------------------------------------------------------------------- with token


def token(
    valid: int = 1,
    attributes: int = MODE64BIT,
    xfrm: int = XFRM_X87_SSE,
    enclave_hash: bytes = SIGNING.enclave_hash,
    mrsigner: bytes = STRANGER.mrsigner,
    cpusvn: int = 0,
    masked_attributes: int = 0,
    key_hash: bytes = SIGNER.mrsigner,
    control: LaunchControl = CONTROL,
) -> bytes:
    """A token for the stranger's enclave, as a launch enclave of *control*'s machine would make it."""
    data = struct.pack(
        "<I44xQQ32s32x32s32xQ8xHH24xIQQ32s16x",
        valid, attributes, xfrm, enclave_hash, mrsigner, cpusvn, 1, 1, 0, masked_attributes, 3, b"\x5a" * 32,
    )  # fmt: skip
    return data[:MAC] + control.token_mac(data, key_hash)


STRANGERS = SIGNING.replace(key=STRANGER)


def test_a_token_lets_another_signers_enclave_be_launched():
    assert len(token()) == 304
    assert check(enclave(), STRANGERS, token()) == SgxError.SUCCESS


@pytest.mark.parametrize("offset", [48, 64, 128, 196, 208, 210, 236, 248, 256, MAC, 303])
def test_a_changed_token_is_refused(offset: int):
    data = bytearray(token())
    data[offset] ^= 1
    # CPUSVNLE has a code of its own.
    expected = SgxError.INVALID_CPUSVN if CPUSVN <= offset < CPUSVN + 16 else SgxError.INVALID_EINITTOKEN
    assert check(enclave(), STRANGERS, bytes(data)) == expected


@pytest.mark.parametrize(
    "offset, value", [(VALID, 3), (4, 1), (47, 1), (96, 1), (160, 1), (212, 1), (235, 1)]
)
def test_reserved_fields_of_a_token_have_to_be_zero_even_with_a_right_mac(offset: int, value: int):
    data = bytearray(token())
    data[offset] = value
    data[MAC:] = CONTROL.token_mac(bytes(data), SIGNER.mrsigner)
    assert check(enclave(), STRANGERS, bytes(data)) == SgxError.INVALID_EINITTOKEN


@pytest.mark.parametrize(
    "change", [{"enclave_hash": bytes(32)}, {"mrsigner": SIGNER.mrsigner}], ids=["hash", "signer"]
)
def test_a_token_for_another_enclave_is_refused(change: dict[str, bytes]):
    assert check(enclave(), STRANGERS, token(**change)) == SgxError.INVALID_MEASUREMENT


@pytest.mark.parametrize(
    "change", [{"attributes": MODE64BIT | PROVISIONKEY}, {"xfrm": 7}], ids=["attributes", "xfrm"]
)
def test_a_token_for_other_attributes_is_refused(change: dict[str, int]):
    assert check(enclave(), STRANGERS, token(**change)) == SgxError.INVALID_ATTRIBUTE


def test_a_token_of_a_newer_processor_is_refused():
    assert check(enclave(), STRANGERS, token(cpusvn=1)) == SgxError.INVALID_CPUSVN


def test_a_debug_launch_enclave_launches_only_debug_enclaves():
    assert check(enclave(), STRANGERS, token(masked_attributes=DEBUG)) == SgxError.INVALID_EINITTOKEN
    attributes = MODE64BIT | DEBUG
    debugged = token(attributes=attributes, masked_attributes=DEBUG)
    assert check(enclave(attributes), STRANGERS, debugged) == SgxError.SUCCESS


def test_a_token_of_another_machine_or_launch_enclave_is_refused():
    for foreign in (token(control=LaunchControl(b"another machine")), token(key_hash=STRANGER.mrsigner)):
        assert check(enclave(), STRANGERS, foreign) == SgxError.INVALID_EINITTOKEN


def test_a_right_signer_does_not_make_up_for_a_bad_token():
    data = bytearray(token(mrsigner=SIGNER.mrsigner))
    assert check(enclave(), SIGNING, bytes(data)) == SgxError.SUCCESS
    data[MAC] ^= 1
    assert check(enclave(), SIGNING, bytes(data)) == SgxError.INVALID_EINITTOKEN


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=304, max_size=304))
def test_a_random_token_that_claims_to_be_valid_is_refused(data: bytes):
    sigstruct = Sigstruct.parse(STRANGERS.sigstruct())
    data = bytes((data[0] | 1,)) + data[1:]
    result = CONTROL.check(enclave(), sigstruct, EinitToken.parse(data), SIGNER.mrsigner)
    assert result in (SgxError.INVALID_EINITTOKEN, SgxError.INVALID_CPUSVN)


# --------------------------------------------------------------------------------------------------------- what it does


def test_an_initialized_enclave_has_its_identity():
    secs = enclave()
    before = replace(secs)
    initialize(secs, Sigstruct.parse(SIGNING.sigstruct()))
    assert secs.is_initialized
    assert secs.mrenclave == SIGNING.enclave_hash
    assert secs.mrsigner == SIGNER.mrsigner
    assert (secs.isvprodid, secs.isvsvn) == (0x1234, 5)
    assert (secs.size, secs.base, secs.eid) == (before.size, before.base, before.eid)
    assert secs.attributes & ~1 == before.attributes
