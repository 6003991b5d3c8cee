"""Loading a guest image: find out what a file is, put it into guest memory, say how to enter it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lasskvm.errors import ImageError
from lasskvm.machine.boot.bzimage import BzImage
from lasskvm.machine.boot.e820 import E820Map
from lasskvm.machine.boot.elf import place_elf, read_elf64
from lasskvm.machine.boot.entry import Entry, prepare_long_mode
from lasskvm.machine.boot.files import open_image
from lasskvm.machine.boot.linux import (
    check_kernel_placement,
    place_boot_params,
    place_initrd,
    prepare_protected_mode,
)
from lasskvm.machine.boot.modules import Module
from lasskvm.machine.boot.multiboot import multiboot_information, place_multiboot
from lasskvm.machine.boot.placement import Placement, write_all
from lasskvm.machine.boot.pvh import check_entry, start_information
from lasskvm.machine.boot.recognition import BootProtocol, Recognized, recognize
from lasskvm.machine.boot.setup_header import SetupHeader
from lasskvm.memory import GuestMemory

__all__ = ["Initrd", "LoadedImage", "LoadedModule", "load_image"]


@dataclass(frozen=True)
class Initrd:
    """Where Linux finds its initrd: *size* bytes at *gpa*; both 0 when there is none."""

    gpa: int = 0
    size: int = 0


@dataclass(frozen=True)
class LoadedModule:
    """A boot module in memory: *size* bytes at *gpa*, and what the image is told with it."""

    gpa: int
    size: int
    command_line: str


@dataclass(frozen=True)
class LoadedImage:
    """An image that lies in guest memory, ready to be entered."""

    entry: Entry
    #: "bzImage", "ELF" or "raw".
    format: str
    #: How it is started.
    protocol: BootProtocol
    #: The version string of a bzImage, otherwise empty.
    version: str
    #: The first gpa of the image's segments and the first one behind them.
    start: int
    end: int
    initrd: Initrd = Initrd()
    #: What a multiboot or PVH image finds beside itself, the initrd first.
    modules: tuple[LoadedModule, ...] = ()


def load_image(
    path: Path,
    memory: GuestMemory,
    *,
    command_line: str = "",
    initrd: Path | bytes | None = None,
    modules: Sequence[Module] = (),
    rsdp: int | None = None,
    e820: E820Map | None = None,
    boot_protocol: BootProtocol | None = None,
) -> LoadedImage:
    """Load the kernel at *path* into *memory*, with what it needs at its entry.

    What it is and how it is started is told by the content (:mod:`~lasskvm.machine.boot.recognition`), unless
    *boot_protocol* says how. *initrd* is a file or its bytes; for an image that is not started as Linux is, it is the
    first module. *rsdp* is the gpa of the ACPI tables' root. *e820* is the memory map, by default that of the slots.
    A multiboot image finds *path* before the command line, as with QEMU.

    The same call does the same again, whatever the guest has done to its memory. Raises :class:`ImageError` for
    anything wrong with the files or without room in memory, which is then as it was, and
    :class:`~lasskvm.errors.MemoryLayoutError` without low memory.
    """
    e820 = e820 or E820Map.of_memory(memory)
    with open_image(path) as stream:
        recognized = recognize(stream, boot_protocol)
        kernel = _place_kernel(recognized, stream, e820)
    if recognized.protocol in (BootProtocol.MULTIBOOT, BootProtocol.PVH):
        if initrd is not None:
            modules = [Module.of_initrd(initrd), *modules]
        return _load_flat(recognized, kernel, path, memory, command_line, modules, e820, rsdp)
    if modules:
        raise ImageError(f"{path} is started as Linux is, which knows no modules; give it an initrd")
    return _load_linux(recognized, kernel, memory, command_line, initrd, e820, rsdp)


@dataclass(frozen=True)
class _Kernel:
    """A kernel that has its place: its parts, its entry point, and the end of the memory that it works in."""

    parts: list[Placement]
    entry: int
    end: int
    header: SetupHeader


def _place_kernel(recognized: Recognized, stream: BinaryIO, e820: E820Map) -> _Kernel:
    header = SetupHeader.synthesized() if recognized.bzimage is None else recognized.bzimage.header
    match recognized.protocol:
        case BootProtocol.MULTIBOOT:
            assert recognized.multiboot is not None
            parts, entry = place_multiboot(recognized.multiboot, recognized.elf, stream, e820)
            return _Kernel(parts, entry, parts[-1].end, header)
        case BootProtocol.PVH:
            assert recognized.elf is not None
            assert recognized.pvh_entry is not None
            parts, _ = place_elf(recognized.elf, stream, e820)
            check_entry(recognized.pvh_entry, parts)
            return _Kernel(parts, recognized.pvh_entry, parts[-1].end, header)
        case BootProtocol.LINUX32 if recognized.bzimage is not None:
            part, entry, end = recognized.bzimage.place(e820)
            parts = [part]
        case BootProtocol.LINUX64 if recognized.bzimage is not None:
            parts, entry = _place_vmlinux(recognized.bzimage, e820)
            end = parts[-1].end
        case BootProtocol.LINUX64 | BootProtocol.LINUX32:
            assert recognized.elf is not None
            parts, entry = place_elf(recognized.elf, stream, e820)
            end = parts[-1].end
    check_kernel_placement(parts)
    return _Kernel(parts, entry, end, header)


def _place_vmlinux(image: BzImage, e820: E820Map) -> tuple[list[Placement], int]:
    try:
        vmlinux = io.BytesIO(image.unpack(e820.ram_size))
        return place_elf(read_elf64(vmlinux), vmlinux, e820)
    except ImageError as error:
        raise ImageError(f"is a bzImage that cannot be used: {error}") from error


def _load_flat(
    recognized: Recognized,
    kernel: _Kernel,
    path: Path,
    memory: GuestMemory,
    command_line: str,
    modules: Sequence[Module],
    e820: E820Map,
    rsdp: int | None,
) -> LoadedImage:
    """Load a multiboot or PVH image with its information and modules."""
    if recognized.protocol is BootProtocol.MULTIBOOT:
        line = f"{path} {command_line}" if command_line else str(path)
        information = multiboot_information(kernel.parts, kernel.entry, line, modules, e820)
    else:
        information = start_information(kernel.parts, kernel.entry, command_line, modules, e820, rsdp)
    write_all([*kernel.parts, *information.placements], memory)
    return LoadedImage(
        entry=information.entry,
        format=recognized.format,
        protocol=recognized.protocol,
        version="",
        start=kernel.parts[0].start,
        end=kernel.parts[-1].end,
        modules=tuple(
            LoadedModule(placed.placement.start, len(placed.placement.data), placed.module.command_line)
            for placed in information.modules
        ),
    )


def _load_linux(
    recognized: Recognized,
    kernel: _Kernel,
    memory: GuestMemory,
    command_line: str,
    initrd: Path | bytes | None,
    e820: E820Map,
    rsdp: int | None,
) -> LoadedImage:
    """Load a kernel that is started as Linux is."""
    is_32_bit = recognized.protocol is BootProtocol.LINUX32
    placed_initrd = place_initrd(initrd, e820, kernel.header, kernel.end)
    parameters = place_boot_params(
        kernel.header,
        e820,
        command_line,
        placed_initrd,
        code32_start=kernel.entry if is_32_bit else 0,
        rsdp=rsdp,
    )
    rest = [] if placed_initrd is None else [placed_initrd]
    write_all([*kernel.parts, *parameters, *rest], memory)
    prepare = prepare_protected_mode if is_32_bit else prepare_long_mode
    return LoadedImage(
        entry=prepare(memory, kernel.entry),
        format=recognized.format,
        protocol=recognized.protocol,
        version="" if recognized.bzimage is None else recognized.bzimage.version,
        start=kernel.parts[0].start,
        end=kernel.parts[-1].end,
        initrd=Initrd() if placed_initrd is None else Initrd(placed_initrd.start, len(placed_initrd.data)),
    )
