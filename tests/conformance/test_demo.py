"""The demonstration: its guest enables LASS by itself, and every access comes out as the manual says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lasskvm.conformance import demo
from lasskvm.conformance.demo import NOT_REACHED, DemoResult, run_demo
from lasskvm.conformance.demo_cases import CASES, Observation
from lasskvm.x86.cpu_models import CpuModel, parse_cpu


@pytest.fixture(scope="module")
def result() -> DemoResult:
    return run_demo()


def test_the_guest_finds_and_enables_lass(result: DemoResult) -> None:
    assert result.found
    assert result.enabled


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.words for case in CASES])
def test_access_comes_out_as_documented(result: DemoResult, number: int) -> None:
    row, case = result.rows[number], CASES[number]
    assert row.access == case.words
    assert (row.without_lass, row.with_lass) == (str(case.without_lass), str(case.with_lass))
    assert row.as_documented
    assert row.blocked == (case.with_lass.vector is not None)


def test_about_twenty_accesses_most_of_them_blocked(result: DemoResult) -> None:
    assert 20 <= len(result.rows) <= 25
    assert sum(row.blocked for row in result.rows) >= 15
    assert any(not row.blocked for row in result.rows)
    assert result.as_documented


def test_nothing_that_goes_through_with_lass_fails_without_it() -> None:
    for case in CASES:
        assert case.with_lass.vector is not None or case.without_lass.vector is None


def test_progress_is_told() -> None:
    messages: list[str] = []
    run_demo(messages.append)
    assert messages


def test_two_demonstrations_are_the_same(result: DemoResult) -> None:
    assert run_demo() == result


def test_wrong_outcome_is_not_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = CASES
    monkeypatch.setattr(demo, "CASES", (replace(first, with_lass=Observation()), *others))
    result = run_demo()
    assert not result.rows[0].as_documented
    assert not result.as_documented


def test_processor_without_lass_is_seen_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_lass(text: str) -> CpuModel:
        return parse_cpu(f"{text},-lass")

    monkeypatch.setattr(demo, "parse_cpu", without_lass)
    result = run_demo()
    assert not result.found
    assert not result.enabled
    assert not result.as_documented
    assert {row.with_lass for row in result.rows} == {NOT_REACHED}
    assert not any(row.blocked for row in result.rows)
