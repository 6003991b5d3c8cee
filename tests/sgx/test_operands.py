"""Operands of leaf functions: who is asked about an address, in which order, and with which size."""

from __future__ import annotations

import pytest
from emulator_guest import KERNEL_CS32, MAPPED, UPPER
from sgx_guest import (
    EPC,
    EPC_GPA,
    GENERAL_PROTECTION,
    NON_CANONICAL,
    SOURCE,
    UNMAPPED,
    USER_EPC,
    SgxGuest,
    epc_fault,
)

from lasskvm.emulator.faults import GuestFault
from lasskvm.sgx.operands import EpcOperand, MemoryOperand, UpdatedOperand, require_aligned
from lasskvm.state import CR3, CR4, Segment
from lasskvm.x86.exceptions import GP, PF, PF_P, PF_W
from lasskvm.x86.paging import PTE_W
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_DATA,
    AR_EXPAND_DOWN,
    AR_UNUSABLE,
    AR_WRITABLE,
    CR3_LAM_U48,
    CR4_LASS,
    CR4_SMAP,
    CS,
    DS,
    MASK64,
)

PAGE = 4096
#: A page of the guest's own memory: as the kernel has it mapped, and as a user page.
KERNEL_PAGE, USER_PAGE = SOURCE, SOURCE - UPPER
LAST_KERNEL_BYTES = MASK64 + 1 - PAGE


def access(operand: MemoryOperand, guest: SgxGuest) -> None:
    """The access that a leaf function makes first."""
    if isinstance(operand, EpcOperand):
        operand.resolve(guest.epc)
    elif isinstance(operand, UpdatedOperand):
        operand.prepare()
    else:
        operand.load()


def fault_of(operand: MemoryOperand, guest: SgxGuest) -> tuple[int, int | None, int | None]:
    with pytest.raises(GuestFault) as caught:
        access(operand, guest)
    return caught.value.vector, caught.value.error_code, caught.value.cr2


def enter_32bit_code(guest: SgxGuest, data: Segment) -> None:
    """Compatibility mode, with *data* in DS."""
    guest.state.set_segment(CS, Segment(KERNEL_CS32, 0, 0xFFFFFFFF, AR_CODE32))
    guest.state.set_segment(DS, data)


def test_a_kernel_address_is_loaded_from(guest: SgxGuest) -> None:
    guest.write(KERNEL_PAGE, b"SECINFO!" * 8)
    assert MemoryOperand(guest.ctx, KERNEL_PAGE, 64).load() == b"SECINFO!" * 8


@pytest.mark.parametrize("alignment", (8, 32, 64, 128, 256, 512, PAGE))
def test_an_address_that_is_not_a_multiple_of_the_alignment_is_gp(guest: SgxGuest, alignment: int) -> None:
    require_aligned(MemoryOperand(guest.ctx, KERNEL_PAGE, alignment))
    for offset in (1, alignment // 2, alignment - 1):
        with pytest.raises(GuestFault) as caught:
            require_aligned(MemoryOperand(guest.ctx, KERNEL_PAGE + offset, alignment))
        assert (caught.value.vector, caught.value.error_code) == (GP, 0)


def test_alignment_can_be_more_than_the_size(guest: SgxGuest) -> None:
    require_aligned(MemoryOperand(guest.ctx, KERNEL_PAGE, 1808, PAGE))
    with pytest.raises(GuestFault):
        require_aligned(MemoryOperand(guest.ctx, KERNEL_PAGE + 2048, 1808, PAGE))


@pytest.mark.parametrize("kind", (MemoryOperand, UpdatedOperand, EpcOperand))
def test_an_address_that_is_not_canonical_is_gp(guest: SgxGuest, kind: type[MemoryOperand]) -> None:
    assert fault_of(kind(guest.ctx, NON_CANONICAL, PAGE), guest) == GENERAL_PROTECTION


@pytest.mark.parametrize("kind", (MemoryOperand, UpdatedOperand, EpcOperand))
@pytest.mark.parametrize("address", (USER_PAGE, USER_EPC))
def test_with_lass_a_kernel_does_not_reach_the_user_half_without_ac(
    guest: SgxGuest, kind: type[MemoryOperand], address: int
) -> None:
    assert fault_of(kind(guest.ctx, address, PAGE), guest) == GENERAL_PROTECTION


def test_with_lass_a_kernel_reaches_the_user_half_with_ac(guest: SgxGuest) -> None:
    guest.set_ac(True)
    guest.write(USER_PAGE, b"user")
    assert MemoryOperand(guest.ctx, USER_PAGE, 4).load() == b"user"
    assert EpcOperand(guest.ctx, USER_EPC + PAGE).resolve(guest.epc).gpa == EPC_GPA + PAGE


def test_lass_without_smap_leaves_data_accesses_alone(guest: SgxGuest) -> None:
    guest.words[CR4] &= ~CR4_SMAP
    guest.write(USER_PAGE, b"user")
    assert MemoryOperand(guest.ctx, USER_PAGE, 4).load() == b"user"


def test_smap_alone_is_a_page_fault(guest: SgxGuest) -> None:
    guest.words[CR4] &= ~CR4_LASS
    assert fault_of(MemoryOperand(guest.ctx, USER_PAGE, 64), guest) == (PF, PF_P, USER_PAGE)
    assert fault_of(UpdatedOperand(guest.ctx, USER_PAGE, 64), guest) == (PF, PF_P | PF_W, USER_PAGE)
    assert fault_of(EpcOperand(guest.ctx, USER_EPC), guest) == (PF, PF_P | PF_W, USER_EPC)
    guest.set_ac(True)
    assert len(MemoryOperand(guest.ctx, USER_PAGE, 64).load()) == 64


@pytest.mark.parametrize("kind, error_code", ((MemoryOperand, 0), (UpdatedOperand, PF_W), (EpcOperand, PF_W)))
def test_an_unmapped_address_is_an_ordinary_page_fault(
    guest: SgxGuest, kind: type[MemoryOperand], error_code: int
) -> None:
    assert fault_of(kind(guest.ctx, UNMAPPED, PAGE), guest) == (PF, error_code, UNMAPPED)


def test_a_read_only_page_can_be_read_but_not_updated(guest: SgxGuest) -> None:
    guest.write_protect(KERNEL_PAGE)
    guest.write_protect(EPC)
    assert MemoryOperand(guest.ctx, KERNEL_PAGE, 32).load() == guest.read(KERNEL_PAGE, 32)
    assert EpcOperand(guest.ctx, EPC, 256, is_written=False).resolve(guest.epc).gpa == EPC_GPA
    assert fault_of(UpdatedOperand(guest.ctx, KERNEL_PAGE, 32), guest) == (PF, PF_P | PF_W, KERNEL_PAGE)
    assert fault_of(EpcOperand(guest.ctx, EPC), guest) == (PF, PF_P | PF_W, EPC)


def test_every_byte_of_the_operand_counts_for_lass(guest: SgxGuest) -> None:
    """The last page of all addresses is the kernel's with all its bytes."""
    operand = MemoryOperand(guest.ctx, LAST_KERNEL_BYTES, PAGE)
    assert fault_of(operand, guest) == (PF, 0, LAST_KERNEL_BYTES)


def test_lam_takes_metadata_off_before_paging(guest: SgxGuest) -> None:
    guest.words[CR3] |= CR3_LAM_U48
    guest.set_ac(True)
    tagged = USER_PAGE | 0x5A << 48
    guest.write(USER_PAGE, b"masked")
    assert MemoryOperand(guest.ctx, tagged, 6).load() == b"masked"
    guest.unmap(USER_PAGE)
    assert fault_of(MemoryOperand(guest.ctx, tagged, 8), guest) == (PF, 0, USER_PAGE)
    assert fault_of(EpcOperand(guest.ctx, 0x80000 | 0x5A << 48), guest) == epc_fault(0x80000)


# --------------------------------------------------------------------------------------------------------- the EPC


def test_an_operand_in_the_epc_is_known_by_its_physical_address(guest: SgxGuest) -> None:
    operand = EpcOperand(guest.ctx, EPC + 3 * PAGE + 0x208, 8).resolve(guest.epc)
    assert (operand.gpa, operand.page) == (EPC_GPA + 3 * PAGE + 0x208, EPC_GPA + 3 * PAGE)


def test_memory_that_is_not_epc_is_a_page_fault_with_the_sgx_bit(guest: SgxGuest) -> None:
    assert fault_of(EpcOperand(guest.ctx, KERNEL_PAGE), guest) == epc_fault(KERNEL_PAGE)
    reading = EpcOperand(guest.ctx, KERNEL_PAGE, 256, is_written=False)
    assert fault_of(reading, guest) == epc_fault(KERNEL_PAGE, is_write=False)


def test_the_page_behind_the_epc_is_not_in_it(guest: SgxGuest) -> None:
    last = EPC_GPA + guest.epc.size - PAGE
    guest.map(KERNEL_PAGE, last, PTE_W)
    assert EpcOperand(guest.ctx, KERNEL_PAGE).resolve(guest.epc).page == last
    guest.map(KERNEL_PAGE, last + PAGE, PTE_W)
    assert fault_of(EpcOperand(guest.ctx, KERNEL_PAGE), guest) == epc_fault(KERNEL_PAGE)


def test_the_epc_reads_all_ones_for_operands_that_need_not_be_in_it(guest: SgxGuest) -> None:
    guest.version_array(0)
    assert MemoryOperand(guest.ctx, EPC, 64).load() == b"\xff" * 64
    operand = UpdatedOperand(guest.ctx, EPC, 64)
    operand.prepare()
    operand.store(b"nothing ")
    assert guest.epc.read(EPC_GPA, 64) == bytes(64)


def test_an_updated_operand_writes_a_part(guest: SgxGuest) -> None:
    guest.write(KERNEL_PAGE, bytes(32))
    operand = UpdatedOperand(guest.ctx, KERNEL_PAGE, 32)
    operand.prepare()
    operand.store(b"\x11" * 8, 16)
    assert operand.load() == guest.read(KERNEL_PAGE, 32) == bytes(16) + b"\x11" * 8 + bytes(8)


# -------------------------------------------------------------------------------------------- outside 64-bit mode

FLAT = Segment(0, 0, 0xFFFFFFFF, AR_DATA)


@pytest.fixture
def compatibility(guest: SgxGuest) -> SgxGuest:
    """32-bit code, that LASS lets access user pages."""
    enter_32bit_code(guest, FLAT)
    guest.set_ac(True)
    return guest


def test_outside_64_bit_mode_offsets_have_32_bits(compatibility: SgxGuest) -> None:
    guest = compatibility
    guest.write(USER_PAGE, b"low half")
    assert MemoryOperand(guest.ctx, 0xDEAD << 32 | USER_PAGE, 8).load() == b"low half"


def test_outside_64_bit_mode_the_base_of_ds_counts(compatibility: SgxGuest) -> None:
    guest = compatibility
    guest.state.set_segment(DS, Segment(0, USER_PAGE - 0x40, 0xFFFFFFFF, AR_DATA))
    guest.write(USER_PAGE, b"based")
    assert MemoryOperand(guest.ctx, 0x40, 5).load() == b"based"


def test_alignment_is_that_of_the_linear_address(compatibility: SgxGuest) -> None:
    guest = compatibility
    guest.state.set_segment(DS, Segment(0, 0x10, 0xFFFFFFFF, AR_DATA))
    require_aligned(MemoryOperand(guest.ctx, USER_PAGE - 0x10, 64))
    with pytest.raises(GuestFault):
        require_aligned(MemoryOperand(guest.ctx, USER_PAGE, 64))


def test_the_limit_of_ds_counts_every_byte_of_the_operand(compatibility: SgxGuest) -> None:
    guest = compatibility
    guest.state.set_segment(DS, Segment(0, 0, USER_PAGE + 63, AR_DATA))
    assert len(MemoryOperand(guest.ctx, USER_PAGE, 64).load()) == 64
    assert fault_of(MemoryOperand(guest.ctx, USER_PAGE, 128), guest) == GENERAL_PROTECTION
    assert fault_of(EpcOperand(guest.ctx, USER_EPC), guest) == GENERAL_PROTECTION


@pytest.mark.parametrize(
    "attributes", (AR_UNUSABLE, AR_DATA | AR_EXPAND_DOWN), ids=("no segment", "expand-down with a full limit")
)
def test_a_ds_that_does_not_reach_the_operand_is_gp(compatibility: SgxGuest, attributes: int) -> None:
    guest = compatibility
    guest.state.set_segment(DS, Segment(0, 0, 0xFFFFFFFF, attributes))
    assert fault_of(MemoryOperand(guest.ctx, USER_PAGE, 64), guest) == GENERAL_PROTECTION


def test_a_read_only_ds_can_be_read_but_not_updated(compatibility: SgxGuest) -> None:
    guest = compatibility
    guest.state.set_segment(DS, Segment(0, 0, 0xFFFFFFFF, AR_DATA & ~AR_WRITABLE))
    assert len(MemoryOperand(guest.ctx, USER_PAGE, 64).load()) == 64
    assert fault_of(UpdatedOperand(guest.ctx, USER_PAGE, 64), guest) == GENERAL_PROTECTION
    assert fault_of(EpcOperand(guest.ctx, USER_EPC), guest) == GENERAL_PROTECTION


def test_lass_applies_in_compatibility_mode(compatibility: SgxGuest) -> None:
    guest = compatibility
    guest.set_ac(False)
    assert fault_of(MemoryOperand(guest.ctx, USER_PAGE, 64), guest) == GENERAL_PROTECTION


def test_the_tests_pages_are_in_the_guests_memory() -> None:
    assert USER_PAGE + PAGE <= MAPPED
