"""How a vCPU stands at the first instruction: of a 64-bit image, or of a 32-bit one.

Every entry has one method, ``apply(vcpu)``, which puts a vCPU into that state. General registers that an entry
does not name are 0; what it does not touch at all (MSRs, the FPU, debug registers) is to be as after a reset.

A 64-bit image is entered by the 64-bit boot protocol of Linux (Documentation/arch/x86/boot.rst): long mode,
paging on with an identity map, flat segments __BOOT_CS and __BOOT_DS from a GDT in memory, interrupts off, RSI at
``struct boot_params``. A 64-bit ELF kernel that is not Linux is entered in exactly the same way; what it may
rely on:

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
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

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
    AR_CODE32,
    AR_CODE64,
    AR_DATA,
    AR_LDT,
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

if TYPE_CHECKING:
    # Whoever has a vCPU has loaded this already; who only builds images should not load an engine for it.
    from lasskvm.kvm.interface import VcpuInterface
    from lasskvm.kvm.structures import Regs, Sregs

__all__ = [
    "BOOT_CS",
    "BOOT_DS",
    "FLAT_CS",
    "FLAT_DS",
    "Entry",
    "LongModeEntry",
    "ProtectedModeEntry",
    "flat_gdt",
    "prepare_long_mode",
]

#: The selectors that the 32-bit and 64-bit boot protocols of Linux ask for.
BOOT_CS = 0x10
BOOT_DS = 0x18
#: Those of the multiboot loader in QEMU; multiboot and PVH leave them open.
FLAT_CS = 0x08
FLAT_DS = 0x10

_FLAT_LIMIT = 0xFFFFFFFF
_LONG_MODE_TSS_LIMIT = 0xFFFF
#: A 32-bit TSS without an I/O permission map, as PVH asks for.
_TSS32_LIMIT = 0x67

_REAL_MODE_LIMIT = 0xFFFF

_RETURN_ADDRESS_SIZE = 8
_TABLE = PTE_P | PTE_W
_LARGE_PAGE = PTE_P | PTE_W | PTE_PS
_LARGE_PAGE_SIZE = 2 * MIB
_ENTRIES = 512


@dataclass(frozen=True)
class LongModeEntry:
    """The entry of a 64-bit image; made by :func:`prepare_long_mode`."""

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
        return Segment(0, 0, _LONG_MODE_TSS_LIMIT, AR_TSS64_BUSY)

    def apply(self, vcpu: VcpuInterface) -> None:
        """Put *vcpu* at the entry."""
        sregs = vcpu.get_sregs()
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = self.cr0, self.cr3, self.cr4, self.efer
        _set_segments(sregs, self.code_segment, self.data_segment, self.task_segment)
        _set_tables(sregs, self.gdt_base, self.gdt_limit, idt_limit=0)
        vcpu.set_sregs(sregs)
        regs = _cleared(vcpu.get_regs())
        regs.rip, regs.rsp, regs.rsi, regs.rdi = self.rip, self.rsp, self.rsi, self.rdi
        regs.rflags = self.rflags
        vcpu.set_regs(regs)


@dataclass(frozen=True)
class ProtectedModeEntry:
    """The entry of a 32-bit image: protected mode without paging, flat segments, interrupts off.

    That is what multiboot (3.2), PVH and the 32-bit boot protocol of Linux have in common; they differ in what the
    general registers hold and in the selectors.
    """

    eip: int
    esp: int
    gdt_base: int
    gdt_limit: int
    eax: int = 0
    ebx: int = 0
    esi: int = 0
    eflags: int = RFLAGS_FIXED
    cr0: int = CR0_PE | CR0_ET
    code_selector: int = FLAT_CS
    data_selector: int = FLAT_DS

    @property
    def code_segment(self) -> Segment:
        """CS: 32-bit code, privilege level 0."""
        return Segment(self.code_selector, 0, _FLAT_LIMIT, AR_CODE32)

    @property
    def data_segment(self) -> Segment:
        """DS, ES, SS, FS and GS: flat, writable, privilege level 0."""
        return Segment(self.data_selector, 0, _FLAT_LIMIT, AR_DATA)

    @property
    def task_segment(self) -> Segment:
        """TR: a busy 32-bit TSS, as VM entry in protected mode asks for, though none is used yet."""
        return Segment(0, 0, _TSS32_LIMIT, AR_TSS64_BUSY)

    def apply(self, vcpu: VcpuInterface) -> None:
        """Put *vcpu* at the entry."""
        sregs = vcpu.get_sregs()
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = self.cr0, 0, 0, 0
        _set_segments(sregs, self.code_segment, self.data_segment, self.task_segment)
        _set_tables(sregs, self.gdt_base, self.gdt_limit, idt_limit=0)
        vcpu.set_sregs(sregs)
        regs = _cleared(vcpu.get_regs())
        regs.rip, regs.rsp = self.eip, self.esp
        regs.rax, regs.rbx, regs.rsi = self.eax, self.ebx, self.esi
        regs.rflags = self.eflags
        vcpu.set_regs(regs)


#: How a vCPU starts.
Entry = LongModeEntry | ProtectedModeEntry


def prepare_long_mode(memory: GuestMemory, rip: int) -> LongModeEntry:
    """Write GDT, identity map and stack into *memory* for an entry at gpa *rip*, below 4 GiB; say how to
    enter.

    Raises :class:`~lasskvm.errors.MemoryLayoutError` when there is no memory below 640 KiB.
    """
    gdt = flat_gdt(BOOT_CS, BOOT_DS, AR_CODE64)
    memory.write(GDT_ADDRESS, gdt)
    memory.write(PAGE_TABLES_ADDRESS, _identity_map(PAGE_TABLES_ADDRESS))
    rsp = STACK_TOP - _RETURN_ADDRESS_SIZE
    memory.write(rsp, bytes(_RETURN_ADDRESS_SIZE))
    return LongModeEntry(
        rip=rip,
        rsp=rsp,
        rsi=BOOT_PARAMS_ADDRESS,
        cr3=PAGE_TABLES_ADDRESS,
        gdt_base=GDT_ADDRESS,
        gdt_limit=len(gdt) - 1,
    )


def flat_gdt(code_selector: int, data_selector: int, code_attributes: int = AR_CODE32) -> bytes:
    """A GDT with a flat code segment of *code_attributes* and a flat data segment, the latter at its end."""
    descriptors = [0] * (data_selector // DESCRIPTOR_BYTES + 1)
    descriptors[code_selector // DESCRIPTOR_BYTES] = make_segment(0, _FLAT_LIMIT, code_attributes)
    descriptors[data_selector // DESCRIPTOR_BYTES] = make_segment(0, _FLAT_LIMIT, AR_DATA)
    return struct.pack(f"<{len(descriptors)}Q", *descriptors)


def _identity_map(base: int) -> bytes:
    """PML4, PDPT and page directories at gpa *base* that map the first 4 GiB with 2 MiB pages."""
    directories = FOUR_GIB // (_ENTRIES * _LARGE_PAGE_SIZE)
    pdpt, first_directory = base + PAGE_SIZE, base + 2 * PAGE_SIZE
    tables = [pdpt | _TABLE] + [0] * (_ENTRIES - 1)
    tables += [first_directory + index * PAGE_SIZE | _TABLE for index in range(directories)]
    tables += [0] * (_ENTRIES - directories)
    tables += [page * _LARGE_PAGE_SIZE | _LARGE_PAGE for page in range(directories * _ENTRIES)]
    return struct.pack(f"<{len(tables)}Q", *tables)


def _set_segments(sregs: Sregs, code: Segment, data: Segment, task: Segment) -> None:
    sregs.cs, sregs.tr = code, task
    sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = data
    sregs.ldt = Segment(0, 0, _REAL_MODE_LIMIT, AR_LDT)


def _set_tables(sregs: Sregs, gdt_base: int, gdt_limit: int, *, idt_limit: int) -> None:
    sregs.gdt = replace(sregs.gdt, base=gdt_base, limit=gdt_limit)
    sregs.idt = replace(sregs.idt, base=0, limit=idt_limit)
    sregs.cr2 = sregs.cr8 = 0


def _cleared(regs: Regs) -> Regs:
    """*regs* with zeros in all of them; what an image left in one does not come back behind a reset."""
    return replace(regs, **{field.name: 0 for field in fields(regs)})
