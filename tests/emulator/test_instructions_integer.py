"""What comparing with direct execution does not show: faults, addresses, and where direct execution is wrong."""

from __future__ import annotations

import pytest
from emulator_guest import DPL3, USER_CS32, Guest
from hypothesis import given
from hypothesis import strategies as st
from iced_x86 import ConditionCode

from lasskvm.conformance.assembler import assemble
from lasskvm.emulator.decode import Decoded, decode
from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.flags import CONDITIONS, carry_flags
from lasskvm.emulator.instructions import PLAIN
from lasskvm.state import BASE, RAX, RBP, RBX, RCX, RDI, RDX, RFLAGS, RIP, Segment, segment_word
from lasskvm.x86.exceptions import DE, GP, PF, SS
from lasskvm.x86.registers import (
    AR_CODE32,
    CS,
    FS,
    MASK64,
    RFLAGS_AF,
    RFLAGS_ARITHMETIC,
    RFLAGS_CF,
    RFLAGS_OF,
    RFLAGS_PF,
    RFLAGS_SF,
    RFLAGS_ZF,
)

DATA = 0x70000
NON_CANONICAL = 1 << 62
PAGE = 0x1000
WRITE_BY_USER, WRITE_BY_USER_PRESENT = 6, 7


def run(guest: Guest, source: str) -> None:
    """Execute the instruction *source* at RIP."""
    guest.run(assemble(source, 0).code.hex())


def fault_of(guest: Guest, source: str) -> tuple[int, int | None]:
    return guest.fault_of(assemble(source, 0).code.hex())


def page_fault_of(guest: Guest, source: str) -> tuple[int | None, int | None]:
    """The error code and the address of the #PF of *source*."""
    guest.write_code(assemble(source, 0).code)
    decoded = decode(64, assemble(source, 0).code)
    assert isinstance(decoded, Decoded)
    with pytest.raises(GuestFault) as caught:
        PLAIN[decoded.instruction.mnemonic](decoded)(guest.ctx)
    assert caught.value.vector == PF
    return caught.value.error_code, caught.value.cr2


def flags_of(guest: Guest) -> int:
    return guest.words[RFLAGS] & RFLAGS_ARITHMETIC


# ------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "source",
    [
        "add [rdi], rax", "lock add [rdi], rax", "inc byte [rdi]", "neg dword [rdi]", "not word [rdi]",
        "shl dword [rdi], 0",
        "xchg [rdi], rax", "lock xadd [rdi], rax", "cmpxchg [rdi], rbx", "lock cmpxchg8b [rdi]", "cmpxchg16b [rdi]",
        "bts dword [rdi], 3", "bts [rdi], rcx", "shld [rdi], rax, 3", "rcl qword [rdi], cl",
    ],
)  # fmt: skip
def test_a_read_modify_write_of_a_read_only_page_faults_as_a_write_and_changes_nothing(
    user: Guest, source: str
) -> None:
    user.words[RDI], user.words[RAX], user.words[RCX], user.words[RBX] = DATA, 5, 0, 7
    user.write_protect(DATA)
    assert fault_of(user, source) == (PF, WRITE_BY_USER_PRESENT)
    assert user.load(DATA) == 0


@pytest.mark.parametrize("source", ["cmp [rdi], rax", "test [rdi], al", "bt dword [rdi], 3", "bt [rdi], rcx"])
def test_comparisons_and_bit_tests_do_not_need_write_access(user: Guest, source: str) -> None:
    user.words[RDI] = DATA
    user.write_protect(DATA)
    rip = user.words[RIP]
    run(user, source)
    assert user.words[RIP] == rip + len(assemble(source, 0).code)


@pytest.mark.parametrize("source", ["div rcx", "idiv cl"])
def test_dividing_by_zero_is_a_divide_error_and_changes_nothing(user: Guest, source: str) -> None:
    user.words[RAX], user.words[RDX], user.words[RCX] = 5, 6, 0
    assert fault_of(user, source) == (DE, None)


def test_aam_in_base_0_is_a_divide_error(user: Guest) -> None:
    user.state.set_segment(CS, Segment(USER_CS32, 0, 0xFFFFFFFF, AR_CODE32 | DPL3))
    user.words[RAX] = 5
    assert user.fault_of("d400") == (DE, None)


@pytest.mark.parametrize(
    ("high", "low", "divisor", "source"),
    [
        (5, 0, 5, "div rcx"), (MASK64, 1 << 63, MASK64, "idiv rcx"), (0, 1 << 63, 1, "idiv rcx"),
        (0, 1 << 31, 1, "idiv ecx"), (1, 0, 1, "div ecx"), (0, 0x100, 1, "div cl"), (0, 0x80, 1, "idiv cl"),
    ],
)  # fmt: skip
def test_a_quotient_that_does_not_fit_is_a_divide_error(
    user: Guest, high: int, low: int, divisor: int, source: str
) -> None:
    user.words[RDX], user.words[RAX], user.words[RCX] = high, low, divisor
    assert fault_of(user, source) == (DE, None)


def test_the_most_negative_quotient_fits(user: Guest) -> None:
    user.words[RDX], user.words[RAX], user.words[RCX] = MASK64, 1 << 63, 1
    run(user, "idiv rcx")
    assert (user.words[RAX], user.words[RDX]) == (1 << 63, 0)


def test_division_rounds_towards_zero_and_the_remainder_has_the_sign_of_the_dividend(user: Guest) -> None:
    user.words[RDX], user.words[RAX], user.words[RCX] = MASK64, -7 & MASK64, 2
    run(user, "idiv rcx")
    assert (user.words[RAX], user.words[RDX]) == (-3 & MASK64, -1 & MASK64)


@pytest.mark.parametrize("offset", range(1, 16))
def test_cmpxchg16b_of_a_misaligned_operand_is_a_general_protection_fault(user: Guest, offset: int) -> None:
    user.words[RDI] = DATA + offset
    assert fault_of(user, "lock cmpxchg16b [rdi]") == (GP, 0)


def test_cmpxchg16b_aligns_the_linear_address_and_not_the_offset(user: Guest) -> None:
    user.words[segment_word(FS, BASE)] = 8
    user.words[RDI] = DATA + 8
    user.words[RDX], user.words[RBX], user.words[RCX] = 0, 1, 2
    run(user, "cmpxchg16b fs:[rdi]")
    assert (user.load(DATA + 16), user.load(DATA + 24)) == (1, 2)
    user.words[RDI] = DATA
    assert fault_of(user, "cmpxchg16b fs:[rdi]") == (GP, 0)


def test_a_false_cmov_reads_memory_nevertheless(user: Guest) -> None:
    user.words[RDI], user.words[RFLAGS] = DATA, user.words[RFLAGS] & ~RFLAGS_ZF
    user.unmap(DATA)
    assert fault_of(user, "cmove rax, [rdi]") == (PF, 4)


def test_a_false_cmov_of_32_bits_clears_the_upper_half(user: Guest) -> None:
    user.words[RAX], user.words[RFLAGS] = MASK64, user.words[RFLAGS] & ~RFLAGS_ZF
    run(user, "cmove eax, ecx")
    assert user.words[RAX] == 0xFFFFFFFF


def test_multi_byte_and_reserved_no_operations_access_nothing(user: Guest) -> None:
    before = bytes(user.snapshot())
    user.words[RAX] = NON_CANONICAL
    for code in ("0f1f00", "0f1980", "0f1d00", "f30f1efa", "f30f1ec8", "0f1c00", "90", "f390"):
        rip = user.words[RIP]
        user.run(code + "00000000")
        user.words[RIP] = rip
    user.words[RAX] = 0
    assert user.snapshot() == before


def test_an_operand_on_the_stack_faults_as_one(user: Guest) -> None:
    user.words[RBP] = NON_CANONICAL
    assert fault_of(user, "add [rbp], rax") == (SS, 0)
    user.words[RBP], user.words[RCX] = DATA, NON_CANONICAL
    assert fault_of(user, "bts [rbp], rcx") == (SS, 0)


# ---------------------------------------------------------------------------------------------------- addresses


def test_lea_neither_accesses_nor_checks_its_address(user: Guest) -> None:
    user.words[RCX] = NON_CANONICAL
    run(user, "lea rax, fs:[rcx + 1]")
    assert user.words[RAX] == NON_CANONICAL + 1


def test_lea_counts_from_the_next_instruction_when_relative_to_rip(user: Guest) -> None:
    rip = user.words[RIP]
    user.run("488d0510000000")
    assert user.words[RAX] == rip + 7 + 0x10


@pytest.mark.parametrize(
    ("source", "number", "place", "bit"),
    [
        ("bts [rdi], rcx", 64 * 100 + 5, 800, 5), ("bts [rdi], rcx", -1, -8, 63), ("bts [rdi], rcx", -64, -8, 0),
        ("bts [rdi], ecx", 0xFFFFFFFF, -4, 31), ("bts [rdi], cx", 0x8000, -4096, 0),
        ("bts [rdi], cx", 0x7FFF, 4094, 15),
    ],
)  # fmt: skip
def test_a_bit_number_in_a_register_is_signed_and_reaches_beyond_the_operand(
    user: Guest, source: str, number: int, place: int, bit: int
) -> None:
    user.words[RDI], user.words[RCX] = DATA, number & MASK64
    run(user, source)
    size = {"rcx": 8, "ecx": 4, " cx": 2}[source[-3:]]
    assert user.load(DATA + place, size) == 1 << bit
    assert not flags_of(user) & RFLAGS_CF
    run(user, source.replace("bts", "bt"))
    assert flags_of(user) & RFLAGS_CF


def test_a_bit_test_faults_at_the_place_that_it_reaches(user: Guest) -> None:
    user.words[RDI], user.words[RCX] = DATA, 8 * PAGE
    user.unmap(DATA + PAGE)
    assert page_fault_of(user, "btr [rdi], rcx") == (WRITE_BY_USER, DATA + PAGE)


def test_a_bit_number_that_is_immediate_stays_within_the_operand(user: Guest) -> None:
    user.words[RDI] = DATA
    run(user, "bts dword [rdi], 35")
    assert user.load(DATA) == 1 << 3


def test_xlat_adds_al_without_sign_and_takes_a_segment_override(user: Guest) -> None:
    user.words[RBX], user.words[RAX] = DATA, 0x1234_5678_9ABC_DEF0
    user.store(DATA + 0xF0, 1, 0x42)
    user.run("d7")
    assert user.words[RAX] == 0x1234_5678_9ABC_DE42
    user.words[segment_word(FS, BASE)] = 0x100
    user.store(DATA + 0x142, 1, 0x77)
    user.run("64d7")
    assert user.words[RAX] == 0x1234_5678_9ABC_DE77


def test_moves_cross_pages_and_fault_at_the_second(user: Guest) -> None:
    user.words[RDI] = DATA + PAGE - 3
    user.unmap(DATA + PAGE)
    assert page_fault_of(user, "mov [rdi], rax") == (WRITE_BY_USER, DATA + PAGE)
    assert user.load(DATA + PAGE - 3, 2) == 0


# ---------------------------------------------------------------------------------------------------- exchanges


def test_cmpxchg_changes_the_upper_half_only_of_what_it_writes(user: Guest) -> None:
    high = 0xAAAAAAAA_00000000
    user.words[RAX], user.words[RDX], user.words[RBX] = high | 5, high | 5, high | 9
    run(user, "cmpxchg edx, ebx")
    assert (user.words[RAX], user.words[RDX]) == (high | 5, 9)
    user.words[RDX] = high | 7
    run(user, "cmpxchg edx, ebx")
    assert (user.words[RAX], user.words[RDX]) == (7, high | 7)


def test_a_failed_cmpxchg8b_gives_what_memory_holds(user: Guest) -> None:
    user.words[RDI] = DATA
    user.store(DATA, 8, 0x11223344_55667788)
    user.words[RAX] = user.words[RDX] = MASK64
    run(user, "lock cmpxchg8b [rdi]")
    assert (user.words[RDX], user.words[RAX]) == (0x11223344, 0x55667788)
    assert not flags_of(user) & RFLAGS_ZF
    run(user, "lock cmpxchg8b [rdi]")
    assert flags_of(user) & RFLAGS_ZF


def test_xadd_of_a_register_with_itself_doubles_it(user: Guest) -> None:
    user.words[RAX] = 21
    run(user, "xadd rax, rax")
    assert user.words[RAX] == 42


def test_a_16_bit_bswap_clears_the_word(user: Guest) -> None:
    user.words[RAX] = 0x1122334455667788
    user.run("660fc8")
    assert user.words[RAX] == 0x1122334455660000


def test_lock_neg_sets_flags_from_the_result(user: Guest) -> None:
    user.words[RDI] = DATA
    user.store(DATA, 1, 0xFF)
    run(user, "lock neg byte [rdi]")
    assert (user.load(DATA, 1), flags_of(user)) == (1, RFLAGS_CF | RFLAGS_AF)


# -------------------------------------------------------------------------------------------------------- flags


def test_the_flags_of_every_sum_and_difference_of_bytes_follow_their_definition() -> None:
    flags = carry_flags(8)
    for a in range(0, 256, 3):
        for b in range(256):
            for carry in (0, 1):
                for sign in (1, -1):
                    total = a + sign * (b + carry)
                    signed_total = (a ^ 0x80) - 0x80 + sign * ((b ^ 0x80) - 0x80 + carry)
                    result = total & 0xFF
                    nibbles = (a & 0xF) + sign * ((b & 0xF) + carry)
                    expected = (
                        (RFLAGS_CF if not 0 <= total <= 0xFF else 0)
                        | (RFLAGS_PF if f"{result:b}".count("1") % 2 == 0 else 0)
                        | (RFLAGS_AF if not 0 <= nibbles <= 0xF else 0)
                        | (RFLAGS_ZF if result == 0 else 0)
                        | (RFLAGS_SF if result >= 0x80 else 0)
                        | (RFLAGS_OF if not -0x80 <= signed_total <= 0x7F else 0)
                    )
                    assert flags(a, b, total) == expected, (a, b, carry, sign)


@given(st.integers(-(1 << 31), (1 << 31) - 1), st.integers(-(1 << 31), (1 << 31) - 1))
def test_conditions_compare_what_has_been_subtracted(a: int, b: int) -> None:
    unsigned_a, unsigned_b = a & 0xFFFFFFFF, b & 0xFFFFFFFF
    rflags = carry_flags(32)(unsigned_a, unsigned_b, unsigned_a - unsigned_b)
    expected = {
        ConditionCode.E: a == b, ConditionCode.L: a < b, ConditionCode.LE: a <= b,
        ConditionCode.B: unsigned_a < unsigned_b, ConditionCode.BE: unsigned_a <= unsigned_b,
        ConditionCode.S: (unsigned_a - unsigned_b) >> 31 & 1 == 1, ConditionCode.O: not -(1 << 31) <= a - b < 1 << 31,
        ConditionCode.P: bin(unsigned_a - unsigned_b & 0xFF).count("1") % 2 == 0,
    }  # fmt: skip
    opposites = {
        ConditionCode.E: ConditionCode.NE, ConditionCode.L: ConditionCode.GE, ConditionCode.LE: ConditionCode.G,
        ConditionCode.B: ConditionCode.AE, ConditionCode.BE: ConditionCode.A, ConditionCode.S: ConditionCode.NS,
        ConditionCode.O: ConditionCode.NO, ConditionCode.P: ConditionCode.NP,
    }  # fmt: skip
    for condition, holds in expected.items():
        assert CONDITIONS[condition](rflags) == holds
        assert CONDITIONS[opposites[condition]](rflags) == (not holds)
