"""TAP, version 14 (https://testanything.org): a line for each run, a block of YAML behind what is bad.

Version 13 has the same lines, so consumers of either read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from lasskvm.conformance.runner import Report, Result, Status

__all__ = ["as_tap"]


def as_tap(report: Report) -> str:
    """*report* as TAP."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield "TAP version 14"
    yield f"1..{len(report.results)}"
    for number, result in enumerate(report.results, 1):
        yield from _result(number, result)


def _result(number: int, result: Result) -> Iterator[str]:
    line = f"{'not ok' if result.status.is_bad else 'ok'} {number} - {_escaped(result.name)}"
    if result.status is Status.SKIP:
        line += f" # SKIP {_escaped(result.reason)}"
    yield line
    if result.status.is_bad:
        # A JSON string is one of YAML's.
        yield "  ---"
        for name, value in (
            ("status", result.status.value),
            ("words", result.words),
            ("instruction", result.disassembly),
            ("expected", result.expected),
            ("got", result.got),
            ("reason", result.reason),
        ):
            yield f"  {name}: {json.dumps(value)}"
        yield "  ..."


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("#", "\\#")
