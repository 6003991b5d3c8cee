"""fw_cfg: what firmware reads through the ports and by DMA, and what it cannot make the device do."""

import mmap
import random
import struct

import pytest

from lasskvm.errors import LassKvmError
from lasskvm.kvm.iobus import PortBus
from lasskvm.machine.devices.fw_cfg import FwCfg, FwCfgKey
from lasskvm.machine.devices.fw_cfg_items import (
    BOOT_ORDER_FILE,
    E820_FILE,
    Payload,
    boot_fail_wait,
    boot_menu_wait,
    boot_order,
    e820_file,
    kernel_items,
    machine_items,
    serial_console,
)
from lasskvm.memory import SLOT_READONLY, GuestMemory

SELECTOR, DATA, DMA_HIGH, DMA_LOW = 0x510, 0x511, 0x514, 0x518
ERROR, READ, SKIP, SELECT, WRITE = 1, 2, 4, 8, 16
RAM_SIZE, ROM, ROM_SIZE = 0x10000, 0x20000, 0x1000
COMMAND, BUFFER = 0x1000, 0x2000
MIB, GIB = 1 << 20, 1 << 30


class Bench:
    """A device with two files on a bus, 64 KiB of RAM from 0, and a page of ROM at 128 KiB."""

    def __init__(self) -> None:
        self.memory = GuestMemory()
        self.memory.set_slot(0, 0, mmap.mmap(-1, RAM_SIZE))
        self.memory.set_slot(1, ROM, mmap.mmap(-1, ROM_SIZE), SLOT_READONLY)
        self.fw_cfg = FwCfg(self.memory)
        self.bus = PortBus()
        self.bus.register(self.fw_cfg)

    def select(self, key: int) -> None:
        assert self.bus.write(SELECTOR, 2, key)

    def take(self, count: int) -> bytes:
        return bytes(self.bus.read(DATA, 1) for _ in range(count))

    def start_dma(self, gpa: int) -> None:
        for port, half in ((DMA_HIGH, gpa >> 32), (DMA_LOW, gpa & 0xFFFFFFFF)):
            assert self.bus.write(port, 4, int.from_bytes(half.to_bytes(4, "big"), "little"))

    def dma(self, control: int, length: int = 0, address: int = BUFFER, at: int = COMMAND) -> int:
        """Run a command, and return its control field."""
        self.memory.write(at, struct.pack(">IIQ", control, length, address))
        self.start_dma(at)
        return int.from_bytes(self.memory.read(at, 4), "big")


@pytest.fixture
def bench():
    return Bench()


def test_the_device_says_that_it_is_there_and_can_do_dma(bench):
    bench.select(FwCfgKey.SIGNATURE)
    assert bench.take(6) == b"QEMU\0\0"
    bench.select(FwCfgKey.ID)
    assert bench.take(4) == b"\x03\0\0\0"
    assert bytes(bench.bus.read(DMA_HIGH + offset, 1) for offset in range(8)) == b"QEMU CFG"


def test_a_wide_read_of_the_dma_register_has_the_bytes_in_the_order_of_the_ports(bench):
    assert bench.bus.read(DMA_HIGH, 4).to_bytes(4, "little") == b"QEMU"
    assert bench.bus.read(DMA_LOW, 4).to_bytes(4, "little") == b" CFG"
    assert bench.bus.read(DMA_HIGH + 2, 2).to_bytes(2, "little") == b"MU"


def test_selecting_starts_at_the_first_byte_again_and_either_port_gives_the_next(bench):
    bench.select(FwCfgKey.SIGNATURE)
    assert bench.take(3) == b"QEM"
    bench.select(FwCfgKey.SIGNATURE)
    assert bytes(bench.bus.read(port, 1) for port in (SELECTOR, DATA)) == b"QE"


def test_the_write_bit_of_a_key_selects_the_same_item(bench):
    bench.select(0x4000 | FwCfgKey.SIGNATURE)
    assert bench.take(4) == b"QEMU"


@pytest.mark.parametrize("key", [0x1A, 0x20, 0x3FFF, 0x4020, 0x8000, 0xFFFF])
def test_an_item_that_is_not_there_reads_as_zeros(bench, key):
    bench.select(key)
    assert bench.take(5) == bytes(5)


def test_bytes_written_to_the_ports_change_nothing(bench):
    bench.select(FwCfgKey.SIGNATURE)
    for port in (SELECTOR, DATA):
        bench.bus.write(port, 1, 0x01)
    assert bench.take(4) == b"QEMU"


def test_a_wide_read_of_the_selector_takes_no_byte(bench):
    bench.select(FwCfgKey.SIGNATURE)
    assert bench.bus.read(SELECTOR, 2) == 0
    assert bench.take(4) == b"QEMU"


def test_the_directory_lists_the_files_by_name_and_each_can_be_read(bench):
    contents = {"opt/zeta": b"last", "bootorder": b"first\0", "etc/e820": bytes(40)}
    for name, data in contents.items():
        bench.fw_cfg.add_file(name, data)
    bench.select(FwCfgKey.FILE_DIR)
    count = int.from_bytes(bench.take(4), "big")
    entries = [struct.unpack(">IHH56s", bench.take(64)) for _ in range(count)]
    names = [entry[3].rstrip(b"\0").decode() for entry in entries]
    assert names == sorted(contents)
    assert [entry[1] for entry in entries] == [0x20, 0x21, 0x22]
    for (size, key, _, _), name in zip(entries, names, strict=True):
        bench.select(key)
        assert bench.take(size) == contents[name]
        assert bench.take(1) == b"\0"


@pytest.mark.parametrize("name", ["", "x" * 56, "opt/\u00e4", "opt/a\0b"])
def test_a_file_name_that_does_not_fit_the_directory_is_refused(bench, name):
    with pytest.raises(LassKvmError, match=r"1 to 55 ASCII characters"):
        bench.fw_cfg.add_file(name, b"")


def test_the_longest_file_name_fits_and_a_second_file_of_that_name_is_refused(bench):
    bench.fw_cfg.add_file("x" * 55, b"")
    with pytest.raises(LassKvmError, match="give the second one another name"):
        bench.fw_cfg.add_file("x" * 55, b"")
    bench.select(FwCfgKey.FILE_DIR)
    assert bench.take(68)[12:] == b"x" * 55 + b"\0"


@pytest.mark.parametrize("key", [-1, 0x20, 0x3FFF, 0x4001, 0x10000])
def test_an_item_cannot_have_the_key_of_a_file_or_one_that_nobody_can_select(bench, key):
    with pytest.raises(ValueError, match="is no key"):
        bench.fw_cfg.add_item(key, b"")


def test_dma_selects_an_item_and_reads_it_to_memory(bench):
    assert bench.dma(FwCfgKey.SIGNATURE << 16 | SELECT | READ, 4) == 0
    assert bench.memory.read(BUFFER, 5) == b"QEMU\0"


def test_dma_goes_on_where_the_last_access_stopped_and_fills_up_with_zeros(bench):
    bench.select(FwCfgKey.SIGNATURE)
    assert bench.take(1) == b"Q"
    assert bench.dma(SKIP, 1) == 0
    bench.memory.write(BUFFER, b"\xaa" * 8)
    assert bench.dma(READ, 6) == 0
    assert bench.memory.read(BUFFER, 8) == b"MU\0\0\0\0\xaa\xaa"


def test_dma_that_only_selects_moves_nothing(bench):
    bench.memory.write(BUFFER, b"\xaa" * 4)
    assert bench.dma(FwCfgKey.ID << 16 | SELECT, 4) == 0
    assert bench.memory.read(BUFFER, 4) == b"\xaa" * 4
    assert bench.take(1) == b"\x03"


def test_dma_cannot_write_to_an_item(bench):
    bench.select(FwCfgKey.SIGNATURE)
    bench.memory.write(BUFFER, b"KVM!")
    assert bench.dma(WRITE, 4) == ERROR
    bench.select(FwCfgKey.SIGNATURE)
    assert bench.take(4) == b"QEMU"


@pytest.mark.parametrize("address", [RAM_SIZE, ROM, 1 << 40, (1 << 64) - 2])
def test_dma_to_what_is_no_ram_is_an_error(bench, address):
    assert bench.dma(SELECT | READ, 4, address) == ERROR
    assert bench.memory.read(ROM, 4) == bytes(4)


def test_dma_across_the_end_of_ram_fills_the_ram_and_is_an_error(bench):
    assert bench.dma(SELECT | READ, 4, RAM_SIZE - 2) == ERROR
    assert bench.memory.read(RAM_SIZE - 2, 2) == b"QE"


def test_dma_may_cross_from_one_slot_into_the_next(bench):
    bench.memory.set_slot(2, RAM_SIZE, mmap.mmap(-1, 0x1000))
    assert bench.dma(SELECT | READ, 4, RAM_SIZE - 2) == 0
    assert bench.memory.read(RAM_SIZE - 2, 4) == b"QEMU"


def test_the_longest_dma_ends_with_the_memory(bench):
    """4 GiB of zeros into 64 KiB of RAM: all of it, the command itself included, and not a byte beyond."""
    bench.memory.write(0, b"\xaa" * RAM_SIZE)
    assert bench.dma(SELECT | READ, (1 << 32) - 1, 0) == ERROR
    assert bench.memory.read(0, COMMAND) == b"QEMU".ljust(COMMAND, b"\0")
    assert bench.memory.read(COMMAND + 4, RAM_SIZE - COMMAND - 4) == bytes(RAM_SIZE - COMMAND - 4)


@pytest.mark.parametrize("gpa", [RAM_SIZE, RAM_SIZE - 8, (1 << 64) - 16])
def test_a_command_that_does_not_lie_in_memory_does_nothing(bench, gpa):
    bench.select(FwCfgKey.ID)
    bench.start_dma(gpa)
    assert bench.take(1) == b"\x03"


def test_a_command_cut_off_by_the_end_of_memory_gets_the_error_bit(bench):
    bench.start_dma(RAM_SIZE - 8)
    assert bench.memory.read(RAM_SIZE - 8, 4) == b"\0\0\0\x01"


def test_dma_tells_the_memory_that_code_was_overwritten(bench):
    stores = []
    bench.memory.on_code_store = lambda gpa, size: stores.append((gpa, size))
    bench.memory.find(BUFFER).page_flags[BUFFER >> 12] |= 1
    bench.dma(SELECT | READ, 4)
    assert stores == [(BUFFER, 4)]


def test_the_upper_half_of_an_address_is_used_once(bench):
    bench.bus.write(DMA_HIGH, 4, 0x01000000)
    bench.bus.write(DMA_LOW, 4, 0)
    assert bench.dma(SELECT | READ, 4) == 0


def test_a_saved_device_goes_on_within_an_item(bench):
    bench.select(FwCfgKey.SIGNATURE)
    bench.take(2)
    bench.bus.write(DMA_HIGH, 4, 0x12345678)
    other = Bench()
    other.fw_cfg.set_state(bench.fw_cfg.get_state())
    assert other.take(2) == b"MU"
    assert other.fw_cfg.get_state() == {"key": 0, "offset": 4, "dma_address": 0x7856341200000000}
    with pytest.raises(ValueError, match="offset"):
        other.fw_cfg.set_state({"key": 0, "offset": -1, "dma_address": 0})


def test_reset_selects_the_signature_and_keeps_the_files(bench):
    bench.fw_cfg.add_file("opt/kept", b"kept")
    bench.select(FwCfgKey.ID)
    bench.take(1)
    bench.fw_cfg.reset()
    assert bench.take(4) == b"QEMU"
    bench.select(0x20)
    assert bench.take(4) == b"kept"


def test_random_commands_never_raise_and_never_leave_the_ram(bench):
    chance = random.Random(510)
    bench.fw_cfg.add_file("opt/file", chance.randbytes(300))
    addresses = (0, COMMAND, BUFFER, RAM_SIZE - 100, RAM_SIZE, ROM - 50, ROM, 1 << 52, (1 << 64) - 1)
    for _ in range(2_000):
        control = chance.choice((0, FwCfgKey.FILE_DIR, 0x20, 0xFFFF)) << 16 | chance.getrandbits(5)
        bench.memory.write(
            COMMAND,
            struct.pack(">IIQ", control, chance.getrandbits(chance.randrange(33)), chance.choice(addresses)),
        )
        bench.start_dma(chance.choice((COMMAND, COMMAND, COMMAND, chance.getrandbits(64))))
        for port in range(DMA_HIGH - 5, DMA_LOW + 5):
            size = chance.choice((1, 2, 4))
            value = bench.bus.read(port, size)
            assert value is None or 0 <= value < 1 << 8 * size
            bench.bus.write(port, size, chance.getrandbits(8 * size))
        assert 0 <= bench.fw_cfg.offset <= 300
    assert bench.memory.read(ROM, ROM_SIZE) == bytes(ROM_SIZE)


def test_the_items_of_a_machine_have_the_widths_that_qemu_gives_them():
    items = machine_items(3 * GIB, 1)
    assert items[FwCfgKey.RAM_SIZE] == struct.pack("<Q", 3 * GIB)
    assert items[FwCfgKey.NB_CPUS] == items[FwCfgKey.MAX_CPUS] == b"\x01\0"
    assert items[FwCfgKey.NOGRAPHIC] == b"\x01\0"
    assert items[FwCfgKey.BOOT_MENU] == b"\0\0"


def test_kernel_items_are_there_only_for_what_is_given():
    assert kernel_items() == {}
    items = kernel_items(
        kernel=Payload(0x400000, b"kernel"), entry=0x400010, command_line=Payload(0x20000, b"quiet")
    )
    assert items == {
        FwCfgKey.KERNEL_ADDR: struct.pack("<I", 0x400000),
        FwCfgKey.KERNEL_SIZE: struct.pack("<I", 6),
        FwCfgKey.KERNEL_DATA: b"kernel",
        FwCfgKey.KERNEL_ENTRY: struct.pack("<I", 0x400010),
        FwCfgKey.CMDLINE_ADDR: struct.pack("<I", 0x20000),
        FwCfgKey.CMDLINE_SIZE: struct.pack("<I", 6),
        FwCfgKey.CMDLINE_DATA: b"quiet\0",
    }
    assert kernel_items(initrd=Payload(1, b"x")).keys() == {
        FwCfgKey.INITRD_ADDR,
        FwCfgKey.INITRD_SIZE,
        FwCfgKey.INITRD_DATA,
    }


def test_the_memory_map_has_an_entry_for_each_side_of_the_hole():
    entry = struct.Struct("<QQI")
    assert list(entry.iter_unpack(e820_file(128 * MIB, 0))) == [(0, 128 * MIB, 1)]
    assert list(entry.iter_unpack(e820_file(3 * GIB, GIB))) == [(0, 3 * GIB, 1), (4 * GIB, GIB, 1)]


def test_the_small_files_of_seabios():
    assert serial_console(0x3F8) == b"\xf8\x03"
    assert boot_menu_wait(500) == b"\xf4\x01"
    assert boot_fail_wait(500) == b"\xf4\x01\0\0"
    assert boot_fail_wait(None) == b"\xff\xff\xff\xff"
    assert boot_order(["/rom@genroms/one", "HALT"]) == b"/rom@genroms/one\nHALT\0"
    assert (E820_FILE, BOOT_ORDER_FILE) == ("etc/e820", "bootorder")
