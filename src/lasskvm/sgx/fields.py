"""Reading fields out of the structures of SGX: little-endian integers, byte strings, and what has to be zero."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["field", "is_zero", "u16", "u32", "u64"]


def u16(data: bytes, offset: int) -> int:
    """The 16-bit integer at *offset*."""
    return int.from_bytes(data[offset : offset + 2], "little")


def u32(data: bytes, offset: int) -> int:
    """The 32-bit integer at *offset*."""
    return int.from_bytes(data[offset : offset + 4], "little")


def u64(data: bytes, offset: int) -> int:
    """The 64-bit integer at *offset*."""
    return int.from_bytes(data[offset : offset + 8], "little")


def field(data: bytes, offset: int, size: int) -> bytes:
    """*size* bytes at *offset*."""
    return bytes(data[offset : offset + size])


def is_zero(data: bytes, spans: Iterable[tuple[int, int]]) -> bool:
    """Whether all bytes of the (offset, size) *spans* are zero."""
    return not any(any(data[offset : offset + size]) for offset, size in spans)
