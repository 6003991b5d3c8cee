"""VMLAUNCH and VMRESUME up to the guest state, and INVEPT and INVVPID."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypervisor_guest import DATA, FAIL_INVALID, SUCCEED, Hypervisor
from legacy_modes import DATA_BASE, enter_protected_mode

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.faults import Unhandleable
from lasskvm.state import CR4_ALLOWED, INTERRUPT_SHADOW, RBX, RCX, RIP, TLB_FLUSH
from lasskvm.vmx.instructions import VmxInstructions
from lasskvm.vmx.vmcs import VmFailValid
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import UD
from lasskvm.x86.registers import CR4_LASS
from lasskvm.x86.vmx import VmInstructionError as Error
from lasskvm.x86.vmx_fields import VmcsField as F

INVEPT, INVVPID = "invept rcx, [rbx]", "invvpid rcx, [rbx]"
EPTP = 0x8000 | vmx.VMX_EPTP_AD_ENABLE_BIT | vmx.VMX_EPTP_PWL_4 | vmx.MEMORY_TYPE_WB
SINGLE, GLOBAL = vmx.VMX_EPT_EXTENT_CONTEXT, vmx.VMX_EPT_EXTENT_GLOBAL
ADDRESS, ONE_VPID, ALL_VPIDS, NON_GLOBAL = range(4)
INVALID_OPERAND = Error.INVALID_OPERAND_TO_INVEPT_INVVPID
BOTH = pytest.mark.parametrize("source", ["vmlaunch", "vmresume"])


def ready_to_enter(*, launched: bool = False) -> Hypervisor:
    l1 = Hypervisor().in_operation().prepare_entry()
    l1.vmcs.launched = launched
    return l1


def enter(l1: Hypervisor, source: str) -> list[str]:
    """Execute an entry that passes: what it asked for. RIP is whoever enters the guest's to set."""
    rip = l1.words[RIP]
    l1.step(source)
    assert l1.words[RIP] == rip
    return l1.entries


# --------------------------------------------------------------------------------------------------- VM entries


def test_vmlaunch_of_a_clear_vmcs_enters_the_guest() -> None:
    assert enter(ready_to_enter(), "vmlaunch") == ["launch"]


def test_vmresume_of_a_launched_vmcs_enters_the_guest() -> None:
    assert enter(ready_to_enter(launched=True), "vmresume") == ["resume"]


def test_vmlaunch_needs_a_clear_vmcs_and_vmresume_a_launched_one() -> None:
    assert ready_to_enter(launched=True).vmx("vmlaunch") is Error.VMLAUNCH_NONCLEAR_VMCS
    assert ready_to_enter().vmx("vmresume") is Error.VMRESUME_NONLAUNCHED_VMCS


@BOTH
def test_entry_without_a_current_vmcs_fails(source: str) -> None:
    l1 = Hypervisor().in_operation(current=None)
    l1.words[INTERRUPT_SHADOW] = 1
    assert l1.vmx(source) is FAIL_INVALID


@BOTH
def test_entry_behind_mov_ss_fails_whatever_the_launch_state(source: str) -> None:
    for launched in (False, True):
        l1 = ready_to_enter(launched=launched)
        l1.words[INTERRUPT_SHADOW] = 1
        assert l1.vmx(source) is Error.ENTRY_EVENTS_BLOCKED_BY_MOV_SS
        assert not l1.entries


def test_launch_state_is_checked_before_the_controls() -> None:
    l1 = ready_to_enter(launched=True)
    l1.vmwrite(F.VM_ENTRY_CONTROLS, 0)
    assert l1.vmx("vmlaunch") is Error.VMLAUNCH_NONCLEAR_VMCS


def test_controls_fail_with_7_and_before_the_host_state_with_8() -> None:
    l1 = ready_to_enter()
    l1.vmwrite(F.HOST_TR_SELECTOR, 0)
    assert l1.vmx("vmlaunch") is Error.ENTRY_INVALID_HOST_STATE_FIELD
    l1.vmwrite(F.CPU_BASED_VM_EXEC_CONTROL, 0)
    assert l1.vmx("vmlaunch") is Error.ENTRY_INVALID_CONTROL_FIELD
    assert not l1.entries
    assert not l1.vmcs.launched


@pytest.mark.parametrize("has_lass", [True, False])
def test_host_cr4_with_lass_needs_lass(has_lass: bool) -> None:
    l1 = ready_to_enter()
    l1.vmwrite(F.HOST_CR4, l1.vmcs[F.HOST_CR4] | CR4_LASS)
    if has_lass:
        assert enter(l1, "vmlaunch") == ["launch"]
    else:
        offered = l1.nested.capabilities
        l1.nested.capabilities = replace(
            offered, cr4=offered.cr4._replace(may_be_1=offered.cr4.may_be_1 & ~CR4_LASS)
        )
        assert l1.vmx("vmlaunch") is Error.ENTRY_INVALID_HOST_STATE_FIELD


def test_who_enters_the_guest_may_still_fail_the_instruction() -> None:
    def refuse(ctx: Emulation, launch: bool) -> None:
        raise VmFailValid(Error.ENTRY_INVALID_CONTROL_FIELD)

    l1 = ready_to_enter()
    l1.instructions.enter_guest = refuse
    assert l1.vmx("vmlaunch") is Error.ENTRY_INVALID_CONTROL_FIELD


def test_without_a_way_into_the_guest_an_entry_is_an_internal_error() -> None:
    l1 = ready_to_enter()
    l1.ctx.vmx = VmxInstructions(l1.nested)
    with pytest.raises(Unhandleable, match="VM entries"):
        l1.vmx("vmlaunch")


# ------------------------------------------------------------------------------------------------------- INVEPT


@pytest.mark.parametrize(
    ("kind", "eptp"), [(SINGLE, EPTP), (GLOBAL, EPTP), (GLOBAL, 0), (GLOBAL, (1 << 64) - 1)]
)
def test_invept_forgets_all_translations(kind: int, eptp: int) -> None:
    l1 = Hypervisor().in_operation()
    l1.words[TLB_FLUSH] = 0
    assert l1.with_descriptor(INVEPT, kind, eptp) is SUCCEED
    assert l1.words[TLB_FLUSH] == 1


@pytest.mark.parametrize("kind", [0, 3, 4, 32, 1 << 32 | SINGLE, (1 << 64) - 1])
def test_invept_of_a_type_that_does_not_exist_fails_before_the_descriptor_is_read(kind: int) -> None:
    l1 = Hypervisor().in_operation()
    l1.words[RCX] = kind
    l1.unmap(DATA)
    l1.words[TLB_FLUSH] = 0
    assert l1.vmx(INVEPT) is INVALID_OPERAND
    assert l1.words[TLB_FLUSH] == 0


@pytest.mark.parametrize(
    "eptp", [0, EPTP & ~7 | 1, EPTP & ~vmx.VMX_EPTP_PWL_MASK, EPTP | 1 << 7, EPTP | 1 << 46]
)
def test_invept_of_one_context_needs_an_ept_pointer_that_an_entry_would_take(eptp: int) -> None:
    l1 = Hypervisor().in_operation()
    assert l1.with_descriptor(INVEPT, SINGLE, eptp) is INVALID_OPERAND


def test_invept_does_not_look_at_the_reserved_half_of_its_descriptor() -> None:
    l1 = Hypervisor().in_operation()
    assert l1.with_descriptor(INVEPT, SINGLE, EPTP, (1 << 64) - 1) is SUCCEED


def test_in_32_bit_mode_the_type_is_in_a_32_bit_register() -> None:
    l1 = Hypervisor().in_operation()
    enter_protected_mode(l1, 32)
    l1.words[RBX], l1.words[RCX] = 0x20, 1 << 32 | SINGLE
    l1.memory.store(DATA_BASE + 0x20, 8, EPTP)
    assert l1.vmx("invept ecx, [ebx]") is SUCCEED


def test_invept_and_invvpid_are_undefined_where_they_are_not_offered() -> None:
    l1 = Hypervisor().in_operation()
    offered = l1.nested.capabilities
    l1.nested.capabilities = replace(offered, ept_vpid=offered.ept_vpid & ~vmx.VMX_EPT_INVEPT_BIT)
    assert l1.vmx_fault(INVEPT) == (UD, None)
    assert l1.with_descriptor(INVVPID, ALL_VPIDS, 0) is SUCCEED
    l1.nested.capabilities = replace(offered, secondary=offered.secondary._replace(may_be_1=0))
    assert l1.vmx_fault(INVEPT) == (UD, None)
    assert l1.vmx_fault(INVVPID) == (UD, None)


# ------------------------------------------------------------------------------------------------------ INVVPID


@pytest.mark.parametrize("kind", [ADDRESS, ONE_VPID, ALL_VPIDS, NON_GLOBAL])
def test_invvpid_forgets_all_translations(kind: int) -> None:
    l1 = Hypervisor().in_operation()
    l1.words[TLB_FLUSH] = 0
    assert l1.with_descriptor(INVVPID, kind, 0xFFFF, 0x1000) is SUCCEED
    assert l1.words[TLB_FLUSH] == 1


@pytest.mark.parametrize("kind", [4, 32, 1 << 32, (1 << 64) - 1])
def test_invvpid_of_a_type_that_does_not_exist_fails(kind: int) -> None:
    l1 = Hypervisor().in_operation()
    l1.words[TLB_FLUSH] = 0
    assert l1.with_descriptor(INVVPID, kind, 1) is INVALID_OPERAND
    assert l1.words[TLB_FLUSH] == 0


@pytest.mark.parametrize("kind", [ADDRESS, ONE_VPID, NON_GLOBAL])
def test_invvpid_of_vpid_0_fails_unless_all_are_meant(kind: int) -> None:
    l1 = Hypervisor().in_operation()
    assert l1.with_descriptor(INVVPID, kind, 0) is INVALID_OPERAND
    assert l1.with_descriptor(INVVPID, ALL_VPIDS, 0) is SUCCEED


@pytest.mark.parametrize("kind", [ADDRESS, ONE_VPID, ALL_VPIDS, NON_GLOBAL])
@pytest.mark.parametrize("bit", [16, 31, 32, 63])
def test_reserved_bits_of_an_invvpid_descriptor_must_be_0(kind: int, bit: int) -> None:
    l1 = Hypervisor().in_operation()
    assert l1.with_descriptor(INVVPID, kind, 1 | 1 << bit) is INVALID_OPERAND


def test_address_to_invalidate_must_be_canonical_where_there_is_one() -> None:
    l1 = Hypervisor().in_operation()
    assert l1.with_descriptor(INVVPID, ADDRESS, 1, 1 << 47) is INVALID_OPERAND
    for kind in (ONE_VPID, ALL_VPIDS, NON_GLOBAL):
        assert l1.with_descriptor(INVVPID, kind, 1, 1 << 47) is SUCCEED


def test_address_to_invalidate_has_57_bits_on_processors_that_have_them_whatever_cr4_says() -> None:
    l1 = Hypervisor(features=("vmx", "la57")).in_operation()
    assert l1.words[CR4_ALLOWED] >> 12 & 1
    assert l1.with_descriptor(INVVPID, ADDRESS, 1, 1 << 47) is SUCCEED
    assert l1.with_descriptor(INVVPID, ADDRESS, 1, 1 << 56) is INVALID_OPERAND


def test_tagged_address_is_not_untagged() -> None:
    l1 = Hypervisor().in_operation()
    assert l1.with_descriptor(INVVPID, ADDRESS, 1, 0x2A00_0000_0000_1000) is INVALID_OPERAND
