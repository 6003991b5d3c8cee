"""The table of known defects: every entry says why, and nothing is left over."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from lasskvm.fuzz import control_signs, known_defects, operand_signs
from lasskvm.fuzz.known_defects import KNOWN_DEFECTS, Defect


@pytest.mark.parametrize("defect", KNOWN_DEFECTS, ids=lambda defect: defect.name)
def test_entry_has_a_reason(defect: Defect) -> None:
    assert len(defect.reason.split()) >= 6
    assert defect.reason.endswith(".")


def test_names_are_distinct() -> None:
    assert len({defect.name for defect in KNOWN_DEFECTS}) == len(KNOWN_DEFECTS)


@pytest.mark.parametrize("module", [control_signs, operand_signs], ids=lambda module: module.__name__)
def test_every_sign_is_used(module: object) -> None:
    path = Path(str(module.__file__))  # type: ignore[attr-defined]
    signs = {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    table = ast.parse(Path(known_defects.__file__).read_text())
    used = {node.attr for node in ast.walk(table) if isinstance(node, ast.Attribute)}
    assert signs
    assert signs <= used
