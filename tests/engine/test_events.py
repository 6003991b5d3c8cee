"""Software interrupts, exceptions, their frames, double and triple faults."""

from __future__ import annotations

import pytest

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import (
    KERNEL_CODE,
    KERNEL_CS,
    KERNEL_STACK_TOP,
    LOW_USER,
    RING0_STACK_TOP,
    USER_CS,
)
from lasskvm.kvm import DescriptorTable, ShutdownExit
from lasskvm.x86.descriptors import SYS_TRAP_GATE
from lasskvm.x86.exceptions import (
    BP,
    DB,
    DE,
    DF,
    ERROR_IDT,
    GP,
    NM,
    NP,
    OF,
    PF,
    SS,
    UD,
)
from lasskvm.x86.registers import (
    CR0_TS,
    CR4_LASS,
    RFLAGS_AC,
    RFLAGS_CF,
    RFLAGS_FIXED,
    RFLAGS_IF,
    RFLAGS_NT,
    RFLAGS_RF,
)

HANDLER = KERNEL_CODE + 0x1000
# ------------------------------------------------------------------------------------------ software interrupts


@pytest.mark.parametrize(
    ("source", "vector"),
    [("int3", BP), ("int 3", BP), ("int 4", OF), ("int 0x80", 0x80), ("db 0xcd, 0x80", 0x80)],
)
@pytest.mark.parametrize("cpl", [0, 3])
def test_software_interrupt_pushes_the_next_rip_and_no_error_code(
    guest: Guest, source: str, vector: int, cpl: int
) -> None:
    outcome = guest.execute(f"{source}; after: nop", cpl=cpl)
    assert (outcome.vector, outcome.error_code, outcome.label) == (vector, None, "after")


@pytest.mark.parametrize("vector", [0, 6, GP, 0x20, 0xFF])
def test_software_interrupt_through_a_kernel_gate_is_gp_at_the_instruction(guest: Guest, vector: int) -> None:
    outcome = guest.execute(f"fault: int {vector}", cpl=3)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, vector << 3 | ERROR_IDT, "fault")


def test_int3_through_a_kernel_gate_is_gp(guest: Guest) -> None:
    layout.set_gate(guest.memory, BP, layout.HANDLERS, ist=layout.IST)
    outcome = guest.execute("fault: int3", cpl=3)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, BP << 3 | ERROR_IDT, "fault")


def test_int_of_an_exception_vector_pushes_no_error_code(guest: Guest) -> None:
    outcome = guest.execute("int 14; after: nop")
    assert (outcome.vector, outcome.error_code, outcome.label) == (PF, None, "after")


def test_int1_ignores_the_gates_dpl(guest: Guest) -> None:
    outcome = guest.execute("int1; after: nop", cpl=3)
    assert (outcome.vector, outcome.error_code, outcome.label) == (DB, None, "after")


def test_into_is_undefined_in_64_bit_mode(guest: Guest) -> None:
    outcome = guest.execute("fault: db 0xce")
    assert (outcome.vector, outcome.label) == (UD, "fault")


def test_into_traps_in_compatibility_mode_when_of_is_set(guest: Guest) -> None:
    outcome = guest.execute("mov al, 0x7f; add al, 1; into; after: nop", cpl=3, bits=32)
    assert (outcome.vector, outcome.label) == (OF, "after")
    assert guest.execute("xor eax, eax; into", cpl=3, bits=32).completed


# --------------------------------------------------------------------------------------------------- exceptions


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize(
    ("source", "vector", "error_code"),
    [
        ("div ecx", DE, None),
        ("idiv rcx", DE, None),
        ("ud2", UD, None),
        ("db 0x06", UD, None),
        ("mov ds, edx", GP, 0x1230),
        ("mov ss, edx", GP, 0x1230),
        ("mov es, esi", GP, 0x30),
        (
            "db 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x90",
            GP,
            0,
        ),
    ],
)
def test_exception_reports_the_instruction(
    guest: Guest, source: str, vector: int, error_code: int | None, cpl: int
) -> None:
    outcome = guest.execute(f"fault: {source}", cpl=cpl, rcx=0, rdx=0x1230, rsi=layout.TSS_SELECTOR)
    assert (outcome.vector, outcome.error_code, outcome.label) == (vector, error_code, "fault")


@pytest.mark.xfail(strict=True, reason="the translator does not check the alignment of SSE operands")
def test_misaligned_sse_operand_is_gp(guest: Guest) -> None:
    outcome = guest.execute("fault: movaps xmm0, [rsp - 15]")
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


def test_second_general_protection_is_not_a_double_fault(guest: Guest) -> None:
    """The handler skips the two bytes of the first instruction; the second one faults on its own."""
    guest.place(assemble("inc r8; add rsp, 8; add qword [rsp], 2; iretq", HANDLER))
    layout.set_gate(guest.memory, GP, HANDLER, ist=layout.IST)
    outcome = guest.execute("mov ds, edx; mov es, edx", rdx=0x1230)
    assert outcome.completed
    assert outcome.registers.r8 == 2


@pytest.mark.parametrize(
    "source",
    [
        "hlt",
        "cli",
        "mov cr3, rax",
        "invlpg [rax]",
        "wbinvd",
        "rdmsr",
        "lgdt [rax]",
        "mov rax, dr0",
        "clts",
        "swapgs",
        "lldt ax",
    ],
)
def test_privileged_instruction_in_user_mode_is_gp(guest: Guest, source: str) -> None:
    outcome = guest.execute(f"fault: {source}", cpl=3, rax=LOW_USER)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


def test_sse_with_ts_is_nm(guest: Guest) -> None:
    guest.cr0 |= CR0_TS
    outcome = guest.execute("fault: movups xmm0, [rsp]", cpl=3)
    assert (outcome.vector, outcome.label) == (NM, "fault")


def test_frame_holds_the_interrupted_program(guest: Guest) -> None:
    outcome = guest.execute("stc; fault: ud2", cpl=3, rsp=0x411F08, rflags=RFLAGS_AC)
    assert outcome.cs == USER_CS
    assert outcome.ss == layout.USER_SS
    assert outcome.rsp == 0x411F08
    assert outcome.rflags == RFLAGS_FIXED | RFLAGS_CF | RFLAGS_AC | RFLAGS_RF


def test_handler_starts_with_interrupts_off_through_an_interrupt_gate_only(guest: Guest) -> None:
    flags = RFLAGS_IF | RFLAGS_NT
    assert guest.execute("ud2", rflags=flags).registers.rflags == RFLAGS_FIXED
    layout.set_gate(
        guest.memory, UD, layout.HANDLERS + UD * layout.HANDLER_BYTES, gate_type=SYS_TRAP_GATE, ist=layout.IST
    )
    assert guest.execute("ud2", rflags=flags).registers.rflags == RFLAGS_FIXED | RFLAGS_IF


def test_delivery_does_not_clear_ac(guest: Guest) -> None:
    """A kernel has to, with CLAC."""
    assert guest.execute("ud2", cpl=3, rflags=RFLAGS_AC).registers.rflags & RFLAGS_AC


def test_stack_of_the_new_level_comes_from_the_tss(guest: Guest) -> None:
    layout.set_gate(guest.memory, UD, layout.HANDLERS + UD * layout.HANDLER_BYTES)
    outcome = guest.execute("ud2", cpl=3)
    assert outcome.registers.rsp == RING0_STACK_TOP - 40
    assert guest.vcpu.get_sregs().ss.selector == 0


def test_same_level_frame_goes_on_the_aligned_current_stack(guest: Guest) -> None:
    layout.set_gate(guest.memory, UD, layout.HANDLERS + UD * layout.HANDLER_BYTES)
    outcome = guest.execute("ud2", rsp=KERNEL_STACK_TOP - 0x109)
    assert outcome.registers.rsp == KERNEL_STACK_TOP - 0x110 - 40
    rip, cs, _, rsp, ss = guest.stack(outcome.registers.rsp, 5)
    assert (rip, cs, rsp, ss) == (KERNEL_CODE, KERNEL_CS, KERNEL_STACK_TOP - 0x109, layout.KERNEL_SS)


def test_gate_that_is_not_present_is_np(guest: Guest) -> None:
    layout.set_gate(guest.memory, UD, layout.HANDLERS, present=False)
    outcome = guest.execute("fault: ud2")
    assert (outcome.vector, outcome.error_code, outcome.label) == (NP, UD << 3 | ERROR_IDT | 1, "fault")


def test_vector_beyond_the_idt_is_gp(guest: Guest) -> None:
    guest.sregs["idt"] = DescriptorTable(layout.IDT, 16 * 32 - 1)
    outcome = guest.execute("fault: int 0x40")
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0x40 << 3 | ERROR_IDT, "fault")


# ------------------------------------------------------------------------------------ double and triple faults


def test_fault_while_delivering_a_contributory_fault_is_df(guest: Guest) -> None:
    layout.set_gate(guest.memory, GP, layout.HANDLERS, present=False)
    outcome = guest.execute("fault: mov ds, edx", rdx=0x1230)
    assert (outcome.vector, outcome.error_code, outcome.label) == (DF, 0, "fault")


def test_page_fault_while_delivering_a_page_fault_is_df(guest: Guest) -> None:
    layout.set_gate(guest.memory, PF, layout.HANDLERS)
    outcome = guest.execute("mov rsp, rbx; fault: mov rax, [rbx]", rbx=layout.HIGH_ABSENT + 0x800)
    assert (outcome.vector, outcome.error_code, outcome.label) == (DF, 0, "fault")


def test_page_fault_on_the_stack_of_a_benign_exception_is_delivered_alone(guest: Guest) -> None:
    layout.set_gate(guest.memory, UD, layout.HANDLERS)
    outcome = guest.execute("mov rsp, rbx; fault: ud2", rbx=layout.HIGH_ABSENT + 0x800)
    assert (outcome.vector, outcome.error_code, outcome.label) == (PF, 2, "fault")
    assert outcome.cr2 == layout.HIGH_ABSENT + 0x7F8


def test_low_kernel_stack_is_ss_under_lass(guest: Guest) -> None:
    """The frame is pushed by the new privilege level, and a stack access violates LASS as #SS."""
    layout.set_gate(guest.memory, UD, layout.HANDLERS)
    outcome = guest.execute("mov rsp, rbx; fault: ud2", rbx=layout.LOW_SUPERVISOR + 0x800)
    assert (outcome.vector, outcome.label) == (SS, "fault")
    guest.cr4 &= ~CR4_LASS
    layout.set_gate(guest.memory, UD, layout.HANDLERS + UD * layout.HANDLER_BYTES)
    outcome = guest.execute("mov rsp, rbx; fault: ud2", rbx=layout.LOW_SUPERVISOR + 0x800)
    assert outcome.registers.rsp == layout.LOW_SUPERVISOR + 0x800 - 40


def test_fault_while_delivering_df_is_a_shutdown(guest: Guest) -> None:
    for vector in (GP, DF):
        layout.set_gate(guest.memory, vector, layout.HANDLERS, present=False)
    outcome = guest.execute("fault: mov ds, edx", rdx=0x1230)
    assert isinstance(outcome.exit, ShutdownExit)
    assert outcome.label == "fault"


def test_no_idt_at_all_is_a_shutdown_and_the_guest_can_be_used_again(guest: Guest) -> None:
    guest.sregs["idt"] = DescriptorTable(0, 0)
    assert isinstance(guest.execute("ud2").exit, ShutdownExit)
    guest.reset()
    assert guest.execute("nop").completed
