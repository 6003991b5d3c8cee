"""QEMU's fw_cfg: named blobs of bytes that firmware and test kernels read about the machine they are on.

A guest writes a key to the selector and reads the item's bytes from the data port, one by one, or gives the
guest-physical address of a command to the DMA register. Behind an item's end, and where there is no item,
everything reads as zero.

All items are read-only. A DMA command comes from the guest and may say anything: it moves at most the bytes that lie
in the memory slots it names, and sets the error bit for the rest.

Source: the specification "QEMU Firmware Configuration (fw_cfg) Device" in QEMU's documentation.
"""

from __future__ import annotations

import struct
from bisect import insort
from collections.abc import Iterator
from enum import IntEnum

from lasskvm.errors import LassKvmError
from lasskvm.kvm.iobus import ALL_ONES, DeviceState
from lasskvm.memory import SLOT_READONLY, GuestMemory

__all__ = ["FW_CFG_PORT", "FW_CFG_PORT_COUNT", "MAX_FILES", "MAX_NAME", "FwCfg", "FwCfgKey"]

FW_CFG_PORT = 0x510
#: Ports from the selector to the end of the DMA register, as one range with a gap of two.
FW_CFG_PORT_COUNT = 12

#: The selector takes 16-bit writes. Bytes are read from either port, and bytes that are written go nowhere.
SELECTOR_PORT = FW_CFG_PORT
DATA_PORT = FW_CFG_PORT + 1
SELECTOR_SIZE = 2
#: The DMA register: 64 bits, big-endian, written as two halves. The lower one starts the command.
DMA_HIGH_PORT = FW_CFG_PORT + 4
DMA_LOW_PORT = FW_CFG_PORT + 8
DMA_SIZE = 8
DMA_HALF_SIZE = 4
#: What the DMA register reads as, from its first port on.
DMA_SIGNATURE = b"QEMU CFG"

SIGNATURE = b"QEMU"
#: The interface has selector and data port, and DMA.
ID_TRADITIONAL = 1 << 0
ID_DMA = 1 << 1

#: A key that is selected with this bit is the same item; it once meant writing.
KEY_WRITE_CHANNEL = 1 << 14
KEY_MASK = 0xFFFF
FIRST_FILE_KEY = 0x20
#: Files in the directory, at most: the keys that there are for them.
MAX_FILES = KEY_WRITE_CHANNEL - FIRST_FILE_KEY
#: Bytes of a file's name, at most; the field has a terminating zero.
MAX_NAME = 55
_COUNT = struct.Struct(">I")
#: A file in the directory: size, key, 0, name.
_FILE = struct.Struct(f">IHH{MAX_NAME + 1}s")

#: A DMA command: control, length, address.
_COMMAND = struct.Struct(">IIQ")
_CONTROL = struct.Struct(">I")
CONTROL_ERROR = 1 << 0
CONTROL_READ = 1 << 1
CONTROL_SKIP = 1 << 2
CONTROL_SELECT = 1 << 3
CONTROL_WRITE = 1 << 4
CONTROL_KEY_SHIFT = 16

#: Zeros are written in pieces of this size.
_ZEROS = bytes(1 << 20)


class FwCfgKey(IntEnum):
    """The keys of the items that have no name."""

    SIGNATURE = 0x00
    ID = 0x01
    RAM_SIZE = 0x03
    NOGRAPHIC = 0x04
    NB_CPUS = 0x05
    KERNEL_ADDR = 0x07
    KERNEL_SIZE = 0x08
    INITRD_ADDR = 0x0A
    INITRD_SIZE = 0x0B
    BOOT_MENU = 0x0E
    MAX_CPUS = 0x0F
    KERNEL_ENTRY = 0x10
    KERNEL_DATA = 0x11
    INITRD_DATA = 0x12
    CMDLINE_ADDR = 0x13
    CMDLINE_SIZE = 0x14
    CMDLINE_DATA = 0x15
    SETUP_ADDR = 0x16
    SETUP_SIZE = 0x17
    SETUP_DATA = 0x18
    FILE_DIR = 0x19
    #: The keys of an architecture have bit 15. A PC's timer interrupt arrives at the IOAPIC's pin 2.
    IRQ0_OVERRIDE = 0x8002


class FwCfg:
    """The device. DMA goes to *memory*.

    >>> fw_cfg = FwCfg(GuestMemory())
    >>> fw_cfg.write_port(0x510, 2, FwCfgKey.SIGNATURE)
    >>> bytes(fw_cfg.read_port(0x511, 1) for _ in range(6))
    b'QEMU\\x00\\x00'
    """

    ports = (range(SELECTOR_PORT, DATA_PORT + 1), range(DMA_HIGH_PORT, DMA_HIGH_PORT + DMA_SIZE))
    register_size = 4
    __slots__ = ("_files", "_items", "_memory", "_names", "dma_address", "key", "offset")

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._items: dict[int, bytes] = {}
        self._files: dict[str, bytes] = {}
        self._names: list[str] = []
        self.add_item(FwCfgKey.SIGNATURE, SIGNATURE)
        self.add_item(FwCfgKey.ID, (ID_TRADITIONAL | ID_DMA).to_bytes(4, "little"))
        self._list_files()
        self.reset()

    def add_item(self, key: int, data: bytes) -> None:
        """Let a guest that selects *key* read *data*; an item of that key is replaced.

        Raises ValueError for a key that no guest can select, or that belongs to the files.
        """
        if not 0 <= key <= KEY_MASK or key & KEY_WRITE_CHANNEL or FIRST_FILE_KEY <= key < KEY_WRITE_CHANNEL:
            raise ValueError(f"{key:#x} is no key for an item")
        self._items[key] = bytes(data)

    def add_file(self, name: str, data: bytes) -> None:
        """Put a file into the directory, which is sorted by name: keys are given in that order.

        Raises :class:`LassKvmError` for a name that is taken, empty, too long or not ASCII.
        """
        if not name or not name.isascii() or "\0" in name or len(name) > MAX_NAME:
            raise LassKvmError(
                f"the fw_cfg file name {name!r} cannot be given to a guest; "
                f"use 1 to {MAX_NAME} ASCII characters, such as opt/example"
            )
        if name in self._files:
            raise LassKvmError(f"the fw_cfg file {name} is there already; give the second one another name")
        if len(self._files) == MAX_FILES:
            raise LassKvmError(f"fw_cfg has room for {MAX_FILES} files; leave {name} out")
        self._files[name] = bytes(data)
        insort(self._names, name)
        self._list_files()

    def reset(self) -> None:
        """Select the signature. The items stay."""
        self.key: int = FwCfgKey.SIGNATURE
        self.offset = 0
        self.dma_address = 0

    def get_state(self) -> DeviceState:
        """What is selected, how far it has been read, and the upper half of a DMA address; not the items."""
        return {"key": self.key, "offset": self.offset, "dma_address": self.dma_address}

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`, on a device with the same items."""
        key, offset, dma_address = int(state["key"]), int(state["offset"]), int(state["dma_address"])
        if offset < 0:
            raise ValueError(f"fw_cfg at offset {offset}")
        self.key, self.offset, self.dma_address = key, offset, dma_address

    def read_port(self, port: int, size: int) -> int:
        """Read the next byte of the item, or the signature of the DMA register."""
        if port >= DMA_HIGH_PORT:
            start = port - DMA_HIGH_PORT
            return int.from_bytes(DMA_SIGNATURE[start : start + size], "little")
        if size != 1:
            return 0
        item = self._item()
        if self.offset >= len(item):
            return 0
        value = item[self.offset]
        self.offset += 1
        return value

    def write_port(self, port: int, size: int, value: int) -> None:
        """Select an item, or give half of a DMA address. Other accesses have no effect."""
        if port == SELECTOR_PORT and size == SELECTOR_SIZE:
            self._select(value)
        elif port == DMA_HIGH_PORT and size == DMA_HALF_SIZE:
            self.dma_address = _swap(value) << 8 * DMA_HALF_SIZE
        elif port == DMA_LOW_PORT and size == DMA_HALF_SIZE:
            gpa, self.dma_address = self.dma_address | _swap(value), 0
            self._command(gpa)

    def _select(self, key: int) -> None:
        self.key = key
        self.offset = 0

    def _item(self) -> bytes:
        key = self.key & ~KEY_WRITE_CHANNEL
        if FIRST_FILE_KEY <= key < KEY_WRITE_CHANNEL:
            number = key - FIRST_FILE_KEY
            return self._files[self._names[number]] if number < len(self._names) else b""
        return self._items.get(key, b"")

    def _list_files(self) -> None:
        entries = [
            _FILE.pack(len(self._files[name]), FIRST_FILE_KEY + number, 0, name.encode("ascii"))
            for number, name in enumerate(self._names)
        ]
        self._items[FwCfgKey.FILE_DIR] = b"".join((_COUNT.pack(len(entries)), *entries))

    def _command(self, gpa: int) -> None:
        """Do the command at *gpa* and tell its outcome in its control field."""
        memory = self._memory
        error = True
        if self._readable(gpa, _COMMAND.size):
            control, length, address = _COMMAND.unpack(memory.read(gpa, _COMMAND.size))
            if control & CONTROL_SELECT:
                self._select(control >> CONTROL_KEY_SHIFT)
            if control & CONTROL_READ:
                error = not self._read(address, length)
            elif control & CONTROL_WRITE:
                self._pass(length)
                error = length > 0
            else:
                if control & CONTROL_SKIP:
                    self._pass(length)
                error = False
        memory.store_bytes(gpa, _CONTROL.pack(CONTROL_ERROR if error else 0))

    def _pass(self, length: int) -> bytes:
        """Move on by *length* bytes, but not beyond the item's end. Returns the bytes that were passed."""
        data = self._item()[self.offset : self.offset + length]
        self.offset += len(data)
        return data

    def _read(self, gpa: int, length: int) -> bool:
        """Write *length* bytes of the item, then zeros, to *gpa*. Returns whether all of it was RAM."""
        data = self._pass(length)
        stored = 0
        for start, end in self._ranges(gpa, length, writable=True):
            stored += end - start
            while start < end:
                piece = data[start - gpa : end - gpa] or _ZEROS[: end - start]
                self._memory.store_bytes(start, piece)
                start += len(piece)
        return stored == length

    def _readable(self, gpa: int, length: int) -> bool:
        return sum(end - start for start, end in self._ranges(gpa, length, writable=False)) == length

    def _ranges(self, gpa: int, length: int, *, writable: bool) -> Iterator[tuple[int, int]]:
        """The parts of ``gpa .. gpa + length`` that lie in memory slots, as (start, end)."""
        for slot in self._memory:
            start, end = max(gpa, slot.gpa), min(gpa + length, slot.end)
            if start < end and not (writable and slot.flags & SLOT_READONLY):
                yield start, end


def _swap(value: int) -> int:
    """What a 32-bit OUT of *value* gives a big-endian register."""
    return int.from_bytes((value & ALL_ONES[DMA_HALF_SIZE]).to_bytes(DMA_HALF_SIZE, "little"), "big")
