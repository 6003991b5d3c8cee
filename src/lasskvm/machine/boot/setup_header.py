"""The Linux/x86 setup header: the part of a bzImage that tells a boot loader what the kernel needs.

Field names, offsets and meanings are those of Documentation/arch/x86/boot.rst; offsets count from the start
of the image, which are also the offsets in ``struct boot_params``.
"""

from __future__ import annotations

import struct

from lasskvm.errors import ImageError

__all__ = ["CMDLINE_SIZE", "HEADER_START", "LOADED_HIGH", "XLF_KERNEL_64", "SetupHeader", "has_setup_header"]

HEADER_START = 0x1F1
#: The header may not go beyond this offset: ``edd_mbr_sig_buffer`` of boot_params follows.
HEADER_LIMIT = 0x290

BOOT_FLAG = 0xAA55
HEADER_MAGIC = int.from_bytes(b"HdrS", "little")
#: The header ends at 0x202 plus the byte at 0x201, the operand of the jump over it.
_JUMP_OPERAND = 0x201
_JUMP_BASE = 0x202
_MAGIC_OFFSET = 0x202

#: loadflags: the protected-mode code lies at 1 MiB or above.
LOADED_HIGH = 1 << 0
#: xloadflags: the kernel has a 64-bit entry point (protocol 2.12).
XLF_KERNEL_64 = 1 << 0

#: ``initrd_addr_max`` came with protocol 2.03, a ``syssize`` of four bytes with 2.04, ``cmdline_size`` with 2.06,
#: ``pref_address`` with 2.10, ``xloadflags`` with 2.12.
VERSION_INITRD_ADDR_MAX = 0x203
VERSION_SYSSIZE = 0x204
VERSION_CMDLINE_SIZE = 0x206
VERSION_PREF_ADDRESS = 0x20A
VERSION_XLOADFLAGS = 0x20C
VERSION_NEWEST = 0x20F

#: COMMAND_LINE_SIZE of x86 without the terminating zero, and the highest initrd byte; for kernels without a
#: header.
CMDLINE_SIZE = 2047
INITRD_ADDR_MAX = 0x7FFFFFFF
#: What counts where the header is too old to say: the highest initrd byte, and the longest command line.
OLD_INITRD_ADDR_MAX = 0x37FFFFFF
OLD_CMDLINE_SIZE = 255

_FIELDS = {
    "setup_sects": (0x1F1, "<B"),
    "syssize": (0x1F4, "<I"),
    "boot_flag": (0x1FE, "<H"),
    "header": (0x202, "<I"),
    "version": (0x206, "<H"),
    "kernel_version": (0x20E, "<H"),
    "type_of_loader": (0x210, "<B"),
    "loadflags": (0x211, "<B"),
    "code32_start": (0x214, "<I"),
    "ramdisk_image": (0x218, "<I"),
    "ramdisk_size": (0x21C, "<I"),
    "cmd_line_ptr": (0x228, "<I"),
    "initrd_addr_max": (0x22C, "<I"),
    "kernel_alignment": (0x230, "<I"),
    "relocatable_kernel": (0x234, "<B"),
    "xloadflags": (0x236, "<H"),
    "cmdline_size": (0x238, "<I"),
    "payload_offset": (0x248, "<I"),
    "payload_length": (0x24C, "<I"),
    "setup_data": (0x250, "<Q"),
    "pref_address": (0x258, "<Q"),
    "init_size": (0x260, "<I"),
}


class SetupHeader:
    """A setup header; fields by their names in boot.rst, those that an old protocol lacks are 0.

    >>> hex(SetupHeader.synthesized()["version"])
    '0x20f'
    """

    def __init__(self, data: bytes) -> None:
        """*data* are the bytes from offset 0x1f1 of the image to the end of the header."""
        self._data = data.ljust(HEADER_LIMIT - HEADER_START, b"\0")[: HEADER_LIMIT - HEADER_START]

    @classmethod
    def parse(cls, image: bytes) -> SetupHeader:
        """The header of the bzImage that starts with *image* (the first ``HEADER_LIMIT`` bytes are enough).

        Raises :class:`ImageError`, whose sentence goes on after the file's name, when it is truncated.
        """
        end = _JUMP_BASE + image[_JUMP_OPERAND] if len(image) > _JUMP_OPERAND else HEADER_LIMIT
        if len(image) < min(end, HEADER_LIMIT):
            raise ImageError("is a truncated bzImage: it ends inside the setup header; get the kernel again")
        header = cls(image[HEADER_START:end])
        if header["boot_flag"] != BOOT_FLAG:
            raise ImageError("is a damaged bzImage: its boot flag is not 0xaa55; get the kernel again")
        return header

    @classmethod
    def synthesized(cls) -> SetupHeader:
        """The header for a kernel that has none, such as a vmlinux: what a 64-bit kernel of today would
        say."""
        return cls(b"").replace(
            boot_flag=BOOT_FLAG,
            header=HEADER_MAGIC,
            version=VERSION_NEWEST,
            loadflags=LOADED_HIGH,
            xloadflags=XLF_KERNEL_64,
            cmdline_size=CMDLINE_SIZE,
            initrd_addr_max=INITRD_ADDR_MAX,
        )

    def __getitem__(self, name: str) -> int:
        """The value of field *name*."""
        offset, form = _FIELDS[name]
        return int(struct.unpack_from(form, self._data, offset - HEADER_START)[0])

    @property
    def initrd_limit(self) -> int:
        """The first address that an initrd must not reach."""
        if self["version"] < VERSION_INITRD_ADDR_MAX:
            return OLD_INITRD_ADDR_MAX + 1
        return self["initrd_addr_max"] + 1

    @property
    def command_line_limit(self) -> int:
        """The most bytes that a command line may have, without its terminating zero."""
        if self["version"] < VERSION_CMDLINE_SIZE:
            return OLD_CMDLINE_SIZE
        return self["cmdline_size"] or CMDLINE_SIZE

    def replace(self, **fields: int) -> SetupHeader:
        """A copy with some fields changed."""
        data = bytearray(self._data)
        for name, value in fields.items():
            offset, form = _FIELDS[name]
            struct.pack_into(form, data, offset - HEADER_START, value)
        return SetupHeader(bytes(data))

    def to_bytes(self) -> bytes:
        """The header as it goes into boot_params at offset 0x1f1."""
        return self._data


def has_setup_header(image: bytes) -> bool:
    """Whether *image* has the magic of a bzImage, "HdrS" at offset 0x202."""
    return image[_MAGIC_OFFSET : _MAGIC_OFFSET + 4] == HEADER_MAGIC.to_bytes(4, "little")
