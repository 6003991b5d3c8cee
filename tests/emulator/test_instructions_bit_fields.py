"""Bit fields, counts of zeros, shifts without flags, MULX and CRC32, by their definitions.

Direct execution does not offer most of them, so the builders are called here, and not whether the CPUID has them.
"""

from __future__ import annotations

import pytest
from emulator_guest import Guest
from hypothesis import given
from hypothesis import strategies as st

from lasskvm.emulator.decode import Decoded, decode
from lasskvm.emulator.instructions import PLAIN
from lasskvm.state import RAX, RCX, RDX, RFLAGS, RSI
from lasskvm.x86.registers import (
    MASK64,
    RFLAGS_ARITHMETIC,
    RFLAGS_CF,
    RFLAGS_OF,
    RFLAGS_SF,
    RFLAGS_ZF,
)

_quadwords = st.integers(0, MASK64)
#: Instructions of registers only need no other guest for each example.
_guest = Guest()
_words = _guest.words


def compute(code: str, rcx: int, rdx: int = 0, rax: int = 0) -> int:
    """RAX after the instruction *code* (hexadecimal)."""
    decoded = decode(64, bytes.fromhex(code))
    assert isinstance(decoded, Decoded)
    _words[RAX], _words[RCX], _words[RDX] = rax, rcx, rdx
    PLAIN[decoded.instruction.mnemonic](decoded)(_guest.ctx)
    return _words[RAX]


def flags() -> int:
    return _words[RFLAGS] & RFLAGS_ARITHMETIC


_PEXT, _PDEP = "c4e2f2f5c2", "c4e2f3f5c2"  # rax, rcx, rdx


def _bits(value: int) -> list[int]:
    return [number for number in range(64) if value >> number & 1]


@given(_quadwords, _quadwords)
def test_pext_gathers_and_pdep_scatters(value: int, mask: int) -> None:
    places = _bits(mask)
    gathered = sum((value >> place & 1) << number for number, place in enumerate(places))
    scattered = sum((value >> number & 1) << place for number, place in enumerate(places))
    assert compute(_PEXT, rcx=value, rdx=mask) == gathered
    assert compute(_PDEP, rcx=value, rdx=mask) == scattered


@given(_quadwords)
def test_leading_and_trailing_zeros_are_counted(value: int) -> None:
    text = f"{value:064b}"
    for code, count in (
        ("f3480fbdc1", len(text) - len(text.lstrip("0"))),
        ("f3480fbcc1", len(text) - len(text.rstrip("0"))),
    ):
        assert compute(code, rcx=value, rdx=0) == count
        assert bool(flags() & RFLAGS_CF) == (value == 0)
        assert bool(flags() & RFLAGS_ZF) == (count == 0)


@pytest.mark.parametrize(
    ("code", "source", "result", "expected"),
    [
        # BLSI, BLSMSK and BLSR rax, rcx; then with 32 bits
        ("c4e2f8f3d9", 0b101000, 0b1000, RFLAGS_CF), ("c4e2f8f3d9", 0, 0, RFLAGS_ZF),
        ("c4e2f8f3d9", 1 << 63, 1 << 63, RFLAGS_CF | RFLAGS_SF),
        ("c4e2f8f3d1", 0b101000, 0b1111, 0), ("c4e2f8f3d1", 0, MASK64, RFLAGS_CF | RFLAGS_SF),
        ("c4e2f8f3c9", 0b101000, 0b100000, 0), ("c4e2f8f3c9", 0, 0, RFLAGS_CF | RFLAGS_ZF),
        ("c4e278f3d1", 1 << 40, 0xFFFFFFFF, RFLAGS_CF | RFLAGS_SF),
    ],
)  # fmt: skip
def test_the_lowest_one_is_isolated_masked_and_reset(
    code: str, source: int, result: int, expected: int
) -> None:
    _words[RFLAGS] |= RFLAGS_OF
    assert compute(code, rcx=source, rdx=0) == result
    defined = RFLAGS_CF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF
    assert flags() & defined == expected


@pytest.mark.parametrize(
    ("code", "rcx", "rdx", "result", "expected"),
    [
        ("c4e2e8f7c1", 0x12345678, 0x0804, 0x67, 0),  # bextr rax, rcx, rdx
        ("c4e2e8f7c1", MASK64, 0x4000, MASK64, 0), ("c4e2e8f7c1", MASK64, 0x0840, 0, RFLAGS_ZF),
        ("c4e2e8f5c1", MASK64, 0x104, 0xF, 0),  # bzhi rax, rcx, rdx
        ("c4e2e8f5c1", MASK64, 64, MASK64, RFLAGS_CF), ("c4e2e8f5c1", 5, 0, 0, RFLAGS_ZF),
        ("c4e2f0f2c2", 0b1100, 0b1010, 0b0010, 0),  # andn rax, rcx, rdx
        ("c4e270f2c2", 0, 1 << 32, 0, RFLAGS_ZF),
    ],
)  # fmt: skip
def test_fields_are_extracted_and_cut(code: str, rcx: int, rdx: int, result: int, expected: int) -> None:
    assert compute(code, rcx=rcx, rdx=rdx) == result
    assert flags() & (RFLAGS_CF | RFLAGS_ZF | RFLAGS_OF) == expected


@pytest.mark.parametrize(
    ("code", "rcx", "rdx", "result"),
    [
        ("c4e2e9f7c1", 3, 65, 6), ("c4e269f7c1", 3, 33, 6),  # shlx rax, rcx, rdx; eax
        ("c4e2ebf7c1", 1 << 63, 63, 1), ("c4e26bf7c1", MASK64, 31, 1),  # shrx
        ("c4e2eaf7c1", 1 << 63, 62, MASK64 - 1), ("c4e26af7c1", 1 << 31, 31, 0xFFFFFFFF),  # sarx
        ("c4e3fbf0c104", 0x1F, 0, 0xF << 60 | 1), ("c4e37bf0c104", 0x1F, 0, 0xF0000001),  # rorx 4
    ],
)  # fmt: skip
def test_shifts_without_flags_leave_the_flags(code: str, rcx: int, rdx: int, result: int) -> None:
    _words[RFLAGS] |= RFLAGS_ARITHMETIC
    assert compute(code, rcx=rcx, rdx=rdx) == result
    assert flags() == RFLAGS_ARITHMETIC


def test_mulx_writes_the_high_half_last() -> None:
    _words[RFLAGS] |= RFLAGS_ARITHMETIC
    # mulx rax, rax, rcx
    assert compute("c4e2fbf6c1", rcx=1 << 63, rdx=6) == 3
    # mulx rax, rsi, rcx
    assert compute("c4e2cbf6c1", rcx=1 << 63, rdx=7) == 3
    assert _words[RSI] == 1 << 63
    assert flags() == RFLAGS_ARITHMETIC


def test_crc32_gives_the_check_value_of_crc_32c() -> None:
    """That of the digits 1 to 9, with the remainder inverted before and after."""
    remainder = compute("f2480f38f1c1", rcx=int.from_bytes(b"12345678", "little"), rax=0xFFFFFFFF)
    assert compute("f20f38f0c1", rcx=ord("9"), rax=remainder) ^ 0xFFFFFFFF == 0xE3069283
