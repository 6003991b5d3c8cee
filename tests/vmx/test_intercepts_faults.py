"""Faults of L2 that L1's intercepts do not see, and instructions that L1 has to enable."""

from __future__ import annotations

import pytest
from emulator_guest import KERNEL_CS32, USER_CS32
from l2_guest import L2
from legacy_modes import enter_compatibility_mode, enter_real_mode, enter_virtual_8086_mode

from lasskvm.emulator.faults import GuestFault
from lasskvm.state import CR4, RIP, Segment
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.x86 import vmx
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.exceptions import GP, UD
from lasskvm.x86.msr import MSR_MISC_FEATURE_ENABLES
from lasskvm.x86.registers import (
    AR_CODE32,
    CR4_LASS,
    CR4_OSXSAVE,
    CR4_PCE,
    CR4_SMEP,
    CR4_SMXE,
    CR4_TSD,
    CR4_UMIP,
    CS,
)
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField as F

ALL_CONTROLS = 0xFFFF_FFFF
PRIVILEGED = (
    "hlt", "invd", "wbinvd", "wbnoinvd", "clts", "lmsw ax", "invlpg [rax]", "invpcid rax, [rbx]", "rdmsr", "wrmsr",
    "lgdt [rax]", "lidt [rax]", "lldt ax", "ltr ax", "mov cr0, rax", "mov rax, cr3", "mov cr8, rax", "xsetbv",
    "xsaves [rax]", "xrstors [rax]",
)  # fmt: skip
VMX = (
    "vmxon [ebx]", "vmxoff", "vmclear [ebx]", "vmptrld [ebx]", "vmptrst [ebx]", "vmread eax, ebx",
    "vmwrite eax, ebx", "vmlaunch", "vmresume", "invept eax, [ebx]", "invvpid eax, [ebx]",
)  # fmt: skip


@pytest.fixture
def l2() -> L2:
    """L1 intercepts all it can."""
    l2 = L2()
    l2.secondary(ALL_CONTROLS)
    l2.vmcs[F.CPU_BASED_VM_EXEC_CONTROL] = ALL_CONTROLS & ~vmx.CPU_BASED_USE_MSR_BITMAPS
    for field in (F.CR0_GUEST_HOST_MASK, F.CR4_GUEST_HOST_MASK, F.ENCLS_EXITING_BITMAP):
        l2.vmcs[field] = (1 << 64) - 1
    l2.words[CR4] |= CR4_OSXSAVE
    return l2


def reason_of(nested_exit: NestedExit | None) -> ExitReason | None:
    return None if nested_exit is None else nested_exit.reason


@pytest.mark.parametrize("source", PRIVILEGED)
def test_the_gp_of_privileged_instructions_comes_before_the_exit(l2: L2, source: str) -> None:
    l2.enter_user()
    assert l2.fault_before_exit(source) == (GP, 0)


@pytest.mark.parametrize("source", ["hlt", "mov eax, cr0", "invlpg [eax]", "rdmsr"])
def test_virtual_8086_mode_is_not_privileged_whatever_iopl(l2: L2, source: str) -> None:
    enter_virtual_8086_mode(l2, iopl=3)
    assert l2.fault_before_exit(source) == (GP, 0)


@pytest.mark.parametrize("source", ["monitor", "mwait", "encls"])
def test_some_instructions_are_undefined_for_user_code(l2: L2, source: str) -> None:
    l2.enter_user()
    assert l2.fault_before_exit(source) == (UD, None)


@pytest.mark.parametrize(
    "source, bit, forbids",
    [
        ("rdtsc", CR4_TSD, True),
        ("rdtscp", CR4_TSD, True),
        ("rdpmc", CR4_PCE, False),
        ("sgdt [rax]", CR4_UMIP, True),
        ("sidt [rax]", CR4_UMIP, True),
        ("sldt ax", CR4_UMIP, True),
        ("str ax", CR4_UMIP, True),
    ],
)
def test_what_cr4_forbids_user_code_faults_and_what_it_permits_exits(
    l2: L2, source: str, bit: int, forbids: bool
) -> None:
    """At CPL 0 the bit does not matter."""
    for is_set in (False, True):
        l2.words[CR4] = l2.words[CR4] & ~bit | bit * is_set
        l2.enter_kernel()
        assert l2.exit_of(source) is not None
        l2.enter_user()
        if is_set == forbids:
            assert l2.fault_before_exit(source) == (GP, 0)
        else:
            assert l2.exit_of(source) is not None


def test_cpuid_faulting_comes_before_the_exit_of_user_code(l2: L2) -> None:
    l2.ctx.msrs.values[MSR_MISC_FEATURE_ENABLES] = 1
    assert reason_of(l2.exit_of("cpuid")) == ExitReason.CPUID
    l2.enter_user()
    assert l2.fault_before_exit("cpuid") == (GP, 0)


# ----------------------------------------------------------------------------------------------------------- by mode


@pytest.mark.parametrize("source", ["lldt ax", "ltr ax", "sldt ax", "str ax", "encls"])
def test_instructions_of_protected_mode_are_undefined_elsewhere(l2: L2, source: str) -> None:
    enter_real_mode(l2)
    assert l2.fault_before_exit(source) == (UD, None)
    enter_virtual_8086_mode(l2, iopl=3)
    assert l2.fault_before_exit(source) == (UD, None)


@pytest.mark.parametrize("source", VMX)
def test_vmx_instructions_are_recognized_in_protected_and_64_bit_mode_only(l2: L2, source: str) -> None:
    """In compatibility mode, in real mode and in virtual-8086 mode they are #UD, at any CPL."""
    enter_real_mode(l2)
    assert l2.fault_before_exit(source) == (UD, None)
    enter_virtual_8086_mode(l2, iopl=3)
    assert l2.fault_before_exit(source) == (UD, None)


@pytest.mark.parametrize("selector, cpl", [(USER_CS32, 3), (KERNEL_CS32, 0)])
def test_compatibility_mode_has_no_vmx_instructions_but_vmcall(l2: L2, selector: int, cpl: int) -> None:
    if cpl:
        enter_compatibility_mode(l2)
    else:
        l2.state.set_segment(CS, Segment(selector, 0, 0xFFFF_FFFF, AR_CODE32))
        # So that the kernel may fetch from the only half that it can reach.
        l2.words[CR4] &= ~(CR4_LASS | CR4_SMEP)
        l2.words[RIP] = 0x10000
    for source in VMX:
        assert l2.fault_before_exit(source) == (UD, None)
    assert reason_of(l2.exit_of("vmcall")) == ExitReason.VMCALL


def test_vmx_instructions_of_64_bit_user_code_exit(l2: L2) -> None:
    """Their #GP by CPL is for VMX root operation."""
    l2.enter_user()
    for source in VMX:
        assert l2.exit_of(source.replace("eax, ebx", "rax, rbx").replace("eax, [", "rax, [")) is not None
    assert reason_of(l2.exit_of("vmcall")) == ExitReason.VMCALL


@pytest.mark.parametrize("source", ["xsetbv", "xsaves [rax]", "xrstors [rax]"])
def test_without_osxsave_there_is_no_xsetbv_and_no_xsaves(l2: L2, source: str) -> None:
    l2.words[CR4] &= ~CR4_OSXSAVE
    assert l2.fault_before_exit(source) == (UD, None)
    l2.enter_user()
    assert l2.fault_before_exit(source) == (UD, None)


def test_getsec_needs_smxe(l2: L2) -> None:
    assert l2.fault_before_exit("getsec") == (UD, None)
    l2.words[CR4] |= CR4_SMXE
    assert reason_of(l2.exit_of("getsec")) == ExitReason.GETSEC


# -------------------------------------------------------------------------------------------- registers that are not


@pytest.mark.parametrize(
    "source",
    ["mov cr1, rax", "mov cr5, rax", "mov rax, cr7", "mov rax, cr9", "mov dr8, rax", "mov rax, dr15"],
)
def test_registers_that_do_not_exist_are_undefined_at_any_cpl_before_anybody_asks(
    l2: L2, source: str
) -> None:
    for enter in (l2.enter_kernel, l2.enter_user):
        enter()
        with pytest.raises(GuestFault) as caught:
            l2.fetch(source)
        assert caught.value.vector == UD


# -------------------------------------------------------------------------------------------------- to be enabled


@pytest.mark.parametrize(
    "source, control",
    [
        ("rdtscp", vmx.SECONDARY_EXEC_ENABLE_RDTSCP),
        ("rdpid rax", vmx.SECONDARY_EXEC_ENABLE_RDTSCP),
        ("invpcid rax, [rbx]", vmx.SECONDARY_EXEC_ENABLE_INVPCID),
        ("xsaves [rbx]", vmx.SECONDARY_EXEC_ENABLE_XSAVES),
        ("xrstors64 [rbx]", vmx.SECONDARY_EXEC_ENABLE_XSAVES),
    ],
)
def test_instructions_that_l1_has_not_enabled_are_undefined(l2: L2, source: str, control: int) -> None:
    l2.exit_of(source)
    l2.vmcs[F.SECONDARY_VM_EXEC_CONTROL] &= ~control
    assert l2.fault_before_exit(source) == (UD, None)
    l2.enter_user()
    assert l2.fault_before_exit(source) == (UD, None)


@pytest.mark.parametrize("source", ["vmfunc", "vmmcall"])
def test_vm_functions_and_the_hypercall_of_the_other_vendor_are_undefined_in_l2(l2: L2, source: str) -> None:
    l2.ctx.hypercall = lambda ctx: None
    assert l2.fault_before_exit(source) == (UD, None)


@pytest.mark.parametrize(
    "source",
    ["rdrand eax", "rdseed eax", "encls", "monitor", "mwait", "xsaves [rax]", "getsec", "vmlaunch", "vmfunc"],
)
def test_an_instruction_that_the_processor_lacks_is_undefined_and_not_intercepted(
    l2: L2, source: str
) -> None:
    l2.use_cpuid(CpuidTable(parse_cpu("max,-rdtscp,-vmx").entries()))
    assert l2.fault_before_exit(source) == (UD, None)


def test_without_its_feature_wbnoinvd_is_wbinvd(l2: L2) -> None:
    l2.use_cpuid(CpuidTable(parse_cpu("max,-wbnoinvd").entries()))
    assert l2.exit_of("wbnoinvd") == NestedExit(ExitReason.WBINVD, instruction_length=3)
