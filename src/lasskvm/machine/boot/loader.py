"""Loading a guest image: find out what a file is, put it into guest memory, say how to enter it."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lasskvm.errors import ImageError
from lasskvm.machine.boot.bzimage import read_bzimage
from lasskvm.machine.boot.e820 import E820Map
from lasskvm.machine.boot.elf import ELF_MAGIC, Elf64, load_elf64, read_elf64
from lasskvm.machine.boot.entry import LongModeEntry, prepare_long_mode
from lasskvm.machine.boot.linux import Initrd, load_initrd, write_boot_params
from lasskvm.machine.boot.setup_header import SetupHeader, has_setup_header
from lasskvm.memory import GuestMemory

__all__ = ["LoadedImage", "load_image"]

#: A multiboot header lies in the first 8 KiB (Multiboot Specification 0.6.96, 3.1).
_DETECTION_SIZE = 8192
_MULTIBOOT_MAGIC = (0x1BADB002).to_bytes(4, "little")
_ELF_CLASS_OFFSET = 4
_ELFCLASS32 = 1


@dataclass(frozen=True)
class LoadedImage:
    """An image that lies in guest memory, ready to be entered."""

    entry: LongModeEntry
    #: "bzImage" or "ELF".
    format: str
    #: The version string of a bzImage, otherwise empty.
    version: str
    #: The first gpa of the image's segments and the first one behind them.
    start: int
    end: int
    initrd: Initrd


def load_image(
    path: Path, memory: GuestMemory, *, command_line: str = "", initrd: Path | bytes | None = None
) -> LoadedImage:
    """Load the bzImage or 64-bit ELF kernel at *path* into *memory*, with what it needs at its entry.

    The format is told by the content. *initrd* is a file or its bytes. Raises :class:`ImageError` for
    anything wrong with the files or without room in memory, :class:`~lasskvm.errors.MemoryLayoutError`
    without low memory.
    """
    e820 = E820Map.of_memory(memory)
    with _open_regular(path) as stream:
        kernel = _read_kernel(stream, e820)
        entry = load_elf64(kernel.elf, kernel.stream, memory, e820)
    segments = kernel.elf.loadable
    placed_initrd = load_initrd(initrd, memory, e820, kernel.header, segments[-1].physical_end)
    write_boot_params(memory, kernel.header, e820, command_line, placed_initrd)
    return LoadedImage(
        entry=prepare_long_mode(memory, entry),
        format=kernel.format,
        version=kernel.version,
        start=segments[0].physical_address,
        end=segments[-1].physical_end,
        initrd=placed_initrd,
    )


@dataclass(frozen=True)
class _Kernel:
    """A kernel whose headers have been read; *stream* holds the ELF file."""

    format: str
    version: str
    header: SetupHeader
    elf: Elf64
    stream: BinaryIO


@contextmanager
def _open_regular(path: Path) -> Iterator[BinaryIO]:
    """The file at *path*; every :class:`ImageError` raised while it is open gets the file's name in front."""
    try:
        with path.open("rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ImageError("is not a regular file; give a kernel image")
            yield stream
    except ImageError as error:
        raise ImageError(f"{path} {error}") from error
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror}); give a readable kernel image") from error


def _read_kernel(stream: BinaryIO, e820: E820Map) -> _Kernel:
    start = stream.read(_DETECTION_SIZE)
    if has_setup_header(start):
        image = read_bzimage(stream)
        try:
            vmlinux = io.BytesIO(image.unpack(e820.ram_size))
            return _Kernel("bzImage", image.version, image.header, read_elf64(vmlinux), vmlinux)
        except ImageError as error:
            raise ImageError(f"is a bzImage that cannot be used: {error}") from error
    _refuse_unsupported(start)
    return _Kernel("ELF", "", SetupHeader.synthesized(), read_elf64(stream), stream)


def _refuse_unsupported(start: bytes) -> None:
    if not start:
        raise ImageError("is empty; give a bzImage or a 64-bit ELF kernel")
    is_elf = start.startswith(ELF_MAGIC)
    is_elf32 = is_elf and start[_ELF_CLASS_OFFSET : _ELF_CLASS_OFFSET + 1] == bytes([_ELFCLASS32])
    if _MULTIBOOT_MAGIC in start and (is_elf32 or not is_elf):
        raise ImageError(
            "is a multiboot kernel, which is not supported yet; give a bzImage or a 64-bit ELF kernel"
        )
    if is_elf32:
        raise ImageError(
            "is a 32-bit ELF file, which is not supported yet; give a bzImage or a 64-bit ELF kernel"
        )
    if not is_elf:
        raise ImageError("is neither a bzImage nor an ELF file; give a kernel image")
