"""Memory operands of L1's VMX instructions: LASS on both sides of the split, canonical addresses, segments, paging.

Also VMREAD and VMWRITE in their operand sizes.
"""

from __future__ import annotations

import pytest
from emulator_guest import MAPPED, UPPER
from hypervisor_guest import (
    DATA,
    DATA_GPA,
    FAIL_INVALID,
    SUCCEED,
    USER_DATA,
    VMCS_A,
    VMCS_B,
    VMXON_REGION,
    Hypervisor,
)
from legacy_modes import DATA_BASE, enter_protected_mode

from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.mmio import MmioReadNeeded
from lasskvm.state import CR2, CR4, RAX, RBX, RCX, RFLAGS, RSP, Segment
from lasskvm.x86.exceptions import GP, PF, SS
from lasskvm.x86.registers import AR_DATA, AR_WRITABLE, CR4_LASS, CR4_SMAP, DS, RFLAGS_AC
from lasskvm.x86.vmx import VmInstructionError as Error
from lasskvm.x86.vmx_fields import VmcsField as F

#: Each instruction with a memory operand.
READING = [
    "vmxon [{}]",
    "vmclear [{}]",
    "vmptrld [{}]",
    "vmwrite rcx, [{}]",
    "invept rcx, [{}]",
    "invvpid rcx, [{}]",
]
WRITING = ["vmptrst [{}]", "vmread [{}], rcx"]
EVERY = READING + WRITING
ALL_CONTEXTS = 2
LAST_PAGE = 0xFFFF_FFFF_FFFF_F000


def ready_for(source: str, operand: int = DATA) -> Hypervisor:
    """L1 where the instruction would succeed with its operand at *operand*, a linear address."""
    l1 = Hypervisor()
    if not source.startswith("vmxon"):
        l1.in_operation()
    l1.words[RBX], l1.words[RCX] = operand, F.GUEST_RIP
    contents = VMXON_REGION if source.startswith("vmxon") else VMCS_B
    if source.startswith("inv"):
        l1.words[RCX], contents = ALL_CONTEXTS, 0
    l1.memory.store(DATA_GPA, 8, contents)
    return l1


def fault(source: str, operand: int) -> tuple[int, int | None]:
    return ready_for(source, operand).vmx_fault(source.format("rbx"))


# ---------------------------------------------------------------------------------------------------------- LASS


@pytest.mark.parametrize("source", EVERY)
def test_operand_above_the_split_is_the_supervisors(source: str) -> None:
    assert ready_for(source).vmx(source.format("rbx")) is SUCCEED


@pytest.mark.parametrize("source", EVERY)
def test_operand_below_the_split_is_a_lass_violation(source: str) -> None:
    assert fault(source, USER_DATA) == (GP, 0)


@pytest.mark.parametrize("source", EVERY)
def test_violation_comes_before_paging(source: str) -> None:
    l1 = ready_for(source, USER_DATA)
    l1.unmap(USER_DATA)
    assert l1.vmx_fault(source.format("rbx")) == (GP, 0)


@pytest.mark.parametrize("source", EVERY)
def test_violation_through_the_stack_pointer_is_a_stack_fault(source: str) -> None:
    l1 = ready_for(source)
    l1.words[RSP] = USER_DATA
    assert l1.vmx_fault(source.format("rsp + 0")) == (SS, 0)


@pytest.mark.parametrize("source", EVERY)
def test_ac_allows_operands_below_the_split(source: str) -> None:
    l1 = ready_for(source, USER_DATA)
    l1.words[RFLAGS] |= RFLAGS_AC
    assert l1.vmx(source.format("rbx")) is SUCCEED


@pytest.mark.parametrize("source", EVERY)
def test_ac_changes_nothing_above_the_split(source: str) -> None:
    l1 = ready_for(source)
    l1.words[RFLAGS] |= RFLAGS_AC
    assert l1.vmx(source.format("rbx")) is SUCCEED


@pytest.mark.parametrize("source", EVERY)
def test_without_smap_lass_leaves_supervisor_data_accesses_alone(source: str) -> None:
    l1 = ready_for(source, USER_DATA)
    l1.words[CR4] &= ~CR4_SMAP
    assert l1.vmx(source.format("rbx")) is SUCCEED


@pytest.mark.parametrize("source", EVERY)
def test_without_lass_smap_makes_it_a_page_fault(source: str) -> None:
    l1 = ready_for(source, USER_DATA)
    l1.words[CR4] &= ~CR4_LASS
    written = 2 if source in WRITING else 0
    assert l1.vmx_fault(source.format("rbx")) == (PF, 1 | written)


@pytest.mark.parametrize("source", EVERY)
def test_operand_that_wraps_into_the_lower_half_is_a_violation(source: str) -> None:
    assert fault(source, (1 << 64) - 4) == (GP, 0)


@pytest.mark.parametrize("source", ["invept rcx, [{}]", "invvpid rcx, [{}]"])
def test_all_16_bytes_of_a_descriptor_count(source: str) -> None:
    assert fault(source, (1 << 64) - 8) == (GP, 0)


@pytest.mark.parametrize("target", [0, USER_DATA, (1 << 47) - 1, UPPER, (1 << 64) - 1])
def test_address_inside_an_invvpid_descriptor_may_be_on_either_side(target: int) -> None:
    l1 = Hypervisor().in_operation()
    assert l1.with_descriptor("invvpid rcx, [rbx]", 0, 1, target) is SUCCEED


# --------------------------------------------------------------------------------- canonical, segments, paging


@pytest.mark.parametrize("source", EVERY)
def test_operand_that_is_not_canonical_faults(source: str) -> None:
    assert fault(source, 1 << 63) == (GP, 0)
    l1 = ready_for(source)
    l1.words[RSP] = 1 << 63
    assert l1.vmx_fault(source.format("rsp + 0")) == (SS, 0)


@pytest.mark.parametrize("source", READING)
def test_absent_page_is_a_page_fault_of_a_read(source: str) -> None:
    assert fault(source, LAST_PAGE) == (PF, 0)


@pytest.mark.parametrize("source", WRITING)
def test_absent_page_is_a_page_fault_of_a_write(source: str) -> None:
    assert fault(source, LAST_PAGE) == (PF, 2)


def test_page_fault_names_the_page_that_is_missing() -> None:
    l1 = ready_for("vmptrld [{}]", DATA + 0xFFC)
    l1.unmap(DATA + 0x1000)
    with pytest.raises(GuestFault) as caught:
        l1.step("vmptrld [rbx]")
    assert caught.value.cr2 == DATA + 0x1000
    assert l1.words[CR2] == 0


@pytest.mark.parametrize("source", WRITING)
def test_write_protected_operand_is_a_page_fault_and_nothing_is_written(source: str) -> None:
    l1 = ready_for(source)
    l1.write_protect(DATA)
    assert l1.vmx_fault(source.format("rbx")) == (PF, 3)


@pytest.mark.parametrize("source", ["vmclear [ebx]", "vmptrld [ebx]", "vmptrst [ebx]", "vmread [ebx], ecx"])
def test_segment_limit_counts_in_32_bit_mode(source: str) -> None:
    l1 = Hypervisor().in_operation()
    enter_protected_mode(l1, 32)
    l1.words[RCX] = F.GUEST_RIP
    l1.state.set_segment(DS, Segment(8, DATA_BASE, 0xFFF, AR_DATA))
    l1.words[RBX] = 0xFFD
    assert l1.vmx_fault(source) == (GP, 0)


def test_segment_that_is_read_only_cannot_be_written() -> None:
    l1 = Hypervisor().in_operation()
    enter_protected_mode(l1, 32)
    l1.state.set_segment(DS, Segment(8, DATA_BASE, 0xFFFF, AR_DATA & ~AR_WRITABLE))
    l1.words[RBX] = 0
    assert l1.vmx_fault("vmptrst [ebx]") == (GP, 0)


def test_operand_may_be_a_device() -> None:
    l1 = ready_for("vmptrld [{}]")
    entry = l1.page_entry(DATA)
    l1.memory.store(entry, 8, l1.memory.load(entry, 8) & 0xFFF | MAPPED)
    with pytest.raises(MmioReadNeeded) as needed:
        l1.step("vmptrld [rbx]")
    assert (needed.value.gpa, needed.value.size) == (MAPPED, 8)
    l1.ctx.mmio.answer(VMCS_B)
    assert l1.vmx("vmptrld [rbx]") is SUCCEED
    assert l1.nested.current_gpa == VMCS_B


# --------------------------------------------------------------------------------------------- VMREAD and VMWRITE


def test_vmwrite_and_vmread_move_fields_by_registers_and_memory() -> None:
    l1 = Hypervisor().in_operation()
    l1.words[RAX], l1.words[RCX] = 0x1122_3344_5566_7788, F.GUEST_RSP
    assert l1.vmx("vmwrite rcx, rax") is SUCCEED
    assert l1.vmx("vmread [rbx], rcx") is SUCCEED
    assert l1.load(DATA) == 0x1122_3344_5566_7788
    l1.words[RCX] = F.HOST_RSP
    assert l1.vmx("vmwrite rcx, [rbx]") is SUCCEED
    assert l1.vmread(F.HOST_RSP) == 0x1122_3344_5566_7788


def test_vmread_zero_extends_narrow_fields_to_the_operand() -> None:
    l1 = Hypervisor().in_operation()
    l1.vmwrite(F.GUEST_CS_SELECTOR, 0xFFFF_FFFF_FFFF_0010)
    l1.store(DATA, 8, (1 << 64) - 1)
    l1.words[RCX] = F.GUEST_CS_SELECTOR
    assert l1.vmx("vmread [rbx], rcx") is SUCCEED
    assert l1.load(DATA) == 0x10
    assert l1.vmx("vmread rcx, rcx") is SUCCEED
    assert l1.words[RCX] == 0x10


def test_in_32_bit_mode_operands_have_32_bits() -> None:
    l1 = Hypervisor().in_operation()
    l1.vmwrite(F.EPT_POINTER, 0x1111_2222_3333_4444)
    enter_protected_mode(l1, 32)
    words = l1.words
    words[RBX] = 0x10
    l1.memory.store(DATA_BASE + 0x10, 8, (1 << 64) - 1)
    words[RCX] = 0xFFFF_FFFF << 32 | F.EPT_POINTER
    assert l1.vmx("vmread [ebx], ecx") is SUCCEED
    assert l1.memory.load(DATA_BASE + 0x10, 8) == 0xFFFF_FFFF_3333_4444
    assert l1.vmx("vmread eax, ecx") is SUCCEED
    assert words[RAX] == 0x3333_4444
    words[RCX] = F.EPT_POINTER + 1
    assert l1.vmx("vmread eax, ecx") is SUCCEED
    assert words[RAX] == 0x1111_2222
    words[RAX] = 0xFFFF_FFFF_9999_9999
    assert l1.vmx("vmwrite ecx, eax") is SUCCEED
    assert l1.vmcs[F.EPT_POINTER] == 0x9999_9999_3333_4444
    words[RCX] = F.EPT_POINTER
    assert l1.vmx("vmwrite ecx, eax") is SUCCEED
    assert l1.vmcs[F.EPT_POINTER] == 0x9999_9999, "VMWRITE of 32 bits clears the upper half of a 64-bit field"


@pytest.mark.parametrize("encoding", [0x6, F.GUEST_RIP | 1, 1 << 15 | F.GUEST_RIP, 1 << 32 | F.GUEST_RIP])
def test_encoding_that_names_no_field_fails_and_moves_nothing(encoding: int) -> None:
    l1 = Hypervisor().in_operation()
    l1.words[RAX], l1.words[RCX] = 77, encoding
    assert l1.vmx("vmread rax, rcx") is Error.UNSUPPORTED_VMCS_COMPONENT
    assert l1.words[RAX] == 77
    assert l1.vmx("vmwrite rcx, rax") is Error.UNSUPPORTED_VMCS_COMPONENT
    l1.store(DATA, 8, 0x55)
    assert l1.vmx("vmread [rbx], rcx") is Error.UNSUPPORTED_VMCS_COMPONENT
    assert l1.load(DATA) == 0x55


def test_vmread_that_fails_does_not_touch_its_operand_but_vmwrite_does() -> None:
    l1 = Hypervisor().in_operation()
    l1.words[RBX], l1.words[RCX] = LAST_PAGE, 0x6
    assert l1.vmx("vmread [rbx], rcx") is Error.UNSUPPORTED_VMCS_COMPONENT
    assert l1.vmx_fault("vmwrite rcx, [rbx]") == (PF, 0)


@pytest.mark.parametrize(
    "source", ["vmread rax, rcx", "vmread [rbx], rcx", "vmwrite rcx, rax", "vmwrite rcx, [rbx]"]
)
def test_without_a_current_vmcs_they_fail_before_their_operands_are_looked_at(source: str) -> None:
    l1 = Hypervisor().in_operation(current=None)
    l1.words[RBX], l1.words[RCX] = USER_DATA, 0x6
    assert l1.vmx(source) is FAIL_INVALID


def test_vmwrite_writes_exit_information_as_the_capabilities_say() -> None:
    l1 = Hypervisor().in_operation()
    assert l1.nested.capabilities.vmwrite_any_field
    assert l1.vmwrite(F.VM_EXIT_REASON, 33) is SUCCEED
    assert l1.vmread(F.VM_EXIT_REASON) == 33


def test_fields_of_both_vmcss_are_apart() -> None:
    l1 = Hypervisor().in_operation(current=VMCS_A)
    l1.vmwrite(F.HOST_RIP, 1)
    l1.words[RBX] = DATA
    assert l1.with_pointer("vmptrld [rbx]", VMCS_B) is SUCCEED
    assert l1.vmread(F.HOST_RIP) == 0
