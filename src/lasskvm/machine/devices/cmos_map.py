"""What firmware finds in the CMOS memory of a PC about the machine it is on.

Sources: IBM PC AT technical reference for the map up to 0x3f; above that, and for memory beyond 16 MiB, what QEMU's pc
machine stores for SeaBIOS.
"""

from __future__ import annotations

__all__ = ["describe_machine"]

KIB = 1 << 10
MIB = 1 << 20
#: Memory above 16 MiB is counted in these.
EXTENDED_UNIT = 64 * KIB

SHUTDOWN_STATUS = 0x0F
FLOPPY_TYPES = 0x10
DISK_TYPES = 0x12
EQUIPMENT = 0x14
#: Conventional memory below 640 KiB, in KiB.
BASE_MEMORY = 0x15
#: Memory from 1 MiB, in KiB; and the same as the self-test found it.
EXTENDED_MEMORY = 0x17
EXTENDED_MEMORY_FOUND = 0x30
#: Memory from 16 MiB to 4 GiB, and from 4 GiB, in 64 KiB.
MEMORY_ABOVE_16_MIB = 0x34
MEMORY_ABOVE_4_GIB = 0x5B
#: The low nibble keeps the test of a floppy's boot signature on when 0, the high one is the third choice.
BOOT_THIRD = 0x38
#: The first choice in the low nibble, the second in the high one.
BOOT_FIRST_AND_SECOND = 0x3D
#: How many processors there are beside the first.
OTHER_PROCESSORS = 0x5F

#: The checksum, high byte first, is the sum of these.
CHECKSUMMED = range(0x10, 0x2E)
CHECKSUM_HIGH, CHECKSUM_LOW = 0x2E, 0x2F

#: Equipment: a floating-point unit. No display adapter, no floppies, no pointing device.
EQUIPMENT_FPU = 1 << 1
#: Devices to boot from.
BOOT_FLOPPY, BOOT_DISK, BOOT_CD = 1, 2, 3

BASE_MEMORY_LIMIT = 640 * KIB
EXTENDED_MEMORY_START = 1 * MIB
ABOVE_16_MIB_START = 16 * MIB


def describe_machine(cmos: bytearray, low_memory: int, high_memory: int, processors: int = 1) -> None:
    """Write the machine's facts into *cmos*, :attr:`Rtc.cmos <lasskvm.machine.devices.rtc.Rtc>`.

    *low_memory* is where the memory below 4 GiB ends, *high_memory* how much there is above, both in bytes. What a
    field cannot hold is its maximum.
    """
    extended = max(0, low_memory - EXTENDED_MEMORY_START) // KIB
    for register, size, value in (
        (SHUTDOWN_STATUS, 1, 0),
        (FLOPPY_TYPES, 1, 0),
        (DISK_TYPES, 1, 0),
        (EQUIPMENT, 1, EQUIPMENT_FPU),
        (BASE_MEMORY, 2, min(low_memory, BASE_MEMORY_LIMIT) // KIB),
        (EXTENDED_MEMORY, 2, extended),
        (EXTENDED_MEMORY_FOUND, 2, extended),
        (MEMORY_ABOVE_16_MIB, 2, max(0, low_memory - ABOVE_16_MIB_START) // EXTENDED_UNIT),
        (MEMORY_ABOVE_4_GIB, 3, high_memory // EXTENDED_UNIT),
        (BOOT_FIRST_AND_SECOND, 1, BOOT_FLOPPY << 4 | BOOT_DISK),
        (BOOT_THIRD, 1, BOOT_CD << 4),
        (OTHER_PROCESSORS, 1, processors - 1),
    ):
        most = (1 << 8 * size) - 1
        cmos[register : register + size] = min(value, most).to_bytes(size, "little")
    total = sum(cmos[register] for register in CHECKSUMMED)
    cmos[CHECKSUM_HIGH], cmos[CHECKSUM_LOW] = total.to_bytes(2, "big")
