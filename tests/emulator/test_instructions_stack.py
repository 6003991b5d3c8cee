"""PUSH, POP and their relatives, and stack frames."""

from __future__ import annotations

import pytest
from emulator_guest import CODE, KERNEL_STACK, UPPER, Guest
from legacy_modes import (
    DATA_BASE,
    STACK_BASE,
    STACK_TOP,
    START,
    enter_compatibility_mode,
    enter_protected_mode,
    enter_real_mode,
    run,
)

from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.stack import Stack
from lasskvm.state import (
    CR0,
    DR0,
    DR7,
    LIMIT,
    RAX,
    RBP,
    RBX,
    RCX,
    RDI,
    RDX,
    RFLAGS,
    RIP,
    RSI,
    RSP,
    segment_word,
)
from lasskvm.x86.exceptions import AC, GP, PF, PF_W
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.registers import (
    CR0_AM,
    DS,
    RFLAGS_AC,
    SS,
)

VALUE = 0x8877_6655_4433_2211
#: A page-aligned place inside the kernel's stack area.
STACK_PAGE = KERNEL_STACK & ~0xFFF


@pytest.fixture(params=["walked", "cached"])
def kernel(guest: Guest, request: pytest.FixtureRequest) -> Guest:
    """A 64-bit kernel whose accesses walk the page tables, or whose stack is in the software TLB."""
    if request.param == "cached":
        guest.ctx.tlb.select(guest.words)
        guest.run("50")
        guest.run("58")
        assert guest.ctx.tlb.stores
        guest.words[RIP] = CODE
    return guest


# ------------------------------------------------------------------------------------------------- the view


def test_nothing_is_pushed_before_commit(guest: Guest) -> None:
    before = guest.load(KERNEL_STACK - 8)
    stack = Stack(guest.ctx)
    stack.push(8, VALUE)
    assert guest.load(KERNEL_STACK - 8) == before
    assert guest.words[RSP] == KERNEL_STACK
    stack.commit()
    assert guest.load(KERNEL_STACK - 8) == VALUE
    assert guest.words[RSP] == KERNEL_STACK - 8


def test_all_pushes_happen_or_none(guest: Guest) -> None:
    guest.words[RSP] = STACK_PAGE + 8
    guest.unmap(STACK_PAGE - 8)
    guest.store(STACK_PAGE, 8, 0x1111)
    stack = Stack(guest.ctx)
    stack.push(8, VALUE)
    stack.push(8, VALUE)
    with pytest.raises(GuestFault) as caught:
        stack.commit()
    assert caught.value.cr2 == STACK_PAGE - 8
    assert guest.load(STACK_PAGE) == 0x1111
    assert guest.words[RSP] == STACK_PAGE + 8


def test_loads_see_what_was_pushed_before(guest: Guest) -> None:
    guest.store(KERNEL_STACK, 8, 0x1111_1111_1111_1111)
    stack = Stack(guest.ctx)
    stack.push(8, VALUE)
    assert stack.peek(8) == VALUE
    assert stack.peek(8, 4) == 0x1111_1111_8877_6655
    assert stack.pop(8) == VALUE
    assert stack.pop(8) == 0x1111_1111_1111_1111
    assert stack.pointer == KERNEL_STACK + 8


# --------------------------------------------------------------------------------------------- PUSH and POP


@pytest.mark.parametrize(
    "code, size, pushed",
    [
        ("50", 8, VALUE),
        ("6650", 2, VALUE & 0xFFFF),
        ("6a80", 8, (1 << 64) - 0x80),
        ("666a80", 2, 0xFF80),
        ("68 000000f0", 8, 0xFFFF_FFFF_F000_0000),
        ("66 68 0080", 2, 0x8000),
        ("ff30", 8, VALUE),
    ],
)
def test_push_in_64_bit_mode_has_64_or_16_bits(kernel: Guest, code: str, size: int, pushed: int) -> None:
    kernel.words[RAX] = VALUE
    if code == "ff30":
        kernel.words[RAX] = UPPER + 0x70000
        kernel.store(UPPER + 0x70000, 8, VALUE)
    kernel.run(code)
    assert kernel.words[RSP] == KERNEL_STACK - size
    assert kernel.load(KERNEL_STACK - size, size) == pushed
    assert kernel.words[RIP] == CODE + len(bytes.fromhex(code))


def test_push_rsp_pushes_the_value_before(kernel: Guest) -> None:
    kernel.run("54")
    assert kernel.frame(1) == [KERNEL_STACK]


def test_push_of_memory_at_rsp_uses_rsp_before(kernel: Guest) -> None:
    kernel.store(KERNEL_STACK, 8, VALUE)
    kernel.run("ff3424")
    assert kernel.frame(2) == [VALUE, VALUE]


def test_pop_writes_its_register(kernel: Guest) -> None:
    kernel.store(KERNEL_STACK, 8, VALUE)
    kernel.run("5b")
    assert (kernel.words[RBX], kernel.words[RSP]) == (VALUE, KERNEL_STACK + 8)


def test_pop_of_16_bits_keeps_the_rest_of_the_register(kernel: Guest) -> None:
    kernel.store(KERNEL_STACK, 8, VALUE)
    kernel.words[RBX] = (1 << 64) - 1
    kernel.run("665b")
    assert (kernel.words[RBX], kernel.words[RSP]) == (0xFFFF_FFFF_FFFF_2211, KERNEL_STACK + 2)


def test_pop_rsp_ends_with_the_value_popped(kernel: Guest) -> None:
    kernel.store(KERNEL_STACK, 8, VALUE)
    kernel.run("5c")
    assert kernel.words[RSP] == VALUE


def test_pop_sp_writes_the_low_half_of_the_incremented_pointer(kernel: Guest) -> None:
    kernel.words[RSP] = UPPER + 0x2FFFE
    kernel.store(UPPER + 0x2FFFE, 2, 0x1234)
    kernel.run("665c")
    assert kernel.words[RSP] == UPPER + 0x31234


def test_pop_to_memory_at_rsp_uses_rsp_behind_the_pop(kernel: Guest) -> None:
    kernel.store(KERNEL_STACK, 8, VALUE)
    kernel.run("8f442408")
    assert kernel.load(KERNEL_STACK + 16) == VALUE
    assert kernel.words[RSP] == KERNEL_STACK + 8


def test_pop_whose_store_faults_leaves_rsp(guest: Guest) -> None:
    guest.words[RBX] = UPPER + 0x70000
    guest.write_protect(UPPER + 0x70000)
    assert guest.fault_of("8f03") == (PF, PF_W | 1)


def test_push_across_a_missing_page_stores_nothing(guest: Guest) -> None:
    guest.words[RSP] = STACK_PAGE + 4
    guest.unmap(STACK_PAGE - 4)
    guest.store(STACK_PAGE, 4, 0x1111)
    assert guest.fault_of("50") == (PF, PF_W)
    assert guest.load(STACK_PAGE, 4) == 0x1111


def test_user_stack_in_the_kernel_half_is_a_stack_fault_by_lass(user: Guest) -> None:
    user.words[RSP] = KERNEL_STACK
    for code in ("50", "58", "6a00", "c9", "9c", "9d", "c8000000"):
        user.words[RBP] = KERNEL_STACK
        assert user.fault_of(code) == (STACK_FAULT, 0), code


def test_source_of_push_and_destination_of_pop_are_no_stack_accesses(user: Guest) -> None:
    user.words[RAX] = KERNEL_STACK
    assert user.fault_of("ff30") == (GP, 0)
    assert user.fault_of("8f00") == (GP, 0)


def test_misaligned_push_of_a_user_with_alignment_checks_faults(user: Guest) -> None:
    user.words[CR0] |= CR0_AM
    user.words[RFLAGS] |= RFLAGS_AC
    user.words[RSP] += 1
    assert user.fault_of("50") == (AC, 0)


def test_data_breakpoint_on_the_stack_is_met(guest: Guest) -> None:
    guest.words[DR0], guest.words[DR7] = KERNEL_STACK - 8, 0xD0402
    guest.run("50")
    assert guest.ctx.watch_hits == 1


# ---------------------------------------------------------------------------------------- outside 64-bit mode


@pytest.mark.parametrize("code, size", [("50", 2), ("6650", 4), ("6a80", 2), ("666a80", 4)])
def test_real_mode_push_goes_through_ss_and_wraps_sp(guest: Guest, code: str, size: int) -> None:
    enter_real_mode(guest)
    guest.words[RAX], guest.words[RSP] = 0xFFFF_FF80, 0x7_0000
    run(guest, code)
    assert guest.words[RSP] == 0x8_0000 - size
    assert guest.memory.load(STACK_BASE + 0x1_0000 - size, size) == 0xFFFF_FF80 & (1 << 8 * size) - 1


def test_push_that_straddles_the_end_of_a_16_bit_stack_is_a_stack_fault(guest: Guest) -> None:
    enter_real_mode(guest)
    guest.words[RSP] = 1
    with pytest.raises(GuestFault) as caught:
        run(guest, "50")
    assert caught.value.vector == STACK_FAULT
    assert guest.words[RSP] == 1


def test_push_in_32_bit_code_on_a_16_bit_stack_moves_sp_only(guest: Guest) -> None:
    enter_protected_mode(guest, 32, stack_bits=16)
    guest.words[RAX], guest.words[RSP] = VALUE & 0xFFFFFFFF, 0x9_0002
    run(guest, "50")
    assert guest.words[RSP] == 0x9_FFFE
    assert guest.memory.load(STACK_BASE + 0xFFFE, 4) == VALUE & 0xFFFFFFFF


def test_push_in_16_bit_code_on_a_32_bit_stack_moves_all_of_esp(guest: Guest) -> None:
    enter_protected_mode(guest, 16, stack_bits=32)
    guest.words[RSP] = 0x1_0000
    run(guest, "50")
    assert guest.words[RSP] == 0xFFFE


def test_pop_to_a_stack_address_uses_ss(guest: Guest) -> None:
    enter_protected_mode(guest, 32)
    guest.memory.store(STACK_BASE + STACK_TOP, 4, 0x12345678)
    run(guest, "8f0424")
    assert guest.memory.load(STACK_BASE + STACK_TOP + 4, 4) == 0x12345678


def test_pop_to_memory_uses_its_own_segment(guest: Guest) -> None:
    enter_protected_mode(guest, 32)
    guest.words[RBX] = 0x40
    guest.memory.store(STACK_BASE + STACK_TOP, 4, 0x12345678)
    run(guest, "8f03")
    assert guest.memory.load(DATA_BASE + 0x40, 4) == 0x12345678
    guest.words[segment_word(DS, LIMIT)] = 0x42
    with pytest.raises(GuestFault) as caught:
        run(guest, "8f03")
    assert caught.value.vector == GP
    assert guest.words[RSP] == STACK_TOP + 4


def test_stack_limit_is_checked(guest: Guest) -> None:
    enter_protected_mode(guest, 32)
    guest.words[segment_word(SS, LIMIT)] = STACK_TOP - 3
    for code in ("50", "60", "9c", "e800000000", "c8040000"):
        guest.words[RIP] = START
        with pytest.raises(GuestFault) as caught:
            run(guest, code)
        assert (caught.value.vector, caught.value.error_code) == (STACK_FAULT, 0), code
        assert guest.words[RSP] == STACK_TOP


@pytest.mark.parametrize("code, size", [("60", 4), ("6660", 2)])
def test_pusha_pushes_the_stack_pointer_it_began_with(guest: Guest, code: str, size: int) -> None:
    enter_protected_mode(guest, 32)
    registers = (RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI)
    for number, register in enumerate(registers):
        if register != RSP:
            guest.words[register] = 0x1111_1111 * number
    run(guest, code)
    mask = (1 << 8 * size) - 1
    expected = [0x1111_1111 * number & mask for number in range(8)]
    expected[4] = STACK_TOP
    pushed = [guest.memory.load(STACK_BASE + STACK_TOP - size * (number + 1), size) for number in range(8)]
    assert pushed == expected
    assert guest.words[RSP] == STACK_TOP - 8 * size


def test_popa_skips_the_stack_pointer(guest: Guest) -> None:
    enter_protected_mode(guest, 32)
    for number in range(8):
        guest.memory.store(STACK_BASE + STACK_TOP + 4 * number, 4, 0x1000_0000 + number)
    run(guest, "61")
    found = [guest.words[register] for register in (RDI, RSI, RBP, RBX, RDX, RCX, RAX)]
    assert found == [0x1000_0000 + number for number in (0, 1, 2, 4, 5, 6, 7)]
    assert guest.words[RSP] == STACK_TOP + 32


def test_16_bit_popa_keeps_the_upper_halves(guest: Guest) -> None:
    enter_real_mode(guest)
    guest.words[RAX] = 0xAAAA_BBBB
    guest.memory.store(STACK_BASE + STACK_TOP + 14, 2, 0x1234)
    run(guest, "61")
    assert guest.words[RAX] == 0xAAAA_1234


def test_pusha_that_runs_out_of_the_segment_halfway_stores_nothing(guest: Guest) -> None:
    enter_protected_mode(guest, 32)
    words = guest.words
    words[RSP], words[RAX] = 8, 0x1234
    words[segment_word(SS, LIMIT)] = 0xFFFF
    guest.memory.store(STACK_BASE + 4, 4, 0x1111)
    with pytest.raises(GuestFault) as caught:
        run(guest, "60")
    assert caught.value.vector == STACK_FAULT
    assert guest.memory.load(STACK_BASE + 4, 4) == 0x1111
    assert words[RSP] == 8


def test_compatibility_mode_pushes_32_bits(guest: Guest) -> None:
    enter_compatibility_mode(guest)
    top = guest.words[RSP]
    guest.words[RAX] = VALUE & 0xFFFFFFFF
    run(guest, "50")
    assert guest.words[RSP] == top - 4
    assert guest.load(top - 4, 4) == VALUE & 0xFFFFFFFF


# --------------------------------------------------------------------------------------------- stack frames


def test_enter_without_nesting_makes_a_frame(kernel: Guest) -> None:
    kernel.words[RBP] = VALUE
    kernel.run("c8200000")
    assert kernel.words[RBP] == KERNEL_STACK - 8
    assert kernel.words[RSP] == KERNEL_STACK - 8 - 0x20
    assert kernel.load(KERNEL_STACK - 8) == VALUE


def test_nested_enter_copies_the_frame_pointers_of_the_outer_levels(guest: Guest) -> None:
    outer = KERNEL_STACK + 0x100
    guest.words[RBP] = outer
    guest.store(outer - 8, 8, 0x1111)
    guest.store(outer - 16, 8, 0x2222)
    guest.run("c8100003")
    frame = KERNEL_STACK - 8
    assert guest.words[RBP] == frame
    assert guest.words[RSP] == frame - 3 * 8 - 0x10
    assert [guest.load(frame - 8 * number) for number in range(4)] == [outer, 0x1111, 0x2222, frame]


def test_nesting_level_counts_modulo_32(guest: Guest) -> None:
    guest.run("c8000020")
    assert guest.words[RSP] == KERNEL_STACK - 8


def test_enter_copies_what_it_has_just_pushed(guest: Guest) -> None:
    guest.words[RBP] = KERNEL_STACK
    guest.run("c8000003")
    frame = KERNEL_STACK - 8
    assert [guest.load(frame - 8 * number) for number in range(4)] == [KERNEL_STACK] * 3 + [frame]


def test_enter_faults_when_the_new_top_of_the_stack_cannot_be_written(guest: Guest) -> None:
    guest.unmap(KERNEL_STACK - 8 - 0x2000)
    guest.store(KERNEL_STACK - 8, 8, 0x1111)
    assert guest.fault_of("c8002000") == (PF, PF_W)
    assert guest.load(KERNEL_STACK - 8) == 0x1111


@pytest.mark.parametrize("stack_bits, pointer", [(16, 0x7_0800), (32, 0x800)])
def test_enter_and_leave_move_as_much_of_the_registers_as_addresses_the_stack(
    guest: Guest, stack_bits: int, pointer: int
) -> None:
    enter_protected_mode(guest, 32, stack_bits=stack_bits)
    guest.words[RSP], guest.words[RBP] = pointer, 0x9_1234
    run(guest, "c8080000")
    assert guest.words[RSP] == pointer - 4 - 8
    assert guest.words[RBP] == (0x9_07FC if stack_bits == 16 else 0x7FC)
    run(guest, "c9")
    assert (guest.words[RSP], guest.words[RBP]) == (pointer, 0x9_1234)


def test_leave_pops_the_frame_pointer_from_where_it_points(kernel: Guest) -> None:
    kernel.words[RBP] = KERNEL_STACK - 0x80
    kernel.store(KERNEL_STACK - 0x80, 8, VALUE)
    kernel.run("c9")
    assert (kernel.words[RSP], kernel.words[RBP]) == (KERNEL_STACK - 0x78, VALUE)


def test_16_bit_leave_keeps_the_rest_of_rbp(kernel: Guest) -> None:
    kernel.words[RBP] = KERNEL_STACK - 0x80
    kernel.store(KERNEL_STACK - 0x80, 8, VALUE)
    kernel.run("66c9")
    assert kernel.words[RSP] == KERNEL_STACK - 0x7E
    assert kernel.words[RBP] == KERNEL_STACK & ~0xFFFF | 0x2211
