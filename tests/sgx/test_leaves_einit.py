"""EINIT: the identity that an enclave gets, and what keeps it from getting one, each with its error code."""

from __future__ import annotations

import struct

import pytest
import signing
from sgx_guest import (
    EPC,
    GENERAL_PROTECTION,
    NONE,
    SIGSTRUCT,
    SIZE,
    TOKEN,
    ZERO,
    Left,
    SgxGuest,
    epc_fault,
)
from signing import DEBUG, EINITTOKENKEY, MODE64BIT, PAGE, REG_RX, SIGNER, STRANGER, Page, Signing

from lasskvm.sgx.launch import hash_of_msrs
from lasskvm.x86.msr import MSR_IA32_SGXLEPUBKEYHASH0
from lasskvm.x86.sgx import EnclsLeaf, SgxError

EINIT = EnclsLeaf.EINIT
CODE = Page(0x1000, REG_RX, bytes(range(256)) * 16)
SECS, FIRST = EPC, EPC + PAGE


def signed(key: signing.Key = SIGNER, attributes: int = MODE64BIT, **fields: object) -> Signing:
    enclave = signing.mrenclave(SIZE, 1, [CODE])
    return Signing(enclave, key, attributes=attributes).replace(**fields)


def einit_outcome(
    guest: SgxGuest, what: Signing | bytes, attributes: int = MODE64BIT, token: bytes = bytes(304)
) -> Left:
    """EINIT of the enclave; when it fails the SECS stays as it was."""
    guest.build([CODE], attributes)
    before = guest.epc_state()
    left = guest.initialize(what, token=token)
    if left.rax:
        assert guest.epc_state() == before
    return left


def test_einit_gives_the_enclave_its_identity(guest: SgxGuest) -> None:
    guest.initialized([CODE])
    secs = guest.epc.secs(guest.gpa(SECS))
    assert secs.is_initialized
    assert secs.mrenclave == signing.mrenclave(SIZE, 1, [CODE])
    assert (secs.mrsigner, secs.isvprodid, secs.isvsvn) == (SIGNER.mrsigner, 0x1234, 5)


def test_an_enclave_is_initialized_once(guest: SgxGuest) -> None:
    guest.initialized([CODE])
    assert guest.fault(EINIT, SIGSTRUCT, SECS, TOKEN) == GENERAL_PROTECTION


@pytest.mark.parametrize("vendor", (0, 0x8086))
def test_two_vendors_sign(guest: SgxGuest, vendor: int) -> None:
    guest.allow_signer(SIGNER)
    assert einit_outcome(guest, signed(vendor=vendor)) == Left(0, NONE)


@pytest.mark.parametrize(
    "what",
    (
        signed(header=bytes(16)),
        signed(header2=bytes(16)),
        signed(vendor=1),
        bytes(1808),
        b"\xff" * 1808,
    ),
    ids=("header", "second header", "vendor", "zeros", "ones"),
)
def test_a_malformed_sigstruct_is_told(guest: SgxGuest, what: Signing | bytes) -> None:
    guest.allow_signer(SIGNER)
    assert einit_outcome(guest, what) == Left(SgxError.INVALID_SIG_STRUCT, ZERO)


@pytest.mark.parametrize("offset", (44, 127, 512, 908, 992, 1028, 1039))
def test_reserved_bytes_and_the_exponent_of_a_sigstruct_are_checked(guest: SgxGuest, offset: int) -> None:
    broken = bytearray(signed().sigstruct())
    broken[offset] ^= 0x40
    guest.allow_signer(SIGNER)
    assert einit_outcome(guest, bytes(broken)) == Left(SgxError.INVALID_SIG_STRUCT, ZERO)


@pytest.mark.parametrize("offset", (20, 128, 516, 899, 960, 1024, 1040, 1424), ids=(
    "date", "modulus", "signature", "end of signature", "hash", "product", "Q1", "Q2",
))  # fmt: skip
def test_a_sigstruct_that_is_not_what_was_signed_is_told(guest: SgxGuest, offset: int) -> None:
    broken = bytearray(signed().sigstruct())
    broken[offset] ^= 1
    guest.allow_signer(SIGNER)
    assert einit_outcome(guest, bytes(broken)) == Left(SgxError.INVALID_SIGNATURE, ZERO)


def test_the_signature_is_looked_at_before_the_secs(guest: SgxGuest) -> None:
    guest.write(SIGSTRUCT, bytes(1808))
    guest.write(TOKEN, bytes(304))
    assert guest.encls(EINIT, SIGSTRUCT, SECS, TOKEN) == Left(SgxError.INVALID_SIG_STRUCT, ZERO)
    guest.write(SIGSTRUCT, signed().sigstruct())
    assert guest.fault(EINIT, SIGSTRUCT, SECS, TOKEN) == epc_fault(SECS)


def test_einit_wants_an_secs(guest: SgxGuest) -> None:
    guest.build([CODE])
    guest.write(SIGSTRUCT, signed().sigstruct())
    guest.write(TOKEN, bytes(304))
    assert guest.fault(EINIT, SIGSTRUCT, FIRST, TOKEN) == epc_fault(FIRST)


def test_another_measurement_is_told(guest: SgxGuest) -> None:
    guest.allow_signer(SIGNER)
    assert einit_outcome(guest, signed(enclave_hash=bytes(32))) == Left(SgxError.INVALID_MEASUREMENT, ZERO)


@pytest.mark.parametrize(
    "fields",
    (
        {"attributes": 0},
        {"attributes": MODE64BIT | DEBUG, "attribute_mask": DEBUG},
        {"xfrm": 1 << 9 | 3},
        {"miscselect": 1},
    ),
    ids=str,
)
def test_attributes_that_the_signer_does_not_want_are_told(
    guest: SgxGuest, fields: dict[str, object]
) -> None:
    guest.allow_signer(SIGNER)
    assert einit_outcome(guest, signed(**fields)) == Left(SgxError.INVALID_ATTRIBUTE, ZERO)


@pytest.mark.parametrize(
    "fields",
    (
        {"attributes": MODE64BIT | DEBUG},
        {"xfrm": 7, "xfrm_mask": 3},
        {"miscselect": 1, "miscmask": 0},
        {"attributes": 0, "attribute_mask": 0},
    ),
    ids=str,
)
def test_what_the_signer_masks_does_not_matter(guest: SgxGuest, fields: dict[str, object]) -> None:
    guest.allow_signer(SIGNER)
    assert einit_outcome(guest, signed(**fields)) == Left(0, NONE)


def test_a_debug_enclave_runs_with_a_signature_that_does_not_mind(guest: SgxGuest) -> None:
    guest.allow_signer(SIGNER)
    assert einit_outcome(guest, signed(), attributes=MODE64BIT | DEBUG) == Left(0, NONE)


def test_without_a_token_only_the_signer_of_the_msrs_may_launch(guest: SgxGuest) -> None:
    guest.allow_signer(SIGNER)
    assert einit_outcome(guest, signed(STRANGER)) == Left(SgxError.INVALID_EINITTOKEN, ZERO)


def test_at_reset_that_signer_is_none_of_us(guest: SgxGuest) -> None:
    assert einit_outcome(guest, signed()) == Left(SgxError.INVALID_EINITTOKEN, ZERO)


@pytest.mark.parametrize(
    "allowed, outcome",
    ((STRANGER, Left(SgxError.INVALID_ATTRIBUTE, ZERO)), (SIGNER, Left(0, NONE))),
    ids=("no", "yes"),
)
def test_the_einittoken_key_is_for_the_signer_of_the_msrs(
    guest: SgxGuest, allowed: signing.Key, outcome: Left
) -> None:
    attributes = MODE64BIT | EINITTOKENKEY
    guest.allow_signer(allowed)
    assert einit_outcome(guest, signed(attributes=attributes), attributes) == outcome


# ----------------------------------------------------------------------------------------------------- EINITTOKEN


def token(guest: SgxGuest, allowed: signing.Key = STRANGER, **fields: object) -> bytes:
    """A token for the enclave, made by a launch enclave that *allowed* has signed."""
    values: dict[str, object] = {
        "valid": 1, "attributes": MODE64BIT, "xfrm": 3, "mrenclave": signing.mrenclave(SIZE, 1, [CODE]),
        "mrsigner": SIGNER.mrsigner, "cpusvn": bytes(16), "masked": MODE64BIT, "reserved": 0,
    }  # fmt: skip
    values |= fields
    data = struct.pack(
        "<II40xQQ32s32x32s32x16sHH24xIQQ32s",
        values["valid"], values["reserved"], values["attributes"], values["xfrm"], values["mrenclave"],
        values["mrsigner"], values["cpusvn"], 1, 1, 0, values["masked"], 3, b"key",
    )  # fmt: skip
    guest.allow_signer(allowed)
    key_hash = hash_of_msrs(
        tuple(guest.ctx.msrs.values[MSR_IA32_SGXLEPUBKEYHASH0 + number] for number in range(4))  # type: ignore[arg-type]
    )
    return data + guest.encls_unit.launch.token_mac(data + bytes(16), key_hash)


def test_a_valid_token_launches_what_the_msrs_would_not(guest: SgxGuest) -> None:
    assert einit_outcome(guest, signed(), token=token(guest)) == Left(0, NONE)


@pytest.mark.parametrize(
    "fields, error",
    (
        ({"masked": MODE64BIT | DEBUG}, SgxError.INVALID_EINITTOKEN),
        ({"valid": 3}, SgxError.INVALID_EINITTOKEN),
        ({"reserved": 1}, SgxError.INVALID_EINITTOKEN),
        ({"cpusvn": b"\x01" * 16}, SgxError.INVALID_CPUSVN),
        ({"mrenclave": bytes(32)}, SgxError.INVALID_MEASUREMENT),
        ({"mrsigner": bytes(32)}, SgxError.INVALID_MEASUREMENT),
        ({"attributes": MODE64BIT | DEBUG}, SgxError.INVALID_ATTRIBUTE),
        ({"xfrm": 7}, SgxError.INVALID_ATTRIBUTE),
    ),
    ids=str,
)
def test_a_token_for_something_else_is_told(
    guest: SgxGuest, fields: dict[str, object], error: SgxError
) -> None:
    assert einit_outcome(guest, signed(), token=token(guest, **fields)) == Left(error, ZERO)


@pytest.mark.parametrize("offset", (288, 303, 256, 208), ids=("MAC", "end of MAC", "key", "product"))
def test_a_forged_token_is_told(guest: SgxGuest, offset: int) -> None:
    forged = bytearray(token(guest))
    forged[offset] ^= 1
    assert einit_outcome(guest, signed(), token=bytes(forged)) == Left(SgxError.INVALID_EINITTOKEN, ZERO)


def test_a_token_of_another_launch_enclaves_signer_does_not_count(guest: SgxGuest) -> None:
    made = token(guest, STRANGER)
    guest.allow_signer(signing.Key(SIGNER.p, STRANGER.q))
    assert einit_outcome(guest, signed(), token=made) == Left(SgxError.INVALID_EINITTOKEN, ZERO)
