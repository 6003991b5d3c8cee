"""Far JMP and CALL in 64-bit mode: privilege, gates, stacks, and what each forbidden transfer raises."""

from __future__ import annotations

import pytest
from emulator_guest import (
    ABSENT_CS,
    CODE,
    CONFORMING_CS,
    DPL1,
    DPL3,
    GDT,
    KERNEL_CS,
    KERNEL_CS32,
    KERNEL_SS,
    KERNEL_STACK,
    RING0_STACK,
    RING1_CS,
    TSS,
    TSS_SELECTOR,
    UPPER,
    USER_CODE,
    USER_CS32,
    USER_CS64,
    USER_SS,
    USER_STACK,
    Guest,
)
from legacy_modes import (
    enter_compatibility_mode,
)
from legacy_modes import run as run_legacy

from lasskvm.emulator.faults import GuestFault
from lasskvm.state import (
    CPL,
    GDT_BASE,
    GDT_LIMIT,
    INTERRUPT_SHADOW,
    LIMIT,
    RAX,
    RFLAGS,
    RIP,
    RSP,
    Segment,
    segment_word,
)
from lasskvm.x86.descriptors import SYS_CALL_GATE, SYS_CALL_GATE16, TSS64_RSP0, make_gate, make_segment
from lasskvm.x86.exceptions import DB, GP, NP, PF, PF_P, PF_U, PF_W
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.exceptions import TS as INVALID_TSS
from lasskvm.x86.registers import (
    AR_ACCESSED,
    AR_CODE32,
    AR_CODE64,
    AR_DATA,
    AR_DB,
    AR_DPL_SHIFT,
    AR_P,
    AR_UNUSABLE,
    CS,
    RFLAGS_AC,
    RFLAGS_RF,
    RFLAGS_TF,
    SS,
)

JMP16, JMP32, JMP64 = "66ff28", "ff28", "48ff28"
CALL16, CALL32, CALL64 = "66ff18", "ff18", "48ff18"

POINTER, USER_POINTER = UPPER + 0x70000, 0x70000
TARGET = UPPER + 0x12340
NOT_CANONICAL = 1 << 47
#: The last descriptors within the GDT's limit; a 64-bit gate needs both.
GATE, AFTER_GATE = 0x78, 0x80
FLAT = 0xFFFFFFFF
CALL_GATE = AR_P | SYS_CALL_GATE | DPL3


def point(guest: Guest, selector: int, offset: int, size: int = 8) -> None:
    """Let RAX point to a far pointer with an offset of *size* bytes."""
    where = USER_POINTER if guest.words[CPL] == 3 else POINTER
    guest.words[RAX] = where
    guest.store(where, size, offset & (1 << 8 * size) - 1)
    guest.store(where + size, 2, selector)


def fault_of(guest: Guest, code: str, selector: int, offset: int = TARGET) -> tuple[int, int | None]:
    """What *code*, with a 64-bit offset, faults with; the state must be as before."""
    point(guest, selector, offset)
    return guest.fault_of(code)


def segment(guest: Guest, number: int) -> Segment:
    return guest.state.segment(number)


def set_gate(
    guest: Guest, selector: int = KERNEL_CS, entry: int = TARGET, attributes: int = CALL_GATE, high: int = 0
) -> None:
    """A 64-bit call gate in ``GATE``; *high* is added to its second half."""
    guest.words[GDT_LIMIT] = AFTER_GATE + 7
    guest.set_descriptor(GATE, make_gate(entry, selector, attributes, 0))
    guest.set_descriptor(AFTER_GATE, entry >> 32 | high)


# ---------------------------------------------------------------------------------- JMP without a gate, 64-bit


def test_jump_loads_cs_and_rip_and_nothing_else(guest: Guest) -> None:
    point(guest, KERNEL_CS, TARGET)
    guest.run(JMP64)
    assert (guest.words[RIP], guest.words[RSP]) == (TARGET, KERNEL_STACK)
    assert segment(guest, CS) == Segment(KERNEL_CS, 0, FLAT, AR_CODE64)


@pytest.mark.parametrize(("code", "size"), [(JMP16, 2), (JMP32, 4)])
def test_shorter_offset_is_zero_extended(guest: Guest, code: str, size: int) -> None:
    point(guest, KERNEL_CS, 0xFEDCBA98, size)
    guest.run(code)
    assert guest.words[RIP] == 0xFEDCBA98 & (1 << 8 * size) - 1


def test_jump_ends_rf_and_the_interrupt_shadow(guest: Guest) -> None:
    guest.words[RFLAGS] |= RFLAGS_RF
    guest.words[INTERRUPT_SHADOW] = 1
    point(guest, KERNEL_CS, TARGET)
    guest.run(JMP64)
    assert not guest.words[RFLAGS] & RFLAGS_RF
    assert not guest.words[INTERRUPT_SHADOW]


def test_single_stepped_jump_traps_at_the_target(guest: Guest) -> None:
    guest.words[RFLAGS] |= RFLAGS_TF
    point(guest, KERNEL_CS, TARGET)
    with pytest.raises(GuestFault) as caught:
        guest.run(JMP64)
    assert (caught.value.vector, guest.words[RIP]) == (DB, TARGET)


def test_jump_sets_the_accessed_bit_in_the_table_and_in_cs(guest: Guest) -> None:
    guest.set_descriptor(KERNEL_CS, make_segment(0, FLAT, AR_CODE64 & ~AR_ACCESSED))
    point(guest, KERNEL_CS, TARGET)
    guest.run(JMP64)
    assert guest.descriptor(KERNEL_CS) >> 40 & AR_ACCESSED
    assert segment(guest, CS).attributes & AR_ACCESSED


def test_kernel_may_jump_into_the_lower_half_and_faults_there(guest: Guest) -> None:
    point(guest, KERNEL_CS, USER_CODE)
    guest.run(JMP64)
    assert guest.words[RIP] == USER_CODE


def test_jump_to_compatibility_mode_uses_the_low_half_of_the_offset(guest: Guest) -> None:
    point(guest, KERNEL_CS32, 0x1234_0000_5678)
    guest.run(JMP64)
    assert (guest.words[RIP], guest.words[RSP]) == (0x5678, KERNEL_STACK)
    assert segment(guest, CS).attributes == AR_CODE32


def test_limit_counts_in_compatibility_mode_only(guest: Guest) -> None:
    guest.set_descriptor(KERNEL_CS32, make_segment(0, 0xFFF, AR_CODE32 & ~(1 << 15)))
    assert fault_of(guest, JMP64, KERNEL_CS32, 0x1000) == (GP, 0)
    guest.set_descriptor(KERNEL_CS, make_segment(0, 0, AR_CODE64 & ~(1 << 15)))
    point(guest, KERNEL_CS, TARGET)
    guest.run(JMP64)
    assert guest.words[RIP] == TARGET


def test_target_must_be_canonical(guest: Guest) -> None:
    assert fault_of(guest, JMP64, KERNEL_CS, NOT_CANONICAL) == (GP, 0)


@pytest.mark.parametrize("selector", [0, 3])
def test_null_selector_is_a_general_protection(guest: Guest, selector: int) -> None:
    assert fault_of(guest, JMP64, selector) == (GP, 0)


@pytest.mark.parametrize(
    ("selector", "fault"),
    [
        (0x80, (GP, 0x80)),
        (KERNEL_SS, (GP, KERNEL_SS)),
        (USER_CS64, (GP, USER_CS64 & ~3)),
        (KERNEL_CS | 1, (GP, KERNEL_CS)),
        (RING1_CS & ~3, (GP, RING1_CS & ~3)),
        (TSS_SELECTOR, (GP, TSS_SELECTOR)),
        (ABSENT_CS, (NP, ABSENT_CS)),
    ],
    ids=["beyond", "data", "outer", "rpl", "dpl", "tss", "absent"],
)
@pytest.mark.parametrize("code", [JMP64, CALL64])
def test_forbidden_segments(guest: Guest, code: str, selector: int, fault: tuple[int, int]) -> None:
    assert fault_of(guest, code, selector) == fault


@pytest.mark.parametrize("code", [JMP64, CALL64])
def test_64_bit_code_with_32_bit_operands_does_not_exist(guest: Guest, code: str) -> None:
    guest.set_descriptor(GATE, make_segment(0, FLAT, AR_CODE64 | AR_DB))
    assert fault_of(guest, code, GATE) == (GP, GATE)


def test_privilege_is_checked_before_presence(guest: Guest) -> None:
    guest.set_descriptor(GATE, make_segment(0, FLAT, AR_CODE64 & ~AR_P | DPL1))
    assert fault_of(guest, JMP64, GATE) == (GP, GATE)


def test_presence_is_checked_before_the_target(guest: Guest) -> None:
    assert fault_of(guest, JMP64, ABSENT_CS, NOT_CANONICAL) == (NP, ABSENT_CS)


@pytest.mark.parametrize("rpl", [0, 3])
def test_conforming_code_runs_at_the_level_of_the_caller(user: Guest, rpl: int) -> None:
    point(user, CONFORMING_CS | rpl, USER_CODE)
    user.run(JMP64)
    assert (user.words[CPL], segment(user, CS).selector) == (3, CONFORMING_CS | 3)


def test_less_privileged_conforming_code_is_out_of_reach(guest: Guest) -> None:
    guest.set_descriptor(GATE, make_segment(0, FLAT, AR_CODE64 | 4 | DPL1))
    assert fault_of(guest, JMP64, GATE) == (GP, GATE)


# ------------------------------------------------------------------------------- which access is whose, and LASS


def test_user_pointer_in_the_upper_half_violates_lass(user: Guest) -> None:
    user.words[RAX] = POINTER
    assert user.fault_of(JMP64) == (GP, 0)


def test_pointer_based_on_rsp_is_a_stack_access(user: Guest) -> None:
    user.words[RSP] = POINTER
    assert user.fault_of("48ff2c24") == (STACK_FAULT, 0)


def test_pointer_whose_selector_lies_on_an_absent_page_is_a_page_fault_there(user: Guest) -> None:
    user.words[RAX] = USER_POINTER + 0xFF8
    user.unmap(USER_POINTER + 0x1000)
    user.write_code(bytes.fromhex(JMP64))
    with pytest.raises(GuestFault) as caught:
        user.run(JMP64)
    assert (caught.value.vector, caught.value.error_code) == (PF, PF_U)
    assert caught.value.cr2 == USER_POINTER + 0x1000


def test_descriptor_is_read_as_an_implicit_supervisor_access(user: Guest) -> None:
    point(user, USER_CS64, USER_CODE + 0x100)
    user.run(JMP64)
    assert user.words[RIP] == USER_CODE + 0x100
    user.words[GDT_BASE] = GDT - UPPER
    user.words[RFLAGS] |= RFLAGS_AC
    assert fault_of(user, JMP64, USER_CS64, USER_CODE) == (GP, 0)


def test_user_call_pushes_as_user(user: Guest) -> None:
    point(user, USER_CS64, USER_CODE)
    user.words[RSP] = KERNEL_STACK
    assert user.fault_of(CALL64) == (STACK_FAULT, 0)


def test_push_that_fails_on_a_page_is_a_user_write(user: Guest) -> None:
    point(user, USER_CS64, USER_CODE)
    user.write_protect(USER_STACK - 8)
    assert user.fault_of(CALL64) == (PF, PF_P | PF_W | PF_U)


def test_kernel_call_on_a_user_stack_needs_ac(guest: Guest) -> None:
    point(guest, KERNEL_CS, TARGET)
    guest.words[RSP] = USER_STACK
    assert guest.fault_of(CALL64) == (STACK_FAULT, 0)
    guest.words[RFLAGS] |= RFLAGS_AC
    guest.run(CALL64)
    assert guest.words[RSP] == USER_STACK - 16


# --------------------------------------------------------------------------------- CALL without a gate, 64-bit


@pytest.mark.parametrize(("code", "size"), [(CALL16, 2), (CALL32, 4), (CALL64, 8)])
def test_call_pushes_cs_and_the_next_rip_in_the_operand_size(guest: Guest, code: str, size: int) -> None:
    point(guest, KERNEL_CS, 0x1234, size)
    guest.run(code)
    assert guest.words[RSP] == KERNEL_STACK - 2 * size
    pushed = [guest.load(guest.words[RSP] + size * number, size) for number in range(2)]
    assert pushed == [CODE + len(code) // 2 & (1 << 8 * size) - 1, KERNEL_CS]
    assert guest.words[RIP] == 0x1234


def test_call_checks_the_stack_before_the_target(guest: Guest) -> None:
    guest.words[RSP] = NOT_CANONICAL + 8
    assert fault_of(guest, CALL64, KERNEL_CS, NOT_CANONICAL) == (STACK_FAULT, 0)
    guest.words[RSP] = KERNEL_STACK
    assert fault_of(guest, CALL64, KERNEL_CS, NOT_CANONICAL) == (GP, 0)


def test_failed_call_pushes_nothing(guest: Guest) -> None:
    guest.store(KERNEL_STACK - 16, 8, 0x1111)
    guest.store(KERNEL_STACK - 8, 8, 0x2222)
    assert fault_of(guest, CALL64, KERNEL_CS, NOT_CANONICAL) == (GP, 0)
    assert (guest.load(KERNEL_STACK - 16), guest.load(KERNEL_STACK - 8)) == (0x1111, 0x2222)


# ------------------------------------------------------------------------------------------ 64-bit call gates


def test_gate_leads_from_user_mode_to_the_stack_in_the_tss(user: Guest) -> None:
    set_gate(user)
    point(user, GATE, 0xDEAD)
    user.run(CALL64)
    assert (user.words[RIP], user.words[CPL], segment(user, CS).selector) == (TARGET, 0, KERNEL_CS)
    assert user.words[RSP] == RING0_STACK - 32
    assert user.frame(4) == [USER_CODE + 3, USER_CS64, USER_STACK, USER_SS]
    assert segment(user, SS) == Segment(0, 0, 0, AR_UNUSABLE)


def test_gate_to_ring_1_makes_a_null_ss_of_that_ring(user: Guest) -> None:
    set_gate(user, RING1_CS)
    user.store(TSS + TSS64_RSP0 + 8, 8, KERNEL_STACK)
    point(user, GATE, 0)
    user.run(CALL64)
    assert (user.words[CPL], user.words[RSP]) == (1, KERNEL_STACK - 32)
    assert segment(user, SS) == Segment(1, 0, 0, AR_UNUSABLE | 1 << AR_DPL_SHIFT)


def test_gate_to_the_same_level_stays_on_the_stack(guest: Guest) -> None:
    set_gate(guest)
    point(guest, GATE, 0, 4)
    guest.run(CALL32)
    assert (guest.words[RIP], guest.words[RSP]) == (TARGET, KERNEL_STACK - 16)
    assert guest.frame(2) == [CODE + 2, KERNEL_CS]


def test_gate_to_conforming_code_does_not_change_the_level(user: Guest) -> None:
    set_gate(user, CONFORMING_CS, USER_CODE)
    point(user, GATE, 0)
    user.run(CALL64)
    assert (user.words[CPL], user.words[RSP]) == (3, USER_STACK - 16)
    assert segment(user, CS).selector == CONFORMING_CS | 3


def test_gate_leads_out_of_compatibility_mode(guest: Guest) -> None:
    enter_compatibility_mode(guest)
    set_gate(guest)
    guest.memory.write(USER_CODE, bytes.fromhex("9a000000007b00"))
    run_legacy(guest, "9a000000007b00")
    assert (guest.words[RIP], guest.words[CPL]) == (TARGET, 0)
    assert guest.frame(4) == [USER_CODE + 7, USER_CS32, USER_STACK, USER_SS]


def test_gate_out_of_compatibility_mode_on_the_same_level_leaves_the_stack_segment_behind(
    guest: Guest,
) -> None:
    enter_compatibility_mode(guest)
    guest.state.set_segment(SS, Segment(USER_SS, 0x10000, FLAT, AR_DATA | DPL3))
    set_gate(guest, USER_CS64, USER_CODE)
    run_legacy(guest, "9a000000007b00")
    assert (guest.words[RIP], guest.words[CPL], guest.words[RSP]) == (USER_CODE, 3, USER_STACK - 16)
    assert guest.frame(2) == [USER_CODE + 7, USER_CS32]
    assert segment(guest, SS).base == 0x10000


def test_jump_through_a_gate_takes_only_rip_from_it(guest: Guest) -> None:
    set_gate(guest)
    point(guest, GATE, 0)
    guest.run(JMP64)
    assert (guest.words[RIP], guest.words[RSP]) == (TARGET, KERNEL_STACK)


@pytest.mark.parametrize("present", [True, False])
def test_jump_through_a_gate_cannot_change_the_level(user: Guest, present: bool) -> None:
    user.set_descriptor(KERNEL_CS, make_segment(0, FLAT, AR_CODE64 & ~(0 if present else AR_P)))
    set_gate(user)
    assert fault_of(user, JMP64, GATE) == (GP, KERNEL_CS)


@pytest.mark.parametrize("code", [JMP64, CALL64])
@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"attributes": AR_P | SYS_CALL_GATE}, (GP, GATE)),
        ({"attributes": SYS_CALL_GATE | DPL3}, (NP, GATE)),
        ({"attributes": SYS_CALL_GATE}, (GP, GATE)),
        ({"attributes": AR_P | SYS_CALL_GATE16 | DPL3}, (GP, GATE)),
        ({"high": 1 << 40}, (GP, GATE)),
        ({"selector": 3}, (GP, 0)),
        ({"selector": 0x1000}, (GP, 0x1000)),
        ({"selector": USER_SS}, (GP, USER_SS & ~3)),
        ({"selector": USER_CS32}, (GP, USER_CS32 & ~3)),
        ({"entry": NOT_CANONICAL, "selector": USER_CS64}, (GP, 0)),
    ],
    ids=[
        "dpl",
        "absent",
        "dpl first",
        "16-bit",
        "type above",
        "null",
        "beyond",
        "data",
        "32-bit code",
        "entry",
    ],
)
def test_forbidden_gates(user: Guest, code: str, changes: dict[str, int], fault: tuple[int, int]) -> None:
    set_gate(user, **changes)
    assert fault_of(user, code, GATE | 3) == fault


def test_rpl_weakens_the_caller_of_a_gate(guest: Guest) -> None:
    set_gate(guest, attributes=AR_P | SYS_CALL_GATE)
    assert fault_of(guest, CALL64, GATE | 1) == (GP, GATE)


def test_absent_code_behind_a_gate_is_not_present(user: Guest) -> None:
    set_gate(user, ABSENT_CS)
    assert fault_of(user, CALL64, GATE) == (NP, ABSENT_CS)


def test_gate_of_16_bytes_must_lie_within_the_table(user: Guest) -> None:
    set_gate(user)
    user.words[GDT_LIMIT] = AFTER_GATE + 6
    assert fault_of(user, CALL64, GATE) == (GP, GATE)


def test_gate_needs_a_tss_that_holds_the_stack_pointer(user: Guest) -> None:
    set_gate(user)
    user.words[segment_word(7, LIMIT)] = TSS64_RSP0 + 6
    assert fault_of(user, CALL64, GATE) == (INVALID_TSS, TSS_SELECTOR)


@pytest.mark.parametrize("rsp0", [NOT_CANONICAL, NOT_CANONICAL + 24, USER_STACK, 16])
def test_bad_stack_in_the_tss_is_a_stack_fault(user: Guest, rsp0: int) -> None:
    set_gate(user, entry=NOT_CANONICAL)
    user.store(TSS + TSS64_RSP0, 8, rsp0)
    assert fault_of(user, CALL64, GATE) == (STACK_FAULT, 0)


def test_push_on_the_new_stack_is_a_supervisor_access_to_which_ac_applies(user: Guest) -> None:
    set_gate(user)
    user.store(TSS + TSS64_RSP0, 8, USER_STACK)
    user.words[RFLAGS] |= RFLAGS_AC
    point(user, GATE, 0)
    user.run(CALL64)
    assert user.words[RSP] == USER_STACK - 32


def test_page_fault_on_the_new_stack_is_a_supervisor_write(user: Guest) -> None:
    set_gate(user)
    user.unmap(RING0_STACK - 8)
    assert fault_of(user, CALL64, GATE) == (PF, PF_W)
