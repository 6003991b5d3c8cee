"""Where boot data lies in the first 640 KiB of guest-physical memory.

The loader builds everything the guest needs at its first instruction below the legacy hole, in memory that
the e820 map calls RAM: the guest may use it for itself as soon as it no longer needs what is there. Page 0
stays free.
"""

__all__ = [
    "BOOT_BLOCK_ADDRESS",
    "BOOT_DATA_END",
    "BOOT_DATA_START",
    "BOOT_PARAMS_ADDRESS",
    "COMMAND_LINE_ADDRESS",
    "COMMAND_LINE_ROOM",
    "DEVICE_SPACE_START",
    "FOUR_GIB",
    "GDT_ADDRESS",
    "LEGACY_HOLE_END",
    "LEGACY_HOLE_START",
    "MIB",
    "PAGE_TABLES_ADDRESS",
    "STACK_TOP",
]

MIB = 1 << 20
FOUR_GIB = 1 << 32

#: The extended BIOS data area, video memory and option ROMs of a PC: 639 KiB to 1 MiB, never RAM for the
#: guest.
LEGACY_HOLE_START = 0x9FC00
LEGACY_HOLE_END = 0x100000
#: From the IOAPIC up to 4 GiB: interrupt controllers and firmware, never RAM for the guest.
DEVICE_SPACE_START = 0xFEC00000

BOOT_DATA_START = 0x1000
GDT_ADDRESS = 0x1000
#: ``struct boot_params``, the "zero page": one page.
BOOT_PARAMS_ADDRESS = 0x7000
#: The stack of the first instructions: the page below this address.
STACK_TOP = 0x9000
#: The identity map: PML4, PDPT and four page directories.
PAGE_TABLES_ADDRESS = 0x9000
COMMAND_LINE_ADDRESS = 0x20000
#: Bytes for the command line, its terminating zero included.
COMMAND_LINE_ROOM = 0x10000
BOOT_DATA_END = COMMAND_LINE_ADDRESS + COMMAND_LINE_ROOM

#: Where multiboot and PVH images find what they are told, unless they are loaded there themselves: a page of stack,
#: then, at 0x9000 as in QEMU, the structures.
BOOT_BLOCK_ADDRESS = 0x8000
