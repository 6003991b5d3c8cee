# SPDX-License-Identifier: GPL-2.0-or-later
"""BTF, the type information Linux carries in its own image: as much of it as finds structure layouts.

Source: Documentation/bpf/btf.rst of the kernel.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from lasskvm.errors import ImageError

__all__ = ["Btf", "Struct"]

_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_MEMBER = struct.Struct("<III")
_MAGIC = 0xEB9F
_DAMAGED = "has type information this tool cannot read; adapt guests/module/btf.py to its BTF version"

_KIND_SHIFT, _KIND_MASK, _COUNT_MASK = 24, 0x1F, 0xFFFF
_KIND_STRUCT = 4
#: With the kind flag, the upper 8 bits of a member's offset are the width of a bit field.
_KIND_FLAG = 1 << 31
_BIT_OFFSET_MASK = (1 << 24) - 1

#: Bytes behind the common part of each kind of type: a constant, and one for each of its members.
_EXTRA = {
    1: (4, 0),  # INT
    2: (0, 0),  # PTR
    3: (12, 0),  # ARRAY
    4: (0, 12),  # STRUCT
    5: (0, 12),  # UNION
    6: (0, 8),  # ENUM
    7: (0, 0),  # FWD
    8: (0, 0),  # TYPEDEF
    9: (0, 0),  # VOLATILE
    10: (0, 0),  # CONST
    11: (0, 0),  # RESTRICT
    12: (0, 0),  # FUNC
    13: (0, 8),  # FUNC_PROTO
    14: (4, 0),  # VAR
    15: (0, 12),  # DATASEC
    16: (0, 0),  # FLOAT
    17: (4, 0),  # DECL_TAG
    18: (0, 0),  # TYPE_TAG
    19: (0, 12),  # ENUM64
}


@dataclass(frozen=True)
class Struct:
    """A structure: its size and the offsets of its members in bytes; an anonymous member is called ""."""

    name: str
    size: int
    offsets: dict[str, int]


class Btf:
    """The types in a .BTF section; raises :class:`ImageError` when it is not one."""

    def __init__(self, data: bytes) -> None:
        if len(data) < _HEADER.size:
            raise ImageError(_DAMAGED)
        magic, _version, _flags, header, type_start, type_size, string_start, string_size = (
            _HEADER.unpack_from(data)
        )
        if magic != _MAGIC or header + max(type_start + type_size, string_start + string_size) > len(data):
            raise ImageError(_DAMAGED)
        self._types = memoryview(data)[header + type_start :][:type_size]
        self._strings = data[header + string_start :][:string_size]

    def struct(self, name: str) -> Struct:
        """The structure called *name*; raises :class:`ImageError` when the kernel has none."""
        wanted = name.encode()
        for name_offset, info, size, start in self._walk():
            if (info >> _KIND_SHIFT) & _KIND_MASK == _KIND_STRUCT and self._string(name_offset) == wanted:
                return Struct(name, size, self._offsets(info, start))
        raise ImageError(
            f"has no struct {name} in its type information; use a kernel built with CONFIG_MODULES=y"
        )

    def _walk(self) -> Iterator[tuple[int, int, int, int]]:
        """Name, info word, size or type, and the place of what follows, for each type."""
        position = 0
        while position + _TYPE.size <= len(self._types):
            name_offset, info, size = _TYPE.unpack_from(self._types, position)
            position += _TYPE.size
            yield name_offset, info, size, position
            kind = (info >> _KIND_SHIFT) & _KIND_MASK
            if kind not in _EXTRA:
                raise ImageError(_DAMAGED)
            constant, each = _EXTRA[kind]
            position += constant + each * (info & _COUNT_MASK)

    def _offsets(self, info: int, start: int) -> dict[str, int]:
        offsets = {}
        for index in range(info & _COUNT_MASK):
            name_offset, _type, bits = _MEMBER.unpack_from(self._types, start + index * _MEMBER.size)
            if info & _KIND_FLAG:
                bits &= _BIT_OFFSET_MASK
            offsets[self._string(name_offset).decode()] = bits // 8
        return offsets

    def _string(self, offset: int) -> bytes:
        return self._strings[offset : self._strings.index(b"\0", offset)]
