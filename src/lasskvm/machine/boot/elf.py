"""x86 ELF executables of both classes: a vmlinux, a multiboot kernel, or a kernel of one's own.

Only the ELF header, the program headers and, when asked for, the notes are read; a vmlinux with gigabytes of
debug information loads as fast as one without. Segments go to their physical addresses (``p_paddr``).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

from elftools.common.exceptions import ELFParseError
from elftools.common.utils import struct_parse
from elftools.elf.structs import ELFStructs

from lasskvm.errors import ImageError
from lasskvm.machine.boot.e820 import E820Map
from lasskvm.machine.boot.layout import FOUR_GIB, MIB
from lasskvm.machine.boot.placement import Placement

__all__ = [
    "ELF_MAGIC",
    "Elf",
    "ElfNote",
    "ElfSegment",
    "check_placement",
    "place_elf",
    "read_elf",
    "read_elf64",
    "read_notes",
]

ELF_MAGIC = b"\x7fELF"
_EI_CLASS, _EI_DATA = 4, 5
_ELFCLASS32, _ELFCLASS64 = 1, 2
_ELFDATA2LSB = 1
_IDENT_SIZE = 16


@dataclass(frozen=True)
class _Format:
    """What differs between the classes."""

    bits: int
    header_size: int
    program_header_size: int
    machine: str
    machine_name: str


_FORMATS = {
    _ELFCLASS32: _Format(32, 52, 32, "EM_386", "i386"),
    _ELFCLASS64: _Format(64, 64, 56, "EM_X86_64", "x86-64"),
}

#: ``Elf32_Nhdr``, the same in both classes: sizes of name and descriptor, and the type.
_NOTE = struct.Struct("<III")
_NOTE_ALIGNMENT = 4
#: Notes are short; what a vmlinux has is below 1 KiB.
_NOTES_LIMIT = MIB


@dataclass(frozen=True)
class ElfSegment:
    """One program header; *type* is its name in the ELF specification, such as "PT_LOAD"."""

    type: str
    offset: int
    file_size: int
    virtual_address: int
    physical_address: int
    memory_size: int

    @property
    def physical_end(self) -> int:
        """The first physical address behind the segment."""
        return self.physical_address + self.memory_size


@dataclass(frozen=True)
class Elf:
    """The headers of an x86 ELF file of *bits* 32 or 64; *type* is "ET_EXEC", "ET_DYN", ..., *entry* is
    ``e_entry``."""

    bits: int
    type: str
    entry: int
    segments: tuple[ElfSegment, ...]

    @property
    def loadable(self) -> tuple[ElfSegment, ...]:
        """The PT_LOAD segments that occupy memory, by physical address."""
        found = (segment for segment in self.segments if segment.type == "PT_LOAD" and segment.memory_size)
        return tuple(sorted(found, key=lambda segment: segment.physical_address))

    @property
    def needs_interpreter(self) -> bool:
        """Whether the file asks for a dynamic linker (PT_INTERP)."""
        return any(segment.type == "PT_INTERP" for segment in self.segments)


@dataclass(frozen=True)
class ElfNote:
    """One note; *name* is that of its owner, such as "Xen", who gives *type* and *descriptor* their meaning."""

    name: str
    type: int
    descriptor: bytes


def read_elf64(stream: BinaryIO) -> Elf:
    """:func:`read_elf` for a file that has to be a 64-bit one; raises :class:`ImageError` for any other, too."""
    stream.seek(0)
    ident = stream.read(_IDENT_SIZE)
    if ident.startswith(ELF_MAGIC) and len(ident) > _EI_CLASS and ident[_EI_CLASS] != _ELFCLASS64:
        raise ImageError("is not a 64-bit little-endian ELF file; build it for x86-64")
    return read_elf(stream)


def read_elf(stream: BinaryIO) -> Elf:
    """Read the headers of the ELF file in *stream* and check that its segments lie in the file.

    Raises :class:`ImageError`, whose sentence goes on after the file's name: not ELF, another machine,
    truncated or damaged.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    ident = stream.read(_IDENT_SIZE)
    if ident[: len(ELF_MAGIC)] != ELF_MAGIC:
        raise ImageError("is not an ELF file; give an x86-64 ELF executable")
    elf_format = _FORMATS.get(ident[_EI_CLASS]) if len(ident) == _IDENT_SIZE else None
    if len(ident) < _IDENT_SIZE or (elf_format is not None and size < elf_format.header_size):
        raise ImageError("is a truncated ELF file: it ends inside the ELF header; get or build it again")
    if elf_format is None or ident[_EI_DATA] != _ELFDATA2LSB:
        raise ImageError("is not a little-endian ELF file of 32 or 64 bits; build it for x86-64")
    try:
        return _read_headers(stream, size, elf_format)
    except ELFParseError as error:
        raise ImageError(
            "is a truncated ELF file: it ends inside its headers; get or build it again"
        ) from error


def _read_headers(stream: BinaryIO, size: int, elf_format: _Format) -> Elf:
    structs = ELFStructs(little_endian=True, elfclass=elf_format.bits)
    structs.create_basic_structs()
    header: Any = struct_parse(structs.Elf_Ehdr, stream, 0)
    structs.create_advanced_structs(header["e_type"], header["e_machine"], header["e_ident"]["EI_OSABI"])
    if header["e_machine"] != elf_format.machine:
        machine = str(header["e_machine"]).removeprefix("EM_")
        raise ImageError(
            f"is a {elf_format.bits}-bit ELF file for another machine ({machine}); "
            f"build it for {elf_format.machine_name}"
        )
    count, offset = header["e_phnum"], header["e_phoff"]
    if count and header["e_phentsize"] != elf_format.program_header_size:
        raise ImageError(
            "is a damaged ELF file: its program headers have a wrong size; get or build it again"
        )
    if offset + count * elf_format.program_header_size > size:
        raise ImageError(
            "is a truncated ELF file: its program headers lie behind its end; get or build it again"
        )
    segments = []
    for index in range(count):
        raw: Any = struct_parse(structs.Elf_Phdr, stream, offset + index * elf_format.program_header_size)
        segments.append(
            ElfSegment(
                type=str(raw["p_type"]),
                offset=raw["p_offset"],
                file_size=raw["p_filesz"],
                virtual_address=raw["p_vaddr"],
                physical_address=raw["p_paddr"],
                memory_size=raw["p_memsz"],
            )
        )
    elf = Elf(elf_format.bits, str(header["e_type"]), header["e_entry"], tuple(segments))
    for segment in elf.loadable:
        _check_file_range(segment, size)
    return elf


def _check_file_range(segment: ElfSegment, size: int) -> None:
    if segment.file_size > segment.memory_size:
        raise ImageError(
            "is a damaged ELF file: a segment is larger in the file than in memory; build it again"
        )
    if segment.file_size and segment.offset + segment.file_size > size:
        raise ImageError(
            f"is a truncated ELF file: it has {size} bytes, a segment ends at "
            f"{segment.offset + segment.file_size}; get or build it again"
        )


def read_notes(elf: Elf, stream: BinaryIO) -> Iterator[ElfNote]:
    """The notes in the PT_NOTE segments of *elf*, with 4-byte alignment as Linux and Xen write them.

    Raises :class:`ImageError`, whose sentence goes on after the file's name, when they do not lie in the file.
    """
    for segment in elf.segments:
        if segment.type == "PT_NOTE":
            stream.seek(min(segment.offset, FOUR_GIB))
            data = stream.read(min(segment.file_size, _NOTES_LIMIT))
            if len(data) < segment.file_size:
                raise ImageError(
                    f"is a damaged ELF file: it says that it has {segment.file_size} bytes of notes; "
                    "get or build it again"
                )
            yield from _parse_notes(data)


def _parse_notes(data: bytes) -> Iterator[ElfNote]:
    position = 0
    while position + _NOTE.size <= len(data):
        name_size, descriptor_size, kind = _NOTE.unpack_from(data, position)
        name = position + _NOTE.size
        descriptor = _note_aligned(name + name_size)
        end = descriptor + descriptor_size
        if end > len(data):
            raise ImageError("is a damaged ELF file: a note is cut off; get or build it again")
        owner = data[name : name + name_size].rstrip(b"\0").decode("ascii", "replace")
        yield ElfNote(owner, kind, data[descriptor:end])
        position = _note_aligned(end)


def _note_aligned(position: int) -> int:
    return -(-position // _NOTE_ALIGNMENT) * _NOTE_ALIGNMENT


def place_elf(elf: Elf, stream: BinaryIO, e820: E820Map) -> tuple[list[Placement], int]:
    """Where the PT_LOAD segments of *elf* go, by address, what the file does not fill as zeros; and the entry's gpa.

    ``e_entry`` may be physical (Linux: ``startup_64``) or virtual; a virtual one is translated through its
    segment. Raises :class:`ImageError`, whose sentence goes on after the file's name: nothing to load, not an
    executable, segments that overlap each other or anything but RAM below 4 GiB, an entry point in no segment.
    """
    if elf.type != "ET_EXEC":
        raise ImageError(
            f"is of ELF type {elf.type}, not an executable at a fixed address; link it with -static -no-pie"
        )
    segments = elf.loadable
    if not segments:
        raise ImageError("has no PT_LOAD segment, so there is nothing to run; link it with one")
    for segment in segments:
        check_placement(segment.physical_address, segment.physical_end, e820)
    for lower, upper in pairwise(segments):
        if lower.physical_end > upper.physical_address:
            raise ImageError(
                f"has segments that overlap at physical address {upper.physical_address:#x}; "
                "give every segment its own load address (AT in the linker script)"
            )
    entry = _physical_entry(elf)
    return [_place_segment(segment, stream) for segment in segments], entry


def check_placement(start: int, end: int, e820: E820Map) -> None:
    """Raise :class:`ImageError`, whose sentence goes on after the file's name, unless *start* to *end* is all RAM
    below 4 GiB."""
    where = f"at {start:#x} to {end - 1:#x}"
    if end > FOUR_GIB:
        raise ImageError(
            f"loads {where}, beyond the first 4 GiB; set its load address (AT in the linker script)"
        )
    if not e820.is_ram(start, end - start):
        raise ImageError(
            f"loads {where}, which is not all guest RAM; "
            "give the guest more memory or change the load address"
        )


def _place_segment(segment: ElfSegment, stream: BinaryIO) -> Placement:
    data = b""
    if segment.file_size:
        stream.seek(segment.offset)
        data = stream.read(segment.file_size)
    return Placement(segment.physical_address, segment.physical_end, data)


def _physical_entry(elf: Elf) -> int:
    for segment in elf.loadable:
        if segment.physical_address <= elf.entry < segment.physical_end:
            return elf.entry
    for segment in elf.loadable:
        offset = elf.entry - segment.virtual_address
        if 0 <= offset < segment.memory_size:
            return segment.physical_address + offset
    raise ImageError(
        f"has its entry point at {elf.entry:#x}, outside all its segments; fix its linker script"
    )
