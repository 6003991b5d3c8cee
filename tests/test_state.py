"""One vCPU's state: reset values, the two views of its words, segments, snapshots."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasskvm import state as s
from lasskvm.state import STATE_WORDS, Segment, VcpuState, segment_word
from lasskvm.x86.registers import (
    AR_CODE,
    AR_LDT,
    AR_P,
    AR_S,
    AR_TYPE,
    AR_WRITABLE,
    CS,
    DS,
    ES,
    FS,
    GS,
    LDTR,
    SS,
    TR,
)

GENERAL_REGISTERS = range(s.RAX, s.R15 + 1)


def test_the_words_of_the_state_do_not_overlap() -> None:
    words = [
        *GENERAL_REGISTERS, s.RIP, s.RFLAGS, s.CPL,
        s.CR0, s.CR2, s.CR3, s.CR4, s.CR8, s.EFER, *range(s.PDPTR0, s.PDPTR0 + 4),
        s.DR0, s.DR1, s.DR2, s.DR3, s.DR6, s.DR7,
        *(segment_word(number, field) for number in range(8) for field in range(s.SEGMENT_WORDS)),
        s.GDT_BASE, s.GDT_LIMIT, s.IDT_BASE, s.IDT_LIMIT,
        s.STAR, s.LSTAR, s.CSTAR, s.SFMASK, s.KERNEL_GS_BASE, s.TSC_AUX,
        s.SYSENTER_CS, s.SYSENTER_ESP, s.SYSENTER_EIP, s.PAT, s.APIC_BASE, s.MISC_ENABLE, s.XCR0,
        s.INTERRUPT_SHADOW, s.NMI_BLOCKED, s.MAXPHYADDR, s.TLB_FLUSH, s.CR4_ALLOWED, s.EFER_ALLOWED,
    ]  # fmt: skip
    assert len(set(words)) == len(words)
    assert all(0 <= word < STATE_WORDS for word in words)


def test_general_registers_are_in_the_order_of_their_encodings() -> None:
    encodings = [s.RAX, s.RCX, s.RDX, s.RBX, s.RSP, s.RBP, s.RSI, s.RDI]
    assert encodings == list(range(8))
    assert [s.R8, s.R15] == [8, 15]


# ---- reset


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (s.RIP, 0xFFF0),
        (s.RFLAGS, 0x2),
        (s.CR0, 0x60000010),
        (s.CR2, 0),
        (s.CR3, 0),
        (s.CR4, 0),
        (s.EFER, 0),
        (s.DR6, 0xFFFF0FF0),
        (s.DR7, 0x400),
        (s.GDT_BASE, 0),
        (s.GDT_LIMIT, 0xFFFF),
        (s.IDT_BASE, 0),
        (s.IDT_LIMIT, 0xFFFF),
        (s.CPL, 0),
        (s.PAT, 0x0007040600070406),
        (s.APIC_BASE, 0xFEE00900),
        (s.XCR0, 1),
        (s.INTERRUPT_SHADOW, 0),
        (s.NMI_BLOCKED, 0),
    ],
)
def test_a_register_after_reset(word: int, value: int) -> None:
    assert VcpuState().words[word] == value


def test_rdx_holds_the_processor_signature_and_the_others_nothing_after_reset() -> None:
    words = VcpuState().words
    assert words[s.RDX] == 0x606A6
    assert not any(words[register] for register in GENERAL_REGISTERS if register != s.RDX)


def test_the_first_instruction_after_reset_is_16_bytes_below_4_gib() -> None:
    vcpu = VcpuState()
    assert vcpu.segment(CS).base + vcpu.words[s.RIP] == 0xFFFFFFF0
    assert vcpu.segment(CS).selector == 0xF000
    assert vcpu.segment(CS).attributes & AR_CODE


@pytest.mark.parametrize("number", [ES, SS, DS, FS, GS])
def test_a_data_segment_after_reset(number: int) -> None:
    segment = VcpuState().segment(number)
    assert (segment.selector, segment.base, segment.limit) == (0, 0, 0xFFFF)
    assert segment.attributes & (AR_P | AR_S | AR_CODE | AR_WRITABLE) == AR_P | AR_S | AR_WRITABLE


def test_the_system_segments_after_reset() -> None:
    vcpu = VcpuState()
    assert vcpu.segment(LDTR) == Segment(0, 0, 0xFFFF, AR_LDT)
    task = vcpu.segment(TR)
    assert (task.selector, task.base, task.limit) == (0, 0, 0xFFFF)
    assert task.attributes & AR_P
    assert task.attributes & AR_TYPE in (3, 11)


def test_reset_forgets_everything_but_what_cpuid_decided() -> None:
    vcpu = VcpuState()
    fresh = vcpu.to_bytes()
    vcpu.array[:] = 0x5555
    vcpu.words[s.MAXPHYADDR], vcpu.words[s.CR4_ALLOWED], vcpu.words[s.EFER_ALLOWED] = 39, 0x123, 0x456
    vcpu.reset()
    assert vcpu.words[s.MAXPHYADDR] == 39
    assert vcpu.words[s.CR4_ALLOWED] == 0x123
    assert vcpu.words[s.EFER_ALLOWED] == 0x456
    vcpu.words[s.MAXPHYADDR], vcpu.words[s.CR4_ALLOWED], vcpu.words[s.EFER_ALLOWED] = 46, 0, 0
    assert vcpu.to_bytes() == fresh


def test_reset_asks_for_a_tlb_flush() -> None:
    vcpu = VcpuState()
    vcpu.words[s.TLB_FLUSH] = 0
    vcpu.reset()
    assert vcpu.words[s.TLB_FLUSH] == 1


# ---- words


def test_words_and_array_are_the_same_memory() -> None:
    vcpu = VcpuState()
    vcpu.words[s.RAX] = 0xFFFF_FFFF_FFFF_FFFF
    assert int(vcpu.array[s.RAX]) == 0xFFFF_FFFF_FFFF_FFFF
    vcpu.array[s.R15] = 1 << 63
    assert vcpu.words[s.R15] == 1 << 63
    vcpu.reset()
    assert vcpu.words[s.RAX] == int(vcpu.array[s.RAX]) == 0


def test_words_are_python_integers() -> None:
    assert type(VcpuState().words[s.RIP]) is int
    assert VcpuState().array.dtype == np.uint64


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_a_word_has_64_bits(value: int) -> None:
    with pytest.raises(ValueError, match="invalid value"):
        VcpuState().words[s.RAX] = value


def test_two_states_are_two_vcpus() -> None:
    first, second = VcpuState(), VcpuState()
    first.words[s.RAX] = 1
    assert second.words[s.RAX] == 0


# ---- segments


@given(
    st.integers(0, 7),
    st.builds(
        Segment,
        st.integers(0, 0xFFFF),
        st.integers(0, (1 << 64) - 1),
        st.integers(0, (1 << 32) - 1),
        st.integers(0, 0x1FFFF),
    ),
)
def test_a_segment_register_holds_what_is_loaded(number: int, segment: Segment) -> None:
    vcpu = VcpuState()
    others = {other: vcpu.segment(other) for other in range(8) if other != number}
    vcpu.set_segment(number, segment)
    assert vcpu.segment(number) == segment
    assert {other: vcpu.segment(other) for other in others} == others


def test_the_words_of_a_segment_are_where_segment_word_says() -> None:
    vcpu = VcpuState()
    vcpu.set_segment(GS, Segment(0x1B, 0xFFFF_8000_0000_0000, 0xFFFFFFFF, 0xC0F3))
    assert vcpu.words[segment_word(GS, s.SELECTOR)] == 0x1B
    assert vcpu.words[segment_word(GS, s.BASE)] == 0xFFFF_8000_0000_0000
    assert vcpu.words[segment_word(GS, s.LIMIT)] == 0xFFFFFFFF
    assert vcpu.words[segment_word(GS, s.ATTRIBUTES)] == 0xC0F3


# ---- snapshots


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=STATE_WORDS, max_size=STATE_WORDS))
def test_a_state_survives_the_way_through_bytes(values: list[int]) -> None:
    saved, restored = VcpuState(), VcpuState()
    saved.array[:] = values
    restored.load_bytes(saved.to_bytes())
    for word, value in enumerate(values):
        assert restored.words[word] == (1 if word == s.TLB_FLUSH else value)


def test_a_restored_state_asks_for_a_tlb_flush() -> None:
    saved, restored = VcpuState(), VcpuState()
    saved.words[s.TLB_FLUSH] = restored.words[s.TLB_FLUSH] = 0
    restored.load_bytes(saved.to_bytes())
    assert restored.words[s.TLB_FLUSH] == 1


@pytest.mark.parametrize("length", [0, 1, 8, 8 * STATE_WORDS - 8, 8 * STATE_WORDS + 8])
def test_bytes_of_another_length_are_refused(length: int) -> None:
    vcpu = VcpuState()
    before = vcpu.to_bytes()
    with pytest.raises(ValueError, match="bytes"):
        vcpu.load_bytes(bytes(length))
    assert vcpu.to_bytes() == before
