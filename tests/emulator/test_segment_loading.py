"""Loading segment registers, LDTR and TR."""

from __future__ import annotations

import pytest
from emulator_guest import (
    ABSENT_CS,
    CONFORMING_CS,
    DPL3,
    GDT,
    KERNEL_CS,
    KERNEL_SS,
    LDT,
    LDT_SELECTOR,
    TSS,
    TSS_SELECTOR,
    UPPER,
    USER_CS64,
    USER_SS,
    Guest,
)

from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.segments import load_ldtr, load_segment, load_tr
from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    CR0,
    EFER,
    GDT_BASE,
    GDT_LIMIT,
    LIMIT,
    RFLAGS,
    SELECTOR,
    segment_word,
)
from lasskvm.x86.descriptors import SYS_TSS_AVAILABLE, SYS_TSS_BUSY, TSS64_BYTES, make_segment
from lasskvm.x86.exceptions import GP, NP, PF, PF_P, PF_W
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.registers import (
    AR_ACCESSED,
    AR_CODE,
    AR_DATA,
    AR_DPL_SHIFT,
    AR_LDT,
    AR_P,
    AR_REAL_MODE,
    AR_S,
    AR_TSS64_BUSY,
    AR_UNUSABLE,
    CR0_PE,
    DS,
    EFER_LMA,
    ES,
    FS,
    LDTR,
    RFLAGS_VM,
    SS,
    TR,
)

SPARE = 0x78


def field(guest: Guest, number: int, which: int) -> int:
    return guest.words[segment_word(number, which)]


def fault_of(guest: Guest, number: int, selector: int) -> tuple[int, int | None]:
    before = guest.snapshot()
    with pytest.raises(GuestFault) as caught:
        load_segment(guest.words, guest.memory, number, selector)
    assert guest.snapshot() == before, "a rejected load changed the state"
    return caught.value.vector, caught.value.error_code


def system_fault(guest: Guest, load, selector: int) -> tuple[int, int | None]:  # type: ignore[no-untyped-def]
    with pytest.raises(GuestFault) as caught:
        load(guest.words, guest.memory, selector)
    return caught.value.vector, caught.value.error_code


# ------------------------------------------------------------------------------------------- data segments


def test_data_segment_takes_everything_from_its_descriptor(guest: Guest) -> None:
    guest.set_descriptor(SPARE, make_segment(0x12345678, 0x7FFF, AR_P | AR_S))
    load_segment(guest.words, guest.memory, DS, SPARE)
    assert field(guest, DS, SELECTOR) == SPARE
    assert field(guest, DS, BASE) == 0x12345678
    assert field(guest, DS, LIMIT) == 0x7FFF
    assert field(guest, DS, ATTRIBUTES) == AR_P | AR_S | AR_ACCESSED


def test_loading_sets_the_accessed_bit_in_the_table(guest: Guest) -> None:
    guest.set_descriptor(SPARE, make_segment(0, 0, AR_P | AR_S))
    load_segment(guest.words, guest.memory, ES, SPARE)
    assert guest.descriptor(SPARE) >> 40 & AR_ACCESSED


def test_accessed_bit_in_a_write_protected_table_is_an_implicit_write_fault(user: Guest) -> None:
    user.set_descriptor(SPARE, make_segment(0, 0, AR_P | AR_S | DPL3))
    user.write_protect(GDT)
    assert fault_of(user, DS, SPARE | 3) == (PF, PF_P | PF_W)


def test_user_load_reads_the_upper_half_gdt_as_an_implicit_supervisor_access(user: Guest) -> None:
    load_segment(user.words, user.memory, DS, USER_SS)
    assert field(user, DS, SELECTOR) == USER_SS


def test_low_gdt_violates_lass_for_any_load(guest: Guest) -> None:
    guest.words[GDT_BASE] = GDT - UPPER
    assert fault_of(guest, DS, KERNEL_SS) == (GP, 0)


@pytest.mark.parametrize("selector", [0, 1, 2, 3])
def test_null_selector_makes_a_data_segment_unusable(guest: Guest, selector: int) -> None:
    load_segment(guest.words, guest.memory, FS, selector)
    assert field(guest, FS, ATTRIBUTES) == AR_UNUSABLE
    assert field(guest, FS, SELECTOR) == selector


def test_readable_code_is_allowed_and_execute_only_code_is_not(guest: Guest) -> None:
    load_segment(guest.words, guest.memory, DS, KERNEL_CS)
    guest.set_descriptor(SPARE, make_segment(0, 0, AR_P | AR_S | AR_CODE))
    assert fault_of(guest, DS, SPARE) == (GP, SPARE)


def test_system_descriptor_is_a_general_protection(guest: Guest) -> None:
    assert fault_of(guest, DS, TSS_SELECTOR) == (GP, TSS_SELECTOR)


def test_selector_beyond_the_table_is_a_general_protection(guest: Guest) -> None:
    guest.words[GDT_LIMIT] = KERNEL_SS + 6
    assert fault_of(guest, DS, KERNEL_SS) == (GP, KERNEL_SS)


def test_user_cannot_load_a_kernel_data_segment(user: Guest) -> None:
    assert fault_of(user, DS, KERNEL_SS) == (GP, KERNEL_SS)


def test_rpl_weakens_the_caller(guest: Guest) -> None:
    assert fault_of(guest, DS, KERNEL_SS | 3) == (GP, KERNEL_SS)


def test_conforming_code_is_readable_by_anyone(user: Guest) -> None:
    load_segment(user.words, user.memory, DS, CONFORMING_CS | 3)
    assert field(user, DS, SELECTOR) == CONFORMING_CS | 3


def test_absent_data_segment_is_not_present(guest: Guest) -> None:
    assert fault_of(guest, DS, ABSENT_CS) == (NP, ABSENT_CS)


# ---------------------------------------------------------------------------------------------------- SS


def test_stack_segment_must_match_cpl_in_rpl_and_dpl(user: Guest) -> None:
    load_segment(user.words, user.memory, SS, USER_SS)
    assert fault_of(user, SS, USER_SS & ~3) == (GP, USER_SS & ~3)
    user.enter_kernel()
    assert fault_of(user, SS, USER_SS & ~3) == (GP, USER_SS & ~3)


def test_stack_segment_must_be_writable_data(guest: Guest) -> None:
    guest.set_descriptor(SPARE, make_segment(0, 0, AR_P | AR_S))
    assert fault_of(guest, SS, SPARE) == (GP, SPARE)
    assert fault_of(guest, SS, KERNEL_CS) == (GP, KERNEL_CS)


def test_absent_stack_segment_is_a_stack_fault(guest: Guest) -> None:
    guest.set_descriptor(SPARE, make_segment(0, 0, AR_DATA & ~AR_P))
    assert fault_of(guest, SS, SPARE) == (STACK_FAULT, SPARE)


def test_null_stack_segment_is_for_64_bit_kernel_code_only(user: Guest) -> None:
    assert fault_of(user, SS, 3) == (GP, 0)
    user.enter_kernel()
    assert fault_of(user, SS, 1) == (GP, 0)
    load_segment(user.words, user.memory, SS, 0)
    assert field(user, SS, ATTRIBUTES) == AR_UNUSABLE
    user.words[EFER] &= ~EFER_LMA
    assert fault_of(user, SS, 0) == (GP, 0)


# ------------------------------------------------------------------------------------ real and v8086 mode


def test_real_mode_changes_only_selector_and_base(guest: Guest) -> None:
    guest.words[CR0] &= ~CR0_PE
    guest.words[segment_word(DS, LIMIT)] = 0xFFFFFFFF
    load_segment(guest.words, guest.memory, DS, 0x1234)
    assert (field(guest, DS, BASE), field(guest, DS, LIMIT)) == (0x12340, 0xFFFFFFFF)


def test_virtual_8086_mode_fixes_limit_and_attributes(user: Guest) -> None:
    user.words[EFER] &= ~EFER_LMA
    user.words[RFLAGS] |= RFLAGS_VM
    load_segment(user.words, user.memory, DS, 0x1234)
    assert (field(user, DS, BASE), field(user, DS, LIMIT)) == (0x12340, 0xFFFF)
    assert field(user, DS, ATTRIBUTES) == AR_REAL_MODE | 3 << AR_DPL_SHIFT


# --------------------------------------------------------------------------------------------- LDTR, TR


def test_lldt_loads_a_64_bit_base(guest: Guest) -> None:
    load_ldtr(guest.words, guest.memory, LDT_SELECTOR)
    assert (field(guest, LDTR, BASE), field(guest, LDTR, LIMIT)) == (LDT, 0xFFF)
    assert field(guest, LDTR, ATTRIBUTES) == AR_LDT


def test_lldt_null_makes_the_ldt_unusable(guest: Guest) -> None:
    load_ldtr(guest.words, guest.memory, 3)
    assert field(guest, LDTR, ATTRIBUTES) == AR_UNUSABLE


@pytest.mark.parametrize("selector", [LDT_SELECTOR | 4, TSS_SELECTOR, KERNEL_CS])
def test_lldt_of_something_else_is_a_general_protection(guest: Guest, selector: int) -> None:
    assert system_fault(guest, load_ldtr, selector) == (GP, selector)


def test_lldt_of_an_absent_ldt_is_not_present(guest: Guest) -> None:
    guest.set_descriptor(LDT_SELECTOR, make_segment(0, 0, AR_LDT & ~AR_P))
    assert system_fault(guest, load_ldtr, LDT_SELECTOR) == (NP, LDT_SELECTOR)


def test_ltr_makes_the_tss_busy_in_the_gdt_and_in_the_register(guest: Guest) -> None:
    guest.set_descriptor(
        TSS_SELECTOR, make_segment(TSS & 0xFFFFFFFF, TSS64_BYTES - 1, AR_P | SYS_TSS_AVAILABLE)
    )
    load_tr(guest.words, guest.memory, TSS_SELECTOR)
    assert guest.descriptor(TSS_SELECTOR) >> 40 & 0xF == SYS_TSS_BUSY
    assert (field(guest, TR, BASE), field(guest, TR, ATTRIBUTES)) == (TSS, AR_TSS64_BUSY)


def test_ltr_of_a_busy_tss_is_a_general_protection(guest: Guest) -> None:
    assert system_fault(guest, load_tr, TSS_SELECTOR) == (GP, TSS_SELECTOR)


def test_ltr_of_a_null_selector_is_a_general_protection(guest: Guest) -> None:
    assert system_fault(guest, load_tr, 0) == (GP, 0)


def test_16_byte_descriptor_must_fit_into_the_gdt_and_have_a_zero_type_behind(guest: Guest) -> None:
    guest.set_descriptor(TSS_SELECTOR, make_segment(0, 0, AR_P | SYS_TSS_AVAILABLE))
    guest.words[GDT_LIMIT] = TSS_SELECTOR + 14
    assert system_fault(guest, load_tr, TSS_SELECTOR) == (GP, TSS_SELECTOR)
    guest.words[GDT_LIMIT] = TSS_SELECTOR + 15
    guest.set_descriptor(TSS_SELECTOR + 8, 1 << 40)
    assert system_fault(guest, load_tr, TSS_SELECTOR) == (GP, TSS_SELECTOR)


def test_tss_base_must_be_canonical(guest: Guest) -> None:
    guest.set_descriptor(TSS_SELECTOR, make_segment(0, 0, AR_P | SYS_TSS_AVAILABLE))
    guest.set_descriptor(TSS_SELECTOR + 8, 0x8000)
    assert system_fault(guest, load_tr, TSS_SELECTOR) == (GP, TSS_SELECTOR)


def test_user_segment_64_cannot_be_a_tss(guest: Guest) -> None:
    assert system_fault(guest, load_tr, USER_CS64 & ~3) == (GP, USER_CS64 & ~3)
