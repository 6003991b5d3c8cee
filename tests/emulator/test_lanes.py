"""Packed integer operations: all lanes at once give what one lane after the other would."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from lasskvm.emulator.lanes import (
    Binary,
    adder,
    averager,
    chooser,
    equal,
    greater,
    joiner,
    packer,
    saturating_adder,
    saturating_subtracter,
    selector,
    shifter,
    splitter,
    subtracter,
)

LANES = [8, 16, 32, 64]


def vectors(width: int, seed: int) -> list[tuple[int, int]]:
    """Pairs with many equal and extreme lanes among them."""
    rng = random.Random(seed)

    def vector() -> int:
        return int.from_bytes(
            bytes(rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256))) for _ in range(width // 8)),
            "little",
        )

    pairs = [(vector(), vector()) for _ in range(100)]
    return pairs + [(left, left ^ 1 << rng.randrange(width)) for left, _ in pairs[:20]]


def check(
    operation: Binary, lane: int, width: int, one_lane: Callable[[int, int], int], signed: bool
) -> None:
    split, join = splitter(lane, width, signed=signed), joiner(lane)
    for left, right in vectors(width, lane):
        expected = join([one_lane(a, b) for a, b in zip(split(left), split(right), strict=True)])
        assert operation(left, right) == expected, (hex(left), hex(right))


def clamp(value: int, lane: int, signed: bool) -> int:
    low, high = (-(1 << lane - 1), (1 << lane - 1) - 1) if signed else (0, (1 << lane) - 1)
    return min(max(value, low), high)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("lane", LANES)
class TestAllLanes:
    def test_sums_and_differences_wrap_in_their_lane(self, lane: int, width: int) -> None:
        check(adder(lane, width), lane, width, lambda a, b: a + b, signed=False)
        check(subtracter(lane, width), lane, width, lambda a, b: a - b, signed=False)

    @pytest.mark.parametrize("signed", [False, True])
    def test_saturated_sums_and_differences_stop_at_the_limits(
        self, lane: int, width: int, signed: bool
    ) -> None:
        add, subtract = (
            make(lane, width, signed=signed) for make in (saturating_adder, saturating_subtracter)
        )
        check(add, lane, width, lambda a, b: clamp(a + b, lane, signed), signed)
        check(subtract, lane, width, lambda a, b: clamp(a - b, lane, signed), signed)

    def test_comparisons_give_ones_or_zeros(self, lane: int, width: int) -> None:
        check(equal(lane, width), lane, width, lambda a, b: -(a == b), signed=False)
        check(greater(lane, width), lane, width, lambda a, b: -(a > b), signed=True)

    @pytest.mark.parametrize("signed", [False, True])
    def test_largest_and_smallest(self, lane: int, width: int, signed: bool) -> None:
        check(chooser(lane, width, largest=True, signed=signed), lane, width, max, signed)
        check(chooser(lane, width, largest=False, signed=signed), lane, width, min, signed)

    def test_averages_are_rounded_up(self, lane: int, width: int) -> None:
        check(averager(lane, width), lane, width, lambda a, b: a + b + 1 >> 1, signed=False)

    def test_shifts_keep_to_their_lane(self, lane: int, width: int) -> None:
        for count in (0, 1, lane // 2, lane - 1, lane, lane + 1, 1 << 40):
            left, right, arithmetic = (shifter(lane, width, way) for way in ("left", "right", "arithmetic"))
            effective = min(count, lane)
            check(lambda a, b, s=left, c=count: s(a, c), lane, width, lambda a, b, c=effective: a << c, False)
            check(
                lambda a, b, s=right, c=count: s(a, c), lane, width, lambda a, b, c=effective: a >> c, False
            )
            check(
                lambda a, b, s=arithmetic, c=count: s(a, c),
                lane,
                width,
                lambda a, b, c=effective: a >> c,
                True,
            )


@pytest.mark.parametrize("signed", [False, True])
def test_packing_saturates_and_puts_the_left_vector_first(signed: bool) -> None:
    left = joiner(16)([0x1234, -0x8000, 0x7F, 0x80, -1, 0xFF, 0x100, 0])
    packed = splitter(8, 128, signed=signed)(packer(16, 128, signed=signed)(left, 0))
    expected = [clamp(value, 8, signed) for value in (0x1234, -0x8000, 0x7F, 0x80, -1, 0xFF, 0x100, 0)]
    assert list(packed) == expected + [0] * 8


def test_selected_bytes_come_from_left_right_or_are_zero() -> None:
    select = selector((0, 15, 16, 31, 32, 1, 17, 32))
    left = int.from_bytes(range(0x10, 0x20), "little")
    right = int.from_bytes(range(0x20, 0x30), "little")
    assert select(left, right).to_bytes(8, "little") == bytes.fromhex("101f202f00112100")
