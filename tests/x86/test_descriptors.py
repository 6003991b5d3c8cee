"""Descriptors, gates and task-state segments field by field."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lasskvm.x86 import descriptors as d
from lasskvm.x86.registers import (
    AR_CODE64,
    AR_DATA,
    AR_DPL,
    AR_G,
    AR_L,
    AR_P,
    AR_TSS16_BUSY,
    AR_TSS64_BUSY,
    AR_TYPE,
)

FLAT_CODE64 = 0x00AF9B000000FFFF
FLAT_DATA = 0x00CF93000000FFFF


def test_the_flat_64_bit_code_segment() -> None:
    assert d.segment_attributes(FLAT_CODE64) == AR_CODE64
    assert d.segment_attributes(FLAT_CODE64) & AR_L
    assert d.segment_base(FLAT_CODE64) == 0
    assert d.segment_limit(FLAT_CODE64) == 0xFFFFFFFF


def test_the_flat_data_segment() -> None:
    assert d.segment_attributes(FLAT_DATA) == AR_DATA


def test_base_and_limit_are_put_together_from_their_pieces() -> None:
    descriptor = 0x1245933456789ABC
    assert d.segment_base(descriptor) == 0x12345678
    assert d.segment_limit(descriptor) == 0x59ABC


def test_the_granularity_bit_scales_the_limit_and_fills_it_with_ones() -> None:
    assert d.segment_limit(0x00CF93000000FFFF) == 0xFFFFFFFF
    assert d.segment_limit(0x00C0930000000000) == 0xFFF
    assert d.segment_limit(0x0040930000000000) == 0


def test_limit_bits_are_not_attributes() -> None:
    assert d.segment_attributes(0x000F000000000000) == 0


def test_a_16_byte_descriptor_has_a_64_bit_base() -> None:
    assert d.segment_base64(0x1200893456780067, 0xFFFF8000) == 0xFFFF800012345678
    assert d.segment_base64(0x1200893456780067, 0xDEADBEEF_00000001) == 0x112345678


def test_the_second_half_of_a_16_byte_descriptor_has_no_type() -> None:
    assert d.high_is_valid(0xFFFFFFFF)
    assert d.high_is_valid(0xFFFFE0FF_FFFFFFFF)
    for bit in range(8, 13):
        assert not d.high_is_valid(1 << 32 + bit)


def test_a_64_bit_interrupt_gate() -> None:
    low, high = 0x8100_8E05_0010_2340, 0xFFFFFFFF
    assert d.gate_offset64(low, high) == 0xFFFFFFFF81002340
    assert d.gate_offset32(low) == 0x81002340
    assert d.gate_offset16(low) == 0x2340
    assert d.gate_selector(low) == 0x10
    assert d.gate_ist(low) == 5
    attributes = d.segment_attributes(low)
    assert attributes & AR_TYPE == d.SYS_INTERRUPT_GATE
    assert attributes & AR_P
    assert attributes & AR_DPL == 0


def test_a_call_gate_counts_its_parameters_in_five_bits() -> None:
    assert d.gate_parameters(0x0000_EC1F_0008_0000) == 31
    assert d.gate_parameters(0x0000_ECE0_0008_0000) == 0


def test_the_busy_bit_tells_the_two_kinds_of_tss_apart() -> None:
    assert d.SYS_TSS_AVAILABLE | d.SYS_TSS_BUSY_BIT == d.SYS_TSS_BUSY == AR_TSS64_BUSY & AR_TYPE
    assert d.SYS_TSS16_AVAILABLE | d.SYS_TSS_BUSY_BIT == d.SYS_TSS16_BUSY == AR_TSS16_BUSY & AR_TYPE
    available = d.make_segment(0, 0x67, AR_P | d.SYS_TSS_AVAILABLE)
    assert d.segment_attributes(available | d.DESCRIPTOR_TSS_BUSY) == AR_TSS64_BUSY


def test_the_fields_of_a_64_bit_tss_do_not_overlap() -> None:
    assert [d.TSS64_RSP0 + n * d.TSS64_STACK_BYTES for n in range(3)] == [
        d.TSS64_RSP0,
        d.TSS64_RSP1,
        d.TSS64_RSP2,
    ]
    assert d.TSS64_IST1 + 6 * d.TSS64_STACK_BYTES == d.TSS64_IST7
    assert d.TSS64_IST7 + 8 <= d.TSS64_IO_MAP_BASE == d.TSS64_BYTES - 2


def test_the_stacks_of_a_32_bit_tss() -> None:
    for level, (esp, ss) in enumerate(
        [(d.TSS32_ESP0, d.TSS32_SS0), (d.TSS32_ESP1, d.TSS32_SS1), (d.TSS32_ESP2, d.TSS32_SS2)]
    ):
        assert esp == d.TSS32_ESP0 + level * d.TSS32_STACK_BYTES
        assert ss == esp + d.TSS32_STACK_SS
    assert d.TSS32_EAX + 8 * 4 == d.TSS32_ES
    assert d.TSS32_ES + 6 * 4 == d.TSS32_LDT


def test_the_stacks_of_a_16_bit_tss() -> None:
    for level, (sp, ss) in enumerate(
        [(d.TSS16_SP0, d.TSS16_SS0), (d.TSS16_SP1, d.TSS16_SS1), (d.TSS16_SP2, d.TSS16_SS2)]
    ):
        assert sp == d.TSS16_SP0 + level * d.TSS16_STACK_BYTES
        assert ss == sp + d.TSS16_STACK_SS
    assert d.TSS16_AX + 8 * 2 == d.TSS16_ES
    assert d.TSS16_ES + 4 * 2 == d.TSS16_LDT == d.TSS16_BYTES - 2


ATTRIBUTES = st.integers(0, 0xFFFF).map(lambda value: value & 0xF0FF)


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFF), ATTRIBUTES)
def test_a_segment_descriptor_gives_back_what_it_was_made_of(base: int, limit: int, attributes: int) -> None:
    bytes_limit = limit << 12 | 0xFFF if attributes & AR_G else limit
    descriptor = d.make_segment(base, bytes_limit, attributes)
    assert 0 <= descriptor < 1 << 64
    assert d.segment_base(descriptor) == base
    assert d.segment_limit(descriptor) == bytes_limit
    assert d.segment_attributes(descriptor) == attributes


@given(st.integers(0, (1 << 64) - 1), st.integers(0, 0xFFFF), st.integers(0, 0xFF), st.integers(0, 7))
def test_a_gate_gives_back_what_it_was_made_of(offset: int, selector: int, attributes: int, ist: int) -> None:
    low = d.make_gate(offset, selector, attributes, ist)
    assert 0 <= low < 1 << 64
    assert d.gate_offset64(low, offset >> 32) == offset
    assert d.gate_selector(low) == selector
    assert d.segment_attributes(low) & 0xFF == attributes
    assert d.gate_ist(low) == d.gate_parameters(low) == ist
