"""`lasskvm demo`: how a result is shown, and what the exit status says about it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from cli_support import Cli, Result

from lasskvm import kvm


@dataclass(frozen=True)
class FakeRow:
    access: str
    without_lass: str
    with_lass: str
    blocked: bool


@dataclass(frozen=True)
class FakeResult:
    rows: tuple[FakeRow, ...]
    as_documented: bool


ROWS = (
    FakeRow("user reads [kernel] data", "#PF, error code 5", "#GP(0)", True),
    FakeRow("user reads its own data", "done", "done", False),
)


@pytest.fixture
def run_demo(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command with a demo that finds *rows* and calls its progress once."""

    def run(as_documented: bool, *words: str) -> Result:
        module = types.ModuleType("lasskvm.conformance.demo")

        def fake(progress: Callable[[str], None], *, engine: str, forced_emulation: bool) -> FakeResult:
            progress("switching LASS on")
            return FakeResult(ROWS, as_documented)

        module.run_demo = fake  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lasskvm.conformance.demo", module)
        monkeypatch.setattr(kvm, "prepare", lambda progress: None)
        return cli("demo", *words)

    return run


def test_the_table_shows_each_access_without_and_with_lass(run_demo: Callable[..., Result]) -> None:
    result = run_demo(True)
    assert result.status == 0
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.out.splitlines()]
    assert ["user reads [kernel] data", "#PF, error code 5", "#GP(0)"] in cells
    assert ["user reads its own data", "done", "done"] in cells
    assert "LASS blocked 1 of 2 accesses, and each came out as the manual says." in result.out


def test_progress_goes_to_standard_error_unless_it_is_to_be_quiet(run_demo: Callable[..., Result]) -> None:
    assert run_demo(True).err == "lasskvm: switching LASS on\n"
    assert run_demo(True, "--quiet").err == ""


def test_an_outcome_that_the_manual_does_not_give_is_a_failure(run_demo: Callable[..., Result]) -> None:
    result = run_demo(False)
    assert result.status == 1
    assert "not each came out as the manual says" in result.out
