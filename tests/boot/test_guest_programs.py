"""The programs of guests/ as judges of the machine, under Debian's kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LassKvm = Callable[..., Any]
GuestProgram = Callable[[str], Path]

#: Expectations that do not hold yet, by program, with the row of docs/differences.md that each belongs to. One
#: that begins to hold fails its test too, and is taken out here and there.
NOT_YET = {
    "lass_user": {
        "iret, rsp there": "stack accesses of far transfers",
    },
    "exact": {
        "lock on a plain load": "LOCK on an instruction that cannot have it",
        "movaps, misaligned": "a misaligned 16-byte operand",
        "alignment check": "#AC",
    },
    "fp": {
        "fprem is exact": "FPREM",
    },
}
#: Where an expectation's name ends in its line: the details stand behind.
NAME = slice(5, 39)


def verdicts(lines: list[str]) -> dict[str, list[str]]:
    """The names of expectations by "ok" and "FAIL"."""
    found: dict[str, list[str]] = {"ok": [], "FAIL": []}
    for line in lines:
        word, _, _ = line.partition(" ")
        if word in found:
            found[word].append(line[NAME].strip())
    return found


def check(run: Any, program: str, not_yet: dict[str, str]) -> None:
    """Judge a run of *program*: all its expectations hold but those that are known not to."""
    found = verdicts(run.lines)
    count = len(found["ok"]) + len(found["FAIL"])
    assert f"{program}: {len(found['ok'])} of {count} expectations hold" in run.lines, run.console
    assert set(found["FAIL"]) == set(not_yet), "\n".join(run.lines[-count:])
    assert run.status == (1 if not_yet else 0)


@pytest.mark.parametrize("program", ("lass_user", "selfmod", "exact", "debug", "fp", "lass_supervisor"))
def test_expectations_hold_with_lass(lasskvm: LassKvm, guest_program: GuestProgram, program: str) -> None:
    check(lasskvm("-q", "--", guest_program(program)), program, NOT_YET.get(program, {}))


@pytest.mark.parametrize("program", ("lass_user", "lass_supervisor"))
def test_expectations_hold_without_lass(lasskvm: LassKvm, guest_program: GuestProgram, program: str) -> None:
    run = lasskvm("-q", "--cpu", "max,-lass", "--", guest_program(program))
    assert "LASS is off" in run.console
    check(run, program, NOT_YET.get(program, {}))


@pytest.mark.parametrize(
    ("access", "with_lass"),
    (
        ("read kernel text", "trap 13 error 0"),
        ("write kernel data", "trap 13 error 0"),
        ("call kernel text", "trap 13 error 0"),
        ("push", "trap 12 error 0"),
        ("call, rsp there", "trap 12 error 0"),
        ("read [rbp]", "trap 12 error 0"),
    ),
)
def test_user_access_to_the_upper_half_is_refused_before_paging(
    transcripts: dict[str, list[str]], access: str, with_lass: str
) -> None:
    assert f"got {with_lass}" in line_about(transcripts["on"], access)
    assert "got trap 14" in line_about(transcripts["off"], access)


@pytest.fixture(scope="module")
def transcripts(debian: Any, guest_program: GuestProgram) -> dict[str, list[str]]:
    """What lass_user prints with LASS on and off."""
    import subprocess
    import sys

    lines = {}
    for name, cpu in (("on", "max"), ("off", "max,-lass")):
        command = [sys.executable, "-m", "lasskvm", "run", "debian", "-q", "--cpu", cpu, "--"]
        output = subprocess.run(
            [*command, str(guest_program("lass_user"))],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        ).stdout
        lines[name] = output.decode().replace("\r", "").splitlines()
    return lines


def line_about(lines: list[str], access: str) -> str:
    return next(line for line in lines if line[NAME].strip() == access)


def test_the_kernel_names_a_ring_0_violation(lasskvm: LassKvm, guest_program: GuestProgram) -> None:
    run = lasskvm("--", guest_program("lass_supervisor"))
    assert run.status == 0
    assert "probably LASS violation for address 0x10000" in run.console
