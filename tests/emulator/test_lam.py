"""Linear-address masking: the rule itself, the emulator's accesses, and the control registers that switch it."""

from __future__ import annotations

import pytest
from emulator_guest import CODE, DELIVERED, KERNEL_STACK, PML4, UPPER, Guest
from hypothesis import given
from hypothesis import strategies as st

from lasskvm.emulator import control
from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.mmu import check_linear, locate, translate, untagged
from lasskvm.lass import BRANCH, DT_LOAD, FETCH, IMPLICIT, INVLPG, MSR, STACK, WRITE
from lasskvm.state import CR0, CR3, CR4, CR4_ALLOWED, EFER, RAX, RBX, RFLAGS, RSP, TLB_FLUSH
from lasskvm.x86.address import is_canonical, untag
from lasskvm.x86.exceptions import GP, PF, PF_W, SS
from lasskvm.x86.registers import (
    CR0_PG,
    CR3_LAM_U48,
    CR3_LAM_U57,
    CR4_LA57,
    CR4_LAM_SUP,
    CR4_LASS,
    CR4_PCIDE,
    EFER_LMA,
    RFLAGS_AC,
)

#: A page of the guest's, below the split and above it.
LOW, HIGH = 0x70000, UPPER + 0x70000
METADATA48, METADATA57 = 0x7FFF << 48, 0x7E << 56
TAG = 0x2A5A << 48

ADDRESSES = st.integers(0, (1 << 64) - 1)
CR3_BITS = st.sampled_from((0, CR3_LAM_U48, CR3_LAM_U57, CR3_LAM_U48 | CR3_LAM_U57))
CR4_BITS = st.sampled_from((0, CR4_LAM_SUP, CR4_LA57, CR4_LAM_SUP | CR4_LA57))
ACCESSES = st.sampled_from((0, WRITE, STACK, STACK | WRITE))
NO_ACCESSES = (FETCH, IMPLICIT, IMPLICIT | WRITE, INVLPG, MSR, DT_LOAD, BRANCH)


def width(address: int, cr3: int, cr4: int) -> int:
    """How many bits of *address* count: 48, 57, or 64 without LAM; by the tables of the manual."""
    if address >> 63:
        return (57 if cr4 & CR4_LA57 else 48) if cr4 & CR4_LAM_SUP else 64
    return 57 if cr3 & CR3_LAM_U57 else 48 if cr3 & CR3_LAM_U48 else 64


def masked(address: int, cr3: int, cr4: int) -> int:
    """The address after masking, put together from its bits as text."""
    bits = f"{address:064b}"
    kept = width(address, cr3, cr4)
    if kept == 64:
        return address
    low = bits[-kept:]
    return int(bits[0] + low[0] * (63 - kept) + low, 2)


def tagged(address: int) -> int:
    return address & ~METADATA48 | TAG


@pytest.fixture
def masking(guest: Guest) -> Guest:
    """A guest at CPL 0 with LAM_U48 and LAM_SUP on, LASS on."""
    guest.words[CR4_ALLOWED] |= CR4_LAM_SUP
    guest.words[CR4] |= CR4_LAM_SUP
    guest.words[CR3] |= CR3_LAM_U48
    return guest


# ----------------------------------------------------------------------------------------------------- the rule


@given(ADDRESSES, ACCESSES, CR3_BITS, CR4_BITS)
def test_masking_extends_bit_47_or_56_and_keeps_bit_63(address: int, flags: int, cr3: int, cr4: int) -> None:
    assert untag(address, flags, cr3, cr4) == masked(address, cr3, cr4)


@given(ADDRESSES, st.sampled_from(NO_ACCESSES), CR3_BITS, CR4_BITS)
def test_code_implicit_accesses_and_named_addresses_are_not_masked(
    address: int, flags: int, cr3: int, cr4: int
) -> None:
    assert untag(address, flags, cr3, cr4) == address


@given(st.integers(0, (1 << 32) - 1), ACCESSES, CR3_BITS, CR4_BITS)
def test_an_address_of_32_bits_has_nothing_to_mask(address: int, flags: int, cr3: int, cr4: int) -> None:
    assert untag(address, flags, cr3, cr4) == address


@given(ADDRESSES, ACCESSES, CR3_BITS, CR4_BITS)
def test_masking_twice_is_masking_once(address: int, flags: int, cr3: int, cr4: int) -> None:
    once = untag(address, flags, cr3, cr4)
    assert untag(once, flags, cr3, cr4) == once


@given(ADDRESSES, CR3_BITS, st.sampled_from((0, CR4_LAM_SUP)))
def test_with_4_level_paging_canonical_addresses_are_never_changed(address: int, cr3: int, cr4: int) -> None:
    canonical = address & (1 << 47) - 1 | (0xFFFF_8000_0000_0000 if address >> 63 else 0)
    assert untag(canonical, 0, cr3, cr4) == canonical


@given(ADDRESSES)
def test_lam48_leaves_one_condition_of_the_canonical_rule(address: int) -> None:
    """Bit 47 equals bit 63."""
    result = untag(address, 0, CR3_LAM_U48, CR4_LAM_SUP)
    assert is_canonical(result, 48) == (address >> 47 & 1 == address >> 63)


def test_lam57_under_4_level_paging_leaves_ten_bits_to_be_equal() -> None:
    for bit in range(64):
        address = LOW | 1 << bit
        result = untag(address, 0, CR3_LAM_U57, 0)
        assert is_canonical(result, 48) == (bit not in (63, *range(47, 57))), bit


# -------------------------------------------------------------------------------------------- order of the checks


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize(
    "address", [tagged(LOW), tagged(HIGH), tagged(HIGH) ^ 1 << 47, tagged(LOW) ^ 1 << 47]
)
@pytest.mark.parametrize("flags", [0, STACK])
def test_canonical_comes_behind_masking_and_lass_behind_both(
    masking: Guest, address: int, cpl: int, flags: int
) -> None:
    wrong_half = address >> 63 == (cpl == 3)
    canonical = address >> 47 & 1 == address >> 63
    fault = SS if flags else GP
    assert check_linear(masking.words, address, 8, flags, cpl, 0) == (
        0 if canonical and not wrong_half else fault
    )
    masking.words[CR4] &= ~CR4_LASS
    assert check_linear(masking.words, address, 8, flags, cpl, 0) == (0 if canonical else fault)


def test_every_byte_of_an_access_is_masked_by_itself(masking: Guest) -> None:
    """Beyond the last byte of a half, the next tag begins: that is not canonical."""
    top = tagged((1 << 64) - 4)
    assert check_linear(masking.words, top, 4, 0, 0, RFLAGS_AC) == 0
    assert check_linear(masking.words, top, 8, 0, 0, RFLAGS_AC) == GP
    low_top = tagged((1 << 47) - 4)
    assert check_linear(masking.words, low_top, 4, 0, 3, 0) == 0
    assert check_linear(masking.words, low_top, 8, 0, 3, 0) == GP


def test_the_page_walk_sees_no_metadata(masking: Guest) -> None:
    gpa, permissions, vector, _ = translate(masking.words, masking.memory, tagged(HIGH) + 5, 1, 0, 0, 0)
    assert (gpa, vector) == (0x70005, 0)
    assert permissions
    assert untagged(masking.words, tagged(HIGH), FETCH) == tagged(HIGH)


def test_faults_are_reported_without_metadata_in_either_page(masking: Guest) -> None:
    for unmapped in (HIGH, HIGH + 0x1000):
        masking.unmap(unmapped)
        *_, vector, _, address = locate(
            masking.words, masking.memory, tagged(HIGH) + 0xFFC, 8, WRITE, 0, masking.words[RFLAGS]
        )
        assert (vector, address) == (PF, HIGH + 0xFFC if unmapped == HIGH else HIGH + 0x1000)
        masking.memory.store(
            masking.page_entry(unmapped), 8, masking.memory.load(masking.page_entry(LOW), 8) & ~4
        )


# ------------------------------------------------------------------------------------------------- instructions


def test_an_instruction_stores_through_a_tagged_pointer(masking: Guest) -> None:
    masking.words[RAX], masking.words[RBX] = 0x1234, tagged(HIGH) + 0xFFE
    masking.run("48 89 03")  # mov [rbx], rax
    assert masking.load(HIGH + 0xFFE) == 0x1234
    assert masking.words[RBX] == tagged(HIGH) + 0xFFE


def test_a_push_keeps_the_metadata_of_the_stack_pointer(masking: Guest) -> None:
    masking.words[RAX], masking.words[RSP] = 0x77, tagged(KERNEL_STACK)
    masking.run("50")  # push rax
    assert masking.words[RSP] == tagged(KERNEL_STACK) - 8
    assert masking.load(KERNEL_STACK - 8) == 0x77


def test_the_fault_of_a_tagged_store_has_its_address_without_metadata(masking: Guest) -> None:
    masking.unmap(HIGH)
    masking.words[RBX] = tagged(HIGH) + 8
    masking.write_code(bytes.fromhex("488903"))
    with pytest.raises(GuestFault) as caught:
        masking.run("48 89 03")
    assert (caught.value.vector, caught.value.error_code, caught.value.cr2) == (PF, PF_W, HIGH + 8)


def test_a_tagged_jump_target_is_refused(masking: Guest) -> None:
    masking.words[RAX] = tagged(CODE)
    assert masking.fault_of("ff e0") == (GP, 0)  # jmp rax


def test_an_exception_is_pushed_through_a_tagged_stack_pointer(masking: Guest) -> None:
    masking.words[RSP] = tagged(KERNEL_STACK)
    assert masking.deliver64(GP, error_code=5) == DELIVERED
    assert masking.words[RSP] == (tagged(KERNEL_STACK) & ~0xF) - 48
    assert masking.load((KERNEL_STACK & ~0xF) - 48) == 5


def test_a_page_fault_on_a_tagged_stack_is_reported_without_metadata(masking: Guest) -> None:
    masking.words[RSP] = tagged(KERNEL_STACK)
    masking.unmap((KERNEL_STACK & ~0xF) - 8)
    assert masking.deliver64(GP, error_code=5) == (PF, PF_W, (KERNEL_STACK & ~0xF) - 8)


# -------------------------------------------------------------------------------------------- control registers


@pytest.mark.parametrize("bits", [CR3_LAM_U48, CR3_LAM_U57, CR3_LAM_U48 | CR3_LAM_U57])
def test_cr3_takes_lam_bits_where_the_processor_has_lam(guest: Guest, bits: int) -> None:
    guest.words[CR4_ALLOWED] &= ~CR4_LAM_SUP
    assert control.set_cr3(guest.words, guest.memory, PML4 | bits) == GP
    assert (guest.words[CR3], guest.words[TLB_FLUSH]) == (PML4, 0)
    guest.words[CR4_ALLOWED] |= CR4_LAM_SUP
    assert control.set_cr3(guest.words, guest.memory, PML4 | bits) == 0
    assert (guest.words[CR3], guest.words[TLB_FLUSH]) == (PML4 | bits, 1)


def test_the_other_upper_bits_of_cr3_stay_reserved(guest: Guest) -> None:
    guest.words[CR4_ALLOWED] |= CR4_LAM_SUP
    for bit in (46, 52, 60, 63):
        assert control.set_cr3(guest.words, guest.memory, PML4 | CR3_LAM_U48 | 1 << bit) == GP


def test_lam_bits_and_the_no_flush_bit_go_together(guest: Guest) -> None:
    guest.words[CR4_ALLOWED] |= CR4_LAM_SUP
    guest.words[CR4] |= CR4_PCIDE
    assert control.set_cr3(guest.words, guest.memory, PML4 | CR3_LAM_U57 | 1 << 63) == 0
    assert guest.words[CR3] == PML4 | CR3_LAM_U57


def test_outside_ia32e_mode_the_upper_half_of_cr3_is_not_written(guest: Guest) -> None:
    guest.words[CR4_ALLOWED] |= CR4_LAM_SUP
    guest.words[EFER] &= ~EFER_LMA
    guest.words[CR0] &= ~CR0_PG
    assert control.set_cr3(guest.words, guest.memory, PML4 | CR3_LAM_U48) == 0
    assert guest.words[CR3] == PML4


def test_lam_sup_is_reserved_without_lam_and_forgets_translations_with_it(guest: Guest) -> None:
    guest.words[CR4_ALLOWED] &= ~CR4_LAM_SUP
    with pytest.raises(GuestFault) as caught:
        control.set_cr4(guest.words, guest.memory, guest.words[CR4] | CR4_LAM_SUP)
    assert (caught.value.vector, caught.value.error_code, guest.words[TLB_FLUSH]) == (GP, 0, 0)
    guest.words[CR4_ALLOWED] |= CR4_LAM_SUP
    control.set_cr4(guest.words, guest.memory, guest.words[CR4] | CR4_LAM_SUP)
    assert guest.words[CR4] & CR4_LAM_SUP
    assert guest.words[TLB_FLUSH] == 1
