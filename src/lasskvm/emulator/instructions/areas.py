"""Memory operands of many bytes: areas that an instruction names by their first byte.

Each access is all or nothing. An instruction that makes several has the area located first: after that none can fault.
"""

from __future__ import annotations

from lasskvm.emulator.accessors import address_of
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import Pieces, load_bytes, locate, store_bytes, touch
from lasskvm.emulator.decode import Decoded, stack_flag
from lasskvm.emulator.instructions.vector_operands import check_aligned
from lasskvm.lass import WRITE

__all__ = ["Area"]

_ALIGNMENT = 16


class Area:
    """*size* bytes, up to a page, *start* bytes into the explicit memory operand of *decoded*."""

    def __init__(self, decoded: Decoded, size: int, start: int = 0) -> None:
        operand = decoded.operand
        assert operand is not None
        self._size, self._start = size, start
        self._segment = operand.segment
        self._offset = address_of(decoded)
        self._flags = stack_flag(decoded)

    def check_aligned(self, ctx: Emulation, flags: int = 0, alignment: int = _ALIGNMENT) -> None:
        """#GP(0) when the area is misaligned; faults of segment and linear address come first.

        *flags* has ``WRITE`` for an area that is to be stored to.
        """
        offset = self._offset(ctx.words) + self._start
        check_aligned(ctx, self._segment, offset, self._size, self._flags | flags, alignment)

    def touch(self, ctx: Emulation) -> None:
        """Make sure that every byte can be stored."""
        offset = self._offset(ctx.words) + self._start
        touch(ctx, self._segment, offset, self._size, self._flags | WRITE)

    def locate(self, ctx: Emulation) -> Pieces:
        """The same, for ``load_located()`` and ``store_located()`` of :mod:`lasskvm.emulator.data_access`."""
        offset = self._offset(ctx.words) + self._start
        return locate(ctx, self._segment, offset, self._size, self._flags | WRITE)

    def load(self, ctx: Emulation) -> bytes:
        """Load the area."""
        return load_bytes(ctx, self._segment, self._offset(ctx.words) + self._start, self._size, self._flags)

    def store(self, ctx: Emulation, data: bytes, position: int = 0) -> None:
        """Store *data*, *position* bytes into the area."""
        offset = self._offset(ctx.words) + self._start + position
        store_bytes(ctx, self._segment, offset, data, self._flags)
