"""Far RET in 64-bit mode: frames, privilege, stack segments, and what each forbidden return raises."""

from __future__ import annotations

import pytest
from emulator_guest import (
    ABSENT_CS,
    CONFORMING_CS,
    DPL1,
    DPL3,
    KERNEL_CS,
    KERNEL_SS,
    KERNEL_STACK,
    RING1_CS,
    RING1_SS,
    TSS_SELECTOR,
    UPPER,
    USER_CODE,
    USER_CS32,
    USER_CS64,
    USER_SS,
    USER_STACK,
    Guest,
)

from lasskvm.state import (
    CPL,
    RIP,
    RSP,
    Segment,
)
from lasskvm.x86.descriptors import make_segment
from lasskvm.x86.exceptions import GP, NP
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_CODE64,
    AR_DATA,
    AR_DB,
    AR_DPL_SHIFT,
    AR_P,
    AR_UNUSABLE,
    CS,
    DS,
    ES,
    FS,
    GS,
    SS,
)

RETFW, RETFD, RETFQ, RETFQ_16 = "66cb", "cb", "48cb", "48ca1000"

TARGET = UPPER + 0x12340
NOT_CANONICAL = 1 << 47
#: The last descriptor within the GDT's limit.
SPARE = 0x78
FLAT = 0xFFFFFFFF


def segment(guest: Guest, number: int) -> Segment:
    return guest.state.segment(number)


def push_frame(guest: Guest, *values: int, size: int = 8) -> None:
    """Put *values* on the stack, the first at RSP."""
    for number, value in enumerate(values):
        guest.store(guest.words[RSP] + size * number, size, value & (1 << 8 * size) - 1)


@pytest.mark.parametrize(("code", "size"), [(RETFW, 2), (RETFD, 4), (RETFQ, 8)])
def test_return_pops_rip_and_cs(guest: Guest, code: str, size: int) -> None:
    push_frame(guest, 0x1234, KERNEL_CS, size=size)
    guest.run(code)
    assert (guest.words[RIP], guest.words[RSP]) == (0x1234, KERNEL_STACK + 2 * size)


def test_return_ignores_what_lies_above_the_selector(guest: Guest) -> None:
    push_frame(guest, TARGET, 0xFFFF_FFFF_FFFF_0000 | KERNEL_CS)
    guest.run(RETFQ)
    assert segment(guest, CS).selector == KERNEL_CS


def test_return_to_user_mode_pops_the_stack(guest: Guest) -> None:
    push_frame(guest, USER_CODE, USER_CS64, USER_STACK, USER_SS)
    guest.run(RETFQ)
    words = guest.words
    assert (words[RIP], words[CPL], words[RSP]) == (USER_CODE, 3, USER_STACK)
    assert segment(guest, SS) == Segment(USER_SS, 0, FLAT, AR_DATA | DPL3)
    assert segment(guest, CS).selector == USER_CS64


def test_return_releases_parameters_of_both_stacks(guest: Guest) -> None:
    push_frame(guest, USER_CODE, USER_CS64, 0, 0, USER_STACK, USER_SS)
    guest.run(RETFQ_16)
    assert guest.words[RSP] == USER_STACK + 16
    assert segment(guest, SS).selector == USER_SS


def test_return_to_the_same_level_releases_parameters_once(guest: Guest) -> None:
    push_frame(guest, TARGET, KERNEL_CS)
    guest.run(RETFQ_16)
    assert guest.words[RSP] == KERNEL_STACK + 32


def test_return_to_compatibility_mode_uses_the_low_halves(guest: Guest) -> None:
    push_frame(guest, 0xABCD_0000_0000 | USER_CODE, USER_CS32, 0x1_0000_0000 | USER_STACK, USER_SS)
    guest.run(RETFQ)
    assert (guest.words[RIP], guest.words[RSP]) == (USER_CODE, USER_STACK)


def test_return_to_a_16_bit_stack_leaves_the_upper_half_of_esp(guest: Guest) -> None:
    guest.set_descriptor(SPARE, make_segment(0, 0xFFFF, AR_DATA & ~AR_DB | DPL3))
    push_frame(guest, USER_CODE, USER_CS32, 0x1234, SPARE | 3)
    guest.run(RETFQ)
    assert guest.words[RSP] == KERNEL_STACK & ~0xFFFF | 0x1234


@pytest.mark.parametrize(
    ("frame", "fault"),
    [
        ((TARGET, 0), (GP, 0)),
        ((TARGET, 0x80), (GP, 0x80)),
        ((TARGET, KERNEL_SS), (GP, KERNEL_SS)),
        ((TARGET, TSS_SELECTOR), (GP, TSS_SELECTOR)),
        ((TARGET, USER_CS64 & ~3), (GP, USER_CS64 & ~3)),
        ((TARGET, KERNEL_CS | 3), (GP, KERNEL_CS)),
        ((TARGET, ABSENT_CS), (NP, ABSENT_CS)),
        ((NOT_CANONICAL, KERNEL_CS), (GP, 0)),
        ((TARGET, USER_CS64, 0, 0), (GP, 0)),
        ((TARGET, USER_CS64, 0, 3), (GP, 0)),
        ((TARGET, RING1_CS, 0, 0), (GP, 0)),
        ((TARGET, USER_CS64, 0, KERNEL_SS), (GP, KERNEL_SS)),
        ((TARGET, USER_CS64, 0, USER_SS & ~3), (GP, USER_SS & ~3)),
        ((TARGET, USER_CS64, 0, USER_CS64), (GP, USER_CS64 & ~3)),
        ((TARGET, USER_CS64, 0, 0x83), (GP, 0x80)),
        ((NOT_CANONICAL, USER_CS64, 0, USER_SS), (GP, 0)),
    ],
    ids=[
        "null", "beyond", "data", "tss", "dpl above rpl", "dpl below rpl", "absent", "target", "null ss for user",
        "null ss with rpl 3", "null ss of another level", "ss of the kernel", "ss rpl", "ss code", "ss beyond",
        "target outside",
    ],
)  # fmt: skip
def test_forbidden_returns(guest: Guest, frame: tuple[int, ...], fault: tuple[int, int]) -> None:
    push_frame(guest, *frame)
    assert guest.fault_of(RETFQ) == fault


def test_return_inwards_is_a_general_protection(user: Guest) -> None:
    push_frame(user, TARGET, KERNEL_CS)
    assert user.fault_of(RETFQ) == (GP, KERNEL_CS)


def test_null_ss_of_ring_1_is_fine_for_64_bit_code_there(guest: Guest) -> None:
    push_frame(guest, TARGET, RING1_CS, KERNEL_STACK, 1)
    guest.run(RETFQ)
    assert guest.words[CPL] == 1
    assert segment(guest, SS) == Segment(1, 0, 0, AR_UNUSABLE | 1 << AR_DPL_SHIFT)


def test_null_ss_is_not_fine_for_compatibility_mode(guest: Guest) -> None:
    guest.set_descriptor(SPARE, make_segment(0, FLAT, AR_CODE32 | DPL1))
    push_frame(guest, 0x1000, SPARE | 1, KERNEL_STACK, 1)
    assert guest.fault_of(RETFQ) == (GP, 0)


def test_absent_stack_segment_is_a_stack_fault(guest: Guest) -> None:
    guest.set_descriptor(RING1_SS, make_segment(0, FLAT, AR_DATA & ~AR_P | DPL1))
    push_frame(guest, NOT_CANONICAL, RING1_CS, KERNEL_STACK, RING1_SS)
    assert guest.fault_of(RETFQ) == (STACK_FAULT, RING1_SS & ~3)


def test_return_to_user_mode_takes_the_kernels_data_segments_away(guest: Guest) -> None:
    base = 0x1234_5678_9ABC
    guest.state.set_segment(DS, Segment(KERNEL_SS, 0, FLAT, AR_DATA))
    guest.state.set_segment(ES, Segment(USER_SS, 0, FLAT, AR_DATA | DPL3))
    guest.state.set_segment(FS, Segment(3, base, 0, AR_UNUSABLE))
    guest.state.set_segment(GS, Segment(CONFORMING_CS, 0, FLAT, AR_CODE64 | 4))
    push_frame(guest, USER_CODE, USER_CS64, USER_STACK, USER_SS)
    guest.run(RETFQ)
    assert segment(guest, DS) == Segment(0, 0, 0, AR_UNUSABLE)
    assert segment(guest, ES).selector == USER_SS
    assert segment(guest, FS) == Segment(0, base, 0, AR_UNUSABLE)
    assert segment(guest, GS).selector == CONFORMING_CS


def test_return_to_conforming_code_takes_the_level_of_the_selector(guest: Guest) -> None:
    push_frame(guest, USER_CODE, CONFORMING_CS | 3, USER_STACK, USER_SS)
    guest.run(RETFQ)
    assert (guest.words[CPL], segment(guest, CS).selector) == (3, CONFORMING_CS | 3)


def test_far_return_pops_as_user(user: Guest) -> None:
    user.words[RSP] = KERNEL_STACK
    assert user.fault_of(RETFQ) == (STACK_FAULT, 0)
