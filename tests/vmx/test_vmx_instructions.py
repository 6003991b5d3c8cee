"""VMX instructions of L1: where they are not recognized or not permitted, VMX operation, and VMCS pointers."""

from __future__ import annotations

import pytest
from emulator_guest import MAPPED
from hypervisor_guest import (
    DATA,
    FAIL_INVALID,
    NO_POINTER,
    OTHER_REVISION,
    SUCCEED,
    VMCS_A,
    VMCS_B,
    VMXON_REGION,
    Hypervisor,
)
from legacy_modes import (
    DATA_BASE,
    enter_compatibility_mode,
    enter_protected_mode,
    enter_real_mode,
    enter_virtual_8086_mode,
)

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.faults import GuestFault, Unhandleable
from lasskvm.emulator.msrs import read_msr
from lasskvm.state import CPL, CR0, CR3, CR4, MAXPHYADDR, RBX, RCX, RFLAGS, RIP
from lasskvm.vmx.vmcs import VMCS12_REVISION, Vmcs12
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.exceptions import DB, GP, UD
from lasskvm.x86.msr import MSR_IA32_FEATURE_CONTROL
from lasskvm.x86.paging import PTE_P, PTE_PS, PTE_W
from lasskvm.x86.registers import (
    CR0_NE,
    CR0_PG,
    CR4_PSE,
    CR4_VMXE,
    RFLAGS_CF,
    RFLAGS_TF,
)
from lasskvm.x86.vmx import VmInstructionError as Error
from lasskvm.x86.vmx_fields import VmcsField as F

OUTSIDE = ["vmxon [{b}]"]
INSIDE = [
    "vmxoff", "vmclear [{b}]", "vmptrld [{b}]", "vmptrst [{b}]", "vmlaunch", "vmresume",
    "vmread {a}, {c}", "vmread [{b}], {c}", "vmwrite {c}, {a}", "vmwrite {c}, [{b}]",
    "invept {c}, [{b}]", "invvpid {c}, [{b}]",
]  # fmt: skip
ALL = OUTSIDE + INSIDE
REGISTERS_64 = {"a": "rax", "b": "rbx", "c": "rcx"}
REGISTERS_32 = {"a": "eax", "b": "ebx", "c": "ecx"}


def in_64_bits(source: str) -> str:
    return source.format(**REGISTERS_64)


def ready_for(source: str) -> Hypervisor:
    """L1 where the instruction would not be #UD: VMXON outside VMX operation, the others in it."""
    return Hypervisor() if source in OUTSIDE else Hypervisor().in_operation()


# ------------------------------------------------------------------------------------------- not recognized: #UD


@pytest.mark.parametrize("source", ALL)
def test_without_vmx_in_cpuid_they_are_undefined(source: str) -> None:
    l1 = ready_for(source)
    l1.ctx.cpuid = CpuidTable(parse_cpu("max,-vmx").entries())
    assert l1.vmx_fault(in_64_bits(source)) == (UD, None)


@pytest.mark.parametrize("source", ALL)
def test_without_somebody_who_virtualizes_vmx_they_are_undefined(source: str) -> None:
    l1 = ready_for(source)
    l1.ctx.vmx = None
    assert l1.vmx_fault(in_64_bits(source)) == (UD, None)


@pytest.mark.parametrize("source", INSIDE)
@pytest.mark.parametrize("cpl", [0, 3])
def test_outside_vmx_operation_they_are_undefined_at_any_privilege(source: str, cpl: int) -> None:
    l1 = Hypervisor()
    if cpl:
        l1.enter_user()
    assert l1.vmx_fault(in_64_bits(source)) == (UD, None)


@pytest.mark.parametrize("cpl", [0, 3])
def test_vmxon_needs_cr4_vmxe_before_it_needs_privilege(cpl: int) -> None:
    l1 = Hypervisor()
    if cpl:
        l1.enter_user()
    l1.words[CR4] &= ~CR4_VMXE
    assert l1.vmx_fault("vmxon [rbx]") == (UD, None)


@pytest.mark.parametrize("source", ALL)
def test_compatibility_mode_does_not_know_them(source: str) -> None:
    l1 = ready_for(source)
    enter_compatibility_mode(l1)
    assert l1.vmx_fault(source.format(**REGISTERS_32)) == (UD, None)


@pytest.mark.parametrize("source", ALL)
@pytest.mark.parametrize("mode", ["real", "virtual-8086"])
def test_real_and_virtual_8086_mode_do_not_know_them(source: str, mode: str) -> None:
    l1 = ready_for(source)
    if mode == "real":
        enter_real_mode(l1)
    else:
        enter_virtual_8086_mode(l1, iopl=3)
    l1.words[CR4] |= CR4_VMXE
    l1.words[RBX] = 0
    assert l1.vmx_fault(source.format(**REGISTERS_32)) == (UD, None)


def test_vmfunc_is_undefined_in_vmx_operation_too() -> None:
    assert Hypervisor().vmx_fault("vmfunc") == (UD, None)
    assert Hypervisor().in_operation().vmx_fault("vmfunc") == (UD, None)


def test_vmcall_in_vmx_root_operation_is_a_hypercall() -> None:
    l1 = Hypervisor().in_operation()
    called: list[Emulation] = []
    l1.ctx.hypercall = called.append
    l1.step("vmcall")
    assert called == [l1.ctx]
    assert l1.vmcs[F.VM_INSTRUCTION_ERROR] == 0


# --------------------------------------------------------------------------------------------- not permitted: #GP


@pytest.mark.parametrize("source", ALL)
def test_users_get_a_general_protection_fault_and_no_access_is_made(source: str) -> None:
    l1 = ready_for(source)
    l1.enter_user()
    l1.unmap(DATA)
    assert l1.vmx_fault(in_64_bits(source)) == (GP, 0)


@pytest.mark.parametrize("cpl", [1, 2])
def test_rings_1_and_2_are_not_privileged_enough(cpl: int) -> None:
    l1 = Hypervisor().in_operation()
    l1.words[CPL] = cpl
    assert l1.vmx_fault("vmptrst [rbx]") == (GP, 0)


def test_vmxon_needs_the_fixed_bits_of_cr0() -> None:
    l1 = Hypervisor()
    l1.words[CR0] &= ~CR0_NE
    assert l1.vmx_fault("vmxon [rbx]") == (GP, 0)


def test_vmxon_needs_paging() -> None:
    l1 = Hypervisor()
    enter_protected_mode(l1, 32)
    l1.words[CR0] |= CR0_NE
    l1.words[CR4] = CR4_VMXE
    l1.words[RBX] = 0
    assert l1.vmx_fault("vmxon [ebx]") == (GP, 0)


def test_vmxon_takes_any_cr4_that_cpuid_allows_and_no_other() -> None:
    l1 = Hypervisor()
    l1.words[CR4] |= 1 << 40
    assert l1.vmx_fault("vmxon [rbx]") == (GP, 0)
    l1.words[CR4] &= ~(1 << 40)
    assert l1.with_pointer("vmxon [rbx]", VMXON_REGION) is SUCCEED


@pytest.mark.parametrize("value", [0, 1, 4, 1 | 2])
def test_vmxon_needs_firmware_to_have_locked_feature_control_with_vmx_on(value: int) -> None:
    l1 = Hypervisor()
    l1.set_feature_control(value)
    assert l1.vmx_fault("vmxon [rbx]") == (GP, 0)
    assert read_msr(l1.ctx, MSR_IA32_FEATURE_CONTROL) == value


# ------------------------------------------------------------------------------------------------- VMX operation


def test_vmxon_enters_vmx_operation_without_a_current_vmcs() -> None:
    l1 = Hypervisor()
    assert l1.with_pointer("vmxon [rbx]", VMXON_REGION) is SUCCEED
    assert l1.nested.in_vmx_operation
    assert l1.nested.vmxon_gpa == VMXON_REGION
    assert l1.vmx("vmptrst [rbx]") is SUCCEED
    assert l1.load(DATA) == NO_POINTER


def test_vmxon_with_lass_on_works_where_cpuid_has_lass() -> None:
    l1 = Hypervisor()
    assert l1.words[CR4] >> 27 & 1
    assert l1.with_pointer("vmxon [rbx]", VMXON_REGION) is SUCCEED


@pytest.mark.parametrize(
    "pointer",
    [VMXON_REGION + 8, VMXON_REGION + 0x800, 1 << 46, 1 << 63 | VMXON_REGION, OTHER_REVISION, MAPPED],
    ids=["misaligned", "in a page", "MAXPHYADDR", "bit 63", "revision", "no memory"],
)
def test_vmxon_fails_without_an_error_number_for_a_bad_region(pointer: int) -> None:
    l1 = Hypervisor()
    assert l1.with_pointer("vmxon [rbx]", pointer) is FAIL_INVALID
    assert not l1.nested.in_vmx_operation


def test_vmxon_fails_for_a_region_marked_as_shadow_vmcs() -> None:
    l1 = Hypervisor()
    l1.memory.store(VMXON_REGION, 4, VMCS12_REVISION | 1 << 31)
    assert l1.with_pointer("vmxon [rbx]", VMXON_REGION) is FAIL_INVALID


def test_region_addresses_end_at_this_guests_maxphyaddr() -> None:
    l1 = Hypervisor().in_operation()
    l1.words[MAXPHYADDR] = 40
    assert l1.with_pointer("vmptrld [rbx]", 1 << 40) is Error.VMPTRLD_INVALID_ADDRESS
    l1.words[MAXPHYADDR] = 41
    assert l1.with_pointer("vmptrld [rbx]", 1 << 40) is Error.VMPTRLD_INCORRECT_VMCS_REVISION_ID


def test_vmxon_in_vmx_operation_fails_and_does_not_read_its_operand() -> None:
    l1 = Hypervisor().in_operation()
    l1.unmap(DATA)
    assert l1.vmx("vmxon [rbx]") is Error.VMXON_IN_VMX_ROOT_OPERATION
    without_vmcs = Hypervisor().in_operation(current=None)
    assert without_vmcs.vmx("vmxon [rbx]") is FAIL_INVALID


def test_vmxon_in_vmx_operation_fails_before_the_checks_of_control_registers() -> None:
    l1 = Hypervisor().in_operation()
    l1.words[CR0] &= ~CR0_NE
    l1.set_feature_control(0)
    assert l1.vmx("vmxon [rbx]") is Error.VMXON_IN_VMX_ROOT_OPERATION


def test_vmxoff_leaves_vmx_operation_and_writes_the_current_vmcs_to_memory() -> None:
    l1 = Hypervisor().in_operation()
    l1.vmwrite(F.GUEST_RIP, 0x1234)
    assert l1.vmx("vmxoff") is SUCCEED
    assert not l1.nested.in_vmx_operation
    assert l1.vmx_fault("vmptrst [rbx]") == (UD, None)
    assert Vmcs12.load(l1.memory, VMCS_A)[F.GUEST_RIP] == 0x1234
    l1.in_operation(current=VMCS_A)
    assert l1.vmread(F.GUEST_RIP) == 0x1234


def test_vmxon_is_possible_in_32_bit_mode_with_paging() -> None:
    l1 = Hypervisor()
    enter_protected_mode(l1, 32)
    words = l1.words
    page_directory = 0x180000
    l1.memory.store(page_directory, 4, PTE_P | PTE_W | PTE_PS)
    words[CR3], words[CR4] = page_directory, CR4_VMXE | CR4_PSE
    words[CR0] |= CR0_PG | CR0_NE
    words[RBX] = 0x10
    l1.memory.store(DATA_BASE + 0x10, 8, VMXON_REGION)
    assert l1.vmx("vmxon [ebx]") is SUCCEED
    assert l1.nested.vmxon_gpa == VMXON_REGION


def test_single_stepped_instruction_traps_behind_itself_with_its_flags_set() -> None:
    l1 = Hypervisor().in_operation()
    l1.store(DATA, 8, VMXON_REGION)
    l1.words[RFLAGS] |= RFLAGS_TF | RFLAGS_CF
    rip = l1.words[RIP]
    with pytest.raises(GuestFault) as trapped:
        l1.step("vmxoff")
    assert trapped.value.vector == DB
    assert l1.words[RIP] == rip + 3
    assert not l1.words[RFLAGS] & RFLAGS_CF
    assert not l1.nested.in_vmx_operation


# ------------------------------------------------------------------------------------------------ VMCS pointers


@pytest.mark.parametrize("pointer", [VMCS_A + 1, VMCS_A + 0xFFF, 1 << 46, NO_POINTER])
def test_vmclear_and_vmptrld_need_the_address_of_a_page(pointer: int) -> None:
    l1 = Hypervisor().in_operation()
    assert l1.with_pointer("vmclear [rbx]", pointer) is Error.VMCLEAR_INVALID_ADDRESS
    assert l1.with_pointer("vmptrld [rbx]", pointer) is Error.VMPTRLD_INVALID_ADDRESS
    assert l1.nested.current_gpa == VMCS_A


def test_vmclear_and_vmptrld_refuse_the_vmxon_region() -> None:
    l1 = Hypervisor().in_operation()
    assert l1.with_pointer("vmclear [rbx]", VMXON_REGION) is Error.VMCLEAR_VMXON_POINTER
    assert l1.with_pointer("vmptrld [rbx]", VMXON_REGION) is Error.VMPTRLD_VMXON_POINTER


def test_without_a_current_vmcs_there_is_no_place_for_an_error_number() -> None:
    l1 = Hypervisor().in_operation(current=None)
    assert l1.with_pointer("vmclear [rbx]", 1) is FAIL_INVALID
    assert l1.with_pointer("vmptrld [rbx]", VMXON_REGION) is FAIL_INVALID


@pytest.mark.parametrize("first_word", [VMCS12_REVISION ^ 1, VMCS12_REVISION | 1 << 31, 0])
def test_vmptrld_fails_for_another_revision_and_for_a_shadow_vmcs(first_word: int) -> None:
    l1 = Hypervisor().in_operation()
    l1.memory.store(VMCS_B, 4, first_word)
    assert l1.with_pointer("vmptrld [rbx]", VMCS_B) is Error.VMPTRLD_INCORRECT_VMCS_REVISION_ID
    assert l1.nested.current_gpa == VMCS_A


def test_vmptrld_fails_where_there_is_no_memory() -> None:
    l1 = Hypervisor().in_operation()
    assert l1.with_pointer("vmptrld [rbx]", MAPPED) is Error.VMPTRLD_INCORRECT_VMCS_REVISION_ID


def test_vmclear_takes_any_page_whatever_is_there() -> None:
    l1 = Hypervisor().in_operation()
    assert l1.with_pointer("vmclear [rbx]", OTHER_REVISION) is SUCCEED
    assert l1.with_pointer("vmclear [rbx]", MAPPED) is SUCCEED


def test_vmptrst_stores_the_current_vmcs_pointer() -> None:
    l1 = Hypervisor().in_operation(current=VMCS_B)
    assert l1.vmx("vmptrst [rbx]") is SUCCEED
    assert l1.load(DATA) == VMCS_B


def test_fields_live_in_the_copy_until_vmclear_writes_them_to_memory() -> None:
    l1 = Hypervisor().in_operation()
    l1.vmwrite(F.GUEST_RIP, 0x1111)
    assert Vmcs12.load(l1.memory, VMCS_A)[F.GUEST_RIP] == 0
    stale = Vmcs12()
    stale[F.GUEST_RIP] = 0x2222
    stale.store(l1.memory, VMCS_A)
    assert l1.vmread(F.GUEST_RIP) == 0x1111
    assert l1.with_pointer("vmclear [rbx]", VMCS_A) is SUCCEED
    assert Vmcs12.load(l1.memory, VMCS_A)[F.GUEST_RIP] == 0x1111
    assert l1.nested.current_gpa == NO_POINTER
    l1.words[RCX] = F.GUEST_RIP
    assert l1.vmx("vmread rax, rcx") is FAIL_INVALID


def test_vmptrld_of_another_vmcs_writes_the_old_one_to_memory_and_copies_the_new_one() -> None:
    l1 = Hypervisor().in_operation()
    l1.vmwrite(F.GUEST_RSP, 0xA)
    assert l1.with_pointer("vmptrld [rbx]", VMCS_B) is SUCCEED
    assert l1.vmread(F.GUEST_RSP) == 0
    l1.vmwrite(F.GUEST_RSP, 0xB)
    assert l1.with_pointer("vmptrld [rbx]", VMCS_A) is SUCCEED
    assert l1.vmread(F.GUEST_RSP) == 0xA
    assert Vmcs12.load(l1.memory, VMCS_B)[F.GUEST_RSP] == 0xB


def test_vmptrld_of_the_current_vmcs_neither_copies_nor_stores_its_fields() -> None:
    l1 = Hypervisor().in_operation()
    l1.vmwrite(F.GUEST_RSP, 0xA)
    assert l1.with_pointer("vmptrld [rbx]", VMCS_A) is SUCCEED
    assert l1.vmread(F.GUEST_RSP) == 0xA
    assert Vmcs12.load(l1.memory, VMCS_A)[F.GUEST_RSP] == 0


@pytest.mark.parametrize("cleared", [VMCS_A, VMCS_B])
def test_vmclear_makes_the_launch_state_clear_current_or_not(cleared: int) -> None:
    l1 = Hypervisor().in_operation(current=cleared)
    l1.vmcs.launched = True
    assert l1.with_pointer("vmptrld [rbx]", VMCS_A) is SUCCEED
    assert l1.with_pointer("vmclear [rbx]", cleared) is SUCCEED
    assert not Vmcs12.load(l1.memory, cleared).launched
    assert l1.with_pointer("vmptrld [rbx]", cleared) is SUCCEED
    assert not l1.vmcs.launched


def test_vmclear_of_another_vmcs_leaves_the_current_one_current() -> None:
    l1 = Hypervisor().in_operation()
    l1.vmwrite(F.GUEST_RSP, 0xA)
    assert l1.with_pointer("vmclear [rbx]", VMCS_B) is SUCCEED
    assert l1.vmread(F.GUEST_RSP) == 0xA


def test_store_current_writes_the_fields_and_keeps_the_vmcs_current() -> None:
    l1 = Hypervisor().in_operation()
    l1.vmwrite(F.GUEST_RSP, 0xA)
    l1.nested.store_current(l1.memory)
    assert Vmcs12.load(l1.memory, VMCS_A)[F.GUEST_RSP] == 0xA
    assert l1.nested.current_gpa == VMCS_A


def test_the_error_number_of_the_last_failure_can_be_read_after_a_success() -> None:
    l1 = Hypervisor().in_operation()
    assert l1.with_pointer("vmptrld [rbx]", 1) is Error.VMPTRLD_INVALID_ADDRESS
    assert l1.vmread(F.VM_INSTRUCTION_ERROR) == Error.VMPTRLD_INVALID_ADDRESS


def test_instruction_of_l2_that_nobody_intercepted_is_an_internal_error() -> None:
    l1 = Hypervisor().in_operation()
    l1.nested.in_guest = True
    with pytest.raises(Unhandleable, match="nested guest"):
        l1.vmx("vmptrst [rbx]")


def test_l2_in_real_mode_gets_the_undefined_opcode_fault_that_comes_before_exits() -> None:
    l1 = Hypervisor().in_operation()
    l1.nested.in_guest = True
    enter_real_mode(l1)
    assert l1.vmx_fault("vmxoff") == (UD, None)
