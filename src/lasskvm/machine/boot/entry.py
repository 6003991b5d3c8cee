"""How a vCPU must stand at the first instruction of a 64-bit image.

This is the 64-bit boot protocol of Linux (Documentation/arch/x86/boot.rst): long mode, paging on with an
identity map, flat segments __BOOT_CS and __BOOT_DS from a GDT in memory, interrupts off, RSI at ``struct
boot_params``. A 64-bit ELF kernel that is not Linux is entered in exactly the same way; what it may rely
on:

- the first 4 GiB are mapped one to one, writable and executable, with 2 MiB supervisor pages; nothing else
  is;
- RSI holds the address of boot_params: e820 map, command line and initrd are found there as by Linux; RDI
  is 0;
- RSP is that of a function's first instruction (RSP + 8 is a multiple of 16), with a page of stack below it
  and a zero return address on top, so that the entry point may be a C function that does not return;
- CS is 0x10, DS, ES, SS, FS and GS are 0x18 with base 0; there is no IDT yet.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from lasskvm.machine.boot.layout import (
    BOOT_PARAMS_ADDRESS,
    FOUR_GIB,
    GDT_ADDRESS,
    MIB,
    PAGE_TABLES_ADDRESS,
    STACK_TOP,
)
from lasskvm.memory import PAGE_SIZE, GuestMemory
from lasskvm.state import Segment
from lasskvm.x86.descriptors import DESCRIPTOR_BYTES, make_segment
from lasskvm.x86.paging import PTE_P, PTE_PS, PTE_W
from lasskvm.x86.registers import (
    AR_CODE64,
    AR_DATA,
    AR_TSS64_BUSY,
    CR0_ET,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    RFLAGS_FIXED,
)

__all__ = ["BOOT_CS", "BOOT_DS", "LongModeEntry", "prepare_long_mode"]

#: The selectors that the 64-bit boot protocol asks for.
BOOT_CS = 0x10
BOOT_DS = 0x18

_FLAT_LIMIT = 0xFFFFFFFF
_TSS_LIMIT = 0xFFFF
_GDT_ENTRIES = BOOT_DS // DESCRIPTOR_BYTES + 1
_RETURN_ADDRESS_SIZE = 8

_TABLE = PTE_P | PTE_W
_LARGE_PAGE = PTE_P | PTE_W | PTE_PS
_LARGE_PAGE_SIZE = 2 * MIB
_ENTRIES = 512


@dataclass(frozen=True)
class LongModeEntry:
    """The registers of a vCPU at the entry of a 64-bit image; everything not named is as after reset."""

    rip: int
    rsp: int
    rsi: int
    cr3: int
    gdt_base: int
    gdt_limit: int
    rdi: int = 0
    rflags: int = RFLAGS_FIXED
    cr0: int = CR0_PE | CR0_ET | CR0_NE | CR0_PG
    cr4: int = CR4_PAE
    efer: int = EFER_LME | EFER_LMA
    code_selector: int = BOOT_CS
    data_selector: int = BOOT_DS

    @property
    def code_segment(self) -> Segment:
        """CS: 64-bit code, privilege level 0."""
        return Segment(self.code_selector, 0, _FLAT_LIMIT, AR_CODE64)

    @property
    def data_segment(self) -> Segment:
        """DS, ES, SS, FS and GS: flat, writable, privilege level 0."""
        return Segment(self.data_selector, 0, _FLAT_LIMIT, AR_DATA)

    @property
    def task_segment(self) -> Segment:
        """TR: VM entry in long mode asks for a busy 64-bit TSS (SDM 26.3.1.2), though none is used yet."""
        return Segment(0, 0, _TSS_LIMIT, AR_TSS64_BUSY)


def prepare_long_mode(memory: GuestMemory, rip: int) -> LongModeEntry:
    """Write GDT, identity map and stack into *memory* for an entry at gpa *rip*, below 4 GiB; say how to
    enter.

    Raises :class:`~lasskvm.errors.MemoryLayoutError` when there is no memory below 640 KiB.
    """
    memory.write(GDT_ADDRESS, _gdt())
    memory.write(PAGE_TABLES_ADDRESS, _identity_map(PAGE_TABLES_ADDRESS))
    rsp = STACK_TOP - _RETURN_ADDRESS_SIZE
    memory.write(rsp, bytes(_RETURN_ADDRESS_SIZE))
    return LongModeEntry(
        rip=rip,
        rsp=rsp,
        rsi=BOOT_PARAMS_ADDRESS,
        cr3=PAGE_TABLES_ADDRESS,
        gdt_base=GDT_ADDRESS,
        gdt_limit=_GDT_ENTRIES * DESCRIPTOR_BYTES - 1,
    )


def _gdt() -> bytes:
    descriptors = [0] * _GDT_ENTRIES
    descriptors[BOOT_CS // DESCRIPTOR_BYTES] = make_segment(0, _FLAT_LIMIT, AR_CODE64)
    descriptors[BOOT_DS // DESCRIPTOR_BYTES] = make_segment(0, _FLAT_LIMIT, AR_DATA)
    return struct.pack(f"<{_GDT_ENTRIES}Q", *descriptors)


def _identity_map(base: int) -> bytes:
    """PML4, PDPT and page directories at gpa *base* that map the first 4 GiB with 2 MiB pages."""
    directories = FOUR_GIB // (_ENTRIES * _LARGE_PAGE_SIZE)
    pdpt, first_directory = base + PAGE_SIZE, base + 2 * PAGE_SIZE
    tables = [pdpt | _TABLE] + [0] * (_ENTRIES - 1)
    tables += [first_directory + index * PAGE_SIZE | _TABLE for index in range(directories)]
    tables += [0] * (_ENTRIES - directories)
    tables += [page * _LARGE_PAGE_SIZE | _LARGE_PAGE for page in range(directories * _ENTRIES)]
    return struct.pack(f"<{len(tables)}Q", *tables)
