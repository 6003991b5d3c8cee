"""Which instructions of L2 cause VM exits: those without a say of L1, and those with a control of their own."""

from __future__ import annotations

import pytest
from emulator_guest import UPPER
from l2_guest import L2
from legacy_modes import DATA_BASE, enter_protected_mode, enter_real_mode, enter_virtual_8086_mode

from lasskvm.state import BASE, CPL, CR4, RAX, RBX, RFLAGS, segment_word
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.intercepts import is_sensitive
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import BP, DB, OF
from lasskvm.x86.registers import CR4_OSXSAVE, CR4_SMXE, GS, RFLAGS_OF
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField as F

ALL_CONTROLS = 0xFFFF_FFFF


@pytest.fixture
def l2() -> L2:
    return L2()


@pytest.mark.parametrize(
    "source, reason, length",
    [
        ("cpuid", ExitReason.CPUID, 2),
        ("invd", ExitReason.INVD, 2),
        ("getsec", ExitReason.GETSEC, 2),
        ("xsetbv", ExitReason.XSETBV, 3),
        ("vmcall", ExitReason.VMCALL, 3),
        ("vmlaunch", ExitReason.VMLAUNCH, 3),
        ("vmresume", ExitReason.VMRESUME, 3),
        ("vmxoff", ExitReason.VMXOFF, 3),
    ],
)
def test_some_instructions_exit_whatever_the_controls(
    l2: L2, source: str, reason: ExitReason, length: int
) -> None:
    l2.words[CR4] |= CR4_SMXE | CR4_OSXSAVE
    assert l2.exit_of(source) == NestedExit(reason, instruction_length=length)


@pytest.mark.parametrize(
    "source, control, reason, length",
    [
        ("hlt", vmx.CPU_BASED_HLT_EXITING, ExitReason.HLT, 1),
        ("monitor", vmx.CPU_BASED_MONITOR_EXITING, ExitReason.MONITOR_INSTRUCTION, 3),
        ("mwait", vmx.CPU_BASED_MWAIT_EXITING, ExitReason.MWAIT_INSTRUCTION, 3),
        ("pause", vmx.CPU_BASED_PAUSE_EXITING, ExitReason.PAUSE_INSTRUCTION, 2),
        ("rdpmc", vmx.CPU_BASED_RDPMC_EXITING, ExitReason.RDPMC, 2),
        ("rdtsc", vmx.CPU_BASED_RDTSC_EXITING, ExitReason.RDTSC, 2),
        ("rdtscp", vmx.CPU_BASED_RDTSC_EXITING, ExitReason.RDTSCP, 3),
    ],
)
def test_a_primary_control_makes_its_instruction_exit(
    l2: L2, source: str, control: int, reason: ExitReason, length: int
) -> None:
    l2.secondary(vmx.SECONDARY_EXEC_ENABLE_RDTSCP)
    l2.vmcs[F.CPU_BASED_VM_EXEC_CONTROL] |= ALL_CONTROLS & ~control
    assert l2.exit_of(source) is None
    l2.primary(control)
    assert l2.exit_of(source) == NestedExit(reason, instruction_length=length)


@pytest.mark.parametrize("source, length", [("wbinvd", 2), ("wbnoinvd", 3)])
def test_wbinvd_exiting_is_about_both_forms(l2: L2, source: str, length: int) -> None:
    l2.secondary(ALL_CONTROLS & ~vmx.SECONDARY_EXEC_WBINVD_EXITING)
    assert l2.exit_of(source) is None
    l2.secondary(vmx.SECONDARY_EXEC_WBINVD_EXITING)
    assert l2.exit_of(source) == NestedExit(ExitReason.WBINVD, instruction_length=length)


def test_secondary_controls_count_only_when_they_are_activated(l2: L2) -> None:
    l2.secondary(vmx.SECONDARY_EXEC_WBINVD_EXITING)
    l2.vmcs[F.CPU_BASED_VM_EXEC_CONTROL] &= ~vmx.CPU_BASED_ACTIVATE_SECONDARY_CONTROLS
    assert l2.exit_of("wbinvd") is None


def test_pause_exits_at_any_privilege_level(l2: L2) -> None:
    l2.primary(vmx.CPU_BASED_PAUSE_EXITING)
    l2.enter_user()
    assert l2.exit_of("pause") == NestedExit(ExitReason.PAUSE_INSTRUCTION, instruction_length=2)


@pytest.mark.parametrize(
    "source",
    [
        "nop",
        "mov rax, rbx",
        "mov rax, [rbx]",
        "syscall",
        "swapgs",
        "iretq",
        "cli",
        "smsw eax",
        "clflush [rax]",
        "ud2",
    ],
)
def test_l1_cannot_intercept_other_instructions(l2: L2, source: str) -> None:
    l2.vmcs[F.CPU_BASED_VM_EXEC_CONTROL] = ALL_CONTROLS
    l2.vmcs[F.SECONDARY_VM_EXEC_CONTROL] = ALL_CONTROLS
    assert not is_sensitive(l2.fetch(source))
    assert l2.exit_of(source) is None


# ------------------------------------------------------------------------------------------------------------- INVLPG


@pytest.mark.parametrize("address", [UPPER + 0x123, 0x123, 0x8000_0000_0000_0000], ids=hex)
def test_invlpg_reports_any_address_unchecked(l2: L2, address: int) -> None:
    """Canonical or not, on either side of the split: the address is only named."""
    l2.words[RAX] = address
    assert l2.exit_of("invlpg [rax]") is None
    l2.primary(vmx.CPU_BASED_INVLPG_EXITING)
    assert l2.exit_of("invlpg [rax]") == NestedExit(
        ExitReason.INVLPG, qualification=address, instruction_length=3
    )


def test_invlpg_reports_the_linear_address(l2: L2) -> None:
    l2.primary(vmx.CPU_BASED_INVLPG_EXITING)
    l2.words[segment_word(GS, BASE)] = UPPER
    l2.words[RAX], l2.words[RBX] = 0x1000, 0x20
    nested_exit = l2.exit_of("invlpg gs:[rax + rbx * 4 - 1]")
    assert nested_exit == NestedExit(ExitReason.INVLPG, qualification=UPPER + 0x107F, instruction_length=6)


def test_invlpg_outside_64_bit_mode_adds_the_segment_base(l2: L2) -> None:
    enter_protected_mode(l2, 32)
    l2.primary(vmx.CPU_BASED_INVLPG_EXITING)
    l2.words[RAX] = 0xFFFF_FFFF
    nested_exit = l2.exit_of("invlpg [eax]")
    assert nested_exit == NestedExit(ExitReason.INVLPG, qualification=DATA_BASE - 1, instruction_length=3)


# -------------------------------------------------------------------------------------------------------------- ENCLS


@pytest.mark.parametrize("leaf, bit", [(0, 0), (2, 2), (62, 62), (63, 63), (64, 63), (0xFFFF_FFFF, 63)])
def test_encls_leaves_have_a_bit_each_up_to_the_last_one(l2: L2, leaf: int, bit: int) -> None:
    l2.words[RAX] = 0xFFFF_FFFF_0000_0000 | leaf
    l2.secondary(vmx.SECONDARY_EXEC_ENCLS_EXITING)
    l2.vmcs[F.ENCLS_EXITING_BITMAP] = ~(1 << bit)
    assert l2.exit_of("encls") is None
    l2.vmcs[F.ENCLS_EXITING_BITMAP] = 1 << bit
    assert l2.exit_of("encls") == NestedExit(ExitReason.ENCLS, instruction_length=3)


def test_the_encls_bitmap_needs_its_control(l2: L2) -> None:
    l2.secondary(ALL_CONTROLS & ~vmx.SECONDARY_EXEC_ENCLS_EXITING)
    l2.vmcs[F.ENCLS_EXITING_BITMAP] = ~0
    assert l2.exit_of("encls") is None


# ------------------------------------------------------------------------------------------------ software exceptions

SOFT = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_SOFT_EXCEPTION


def test_int3_exits_as_a_software_exception_with_its_length(l2: L2) -> None:
    l2.vmcs[F.EXCEPTION_BITMAP] = ALL_CONTROLS & ~(1 << BP)
    assert l2.exit_of("int3") is None
    l2.vmcs[F.EXCEPTION_BITMAP] = 1 << BP
    assert l2.exit_of("int3") == NestedExit(
        ExitReason.EXCEPTION_NMI, instruction_length=1, interruption_information=SOFT | BP
    )


def test_int3_exits_whatever_the_dpl_of_its_gate_says(l2: L2) -> None:
    """The gate is a kernel's; delivery from CPL 3 would be #GP."""
    l2.enter_user()
    l2.vmcs[F.EXCEPTION_BITMAP] = 1 << BP
    nested_exit = l2.exit_of("int3")
    assert nested_exit is not None
    assert nested_exit.interruption_information == SOFT | BP


def test_int3_is_not_sensitive_to_iopl_in_virtual_8086_mode(l2: L2) -> None:
    enter_virtual_8086_mode(l2, iopl=0)
    l2.vmcs[F.EXCEPTION_BITMAP] = 1 << BP
    assert l2.exit_of("int3") == NestedExit(
        ExitReason.EXCEPTION_NMI, instruction_length=1, interruption_information=SOFT | BP
    )


@pytest.mark.parametrize("vector", [DB, BP, OF])
def test_int_n_is_no_exception_to_intercept(l2: L2, vector: int) -> None:
    """With the long opcode it is a software interrupt, also with the vector of an exception."""
    l2.vmcs[F.EXCEPTION_BITMAP] = ALL_CONTROLS
    assert l2.exit_of(f"db 0xCD, {vector}") is None


def test_into_exits_only_with_the_overflow_flag(l2: L2) -> None:
    enter_protected_mode(l2, 32)
    l2.vmcs[F.EXCEPTION_BITMAP] = 1 << OF
    assert l2.exit_of("into") is None
    l2.words[RFLAGS] |= RFLAGS_OF
    assert l2.exit_of("into") == NestedExit(
        ExitReason.EXCEPTION_NMI, instruction_length=1, interruption_information=SOFT | OF
    )


def test_int1_exits_as_a_privileged_software_exception_without_dr6_bits(l2: L2) -> None:
    assert l2.exit_of("int1") is None
    l2.vmcs[F.EXCEPTION_BITMAP] = 1 << DB
    information = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_PRIV_SW_EXCEPTION | DB
    assert l2.exit_of("int1") == NestedExit(
        ExitReason.EXCEPTION_NMI, instruction_length=1, interruption_information=information
    )


def test_the_length_counts_prefixes(l2: L2) -> None:
    l2.primary(vmx.CPU_BASED_HLT_EXITING)
    assert l2.exit_of("db 0x66, 0x66, 0x48, 0xF4") == NestedExit(ExitReason.HLT, instruction_length=4)


def test_unconditional_exits_also_come_from_real_mode(l2: L2) -> None:
    enter_real_mode(l2)
    assert l2.words[CPL] == 0
    assert l2.exit_of("cpuid") == NestedExit(ExitReason.CPUID, instruction_length=2)
    assert l2.exit_of("vmcall") == NestedExit(ExitReason.VMCALL, instruction_length=3)
