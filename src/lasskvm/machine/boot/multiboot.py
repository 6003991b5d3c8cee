"""Multiboot 1: the header in the image, and what the image finds in memory.

Source: Multiboot Specification 0.6.96. Where it leaves something open this does what QEMU's loader does, since that
is what many images have been tried with: the command line starts with the image's path, an initrd is a module, modules
lie on page boundaries right behind the image, and a request for a video mode is passed over: the information says that
there is none.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import BinaryIO

from lasskvm.errors import ImageError
from lasskvm.machine.boot.e820 import E820Map
from lasskvm.machine.boot.elf import Elf, check_placement, place_elf
from lasskvm.machine.boot.information import Information, place_information
from lasskvm.machine.boot.layout import LEGACY_HOLE_END
from lasskvm.machine.boot.modules import Module, PlacedModule
from lasskvm.machine.boot.placement import Arena, Placement

__all__ = [
    "SEARCH_SIZE",
    "MultibootHeader",
    "find_multiboot_header",
    "multiboot_information",
    "place_multiboot",
]

#: The header lies in the first 8 KiB, on a 4-byte boundary (3.1).
SEARCH_SIZE = 8192
_HEADER_ALIGNMENT = 4
_HEADER_MAGIC = 0x1BADB002
#: Magic, flags and checksum, whose sum is 0.
_HEADER = struct.Struct("<III")
#: header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr.
_ADDRESSES = struct.Struct("<IIIII")
_MASK32 = (1 << 32) - 1

# Header flags (3.1.2). The lower 16 are requirements: a loader that does not know one must not start the image.
_PAGE_ALIGN = 1 << 0
_MEMORY_INFORMATION = 1 << 1
_VIDEO_MODE = 1 << 2
_REQUIREMENTS = 0xFFFF
_HAS_ADDRESSES = 1 << 16

#: What EAX holds at the entry (3.2).
_LOADER_MAGIC = 0x2BADB002
_LOADER_NAME = "lasskvm"
#: The first hard disk, without a partition, as QEMU says.
_BOOT_DEVICE = 0x8000FFFF

#: flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms (16 bytes), mmap_length, mmap_addr,
#: drives and config_table (12 bytes), boot_loader_name, apm_table to vbe_interface_len (20 bytes) (3.3).
_INFORMATION = struct.Struct("<IIIIIII16xII12xI20x")
#: mod_start, mod_end, string, reserved.
_MODULE = struct.Struct("<IIII")
#: Size of the rest, base_addr, length, type.
_MMAP_ENTRY = struct.Struct("<IQQI")
_MMAP_SIZE_FIELD = 4
_KIB = 1024


class _Has(IntFlag):
    """Information flags: which fields count."""

    MEMORY = 1 << 0
    BOOT_DEVICE = 1 << 1
    COMMAND_LINE = 1 << 2
    MODULES = 1 << 3
    MEMORY_MAP = 1 << 6
    LOADER_NAME = 1 << 9


@dataclass(frozen=True)
class _Addresses:
    header: int
    load: int
    load_end: int
    bss_end: int
    entry: int


@dataclass(frozen=True)
class MultibootHeader:
    """A header at *offset* in the file; *addresses* are its address fields, None when it leaves them to ELF."""

    offset: int
    flags: int
    addresses: _Addresses | None

    @property
    def says_where_to_load(self) -> bool:
        """Whether it has address fields, so that the file may be in any format."""
        return self.addresses is not None


def find_multiboot_header(start: bytes) -> MultibootHeader | None:
    """The first multiboot header with a right checksum in *start*, the first ``SEARCH_SIZE`` bytes of a file.

    Raises :class:`ImageError`, whose sentence goes on after the file's name, when it ends inside the header.
    """
    start = start[:SEARCH_SIZE]
    for offset in range(0, len(start) - _HEADER.size + 1, _HEADER_ALIGNMENT):
        magic, flags, checksum = _HEADER.unpack_from(start, offset)
        if magic != _HEADER_MAGIC or (magic + flags + checksum) & _MASK32:
            continue
        if not flags & _HAS_ADDRESSES:
            return MultibootHeader(offset, flags, None)
        if offset + _HEADER.size + _ADDRESSES.size > len(start):
            raise ImageError("ends inside its multiboot header; get or build it again")
        addresses = _Addresses(*_ADDRESSES.unpack_from(start, offset + _HEADER.size))
        return MultibootHeader(offset, flags, addresses)
    return None


def place_multiboot(
    header: MultibootHeader, elf: Elf | None, stream: BinaryIO, e820: E820Map
) -> tuple[list[Placement], int]:
    """Where the image in *stream* goes, by the addresses of its *header* or else as *elf*; and the entry's gpa.

    Raises :class:`ImageError`, whose sentence goes on after the file's name, when the header asks for something that
    is not there, or says what cannot be.
    """
    unknown = header.flags & _REQUIREMENTS & ~(_PAGE_ALIGN | _MEMORY_INFORMATION | _VIDEO_MODE)
    if unknown:
        raise ImageError(
            f"has a multiboot header that requires what does not exist (flags {unknown:#x}); build it for multiboot 1"
        )
    if header.addresses is not None:
        return _place_by_addresses(header, header.addresses, stream, e820)
    if elf is None:
        raise ImageError(
            "has a multiboot header without load addresses and is not an ELF file; "
            "link it to ELF or set bit 16 of the header's flags"
        )
    return place_elf(elf, stream, e820)


def _place_by_addresses(
    header: MultibootHeader, addresses: _Addresses, stream: BinaryIO, e820: E820Map
) -> tuple[list[Placement], int]:
    """The placement by the header's address fields (3.1.3), the "a.out kludge"."""
    file_size = stream.seek(0, os.SEEK_END)
    offset = header.offset - (addresses.header - addresses.load)
    if not 0 <= offset <= header.offset:
        raise _lie(
            f"it is at {addresses.header:#x} and the image is loaded from {addresses.load:#x} on, "
            f"but it is {header.offset:#x} bytes into the file"
        )
    size = (addresses.load_end or addresses.load + file_size - offset) - addresses.load
    if size <= 0:
        raise _lie(
            f"the image ends at {addresses.load_end:#x}, not behind its load address {addresses.load:#x}"
        )
    if offset + size > file_size:
        raise _lie(f"{size} bytes are to be loaded from offset {offset}, but the file has {file_size}")
    end = addresses.bss_end or addresses.load + size
    if end < addresses.load + size:
        raise _lie(f"the image ends at {addresses.load + size:#x}, behind the end of its bss at {end:#x}")
    check_placement(addresses.load, end, e820)
    if not addresses.load <= addresses.entry < end:
        raise _lie(f"the entry point at {addresses.entry:#x} is outside the image")
    stream.seek(offset)
    return [Placement(addresses.load, end, stream.read(size))], addresses.entry


def _lie(what: str) -> ImageError:
    return ImageError(f"has a multiboot header that cannot be right: {what}; fix its address fields")


def multiboot_information(
    image: Sequence[Placement], entry: int, command_line: str, modules: Sequence[Module], e820: E820Map
) -> Information:
    """What an *image* with that *entry* is told, and how it is entered (3.2, 3.3).

    *command_line* is whole: it starts with the name of the image. Raises as
    :func:`~lasskvm.machine.boot.information.place_information` does.
    """

    def describe(arena: Arena, placed: Sequence[PlacedModule]) -> int:
        return _write_information(arena, command_line, placed, e820)

    return place_information(image, entry, modules, e820, describe, eax=_LOADER_MAGIC)


def _write_information(
    arena: Arena, command_line: str, modules: Sequence[PlacedModule], e820: E820Map
) -> int:
    memory_map = b"".join(
        _MMAP_ENTRY.pack(
            _MMAP_ENTRY.size - _MMAP_SIZE_FIELD, known.start, known.end - known.start, known.type
        )
        for known in e820.entries
    )
    records = b"".join(
        _MODULE.pack(
            module.placement.start, module.placement.end, arena.add_text(module.module.command_line), 0
        )
        for module in modules
    )
    information = _INFORMATION.pack(
        sum(_Has),
        _ram_from(0, e820) // _KIB,
        _ram_from(LEGACY_HOLE_END, e820) // _KIB,
        _BOOT_DEVICE,
        arena.add_text(command_line),
        len(modules),
        arena.add(records),
        len(memory_map),
        arena.add(memory_map),
        arena.add_text(_LOADER_NAME),
    )
    return arena.add(information)


def _ram_from(start: int, e820: E820Map) -> int:
    """The bytes of RAM from gpa *start* to the first hole."""
    return sum(entry.end - entry.start for entry in e820.ram if entry.start == start)
