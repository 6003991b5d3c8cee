"""Real mode, 16-bit and 32-bit protected mode, the ways between them and to IA-32e mode."""

from __future__ import annotations

import pytest
from legacy_machine import (
    BOOT,
    CODE16_SELECTOR,
    CODE32,
    CODE64,
    DATA16_SELECTOR,
    IDT32,
    STACK_TOP,
    LegacyMachine,
)

from lasskvm.conformance import layout
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import KERNEL_CS, KERNEL_CS32, KERNEL_SS, USER_CS32, USER_SS
from lasskvm.kvm import HltExit, IoExit, ShutdownExit, Vm
from lasskvm.x86.descriptors import make_segment
from lasskvm.x86.exceptions import BP, DE, GP, UD
from lasskvm.x86.msr import MSR_IA32_EFER
from lasskvm.x86.registers import (
    AR_P,
    CR0_PE,
    CR0_PG,
    CR4_LASS,
    CR4_PAE,
    CR4_SMAP,
    EFER_LMA,
    EFER_LME,
    RFLAGS_FIXED,
    RFLAGS_IF,
)

HALTED = HltExit(interrupts_enabled=False)
GDT_POINTER, IDT_POINTER = 0x6F00, 0x6F10


@pytest.fixture
def machine(guest: Guest) -> LegacyMachine:
    legacy = LegacyMachine(guest)
    legacy.pointer(GDT_POINTER, layout.GDT_GPA, 0xFF)
    legacy.pointer(IDT_POINTER, IDT32, 0x7FF)
    return legacy


# ---------------------------------------------------------------------------------------------------- real mode


def test_execution_begins_at_the_reset_vector() -> None:
    vm = Vm()
    rom = vm.allocate(0x10000)
    rom[0xFFF0] = 0xF4
    vm.set_user_memory_region(0, 0xFFFF0000, rom)
    vcpu = vm.create_vcpu()
    assert vcpu.run() == HALTED
    assert vcpu.get_regs().rip == 0xFFF1


def test_real_mode_segments_are_shifted_by_four(machine: LegacyMachine) -> None:
    assert (
        machine.run_real("mov ax, 0x3123; mov ds, ax; mov word [0x10], 0xBEEF; mov bx, [0x10]; hlt") == HALTED
    )
    assert machine.memory.load(0x31240, 2) == 0xBEEF
    assert machine.regs.rbx == 0xBEEF


def test_real_mode_far_call_and_return(machine: LegacyMachine) -> None:
    machine.place("mov cx, 7; db 0xcb", 0x20100, 16)  # RETF
    assert machine.run_real("call far 0x2010:0; mov bx, cs; hlt") == HALTED
    assert (machine.regs.rcx, machine.regs.rbx, machine.regs.rsp) == (7, 0, STACK_TOP)


def test_real_mode_interrupt_goes_through_the_vector_table(machine: LegacyMachine) -> None:
    machine.memory.store(0x21 * 4, 4, 0x2000_0010)
    machine.place("inc cx; pushf; pop dx; iret", 0x20010, 16)
    assert machine.run_real("sti; int 0x21; int 0x21; pushf; pop bx; cli; hlt") == HALTED
    assert (machine.regs.rcx, machine.regs.rsp) == (2, STACK_TOP)
    assert machine.regs.rdx & RFLAGS_IF == 0
    assert machine.regs.rbx & RFLAGS_IF


def test_real_mode_interrupt_pushes_three_words(machine: LegacyMachine) -> None:
    machine.memory.store(0x21 * 4, 4, 0x2000_0010)
    machine.place("hlt", 0x20010, 16)
    assert machine.run_real("int 0x21") == HALTED
    assert machine.regs.rsp == STACK_TOP - 6
    assert machine.stacked(2, 3) == [BOOT + 2, 0, RFLAGS_FIXED]


def test_real_mode_divide_error_pushes_its_own_address(machine: LegacyMachine) -> None:
    machine.memory.store(DE * 4, 4, 0x2000_0010)
    machine.place("hlt", 0x20010, 16)
    assert machine.run_real("xor cx, cx; div cx") == HALTED
    assert machine.stacked(2, 1) == [BOOT + 2]


def test_real_mode_int3_and_undefined_instruction(machine: LegacyMachine) -> None:
    machine.memory.store(BP * 4, 4, 0x2000_0010)
    machine.memory.store(UD * 4, 4, 0x2000_0020)
    machine.place("inc cx; iret", 0x20010, 16)
    machine.place("hlt", 0x20020, 16)
    assert machine.run_real("int3; ud2") == HALTED
    assert machine.regs.rcx == 1
    assert machine.stacked(2, 1) == [BOOT + 1]


def test_real_mode_port_output(machine: LegacyMachine) -> None:
    assert machine.run_real("mov al, 0x41; out 0x99, al; hlt") == IoExit(0x99, 1, write=True, data=0x41)
    assert machine.vcpu.run() == HALTED


def test_real_mode_string_copy_between_segments(machine: LegacyMachine) -> None:
    machine.memory.write(0x30000, b"0123456789")
    source = "mov ds, bx; mov es, dx; xor si, si; xor di, di; mov cx, 10; rep movsb; hlt"
    assert machine.run_real(source, rbx=0x3000, rdx=0x3100) == HALTED
    assert machine.memory.read(0x31000, 10) == b"0123456789"


def test_addresses_above_1_mib_need_no_a20_gate(machine: LegacyMachine) -> None:
    assert machine.run_real("mov ax, 0xffff; mov ds, ax; mov byte [0x10], 0x5A; hlt") == HALTED
    assert machine.memory.load(0x100000, 1) == 0x5A


# ----------------------------------------------------------------------------------------------- protected mode

TO_PROTECTED_MODE = f"""
    cli; xor ax, ax; mov ds, ax; lgdt [{GDT_POINTER:#x}]; lidt [{IDT_POINTER:#x}]
    mov eax, cr0; or al, 1; mov cr0, eax
    jmp_ptr1632 far {KERNEL_CS32:#x}:{CODE32:#x}
"""
LOAD_FLAT_SEGMENTS = f"mov ax, {KERNEL_SS:#x}; mov ds, ax; mov es, ax; mov ss, ax; mov esp, {STACK_TOP:#x}; "


def test_real_mode_to_protected_mode(machine: LegacyMachine) -> None:
    machine.place(
        LOAD_FLAT_SEGMENTS + "mov dword [0x123456], 0xCAFE; mov ebx, [0x123456]; push ebx; pop ecx; hlt",
        CODE32,
        32,
    )
    assert machine.run_real(TO_PROTECTED_MODE) == HALTED
    assert (machine.regs.rbx, machine.regs.rcx) == (0xCAFE, 0xCAFE)
    assert machine.vcpu.get_sregs().cs.selector == KERNEL_CS32


def test_protected_mode_and_back_to_real_mode(machine: LegacyMachine) -> None:
    machine.memory.store(0x21 * 4, 4, 0x2000_0010)
    machine.place("inc cx; iret", 0x20010 - 0x10 + 0x1010, 16)
    machine.memory.store(0x21 * 4, 4, 0x2000_1010)
    machine.pointer(0x6F20, 0, 0x3FF)
    machine.place(LOAD_FLAT_SEGMENTS + f"lidt [0x6f20]; jmp far {CODE16_SELECTOR:#x}:0x7000", CODE32, 32)
    machine.place(
        f"mov ax, {DATA16_SELECTOR:#x}; mov ds, ax; mov ss, ax; "
        "mov eax, cr0; and al, 0xfe; mov cr0, eax; jmp far 0:0x7100",
        0x7000, 16,
    )  # fmt: skip
    machine.place("xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x6800; xor cx, cx; int 0x21; hlt", 0x7100, 16)
    assert machine.run_real(TO_PROTECTED_MODE) == HALTED
    assert machine.regs.rcx & 0xFFFF == 1
    assert not machine.vcpu.get_sregs().cr0 & CR0_PE


def test_protected_mode_interrupt_and_return(machine: LegacyMachine) -> None:
    handler = machine.place("inc ecx; iretd", CODE32 + 0x800, 32)
    machine.set_gate(0x30, handler.address)
    assert machine.run_protected("int 0x30; int 0x30; hlt") == HALTED
    assert (machine.regs.rcx, machine.regs.rsp) == (2, STACK_TOP)


def test_protected_mode_exception_frame(machine: LegacyMachine) -> None:
    machine.run_protected("mov ds, ecx", rcx=0x1230)
    assert machine.vector == GP
    assert machine.stacked(4, 4) == [0x1230, CODE32, KERNEL_CS32, RFLAGS_FIXED | 1 << 16]


def test_protected_mode_user_program_returns_through_the_tss(machine: LegacyMachine) -> None:
    tss = 0x6000
    machine.memory.write(tss, bytes(0x68))
    machine.memory.store(tss + 4, 4, STACK_TOP - 0x800)
    machine.memory.store(tss + 8, 4, KERNEL_SS)
    layout.set_descriptor(machine.memory, layout.TSS_SELECTOR, make_segment(tss, 0x67, AR_P | 9))
    machine.set_gate(0x30, layout.HANDLERS_GPA + 0x30 * 16, dpl=3)
    machine.place("mov eax, 5; int 0x30", CODE32 + 0x800, 32)
    machine.run_protected(
        f"mov ax, {layout.TSS_SELECTOR:#x}; ltr ax; push {USER_SS:#x}; push 0x6800; push 2; push {USER_CS32:#x}; "
        f"push {CODE32 + 0x800:#x}; iretd"
    )
    assert machine.vector == 0x30
    assert machine.regs.rax == 5
    assert machine.regs.rsp == STACK_TOP - 0x800 - 20
    assert machine.stacked(4, 5) == [CODE32 + 0x807, USER_CS32, RFLAGS_FIXED, 0x6800, USER_SS]


def test_cr4_lass_has_no_effect_in_protected_mode(machine: LegacyMachine) -> None:
    exit_ = machine.run_protected(
        f"mov eax, cr4; or eax, {CR4_LASS | CR4_SMAP:#x}; mov cr4, eax; mov eax, [0x123456]; mov [0x123456], eax; "
        "mov ebx, cr4; hlt"
    )
    assert exit_ == HALTED
    assert machine.regs.rbx & CR4_LASS


def test_sixteen_bit_operations_keep_the_upper_halves(machine: LegacyMachine) -> None:
    assert (
        machine.run_protected(
            "mov ax, 0x1111; push bx; pop cx; hlt", rax=0xAAAA0000, rbx=0x2222, rcx=0xBBBB0000
        )
        == HALTED
    )
    assert (machine.regs.rax, machine.regs.rcx) == (0xAAAA1111, 0xBBBB2222)


# -------------------------------------------------------------------------------------------------- IA-32e mode


def enter_long_mode(guest: Guest, cr4: int = 0) -> str:
    return f"""
        mov eax, cr4; or eax, {CR4_PAE | cr4:#x}; mov cr4, eax; mov eax, {guest.tables.root:#x}; mov cr3, eax
        mov ecx, {MSR_IA32_EFER:#x}; rdmsr; or eax, {EFER_LME:#x}; wrmsr
        mov eax, cr0; or eax, {CR0_PG:#x}; mov cr0, eax
        compatibility: jmp far {KERNEL_CS:#x}:{CODE64:#x}
    """


@pytest.fixture
def identity(guest: Guest, machine: LegacyMachine) -> LegacyMachine:
    """The machine with its first pages mapped one to one for the time after paging is enabled."""
    for page in range(0x30):
        guest.tables.map(page << 12, page << 12)
    return machine


def test_real_mode_to_long_mode(identity: LegacyMachine, guest: Guest) -> None:
    identity.place(LOAD_FLAT_SEGMENTS + enter_long_mode(guest), CODE32, 32)
    identity.place("mov rax, 0x1122334455667788; push rax; pop r15; mov rbx, cr0; hlt", CODE64, 64)
    assert identity.run_real(TO_PROTECTED_MODE) == HALTED
    assert identity.regs.r15 == 0x1122334455667788
    assert identity.vcpu.get_sregs().efer & EFER_LMA


def test_long_mode_and_back_to_protected_mode(identity: LegacyMachine, guest: Guest) -> None:
    back = CODE32 + 0x800
    identity.memory.write(0x6F30, back.to_bytes(4, "little") + KERNEL_CS32.to_bytes(2, "little"))
    identity.place("mov r15, 5; jmp fword [0x6f30]", CODE64, 64)
    identity.place(
        f"mov eax, cr0; btr eax, 31; mov cr0, eax; mov ecx, {MSR_IA32_EFER:#x}; rdmsr; btr eax, 8; wrmsr; "
        "rdmsr; mov ebx, eax; mov eax, cr4; btr eax, 5; mov cr4, eax; "
        "mov dword [0x123456], 0x77; mov edx, [0x123456]; hlt",
        back, 32,
    )  # fmt: skip
    assert identity.run_protected(enter_long_mode(guest)) == HALTED
    assert identity.regs.rbx & (EFER_LME | EFER_LMA) == 0
    assert identity.regs.rdx == 0x77
    assert not identity.vcpu.get_sregs().cr0 & CR0_PG


def test_lass_becomes_active_with_long_mode(identity: LegacyMachine, guest: Guest) -> None:
    """CR4.LASS set beforehand: the first fetch behind the MOV to CR0 is a low supervisor fetch in IA-32e mode."""
    program = identity.place(enter_long_mode(guest, CR4_LASS), CODE32, 32)
    exit_ = identity.run_protected(enter_long_mode(guest, CR4_LASS))
    assert isinstance(exit_, ShutdownExit)
    assert identity.regs.rip == program.labels["compatibility"]


def test_paging_cannot_be_switched_off_in_64_bit_mode(identity: LegacyMachine, guest: Guest) -> None:
    identity.place("mov rax, cr0; btr rax, 31; mov cr0, rax; hlt", CODE64, 64)
    assert isinstance(identity.run_protected(enter_long_mode(guest)), ShutdownExit)
    assert identity.vcpu.get_sregs().cr0 & CR0_PG


def test_lme_cannot_change_while_paging_is_on(guest: Guest) -> None:
    outcome = guest.execute(f"mov ecx, {MSR_IA32_EFER:#x}; rdmsr; btr eax, 8; fault: wrmsr")
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
