"""QEMU's ``pc-testdev``: interrupt lines, the register in two places, memory that is a device."""

from __future__ import annotations

import pytest

from lasskvm.kvm import MmioBus, PortBus
from lasskvm.machine.devices.pc_testdev import DeviceMemory, PcTestDevice


@pytest.fixture
def lines() -> list[tuple[int, bool]]:
    return []


@pytest.fixture
def ports(lines: list[tuple[int, bool]]) -> PortBus:
    bus = PortBus()
    bus.register(PcTestDevice(lambda gsi, level: lines.append((gsi, level))))
    return bus


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_write_drives_the_line_of_its_port(
    ports: PortBus, lines: list[tuple[int, bool]], size: int
) -> None:
    for port in (0x2000, 0x2009, 0x2014):
        ports.write(port, size, 1)
        ports.write(port, size, 0)
    assert lines == [(0, True), (0, False), (9, True), (9, False), (20, True), (20, False)]


def test_the_register_is_one_in_both_places_and_takes_parts(ports: PortBus) -> None:
    ports.write(0xE0, 4, 0x11223344)
    ports.write(0xE2, 1, 0xAA)
    ports.write(0xE8, 1, 0x55)
    assert ports.read(0xE0, 4) == 0x11AA3355
    assert [ports.read(0xE8 + offset, 1) for offset in (0, 2, 3)] == [0x55, 0xAA, 0x11]


def test_the_debug_console_keeps_its_port(ports: PortBus) -> None:
    assert ports.read(0xE9, 1) is None


def test_flushing_a_page_changes_nothing(ports: PortBus, lines: list[tuple[int, bool]]) -> None:
    ports.write(0xE0, 4, 7)
    ports.write(0xE4, 4, 0x12345000)
    assert (ports.read(0xE0, 4), ports.read(0xE4, 4), lines) == (7, 0, [])


def test_the_memory_keeps_what_is_stored_in_any_size() -> None:
    bus = MmioBus()
    bus.register(DeviceMemory())
    bus.write(0xFF000000, 8, 0x1122334455667788)
    bus.write(0xFF00FFFF, 1, 0x99)
    assert bus.read(0xFF000002, 4) == 0x33445566
    assert bus.read(0xFF00FFFF, 1) == 0x99
    assert bus.read(0xFF00FFFF, 2) is None


def test_what_was_saved_comes_back() -> None:
    device, memory = PcTestDevice(lambda gsi, level: None), DeviceMemory()
    device.write_port(0xE0, 4, 5)
    memory.write_mmio(0xFF000010, 4, 6)
    other, other_memory = PcTestDevice(lambda gsi, level: None), DeviceMemory()
    other.set_state(device.get_state())
    other_memory.set_state(memory.get_state())
    assert (other.read_port(0xE0, 4), other_memory.read_mmio(0xFF000010, 4)) == (5, 6)
    with pytest.raises(ValueError, match="bytes of test memory"):
        other_memory.set_state({"bytes": "00"})
