"""bzImage: the format of compressed Linux kernels, which other programs have taken over.

A Linux kernel's own 16-bit and 32-bit code need not run: the vmlinux inside is unpacked by the host and entered
directly, which skips the slowest part of a boot. An image that has no vmlinux, such as memtest86+, is loaded as it is
and entered by the 32-bit boot protocol. Source: Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import BinaryIO

from lasskvm.errors import ImageError
from lasskvm.machine.boot.decompress import MAX_VMLINUX_SIZE, decompress
from lasskvm.machine.boot.e820 import E820Map
from lasskvm.machine.boot.elf import check_placement
from lasskvm.machine.boot.placement import Placement
from lasskvm.machine.boot.setup_header import (
    HEADER_LIMIT,
    LOADED_HIGH,
    VERSION_PREF_ADDRESS,
    VERSION_SYSSIZE,
    VERSION_XLOADFLAGS,
    XLF_KERNEL_64,
    SetupHeader,
)

__all__ = ["BzImage", "read_bzimage"]

_SECTOR = 512
#: A header from before there was a choice says 0 and means this.
_DEFAULT_SETUP_SECTORS = 4
#: ``kernel_version`` counts from the second sector.
_VERSION_STRING_BASE = 0x200
_VERSION_STRING_ROOM = 256
#: ``syssize`` counts in these.
_PARAGRAPH = 16
#: Where the protected-mode code of an image that is not relocatable is loaded.
_LOAD_ADDRESS = 0x100000


@dataclass(frozen=True)
class BzImage:
    """An image with a setup header: the header, its version string and its protected-mode code."""

    header: SetupHeader
    #: What ``uname -r`` and more will say, such as "6.1.0 (builder@host) #1 SMP"; empty when the image has
    #: none.
    version: str
    #: What follows the setup sectors; a vmlinux, when there is one, is somewhere inside, compressed.
    code: bytes

    @property
    def has_vmlinux(self) -> bool:
        """Whether it says that it has a 64-bit Linux kernel inside."""
        return self._is_64_bit and self.header["payload_length"] != 0

    @property
    def has_32_bit_entry(self) -> bool:
        """Whether it can be entered by the 32-bit boot protocol."""
        return bool(self.header["loadflags"] & LOADED_HIGH) and self.header["code32_start"] != 0

    @property
    def _is_64_bit(self) -> bool:
        header = self.header
        return header["version"] >= VERSION_XLOADFLAGS and bool(header["xloadflags"] & XLF_KERNEL_64)

    def payload(self) -> bytes:
        """The compressed vmlinux.

        Raises :class:`ImageError`, whose sentence goes on after the file's name, when there is none: not a 64-bit
        kernel, truncated or damaged.
        """
        if not self._is_64_bit:
            raise ImageError(
                "is a bzImage without a 64-bit entry point; use an x86-64 kernel (CONFIG_X86_64=y)"
            )
        start, length = self.header["payload_offset"], self.header["payload_length"]
        if start + length > len(self.code):
            raise ImageError(
                f"is a truncated bzImage: it has {len(self.code)} bytes of code, its payload ends at "
                f"{start + length}; get the kernel again"
            )
        if not 0 < length <= MAX_VMLINUX_SIZE:
            raise ImageError(f"is a damaged bzImage: its payload has {length} bytes; get the kernel again")
        return self.code[start : start + length]

    def unpack(self, limit: int = MAX_VMLINUX_SIZE) -> bytes:
        """The vmlinux inside, at most *limit* bytes; raises as :meth:`payload` and
        :func:`~lasskvm.machine.boot.decompress.decompress`."""
        return decompress(self.payload(), limit)

    def place(self, e820: E820Map) -> tuple[Placement, int, int]:
        """Where the protected-mode code goes, its 32-bit entry, and the end of the memory that it works in.

        Raises :class:`ImageError`, whose sentence goes on after the file's name, when it is truncated or there is not
        enough RAM.
        """
        header = self.header
        if header["version"] >= VERSION_SYSSIZE and (header["syssize"] - 1) * _PARAGRAPH >= len(self.code):
            raise ImageError(
                f"is a truncated bzImage: it has {len(self.code)} bytes of code and says "
                f"{header['syssize'] * _PARAGRAPH}; get it again"
            )
        start, entry = _LOAD_ADDRESS, header["code32_start"]
        works_from, works_to = start, start
        if header["version"] >= VERSION_PREF_ADDRESS and header["pref_address"]:
            works_from = header["pref_address"]
            works_to = works_from + header["init_size"]
            if header["relocatable_kernel"]:
                entry += works_from - start
                start = works_from
        placement = Placement.of(start, self.code)
        check_placement(start, placement.end, e820)
        if works_to > works_from:
            check_placement(works_from, works_to, e820)
        if not start <= entry < placement.end:
            raise ImageError(
                f"is a damaged bzImage: its entry point at {entry:#x} is outside its code; get it again"
            )
        return placement, entry, max(placement.end, works_to)


def read_bzimage(stream: BinaryIO) -> BzImage:
    """Read the image with a setup header in *stream*, from its beginning.

    Raises :class:`ImageError`, whose sentence goes on after the file's name, when it is truncated or damaged.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    header = SetupHeader.parse(stream.read(HEADER_LIMIT))
    start = (1 + (header["setup_sects"] or _DEFAULT_SETUP_SECTORS)) * _SECTOR
    if start >= size:
        raise ImageError(
            f"is a truncated bzImage: it has {size} bytes, its code begins at {start}; get the kernel again"
        )
    if size - start > MAX_VMLINUX_SIZE:
        raise ImageError(f"is a bzImage of {size} bytes, which no kernel has; get it again")
    version = _version_string(stream, header)
    stream.seek(start)
    return BzImage(header, version, stream.read())


def _version_string(stream: BinaryIO, header: SetupHeader) -> str:
    if not header["kernel_version"]:
        return ""
    stream.seek(_VERSION_STRING_BASE + header["kernel_version"])
    text = stream.read(_VERSION_STRING_ROOM).split(b"\0")[0].decode("ascii", "replace")
    return "".join(character for character in text if character.isprintable())
