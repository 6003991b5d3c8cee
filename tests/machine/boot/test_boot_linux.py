"""What Linux finds at its entry: boot_params, e820 map, command line, initrd."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import pytest
from boot_builders import COMPRESSIONS, MIB, Load, make_bzimage, make_elf, make_memory
from hypothesis import given
from hypothesis import strategies as st

from lasskvm.errors import ImageError, MemoryLayoutError
from lasskvm.machine.boot import E820Entry, E820Map, E820Type, LoadedImage, Module, load_image
from lasskvm.memory import SLOT_READONLY, GuestMemory

VMLINUX = make_elf(Load(0x100000, b"\xf4" * 64))
GIB = 1 << 30


def load(tmp_path: Path, memory: GuestMemory, image: bytes = VMLINUX, **options: object) -> LoadedImage:
    path = tmp_path / "kernel"
    path.write_bytes(image)
    return load_image(path, memory, **options)  # type: ignore[arg-type]


def boot_params(memory: GuestMemory, loaded: LoadedImage) -> bytes:
    return memory.read(loaded.entry.rsi, 4096)


def u32(params: bytes, offset: int) -> int:
    return int(struct.unpack_from("<I", params, offset)[0])


def test_the_setup_header_of_a_bzimage_is_copied_and_completed(tmp_path: Path) -> None:
    image = make_bzimage(COMPRESSIONS["zstd"](VMLINUX), cmdline_size=999)
    memory = make_memory()
    params = boot_params(memory, load(tmp_path, memory, image))
    assert params[0x202:0x206] == b"HdrS"
    assert params[0x1F1] == image[0x1F1]
    assert u32(params, 0x238) == 999
    assert params[0x210] == 0xFF
    assert params[0x211] & 1
    assert params[:0x1E8] == bytes(0x1E8)
    assert params[0x1EF] == 0, "the sentinel: not zero makes Linux discard half of boot_params"


def test_a_vmlinux_gets_a_header_of_its_own(tmp_path: Path) -> None:
    memory = make_memory()
    params = boot_params(memory, load(tmp_path, memory))
    assert params[0x1FE:0x200] == b"\x55\xaa"
    assert params[0x202:0x206] == b"HdrS"
    assert struct.unpack_from("<H", params, 0x206)[0] == 0x20F
    assert struct.unpack_from("<H", params, 0x236)[0] & 1


def test_the_command_line_ends_with_a_zero_byte(tmp_path: Path) -> None:
    memory = make_memory()
    params = boot_params(memory, load(tmp_path, memory, command_line="console=ttyS0 é"))
    assert memory.read(u32(params, 0x228), 18) == "console=ttyS0 é".encode() + b"\0\0"


def test_a_command_line_as_long_as_the_kernel_takes_is_accepted_and_one_byte_more_refused(
    tmp_path: Path,
) -> None:
    image = make_bzimage(COMPRESSIONS["zstd"](VMLINUX), cmdline_size=100)
    load(tmp_path, make_memory(), image, command_line="x" * 100)
    with pytest.raises(ImageError, match="has 101 bytes, this kernel takes at most 100; shorten it"):
        load(tmp_path, make_memory(), image, command_line="x" * 101)


def test_a_kernel_that_takes_any_command_line_is_bounded_by_the_room_for_it(tmp_path: Path) -> None:
    image = make_bzimage(COMPRESSIONS["zstd"](VMLINUX), cmdline_size=0xFFFFFFFF)
    memory = make_memory()
    params = boot_params(memory, load(tmp_path, memory, image, command_line="x" * 0xFFFF))
    assert memory.read(u32(params, 0x228) + 0xFFFF, 1) == b"\0"
    with pytest.raises(ImageError, match="shorten it"):
        load(tmp_path, make_memory(), image, command_line="x" * 0x10000)


def test_a_command_line_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="zero byte"):
        load(tmp_path, make_memory(), command_line="quiet\0init=/bin/sh")


@pytest.mark.parametrize("as_file", [True, False])
def test_the_initrd_lies_page_aligned_at_the_top_of_memory(tmp_path: Path, as_file: bool) -> None:
    content = b"initrd" * 1000
    (tmp_path / "initrd").write_bytes(content)
    memory = make_memory(8 * MIB)
    loaded = load(tmp_path, memory, initrd=tmp_path / "initrd" if as_file else content)
    params = boot_params(memory, loaded)
    gpa, size = u32(params, 0x218), u32(params, 0x21C)
    assert gpa % 4096 == 0
    assert 8 * MIB - 4096 < gpa + size <= 8 * MIB
    assert memory.read(gpa, size) == content
    assert (loaded.initrd.gpa, loaded.initrd.size) == (gpa, size)


def test_the_initrd_stays_below_initrd_addr_max(tmp_path: Path) -> None:
    image = make_bzimage(COMPRESSIONS["zstd"](VMLINUX), initrd_addr_max=4 * MIB - 1)
    loaded = load(tmp_path, make_memory(16 * MIB), image, initrd=bytes(4096))
    assert loaded.initrd.gpa == 4 * MIB - 4096


def test_an_initrd_that_exactly_fits_beside_the_kernel_is_accepted(tmp_path: Path) -> None:
    loaded = load(tmp_path, make_memory(), initrd=bytes(4 * MIB - 0x101000))
    assert loaded.initrd.gpa == 0x101000


@pytest.mark.parametrize("size", [4 * MIB - 0x101000 + 1, 5 * MIB])
def test_an_initrd_larger_than_memory_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "initrd"
    with path.open("wb") as stream:
        stream.truncate(size)
    with pytest.raises(ImageError, match=r"does not fit beside the kernel .*; give the guest more memory"):
        load(tmp_path, make_memory(), initrd=path)


def test_an_initrd_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"initrd .*absent cannot be read \(No such file or directory\)"):
        load(tmp_path, make_memory(), initrd=tmp_path / "absent")


def test_no_initrd_is_said_as_no_address_and_no_size(tmp_path: Path) -> None:
    memory = make_memory()
    params = boot_params(memory, load(tmp_path, memory))
    assert (u32(params, 0x218), u32(params, 0x21C)) == (0, 0)


def test_the_place_of_the_acpi_tables_is_handed_on(tmp_path: Path) -> None:
    memory = make_memory()
    params = boot_params(memory, load(tmp_path, memory, rsdp=0xE1230))
    assert struct.unpack_from("<Q", params, 0x070) == (0xE1230,)
    params = boot_params(memory, load(tmp_path, memory))
    assert struct.unpack_from("<Q", params, 0x070) == (0,)


def test_modules_are_refused_in_favour_of_an_initrd(tmp_path: Path) -> None:
    memory = make_memory()
    with pytest.raises(ImageError, match="is started as Linux is, which knows no modules; give it an initrd"):
        load(tmp_path, memory, modules=[Module(tmp_path / "kernel")])
    assert memory.read(0, 4 * MIB) == bytes(4 * MIB)


@pytest.mark.parametrize("options", [{"command_line": "x" * 3000}, {"initrd": bytes(5 * MIB)}])
def test_what_is_refused_behind_the_kernel_leaves_memory_alone(
    tmp_path: Path, options: dict[str, object]
) -> None:
    memory = make_memory()
    with pytest.raises(ImageError):
        load(tmp_path, memory, **options)
    assert memory.read(0, 4 * MIB) == bytes(4 * MIB)


def test_loading_again_gives_the_same_whatever_the_guest_did(tmp_path: Path) -> None:
    memory = make_memory()
    options = {"command_line": "quiet", "initrd": b"initrd"}
    first = load(tmp_path, memory, **options)
    places = [(0x9000, 0x6000), (0x7000, 4096), (0x20000, 6), (0x100000, 64), (first.initrd.gpa, 6)]
    before = [memory.read(gpa, size) for gpa, size in places]
    memory.write(0x1000, b"\xaa" * 0x80000)
    memory.write(0x100000, b"\xaa" * 0x300000)
    assert load(tmp_path, memory, **options) == first
    assert [memory.read(gpa, size) for gpa, size in places] == before


def test_the_e820_map_reserves_the_legacy_hole(tmp_path: Path) -> None:
    memory = make_memory(4 * MIB)
    params = boot_params(memory, load(tmp_path, memory))
    entries = [struct.unpack_from("<QQI", params, 0x2D0 + 20 * index) for index in range(params[0x1E8])]
    assert entries == [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (0x100000, 3 * MIB, 1)]


def test_ram_above_4_gib_leaves_the_hole_below_unmentioned() -> None:
    e820 = E820Map.of_memory(make_memory(3 * GIB, (4 * GIB, 1 * GIB)))
    assert [(entry.start, entry.end) for entry in e820.ram] == [
        (0, 0x9FC00),
        (0x100000, 3 * GIB),
        (4 * GIB, 5 * GIB),
    ]
    assert not any(entry.start < 4 * GIB and entry.end > 3 * GIB for entry in e820.entries)


def test_adjacent_slots_are_one_range_of_ram() -> None:
    e820 = E820Map.of_memory(make_memory(2 * MIB, (2 * MIB, 2 * MIB)))
    assert e820.is_ram(0x100000, 3 * MIB)
    assert len(e820.entries) == 3


def test_a_read_only_slot_is_reserved() -> None:
    memory = make_memory()
    memory.set_slot(9, 0xFFFE0000, mmap.mmap(-1, 0x20000), SLOT_READONLY)
    last = E820Map.of_memory(memory).entries[-1]
    assert (last.start, last.end, last.type) == (0xFFFE0000, 1 << 32, E820Type.RESERVED)


def test_the_machine_can_reserve_parts_of_ram() -> None:
    reserved = [
        E820Entry(0x3F0000, 0x3F8000, E820Type.ACPI),
        E820Entry(0x3F8000, 0x400000, E820Type.NVS),
        E820Entry(0xE0000, 0xF0000, E820Type.RESERVED),
    ]
    entries = [
        (entry.start, entry.end, entry.type) for entry in E820Map.of_memory(make_memory(), reserved).entries
    ]
    assert entries == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x100000, 2),
        (0x100000, 0x3F0000, 1),
        (0x3F0000, 0x3F8000, 3),
        (0x3F8000, 0x400000, 4),
    ]


def test_a_slot_among_the_interrupt_controllers_is_never_ram() -> None:
    e820 = E820Map.of_memory(make_memory(4 * MIB, (0xFF000000, 0x10000)))
    assert (e820.entries[-1].start, e820.entries[-1].type) == (0xFF000000, E820Type.RESERVED)
    assert e820.ram_size == 4 * MIB - 0x60400


@given(st.lists(st.integers(1, 64), min_size=1, max_size=8), st.data())
def test_the_e820_map_is_ordered_and_says_ram_only_where_a_slot_is(
    gaps: list[int], data: st.DataObject
) -> None:
    memory, gpa = GuestMemory(), 0
    for number, gap in enumerate(gaps):
        size = data.draw(st.integers(1, 64)) * 0x8000
        memory.set_slot(number, gpa, mmap.mmap(-1, size))
        gpa += size + (gap - 1) * 0x8000
    e820 = E820Map.of_memory(memory)
    for before, after in zip(e820.entries, e820.entries[1:], strict=False):
        assert before.end <= after.start
    for entry in e820.ram:
        assert entry.start < entry.end
        for gpa in range(entry.start & -0x8000, entry.end, 0x8000):
            assert memory.find(gpa) is not None
        assert entry.end <= 0x9FC00 or entry.start >= 0x100000


def test_a_machine_without_low_memory_is_refused(tmp_path: Path) -> None:
    memory = GuestMemory()
    memory.set_slot(0, 0x100000, mmap.mmap(-1, 2 * MIB))
    with pytest.raises(MemoryLayoutError):
        load(tmp_path, memory)
