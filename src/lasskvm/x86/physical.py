"""What every walk needs: guest-physical memory, and names for what a translation allows.

:func:`load_physical` and :func:`store_physical` are the seam of the compiled subset (``docs/architecture.md``): plain
Python calls methods of the memory object, compiled code has native versions of both in their place.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["PERM_ALL", "PERM_R", "PERM_W", "PERM_X", "PhysicalMemory", "load_physical", "store_physical"]

#: What a translation allows.
PERM_R = 1 << 0
PERM_W = 1 << 1
PERM_X = 1 << 2
PERM_ALL = PERM_R | PERM_W | PERM_X


class PhysicalMemory(Protocol):
    """What a walk needs of guest-physical memory; :class:`lasskvm.memory.GuestMemory` is one."""

    def load(self, gpa: int, size: int, /) -> int:
        """The little-endian value of *size* bytes at *gpa*; all ones where there is no memory."""
        ...

    def store(self, gpa: int, size: int, value: int, /) -> None:
        """Store *size* bytes at *gpa*; dropped where there is no memory."""
        ...


def load_physical(memory: PhysicalMemory, gpa: int, size: int) -> int:
    """The little-endian value of *size* bytes at *gpa*. Compiled code has a native version of it."""
    return memory.load(gpa, size)


def store_physical(memory: PhysicalMemory, gpa: int, size: int, value: int) -> None:
    """Store the little-endian *value* of *size* bytes at *gpa*. Compiled code has a native version of it."""
    memory.store(gpa, size, value)
