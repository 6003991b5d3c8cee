"""64-bit x86-64 ELF executables: a vmlinux, or a kernel of one's own.

Only the ELF header and the program headers are read; a vmlinux with gigabytes of debug information loads as
fast as one without. Segments go to their physical addresses (``p_paddr``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

from elftools.common.exceptions import ELFParseError
from elftools.common.utils import struct_parse
from elftools.elf.structs import ELFStructs

from lasskvm.errors import ImageError
from lasskvm.machine.boot.e820 import E820Map
from lasskvm.machine.boot.layout import BOOT_DATA_END, BOOT_DATA_START, FOUR_GIB, MIB
from lasskvm.memory import GuestMemory

__all__ = ["ELF_MAGIC", "Elf64", "ElfSegment", "load_elf64", "read_elf64"]

ELF_MAGIC = b"\x7fELF"
_EI_CLASS, _EI_DATA = 4, 5
_ELFCLASS64 = 2
_ELFDATA2LSB = 1
_IDENT_SIZE = 16
_HEADER_SIZE = 64
_PROGRAM_HEADER_SIZE = 56
_ZEROS = bytes(MIB)


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
class Elf64:
    """The headers of a 64-bit x86-64 ELF file; *type* is "ET_EXEC", "ET_DYN", ..., *entry* is ``e_entry``."""

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


def read_elf64(stream: BinaryIO) -> Elf64:
    """Read the headers of the ELF file in *stream* and check that its segments lie in the file.

    Raises :class:`ImageError`, whose sentence goes on after the file's name: not ELF, 32-bit, another
    machine, truncated or damaged.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    ident = stream.read(_IDENT_SIZE)
    if ident[: len(ELF_MAGIC)] != ELF_MAGIC:
        raise ImageError("is not an ELF file; give an x86-64 ELF executable")
    if size < _HEADER_SIZE:
        raise ImageError("is a truncated ELF file: it ends inside the ELF header; get or build it again")
    if ident[_EI_CLASS] != _ELFCLASS64 or ident[_EI_DATA] != _ELFDATA2LSB:
        raise ImageError("is not a 64-bit little-endian ELF file; build it for x86-64")
    try:
        return _read_headers(stream, size)
    except ELFParseError as error:
        raise ImageError(
            "is a truncated ELF file: it ends inside its headers; get or build it again"
        ) from error


def _read_headers(stream: BinaryIO, size: int) -> Elf64:
    structs = ELFStructs(little_endian=True, elfclass=64)
    structs.create_basic_structs()
    header: Any = struct_parse(structs.Elf_Ehdr, stream, 0)
    structs.create_advanced_structs(header["e_type"], header["e_machine"], header["e_ident"]["EI_OSABI"])
    if header["e_machine"] != "EM_X86_64":
        machine = str(header["e_machine"]).removeprefix("EM_")
        raise ImageError(f"is an ELF file for another machine ({machine}); build it for x86-64")
    count, offset = header["e_phnum"], header["e_phoff"]
    if count and header["e_phentsize"] != _PROGRAM_HEADER_SIZE:
        raise ImageError(
            "is a damaged ELF file: its program headers have a wrong size; get or build it again"
        )
    if offset + count * _PROGRAM_HEADER_SIZE > size:
        raise ImageError(
            "is a truncated ELF file: its program headers lie behind its end; get or build it again"
        )
    segments = []
    for index in range(count):
        raw: Any = struct_parse(structs.Elf_Phdr, stream, offset + index * _PROGRAM_HEADER_SIZE)
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
    elf = Elf64(str(header["e_type"]), header["e_entry"], tuple(segments))
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


def load_elf64(elf: Elf64, stream: BinaryIO, memory: GuestMemory, e820: E820Map) -> int:
    """Write the PT_LOAD segments of *elf* into *memory*, what the file does not fill as zeros; the entry's
    gpa.

    ``e_entry`` may be physical (Linux: ``startup_64``) or virtual; a virtual one is translated through its
    segment. Raises :class:`ImageError`, whose sentence goes on after the file's name, and leaves memory
    alone then: nothing to load, not an executable, segments that overlap each other, the loader's own data
    or anything but RAM below 4 GiB, an entry point in no segment.
    """
    if elf.type != "ET_EXEC":
        raise ImageError(
            f"is of ELF type {elf.type}, not an executable at a fixed address; link it with -static -no-pie"
        )
    segments = elf.loadable
    if not segments:
        raise ImageError("has no PT_LOAD segment, so there is nothing to run; link it with one")
    for segment in segments:
        _check_placement(segment, e820)
    for lower, upper in pairwise(segments):
        if lower.physical_end > upper.physical_address:
            raise ImageError(
                f"has segments that overlap at physical address {upper.physical_address:#x}; "
                "give every segment its own load address (AT in the linker script)"
            )
    entry = _physical_entry(elf)
    for segment in segments:
        stream.seek(segment.offset)
        memory.write(segment.physical_address, stream.read(segment.file_size))
        for gpa in range(segment.physical_address + segment.file_size, segment.physical_end, len(_ZEROS)):
            memory.write(gpa, memoryview(_ZEROS)[: segment.physical_end - gpa])
    return entry


def _check_placement(segment: ElfSegment, e820: E820Map) -> None:
    where = f"at {segment.physical_address:#x} to {segment.physical_end - 1:#x}"
    if segment.physical_address < BOOT_DATA_END and segment.physical_end > BOOT_DATA_START:
        raise ImageError(f"loads {where}, where the loader's own data lie; link it to load at 1 MiB or above")
    if segment.physical_end > FOUR_GIB:
        raise ImageError(
            f"loads {where}, beyond the first 4 GiB; set its load address (AT in the linker script)"
        )
    if not e820.is_ram(segment.physical_address, segment.memory_size):
        raise ImageError(
            f"loads {where}, which is not all guest RAM; "
            "give the guest more memory or change the load address"
        )


def _physical_entry(elf: Elf64) -> int:
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
