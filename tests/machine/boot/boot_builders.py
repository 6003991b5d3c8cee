"""Small kernels for the loader's tests, built byte by byte from the specifications."""

from __future__ import annotations

import bz2
import gzip
import lzma
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import lz4.block
import zstandard

from lasskvm.kvm.structures import DescriptorTable, Regs, Sregs
from lasskvm.memory import GuestMemory
from lasskvm.state import Segment

MIB = 1 << 20
ET_REL, ET_EXEC, ET_DYN = 1, 2, 3
PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4
EM_386, EM_X86_64, EM_AARCH64 = 3, 62, 183


@dataclass(frozen=True)
class Load:
    """A program header and what it loads; *memory_size* and *virtual* default to the file's size and
    *physical*."""

    physical: int
    data: bytes
    memory_size: int | None = None
    virtual: int | None = None
    type: int = PT_LOAD


def make_elf(
    *loads: Load, entry: int = 0x100000, kind: int = ET_EXEC, machine: int = EM_X86_64, elf_class: int = 2
) -> bytes:
    header_size = 64 + 56 * len(loads)
    ident = b"\x7fELF" + bytes([elf_class, 1, 1]) + bytes(9)
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH", kind, machine, 1, entry, 64, 0, 0, 64, 56, len(loads), 0, 0, 0
    )
    program_headers, contents = b"", b""
    for load in loads:
        size = len(load.data) if load.memory_size is None else load.memory_size
        virtual = load.physical if load.virtual is None else load.virtual
        offset = header_size + len(contents)
        program_headers += struct.pack(
            "<IIQQQQQQ", load.type, 5, offset, virtual, load.physical, len(load.data), size, 0x1000
        )
        contents += load.data
    return header + program_headers + contents


def make_elf32(*loads: Load, entry: int = 0x100000, kind: int = ET_EXEC, machine: int = EM_386) -> bytes:
    header_size = 52 + 32 * len(loads)
    ident = b"\x7fELF\x01\x01\x01" + bytes(9)
    header = ident + struct.pack(
        "<HHIIIIIHHHHHH", kind, machine, 1, entry, 52, 0, 0, 52, 32, len(loads), 0, 0, 0
    )
    program_headers, contents = b"", b""
    for load in loads:
        size = len(load.data) if load.memory_size is None else load.memory_size
        virtual = load.physical if load.virtual is None else load.virtual
        offset = header_size + len(contents)
        program_headers += struct.pack(
            "<IIIIIIII", load.type, offset, virtual, load.physical, len(load.data), size, 5, 0x1000
        )
        contents += load.data
    return header + program_headers + contents


def make_note(owner: bytes, kind: int, descriptor: bytes) -> bytes:
    """An ELF note, each part padded to four bytes."""
    name = owner + b"\0"
    head = struct.pack("<III", len(name), len(descriptor), kind)
    return head + name + bytes(-len(name) % 4) + descriptor + bytes(-len(descriptor) % 4)


def make_multiboot_header(flags: int = 0, *addresses: int, wrong_checksum: bool = False) -> bytes:
    """A multiboot header; *addresses* are header_addr, load_addr, load_end_addr, bss_end_addr and entry_addr."""
    checksum = -(0x1BADB002 + flags) + wrong_checksum
    return struct.pack(f"<III{len(addresses)}I", 0x1BADB002, flags, checksum % (1 << 32), *addresses)


def with_size(compressed: bytes, size: int) -> bytes:
    """What the kernel's build does to every format but gzip."""
    return compressed + struct.pack("<I", size)


def lz4_legacy(data: bytes) -> bytes:
    blocks = [data[start : start + 8 * MIB] for start in range(0, len(data), 8 * MIB)]
    packed = [lz4.block.compress(block, store_size=False) for block in blocks]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(block)) + block for block in packed)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": lambda data: with_size(bz2.compress(data), len(data)),
    "lzma": lambda data: with_size(lzma.compress(data, lzma.FORMAT_ALONE), len(data)),
    "xz": lambda data: with_size(lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32), len(data)),
    "lz4": lambda data: with_size(lz4_legacy(data), len(data)),
    "zstd": lambda data: with_size(zstandard.compress(data), len(data)),
    "zstd-stream": lambda data: with_size(
        zstandard.ZstdCompressor(write_content_size=False).compress(data), len(data)
    ),
    "uncompressed": lambda data: data,
}


def make_bzimage(
    payload: bytes,
    *,
    version: int = 0x20F,
    xloadflags: int = 1,
    cmdline_size: int = 2047,
    initrd_addr_max: int = 0x7FFFFFFF,
    version_string: bytes = b"7.2.0-test (someone@somewhere) #1",
    code32_start: int = 0,
    pref_address: int = 0,
    init_size: int = 0,
    relocatable: int = 0,
    syssize: int = 0,
) -> bytes:
    """A bzImage with two setup sectors behind the boot sector, and *payload* 64 bytes into its
    protected-mode part."""
    setup_sectors, payload_offset = 2, 64
    image = bytearray((1 + setup_sectors) * 512 + payload_offset)
    image[0x1F1] = setup_sectors
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x200:0x202] = b"\xeb\x6a"
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, version)
    struct.pack_into("<H", image, 0x20E, 0x300 - 0x200)
    image[0x300 : 0x300 + len(version_string)] = version_string
    struct.pack_into("<I", image, 0x22C, initrd_addr_max)
    struct.pack_into("<H", image, 0x236, xloadflags)
    struct.pack_into("<I", image, 0x238, cmdline_size)
    struct.pack_into("<I", image, 0x1F4, syssize)
    image[0x211] = 1
    struct.pack_into("<I", image, 0x214, code32_start)
    image[0x234] = relocatable
    struct.pack_into("<II", image, 0x248, payload_offset, len(payload))
    struct.pack_into("<QI", image, 0x258, pref_address, init_size)
    return bytes(image) + payload


def make_memory(size: int = 4 * MIB, *more: tuple[int, int]) -> GuestMemory:
    """Memory with one slot of *size* bytes at 0, and more as (gpa, size)."""
    memory = GuestMemory()
    for number, (gpa, length) in enumerate([(0, size), *more]):
        memory.set_slot(number, gpa, mmap.mmap(-1, length))
    return memory


class Registers:
    """A vCPU of which only the registers exist, for the entries of images."""

    def __init__(self) -> None:
        junk = {field.name: 0x1111 for field in fields(Regs)}
        segment = Segment(0x33, 0x44000, 0x55FFF, 0x93)
        table = DescriptorTable(0x6000, 0x77)
        self.regs = Regs(**junk)
        self.sregs = Sregs(
            *[segment] * 8,
            table,
            table,
            cr0=0x80000011,
            cr2=8,
            cr3=9,
            cr4=0x20,
            cr8=5,
            efer=0x500,
            apic_base=0xFEE00900,
        )

    def get_regs(self) -> Regs:
        return replace(self.regs)

    def set_regs(self, regs: Regs) -> None:
        self.regs = replace(regs)

    def get_sregs(self) -> Sregs:
        return replace(self.sregs)

    def set_sregs(self, sregs: Sregs) -> None:
        self.sregs = replace(sregs)
