"""Near control transfer: targets, counts, return addresses, and what a bad target leaves behind."""

from __future__ import annotations

import pytest
from emulator_guest import CODE, KERNEL_STACK, UPPER, USER_CODE, Guest
from legacy_modes import (
    CODE_BASE,
    DATA_BASE,
    LIMIT32,
    STACK_BASE,
    STACK_TOP,
    START,
    enter_compatibility_mode,
    enter_protected_mode,
    enter_real_mode,
    run,
)

from lasskvm.emulator.decode import Decoded, decode
from lasskvm.emulator.execution import execute
from lasskvm.emulator.faults import GuestFault
from lasskvm.lass import FETCH
from lasskvm.state import (
    CR4,
    INTERRUPT_SHADOW,
    LIMIT,
    RAX,
    RBX,
    RCX,
    RFLAGS,
    RIP,
    RSP,
    segment_word,
)
from lasskvm.x86.exceptions import DB, GP, PF, PF_W
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.registers import (
    CR4_LA57,
    CS,
    RFLAGS_CF,
    RFLAGS_OF,
    RFLAGS_PF,
    RFLAGS_RF,
    RFLAGS_SF,
    RFLAGS_TF,
    RFLAGS_ZF,
)

NOT_CANONICAL = 1 << 47
CALL_REL32 = "e8 00100000"
CALL_RAX = "ffd0"
CALL_AT_RBX = "ff13"
JMP_RAX = "ffe0"
JMP_AT_RBX = "ff23"
RET = "c3"


@pytest.fixture(params=["walked", "cached"])
def kernel(guest: Guest, request: pytest.FixtureRequest) -> Guest:
    """A 64-bit kernel whose accesses walk the page tables, or whose stack is in the software TLB."""
    if request.param == "cached":
        guest.ctx.tlb.select(guest.words)
        guest.run("50")
        guest.run("58")
        guest.words[RIP] = CODE
    return guest


# ----------------------------------------------------------------------------------------------- JMP and Jcc


@pytest.mark.parametrize(
    "code, distance",
    [("eb 7f", 2 + 0x7F), ("eb 80", 2 - 0x80), ("e9 00100000", 5 + 0x1000), ("e9 00f0ffff", 5 - 0x1000)],
)
def test_jmp_counts_from_its_end(guest: Guest, code: str, distance: int) -> None:
    guest.run(code)
    assert guest.words[RIP] == CODE + distance


def test_operand_size_prefix_does_not_shorten_a_near_jump_in_64_bit_mode(guest: Guest) -> None:
    guest.run("66 e9 00100000")
    assert guest.words[RIP] == CODE + 6 + 0x1000


def test_operand_size_prefix_does_not_narrow_an_indirect_jump_in_64_bit_mode(guest: Guest) -> None:
    guest.words[RAX] = UPPER + 0x12345678
    guest.run("66" + JMP_RAX)
    assert guest.words[RIP] == UPPER + 0x12345678


def test_indirect_jump_reads_its_target_from_memory(guest: Guest) -> None:
    guest.words[RBX] = UPPER + 0x70000
    guest.store(UPPER + 0x70000, 8, UPPER + 0x1234)
    guest.run(JMP_AT_RBX)
    assert guest.words[RIP] == UPPER + 0x1234


def test_jump_ends_rf_and_the_interrupt_shadow(guest: Guest) -> None:
    guest.words[RFLAGS] |= RFLAGS_RF
    guest.words[INTERRUPT_SHADOW] = 1
    guest.run("eb 00")
    assert not guest.words[RFLAGS] & RFLAGS_RF
    assert guest.words[INTERRUPT_SHADOW] == 0


def test_single_step_trap_comes_at_the_target(guest: Guest) -> None:
    guest.words[RFLAGS] |= RFLAGS_TF
    with pytest.raises(GuestFault) as caught:
        guest.run("eb 10")
    assert caught.value.vector == DB
    assert guest.words[RIP] == CODE + 2 + 0x10


def test_jump_into_the_canonical_hole_faults(user: Guest) -> None:
    user.words[RIP] = NOT_CANONICAL - 2
    before = user.snapshot()
    with pytest.raises(GuestFault) as caught:
        _jump_forward(user)
    assert (caught.value.vector, caught.value.error_code) == (GP, 0)
    assert user.snapshot() == before


def test_with_57_bit_addresses_there_is_no_hole_at_that_place(user: Guest) -> None:
    user.words[CR4] |= CR4_LA57
    user.words[RIP] = NOT_CANONICAL - 2
    _jump_forward(user)
    assert user.words[RIP] == NOT_CANONICAL


def _jump_forward(guest: Guest) -> None:
    """A jump over nothing at RIP, where no code can be placed."""
    decoded = decode(64, bytes.fromhex("eb00"))
    assert isinstance(decoded, Decoded)
    execute(guest.ctx, decoded)


def test_branch_to_where_lass_forbids_execution_completes(user: Guest) -> None:
    user.words[RAX] = CODE
    user.run(JMP_RAX)
    assert user.words[RIP] == CODE
    _, _, vector, _ = user.ctx.translate(user.words, user.memory, CODE, 1, FETCH, 3, user.words[RFLAGS])
    assert vector == GP


CONDITIONS = [
    (0x0, RFLAGS_OF, 0), (0x2, RFLAGS_CF, 0), (0x4, RFLAGS_ZF, 0), (0x6, RFLAGS_CF, 0), (0x6, RFLAGS_ZF, 0),
    (0x8, RFLAGS_SF, 0), (0xA, RFLAGS_PF, 0), (0xC, RFLAGS_SF, RFLAGS_SF | RFLAGS_OF),
    (0xC, RFLAGS_OF, 0), (0xE, RFLAGS_ZF, 0), (0xE, RFLAGS_SF, RFLAGS_SF | RFLAGS_OF),
]  # fmt: skip


@pytest.mark.parametrize("condition, holds, fails", CONDITIONS)
@pytest.mark.parametrize("form, length", [("7{:x} 40", 2), ("0f 8{:x} 40000000", 6)])
def test_conditional_jump_follows_the_flags(
    guest: Guest, condition: int, holds: int, fails: int, form: str, length: int
) -> None:
    fixed = guest.words[RFLAGS]
    for flags, code, taken in (
        (holds, condition, True),
        (fails, condition, False),
        (holds, condition | 1, False),
        (fails, condition | 1, True),
    ):
        guest.words[RIP], guest.words[RFLAGS] = CODE, fixed | flags
        guest.run(form.format(code))
        assert guest.words[RIP] == CODE + length + (0x40 if taken else 0)


# -------------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    "code, count, left, taken",
    [
        ("e2 40", 2, 1, True),
        ("e2 40", 1, 0, False),
        ("e2 40", 0, (1 << 64) - 1, True),
        ("67 e2 40", 0xAAAA_0000_0000_0002, 1, True),
        ("67 e2 40", 0xAAAA_0000_0000_0001, 0, False),
        ("67 e2 40", 0xAAAA_0000_0000_0000, 0xFFFFFFFF, True),
    ],
)
def test_loop_counts_as_wide_as_addresses(
    guest: Guest, code: str, count: int, left: int, taken: bool
) -> None:
    guest.words[RCX] = count
    guest.run(code)
    assert guest.words[RCX] == left
    assert guest.words[RIP] == CODE + len(bytes.fromhex(code)) + (0x40 if taken else 0)


@pytest.mark.parametrize(
    "code, flags, taken",
    [("e1 40", RFLAGS_ZF, True), ("e1 40", 0, False), ("e0 40", RFLAGS_ZF, False), ("e0 40", 0, True)],
)
def test_loope_and_loopne_look_at_zf_too(guest: Guest, code: str, flags: int, taken: bool) -> None:
    guest.words[RCX] = 5
    guest.words[RFLAGS] |= flags
    guest.run(code)
    assert guest.words[RCX] == 4
    assert guest.words[RIP] == CODE + 2 + (0x40 if taken else 0)
    assert guest.words[RFLAGS] & RFLAGS_ZF == flags


def test_loop_in_16_bit_code_counts_in_cx(guest: Guest) -> None:
    enter_protected_mode(guest, 16)
    guest.words[RCX] = 0x50001
    run(guest, "e2 40")
    assert (guest.words[RCX], guest.words[RIP]) == (0x50000, START + 2)


def test_loop_to_a_bad_target_leaves_the_count(guest: Guest) -> None:
    enter_protected_mode(guest, 32)
    guest.words[segment_word(CS, LIMIT)] = START + 0x20
    guest.words[RCX] = 5
    with pytest.raises(GuestFault) as caught:
        run(guest, "e2 40")
    assert caught.value.vector == GP
    assert (guest.words[RCX], guest.words[RIP]) == (5, START)
    guest.words[RCX] = 1
    run(guest, "e2 40")
    assert guest.words[RIP] == START + 2


@pytest.mark.parametrize(
    "code, count, taken",
    [
        ("e3 40", 0, True),
        ("e3 40", 1 << 32, False),
        ("67 e3 40", 1 << 32, True),
        ("67 e3 40", 1, False),
    ],
)
def test_jrcxz_and_jecxz_test_as_much_as_they_are_named_for(
    guest: Guest, code: str, count: int, taken: bool
) -> None:
    guest.words[RCX] = count
    guest.run(code)
    assert guest.words[RIP] == CODE + len(bytes.fromhex(code)) + (0x40 if taken else 0)
    assert guest.words[RCX] == count


# ---------------------------------------------------------------------------------------------- CALL and RET


def test_call_pushes_the_next_rip(kernel: Guest) -> None:
    kernel.run(CALL_REL32)
    assert kernel.words[RIP] == CODE + 5 + 0x1000
    assert kernel.words[RSP] == KERNEL_STACK - 8
    assert kernel.frame(1) == [CODE + 5]


def test_operand_size_prefix_does_not_narrow_a_call_in_64_bit_mode(kernel: Guest) -> None:
    kernel.run("66" + CALL_REL32)
    assert kernel.words[RSP] == KERNEL_STACK - 8
    assert kernel.frame(1) == [CODE + 6]


def test_indirect_call_reads_its_target_before_it_pushes(kernel: Guest) -> None:
    kernel.words[RBX] = KERNEL_STACK - 8
    kernel.store(KERNEL_STACK - 8, 8, UPPER + 0x4321)
    kernel.run(CALL_AT_RBX)
    assert kernel.words[RIP] == UPPER + 0x4321
    assert kernel.frame(1) == [CODE + 2]


def test_call_through_rsp_uses_the_stack_pointer_before_the_push(kernel: Guest) -> None:
    kernel.store(KERNEL_STACK, 8, UPPER + 0x4321)
    kernel.run("ff1424")
    assert kernel.words[RIP] == UPPER + 0x4321


def test_ret_pops_its_target(kernel: Guest) -> None:
    kernel.store(KERNEL_STACK, 8, UPPER + 0x1234)
    kernel.run(RET)
    assert (kernel.words[RIP], kernel.words[RSP]) == (UPPER + 0x1234, KERNEL_STACK + 8)


def test_ret_with_a_number_releases_that_many_bytes_more(kernel: Guest) -> None:
    kernel.store(KERNEL_STACK, 8, UPPER + 0x1234)
    kernel.run("c2 0180")
    assert (kernel.words[RIP], kernel.words[RSP]) == (UPPER + 0x1234, KERNEL_STACK + 8 + 0x8001)


def test_call_to_an_address_that_is_not_canonical_faults_with_the_stack_as_it_was(kernel: Guest) -> None:
    kernel.words[RAX] = NOT_CANONICAL
    kernel.store(KERNEL_STACK - 8, 8, 0x1111)
    assert kernel.fault_of(CALL_RAX) == (GP, 0)
    assert kernel.load(KERNEL_STACK - 8) == 0x1111


@pytest.mark.parametrize("code", [RET, "c2 1000"])
def test_ret_to_an_address_that_is_not_canonical_faults_with_rsp_as_it_was(kernel: Guest, code: str) -> None:
    kernel.store(KERNEL_STACK, 8, NOT_CANONICAL)
    assert kernel.fault_of(code) == (GP, 0)


def test_call_whose_push_faults_goes_nowhere(guest: Guest) -> None:
    guest.unmap(KERNEL_STACK - 0x2000)
    guest.words[RSP] = KERNEL_STACK - 0x1000 & ~0xFFF
    assert guest.fault_of(CALL_REL32) == (PF, PF_W)


def test_call_and_ret_of_a_user_with_a_kernel_stack_are_stack_faults_by_lass(user: Guest) -> None:
    user.words[RSP] = KERNEL_STACK
    assert user.fault_of(CALL_REL32) == (STACK_FAULT, 0)
    assert user.fault_of(RET) == (STACK_FAULT, 0)


def test_single_stepped_call_and_ret_are_complete(guest: Guest) -> None:
    guest.words[RFLAGS] |= RFLAGS_TF
    for code, rip in ((CALL_REL32, CODE + 5 + 0x1000), (RET, CODE + 5)):
        with pytest.raises(GuestFault) as caught:
            guest.run(code)
        assert caught.value.vector == DB
        assert guest.words[RIP] == rip
    assert guest.words[RSP] == KERNEL_STACK


# --------------------------------------------------------------------------------------- outside 64-bit mode


def test_16_bit_operand_size_truncates_the_target(guest: Guest) -> None:
    enter_protected_mode(guest, 32)
    guest.words[RIP] = 0x8FFF0
    run(guest, "66 eb 7f")
    assert guest.words[RIP] == (0xFFF0 + 3 + 0x7F) & 0xFFFF


def test_16_bit_conditional_jump_that_is_not_taken_truncates_nothing(guest: Guest) -> None:
    enter_protected_mode(guest, 32)
    guest.words[RIP] = 0x8FFF0
    run(guest, "66 74 7f")
    assert guest.words[RIP] == 0x8FFF3


def test_32_bit_target_wraps(guest: Guest) -> None:
    enter_protected_mode(guest, 32)
    run(guest, "e9 00ffffff")
    assert guest.words[RIP] == START + 5 - 0x100
    guest.words[RIP] = START
    run(guest, "e9 00f0ffff")
    assert guest.words[RIP] == START + 5 - 0x1000 + (1 << 32)


def test_real_mode_call_pushes_two_bytes_and_keeps_the_upper_stack_pointer(guest: Guest) -> None:
    enter_real_mode(guest)
    guest.words[RSP] = 0x1234_0800
    run(guest, "e8 0010")
    assert guest.words[RIP] == START + 3 + 0x1000
    assert guest.words[RSP] == 0x1234_07FE
    assert guest.memory.load(STACK_BASE + 0x7FE, 2) == START + 3


def test_real_mode_call_of_32_bits_pushes_four_bytes(guest: Guest) -> None:
    enter_real_mode(guest)
    run(guest, "66 e8 00100000")
    assert guest.words[RIP] == START + 6 + 0x1000
    assert guest.memory.load(STACK_BASE + STACK_TOP - 4, 4) == START + 6


def test_ret_of_16_bits_pops_two_bytes_in_32_bit_code(guest: Guest) -> None:
    enter_protected_mode(guest, 32)
    guest.memory.store(STACK_BASE + STACK_TOP, 4, 0xAAAA1234)
    run(guest, "66 c2 0400")
    assert (guest.words[RIP], guest.words[RSP]) == (0x1234, STACK_TOP + 2 + 4)


def test_ret_on_a_16_bit_stack_wraps_sp(guest: Guest) -> None:
    enter_protected_mode(guest, 32, stack_bits=16)
    guest.words[RSP] = 0x5_FFFC
    guest.memory.store(STACK_BASE + 0xFFFC, 4, 0x1234)
    run(guest, "c2 0800")
    assert (guest.words[RIP], guest.words[RSP]) == (0x1234, 0x5_0008)


@pytest.mark.parametrize("code", ["e9 00100000", "e8 00100000", "0f85 00100000", "ffe0", "ffd0", "c3"])
def test_target_behind_the_code_segment_faults_before_anything_changes(guest: Guest, code: str) -> None:
    enter_protected_mode(guest, 32)
    words = guest.words
    words[segment_word(CS, LIMIT)] = 0xFFF
    words[RAX] = 0x1000
    guest.memory.store(STACK_BASE + STACK_TOP, 4, 0x1000)
    guest.memory.write(CODE_BASE + START, bytes.fromhex(code))
    before = guest.snapshot()
    with pytest.raises(GuestFault) as caught:
        run(guest, code)
    assert (caught.value.vector, caught.value.error_code) == (GP, 0)
    assert guest.snapshot() == before


def test_indirect_jump_in_32_bit_code_reads_through_ds(guest: Guest) -> None:
    enter_protected_mode(guest, 32)
    guest.words[RBX] = 0x40
    guest.memory.store(DATA_BASE + 0x40, 4, 0x1234)
    run(guest, "ff23")
    assert guest.words[RIP] == 0x1234
    guest.words[RIP] = START
    run(guest, "66 ff23")
    assert guest.words[RIP] == 0x1234


def test_compatibility_mode_branches_within_32_bits(guest: Guest) -> None:
    enter_compatibility_mode(guest)
    run(guest, "e8 00100000")
    assert guest.words[RIP] == USER_CODE + 5 + 0x1000
    assert guest.load(guest.words[RSP], 4) == USER_CODE + 5
    run(guest, "c3")
    assert guest.words[RIP] == USER_CODE + 5
    assert guest.words[segment_word(CS, LIMIT)] == LIMIT32
