"""PVH: the entry point in a Xen note, and the structure that EBX points to."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from boot_builders import (
    MIB,
    PT_NOTE,
    Load,
    make_elf,
    make_elf32,
    make_memory,
    make_multiboot_header,
    make_note,
)

from lasskvm.errors import ImageError
from lasskvm.machine.boot import BootProtocol, E820Map, LoadedImage, Module, ProtectedModeEntry, load_image
from lasskvm.memory import GuestMemory

LOAD = 0x400000
CODE = b"\xf4" * 64
ENTRY = LOAD + 8
PHYS32_ENTRY = 18
XEN_NOTE = make_note(b"Xen", PHYS32_ENTRY, struct.pack("<I", ENTRY))
OTHER_NOTES = make_note(b"GNU", 3, b"build id 12") + make_note(b"Xen", 6, b"guest\0")
LINUX_NOTE = make_note(b"Linux", 0x100, b"salt\0")


def kernel64(notes: bytes, **options: int) -> bytes:
    return make_elf(Load(LOAD, CODE), Load(0, notes, type=PT_NOTE), entry=LOAD, **options)


def kernel32(notes: bytes) -> bytes:
    return make_elf32(Load(LOAD, CODE), Load(0, notes, type=PT_NOTE), entry=LOAD)


def load(tmp_path: Path, image: bytes, **options: object) -> tuple[LoadedImage, GuestMemory]:
    path = tmp_path / "kernel"
    path.write_bytes(image)
    memory = make_memory(8 * MIB)
    return load_image(path, memory, **options), memory  # type: ignore[arg-type]


def entry_of(loaded: LoadedImage) -> ProtectedModeEntry:
    assert loaded.protocol is BootProtocol.PVH
    assert isinstance(loaded.entry, ProtectedModeEntry)
    return loaded.entry


def text(memory: GuestMemory, gpa: int) -> str:
    return memory.read(gpa, 4096).split(b"\0")[0].decode()


@pytest.mark.parametrize("make", [kernel32, kernel64])
@pytest.mark.parametrize("size", [4, 8])
def test_an_image_is_entered_where_its_xen_note_says(tmp_path: Path, make: object, size: int) -> None:
    note = make_note(b"Xen", PHYS32_ENTRY, ENTRY.to_bytes(size, "little"))
    loaded, memory = load(tmp_path, make(OTHER_NOTES + note))  # type: ignore[operator]
    entry = entry_of(loaded)
    assert entry.eip == ENTRY
    assert (entry.code_segment.limit, entry.data_segment.limit) == (0xFFFFFFFF, 0xFFFFFFFF)
    assert entry.task_segment.limit == 0x67
    assert memory.read(LOAD, len(CODE)) == CODE
    assert memory.read(0, 4) == bytes(4), "notes are not loaded"


def test_the_start_info_tells_of_command_line_modules_memory_and_acpi_tables(tmp_path: Path) -> None:
    module = tmp_path / "module"
    module.write_bytes(b"contents")
    loaded, memory = load(
        tmp_path,
        kernel64(XEN_NOTE),
        command_line="root=x",
        initrd=b"initrd",
        modules=[Module(module, "with arguments")],
        rsdp=0xE1230,
    )
    raw = memory.read(entry_of(loaded).ebx, 56)
    magic, version, flags, count, list_at, line_at, rsdp, map_at, map_count, reserved = struct.unpack(
        "<IIIIQQQQII", raw
    )
    assert (magic, version, flags, reserved) == (0x336EC578, 1, 0, 0)
    assert rsdp == 0xE1230
    assert text(memory, line_at) == "root=x"
    first, second = struct.iter_unpack("<QQQQ", memory.read(list_at, 32 * count))
    assert memory.read(first[0], first[1]) == b"initrd"
    assert memory.read(second[0], second[1]) == b"contents"
    assert text(memory, second[2]) == f"{module} with arguments"
    entries = list(struct.iter_unpack("<QQII", memory.read(map_at, 24 * map_count)))
    assert [(start, start + size, kind) for start, size, kind, _ in entries] == [
        (entry.start, entry.end, entry.type) for entry in E820Map.of_memory(memory).entries
    ]


def test_without_modules_and_acpi_tables_there_are_none(tmp_path: Path) -> None:
    loaded, memory = load(tmp_path, kernel32(XEN_NOTE))
    raw = memory.read(entry_of(loaded).ebx, 56)
    count, modules, _, rsdp = struct.unpack_from("<IQQQ", raw, 12)
    assert (count, modules, rsdp) == (0, 0, 0)


def test_a_64_bit_linux_with_a_pvh_entry_keeps_its_own_protocol_unless_pvh_is_asked_for(
    tmp_path: Path,
) -> None:
    image = kernel64(XEN_NOTE + LINUX_NOTE)
    assert load(tmp_path, image)[0].protocol is BootProtocol.LINUX64
    assert entry_of(load(tmp_path, image, boot_protocol=BootProtocol.PVH)[0]).eip == ENTRY


def test_multiboot_comes_before_pvh(tmp_path: Path) -> None:
    image = make_elf32(
        Load(LOAD, make_multiboot_header() + CODE), Load(0, XEN_NOTE, type=PT_NOTE), entry=LOAD
    )
    assert load(tmp_path, image)[0].protocol is BootProtocol.MULTIBOOT
    assert entry_of(load(tmp_path, image, boot_protocol=BootProtocol.PVH)[0]).eip == ENTRY


@pytest.mark.parametrize(
    "note",
    [
        make_note(b"Zen", PHYS32_ENTRY, ENTRY.to_bytes(4, "little")),
        make_note(b"Xen", PHYS32_ENTRY + 1, ENTRY.to_bytes(4, "little")),
        make_note(b"Xen", PHYS32_ENTRY, b"\0" * 5),
        b"",
        b"\0" * 11,
    ],
)
def test_other_notes_are_no_entry_point(tmp_path: Path, note: bytes) -> None:
    assert load(tmp_path, kernel64(note))[0].protocol is BootProtocol.LINUX64


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (
            kernel64(make_note(b"Xen", PHYS32_ENTRY, struct.pack("<I", LOAD - 1))),
            "has its PVH entry point at 0x3fffff, outside all its segments; fix its Xen note",
        ),
        (kernel64(struct.pack("<III", 4, 0xFFFFFFFF, 18) + b"Xen\0"), "a note is cut off"),
        (kernel64(struct.pack("<III", 0xFFFFFFFF, 4, 18) + b"Xen\0"), "a note is cut off"),
        (
            make_elf(Load(LOAD, CODE), entry=LOAD).replace(
                struct.pack("<I", 1) + struct.pack("<I", 5), struct.pack("<II", PT_NOTE, 5)
            )[:-1],
            "it says that it has 64 bytes of notes",
        ),
    ],
)
def test_a_note_that_lies_is_refused(tmp_path: Path, image: bytes, sentence: str) -> None:
    with pytest.raises(ImageError) as caught:
        load(tmp_path, image)
    assert sentence in str(caught.value)
