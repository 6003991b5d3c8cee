"""The numbers of VMX: field encodings, exit formats. Values are written out where the code under test computes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasskvm.x86 import vmx
from lasskvm.x86.registers import DS, ES, SS
from lasskvm.x86.vmx_exits import (
    CrAccess,
    ExitReason,
    TaskSwitchSource,
    cr_access_qualification,
    descriptor_table_information,
    dr_access_qualification,
    io_information,
    io_qualification,
    memory_operand_information,
    random_information,
    register_operand_information,
    task_switch_qualification,
)
from lasskvm.x86.vmx_fields import (
    ENCODING_HIGH_ACCESS,
    ENCODING_RESERVED,
    FieldType,
    FieldWidth,
    VmcsField,
    field_encoding,
    field_index,
    field_type,
    field_width,
    is_high_access,
)

RAX, RCX, RBX = 0, 1, 3


# ------------------------------------------------------------------------------------------------ field encodings


def test_encoding_of_a_field_has_no_reserved_bits_and_means_all_of_it() -> None:
    for field in VmcsField:
        assert not field & (ENCODING_RESERVED | ENCODING_HIGH_ACCESS), field.name
        assert field_encoding(field_width(field), field_type(field), field_index(field)) == field


def test_name_of_a_field_agrees_with_its_encoding() -> None:
    #: Two of the VM-exit information: what the guest accessed.
    exit_information = {VmcsField.GUEST_LINEAR_ADDRESS, VmcsField.GUEST_PHYSICAL_ADDRESS}
    for field in VmcsField:
        assert (field_type(field) == FieldType.HOST_STATE) == field.name.startswith("HOST_"), field.name
        if field.name.startswith("GUEST_"):
            expected = FieldType.READ_ONLY if field in exit_information else FieldType.GUEST_STATE
            assert field_type(field) == expected, field.name
        if field.name.endswith("_SELECTOR"):
            assert field_width(field) == FieldWidth.BITS_16


# Appendix B, by its tables: the encodings in each that belong to an offered feature.
@pytest.mark.parametrize(
    ("width", "kind", "encodings"),
    [
        (FieldWidth.BITS_16, FieldType.CONTROL, [0x0]),
        (FieldWidth.BITS_16, FieldType.READ_ONLY, []),
        (FieldWidth.BITS_16, FieldType.GUEST_STATE, [*range(0x800, 0x810, 2)]),
        (FieldWidth.BITS_16, FieldType.HOST_STATE, [*range(0xC00, 0xC0E, 2)]),
        (
            FieldWidth.BITS_64,
            FieldType.CONTROL,
            [*range(0x2000, 0x200C, 2), 0x2010, 0x2012, 0x201A, 0x202C, 0x202E],
        ),
        (FieldWidth.BITS_64, FieldType.READ_ONLY, [0x2400]),
        (FieldWidth.BITS_64, FieldType.GUEST_STATE, [*range(0x2800, 0x2808, 2), *range(0x280A, 0x2812, 2)]),
        (FieldWidth.BITS_64, FieldType.HOST_STATE, [0x2C00, 0x2C02]),
        (FieldWidth.BITS_32, FieldType.CONTROL, [*range(0x4000, 0x4020, 2)]),
        (FieldWidth.BITS_32, FieldType.READ_ONLY, [*range(0x4400, 0x4410, 2)]),
        (FieldWidth.BITS_32, FieldType.GUEST_STATE, [*range(0x4800, 0x4828, 2), 0x482A, 0x482E]),
        (FieldWidth.BITS_32, FieldType.HOST_STATE, [0x4C00]),
        (FieldWidth.NATURAL, FieldType.CONTROL, [*range(0x6000, 0x6008, 2)]),
        (FieldWidth.NATURAL, FieldType.READ_ONLY, [0x6400, 0x640A]),
        (FieldWidth.NATURAL, FieldType.GUEST_STATE, [*range(0x6800, 0x6828, 2)]),
        (FieldWidth.NATURAL, FieldType.HOST_STATE, [*range(0x6C00, 0x6C18, 2)]),
    ],
)
def test_fields_of_each_table_of_the_manual(width: FieldWidth, kind: FieldType, encodings: list[int]) -> None:
    fields = [field for field in VmcsField if (field_width(field), field_type(field)) == (width, kind)]
    assert fields == encodings


@given(st.integers(0, (1 << 64) - 1))
def test_every_encoding_can_be_taken_apart(encoding: int) -> None:
    parts = field_width(encoding), field_type(encoding), field_index(encoding)
    rebuilt = field_encoding(*parts) | is_high_access(encoding)
    assert rebuilt == encoding & ~ENCODING_RESERVED


# ---------------------------------------------------------------------------------------------------------- exits


# Numbers from appendix C and 31.4 that are easily confused.
def test_exit_reasons_and_errors_have_the_manuals_numbers() -> None:
    assert (ExitReason.CPUID, ExitReason.HLT, ExitReason.VMCALL, ExitReason.CR_ACCESS) == (10, 12, 18, 28)
    assert (ExitReason.INVALID_STATE, ExitReason.MSR_LOAD_FAIL, ExitReason.EPT_VIOLATION) == (33, 34, 48)
    assert (ExitReason.RDTSCP, ExitReason.PREEMPTION_TIMER, ExitReason.INVVPID) == (51, 52, 53)
    error = vmx.VmInstructionError
    assert (error.ENTRY_INVALID_CONTROL_FIELD, error.ENTRY_INVALID_HOST_STATE_FIELD) == (7, 8)
    assert (error.UNSUPPORTED_VMCS_COMPONENT, error.VMWRITE_READ_ONLY_VMCS_COMPONENT) == (12, 13)
    assert (error.ENTRY_EVENTS_BLOCKED_BY_MOV_SS, error.INVALID_OPERAND_TO_INVEPT_INVVPID) == (26, 28)


def test_qualification_of_control_register_accesses() -> None:
    assert cr_access_qualification(4, CrAccess.MOV_TO_CR, RBX) == 0x304
    assert cr_access_qualification(8, CrAccess.MOV_FROM_CR, 15) == 0xF18
    assert cr_access_qualification(0, CrAccess.CLTS) == 0x20
    assert cr_access_qualification(0, CrAccess.LMSW, lmsw_source=0xABCD) == 0xABCD0030
    assert cr_access_qualification(0, CrAccess.LMSW, lmsw_source=1, lmsw_from_memory=True) == 0x10070


def test_qualification_of_debug_register_accesses() -> None:
    assert dr_access_qualification(7, RCX, reads=False) == 0x107
    assert dr_access_qualification(6, RAX, reads=True) == 0x16


def test_qualification_of_port_io() -> None:
    assert io_qualification(0x70, 1, reads=False, immediate=True) == 0x700040
    assert io_qualification(0x1F0, 2, reads=True, string=True, rep=True) == 0x1F00039
    assert io_qualification(0xCFC, 4, reads=True) == 0xCFC000B


def test_qualification_of_task_switches() -> None:
    assert task_switch_qualification(0x40, TaskSwitchSource.CALL) == 0x40
    assert task_switch_qualification(0x48, TaskSwitchSource.GATE) == 0xC0000048


def test_information_of_memory_operands() -> None:
    # VMREAD [rbx + rcx * 8], rax
    assert memory_operand_information(
        address_size=8, segment=DS, base=RBX, index=RCX, scale=8, register2=RAX
    ) == (3 | 2 << 7 | DS << 15 | RCX << 18 | RBX << 23)
    # INVEPT r15, [disp32]
    assert memory_operand_information(address_size=4, segment=SS, base=None, index=None, register2=15) == (
        1 << 7 | SS << 15 | 1 << 22 | 1 << 27 | 15 << 28
    )


def test_information_of_other_operands() -> None:
    assert register_operand_information(RCX, RBX) == 1 << 10 | RCX << 3 | RBX << 28
    operand = memory_operand_information(address_size=2, segment=ES, base=RBX, index=None)
    assert descriptor_table_information(operand, instruction=3, operand_size=4) == operand | 1 << 11 | 3 << 28
    assert random_information(RBX, 8) == RBX << 3 | 2 << 11
    assert io_information(4, ES) == 1 << 7


def test_no_two_controls_of_a_field_share_a_bit() -> None:
    for prefix in ("PIN_BASED_", "CPU_BASED_", "SECONDARY_EXEC_", "VM_EXIT_", "VM_ENTRY_"):
        names = [
            name
            for name in vars(vmx)
            if name.startswith(prefix) and not name.endswith(("TRUE_MSR", "LEN_MAX"))
        ]
        values = [getattr(vmx, name) for name in names]
        assert len(values) > 3
        assert all(value.bit_count() == 1 for value in values)
        assert len(set(values)) == len(values)
