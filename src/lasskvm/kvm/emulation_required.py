"""Which guest states direct execution cannot run exactly, so that the emulator runs them.

KVM does the same for what old processors cannot enter by VMX (``vmx->emulation_required``). Direct execution makes no
segment limit, type or null checks, so code outside 64-bit mode runs there only while they could not matter; it knows
no alignment checks; and in 64-bit mode it adds segment bases that a processor ignores.

Unusable (null) data segments are let through, since ordinary 32-bit programs have them in FS and GS: an access through
one is then not refused (``docs/differences.md``).
"""

from __future__ import annotations

from lasskvm.emulator.modes import in_64bit_mode, in_protected_mode
from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    CPL,
    CR0,
    LIMIT,
    RFLAGS,
    SEGMENT_WORDS,
    SEGMENTS,
    Words,
    segment_word,
)
from lasskvm.x86.registers import (
    AR_CODE,
    AR_DB,
    AR_EXPAND_DOWN,
    AR_READABLE,
    AR_UNUSABLE,
    AR_WRITABLE,
    CR0_AM,
    CS,
    DS,
    ES,
    GS,
    MASK32,
    RFLAGS_AC,
    SS,
)

__all__ = ["emulation_required"]

_USER_CPL = 3
#: Segment bases that do not count in 64-bit mode; direct execution adds them where an override names the segment.
_ES_BASE, _CS_BASE, _SS_BASE, _DS_BASE = (segment_word(number, BASE) for number in (ES, CS, SS, DS))


def emulation_required(words: Words) -> bool:
    """Whether the vCPU's state is one that only the emulator runs exactly."""
    if words[CPL] == _USER_CPL and words[RFLAGS] & RFLAGS_AC and words[CR0] & CR0_AM:
        return True
    if in_64bit_mode(words):
        return bool(words[_ES_BASE] or words[_CS_BASE] or words[_SS_BASE] or words[_DS_BASE])
    return not in_protected_mode(words) or not _segments_are_flat(words)


def _segments_are_flat(words: Words) -> bool:
    for number in range(GS + 1):
        first = SEGMENTS + SEGMENT_WORDS * number
        attributes = words[first + ATTRIBUTES]
        if attributes & AR_UNUSABLE:
            if number == CS:
                return False
            continue
        if words[first + LIMIT] != MASK32 or not _allows_everything(number, attributes):
            return False
    return True


def _allows_everything(number: int, attributes: int) -> bool:
    """Whether what code does with the segment cannot be refused by its type; for CS, also that it is of 32 bits."""
    if number == CS:
        return bool(attributes & AR_READABLE and attributes & AR_DB)
    return not attributes & AR_CODE and attributes & (AR_WRITABLE | AR_EXPAND_DOWN) == AR_WRITABLE
