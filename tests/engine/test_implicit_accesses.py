"""Accesses that the processor makes on its own account are supervisor-mode at any CPL, and RFLAGS.AC does not help."""

from __future__ import annotations

import pytest

from lasskvm.conformance import layout
from lasskvm.conformance.guest import CR2_UNTOUCHED, Guest
from lasskvm.conformance.layout import HIGH_USER, KERNEL_SS, LDT_DATA, LOW_SUPERVISOR, LOW_USER
from lasskvm.kvm import DescriptorTable, IoExit, ShutdownExit
from lasskvm.memory import PAGE_SIZE
from lasskvm.state import Segment
from lasskvm.x86.descriptors import TSS64_IO_MAP_BASE, make_gate, make_segment
from lasskvm.x86.exceptions import GP, PF, PF_P, UD
from lasskvm.x86.registers import (
    AR_ACCESSED,
    AR_CODE64,
    AR_DATA,
    AR_DPL_SHIFT,
    AR_LDT,
    AR_P,
    AR_TSS64_BUSY,
    CR4_LASS,
    CR4_SMAP,
    MASK32,
    RFLAGS_AC,
)

#: Instructions that read the descriptor which EAX selects.
DESCRIPTOR_READERS = (
    "mov fs, eax", "mov ds, eax", "lar ecx, eax", "lsl ecx, eax", "verr ax", "verw ax", "push rax; pop gs",
)  # fmt: skip
LDT_CODE = 0x17
IO_BITMAP = 0x800


def copy_page(guest: Guest, gpa: int, gva: int) -> None:
    guest.write(gva, guest.memory.read(gpa, PAGE_SIZE))


def move_ldt(guest: Guest, gva: int) -> None:
    """Put the LDT at *gva*, with a data segment of every privilege level and a code segment of level 3."""
    copy_page(guest, layout.LDT_GPA, gva)
    code = make_segment(0, MASK32, AR_CODE64 | 3 << AR_DPL_SHIFT)
    guest.write(gva + (LDT_CODE & ~7), code.to_bytes(8, "little"))
    guest.sregs["ldt"] = Segment(layout.LDT_SELECTOR, gva, 0xFFF, AR_LDT)


def marked(source: str) -> str:
    """*source* with the label ``fault`` before its last instruction."""
    *before, last = source.split("; ")
    return "; ".join([*before, f"nop; fault: {last}"])


@pytest.mark.parametrize("source", DESCRIPTOR_READERS)
@pytest.mark.parametrize("ac", [False, True])
@pytest.mark.parametrize("cpl", [0, 1, 3])
def test_low_ldt_violates_lass_whatever_ac_says(guest: Guest, source: str, ac: bool, cpl: int) -> None:
    move_ldt(guest, LOW_SUPERVISOR)
    outcome = guest.execute(marked(source), cpl=cpl, rflags=RFLAGS_AC * ac, rax=LDT_DATA)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
    assert outcome.cr2 == CR2_UNTOUCHED
    assert guest.accessed_and_dirty(LOW_SUPERVISOR) == (False, False)


@pytest.mark.parametrize("source", DESCRIPTOR_READERS)
@pytest.mark.parametrize("cpl", [0, 3])
def test_low_ldt_is_fine_without_lass(guest: Guest, source: str, cpl: int) -> None:
    move_ldt(guest, LOW_SUPERVISOR)
    guest.cr4 &= ~CR4_LASS
    assert guest.execute(source, cpl=cpl, rax=LDT_DATA).completed


@pytest.mark.parametrize("source", DESCRIPTOR_READERS)
def test_low_ldt_is_fine_without_smap(guest: Guest, source: str) -> None:
    """LASS checks supervisor-mode data accesses only under SMAP."""
    move_ldt(guest, LOW_SUPERVISOR)
    guest.cr4 &= ~CR4_SMAP
    assert guest.execute(source, rax=LDT_DATA).completed


@pytest.mark.parametrize("source", DESCRIPTOR_READERS)
def test_upper_half_ldt_serves_user_mode_under_lass(guest: Guest, source: str) -> None:
    assert guest.execute(source, cpl=3, rax=LDT_DATA).completed


@pytest.mark.parametrize("source", DESCRIPTOR_READERS)
@pytest.mark.parametrize("ac", [False, True])
@pytest.mark.parametrize("cpl", [0, 3])
def test_smap_keeps_implicit_accesses_off_user_pages_whatever_ac_says(
    guest: Guest, source: str, ac: bool, cpl: int
) -> None:
    move_ldt(guest, HIGH_USER)
    outcome = guest.execute(marked(source), cpl=cpl, rflags=RFLAGS_AC * ac, rax=LDT_DATA)
    assert (outcome.vector, outcome.error_code, outcome.label) == (PF, PF_P, "fault")
    assert outcome.cr2 == HIGH_USER + (LDT_DATA & ~7)


@pytest.mark.parametrize("page", [LOW_SUPERVISOR, LOW_USER])
def test_implicit_access_faults_also_after_an_explicit_one_to_the_same_page(guest: Guest, page: int) -> None:
    move_ldt(guest, page)
    outcome = guest.execute("mov rcx, [rbx]; fault: mov fs, eax", rflags=RFLAGS_AC, rax=LDT_DATA, rbx=page)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


def test_explicit_access_with_ac_works_also_after_an_implicit_one_faulted(guest: Guest) -> None:
    move_ldt(guest, LOW_SUPERVISOR)
    outcome = guest.execute(
        "mov fs, eax; after: mov rcx, [rbx]; jmp done; handler: add qword [rsp + 8], 2; add rsp, 8; iretq; done: nop",
        rflags=RFLAGS_AC, rax=LDT_DATA, rbx=LOW_SUPERVISOR + 8, handlers={GP: "handler"},
    )  # fmt: skip
    assert outcome.completed
    assert outcome.registers.rcx == layout.ldt_data_descriptor()


def test_setting_the_accessed_bit_of_a_low_descriptor_is_an_implicit_write(guest: Guest) -> None:
    move_ldt(guest, LOW_SUPERVISOR)
    guest.cr4 &= ~CR4_LASS
    fresh = make_segment(0, MASK32, AR_DATA & ~AR_ACCESSED | 3 << AR_DPL_SHIFT)
    guest.write(LOW_SUPERVISOR + 8, fresh.to_bytes(8, "little"))
    assert guest.execute("mov fs, eax", cpl=3, rax=LDT_DATA).completed
    assert guest.read(LOW_SUPERVISOR + 8) == layout.ldt_data_descriptor()
    assert guest.accessed_and_dirty(LOW_SUPERVISOR) == (True, True)


@pytest.mark.parametrize("ac", [False, True])
def test_far_return_through_a_low_ldt_violates_lass(guest: Guest, ac: bool) -> None:
    move_ldt(guest, LOW_SUPERVISOR)
    outcome = guest.execute(
        "push rax; push rbx; fault: retfq", rflags=RFLAGS_AC * ac, rax=LDT_CODE, rbx=layout.USER_CODE
    )
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


@pytest.mark.parametrize("ac", [False, True])
@pytest.mark.parametrize("cpl", [0, 3])
def test_low_idt_means_shutdown_under_lass(guest: Guest, ac: bool, cpl: int) -> None:
    """#GP instead of the exception, then #DF, and neither can be delivered."""
    copy_page(guest, layout.IDT_GPA, LOW_SUPERVISOR)
    guest.sregs["idt"] = DescriptorTable(LOW_SUPERVISOR, 0xFFF)
    outcome = guest.execute("fault: ud2", cpl=cpl, rflags=RFLAGS_AC * ac)
    assert isinstance(outcome.exit, ShutdownExit)
    assert outcome.label == "fault"


def test_low_idt_works_without_lass(guest: Guest) -> None:
    copy_page(guest, layout.IDT_GPA, LOW_SUPERVISOR)
    guest.sregs["idt"] = DescriptorTable(LOW_SUPERVISOR, 0xFFF)
    guest.cr4 &= ~CR4_LASS
    outcome = guest.execute("fault: ud2")
    assert (outcome.vector, outcome.label) == (UD, "fault")


@pytest.mark.parametrize("ac", [False, True])
def test_low_gdt_means_shutdown_under_lass(guest: Guest, ac: bool) -> None:
    copy_page(guest, layout.GDT_GPA, LOW_SUPERVISOR)
    guest.sregs["gdt"] = DescriptorTable(LOW_SUPERVISOR, 0xFF)
    outcome = guest.execute("fault: mov fs, eax", rflags=RFLAGS_AC * ac, rax=KERNEL_SS)
    assert isinstance(outcome.exit, ShutdownExit)
    assert outcome.label == "fault"


def move_tss(guest: Guest, gva: int) -> None:
    copy_page(guest, layout.TSS_GPA, gva)
    guest.sregs["tr"] = Segment(layout.TSS_SELECTOR, gva, 0xFFF, AR_TSS64_BUSY)


@pytest.mark.parametrize("lass", [False, True])
def test_stack_switch_through_a_low_tss(guest: Guest, lass: bool) -> None:
    move_tss(guest, LOW_SUPERVISOR)
    guest.cr4 = guest.cr4 & ~CR4_LASS | CR4_LASS * lass
    outcome = guest.execute("fault: ud2", cpl=3)
    if lass:
        assert isinstance(outcome.exit, ShutdownExit)
        assert outcome.label == "fault"
    else:
        assert (outcome.vector, outcome.label) == (UD, "fault")


@pytest.mark.parametrize("lass", [False, True])
def test_io_bitmap_in_a_low_tss(guest: Guest, lass: bool) -> None:
    move_tss(guest, LOW_SUPERVISOR)
    guest.write(LOW_SUPERVISOR + TSS64_IO_MAP_BASE, (IO_BITMAP).to_bytes(2, "little"))
    guest.write(LOW_SUPERVISOR + IO_BITMAP, bytes(0x100))
    guest.cr4 = guest.cr4 & ~CR4_LASS | CR4_LASS * lass
    outcome = guest.execute("fault: out 0x80, al", cpl=3)
    if lass:
        assert isinstance(outcome.exit, ShutdownExit)
    else:
        assert outcome.exit == IoExit(port=0x80, size=1, write=True, data=0)
    assert outcome.label == "fault"


def test_addresses_that_are_only_loaded_into_table_registers_may_be_low(guest: Guest) -> None:
    pointer = layout.KERNEL_STACK_TOP - 0x100
    guest.write(pointer, (0xFFF).to_bytes(2, "little") + LOW_USER.to_bytes(8, "little"))
    outcome = guest.execute(
        "lidt [rbx]; sidt [rcx]; lidt [rdx]", rbx=pointer, rcx=pointer + 16, rdx=pointer + 32
    )
    assert isinstance(outcome.exit, ShutdownExit)
    assert guest.read(pointer + 18) == LOW_USER


def test_gate_to_a_low_handler_faults_at_the_handler(guest: Guest) -> None:
    """The gate's offset is a branch target: delivery completes, and the fetch at the handler violates LASS."""
    low, high = make_gate(LOW_SUPERVISOR, layout.KERNEL_CS, AR_P | 0xE, 0), LOW_SUPERVISOR >> 32
    guest.memory.store(layout.IDT_GPA + 16 * UD, 8, low)
    guest.memory.store(layout.IDT_GPA + 16 * UD + 8, 8, high)
    outcome = guest.execute("ud2")
    assert (outcome.vector, outcome.error_code, outcome.rip) == (GP, 0, LOW_SUPERVISOR)
