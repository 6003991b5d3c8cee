"""What a machine says of itself: to firmware by CMOS and fw_cfg, to kernels that are booted directly by ACPI tables.

With firmware the tables reach the guest through the firmware, which finds them as fw_cfg files; without, they lie in
the BIOS area, where kernels look for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from lasskvm.kvm.interface import VcpuInterface
from lasskvm.machine.acpi import BIOS_AREA_START, AcpiTables
from lasskvm.machine.bios_data import place_bios_data
from lasskvm.machine.boot.e820 import E820Entry
from lasskvm.machine.devices.cmos_map import describe_machine
from lasskvm.machine.devices.fw_cfg_items import (
    BOOT_FAIL_WAIT_FILE,
    E820_FILE,
    SERIAL_CONSOLE_FILE,
    boot_fail_wait,
    e820_file,
    machine_items,
    serial_console,
)
from lasskvm.machine.devices.uart16550 import COM1_PORT
from lasskvm.machine.hardware import Hardware
from lasskvm.memory import GuestMemory
from lasskvm.x86.msr import MSR_IA32_MTRR_DEF_TYPE, MTRR_DEF_TYPE_ENABLE

__all__ = ["describe", "leave_as_firmware"]

_WRITE_BACK = 6


def describe(
    hardware: Hardware, low_memory: int, high_memory: int, reserved: Iterable[E820Entry] = ()
) -> None:
    """Fill CMOS and fw_cfg of a machine with *low_memory* bytes from 0 and *high_memory* bytes from 4 GiB.

    *reserved* are ranges behind its memory.
    """
    describe_machine(hardware.rtc.cmos, low_memory, high_memory)
    fw_cfg = hardware.fw_cfg
    for key, data in machine_items(low_memory + high_memory).items():
        fw_cfg.add_item(key, data)
    fw_cfg.add_file(E820_FILE, e820_file(low_memory, high_memory, reserved))
    # There is no screen: what firmware would show on one goes to the serial port.
    fw_cfg.add_file(SERIAL_CONSOLE_FILE, serial_console(COM1_PORT))
    # Another try would find as little to boot from.
    fw_cfg.add_file(BOOT_FAIL_WAIT_FILE, boot_fail_wait(None))
    for name, data in _acpi_tables().loader_files().items():
        fw_cfg.add_file(name, data)


def leave_as_firmware(memory: GuestMemory, vcpu: VcpuInterface) -> int:
    """Leave what firmware leaves behind for what it starts; the gpa of ACPI's RSDP.

    In *memory*, the BIOS data area and the ACPI tables; in *vcpu*, memory types: write-back where nothing else is said.
    """
    vcpu.set_msrs({MSR_IA32_MTRR_DEF_TYPE: MTRR_DEF_TYPE_ENABLE | _WRITE_BACK})
    place_bios_data(memory)
    _acpi_tables().place(memory, BIOS_AREA_START)
    return BIOS_AREA_START


@cache
def _acpi_tables() -> AcpiTables:
    return AcpiTables()
