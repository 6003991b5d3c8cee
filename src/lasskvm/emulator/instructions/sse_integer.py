"""Packed integers in XMM and MMX registers: arithmetic, logic, comparisons, shifts and packing.

The tables say which operation (:mod:`lasskvm.emulator.lanes`) an instruction makes, for vectors of either size. Logic
on packed floating-point numbers is the same and is here too.

Source: Intel SDM volume 2, the instructions by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

from iced_x86 import Mnemonic, OpKind

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.flags import KEPT
from lasskvm.emulator.instructions.vector_operands import (
    XMM_BITS,
    binary,
    executor,
    reader,
    unary,
    vector_bits,
    writer,
)
from lasskvm.emulator.lanes import (
    Binary,
    Unary,
    adder,
    averager,
    chooser,
    equal,
    greater,
    high_bits,
    joiner,
    lanewise,
    negator,
    packer,
    saturating_adder,
    saturating_subtracter,
    shifter,
    splitter,
    subtracter,
)
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.state import RFLAGS
from lasskvm.x86.registers import MASK64, RFLAGS_CF, RFLAGS_ZF

__all__ = ["PLAIN"]

#: Makes an operation for vectors of so many bits.
MakeBinary = Callable[[int], Binary]
MakeUnary = Callable[[int], Unary]


def _binary(decoded: Decoded, make: MakeBinary) -> Executor:
    return binary(decoded, _made_binary(make, vector_bits(decoded)))


def _unary(decoded: Decoded, make: MakeUnary) -> Executor:
    return unary(decoded, _made_unary(make, vector_bits(decoded)))


@cache
def _made_binary(make: MakeBinary, width: int) -> Binary:
    """What *make* makes, once for all instructions."""
    return make(width)


@cache
def _made_unary(make: MakeUnary, width: int) -> Unary:
    """The same for one operand."""
    return make(width)


# -------------------------------------------------------------------------------------------------------- products


def _multiply_low(lane: int, width: int) -> Binary:
    return lanewise(lane, width, lambda left, right: left * right, signed=False)


def _multiply_high(width: int, *, signed: bool) -> Binary:
    return lanewise(16, width, lambda left, right: left * right >> 16, signed=signed)


def _multiply_even(width: int, *, signed: bool) -> Binary:
    """PMULUDQ and PMULDQ: the lower halves of quadwords, to full products."""
    split, join = splitter(32, width, signed=signed), joiner(64)
    return lambda left, right: join(
        [one * other for one, other in zip(split(left)[::2], split(right)[::2], strict=True)]
    )


def _multiply_round(width: int) -> Binary:
    """PMULHRSW: the product of fractions, rounded."""
    return lanewise(16, width, lambda left, right: (left * right >> 14) + 1 >> 1, signed=True)


def _multiply_add(width: int) -> Binary:
    """PMADDWD: sums of two products of neighbours."""
    split, join = splitter(16, width, signed=True), joiner(32)

    def operation(left: int, right: int) -> int:
        products = [one * other for one, other in zip(split(left), split(right), strict=True)]
        return join([one + other for one, other in zip(products[::2], products[1::2], strict=True)])

    return operation


def _multiply_add_bytes(width: int) -> Binary:
    """PMADDUBSW: unsigned bytes by signed ones, neighbours added with saturation."""
    split_left, split_right = splitter(8, width, signed=False), splitter(8, width, signed=True)
    join = joiner(16)

    def operation(left: int, right: int) -> int:
        products = [one * other for one, other in zip(split_left(left), split_right(right), strict=True)]
        pairs = zip(products[::2], products[1::2], strict=True)
        return join([_saturate16(one + other) for one, other in pairs])

    return operation


def _saturate16(value: int) -> int:
    return min(max(value, -0x8000), 0x7FFF)


# --------------------------------------------------------------------------------------------------- other arithmetic


def _sum_of_differences(width: int) -> Binary:
    """PSADBW: absolute differences of bytes, added up for each quadword."""
    split, join = splitter(8, width, signed=False), joiner(64)

    def operation(left: int, right: int) -> int:
        differences = [abs(one - other) for one, other in zip(split(left), split(right), strict=True)]
        return join([sum(differences[first : first + 8]) for first in range(0, len(differences), 8)])

    return operation


def _horizontal(lane: int, width: int, *, sign: int, saturate: bool = False) -> Binary:
    """PHADDW, PHSUBSW and their like: neighbours of the left vector, then of the right one."""
    split, join = splitter(lane, width, signed=True), joiner(lane)

    def operation(left: int, right: int) -> int:
        lanes = split(left) + split(right)
        results = [one + sign * other for one, other in zip(lanes[::2], lanes[1::2], strict=True)]
        return join([_saturate16(result) for result in results] if saturate else results)

    return operation


def _absolute(lane: int, width: int) -> Unary:
    top, negate, lane_mask = high_bits(lane, width), negator(lane, width), (1 << lane) - 1

    def operation(value: int) -> int:
        mask = ((value & top) >> lane - 1) * lane_mask
        return value ^ (value ^ negate(value)) & mask

    return operation


def _sign(lane: int, width: int) -> Binary:
    """PSIGNB and its like: negated, cleared or kept by the sign of the other."""
    return lanewise(lane, width, lambda left, right: left * ((right > 0) - (right < 0)), signed=True)


def _minimum_position(width: int) -> Unary:
    """PHMINPOSUW: the least word and its number."""
    split = splitter(16, width, signed=False)

    def operation(value: int) -> int:
        words = split(value)
        least = min(words)
        return least | words.index(least) << 16

    return operation


def _multiple_differences(decoded: Decoded) -> Executor:
    """MPSADBW: sums of four absolute differences, at eight places, against one group of four."""
    control = decoded.instruction.immediate8
    left_start, right_start = (control >> 2 & 1) * 4, (control & 3) * 4
    split, join = splitter(8, XMM_BITS, signed=False), joiner(16)

    def operation(left: int, right: int) -> int:
        group = split(right)[right_start : right_start + 4]
        window = split(left)[left_start:]
        return join([sum(abs(window[place + byte] - group[byte]) for byte in range(4)) for place in range(8)])

    return binary(decoded, operation)


# --------------------------------------------------------------------------------------------------------- shifts


def _shift(decoded: Decoded, lane: int, direction: str) -> Executor:
    """PSLLW and its like, by an immediate or by the low quadword of operand 1."""
    operation = shifter(lane, vector_bits(decoded), direction)
    if decoded.instruction.op_kind(1) == OpKind.IMMEDIATE8:
        count = int(decoded.instruction.immediate8)
        current, write = reader(decoded, 0), writer(decoded, 0)
        return executor(decoded, lambda ctx: write(ctx, operation(current(ctx), count)))
    return binary(decoded, lambda left, right: operation(left, right & MASK64))


def _shift_bytes(decoded: Decoded, *, left: bool) -> Executor:
    """PSLLDQ and PSRLDQ."""
    count = 8 * min(int(decoded.instruction.immediate8), 16)
    current, write = reader(decoded, 0), writer(decoded, 0)
    if left:
        ones = (1 << XMM_BITS) - 1
        return executor(decoded, lambda ctx: write(ctx, current(ctx) << count & ones))
    return executor(decoded, lambda ctx: write(ctx, current(ctx) >> count))


# ----------------------------------------------------------------------------------------------------------- tests


def _test(decoded: Decoded) -> Executor:
    """PTEST: ZF when the operands have no bit in common, CF when operand 1 has no bit that operand 0 lacks."""
    current, read = reader(decoded, 0), reader(decoded, 1)

    def test(ctx: Emulation) -> None:
        left, right = current(ctx), read(ctx)
        flags = (0 if left & right else RFLAGS_ZF) | (0 if right & ~left else RFLAGS_CF)
        ctx.words[RFLAGS] = ctx.words[RFLAGS] & KEPT | flags

    return executor(decoded, test)


_XOR = (Mnemonic.PXOR, Mnemonic.XORPS, Mnemonic.XORPD)
_OR = (Mnemonic.POR, Mnemonic.ORPS, Mnemonic.ORPD)
_AND = (Mnemonic.PAND, Mnemonic.ANDPS, Mnemonic.ANDPD)
_AND_NOT = (Mnemonic.PANDN, Mnemonic.ANDNPS, Mnemonic.ANDNPD)

_BINARY: dict[int, MakeBinary] = {
    **dict.fromkeys(_XOR, lambda width: lambda left, right: left ^ right),
    **dict.fromkeys(_OR, lambda width: lambda left, right: left | right),
    **dict.fromkeys(_AND, lambda width: lambda left, right: left & right),
    **dict.fromkeys(_AND_NOT, lambda width: lambda left, right: ~left & right),
    Mnemonic.PADDB: partial(adder, 8),
    Mnemonic.PADDW: partial(adder, 16),
    Mnemonic.PADDD: partial(adder, 32),
    Mnemonic.PADDQ: partial(adder, 64),
    Mnemonic.PSUBB: partial(subtracter, 8),
    Mnemonic.PSUBW: partial(subtracter, 16),
    Mnemonic.PSUBD: partial(subtracter, 32),
    Mnemonic.PSUBQ: partial(subtracter, 64),
    Mnemonic.PADDSB: partial(saturating_adder, 8, signed=True),
    Mnemonic.PADDSW: partial(saturating_adder, 16, signed=True),
    Mnemonic.PADDUSB: partial(saturating_adder, 8, signed=False),
    Mnemonic.PADDUSW: partial(saturating_adder, 16, signed=False),
    Mnemonic.PSUBSB: partial(saturating_subtracter, 8, signed=True),
    Mnemonic.PSUBSW: partial(saturating_subtracter, 16, signed=True),
    Mnemonic.PSUBUSB: partial(saturating_subtracter, 8, signed=False),
    Mnemonic.PSUBUSW: partial(saturating_subtracter, 16, signed=False),
    Mnemonic.PCMPEQB: partial(equal, 8),
    Mnemonic.PCMPEQW: partial(equal, 16),
    Mnemonic.PCMPEQD: partial(equal, 32),
    Mnemonic.PCMPEQQ: partial(equal, 64),
    Mnemonic.PCMPGTB: partial(greater, 8),
    Mnemonic.PCMPGTW: partial(greater, 16),
    Mnemonic.PCMPGTD: partial(greater, 32),
    Mnemonic.PCMPGTQ: partial(greater, 64),
    Mnemonic.PMAXUB: partial(chooser, 8, largest=True, signed=False),
    Mnemonic.PMAXUW: partial(chooser, 16, largest=True, signed=False),
    Mnemonic.PMAXUD: partial(chooser, 32, largest=True, signed=False),
    Mnemonic.PMAXSB: partial(chooser, 8, largest=True, signed=True),
    Mnemonic.PMAXSW: partial(chooser, 16, largest=True, signed=True),
    Mnemonic.PMAXSD: partial(chooser, 32, largest=True, signed=True),
    Mnemonic.PMINUB: partial(chooser, 8, largest=False, signed=False),
    Mnemonic.PMINUW: partial(chooser, 16, largest=False, signed=False),
    Mnemonic.PMINUD: partial(chooser, 32, largest=False, signed=False),
    Mnemonic.PMINSB: partial(chooser, 8, largest=False, signed=True),
    Mnemonic.PMINSW: partial(chooser, 16, largest=False, signed=True),
    Mnemonic.PMINSD: partial(chooser, 32, largest=False, signed=True),
    Mnemonic.PAVGB: partial(averager, 8),
    Mnemonic.PAVGW: partial(averager, 16),
    Mnemonic.PMULLW: partial(_multiply_low, 16),
    Mnemonic.PMULLD: partial(_multiply_low, 32),
    Mnemonic.PMULHW: partial(_multiply_high, signed=True),
    Mnemonic.PMULHUW: partial(_multiply_high, signed=False),
    Mnemonic.PMULUDQ: partial(_multiply_even, signed=False),
    Mnemonic.PMULDQ: partial(_multiply_even, signed=True),
    Mnemonic.PMULHRSW: _multiply_round,
    Mnemonic.PMADDWD: _multiply_add,
    Mnemonic.PMADDUBSW: _multiply_add_bytes,
    Mnemonic.PSADBW: _sum_of_differences,
    Mnemonic.PHADDW: partial(_horizontal, 16, sign=1),
    Mnemonic.PHADDD: partial(_horizontal, 32, sign=1),
    Mnemonic.PHADDSW: partial(_horizontal, 16, sign=1, saturate=True),
    Mnemonic.PHSUBW: partial(_horizontal, 16, sign=-1),
    Mnemonic.PHSUBD: partial(_horizontal, 32, sign=-1),
    Mnemonic.PHSUBSW: partial(_horizontal, 16, sign=-1, saturate=True),
    Mnemonic.PSIGNB: partial(_sign, 8),
    Mnemonic.PSIGNW: partial(_sign, 16),
    Mnemonic.PSIGND: partial(_sign, 32),
    Mnemonic.PACKSSWB: partial(packer, 16, signed=True),
    Mnemonic.PACKSSDW: partial(packer, 32, signed=True),
    Mnemonic.PACKUSWB: partial(packer, 16, signed=False),
    Mnemonic.PACKUSDW: partial(packer, 32, signed=False),
}

_UNARY: dict[int, MakeUnary] = {
    Mnemonic.PABSB: partial(_absolute, 8),
    Mnemonic.PABSW: partial(_absolute, 16),
    Mnemonic.PABSD: partial(_absolute, 32),
    Mnemonic.PHMINPOSUW: _minimum_position,
}

_SHIFTS = {
    Mnemonic.PSLLW: (16, "left"),
    Mnemonic.PSLLD: (32, "left"),
    Mnemonic.PSLLQ: (64, "left"),
    Mnemonic.PSRLW: (16, "right"),
    Mnemonic.PSRLD: (32, "right"),
    Mnemonic.PSRLQ: (64, "right"),
    Mnemonic.PSRAW: (16, "arithmetic"),
    Mnemonic.PSRAD: (32, "arithmetic"),
}

#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    **{mnemonic: partial(_binary, make=make) for mnemonic, make in _BINARY.items()},
    **{mnemonic: partial(_unary, make=make) for mnemonic, make in _UNARY.items()},
    **{mnemonic: partial(_shift, lane=lane, direction=way) for mnemonic, (lane, way) in _SHIFTS.items()},
    Mnemonic.PSLLDQ: partial(_shift_bytes, left=True),
    Mnemonic.PSRLDQ: partial(_shift_bytes, left=False),
    Mnemonic.PTEST: _test,
    Mnemonic.MPSADBW: _multiple_differences,
}
