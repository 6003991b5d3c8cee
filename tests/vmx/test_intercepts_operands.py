"""VM exits that describe operands: the VMX instructions, descriptor tables, INVPCID, XSAVES, RDRAND and RDSEED."""

from __future__ import annotations

import pytest
from l2_guest import L2
from legacy_modes import enter_protected_mode

from lasskvm.state import CR4, RAX, RBX, RDX, RIP
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.x86 import vmx
from lasskvm.x86.msr import MSR_IA32_XSS
from lasskvm.x86.registers import CR4_OSXSAVE
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField as F

ALL_CONTROLS = 0xFFFF_FFFF
MINUS_8 = (1 << 64) - 8

# Instruction information
ADDRESS_16, ADDRESS_32, ADDRESS_64 = 0, 1 << 7, 2 << 7
REGISTER = 1 << 10
SS_SEGMENT, DS_SEGMENT, FS_SEGMENT, GS_SEGMENT = 2 << 15, 3 << 15, 4 << 15, 5 << 15
NO_INDEX, NO_BASE = 1 << 22, 1 << 27
#: 64-bit addresses, DS, [rbx]
AT_RBX = ADDRESS_64 | DS_SEGMENT | NO_INDEX | 3 << 23


@pytest.fixture
def l2() -> L2:
    return L2()


# --------------------------------------------------------------------------------------------------- VMX instructions


@pytest.mark.parametrize(
    "source, reason, length",
    [
        ("vmxon [rbx]", ExitReason.VMXON, 4),
        ("vmclear [rbx]", ExitReason.VMCLEAR, 4),
        ("vmptrld [rbx]", ExitReason.VMPTRLD, 3),
        ("vmptrst [rbx]", ExitReason.VMPTRST, 3),
    ],
)
def test_vmx_instructions_with_a_pointer_exit_without_looking_at_it(
    l2: L2, source: str, reason: ExitReason, length: int
) -> None:
    """RBX is in the lower half, where LASS would stop the access."""
    l2.words[RBX] = 0x1000
    assert l2.exit_of(source) == NestedExit(reason, instruction_information=AT_RBX, instruction_length=length)


@pytest.mark.parametrize(
    "operand, information, displacement, length",
    [
        ("[rbx - 8]", AT_RBX, MINUS_8, 4),
        ("[rbx + 0x12345678]", AT_RBX, 0x1234_5678, 7),
        ("[rbx + rcx]", ADDRESS_64 | DS_SEGMENT | 1 << 18 | 3 << 23, 0, 4),
        ("[r13 + r14 * 8 + 4]", ADDRESS_64 | DS_SEGMENT | 3 | 14 << 18 | 13 << 23, 4, 6),
        ("[rcx * 4 + 0x40]", ADDRESS_64 | DS_SEGMENT | 2 | 1 << 18 | NO_BASE, 0x40, 8),
        ("[rsp]", ADDRESS_64 | SS_SEGMENT | NO_INDEX | 4 << 23, 0, 4),
        ("[rbp + rax * 2 + 1]", ADDRESS_64 | SS_SEGMENT | 1 | 5 << 23, 1, 5),
        ("gs:[rax]", ADDRESS_64 | GS_SEGMENT | NO_INDEX, 0, 4),
        ("fs:[ecx - 8]", ADDRESS_32 | FS_SEGMENT | NO_INDEX | 1 << 23, 0xFFFF_FFF8, 6),
    ],
)
def test_the_operand_is_described_by_its_parts(
    l2: L2, operand: str, information: int, displacement: int, length: int
) -> None:
    assert l2.exit_of(f"vmptrld {operand}") == NestedExit(
        ExitReason.VMPTRLD,
        qualification=displacement,
        instruction_information=information,
        instruction_length=length,
    )


def test_relative_to_rip_the_qualification_is_the_address(l2: L2) -> None:
    # vmptrld [rip + 0x10], and the same with an address-size prefix, where bits 63:32 do not count
    nested_exit = l2.exit_of("db 0x0F, 0xC7, 0x35, 0x10, 0, 0, 0")
    assert nested_exit is not None
    assert nested_exit.qualification == l2.words[RIP] + 7 + 0x10
    assert nested_exit.instruction_information == ADDRESS_64 | DS_SEGMENT | NO_INDEX | NO_BASE
    nested_exit = l2.exit_of("db 0x67, 0x0F, 0xC7, 0x35, 0xF0, 0xFF, 0xFF, 0xFF")
    assert nested_exit is not None
    assert nested_exit.qualification == (l2.words[RIP] + 8 - 0x10) & 0xFFFF_FFFF
    assert nested_exit.instruction_information == ADDRESS_32 | DS_SEGMENT | NO_INDEX | NO_BASE


@pytest.mark.parametrize(
    "source, reason, information, length",
    [
        # Register 1 stands in bits 6:3, register 2, which has the field's encoding, in bits 31:28.
        ("vmread rcx, rdx", ExitReason.VMREAD, REGISTER | 1 << 3 | 2 << 28, 3),
        ("vmread r9, r15", ExitReason.VMREAD, REGISTER | 9 << 3 | 15 << 28, 4),
        ("vmread [rbx], rdx", ExitReason.VMREAD, AT_RBX | 2 << 28, 3),
        ("vmwrite rcx, rdx", ExitReason.VMWRITE, REGISTER | 2 << 3 | 1 << 28, 3),
        ("vmwrite r12, [rbx]", ExitReason.VMWRITE, AT_RBX | 12 << 28, 4),
        ("invept rdi, [rbx]", ExitReason.INVEPT, AT_RBX | 7 << 28, 5),
        ("invvpid r8, [rbx]", ExitReason.INVVPID, AT_RBX | 8 << 28, 6),
    ],
)
def test_vmx_instructions_with_two_operands_name_both(
    l2: L2, source: str, reason: ExitReason, information: int, length: int
) -> None:
    assert l2.exit_of(source) == NestedExit(
        reason, instruction_information=information, instruction_length=length
    )


def test_vmx_instructions_exit_at_any_privilege_level(l2: L2) -> None:
    l2.enter_user()
    nested_exit = l2.exit_of("vmread rcx, rdx")
    assert nested_exit is not None
    assert nested_exit.reason == ExitReason.VMREAD


# ------------------------------------------------------------------------------------------------- descriptor tables


@pytest.mark.parametrize(
    "source, reason, information, length",
    [
        ("sgdt [rbx]", ExitReason.GDTR_IDTR, AT_RBX | 1 << 11 | 0 << 28, 3),
        ("sidt [rbx]", ExitReason.GDTR_IDTR, AT_RBX | 1 << 11 | 1 << 28, 3),
        ("lgdt [rbx]", ExitReason.GDTR_IDTR, AT_RBX | 1 << 11 | 2 << 28, 3),
        ("lidt [rbx]", ExitReason.GDTR_IDTR, AT_RBX | 1 << 11 | 3 << 28, 3),
        ("sldt [rbx]", ExitReason.LDTR_TR, AT_RBX | 0 << 28, 3),
        ("str [rbx]", ExitReason.LDTR_TR, AT_RBX | 1 << 28, 3),
        ("lldt [rbx]", ExitReason.LDTR_TR, AT_RBX | 2 << 28, 3),
        ("ltr [rbx]", ExitReason.LDTR_TR, AT_RBX | 3 << 28, 3),
        ("sldt edx", ExitReason.LDTR_TR, REGISTER | 2 << 3 | 0 << 28, 3),
        ("str r10d", ExitReason.LDTR_TR, REGISTER | 10 << 3 | 1 << 28, 4),
        ("lldt cx", ExitReason.LDTR_TR, REGISTER | 1 << 3 | 2 << 28, 4),
        ("ltr ax", ExitReason.LDTR_TR, REGISTER | 3 << 28, 4),
    ],
)
def test_descriptor_table_exiting_tells_instruction_and_operand(
    l2: L2, source: str, reason: ExitReason, information: int, length: int
) -> None:
    l2.secondary(ALL_CONTROLS & ~vmx.SECONDARY_EXEC_DESC)
    assert l2.exit_of(source) is None
    l2.secondary(vmx.SECONDARY_EXEC_DESC)
    assert l2.exit_of(source) == NestedExit(
        reason, instruction_information=information, instruction_length=length
    )


def test_the_operand_size_of_descriptor_tables_is_told_outside_64_bit_mode(l2: L2) -> None:
    enter_protected_mode(l2, 32)
    l2.secondary(vmx.SECONDARY_EXEC_DESC)
    at_ebx = ADDRESS_32 | DS_SEGMENT | NO_INDEX | 3 << 23
    assert l2.exit_of("lgdt [ebx]") == NestedExit(
        ExitReason.GDTR_IDTR, instruction_information=at_ebx | 1 << 11 | 2 << 28, instruction_length=3
    )
    # lgdt [ebx] with an operand-size prefix
    assert l2.exit_of("db 0x66, 0x0F, 0x01, 0x13") == NestedExit(
        ExitReason.GDTR_IDTR, instruction_information=at_ebx | 2 << 28, instruction_length=4
    )


def test_16_bit_addresses_are_told_with_16_bit_displacements(l2: L2) -> None:
    enter_protected_mode(l2, 16)
    l2.secondary(vmx.SECONDARY_EXEC_DESC)
    # sidt [bp + si - 8]: base BP, index SI, stack segment
    assert l2.exit_of("db 0x0F, 0x01, 0x4A, 0xF8") == NestedExit(
        ExitReason.GDTR_IDTR,
        qualification=0xFFF8,
        instruction_information=ADDRESS_16 | SS_SEGMENT | 6 << 18 | 5 << 23 | 1 << 28,
        instruction_length=4,
    )


# ------------------------------------------------------------------------------------------------------------- others


def test_invpcid_exits_with_invlpg_exiting(l2: L2) -> None:
    l2.secondary(vmx.SECONDARY_EXEC_ENABLE_INVPCID)
    l2.vmcs[F.CPU_BASED_VM_EXEC_CONTROL] |= ALL_CONTROLS & ~vmx.CPU_BASED_INVLPG_EXITING
    assert l2.exit_of("invpcid rdi, [rbx + 8]") is None
    l2.primary(vmx.CPU_BASED_INVLPG_EXITING)
    assert l2.exit_of("invpcid rdi, [rbx + 8]") == NestedExit(
        ExitReason.INVPCID,
        qualification=8,
        instruction_information=AT_RBX | 7 << 28,
        instruction_length=6,
    )


@pytest.mark.parametrize("source, reason, length", [
    ("xsaves [rbx]", ExitReason.XSAVES, 3), ("xsaves64 [rbx]", ExitReason.XSAVES, 4),
    ("xrstors [rbx]", ExitReason.XRSTORS, 3), ("xrstors64 [rbx]", ExitReason.XRSTORS, 4),
])  # fmt: skip
def test_xsaves_exits_for_a_component_that_is_asked_for_enabled_and_intercepted(
    l2: L2, source: str, reason: ExitReason, length: int
) -> None:
    component, other = 1 << 40, 1 << 11
    l2.secondary(vmx.SECONDARY_EXEC_ENABLE_XSAVES)
    l2.words[CR4] |= CR4_OSXSAVE
    expected = NestedExit(reason, instruction_information=AT_RBX, instruction_length=length)
    for requested in (component, other):
        for enabled in (component, other):
            for intercepted in (component, other):
                l2.words[RAX], l2.words[RDX] = requested & 0xFFFF_FFFF, requested >> 32
                l2.ctx.msrs.values[MSR_IA32_XSS] = enabled
                l2.vmcs[F.XSS_EXIT_BITMAP] = intercepted
                exits = requested == enabled == intercepted
                assert l2.exit_of(source) == (expected if exits else None)


def test_xsaves_without_supervisor_components_does_not_exit(l2: L2) -> None:
    l2.secondary(vmx.SECONDARY_EXEC_ENABLE_XSAVES)
    l2.words[CR4] |= CR4_OSXSAVE
    l2.words[RAX] = l2.words[RDX] = 0xFFFF_FFFF
    l2.vmcs[F.XSS_EXIT_BITMAP] = (1 << 64) - 1
    assert l2.exit_of("xsaves [rbx]") is None


@pytest.mark.parametrize(
    "source, control, reason, information, length",
    [
        ("rdrand cx", vmx.SECONDARY_EXEC_RDRAND_EXITING, ExitReason.RDRAND, 1 << 3, 4),
        ("rdrand r9d", vmx.SECONDARY_EXEC_RDRAND_EXITING, ExitReason.RDRAND, 9 << 3 | 1 << 11, 4),
        ("rdrand rdx", vmx.SECONDARY_EXEC_RDRAND_EXITING, ExitReason.RDRAND, 2 << 3 | 2 << 11, 4),
        ("rdseed eax", vmx.SECONDARY_EXEC_RDSEED_EXITING, ExitReason.RDSEED, 1 << 11, 3),
    ],
)
def test_random_numbers_tell_register_and_size(
    l2: L2, source: str, control: int, reason: ExitReason, information: int, length: int
) -> None:
    l2.secondary(ALL_CONTROLS & ~control)
    assert l2.exit_of(source) is None
    l2.secondary(control)
    assert l2.exit_of(source) == NestedExit(
        reason, instruction_information=information, instruction_length=length
    )
