"""Event delivery through the 64-bit IDT, one architectural check a test."""

from __future__ import annotations

import pytest
from emulator_guest import (
    ABSENT_CS,
    CODE,
    CONFORMING_CS,
    DELIVERED,
    DPL3,
    GDT,
    IST_STACK,
    KERNEL_CS,
    KERNEL_CS32,
    KERNEL_SS,
    KERNEL_STACK,
    LDT_CS,
    RING0_STACK,
    RING1_CS,
    TSS,
    TSS_SELECTOR,
    USER_CODE,
    USER_CS64,
    USER_SS,
    USER_STACK,
    Guest,
)

from lasskvm.emulator.delivery import EXCEPTION, EXTERNAL, SOFTWARE
from lasskvm.state import (
    ATTRIBUTES,
    CPL,
    GDT_LIMIT,
    IDT_LIMIT,
    INTERRUPT_SHADOW,
    LIMIT,
    RFLAGS,
    RIP,
    RSP,
    SELECTOR,
    segment_word,
)
from lasskvm.x86.descriptors import (
    SYS_CALL_GATE,
    SYS_INTERRUPT_GATE,
    SYS_TRAP_GATE,
    TSS64_IST1,
    TSS64_RSP0,
    make_segment,
)
from lasskvm.x86.exceptions import BP, BR, DB, ERROR_EXT, ERROR_IDT, GP, NP, PF, PF_P, PF_W, TS, UD
from lasskvm.x86.registers import (
    AR_ACCESSED,
    AR_CODE64,
    AR_DPL_SHIFT,
    AR_P,
    AR_UNUSABLE,
    CS,
    LDTR,
    RFLAGS_AC,
    RFLAGS_FIXED,
    RFLAGS_IF,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
    TR,
)
from lasskvm.x86.registers import SS as SS_REGISTER

CS_WORD, SS_WORD = segment_word(CS, SELECTOR), segment_word(SS_REGISTER, SELECTOR)
INTERRUPT = 0x80


def gate_error(vector: int, external: int = ERROR_EXT) -> int:
    return vector << 3 | ERROR_IDT | external


# ------------------------------------------------------------------------------------------------ the frame


def test_page_fault_in_the_kernel_pushes_the_whole_frame_with_error_code(guest: Guest) -> None:
    flags = guest.words[RFLAGS]
    assert guest.deliver64(PF, error_code=PF_W) == DELIVERED
    assert guest.words[RIP] == CODE + PF * 16
    assert guest.words[RSP] == KERNEL_STACK - 48
    assert guest.frame(6) == [PF_W, CODE, KERNEL_CS, flags | RFLAGS_RF, KERNEL_STACK, KERNEL_SS]


def test_interrupt_without_error_code_pushes_five_words(guest: Guest) -> None:
    flags = guest.words[RFLAGS]
    assert guest.deliver64(INTERRUPT, EXTERNAL) == DELIVERED
    assert guest.words[RSP] == KERNEL_STACK - 40
    assert guest.frame(5) == [CODE, KERNEL_CS, flags, KERNEL_STACK, KERNEL_SS]


def test_stack_is_aligned_to_sixteen_bytes_before_the_frame(guest: Guest) -> None:
    guest.words[RSP] = KERNEL_STACK - 0x103
    assert guest.deliver64(UD) == DELIVERED
    assert guest.words[RSP] == KERNEL_STACK - 0x110 - 40
    assert guest.frame(5)[3] == KERNEL_STACK - 0x103


def test_same_privilege_keeps_ss(guest: Guest) -> None:
    assert guest.deliver64(UD) == DELIVERED
    assert guest.words[SS_WORD] == KERNEL_SS


def test_frame_that_crosses_a_page_is_pushed_whole(guest: Guest) -> None:
    guest.words[RSP] = KERNEL_STACK - 0x1000 + 0x10
    assert guest.deliver64(PF, error_code=7) == DELIVERED
    assert guest.frame(6)[0] == 7
    assert guest.frame(6)[4:] == [KERNEL_STACK - 0x1000 + 0x10, KERNEL_SS]


def test_frame_without_error_code_that_crosses_a_page(guest: Guest) -> None:
    guest.words[RSP] = KERNEL_STACK - 0x1000 + 0x10
    assert guest.deliver64(UD) == DELIVERED
    assert guest.frame(5)[:2] == [CODE, KERNEL_CS]
    assert guest.words[RSP] == KERNEL_STACK - 0x1000 + 0x10 - 40


# --------------------------------------------------------------------------------------- privilege change


def test_from_user_mode_the_stack_comes_from_rsp0_and_ss_is_null(user: Guest) -> None:
    flags = user.words[RFLAGS]
    assert user.deliver64(PF, error_code=4) == DELIVERED
    assert user.words[CPL] == 0
    assert user.words[RSP] == RING0_STACK - 48
    assert user.frame(6) == [4, USER_CODE, USER_CS64, flags | RFLAGS_RF, USER_STACK, USER_SS]
    assert user.words[SS_WORD] == 0
    assert user.words[segment_word(SS_REGISTER, ATTRIBUTES)] == AR_UNUSABLE


def test_handler_in_ring_one_gets_rsp1_and_a_null_ss_with_rpl_one(user: Guest) -> None:
    user.store(TSS + TSS64_RSP0 + 8, 8, RING0_STACK - 0x800)
    user.set_gate(UD, CODE, RING1_CS)
    assert user.deliver64(UD) == DELIVERED
    assert user.words[CPL] == 1
    assert user.words[RSP] == RING0_STACK - 0x800 - 40
    assert user.words[SS_WORD] == 1
    assert user.words[CS_WORD] == RING1_CS
    assert user.words[segment_word(SS_REGISTER, ATTRIBUTES)] == AR_UNUSABLE | 1 << AR_DPL_SHIFT


def test_user_mode_handler_of_a_user_mode_event_keeps_the_stack(user: Guest) -> None:
    user.set_gate(UD, USER_CODE + 0x100, USER_CS64)
    assert user.deliver64(UD) == DELIVERED
    assert user.words[CPL] == 3
    assert user.words[RSP] == USER_STACK - 40
    assert user.words[SS_WORD] == USER_SS


def test_cs_takes_the_new_cpl_as_rpl_and_the_descriptors_attributes(user: Guest) -> None:
    user.set_gate(UD, CODE, KERNEL_CS | 3)
    assert user.deliver64(UD) == DELIVERED
    assert user.words[CS_WORD] == KERNEL_CS
    assert user.words[segment_word(CS, ATTRIBUTES)] == AR_CODE64
    assert user.words[segment_word(CS, LIMIT)] == 0xFFFFFFFF


def test_conforming_handler_runs_at_the_interrupted_cpl(user: Guest) -> None:
    user.set_gate(UD, USER_CODE, CONFORMING_CS)
    assert user.deliver64(UD) == DELIVERED
    assert user.words[CPL] == 3
    assert user.words[CS_WORD] == CONFORMING_CS | 3
    assert user.words[RSP] == USER_STACK - 40


def test_rsp_beyond_the_tss_limit_is_an_invalid_tss(user: Guest) -> None:
    user.words[segment_word(TR, LIMIT)] = TSS64_RSP0 + 6
    assert user.deliver64(UD) == (TS, TSS_SELECTOR | ERROR_EXT, 0)


# --------------------------------------------------------------------------------------------------- IST


def test_ist_switches_the_stack_without_a_privilege_change(guest: Guest) -> None:
    guest.set_gate(UD, CODE, ist=1)
    assert guest.deliver64(UD) == DELIVERED
    assert guest.words[RSP] == IST_STACK - 40
    assert guest.frame(5)[3] == KERNEL_STACK
    assert guest.words[SS_WORD] == KERNEL_SS


def test_ist_takes_precedence_over_rsp0(user: Guest) -> None:
    user.set_gate(UD, CODE, ist=1)
    assert user.deliver64(UD) == DELIVERED
    assert user.words[RSP] == IST_STACK - 40


def test_ist_seven_lies_at_its_own_offset(guest: Guest) -> None:
    guest.store(TSS + TSS64_IST1 + 6 * 8, 8, IST_STACK - 0x100)
    guest.set_gate(UD, CODE, ist=7)
    assert guest.deliver64(UD) == DELIVERED
    assert guest.words[RSP] == IST_STACK - 0x100 - 40


def test_ist_beyond_the_tss_limit_is_an_invalid_tss(guest: Guest) -> None:
    guest.words[segment_word(TR, LIMIT)] = TSS64_IST1 + 6
    guest.set_gate(UD, CODE, ist=1)
    assert guest.deliver64(UD) == (TS, TSS_SELECTOR | ERROR_EXT, 0)


# -------------------------------------------------------------------------------------------------- flags


def test_interrupt_gate_clears_if_and_trap_gate_does_not(guest: Guest) -> None:
    guest.set_gate(UD, CODE, attributes=AR_P | SYS_TRAP_GATE)
    assert guest.deliver64(UD) == DELIVERED
    assert guest.words[RFLAGS] & RFLAGS_IF
    assert guest.deliver64(BR) == DELIVERED
    assert not guest.words[RFLAGS] & RFLAGS_IF


def test_delivery_clears_tf_nt_and_rf_but_not_ac(guest: Guest) -> None:
    guest.words[RFLAGS] |= RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_AC
    assert guest.deliver64(UD) == DELIVERED
    assert guest.words[RFLAGS] == RFLAGS_FIXED | RFLAGS_AC


def test_fault_pushes_rf_and_debug_trap_leaves_it(guest: Guest) -> None:
    assert guest.deliver64(UD) == DELIVERED
    assert guest.frame(5)[2] & RFLAGS_RF
    assert guest.deliver64(DB) == DELIVERED
    assert not guest.frame(5)[2] & RFLAGS_RF


def test_software_interrupt_pushes_rf_clear(guest: Guest) -> None:
    guest.words[RFLAGS] |= RFLAGS_RF
    assert guest.deliver64(INTERRUPT, SOFTWARE) == DELIVERED
    assert not guest.frame(5)[2] & RFLAGS_RF


def test_external_interrupt_pushes_rf_as_it_is(guest: Guest) -> None:
    guest.words[RFLAGS] |= RFLAGS_RF
    assert guest.deliver64(UD, EXTERNAL) == DELIVERED
    assert guest.frame(5)[2] & RFLAGS_RF


def test_delivery_ends_the_interrupt_shadow(guest: Guest) -> None:
    guest.words[INTERRUPT_SHADOW] = 1
    assert guest.deliver64(UD) == DELIVERED
    assert guest.words[INTERRUPT_SHADOW] == 0


# --------------------------------------------------------------------------------------------------- gates


def test_vector_beyond_the_idt_limit_reports_the_gate(guest: Guest) -> None:
    guest.words[IDT_LIMIT] = UD * 16 + 14
    assert guest.deliver64(UD) == (GP, gate_error(UD), 0)
    guest.words[IDT_LIMIT] = UD * 16 + 15
    assert guest.deliver64(UD) == DELIVERED


@pytest.mark.parametrize(
    "attributes", [AR_P | SYS_CALL_GATE, AR_P | SYS_INTERRUPT_GATE | 1 << 4, AR_P | 6, AR_P | 5]
)
def test_entry_of_another_type_is_a_general_protection(guest: Guest, attributes: int) -> None:
    guest.set_gate(UD, CODE, attributes=attributes)
    assert guest.deliver64(UD) == (GP, gate_error(UD), 0)


def test_absent_gate_is_not_present_with_idt_and_ext(guest: Guest) -> None:
    guest.set_gate(UD, CODE, attributes=SYS_INTERRUPT_GATE)
    assert guest.deliver64(UD) == (NP, gate_error(UD), 0)


def test_absent_gate_of_a_software_interrupt_has_ext_clear(guest: Guest) -> None:
    guest.set_gate(INTERRUPT, CODE, attributes=SYS_INTERRUPT_GATE)
    assert guest.deliver64(INTERRUPT, SOFTWARE) == (NP, gate_error(INTERRUPT, 0), 0)


def test_user_int_n_needs_a_gate_with_dpl_three(user: Guest) -> None:
    assert user.deliver64(INTERRUPT, SOFTWARE) == (GP, gate_error(INTERRUPT, 0), 0)
    user.set_gate(INTERRUPT, CODE, attributes=AR_P | SYS_INTERRUPT_GATE | DPL3)
    assert user.deliver64(INTERRUPT, SOFTWARE) == DELIVERED


def test_gate_privilege_comes_before_gate_presence(user: Guest) -> None:
    user.set_gate(BP, CODE, attributes=SYS_INTERRUPT_GATE)
    assert user.deliver64(BP, SOFTWARE) == (GP, gate_error(BP, 0), 0)


@pytest.mark.parametrize("kind", [EXCEPTION, EXTERNAL])
def test_gate_privilege_does_not_matter_to_exceptions_and_interrupts(user: Guest, kind: int) -> None:
    assert user.deliver64(INTERRUPT, kind) == DELIVERED


def test_handler_address_that_is_not_canonical_is_a_general_protection(guest: Guest) -> None:
    guest.set_gate(UD, 0x8000_0000_0000)
    assert guest.deliver64(UD) == (GP, ERROR_EXT, 0)


# ------------------------------------------------------------------------------------------- code segments


def test_null_code_selector_is_a_general_protection_with_ext_only(guest: Guest) -> None:
    guest.set_gate(UD, CODE, selector=3)
    assert guest.deliver64(UD) == (GP, ERROR_EXT, 0)


def test_code_selector_beyond_the_gdt_is_a_general_protection(guest: Guest) -> None:
    guest.words[GDT_LIMIT] = KERNEL_CS + 6
    assert guest.deliver64(UD) == (GP, KERNEL_CS | ERROR_EXT, 0)


@pytest.mark.parametrize("selector", [KERNEL_SS, KERNEL_CS32, TSS_SELECTOR])
def test_handler_must_be_in_a_64_bit_code_segment(guest: Guest, selector: int) -> None:
    guest.set_gate(UD, CODE, selector)
    assert guest.deliver64(UD) == (GP, selector | ERROR_EXT, 0)


def test_handler_must_not_be_less_privileged(guest: Guest) -> None:
    guest.set_gate(UD, CODE, USER_CS64)
    assert guest.deliver64(UD) == (GP, USER_CS64 & ~3 | ERROR_EXT, 0)


def test_absent_code_segment_is_not_present_with_the_selector(guest: Guest) -> None:
    guest.set_gate(INTERRUPT, CODE, ABSENT_CS)
    assert guest.deliver64(INTERRUPT) == (NP, ABSENT_CS | ERROR_EXT, 0)
    assert guest.deliver64(INTERRUPT, SOFTWARE) == (NP, ABSENT_CS, 0)


def test_code_segment_may_be_in_the_ldt(guest: Guest) -> None:
    guest.set_gate(UD, CODE, LDT_CS)
    assert guest.deliver64(UD) == DELIVERED
    assert guest.words[CS_WORD] == LDT_CS


def test_ldt_selector_without_an_ldt_is_a_general_protection(guest: Guest) -> None:
    guest.words[segment_word(LDTR, ATTRIBUTES)] = AR_UNUSABLE
    guest.set_gate(UD, CODE, LDT_CS)
    assert guest.deliver64(UD) == (GP, LDT_CS | ERROR_EXT, 0)


def test_delivery_sets_the_accessed_bit_of_the_code_segment(guest: Guest) -> None:
    guest.set_descriptor(KERNEL_CS, make_segment(0, 0xFFFFFFFF, AR_CODE64 & ~AR_ACCESSED))
    assert guest.deliver64(UD) == DELIVERED
    assert guest.descriptor(KERNEL_CS) >> 40 & AR_ACCESSED
    assert guest.words[segment_word(CS, ATTRIBUTES)] & AR_ACCESSED


def test_accessed_bit_in_a_write_protected_gdt_is_a_page_fault(guest: Guest) -> None:
    guest.set_descriptor(KERNEL_CS, make_segment(0, 0xFFFFFFFF, AR_CODE64 & ~AR_ACCESSED))
    guest.write_protect(GDT)
    assert guest.deliver64(UD) == (PF, PF_P | PF_W, GDT + KERNEL_CS)
