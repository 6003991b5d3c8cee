"""A VMCS: VMREAD and VMWRITE, and its format in guest memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lasskvm.memory import PAGE_SIZE, SLOT_READONLY, GuestMemory
from lasskvm.vmx.vmcs import (
    VMCS12_REVISION,
    Vmcs12,
    VmFailValid,
    field_offset,
    revision_id,
    set_abort_indicator,
    set_clear,
)
from lasskvm.x86.vmx import VmInstructionError, VmxAbort
from lasskvm.x86.vmx_fields import FIELD_BYTES, FieldType, FieldWidth, VmcsField, field_type, field_width

REGION = 0x3000
ALL_ONES = (1 << 64) - 1

fields = st.sampled_from(list(VmcsField))
values = st.integers(0, ALL_ONES)
#: Anything a register can hold, and much of what is near the fields.
encodings = st.one_of(values, st.integers(0, 0x7FFF), fields, fields.map(lambda field: field | 1))


def memory_with(page: bytes = b"") -> GuestMemory:
    memory = GuestMemory()
    memory.set_slot(0, 0, mmap.mmap(-1, 0x10000))
    memory.write(REGION, page)
    return memory


def width_mask(field: VmcsField) -> int:
    return (1 << 8 * FIELD_BYTES[field_width(field)]) - 1


def error_of_read(encoding: int) -> VmInstructionError:
    with pytest.raises(VmFailValid) as failure:
        Vmcs12().read(encoding)
    return failure.value.error


def error_of_write(encoding: int, *, any_field: bool) -> VmInstructionError:
    with pytest.raises(VmFailValid) as failure:
        Vmcs12().write(encoding, 1, any_field=any_field)
    return failure.value.error


def failure_of(access: Callable[[], None]) -> VmInstructionError | None:
    try:
        access()
    except VmFailValid as failure:
        return failure.error
    return None


# ------------------------------------------------------------------------------------------------ VMREAD, VMWRITE


def test_vmread_returns_what_vmwrite_wrote_cut_to_the_width() -> None:
    for field in VmcsField:
        vmcs = Vmcs12()
        vmcs.write(field, ALL_ONES, any_field=True)
        expected = 0x1F0FF if field.name.endswith("_AR_BYTES") else width_mask(field)
        assert vmcs.read(field) == expected, field.name
        assert [key for key, bits in vmcs.items() if bits] == [field]


def test_high_access_is_the_upper_half_of_a_64_bit_field() -> None:
    vmcs = Vmcs12()
    vmcs.write(VmcsField.EPT_POINTER, 0x1111_2222_3333_4444, any_field=False)
    assert vmcs.read(VmcsField.EPT_POINTER | 1) == 0x1111_2222
    vmcs.write(VmcsField.EPT_POINTER | 1, 0xAAAA_BBBB_CCCC_DDDD, any_field=False)
    assert vmcs[VmcsField.EPT_POINTER] == 0xCCCC_DDDD_3333_4444


def test_full_access_by_a_32_bit_operand_clears_the_upper_half() -> None:
    vmcs = Vmcs12()
    vmcs[VmcsField.TSC_OFFSET] = ALL_ONES
    vmcs.write(VmcsField.TSC_OFFSET, 0x8000_0001, any_field=False)
    assert vmcs[VmcsField.TSC_OFFSET] == 0x8000_0001


def test_only_64_bit_fields_have_an_upper_half() -> None:
    for field in VmcsField:
        if field_width(field) != FieldWidth.BITS_64:
            assert error_of_read(field | 1) == VmInstructionError.UNSUPPORTED_VMCS_COMPONENT
            assert error_of_write(field | 1, any_field=True) == VmInstructionError.UNSUPPORTED_VMCS_COMPONENT


@pytest.mark.parametrize(
    "encoding",
    [
        0x0002,  # posted-interrupt vector: no posted interrupts
        0x0004,  # EPTP index: no #VE
        0x200C,  # executive-VMCS pointer: no SMM monitor
        0x2014,  # APIC-access address: not offered
        0x2808,  # guest IA32_PERF_GLOBAL_CTRL
        0x4020,  # PLE gap
        0x4828,  # SMBASE
        0x6008,  # CR3-target value 0: there are none
        0x1800,  # reserved bit 12
        0x8000 | VmcsField.GUEST_RIP,
        1 << 32 | VmcsField.GUEST_RIP,
        ALL_ONES,
    ],
)
def test_encodings_without_a_field_fail_with_error_12(encoding: int) -> None:
    assert error_of_read(encoding) == 12
    assert error_of_write(encoding, any_field=True) == 12
    assert error_of_write(encoding, any_field=False) == 12


def test_read_only_fields_are_written_only_where_vmwrite_writes_any_field() -> None:
    read_only = [field for field in VmcsField if field_type(field) == FieldType.READ_ONLY]
    assert VmcsField.VM_EXIT_REASON in read_only
    for field in read_only:
        assert error_of_write(field, any_field=False) == 13
        vmcs = Vmcs12()
        vmcs.write(field, 7, any_field=True)
        assert vmcs.read(field) == 7


@given(encodings, values, st.booleans())
@example(VmcsField.GUEST_PHYSICAL_ADDRESS | 1, 1, False)
def test_random_encodings_end_in_defined_failures_and_change_nothing(
    encoding: int, value: int, any_field: bool
) -> None:
    vmcs = Vmcs12()
    failed = failure_of(lambda: vmcs.write(encoding, value, any_field=any_field))
    assert failed in (None, 12, 13)
    assert failed is None or vmcs == Vmcs12()
    read: list[int] = []
    failed_too = failure_of(lambda: read.append(vmcs.read(encoding)))
    assert failed_too == (12 if failed == 12 else None)
    assert all(bits & ~value == 0 for bits in read)


# ------------------------------------------------------------------------------------------------- in guest memory


def vmcs_of(contents: dict[VmcsField, int], launched: bool, abort: int) -> Vmcs12:
    vmcs = Vmcs12()
    vmcs.launched, vmcs.abort = launched, abort
    for field, value in contents.items():
        vmcs[field] = value
    return vmcs


@given(st.dictionaries(fields, values), st.booleans(), st.integers(0, (1 << 32) - 1))
def test_what_is_stored_is_loaded(contents: dict[VmcsField, int], launched: bool, abort: int) -> None:
    memory, vmcs = memory_with(), vmcs_of(contents, launched, abort)
    vmcs.store(memory, REGION)
    assert Vmcs12.load(memory, REGION) == vmcs
    assert revision_id(memory, REGION) == VMCS12_REVISION
    assert memory.read(REGION - 8, 8) == bytes(8)
    assert memory.read(REGION + PAGE_SIZE, 8) == bytes(8)


@given(st.integers())
def test_any_page_loads_and_keeps_its_fields_when_it_is_stored(seed: int) -> None:
    memory = memory_with(Random(seed).randbytes(PAGE_SIZE))
    vmcs = Vmcs12.load(memory, REGION)
    for field in VmcsField:
        assert vmcs.read(field) == memory.load(REGION + field_offset(field), FIELD_BYTES[field_width(field)])
    vmcs.store(memory, REGION)
    assert Vmcs12.load(memory, REGION) == vmcs


def test_format_is_that_of_the_documentation() -> None:
    memory = memory_with()
    contents = {
        VmcsField.VIRTUAL_PROCESSOR_ID: 0x1122,
        VmcsField.HOST_TR_SELECTOR: 0x40,
        VmcsField.GUEST_CS_LIMIT: 0xFFFF,
        VmcsField.VMCS_LINK_POINTER: ALL_ONES,
        VmcsField.HOST_RIP: 0xFFFF_FFFF_8100_0000,
    }
    vmcs_of(contents, launched=True, abort=4).store(memory, REGION)
    assert memory.read(REGION, 12) == b"LKV1" + (4).to_bytes(4, "little") + (1).to_bytes(4, "little")
    assert memory.load(REGION + 0x040, 2) == 0x1122
    assert memory.load(REGION + 0x040 + (3 * 32 + 6) * 2, 2) == 0x40
    assert memory.load(REGION + 0x140 + (2 * 32 + 1) * 4, 4) == 0xFFFF
    assert memory.load(REGION + 0x340 + (2 * 32 + 0) * 8, 8) == ALL_ONES
    assert memory.load(REGION + 0x740 + (3 * 32 + 11) * 8, 8) == 0xFFFF_FFFF_8100_0000


def test_fields_do_not_overlap_and_fit_into_the_page() -> None:
    taken: set[int] = set()
    for field in VmcsField:
        place = range(field_offset(field), field_offset(field) + FIELD_BYTES[field_width(field)])
        assert not taken & set(place), field.name
        taken |= set(place)
    assert min(taken) >= 12
    assert max(taken) < PAGE_SIZE


def test_revision_identifier_is_no_shadow_vmcs() -> None:
    assert 0 < VMCS12_REVISION < 1 << 31


def test_vmclear_changes_the_launch_state_and_nothing_else() -> None:
    memory, vmcs = memory_with(), vmcs_of({VmcsField.GUEST_RIP: 0x1234}, launched=True, abort=0)
    vmcs.store(memory, REGION)
    set_clear(memory, REGION)
    assert Vmcs12.load(memory, REGION) == vmcs_of({VmcsField.GUEST_RIP: 0x1234}, launched=False, abort=0)


def test_abort_indicator_is_found_where_the_manual_puts_it() -> None:
    memory = memory_with()
    Vmcs12().store(memory, REGION)
    set_abort_indicator(memory, REGION, VmxAbort.LOAD_HOST_MSR_FAIL)
    assert memory.load(REGION + 4, 4) == 4
    assert Vmcs12.load(memory, REGION).abort == VmxAbort.LOAD_HOST_MSR_FAIL


def test_vmcs_outside_memory_reads_as_ones_and_is_not_stored() -> None:
    memory = memory_with()
    for gpa in (0x40_0000, ALL_ONES & ~(PAGE_SIZE - 1)):
        vmcs = Vmcs12.load(memory, gpa)
        assert vmcs[VmcsField.GUEST_RIP] == ALL_ONES
        assert not vmcs.launched
        vmcs.store(memory, gpa)
        set_clear(memory, gpa)
        assert revision_id(memory, gpa) == 0xFFFF_FFFF


def test_vmcs_in_read_only_memory_keeps_what_it_was() -> None:
    memory = memory_with()
    memory.set_slot(1, 0x20000, mmap.mmap(-1, PAGE_SIZE), SLOT_READONLY)
    Vmcs12().store(memory, 0x20000)
    assert revision_id(memory, 0x20000) == 0
