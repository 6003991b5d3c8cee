"""Breakpoints (SDM volume 3B, 18.2): data breakpoints, which the translator lacks, and instruction breakpoints.

Pages that a data breakpoint touches get no lasting TLB entry, so each access to them comes to the fill, which asks
:func:`watch_hit`. Instruction and I/O breakpoints are left to the translator: :func:`translated_dr7`.
"""

from lasskvm.lass import WRITE
from lasskvm.state import DR0, DR7, Words

__all__ = ["instruction_hit", "translated_dr7", "watch_hit", "watched_page"]

_ENABLED = 0xFF
_PAGE_SHIFT = 12
_READ_WRITE_SHIFT = 16
_ON_WRITE, _ON_ACCESS = 1, 3


def translated_dr7(dr7: int) -> int:
    """*dr7* without its data breakpoints."""
    for number in range(4):
        if _is_data(dr7, number):
            dr7 &= 0xFFFFFFFF ^ (3 << (2 * number))
    return dr7


def watched_page(state: Words, address: int) -> bool:
    """Whether an enabled data breakpoint touches the page of *address*."""
    dr7 = state[DR7]
    if dr7 & _ENABLED == 0:
        return False
    found = False
    for number in range(4):
        if _is_data(dr7, number):
            start = state[DR0 + number]
            last = start + _length(dr7, number) - 1
            page = address >> _PAGE_SHIFT
            found = found or page == start >> _PAGE_SHIFT or page == last >> _PAGE_SHIFT
    return found


def watch_hit(state: Words, address: int, size: int, flags: int) -> int:
    """The data breakpoints that an access of *size* bytes at *address* meets, as bits 3:0 of DR6."""
    dr7 = state[DR7]
    hits = 0
    for number in range(4):
        if _is_data(dr7, number):
            start = state[DR0 + number]
            overlaps = address < start + _length(dr7, number) and address + size > start
            kind = (dr7 >> (_READ_WRITE_SHIFT + 4 * number)) & 3
            if overlaps and (kind == _ON_ACCESS or flags & WRITE != 0):
                hits |= 1 << number
    return hits


def instruction_hit(state: Words, address: int) -> int:
    """The instruction breakpoints at linear *address*, as bits 3:0 of DR6."""
    dr7 = state[DR7]
    hits = 0
    for number in range(4):
        enabled = (dr7 >> (2 * number)) & 3 != 0
        on_execution = (dr7 >> (_READ_WRITE_SHIFT + 4 * number)) & 0xF == 0
        if enabled and on_execution and state[DR0 + number] == address:
            hits |= 1 << number
    return hits


def _is_data(dr7: int, number: int) -> bool:
    enabled = (dr7 >> (2 * number)) & 3 != 0
    kind = (dr7 >> (_READ_WRITE_SHIFT + 4 * number)) & 3
    return enabled and (kind == _ON_WRITE or kind == _ON_ACCESS)


def _length(dr7: int, number: int) -> int:
    """Bytes that breakpoint *number* covers: LEN 0, 1, 3, 2 mean 1, 2, 4, 8."""
    field = (dr7 >> (_READ_WRITE_SHIFT + 2 + 4 * number)) & 3
    if field == 2:
        return 8
    return field + 1
