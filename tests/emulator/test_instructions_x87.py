"""x87 instructions: results, the register stack, exceptions, and agreement with direct execution."""

from __future__ import annotations

import pytest
from both_paths import run_on_both_paths
from emulator_guest import USER_CS64, Guest

from lasskvm.conformance.guest import Guest as DirectGuest
from lasskvm.conformance.layout import LOW_USER
from lasskvm.emulator.fpu import FpuState, initialize
from lasskvm.state import CR0, RBX, RFLAGS, RIP
from lasskvm.x86.exceptions import MF, PF
from lasskvm.x86.fpu import (
    EXCEPTION_DE,
    EXCEPTION_IE,
    EXCEPTION_OE,
    EXCEPTION_PE,
    EXCEPTION_ZE,
    EXCEPTIONS,
    FCW_INITIAL,
    FCW_RC_SHIFT,
    FSW_C0,
    FSW_C1,
    FSW_C2,
    FSW_C3,
    FSW_ES,
    FSW_SF,
    ROUND_DOWN,
    ROUND_UP,
)
from lasskvm.x86.registers import (
    CR0_NE,
    RFLAGS_ARITHMETIC,
    RFLAGS_CF,
    RFLAGS_PF,
    RFLAGS_ZF,
)

AREA = 0x70000
ZERO, ONE, TWO, THREE = 0, 0x3FFF << 64 | 1 << 63, 0x4000 << 64 | 1 << 63, 0x4000 << 64 | 3 << 62
SIGN = 1 << 79
INFINITY = 0x7FFF << 64 | 1 << 63
INDEFINITE = 0xFFFF << 64 | 3 << 62
QNAN = 0x7FFF << 64 | 3 << 62 | 5
SNAN = 0x7FFF << 64 | 1 << 63 | 9
UNNORMAL = 0x3FFF << 64 | 1
UNDERFLOW, OVERFLOW = EXCEPTION_IE | FSW_SF, EXCEPTION_IE | FSW_SF | FSW_C1

FLD1, FLDZ, FLDPI, FLD_ST0, FLD_ST1 = "d9 e8", "d9 ee", "d9 eb", "d9 c0", "d9 c1"
FLD_M32, FLD_M64, FLD_M80, FILD_M16, FILD_M64, FBLD = "d9 03", "dd 03", "db 2b", "df 03", "df 2b", "df 23"
FST_M32, FSTP_M32, FSTP_M64, FSTP_M80, FSTP_ST1 = "d9 13", "d9 1b", "dd 1b", "db 3b", "dd d9"
FIST_M32, FISTP_M16, FISTP_M64, FISTTP_M32, FBSTP = "db 13", "df 1b", "df 3b", "db 0b", "df 33"
FXCH, FCHS, FABS, FFREE_ST0, FINCSTP, FDECSTP = "d9 c9", "d9 e0", "d9 e1", "dd c0", "d9 f7", "d9 f6"
FADD, FADDP, FSUBP, FDIVP, FDIVRP, FSQRT, FRNDINT = (
    "d8 c1",
    "de c1",
    "de e9",
    "de f9",
    "de f1",
    "d9 fa",
    "d9 fc",
)
FCOM, FCOMPP, FUCOM, FCOMI, FTST, FXAM = "d8 d1", "de d9", "dd e1", "db f1", "d9 e4", "d9 e5"
FCMOVE, FNSTCW, FWAIT = "da c9", "d9 3b", "9b"


@pytest.fixture
def guest(user: Guest) -> Guest:
    user.words[RBX] = AREA
    user.words[CR0] |= CR0_NE
    return user


def load(guest: Guest, *values: int, fcw: int = FCW_INITIAL) -> FpuState:
    """Make *values* the whole stack, ST(0) first."""
    fpu = guest.ctx.fpu
    assert isinstance(fpu, FpuState)
    initialize(fpu)
    fpu.fcw = fcw
    fpu.top = -len(values) % 8
    for number, value in enumerate(values):
        fpu.registers[fpu.top + number] = value
        fpu.ftw |= 1 << fpu.top + number
    return fpu


def stack(fpu: FpuState) -> list[int]:
    """ST(0) and on, as far as they are in use."""
    order = [(fpu.top + number) % 8 for number in range(8)]
    return [fpu.registers[number] for number in order if fpu.ftw >> number & 1]


def put(guest: Guest, value: int, size: int) -> None:
    guest.memory.write(AREA, value.to_bytes(size, "little"))


def get(guest: Guest, size: int) -> int:
    return int.from_bytes(guest.memory.read(AREA, size), "little")


# ----------------------------------------------------------------------------------------------------------- moves


@pytest.mark.parametrize(
    "code, memory, size, value, flags",
    [
        (FLD_M32, 0x3F80_0000, 4, ONE, 0),
        (FLD_M64, 0xBFF0 << 48, 8, ONE | SIGN, 0),
        (FLD_M80, SNAN, 10, SNAN, 0),
        (FLD_M80, UNNORMAL, 10, UNNORMAL, 0),
        (FLD_M32, 0x7FA0_0000, 4, 0x7FFF << 64 | 7 << 61, EXCEPTION_IE),
        (FLD_M32, 1, 4, (0x3FFF - 149) << 64 | 1 << 63, EXCEPTION_DE),
        (FILD_M16, 0xFFFE, 2, TWO | SIGN, 0),
        (FILD_M64, 1 << 63, 8, (0x3FFF + 63) << 64 | 1 << 63 | SIGN, 0),
        (FBLD, 0x80 << 72 | 0x3, 10, THREE | SIGN, 0),
    ],
)
def test_load(guest: Guest, code: str, memory: int, size: int, value: int, flags: int) -> None:
    fpu = load(guest)
    put(guest, memory, size)
    guest.run(code)
    assert (stack(fpu), fpu.fsw) == ([value], flags)


@pytest.mark.parametrize(
    "code, value, size, memory, flags",
    [
        (FSTP_M32, ONE, 4, 0x3F80_0000, 0),
        (FSTP_M64, THREE | SIGN, 8, 0xC008 << 48, 0),
        (FSTP_M80, SNAN, 10, SNAN, 0),
        (FSTP_M32, SNAN, 4, 0x7FC0_0000, EXCEPTION_IE),
        (FSTP_M32, UNNORMAL, 4, 0xFFC0_0000, EXCEPTION_IE),
        (FSTP_M32, ONE + 1, 4, 0x3F80_0000, EXCEPTION_PE),
        (FSTP_M32, 0x5FFF << 64 | 1 << 63, 4, 0x7F80_0000, EXCEPTION_OE | EXCEPTION_PE | FSW_C1),
        (FISTP_M16, TWO | SIGN, 2, 0xFFFE, 0),
        (FISTP_M16, (0x3FFF + 15) << 64 | 1 << 63, 2, 0x8000, EXCEPTION_IE),
        (FISTP_M64, QNAN, 8, 1 << 63, EXCEPTION_IE),
        (FISTTP_M32, 0x3FFF << 64 | 0xFFFF << 48, 4, 1, EXCEPTION_PE),
        (FBSTP, THREE | SIGN, 10, 0x80 << 72 | 0x3, 0),
        (FBSTP, INFINITY, 10, 0xFFFF_C000_0000_0000_0000, EXCEPTION_IE),
    ],
)
def test_store(guest: Guest, code: str, value: int, size: int, memory: int, flags: int) -> None:
    fpu = load(guest, value)
    guest.run(code)
    assert (get(guest, size), fpu.fsw, stack(fpu)) == (memory, flags, [])


def test_integer_store_rounds_as_the_control_word_says(guest: Guest) -> None:
    for mode, expected in ((ROUND_DOWN, 0xFFFF_FFFE), (ROUND_UP, 0xFFFF_FFFF)):
        load(guest, 0xBFFF << 64 | 3 << 62, fcw=FCW_INITIAL | mode << FCW_RC_SHIFT)
        guest.run(FIST_M32)
        assert get(guest, 4) == expected


def test_constants_are_rounded_as_the_control_word_says(guest: Guest) -> None:
    fpu = load(guest)
    guest.run(FLDPI)
    fpu.fcw |= ROUND_DOWN << FCW_RC_SHIFT
    guest.run(FLDPI)
    assert stack(fpu) == [0x4000_C90F_DAA2_2168_C234, 0x4000_C90F_DAA2_2168_C235]


def test_faulting_store_does_not_pop(guest: Guest) -> None:
    fpu = load(guest, SNAN)
    guest.unmap(AREA)
    assert guest.fault_of(FSTP_M32) == (PF, 0x6)
    assert (stack(fpu), fpu.fsw) == ([SNAN], 0)


def test_extended_operand_crosses_pages_whole_or_not_at_all(guest: Guest) -> None:
    load(guest, ONE)
    guest.unmap(AREA + 0x1000)
    guest.words[RBX] = AREA + 0x1000 - 9
    before = guest.memory.read(AREA, 0x1000)
    assert guest.fault_of(FSTP_M80) == (PF, 0x6)
    assert guest.memory.read(AREA, 0x1000) == before


def test_exchange_copy_free_and_turn(guest: Guest) -> None:
    fpu = load(guest, ONE, TWO)
    guest.run(FXCH)
    assert stack(fpu) == [TWO, ONE]
    guest.run(FLD_ST1)
    assert stack(fpu) == [ONE, TWO, ONE]
    guest.run(FSTP_ST1)
    assert stack(fpu) == [ONE, ONE]
    guest.run(FFREE_ST0)
    assert stack(fpu) == [ONE]
    top = fpu.top
    guest.run(FDECSTP)
    assert fpu.top == top - 1
    guest.run(FINCSTP)
    assert fpu.top == top


def test_sign_changes_even_of_what_is_no_number(guest: Guest) -> None:
    fpu = load(guest, SNAN)
    guest.run(FCHS)
    assert (stack(fpu), fpu.fsw) == ([SNAN | SIGN], 0)
    guest.run(FABS)
    assert stack(fpu) == [SNAN]


# ---------------------------------------------------------------------------------------------------------- the stack


def test_push_onto_a_full_stack_overflows(guest: Guest) -> None:
    fpu = load(guest, *[ONE] * 8)
    guest.run(FLDZ)
    assert (fpu.registers[7], fpu.top, fpu.fsw) == (INDEFINITE, 7, OVERFLOW)


@pytest.mark.parametrize("code", [FADD, FCHS, FSQRT, FXCH, FLD_ST0, FCMOVE])
def test_use_of_an_empty_register_underflows(guest: Guest, code: str) -> None:
    fpu = load(guest)
    guest.run(code)
    assert fpu.fsw == UNDERFLOW
    assert INDEFINITE in stack(fpu)


def test_underflowing_store_stores_the_indefinite(guest: Guest) -> None:
    fpu = load(guest)
    guest.run(FSTP_M32)
    assert (get(guest, 4), fpu.fsw, fpu.top) == (0xFFC0_0000, UNDERFLOW, 1)


@pytest.mark.parametrize("code", [FADD, FCHS, FXCH, FLD_ST0, FSTP_M32, FIST_M32, FCOMPP])
def test_unmasked_stack_fault_changes_nothing_but_the_status(guest: Guest, code: str) -> None:
    fpu = load(guest, fcw=FCW_INITIAL & ~EXCEPTION_IE)
    put(guest, 0x1234, 4)
    guest.run(code)
    assert (fpu.top, fpu.ftw, get(guest, 4)) == (0, 0, 0x1234)
    assert fpu.fsw & (UNDERFLOW | FSW_ES) == UNDERFLOW | FSW_ES


# --------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    "code, first, second, result, flags",
    [
        (FADDP, ONE, TWO, THREE, 0),
        (FSUBP, ONE, THREE, TWO, 0),
        (FDIVP, ZERO, ONE, INFINITY, EXCEPTION_ZE),
        (FDIVP, ZERO, ZERO, INDEFINITE, EXCEPTION_IE),
        (FDIVRP, TWO, ONE, TWO, 0),
        (FADDP, INFINITY, INFINITY | SIGN, INDEFINITE, EXCEPTION_IE),
        (FADDP, UNNORMAL, ONE, INDEFINITE, EXCEPTION_IE),
        (FADDP, 1, ZERO, 1, EXCEPTION_DE),
        (FADDP, QNAN, ONE, QNAN, 0),
        (FADDP, SNAN, ONE, SNAN | 1 << 62, EXCEPTION_IE),
        (FADDP, SNAN, QNAN, QNAN, EXCEPTION_IE),
        (FADDP, QNAN, QNAN + 1, QNAN + 1, 0),
        (FADDP, QNAN | SIGN, QNAN, QNAN, 0),
    ],
)
def test_arithmetic(guest: Guest, code: str, first: int, second: int, result: int, flags: int) -> None:
    fpu = load(guest, first, second)
    guest.run(code)
    assert (stack(fpu), fpu.fsw) == ([result], flags)


def test_inexact_result_notes_the_direction(guest: Guest) -> None:
    third = 0x3FFD << 64 | 0xAAAA_AAAA_AAAA_AAAA
    for mode, up in ((ROUND_DOWN, 0), (ROUND_UP, 1)):
        fpu = load(guest, THREE, ONE, fcw=FCW_INITIAL | mode << FCW_RC_SHIFT)
        guest.run(FDIVP)
        assert (stack(fpu), fpu.fsw) == ([third + up], EXCEPTION_PE | (FSW_C1 if up else 0))


def test_unmasked_division_by_zero_waits_for_the_next_instruction(guest: Guest) -> None:
    fpu = load(guest, ZERO, ONE, fcw=FCW_INITIAL & ~EXCEPTION_ZE)
    guest.run(FDIVP)
    assert stack(fpu) == [ZERO, ONE]
    guest.run(FNSTCW)
    assert guest.fault_of(FLD1) == (MF, None)
    guest.words[CR0] &= ~CR0_NE
    guest.run(FWAIT)


def test_unmasked_overflow_delivers_a_smaller_result(guest: Guest) -> None:
    huge = 0x7FFE << 64 | 1 << 63
    fpu = load(guest, huge, huge, fcw=FCW_INITIAL & ~EXCEPTION_OE)
    guest.run(FADDP)
    assert stack(fpu) == [(0x7FFF - 24576) << 64 | 1 << 63]
    assert fpu.fsw & (EXCEPTIONS | FSW_ES) == EXCEPTION_OE | FSW_ES


def test_rounding_to_an_integer_keeps_the_sign_of_zero(guest: Guest) -> None:
    fpu = load(guest, 0xBFFD << 64 | 1 << 63)
    guest.run(FRNDINT)
    assert (stack(fpu), fpu.fsw) == ([SIGN], EXCEPTION_PE)


@pytest.mark.parametrize(
    "first, second, conditions, flags",
    [
        (ONE, TWO, FSW_C0, RFLAGS_CF),
        (TWO, ONE, 0, 0),
        (ZERO, SIGN, FSW_C3, RFLAGS_ZF),
        (QNAN, ONE, FSW_C3 | FSW_C2 | FSW_C0, RFLAGS_ZF | RFLAGS_PF | RFLAGS_CF),
    ],
)
def test_comparison(guest: Guest, first: int, second: int, conditions: int, flags: int) -> None:
    invalid = EXCEPTION_IE if first == QNAN else 0
    fpu = load(guest, first, second)
    guest.run(FUCOM)
    assert fpu.fsw == conditions
    fpu.fsw = 0
    guest.run(FCOM)
    assert fpu.fsw == conditions | invalid
    guest.words[RFLAGS] |= RFLAGS_ARITHMETIC
    guest.run(FCOMI)
    assert guest.words[RFLAGS] & RFLAGS_ARITHMETIC == flags
    guest.run(FCOMPP)
    assert stack(fpu) == []


@pytest.mark.parametrize(
    "value, conditions",
    [
        (ONE, FSW_C2), (ONE | SIGN, FSW_C2 | FSW_C1), (ZERO, FSW_C3), (1, FSW_C3 | FSW_C2), (UNNORMAL, 0),
        (INFINITY, FSW_C2 | FSW_C0), (QNAN, FSW_C0), (SNAN, FSW_C0), (None, FSW_C3 | FSW_C0),
    ],
)  # fmt: skip
def test_examination(guest: Guest, value: int | None, conditions: int) -> None:
    fpu = load(guest) if value is None else load(guest, value)
    fpu.registers[0] = 0
    guest.run(FXAM)
    assert fpu.fsw == conditions


def test_conditional_move(guest: Guest) -> None:
    fpu = load(guest, ONE, TWO)
    guest.words[RFLAGS] &= ~RFLAGS_ZF
    guest.run(FCMOVE)
    assert stack(fpu) == [ONE, TWO]
    guest.words[RFLAGS] |= RFLAGS_ZF
    guest.run(FCMOVE)
    assert stack(fpu) == [TWO, TWO]


def test_last_instruction_and_its_operand_are_noted(guest: Guest) -> None:
    fpu = load(guest)
    at = guest.words[RIP]
    guest.run(FLD_M32)
    assert (fpu.fcs, fpu.fip, fpu.fds, fpu.fdp) == (USER_CS64, at, 0, AREA)
    behind = guest.words[RIP]
    guest.words[RBX] = AREA + 8
    guest.run(FLD1)
    assert (fpu.fip, fpu.fdp) == (behind, AREA)
    guest.run(FNSTCW)
    assert (fpu.fip, fpu.fdp) == (behind, AREA)


# --------------------------------------------------------------------------------------------------- direct execution


@pytest.fixture(scope="module")
def direct() -> DirectGuest:
    return DirectGuest()


_BINARY = ("fadd", "fsub", "fsubr", "fmul", "fdiv", "fdivr")
_CONTROL_WORDS = (0x037F, 0x077F, 0x0B7F, 0x0F7F, 0x007F, 0x027F)


def _arithmetic_program() -> str:
    """Everything on pairs of integers, with every rounding mode and precision; the results go to memory."""
    lines = ["mov rdi, rbx"]
    for control in _CONTROL_WORDS:
        lines += ["fninit", f"mov eax, {control:#x}", "mov [rbx + 2048], ax", "fldcw [rbx + 2048]"]
        for number, name in enumerate(_BINARY):
            lines += [
                f"fild_m64int [rbx + {8 * number}]",
                f"fild_m32int [rbx + {8 * number + 60}]",
                f"{name}p_sti_st0 st1, st0",
                f"{name}_m64fp [rbx + 1024]",
                "fst_m32fp [rdi + 16]",
                "fst_m64fp [rdi + 24]",
                "fstp_m80fp [rdi + 32]",
                "add rdi, 32",
            ]
        lines += [
            "fild_m64int [rbx + 8]",
            "fabs",
            "fsqrt",
            "frndint",
            "fistp_m64int [rdi + 16]",
            "add rdi, 16",
        ]
    return "\n".join(lines)


def test_arithmetic_is_that_of_direct_execution(direct: DirectGuest) -> None:
    executed, emulated = run_on_both_paths(direct, _arithmetic_program(), cpl=3, rbx=LOW_USER)
    assert emulated == executed


def test_comparisons_and_environments_are_those_of_direct_execution(direct: DirectGuest) -> None:
    program = """
        fninit
        fild_m64int [rbx]
        fild_m64int [rbx + 8]
        fcom_st0_sti st0, st1
        fnstsw_ax ax
        and eax, 0x4500
        fcomi_st0_sti st0, st1
        setb cl
        fxam
        fnstenv_m28byte [rbx + 64]
        fldenv_m28byte [rbx + 64]
        fnsave_m108byte [rbx + 128]
        fld1
        frstor_m108byte [rbx + 128]
        fistp_m64int [rbx + 256]
        fstp_m64fp [rbx + 304]
        fild_m32int [rbx]
        fbstp_m80bcd [rbx + 272]
        fbld_m80bcd [rbx + 272]
        fstp_m80fp [rbx + 288]
    """
    executed, emulated = run_on_both_paths(direct, program, cpl=3, rbx=LOW_USER)
    assert emulated == executed
