"""What Linux finds in memory at its 32-bit or 64-bit entry: boot_params, the command line and the initrd.

Sources: Documentation/arch/x86/boot.rst (fields, order of steps) and zero-page.rst (layout of ``struct
boot_params``).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from lasskvm.errors import ImageError
from lasskvm.machine.boot.e820 import E820Map
from lasskvm.machine.boot.entry import BOOT_CS, BOOT_DS, ProtectedModeEntry, flat_gdt
from lasskvm.machine.boot.files import open_file, size_of
from lasskvm.machine.boot.layout import (
    BOOT_DATA_END,
    BOOT_DATA_START,
    BOOT_PARAMS_ADDRESS,
    COMMAND_LINE_ADDRESS,
    COMMAND_LINE_ROOM,
    FOUR_GIB,
    GDT_ADDRESS,
    LEGACY_HOLE_END,
    MIB,
    STACK_TOP,
)
from lasskvm.machine.boot.placement import Placement
from lasskvm.machine.boot.setup_header import HEADER_START, LOADED_HIGH, SetupHeader
from lasskvm.memory import PAGE_SIZE, GuestMemory

__all__ = [
    "PROGRAM_STATUS_PORT",
    "check_kernel_placement",
    "place_boot_params",
    "place_initrd",
    "prepare_protected_mode",
]

#: One byte written to this I/O port ends the VM with exactly that exit status, 0 to 255. It lies behind the
#: debug-exit ports 0xf4 to 0xf7, whose encoding ``(value << 1) | 1`` can express neither success nor a status
#: above 127.
PROGRAM_STATUS_PORT = 0xF8

#: type_of_loader for a loader without a registered number.
_LOADER_UNDEFINED = 0xFF

# Offsets in struct boot_params (zero-page.rst)
_BOOT_PARAMS_SIZE = 4096
_ACPI_RSDP_ADDRESS = 0x070
_EXT_RAMDISK_IMAGE = 0x0C0
_EXT_RAMDISK_SIZE = 0x0C4
_EXT_CMD_LINE_PTR = 0x0C8
_E820_ENTRIES = 0x1E8
_E820_TABLE = 0x2D0

_MASK32 = (1 << 32) - 1


def check_kernel_placement(image: Sequence[Placement]) -> None:
    """Raise :class:`ImageError`, whose sentence goes on after the file's name, when *image* is loaded where boot data
    lie."""
    for part in image:
        if part.start < BOOT_DATA_END and part.end > BOOT_DATA_START:
            raise ImageError(
                f"loads at {part.start:#x} to {part.end - 1:#x}, where the loader's own data lie; "
                "link it to load at 1 MiB or above"
            )


def place_initrd(
    source: Path | bytes | None, e820: E820Map, header: SetupHeader, kernel_end: int
) -> Placement | None:
    """Where the initrd, a file or its bytes, goes: as high as the kernel takes it, below 4 GiB. None without one.

    *kernel_end* is the first gpa behind the memory that the kernel works in. Raises :class:`ImageError` when the file
    cannot be read or there is no room.
    """
    if source is None:
        return None
    if isinstance(source, bytes):
        gpa = _initrd_address("the initrd", len(source), e820, header, kernel_end)
        return Placement.of(gpa, source)
    with open_file(source, "initrd") as stream:
        size = size_of(stream)
        gpa = _initrd_address(f"initrd {source}", size, e820, header, kernel_end)
        return Placement.of(gpa, stream.read(size))


def _initrd_address(name: str, size: int, e820: E820Map, header: SetupHeader, kernel_end: int) -> int:
    highest = min(header.initrd_limit, FOUR_GIB)
    for ram in reversed(e820.ram):
        gpa = (min(ram.end, highest) - size) & -PAGE_SIZE
        if gpa >= max(ram.start, kernel_end, LEGACY_HOLE_END):
            return gpa
    raise ImageError(
        f"{name} has {size / MIB:.1f} MiB and does not fit beside the kernel into the guest's "
        f"{e820.ram_size / MIB:.1f} MiB of memory; give the guest more memory or use a smaller initrd"
    )


def place_boot_params(
    header: SetupHeader,
    e820: E820Map,
    command_line: str,
    initrd: Placement | None,
    *,
    code32_start: int = 0,
    rsdp: int | None = None,
) -> list[Placement]:
    """``struct boot_params`` and the command line, in low memory.

    *code32_start* is the 32-bit entry point for a kernel that is entered there, *rsdp* the gpa of the ACPI tables'
    root; without it the kernel looks for them as on any PC. Raises :class:`ImageError` when the command line is longer
    than the kernel takes or holds a zero byte.
    """
    text = _encode_command_line(command_line, header)
    initrd_gpa = 0 if initrd is None else initrd.start
    initrd_size = 0 if initrd is None else len(initrd.data)
    filled = header.replace(
        type_of_loader=_LOADER_UNDEFINED,
        loadflags=header["loadflags"] | LOADED_HIGH,
        code32_start=code32_start or header["code32_start"],
        cmd_line_ptr=COMMAND_LINE_ADDRESS,
        ramdisk_image=initrd_gpa & _MASK32,
        ramdisk_size=initrd_size & _MASK32,
        setup_data=0,
    )
    params = bytearray(_BOOT_PARAMS_SIZE)
    struct.pack_into("<Q", params, _ACPI_RSDP_ADDRESS, rsdp or 0)
    struct.pack_into("<I", params, _EXT_RAMDISK_IMAGE, initrd_gpa >> 32)
    struct.pack_into("<I", params, _EXT_RAMDISK_SIZE, initrd_size >> 32)
    struct.pack_into("<I", params, _EXT_CMD_LINE_PTR, COMMAND_LINE_ADDRESS >> 32)
    raw_header, table = filled.to_bytes(), e820.to_bytes()
    params[HEADER_START : HEADER_START + len(raw_header)] = raw_header
    params[_E820_ENTRIES] = len(e820.entries)
    params[_E820_TABLE : _E820_TABLE + len(table)] = table
    return [Placement.of(COMMAND_LINE_ADDRESS, text), Placement.of(BOOT_PARAMS_ADDRESS, bytes(params))]


def _encode_command_line(command_line: str, header: SetupHeader) -> bytes:
    text = command_line.encode("utf-8", "surrogateescape")
    longest = min(header.command_line_limit, COMMAND_LINE_ROOM - 1)
    if len(text) > longest:
        raise ImageError(
            f"the command line has {len(text)} bytes, this kernel takes at most {longest}; shorten it"
        )
    if b"\0" in text:
        raise ImageError("the command line holds a zero byte, which would end it there; remove it")
    return text + b"\0"


def prepare_protected_mode(memory: GuestMemory, eip: int) -> ProtectedModeEntry:
    """Write the GDT of the 32-bit boot protocol into *memory* for an entry at gpa *eip*; say how to enter.

    CS is __BOOT_CS, the data segments are __BOOT_DS, ESI is at boot_params, the other registers are 0 but for ESP.
    Raises :class:`~lasskvm.errors.MemoryLayoutError` when there is no memory below 640 KiB.
    """
    gdt = flat_gdt(BOOT_CS, BOOT_DS)
    memory.write(GDT_ADDRESS, gdt)
    return ProtectedModeEntry(
        eip=eip,
        esp=STACK_TOP,
        esi=BOOT_PARAMS_ADDRESS,
        gdt_base=GDT_ADDRESS,
        gdt_limit=len(gdt) - 1,
        code_selector=BOOT_CS,
        data_selector=BOOT_DS,
    )
