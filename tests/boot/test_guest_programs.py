"""The programs of guests/ as judges of the machine, under Debian's kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

GoesOn = Callable[..., Any]

#: Expectations that do not hold yet, by program, with the row of docs/differences.md that each belongs to. One
#: that begins to hold fails its test too, and is taken out here and there.
NOT_YET = {
    "exact": {
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


@pytest.mark.parametrize("program", ["selfmod", "exact", "debug", "fp"])
def test_expectations_hold(at_prompt: GoesOn, program: str) -> None:
    check(at_prompt(f"/program/{program}\n"), program, NOT_YET.get(program, {}))


@pytest.mark.parametrize(
    ("cpu", "lass", "refusal", "refusal_of_stack_accesses"),
    [
        pytest.param("max", "on", "trap 13 error 0", "trap 12 error 0", id="with_lass"),
        pytest.param("max,-lass,-pku", "off", "trap 14", "trap 14", id="without_lass"),
    ],
)
def test_user_accesses_to_the_upper_half(
    at_prompt: GoesOn,
    cpu: str,
    lass: str,
    refusal: str,
    refusal_of_stack_accesses: str,
) -> None:
    run = at_prompt("/program/lass_user\n", cpu=cpu)
    assert f"LASS is {lass}, linear addresses have 48 bits" in run.lines
    for access in (
        "read kernel text",
        "write kernel data",
        "call kernel text",
        "fs:[rbp] is no stack access",
    ):
        assert f"got {refusal} " in line_about(run, access)
    for access in ("push", "call, rsp there", "read [rbp]", "ds: override is ignored"):
        assert f"got {refusal_of_stack_accesses} " in line_about(run, access)
    check(run, "lass_user", {})


def line_about(run: Any, access: str) -> str:
    return next(line for line in run.lines if line[NAME].strip() == access)


@pytest.mark.parametrize(
    ("cpu", "lass", "report"),
    [
        pytest.param("max", "on", "probably LASS violation for address 0x10000", id="with_lass"),
        pytest.param(
            "max,-lass,-pku",
            "off",
            "unable to handle page fault for address: 0000000000010000",
            id="without_lass",
        ),
    ],
)
def test_kernel_reports_its_own_access_to_the_lower_half(
    at_prompt: GoesOn, cpu: str, lass: str, report: str
) -> None:
    run = at_prompt("/program/lass_supervisor\n", cpu=cpu)
    assert f"LASS is {lass}" in run.lines
    assert report in line_about(run, "read")
    check(run, "lass_supervisor", {})
