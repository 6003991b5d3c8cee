"""String instructions on memory: MOVS, CMPS, STOS, LODS and SCAS, alone and repeated.

A repeated instruction is executed in batches. Between two of them, and whenever something has to be looked at (a trap
flag, a breakpoint that was met, a device, code that was stored to), RIP stays on it and interrupts can come in; a fault
leaves the registers at the element that faults. Forward MOVS and STOS work on whole pieces of pages where that comes
to the same as element by element.

Source: Intel SDM volume 2, the instructions by name and REP; volume 1, 7.3.9; KVM's ``em_mov()`` with ``String``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from iced_x86 import Code, MemorySizeInfo, Mnemonic, Register

from lasskvm.emulator.accessors import register_reader, register_writer
from lasskvm.emulator.completion import Handler, complete
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import checks_alignment, load, store
from lasskvm.emulator.decode import SEGMENT_NUMBERS, Decoded
from lasskvm.emulator.faults import Interruption
from lasskvm.emulator.flags import KEPT, carry_flags
from lasskvm.emulator.instructions.string_pieces import move_piece, store_piece
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.emulator.string_registers import (
    add_to_register,
    address_mask,
    is_repeated,
    kept_bits,
    pause,
    skip_repetition,
)
from lasskvm.memory import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from lasskvm.state import DR7, RCX, RDI, RFLAGS, RSI
from lasskvm.x86.registers import ES, FS, RFLAGS_DF, RFLAGS_TF, RFLAGS_ZF

__all__ = ["BY_CODE", "TRANSFERS"]

#: Elements that one execution of a repeated instruction does at least, if nothing stops it.
_BATCH = 1024
#: From this count on, looking for a piece is worth its while.
_PIECE_ELEMENTS = 8
_COMPILED_INSTRUCTIONS = 1 << 10
_DR7_ENABLED = 0xFF
_ACCUMULATORS = {1: Register.AL, 2: Register.AX, 4: Register.EAX, 8: Register.RAX}

#: Does up to so many elements at once and tells how many; 0 when it has to be done element by element.
_Piece = Callable[[Emulation, int], int]
_Load = Callable[[Emulation, int], int]
_Store = Callable[[Emulation, int, int], None]


def _movs(decoded: Decoded) -> Executor:
    size, mask, segment = _size(decoded), address_mask(decoded), _source_segment(decoded)
    kept = kept_bits(mask)
    load_at, store_at = _loader(decoded, segment, size), _storer(decoded, size)

    def move(ctx: Emulation) -> None:
        words = ctx.words
        source, destination = words[RSI], words[RDI]
        store_at(ctx, destination & mask, load_at(ctx, source & mask))
        step = -size if words[RFLAGS] & RFLAGS_DF else size
        words[RSI] = source & kept | source + step & mask
        words[RDI] = destination & kept | destination + step & mask

    def move_many(ctx: Emulation, count: int) -> int:
        return move_piece(ctx, segment, size, mask, count)

    return _executor(decoded, move, piece=move_many, indices=(RSI, RDI))


def _stos(decoded: Decoded) -> Executor:
    size, mask = _size(decoded), address_mask(decoded)
    kept = kept_bits(mask)
    read_accumulator, store_at = register_reader(_ACCUMULATORS[size]), _storer(decoded, size)

    def store_element(ctx: Emulation) -> None:
        words = ctx.words
        destination = words[RDI]
        store_at(ctx, destination & mask, read_accumulator(ctx))
        step = -size if words[RFLAGS] & RFLAGS_DF else size
        words[RDI] = destination & kept | destination + step & mask

    def store_many(ctx: Emulation, count: int) -> int:
        return store_piece(ctx, read_accumulator(ctx), size, mask, count)

    return _executor(decoded, store_element, piece=store_many, indices=(RDI,))


def _lods(decoded: Decoded) -> Executor:
    size, mask = _size(decoded), address_mask(decoded)
    kept = kept_bits(mask)
    load_at = _loader(decoded, _source_segment(decoded), size)
    write_accumulator = register_writer(_ACCUMULATORS[size])

    def load_element(ctx: Emulation) -> None:
        words = ctx.words
        source = words[RSI]
        write_accumulator(ctx, load_at(ctx, source & mask))
        step = -size if words[RFLAGS] & RFLAGS_DF else size
        words[RSI] = source & kept | source + step & mask

    return _executor(decoded, load_element)


def _cmps(decoded: Decoded) -> Executor:
    size, mask = _size(decoded), address_mask(decoded)
    kept = kept_bits(mask)
    load_first, load_second = _loader(decoded, _source_segment(decoded), size), _loader(decoded, ES, size)
    flags_of = carry_flags(8 * size)

    def compare(ctx: Emulation) -> None:
        words = ctx.words
        source, destination, rflags = words[RSI], words[RDI], words[RFLAGS]
        first = load_first(ctx, source & mask)
        second = load_second(ctx, destination & mask)
        words[RFLAGS] = rflags & KEPT | flags_of(first, second, first - second)
        step = -size if rflags & RFLAGS_DF else size
        words[RSI] = source & kept | source + step & mask
        words[RDI] = destination & kept | destination + step & mask

    return _executor(decoded, compare, compares=True)


def _scas(decoded: Decoded) -> Executor:
    size, mask = _size(decoded), address_mask(decoded)
    kept = kept_bits(mask)
    read_accumulator, load_at = register_reader(_ACCUMULATORS[size]), _loader(decoded, ES, size)
    flags_of = carry_flags(8 * size)

    def scan(ctx: Emulation) -> None:
        words = ctx.words
        destination, rflags = words[RDI], words[RFLAGS]
        accumulator, element = read_accumulator(ctx), load_at(ctx, destination & mask)
        words[RFLAGS] = rflags & KEPT | flags_of(accumulator, element, accumulator - element)
        step = -size if rflags & RFLAGS_DF else size
        words[RDI] = destination & kept | destination + step & mask

    return _executor(decoded, scan, compares=True)


# ------------------------------------------------------------------------------------------------- repetition


def _executor(
    decoded: Decoded,
    element: Executor,
    *,
    compares: bool = False,
    piece: _Piece | None = None,
    indices: tuple[int, ...] = (),
) -> Executor:
    """Executes *decoded*, which does *element* once, or as often as its prefix says.

    *piece* does many elements at once; *indices* are the registers that :func:`skip_repetition` wants to know.
    """
    if not is_repeated(decoded):

        def once(ctx: Emulation) -> None:
            element(ctx)
            complete(ctx, decoded)

        return once
    mask = address_mask(decoded)
    batch = _comparing_batch(decoded, element, mask) if compares else _batch(element, piece, mask)

    def repeat(ctx: Emulation) -> None:
        words = ctx.words
        if not words[RCX] & mask:
            skip_repetition(words, mask, indices)
        elif not batch(ctx):
            pause(ctx)
            return
        complete(ctx, decoded)

    return repeat


def _batch(element: Executor, piece: _Piece | None, mask: int) -> Callable[[Emulation], bool]:
    """Does a batch of elements; tells whether the count has reached 0."""

    def run(ctx: Emulation) -> bool:
        words = ctx.words
        stepping = ctx.stepping or words[RFLAGS] & RFLAGS_TF
        # Data breakpoints and #AC concern single elements.
        by_piece = piece is not None and not stepping
        by_piece = by_piece and not words[DR7] & _DR7_ENABLED and not checks_alignment(ctx)
        left = 1 if stepping else _BATCH
        while left > 0:
            count = words[RCX] & mask
            done = piece(ctx, count) if piece and by_piece and count >= _PIECE_ELEMENTS else 0
            if not done:
                element(ctx)
                done = 1
            add_to_register(words, RCX, -done, mask)
            if done == count:
                return True
            if ctx.leave_block or ctx.watch_hits:
                # A device may have answered: its answers are for this element.
                ctx.mmio.commit()
                return False
            left -= done
        return False

    return run


def _comparing_batch(decoded: Decoded, element: Executor, mask: int) -> Callable[[Emulation], bool]:
    """As :func:`_batch`, for CMPS and SCAS: ends with the first element that differs (REPE) or matches (REPNE)."""
    kept = kept_bits(mask)
    zf_to_go_on = 0 if decoded.instruction.has_repne_prefix else RFLAGS_ZF

    def run(ctx: Emulation) -> bool:
        words = ctx.words
        # The manual, on REP: a fault restores the flags, though not the registers.
        flags = words[RFLAGS]
        try:
            for _ in range(1 if ctx.stepping or flags & RFLAGS_TF else _BATCH):
                element(ctx)
                count = words[RCX]
                words[RCX] = count & kept | count - 1 & mask
                if count & mask == 1 or words[RFLAGS] & RFLAGS_ZF != zf_to_go_on:
                    return True
                if ctx.leave_block or ctx.watch_hits:
                    ctx.mmio.commit()
                    break
        except Interruption:
            words[RFLAGS] = flags
            raise
        return False

    return run


# --------------------------------------------------------------------------------------------------- operands


def _size(decoded: Decoded) -> int:
    """The size of an element in bytes."""
    return int(MemorySizeInfo(decoded.instruction.memory_size).size)


def _source_segment(decoded: Decoded) -> int:
    return SEGMENT_NUMBERS[decoded.instruction.memory_segment]


def _loader(decoded: Decoded, segment: int, size: int) -> _Load:
    """A function that loads an element at an offset in *segment*."""
    if decoded.bits != 64 or segment >= FS:
        return lambda ctx, offset: load(ctx, segment, offset, size)
    last_start = PAGE_SIZE - size

    def load_flat(ctx: Emulation, offset: int) -> int:
        page = ctx.tlb.loads.get(offset >> PAGE_SHIFT)
        if page is None or offset & PAGE_MASK > last_start:
            return load(ctx, segment, offset, size)
        start = offset + page[1]
        return int.from_bytes(page[0][start : start + size], "little")

    return load_flat


def _storer(decoded: Decoded, size: int) -> _Store:
    """A function that stores an element at an offset in ES."""
    if decoded.bits != 64:
        return lambda ctx, offset, value: store(ctx, ES, offset, size, value)
    last_start = PAGE_SIZE - size

    def store_flat(ctx: Emulation, offset: int, value: int) -> None:
        page = ctx.tlb.stores.get(offset >> PAGE_SHIFT)
        if page is None or offset & PAGE_MASK > last_start:
            store(ctx, ES, offset, size, value)
            return
        start = offset + page[1]
        page[0][start : start + size] = value.to_bytes(size, "little")

    return store_flat


def _handler(builder: Builder) -> Handler:
    """For a form of a mnemonic that other instructions have too: its executor, made once."""
    compiled = lru_cache(maxsize=_COMPILED_INSTRUCTIONS)(builder)
    return lambda ctx, decoded: compiled(decoded)(ctx)


#: The builders of this module, by ``iced_x86.Mnemonic``.
TRANSFERS: dict[int, Builder] = {
    **dict.fromkeys((Mnemonic.MOVSB, Mnemonic.MOVSW, Mnemonic.MOVSQ), _movs),
    **dict.fromkeys((Mnemonic.CMPSB, Mnemonic.CMPSW, Mnemonic.CMPSQ), _cmps),
    **dict.fromkeys((Mnemonic.STOSB, Mnemonic.STOSW, Mnemonic.STOSD, Mnemonic.STOSQ), _stos),
    **dict.fromkeys((Mnemonic.LODSB, Mnemonic.LODSW, Mnemonic.LODSD, Mnemonic.LODSQ), _lods),
    **dict.fromkeys((Mnemonic.SCASB, Mnemonic.SCASW, Mnemonic.SCASD, Mnemonic.SCASQ), _scas),
}
#: The forms whose mnemonics SSE2 instructions have too, by ``iced_x86.Code``.
BY_CODE: dict[int, Handler] = {
    Code.MOVSD_M32_M32: _handler(_movs),
    Code.CMPSD_M32_M32: _handler(_cmps),
}
