"""The state at the entry is one that an x86-64 processor accepts; Unicorn's own MMU and segment loads say
so."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import unicorn
from boot_builders import MIB, Load, Registers, make_elf, make_memory
from unicorn import x86_const as uc

from lasskvm.machine.boot import LongModeEntry, ProtectedModeEntry, load_image
from lasskvm.memory import GuestMemory
from lasskvm.x86.registers import (
    AR_DB,
    AR_L,
    CR0_ET,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    RFLAGS_IF,
)

MSR_EFER = 0xC0000080
#: The segment registers of ``struct kvm_sregs``, by the numbers of :mod:`lasskvm.x86.registers`.
SEGMENT_NUMBERS = {"es": 0, "cs": 1, "ss": 2, "ds": 3, "fs": 4, "gs": 5, "ldt": 6, "tr": 7}

#: Takes the e820 count from boot_params into EAX and the word on the stack into RBX, pushes, then loads CS
#: and SS from the GDT with a far return.
KERNEL_CODE = bytes.fromhex(
    "0fb686e8010000"  # movzx eax, byte [rsi + 0x1e8]
    "488b1c24"  # mov rbx, [rsp]
    "6a10"  # push 0x10
    "488d0d03000000"  # lea rcx, [rip + 3]
    "51"  # push rcx
    "48cb"  # retfq
    "b918000000"  # mov ecx, 0x18
    "8ed1"  # mov ss, ecx
    "8ed9"  # mov ds, ecx
    "f4"  # hlt
)
KERNEL_BASE = 0x100000


def loaded_entry(tmp_path: Path) -> tuple[LongModeEntry, GuestMemory]:
    path = tmp_path / "kernel"
    path.write_bytes(make_elf(Load(KERNEL_BASE, KERNEL_CODE)))
    memory = make_memory()
    entry = load_image(path, memory).entry
    assert isinstance(entry, LongModeEntry)
    return entry, memory


def test_a_bare_kernel_runs_from_its_entry(tmp_path: Path) -> None:
    entry, memory = loaded_entry(tmp_path)
    cpu = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    for slot in memory:
        cpu.mem_map_ptr(slot.gpa, slot.size, unicorn.UC_PROT_ALL, slot.host_address)
    cpu.msr_write(MSR_EFER, entry.efer)
    cpu.reg_write(uc.UC_X86_REG_GDTR, (0, entry.gdt_base, entry.gdt_limit, 0))
    cpu.reg_write(uc.UC_X86_REG_CR3, entry.cr3)
    cpu.reg_write(uc.UC_X86_REG_CR4, entry.cr4)
    cpu.reg_write(uc.UC_X86_REG_CR0, entry.cr0)
    cpu.reg_write(uc.UC_X86_REG_RSP, entry.rsp)
    cpu.reg_write(uc.UC_X86_REG_RSI, entry.rsi)
    cpu.emu_start(entry.rip, KERNEL_BASE + len(KERNEL_CODE) - 1)
    assert cpu.reg_read(uc.UC_X86_REG_RAX) == 3
    assert cpu.reg_read(uc.UC_X86_REG_RBX) == 0
    assert cpu.reg_read(uc.UC_X86_REG_CS) == entry.code_selector == 0x10
    assert cpu.reg_read(uc.UC_X86_REG_SS) == entry.data_selector == 0x18
    assert cpu.reg_read(uc.UC_X86_REG_RSP) == entry.rsp


def test_the_entry_is_in_long_mode_with_interrupts_off(tmp_path: Path) -> None:
    entry, _ = loaded_entry(tmp_path)
    assert entry.cr0 & CR0_PG
    assert entry.cr4 == CR4_PAE
    assert entry.efer == EFER_LME | EFER_LMA
    assert not entry.rflags & RFLAGS_IF
    assert entry.code_segment.attributes & AR_L
    assert entry.code_segment.limit == entry.data_segment.limit == 0xFFFFFFFF
    assert entry.task_segment.attributes & 0xF == 11


def test_the_stack_is_that_of_a_functions_first_instruction(tmp_path: Path) -> None:
    entry, memory = loaded_entry(tmp_path)
    assert (entry.rsp + 8) % 16 == 0
    assert memory.load(entry.rsp, 8) == 0


def walk(memory: GuestMemory, cr3: int, address: int) -> int | None:
    """A page walk of the test's own: PML4, PDPT, then a directory of 2 MiB pages."""
    table = cr3
    for shift in (39, 30, 21):
        (entry,) = struct.unpack("<Q", memory.read(table + 8 * (address >> shift & 511), 8))
        if not entry & 1:
            return None
        assert entry & 2, "every level is writable"
        table = entry & 0x000FFFFFFFFFF000
        if entry & 0x80:
            assert shift == 21
            return table + address % (2 * MIB)
    raise AssertionError("no large page at the last level")


@pytest.mark.parametrize("address", [0, 0x1000, 0x1FFFFF, 0x200000, 1 << 30, (3 << 30) + 5, (1 << 32) - 1])
def test_the_first_4_gib_are_mapped_one_to_one(tmp_path: Path, address: int) -> None:
    entry, memory = loaded_entry(tmp_path)
    assert walk(memory, entry.cr3, address) == address


@pytest.mark.parametrize("address", [1 << 32, 1 << 39, 0x7FFFFFFFF000, 0xFFFF800000000000, (1 << 64) - 1])
def test_nothing_else_is_mapped(tmp_path: Path, address: int) -> None:
    entry, memory = loaded_entry(tmp_path)
    assert walk(memory, entry.cr3, address) is None


def test_applying_a_64_bit_entry_sets_all_it_names_and_clears_the_other_registers(tmp_path: Path) -> None:
    entry, _ = loaded_entry(tmp_path)
    vcpu = Registers()
    entry.apply(vcpu)  # type: ignore[arg-type]
    regs, sregs = vcpu.regs, vcpu.sregs
    assert (regs.rip, regs.rsp, regs.rsi, regs.rflags) == (KERNEL_BASE, entry.rsp, entry.rsi, 2)
    assert regs.rax == regs.rbx == regs.rdi == regs.r15 == 0
    assert (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) == (entry.cr0, entry.cr3, entry.cr4, entry.efer)
    assert (sregs.gdt.base, sregs.gdt.limit) == (entry.gdt_base, entry.gdt_limit)
    assert sregs.idt.limit == sregs.cr2 == sregs.cr8 == 0
    assert sregs.cs == entry.code_segment
    assert sregs.ds == sregs.es == sregs.ss == sregs.fs == sregs.gs == entry.data_segment
    assert sregs.apic_base == 0xFEE00900


def test_applying_a_32_bit_entry_leaves_long_mode_and_paging() -> None:
    entry = ProtectedModeEntry(eip=0x400000, esp=0x9000, gdt_base=0x9000, gdt_limit=23, eax=1, ebx=2, esi=3)
    vcpu = Registers()
    entry.apply(vcpu)  # type: ignore[arg-type]
    regs, sregs = vcpu.regs, vcpu.sregs
    assert (regs.rip, regs.rsp, regs.rax, regs.rbx, regs.rsi) == (0x400000, 0x9000, 1, 2, 3)
    assert regs.rcx == regs.rdx == regs.rdi == regs.rbp == 0
    assert (sregs.cr0 & ~CR0_ET, sregs.cr3, sregs.cr4, sregs.efer) == (CR0_PE, 0, 0, 0)
    assert (sregs.cs.selector, sregs.cs.base, sregs.cs.limit) == (8, 0, 0xFFFFFFFF)
    assert sregs.cs.attributes & (AR_L | AR_DB) == AR_DB
    assert (sregs.ss.selector, sregs.ss.base, sregs.ss.limit) == (16, 0, 0xFFFFFFFF)
    assert (sregs.gdt.base, sregs.gdt.limit) == (0x9000, 23)
