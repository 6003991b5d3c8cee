"""SSE floating-point operations on one element: bits in, bits and exceptions out, as MXCSR says.

Source: Intel SDM volume 1, 4.8.3.5 and table 4-7 (NaNs), 4.9.2 (which exception comes first), 10.2.3 (MXCSR),
11.5.2 (SIMD floating-point exceptions).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from lasskvm.emulator.softfloat import (
    FINITE,
    QNAN,
    SINGLE,
    SNAN,
    ZERO,
    Format,
    Number,
    add,
    compare,
    divide,
    from_integer,
    indefinite,
    infinity,
    is_nan,
    multiply,
    pack_nan,
    round_number,
    square_root,
    to_integer,
    unpack,
    zero,
)
from lasskvm.x86.fpu import (
    EXCEPTION_DE,
    EXCEPTION_IE,
    EXCEPTION_UE,
    EXCEPTIONS,
    MXCSR_DAZ,
    MXCSR_FZ,
    MXCSR_MASK_SHIFT,
    MXCSR_RC_SHIFT,
    ROUND_NEAREST,
    ROUNDING_MASK,
)

__all__ = [
    "Control",
    "ElementOperation",
    "added",
    "as_integer",
    "compared",
    "control_of",
    "converted",
    "divided",
    "from_signed",
    "maximum",
    "minimum",
    "multiplied",
    "ordered",
    "reciprocal",
    "reciprocal_root",
    "root",
    "rounded_to_integer",
    "subtracted",
]


class Control(NamedTuple):
    """What MXCSR asks for."""

    rounding: int
    unmasked: int
    denormals_are_zeros: bool
    flush_to_zero: bool


@lru_cache(maxsize=64)
def control_of(mxcsr: int) -> Control:
    """The control part of *mxcsr*; underflows are flushed only while they are masked."""
    unmasked = ~mxcsr >> MXCSR_MASK_SHIFT & EXCEPTIONS
    return Control(
        mxcsr >> MXCSR_RC_SHIFT & ROUNDING_MASK,
        unmasked,
        mxcsr & MXCSR_DAZ != 0,
        mxcsr & MXCSR_FZ != 0 and not unmasked & EXCEPTION_UE,
    )


#: Format, control, operands: bits and exceptions.
ElementOperation = Callable[[Format, Control, int, int], tuple[int, int]]


def _operand(form: Format, control: Control, bits: int) -> Number:
    number = unpack(form, bits)
    if number.is_denormal and control.denormals_are_zeros:
        return Number(ZERO, number.sign)
    return number


def _arithmetic(operation: Callable[[Number, Number, int], tuple[Number, int]]) -> ElementOperation:
    def operate(form: Format, control: Control, left: int, right: int) -> tuple[int, int]:
        one, other = _operand(form, control, left), _operand(form, control, right)
        if is_nan(one) or is_nan(other):
            return _nan_result(form, one, other)
        result, flags = operation(one, other, control.rounding)
        if flags & EXCEPTION_IE:
            return indefinite(form), flags
        if not flags and (one.is_denormal or other.is_denormal):
            flags = EXCEPTION_DE
        return _rounded(form, control, result, flags)

    return operate


def _rounded(form: Format, control: Control, number: Number, flags: int) -> tuple[int, int]:
    """*number* rounded, behind an operation that has signaled *flags*."""
    if flags & control.unmasked:
        return 0, flags
    bits, rounding_flags = round_number(
        form, number, control.rounding, unmasked=control.unmasked, flush_to_zero=control.flush_to_zero
    )
    return bits, flags | rounding_flags & EXCEPTIONS


def _nan_result(form: Format, one: Number, other: Number) -> tuple[int, int]:
    """The first operand that is a NaN, made quiet."""
    flags = EXCEPTION_IE if SNAN in (one.kind, other.kind) else 0
    return pack_nan(form, one if is_nan(one) else other), flags


added = _arithmetic(add)
subtracted = _arithmetic(lambda one, other, mode: add(one, other._replace(sign=other.sign ^ 1), mode))
multiplied = _arithmetic(lambda one, other, mode: multiply(one, other))
divided = _arithmetic(lambda one, other, mode: divide(one, other))
_rooted = _arithmetic(lambda one, other, mode: square_root(one))


def root(form: Format, control: Control, left: int, right: int) -> tuple[int, int]:
    """The square root of *right*."""
    return _rooted(form, control, right, right)


def _extreme(largest: bool) -> ElementOperation:
    def choose(form: Format, control: Control, left: int, right: int) -> tuple[int, int]:
        one, other = _operand(form, control, left), _operand(form, control, right)
        right = zero(form, other.sign) if other.kind == ZERO else right
        if is_nan(one) or is_nan(other):
            return right, EXCEPTION_IE
        flags = EXCEPTION_DE if one.is_denormal or other.is_denormal else 0
        order = compare(one, other)
        if order > 0 if largest else order < 0:
            return (zero(form, one.sign) if one.kind == ZERO else left), flags
        # Of equal ones, zeros of both signs among them, the second.
        return right, flags

    return choose


maximum = _extreme(largest=True)
minimum = _extreme(largest=False)


# ----------------------------------------------------------------------------------------------------- comparisons


def ordered(
    form: Format, control: Control, left: int, right: int, *, signaling: bool
) -> tuple[int | None, int]:
    """How *left* compares with *right* (negative, zero, positive; None when unordered), and the exceptions.

    *signaling* comparisons take exception at QNaNs too.
    """
    one, other = _operand(form, control, left), _operand(form, control, right)
    kinds = one.kind, other.kind
    if SNAN in kinds or (signaling and QNAN in kinds):
        return None, EXCEPTION_IE
    if QNAN in kinds:
        return None, 0
    return compare(one, other), EXCEPTION_DE if one.is_denormal or other.is_denormal else 0


#: CMPPS's predicates 0 to 3, of which 4 to 7 are the opposites: which orders they hold for, and whether they signal.
_PREDICATES: tuple[tuple[tuple[int | None, ...], bool], ...] = (
    ((0,), False),
    ((-1,), True),
    ((-1, 0), True),
    ((None,), False),
)
_OPPOSITE = 4


def compared(predicate: int) -> ElementOperation:
    """CMPPS and its like: all ones or zero."""
    orders, signaling = _PREDICATES[predicate % _OPPOSITE]
    opposite = bool(predicate & _OPPOSITE)

    def operate(form: Format, control: Control, left: int, right: int) -> tuple[int, int]:
        order, flags = ordered(form, control, left, right, signaling=signaling)
        holds = (order in orders) != opposite
        return ((1 << form.size) - 1 if holds else 0), flags

    return operate


# ----------------------------------------------------------------------------------------------------- conversions


def converted(source: Format, target: Format, control: Control, bits: int) -> tuple[int, int]:
    """From one format to the other: CVTSS2SD, CVTSD2SS."""
    number = _operand(source, control, bits)
    if is_nan(number):
        return _nan_result(target, number, number)
    return _rounded(target, control, number, EXCEPTION_DE if number.is_denormal else 0)


def from_signed(form: Format, control: Control, value: int) -> tuple[int, int]:
    """From a signed integer: CVTSI2SS."""
    return _rounded(form, control, from_integer(value), 0)


def as_integer(form: Format, control: Control, bits: int, width: int, rounding: int) -> tuple[int, int]:
    """To a signed integer of *width* bits, as an unsigned value; the integer indefinite for what does not fit."""
    number = _operand(form, control, bits)
    limit = 1 << width - 1
    if number.kind not in (ZERO, FINITE):
        return limit, EXCEPTION_IE
    value, flags = to_integer(number, rounding)
    if not -limit <= value < limit:
        return limit, EXCEPTION_IE
    return value & 2 * limit - 1, flags & EXCEPTIONS


def rounded_to_integer(
    form: Format, control: Control, bits: int, rounding: int, *, exactness_matters: bool
) -> tuple[int, int]:
    """ROUNDPS and its like: to an integer of the same format. Inexact results may go without an exception."""
    number = _operand(form, control, bits)
    if is_nan(number):
        return _nan_result(form, number, number)
    if number.kind == ZERO:
        return zero(form, number.sign), 0
    if number.kind != FINITE or number.exponent >= 0:
        return bits, 0
    value, flags = to_integer(number, rounding)
    flags = flags & EXCEPTIONS if exactness_matters else 0
    if value == 0:
        return zero(form, number.sign), flags
    return round_number(form, from_integer(value), ROUND_NEAREST)[0], flags


# -------------------------------------------------------------------------------------------------- approximations

_APPROXIMATE = Control(ROUND_NEAREST, unmasked=0, denormals_are_zeros=True, flush_to_zero=True)
_ONE = from_integer(1)


def reciprocal(form: Format, control: Control, left: int, right: int) -> tuple[int, int]:
    """RCPPS: any value near enough will do, and this is the best one. It signals nothing and does not ask MXCSR."""
    number = _operand(SINGLE, _APPROXIMATE, right)
    if is_nan(number):
        return pack_nan(SINGLE, number), 0
    return _rounded(SINGLE, _APPROXIMATE, divide(_ONE, number)[0], 0)[0], 0


def reciprocal_root(form: Format, control: Control, left: int, right: int) -> tuple[int, int]:
    """RSQRTPS: the same for the reciprocal of the square root."""
    number = _operand(SINGLE, _APPROXIMATE, right)
    if is_nan(number):
        return pack_nan(SINGLE, number), 0
    if number.kind == ZERO:
        return infinity(SINGLE, number.sign), 0
    rooted, flags = square_root(number)
    if flags:
        return indefinite(SINGLE), 0
    return _rounded(SINGLE, _APPROXIMATE, divide(_ONE, rooted)[0], 0)[0], 0
