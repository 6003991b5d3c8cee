"""Binary floating point in integers: unpacking, exact arithmetic, and rounding to one of the x86 formats.

A :class:`Number` is an operand taken apart; arithmetic on two of them gives an exact result (or one with a sticky
remainder), and :func:`round_number` makes bits of it and says which exceptions that signals. What NaNs an instruction
prefers, and what becomes of unmasked exceptions, is its own affair.

Source: Intel SDM volume 1, chapter 4 (4.2.2, 4.8, 4.9), and IEEE 754.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple

from lasskvm.x86.fpu import (
    EXCEPTION_IE,
    EXCEPTION_OE,
    EXCEPTION_PE,
    EXCEPTION_UE,
    EXCEPTION_ZE,
    FSW_C1,
    ROUND_DOWN,
    ROUND_NEAREST,
    ROUND_UP,
)

__all__ = [
    "DOUBLE",
    "EXTENDED",
    "FINITE",
    "INFINITY",
    "QNAN",
    "SINGLE",
    "SNAN",
    "UNSUPPORTED",
    "ZERO",
    "Format",
    "Number",
    "add",
    "compare",
    "divide",
    "from_integer",
    "indefinite",
    "infinity",
    "is_nan",
    "multiply",
    "pack_nan",
    "round_number",
    "square_root",
    "to_integer",
    "unpack",
    "zero",
]

ZERO, FINITE, INFINITY, QNAN, SNAN, UNSUPPORTED = range(6)

#: NaN payloads are kept left-aligned in the significand of the extended format.
_NAN_BITS = 64
_NAN_INTEGER_BIT = 1 << 63
_NAN_QUIET_BIT = 1 << 62
#: Bits of a quotient or root beyond the widest significand: enough for a remainder to be a mere tail.
_SPARE_BITS = 3
_WIDEST = 64


@dataclass(frozen=True, eq=False)
class Format:
    """A binary format. *precision* counts the integer bit, which is stored only where it is *explicit*."""

    precision: int
    exponent_bits: int
    explicit: bool = False

    @property
    def fraction_bits(self) -> int:
        """How many bits of the significand are stored."""
        return self.precision - (not self.explicit)

    @property
    def size(self) -> int:
        """Bits in all."""
        return 1 + self.exponent_bits + self.fraction_bits

    @property
    def bias(self) -> int:
        """What is added to an exponent; the largest exponent too."""
        return (1 << self.exponent_bits - 1) - 1

    @property
    def special_exponent(self) -> int:
        """The exponent field of infinities and NaNs."""
        return (1 << self.exponent_bits) - 1

    @property
    def bias_adjustment(self) -> int:
        """How far a result moves whose overflow or underflow is unmasked (SDM volume 1, 4.9.1.4)."""
        return 3 << self.exponent_bits - 2


SINGLE = Format(24, 8)
DOUBLE = Format(53, 11)
EXTENDED = Format(64, 15, explicit=True)


class Number(NamedTuple):
    """An operand. FINITE is ``(-1)**sign * significand * 2**exponent``, with a tail when ``is_inexact``.

    ``significand`` of a NaN is its payload as in the extended format. ``is_denormal`` says that the operand was stored
    as a denormal, which signals #D.
    """

    kind: int
    sign: int
    exponent: int = 0
    significand: int = 0
    is_denormal: bool = False
    is_inexact: bool = False


class _Layout(NamedTuple):
    """A format's constants, computed once: operands are taken apart millions of times."""

    fraction_bits: int
    fraction_mask: int
    special_exponent: int
    sign_shift: int
    lowest: int
    integer_bit: int
    explicit: bool


def _layout(form: Format) -> _Layout:
    lowest = 1 - form.bias - (form.precision - 1)
    fraction = form.fraction_bits
    integer_bit = 1 << form.precision - 1
    return _Layout(
        fraction,
        (1 << fraction) - 1,
        form.special_exponent,
        form.size - 1,
        lowest,
        integer_bit,
        form.explicit,
    )


_LAYOUTS = {form: _layout(form) for form in (SINGLE, DOUBLE, EXTENDED)}


def unpack(form: Format, bits: int) -> Number:
    """Take *bits* of *form* apart."""
    layout = _LAYOUTS[form]
    sign = bits >> layout.sign_shift
    exponent = bits >> layout.fraction_bits & layout.special_exponent
    fraction = bits & layout.fraction_mask
    if exponent == layout.special_exponent:
        return _unpack_special(form, sign, fraction)
    if exponent == 0:
        if fraction == 0:
            return Number(ZERO, sign)
        return Number(FINITE, sign, layout.lowest, fraction, is_denormal=True)
    if layout.explicit and not fraction & layout.integer_bit:
        return Number(UNSUPPORTED, sign)
    return Number(FINITE, sign, layout.lowest + exponent - 1, fraction | layout.integer_bit)


def _unpack_special(form: Format, sign: int, fraction: int) -> Number:
    if form.explicit and not fraction & _NAN_INTEGER_BIT:
        return Number(UNSUPPORTED, sign)
    payload = fraction << _NAN_BITS - form.precision | _NAN_INTEGER_BIT
    if payload == _NAN_INTEGER_BIT:
        return Number(INFINITY, sign)
    return Number(QNAN if payload & _NAN_QUIET_BIT else SNAN, sign, 0, payload)


def is_nan(number: Number) -> bool:
    """Whether *number* is a NaN of either kind."""
    return number.kind in (QNAN, SNAN)


def pack_nan(form: Format, number: Number) -> int:
    """The bits of NaN *number* in *form*, made quiet; a narrower format keeps the upper part of the payload."""
    fraction = (number.significand | _NAN_QUIET_BIT) >> _NAN_BITS - form.precision
    return _assemble(form, number.sign, form.special_exponent, fraction)


def indefinite(form: Format) -> int:
    """The QNaN floating-point indefinite: what a masked invalid operation gives."""
    return _assemble(form, 1, form.special_exponent, 3 << form.precision - 2)


def infinity(form: Format, sign: int) -> int:
    """An infinity."""
    return _assemble(form, sign, form.special_exponent, 1 << form.precision - 1)


def zero(form: Format, sign: int) -> int:
    """A zero."""
    return _assemble(form, sign, 0, 0)


def _assemble(form: Format, sign: int, exponent: int, significand: int) -> int:
    """Bits from a sign, an exponent field, and a significand with its integer bit."""
    fraction = significand & (1 << form.fraction_bits) - 1
    return (sign << form.exponent_bits | exponent) << form.fraction_bits | fraction


# ------------------------------------------------------------------------------------------------------ rounding


def from_integer(value: int) -> Number:
    """An integer as a number."""
    if value == 0:
        return Number(ZERO, 0)
    return Number(FINITE, int(value < 0), 0, abs(value))


def round_number(
    form: Format,
    number: Number,
    rounding: int,
    *,
    precision: int | None = None,
    unmasked: int = 0,
    flush_to_zero: bool = False,
) -> tuple[int, int]:
    """The bits of *number* in *form*, and the exceptions (``EXCEPTION_*``) of rounding it, with ``FSW_C1`` when it was
    rounded away from zero.

    *number* is not a NaN. *precision* may be less than that of *form* (x87 precision control). *unmasked* are
    exceptions for which the result is the adjusted one of SDM volume 1, 4.9.1.4 and 4.9.1.5. With *flush_to_zero* a
    tiny result becomes zero (MXCSR.FZ with underflow masked).
    """
    if number.kind == ZERO:
        return zero(form, number.sign), 0
    if number.kind == INFINITY:
        return infinity(form, number.sign), 0
    precision = precision or form.precision
    sign, lowest_exponent = number.sign, 1 - form.bias
    significand, leading, flags = _round_to(number, precision, rounding)
    if leading < lowest_exponent:
        if unmasked & EXCEPTION_UE:
            adjusted = leading + form.bias_adjustment
            if adjusted < lowest_exponent:
                return zero(form, sign), flags | EXCEPTION_UE
            return _pack_rounded(form, sign, adjusted, significand, precision), flags | EXCEPTION_UE
        if flush_to_zero:
            return zero(form, sign), EXCEPTION_UE | EXCEPTION_PE
        quantum = lowest_exponent - (precision - 1)
        significand, flags = _round_at(number, quantum, rounding)
        if flags:
            flags |= EXCEPTION_UE
        field = significand >> precision - 1
        return _assemble(form, sign, field, significand << form.precision - precision), flags
    if leading > form.bias:
        if unmasked & EXCEPTION_OE:
            adjusted = leading - form.bias_adjustment
            if adjusted > form.bias:
                return infinity(form, sign), flags | EXCEPTION_OE
            return _pack_rounded(form, sign, adjusted, significand, precision), flags | EXCEPTION_OE
        return _overflowed(form, sign, rounding, precision)
    return _pack_rounded(form, sign, leading, significand, precision), flags


def _round_to(number: Number, precision: int, rounding: int) -> tuple[int, int, int]:
    """*number* rounded to *precision* bits, whatever its exponent: significand, exponent of the leading bit, flags."""
    leading = number.exponent + number.significand.bit_length() - 1
    significand, flags = _round_at(number, leading - (precision - 1), rounding)
    if significand >> precision:
        return significand >> 1, leading + 1, flags
    return significand, leading, flags


def _round_at(number: Number, quantum: int, rounding: int) -> tuple[int, int]:
    """*number* as a multiple of ``2**quantum``, and the flags of rounding it to that."""
    shift = quantum - number.exponent
    if shift <= 0:
        # Inexact numbers have spare bits, so they never come here with a tail.
        return number.significand << -shift, 0
    kept = number.significand >> shift
    # Twice the remainder and its tail, to be compared with the divisor: the halfway case has neither.
    remainder = (number.significand & (1 << shift) - 1) << 1 | number.is_inexact
    if not remainder:
        return kept, 0
    half = 1 << shift
    if rounding == ROUND_NEAREST:
        up = remainder > half or (remainder == half and kept & 1 == 1)
    else:
        up = rounding == (ROUND_DOWN if number.sign else ROUND_UP)
    return kept + up, EXCEPTION_PE | (FSW_C1 if up else 0)


def _pack_rounded(form: Format, sign: int, leading: int, significand: int, precision: int) -> int:
    return _assemble(form, sign, leading + form.bias, significand << form.precision - precision)


def _overflowed(form: Format, sign: int, rounding: int, precision: int) -> tuple[int, int]:
    """The masked response to an overflow (SDM volume 1, table 4-10)."""
    away = ROUND_DOWN if sign else ROUND_UP
    if rounding in (ROUND_NEAREST, away):
        return infinity(form, sign), EXCEPTION_OE | EXCEPTION_PE | FSW_C1
    largest = (1 << precision) - 1
    return _pack_rounded(form, sign, form.bias, largest, precision), EXCEPTION_OE | EXCEPTION_PE


def to_integer(number: Number, rounding: int) -> tuple[int, int]:
    """A finite or zero *number* as an integer, and the flags of rounding it."""
    if number.kind == ZERO:
        return 0, 0
    magnitude, flags = _round_at(number, 0, rounding)
    return -magnitude if number.sign else magnitude, flags


# ---------------------------------------------------------------------------------------------------- arithmetic
# Operands are neither NaNs nor unsupported. The results are a number and exceptions; after an invalid operation the
# number means nothing.


def add(left: Number, right: Number, rounding: int) -> tuple[Number, int]:
    """The sum; *rounding* decides the sign of an exact zero."""
    if left.kind == INFINITY or right.kind == INFINITY:
        if left.kind == right.kind and left.sign != right.sign:
            return left, EXCEPTION_IE
        return (left if left.kind == INFINITY else right), 0
    exponent = min(left.exponent, right.exponent)
    total = _signed(left, exponent) + _signed(right, exponent)
    if total:
        return Number(FINITE, int(total < 0), exponent, abs(total)), 0
    if left.kind == right.kind == ZERO and left.sign == right.sign:
        return left, 0
    return Number(ZERO, int(rounding == ROUND_DOWN)), 0


def _signed(number: Number, exponent: int) -> int:
    magnitude = number.significand << number.exponent - exponent
    return -magnitude if number.sign else magnitude


def multiply(left: Number, right: Number) -> tuple[Number, int]:
    """The product."""
    sign = left.sign ^ right.sign
    kinds = left.kind, right.kind
    if INFINITY in kinds:
        return Number(INFINITY, sign), EXCEPTION_IE if ZERO in kinds else 0
    if ZERO in kinds:
        return Number(ZERO, sign), 0
    return Number(FINITE, sign, left.exponent + right.exponent, left.significand * right.significand), 0


def divide(dividend: Number, divisor: Number) -> tuple[Number, int]:
    """The quotient, with as many bits as any format can ask for."""
    sign = dividend.sign ^ divisor.sign
    if dividend.kind == divisor.kind and dividend.kind != FINITE:
        return Number(ZERO, sign), EXCEPTION_IE
    if dividend.kind == INFINITY:
        return Number(INFINITY, sign), 0
    if divisor.kind == ZERO:
        return Number(INFINITY, sign), EXCEPTION_ZE
    if dividend.kind == ZERO or divisor.kind == INFINITY:
        return Number(ZERO, sign), 0
    missing = _WIDEST + _SPARE_BITS + divisor.significand.bit_length() - dividend.significand.bit_length()
    shift = max(missing, 0)
    quotient, remainder = divmod(dividend.significand << shift, divisor.significand)
    exponent = dividend.exponent - divisor.exponent - shift
    return Number(FINITE, sign, exponent, quotient, is_inexact=remainder != 0), 0


def square_root(number: Number) -> tuple[Number, int]:
    """The square root; that of a negative zero is itself."""
    if number.kind == ZERO:
        return number, 0
    if number.sign:
        return number, EXCEPTION_IE
    if number.kind == INFINITY:
        return number, 0
    shift = max(2 * (_WIDEST + _SPARE_BITS) - number.significand.bit_length(), 0)
    # The exponent must stay even.
    shift += (number.exponent - shift) & 1
    scaled = number.significand << shift
    root = isqrt(scaled)
    return Number(FINITE, 0, number.exponent - shift >> 1, root, is_inexact=root * root != scaled), 0


def compare(left: Number, right: Number) -> int:
    """Negative, zero or positive, as *left* is less than, equal to or greater than *right*."""
    if INFINITY in (left.kind, right.kind):
        return _rank(left) - _rank(right)
    exponent = min(left.exponent, right.exponent)
    difference = _signed(left, exponent) - _signed(right, exponent)
    return (difference > 0) - (difference < 0)


def _rank(number: Number) -> int:
    if number.kind != INFINITY:
        return 0
    return -1 if number.sign else 1
