"""JSON: one object with the summary and every result.

``{"backend": ..., "summary": {"pass": n, "fail": n, "skip": n, "error": n}, "cases": [{"id", "group", "variant",
"status", "expected", "got", "reason", "disassembly"}]}``
"""

from __future__ import annotations

import json

from lasskvm.conformance.runner import Report

__all__ = ["as_json"]


def as_json(report: Report) -> str:
    """*report* as JSON."""
    return (
        json.dumps(
            {
                "backend": report.backend,
                "summary": report.summary,
                "seconds": round(report.seconds, 3),
                "cases": [
                    {
                        "id": result.id,
                        "group": result.group,
                        "variant": result.variant,
                        "status": result.status.value,
                        "expected": result.expected,
                        "got": result.got,
                        "reason": result.reason,
                        "disassembly": result.disassembly,
                    }
                    for result in report.results
                ],
            },
            indent=1,
        )
        + "\n"
    )
