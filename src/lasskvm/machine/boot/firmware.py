"""Firmware: a ROM that the processor starts in by itself, after power-on at the reset vector.

The ROM is mapped read-only so that it ends at 4 GiB, and a copy of its last 128 KiB lies below 1 MiB, where its
real-mode code runs. On a PC the chipset shows the ROM there, until the firmware has it replaced by RAM through the PCI
host bridge and copies what it needs of itself. There is no such bridge here, so the copy is plain RAM from the start,
as on QEMU's ISA-only PC; and a BIOS of up to 256 KiB, which would copy the rest of itself, is there as a whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lasskvm.errors import ImageError
from lasskvm.machine.boot.files import open_file, size_of
from lasskvm.machine.boot.layout import FOUR_GIB, LEGACY_HOLE_END, MIB
from lasskvm.memory import SLOT_READONLY, GuestMemory

if TYPE_CHECKING:
    # Whoever has a VM has loaded this already; who only builds images should not load an engine for it.
    from lasskvm.kvm.interface import VmInterface

__all__ = ["load_firmware", "place_firmware", "shadow_firmware"]

_UNIT = 64 << 10
_SMALLEST = _UNIT
_LARGEST = 16 * MIB
#: What is copied below 1 MiB, and the largest ROM that is copied as a whole.
_SHADOW_SIZE = 128 << 10
_LARGEST_BIOS = 256 << 10


def load_firmware(path: Path) -> bytes:
    """The ROM image at *path*: a multiple of 64 KiB, up to 16 MiB. Raises :class:`ImageError` for anything else."""
    with open_file(path, "firmware") as stream:
        size = size_of(stream)
        if size % _UNIT or not _SMALLEST <= size <= _LARGEST:
            raise ImageError(
                f"firmware {path} has {size} bytes, and a ROM has 64 KiB to 16 MiB in steps of 64 KiB; "
                "give a whole ROM image"
            )
        return stream.read(size)


def place_firmware(vm: VmInterface, rom: bytes, first_free_slot: int) -> int:
    """Map *rom*, from :func:`load_firmware`, below 4 GiB and copy its end below 1 MiB; the next free slot's number.

    RAM below 1 MiB must be there already. Raises :class:`~lasskvm.errors.MemoryLayoutError` when another slot is where
    the ROM goes.
    """
    memory = vm.allocate(len(rom))
    memory[:] = rom
    vm.set_user_memory_region(first_free_slot, FOUR_GIB - len(rom), memory, SLOT_READONLY)
    shadow_firmware(vm.memory, rom)
    return first_free_slot + 1


def shadow_firmware(memory: GuestMemory, rom: bytes) -> None:
    """Copy the end of *rom* below 1 MiB: once when it is placed, and again at every reset, as a chipset would."""
    shadow = rom if len(rom) <= _LARGEST_BIOS else rom[-_SHADOW_SIZE:]
    memory.write(LEGACY_HOLE_END - len(shadow), shadow)
