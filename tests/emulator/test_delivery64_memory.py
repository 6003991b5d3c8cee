"""Event delivery through the 64-bit IDT: paging, the canonical rule and LASS on the way."""

from __future__ import annotations

import pytest
from emulator_guest import (
    CODE,
    DELIVERED,
    DPL3,
    GDT,
    IDT,
    KERNEL_CS,
    KERNEL_STACK,
    RING0_STACK,
    TSS,
    UPPER,
    USER_CODE,
    USER_STACK,
    Guest,
)

from lasskvm.emulator.delivery import SOFTWARE
from lasskvm.state import (
    ATTRIBUTES,
    CR4,
    IDT_BASE,
    RFLAGS,
    RIP,
    RSP,
    segment_word,
)
from lasskvm.x86.descriptors import (
    SYS_INTERRUPT_GATE,
    TSS64_RSP0,
)
from lasskvm.x86.exceptions import ERROR_EXT, GP, PF, PF_P, PF_W, SS, UD
from lasskvm.x86.registers import (
    AR_CODE64,
    AR_DATA,
    AR_P,
    CR4_LASS,
    CS,
    RFLAGS_AC,
)

INTERRUPT = 0x80


@pytest.mark.parametrize(
    ("page", "address"), [(IDT, IDT + UD * 16), (GDT, GDT + KERNEL_CS), (TSS, TSS + TSS64_RSP0)]
)
def test_unmapped_system_structure_is_a_supervisor_page_fault(user: Guest, page: int, address: int) -> None:
    user.unmap(page)
    assert user.deliver64(UD) == (PF, 0, address)


def test_page_fault_on_the_stack_reports_a_write_at_the_first_push(user: Guest) -> None:
    user.unmap(RING0_STACK - 8)
    assert user.deliver64(UD) == (PF, PF_W, RING0_STACK - 8)


def test_page_fault_on_the_lower_page_of_a_frame_reports_the_push_that_hit_it(guest: Guest) -> None:
    guest.words[RSP] = KERNEL_STACK - 0x1000 + 0x10
    guest.unmap(KERNEL_STACK - 0x1001)
    assert guest.deliver64(UD) == (PF, PF_W, KERNEL_STACK - 0x1008)


def test_stack_that_is_not_canonical_is_a_stack_fault(user: Guest) -> None:
    user.store(TSS + TSS64_RSP0, 8, 1 << 62)
    assert user.deliver64(UD) == (SS, ERROR_EXT, 0x4000_0000_0000_0000 - 8)


def test_idt_that_is_not_canonical_is_a_general_protection(guest: Guest) -> None:
    guest.words[IDT_BASE] = 1 << 62
    result = guest.deliver64(UD)
    assert result[:2] == (GP, ERROR_EXT)


def test_low_idt_violates_lass_even_with_ac(guest: Guest) -> None:
    guest.words[IDT_BASE] = IDT - UPPER
    guest.words[RFLAGS] |= RFLAGS_AC
    assert guest.deliver64(UD)[:2] == (GP, ERROR_EXT)


def test_low_idt_without_lass_is_a_smap_page_fault(guest: Guest) -> None:
    guest.words[CR4] &= ~CR4_LASS
    guest.words[IDT_BASE] = IDT - UPPER
    guest.words[RFLAGS] |= RFLAGS_AC
    assert guest.deliver64(UD) == (PF, PF_P, IDT - UPPER + UD * 16)


def test_low_kernel_stack_violates_lass_as_a_stack_fault(user: Guest) -> None:
    user.store(TSS + TSS64_RSP0, 8, USER_STACK)
    assert user.deliver64(UD)[:2] == (SS, ERROR_EXT)


def test_low_kernel_stack_is_allowed_with_ac_because_pushes_are_explicit(user: Guest) -> None:
    user.store(TSS + TSS64_RSP0, 8, USER_STACK)
    user.words[RFLAGS] |= RFLAGS_AC
    assert user.deliver64(UD) == DELIVERED


def test_software_interrupt_with_a_forbidden_stack_has_ext_clear(user: Guest) -> None:
    user.set_gate(INTERRUPT, CODE, attributes=AR_P | SYS_INTERRUPT_GATE | DPL3)
    user.store(TSS + TSS64_RSP0, 8, USER_STACK)
    assert user.deliver64(INTERRUPT, SOFTWARE)[:2] == (SS, 0)


def test_low_handler_address_is_loaded_and_only_its_fetch_will_fault(guest: Guest) -> None:
    guest.set_gate(UD, USER_CODE)
    assert guest.deliver64(UD) == DELIVERED
    assert guest.words[RIP] == USER_CODE


def test_compatibility_mode_code_is_interrupted_through_the_64_bit_idt(user: Guest) -> None:
    user.words[segment_word(CS, ATTRIBUTES)] = AR_DATA | AR_P
    assert user.deliver64(UD) == DELIVERED
    assert user.words[segment_word(CS, ATTRIBUTES)] == AR_CODE64
