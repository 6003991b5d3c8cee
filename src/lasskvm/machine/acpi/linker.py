"""Blobs that hold addresses of each other and checksums, and that somebody else places.

QEMU's table loader is a file of fixed-size commands that firmware carries out: allocate memory for a file, add the
address of one file to a field in another, fix up a checksum. :class:`Linker` collects them, and either writes that
file, or does the same itself for addresses that are given.

Source: SeaBIOS, "Linker/loader" in its documentation of QEMU's interface, and the layout of its commands.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

__all__ = ["ChecksumField", "Linker", "LoaderCommand", "PointerField", "Zone", "checksum"]

NAME_SIZE = 56
COMMAND_SIZE = 128
_ALLOCATE = struct.Struct(f"<I{NAME_SIZE}sIB")
_ADD_POINTER = struct.Struct(f"<I{NAME_SIZE}s{NAME_SIZE}sIB")
_ADD_CHECKSUM = struct.Struct(f"<I{NAME_SIZE}sIII")


class LoaderCommand(IntEnum):
    """What firmware is to do."""

    ALLOCATE = 1
    ADD_POINTER = 2
    ADD_CHECKSUM = 3


class Zone(IntEnum):
    """Where firmware is to allocate: anywhere below 4 GiB, or where the RSDP is looked for."""

    HIGH = 1
    F_SEGMENT = 2


@dataclass(frozen=True)
class PointerField:
    """*size* bytes at *offset* in *file* hold an offset in *target*, to which *target*'s address is added."""

    file: str
    offset: int
    size: int
    target: str


@dataclass(frozen=True)
class ChecksumField:
    """The byte at *offset* in *file* makes the *length* bytes from *start* add up to 0."""

    file: str
    offset: int
    start: int
    length: int


@dataclass(frozen=True)
class _Allocation:
    alignment: int
    zone: Zone
    data: bytearray


def checksum(data: bytes | bytearray) -> int:
    """The byte that, added to *data*, makes its sum 0."""
    return -sum(data) & 0xFF


class Linker:
    """Files to be placed, and the fields to be fixed up afterwards."""

    def __init__(self) -> None:
        self._allocations: dict[str, _Allocation] = {}
        self._pointers: list[PointerField] = []
        self._checksums: list[ChecksumField] = []

    def add_file(self, name: str, data: bytearray, alignment: int, zone: Zone) -> None:
        """Have *data* placed at a multiple of *alignment*. It may be changed and grow until it is linked."""
        self._allocations[name] = _Allocation(alignment, zone, data)

    def add_pointer(self, file: str, offset: int, size: int, target: str, target_offset: int) -> None:
        """Let the field at *offset* in *file* point to *target_offset* in *target*."""
        data = self._allocations[file].data
        data[offset : offset + size] = target_offset.to_bytes(size, "little")
        self._pointers.append(PointerField(file, offset, size, target))

    def add_checksum(self, file: str, offset: int, start: int, length: int) -> None:
        """Let the byte at *offset* make *length* bytes from *start* add up to 0, once all pointers are set."""
        self._checksums.append(ChecksumField(file, offset, start, length))

    def size(self, name: str) -> int:
        """The length of a file in bytes."""
        return len(self._allocations[name].data)

    def link(self, addresses: Mapping[str, int]) -> dict[str, bytes]:
        """The contents of the files when they lie at *addresses*."""
        files = {name: bytearray(allocation.data) for name, allocation in self._allocations.items()}
        for pointer in self._pointers:
            data = files[pointer.file]
            field = slice(pointer.offset, pointer.offset + pointer.size)
            value = int.from_bytes(data[field], "little") + addresses[pointer.target]
            data[field] = value.to_bytes(pointer.size, "little")
        for field_ in self._checksums:
            data = files[field_.file]
            covered = data[field_.start : field_.start + field_.length]
            data[field_.offset] = data[field_.offset] + checksum(covered) & 0xFF
        return {name: bytes(data) for name, data in files.items()}

    def files(self) -> dict[str, bytes]:
        """The contents of the files before firmware has placed them."""
        return {name: bytes(allocation.data) for name, allocation in self._allocations.items()}

    def script(self) -> bytes:
        """The commands for firmware, which do what :meth:`link` does."""
        commands = [
            _ALLOCATE.pack(LoaderCommand.ALLOCATE, name.encode("ascii"), entry.alignment, entry.zone)
            for name, entry in self._allocations.items()
        ]
        commands += [
            _ADD_POINTER.pack(
                LoaderCommand.ADD_POINTER,
                pointer.file.encode("ascii"),
                pointer.target.encode("ascii"),
                pointer.offset,
                pointer.size,
            )
            for pointer in self._pointers
        ]
        commands += [
            _ADD_CHECKSUM.pack(
                LoaderCommand.ADD_CHECKSUM,
                field.file.encode("ascii"),
                field.offset,
                field.start,
                field.length,
            )
            for field in self._checksums
        ]
        return b"".join(command.ljust(COMMAND_SIZE, b"\0") for command in commands)
