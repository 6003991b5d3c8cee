"""Selecting runs by name: the expressions of pytest's -k."""

from __future__ import annotations

import pytest

from lasskvm.conformance.selection import SelectionError, parse_selection

NAMES = (
    "stack/push [lass] stack",
    "stack/push [mmio] stack",
    "data/read [lass] data",
    "data/read [off] data",
)


def chosen(expression: str) -> list[int]:
    selector = parse_selection(expression)
    return [number for number, name in enumerate(NAMES) if selector(name)]


@pytest.mark.parametrize(
    ("expression", "numbers"),
    [
        ("", [0, 1, 2, 3]),
        ("stack", [0, 1]),
        ("STACK", [0, 1]),
        ("not stack", [2, 3]),
        ("stack and lass", [0]),
        ("mmio or off", [1, 3]),
        ("stack and not mmio", [0]),
        ("not (mmio or off)", [0, 2]),
        ("stack and mmio or data and off", [1, 3]),
        ("(stack or data) and lass", [0, 2]),
        ("not not push", [0, 1]),
        ("[lass]", [0, 2]),
        ("data/read", [2, 3]),
        ("nothing-of-the-kind", []),
    ],
)
def test_expression(expression: str, numbers: list[int]) -> None:
    assert chosen(expression) == numbers


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("stack and", "missing at the end"),
        ("stack mmio", 'missing before "mmio"'),
        ("(stack", '")" is missing'),
        ("stack)", 'missing before ")"'),
        ("or stack", 'missing before "or"'),
        ("not", "missing at the end"),
        ("()", 'missing before ")"'),
    ],
)
def test_mistakes_are_explained(expression: str, problem: str) -> None:
    with pytest.raises(SelectionError) as raised:
        parse_selection(expression)
    assert problem in str(raised.value)
    assert expression in str(raised.value)
