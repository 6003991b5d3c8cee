"""String instructions: elements, repetition, what interrupts it, and that pieces come to the same as elements."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from both_paths import Result, run_on_both_paths
from emulator_guest import CODE, UPPER, Guest
from legacy_modes import DATA_BASE, EXTRA_BASE, STACK_BASE, START, enter_protected_mode, enter_real_mode, run

from lasskvm.conformance import layout
from lasskvm.conformance.guest import Guest as WholeGuest
from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.mmio import Mmio, MmioReadNeeded, MmioWrite
from lasskvm.emulator.string_registers import element_step
from lasskvm.memory import PAGE_SIZE
from lasskvm.state import (
    BASE,
    CR0,
    DR0,
    DR7,
    INTERRUPT_SHADOW,
    LIMIT,
    RAX,
    RCX,
    RDI,
    RFLAGS,
    RIP,
    RSI,
    segment_word,
)
from lasskvm.x86.exceptions import AC, DB, GP, PF, PF_U, PF_W
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.paging import PTE_A, PTE_D, PTE_P, PTE_W
from lasskvm.x86.registers import (
    CR0_AM,
    DR6_BS,
    ES,
    FS,
    GS,
    RFLAGS_AC,
    RFLAGS_AF,
    RFLAGS_CF,
    RFLAGS_DF,
    RFLAGS_RF,
    RFLAGS_SF,
    RFLAGS_TF,
    RFLAGS_ZF,
)

SOURCE, DESTINATION = UPPER + 0x70000, UPPER + 0x90000
#: Guest-physical, where no memory is, and a linear page for it.
DEVICE_GPA, DEVICE = 0xFE00_0000, UPPER + 0xB0000
PATTERN = bytes(range(1, 256)) * 40
MOVSB, MOVSW, MOVSD, MOVSQ = "a4", "66a5", "a5", "48a5"
STOSB, STOSQ, LODSB, LODSD, LODSQ = "aa", "48ab", "ac", "ad", "48ad"
CMPSB, CMPSD, SCASB, SCASQ = "a6", "a7", "ae", "48af"
REP, REPNE = "f3", "f2"


@pytest.fixture(scope="module")
def whole_guest() -> WholeGuest:
    """A guest with both ways to execute."""
    return WholeGuest()


@pytest.fixture(params=["walked", "cached"])
def kernel(guest: Guest, request: pytest.FixtureRequest) -> Guest:
    """A 64-bit kernel with a pattern at the source; its accesses walk the page tables, or use the software TLB."""
    if request.param == "cached":
        guest.ctx.tlb.select(guest.words)
    prepare(guest)
    return guest


def prepare(guest: Guest, count: int = 0) -> None:
    """The pattern at the source; registers for *count* elements."""
    guest.memory.write(SOURCE & 0xFFFFF, PATTERN)
    guest.words[RSI], guest.words[RDI], guest.words[RCX] = SOURCE, DESTINATION, count


def content(guest: Guest, address: int, size: int) -> bytes:
    return guest.memory.read(address & 0xFFFFF, size)


def finish(guest: Guest, code: str) -> int:
    """Execute *code* until it is complete; returns how many executions it took."""
    rip = guest.words[RIP]
    for executions in range(1, 10000):
        guest.run(code)
        if guest.words[RIP] != rip:
            return executions
    raise AssertionError("the instruction does not end")


def map_device(guest: Guest, address: int = DEVICE) -> None:
    """Map the page at *address* to where no memory is."""
    guest.memory.store(guest.page_entry(address), 8, DEVICE_GPA | PTE_P | PTE_W)


# -------------------------------------------------------------------------------------------------- elements


@pytest.mark.parametrize("code, size", [(MOVSB, 1), (MOVSW, 2), (MOVSD, 4), (MOVSQ, 8)])
@pytest.mark.parametrize("direction", [0, RFLAGS_DF])
def test_movs_moves_one_element(kernel: Guest, code: str, size: int, direction: int) -> None:
    kernel.words[RFLAGS] |= direction
    kernel.run(code)
    step = -size if direction else size
    assert content(kernel, DESTINATION, size) == PATTERN[:size]
    assert (kernel.words[RSI], kernel.words[RDI]) == (SOURCE + step, DESTINATION + step)
    assert kernel.words[RIP] == CODE + len(code) // 2
    assert element_step(kernel.words, size) == step


@pytest.mark.parametrize(
    "code, expected",
    [(LODSB, 0xFFFF_FFFF_FFFF_FF01), (LODSD, 0x04030201), (LODSQ, 0x0807060504030201)],
)
def test_lods_writes_as_much_of_rax_as_it_loads(kernel: Guest, code: str, expected: int) -> None:
    kernel.words[RAX] = (1 << 64) - 1
    kernel.run(code)
    assert kernel.words[RAX] == expected


def test_stos_stores_rax(kernel: Guest) -> None:
    kernel.words[RAX] = 0x1122334455667788
    kernel.run(STOSQ)
    assert content(kernel, DESTINATION, 8) == bytes.fromhex("8877665544332211")
    assert (kernel.words[RSI], kernel.words[RDI]) == (SOURCE, DESTINATION + 8)


def test_cmps_subtracts_the_destination_from_the_source(kernel: Guest) -> None:
    kernel.store(DESTINATION, 1, 2)
    kernel.run(CMPSB)
    assert kernel.words[RFLAGS] & (RFLAGS_CF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_AF) == (
        RFLAGS_CF | RFLAGS_SF | RFLAGS_AF
    )
    assert (kernel.words[RSI], kernel.words[RDI]) == (SOURCE + 1, DESTINATION + 1)


def test_scas_subtracts_memory_from_rax(kernel: Guest) -> None:
    kernel.store(DESTINATION, 8, 5)
    kernel.words[RAX] = 5
    kernel.run(SCASQ)
    assert kernel.words[RFLAGS] & (RFLAGS_ZF | RFLAGS_CF) == RFLAGS_ZF
    assert kernel.words[RDI] == DESTINATION + 8


def test_segment_override_is_for_the_source_only(kernel: Guest) -> None:
    kernel.words[segment_word(FS, BASE)] = 0x10
    kernel.words[segment_word(GS, BASE)] = 0x20
    kernel.run("64" + MOVSQ)
    assert content(kernel, DESTINATION, 8) == PATTERN[0x10:0x18]
    kernel.run("65" + MOVSQ)
    assert content(kernel, DESTINATION + 8, 8) == PATTERN[0x28:0x30]


def test_32_bit_addresses_clear_the_upper_halves(guest: Guest) -> None:
    guest.enter_user()
    words = guest.words
    words[RSI], words[RDI] = 0xAAAA_0000_0007_0000, 0xBBBB_0000_0009_0000
    guest.memory.write(0x70000, PATTERN)
    guest.run("67" + MOVSB)
    assert (words[RSI], words[RDI]) == (0x70001, 0x90001)
    assert content(guest, 0x90000, 1) == PATTERN[:1]


def test_32_bit_index_wraps(guest: Guest) -> None:
    guest.enter_user()
    words = guest.words
    words[RFLAGS] |= RFLAGS_DF
    words[RDI] = 0
    guest.run("67" + STOSB)
    assert words[RDI] == 0xFFFFFFFF


# ------------------------------------------------------------------------------------------------ repetition


@pytest.mark.parametrize("code, size", [(MOVSB, 1), (MOVSW, 2), (MOVSD, 4), (MOVSQ, 8)])
@pytest.mark.parametrize("prefix", [REP, REPNE])
@pytest.mark.parametrize("count", [1, 7, 8, 700])
def test_rep_movs_moves_as_many_as_rcx_says(
    kernel: Guest, code: str, size: int, prefix: str, count: int
) -> None:
    kernel.words[RCX] = count
    finish(kernel, prefix + code)
    assert content(kernel, DESTINATION, size * count) == PATTERN[: size * count]
    assert kernel.load(DESTINATION + size * count, 1) == 0
    words = kernel.words
    assert (words[RSI], words[RDI], words[RCX]) == (SOURCE + size * count, DESTINATION + size * count, 0)
    assert not words[RFLAGS] & RFLAGS_RF


def test_rep_movs_backwards(kernel: Guest) -> None:
    words = kernel.words
    words[RFLAGS] |= RFLAGS_DF
    words[RSI], words[RDI], words[RCX] = SOURCE + 49 * 8, DESTINATION + 49 * 8, 50
    finish(kernel, REP + MOVSQ)
    assert content(kernel, DESTINATION, 400) == PATTERN[:400]
    assert (words[RSI], words[RDI]) == (SOURCE - 8, DESTINATION - 8)


@pytest.mark.parametrize("distance", [1, 2, 3, 5, 8, 9, 64, 100])
@pytest.mark.parametrize("code, size", [(MOVSB, 1), (MOVSW, 2), (MOVSQ, 8)])
def test_forward_movs_onto_its_own_source_repeats_a_pattern(
    kernel: Guest, code: str, size: int, distance: int
) -> None:
    count = 300 // size
    expected = bytearray(PATTERN[: size * count + distance])
    for start in range(0, size * count, size):
        expected[start + distance : start + distance + size] = expected[start : start + size]
    kernel.words[RDI], kernel.words[RCX] = SOURCE + distance, count
    finish(kernel, REP + code)
    assert content(kernel, SOURCE, len(expected)) == bytes(expected)


def test_forward_movs_onto_its_own_source_through_another_mapping_repeats_a_pattern(kernel: Guest) -> None:
    entry = kernel.memory.load(kernel.page_entry(SOURCE), 8)
    kernel.memory.store(kernel.page_entry(DESTINATION), 8, entry)
    kernel.words[RDI], kernel.words[RCX] = DESTINATION + 16, 40
    finish(kernel, REP + MOVSQ)
    assert content(kernel, SOURCE, 16 + 320) == (PATTERN[:16] * 21)[: 16 + 320]


def test_forward_movs_to_a_lower_overlapping_place_keeps_the_source(kernel: Guest) -> None:
    kernel.words[RSI], kernel.words[RCX] = SOURCE + 24, 40
    kernel.words[RDI] = SOURCE
    finish(kernel, REP + MOVSQ)
    assert content(kernel, SOURCE, 320) == PATTERN[24 : 24 + 320]


@pytest.mark.parametrize("offset", [0, 4, 0xFF9, 0xFFF])
def test_rep_stos_fills_pages_whatever_the_alignment(kernel: Guest, offset: int) -> None:
    kernel.words[RAX], kernel.words[RCX] = 0x1122334455667788, 1500
    kernel.words[RDI] = DESTINATION + offset
    finish(kernel, REP + STOSQ)
    assert content(kernel, DESTINATION + offset, 12000) == bytes.fromhex("8877665544332211") * 1500
    assert kernel.load(DESTINATION + offset + 12000, 8) == 0
    assert kernel.words[RDI] == DESTINATION + offset + 12000


def test_rep_lods_ends_with_the_last_element(kernel: Guest) -> None:
    kernel.words[RCX] = 9
    finish(kernel, REP + LODSB)
    assert (kernel.words[RAX] & 0xFF, kernel.words[RSI]) == (PATTERN[8], SOURCE + 9)


@pytest.mark.parametrize("code", [MOVSB, STOSB, LODSB, CMPSB, SCASB])
@pytest.mark.parametrize("prefix", [REP, REPNE])
def test_count_of_0_does_nothing_and_faults_nowhere(guest: Guest, code: str, prefix: str) -> None:
    words = guest.words
    words[RSI] = words[RDI] = 1 << 47
    before = list(words[:RIP]), words[RFLAGS]
    guest.run(prefix + code)
    assert (list(words[:RIP]), words[RFLAGS]) == before
    assert words[RIP] == CODE + 2


@pytest.mark.parametrize(
    "code, clears_source, clears_destination",
    [(MOVSB, True, True), (STOSB, False, True), (LODSB, False, False), (CMPSB, False, False)],
)
def test_32_bit_count_of_0_clears_upper_halves_as_on_intel(
    guest: Guest, code: str, clears_source: bool, clears_destination: bool
) -> None:
    words = guest.words
    words[RSI], words[RDI], words[RCX] = 0xA_0000_0001, 0xB_0000_0002, 0xC_0000_0000
    guest.run("67" + REP + code)
    assert words[RCX] == 0
    assert words[RSI] == (1 if clears_source else 0xA_0000_0001)
    assert words[RDI] == (2 if clears_destination else 0xB_0000_0002)


@pytest.mark.parametrize("prefix, differs_at, stops", [(REP, 5, 6), (REP, None, 20), (REPNE, 5, 1)])
def test_repe_cmps_stops_at_a_difference(
    kernel: Guest, prefix: str, differs_at: int | None, stops: int
) -> None:
    kernel.memory.write(DESTINATION & 0xFFFFF, PATTERN[:20])
    if differs_at is not None:
        kernel.store(DESTINATION + differs_at, 1, 0xEE)
    kernel.words[RCX] = 20
    finish(kernel, prefix + CMPSB)
    assert kernel.words[RSI] == SOURCE + stops
    assert kernel.words[RCX] == 20 - stops
    assert bool(kernel.words[RFLAGS] & RFLAGS_ZF) == (stops != 6)


def test_repne_scas_finds_a_byte(kernel: Guest) -> None:
    kernel.words[RDI], kernel.words[RCX], kernel.words[RAX] = SOURCE, (1 << 64) - 1, PATTERN[100]
    finish(kernel, REPNE + SCASB)
    assert kernel.words[RDI] == SOURCE + 101
    assert kernel.words[RFLAGS] & RFLAGS_ZF


def test_32_bit_count_counts_in_ecx(guest: Guest) -> None:
    guest.enter_user()
    words = guest.words
    guest.memory.write(0x70000, PATTERN)
    words[RSI], words[RDI], words[RCX] = 0x70000, 0x90000, 0xCC_0000_0003
    finish(guest, "67" + REP + MOVSB)
    assert (words[RSI], words[RDI], words[RCX]) == (0x70003, 0x90003, 0)


# ------------------------------------------------------------------------------------- what comes in between


def test_long_repetition_pauses_on_itself_so_that_interrupts_can_come_in(kernel: Guest) -> None:
    kernel.words[RCX] = 3000
    kernel.words[RFLAGS] |= RFLAGS_DF
    kernel.words[RDI] = DESTINATION + 3000
    kernel.words[INTERRUPT_SHADOW] = 1
    kernel.run(REP + STOSB)
    assert kernel.words[RIP] == CODE
    assert 0 < kernel.words[RCX] < 3000
    assert kernel.words[RFLAGS] & RFLAGS_RF
    assert kernel.words[INTERRUPT_SHADOW] == 0
    assert kernel.words[RDI] == DESTINATION + kernel.words[RCX]
    assert finish(kernel, REP + STOSB) > 1
    assert not kernel.words[RFLAGS] & RFLAGS_RF


def test_single_step_trap_comes_behind_each_element(kernel: Guest) -> None:
    kernel.words[RFLAGS] |= RFLAGS_TF
    kernel.words[RCX] = 20
    for left in range(19, -1, -1):
        with pytest.raises(GuestFault) as caught:
            kernel.run(REP + MOVSB)
        assert (caught.value.vector, caught.value.dr6) == (DB, DR6_BS)
        assert kernel.words[RCX] == left
        assert kernel.words[RIP] == (CODE if left else CODE + 2)
        assert bool(kernel.words[RFLAGS] & RFLAGS_RF) == bool(left)


def test_data_breakpoint_stops_behind_the_element_that_met_it(guest: Guest) -> None:
    prepare(guest, 40)
    guest.words[DR0], guest.words[DR7] = DESTINATION + 10, 0x10402
    guest.run(REP + MOVSB)
    assert guest.ctx.watch_hits == 1
    assert guest.words[RDI] == DESTINATION + 11
    assert guest.words[RIP] == CODE
    guest.run(REP + MOVSB)
    assert guest.ctx.watch_hits == 0
    assert guest.words[RIP] == CODE + 2


@pytest.mark.parametrize("code, size", [(MOVSB, 1), (MOVSQ, 8), (STOSB, 1), (STOSQ, 8)])
def test_fault_leaves_the_registers_at_the_element_that_faults(kernel: Guest, code: str, size: int) -> None:
    words = kernel.words
    start = DESTINATION + PAGE_SIZE - 100 * size
    words[RDI], words[RCX], words[RAX] = start, 200, 0x5A5A5A5A5A5A5A5A
    kernel.unmap(DESTINATION + PAGE_SIZE)
    with pytest.raises(GuestFault) as caught:
        finish(kernel, REP + code)
    assert (caught.value.vector, caught.value.error_code) == (PF, PF_W)
    assert caught.value.cr2 == DESTINATION + PAGE_SIZE
    assert (words[RDI], words[RCX], words[RIP]) == (DESTINATION + PAGE_SIZE, 100, CODE)
    moved = PATTERN[: 100 * size] if code in (MOVSB, MOVSQ) else b"\x5a" * 100 * size
    assert content(kernel, start, 100 * size) == moved


def test_element_across_a_missing_page_is_not_stored_in_part(kernel: Guest) -> None:
    kernel.words[RDI], kernel.words[RCX] = DESTINATION + PAGE_SIZE - 84, 20
    kernel.unmap(DESTINATION + PAGE_SIZE)
    with pytest.raises(GuestFault) as caught:
        finish(kernel, REP + MOVSQ)
    assert caught.value.cr2 == DESTINATION + PAGE_SIZE
    assert kernel.words[RCX] == 10
    assert content(kernel, DESTINATION + PAGE_SIZE - 4, 4) == bytes(4)


def test_page_of_the_destination_stays_clean_when_the_source_faults(kernel: Guest) -> None:
    kernel.words[RCX] = 100
    kernel.unmap(SOURCE)
    entry = kernel.page_entry(DESTINATION)
    with pytest.raises(GuestFault) as caught:
        kernel.run(REP + MOVSQ)
    assert (caught.value.vector, caught.value.error_code, caught.value.cr2) == (PF, 0, SOURCE)
    assert not kernel.memory.load(entry, 8) & (PTE_A | PTE_D)


def test_fault_in_a_repeated_comparison_restores_the_flags(kernel: Guest) -> None:
    """The manual, on REP: "the EFLAGS value is restored to the state prior to the execution of the instruction"."""
    kernel.memory.write(DESTINATION & 0xFFFFF, PATTERN)
    kernel.unmap(SOURCE + PAGE_SIZE)
    words = kernel.words
    words[RSI] = SOURCE + PAGE_SIZE - 10
    words[RDI] = DESTINATION + PAGE_SIZE - 10
    words[RCX] = 20
    words[RFLAGS] |= RFLAGS_CF | RFLAGS_SF
    before = words[RFLAGS]
    with pytest.raises(GuestFault):
        kernel.run(REP + CMPSB)
    assert words[RCX] == 10
    assert words[RFLAGS] == before


def test_repetition_of_a_user_stops_where_lass_begins(user: Guest) -> None:
    user.words[RSI], user.words[RDI], user.words[RCX] = SOURCE, 0x90000, 4
    assert user.fault_of(REP + MOVSB) == (GP, 0)
    user.words[RDI], user.words[RSI] = DESTINATION, 0x70000
    assert user.fault_of(REP + MOVSB) == (GP, 0)


def test_supervisor_string_access_below_the_split_needs_ac(kernel: Guest) -> None:
    kernel.words[RDI], kernel.words[RCX] = 0x90000, 100
    assert kernel.fault_of(REP + MOVSQ) == (GP, 0)
    kernel.words[RFLAGS] |= RFLAGS_AC
    if kernel.ctx.tlb.enabled:
        kernel.ctx.tlb.select(kernel.words)
    finish(kernel, REP + MOVSQ)
    assert content(kernel, 0x90000, 800) == PATTERN[:800]


def test_misaligned_elements_of_a_user_with_alignment_checks_fault(user: Guest) -> None:
    user.words[CR0] |= CR0_AM
    user.words[RFLAGS] |= RFLAGS_AC
    user.words[RSI], user.words[RDI], user.words[RCX] = 0x70001, 0x90000, 64
    assert user.fault_of(REP + MOVSQ) == (AC, 0)
    finish(user, REP + MOVSB)
    assert user.words[RCX] == 0


def test_write_protected_user_page_faults_as_a_write(user: Guest) -> None:
    user.write_protect(0x90000)
    user.words[RDI], user.words[RCX] = 0x90000, 64
    assert user.fault_of(REP + STOSQ) == (PF, PF_W | PF_U | 1)


# ------------------------------------------------------------------------------------------------------ MMIO


def test_repeated_stores_to_a_device_leave_one_at_a_time(guest: Guest) -> None:
    prepare(guest, 3)
    map_device(guest)
    guest.words[RDI] = DEVICE + 8
    rip = guest.words[RIP]
    for number in range(3):
        guest.run(REP + MOVSD)
        value = int.from_bytes(PATTERN[4 * number : 4 * number + 4], "little")
        assert guest.ctx.mmio.writes == [MmioWrite(DEVICE_GPA + 8 + 4 * number, 4, value)]
        guest.ctx.mmio.writes.clear()
        guest.ctx.leave_block = False
        assert (guest.words[RIP] == rip) == (number < 2)


def test_repeated_loads_from_a_device_wait_for_each_answer(guest: Guest) -> None:
    prepare(guest, 2)
    map_device(guest)
    guest.words[RSI] = DEVICE
    for number in range(2):
        with pytest.raises(MmioReadNeeded) as needed:
            guest.run(REP + MOVSD)
        assert needed.value.gpa == DEVICE_GPA + 4 * number
        assert guest.words[RCX] == 2 - number
        guest.ctx.mmio.answer(0x11111111 * (number + 1))
        guest.run(REP + MOVSD)
    assert content(guest, DESTINATION, 8) == bytes.fromhex("1111111122222222")
    assert guest.words[RIP] == CODE + 2


def test_comparison_of_two_device_registers_asks_for_both(guest: Guest) -> None:
    map_device(guest)
    guest.words[RSI], guest.words[RDI] = DEVICE, DEVICE + 0x10
    for gpa in (DEVICE_GPA, DEVICE_GPA + 0x10):
        with pytest.raises(MmioReadNeeded) as needed:
            guest.run(CMPSD)
        assert needed.value.gpa == gpa
        guest.ctx.mmio.answer(7)
    guest.run(CMPSD)
    assert guest.words[RFLAGS] & RFLAGS_ZF


def test_device_on_the_vms_own_bus_gets_every_element(guest: Guest) -> None:
    prepare(guest, 200)
    map_device(guest)
    written: list[tuple[int, int]] = []

    def write(gpa: int, size: int, value: int) -> bool:
        written.append((gpa, value))
        return True

    guest.ctx.mmio = Mmio(write=write)
    guest.words[RDI] = DEVICE
    finish(guest, REP + MOVSB)
    assert written == [(DEVICE_GPA + number, PATTERN[number]) for number in range(200)]


def test_store_to_a_page_with_decoded_code_pauses(guest: Guest) -> None:
    guest.ctx.tlb.select(guest.words)
    guest.ctx.tlb.mark_code(DESTINATION & 0xFFFFF)
    prepare(guest, 600)
    guest.words[RDI] = DESTINATION + PAGE_SIZE - 8
    guest.ctx.tlb.mark_code((DESTINATION & 0xFFFFF) + PAGE_SIZE)
    guest.run(REP + MOVSQ)
    assert guest.ctx.leave_block
    assert guest.words[RIP] == CODE
    assert finish(guest, REP + MOVSQ) >= 2
    assert content(guest, DESTINATION + PAGE_SIZE - 8, 4800) == PATTERN[:4800]


# --------------------------------------------------------------------------------------- outside 64-bit mode


def test_real_mode_string_goes_from_ds_to_es_and_wraps_16_bit_indices(guest: Guest) -> None:
    enter_real_mode(guest)
    words = guest.words
    words[RSI], words[RDI], words[RCX] = 0x5_FFFC, 0x6_0010, 0x7_0002
    guest.memory.write(DATA_BASE + 0xFFFC, b"abcd")
    guest.memory.write(DATA_BASE, b"efgh")
    run(guest, REP + "66a5")
    assert guest.memory.read(EXTRA_BASE + 0x10, 8) == b"abcdefgh"
    assert (words[RSI], words[RDI], words[RCX]) == (0x5_0004, 0x6_0018, 0x7_0000)


def test_real_mode_fill_wraps_around_its_segment(guest: Guest) -> None:
    enter_real_mode(guest)
    words = guest.words
    words[RDI], words[RCX], words[RAX] = 0xFF00, 0x200, 0x77
    words[segment_word(ES, BASE)] = EXTRA_BASE + 0x7F0
    while words[RIP] == START:
        run(guest, REP + "aa")
    assert guest.memory.read(EXTRA_BASE + 0x7F0 + 0xFF00, 0x100) == b"\x77" * 0x100
    assert guest.memory.read(EXTRA_BASE + 0x7F0, 0x100) == b"\x77" * 0x100
    assert guest.memory.load(EXTRA_BASE + 0x7F0 + 0x100, 1) == 0
    assert guest.memory.load(EXTRA_BASE + 0x7F0 + 0x10000, 1) == 0
    assert words[RDI] == 0x100


def test_word_at_the_end_of_a_segment_faults_after_the_elements_before(guest: Guest) -> None:
    enter_real_mode(guest)
    words = guest.words
    words[RDI], words[RCX], words[RAX] = 0xFFEF, 100, 0x7777
    with pytest.raises(GuestFault) as caught:
        run(guest, REP + "ab")
    assert (caught.value.vector, caught.value.error_code) == (GP, 0)
    assert (words[RDI], words[RCX]) == (0xFFFF, 92)
    assert guest.memory.read(EXTRA_BASE + 0xFFEF, 16) == b"\x77" * 16


def test_segment_limit_stops_a_fill_at_the_element_behind_it(guest: Guest) -> None:
    enter_protected_mode(guest, 32)
    words = guest.words
    words[segment_word(ES, LIMIT)] = 0x83F
    words[RDI], words[RCX], words[RAX] = 0x800, 100, 0x11223344
    with pytest.raises(GuestFault) as caught:
        run(guest, REP + "ab")
    assert caught.value.vector == GP
    assert (words[RDI], words[RCX]) == (0x840, 84)


def test_source_through_ss_is_a_stack_fault(guest: Guest) -> None:
    enter_real_mode(guest)
    guest.words[RSI] = 0xFFFF
    with pytest.raises(GuestFault) as caught:
        run(guest, "36 ad")
    assert caught.value.vector == STACK_FAULT
    guest.words[RSI] = 0x40
    guest.memory.store(STACK_BASE + 0x40, 2, 0x1234)
    run(guest, "36 ad")
    assert guest.words[RAX] & 0xFFFF == 0x1234


def test_protected_mode_move_uses_both_segments(guest: Guest) -> None:
    enter_protected_mode(guest, 32)
    guest.memory.write(DATA_BASE + 0x123, PATTERN[:4000])
    words = guest.words
    words[RSI], words[RDI], words[RCX] = 0x123, 0x456, 1000
    while words[RIP] == START:
        run(guest, REP + "a5")
    assert guest.memory.read(EXTRA_BASE + 0x456, 4000) == PATTERN[:4000]


# ------------------------------------------------------------------------------------------------ both paths

#: Places near the ends of pages: of each kind that there is, and in the canonical hole.
PLACES = (
    *(page + offset for page in (layout.LOW_USER, layout.HIGH_SUPERVISOR) for offset in (0, 0xFF0, 0x1FE0)),
    layout.LOW_SUPERVISOR, layout.LOW_ABSENT, layout.LOW_ABSENT - 0x20, layout.HIGH_USER, layout.HIGH_ABSENT,
    0x7FFF_FFFF_FFF0,
)  # fmt: skip


COMPARISONS = ("cmps", "scas")


@pytest.mark.parametrize("seed", range(80))
def test_repetition_ends_up_as_in_direct_execution(whole_guest: WholeGuest, seed: int) -> None:
    """Two liberties of direct execution are left out: it loads the second operand of CMPS first, which shows where
    neither can be loaded, and keeps the flags of the last element when a repeated comparison faults.
    """
    rng = random.Random(seed)
    name = rng.choice(("movs", "stos", "lods", *COMPARISONS))
    cpl = rng.choice((0, 3))
    source, destination = rng.choice(PLACES), rng.choice(PLACES)
    if name == "cmps":
        source = layout.LOW_USER if cpl == 3 else layout.HIGH_SUPERVISOR
    prefixes = ("", "rep ", "repne ") if name in COMPARISONS else ("", "rep ")
    direct, emulated = run_on_both_paths(
        whole_guest,
        rng.choice(prefixes) + name + rng.choice("bwdq"),
        cpl=cpl,
        rflags=rng.choice((0, RFLAGS_DF)) | rng.choice((0, RFLAGS_AC)),
        rax=rng.choice((0, rng.getrandbits(64))),
        rcx=rng.choice((0, 1, 5, 9, 40, 600)),
        rsi=source + rng.randrange(0x18),
        rdi=destination + rng.randrange(0x18),
    )
    if name in COMPARISONS and direct.event != str(layout.DONE_VECTOR):
        direct, emulated = _without_flags(direct), _without_flags(emulated)
    assert emulated == direct


def _without_flags(result: Result) -> Result:
    """Memory has them too, in the frame of the fault."""
    return replace(result, rflags=0, registers=replace(result.registers, rflags=0), memory="")


@pytest.mark.parametrize("seed", range(20))
def test_repetition_of_compatibility_mode_ends_up_as_in_direct_execution(
    whole_guest: WholeGuest, seed: int
) -> None:
    rng = random.Random(seed)
    name = rng.choice(("movs", "stos", "lods")) + rng.choice("bwd")
    direct, emulated = run_on_both_paths(
        whole_guest,
        rng.choice(("", "rep ")) + name,
        cpl=3,
        bits=32,
        rflags=rng.choice((0, RFLAGS_DF)),
        rax=rng.getrandbits(32),
        rcx=rng.choice((0, 1, 9, 600)),
        rsi=layout.LOW_USER + rng.choice((0, 0xFF0, 0x1FF0)) + rng.randrange(0x10),
        rdi=layout.LOW_USER + rng.choice((0, 0x10, 0x800, 0x1FF0)) + rng.randrange(0x10),
    )
    assert emulated == direct
