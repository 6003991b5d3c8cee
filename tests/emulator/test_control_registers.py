"""MOV to control and debug registers: reserved bits, combinations, and what a write entails."""

from __future__ import annotations

import pytest
from emulator_guest import PML4, Guest

from lasskvm.emulator import control
from lasskvm.emulator.faults import GuestFault
from lasskvm.state import (
    ATTRIBUTES,
    CPL,
    CR0,
    CR3,
    CR4,
    CR4_ALLOWED,
    CR8,
    DR0,
    DR6,
    DR7,
    EFER,
    MAXPHYADDR,
    PDPTR0,
    SELECTOR,
    TLB_FLUSH,
    segment_word,
)
from lasskvm.x86.exceptions import DB, GP, UD
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_CODE64,
    AR_TSS16_BUSY,
    CR0_CD,
    CR0_EM,
    CR0_ET,
    CR0_MP,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR0_WP,
    CR4_CET,
    CR4_DE,
    CR4_LA57,
    CR4_LASS,
    CR4_PAE,
    CR4_PCIDE,
    CR4_PGE,
    CR4_PKS,
    CR4_PSE,
    CR4_SMEP,
    CR4_TSD,
    CS,
    DR6_B0,
    DR6_BD,
    DR6_BS,
    DR6_FIXED,
    DR7_FIXED,
    DR7_GD,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    TR,
)

PDPT = 0x10000


def vector_of(guest: Guest, write, *arguments) -> int:  # type: ignore[no-untyped-def]
    """The vector that a rejected write raises; the state must be as before."""
    before = guest.snapshot()
    with pytest.raises(GuestFault) as caught:
        write(guest.words, *arguments)
    assert guest.snapshot() == before, "a rejected write changed the state"
    return caught.value.vector


def set_cr0(guest: Guest, value: int) -> None:
    control.set_cr0(guest.words, guest.memory, value)


def set_cr4(guest: Guest, value: int) -> None:
    control.set_cr4(guest.words, guest.memory, value)


@pytest.fixture
def protected(guest: Guest) -> Guest:
    """32-bit protected mode without paging."""
    words = guest.words
    words[CR0] = CR0_PE | CR0_ET
    words[CR4] = 0
    words[EFER] = 0
    words[segment_word(CS, ATTRIBUTES)] = AR_CODE32
    return guest


# --------------------------------------------------------------------------------------------------- CR0


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda cr0: cr0 | CR0_NW, id="NW without CD"),
        pytest.param(lambda cr0: cr0 & ~CR0_PE, id="PG without PE"),
        pytest.param(lambda cr0: cr0 | 1 << 32, id="upper half"),
        pytest.param(lambda cr0: cr0 & ~CR0_PG, id="leaving paging in 64-bit mode"),
    ],
)
def test_forbidden_cr0_values_are_a_general_protection(guest: Guest, change) -> None:  # type: ignore[no-untyped-def]
    value = change(guest.words[CR0])
    assert vector_of(guest, control.set_cr0, guest.memory, value) == GP


def test_reserved_low_cr0_bits_are_ignored_and_et_reads_as_one(guest: Guest) -> None:
    set_cr0(guest, (guest.words[CR0] & ~CR0_ET) | 1 << 10 | CR0_CD)
    assert guest.words[CR0] & (1 << 10) == 0
    assert guest.words[CR0] & CR0_ET
    assert guest.words[CR0] & CR0_CD


def test_clearing_wp_with_cet_is_a_general_protection(guest: Guest) -> None:
    guest.words[CR4] |= CR4_CET
    assert vector_of(guest, control.set_cr0, guest.memory, guest.words[CR0] & ~CR0_WP) == GP


def test_cr0_write_that_changes_translation_asks_for_a_flush(guest: Guest) -> None:
    set_cr0(guest, guest.words[CR0] | CR0_TS)
    assert guest.words[TLB_FLUSH] == 0
    set_cr0(guest, guest.words[CR0] & ~CR0_WP)
    assert guest.words[TLB_FLUSH] == 1


def test_setting_pg_with_lme_activates_ia32e_mode_and_clearing_it_leaves(protected: Guest) -> None:
    words = protected.words
    words[CR4], words[EFER] = CR4_PAE, EFER_LME
    set_cr0(protected, words[CR0] | CR0_PG)
    assert words[EFER] == EFER_LME | EFER_LMA
    set_cr0(protected, words[CR0] & ~CR0_PG)
    assert words[EFER] == EFER_LME


def test_activating_ia32e_mode_needs_pae(protected: Guest) -> None:
    protected.words[EFER] = EFER_LME
    assert vector_of(protected, control.set_cr0, protected.memory, protected.words[CR0] | CR0_PG) == GP


def test_activating_ia32e_mode_from_a_64_bit_code_segment_is_a_general_protection(protected: Guest) -> None:
    protected.words[CR4], protected.words[EFER] = CR4_PAE, EFER_LME
    protected.words[segment_word(CS, ATTRIBUTES)] = AR_CODE64
    assert vector_of(protected, control.set_cr0, protected.memory, protected.words[CR0] | CR0_PG) == GP


def test_activating_ia32e_mode_with_a_16_bit_tss_is_a_general_protection(protected: Guest) -> None:
    words = protected.words
    words[CR4], words[EFER] = CR4_PAE, EFER_LME
    words[segment_word(TR, ATTRIBUTES)] = AR_TSS16_BUSY
    assert vector_of(protected, control.set_cr0, protected.memory, words[CR0] | CR0_PG) == GP
    words[segment_word(TR, SELECTOR)] = 0
    set_cr0(protected, words[CR0] | CR0_PG)
    assert words[EFER] & EFER_LMA


def test_leaving_paging_with_pcide_is_a_general_protection(guest: Guest) -> None:
    guest.words[segment_word(CS, ATTRIBUTES)] = AR_CODE32
    guest.words[CR4] |= CR4_PCIDE
    assert vector_of(guest, control.set_cr0, guest.memory, guest.words[CR0] & ~CR0_PG) == GP


def test_enabling_pae_paging_loads_the_pdptes(protected: Guest) -> None:
    words = protected.words
    words[CR4], words[CR3] = CR4_PAE, PDPT
    for index in range(4):
        protected.memory.store(PDPT + 8 * index, 8, (index + 1) << 12 | 1)
    set_cr0(protected, words[CR0] | CR0_PG)
    assert [words[PDPTR0 + index] for index in range(4)] == [0x1001, 0x2001, 0x3001, 0x4001]


def test_enabling_pae_paging_with_a_reserved_pdpte_bit_is_a_general_protection(protected: Guest) -> None:
    words = protected.words
    words[CR4], words[CR3] = CR4_PAE, PDPT
    protected.memory.store(PDPT + 24, 8, 1 << 1 | 1)
    assert vector_of(protected, control.set_cr0, protected.memory, words[CR0] | CR0_PG) == GP


def test_lmsw_sets_pe_and_cannot_clear_it() -> None:
    cr0 = control.with_machine_status_word(CR0_ET, CR0_PE | CR0_EM | CR0_CD | 1 << 4)
    assert cr0 == CR0_ET | CR0_PE | CR0_EM
    assert control.with_machine_status_word(cr0, CR0_MP) == CR0_ET | CR0_PE | CR0_MP


def test_clts_clears_only_ts(guest: Guest) -> None:
    before = guest.words[CR0]
    guest.words[CR0] |= CR0_TS
    guest.run("0f 06")
    assert guest.words[CR0] == before


# --------------------------------------------------------------------------------------------------- CR3


def test_cr3_bits_above_maxphyaddr_are_reserved_in_ia32e_mode(guest: Guest) -> None:
    before = guest.snapshot()
    assert control.set_cr3(guest.words, guest.memory, 1 << guest.words[MAXPHYADDR]) == GP
    assert control.set_cr3(guest.words, guest.memory, 1 << 63) == GP
    assert guest.snapshot() == before


def test_cr3_write_asks_for_a_flush(guest: Guest) -> None:
    assert control.set_cr3(guest.words, guest.memory, PML4 | 0x18) == 0
    assert guest.words[CR3] == PML4 | 0x18
    assert guest.words[TLB_FLUSH] == 1


def test_cr3_no_flush_bit_exists_with_pcide_and_is_not_stored(guest: Guest) -> None:
    guest.words[CR4] |= CR4_PCIDE
    assert control.set_cr3(guest.words, guest.memory, 1 << 63 | PML4 | 5) == 0
    assert guest.words[CR3] == PML4 | 5


def test_cr3_no_flush_bit_is_reserved_without_pcide(guest: Guest) -> None:
    assert vector_of_cr3(guest, 1 << 63 | PML4) == GP


@pytest.mark.parametrize("bit", [46, 51, 52, 62])
def test_cr3_bits_above_maxphyaddr_are_reserved_with_pcide_too(guest: Guest, bit: int) -> None:
    guest.words[CR4] |= CR4_PCIDE
    assert vector_of_cr3(guest, 1 << 63 | 1 << bit | PML4) == GP


@pytest.mark.parametrize("no_flush", [0, 1 << 63])
def test_translations_of_the_former_pcid_go_with_and_without_the_no_flush_bit(
    guest: Guest, no_flush: int
) -> None:
    guest.words[CR4] |= CR4_PCIDE
    assert control.set_cr3(guest.words, guest.memory, no_flush | PML4 | 5) == 0
    assert guest.words[TLB_FLUSH] == 1


def vector_of_cr3(guest: Guest, value: int) -> int:
    before = guest.snapshot()
    vector = control.set_cr3(guest.words, guest.memory, value)
    assert guest.snapshot() == before
    return vector


def test_cr3_write_with_pae_paging_loads_and_checks_the_pdptes(protected: Guest) -> None:
    words = protected.words
    words[CR0] |= CR0_PG
    words[CR4] = CR4_PAE
    protected.memory.store(PDPT, 8, 0x5001)
    assert control.set_cr3(words, protected.memory, PDPT) == 0
    assert words[PDPTR0] == 0x5001
    protected.memory.store(PDPT + 8, 8, 1 << words[MAXPHYADDR] | 1)
    before = protected.snapshot()
    assert control.set_cr3(words, protected.memory, PDPT) == GP
    assert protected.snapshot() == before


# --------------------------------------------------------------------------------------------------- CR4


@pytest.mark.parametrize("bit", [CR4_PKS, CR4_LA57, CR4_CET, 1 << 15, 1 << 31, 1 << 32, 1 << 63])
def test_cr4_bits_without_their_cpuid_feature_are_reserved(guest: Guest, bit: int) -> None:
    assert vector_of(guest, control.set_cr4, guest.memory, guest.words[CR4] | bit) == GP


def test_cr4_lass_is_reserved_when_the_guests_cpuid_lacks_it(guest: Guest) -> None:
    guest.words[CR4] &= ~CR4_LASS
    guest.words[CR4_ALLOWED] &= ~CR4_LASS
    assert vector_of(guest, control.set_cr4, guest.memory, guest.words[CR4] | CR4_LASS) == GP


def test_cr4_lass_may_be_set_outside_ia32e_mode(protected: Guest) -> None:
    set_cr4(protected, CR4_LASS)
    assert protected.words[CR4] == CR4_LASS


def test_changing_cr4_lass_asks_for_a_flush(guest: Guest) -> None:
    set_cr4(guest, guest.words[CR4] | CR4_TSD)
    assert guest.words[TLB_FLUSH] == 0
    set_cr4(guest, guest.words[CR4] & ~CR4_LASS)
    assert guest.words[TLB_FLUSH] == 1


def test_pae_cannot_be_cleared_in_ia32e_mode(guest: Guest) -> None:
    assert vector_of(guest, control.set_cr4, guest.memory, guest.words[CR4] & ~CR4_PAE) == GP


def test_la57_cannot_change_in_ia32e_mode_but_can_outside(guest: Guest) -> None:
    guest.words[CR4_ALLOWED] |= CR4_LA57
    assert vector_of(guest, control.set_cr4, guest.memory, guest.words[CR4] | CR4_LA57) == GP
    guest.words[EFER] &= ~EFER_LMA
    guest.words[CR0] &= ~CR0_PG
    set_cr4(guest, guest.words[CR4] | CR4_LA57)
    assert guest.words[CR4] & CR4_LA57


def test_pcide_needs_ia32e_mode_and_pcid_zero(guest: Guest) -> None:
    guest.words[CR4_ALLOWED] |= CR4_PCIDE
    guest.words[CR3] = PML4 | 1
    assert vector_of(guest, control.set_cr4, guest.memory, guest.words[CR4] | CR4_PCIDE) == GP
    guest.words[CR3] = PML4
    guest.words[EFER] &= ~EFER_LMA
    assert vector_of(guest, control.set_cr4, guest.memory, guest.words[CR4] | CR4_PCIDE) == GP
    guest.words[EFER] |= EFER_LMA
    set_cr4(guest, guest.words[CR4] | CR4_PCIDE)
    assert guest.words[CR4] & CR4_PCIDE


def test_pcide_once_set_does_not_hold_the_pcid_at_zero(guest: Guest) -> None:
    guest.words[CR4] |= CR4_PCIDE
    guest.words[CR3] = PML4 | 7
    set_cr4(guest, guest.words[CR4] | CR4_TSD)
    assert guest.words[CR4] & CR4_PCIDE


def test_changing_pcide_asks_for_a_flush(guest: Guest) -> None:
    set_cr4(guest, guest.words[CR4] | CR4_PCIDE)
    assert guest.words[TLB_FLUSH] == 1
    guest.words[TLB_FLUSH] = 0
    set_cr4(guest, guest.words[CR4] & ~CR4_PCIDE)
    assert guest.words[TLB_FLUSH] == 1


def test_cet_needs_write_protection(guest: Guest) -> None:
    guest.words[CR4_ALLOWED] |= CR4_CET
    guest.words[CR0] &= ~CR0_WP
    assert vector_of(guest, control.set_cr4, guest.memory, guest.words[CR4] | CR4_CET) == GP


@pytest.mark.parametrize("bit", [CR4_PGE, CR4_PSE, CR4_SMEP])
def test_cr4_change_with_pae_paging_loads_the_pdptes(protected: Guest, bit: int) -> None:
    words = protected.words
    words[CR0] |= CR0_PG
    words[CR4], words[CR3] = CR4_PAE, PDPT
    protected.memory.store(PDPT, 8, 0x7001)
    set_cr4(protected, CR4_PAE | bit)
    assert words[PDPTR0] == 0x7001


# ----------------------------------------------------------------------------------------------- CR8, EFER


def test_cr8_has_four_bits(guest: Guest) -> None:
    control.set_cr8(guest.words, 0xF)
    assert guest.words[CR8] == 0xF
    assert vector_of(guest, control.set_cr8, 0x10) == GP


def test_efer_reserved_bits_are_a_general_protection(guest: Guest) -> None:
    assert vector_of(guest, control.set_efer, guest.words[EFER] | 1 << 12) == GP


def test_lme_cannot_change_while_paging_is_on(guest: Guest) -> None:
    assert vector_of(guest, control.set_efer, EFER_SCE) == GP


def test_lma_is_read_only_and_ignored(guest: Guest) -> None:
    control.set_efer(guest.words, EFER_LME | EFER_SCE)
    assert guest.words[EFER] == EFER_LME | EFER_SCE | EFER_LMA


def test_changing_nxe_asks_for_a_flush_and_changing_sce_does_not(guest: Guest) -> None:
    control.set_efer(guest.words, guest.words[EFER] & ~EFER_SCE)
    assert guest.words[TLB_FLUSH] == 0
    control.set_efer(guest.words, guest.words[EFER] & ~EFER_NXE)
    assert guest.words[TLB_FLUSH] == 1


# ---------------------------------------------------------------------------------------- debug registers


def test_address_registers_take_any_value(guest: Guest) -> None:
    control.set_dr(guest.words, 3, 1 << 62)
    assert guest.words[DR0 + 3] == 1 << 62
    assert control.get_dr(guest.words, 3) == 1 << 62


@pytest.mark.parametrize("number", [6, 7])
def test_upper_half_of_dr6_and_dr7_must_be_zero(guest: Guest, number: int) -> None:
    assert vector_of(guest, control.set_dr, number, 1 << 32) == GP


def test_fixed_bits_of_dr6_and_dr7_stay(guest: Guest) -> None:
    control.set_dr(guest.words, 6, 0)
    control.set_dr(guest.words, 7, 0)
    assert (guest.words[DR6], guest.words[DR7]) == (DR6_FIXED, DR7_FIXED)
    control.set_dr(guest.words, 6, 0xFFFFFFFF)
    control.set_dr(guest.words, 7, 0xFFFFFFFF)
    assert guest.words[DR6] == DR6_FIXED | DR6_BD | DR6_BS | 1 << 15 | DR6_B0 * 0xF
    assert guest.words[DR7] == 0xFFFF27FF


def test_dr4_and_dr5_are_aliases_unless_cr4_de(guest: Guest) -> None:
    control.set_dr(guest.words, 5, 0x3)
    assert guest.words[DR7] == DR7_FIXED | 3
    assert control.get_dr(guest.words, 4) == guest.words[DR6]
    guest.words[CR4] |= CR4_DE
    assert vector_of(guest, control.set_dr, 5, 0) == UD
    assert vector_of(guest, control.get_dr, 4) == UD


def test_debug_registers_are_privileged(user: Guest) -> None:
    assert vector_of(user, control.get_dr, 0) == GP
    user.words[CR4] |= CR4_DE
    assert vector_of(user, control.get_dr, 4) == UD


def test_general_detect_is_a_debug_fault_before_the_access(guest: Guest) -> None:
    guest.words[DR7] |= DR7_GD
    with pytest.raises(GuestFault) as caught:
        control.set_dr(guest.words, 0, 5)
    assert (caught.value.vector, caught.value.dr6) == (DB, DR6_BD)
    assert guest.words[DR0] == 0
    guest.words[CPL] = 3
    assert vector_of(guest, control.get_dr, 0) == GP
