"""The ACPI tables: RSDP, RSDT, XSDT, FADT, FACS, MADT and DSDT.

They describe the machine as it is: one processor, an IOAPIC and two 8259s, the PIIX4's fixed hardware, a reset
register; no keyboard controller, no VGA, no PCI. The timer's interrupt, ISA IRQ 0, arrives at pin 2 of the IOAPIC as on
QEMU's pc machine, so GSI 0 has to be routed there.

Source: ACPI specification, "ACPI Software Programming Model".
"""

from __future__ import annotations

import struct

from lasskvm.errors import MemoryLayoutError
from lasskvm.machine.acpi.dsdt import definition_block
from lasskvm.machine.acpi.fadt import DSDT_POINTER, FACS_POINTER, FADT_REVISION, X_DSDT_POINTER, fadt
from lasskvm.machine.acpi.linker import Linker, Zone
from lasskvm.machine.acpi.madt import MADT_REVISION, madt
from lasskvm.memory import GuestMemory

__all__ = ["BIOS_AREA_END", "BIOS_AREA_START", "LOADER_FILE", "RSDP_FILE", "TABLES_FILE", "AcpiTables"]

#: Where an operating system looks for the RSDP, at multiples of 16.
BIOS_AREA_START = 0xE0000
BIOS_AREA_END = 0x100000
RSDP_ALIGNMENT = 16

RSDP_FILE = "etc/acpi/rsdp"
TABLES_FILE = "etc/acpi/tables"
LOADER_FILE = "etc/table-loader"

#: The FACS has to be aligned so; the tables begin with it.
FACS_ALIGNMENT = 64
TABLE_ALIGNMENT = 16
#: Signature, length, hardware signature, waking vector, global lock, flags, X_ waking vector, version.
_FACS = struct.Struct("<4sIIIIIQB31x")
FACS_VERSION = 2

#: Signature, length, revision, checksum, OEM ID, OEM table ID, OEM revision, creator's ID and revision.
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
HEADER_CHECKSUM = 9
OEM_ID = b"LASSKV"
OEM_TABLE_ID = b"LASSKVM "
CREATOR_ID = b"LASS"
OUR_REVISION = 1
ROOT_TABLE_REVISION = 1
#: From revision 2 on, a DSDT's integers have 64 bits.
DSDT_REVISION = 2
POINTER_SIZE, X_POINTER_SIZE = 4, 8

#: Signature, checksum of the first part, OEM ID, revision, RSDT, length, XSDT, checksum of all, 3 reserved bytes.
_RSDP = struct.Struct("<8sB6sBIIQB3x")
RSDP_SIGNATURE = b"RSD PTR "
RSDP_REVISION = 2
RSDP_CHECKSUM, RSDP_RSDT, RSDP_XSDT, RSDP_X_CHECKSUM = 8, 16, 24, 32
RSDP_FIRST_PART = 20


class AcpiTables:
    """The tables of one machine; *fw_cfg* tells whether it has that device.

    >>> sorted(AcpiTables().loader_files())
    ['etc/acpi/rsdp', 'etc/acpi/tables', 'etc/table-loader']
    """

    def __init__(self, *, fw_cfg: bool = True) -> None:
        self._linker = Linker()
        self._tables = bytearray()
        self._linker.add_file(TABLES_FILE, self._tables, FACS_ALIGNMENT, Zone.HIGH)
        facs = self._add_facs()
        dsdt = self._add_table(b"DSDT", DSDT_REVISION, definition_block(fw_cfg=fw_cfg), {})
        fixed = {
            FACS_POINTER: (POINTER_SIZE, facs),
            DSDT_POINTER: (POINTER_SIZE, dsdt),
            X_DSDT_POINTER: (X_POINTER_SIZE, dsdt),
        }
        tables = [
            self._add_table(b"FACP", FADT_REVISION, fadt(), fixed),
            self._add_table(b"APIC", MADT_REVISION, madt(), {}),
        ]
        rsdt = self._add_root(b"RSDT", POINTER_SIZE, tables)
        xsdt = self._add_root(b"XSDT", X_POINTER_SIZE, tables)
        self._add_rsdp(rsdt, xsdt)

    def place(self, memory: GuestMemory, address: int) -> int:
        """Write the tables into the BIOS area of *memory*, the RSDP first. Returns the gpa behind the last.

        *address* is a multiple of 16 from 0xe0000 on. Raises :class:`MemoryLayoutError` when they do not fit there.
        """
        tables = address + self._linker.size(RSDP_FILE) + FACS_ALIGNMENT - 1 & -FACS_ALIGNMENT
        end = tables + self._linker.size(TABLES_FILE)
        if address % RSDP_ALIGNMENT or address < BIOS_AREA_START or end > BIOS_AREA_END:
            raise MemoryLayoutError(
                f"ACPI tables of {end - address:#x} bytes cannot be placed at {address:#x}; "
                f"choose a multiple of {RSDP_ALIGNMENT} between {BIOS_AREA_START:#x} and {BIOS_AREA_END:#x}"
            )
        files = self._linker.link({RSDP_FILE: address, TABLES_FILE: tables})
        memory.write(address, files[RSDP_FILE])
        memory.write(tables, files[TABLES_FILE])
        return end

    def loader_files(self) -> dict[str, bytes]:
        """The tables as fw_cfg files, by name, with the script from which firmware places them."""
        return {**self._linker.files(), LOADER_FILE: self._linker.script()}

    def _align(self, alignment: int) -> int:
        """Fill the tables up to a multiple of *alignment*. Returns the offset of what comes next."""
        self._tables.extend(bytes(-len(self._tables) % alignment))
        return len(self._tables)

    def _add_facs(self) -> int:
        offset = self._align(FACS_ALIGNMENT)
        self._tables += _FACS.pack(b"FACS", _FACS.size, 0, 0, 0, 0, 0, FACS_VERSION)
        return offset

    def _add_table(
        self, signature: bytes, revision: int, body: bytes, pointers: dict[int, tuple[int, int]]
    ) -> int:
        """Append a table. *pointers* has, by offset, the fields that point to a table: their size, and its offset.

        Returns the table's own offset.
        """
        offset = self._align(TABLE_ALIGNMENT)
        length = _HEADER.size + len(body)
        self._tables += _HEADER.pack(
            signature, length, revision, 0, OEM_ID, OEM_TABLE_ID, OUR_REVISION, CREATOR_ID, OUR_REVISION
        )
        self._tables += body
        for field, (size, target) in pointers.items():
            self._linker.add_pointer(TABLES_FILE, offset + field, size, TABLES_FILE, target)
        self._linker.add_checksum(TABLES_FILE, offset + HEADER_CHECKSUM, offset, length)
        return offset

    def _add_root(self, signature: bytes, pointer_size: int, tables: list[int]) -> int:
        pointers = {
            _HEADER.size + pointer_size * number: (pointer_size, table) for number, table in enumerate(tables)
        }
        body = bytes(pointer_size * len(tables))
        return self._add_table(signature, ROOT_TABLE_REVISION, body, pointers)

    def _add_rsdp(self, rsdt: int, xsdt: int) -> None:
        data = bytearray(_RSDP.pack(RSDP_SIGNATURE, 0, OEM_ID, RSDP_REVISION, 0, _RSDP.size, 0, 0))
        linker = self._linker
        linker.add_file(RSDP_FILE, data, RSDP_ALIGNMENT, Zone.F_SEGMENT)
        linker.add_pointer(RSDP_FILE, RSDP_RSDT, POINTER_SIZE, TABLES_FILE, rsdt)
        linker.add_pointer(RSDP_FILE, RSDP_XSDT, X_POINTER_SIZE, TABLES_FILE, xsdt)
        linker.add_checksum(RSDP_FILE, RSDP_CHECKSUM, 0, RSDP_FIRST_PART)
        linker.add_checksum(RSDP_FILE, RSDP_X_CHECKSUM, 0, _RSDP.size)
