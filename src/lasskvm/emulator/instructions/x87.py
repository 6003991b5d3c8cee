"""x87 instructions that move data: loads, stores, conversions, constants, exchanges and conditional moves.

Each function is a builder of plain instructions (:mod:`lasskvm.emulator.operation`).

Source: Intel SDM volume 2, the instructions by name; volume 1, 8.3.3 and 8.5.
"""

from __future__ import annotations

from functools import partial

from iced_x86 import ConditionCode, Mnemonic, Register

from lasskvm.emulator.accessors import memory_loader, memory_storer, operand_bytes
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.flags import CONDITIONS
from lasskvm.emulator.fpu import Fpu
from lasskvm.emulator.instructions.forms import is_memory
from lasskvm.emulator.instructions.x87_stack import (
    INDEFINITE,
    UNDERFLOW,
    blocks_result,
    blocks_store,
    free,
    instruction,
    is_empty,
    pop,
    push,
    rounding,
    set_st,
    signal,
    st,
    unmasked,
)
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.emulator.softfloat import (
    DOUBLE,
    EXTENDED,
    FINITE,
    INFINITY,
    QNAN,
    SINGLE,
    SNAN,
    UNSUPPORTED,
    ZERO,
    Format,
    Number,
    from_integer,
    indefinite,
    is_nan,
    pack_nan,
    round_number,
    to_integer,
    unpack,
)
from lasskvm.state import RFLAGS
from lasskvm.x86.fpu import EXCEPTION_DE, EXCEPTION_IE, FSW_C1, ROUND_NEAREST, ROUND_TRUNCATE

__all__ = ["PLAIN", "stack_number"]

_FORMATS = {4: SINGLE, 8: DOUBLE, 10: EXTENDED}
_EXTENDED_BYTES = 10
_SIGN = 1 << 79
_NOT_NUMBERS = (INFINITY, QNAN, SNAN, UNSUPPORTED)

#: Packed decimals: 18 digits, and the sign in the top bit of the tenth byte.
_BCD_DIGITS = 18
_BCD_DIGIT_BITS = 4
_BCD_DIGIT = 0xF
_BCD_INDEFINITE = 0xFFFF_C000_0000_0000_0000

#: The constants, with more bits than any rounding needs: significand and exponent.
_CONSTANTS = {
    Mnemonic.FLDPI: (0xC90FDAA2_2168C234_C4C6628B_80DC1CD1, -126),
    Mnemonic.FLDL2T: (0xD49A784B_CD1B8AFE_492BF6FF_4DAFDB4C, -126),
    Mnemonic.FLDL2E: (0xB8AA3B29_5C17F0BB_BE87FED0_691D3E88, -127),
    Mnemonic.FLDLG2: (0x9A209A84_FBCFF798_8F8959AC_0B7C9178, -129),
    Mnemonic.FLDLN2: (0xB17217F7_D1CF79AB_C9E3B398_03F2F6AF, -128),
}


def stack_number(decoded: Decoded, number: int) -> int:
    """The *i* of operand *number*, ``ST(i)``."""
    return int(decoded.instruction.op_register(number) - Register.ST0)


# ---------------------------------------------------------------------------------------------------------- loads


def _fld(decoded: Decoded) -> Executor:
    if not is_memory(decoded, 0):
        return _fld_register(decoded)
    size = operand_bytes(decoded, 0)
    form = _FORMATS[size]
    if form is EXTENDED:
        load_extended = memory_loader(decoded, _EXTENDED_BYTES)
        return instruction(decoded, lambda ctx, fpu: push(fpu, load_extended(ctx)))
    load = memory_loader(decoded, size)

    def body(ctx: Emulation, fpu: Fpu) -> None:
        push(fpu, *_widened(unpack(form, load(ctx))))

    return instruction(decoded, body)


def _fld_register(decoded: Decoded) -> Executor:
    number = stack_number(decoded, 0)

    def body(ctx: Emulation, fpu: Fpu) -> None:
        if is_empty(fpu, number):
            push(fpu, INDEFINITE, UNDERFLOW)
        else:
            push(fpu, st(fpu, number))

    return instruction(decoded, body)


def _widened(number: Number) -> tuple[int, int]:
    """A number in the extended format, and the exceptions of loading it."""
    if is_nan(number):
        return pack_nan(EXTENDED, number), EXCEPTION_IE if number.kind == SNAN else 0
    bits, _ = round_number(EXTENDED, number, ROUND_NEAREST)
    return bits, EXCEPTION_DE if number.is_denormal else 0


def _fild(decoded: Decoded) -> Executor:
    size = operand_bytes(decoded, 0)
    load = memory_loader(decoded, size)
    sign = 1 << 8 * size - 1

    def body(ctx: Emulation, fpu: Fpu) -> None:
        value = (load(ctx) ^ sign) - sign
        push(fpu, round_number(EXTENDED, from_integer(value), ROUND_NEAREST)[0])

    return instruction(decoded, body)


def _fbld(decoded: Decoded) -> Executor:
    load = memory_loader(decoded, _EXTENDED_BYTES)

    def body(ctx: Emulation, fpu: Fpu) -> None:
        packed = load(ctx)
        magnitude = 0
        for digit in reversed(range(_BCD_DIGITS)):
            magnitude = magnitude * 10 + (packed >> _BCD_DIGIT_BITS * digit & _BCD_DIGIT)
        bits, _ = round_number(EXTENDED, from_integer(magnitude), ROUND_NEAREST)
        push(fpu, bits | packed & _SIGN)

    return instruction(decoded, body)


def _constant(decoded: Decoded, number: Number) -> Executor:
    """FLDZ, FLD1 and the constants that are rounded as the control word says, without an exception."""
    values = [round_number(EXTENDED, number, mode)[0] for mode in range(4)]
    return instruction(decoded, lambda ctx, fpu: push(fpu, values[rounding(fpu)]))


# --------------------------------------------------------------------------------------------------------- stores


def _fst(decoded: Decoded, *, pops: bool) -> Executor:
    if not is_memory(decoded, 0):
        return _fst_register(decoded, pops)
    size = operand_bytes(decoded, 0)
    form = _FORMATS[size]
    store = memory_storer(decoded, size)

    def body(ctx: Emulation, fpu: Fpu) -> None:
        bits, flags = (indefinite(form), UNDERFLOW) if is_empty(fpu, 0) else _narrowed(fpu, form)
        stored = not blocks_store(fpu, flags)
        if stored:
            store(ctx, bits)
        signal(fpu, flags)
        if stored and pops:
            pop(fpu)

    return instruction(decoded, body)


def _narrowed(fpu: Fpu, form: Format) -> tuple[int, int]:
    """ST(0) in *form*, and the exceptions of storing it. The extended format is stored as it is."""
    if form is EXTENDED:
        return st(fpu, 0), 0
    number = unpack(EXTENDED, st(fpu, 0))
    if number.kind == UNSUPPORTED:
        return indefinite(form), EXCEPTION_IE
    if is_nan(number):
        return pack_nan(form, number), EXCEPTION_IE if number.kind == SNAN else 0
    return round_number(form, number, rounding(fpu), unmasked=unmasked(fpu))


def _fst_register(decoded: Decoded, pops: bool) -> Executor:
    destination = stack_number(decoded, 0)

    def body(ctx: Emulation, fpu: Fpu) -> None:
        value, flags = (INDEFINITE, UNDERFLOW) if is_empty(fpu, 0) else (st(fpu, 0), 0)
        blocked = blocks_result(fpu, flags)
        signal(fpu, flags)
        if not blocked:
            set_st(fpu, destination, value)
            if pops:
                pop(fpu)

    return instruction(decoded, body)


def _fist(decoded: Decoded, *, pops: bool, truncates: bool = False) -> Executor:
    """FIST, FISTP and FISTTP: what does not fit is stored as the integer indefinite."""
    size = operand_bytes(decoded, 0)
    store = memory_storer(decoded, size)
    limit = 1 << 8 * size - 1

    def body(ctx: Emulation, fpu: Fpu) -> None:
        value, flags = _as_integer(fpu, ROUND_TRUNCATE if truncates else rounding(fpu))
        if not flags & EXCEPTION_IE and not -limit <= value < limit:
            flags = EXCEPTION_IE
        if flags & EXCEPTION_IE:
            value = limit
        stored = not blocks_store(fpu, flags)
        if stored:
            store(ctx, value & 2 * limit - 1)
        signal(fpu, flags)
        if stored and pops:
            pop(fpu)

    return instruction(decoded, body)


def _as_integer(fpu: Fpu, mode: int) -> tuple[int, int]:
    """ST(0) as an integer, and the exceptions of that."""
    if is_empty(fpu, 0):
        return 0, UNDERFLOW
    number = unpack(EXTENDED, st(fpu, 0))
    if number.kind in _NOT_NUMBERS:
        return 0, EXCEPTION_IE
    return to_integer(number, mode)


def _fbstp(decoded: Decoded) -> Executor:
    store = memory_storer(decoded, _EXTENDED_BYTES)

    def body(ctx: Emulation, fpu: Fpu) -> None:
        value, flags = _as_integer(fpu, rounding(fpu))
        if not flags & EXCEPTION_IE and abs(value) >= 10**_BCD_DIGITS:
            flags = EXCEPTION_IE
        packed = _BCD_INDEFINITE
        if not flags & EXCEPTION_IE:
            packed = int(str(abs(value)), 16) | st(fpu, 0) & _SIGN
        stored = not blocks_store(fpu, flags)
        if stored:
            store(ctx, packed)
        signal(fpu, flags)
        if stored:
            pop(fpu)

    return instruction(decoded, body)


# ---------------------------------------------------------------------------------------------- within the stack


def _fxch(decoded: Decoded) -> Executor:
    number = stack_number(decoded, 1)

    def body(ctx: Emulation, fpu: Fpu) -> None:
        empty = [place for place in (0, number) if is_empty(fpu, place)]
        flags = UNDERFLOW if empty else 0
        blocked = blocks_result(fpu, flags)
        signal(fpu, flags)
        if blocked:
            return
        for place in empty:
            set_st(fpu, place, INDEFINITE)
        first, second = st(fpu, 0), st(fpu, number)
        set_st(fpu, 0, second)
        set_st(fpu, number, first)

    return instruction(decoded, body)


def _change_sign(decoded: Decoded, *, negate: bool) -> Executor:
    """FCHS and FABS, which do not look at what the number is."""

    def body(ctx: Emulation, fpu: Fpu) -> None:
        if is_empty(fpu, 0):
            value, flags = INDEFINITE, UNDERFLOW
        else:
            value, flags = st(fpu, 0), 0
            value = value ^ _SIGN if negate else value & ~_SIGN
        blocked = blocks_result(fpu, flags)
        signal(fpu, flags)
        if not blocked:
            set_st(fpu, 0, value)

    return instruction(decoded, body)


def _fcmov(decoded: Decoded, condition: int) -> Executor:
    number = stack_number(decoded, 1)
    holds = CONDITIONS[condition]

    def body(ctx: Emulation, fpu: Fpu) -> None:
        underflows = is_empty(fpu, 0) or is_empty(fpu, number)
        flags = UNDERFLOW if underflows else 0
        blocked = blocks_result(fpu, flags)
        signal(fpu, flags)
        if blocked:
            return
        if underflows:
            set_st(fpu, 0, INDEFINITE)
        elif holds(ctx.words[RFLAGS]):
            set_st(fpu, 0, st(fpu, number))

    return instruction(decoded, body)


def _ffree(decoded: Decoded, *, pops: bool) -> Executor:
    number = stack_number(decoded, 0)

    def body(ctx: Emulation, fpu: Fpu) -> None:
        free(fpu, number)
        if pops:
            pop(fpu)

    return instruction(decoded, body)


def _turn(decoded: Decoded, distance: int) -> Executor:
    """FINCSTP and FDECSTP: TOP moves, the registers stay as they are."""

    def body(ctx: Emulation, fpu: Fpu) -> None:
        fpu.top = (fpu.top + distance) % 8
        fpu.fsw &= ~FSW_C1

    return instruction(decoded, body)


_CONDITIONAL_MOVES = {
    Mnemonic.FCMOVB: ConditionCode.B,
    Mnemonic.FCMOVE: ConditionCode.E,
    Mnemonic.FCMOVBE: ConditionCode.BE,
    Mnemonic.FCMOVU: ConditionCode.P,
    Mnemonic.FCMOVNB: ConditionCode.AE,
    Mnemonic.FCMOVNE: ConditionCode.NE,
    Mnemonic.FCMOVNBE: ConditionCode.A,
    Mnemonic.FCMOVNU: ConditionCode.NP,
}

#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    Mnemonic.FLD: _fld,
    Mnemonic.FILD: _fild,
    Mnemonic.FBLD: _fbld,
    Mnemonic.FLDZ: partial(_constant, number=Number(ZERO, 0)),
    Mnemonic.FLD1: partial(_constant, number=from_integer(1)),
    **{
        mnemonic: partial(_constant, number=Number(FINITE, 0, exponent, significand))
        for mnemonic, (significand, exponent) in _CONSTANTS.items()
    },
    Mnemonic.FST: partial(_fst, pops=False),
    Mnemonic.FSTP: partial(_fst, pops=True),
    Mnemonic.FIST: partial(_fist, pops=False),
    Mnemonic.FISTP: partial(_fist, pops=True),
    Mnemonic.FISTTP: partial(_fist, pops=True, truncates=True),
    Mnemonic.FBSTP: _fbstp,
    Mnemonic.FXCH: _fxch,
    Mnemonic.FCHS: partial(_change_sign, negate=True),
    Mnemonic.FABS: partial(_change_sign, negate=False),
    **{mnemonic: partial(_fcmov, condition=condition) for mnemonic, condition in _CONDITIONAL_MOVES.items()},
    Mnemonic.FFREE: partial(_ffree, pops=False),
    Mnemonic.FFREEP: partial(_ffree, pops=True),
    Mnemonic.FINCSTP: partial(_turn, distance=1),
    Mnemonic.FDECSTP: partial(_turn, distance=-1),
}
