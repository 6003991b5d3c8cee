"""Data accesses of emulated instructions: segment, linear address, translation, then memory or MMIO.

:func:`load` and :func:`store` are what every instruction uses. Explicit accesses of the interpreter find their page in
the software TLB; what is not there, crosses a page, or is not plain memory goes the long way.

Source: KVM's ``segmented_read()`` and ``emulator_read_write()``; Intel SDM volume 3A, 7.15 (interrupt 17: #AC).
"""

from __future__ import annotations

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.faults import GuestFault, raise_linear_fault
from lasskvm.emulator.linearize import linearize, segment_address
from lasskvm.emulator.mmu import next_linear, untagged
from lasskvm.emulator.modes import in_64bit_mode
from lasskvm.emulator.watch import watch_hit
from lasskvm.lass import STACK, WRITE
from lasskvm.memory import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, SLOT_READONLY
from lasskvm.state import CPL, CR0, DR7, RFLAGS
from lasskvm.x86.exceptions import AC as ALIGNMENT_CHECK
from lasskvm.x86.registers import CR0_AM, RFLAGS_AC, SS

__all__ = [
    "Pieces",
    "checks_alignment",
    "load",
    "load_bytes",
    "load_located",
    "locate",
    "store",
    "store_bytes",
    "store_located",
    "touch",
]

#: Where an access goes, guest-physically: address and size of each part, one per page.
Pieces = list[tuple[int, int]]

_BUS_BYTES = 8
_DR7_ENABLED = 0xFF
_USER_CPL = 3
#: Operand sizes with an alignment of their own (SDM table 7-7); the others are made of smaller elements.
_ALIGNED_SIZES = (2, 4, 8)


def load(ctx: Emulation, segment: int, offset: int, size: int, flags: int = 0) -> int:
    """Load *size* bytes at *segment*:*offset* as a little-endian integer, at the current CPL.

    *flags* are those of :mod:`lasskvm.lass`; a load that a store to the same place follows has ``WRITE`` among them.
    Raises :class:`GuestFault`; nothing has been changed then, accessed and dirty bits aside.
    """
    tlb = ctx.tlb
    if tlb.enabled:
        address = segment_address(ctx, segment, offset, size, flags)
        page = (tlb.stores if flags & WRITE else tlb.loads).get(address >> PAGE_SHIFT)
        if page is not None and address & PAGE_MASK <= PAGE_SIZE - size:
            start = address + page[1]
            return int.from_bytes(page[0][start : start + size], "little")
    pieces = locate(ctx, segment, offset, size, flags)
    if len(pieces) == 1 and size <= _BUS_BYTES:
        gpa = pieces[0][0]
        if ctx.memory.find(gpa) is not None:
            return ctx.memory.load(gpa, size)
        ctx.leave_block = True
        return ctx.mmio.read(gpa, size)
    return int.from_bytes(b"".join([_load_piece(ctx, gpa, length) for gpa, length in pieces]), "little")


def store(ctx: Emulation, segment: int, offset: int, size: int, value: int, flags: int = 0) -> None:
    """Store the low *size* bytes of *value* at *segment*:*offset*, at the current CPL: all of them or none.

    Raises :class:`GuestFault`.
    """
    data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    tlb = ctx.tlb
    if tlb.enabled:
        address = segment_address(ctx, segment, offset, size, flags | WRITE)
        page = tlb.stores.get(address >> PAGE_SHIFT)
        if page is not None and address & PAGE_MASK <= PAGE_SIZE - size:
            start = address + page[1]
            page[0][start : start + size] = data
            return
    store_bytes(ctx, segment, offset, data, flags)


def load_bytes(ctx: Emulation, segment: int, offset: int, size: int, flags: int = 0) -> bytes:
    """Like :func:`load`, for up to a page of bytes."""
    pieces = locate(ctx, segment, offset, size, flags)
    return b"".join([_load_piece(ctx, gpa, length) for gpa, length in pieces])


def store_bytes(ctx: Emulation, segment: int, offset: int, data: bytes, flags: int = 0) -> None:
    """Like :func:`store`, for up to a page of bytes."""
    done = 0
    for gpa, length in locate(ctx, segment, offset, len(data), flags | WRITE):
        _store_piece(ctx, gpa, data[done : done + length])
        done += length


def touch(ctx: Emulation, segment: int, offset: int, size: int, flags: int = 0) -> None:
    """Make the checks and translations of an access of *size* bytes, without the access."""
    locate(ctx, segment, offset, size, flags)


def load_located(ctx: Emulation, pieces: Pieces, start: int, size: int) -> bytes:
    """Load *size* bytes, *start* bytes into what :func:`locate` has found for reading."""
    gpa, length = pieces[0]
    if start + size <= length:
        return _load_piece(ctx, gpa + start, size)
    return b"".join([_load_piece(ctx, gpa, length) for gpa, length in _part(pieces, start, size)])


def store_located(ctx: Emulation, pieces: Pieces, start: int, data: bytes) -> None:
    """Store *data*, *start* bytes into what :func:`locate` has found for writing."""
    gpa, length = pieces[0]
    if start + len(data) <= length:
        _store_piece(ctx, gpa + start, data)
        return
    done = 0
    for gpa, length in _part(pieces, start, len(data)):
        _store_piece(ctx, gpa, data[done : done + length])
        done += length


def _part(pieces: Pieces, start: int, size: int) -> Pieces:
    """The *size* bytes from *start* on."""
    part = []
    for gpa, length in pieces:
        taken = min(length - start, size)
        if taken > 0:
            part.append((gpa + start, taken))
            start, size = 0, size - taken
        else:
            start -= length
    return part


def locate(ctx: Emulation, segment: int, offset: int, size: int, flags: int = 0) -> Pieces:
    """Make the checks and translations of an access of up to a page, for several accesses to follow.

    Raises :class:`GuestFault` as they would; a read that writes follow has ``WRITE`` among its *flags*.
    """
    words = ctx.words
    address = segment_address(ctx, segment, offset, size, flags)
    first = PAGE_SIZE - (address & PAGE_MASK)
    if size <= first and not (size in _ALIGNED_SIZES and address % size):
        # Within a page the translation makes the checks of linear addresses, too.
        if segment == SS and not in_64bit_mode(words):
            flags |= STACK
        pieces = [(_translate(ctx, address, size, flags), size)]
    else:
        linearize(ctx, segment, offset, size, flags)
        if size in _ALIGNED_SIZES and address % size and checks_alignment(ctx):
            raise GuestFault(ALIGNMENT_CHECK, 0)
        pieces = [(_translate(ctx, address, min(size, first), flags), min(size, first))]
        if size > first:
            rest_gpa = _translate(ctx, next_linear(words, address, first), size - first, flags)
            pieces.append((rest_gpa, size - first))
    if words[DR7] & _DR7_ENABLED:
        ctx.watch_hits |= watch_hit(words, untagged(words, address, flags), size, flags)
    return pieces


def _translate(ctx: Emulation, address: int, size: int, flags: int) -> int:
    words = ctx.words
    gpa, _, vector, error_code = ctx.translate(
        words, ctx.memory, address, size, flags, words[CPL], words[RFLAGS]
    )
    if vector:
        raise_linear_fault(vector, error_code, untagged(words, address, flags))
    if ctx.tlb.enabled:
        ctx.tlb.keep(ctx.memory, address & ~PAGE_MASK, gpa & ~PAGE_MASK, flags & WRITE != 0)
    return gpa


def checks_alignment(ctx: Emulation) -> bool:
    """Whether misaligned data accesses raise #AC: CR0.AM, RFLAGS.AC, CPL 3."""
    words = ctx.words
    return bool(words[CPL] == _USER_CPL and words[RFLAGS] & RFLAGS_AC and words[CR0] & CR0_AM)


def _load_piece(ctx: Emulation, gpa: int, size: int) -> bytes:
    if ctx.memory.find(gpa) is not None:
        return ctx.memory.read(gpa, size)
    ctx.leave_block = True
    pieces = []
    for start in range(0, size, _BUS_BYTES):
        length = min(_BUS_BYTES, size - start)
        pieces.append(ctx.mmio.read(gpa + start, length).to_bytes(length, "little"))
    return b"".join(pieces)


def _store_piece(ctx: Emulation, gpa: int, data: bytes) -> None:
    slot = ctx.memory.find(gpa)
    if slot is not None and not slot.flags & SLOT_READONLY:
        ctx.memory.store_bytes(gpa, data)
        if gpa >> PAGE_SHIFT in ctx.tlb.code_pages:
            ctx.leave_block = True
        return
    ctx.leave_block = True
    for start in range(0, len(data), _BUS_BYTES):
        part = data[start : start + _BUS_BYTES]
        ctx.mmio.write(gpa + start, len(part), int.from_bytes(part, "little"))
