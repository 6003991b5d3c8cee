"""What firmware reads in the CMOS about the machine."""

import pytest

from lasskvm.kvm.clock import VirtualClock
from lasskvm.machine.devices import Rtc
from lasskvm.machine.devices.cmos_map import describe_machine

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def described(low: int, high: int = 0) -> bytearray:
    cmos = bytearray(128)
    describe_machine(cmos, low, high)
    return cmos


def number(cmos: bytearray, register: int, size: int) -> int:
    return int.from_bytes(cmos[register : register + size], "little")


@pytest.mark.parametrize(
    ("low", "high", "kib_from_1_mib", "units_from_16_mib", "units_from_4_gib"),
    [
        (4 * MIB, 0, 3 * KIB, 0, 0),
        (16 * MIB, 0, 15 * KIB, 0, 0),
        (64 * MIB, 0, 63 * KIB, 0x300, 0),
        (65 * MIB, 0, 0xFFFF, 0x310, 0),
        (256 * MIB, 0, 0xFFFF, 0xF00, 0),
        (3 * GIB, 5 * GIB, 0xFFFF, 0xBF00, 5 * GIB >> 16),
        (3 * GIB, 2 << 40, 0xFFFF, 0xBF00, 0xFFFFFF),
    ],
)
def test_memory_sizes_as_firmware_counts_them(low, high, kib_from_1_mib, units_from_16_mib, units_from_4_gib):
    cmos = described(low, high)
    assert number(cmos, 0x15, 2) == 640
    assert number(cmos, 0x17, 2) == number(cmos, 0x30, 2) == kib_from_1_mib
    assert number(cmos, 0x34, 2) == units_from_16_mib
    assert number(cmos, 0x5B, 3) == units_from_4_gib


def test_there_is_a_coprocessor_and_there_are_no_drives():
    cmos = described(64 * MIB)
    assert (cmos[0x10], cmos[0x12], cmos[0x14]) == (0, 0, 0x02)


def test_the_boot_order_is_disk_floppy_cd():
    cmos = described(64 * MIB)
    assert (cmos[0x3D], cmos[0x38]) == (0x12, 0x30)


def test_the_processors_beside_the_first_are_counted():
    cmos = bytearray(128)
    describe_machine(cmos, 64 * MIB, 0, processors=4)
    assert cmos[0x5F] == 3
    assert described(64 * MIB)[0x5F] == 0


def test_the_checksum_is_the_sum_of_0x10_to_0x2d_high_byte_first():
    cmos = described(256 * MIB)
    assert sum(cmos[0x10:0x2E]) == cmos[0x2E] << 8 | cmos[0x2F] == 0x02 + 0x80 + 0x02 + 0xFF + 0xFF


def test_the_clock_keeps_its_registers_and_a_guest_reads_the_map():
    rtc = Rtc(VirtualClock(lambda: 0), lambda level: None)
    before = bytes(rtc.cmos[:0x0E])
    describe_machine(rtc.cmos, 64 * MIB, 0)
    assert bytes(rtc.cmos[:0x0E]) == before
    rtc.write_port(0x70, 1, 0x35)
    assert rtc.read_port(0x71, 1) == 0x03
