"""What a BIOS leaves in low memory, for images that are started without one: its data area, and interrupt vectors.

Kernels take the end of low memory from the data area. Some go back to real mode and call the BIOS, too; there is no
service here, and each call returns with the carry flag, by which they know.

Source: Ralf Brown's Interrupt List, INTERRUP.LST and MEMORY.LST, segment 0x40.
"""

from __future__ import annotations

import struct

from lasskvm.machine.boot.layout import LEGACY_HOLE_START
from lasskvm.machine.devices.uart16550 import COM1_PORT
from lasskvm.memory import GuestMemory

__all__ = ["place_bios_data"]

#: Where a BIOS has the IRET for the interrupts that it does not serve.
_NO_SERVICE = 0xFFF53
#: push bp; mov bp, sp; or byte [bp + 6], 1; pop bp; iret
_RETURN_WITH_CARRY = bytes.fromhex("55 89e5 804e0601 5d cf")
_BIOS_SEGMENT = 0xF000
_VECTORS = 256
_VECTOR = struct.Struct("<HH")

_COM1_BASE = 0x400
_EXTENDED_AREA_SEGMENT = 0x40E
_EQUIPMENT = 0x410
_MEMORY_SIZE = 0x413

_EQUIPMENT_FPU = 1 << 1
_EQUIPMENT_SERIAL_SHIFT = 9

_KIB = 1 << 10
_PARAGRAPH_SHIFT = 4
_WORD = 2


def place_bios_data(memory: GuestMemory) -> None:
    """Write into *memory* what a BIOS leaves on a PC with one serial port; the extended area has 1 KiB."""
    offset = _NO_SERVICE - (_BIOS_SEGMENT << _PARAGRAPH_SHIFT)
    memory.write(0, _VECTOR.pack(offset, _BIOS_SEGMENT) * _VECTORS)
    memory.write(_NO_SERVICE, _RETURN_WITH_CARRY)
    memory.store(_COM1_BASE, _WORD, COM1_PORT)
    memory.store(_EXTENDED_AREA_SEGMENT, _WORD, LEGACY_HOLE_START >> _PARAGRAPH_SHIFT)
    memory.store(_EQUIPMENT, _WORD, _EQUIPMENT_FPU | 1 << _EQUIPMENT_SERIAL_SHIFT)
    memory.store(_MEMORY_SIZE, _WORD, LEGACY_HOLE_START // _KIB)
    memory.store(LEGACY_HOLE_START, 1, 1)
