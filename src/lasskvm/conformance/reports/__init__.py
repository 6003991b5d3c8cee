"""Reports of a conformance run: JSON, TAP and JUnit XML for programs; the table for people is the command line's.

:func:`write` gives the text of a report in one of :data:`FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable

from lasskvm.conformance.reports.as_json import as_json
from lasskvm.conformance.reports.junit import as_junit
from lasskvm.conformance.reports.tap import as_tap
from lasskvm.conformance.runner import Report

__all__ = ["FORMATS", "write"]

#: What each format's name stands for.
FORMATS: dict[str, Callable[[Report], str]] = {"json": as_json, "tap": as_tap, "junit": as_junit}


def write(report: Report, form: str) -> str:
    """*report* in format *form*, a key of :data:`FORMATS`; it ends with a newline."""
    return FORMATS[form](report)
