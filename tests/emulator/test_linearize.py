"""Segment and offset to linear address: canonical rule and LASS in 64-bit mode, limits and types outside."""

from __future__ import annotations

import pytest
from emulator_guest import CODE, DPL3, KERNEL_STACK, UPPER, USER_STACK, Guest

from lasskvm.emulator.data_access import load, store
from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.linearize import linearize
from lasskvm.lass import FETCH, INVLPG, STACK, WRITE
from lasskvm.state import ATTRIBUTES, BASE, CPL, CR0, CR4, EFER, RFLAGS, Segment, segment_word
from lasskvm.x86.exceptions import GP, PF, PF_P, PF_U, PF_W
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.registers import (
    AR_CODE,
    AR_CODE32,
    AR_DATA,
    AR_DB,
    AR_EXPAND_DOWN,
    AR_P,
    AR_REAL_MODE,
    AR_S,
    AR_UNUSABLE,
    AR_WRITABLE,
    CR0_PG,
    CR4_LASS,
    CS,
    DS,
    EFER_LMA,
    ES,
    FS,
    GS,
    RFLAGS_AC,
    SS,
)

LOW = 0x60000
NOT_CANONICAL = 1 << 47


def fault_of(
    guest: Guest, segment: int, offset: int, size: int = 1, flags: int = 0
) -> tuple[int, int | None]:
    with pytest.raises(GuestFault) as caught:
        linearize(guest.ctx, segment, offset, size, flags)
    return caught.value.vector, caught.value.error_code


@pytest.fixture
def protected(guest: Guest) -> Guest:
    """32-bit protected mode without paging; DS is a data segment of 64 KiB at 0x10000."""
    guest.words[EFER] &= ~EFER_LMA
    guest.words[CR0] &= ~CR0_PG
    guest.words[segment_word(CS, ATTRIBUTES)] = AR_CODE32
    guest.state.set_segment(DS, Segment(0x10, 0x10000, 0xFFFF, AR_P | AR_S | AR_WRITABLE | AR_DB))
    return guest


# ------------------------------------------------------------------------------------------------ 64-bit mode


def test_only_fs_and_gs_have_bases_in_64_bit_mode(guest: Guest) -> None:
    for number in range(6):
        guest.words[segment_word(number, BASE)] = 0x1000
    assert linearize(guest.ctx, DS, UPPER, 1, 0) == UPPER
    assert linearize(guest.ctx, CS, CODE, 1, FETCH) == CODE
    assert linearize(guest.ctx, FS, UPPER, 1, 0) == UPPER + 0x1000
    assert linearize(guest.ctx, GS, UPPER, 1, 0) == UPPER + 0x1000


def test_unusable_and_limited_segments_do_not_matter_in_64_bit_mode(guest: Guest) -> None:
    assert linearize(guest.ctx, ES, UPPER + 0x12345, 8, WRITE) == UPPER + 0x12345


def test_address_that_is_not_canonical_is_gp_and_ss_for_the_stack(guest: Guest) -> None:
    assert fault_of(guest, DS, NOT_CANONICAL) == (GP, 0)
    assert fault_of(guest, DS, NOT_CANONICAL, flags=STACK) == (STACK_FAULT, 0)


def test_supervisor_data_access_to_the_user_half_violates_lass_without_ac(guest: Guest) -> None:
    assert fault_of(guest, DS, LOW) == (GP, 0)
    assert fault_of(guest, DS, LOW, flags=STACK) == (STACK_FAULT, 0)
    guest.words[RFLAGS] |= RFLAGS_AC
    assert linearize(guest.ctx, DS, LOW, 1, 0) == LOW


def test_user_data_access_to_the_kernel_half_violates_lass(user: Guest) -> None:
    assert fault_of(user, DS, UPPER) == (GP, 0)
    assert linearize(user.ctx, DS, LOW, 1, 0) == LOW


def test_address_that_is_only_named_is_not_subject_to_lass(guest: Guest) -> None:
    assert linearize(guest.ctx, DS, LOW, 1, INVLPG) == LOW


def test_access_that_wraps_into_the_user_half_violates_lass(guest: Guest) -> None:
    assert fault_of(guest, DS, (1 << 64) - 4, 8) == (GP, 0)


# ------------------------------------------------------------------------------------------- loads and stores


def test_load_and_store_go_through_paging(guest: Guest) -> None:
    store(guest.ctx, DS, KERNEL_STACK - 8, 8, 0x1122334455667788)
    assert load(guest.ctx, DS, KERNEL_STACK - 8, 4) == 0x55667788
    assert guest.load(KERNEL_STACK - 8) == 0x1122334455667788


def test_ten_bytes_across_a_page_come_in_one_value(guest: Guest) -> None:
    store(guest.ctx, DS, KERNEL_STACK - 0x1005, 10, 0x99887766554433221100)
    assert load(guest.ctx, DS, KERNEL_STACK - 0x1005, 10) == 0x99887766554433221100


def test_page_fault_carries_the_address_and_the_kind_of_access(user: Guest) -> None:
    user.unmap(USER_STACK)
    with pytest.raises(GuestFault) as caught:
        store(user.ctx, DS, USER_STACK - 4, 8, 0)
    assert (caught.value.vector, caught.value.error_code, caught.value.cr2) == (PF, PF_U | PF_W, USER_STACK)


def test_lass_comes_before_paging(user: Guest) -> None:
    user.unmap(UPPER)
    with pytest.raises(GuestFault) as caught:
        load(user.ctx, DS, UPPER, 1)
    assert caught.value.vector == GP
    user.words[CR4] &= ~CR4_LASS
    with pytest.raises(GuestFault) as caught:
        load(user.ctx, DS, UPPER, 1)
    assert (caught.value.vector, caught.value.error_code) == (PF, PF_U)
    with pytest.raises(GuestFault) as caught:
        load(user.ctx, DS, UPPER + 0x1000, 1)
    assert caught.value.error_code == PF_U | PF_P


# ------------------------------------------------------------------------------------------- protected mode


def test_base_is_added_and_limits_hold_for_every_byte(protected: Guest) -> None:
    assert linearize(protected.ctx, DS, 0xFFFC, 4, 0) == 0x1FFFC
    assert fault_of(protected, DS, 0xFFFD, 4) == (GP, 0)


def test_linear_addresses_wrap_at_four_gibibytes(protected: Guest) -> None:
    protected.words[segment_word(DS, BASE)] = 0xFFFFF000
    assert linearize(protected.ctx, DS, 0x2000, 4, 0) == 0x1000


def test_null_segment_is_a_general_protection(protected: Guest) -> None:
    protected.state.set_segment(ES, Segment(0, 0, 0, AR_UNUSABLE))
    assert fault_of(protected, ES, 0) == (GP, 0)


def test_stack_segment_limit_is_a_stack_fault(protected: Guest) -> None:
    protected.state.set_segment(SS, Segment(0x10, 0, 0xFFF, AR_DATA))
    assert fault_of(protected, SS, 0x1000) == (STACK_FAULT, 0)


def test_writes_need_writable_data(protected: Guest) -> None:
    protected.words[segment_word(DS, ATTRIBUTES)] &= ~AR_WRITABLE
    assert fault_of(protected, DS, 0, flags=WRITE) == (GP, 0)
    assert linearize(protected.ctx, DS, 0, 1, 0) == 0x10000
    assert fault_of(protected, CS, 0, flags=WRITE) == (GP, 0)


def test_reads_of_execute_only_code_are_a_general_protection(protected: Guest) -> None:
    protected.words[segment_word(CS, ATTRIBUTES)] = AR_P | AR_S | AR_CODE | AR_DB
    assert fault_of(protected, CS, 0) == (GP, 0)
    assert linearize(protected.ctx, CS, 0, 1, FETCH) == 0


def test_expand_down_segments_begin_behind_their_limit(protected: Guest) -> None:
    attributes = AR_P | AR_S | AR_WRITABLE | AR_EXPAND_DOWN
    protected.state.set_segment(DS, Segment(0x10, 0, 0xFFF, attributes))
    assert fault_of(protected, DS, 0xFFF) == (GP, 0)
    assert linearize(protected.ctx, DS, 0x1000, 4, 0) == 0x1000
    assert fault_of(protected, DS, 0xFFFD, 4) == (GP, 0)
    protected.words[segment_word(DS, ATTRIBUTES)] |= AR_DB
    assert linearize(protected.ctx, DS, 0xFFFD, 4, 0) == 0xFFFD


def test_real_mode_checks_limits_but_not_types(protected: Guest) -> None:
    protected.words[CR0] = 0
    protected.state.set_segment(CS, Segment(0x100, 0x1000, 0xFFFF, AR_REAL_MODE | AR_CODE))
    assert linearize(protected.ctx, CS, 0, 2, WRITE) == 0x1000
    assert fault_of(protected, CS, 0xFFFF, 2) == (GP, 0)


# --------------------------------------------------------------------------------------- compatibility mode


def test_compatibility_mode_kernel_code_violates_lass_on_every_data_access(guest: Guest) -> None:
    guest.words[segment_word(CS, ATTRIBUTES)] = AR_CODE32
    guest.state.set_segment(DS, Segment(0x10, 0, 0xFFFFFFFF, AR_DATA))
    assert fault_of(guest, DS, LOW) == (GP, 0)


def test_compatibility_mode_user_code_is_not_hindered(user: Guest) -> None:
    user.words[segment_word(CS, ATTRIBUTES)] = AR_CODE32 | DPL3
    user.state.set_segment(DS, Segment(0x23, 0, 0xFFFFFFFF, AR_DATA | DPL3))
    assert linearize(user.ctx, DS, LOW, 4, 0) == LOW
    assert user.words[CPL] == 3
