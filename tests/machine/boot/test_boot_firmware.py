"""Firmware: a ROM of a size that ROMs have, below 4 GiB, with a copy of its end below 1 MiB."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from boot_builders import MIB, make_memory

from lasskvm.errors import ImageError
from lasskvm.kvm import Vm
from lasskvm.machine.boot import E820Map, E820Type, load_firmware, place_firmware, shadow_firmware
from lasskvm.memory import SLOT_READONLY

KIB = 1 << 10
FOUR_GIB = 1 << 32


def make_rom(size: int) -> bytes:
    """A ROM each of whose 64 KiB differs from the others."""
    return b"".join(bytes([1 + block % 255]) * (64 * KIB) for block in range(size // (64 * KIB)))


def place(rom: bytes) -> tuple[Vm, int]:
    vm = Vm()
    vm.set_user_memory_region(0, 0, vm.allocate(4 * MIB))
    return vm, place_firmware(vm, rom, 5)


@pytest.mark.parametrize("size", [64 * KIB, 128 * KIB, 192 * KIB, 256 * KIB, 2 * MIB, 16 * MIB])
def test_a_rom_ends_at_4_gib_and_cannot_be_written(tmp_path: Path, size: int) -> None:
    path = tmp_path / "rom"
    path.write_bytes(make_rom(size))
    rom = load_firmware(path)
    vm, free = place(rom)
    assert free == 6
    assert vm.memory.read(FOUR_GIB - size, size) == rom
    slot = vm.memory.find(FOUR_GIB - 16)
    assert slot is not None
    assert (slot.number, slot.flags) == (5, SLOT_READONLY)
    vm.memory.store(FOUR_GIB - 16, 4, 0)
    assert vm.memory.read(FOUR_GIB - size, size) == rom


@pytest.mark.parametrize(
    ("size", "copied"),
    [(64 * KIB, 64), (128 * KIB, 128), (256 * KIB, 256), (512 * KIB, 128), (16 * MIB, 128)],
)
def test_the_end_of_a_rom_lies_below_1_mib_too_and_can_be_written_there(size: int, copied: int) -> None:
    rom, length = make_rom(size), copied * KIB
    vm, _ = place(rom)
    assert vm.memory.read(MIB - length, length) == rom[-length:]
    assert vm.memory.read(MIB - length - 16, 16) == bytes(16)
    vm.memory.store(MIB - 16, 4, 0x12345678)
    assert vm.memory.load(MIB - 16, 4) == 0x12345678


def test_the_copy_can_be_made_again() -> None:
    rom = make_rom(128 * KIB)
    vm, _ = place(rom)
    vm.memory.write(MIB - 128 * KIB, bytes(128 * KIB))
    shadow_firmware(vm.memory, rom)
    assert vm.memory.read(MIB - 128 * KIB, 128 * KIB) == rom


@pytest.mark.parametrize("size", [0, 1, 64 * KIB - 1, 64 * KIB + 1, 96 * KIB, 16 * MIB + 64 * KIB, 1 << 40])
def test_a_rom_of_odd_size_is_refused_in_one_sentence(tmp_path: Path, size: int) -> None:
    path = tmp_path / "rom"
    with path.open("wb") as stream:
        stream.truncate(size)
    with pytest.raises(
        ImageError, match=rf"^firmware .*rom has {size} bytes, .* in steps of 64 KiB; give a whole"
    ):
        load_firmware(path)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("absent", r"firmware .*absent cannot be read \(No such file or directory\)"),
        ("", r"cannot be read \(Is a directory\)"),
        ("/dev/zero", "is not a regular file"),
    ],
)
def test_a_rom_that_cannot_be_read_is_refused(tmp_path: Path, path: str, sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence):
        load_firmware(tmp_path / path)


def test_a_rom_is_reserved_in_the_memory_map() -> None:
    memory = make_memory()
    memory.set_slot(3, FOUR_GIB - 64 * KIB, mmap.mmap(-1, 64 * KIB), SLOT_READONLY)
    last = E820Map.of_memory(memory).entries[-1]
    assert (last.start, last.end, last.type) == (FOUR_GIB - 64 * KIB, FOUR_GIB, E820Type.RESERVED)
