"""What the documentation says can be done: examples run, links lead somewhere, commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lasskvm.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text()

#: A Python example and the output it is said to have.
EXAMPLE = re.compile(r"```python\n(?P<code>.*?)```\n\n```text\n(?P<output>.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)(?P<target>[^)#]+)")
#: Files of this repository as prose names them, from its root or from the package.
FILE = re.compile(r"`(?P<path>[\w./-]+/[\w.-]+\.(?:py|md|c))`")
BLOCK = re.compile(r"```(?:sh|console)\n(?P<text>.*?)```", re.DOTALL)
COMMAND = re.compile(r"\blasskvm (?P<words>(?:images )?[a-z]+)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "example", list(EXAMPLE.finditer(README)), ids=lambda example: f"line_{line_of(example)}"
)
def test_example_of_the_readme_prints_what_it_says(example: re.Match[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", example["code"]], capture_output=True, text=True, check=False
    )
    assert (result.stdout, result.stderr) == (example["output"], "")


def line_of(match: re.Match[str]) -> int:
    return match.string.count("\n", 0, match.start()) + 1


def test_readme_has_examples() -> None:
    assert len(EXAMPLE.findall(README)) == README.count("```python")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_file_names_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for link in LINK.finditer(text):
        assert (page.parent / link["target"]).exists(), link["target"]
    for file in FILE.finditer(text):
        places = (ROOT, ROOT / "src" / "lasskvm", ROOT / "tests" / "engine", page.parent)
        assert any((place / file["path"]).exists() for place in places), file["path"]


def commands() -> list[str]:
    return sorted({command for block in BLOCK.findall(README) for command in COMMAND.findall(block)})


@pytest.mark.parametrize("words", commands())
def test_commands_of_the_readme_exist(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words.split(), "--help"], prog_name="lasskvm")
    assert ended.value.code == 0
    assert "Usage" in capsys.readouterr().out


def test_readme_begins_with_the_two_commands() -> None:
    setup = "python3 -m venv .venv && . .venv/bin/activate && pip install -e "
    first_screen = "\n".join(README.splitlines()[:40])
    assert f"{setup}. && lasskvm demo\n" in first_screen
    assert f"{setup}'.[dev]' && pytest -n auto\n" in first_screen


def test_ci_runs_the_readmes_test_command() -> None:
    assert "pytest -n auto\n" in (ROOT / ".ci" / "run").read_text()
