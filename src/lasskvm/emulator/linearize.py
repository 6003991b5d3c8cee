"""From segment and offset to linear address with the checks that precede paging.

In 64-bit mode the canonical rule and LASS apply, elsewhere segment types and limits do (in compatibility mode
LASS too). A failed check is #GP(0), or #SS(0) when the access goes through the stack segment or carries the
``STACK`` flag. The address that results is the one that the program forms, LAM's metadata included.

Source: Intel SDM volume 3A, 6.3 to 6.5 (limit and type checking); KVM's ``__linearize()``.
"""

from __future__ import annotations

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.mmu import check_linear
from lasskvm.emulator.modes import in_64bit_mode, in_protected_mode
from lasskvm.lass import FETCH, STACK, WRITE
from lasskvm.state import ATTRIBUTES, BASE, CPL, LIMIT, RFLAGS, SEGMENT_WORDS, SEGMENTS, Words
from lasskvm.x86.exceptions import GP
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.registers import (
    AR_CODE,
    AR_DB,
    AR_EXPAND_DOWN,
    AR_READABLE,
    AR_UNUSABLE,
    AR_WRITABLE,
    FS,
    MASK32,
    MASK64,
    SS,
)

__all__ = ["check_limit", "linear_address", "linearize", "segment_address"]

_MASK16 = 0xFFFF


def linear_address(words: Words, segment: int, offset: int) -> int:
    """The linear address of *offset* in segment register *segment*, unchecked."""
    base = words[SEGMENTS + SEGMENT_WORDS * segment + BASE]
    if in_64bit_mode(words):
        # Of the bases only those of FS and GS count (SDM volume 3A, 3.4.4).
        return (offset + base) & MASK64 if segment >= FS else offset & MASK64
    return (offset + base) & MASK32


def linearize(ctx: Emulation, segment: int, offset: int, size: int, flags: int) -> int:
    """The linear address of an access of *size* bytes at *segment*:*offset*.

    *flags* describe the access (:mod:`lasskvm.lass`). Raises :class:`GuestFault`: #GP(0) or #SS(0).
    """
    words = ctx.words
    if segment == SS and not in_64bit_mode(words):
        flags |= STACK
    address = segment_address(ctx, segment, offset, size, flags)
    vector = check_linear(words, address, size, flags, words[CPL], words[RFLAGS])
    if vector:
        raise GuestFault(vector, 0)
    return address


def segment_address(ctx: Emulation, segment: int, offset: int, size: int, flags: int) -> int:
    """The first half of :func:`linearize`: the address, after the checks of the segment only."""
    words = ctx.words
    if not in_64bit_mode(words):
        if segment == SS:
            flags |= STACK
        _check_segment(words, segment, offset, size, flags)
    return linear_address(words, segment, offset)


def check_limit(attributes: int, limit: int, offset: int, size: int) -> bool:
    """Whether *size* bytes at *offset* lie within a segment's *limit* (SDM volume 3A, 6.3)."""
    last = offset + max(size, 1) - 1
    expands_down = attributes & (AR_CODE | AR_EXPAND_DOWN) == AR_EXPAND_DOWN
    if expands_down:
        return offset > limit and last <= (MASK32 if attributes & AR_DB else _MASK16)
    return last <= limit


def _check_segment(words: Words, segment: int, offset: int, size: int, flags: int) -> None:
    first = SEGMENTS + SEGMENT_WORDS * segment
    attributes = words[first + ATTRIBUTES]
    vector = STACK_FAULT if flags & STACK else GP
    if in_protected_mode(words):
        is_code = attributes & AR_CODE != 0
        if attributes & AR_UNUSABLE:
            raise GuestFault(vector, 0)
        if flags & WRITE and (is_code or not attributes & AR_WRITABLE):
            raise GuestFault(vector, 0)
        if not flags & (WRITE | FETCH) and is_code and not attributes & AR_READABLE:
            raise GuestFault(vector, 0)
    if not check_limit(attributes, words[first + LIMIT], offset & MASK32, size):
        raise GuestFault(vector, 0)
