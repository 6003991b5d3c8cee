"""What a PC says about itself in fw_cfg: items by key, and files.

Numbers are little-endian, of the widths that QEMU's pc machine gives them. The machine hands these items and files to
:class:`~lasskvm.machine.devices.fw_cfg.FwCfg`.

Source: the specification "QEMU Firmware Configuration (fw_cfg) Device" in QEMU's documentation; SeaBIOS,
"Runtime configuration".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lasskvm.machine.boot.e820 import E820Entry, E820Map, E820Type
from lasskvm.machine.boot.layout import FOUR_GIB
from lasskvm.machine.devices.fw_cfg import FwCfgKey

__all__ = [
    "BOOT_FAIL_WAIT_FILE",
    "BOOT_MENU_WAIT_FILE",
    "BOOT_ORDER_FILE",
    "E820_FILE",
    "SERIAL_CONSOLE_FILE",
    "Payload",
    "boot_fail_wait",
    "boot_menu_wait",
    "boot_order",
    "e820_file",
    "kernel_items",
    "machine_items",
    "serial_console",
]

E820_FILE = "etc/e820"
SERIAL_CONSOLE_FILE = "etc/sercon-port"
BOOT_ORDER_FILE = "bootorder"
BOOT_MENU_WAIT_FILE = "etc/boot-menu-wait"
BOOT_FAIL_WAIT_FILE = "etc/boot-fail-wait"
#: As a time to wait.
_FOR_EVER = 0xFFFF_FFFF


@dataclass(frozen=True)
class Payload:
    """Bytes that firmware is to put to the guest-physical *address*."""

    address: int
    data: bytes


def machine_items(
    ram_size: int, processors: int = 1, *, graphics: bool = False, boot_menu: bool = False
) -> dict[FwCfgKey, bytes]:
    """The items that every PC has; *ram_size* is all of its RAM in bytes."""
    return {
        FwCfgKey.RAM_SIZE: _number(ram_size, 8),
        FwCfgKey.NOGRAPHIC: _number(not graphics, 2),
        FwCfgKey.NB_CPUS: _number(processors, 2),
        FwCfgKey.BOOT_MENU: _number(boot_menu, 2),
        FwCfgKey.MAX_CPUS: _number(processors, 2),
        FwCfgKey.IRQ0_OVERRIDE: _number(1, 4),
    }


def kernel_items(
    *,
    kernel: Payload | None = None,
    entry: int | None = None,
    setup: Payload | None = None,
    initrd: Payload | None = None,
    command_line: Payload | None = None,
) -> dict[FwCfgKey, bytes]:
    """The items about a kernel that firmware is to start, each only when it is given.

    *entry* is the gpa of the first instruction, *setup* the real-mode part of a bzImage. The bytes of
    *command_line* are terminated by a zero here.
    """
    items: dict[FwCfgKey, bytes] = {}
    if command_line is not None:
        command_line = Payload(command_line.address, command_line.data + b"\0")
    for payload, address_key, size_key, data_key in (
        (kernel, FwCfgKey.KERNEL_ADDR, FwCfgKey.KERNEL_SIZE, FwCfgKey.KERNEL_DATA),
        (setup, FwCfgKey.SETUP_ADDR, FwCfgKey.SETUP_SIZE, FwCfgKey.SETUP_DATA),
        (initrd, FwCfgKey.INITRD_ADDR, FwCfgKey.INITRD_SIZE, FwCfgKey.INITRD_DATA),
        (command_line, FwCfgKey.CMDLINE_ADDR, FwCfgKey.CMDLINE_SIZE, FwCfgKey.CMDLINE_DATA),
    ):
        if payload is not None:
            items[address_key] = _number(payload.address, 4)
            items[size_key] = _number(len(payload.data), 4)
            items[data_key] = payload.data
    if entry is not None:
        items[FwCfgKey.KERNEL_ENTRY] = _number(entry, 4)
    return items


def e820_file(low_memory: int, high_memory: int, reserved: Iterable[E820Entry] = ()) -> bytes:
    """``etc/e820``: RAM from 0 to *low_memory*, *high_memory* bytes from 4 GiB, and what is *reserved* behind.

    Firmware cuts the legacy hole out itself.
    """
    entries = [E820Entry(0, low_memory, E820Type.RAM)]
    if high_memory:
        entries.append(E820Entry(FOUR_GIB, FOUR_GIB + high_memory, E820Type.RAM))
    return E820Map([*entries, *reserved]).to_bytes()


def serial_console(port: int) -> bytes:
    """``etc/sercon-port``: the UART that SeaBIOS shows its text screen on."""
    return _number(port, 2)


def boot_menu_wait(milliseconds: int) -> bytes:
    """``etc/boot-menu-wait``: how long the boot menu is offered."""
    return _number(milliseconds, 2)


def boot_fail_wait(milliseconds: int | None) -> bytes:
    """``etc/boot-fail-wait``: when to restart if there is nothing to boot from; None: never, as QEMU has it."""
    return _number(_FOR_EVER if milliseconds is None else milliseconds, 4)


def boot_order(paths: Sequence[str]) -> bytes:
    """``bootorder``: Open Firmware device paths, the first choice first."""
    return "\n".join(paths).encode("ascii") + b"\0"


def _number(value: int, size: int) -> bytes:
    return int(value).to_bytes(size, "little")
