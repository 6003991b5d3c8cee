"""`lasskvm run --cpu max,+sgx --epc SIZE`: how large an EPC is, where it is, and what is said of one that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_support import Cli, Result, kernel

from lasskvm.cli.sizes import parse_size
from lasskvm.errors import MemoryLayoutError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PATIENCE = "60"
#: Prints one of the four words of the subleaf that describes the EPC, from its high digit on.
SHOW = """
    mov eax, 0x12; mov ecx, 2; cpuid
    mov esi, {word}
    mov edi, 8; mov dx, 0x3f8
digit:
    rol esi, 4; mov eax, esi; and al, 15; add al, 48; cmp al, 58; jb out; add al, 39
out: out dx, al
    dec edi; jne digit
    mov al, 10; out dx, al
    xor eax, eax; out 0xf8, al
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "image"


def shown(cli: Cli, image: Path, word: str, *options: object) -> int:
    """A register of CPUID leaf 12H, subleaf 2."""
    image.write_bytes(kernel(SHOW.format(word=word)))
    result = cli("run", image, "-q", "--timeout", PATIENCE, *options)
    assert (result.status, result.err) == (0, "")
    return int(result.out.strip(), 16)


def refused(result: Result) -> str:
    assert result.status == 2
    assert result.out == ""
    return str(result.error)


@pytest.mark.parametrize("engine", ["jit", "emulator"])
def test_the_guest_is_told_of_an_epc_of_the_size_that_was_asked_for(
    cli: Cli, image: Path, engine: str
) -> None:
    assert shown(cli, image, "ecx", "--cpu", "max,+sgx", "--epc", "64K", "--engine", engine) == 64 * KIB | 1


def test_a_processor_with_sgx_has_8_mib_unless_something_else_is_said(cli: Cli, image: Path) -> None:
    assert shown(cli, image, "ecx", "--cpu", "max,+sgx") == 8 * MIB | 1


def test_without_sgx_there_is_none(cli: Cli, image: Path) -> None:
    """Leaf 12H is out of range or empty; in no case does it name a section of type 1."""
    assert shown(cli, image, "eax") & 0xF != 1


def test_the_epc_begins_at_4_gib_when_all_memory_is_below(cli: Cli, image: Path) -> None:
    assert shown(cli, image, "eax", "--cpu", "max,+sgx") == 1
    assert shown(cli, image, "ebx", "--cpu", "max,+sgx") == 1


def test_firmware_may_have_an_epc_too(cli: Cli, image: Path) -> None:
    rom = bytearray(b"\xf4" * 64 * KIB)
    rom[0xFFF0:0xFFF6] = bytes.fromhex("b000 e6f8 ebfe")  # mov al, 0; out 0xf8, al; hang
    image.write_bytes(rom)
    result = cli("run", "--firmware", image, "--cpu", "max,+sgx", "--epc", "1M", "-q", "--timeout", PATIENCE)
    assert (result.status, result.err) == (0, "")


@pytest.mark.parametrize(
    "cpu, epc, said",
    [
        ("max", "8M", "add it with --cpu max,+sgx, or leave --epc out"),
        ("max,-lass", "8M", "--epc is for a processor with SGX"),
        ("max,+sgx", "0", "give --epc a size, such as 8M, or leave +sgx out"),
        ("max,+sgx", "6143K", "give it a multiple of 4 KiB, such as 8M"),
        ("max,+sgx", "1K", "give it a multiple of 4 KiB, such as 8M"),
        ("max,+sgx", "a lot", '"a lot" is no size; write --epc like 8M, 64K or 1G'),
        ("max,+sgx", "-8M", "is no size"),
        ("max,+sgx", "8.5M", "is no size"),
        ("max,+sgx", "8T", "is no size"),
        ("max,+sgx", "9" * 30, "is no size"),
        ("max,+sgx", "", "is no size"),
        ("max,+sgx", "900000G", "this host has"),
        ("amd", "8M", "--epc is for a processor with SGX"),
        ("amd,+sgx", "8M", "is a feature of Intel's processors"),
    ],
)
def test_an_epc_that_cannot_be_is_refused_with_one_sentence(
    cli: Cli, image: Path, cpu: str, epc: str, said: str
) -> None:
    image.write_bytes(kernel("hlt"))
    assert said in refused(cli("run", image, "--cpu", cpu, f"--epc={epc}"))


def test_a_machine_that_is_loaded_has_the_epc_that_it_had(cli: Cli, image: Path, tmp_path: Path) -> None:
    image.write_bytes(kernel("hang: jmp hang"))
    saved = tmp_path / "saved"
    options = ("--cpu", "max,+sgx", "--epc", "1M", "-q")
    result = cli("run", image, *options, "--save", saved, "--save-after", "0.1", "--timeout", PATIENCE)
    assert (result.status, result.err) == (0, "")
    result = cli("run", "--load", saved, "--epc", "1M")
    assert result.status == 2
    assert "leave --epc out" in " ".join(result.err.replace("│", " ").split())
    assert cli("run", "--load", saved, "-q", "--timeout", "0.5").status == 124


@pytest.mark.parametrize(
    "text, size",
    [("8M", 8 * MIB), ("8m", 8 * MIB), ("8MiB", 8 * MIB), ("8", 8 * MIB), ("64K", 64 * KIB), ("2G", 2 * GIB),
     (" 1M ", MIB)],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text, "--epc") == size


@pytest.mark.parametrize("text", ["M", "8X", "0x10", "8 M", "٨M", "1e3"])
def test_what_is_no_size_is_named_with_its_option(text: str) -> None:
    with pytest.raises(MemoryLayoutError, match="write --epc like 8M"):
        parse_size(text, "--epc")
