"""Loading and storing the descriptor-table registers, executed from their bytes."""

from __future__ import annotations

import pytest
from emulator_guest import (
    LDT,
    LDT_SELECTOR,
    TSS,
    TSS_SELECTOR,
    UPPER,
    USER_CODE,
    USER_STACK,
    Guest,
)

from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    CR0,
    CR4,
    EFER,
    GDT_BASE,
    GDT_LIMIT,
    IDT_BASE,
    IDT_LIMIT,
    RAX,
    RBP,
    RFLAGS,
    RIP,
    SELECTOR,
    segment_word,
)
from lasskvm.x86.descriptors import SYS_TSS_AVAILABLE, make_segment
from lasskvm.x86.exceptions import GP, UD
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_DATA,
    AR_P,
    CR0_PG,
    CR4_UMIP,
    CS,
    DS,
    EFER_LMA,
    LDTR,
    RFLAGS_AC,
    TR,
)

DATA = UPPER + 0x70000
USER_DATA = 0x70000

LGDT_RAX = "0f0110"
LIDT_RAX = "0f0118"
SGDT_RAX = "0f0100"
SIDT_RAX = "0f0108"
SMSW_RAX = "480f01e0"


def test_lgdt_reads_ten_bytes_through_lass_and_paging(guest: Guest) -> None:
    guest.store(DATA, 2, 0x77)
    guest.store(DATA + 2, 8, UPPER + 0x9000)
    guest.words[RAX] = DATA
    guest.run(LGDT_RAX)
    assert (guest.words[GDT_BASE], guest.words[GDT_LIMIT]) == (UPPER + 0x9000, 0x77)


def test_lidt_may_load_a_low_base_which_is_only_named(guest: Guest) -> None:
    guest.store(DATA, 2, 0xFFF)
    guest.store(DATA + 2, 8, 0x3000)
    guest.words[RAX] = DATA
    guest.run(LIDT_RAX)
    assert (guest.words[IDT_BASE], guest.words[IDT_LIMIT]) == (0x3000, 0xFFF)


def test_lgdt_operand_in_the_user_half_violates_lass_unless_ac(guest: Guest) -> None:
    guest.words[RAX] = USER_DATA
    assert guest.fault_of(LGDT_RAX) == (GP, 0)
    guest.words[RFLAGS] |= RFLAGS_AC
    guest.store(USER_DATA, 2, 0x77)
    guest.store(USER_DATA + 2, 8, UPPER)
    guest.run(LGDT_RAX)
    assert guest.words[GDT_LIMIT] == 0x77


def test_lgdt_operand_on_the_stack_faults_as_a_stack_access(guest: Guest) -> None:
    guest.words[RBP] = USER_STACK
    assert guest.fault_of("0f015500") == (STACK_FAULT, 0)  # lgdt [rbp]


def test_lgdt_base_must_be_canonical(guest: Guest) -> None:
    guest.store(DATA + 2, 8, 1 << 47)
    guest.words[RAX] = DATA
    assert guest.fault_of(LGDT_RAX) == (GP, 0)


def test_lgdt_with_a_16_bit_operand_size_loads_24_bits_of_base(guest: Guest) -> None:
    words = guest.words
    words[segment_word(CS, ATTRIBUTES)] = AR_CODE32
    words[EFER] &= ~EFER_LMA
    words[CR0] &= ~CR0_PG
    words[RIP] = USER_CODE
    guest.state.set_segment(DS, guest.state.segment(2))
    words[segment_word(DS, ATTRIBUTES)] = AR_DATA
    guest.store(0x7000, 8, 0x12345678_0077)
    words[RAX] = 0x7000
    guest.run("660f0110")
    assert (words[GDT_BASE], words[GDT_LIMIT]) == (0x345678, 0x77)
    guest.run("0f0110")
    assert words[GDT_BASE] == 0x12345678


def test_sgdt_and_sidt_store_ten_bytes(guest: Guest) -> None:
    guest.words[RAX] = DATA
    guest.run(SGDT_RAX)
    assert (guest.load(DATA, 2), guest.load(DATA + 2)) == (guest.words[GDT_LIMIT], guest.words[GDT_BASE])
    guest.run(SIDT_RAX)
    assert (guest.load(DATA, 2), guest.load(DATA + 2)) == (guest.words[IDT_LIMIT], guest.words[IDT_BASE])


@pytest.mark.parametrize("code", [SGDT_RAX, SIDT_RAX, "0f00c0", "0f00c8", SMSW_RAX])
def test_umip_hides_the_tables_from_user_mode(user: Guest, code: str) -> None:
    user.words[RAX] = USER_DATA
    user.run(code)
    user.words[CR4] |= CR4_UMIP
    assert user.fault_of(code) == (GP, 0)


def test_sgdt_to_an_upper_half_address_from_user_mode_violates_lass(user: Guest) -> None:
    user.words[RAX] = DATA
    assert user.fault_of(SGDT_RAX) == (GP, 0)


def test_sldt_and_str_zero_extend_into_registers_and_store_16_bits(guest: Guest) -> None:
    guest.words[RAX] = (1 << 64) - 1
    guest.run("480f00c0")  # sldt rax
    assert guest.words[RAX] == LDT_SELECTOR
    guest.words[RAX] = DATA
    guest.store(DATA, 8, (1 << 64) - 1)
    guest.run("0f0008")  # str [rax]
    assert guest.load(DATA) == (1 << 64) - 1 & ~0xFFFF | TSS_SELECTOR


def test_lldt_and_ltr_load_from_the_gdt(guest: Guest) -> None:
    guest.words[RAX] = 0
    guest.run("0f00d0")  # lldt ax
    assert guest.words[segment_word(LDTR, SELECTOR)] == 0
    guest.words[RAX] = LDT_SELECTOR
    guest.run("0f00d0")
    assert guest.words[segment_word(LDTR, BASE)] == LDT
    guest.set_descriptor(TSS_SELECTOR, make_segment(TSS & 0xFFFFFFFF, 0x67, AR_P | SYS_TSS_AVAILABLE))
    guest.words[RAX] = TSS_SELECTOR
    guest.run("0f00d8")  # ltr ax
    assert guest.words[segment_word(TR, BASE)] == TSS


@pytest.mark.parametrize("code", ["0f00d0", "0f00d8", "0f00c0", "0f00c8"])
def test_ldt_and_task_register_do_not_exist_in_real_mode(guest: Guest, code: str) -> None:
    guest.state.reset()
    guest.words[RIP], guest.words[segment_word(CS, BASE)] = 0x100, 0
    guest.words[segment_word(CS, ATTRIBUTES)] = AR_DATA
    assert guest.fault_of(code) == (UD, None)
