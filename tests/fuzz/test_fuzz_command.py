"""`lasskvm fuzz`: options, exit statuses, and what a person sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import Cli, make_cli

from lasskvm.fuzz import known_defects
from lasskvm.fuzz.case import Case
from lasskvm.fuzz.generator import generate


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return make_cli(capfd)


def test_agreement_is_status_0(cli: Cli) -> None:
    result = cli("fuzz", "--cases", 120, "--paths", "emulator,emulator", "--workers", 1, "--quiet")
    assert result.status == 0
    assert "agreed" in result.out
    assert result.err == ""


def test_random_seed_is_printed(cli: Cli) -> None:
    words = ("--paths", "emulator,emulator", "--workers", 1, "--quiet")
    result = cli("fuzz", "--cases", 5, "--seed", "random", *words)
    assert result.error.startswith("lasskvm: the seed is ")


@pytest.mark.parametrize(
    "words, advice",
    [
        (("--paths", "jit"), "two paths"),
        (("--paths", "jit,emulater"), "emulator"),
        (("--modes", "63"), "64"),
        (("--cases", "0"), "1"),
    ],
)
def test_wrong_option_is_status_2(cli: Cli, words: tuple[str, ...], advice: str) -> None:
    result = cli("fuzz", *words)
    assert result.status == 2
    assert advice in result.err


def test_case_in_a_file_is_run_again(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "case.json"
    file.write_text(generate("replay", 1).to_json())
    result = cli("fuzz", "--replay", file, "--paths", "emulator,emulator")
    assert result.status == 0
    assert "The case is agreed" in result.out


@pytest.mark.parametrize("content", ["", "{}", '{"mode": 7}'])
def test_file_without_a_case_is_status_2(cli: Cli, tmp_path: Path, content: str) -> None:
    file = tmp_path / "case.json"
    file.write_text(content)
    result = cli("fuzz", "--replay", file)
    assert result.status == 2
    assert "cannot be replayed" in result.err


def test_unexplained_case_is_status_1_and_is_kept(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case_of: Callable[..., Case]
) -> None:
    """A difference that the table does not know any more."""
    monkeypatch.setattr(known_defects, "KNOWN_DEFECTS", ())
    file = tmp_path / "case.json"
    file.write_text(case_of("489f").to_json())
    result = cli("fuzz", "--replay", file)
    assert result.status == 1
    assert "unexplained" in result.out
    assert "lahf" in result.out
