"""A guest outside IA-32e mode: real mode from 0:7C00H, or flat 32-bit protected mode with an IDT that halts."""

from __future__ import annotations

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import Assembled, assemble
from lasskvm.conformance.guest import Guest
from lasskvm.kvm import DescriptorTable, Exit, Regs
from lasskvm.state import Segment
from lasskvm.x86.descriptors import SYS_INTERRUPT_GATE, make_gate, make_segment
from lasskvm.x86.registers import (
    AR_CODE,
    AR_CODE32,
    AR_DATA,
    AR_DB,
    AR_DPL_SHIFT,
    AR_G,
    AR_P,
    AR_REAL_MODE,
    CR0_ET,
    CR0_NE,
    CR0_PE,
    MASK32,
    RFLAGS_FIXED,
)

BOOT, STACK_TOP = 0x7C00, 0x7000
CODE32, CODE64 = 0x20000, 0x22000
IDT32 = 0x9000
CODE16_SELECTOR, DATA16_SELECTOR = 0x80, 0x88
_REAL_LIMIT = 0xFFFF
_VECTORS = 256


class LegacyMachine:
    """Runs 16-bit and 32-bit programs on the vCPU of *guest*."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.memory = guest.memory
        self.vcpu = guest.vcpu
        granular = AR_G | AR_DB
        layout.set_descriptor(
            self.memory, CODE16_SELECTOR, make_segment(0, _REAL_LIMIT, AR_CODE32 & ~granular)
        )
        layout.set_descriptor(self.memory, DATA16_SELECTOR, make_segment(0, _REAL_LIMIT, AR_DATA & ~granular))
        for vector in range(_VECTORS):
            self.set_gate(vector, layout.HANDLERS_GPA + vector * layout.HANDLER_BYTES)

    def set_gate(self, vector: int, offset: int, dpl: int = 0) -> None:
        """Write a 32-bit interrupt gate."""
        attributes = AR_P | SYS_INTERRUPT_GATE | dpl << AR_DPL_SHIFT
        self.memory.store(IDT32 + 8 * vector, 8, make_gate(offset, layout.KERNEL_CS32, attributes, 0))

    def place(self, source: str, address: int, bits: int) -> Assembled:
        """Assemble *source* to physical *address*."""
        program = assemble(source, address, bits)
        self.memory.write(address, program.code)
        return program

    def pointer(self, gpa: int, base: int, limit: int) -> int:
        """Place an LGDT or LIDT operand at *gpa*."""
        self.memory.write(gpa, limit.to_bytes(2, "little") + base.to_bytes(4, "little"))
        return gpa

    def run_real(self, source: str, **registers: int) -> Exit:
        """Run *source* in real mode at 0:7C00H."""
        self.place(source, BOOT, 16)
        self.vcpu.reset()
        sregs = self.vcpu.get_sregs()
        sregs.cs = Segment(0, 0, _REAL_LIMIT, AR_REAL_MODE | AR_CODE)
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(Regs(**{"rip": BOOT, "rsp": STACK_TOP, "rflags": RFLAGS_FIXED} | registers))
        return self.vcpu.run()

    def run_protected(self, source: str, *, cr4: int = 0, **registers: int) -> Exit:
        """Run *source* in flat 32-bit protected mode without paging."""
        self.place(source, CODE32, 32)
        self.vcpu.reset()
        sregs = self.vcpu.get_sregs()
        sregs.cr0, sregs.cr4 = CR0_PE | CR0_ET | CR0_NE, cr4
        sregs.cs = Segment(layout.KERNEL_CS32, 0, MASK32, AR_CODE32)
        data = Segment(layout.KERNEL_SS, 0, MASK32, AR_DATA)
        sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = data
        sregs.gdt = DescriptorTable(layout.GDT_GPA, 0xFF)
        sregs.idt = DescriptorTable(IDT32, 8 * _VECTORS - 1)
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(Regs(**{"rip": CODE32, "rsp": STACK_TOP, "rflags": RFLAGS_FIXED} | registers))
        return self.vcpu.run()

    @property
    def regs(self) -> Regs:
        """The vCPU's registers."""
        return self.vcpu.get_regs()

    @property
    def vector(self) -> int:
        """The vector whose handler the vCPU has halted in."""
        return (self.regs.rip - 1 - layout.HANDLERS_GPA) // layout.HANDLER_BYTES

    def stacked(self, size: int, count: int) -> list[int]:
        """The *count* words of *size* bytes at SS:RSP, lowest first."""
        base = self.vcpu.get_sregs().ss.base + self.regs.rsp
        return [self.memory.load(base + size * number, size) for number in range(count)]
