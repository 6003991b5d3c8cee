"""JUnit XML as continuous-integration servers read it: a test suite for each group, a test case for each run."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import groupby

from lasskvm.conformance.runner import Report, Result, Status

__all__ = ["as_junit"]


def as_junit(report: Report) -> str:
    """*report* as JUnit XML."""
    root = ElementTree.Element("testsuites", _attributes(f"lasskvm verify {report.backend}", report.results))
    for group, results in groupby(report.results, key=lambda result: result.group):
        members = tuple(results)
        suite = ElementTree.SubElement(root, "testsuite", _attributes(group, members))
        for result in members:
            _add(suite, report.backend, result)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _attributes(name: str, results: tuple[Result, ...]) -> dict[str, str]:
    def count(status: Status) -> str:
        return str(sum(result.status is status for result in results))

    return {
        "name": name,
        "tests": str(len(results)),
        "failures": count(Status.FAIL),
        "errors": count(Status.ERROR),
        "skipped": count(Status.SKIP),
        "time": f"{sum(result.seconds for result in results):.3f}",
    }


def _add(suite: ElementTree.Element, backend: str, result: Result) -> None:
    case = ElementTree.SubElement(
        suite,
        "testcase",
        {
            "classname": f"lasskvm.{backend}.{result.group}",
            "name": result.name,
            "time": f"{result.seconds:.4f}",
        },
    )
    if result.status is Status.SKIP:
        ElementTree.SubElement(case, "skipped", {"message": result.reason})
    elif result.status.is_bad:
        name = "failure" if result.status is Status.FAIL else "error"
        element = ElementTree.SubElement(case, name, {"message": result.reason})
        element.text = f"{result.words}\n{result.disassembly}\nexpected: {result.expected}\ngot: {result.got}"
