"""Instructions that move elements within and between XMM and MMX registers: shuffles, blends, insertions, extensions.

Most of them are a choice of bytes of their two operands that the encoding settles (``lanes.selector``): places 0 to 15
are those of operand 0, 16 to 31 those of operand 1.

Source: Intel SDM volume 2, the instructions by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from iced_x86 import Mnemonic

from lasskvm.emulator.accessors import operand_bytes
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.instructions.forms import is_memory
from lasskvm.emulator.instructions.vector_operands import (
    XMM_BITS,
    binary,
    executor,
    reader,
    vector_bits,
    writer,
)
from lasskvm.emulator.lanes import high_bits, joiner, selector, splitter
from lasskvm.emulator.operation import Builder, Executor

__all__ = ["PLAIN"]

_SOURCE = 16
_ZERO = 32
#: INSERTPS and EXTRACTPS elements.
_FLOAT_BYTES = 4

#: Bytes of the result, as places, from the size of a vector in bytes and the immediate.
Places = Callable[[int, int], tuple[int, ...]]
_selector = lru_cache(maxsize=4096)(selector)


def _select(decoded: Decoded, places: Places) -> Executor:
    """Operand 0 becomes bytes of operands 0 and 1."""
    operation = _selector(places(vector_bits(decoded) // 8, int(decoded.instruction.immediate8)))
    return binary(decoded, operation)


def _elements(numbers: Sequence[int], size: int, start: int = 0) -> tuple[int, ...]:
    """The bytes of elements of *size* bytes, of the operand that begins at *start*."""
    return tuple(start + size * number + byte for number in numbers for byte in range(size))


def _unpack(length: int, immediate: int, *, size: int, high: bool) -> tuple[int, ...]:
    """PUNPCKLBW, UNPCKHPD and their like: elements of both operands by turns."""
    count = length // size // 2
    first = count if high else 0
    return tuple(
        place
        for number in range(first, first + count)
        for start in (0, _SOURCE)
        for place in _elements([number], size, start)
    )


def _choices(immediate: int) -> list[int]:
    """The four two-bit numbers of an immediate."""
    return [immediate >> shift & 3 for shift in (0, 2, 4, 6)]


def _shuffle_doublewords(length: int, immediate: int) -> tuple[int, ...]:
    """PSHUFD."""
    return _elements(_choices(immediate), 4, _SOURCE)


def _shuffle_words(length: int, immediate: int, *, high: bool = False) -> tuple[int, ...]:
    """PSHUFLW, PSHUFHW, and PSHUFW, which has no other half."""
    shuffled = _elements(_choices(immediate), 2, _SOURCE + 8 * high)
    if length == 8:
        return shuffled
    return _elements([0], 8, _SOURCE) + shuffled if high else shuffled + _elements([1], 8, _SOURCE)


def _shuffle_singles(length: int, immediate: int) -> tuple[int, ...]:
    """SHUFPS: two elements of operand 0, two of operand 1."""
    choices = _choices(immediate)
    return _elements(choices[:2], 4) + _elements(choices[2:], 4, _SOURCE)


def _shuffle_doubles(length: int, immediate: int) -> tuple[int, ...]:
    """SHUFPD."""
    return _elements([immediate & 1], 8) + _elements([immediate >> 1 & 1], 8, _SOURCE)


def _align(length: int, immediate: int) -> tuple[int, ...]:
    """PALIGNR: the bytes from *immediate* on of operand 1 followed by operand 0, followed by zeros."""
    joined = [*range(_SOURCE, _SOURCE + length), *range(length)]
    joined += [_ZERO] * length
    first = min(immediate, 2 * length)
    return tuple(joined[first : first + length])


def _blend(length: int, immediate: int, *, size: int) -> tuple[int, ...]:
    """PBLENDW, BLENDPS and BLENDPD: elements of operand 1 where a bit of the immediate is set."""
    return tuple(
        place
        for number in range(length // size)
        for place in _elements([number], size, _SOURCE if immediate >> number & 1 else 0)
    )


def _extend_zero(length: int, immediate: int, *, size: int, to: int) -> tuple[int, ...]:
    """PMOVZXBW and its like."""
    return tuple(
        _SOURCE + size * number + byte if byte < size else _ZERO
        for number in range(length // to)
        for byte in range(to)
    )


def _extend_sign(decoded: Decoded, size: int, to: int) -> Executor:
    """PMOVSXBW and its like."""
    split, join = splitter(8 * size, XMM_BITS, signed=True), joiner(8 * to)
    count = XMM_BITS // 8 // to
    return binary(decoded, lambda left, right: join(split(right)[:count]))


def _shuffle_bytes(decoded: Decoded) -> Executor:
    """PSHUFB: bytes of operand 0 by number, or zero."""
    length = vector_bits(decoded) // 8

    def operation(left: int, right: int) -> int:
        pool = left.to_bytes(length, "little")
        control = right.to_bytes(length, "little")
        chosen = bytes([0 if byte & 0x80 else pool[byte & length - 1] for byte in control])
        return int.from_bytes(chosen, "little")

    return binary(decoded, operation)


def _blend_by_xmm0(decoded: Decoded, lane: int) -> Executor:
    """PBLENDVB, BLENDVPS and BLENDVPD: elements of operand 1 where the top bit of XMM0's element is set."""
    top, lane_mask = high_bits(lane, XMM_BITS), (1 << lane) - 1
    current, read, write = reader(decoded, 0), reader(decoded, 1), writer(decoded, 0)

    def blend(ctx: Emulation) -> None:
        mask = ((ctx.fpu.xmm[0] & top) >> lane - 1) * lane_mask
        old = current(ctx)
        write(ctx, old ^ (old ^ read(ctx)) & mask)

    return executor(decoded, blend)


# -------------------------------------------------------------------------------------- single elements in and out


def _insert(decoded: Decoded, size: int) -> Executor:
    """PINSRB, PINSRW, PINSRD and PINSRQ: an element from memory or the low part of a register."""
    count = vector_bits(decoded) // (8 * size)
    shift = 8 * size * (int(decoded.instruction.immediate8) % count)
    mask = (1 << 8 * size) - 1
    current, read, write = reader(decoded, 0), reader(decoded, 1), writer(decoded, 0)

    def insert(ctx: Emulation) -> None:
        element = read(ctx) & mask
        write(ctx, current(ctx) & ~(mask << shift) | element << shift)

    return executor(decoded, insert)


def _extract(decoded: Decoded, size: int) -> Executor:
    """PEXTRB, PEXTRW, PEXTRD, PEXTRQ and EXTRACTPS: an element to memory or, extended with zeros, to a register."""
    count = operand_bytes(decoded, 1) // size
    shift = 8 * size * (int(decoded.instruction.immediate8) % count)
    mask = (1 << 8 * size) - 1
    read, write = reader(decoded, 1), writer(decoded, 0)
    return executor(decoded, lambda ctx: write(ctx, read(ctx) >> shift & mask))


def _insert_single(decoded: Decoded) -> Executor:
    """INSERTPS: one element of operand 1 to a place in operand 0, then elements cleared."""
    immediate = int(decoded.instruction.immediate8)
    # In memory there is just the one element.
    source = 0 if is_memory(decoded, 1) else immediate >> 6
    places = list(range(16))
    destination = _FLOAT_BYTES * (immediate >> 4 & 3)
    places[destination : destination + _FLOAT_BYTES] = _elements([source], _FLOAT_BYTES, _SOURCE)
    for number in range(4):
        if immediate >> number & 1:
            places[_FLOAT_BYTES * number : _FLOAT_BYTES * (number + 1)] = [_ZERO] * _FLOAT_BYTES
    operation = _selector(tuple(places))
    return binary(decoded, operation)


_SELECTIONS: dict[int, Places] = {
    Mnemonic.PUNPCKLBW: partial(_unpack, size=1, high=False),
    Mnemonic.PUNPCKLWD: partial(_unpack, size=2, high=False),
    Mnemonic.PUNPCKLDQ: partial(_unpack, size=4, high=False),
    Mnemonic.PUNPCKLQDQ: partial(_unpack, size=8, high=False),
    Mnemonic.PUNPCKHBW: partial(_unpack, size=1, high=True),
    Mnemonic.PUNPCKHWD: partial(_unpack, size=2, high=True),
    Mnemonic.PUNPCKHDQ: partial(_unpack, size=4, high=True),
    Mnemonic.PUNPCKHQDQ: partial(_unpack, size=8, high=True),
    Mnemonic.UNPCKLPS: partial(_unpack, size=4, high=False),
    Mnemonic.UNPCKLPD: partial(_unpack, size=8, high=False),
    Mnemonic.UNPCKHPS: partial(_unpack, size=4, high=True),
    Mnemonic.UNPCKHPD: partial(_unpack, size=8, high=True),
    Mnemonic.PSHUFD: _shuffle_doublewords,
    Mnemonic.PSHUFLW: _shuffle_words,
    Mnemonic.PSHUFHW: partial(_shuffle_words, high=True),
    Mnemonic.PSHUFW: _shuffle_words,
    Mnemonic.SHUFPS: _shuffle_singles,
    Mnemonic.SHUFPD: _shuffle_doubles,
    Mnemonic.PALIGNR: _align,
    Mnemonic.PBLENDW: partial(_blend, size=2),
    Mnemonic.BLENDPS: partial(_blend, size=4),
    Mnemonic.BLENDPD: partial(_blend, size=8),
    Mnemonic.PMOVZXBW: partial(_extend_zero, size=1, to=2),
    Mnemonic.PMOVZXBD: partial(_extend_zero, size=1, to=4),
    Mnemonic.PMOVZXBQ: partial(_extend_zero, size=1, to=8),
    Mnemonic.PMOVZXWD: partial(_extend_zero, size=2, to=4),
    Mnemonic.PMOVZXWQ: partial(_extend_zero, size=2, to=8),
    Mnemonic.PMOVZXDQ: partial(_extend_zero, size=4, to=8),
}

_SIGN_EXTENSIONS = {
    Mnemonic.PMOVSXBW: (1, 2),
    Mnemonic.PMOVSXBD: (1, 4),
    Mnemonic.PMOVSXBQ: (1, 8),
    Mnemonic.PMOVSXWD: (2, 4),
    Mnemonic.PMOVSXWQ: (2, 8),
    Mnemonic.PMOVSXDQ: (4, 8),
}

#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    **{mnemonic: partial(_select, places=places) for mnemonic, places in _SELECTIONS.items()},
    **{
        mnemonic: partial(_extend_sign, size=size, to=to) for mnemonic, (size, to) in _SIGN_EXTENSIONS.items()
    },
    Mnemonic.PSHUFB: _shuffle_bytes,
    Mnemonic.PBLENDVB: partial(_blend_by_xmm0, lane=8),
    Mnemonic.BLENDVPS: partial(_blend_by_xmm0, lane=32),
    Mnemonic.BLENDVPD: partial(_blend_by_xmm0, lane=64),
    Mnemonic.PINSRB: partial(_insert, size=1),
    Mnemonic.PINSRW: partial(_insert, size=2),
    Mnemonic.PINSRD: partial(_insert, size=4),
    Mnemonic.PINSRQ: partial(_insert, size=8),
    Mnemonic.PEXTRB: partial(_extract, size=1),
    Mnemonic.PEXTRW: partial(_extract, size=2),
    Mnemonic.PEXTRD: partial(_extract, size=4),
    Mnemonic.PEXTRQ: partial(_extract, size=8),
    Mnemonic.EXTRACTPS: partial(_extract, size=4),
    Mnemonic.INSERTPS: _insert_single,
}
