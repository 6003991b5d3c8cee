"""What Linux finds in memory at its 64-bit entry: boot_params, the command line and the initrd.

Sources: Documentation/arch/x86/boot.rst (fields, order of steps) and zero-page.rst (layout of ``struct
boot_params``).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from lasskvm.errors import ImageError
from lasskvm.machine.boot.e820 import E820Map
from lasskvm.machine.boot.layout import (
    BOOT_PARAMS_ADDRESS,
    COMMAND_LINE_ADDRESS,
    COMMAND_LINE_ROOM,
    FOUR_GIB,
    LEGACY_HOLE_END,
    MIB,
)
from lasskvm.machine.boot.setup_header import CMDLINE_SIZE, HEADER_START, LOADED_HIGH, SetupHeader
from lasskvm.memory import PAGE_SIZE, GuestMemory

__all__ = ["PROGRAM_STATUS_PORT", "Initrd", "load_initrd", "write_boot_params"]

#: One byte written to this I/O port ends the VM with exactly that exit status, 0 to 255. It lies behind the
#: debug-exit ports 0xf4 to 0xf7, whose encoding ``(value << 1) | 1`` can express neither success nor a status
#: above 127.
PROGRAM_STATUS_PORT = 0xF8

#: type_of_loader for a loader without a registered number.
_LOADER_UNDEFINED = 0xFF

# Offsets in struct boot_params (zero-page.rst)
_BOOT_PARAMS_SIZE = 4096
_EXT_RAMDISK_IMAGE = 0x0C0
_EXT_RAMDISK_SIZE = 0x0C4
_EXT_CMD_LINE_PTR = 0x0C8
_E820_ENTRIES = 0x1E8
_E820_TABLE = 0x2D0

_MASK32 = (1 << 32) - 1


@dataclass(frozen=True)
class Initrd:
    """Where the initrd lies: *size* bytes at *gpa*; both 0 when there is none."""

    gpa: int = 0
    size: int = 0


def load_initrd(
    source: Path | bytes | None, memory: GuestMemory, e820: E820Map, header: SetupHeader, kernel_end: int
) -> Initrd:
    """Put the initrd, a file or its bytes, as high as the kernel takes it: below ``initrd_addr_max`` and 4
    GiB.

    *kernel_end* is the first gpa behind the kernel. Raises :class:`ImageError` when the file cannot be read
    or there is no room.
    """
    if source is None:
        return Initrd()
    if isinstance(source, bytes):
        gpa = _initrd_address("the initrd", len(source), e820, header, kernel_end)
        memory.write(gpa, source)
        return Initrd(gpa, len(source))
    try:
        with source.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            gpa = _initrd_address(f"initrd {source}", size, e820, header, kernel_end)
            data = stream.read(size)
    except OSError as error:
        raise ImageError(
            f"initrd {source} cannot be read ({error.strerror}); give a readable file"
        ) from error
    memory.write(gpa, data)
    return Initrd(gpa, len(data))


def _initrd_address(name: str, size: int, e820: E820Map, header: SetupHeader, kernel_end: int) -> int:
    highest = min(header["initrd_addr_max"] + 1, FOUR_GIB)
    for ram in reversed(e820.ram):
        gpa = (min(ram.end, highest) - size) & -PAGE_SIZE
        if gpa >= max(ram.start, kernel_end, LEGACY_HOLE_END):
            return gpa
    raise ImageError(
        f"{name} has {size / MIB:.1f} MiB and does not fit beside the kernel into the guest's "
        f"{e820.ram_size / MIB:.1f} MiB of memory; give the guest more memory or use a smaller initrd"
    )


def write_boot_params(
    memory: GuestMemory, header: SetupHeader, e820: E820Map, command_line: str, initrd: Initrd
) -> None:
    """Write ``struct boot_params`` and the command line to their places in low memory.

    Raises :class:`ImageError` when the command line is longer than the kernel takes or holds a zero byte.
    """
    text = _encode_command_line(command_line, header)
    memory.write(COMMAND_LINE_ADDRESS, text)
    filled = header.replace(
        type_of_loader=_LOADER_UNDEFINED,
        loadflags=header["loadflags"] | LOADED_HIGH,
        cmd_line_ptr=COMMAND_LINE_ADDRESS,
        ramdisk_image=initrd.gpa & _MASK32,
        ramdisk_size=initrd.size & _MASK32,
        setup_data=0,
    )
    params = bytearray(_BOOT_PARAMS_SIZE)
    struct.pack_into("<I", params, _EXT_RAMDISK_IMAGE, initrd.gpa >> 32)
    struct.pack_into("<I", params, _EXT_RAMDISK_SIZE, initrd.size >> 32)
    struct.pack_into("<I", params, _EXT_CMD_LINE_PTR, COMMAND_LINE_ADDRESS >> 32)
    raw_header, table = filled.to_bytes(), e820.to_bytes()
    params[HEADER_START : HEADER_START + len(raw_header)] = raw_header
    params[_E820_ENTRIES] = len(e820.entries)
    params[_E820_TABLE : _E820_TABLE + len(table)] = table
    memory.write(BOOT_PARAMS_ADDRESS, params)


def _encode_command_line(command_line: str, header: SetupHeader) -> bytes:
    text = command_line.encode("utf-8", "surrogateescape")
    longest = min(header["cmdline_size"] or CMDLINE_SIZE, COMMAND_LINE_ROOM - 1)
    if len(text) > longest:
        raise ImageError(
            f"the command line has {len(text)} bytes, this kernel takes at most {longest}; shorten it"
        )
    if b"\0" in text:
        raise ImageError("the command line holds a zero byte, which would end it there; remove it")
    return text + b"\0"
