"""The string comparisons of SSE4.2: PCMPESTRI, PCMPESTRM, PCMPISTRI and PCMPISTRM.

Each function is a builder of plain instructions (:mod:`lasskvm.emulator.operation`).

Source: Intel SDM volume 2B, 4.1 (imm8 control byte operation), and the instructions by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from iced_x86 import Mnemonic

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.flags import KEPT
from lasskvm.emulator.instructions.vector_operands import XMM_BITS, executor, reader
from lasskvm.emulator.lanes import Lanes, splitter
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.state import RAX, RCX, RDX, RFLAGS
from lasskvm.x86.registers import MASK32, MASK64, RFLAGS_CF, RFLAGS_OF, RFLAGS_SF, RFLAGS_ZF

__all__ = ["PLAIN"]

# The control byte
_WORDS = 1 << 0
_SIGNED = 1 << 1
_AGGREGATION_SHIFT, _AGGREGATION_MASK = 2, 3
_NEGATIVE = 1 << 4
_MASKED = 1 << 5
#: The most significant index, or a mask of elements and not of bits.
_OUTPUT = 1 << 6

_WIDE_LENGTHS = frozenset((Mnemonic.PCMPESTRI64, Mnemonic.PCMPESTRM64))

#: Elements that are valid, of the two strings, and all of the first and of the second.
_Aggregation = Callable[[Lanes, Lanes, int], int]
#: Lengths of the two strings in the registers, from the state and their elements.
_Lengths = Callable[[Emulation, Lanes, Lanes], tuple[int, int]]


def _equal_any(first: Lanes, second: Lanes, count: int) -> int:
    """Which elements of the second string are in the set that the first one is."""
    return sum((element in first) << place for place, element in enumerate(second))


def _ranges(first: Lanes, second: Lanes, count: int) -> int:
    """Which elements of the second string are in a range of the first one, a list of pairs."""
    pairs = list(zip(first[::2], first[1::2], strict=False))
    return sum(
        any(low <= element <= high for low, high in pairs) << place for place, element in enumerate(second)
    )


def _equal_each(first: Lanes, second: Lanes, count: int) -> int:
    """Where the strings have the same element, or both have ended."""
    return sum((first[place : place + 1] == second[place : place + 1]) << place for place in range(count))


def _equal_ordered(first: Lanes, second: Lanes, count: int) -> int:
    """Where in the second string the first one begins, as far as can be seen."""
    return sum(
        (second[place : place + len(first)] == first[: count - place]) << place for place in range(count)
    )


_AGGREGATIONS: tuple[_Aggregation, ...] = (_equal_any, _ranges, _equal_each, _equal_ordered)


def _implicit_lengths(ctx: Emulation, first: Lanes, second: Lanes) -> tuple[int, int]:
    """Strings end before their first zero."""
    return (
        first.index(0) if 0 in first else len(first),
        second.index(0) if 0 in second else len(second),
    )


def _explicit_lengths(width: int) -> _Lengths:
    """Lengths are in rAX and rDX, saturated; negative ones count as positive."""
    mask, sign = (MASK64, 1 << 63) if width == 64 else (MASK32, 1 << 31)

    def lengths(ctx: Emulation, first: Lanes, second: Lanes) -> tuple[int, int]:
        found = [((ctx.words[word] & mask) ^ sign) - sign for word in (RAX, RDX)]
        return min(abs(found[0]), len(first)), min(abs(found[1]), len(second))

    return lengths


def _compare(decoded: Decoded, *, explicit: bool, to_mask: bool) -> Executor:
    control = int(decoded.instruction.immediate8)
    lane = 16 if control & _WORDS else 8
    count = XMM_BITS // lane
    split = splitter(lane, XMM_BITS, signed=bool(control & _SIGNED))
    aggregate = _AGGREGATIONS[control >> _AGGREGATION_SHIFT & _AGGREGATION_MASK]
    lengths: _Lengths = _implicit_lengths
    if explicit:
        lengths = _explicit_lengths(64 if decoded.instruction.mnemonic in _WIDE_LENGTHS else 32)
    # The second operand needs no alignment, unlike those of other instructions.
    read_first, read_second = reader(decoded, 0), reader(decoded, 1, aligned=False)
    write = (
        partial(_write_mask, lane=lane, control=control)
        if to_mask
        else partial(_write_index, control=control)
    )

    def compare(ctx: Emulation) -> None:
        first, second = split(read_first(ctx)), split(read_second(ctx))
        first_length, second_length = lengths(ctx, first, second)
        result = aggregate(first[:first_length], second[:second_length], count)
        if control & _NEGATIVE:
            result ^= (1 << (second_length if control & _MASKED else count)) - 1
        write(ctx, result, count)
        flags = (RFLAGS_CF if result else 0) | (RFLAGS_OF if result & 1 else 0)
        flags |= (RFLAGS_ZF if second_length < count else 0) | (RFLAGS_SF if first_length < count else 0)
        ctx.words[RFLAGS] = ctx.words[RFLAGS] & KEPT | flags

    return executor(decoded, compare)


def _write_index(ctx: Emulation, result: int, count: int, *, control: int) -> None:
    """ECX: the number of the first or last bit, or the number of elements if there is none."""
    if not result:
        ctx.words[RCX] = count
    elif control & _OUTPUT:
        ctx.words[RCX] = result.bit_length() - 1
    else:
        ctx.words[RCX] = (result & -result).bit_length() - 1


def _write_mask(ctx: Emulation, result: int, count: int, *, lane: int, control: int) -> None:
    """XMM0: the bits, or elements of ones in their places."""
    if control & _OUTPUT:
        ones = (1 << lane) - 1
        result = sum((result >> place & 1) * ones << lane * place for place in range(count))
    ctx.fpu.xmm[0] = result


#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    Mnemonic.PCMPESTRI: partial(_compare, explicit=True, to_mask=False),
    Mnemonic.PCMPESTRI64: partial(_compare, explicit=True, to_mask=False),
    Mnemonic.PCMPESTRM: partial(_compare, explicit=True, to_mask=True),
    Mnemonic.PCMPESTRM64: partial(_compare, explicit=True, to_mask=True),
    Mnemonic.PCMPISTRI: partial(_compare, explicit=False, to_mask=False),
    Mnemonic.PCMPISTRM: partial(_compare, explicit=False, to_mask=True),
}
