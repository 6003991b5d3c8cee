"""A guest for the tests: a 64-bit kernel in the upper half, with page tables, GDT, LDT, IDT and TSS."""

from __future__ import annotations

import mmap

import pytest

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import fetch_instruction
from lasskvm.emulator.delivery import EXCEPTION, deliver64
from lasskvm.emulator.execution import execute
from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.msrs import MsrFile
from lasskvm.memory import PAGE_SIZE, GuestMemory
from lasskvm.state import (
    CPL,
    CR0,
    CR3,
    CR4,
    CR4_ALLOWED,
    EFER,
    EFER_ALLOWED,
    GDT_BASE,
    GDT_LIMIT,
    IDT_BASE,
    IDT_LIMIT,
    RFLAGS,
    RIP,
    RSP,
    TLB_FLUSH,
    Segment,
    VcpuState,
    Words,
)
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable, cr4_allowed, efer_allowed
from lasskvm.x86.descriptors import (
    SYS_INTERRUPT_GATE,
    TSS64_BYTES,
    TSS64_IST1,
    TSS64_RSP0,
    make_gate,
    make_segment,
)
from lasskvm.x86.paging import PTE_P, PTE_U, PTE_W
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_CODE64,
    AR_CONFORMING,
    AR_DATA,
    AR_DPL_SHIFT,
    AR_LDT,
    AR_P,
    AR_TSS64_BUSY,
    AR_UNUSABLE,
    CR0_ET,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LASS,
    CR4_PAE,
    CR4_PGE,
    CR4_SMAP,
    CR4_SMEP,
    CS,
    DS,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    ES,
    FS,
    GS,
    LDTR,
    RFLAGS_FIXED,
    RFLAGS_IF,
    SS,
    TR,
)

#: The upper half maps guest-physical memory from 0; the lower half has the same pages as user pages.
UPPER = 0xFFFF_8000_0000_0000
MAPPED = 0x200000
GDT, LDT, IDT, TSS = UPPER + 0x1000, UPPER + 0x2000, UPPER + 0x3000, UPPER + 0x4000
CODE, KERNEL_STACK, RING0_STACK, IST_STACK = (
    UPPER + offset for offset in (0x10000, 0x21000, 0x31000, 0x41000)
)
USER_CODE, USER_STACK = 0x50000, 0x61000
PML4, PDPT_LOW, PDPT_HIGH, PD_LOW, PD_HIGH, PT_LOW, PT_HIGH = range(0x180000, 0x187000, 0x1000)

# Selectors
KERNEL_CS, KERNEL_SS = 0x08, 0x10
USER_CS32, USER_SS, USER_CS64 = 0x1B, 0x23, 0x2B
TSS_SELECTOR, LDT_SELECTOR = 0x30, 0x40
CONFORMING_CS, ABSENT_CS, KERNEL_CS32, RING1_CS, RING1_SS = 0x50, 0x58, 0x60, 0x69, 0x71
LDT_CS = 0x0C

#: What event delivery returns when nothing went wrong.
DELIVERED = (0, 0, 0)

DPL3 = 3 << AR_DPL_SHIFT
DPL1 = 1 << AR_DPL_SHIFT


class Guest:
    """The guest's words and memory, and ways to arrange and inspect them."""

    def __init__(self) -> None:
        self.state = VcpuState()
        self.words: Words = self.state.words
        self.memory = GuestMemory()
        self.memory.set_slot(0, 0, mmap.mmap(-1, MAPPED))
        self.cpuid = CpuidTable(parse_cpu("max").entries())
        self.tsc = 1000
        self.ctx = Emulation(self.words, self.memory, self.cpuid, MsrFile(self.cpuid), lambda: self.tsc)
        self._map()
        self._tables()
        words = self.words
        words[CR4_ALLOWED], words[EFER_ALLOWED] = cr4_allowed(self.cpuid), efer_allowed(self.cpuid)
        words[CR0] = CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG
        words[CR3] = PML4
        words[CR4] = CR4_PAE | CR4_PGE | CR4_SMEP | CR4_SMAP | CR4_LASS
        words[EFER] = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE
        words[RFLAGS] = RFLAGS_FIXED | RFLAGS_IF
        words[GDT_BASE], words[GDT_LIMIT] = GDT, 0x7F
        words[IDT_BASE], words[IDT_LIMIT] = IDT, 0xFFF
        self.state.set_segment(TR, Segment(TSS_SELECTOR, TSS, TSS64_BYTES - 1, AR_TSS64_BUSY))
        self.state.set_segment(LDTR, Segment(LDT_SELECTOR, LDT, 0xFFF, AR_LDT))
        self.enter_kernel()
        words[TLB_FLUSH] = 0

    def _map(self) -> None:
        present = PTE_P | PTE_W
        for pml4e, pdpt, pd, pt, user in (
            (0, PDPT_LOW, PD_LOW, PT_LOW, PTE_U),
            (256, PDPT_HIGH, PD_HIGH, PT_HIGH, 0),
        ):
            self.memory.store(PML4 + 8 * pml4e, 8, pdpt | present | user)
            self.memory.store(pdpt, 8, pd | present | user)
            self.memory.store(pd, 8, pt | present | user)
            for page in range(MAPPED // PAGE_SIZE):
                self.memory.store(pt + 8 * page, 8, page * PAGE_SIZE | present | user)

    def _tables(self) -> None:
        flat = 0xFFFFFFFF
        for selector, attributes in (
            (KERNEL_CS, AR_CODE64),
            (KERNEL_SS, AR_DATA),
            (USER_CS32, AR_CODE32 | DPL3),
            (USER_SS, AR_DATA | DPL3),
            (USER_CS64, AR_CODE64 | DPL3),
            (CONFORMING_CS, AR_CODE64 | AR_CONFORMING),
            (ABSENT_CS, AR_CODE64 & ~AR_P),
            (KERNEL_CS32, AR_CODE32),
            (RING1_CS, AR_CODE64 | DPL1),
            (RING1_SS, AR_DATA | DPL1),
        ):
            self.set_descriptor(selector, make_segment(0, flat, attributes))
        self.store(LDT + (LDT_CS & 0xFFF8), 8, make_segment(0, flat, AR_CODE64))
        self.set_descriptor(TSS_SELECTOR, make_segment(TSS & flat, TSS64_BYTES - 1, AR_TSS64_BUSY))
        self.set_descriptor(TSS_SELECTOR + 8, TSS >> 32)
        self.set_descriptor(LDT_SELECTOR, make_segment(LDT & flat, 0xFFF, AR_LDT))
        self.set_descriptor(LDT_SELECTOR + 8, LDT >> 32)
        self.store(TSS + TSS64_RSP0, 8, RING0_STACK)
        self.store(TSS + TSS64_IST1, 8, IST_STACK)
        for vector in range(256):
            self.set_gate(vector, CODE + vector * 16)

    def enter_kernel(self) -> None:
        """64-bit kernel code at CPL 0."""
        self.words[CPL] = 0
        self.state.set_segment(CS, Segment(KERNEL_CS, 0, 0xFFFFFFFF, AR_CODE64))
        self.state.set_segment(SS, Segment(KERNEL_SS, 0, 0xFFFFFFFF, AR_DATA))
        for number in (DS, ES, FS, GS):
            self.state.set_segment(number, Segment(0, 0, 0, AR_UNUSABLE))
        self.words[RIP], self.words[RSP] = CODE, KERNEL_STACK

    def enter_user(self) -> None:
        """64-bit user code at CPL 3."""
        self.words[CPL] = 3
        self.state.set_segment(CS, Segment(USER_CS64, 0, 0xFFFFFFFF, AR_CODE64 | DPL3))
        self.state.set_segment(SS, Segment(USER_SS, 0, 0xFFFFFFFF, AR_DATA | DPL3))
        self.words[RIP], self.words[RSP] = USER_CODE, USER_STACK

    def set_descriptor(self, selector: int, descriptor: int) -> None:
        """Write a GDT entry."""
        self.store(GDT + (selector & 0xFFF8), 8, descriptor)

    def descriptor(self, selector: int) -> int:
        """Read a GDT entry."""
        return self.load(GDT + (selector & 0xFFF8))

    def set_gate(
        self,
        vector: int,
        offset: int,
        selector: int = KERNEL_CS,
        attributes: int = AR_P | SYS_INTERRUPT_GATE,
        ist: int = 0,
    ) -> None:
        """Write a 16-byte IDT entry."""
        self.store(IDT + 16 * vector, 8, make_gate(offset, selector, attributes, ist))
        self.store(IDT + 16 * vector + 8, 8, offset >> 32)

    def store(self, address: int, size: int, value: int) -> None:
        """Store at a kernel or user address, unchecked."""
        self.memory.store(address & MAPPED - 1, size, value)

    def load(self, address: int, size: int = 8) -> int:
        """Load from a kernel or user address, unchecked."""
        return self.memory.load(address & MAPPED - 1, size)

    def frame(self, count: int) -> list[int]:
        """The *count* words at RSP, lowest first."""
        return [self.load(self.words[RSP] + 8 * number) for number in range(count)]

    def page_entry(self, address: int) -> int:
        """The guest-physical address of the PTE that maps *address*."""
        table = PT_HIGH if address >> 63 else PT_LOW
        return table + 8 * ((address & MAPPED - 1) // PAGE_SIZE)

    def unmap(self, address: int) -> None:
        """Make the page at *address* not present."""
        self.memory.store(self.page_entry(address), 8, 0)

    def write_protect(self, address: int) -> None:
        """Make the page at *address* read-only."""
        entry = self.page_entry(address)
        self.memory.store(entry, 8, self.memory.load(entry, 8) & ~PTE_W)

    def write_code(self, code: bytes) -> None:
        """Place *code* at RIP."""
        self.memory.write(self.words[RIP] & MAPPED - 1, code)

    def run(self, code: str) -> None:
        """Execute the instruction *code* (hexadecimal) at RIP; a fault is raised."""
        self.write_code(bytes.fromhex(code))
        execute(self.ctx, fetch_instruction(self.ctx))

    def fault_of(self, code: str) -> tuple[int, int | None]:
        """The vector and error code that *code* faults with; the state must be as before."""
        self.write_code(bytes.fromhex(code))
        before = self.snapshot()
        with pytest.raises(GuestFault) as caught:
            execute(self.ctx, fetch_instruction(self.ctx))
        assert self.snapshot() == before, "a faulting instruction changed the state"
        return caught.value.vector, caught.value.error_code

    def deliver64(
        self, vector: int, kind: int = EXCEPTION, error_code: int | None = None
    ) -> tuple[int, int, int]:
        """Deliver an event through the 64-bit IDT; where that fails, the state must be as before."""
        before = self.snapshot()
        has_error_code = int(error_code is not None)
        result = deliver64(
            self.words, self.memory, vector, error_code or 0, has_error_code, kind, self.words[RIP]
        )
        if result != DELIVERED:
            assert self.snapshot() == before, "a failed delivery changed the state"
        return result

    def snapshot(self) -> bytes:
        """All state words."""
        return self.state.to_bytes()
