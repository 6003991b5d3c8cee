"""What the DSDT says: how to switch the machine off, and which devices it has at fixed ports.

The devices are those that cannot be found otherwise and that operating systems have drivers for. Identifiers are from
the ACPI specification, "Device Class-Specific Objects", and Microsoft's list of PNP device IDs.
"""

from __future__ import annotations

from collections.abc import Iterator

from lasskvm.machine.acpi import aml
from lasskvm.machine.devices.acpi_pm import (
    GPE0_LENGTH,
    GPE0_PORT,
    PM1_EVENT_PORT,
    PM_TIMER_LENGTH,
    PM_TIMER_PORT,
    SMI_COMMAND_PORT,
    SMI_LENGTH,
    SOFT_OFF,
)
from lasskvm.machine.devices.fw_cfg import FW_CFG_PORT, FW_CFG_PORT_COUNT
from lasskvm.machine.devices.rtc import RTC_IRQ, RTC_PORT
from lasskvm.machine.devices.uart16550 import COM1_IRQ, COM1_PORT, PORT_COUNT

__all__ = ["definition_block"]

UART_16550 = "PNP0501"
AT_RTC = "PNP0B00"
MOTHERBOARD_RESOURCES = "PNP0C02"
PROCESSOR = "ACPI0007"
FW_CFG = "QEMU0002"

RTC_PORT_COUNT = 2
#: _STA: present, enabled and working; shown to a user, or not.
STATUS_SHOWN = 0x0F
STATUS_HIDDEN = 0x0B


def definition_block(*, fw_cfg: bool) -> bytes:
    """The AML of the DSDT, without its header; *fw_cfg* when the machine has that device."""
    soft_off = aml.integer(SOFT_OFF)
    # SLP_TYPa, SLP_TYPb and two reserved elements
    sleep = aml.name("_S5", aml.package(soft_off, soft_off, aml.integer(0), aml.integer(0)))
    return sleep + aml.scope("_SB", *_devices(fw_cfg=fw_cfg))


def _devices(*, fw_cfg: bool) -> Iterator[bytes]:
    # _UID is the processor's in the MADT.
    yield aml.device(
        "CPU0",
        aml.name("_HID", aml.string(PROCESSOR)),
        aml.name("_UID", aml.integer(0)),
        _status(STATUS_SHOWN),
    )
    yield aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id(UART_16550)),
        aml.name("_UID", aml.integer(1)),
        _status(STATUS_SHOWN),
        _resources(aml.io_ports(COM1_PORT, PORT_COUNT), aml.irq(COM1_IRQ)),
    )
    yield aml.device(
        "RTC",
        aml.name("_HID", aml.eisa_id(AT_RTC)),
        _status(STATUS_SHOWN),
        _resources(aml.io_ports(RTC_PORT, RTC_PORT_COUNT), aml.irq(RTC_IRQ)),
    )
    # The fixed hardware's ports, so that nobody else takes them.
    yield aml.device(
        "PM",
        aml.name("_HID", aml.eisa_id(MOTHERBOARD_RESOURCES)),
        aml.name("_UID", aml.integer(0)),
        _status(STATUS_HIDDEN),
        _resources(
            aml.io_ports(PM1_EVENT_PORT, PM_TIMER_PORT + PM_TIMER_LENGTH - PM1_EVENT_PORT),
            aml.io_ports(GPE0_PORT, GPE0_LENGTH),
            aml.io_ports(SMI_COMMAND_PORT, SMI_LENGTH),
        ),
    )
    if fw_cfg:
        yield aml.device(
            "FWCF",
            aml.name("_HID", aml.string(FW_CFG)),
            _status(STATUS_HIDDEN),
            _resources(aml.io_ports(FW_CFG_PORT, FW_CFG_PORT_COUNT)),
        )


def _status(value: int) -> bytes:
    return aml.name("_STA", aml.integer(value))


def _resources(*descriptors: bytes) -> bytes:
    return aml.name("_CRS", aml.resource_template(*descriptors))
