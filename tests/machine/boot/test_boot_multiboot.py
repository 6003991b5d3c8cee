"""Multiboot images: which headers count, where the image goes, and what it finds at its entry."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import pytest
from boot_builders import MIB, Load, make_elf, make_elf32, make_memory, make_multiboot_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lasskvm.errors import ImageError
from lasskvm.machine.boot import (
    BootProtocol,
    E820Map,
    LoadedImage,
    Module,
    ProtectedModeEntry,
    load_image,
    probe_image,
)
from lasskvm.memory import GuestMemory

LOAD = 0x400000
CODE = b"\xf4" * 64
HAS_ADDRESSES = 1 << 16
KERNEL = make_elf32(
    Load(LOAD, make_multiboot_header(3) + CODE), Load(0x500000, b"", memory_size=0x1000), entry=LOAD + 12
)
#: The fields of the multiboot information that a loader of today fills, and the flags that stand for them.
FIELDS = {"flags": 0, "mem_lower": 4, "mem_upper": 8, "boot_device": 12, "cmdline": 16, "mods_count": 20}
FIELDS |= {"mods_addr": 24, "mmap_length": 44, "mmap_addr": 48, "boot_loader_name": 64}
MEMORY_FLAG, CMDLINE_FLAG, MODULES_FLAG, MMAP_FLAG, LOADER_FLAG = (1 << bit for bit in (0, 2, 3, 6, 9))
VIDEO_FLAGS = 1 << 11 | 1 << 12


def load(
    tmp_path: Path, image: bytes = KERNEL, memory: GuestMemory | None = None, **options: object
) -> tuple[LoadedImage, GuestMemory]:
    path = tmp_path / "kernel"
    path.write_bytes(image)
    memory = memory or make_memory(8 * MIB)
    return load_image(path, memory, **options), memory  # type: ignore[arg-type]


def entry_of(loaded: LoadedImage) -> ProtectedModeEntry:
    assert loaded.protocol is BootProtocol.MULTIBOOT
    assert isinstance(loaded.entry, ProtectedModeEntry)
    return loaded.entry


def information(loaded: LoadedImage, memory: GuestMemory) -> dict[str, int]:
    ebx = entry_of(loaded).ebx
    return {name: memory.load(ebx + offset, 4) for name, offset in FIELDS.items()}


def text(memory: GuestMemory, gpa: int) -> str:
    return memory.read(gpa, 4096).split(b"\0")[0].decode("utf-8", "surrogateescape")


def make_raw(
    *,
    before: int = 32,
    load: int = LOAD,
    load_end: int = 0,
    bss_end: int = 0,
    entry: int = LOAD,
    header: int | None = None,
) -> bytes:
    """An image that only its multiboot header describes, the header *before* bytes behind its beginning."""
    where = LOAD + before if header is None else header
    return (
        b"\x90" * before
        + make_multiboot_header(HAS_ADDRESSES, where, load, load_end, bss_end, entry)
        + b"raw image's end"
    )


def test_a_32_bit_elf_image_lies_at_its_addresses_and_is_entered_in_32_bit_protected_mode(
    tmp_path: Path,
) -> None:
    loaded, memory = load(tmp_path)
    assert memory.read(LOAD + 12, len(CODE)) == CODE
    entry = entry_of(loaded)
    assert (entry.eip, entry.eax) == (LOAD + 12, 0x2BADB002)
    assert (entry.code_segment.base, entry.code_segment.limit) == (0, 0xFFFFFFFF)
    assert (entry.data_segment.base, entry.data_segment.limit) == (0, 0xFFFFFFFF)
    assert (loaded.format, loaded.start, loaded.end) == ("ELF", LOAD, 0x501000)


def test_the_segment_registers_can_be_loaded_again_from_the_gdt(tmp_path: Path) -> None:
    loaded, memory = load(tmp_path)
    entry = entry_of(loaded)
    gdt = struct.unpack("<3Q", memory.read(entry.gdt_base, entry.gdt_limit + 1))
    assert gdt == (0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)
    assert (entry.code_selector, entry.data_selector) == (8, 16)


def test_a_64_bit_elf_file_with_a_multiboot_header_is_entered_in_32_bit_mode_too(tmp_path: Path) -> None:
    image = make_elf(Load(LOAD, make_multiboot_header() + CODE), entry=LOAD + 12)
    loaded, _ = load(tmp_path, image)
    assert entry_of(loaded).eip == LOAD + 12
    again = load_image(tmp_path / "kernel", make_memory(8 * MIB), boot_protocol=BootProtocol.LINUX64)
    assert again.protocol is BootProtocol.LINUX64


def test_the_protocol_can_be_told_without_loading(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(KERNEL)
    assert probe_image(path) is BootProtocol.MULTIBOOT
    assert probe_image(path, BootProtocol.LINUX32) is BootProtocol.LINUX32
    with pytest.raises(ImageError, match=r"kernel cannot be started by pvh; choose from: multiboot, linux32"):
        probe_image(path, BootProtocol.PVH)


@pytest.mark.parametrize("offset", [0, 4, 4096, 8192 - 12])
def test_a_header_counts_anywhere_in_the_first_8_kib(tmp_path: Path, offset: int) -> None:
    padding = offset - 52 - 32
    image = make_elf32(Load(LOAD, b"\x90" * padding + make_multiboot_header() + CODE), entry=LOAD)
    if padding >= 0:
        assert image.index(make_multiboot_header()) == offset
        assert entry_of(load(tmp_path, image)[0]).eip == LOAD


@pytest.mark.parametrize(
    "header",
    [
        b"\x90" * (8192 - 52 - 32 - 8) + make_multiboot_header(),
        b"\x90\x90" + make_multiboot_header(),
        make_multiboot_header(wrong_checksum=True),
    ],
    ids=["behind 8 KiB", "not aligned", "wrong checksum"],
)
def test_a_header_elsewhere_or_with_a_wrong_checksum_is_none(tmp_path: Path, header: bytes) -> None:
    loaded, _ = load(tmp_path, make_elf32(Load(LOAD, header + CODE), entry=LOAD))
    assert loaded.protocol is BootProtocol.LINUX32


def test_the_image_is_told_its_name_and_command_line(tmp_path: Path) -> None:
    loaded, memory = load(tmp_path, command_line="-smp 1 é")
    known = information(loaded, memory)
    assert known["flags"] & CMDLINE_FLAG
    assert text(memory, known["cmdline"]) == f"{tmp_path / 'kernel'} -smp 1 é"
    loaded, memory = load(tmp_path)
    assert text(memory, information(loaded, memory)["cmdline"]) == str(tmp_path / "kernel")


def test_the_image_is_told_who_loaded_it_and_that_there_is_no_video_mode(tmp_path: Path) -> None:
    wants_video = make_elf32(Load(LOAD, make_multiboot_header(4) + CODE), entry=LOAD + 12)
    loaded, memory = load(tmp_path, wants_video)
    known = information(loaded, memory)
    assert known["flags"] & LOADER_FLAG
    assert text(memory, known["boot_loader_name"]) == "lasskvm"
    assert not known["flags"] & VIDEO_FLAGS


def test_the_memory_sizes_are_in_kib_up_to_the_first_hole(tmp_path: Path) -> None:
    loaded, memory = load(tmp_path, memory=make_memory(8 * MIB, (16 * MIB, 8 * MIB)))
    known = information(loaded, memory)
    assert known["flags"] & MEMORY_FLAG
    assert (known["mem_lower"], known["mem_upper"]) == (639, 7 * 1024)


def test_the_memory_map_is_that_of_the_machine(tmp_path: Path) -> None:
    loaded, memory = load(tmp_path)
    known = information(loaded, memory)
    assert known["flags"] & MMAP_FLAG
    raw = memory.read(known["mmap_addr"], known["mmap_length"])
    entries = list(struct.iter_unpack("<IQQI", raw))
    assert [entry[0] for entry in entries] == [20] * len(entries)
    assert [(start, start + size, kind) for _, start, size, kind in entries] == [
        (entry.start, entry.end, entry.type) for entry in E820Map.of_memory(memory).entries
    ]


def test_modules_lie_on_page_boundaries_behind_the_image_with_their_arguments(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1" * 5000)
    second.write_bytes(b"")
    modules = [Module.parse(f"{first},a b=c,d"), Module.parse(str(second))]
    loaded, memory = load(tmp_path, modules=modules)
    known = information(loaded, memory)
    assert known["flags"] & MODULES_FLAG
    assert known["mods_count"] == 2
    raw = memory.read(known["mods_addr"], 32)
    (start, end, string, _), (start2, end2, string2, _) = struct.iter_unpack("<IIII", raw)
    assert start >= loaded.end
    assert start % 4096 == start2 % 4096 == 0
    assert memory.read(start, end - start) == b"1" * 5000
    assert start2 == end2 >= end
    assert (text(memory, string), text(memory, string2)) == (f"{first} a b=c,d", str(second))
    assert [(module.gpa, module.size) for module in loaded.modules] == [(start, 5000), (start2, 0)]


def test_an_initrd_is_the_first_module_as_with_qemu(tmp_path: Path) -> None:
    path = tmp_path / "environment"
    path.write_bytes(b"A=1")
    loaded, memory = load(tmp_path, initrd=path, modules=[Module(path, "again")])
    assert [module.command_line for module in loaded.modules] == [str(path), f"{path} again"]
    assert memory.read(loaded.modules[0].gpa, 3) == b"A=1"
    loaded, memory = load(tmp_path, initrd=b"made here")
    assert loaded.modules[0].command_line == "initrd"
    assert memory.read(loaded.modules[0].gpa, 9) == b"made here"


def test_a_module_without_a_file_is_refused() -> None:
    with pytest.raises(ImageError, match=r'the module ",args" has no file; write FILE\[,ARGS\]'):
        Module.parse(",args")


@pytest.mark.parametrize(("start", "size"), [(0x8000, 0x20000), (0x2000, 0x7000), (0x1000, 0x90000)])
def test_what_the_image_is_told_stays_out_of_its_way(tmp_path: Path, start: int, size: int) -> None:
    image = make_multiboot_header() + b"\xcc" * size
    low = make_elf32(Load(start, image), entry=start + 12)
    loaded, memory = load(tmp_path, low, command_line="x" * 1000)
    assert memory.read(start, len(image)) == image
    assert text(memory, information(loaded, memory)["cmdline"]).endswith("x" * 1000)
    entry = entry_of(loaded)
    for used in (entry.esp - 4096, entry.esp - 1, entry.ebx, entry.gdt_base + entry.gdt_limit):
        assert not start <= used < loaded.end
        assert E820Map.of_memory(memory).is_ram(used, 1)


def test_there_is_a_page_of_stack_that_nothing_else_uses(tmp_path: Path) -> None:
    loaded, memory = load(tmp_path)
    entry = entry_of(loaded)
    assert entry.esp % 16 == 0
    known = information(loaded, memory)
    places = [known[name] for name in ("cmdline", "mods_addr", "mmap_addr", "boot_loader_name")]
    assert entry.esp <= min(entry.ebx, entry.gdt_base, *places)
    assert E820Map.of_memory(memory).is_ram(entry.esp - 4096, 4096)


def test_without_room_below_640_kib_the_image_is_refused(tmp_path: Path) -> None:
    everything = make_elf32(Load(0x1000, make_multiboot_header() + CODE, memory_size=0x9EC00), entry=0x100C)
    with pytest.raises(ImageError, match="there is no room below 640 KiB"):
        load(tmp_path, everything)
    with pytest.raises(ImageError, match=r"there is no room below 640 KiB .*; shorten the command line"):
        load(tmp_path, command_line="x" * 0xA0000)


def test_an_image_in_no_known_format_goes_where_its_header_says(tmp_path: Path) -> None:
    image = make_raw(bss_end=LOAD + 0x1000)
    memory = make_memory(8 * MIB)
    memory.write(LOAD, b"\xaa" * 0x2000)
    loaded, memory = load(tmp_path, image, memory)
    assert memory.read(LOAD, len(image)) == image
    assert memory.read(LOAD + len(image), 0x1000 - len(image)) == bytes(0x1000 - len(image))
    assert memory.read(LOAD + 0x1000, 1) == b"\xaa"
    assert entry_of(loaded).eip == LOAD
    assert (loaded.format, loaded.end) == ("raw", LOAD + 0x1000)


def test_an_image_may_begin_behind_the_beginning_of_its_file_and_end_before_its_end(tmp_path: Path) -> None:
    image = b"not loaded" + bytes(6) + make_raw(load_end=LOAD + 60)
    loaded, memory = load(tmp_path, image)
    assert memory.read(LOAD, 60) == image[16:76]
    assert memory.read(LOAD + 60, 4) == bytes(4)
    assert loaded.end == LOAD + 60


def test_the_addresses_of_a_header_count_before_those_of_elf(tmp_path: Path) -> None:
    header = make_multiboot_header(HAS_ADDRESSES, LOAD + 84, LOAD, 0, 0, LOAD + 84)
    image = make_elf32(Load(0x200000, header), entry=0x200000)
    loaded, memory = load(tmp_path, image)
    assert memory.read(LOAD, 4) == b"\x7fELF"
    assert entry_of(loaded).eip == LOAD + 84


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (
            make_raw(header=LOAD - 4),
            "cannot be right: it is at 0x3ffffc and the image is loaded from 0x400000 on",
        ),
        (make_raw(header=LOAD + 36), "but it is 0x20 bytes into the file"),
        (make_raw(header=LOAD + 0x10000000), "but it is 0x20 bytes into the file"),
        (make_raw(load_end=LOAD - 1), "the image ends at 0x3fffff, not behind its load address 0x400000"),
        (make_raw(load_end=LOAD), "not behind its load address"),
        (make_raw(load_end=LOAD + 0x1000), "4096 bytes are to be loaded from offset 0, but the file has 79"),
        (make_raw(load_end=0xFFFFFFFF), "but the file has 79"),
        (make_raw(bss_end=LOAD + 4), "behind the end of its bss at 0x400004"),
        (make_raw(bss_end=0xFFFFFFFF), "at 0x400000 to 0xfffffffe, which is not all guest RAM"),
        (make_raw(entry=LOAD - 1), "the entry point at 0x3fffff is outside the image"),
        (make_raw(entry=LOAD + 79), "the entry point at 0x40004f is outside the image"),
        (make_raw(before=0, load=0xFFFFFFF0, header=0xFFFFFFF0), "beyond the first 4 GiB"),
        (make_raw(load=0xA0000, header=0xA0020), "at 0xa0000 to 0xa004e, which is not all guest RAM"),
        (b"\x90" * 32 + make_multiboot_header(HAS_ADDRESSES), "ends inside its multiboot header"),
        (make_multiboot_header() + CODE, "without load addresses and is not an ELF file"),
        (make_elf32(Load(LOAD, make_multiboot_header(8) + CODE), entry=LOAD), "does not exist (flags 0x8)"),
        (
            make_elf32(Load(LOAD, make_multiboot_header() + CODE), Load(LOAD + 75, CODE), entry=LOAD),
            "overlap at physical address 0x40004b",
        ),
        (make_elf32(Load(0xB8000, make_multiboot_header()), entry=0xB8000), "not all guest RAM"),
        (make_elf32(Load(LOAD, make_multiboot_header()), entry=LOAD + 12), "outside all its segments"),
    ],
)
def test_a_header_that_lies_is_refused_with_the_files_name_and_memory_left_alone(
    tmp_path: Path, image: bytes, sentence: str
) -> None:
    memory = make_memory(8 * MIB)
    with pytest.raises(ImageError) as caught:
        load(tmp_path, image, memory)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "kernel"))
    assert "\n" not in str(caught.value)
    assert memory.read(0, 8 * MIB) == bytes(8 * MIB)


@pytest.mark.parametrize("size", [4 * MIB, 4 * MIB - 0x101FFF, 1 << 40])
def test_a_module_that_does_not_fit_is_refused_and_memory_left_alone(tmp_path: Path, size: int) -> None:
    path = tmp_path / "module"
    with path.open("wb") as stream:
        stream.truncate(size)
    memory = make_memory(8 * MIB)
    sentence = (
        r"module .* does not fit beside the image .*; give the guest more memory or use a smaller module"
    )
    with pytest.raises(ImageError, match=sentence):
        load(tmp_path, KERNEL, memory, modules=[Module(path), Module(path)])
    assert memory.read(0, 8 * MIB) == bytes(8 * MIB)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("absent", r"module .*absent cannot be read \(No such file or directory\)"),
        ("", r"module .* cannot be read \(Is a directory\)"),
        ("/dev/zero", r"module /dev/zero is not a regular file"),
    ],
)
def test_a_module_that_cannot_be_read_is_refused(tmp_path: Path, path: str, sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence):
        load(tmp_path, modules=[Module(tmp_path / path)])


def test_a_command_line_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="zero byte"):
        load(tmp_path, command_line="a\0b")


def test_loading_again_gives_the_same_whatever_the_guest_did(tmp_path: Path) -> None:
    module = tmp_path / "module"
    module.write_bytes(b"module")
    memory = make_memory(8 * MIB)
    first, _ = load(tmp_path, KERNEL, memory, modules=[Module(module)])
    known = information(first, memory)
    memory.write(0x1000, b"\xaa" * 0x90000)
    memory.write(MIB, b"\xaa" * (7 * MIB))
    again, _ = load(tmp_path, KERNEL, memory, modules=[Module(module)])
    assert again == first
    assert information(again, memory) == known
    assert memory.read(LOAD + 12, len(CODE)) == CODE
    assert memory.read(0x500000, 0x1000) == bytes(0x1000)
    assert memory.read(again.modules[0].gpa, 6) == b"module"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    fields=st.lists(st.integers(0, (1 << 32) - 1), min_size=5, max_size=5)
    | st.lists(
        st.integers(LOAD - 64, LOAD + 256) | st.sampled_from([0, 0x9FC00, (1 << 32) - 1]),
        min_size=5,
        max_size=5,
    ),
    flags=st.sampled_from([HAS_ADDRESSES, HAS_ADDRESSES | 7]),
)
def test_any_address_fields_give_an_image_error_or_an_image_inside_ram(
    tmp_path: Path, fields: list[int], flags: int
) -> None:
    image = b"\x90" * 32 + make_multiboot_header(flags, *fields) + CODE
    with suppress(ImageError):
        loaded, memory = load(tmp_path, image)
        assert E820Map.of_memory(memory).is_ram(loaded.start, loaded.end - loaded.start)
        assert loaded.start <= entry_of(loaded).eip < loaded.end
