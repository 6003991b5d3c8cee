"""Shifts and rotates: SHL, SHR, SAR, ROL, ROR, RCL, RCR, SHLD, SHRD, and SHLX, SHRX, SARX and RORX.

A count of 0 leaves the flags, but still writes the destination: memory must be writable, and the upper half of a 64-bit
register goes. Where the manual leaves a flag undefined, the value is the one that direct execution gives: OF after a
shift of more than one bit says whether the last of its steps has changed the sign.

Source: Intel SDM volume 2, the instructions by name.
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Mnemonic

from lasskvm.emulator.accessors import operand_bytes, reader, update_reader, writer
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.flags import KEPT, result_flags
from lasskvm.emulator.instructions.forms import operand_bits, signed
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.state import RFLAGS
from lasskvm.x86.registers import RFLAGS_CF, RFLAGS_OF

__all__ = ["PLAIN"]

_WORD_BITS = 16
_QUADWORD = 8
_COUNT_MASK, _COUNT_MASK64 = 0x1F, 0x3F
_KEPT_BY_ROTATES = ~(RFLAGS_CF | RFLAGS_OF)

#: ``shift(value, count)`` with a count above 0 gives the result, CF and OF, both flags as 0 or 1.
_Shift = Callable[[int, int], tuple[int, int, int]]
#: ``rotate(value, carry, count)`` likewise, with CF as it was.
_Rotate = Callable[[int, int, int], tuple[int, int, int]]


def _count_mask(decoded: Decoded) -> int:
    return _COUNT_MASK64 if operand_bytes(decoded, 0) == _QUADWORD else _COUNT_MASK


# ------------------------------------------------------------------------------------------------------- shifts


def _left(bits: int) -> _Shift:
    mask = (1 << bits) - 1

    def shift(value: int, count: int) -> tuple[int, int, int]:
        wide = value << count
        result, carry = wide & mask, wide >> bits & 1
        return result, carry, result >> bits - 1 ^ carry

    return shift


def _right(bits: int) -> _Shift:
    def shift(value: int, count: int) -> tuple[int, int, int]:
        before_last = value >> count - 1
        return before_last >> 1, before_last & 1, before_last >> bits - 1

    return shift


def _right_signed(bits: int) -> _Shift:
    mask = (1 << bits) - 1

    def shift(value: int, count: int) -> tuple[int, int, int]:
        before_last = signed(value, bits) >> count - 1
        return before_last >> 1 & mask, before_last & 1, 0

    return shift


def _shift(make: Callable[[int], _Shift]) -> Builder:
    """The builder of SHL, SHR or SAR."""

    def build(decoded: Decoded) -> Executor:
        bits, count_mask = operand_bits(decoded, 0), _count_mask(decoded)
        shift, flags = make(bits), result_flags(bits)
        read, read_count, write = update_reader(decoded, 0), reader(decoded, 1), writer(decoded, 0)

        def run(ctx: Emulation) -> None:
            value, count = read(ctx), read_count(ctx) & count_mask
            if not count:
                write(ctx, value)
                return
            result, carry, overflow = shift(value, count)
            write(ctx, result)
            words = ctx.words
            words[RFLAGS] = words[RFLAGS] & KEPT | flags(result) | carry | (RFLAGS_OF if overflow else 0)

        return run

    return build


# ------------------------------------------------------------------------------------------------------ rotates


def _rotate_left(bits: int) -> _Rotate:
    mask = (1 << bits) - 1

    def rotate(value: int, carry: int, count: int) -> tuple[int, int, int]:
        count %= bits
        result = (value << count | value >> bits - count) & mask
        return result, result & 1, result >> bits - 1 ^ result & 1

    return rotate


def _rotate_right(bits: int) -> _Rotate:
    mask = (1 << bits) - 1

    def rotate(value: int, carry: int, count: int) -> tuple[int, int, int]:
        count %= bits
        result = (value >> count | value << bits - count) & mask
        return result, result >> bits - 1, (result >> bits - 1 ^ result >> bits - 2) & 1

    return rotate


def _rotate_left_through_carry(bits: int) -> _Rotate:
    return _rotate_through_carry(bits, 1)


def _rotate_right_through_carry(bits: int) -> _Rotate:
    return _rotate_through_carry(bits, -1)


def _rotate_through_carry(bits: int, direction: int) -> _Rotate:
    """RCL (*direction* 1) or RCR (-1): CF is one more bit, above the sign."""
    width = bits + 1
    mask = (1 << bits) - 1

    def rotate(value: int, carry: int, count: int) -> tuple[int, int, int]:
        left = direction * count % width
        wide = carry << bits | value
        rotated = wide << left | wide >> width - left
        result = rotated & mask
        # OF tells whether the sign has changed: for a count of 1, where it is defined, that is the manual's rule.
        return result, rotated >> bits & 1, (result ^ value) >> bits - 1

    return rotate


def _rotate(make: Callable[[int], _Rotate], *, through_carry: bool) -> Builder:
    """The builder of a rotate. A full turn sets the flags, but one through CF is as good as a count of 0."""

    def build(decoded: Decoded) -> Executor:
        bits, count_mask = operand_bits(decoded, 0), _count_mask(decoded)
        rotate = make(bits)
        period = bits + 1 if through_carry else count_mask + 1
        read, read_count, write = update_reader(decoded, 0), reader(decoded, 1), writer(decoded, 0)

        def run(ctx: Emulation) -> None:
            words = ctx.words
            value, count = read(ctx), (read_count(ctx) & count_mask) % period
            if not count:
                write(ctx, value)
                return
            result, carry, overflow = rotate(value, words[RFLAGS] & RFLAGS_CF, count)
            write(ctx, result)
            words[RFLAGS] = words[RFLAGS] & _KEPT_BY_ROTATES | carry | (RFLAGS_OF if overflow else 0)

        return run

    return build


# ------------------------------------------------------------------------------------------------ double shifts


def _double_shift(decoded: Decoded, *, to_left: bool) -> Executor:
    """SHLD and SHRD: operand 0, with bits of operand 1 coming in.

    A 16-bit operand can be shifted by up to 31 bits. What comes in after operand 1 is undefined by the manual; it is
    operand 0 again, as on Intel's processors.
    """
    bits = operand_bits(decoded, 0)
    mask, count_mask, flags = (1 << bits) - 1, _count_mask(decoded), result_flags(bits)
    read, read_filler, write = update_reader(decoded, 0), reader(decoded, 1), writer(decoded, 0)
    read_count = reader(decoded, 2)
    filler_bits = 2 * bits if bits == _WORD_BITS else bits

    def run(ctx: Emulation) -> None:
        value, filler, count = read(ctx), read_filler(ctx), read_count(ctx) & count_mask
        if not count:
            write(ctx, value)
            return
        if to_left:
            if bits == _WORD_BITS:
                filler = filler << bits | value
            shifted = (value << filler_bits | filler) << count >> filler_bits
            result, carry = shifted & mask, shifted >> bits & 1
            overflow = result >> bits - 1 ^ carry
        else:
            if bits == _WORD_BITS:
                filler |= value << bits
            before_last = (filler << bits | value) >> count - 1
            result, carry = before_last >> 1 & mask, before_last & 1
            overflow = (before_last ^ result) >> bits - 1 & 1
        write(ctx, result)
        words = ctx.words
        words[RFLAGS] = words[RFLAGS] & KEPT | flags(result) | carry | (RFLAGS_OF if overflow else 0)

    return run


def _shld(decoded: Decoded) -> Executor:
    return _double_shift(decoded, to_left=True)


def _shrd(decoded: Decoded) -> Executor:
    return _double_shift(decoded, to_left=False)


# ------------------------------------------------------------------------------------------------ without flags


def _shift_without_flags(operation: Callable[[int, int, int], int]) -> Builder:
    """The builder of SHLX, SHRX, SARX or RORX; ``operation(value, count, bits)`` may exceed the operand."""

    def build(decoded: Decoded) -> Executor:
        bits, count_mask = operand_bits(decoded, 0), _count_mask(decoded)
        mask = (1 << bits) - 1
        write, read, read_count = writer(decoded, 0), reader(decoded, 1), reader(decoded, 2)
        return lambda ctx: write(ctx, operation(read(ctx), read_count(ctx) & count_mask, bits) & mask)

    return build


#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    Mnemonic.SHL: _shift(_left),
    Mnemonic.SAL: _shift(_left),
    Mnemonic.SHR: _shift(_right),
    Mnemonic.SAR: _shift(_right_signed),
    Mnemonic.ROL: _rotate(_rotate_left, through_carry=False),
    Mnemonic.ROR: _rotate(_rotate_right, through_carry=False),
    Mnemonic.RCL: _rotate(_rotate_left_through_carry, through_carry=True),
    Mnemonic.RCR: _rotate(_rotate_right_through_carry, through_carry=True),
    Mnemonic.SHLD: _shld,
    Mnemonic.SHRD: _shrd,
    Mnemonic.SHLX: _shift_without_flags(lambda value, count, bits: value << count),
    Mnemonic.SHRX: _shift_without_flags(lambda value, count, bits: value >> count),
    Mnemonic.SARX: _shift_without_flags(lambda value, count, bits: signed(value, bits) >> count),
    Mnemonic.RORX: _shift_without_flags(lambda value, count, bits: value >> count | value << bits - count),
}
