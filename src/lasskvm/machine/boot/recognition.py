"""What a file is and how it can be started: the first of its boot protocols in an order of preference.

- A setup header (bzImage): Linux's 64-bit protocol when there is a 64-bit vmlinux inside, else the 32-bit one, else
  multiboot.
- A multiboot header: multiboot, whatever the format; a 64-bit ELF file, too, is then entered in 32-bit mode, as by
  GRUB (QEMU refuses it).
- A 64-bit ELF file: Linux's 64-bit protocol. One with a PVH entry point is entered there, unless its notes say that it
  is Linux, which can do both.
- A 32-bit ELF file: PVH when it has that entry point, else Linux's 32-bit protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from lasskvm.errors import ImageError
from lasskvm.machine.boot.bzimage import BzImage, read_bzimage
from lasskvm.machine.boot.elf import ELF_MAGIC, Elf, read_elf, read_notes
from lasskvm.machine.boot.files import open_image
from lasskvm.machine.boot.multiboot import SEARCH_SIZE, MultibootHeader, find_multiboot_header
from lasskvm.machine.boot.pvh import pvh_entry_point
from lasskvm.machine.boot.setup_header import has_setup_header

__all__ = ["BootProtocol", "Recognized", "probe_image", "recognize"]

#: The owner of the notes that every vmlinux has, such as the build salt.
_LINUX_NOTES = "Linux"
_LONG_BITS = 64
#: Debian's Xen is packed like this, which GRUB unpacks.
_GZIP_MAGIC = b"\x1f\x8b"


class BootProtocol(StrEnum):
    """How an image is started."""

    #: Documentation/arch/x86/boot.rst, 64-bit boot protocol.
    LINUX64 = "linux64"
    #: The same, 32-bit boot protocol.
    LINUX32 = "linux32"
    #: Multiboot 1.
    MULTIBOOT = "multiboot"
    #: The entry point of Xen's PVH guests.
    PVH = "pvh"


@dataclass(frozen=True)
class Recognized:
    """A file whose headers have been read, and the *protocol* to start it by."""

    protocol: BootProtocol
    bzimage: BzImage | None = None
    elf: Elf | None = None
    multiboot: MultibootHeader | None = None
    pvh_entry: int | None = None

    @property
    def format(self) -> str:
        """ "bzImage", "ELF", or "raw" for a multiboot image that only its header describes."""
        if self.bzimage is not None:
            return "bzImage"
        return "raw" if self.elf is None else "ELF"


def probe_image(path: Path, boot_protocol: BootProtocol | None = None) -> BootProtocol:
    """The protocol by which :func:`~lasskvm.machine.boot.load_image` would start the image at *path*.

    Raises :class:`ImageError` as it does, as far as the headers tell.
    """
    with open_image(path) as stream:
        return recognize(stream, boot_protocol).protocol


def recognize(stream: BinaryIO, boot_protocol: BootProtocol | None = None) -> Recognized:
    """Read the headers of the image in *stream*; *boot_protocol* is the one to take instead of the preferred one.

    Raises :class:`ImageError`, whose sentence goes on after the file's name: no image, a damaged or truncated one, one
    that cannot be started here, or not by that protocol.
    """
    start = stream.read(SEARCH_SIZE)
    if not start:
        raise ImageError("is empty; give a kernel image")
    multiboot = find_multiboot_header(start)
    if has_setup_header(start):
        return _recognize_bzimage(read_bzimage(stream), multiboot, boot_protocol)
    if start.startswith(ELF_MAGIC):
        return _recognize_elf(read_elf(stream), stream, multiboot, boot_protocol)
    if start.startswith(_GZIP_MAGIC):
        raise ImageError("is compressed; unpack it with gunzip")
    if multiboot is None:
        raise ImageError("is neither a bzImage nor an ELF file nor a multiboot kernel; give a kernel image")
    return Recognized(_choose([BootProtocol.MULTIBOOT], boot_protocol), multiboot=multiboot)


def _recognize_bzimage(
    image: BzImage, multiboot: MultibootHeader | None, wanted: BootProtocol | None
) -> Recognized:
    protocols = []
    if image.has_vmlinux:
        protocols.append(BootProtocol.LINUX64)
    if image.has_32_bit_entry:
        protocols.append(BootProtocol.LINUX32)
    if multiboot is not None and multiboot.says_where_to_load:
        protocols.append(BootProtocol.MULTIBOOT)
    if not protocols:
        raise ImageError(
            "is a bzImage with neither a 64-bit Linux kernel nor a 32-bit entry point (code32_start is 0), so that it "
            "needs a BIOS to start; use an x86-64 kernel (CONFIG_X86_64=y)"
        )
    return Recognized(_choose(protocols, wanted), bzimage=image, multiboot=multiboot)


def _recognize_elf(
    elf: Elf, stream: BinaryIO, multiboot: MultibootHeader | None, wanted: BootProtocol | None
) -> Recognized:
    notes = list(read_notes(elf, stream))
    pvh_entry = pvh_entry_point(notes)
    is_linux = any(note.name == _LINUX_NOTES for note in notes)
    own = BootProtocol.LINUX64 if elf.bits == _LONG_BITS else BootProtocol.LINUX32
    protocols = [own]
    if pvh_entry is not None:
        protocols.insert(1 if is_linux else 0, BootProtocol.PVH)
    if multiboot is not None:
        protocols.insert(0, BootProtocol.MULTIBOOT)
    return Recognized(_choose(protocols, wanted), elf=elf, multiboot=multiboot, pvh_entry=pvh_entry)


def _choose(offered: list[BootProtocol], wanted: BootProtocol | None) -> BootProtocol:
    if wanted is None:
        return offered[0]
    if wanted not in offered:
        raise ImageError(f"cannot be started by {wanted}; choose from: {', '.join(offered)}")
    return wanted
