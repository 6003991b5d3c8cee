"""Moves of XMM and MMX registers, masked stores, prefetches and fences.

Each function is a builder of plain instructions (:mod:`lasskvm.emulator.operation`).

Source: Intel SDM volume 2, the instructions by name.
"""

from __future__ import annotations

from functools import partial

from iced_x86 import Code, Mnemonic

from lasskvm.emulator.accessors import operand_bytes
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import store_bytes, touch
from lasskvm.emulator.decode import Decoded, effective_address
from lasskvm.emulator.instructions.forms import is_memory
from lasskvm.emulator.instructions.vector_operands import executor, is_xmm, reader, vector_bits, writer
from lasskvm.emulator.lanes import high_bits, selector
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.lass import WRITE
from lasskvm.x86.registers import MASK64

__all__ = ["PLAIN"]

_HIGH_HALF = MASK64 << 64
#: Multiplying by this gathers the top bits of eight bytes, each at bit 7 of its byte, in the uppermost byte.
_GATHER_TOP_BITS = 0x0002_0408_1020_4081
_TOP_BITS = 0x8080_8080_8080_8080
_GATHERED = 56
_DOUBLEWORD_MOVES = frozenset((Code.MOVD_XMM_RM32, Code.MOVD_RM32_XMM, Code.MOVD_MM_RM32, Code.MOVD_RM32_MM))


def _move(decoded: Decoded, *, aligned: bool = True) -> Executor:
    """The whole of operand 1 to operand 0."""
    read, write = reader(decoded, 1, aligned=aligned), writer(decoded, 0, aligned=aligned)
    return executor(decoded, lambda ctx: write(ctx, read(ctx)))


def _move_low(decoded: Decoded) -> Executor:
    """MOVD and MOVQ: as many low bytes as the smaller operand has, extended with zeros."""
    read, write = reader(decoded, 1), writer(decoded, 0)
    size = 4 if decoded.instruction.code in _DOUBLEWORD_MOVES else 8
    mask = (1 << 8 * size) - 1
    return executor(decoded, lambda ctx: write(ctx, read(ctx) & mask))


def _move_scalar(decoded: Decoded, size: int) -> Executor:
    """MOVSS and MOVSD: between registers the rest stays, from memory it becomes zero."""
    mask = (1 << 8 * size) - 1
    read, write = reader(decoded, 1), writer(decoded, 0)
    if not is_xmm(decoded, 0):
        return executor(decoded, lambda ctx: write(ctx, read(ctx) & mask))
    if is_memory(decoded, 1):
        return executor(decoded, lambda ctx: write(ctx, read(ctx)))
    current = reader(decoded, 0)

    def merge(ctx: Emulation) -> None:
        old = current(ctx)
        write(ctx, old ^ (old ^ read(ctx)) & mask)

    return executor(decoded, merge)


def _move_half(decoded: Decoded, *, to_high: bool, from_high: bool) -> Executor:
    """MOVLPS, MOVHPS, MOVLHPS, MOVHLPS and the forms for doubles: 64 bits in or out of half a register."""
    read, write = reader(decoded, 1), writer(decoded, 0)
    if is_memory(decoded, 0):
        if from_high:
            return executor(decoded, lambda ctx: write(ctx, read(ctx) >> 64))
        return executor(decoded, lambda ctx: write(ctx, read(ctx) & MASK64))
    current = reader(decoded, 0)
    source_shift = 64 if from_high and not is_memory(decoded, 1) else 0

    def replace_high(ctx: Emulation) -> None:
        value = read(ctx) >> source_shift & MASK64
        write(ctx, current(ctx) & MASK64 | value << 64)

    def replace_low(ctx: Emulation) -> None:
        value = read(ctx) >> source_shift & MASK64
        write(ctx, current(ctx) & _HIGH_HALF | value)

    return executor(decoded, replace_high if to_high else replace_low)


def _duplicate(decoded: Decoded, places: tuple[int, ...]) -> Executor:
    """MOVDDUP, MOVSHDUP and MOVSLDUP: the bytes at *places* of the source."""
    read, write, select = reader(decoded, 1), writer(decoded, 0), selector(places)
    return executor(decoded, lambda ctx: write(ctx, select(read(ctx), 0)))


def _byte_mask(decoded: Decoded) -> Executor:
    """PMOVMSKB: the top bit of each byte."""
    read, write = reader(decoded, 1), writer(decoded, 0)

    def gather(ctx: Emulation) -> None:
        value = read(ctx)
        low = (value & _TOP_BITS) * _GATHER_TOP_BITS >> _GATHERED & 0xFF
        high = (value >> 64 & _TOP_BITS) * _GATHER_TOP_BITS >> _GATHERED & 0xFF
        write(ctx, low | high << 8)

    return executor(decoded, gather)


def _sign_mask(decoded: Decoded, lane: int) -> Executor:
    """MOVMSKPS and MOVMSKPD: the sign of each element."""
    read, write = reader(decoded, 1), writer(decoded, 0)
    shifts = [(lane * (number + 1) - 1, number) for number in range(vector_bits(decoded) // lane)]

    def gather(ctx: Emulation) -> None:
        value = read(ctx)
        write(ctx, sum((value >> shift & 1) << number for shift, number in shifts))

    return executor(decoded, gather)


def _masked_store(decoded: Decoded) -> Executor:
    """MASKMOVDQU and MASKMOVQ: bytes of operand 1 to DS:rDI, those whose mask byte in operand 2 has its top bit set.

    Bytes that are not selected are not accessed. The stores happen all or none.
    """
    (operand,) = decoded.accesses
    read, read_mask = reader(decoded, 1), reader(decoded, 2)
    size = operand_bytes(decoded, 1)
    top_bits = high_bits(8, 8 * size)
    address_mask = operand.address_mask

    def masked_store(ctx: Emulation) -> None:
        mask = (read_mask(ctx) & top_bits).to_bytes(size, "little")
        data = read(ctx).to_bytes(size, "little")
        start = effective_address(ctx.words, operand)
        runs = [(start + first & address_mask, data[first:end]) for first, end in _runs(mask)]
        for offset, part in runs:
            touch(ctx, operand.segment, offset, len(part), WRITE)
        for offset, part in runs:
            store_bytes(ctx, operand.segment, offset, part)

    return executor(decoded, masked_store)


def _runs(mask: bytes) -> list[tuple[int, int]]:
    """The beginnings and ends of runs of bytes that are not zero."""
    runs = []
    first = None
    for place, selected in enumerate((*mask, 0)):
        if selected and first is None:
            first = place
        elif not selected and first is not None:
            runs.append((first, place))
            first = None
    return runs


def _nothing(decoded: Decoded) -> Executor:
    """PREFETCHh and PREFETCHW, hints that access nothing and fault for nothing, and the fences."""
    return lambda ctx: None


def _places(*lanes: int, size: int) -> tuple[int, ...]:
    """The bytes of *lanes* of *size* bytes."""
    return tuple(size * lane + byte for lane in lanes for byte in range(size))


_ALIGNED_MOVES = (
    Mnemonic.MOVAPS, Mnemonic.MOVAPD, Mnemonic.MOVDQA, Mnemonic.MOVNTPS, Mnemonic.MOVNTPD, Mnemonic.MOVNTDQ,
    Mnemonic.MOVNTDQA, Mnemonic.MOVNTQ,
)  # fmt: skip
_UNALIGNED_MOVES = (Mnemonic.MOVUPS, Mnemonic.MOVUPD, Mnemonic.MOVDQU, Mnemonic.LDDQU)
_PREFETCHES = (
    Mnemonic.PREFETCHNTA, Mnemonic.PREFETCHT0, Mnemonic.PREFETCHT1, Mnemonic.PREFETCHT2, Mnemonic.PREFETCHW,
    Mnemonic.PREFETCHWT1, Mnemonic.PREFETCH,
)  # fmt: skip
_FENCES = (Mnemonic.LFENCE, Mnemonic.MFENCE, Mnemonic.SFENCE)

#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    **dict.fromkeys(_ALIGNED_MOVES, _move),
    **dict.fromkeys(_UNALIGNED_MOVES, partial(_move, aligned=False)),
    **dict.fromkeys((Mnemonic.MOVD, Mnemonic.MOVQ, Mnemonic.MOVQ2DQ, Mnemonic.MOVDQ2Q), _move_low),
    Mnemonic.MOVSS: partial(_move_scalar, size=4),
    # The string instruction of this name goes by its code.
    Mnemonic.MOVSD: partial(_move_scalar, size=8),
    Mnemonic.MOVLPS: partial(_move_half, to_high=False, from_high=False),
    Mnemonic.MOVLPD: partial(_move_half, to_high=False, from_high=False),
    Mnemonic.MOVHPS: partial(_move_half, to_high=True, from_high=True),
    Mnemonic.MOVHPD: partial(_move_half, to_high=True, from_high=True),
    Mnemonic.MOVLHPS: partial(_move_half, to_high=True, from_high=False),
    Mnemonic.MOVHLPS: partial(_move_half, to_high=False, from_high=True),
    Mnemonic.MOVDDUP: partial(_duplicate, places=_places(0, 0, size=8)),
    Mnemonic.MOVSLDUP: partial(_duplicate, places=_places(0, 0, 2, 2, size=4)),
    Mnemonic.MOVSHDUP: partial(_duplicate, places=_places(1, 1, 3, 3, size=4)),
    Mnemonic.PMOVMSKB: _byte_mask,
    Mnemonic.MOVMSKPS: partial(_sign_mask, lane=32),
    Mnemonic.MOVMSKPD: partial(_sign_mask, lane=64),
    Mnemonic.MASKMOVDQU: _masked_store,
    Mnemonic.MASKMOVQ: _masked_store,
    **dict.fromkeys((*_PREFETCHES, *_FENCES), _nothing),
}
