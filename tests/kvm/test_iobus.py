"""The port and MMIO buses: who is asked, how wide accesses are cut, what happens where nobody answers."""

import pytest

from lasskvm.errors import LassKvmError
from lasskvm.kvm.iobus import MmioBus, PortBus


class Registers:
    """A port device that logs its accesses and reads as the low byte of the port, in every byte."""

    def __init__(self, ports: range, register_size: int = 1) -> None:
        self.ports = (ports,)
        self.register_size = register_size
        self.log: list[tuple[int, ...]] = []

    def read_port(self, port: int, size: int) -> int:
        self.log.append((port, size))
        return int.from_bytes(bytes((port + offset & 0xFF) for offset in range(size)), "little")

    def write_port(self, port: int, size: int, value: int) -> None:
        self.log.append((port, size, value))

    def reset(self) -> None:
        self.log.clear()


class Window:
    def __init__(self, base: int, size: int) -> None:
        self.base = base
        self.size = size
        self.log: list[tuple[int, ...]] = []

    def read_mmio(self, gpa: int, size: int) -> int:
        self.log.append((gpa, size))
        return -1

    def write_mmio(self, gpa: int, size: int, value: int) -> None:
        self.log.append((gpa, size, value))


def bus_with(*devices: Registers) -> PortBus:
    bus = PortBus()
    for device in devices:
        bus.register(device)
    return bus


def test_nobody_claims_an_empty_bus():
    bus = PortBus()
    for size in (1, 2, 4):
        assert bus.read(0x3F8, size) is None
        assert bus.write(0x3F8, size, 0) is False


def test_a_byte_access_reaches_the_device_with_the_value_masked():
    device = Registers(range(0x10, 0x14))
    bus = bus_with(device)
    assert bus.write(0x12, 1, 0x1234) is True
    assert bus.read(0x13, 1) == 0x13
    assert device.log == [(0x12, 1, 0x34), (0x13, 1)]


def test_a_read_value_wider_than_the_access_is_masked():
    class Wide(Registers):
        def read_port(self, port: int, size: int) -> int:
            return -1

    bus = bus_with(Wide(range(0x10, 0x14)))
    assert [bus.read(0x10, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]


def test_a_wide_access_to_byte_registers_is_split_from_the_low_byte_up():
    device = Registers(range(0x10, 0x14))
    bus = bus_with(device)
    bus.write(0x10, 4, 0x44332211)
    assert device.log == [(0x10, 1, 0x11), (0x11, 1, 0x22), (0x12, 1, 0x33), (0x13, 1, 0x44)]
    assert bus.read(0x10, 2) == 0x1110


def test_a_wide_register_takes_the_access_in_one_piece():
    device = Registers(range(0xF4, 0xF8), register_size=4)
    bus = bus_with(device)
    bus.write(0xF4, 4, 0xDEADBEEF)
    assert bus.read(0xF4, 2) == 0xF5F4
    assert device.log == [(0xF4, 4, 0xDEADBEEF), (0xF4, 2)]


def test_a_wide_access_over_the_end_of_a_wide_device_is_cut_to_fit():
    device = Registers(range(0xF4, 0xF8), register_size=4)
    bus = bus_with(device)
    bus.write(0xF6, 4, 0x44332211)
    assert device.log == [(0xF6, 2, 0x2211)]


def test_bytes_that_nobody_claims_read_as_ones_within_an_access_that_hits_a_device():
    bus = bus_with(Registers(range(0x12, 0x13)))
    assert bus.read(0x10, 4) == 0xFF12FFFF
    assert bus.write(0x11, 2, 0) is True


def test_one_wide_access_can_hit_two_devices():
    low, high = Registers(range(0x10, 0x12)), Registers(range(0x12, 0x14))
    bus = bus_with(low, high)
    bus.write(0x11, 2, 0xBBAA)
    assert (low.log, high.log) == ([(0x11, 1, 0xAA)], [(0x12, 1, 0xBB)])


def test_an_access_does_not_wrap_at_the_end_of_io_space():
    bus = bus_with(Registers(range(0xFFFF, 0x10000)), Registers(range(1)))
    assert bus.read(0xFFFF, 4) == 0xFFFFFFFF


def test_overlapping_ports_are_refused_and_leave_the_bus_as_it_was():
    first = Registers(range(0x12, 0x14))
    bus = bus_with(first)
    with pytest.raises(LassKvmError, match="0x12"):
        bus.register(Registers(range(0x10, 0x14)))
    assert bus.read(0x10, 1) is None
    assert bus.read(0x12, 1) == 0x12
    assert first.log == [(0x12, 1)]


def test_an_unregistered_device_is_gone_and_its_ports_are_free():
    device = Registers(range(0x10, 0x14))
    bus = bus_with(device)
    bus.unregister(device)
    bus.unregister(device)
    assert bus.read(0x10, 1) is None
    bus.register(Registers(range(0x10, 0x11)))
    assert bus.read(0x10, 1) == 0x10


def test_mmio_accesses_reach_the_device_that_covers_them_whole():
    bus = MmioBus()
    apic, ioapic = Window(0xFEE00000, 0x1000), Window(0xFEC00000, 0x1000)
    bus.register(apic)
    bus.register(ioapic)
    assert bus.write(0xFEE000B0, 4, 0x1_0000_0001) is True
    assert bus.read(0xFEC00010, 4) == 0xFFFFFFFF
    assert (apic.log, ioapic.log) == ([(0xFEE000B0, 4, 1)], [(0xFEC00010, 4)])


@pytest.mark.parametrize(("gpa", "size"), [(0xFFF, 1), (0xFFF, 2), (0x1FFD, 4), (0x2000, 1), (0, 8)])
def test_mmio_accesses_that_leave_the_range_are_not_claimed(gpa, size):
    bus = MmioBus()
    window = Window(0x1000, 0x1000)
    bus.register(window)
    assert bus.read(gpa, size) is None
    assert bus.write(gpa, size, 0) is False
    assert window.log == []


@pytest.mark.parametrize(("base", "size"), [(0x0, 0x1001), (0x1FFF, 1), (0x1000, 0x1000), (0x1800, 0x1000)])
def test_overlapping_mmio_ranges_are_refused(base, size):
    bus = MmioBus()
    bus.register(Window(0x1000, 0x1000))
    bus.register(Window(0x4000, 0x1000))
    with pytest.raises(LassKvmError, match="overlaps"):
        bus.register(Window(base, size))


def test_an_mmio_window_can_move_by_unregistering_it():
    bus = MmioBus()
    window = Window(0x1000, 0x1000)
    bus.register(window)
    bus.unregister(window)
    window.base = 0x8000
    bus.register(window)
    assert bus.read(0x1000, 1) is None
    assert bus.read(0x8FFF, 1) == 0xFF
