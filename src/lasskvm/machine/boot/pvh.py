"""PVH: the 32-bit entry point that an ELF file names in a Xen note, and ``struct hvm_start_info``.

Source: Xen, docs/misc/pvh.pandoc and xen/include/public/arch-x86/hvm/start_info.h, version 1. The image is entered in
32-bit protected mode without paging, EBX at the structure.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from lasskvm.errors import ImageError
from lasskvm.machine.boot.e820 import E820Map
from lasskvm.machine.boot.elf import ElfNote
from lasskvm.machine.boot.information import Information, place_information
from lasskvm.machine.boot.modules import Module, PlacedModule
from lasskvm.machine.boot.placement import Arena, Placement

__all__ = ["check_entry", "pvh_entry_point", "start_information"]

_NOTE_OWNER = "Xen"
#: XEN_ELFNOTE_PHYS32_ENTRY: the physical address of the entry point, in 4 or 8 bytes.
_NOTE_PHYS32_ENTRY = 18
_ENTRY_SIZES = (4, 8)

_MAGIC = 0x336EC578
_VERSION = 1
_FLAGS = 0
#: magic, version, flags, nr_modules, modlist_paddr, cmdline_paddr, rsdp_paddr, memmap_paddr, memmap_entries, reserved.
_START_INFO = struct.Struct("<IIIIQQQQII")
#: paddr, size, cmdline_paddr, reserved.
_MODULE = struct.Struct("<QQQQ")
#: addr, size, type, reserved.
_MEMMAP_ENTRY = struct.Struct("<QQII")


def pvh_entry_point(notes: Iterable[ElfNote]) -> int | None:
    """The gpa of the PVH entry point that *notes* name; None when there is none."""
    for note in notes:
        if (note.name, note.type) == (_NOTE_OWNER, _NOTE_PHYS32_ENTRY) and len(
            note.descriptor
        ) in _ENTRY_SIZES:
            return int.from_bytes(note.descriptor, "little")
    return None


def check_entry(entry: int, image: Sequence[Placement]) -> None:
    """Raise :class:`ImageError`, whose sentence goes on after the file's name, unless *entry* lies in *image*."""
    if not any(placement.start <= entry < placement.end for placement in image):
        raise ImageError(f"has its PVH entry point at {entry:#x}, outside all its segments; fix its Xen note")


def start_information(
    image: Sequence[Placement],
    entry: int,
    command_line: str,
    modules: Sequence[Module],
    e820: E820Map,
    rsdp: int | None,
) -> Information:
    """What an *image* with that *entry* is told, and how it is entered; *rsdp* is the gpa of the ACPI tables' root.

    Raises as :func:`~lasskvm.machine.boot.information.place_information` does.
    """

    def describe(arena: Arena, placed: Sequence[PlacedModule]) -> int:
        return _write_start_info(arena, command_line, placed, e820, rsdp or 0)

    return place_information(image, entry, modules, e820, describe)


def _write_start_info(
    arena: Arena, command_line: str, modules: Sequence[PlacedModule], e820: E820Map, rsdp: int
) -> int:
    records = b"".join(
        _MODULE.pack(
            module.placement.start,
            module.placement.end - module.placement.start,
            arena.add_text(module.module.command_line),
            0,
        )
        for module in modules
    )
    memory_map = b"".join(
        _MEMMAP_ENTRY.pack(known.start, known.end - known.start, known.type, 0) for known in e820.entries
    )
    start_info = _START_INFO.pack(
        _MAGIC,
        _VERSION,
        _FLAGS,
        len(modules),
        arena.add(records) if modules else 0,
        arena.add_text(command_line),
        rsdp,
        arena.add(memory_map),
        len(e820.entries),
        0,
    )
    return arena.add(start_info)
