"""bzImage: the compressed Linux kernel that distributions ship.

Its own 16-bit and 32-bit code is never run here: the vmlinux inside is unpacked by the host and entered
directly, which skips the slowest part of a boot. Source: Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import BinaryIO

from lasskvm.errors import ImageError
from lasskvm.machine.boot.decompress import MAX_VMLINUX_SIZE, decompress
from lasskvm.machine.boot.setup_header import (
    HEADER_LIMIT,
    VERSION_PAYLOAD,
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


@dataclass(frozen=True)
class BzImage:
    """A bzImage that passed the checks: its header, its version string and the still compressed payload."""

    header: SetupHeader
    #: What ``uname -r`` and more will say, such as "6.1.0 (builder@host) #1 SMP"; empty when the image has
    #: none.
    version: str
    payload: bytes

    def unpack(self, limit: int = MAX_VMLINUX_SIZE) -> bytes:
        """The vmlinux inside, at most *limit* bytes; raises as
        :func:`~lasskvm.machine.boot.decompress.decompress`."""
        return decompress(self.payload, limit)


def read_bzimage(stream: BinaryIO) -> BzImage:
    """Read and check the bzImage in *stream*, from its beginning.

    Raises :class:`ImageError`, whose sentence goes on after the file's name: truncated, without a 64-bit
    entry point, or from before boot protocol 2.08.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    header = SetupHeader.parse(stream.read(HEADER_LIMIT))
    if header["version"] < VERSION_PAYLOAD:
        raise ImageError(
            f"speaks boot protocol {_protocol(header)}, and 2.08 or newer is needed; "
            "use a kernel from 2008 or later"
        )
    if header["version"] < VERSION_XLOADFLAGS or not header["xloadflags"] & XLF_KERNEL_64:
        raise ImageError("is a bzImage without a 64-bit entry point; use an x86-64 kernel (CONFIG_X86_64=y)")
    start = (1 + (header["setup_sects"] or _DEFAULT_SETUP_SECTORS)) * _SECTOR + header["payload_offset"]
    length = header["payload_length"]
    if start + length > size:
        raise ImageError(
            f"is a truncated bzImage: it has {size} bytes, its payload ends at {start + length}; "
            "get the kernel again"
        )
    if not 0 < length <= MAX_VMLINUX_SIZE:
        raise ImageError(f"is a damaged bzImage: its payload has {length} bytes; get the kernel again")
    version = _version_string(stream, header)
    stream.seek(start)
    return BzImage(header, version, stream.read(length))


def _protocol(header: SetupHeader) -> str:
    major, minor = divmod(header["version"], 1 << 8)
    return f"{major}.{minor:02}"


def _version_string(stream: BinaryIO, header: SetupHeader) -> str:
    if not header["kernel_version"]:
        return ""
    stream.seek(_VERSION_STRING_BASE + header["kernel_version"])
    text = stream.read(_VERSION_STRING_ROOM).split(b"\0")[0].decode("ascii", "replace")
    return "".join(character for character in text if character.isprintable())
