"""A page that leaves the EPC comes back only as what it was, where it was, and in its last version."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from signing import PAGE, REG_RW

from lasskvm.sgx.paging_crypto import MacHeader, PagingCrypto, Pcmd

CRYPTO = PagingCrypto(b"one machine")
HEADER = MacHeader(flags=REG_RW, linear_address=0x7000_1000, eid=3)
CONTENT = bytes(range(256)) * 16
VERSION = 0x1_0000_0007


@given(st.binary(min_size=16, max_size=16), st.integers(1, (1 << 64) - 1))
def test_a_sealed_page_comes_back(filling: bytes, version: int):
    content = filling * (PAGE // 16)
    ciphertext, mac = CRYPTO.seal(content, version, HEADER)
    assert (len(ciphertext), len(mac)) == (PAGE, 16)
    assert CRYPTO.open(ciphertext, mac, version, HEADER) == content


def test_the_ciphertext_shows_nothing_of_the_page():
    ciphertext, _ = CRYPTO.seal(bytes(PAGE), VERSION, HEADER)
    assert len({ciphertext[offset : offset + 16] for offset in range(0, PAGE, 16)}) == PAGE // 16


@pytest.mark.parametrize("position", [0, PAGE - 1, PAGE, PAGE + 15])
def test_a_flipped_bit_in_page_or_mac_is_noticed(position: int):
    sealed = bytearray(b"".join(CRYPTO.seal(CONTENT, VERSION, HEADER)))
    sealed[position] ^= 1
    assert CRYPTO.open(bytes(sealed[:PAGE]), bytes(sealed[PAGE:]), VERSION, HEADER) is None


@pytest.mark.parametrize(
    "change",
    [{"flags": REG_RW | 4}, {"flags": 0x103}, {"linear_address": 0x7000_2000}, {"eid": 4}],
    ids=["permissions", "type", "address", "enclave"],
)
def test_a_page_does_not_come_back_as_another_page(change: dict[str, int]):
    ciphertext, mac = CRYPTO.seal(CONTENT, VERSION, HEADER)
    assert CRYPTO.open(ciphertext, mac, VERSION, replace(HEADER, **change)) is None


def test_an_old_version_does_not_come_back():
    ciphertext, mac = CRYPTO.seal(CONTENT, VERSION, HEADER)
    assert CRYPTO.open(ciphertext, mac, VERSION + 1, HEADER) is None


def test_two_versions_of_a_page_look_different():
    assert CRYPTO.seal(CONTENT, 1, HEADER) != CRYPTO.seal(CONTENT, 2, HEADER)


def test_a_page_of_another_machine_does_not_come_back():
    ciphertext, mac = PagingCrypto(b"another machine").seal(CONTENT, VERSION, HEADER)
    assert CRYPTO.open(ciphertext, mac, VERSION, HEADER) is None


def test_a_machine_with_the_same_secret_seals_the_same():
    assert PagingCrypto(b"one machine").seal(CONTENT, VERSION, HEADER) == CRYPTO.seal(
        CONTENT, VERSION, HEADER
    )


def test_the_fields_of_a_pcmd_are_where_the_manual_has_them():
    data = Pcmd(flags=0x203, enclave_id=0x1122, mac=b"\xaa" * 16).pack()
    assert len(data) == 128
    assert data[:2] == b"\x03\x02"
    assert data[64:66] == b"\x22\x11"
    assert data[112:] == b"\xaa" * 16
    assert not any(data[2:64] + data[66:112])


@given(st.binary(min_size=128, max_size=128))
def test_any_bytes_are_a_pcmd_and_keep_their_meaning(data: bytes):
    pcmd = Pcmd.parse(data)
    assert Pcmd.parse(pcmd.pack()) == pcmd
    assert pcmd.pack() == data[:8] + bytes(56) + data[64:72] + bytes(40) + data[112:]


@pytest.mark.parametrize("bit", [6, 7, 16, 63, 64, 511, 576, 895])
def test_a_bit_in_the_reserved_fields_of_a_pcmd_is_noticed(bit: int):
    good = Pcmd(flags=0x203, enclave_id=(1 << 64) - 1, mac=b"\xff" * 16).pack()
    assert Pcmd.reserved_is_zero(good)
    bad = (int.from_bytes(good, "little") | 1 << bit).to_bytes(128, "little")
    assert not Pcmd.reserved_is_zero(bad)
