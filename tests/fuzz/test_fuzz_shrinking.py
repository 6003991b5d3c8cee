"""Shrinking: what is left of a failing case is what it takes to fail."""

from __future__ import annotations

from lasskvm.fuzz import layout
from lasskvm.fuzz.case import Case, Mode
from lasskvm.fuzz.generator import generate
from lasskvm.fuzz.shrinking import shrink
from lasskvm.x86.registers import CR4_SMAP, RFLAGS_AC


def long_case() -> Case:
    """A case in 64-bit mode with several instructions."""
    cases = (generate("shrink", index, (Mode.LONG64,)) for index in range(10_000))
    return next(case for case in cases if len(case.code) > 20 and case.cr4 & CR4_SMAP)


def test_everything_goes_when_everything_fails() -> None:
    case = shrink(long_case(), lambda candidate: True)
    assert not case.cr4 & CR4_SMAP
    assert set(case.pages) == {layout.PAGE_PLAIN}
    assert set(case.registers) == {0}
    assert case.data_seed == 0


def test_what_the_failure_needs_stays() -> None:
    start = long_case()

    def fails(candidate: Case) -> bool:
        return bool(candidate.cr4 & CR4_SMAP) and candidate.registers[3] == start.registers[3]

    case = shrink(start, fails)
    assert fails(case)
    assert case.registers[3] == start.registers[3]
    assert set(case.registers[4:]) == {0}
    assert not case.rflags & RFLAGS_AC


def test_one_instruction_is_left_of_many() -> None:
    start = long_case()
    first = start.code[:2]
    case = shrink(start, lambda candidate: candidate.code.startswith(first))
    assert len(case.code) < len(start.code)
    assert case.code.startswith(first)


def test_case_that_cannot_shrink_comes_back() -> None:
    case = long_case()
    assert shrink(case, lambda candidate: False) == case
