"""SSE operations on what direct execution does not show: exceptions, flags, NaNs, memory operands, strings."""

from __future__ import annotations

import struct

import pytest
from emulator_guest import Guest

from lasskvm.state import CR4, RAX, RBX, RCX, RDX, RFLAGS
from lasskvm.x86.exceptions import PF, UD, XM
from lasskvm.x86.fpu import (
    EXCEPTION_DE,
    EXCEPTION_IE,
    EXCEPTION_OE,
    EXCEPTION_PE,
    EXCEPTION_UE,
    EXCEPTION_ZE,
    MXCSR_DAZ,
    MXCSR_FZ,
    MXCSR_INITIAL,
    MXCSR_MASK_SHIFT,
    MXCSR_RC_SHIFT,
    ROUND_UP,
)
from lasskvm.x86.registers import (
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    RFLAGS_ARITHMETIC,
    RFLAGS_CF,
    RFLAGS_OF,
    RFLAGS_PF,
    RFLAGS_SF,
    RFLAGS_ZF,
)

AREA = 0x70000
# XMM1 with XMM2
ADDSS, MULSS, DIVSS, SQRTSS = "f3 0f 58 ca", "f3 0f 59 ca", "f3 0f 5e ca", "f3 0f 51 ca"
DIVPS, MINSS, MAXSS = "0f 5e ca", "f3 0f 5d ca", "f3 0f 5f ca"
COMISS, UCOMISS, CMPLTSS = "0f 2f ca", "0f 2e ca", "f3 0f c2 ca 01"
CVTSS2SI, CVTTSS2SI = "f3 0f 2d c2", "f3 0f 2c c2"

SNAN, OTHER_SNAN, QNAN = 0x7FA0_0001, 0xFF90_0002, 0x7FC0_0003
QUIET = 1 << 22
INDEFINITE = 0xFFC0_0000
INFINITY = 0x7F80_0000
DENORMAL, LARGEST = 1, 0x7F7F_FFFF


def single(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


ONE, TWO, THREE = single(1), single(2), single(3)


@pytest.fixture
def guest(user: Guest) -> Guest:
    user.words[CR4] |= CR4_OSFXSR | CR4_OSXMMEXCPT
    user.words[RBX] = AREA
    return user


def operate(guest: Guest, code: str, left: int, right: int, mxcsr: int = MXCSR_INITIAL) -> tuple[int, int]:
    """XMM1's lowest element behind *code*, and the exceptions."""
    fpu = guest.ctx.fpu
    fpu.xmm[1], fpu.xmm[2], fpu.mxcsr = left, right, mxcsr
    guest.run(code)
    return fpu.xmm[1] & 0xFFFF_FFFF, fpu.mxcsr & 0x3F


@pytest.mark.parametrize(
    "code, left, right, result, flags",
    [
        (ADDSS, ONE, TWO, THREE, 0),
        (DIVSS, ONE, THREE, 0x3EAAAAAB, EXCEPTION_PE),
        (DIVSS, ONE, 0, INFINITY, EXCEPTION_ZE),
        (DIVSS, 0, 0, INDEFINITE, EXCEPTION_IE),
        (DIVSS, DENORMAL, 0, INFINITY, EXCEPTION_ZE),
        (SQRTSS, ONE, single(-1), INDEFINITE, EXCEPTION_IE),
        (SQRTSS, ONE, 1 << 31, 1 << 31, 0),
        (ADDSS, INFINITY, INFINITY | 1 << 31, INDEFINITE, EXCEPTION_IE),
        (MULSS, LARGEST, TWO, INFINITY, EXCEPTION_OE | EXCEPTION_PE),
        (MULSS, 0x0080_0001, single(0.5), 0x0040_0000, EXCEPTION_UE | EXCEPTION_PE),
        (ADDSS, DENORMAL, DENORMAL, 2, EXCEPTION_DE),
    ],
)
def test_results_and_exceptions(
    guest: Guest, code: str, left: int, right: int, result: int, flags: int
) -> None:
    assert operate(guest, code, left, right) == (result, flags)


@pytest.mark.parametrize(
    "left, right, result, flags",
    [
        (SNAN, ONE, SNAN | QUIET, EXCEPTION_IE),
        (ONE, SNAN, SNAN | QUIET, EXCEPTION_IE),
        (SNAN, OTHER_SNAN, SNAN | QUIET, EXCEPTION_IE),
        (SNAN, QNAN, SNAN | QUIET, EXCEPTION_IE),
        (QNAN, SNAN, QNAN, EXCEPTION_IE),
        (QNAN, ONE, QNAN, 0),
        (DENORMAL, QNAN, QNAN, 0),
    ],
)
def test_first_nan_is_the_result(guest: Guest, left: int, right: int, result: int, flags: int) -> None:
    assert operate(guest, ADDSS, left, right) == (result, flags)


@pytest.mark.parametrize("code", [MINSS, MAXSS])
def test_minimum_and_maximum_prefer_the_second_operand(guest: Guest, code: str) -> None:
    assert operate(guest, code, 0, 1 << 31) == (1 << 31, 0)
    assert operate(guest, code, 1 << 31, 0) == (0, 0)
    assert operate(guest, code, QNAN, ONE) == (ONE, EXCEPTION_IE)
    assert operate(guest, code, ONE, SNAN) == (SNAN, EXCEPTION_IE)


def test_rounding_follows_mxcsr(guest: Guest) -> None:
    up = MXCSR_INITIAL | ROUND_UP << MXCSR_RC_SHIFT
    assert operate(guest, DIVSS, ONE, THREE, up)[0] == 0x3EAAAAAB
    assert operate(guest, DIVSS, single(-1), THREE, up)[0] == 0xBEAAAAAA


def test_denormals_are_zeros_on_demand(guest: Guest) -> None:
    assert operate(guest, ADDSS, DENORMAL, DENORMAL, MXCSR_INITIAL | MXCSR_DAZ) == (0, 0)
    result = operate(guest, MULSS, 0x0080_0001, single(0.5), MXCSR_INITIAL | MXCSR_FZ)
    assert result == (0, EXCEPTION_UE | EXCEPTION_PE)


def test_unmasked_exception_leaves_the_destination_and_is_noted(guest: Guest) -> None:
    fpu = guest.ctx.fpu
    fpu.mxcsr = MXCSR_INITIAL & ~(EXCEPTION_ZE << MXCSR_MASK_SHIFT)
    fpu.xmm[1], fpu.xmm[2] = ONE << 96 | ONE, ONE << 96 | THREE << 64 | TWO << 32
    before = fpu.xmm[1]
    assert guest.fault_of(DIVPS) == (XM, None)
    assert fpu.xmm[1] == before
    assert fpu.mxcsr & EXCEPTION_ZE
    guest.words[CR4] &= ~CR4_OSXMMEXCPT
    assert guest.fault_of(DIVPS) == (UD, None)


@pytest.mark.parametrize(
    "left, right, flags",
    [
        (ONE, TWO, RFLAGS_CF),
        (TWO, ONE, 0),
        (0, 1 << 31, RFLAGS_ZF),
        (QNAN, ONE, RFLAGS_ZF | RFLAGS_PF | RFLAGS_CF),
    ],
)
@pytest.mark.parametrize("code", [COMISS, UCOMISS])
def test_comparison_to_flags(guest: Guest, code: str, left: int, right: int, flags: int) -> None:
    guest.words[RFLAGS] |= RFLAGS_ARITHMETIC
    operate(guest, code, left, right)
    assert guest.words[RFLAGS] & RFLAGS_ARITHMETIC == flags


def test_only_some_comparisons_take_exception_at_quiet_nans(guest: Guest) -> None:
    assert operate(guest, COMISS, QNAN, ONE)[1] == EXCEPTION_IE
    assert operate(guest, UCOMISS, QNAN, ONE)[1] == 0
    assert operate(guest, UCOMISS, SNAN, ONE)[1] == EXCEPTION_IE
    assert operate(guest, CMPLTSS, QNAN, ONE) == (0, EXCEPTION_IE)


def test_conversion_to_integers(guest: Guest) -> None:
    for value, rounded, truncated, flags in (
        (single(2.5), 2, 2, EXCEPTION_PE),
        (single(-1.75), 0xFFFF_FFFE, 0xFFFF_FFFF, EXCEPTION_PE),
        (single(2.0**31), 0x8000_0000, 0x8000_0000, EXCEPTION_IE),
        (QNAN, 0x8000_0000, 0x8000_0000, EXCEPTION_IE),
    ):
        for code, expected in ((CVTSS2SI, rounded), (CVTTSS2SI, truncated)):
            assert operate(guest, code, 0, value)[1] == flags
            assert guest.words[RAX] == expected


def test_rounding_may_be_silent(guest: Guest) -> None:
    # roundss xmm1, xmm2, imm8
    assert operate(guest, "66 0f 3a 0a ca 02", ONE, single(1.25)) == (TWO, EXCEPTION_PE)
    assert operate(guest, "66 0f 3a 0a ca 0a", ONE, single(1.25)) == (TWO, 0)
    assert operate(guest, "66 0f 3a 0a ca 0b", ONE, single(-0.5)) == (1 << 31, 0)


def test_scalar_memory_operand_has_its_own_size(guest: Guest) -> None:
    guest.unmap(AREA + 0x1000)
    guest.words[RBX] = AREA + 0xFFC
    guest.store(AREA + 0xFFC, 4, TWO)
    assert operate(guest, "f3 0f 58 0b", ONE, 0) == (THREE, 0)
    # addsd xmm1, [rbx]
    assert guest.fault_of("f2 0f 58 0b") == (PF, 0x4)


def test_low_unpacking_of_mmx_reads_four_bytes(guest: Guest) -> None:
    guest.unmap(AREA + 0x1000)
    guest.words[RBX] = AREA + 0xFFC
    guest.store(AREA + 0xFFC, 4, 0x4433_2211)
    guest.ctx.fpu.registers[1] = 0
    # punpcklbw mm1, [rbx]
    guest.run("0f 60 0b")
    assert guest.ctx.fpu.registers[1] & (1 << 64) - 1 == 0x4400_3300_2200_1100


def test_ptest_sets_zero_and_carry(guest: Guest) -> None:
    for left, right, flags in (
        (0b1100, 0b0011, RFLAGS_ZF),
        (0b1111, 0b0011, RFLAGS_CF),
        (0b0001, 0b0011, 0),
        (0b1111, 0, RFLAGS_ZF | RFLAGS_CF),
    ):
        guest.words[RFLAGS] |= RFLAGS_ARITHMETIC
        operate(guest, "66 0f 38 17 ca", left, right)
        assert guest.words[RFLAGS] & RFLAGS_ARITHMETIC == flags


def test_insertion_and_extraction_of_elements(guest: Guest) -> None:
    fpu = guest.ctx.fpu
    fpu.xmm[1] = 0
    guest.words[RAX] = 0x1234_5678_9ABC_DEF0
    guest.run("66 0f c4 c8 0f")  # pinsrw xmm1, eax, 15: the number counts modulo 8
    assert fpu.xmm[1] == 0xDEF0 << 112
    guest.run("66 0f c5 c1 07")  # pextrw eax, xmm1, 7
    assert guest.words[RAX] == 0xDEF0
    guest.run("66 0f 3a 14 0b 0f")  # pextrb [rbx], xmm1, 15
    assert guest.load(AREA, 2) == 0xDE


# --------------------------------------------------------------------------------------------------------- strings


def text(value: bytes) -> int:
    return int.from_bytes(value.ljust(16, b"\0"), "little")


@pytest.mark.parametrize(
    "immediate, left, right, index, flags",
    [
        # Any of a set.
        (0x00, b"aeiou", b"rhythm and", 7, RFLAGS_CF | RFLAGS_ZF | RFLAGS_SF),
        # In a range: the first capital.
        (0x04, b"AZ", b"lower Upper", 6, RFLAGS_CF | RFLAGS_ZF | RFLAGS_SF),
        # The first difference.
        (0x18, b"same text", b"same test", 7, RFLAGS_CF | RFLAGS_ZF | RFLAGS_SF),
        # The last place where they are equal: behind both ends.
        (0x48, b"same text", b"same test", 15, RFLAGS_CF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF),
        # A substring, and one that may go on behind the end.
        (0x0C, b"and", b"rhythm and", 7, RFLAGS_CF | RFLAGS_ZF | RFLAGS_SF),
        (0x0C, b"off", b"0123456789abcdof", 14, RFLAGS_CF | RFLAGS_SF),
        (0x0C, b"none", b"rhythm", 16, RFLAGS_ZF | RFLAGS_SF),
    ],
)
def test_string_comparison(
    guest: Guest, immediate: int, left: bytes, right: bytes, index: int, flags: int
) -> None:
    fpu, words = guest.ctx.fpu, guest.words
    fpu.xmm[1], fpu.xmm[2] = text(left), text(right)
    words[RCX] = (1 << 64) - 1
    guest.run(f"66 0f 3a 63 ca {immediate:02x}")
    assert words[RCX] == index
    assert words[RFLAGS] & RFLAGS_ARITHMETIC == flags
    words[RAX], words[RDX] = len(left), (1 << 32) - len(right)
    guest.run(f"66 0f 3a 61 ca {immediate:02x}")
    assert words[RCX] == index
    assert words[RFLAGS] & RFLAGS_ARITHMETIC == flags


def test_string_comparison_to_a_mask(guest: Guest) -> None:
    fpu = guest.ctx.fpu
    fpu.xmm[1], fpu.xmm[2] = text(b"aeiou"), text(b"audio")
    guest.run("66 0f 3a 62 ca 00")  # pcmpistrm, bits
    assert fpu.xmm[0] == 0b11011
    guest.run("66 0f 3a 62 ca 40")  # pcmpistrm, bytes
    assert fpu.xmm[0] == 0xFF_FF00_FFFF


def test_string_operand_needs_no_alignment(guest: Guest) -> None:
    guest.words[RBX] = AREA + 5
    guest.memory.write(AREA + 5, b"audio\0")
    guest.ctx.fpu.xmm[1] = text(b"i")
    guest.run("66 0f 3a 63 0b 00")
    assert guest.words[RCX] == 3
