"""Sizes of memory as a person writes them on the command line."""

from __future__ import annotations

import re

from lasskvm.errors import MemoryLayoutError

__all__ = ["parse_size"]

_SIZE = re.compile(r"(?P<number>[0-9]+)(?P<unit>[KMG]?)(i?B)?", re.IGNORECASE | re.ASCII)
#: How far a unit shifts; without one, MiB are meant, as with --memory.
_SHIFTS = {"K": 10, "M": 20, "": 20, "G": 30}
_MAX_DIGITS = 15


def parse_size(text: str, option: str) -> int:
    """The bytes that *text*, the value of *option*, stands for: ``8M``, ``64K``, ``1G``; ``8`` is 8 MiB.

    Raises :class:`MemoryLayoutError` for anything else.

    >>> parse_size("8M", "--epc") == parse_size("8", "--epc") == 8 << 20
    True
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or len(match["number"]) > _MAX_DIGITS:
        raise MemoryLayoutError(f'"{text}" is no size; write {option} like 8M, 64K or 1G')
    return int(match["number"]) << _SHIFTS[match["unit"].upper()]
