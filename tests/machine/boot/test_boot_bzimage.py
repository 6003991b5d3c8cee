"""A bzImage is checked, unpacked with bounded output, and its vmlinux loaded."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import pytest
from boot_builders import COMPRESSIONS, MIB, Load, make_bzimage, make_elf, make_memory, with_size
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lasskvm.errors import ImageError
from lasskvm.machine.boot import BootProtocol, LoadedImage, ProtectedModeEntry, load_image
from lasskvm.machine.boot.decompress import MAX_VMLINUX_SIZE, decompress
from lasskvm.memory import GuestMemory

TEXT = bytes(range(256)) * 64
VMLINUX = make_elf(Load(0x100000, TEXT), Load(0x200000, b"data", memory_size=0x3000), entry=0x100010)


def load(tmp_path: Path, image: bytes, memory_size: int = 4 * MIB) -> tuple[LoadedImage, GuestMemory]:
    path = tmp_path / "kernel"
    path.write_bytes(image)
    memory = make_memory(memory_size)
    return load_image(path, memory), memory


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_vmlinux_inside_is_loaded_whatever_it_is_compressed_with(
    tmp_path: Path, compression: str
) -> None:
    loaded, memory = load(tmp_path, make_bzimage(COMPRESSIONS[compression](VMLINUX)))
    assert memory.read(0x100000, len(TEXT)) == TEXT
    assert memory.read(0x200000, 5) == b"data\0"
    assert loaded.format == "bzImage"
    assert loaded.entry.rip == 0x100010
    assert (loaded.start, loaded.end) == (0x100000, 0x203000)


def test_an_lz4_kernel_may_have_several_blocks() -> None:
    data = bytes(9 * MIB) + b"end"
    assert decompress(COMPRESSIONS["lz4"](data)) == data


def test_the_version_string_is_that_of_the_header(tmp_path: Path) -> None:
    image = make_bzimage(COMPRESSIONS["zstd"](VMLINUX), version_string=b"6.1.0 (x@y) #1\x1b[31m\0")
    assert load(tmp_path, image)[0].version == "6.1.0 (x@y) #1[31m"


@pytest.mark.parametrize(
    "options", [{"xloadflags": 0}, {"version": 0x20B}, {"version": 0x207}], ids=["2.15", "2.11", "2.07"]
)
def test_an_image_with_neither_a_64_bit_kernel_nor_a_32_bit_entry_is_refused(
    tmp_path: Path, options: dict[str, int]
) -> None:
    image = make_bzimage(COMPRESSIONS["gzip"](VMLINUX), **options)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"with neither a 64-bit Linux kernel nor a 32-bit entry .* BIOS"):
        load(tmp_path, image)


CODE32 = bytes(range(1, 65)) + b"protected-mode code"


def make_code32(**options: int) -> bytes:
    """An image in the format of a bzImage that has no Linux inside, only 32-bit code."""
    defaults = {"xloadflags": 0, "code32_start": 0x100000, "version": 0x20C}
    return make_bzimage(CODE32, **defaults | options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"version": 0x203}, {"pref_address": 0x100000, "init_size": 0x8000}])
def test_an_image_without_linux_inside_is_entered_by_the_32_bit_protocol(
    tmp_path: Path, options: dict[str, int]
) -> None:
    loaded, memory = load(tmp_path, make_code32(**options))
    assert loaded.protocol is BootProtocol.LINUX32
    assert memory.read(0x100000 + 64, len(CODE32)) == CODE32
    assert isinstance(loaded.entry, ProtectedModeEntry)
    assert (loaded.entry.eip, loaded.entry.code_selector, loaded.entry.data_selector) == (
        0x100000,
        0x10,
        0x18,
    )
    params = memory.read(loaded.entry.esi, 4096)
    assert struct.unpack_from("<I", params, 0x214) == (0x100000,)
    assert params[0x202:0x206] == b"HdrS"
    assert (loaded.entry.eax, loaded.entry.ebx) == (0, 0)


def test_a_relocatable_image_lies_where_it_would_like_to_and_is_told_so(tmp_path: Path) -> None:
    image = make_code32(relocatable=1, pref_address=0x200000, init_size=0x10000)
    loaded, memory = load(tmp_path, image)
    assert isinstance(loaded.entry, ProtectedModeEntry)
    assert (loaded.start, loaded.entry.eip) == (0x200000, 0x200000)
    assert struct.unpack_from("<I", memory.read(loaded.entry.esi, 4096), 0x214) == (0x200000,)


def test_an_initrd_stays_out_of_the_memory_that_32_bit_code_works_in(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(make_code32(pref_address=0x100000, init_size=0x2FF000))
    memory = make_memory()
    assert load_image(path, memory, initrd=bytes(0x1000)).initrd.gpa == 0x3FF000
    with pytest.raises(ImageError, match="does not fit beside the kernel"):
        load_image(path, memory, initrd=bytes(0x1001))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"syssize": 0x1000}, "is a truncated bzImage: it has 147 bytes of code and says 65536"),
        (
            {"pref_address": 0x100000, "init_size": 0x400000},
            "at 0x100000 to 0x4fffff, which is not all guest RAM",
        ),
        ({"pref_address": 0xB8000, "init_size": 0x10}, "at 0xb8000 to 0xb800f, which is not all guest RAM"),
        ({"pref_address": 1 << 40, "init_size": 0x10, "relocatable": 1}, "beyond the first 4 GiB"),
        ({"code32_start": 0x300000}, "its entry point at 0x300000 is outside its code"),
    ],
)
def test_32_bit_code_that_cannot_run_is_refused(
    tmp_path: Path, options: dict[str, int], sentence: str
) -> None:
    with pytest.raises(ImageError) as caught:
        load(tmp_path, make_code32(**options))
    assert sentence in str(caught.value)


def test_a_linux_with_both_entries_is_entered_in_64_bit_mode_unless_the_other_is_asked_for(
    tmp_path: Path,
) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(make_bzimage(COMPRESSIONS["zstd"](VMLINUX), code32_start=0x100000))
    assert load_image(path, make_memory()).protocol is BootProtocol.LINUX64
    loaded = load_image(path, make_memory(), boot_protocol=BootProtocol.LINUX32)
    assert isinstance(loaded.entry, ProtectedModeEntry)
    assert loaded.entry.eip == 0x100000


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_truncation_is_refused_as_an_image_error(tmp_path: Path, compression: str) -> None:
    image = make_bzimage(COMPRESSIONS[compression](VMLINUX))
    boundaries = {
        0,
        1,
        0x1F1,
        0x1FE,
        0x201,
        0x202,
        0x206,
        0x26B,
        0x26C,
        0x290,
        512,
        1024,
        1536,
        1600,
        len(image) - 1,
    }
    for length in sorted({*boundaries, *range(1590, len(image), 61)}):
        if length < len(image):
            with pytest.raises(ImageError):
                load(tmp_path, image[:length])


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_payload_cut_short_in_a_file_of_the_right_length_is_refused(
    tmp_path: Path, compression: str
) -> None:
    payload = COMPRESSIONS[compression](VMLINUX)
    cut = payload[: len(payload) // 2]
    with pytest.raises(ImageError):
        load(tmp_path, make_bzimage(cut + payload[-4:]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0x1F1, 0x290), st.integers(0, 7)), min_size=1, max_size=8))
def test_flipped_header_bits_give_an_image_error_or_a_loaded_kernel(
    tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    image = bytearray(make_bzimage(COMPRESSIONS["zstd"](VMLINUX)))
    for offset, bit in flips:
        image[offset] ^= 1 << bit
    with suppress(ImageError):
        loaded, memory = load(tmp_path, bytes(image))
        if loaded.protocol is BootProtocol.LINUX64:
            assert memory.read(loaded.start, len(TEXT)) == TEXT


@settings(deadline=None)
@given(
    compression=st.sampled_from(sorted(COMPRESSIONS)),
    flips=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 7)), min_size=1, max_size=4),
)
def test_a_damaged_payload_gives_an_image_error_or_bytes(
    compression: str, flips: list[tuple[int, int]]
) -> None:
    payload = bytearray(COMPRESSIONS[compression](VMLINUX))
    for offset, bit in flips:
        payload[offset % len(payload)] ^= 1 << bit
    size = len(payload) if compression == "uncompressed" else int.from_bytes(payload[-4:], "little")
    with suppress(ImageError):
        assert len(decompress(bytes(payload))) == size


@pytest.mark.parametrize("compression", sorted(set(COMPRESSIONS) - {"uncompressed", "gzip"}))
def test_a_payload_that_unpacks_to_more_than_it_says_is_refused(compression: str) -> None:
    bomb = COMPRESSIONS[compression](bytes(32 * MIB))[:-4]
    with pytest.raises(ImageError, match="the payload"):
        decompress(with_size(bomb, 1 * MIB))


def test_a_zstd_content_size_does_not_decide_on_the_allocation() -> None:
    # A raw frame with an 8-byte content size of 1 TiB and one empty last block (RFC 8878, 3.1.1)
    frame = b"\x28\xb5\x2f\xfd" + bytes([0xE0]) + struct.pack("<Q", 1 << 40) + b"\x01\x00\x00"
    with pytest.raises(ImageError, match="damaged"):
        decompress(with_size(frame, 1024))


def test_a_payload_that_says_it_is_larger_than_any_kernel_is_refused() -> None:
    with pytest.raises(ImageError, match="which no kernel has"):
        decompress(with_size(COMPRESSIONS["zstd"](b"")[:-4], MAX_VMLINUX_SIZE + 1))


def test_a_payload_larger_than_guest_memory_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    vmlinux = make_elf(Load(0x100000, bytes(8 * MIB)))
    with pytest.raises(
        ImageError, match=r"unpacks to 8\.0 MiB and there is room for .*; give the guest more memory"
    ):
        load(tmp_path, make_bzimage(COMPRESSIONS["zstd"](vmlinux)))


def test_a_kernel_packed_with_lzo_is_refused_by_name() -> None:
    with pytest.raises(ImageError, match="packed with lzo, which is not supported"):
        decompress(b"\x89LZO\0\r\n\x1a\n" + bytes(32))


def test_an_unknown_payload_is_refused_with_its_first_bytes() -> None:
    with pytest.raises(ImageError, match="starts with de ad be ef"):
        decompress(b"\xde\xad\xbe\xef" + bytes(32))


def test_a_payload_that_is_no_elf_file_names_the_kernel(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"kernel is a bzImage that cannot be used: is not an ELF file"):
        load(tmp_path, make_bzimage(COMPRESSIONS["gzip"](b"not a kernel" * 10)))
