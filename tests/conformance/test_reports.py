"""Reports: JSON, TAP and JUnit of one run of each status."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from lasskvm.conformance.reports import write
from lasskvm.conformance.runner import Report, Result, Status


def result(
    name: str, status: Status, reason: str = "", got: str = "completes", group: str = "stack"
) -> Result:
    return Result(
        f"{group}/{name}", group, "lass", "a case # of words", status, "#SS(0) at access", got, reason,
        "push rax", 0.25,
    )  # fmt: skip


@pytest.fixture
def report() -> Report:
    return Report(
        "jit",
        (
            result("good", Status.PASS),
            result("bad", Status.FAIL, 'not as expected: "completes" <&>'),
            result("hung", Status.ERROR, "timeout: the guest was still running after 5 s"),
            result("unasked", Status.SKIP, "this KVM has no #LASS", got="", group="data"),
        ),
        2.0,
    )


def test_summary(report: Report) -> None:
    assert report.summary == {"pass": 1, "fail": 1, "skip": 1, "error": 1}
    assert not report.passed
    assert report.runs_per_second == 1.5


@pytest.mark.parametrize(
    ("status", "passed"),
    [(Status.PASS, True), (Status.SKIP, True), (Status.FAIL, False), (Status.ERROR, False)],
)
def test_what_counts_as_passed(status: Status, passed: bool) -> None:
    assert Report("jit", (result("one", status),), 1.0).passed is passed


def test_json(report: Report) -> None:
    document = json.loads(write(report, "json"))
    assert document["backend"] == "jit"
    assert document["summary"] == {"pass": 1, "fail": 1, "skip": 1, "error": 1}
    assert document["cases"][1] == {
        "id": "stack/bad", "group": "stack", "variant": "lass", "status": "fail", "expected": "#SS(0) at access",
        "got": "completes", "reason": 'not as expected: "completes" <&>', "disassembly": "push rax",
    }  # fmt: skip


def test_tap(report: Report) -> None:
    lines = write(report, "tap").splitlines()
    assert lines[:3] == ["TAP version 14", "1..4", "ok 1 - stack/good [lass]"]
    assert lines[3] == "not ok 2 - stack/bad [lass]"
    assert lines[4] == "  ---"
    assert '  got: "completes"' in lines
    assert lines[-1] == "ok 4 - data/unasked [lass] # SKIP this KVM has no \\#LASS"
    assert lines.count("  ...") == 2


def test_junit(report: Report) -> None:
    root = ElementTree.fromstring(write(report, "junit"))
    assert root.attrib["tests"] == "4"
    assert (root.attrib["failures"], root.attrib["errors"], root.attrib["skipped"]) == ("1", "1", "1")
    assert [suite.attrib["name"] for suite in root] == ["stack", "data"]
    failure = root.find("testsuite/testcase[@name='stack/bad [lass]']/failure")
    assert failure is not None
    assert failure.attrib["message"] == 'not as expected: "completes" <&>'
    assert "expected: #SS(0) at access" in (failure.text or "")
    assert root.find("testsuite/testcase/error") is not None
    assert root.find("testsuite[@name='data']/testcase/skipped") is not None
