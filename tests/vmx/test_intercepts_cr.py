"""VM exits for control and debug registers: masks and shadows, LASS among the bits that L1 owns, and qualifications."""

from __future__ import annotations

import pytest
from emulator_guest import UPPER
from l2_guest import L2
from legacy_modes import DATA_BASE, enter_protected_mode

from lasskvm.emulator.faults import GuestFault
from lasskvm.state import CR3, CR4, DR7, R9, RAX, RBX
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.intercepts import intercept_of
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import GP, PF
from lasskvm.x86.registers import (
    CR0_EM,
    CR0_MP,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR4_DE,
    CR4_LASS,
    CR4_PAE,
    CR4_SMAP,
    CR4_VMXE,
    DR7_GD,
)
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField as F

DATA = UPPER + 0x70000
ONES = (1 << 64) - 1
MSW = CR0_PE | CR0_MP | CR0_EM | CR0_TS


@pytest.fixture
def l2() -> L2:
    return L2()


def cr_exit(qualification: int, length: int = 3) -> NestedExit:
    return NestedExit(ExitReason.CR_ACCESS, qualification=qualification, instruction_length=length)


# -------------------------------------------------------------------------------------------------------- CR0 and CR4


def test_a_mov_to_cr4_that_changes_lass_against_the_shadow_exits_where_l1_owns_lass(l2: L2) -> None:
    l2.vmcs[F.CR4_GUEST_HOST_MASK] = CR4_LASS | CR4_VMXE
    l2.vmcs[F.CR4_READ_SHADOW] = 0
    l2.words[CR4] = CR4_PAE | CR4_VMXE
    l2.words[RAX] = CR4_PAE | CR4_SMAP
    assert l2.exit_of("mov cr4, rax") is None
    l2.words[RAX] |= CR4_LASS
    assert l2.exit_of("mov cr4, rax") == cr_exit(0x004)


def test_the_shadow_counts_and_not_the_register(l2: L2) -> None:
    """L1 keeps LASS on behind L2's back, and shows it off."""
    l2.words[CR4] |= CR4_LASS
    l2.vmcs[F.CR4_GUEST_HOST_MASK], l2.vmcs[F.CR4_READ_SHADOW] = CR4_LASS, 0
    l2.words[RBX] = l2.words[CR4] & ~CR4_LASS
    assert l2.exit_of("mov cr4, rbx") is None
    l2.words[RBX] |= CR4_LASS
    assert l2.exit_of("mov cr4, rbx") == cr_exit(0x304)


def test_lass_is_l2s_own_where_the_mask_lacks_it(l2: L2) -> None:
    l2.vmcs[F.CR4_GUEST_HOST_MASK], l2.vmcs[F.CR4_READ_SHADOW] = CR4_VMXE, 0
    for value in (0, CR4_LASS, CR4_LASS | CR4_SMAP):
        l2.words[RAX] = value
        assert l2.exit_of("mov cr4, rax") is None


@pytest.mark.parametrize("number, mask, shadow", [
    (0, F.CR0_GUEST_HOST_MASK, F.CR0_READ_SHADOW),
    (4, F.CR4_GUEST_HOST_MASK, F.CR4_READ_SHADOW),
])  # fmt: skip
@pytest.mark.parametrize("bit", [0, 3, 27, 31, 63])
def test_each_bit_of_the_mask_guards_its_bit(l2: L2, number: int, mask: F, shadow: F, bit: int) -> None:
    """Bit 63 too: reserved bits are for L1 to judge, before L2 gets its #GP."""
    l2.vmcs[shadow] = ONES
    l2.words[R9] = ONES ^ 1 << bit
    l2.vmcs[mask] = ONES ^ 1 << bit
    assert l2.exit_of(f"mov cr{number}, r9") is None
    l2.vmcs[mask] = 1 << bit
    assert l2.exit_of(f"mov cr{number}, r9") == cr_exit(number | 0x900, 4)


def test_mov_to_cr0_reports_its_register(l2: L2) -> None:
    l2.vmcs[F.CR0_GUEST_HOST_MASK] = CR0_PG | CR0_PE | CR0_NE
    l2.vmcs[F.CR0_READ_SHADOW] = CR0_PG | CR0_PE
    l2.words[RBX] = CR0_PG | CR0_PE | CR0_TS
    assert l2.exit_of("mov cr0, rbx") is None
    l2.words[RBX] = CR0_PE
    assert l2.exit_of("mov cr0, rbx") == cr_exit(0x300)


def test_outside_64_bit_mode_the_source_has_32_bits(l2: L2) -> None:
    enter_protected_mode(l2, 32)
    l2.vmcs[F.CR0_GUEST_HOST_MASK] = ONES
    l2.vmcs[F.CR0_READ_SHADOW] = CR0_PE
    l2.words[RAX] = 0xFFFF_FFFF_0000_0000 | CR0_PE
    assert l2.exit_of("mov cr0, eax") is None


@pytest.mark.parametrize(
    "source", ["mov rax, cr0", "mov rax, cr4", "smsw eax", "mov rax, cr2", "mov cr2, rax"]
)
def test_reading_cr0_and_cr4_and_all_of_cr2_never_exits(l2: L2, source: str) -> None:
    l2.primary(0xFFFF_FFFF)
    l2.vmcs[F.CR0_GUEST_HOST_MASK] = l2.vmcs[F.CR4_GUEST_HOST_MASK] = ONES
    assert l2.exit_of(source) is None


# --------------------------------------------------------------------------------------------------- CLTS and LMSW


@pytest.mark.parametrize("mask, shadow, exits", [
    (CR0_TS, CR0_TS, True), (CR0_TS, 0, False), (0, CR0_TS, False), (ONES ^ CR0_TS, ONES, False),
])  # fmt: skip
def test_clts_exits_when_l1_owns_ts_and_shows_it_set(l2: L2, mask: int, shadow: int, exits: bool) -> None:
    l2.vmcs[F.CR0_GUEST_HOST_MASK], l2.vmcs[F.CR0_READ_SHADOW] = mask, shadow
    assert l2.exit_of("clts") == (cr_exit(0x20, 2) if exits else None)


@pytest.mark.parametrize(
    "value, mask, shadow, exits",
    [
        (CR0_PE, CR0_PE, 0, True),
        (CR0_PE, CR0_PE, CR0_PE, False),
        # PE cannot be cleared, so nobody needs to know.
        (0, CR0_PE, CR0_PE, False),
        (CR0_TS, CR0_TS, 0, True),
        (0, CR0_TS, CR0_TS, True),
        (CR0_TS, CR0_TS, CR0_TS, False),
        (CR0_TS, MSW ^ CR0_TS, 0, False),
        (CR0_MP, MSW, CR0_MP, False),
        (0, CR0_MP, CR0_MP, True),
        (CR0_EM, CR0_EM, 0, True),
        # LMSW writes the low four bits only.
        (0xFFF0, ONES, 0, False),
    ],
)
def test_lmsw_exits_when_it_would_change_a_bit_of_l1s(
    l2: L2, value: int, mask: int, shadow: int, exits: bool
) -> None:
    l2.vmcs[F.CR0_GUEST_HOST_MASK], l2.vmcs[F.CR0_READ_SHADOW] = mask, shadow
    l2.words[RBX] = 0xFFFF_0000 | value
    assert l2.exit_of("lmsw bx") == (cr_exit(value << 16 | 0x30, 4) if exits else None)


def test_lmsw_from_memory_reports_the_linear_address(l2: L2) -> None:
    l2.vmcs[F.CR0_GUEST_HOST_MASK] = CR0_TS
    l2.words[RBX] = DATA
    l2.store(DATA + 2, 2, 0)
    assert l2.exit_of("lmsw [rbx + 2]") is None
    l2.store(DATA + 2, 2, 0x1238)
    assert l2.exit_of("lmsw [rbx + 2]") == NestedExit(
        ExitReason.CR_ACCESS,
        qualification=0x1238_0070,
        instruction_length=4,
        guest_linear_address=DATA + 2,
    )


def test_lmsw_outside_64_bit_mode_adds_the_segment_base(l2: L2) -> None:
    enter_protected_mode(l2, 32)
    l2.vmcs[F.CR0_GUEST_HOST_MASK] = CR0_TS
    l2.words[RBX] = 0x40
    l2.store(DATA_BASE + 0x40, 2, CR0_TS)
    nested_exit = l2.exit_of("lmsw [ebx]")
    assert nested_exit is not None
    assert nested_exit.guest_linear_address == DATA_BASE + 0x40


def test_lmsw_reads_its_operand_before_it_exits_so_lass_stops_it_first(l2: L2) -> None:
    l2.vmcs[F.CR0_GUEST_HOST_MASK] = ONES
    l2.words[RBX] = 0x70000
    with pytest.raises(GuestFault) as caught:
        intercept_of(l2.ctx, l2.fetch("lmsw [rbx]"), l2.vmcs)
    assert (caught.value.vector, caught.value.error_code) == (GP, 0)


def test_lmsw_with_an_operand_that_is_not_mapped_faults_before_it_exits(l2: L2) -> None:
    l2.vmcs[F.CR0_GUEST_HOST_MASK] = ONES
    l2.words[RBX] = DATA
    l2.unmap(DATA)
    with pytest.raises(GuestFault) as caught:
        intercept_of(l2.ctx, l2.fetch("lmsw [rbx]"), l2.vmcs)
    assert (caught.value.vector, caught.value.cr2) == (PF, DATA)


# -------------------------------------------------------------------------------------------------------- CR3 and CR8


@pytest.mark.parametrize(
    "source, control, qualification, length",
    [
        ("mov cr3, rdi", vmx.CPU_BASED_CR3_LOAD_EXITING, 0x703, 3),
        ("mov rsi, cr3", vmx.CPU_BASED_CR3_STORE_EXITING, 0x613, 3),
        ("mov cr8, rax", vmx.CPU_BASED_CR8_LOAD_EXITING, 0x008, 4),
        ("mov r15, cr8", vmx.CPU_BASED_CR8_STORE_EXITING, 0xF18, 4),
    ],
)
def test_cr3_and_cr8_have_a_control_for_each_direction(
    l2: L2, source: str, control: int, qualification: int, length: int
) -> None:
    l2.vmcs[F.CPU_BASED_VM_EXEC_CONTROL] = 0xFFFF_FFFF & ~control
    assert l2.exit_of(source) is None
    l2.primary(control)
    assert l2.exit_of(source) == cr_exit(qualification, length)


def test_without_cr3_target_values_every_load_of_cr3_exits(l2: L2) -> None:
    """Also one of the value that is there, and one of 0, which the target values would be."""
    l2.primary(vmx.CPU_BASED_CR3_LOAD_EXITING)
    for value in (0, l2.words[CR3], 0x5000):
        l2.words[RAX] = value
        assert l2.exit_of("mov cr3, rax") == cr_exit(0x003)


def test_cr8_exits_come_before_its_reserved_bits_and_the_tpr_shadow(l2: L2) -> None:
    l2.primary(vmx.CPU_BASED_CR8_LOAD_EXITING | vmx.CPU_BASED_TPR_SHADOW)
    l2.words[RAX] = ONES
    assert l2.exit_of("mov cr8, rax") == cr_exit(0x008, 4)


def test_the_tpr_shadow_alone_makes_nothing_exit(l2: L2) -> None:
    l2.primary(vmx.CPU_BASED_TPR_SHADOW)
    assert l2.exit_of("mov cr8, rax") is None
    assert l2.exit_of("mov rax, cr8") is None


# ----------------------------------------------------------------------------------------------------- debug registers


@pytest.mark.parametrize(
    "source, qualification, length",
    [
        ("mov dr0, rax", 0x000, 3),
        ("mov dr7, rbx", 0x307, 3),
        ("mov dr6, r10", 0xA06, 4),
        ("mov dr5, rcx", 0x105, 3),
        ("mov rdx, dr3", 0x213, 3),
        ("mov r15, dr6", 0xF16, 4),
        ("mov rax, dr4", 0x014, 3),
    ],
)
def test_mov_dr_reports_both_registers_and_the_direction(
    l2: L2, source: str, qualification: int, length: int
) -> None:
    l2.vmcs[F.CPU_BASED_VM_EXEC_CONTROL] = 0xFFFF_FFFF & ~vmx.CPU_BASED_MOV_DR_EXITING
    assert l2.exit_of(source) is None
    l2.primary(vmx.CPU_BASED_MOV_DR_EXITING)
    assert l2.exit_of(source) == NestedExit(
        ExitReason.DR_ACCESS, qualification=qualification, instruction_length=length
    )


def test_mov_dr_exits_before_the_faults_that_others_would_take_first(l2: L2) -> None:
    """At CPL 3, with CR4.DE for DR4, and with general detection."""
    l2.primary(vmx.CPU_BASED_MOV_DR_EXITING)
    l2.enter_user()
    l2.words[CR4] |= CR4_DE
    l2.words[DR7] |= DR7_GD
    assert l2.exit_of("mov dr4, rax") == NestedExit(
        ExitReason.DR_ACCESS, qualification=0x004, instruction_length=3
    )
