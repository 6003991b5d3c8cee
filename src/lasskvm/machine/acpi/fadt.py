"""The FADT: where the fixed hardware is, and what the machine does not have.

Source: ACPI specification, "Fixed ACPI Description Table (FADT)".
"""

from __future__ import annotations

import struct

from lasskvm.machine.devices.acpi_pm import (
    ACPI_DISABLE,
    ACPI_ENABLE,
    GPE0_LENGTH,
    GPE0_PORT,
    PM1_CONTROL_LENGTH,
    PM1_CONTROL_PORT,
    PM1_EVENT_LENGTH,
    PM1_EVENT_PORT,
    PM_TIMER_LENGTH,
    PM_TIMER_PORT,
    SCI_IRQ,
    SMI_COMMAND_PORT,
)
from lasskvm.machine.devices.reset_control import RESET_CONTROL_PORT, RESET_FULL
from lasskvm.machine.devices.rtc import CENTURY

__all__ = ["DSDT_POINTER", "FACS_POINTER", "FADT_REVISION", "X_DSDT_POINTER", "fadt"]

#: That of ACPI 4.0: 64-bit addresses, a reset register, and a boot flag for the missing VGA.
FADT_REVISION = 4

#: Offsets in the table of the pointers to others. X_FIRMWARE_CTRL stays 0: the FACS lies below 4 GiB.
FACS_POINTER, DSDT_POINTER, X_DSDT_POINTER = 36, 40, 140

#: FIRMWARE_CTRL, DSDT, a reserved byte, the preferred profile, SCI_INT, SMI_CMD, four commands to it, eight blocks,
#: six lengths, GPE1_BASE, CST_CNT, two latencies, two cache flush values, duty cycle, three CMOS indices, boot
#: flags, a reserved byte, flags.
_FIRST_PART = struct.Struct("<IIBBHIBBBB8I8BHHHHBBBBBHBI")
#: RESET_VALUE, ARM flags and minor version, X_FIRMWARE_CTRL, X_DSDT.
_AFTER_RESET = struct.Struct("<BHBQQ")
#: A generic address: address space, width in bits, offset in bits, access size, address.
_ADDRESS = struct.Struct("<BBBBQ")
SPACE_IO = 1
ACCESS_BYTE, ACCESS_WORD, ACCESS_DWORD = 1, 2, 3

PROFILE_DESKTOP = 1
#: A latency above these means that the processor has no such state.
NO_C2 = 101
NO_C3 = 1001

BOOT_LEGACY_DEVICES = 1 << 0
BOOT_NO_VGA = 1 << 2
BOOT_NO_ASPM = 1 << 4

FLAG_WBINVD = 1 << 0
FLAG_C1 = 1 << 2
#: There is a fixed power button, so its flag is 0; there is none for sleeping, nor a wake-up by the RTC.
FLAG_NO_SLEEP_BUTTON = 1 << 5
FLAG_NO_RTC_WAKE = 1 << 6
FLAG_RESET_REGISTER = 1 << 10


def fadt() -> bytes:
    """The FADT's body. Its pointers are 0."""
    blocks = (PM1_EVENT_PORT, 0, PM1_CONTROL_PORT, 0, 0, PM_TIMER_PORT, GPE0_PORT, 0)
    # No GPE1, so no base of it either; no command for _CST.
    lengths = (PM1_EVENT_LENGTH, PM1_CONTROL_LENGTH, 0, PM_TIMER_LENGTH, GPE0_LENGTH, 0, 0, 0)
    first = _FIRST_PART.pack(
        *(0, 0, 0, PROFILE_DESKTOP, SCI_IRQ, SMI_COMMAND_PORT, ACPI_ENABLE, ACPI_DISABLE, 0, 0),
        *blocks,
        *lengths,
        *(NO_C2, NO_C3, 0, 0, 0, 0, 0, 0, CENTURY),
        *(BOOT_LEGACY_DEVICES | BOOT_NO_VGA | BOOT_NO_ASPM, 0),
        FLAG_WBINVD | FLAG_C1 | FLAG_NO_SLEEP_BUTTON | FLAG_NO_RTC_WAKE | FLAG_RESET_REGISTER,
    )
    nowhere = _ADDRESS.pack(0, 0, 0, 0, 0)
    return b"".join(
        (
            first,
            _io(RESET_CONTROL_PORT, 1, ACCESS_BYTE),
            _AFTER_RESET.pack(RESET_FULL, 0, 0, 0, 0),
            _io(PM1_EVENT_PORT, PM1_EVENT_LENGTH, ACCESS_WORD),
            nowhere,
            _io(PM1_CONTROL_PORT, PM1_CONTROL_LENGTH, ACCESS_WORD),
            nowhere,
            nowhere,
            _io(PM_TIMER_PORT, PM_TIMER_LENGTH, ACCESS_DWORD),
            _io(GPE0_PORT, GPE0_LENGTH, ACCESS_BYTE),
            nowhere,
        )
    )


def _io(port: int, length: int, access: int) -> bytes:
    return _ADDRESS.pack(SPACE_IO, 8 * length, 0, access, port)
