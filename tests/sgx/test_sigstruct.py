"""SIGSTRUCT: well formed, signed by the key inside, or refused with the code that says which."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signing import MODULUS_BYTES, SIGNER, STRANGER, Signing

from lasskvm.sgx.sigstruct import Sigstruct
from lasskvm.x86.sgx import SgxError

SIGNING = Signing(enclave_hash=bytes(range(32)), key=SIGNER)
GOOD = SIGNING.sigstruct()
MODULUS, EXPONENT, SIGNATURE, Q1, Q2 = 128, 512, 516, 1040, 1424


def check(data: bytes) -> SgxError:
    return Sigstruct.parse(data).check()


def patched(offset: int, data: bytes) -> bytes:
    return GOOD[:offset] + data + GOOD[offset + len(data) :]


def flipped(offset: int) -> bytes:
    return patched(offset, bytes((GOOD[offset] ^ 1,)))


def number(value: int) -> bytes:
    return value.to_bytes(MODULUS_BYTES, "little")


def test_a_good_signature_is_accepted():
    assert len(GOOD) == 1808
    assert check(GOOD) == SgxError.SUCCESS


@pytest.mark.parametrize("vendor", [0, 0x8086])
def test_intel_and_everybody_else_are_vendors(vendor: int):
    assert check(SIGNING.replace(vendor=vendor).sigstruct()) == SgxError.SUCCESS


@pytest.mark.parametrize(
    "signing",
    [
        SIGNING.replace(vendor=1),
        SIGNING.replace(header=bytes(16)),
        SIGNING.replace(header2=bytes(16)),
    ],
    ids=["vendor", "header", "header2"],
)
def test_a_signed_structure_of_another_kind_is_no_sigstruct(signing: Signing):
    assert check(signing.sigstruct()) == SgxError.INVALID_SIG_STRUCT


@pytest.mark.parametrize("offset", [44, 127, 908, 912, 927, 992, 1008, 1023, 1028, 1039])
def test_a_byte_in_a_reserved_field_is_no_sigstruct(offset: int):
    assert check(flipped(offset)) == SgxError.INVALID_SIG_STRUCT


def test_an_exponent_other_than_three_is_no_sigstruct():
    assert check(patched(EXPONENT, (65537).to_bytes(4, "little"))) == SgxError.INVALID_SIG_STRUCT


@pytest.mark.parametrize("offset", [20, 40, 900, 904, 928, 944, 960, 991, 1024, 1026])
def test_every_signed_field_is_covered_by_the_signature(offset: int):
    assert check(flipped(offset)) == SgxError.INVALID_SIGNATURE


@pytest.mark.parametrize("offset", [MODULUS, SIGNATURE, Q1, Q2], ids=["modulus", "signature", "q1", "q2"])
def test_every_number_has_to_be_right(offset: int):
    assert check(flipped(offset)) == SgxError.INVALID_SIGNATURE


def test_the_signature_of_another_key_does_not_count():
    strangers = SIGNING.replace(key=STRANGER).sigstruct()
    assert check(patched(MODULUS, strangers[MODULUS:EXPONENT])) == SgxError.INVALID_SIGNATURE


@pytest.mark.parametrize("modulus", [0, 1, 2, SIGNER.p, 1 << 3071, (1 << 3072) - 1, SIGNER.modulus - 1])
def test_a_modulus_that_is_none_is_a_bad_signature_even_when_q1_and_q2_fit(modulus: int):
    signature = min(3, modulus)
    q1 = signature**2 // modulus if modulus else 0
    q2 = (signature**3 - q1 * signature * modulus) // modulus if modulus else 0
    data = bytearray(patched(MODULUS, number(modulus)))
    for offset, value in ((SIGNATURE, signature), (Q1, q1), (Q2, q2)):
        data[offset : offset + MODULUS_BYTES] = number(value)
    assert check(bytes(data)) == SgxError.INVALID_SIGNATURE


def test_a_signature_that_is_not_below_the_modulus_is_bad():
    signature = int.from_bytes(GOOD[SIGNATURE : SIGNATURE + MODULUS_BYTES], "little") + SIGNER.modulus
    if signature.bit_length() > 8 * MODULUS_BYTES:
        signature = SIGNER.modulus
    q1, rest = divmod(signature**2, SIGNER.modulus)
    data = bytearray(patched(SIGNATURE, number(signature)))
    for offset, value in ((Q1, q1), (Q2, rest * signature // SIGNER.modulus)):
        data[offset : offset + MODULUS_BYTES] = number(value & (1 << 8 * MODULUS_BYTES) - 1)
    assert check(bytes(data)) == SgxError.INVALID_SIGNATURE


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1808, max_size=1808))
def test_random_bytes_are_no_sigstruct(data: bytes):
    assert check(data) == SgxError.INVALID_SIG_STRUCT


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=MODULUS_BYTES, max_size=MODULUS_BYTES), st.binary(max_size=MODULUS_BYTES))
def test_random_numbers_are_a_bad_signature(modulus: bytes, signature: bytes):
    data = bytearray(patched(MODULUS, modulus))
    data[SIGNATURE : SIGNATURE + len(signature)] = signature
    assert check(bytes(data)) == SgxError.INVALID_SIGNATURE


def test_the_fields_are_where_the_manual_has_them():
    sigstruct = Sigstruct.parse(
        SIGNING.replace(
            miscselect=1, miscmask=2, attributes=3, attribute_mask=4, xfrm=5, xfrm_mask=6
        ).sigstruct()
    )
    assert (sigstruct.miscselect, sigstruct.miscmask) == (1, 2)
    assert (sigstruct.attributes, sigstruct.attribute_mask) == (3, 4)
    assert (sigstruct.xfrm, sigstruct.xfrm_mask) == (5, 6)
    assert sigstruct.enclave_hash == bytes(range(32))
    assert (sigstruct.isvprodid, sigstruct.isvsvn) == (0x1234, 5)
    assert sigstruct.mrsigner == SIGNER.mrsigner != STRANGER.mrsigner
