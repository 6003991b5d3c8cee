"""Cases: data that can be kept, drawn the same way each time."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from lasskvm.fuzz import layout
from lasskvm.fuzz.case import Case, CaseFormatError, Mode, Paging
from lasskvm.fuzz.encoding import decode_at, instructions_of, random_instruction, reads_time
from lasskvm.fuzz.generator import MODE_WEIGHTS, generate
from lasskvm.fuzz.image import FORCED_EMULATION_PREFIX, case_image

CASES = [generate("cases", index) for index in range(600)]


def test_case_is_the_same_whenever_it_is_drawn() -> None:
    assert [generate("cases", index) for index in range(0, 600, 7)] == CASES[::7]


def test_seeds_differ() -> None:
    assert generate("a", 0) != generate("b", 0)


def test_case_survives_json() -> None:
    for case in CASES:
        assert Case.from_json(case.to_json()) == case


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"mode": "64"}', "null", "not json"])
def test_what_is_no_case_is_refused(text: str) -> None:
    with pytest.raises(CaseFormatError, match="not a fuzz case"):
        Case.from_json(text)


def test_case_with_a_register_too_few_is_refused() -> None:
    fields = json.loads(CASES[0].to_json())
    fields["registers"].pop()
    with pytest.raises(CaseFormatError, match="16 registers"):
        Case.from_json(json.dumps(fields))


def test_every_mode_and_every_kind_of_paging_comes_up() -> None:
    assert {case.mode for case in CASES} == set(MODE_WEIGHTS)
    assert {case.paging for case in CASES} == set(Paging)


def test_only_the_modes_asked_for_come_up() -> None:
    modes = (Mode.REAL, Mode.COMPATIBILITY32)
    assert {generate("cases", index, modes).mode for index in range(60)} == set(modes)


def test_about_half_of_the_cases_are_single_stepped() -> None:
    stepped = Counter(case.is_stepped for case in CASES)
    assert 200 < stepped[True] < 400


def test_cases_do_not_read_the_time() -> None:
    assert not any(reads_time(case.code) for case in CASES)


def test_memory_operands_hit_data_pages_more_often_than_not() -> None:
    hits = Counter(_hits(case) for case in CASES if case.mode is Mode.LONG64 and _base(case) is not None)
    assert hits[True] > hits[False]


def _base(case: Case) -> int | None:
    """The address of the first instruction's operand, when it is nothing but a base register and a displacement."""
    first = instructions_of(case)[0]
    # RAX to R15 are consecutive in iced-x86.
    number = first.memory_base - 53
    if first.is_invalid or first.memory_index or not 0 <= number < 16 or first.memory_segment in (75, 76):
        return None
    return (case.registers[number] + first.memory_displacement) % (1 << 64)


def _hits(case: Case) -> bool:
    address = _base(case)
    assert address is not None
    pages = (layout.interesting_address(gva) for gva in layout.data_pages(case.paging))
    return any(-16 <= address - gva < 2 * layout.PAGE for gva in pages)


def test_random_instructions_decode_most_of_the_time() -> None:
    import random

    rng = random.Random(1)
    for bits in (16, 32, 64):
        decoded = [decode_at(bits, random_instruction(rng, bits)) is not None for _ in range(500)]
        assert sum(decoded) > 430


def test_code_lies_in_the_image_behind_the_forced_emulation_prefix() -> None:
    case = next(case for case in CASES if 0x100 < layout.code_offset(case) < 0x800)
    gpa = layout.CODE_GPA + layout.code_offset(case)
    before = len(FORCED_EMULATION_PREFIX)
    expected = FORCED_EMULATION_PREFIX + case.code
    assert case_image(case)[gpa - before : gpa + len(case.code)].tobytes() == expected


def test_images_of_a_case_are_equal_and_independent() -> None:
    first, second = case_image(CASES[0]), case_image(CASES[0])
    assert (first == second).all()
    first[:] = 0
    assert second.any()
