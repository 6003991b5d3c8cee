"""Other people's images, from Debian: firmware that starts at the reset vector, and a memory test.

None of them ends by itself, so each is run until its output has what the test waits for.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from lasskvm.images.catalog import MEMTEST, SEABIOS

#: What a terminal is told of colours and places.
_CONTROL_SEQUENCE = re.compile(r"\x1b(?:\[[?0-9;]*[A-Za-z]|c)")


@pytest.fixture(scope="module")
def seabios(until: Callable[..., str]) -> list[str]:
    """The lines that SeaBIOS prints, on its debug port and on the serial port, until nothing is left to boot from."""
    output = until(SEABIOS, "No bootable device.\r\n", "--memory", "64")
    return _CONTROL_SEQUENCE.sub("", output).replace("\r", "").splitlines()


def test_seabios_starts_and_says_so_on_its_debug_port_and_on_the_serial_port(seabios: list[str]) -> None:
    # On the debug port at once; then on the screen, which is the serial port, and which the debug port shows too.
    assert len([line for line in seabios if re.match(r"SeaBIOS \(version .*\)$", line)]) == 3
    assert any(line.startswith("sercon: using ioport 0x3f8") for line in seabios)


def test_seabios_finds_fw_cfg_and_all_memory_in_it(seabios: list[str]) -> None:
    assert "Found QEMU fw_cfg" in seabios
    assert "QEMU fw_cfg DMA interface supported" in seabios
    assert "qemu/e820: addr 0x0000000000000000 len 0x0000000004000000 [RAM]" in seabios


def test_seabios_finds_kvm_and_its_clock(seabios: list[str]) -> None:
    assert "Running on KVM" in seabios
    assert "kvmclock: stable tsc, 1000 MHz" in seabios


def test_seabios_places_the_acpi_tables_and_reads_them(seabios: list[str]) -> None:
    assert any(re.match(r"table\(50434146\)=0x[0-9a-f]+ \(via xsdt\)", line) for line in seabios)
    assert any(re.match(r"ACPI: parse DSDT at 0x[0-9a-f]+ \(len \d+\)", line) for line in seabios)


def test_seabios_tries_each_kind_of_disk_and_does_not_try_again(seabios: list[str]) -> None:
    tries = [line for line in seabios if line.startswith("Booting from")]
    assert tries == ["Booting from Floppy..."] * 2 + ["Booting from Hard Disk..."] * 2
    assert not any("Retrying" in line for line in seabios)


def test_seabios_prints_no_line_into_another(seabios: list[str]) -> None:
    assert seabios.count("Boot failed: could not read the boot disk") == 4


def test_memtest_knows_the_machine_and_begins_to_test_it(until: Callable[..., str]) -> None:
    # It waits for seconds to pass before it shows anything, which takes far longer where the guest's clock counts code.
    words = ("--memory", "16", "--clock", "host", "--append", "console=ttyS0,115200 nobench")
    screen = _CONTROL_SEQUENCE.sub("\n", until(MEMTEST, "Address test", *words))
    assert re.search(r"Memtest86\+ v\d+", screen)
    assert "lasskvm virtual CPU" in screen
    # Measured against the ACPI timer; by the host's clock it is as exact as the host is idle.
    assert re.search(r"CLK/Temp: +(9\d\d|10\d\d)MHz", screen)
    assert re.search(r"Memory +: +16MB", screen)
    assert re.search(r"Errors: 0\b", screen)
