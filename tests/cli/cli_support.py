"""The command line under test, called as the installed command calls it, and kernels small enough to read."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from lasskvm.cli import main
from lasskvm.conformance.assembler import assemble

LOAD_ADDRESS = 0x100000
ET_EXEC, EM_X86_64, PT_LOAD = 2, 62, 1
ELF_HEADER_SIZE, PROGRAM_HEADER_SIZE = 64, 56


@dataclass(frozen=True)
class Result:
    """What a person sees of one call."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one sentence that an error has to be."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


Cli = Callable[..., Result]
#: Boots a kernel given as assembly; more words of the command line behind it.
Boot = Callable[..., Result]


def make_cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """A function that runs the command with these words; it sees what is written to the descriptors, too."""

    def run(*words: object) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words], prog_name="lasskvm")
        captured = capfd.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return run


def elf(code: bytes, *, address: int = LOAD_ADDRESS, elf_class: int = 2, interpreter: bool = False) -> bytes:
    """An ELF executable of one segment, entered at its start; with *interpreter* also a dynamic one."""
    headers = 2 if interpreter else 1
    offset = ELF_HEADER_SIZE + headers * PROGRAM_HEADER_SIZE
    ident = b"\x7fELF" + bytes([elf_class, 1, 1]) + bytes(9)
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH", ET_EXEC, EM_X86_64, 1, address, ELF_HEADER_SIZE, 0, 0,
        ELF_HEADER_SIZE, PROGRAM_HEADER_SIZE, headers, 0, 0, 0,
    )  # fmt: skip
    segments = [(PT_LOAD, 5)] + ([(3, 4)] if interpreter else [])
    table = b"".join(
        struct.pack("<IIQQQQQQ", kind, flags, offset, address, address, len(code), len(code), 0x1000)
        for kind, flags in segments
    )
    return header + table + code


def kernel(source: str) -> bytes:
    """A 64-bit kernel: *source* is what it executes."""
    return elf(assemble(source, LOAD_ADDRESS).code)


def bzimage(payload: bytes, *, xloadflags: int = 1) -> bytes:
    """A bzImage with one setup sector behind the boot sector and *payload* behind that."""
    image = bytearray(1024)
    image[0x1F1] = 1
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x200:0x206] = b"\xeb\x6aHdrS"
    struct.pack_into("<H", image, 0x206, 0x20F)
    struct.pack_into("<H", image, 0x236, xloadflags)
    struct.pack_into("<II", image, 0x248, 0, len(payload))
    return bytes(image) + payload
