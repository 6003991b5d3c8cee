"""ELF kernels of both classes are loaded by physical address and checked against memory."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from boot_builders import EM_AARCH64, ET_DYN, ET_REL, MIB, Load, make_elf, make_elf32, make_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lasskvm.errors import ImageError
from lasskvm.machine.boot import BootProtocol, LoadedImage, ProtectedModeEntry, load_image
from lasskvm.memory import GuestMemory

CODE = b"\xf4" * 64
KERNEL = make_elf(Load(0x100000, CODE), Load(0x200000, b"data", memory_size=0x2000))
KERNEL32 = make_elf32(Load(0x100000, CODE), Load(0x200000, b"data", memory_size=0x2000))


def load(tmp_path: Path, image: bytes, memory: GuestMemory | None = None) -> LoadedImage:
    path = tmp_path / "kernel"
    path.write_bytes(image)
    return load_image(path, memory or make_memory())


def test_segments_lie_at_their_physical_addresses(tmp_path: Path) -> None:
    memory = make_memory()
    loaded = load(tmp_path, KERNEL, memory)
    assert memory.read(0x100000, len(CODE)) == CODE
    assert memory.read(0x200000, 4) == b"data"
    assert (loaded.format, loaded.entry.rip, loaded.end) == ("ELF", 0x100000, 0x202000)


def test_what_the_file_does_not_fill_is_zero_even_in_used_memory(tmp_path: Path) -> None:
    memory = make_memory()
    memory.write(0x200000, b"\xaa" * 0x3000)
    load(tmp_path, KERNEL, memory)
    assert memory.read(0x200004, 0x1FFC) == bytes(0x1FFC)
    assert memory.read(0x202000, 1) == b"\xaa"


def test_a_virtual_entry_point_is_translated_through_its_segment(tmp_path: Path) -> None:
    high = 0xFFFFFFFF80000000
    image = make_elf(Load(0x180000, CODE, virtual=high), entry=high + 0x20)
    assert load(tmp_path, image).entry.rip == 0x180020


def test_a_physical_entry_point_is_taken_as_it_is(tmp_path: Path) -> None:
    image = make_elf(Load(0x180000, CODE, virtual=0xFFFFFFFF80000000), entry=0x180010)
    assert load(tmp_path, image).entry.rip == 0x180010


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (make_elf(Load(0x100000, CODE), entry=0x300000), "entry point at 0x300000, outside all its segments"),
        (
            make_elf(Load(0x3FFFF0, CODE), entry=0x3FFFF0),
            "at 0x3ffff0 to 0x40002f, which is not all guest RAM",
        ),
        (make_elf(Load(0xB8000, CODE), entry=0xB8000), "not all guest RAM"),
        (make_elf(Load(0x9FFF0, CODE, memory_size=0x100000), entry=0x9FFF0), "not all guest RAM"),
        (make_elf(Load(1 << 33, CODE), entry=1 << 33), "beyond the first 4 GiB"),
        (make_elf(Load((1 << 64) - 16, CODE), entry=0x100000), "beyond the first 4 GiB"),
        (make_elf(Load(0x7000, CODE), entry=0x7000), "where the loader's own data lie"),
        (make_elf(Load(0x0, bytes(0x2000)), entry=0x10), "where the loader's own data lie"),
        (make_elf(Load(0x100000, CODE), Load(0x10003F, CODE)), "overlap at physical address 0x10003f"),
        (make_elf(Load(0x100000, CODE, memory_size=8)), "larger in the file than in memory"),
        (make_elf(), "no PT_LOAD segment"),
        (make_elf(Load(0x100000, b"", memory_size=0)), "no PT_LOAD segment"),
        (make_elf(Load(0x100000, CODE), kind=ET_DYN), "ET_DYN, not an executable at a fixed address"),
        (make_elf(Load(0x100000, CODE), kind=ET_REL), "ET_REL, not an executable at a fixed address"),
        (make_elf(Load(0x100000, CODE), machine=EM_AARCH64), "for another machine (AARCH64)"),
        (make_elf(Load(0x100000, CODE), elf_class=1), "32-bit ELF file for another machine (X86_64)"),
        (make_elf(Load(0x100000, CODE), elf_class=3), "not a little-endian ELF file of 32 or 64 bits"),
        (make_elf32(Load(0x100000, CODE), Load(0x10003F, CODE)), "overlap at physical address 0x10003f"),
        (make_elf32(Load(0x100000, CODE, memory_size=8)), "larger in the file than in memory"),
        (make_elf32(Load(0xFFFFFFF0, CODE), entry=0xFFFFFFF0), "beyond the first 4 GiB"),
        (make_elf32(Load(0x100000, CODE), entry=0x300000), "entry point at 0x300000, outside all"),
        (make_elf32(Load(0x7000, CODE), entry=0x7000), "where the loader's own data lie"),
        (make_elf32(Load(0x100000, CODE), kind=ET_DYN), "ET_DYN, not an executable at a fixed address"),
        (b"#!/bin/sh\n", "neither a bzImage nor an ELF file nor a multiboot kernel"),
        (b"\x1f\x8b\x08" + bytes(64), "is compressed; unpack it with gunzip"),
        (b"", "is empty"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_files_name(
    tmp_path: Path, image: bytes, sentence: str
) -> None:
    with pytest.raises(ImageError) as caught:
        load(tmp_path, image)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "kernel"))


def test_a_refused_kernel_leaves_memory_alone(tmp_path: Path) -> None:
    memory = make_memory()
    with pytest.raises(ImageError):
        load(tmp_path, make_elf(Load(0x100000, CODE), Load(0x3FFFF0, CODE)), memory)
    assert memory.read(0, 4 * MIB) == bytes(4 * MIB)


def test_segments_may_touch_and_span_two_slots(tmp_path: Path) -> None:
    memory = make_memory(2 * MIB, (2 * MIB, 2 * MIB))
    load(tmp_path, make_elf(Load(0x1FFFF0, CODE), Load(0x200030, CODE), entry=0x1FFFF0), memory)
    assert memory.read(0x1FFFF0, 128) == CODE * 2


def test_a_64_bit_kernel_with_the_multiboot_magic_but_no_checksum_is_entered_as_64_bit(
    tmp_path: Path,
) -> None:
    image = make_elf(Load(0x100000, struct.pack("<I", 0x1BADB002) + CODE), entry=0x100004)
    assert load(tmp_path, image).entry.rip == 0x100004


def test_a_32_bit_kernel_without_any_header_is_entered_as_a_32_bit_linux_is(tmp_path: Path) -> None:
    memory = make_memory()
    high = 0xC0000000
    image = make_elf32(
        Load(0x180000, CODE, virtual=high), Load(0x200000, b"data", memory_size=9), entry=high + 4
    )
    loaded = load(tmp_path, image, memory)
    assert (loaded.format, loaded.protocol) == ("ELF", BootProtocol.LINUX32)
    assert memory.read(0x180000, len(CODE)) == CODE
    assert memory.read(0x200000, 9) == b"data" + bytes(5)
    assert isinstance(loaded.entry, ProtectedModeEntry)
    assert loaded.entry.eip == 0x180004
    assert memory.read(loaded.entry.esi + 0x202, 4) == b"HdrS"


@pytest.mark.parametrize("kernel", [KERNEL, KERNEL32], ids=["64", "32"])
def test_every_prefix_of_a_kernel_is_refused(tmp_path: Path, kernel: bytes) -> None:
    for length in range(len(kernel)):
        with pytest.raises(ImageError):
            load(tmp_path, kernel[:length])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(flips=st.lists(st.tuples(st.integers(5, 52 + 2 * 32 - 1), st.integers(0, 7)), min_size=1, max_size=6))
def test_flipped_header_bits_of_a_32_bit_kernel_give_an_image_error_or_a_loaded_kernel(
    tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    image = bytearray(KERNEL32)
    for offset, bit in flips:
        image[offset] ^= 1 << bit
    with suppress(ImageError):
        loaded = load(tmp_path, bytes(image))
        assert isinstance(loaded.entry, ProtectedModeEntry)
        assert loaded.start <= loaded.entry.eip < loaded.end


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 64 + 2 * 56 - 1), st.integers(0, 7)), min_size=1, max_size=6))
def test_flipped_header_bits_give_an_image_error_or_a_loaded_kernel(
    tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    image = bytearray(KERNEL)
    for offset, bit in flips:
        image[offset] ^= 1 << bit
    with suppress(ImageError):
        loaded = load(tmp_path, bytes(image))
        assert loaded.start <= loaded.entry.rip < loaded.end


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot be read \(No such file or directory\)"):
        load_image(tmp_path / "absent", make_memory())


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="Is a directory"):
        load_image(tmp_path, make_memory())


def test_a_device_is_refused() -> None:
    with pytest.raises(ImageError, match="not a regular file"):
        load_image(Path(os.devnull), make_memory())
