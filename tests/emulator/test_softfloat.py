"""Floating point in integers gives what the host's processor gives, and the exceptions that the manual says."""

from __future__ import annotations

import math
import random
import struct

import pytest

from lasskvm.emulator.softfloat import (
    DOUBLE,
    EXTENDED,
    INFINITY,
    QNAN,
    SINGLE,
    SNAN,
    UNSUPPORTED,
    Format,
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
    EXCEPTION_IE,
    EXCEPTION_OE,
    EXCEPTION_PE,
    EXCEPTION_UE,
    EXCEPTION_ZE,
    FSW_C1,
    ROUND_DOWN,
    ROUND_NEAREST,
    ROUND_TRUNCATE,
    ROUND_UP,
)

FORMATS = [SINGLE, DOUBLE, EXTENDED]


def bits_of(value: float) -> int:
    return int.from_bytes(struct.pack("<d", value), "little")


def float_of(bits: int) -> float:
    return float(struct.unpack("<d", bits.to_bytes(8, "little"))[0])


def random_double(rng: random.Random) -> int:
    """Any double, or one near 1, or a denormal, but no NaN."""
    kind = rng.randrange(5)
    sign = rng.getrandbits(1) << 63
    if kind == 0:
        return sign | rng.randrange(0x7FF) << 52 | rng.getrandbits(52)
    if kind == 1:
        return sign | rng.getrandbits(52)
    if kind == 2:
        return sign | rng.choice((0, 0x7FF << 52))
    return sign | rng.randrange(0x3FC, 0x404) << 52 | rng.getrandbits(52)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(11)


def test_sums_and_products_of_doubles_are_those_of_the_host(rng: random.Random) -> None:
    for _ in range(3000):
        a, b = random_double(rng), random_double(rng)
        left, right = unpack(DOUBLE, a), unpack(DOUBLE, b)
        for (number, flags), expected in (
            (add(left, right, ROUND_NEAREST), float_of(a) + float_of(b)),
            (multiply(left, right), float_of(a) * float_of(b)),
        ):
            if math.isnan(expected):
                assert flags == EXCEPTION_IE
            else:
                assert round_number(DOUBLE, number, ROUND_NEAREST)[0] == bits_of(expected)


def test_quotients_and_roots_of_doubles_are_those_of_the_host(rng: random.Random) -> None:
    for _ in range(3000):
        a, b = random_double(rng), random_double(rng)
        left, right = unpack(DOUBLE, a), unpack(DOUBLE, b)
        number, flags = divide(left, right)
        if not flags and float_of(b):
            assert round_number(DOUBLE, number, ROUND_NEAREST)[0] == bits_of(float_of(a) / float_of(b))
        number, flags = square_root(left)
        if not flags:
            assert round_number(DOUBLE, number, ROUND_NEAREST)[0] == bits_of(math.sqrt(float_of(a)))


def test_comparison_is_that_of_the_host(rng: random.Random) -> None:
    for _ in range(1000):
        a, b = random_double(rng), random_double(rng)
        order = compare(unpack(DOUBLE, a), unpack(DOUBLE, b))
        assert (order < 0, order > 0) == (float_of(a) < float_of(b), float_of(a) > float_of(b))


def test_rounding_to_single_is_that_of_the_host(rng: random.Random) -> None:
    for _ in range(1000):
        value = rng.uniform(-1, 1) * 2.0 ** rng.randrange(-150, 127)
        expected = int.from_bytes(struct.pack("<f", value), "little")
        assert round_number(SINGLE, unpack(DOUBLE, bits_of(value)), ROUND_NEAREST)[0] == expected


@pytest.mark.parametrize("form", FORMATS, ids=["single", "double", "extended"])
def test_every_class_of_number_survives_packing(form: Format, rng: random.Random) -> None:
    for _ in range(300):
        bits = rng.getrandbits(form.size)
        number = unpack(form, bits)
        if number.kind == UNSUPPORTED:
            continue
        if is_nan(number):
            quiet = 1 << form.precision - 2
            assert pack_nan(form, number) == bits | quiet
        elif form is EXTENDED and number.is_denormal and bits >> 63 & 1:
            continue
        else:
            assert round_number(form, number, ROUND_NEAREST) == (bits, 0)


def test_encodings_that_are_no_numbers_are_unsupported() -> None:
    assert unpack(EXTENDED, 0x3FFF << 64 | 1).kind == UNSUPPORTED
    assert unpack(EXTENDED, 0x7FFF << 64).kind == UNSUPPORTED
    assert unpack(EXTENDED, 0x7FFF << 64 | 1 << 63).kind == INFINITY
    assert unpack(EXTENDED, 0x7FFF << 64 | 3 << 62).kind == QNAN
    assert unpack(EXTENDED, 0x7FFF << 64 | 1 << 63 | 1).kind == SNAN


@pytest.mark.parametrize(
    "mode, positive, negative",
    [(ROUND_NEAREST, 2, -2), (ROUND_DOWN, 1, -2), (ROUND_UP, 2, -1), (ROUND_TRUNCATE, 1, -1)],
)
def test_rounding_modes(mode: int, positive: int, negative: int) -> None:
    assert to_integer(unpack(DOUBLE, bits_of(1.75)), mode)[0] == positive
    assert to_integer(unpack(DOUBLE, bits_of(-1.75)), mode)[0] == negative


def test_halves_are_rounded_to_even() -> None:
    rounded = [
        to_integer(unpack(DOUBLE, bits_of(value)), ROUND_NEAREST)[0] for value in (0.5, 1.5, 2.5, -2.5)
    ]
    assert rounded == [0, 2, 2, -2]


def test_inexact_result_says_so_and_which_way_it_went() -> None:
    third, _ = divide(from_integer(1), from_integer(3))
    assert round_number(DOUBLE, third, ROUND_DOWN)[1] == EXCEPTION_PE
    assert round_number(DOUBLE, third, ROUND_UP)[1] == EXCEPTION_PE | FSW_C1
    half, _ = divide(from_integer(1), from_integer(2))
    assert round_number(DOUBLE, half, ROUND_UP)[1] == 0


def test_overflow_gives_infinity_or_the_largest_number() -> None:
    huge, _ = multiply(*[unpack(DOUBLE, bits_of(1e300))] * 2)
    assert round_number(DOUBLE, huge, ROUND_NEAREST) == (
        infinity(DOUBLE, 0),
        EXCEPTION_OE | EXCEPTION_PE | FSW_C1,
    )
    largest = infinity(DOUBLE, 0) - 1
    assert round_number(DOUBLE, huge, ROUND_TRUNCATE) == (largest, EXCEPTION_OE | EXCEPTION_PE)
    assert round_number(DOUBLE, huge._replace(sign=1), ROUND_UP)[0] == largest | 1 << 63


def test_underflow_is_signaled_for_tiny_and_inexact_results() -> None:
    smallest = unpack(DOUBLE, 1)
    exact, _ = multiply(smallest, from_integer(3))
    assert round_number(DOUBLE, exact, ROUND_NEAREST) == (3, 0)
    inexact, _ = divide(unpack(DOUBLE, 3), from_integer(2))
    assert round_number(DOUBLE, inexact, ROUND_NEAREST) == (2, EXCEPTION_UE | EXCEPTION_PE | FSW_C1)


def test_unmasked_underflow_is_signaled_for_exact_results_too() -> None:
    smallest = unpack(EXTENDED, 1)
    bits, flags = round_number(EXTENDED, smallest, ROUND_NEAREST, unmasked=EXCEPTION_UE)
    assert flags == EXCEPTION_UE
    # The result is too large by 2**24576.
    assert unpack(EXTENDED, bits).exponent == smallest.exponent + 24576 - 63


def test_flushing_makes_tiny_results_zero() -> None:
    bits = round_number(DOUBLE, unpack(DOUBLE, 1 << 63 | 5), ROUND_NEAREST, flush_to_zero=True)
    assert bits == (zero(DOUBLE, 1), EXCEPTION_UE | EXCEPTION_PE)


def test_precision_control_rounds_to_fewer_bits() -> None:
    third, _ = divide(from_integer(1), from_integer(3))
    bits, flags = round_number(EXTENDED, third, ROUND_NEAREST, precision=24)
    assert (bits, flags) == (0x3FFD << 64 | 0xAAAA_AB00 << 32, EXCEPTION_PE | FSW_C1)


def test_invalid_operations() -> None:
    plus, minus = unpack(DOUBLE, infinity(DOUBLE, 0)), unpack(DOUBLE, infinity(DOUBLE, 1))
    nothing = from_integer(0)
    assert add(plus, minus, ROUND_NEAREST)[1] == EXCEPTION_IE
    assert multiply(plus, nothing)[1] == EXCEPTION_IE
    assert divide(nothing, nothing)[1] == EXCEPTION_IE
    assert divide(plus, minus)[1] == EXCEPTION_IE
    assert square_root(from_integer(-1))[1] == EXCEPTION_IE
    assert divide(from_integer(1), nothing)[1] == EXCEPTION_ZE
    assert unpack(DOUBLE, indefinite(DOUBLE)).kind == QNAN


def test_sign_of_an_exact_zero_sum_depends_on_rounding() -> None:
    one, other = from_integer(1), from_integer(-1)
    signs = [add(one, other, mode)[0].sign for mode in range(4)]
    assert signs == [0, 1, 0, 0]
