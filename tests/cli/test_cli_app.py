"""The command line as a whole: help for everything, the version, and names that are nearly right."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cli_support import Cli

import lasskvm

COMMANDS = [("demo",), ("run",), ("explain",), ("images",), ("images", "pull"), ("images", "list")]


@pytest.mark.parametrize("command", [(), *COMMANDS])
def test_every_command_has_help_with_an_example(cli: Cli, command: tuple[str, ...]) -> None:
    result = cli(*command, "--help")
    text = " ".join(result.out.split())
    assert (result.status, result.err) == (0, "")
    assert f"Usage: {' '.join(('lasskvm', *command))}" in text
    assert "Example" in text
    assert "lasskvm " + " ".join(command) in text.partition("Example")[2]


def test_the_version_is_the_packages(cli: Cli) -> None:
    assert cli("--version").out == f"lasskvm {lasskvm.__version__}\n"


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (("rnu",), "run"),
        (("exlain",), "explain"),
        (("images", "pul"), "pull"),
        (("run", "--memroy", "3"), "--memory"),
    ],
)
def test_a_misspelt_name_is_told_the_nearest(cli: Cli, words: tuple[str, ...], nearest: str) -> None:
    result = cli(*words)
    assert result.status == 2
    assert nearest in result.err.partition("Error")[2]


def test_no_command_shows_the_help(cli: Cli) -> None:
    result = cli()
    assert "explain" in result.out + result.err
    assert "Traceback" not in result.err


def test_the_package_can_be_run_as_a_module() -> None:
    command = [sys.executable, "-m", "lasskvm", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"lasskvm {lasskvm.__version__}\n", "")


def test_help_and_explanations_do_not_wait_for_the_engine() -> None:
    code = (
        "import sys; from lasskvm.cli import main\n"
        "try: main(['explain', '--cpl', '3', '--address', '0'], prog_name='lasskvm')\n"
        "except SystemExit: print(sorted({'numba', 'unicorn'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1] == "[]"
