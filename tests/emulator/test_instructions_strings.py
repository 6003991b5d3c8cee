"""String instructions: elements, repetition, and that pieces come to the same as elements."""

from __future__ import annotations

import pytest
from emulator_guest import CODE, Guest
from legacy_modes import (
    DATA_BASE,
    EXTRA_BASE,
    STACK_BASE,
    START,
    enter_protected_mode,
    enter_real_mode,
    run,
)
from string_guest import (
    CMPSB,
    DESTINATION,
    LODSB,
    LODSD,
    LODSQ,
    MOVSB,
    MOVSD,
    MOVSQ,
    MOVSW,
    PATTERN,
    REP,
    REPNE,
    SCASB,
    SCASQ,
    SOURCE,
    STOSB,
    STOSQ,
    content,
    finish,
    string_kernel,
)

from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.string_registers import element_step
from lasskvm.state import (
    BASE,
    LIMIT,
    RAX,
    RCX,
    RDI,
    RFLAGS,
    RIP,
    RSI,
    segment_word,
)
from lasskvm.x86.exceptions import GP
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.registers import (
    ES,
    FS,
    GS,
    RFLAGS_AF,
    RFLAGS_CF,
    RFLAGS_DF,
    RFLAGS_RF,
    RFLAGS_SF,
    RFLAGS_ZF,
)


@pytest.fixture(params=["walked", "cached"])
def kernel(guest: Guest, request: pytest.FixtureRequest) -> Guest:
    """A 64-bit kernel with a pattern at the source."""
    return string_kernel(guest, cached=request.param == "cached")


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
