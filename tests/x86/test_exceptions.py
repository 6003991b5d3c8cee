"""Exception vectors: names, error codes, and which pairs make a double fault."""

from __future__ import annotations

import pytest

from lasskvm.x86 import exceptions
from lasskvm.x86.exceptions import (
    AC,
    BP,
    CP,
    DB,
    DE,
    DF,
    GP,
    MC,
    MF,
    NM,
    NMI,
    NP,
    PF,
    SS,
    TS,
    UD,
    VE,
    XM,
    has_error_code,
    makes_double_fault,
    vector_name,
)


@pytest.mark.parametrize(
    ("name", "vector"),
    [
        ("DE", 0), ("DB", 1), ("NMI", 2), ("BP", 3), ("OF", 4), ("BR", 5), ("UD", 6), ("NM", 7), ("DF", 8),
        ("TS", 10), ("NP", 11), ("SS", 12), ("GP", 13), ("PF", 14), ("MF", 16), ("AC", 17), ("MC", 18),
        ("XM", 19), ("VE", 20), ("CP", 21),
    ],
)  # fmt: skip
def test_a_vector_has_its_number_and_its_name(name: str, vector: int) -> None:
    assert getattr(exceptions, name) == vector
    assert vector_name(vector) == (name if name == "NMI" else f"#{name}")


def test_an_interrupt_vector_is_named_by_its_number() -> None:
    assert vector_name(33) == "vector 33"
    assert vector_name(9) == "vector 9"


def test_exactly_these_exceptions_push_an_error_code() -> None:
    assert [vector for vector in range(256) if has_error_code(vector)] == [8, 10, 11, 12, 13, 14, 17, 21]


@pytest.mark.parametrize("first", [DE, TS, NP, SS, GP, CP])
@pytest.mark.parametrize("second", [DE, TS, NP, SS, GP, CP])
def test_two_contributory_exceptions_make_a_double_fault(first: int, second: int) -> None:
    assert makes_double_fault(first, second)


@pytest.mark.parametrize("second", [DE, TS, NP, SS, GP, CP, PF])
def test_a_page_fault_and_a_second_fault_make_a_double_fault(second: int) -> None:
    assert makes_double_fault(PF, second)


@pytest.mark.parametrize("first", [DE, TS, NP, SS, GP, CP])
def test_a_page_fault_while_delivering_a_contributory_exception_is_delivered(first: int) -> None:
    assert not makes_double_fault(first, PF)


@pytest.mark.parametrize("benign", [DB, NMI, BP, UD, NM, MF, AC, MC, XM, VE])
@pytest.mark.parametrize("other", [DE, GP, PF, UD])
def test_a_benign_exception_never_makes_a_double_fault(benign: int, other: int) -> None:
    assert not makes_double_fault(benign, other)
    assert not makes_double_fault(other, benign)


@pytest.mark.parametrize("vector", [32, 128, 255])
def test_an_interrupt_never_makes_a_double_fault(vector: int) -> None:
    assert not makes_double_fault(vector, GP)


def test_a_double_fault_is_not_a_contributory_exception() -> None:
    assert not makes_double_fault(DF, UD)
