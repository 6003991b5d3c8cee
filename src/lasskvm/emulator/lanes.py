"""Packed integers: one operation on all elements ("lanes") of a vector that is kept as one Python integer.

Sums, comparisons and selections work on all lanes at once: each lane's top bit is dealt with apart, so that nothing
carries from one lane into the next. Each function makes the operation for one lane size and vector size, in bits;
the operation takes and returns vectors.

Source: Intel SDM volume 1, 9.3 and 9.4 (wraparound and saturation arithmetic); volume 2 for the instructions named.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from operator import itemgetter

__all__ = [
    "Binary",
    "Lanes",
    "Unary",
    "adder",
    "averager",
    "chooser",
    "equal",
    "greater",
    "high_bits",
    "joiner",
    "lanewise",
    "negator",
    "packer",
    "saturating_adder",
    "saturating_subtracter",
    "selector",
    "shifter",
    "splitter",
    "subtracter",
]

Unary = Callable[[int], int]
Binary = Callable[[int, int], int]
Lanes = tuple[int, ...]

#: Codes of unsigned integers in ``struct``; the small letters are signed.
_FORMATS = {8: "B", 16: "H", 32: "I", 64: "Q"}


def high_bits(lane: int, width: int) -> int:
    """The vector in which the top bit of each lane is set."""
    return _ones(lane, width) << lane - 1


def _ones(lane: int, width: int) -> int:
    """The vector of ones."""
    return ((1 << width) - 1) // ((1 << lane) - 1)


# ----------------------------------------------------------------------------------------- sums and comparisons


def adder(lane: int, width: int) -> Binary:
    """PADDB and its like: wraparound addition."""
    top = high_bits(lane, width)
    rest = top ^ (1 << width) - 1
    return lambda left, right: ((left & rest) + (right & rest)) ^ ((left ^ right) & top)


def subtracter(lane: int, width: int) -> Binary:
    """PSUBB and its like: wraparound subtraction."""
    top = high_bits(lane, width)
    rest = top ^ (1 << width) - 1
    return lambda left, right: ((left | top) - (right & rest)) ^ ((left ^ right ^ top) & top)


def negator(lane: int, width: int) -> Unary:
    """Each lane negated."""
    subtract = subtracter(lane, width)
    return lambda value: subtract(0, value)


def equal(lane: int, width: int) -> Binary:
    """PCMPEQB and its like: all ones where the lanes are equal."""
    top = high_bits(lane, width)
    everything = (1 << width) - 1
    rest = top ^ everything
    lane_mask = (1 << lane) - 1

    def compare(left: int, right: int) -> int:
        difference = left ^ right
        # The top bit comes out set where any bit of the lane is.
        differing = ((difference & rest) + rest | difference) & top
        return everything ^ (differing >> lane - 1) * lane_mask

    return compare


def greater(lane: int, width: int, *, signed: bool = True) -> Binary:
    """PCMPGTB and its like: all ones where the left lane is greater than the right one."""
    below = _borrows(lane, width)
    flip = high_bits(lane, width) if signed else 0
    lane_mask = (1 << lane) - 1
    return lambda left, right: (below(right ^ flip, left ^ flip) >> lane - 1) * lane_mask


def _borrows(lane: int, width: int) -> Binary:
    """The top bit of each lane in which the left lane is less than the right one, both unsigned."""
    top = high_bits(lane, width)
    subtract = subtracter(lane, width)
    return lambda left, right: (~left & right | ~(left ^ right) & subtract(left, right)) & top


def chooser(lane: int, width: int, *, largest: bool, signed: bool) -> Binary:
    """PMAXUB, PMINSW and their like."""
    is_greater = greater(lane, width, signed=signed)

    def choose(left: int, right: int) -> int:
        mask = is_greater(left, right) if largest else is_greater(right, left)
        return right ^ (left ^ right) & mask

    return choose


def averager(lane: int, width: int) -> Binary:
    """PAVGB and PAVGW: the average, rounded up."""
    rest = high_bits(lane, width) ^ (1 << width) - 1
    subtract = subtracter(lane, width)
    return lambda left, right: subtract(left | right, (left ^ right) >> 1 & rest)


def saturating_adder(lane: int, width: int, *, signed: bool) -> Binary:
    """PADDSB, PADDUSW and their like."""
    add, top, lane_mask = adder(lane, width), high_bits(lane, width), (1 << lane) - 1

    def add_unsigned(left: int, right: int) -> int:
        total = add(left, right)
        carries = (left & right | (left | right) & ~total) & top
        return total | (carries >> lane - 1) * lane_mask

    def add_signed(left: int, right: int) -> int:
        total = add(left, right)
        overflows = ~(left ^ right) & (left ^ total) & top
        return _saturated(total, left, overflows)

    _saturated = _saturator(lane, width)
    return add_signed if signed else add_unsigned


def saturating_subtracter(lane: int, width: int, *, signed: bool) -> Binary:
    """PSUBSB, PSUBUSW and their like."""
    subtract, top, lane_mask = subtracter(lane, width), high_bits(lane, width), (1 << lane) - 1
    below = _borrows(lane, width)

    def subtract_unsigned(left: int, right: int) -> int:
        return subtract(left, right) & ~((below(left, right) >> lane - 1) * lane_mask)

    def subtract_signed(left: int, right: int) -> int:
        difference = subtract(left, right)
        overflows = (left ^ right) & (left ^ difference) & top
        return _saturated(difference, left, overflows)

    _saturated = _saturator(lane, width)
    return subtract_signed if signed else subtract_unsigned


def _saturator(lane: int, width: int) -> Callable[[int, int, int], int]:
    """``(result, left, overflows)``: lanes that overflow become the limit on the side of *left*."""
    top, lane_mask = high_bits(lane, width), (1 << lane) - 1
    largest = top ^ (1 << width) - 1

    def saturate(result: int, left: int, overflows: int) -> int:
        if not overflows:
            return result
        mask = (overflows >> lane - 1) * lane_mask
        # 7F..., and one more (80...) where the operand is negative.
        limits = largest + ((left & top) >> lane - 1)
        return result ^ (result ^ limits) & mask

    return saturate


# --------------------------------------------------------------------------------------------------------- shifts


def shifter(lane: int, width: int, direction: str) -> Binary:
    """PSLLW (``"left"``), PSRLW (``"right"``), PSRAW (``"arithmetic"``) and their like; one count is for all lanes."""
    ones, lane_mask, top = _ones(lane, width), (1 << lane) - 1, high_bits(lane, width)

    def left(value: int, count: int) -> int:
        if count >= lane:
            return 0
        return value << count & (lane_mask << count & lane_mask) * ones

    def right(value: int, count: int) -> int:
        if count >= lane:
            return 0
        return value >> count & (lane_mask >> count) * ones

    def arithmetic(value: int, count: int) -> int:
        count = min(count, lane - 1)
        copies = lane_mask ^ lane_mask >> count
        return value >> count & (lane_mask >> count) * ones | ((value & top) >> lane - 1) * copies

    return {"left": left, "right": right, "arithmetic": arithmetic}[direction]


# ------------------------------------------------------------------------------------------------- lane by lane


def splitter(lane: int, width: int, *, signed: bool) -> Callable[[int], Lanes]:
    """The lanes of a vector, lowest first."""
    code = _FORMATS[lane].lower() if signed else _FORMATS[lane]
    unpack = struct.Struct(f"<{width // lane}{code}").unpack
    size = width // 8
    return lambda value: unpack(value.to_bytes(size, "little"))


def joiner(lane: int) -> Callable[[Sequence[int]], int]:
    """A vector of lanes, lowest first; only their low bits count."""
    lane_mask, code = (1 << lane) - 1, _FORMATS[lane]

    def join(lanes: Sequence[int]) -> int:
        packed = struct.pack(f"<{len(lanes)}{code}", *[element & lane_mask for element in lanes])
        return int.from_bytes(packed, "little")

    return join


def lanewise(lane: int, width: int, operation: Binary, *, signed: bool, result: int | None = None) -> Binary:
    """*operation* on each pair of lanes; *result* is the size of its results when they are of another."""
    split, join = splitter(lane, width, signed=signed), joiner(result or lane)
    return lambda left, right: join(
        [operation(one, other) for one, other in zip(split(left), split(right), strict=True)]
    )


def packer(lane: int, width: int, *, signed: bool) -> Binary:
    """PACKSSWB, PACKUSDW and their like: signed lanes, saturated to half their size; the left vector comes first."""
    split, join = splitter(lane, width, signed=True), joiner(lane // 2)
    half = lane // 2
    low, high = (-(1 << half - 1), (1 << half - 1) - 1) if signed else (0, (1 << half) - 1)
    return lambda left, right: join([min(max(one, low), high) for one in split(left) + split(right)])


def selector(places: tuple[int, ...]) -> Binary:
    """A vector made of bytes of two: byte *n* is byte ``places[n]`` of the left vector followed by the right one.

    Both are taken as 16 bytes, so the right one begins at 16; place 32 is a zero.
    """
    pick = itemgetter(*places)

    def select(left: int, right: int) -> int:
        pool = left | right << 128
        return int.from_bytes(pick(pool.to_bytes(33, "little")), "little")

    return select
