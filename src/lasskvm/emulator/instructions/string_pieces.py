"""Many elements of a forward MOVS or STOS at once, within one page of each operand.

A piece is done here only where the result is that of its elements one by one: all of it is plain memory that may be
accessed, and no element reads what an earlier one of the same piece has written. Otherwise 0 is returned and nothing
has changed; the caller goes on with a single element, which finds out what is the matter. Callers see to it that no
data breakpoint is enabled and that alignment is not checked.

Source: Intel SDM volume 1, 7.3.9.3 (fast string operation).
"""

from __future__ import annotations

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import store_bytes
from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.linearize import linear_address, linearize
from lasskvm.emulator.string_registers import add_to_register
from lasskvm.lass import WRITE
from lasskvm.memory import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, SLOT_READONLY
from lasskvm.state import CPL, RDI, RFLAGS, RSI
from lasskvm.x86.registers import ES, RFLAGS_DF

__all__ = ["move_piece", "store_piece"]

_NOT_A_PIECE = 0
#: A single element is not worth being called a piece.
_LEAST_ELEMENTS = 2


def move_piece(ctx: Emulation, segment: int, size: int, mask: int, count: int) -> int:
    """Move up to *count* elements of *size* bytes from *segment*:RSI to ES:RDI; returns how many were moved.

    *mask* is that of the address size. The index registers move on; the count is left to the caller.
    """
    words = ctx.words
    if words[RFLAGS] & RFLAGS_DF:
        return _NOT_A_PIECE
    source, destination = words[RSI] & mask, words[RDI] & mask
    count = min(
        count,
        _bytes_to_page_end(ctx, segment, source, mask) // size,
        _bytes_to_page_end(ctx, ES, destination, mask) // size,
    )
    if count < _LEAST_ELEMENTS:
        return _NOT_A_PIECE
    found = _plain_memory(ctx, segment, source, size * count, 0)
    # In this order: where the source cannot be read, the destination's page is not to become dirty.
    target = _plain_memory(ctx, ES, destination, size * count, WRITE) if found else None
    if found is None or target is None:
        return _NOT_A_PIECE
    (view, start), (target_view, target_start) = found, target
    if view is target_view and start < target_start < start + size * count:
        # Elements behind this distance are copies of those before: they wait for the next piece.
        count = (target_start - start) // size
        if count < _LEAST_ELEMENTS:
            return _NOT_A_PIECE
    _store(ctx, destination, bytes(view[start : start + size * count]))
    add_to_register(words, RSI, size * count, mask)
    add_to_register(words, RDI, size * count, mask)
    return count


def store_piece(ctx: Emulation, value: int, size: int, mask: int, count: int) -> int:
    """Store *value* in up to *count* elements of *size* bytes at ES:RDI; as :func:`move_piece`."""
    words = ctx.words
    if words[RFLAGS] & RFLAGS_DF:
        return _NOT_A_PIECE
    destination = words[RDI] & mask
    count = min(count, _bytes_to_page_end(ctx, ES, destination, mask) // size)
    if count < _LEAST_ELEMENTS or _plain_memory(ctx, ES, destination, size * count, WRITE) is None:
        return _NOT_A_PIECE
    _store(ctx, destination, value.to_bytes(size, "little") * count)
    add_to_register(words, RDI, size * count, mask)
    return count


def _bytes_to_page_end(ctx: Emulation, segment: int, offset: int, mask: int) -> int:
    """The bytes from *segment*:*offset* to the end of the page, or to where the offset wraps."""
    in_page = PAGE_SIZE - (linear_address(ctx.words, segment, offset) & PAGE_MASK)
    return min(in_page, mask + 1 - offset)


def _plain_memory(
    ctx: Emulation, segment: int, offset: int, size: int, flags: int
) -> tuple[memoryview, int] | None:
    """The slot and the position in it of *size* bytes on one page; None unless they may be accessed and are memory."""
    words = ctx.words
    try:
        address = linearize(ctx, segment, offset, size, flags)
    except GuestFault:
        return None
    page = (ctx.tlb.stores if flags & WRITE else ctx.tlb.loads).get(address >> PAGE_SHIFT)
    if page is not None:
        return page[0], address + page[1]
    gpa, _, vector, _ = ctx.translate(words, ctx.memory, address, size, flags, words[CPL], words[RFLAGS])
    slot = None if vector else ctx.memory.find(gpa)
    if slot is None or (flags & WRITE and slot.flags & SLOT_READONLY):
        return None
    return slot.view, gpa - slot.gpa


def _store(ctx: Emulation, offset: int, data: bytes) -> None:
    address = linear_address(ctx.words, ES, offset)
    page = ctx.tlb.stores.get(address >> PAGE_SHIFT)
    if page is None:
        store_bytes(ctx, ES, offset, data)
        return
    start = address + page[1]
    page[0][start : start + len(data)] = data
