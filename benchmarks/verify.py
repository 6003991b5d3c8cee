"""The conformance suite: the whole of it on each backend, and runs per second."""

from __future__ import annotations

import time

from benchmarks.context import Context
from benchmarks.rows import BenchmarkError, Row, limited, measured, median
from lasskvm.conformance.backends import BackendName, open_backend
from lasskvm.conformance.cases import all_cases
from lasskvm.conformance.runner import Report, Runner
from lasskvm.conformance.variants import plan
from lasskvm.errors import HostError

__all__ = ["run"]

#: The bars of docs/architecture.md for the whole suite, in seconds.
_BARS: dict[BackendName, float] = {"jit": 30.0, "emulator": 120.0}


def run(context: Context) -> list[Row]:
    """Rows for ``jit`` and ``emulator``, and for ``kvm`` where this host has one."""
    rows = []
    for name, bar in _BARS.items():
        # The first VM of a process may compile.
        _verify(name)
        reports = []
        for number in range(context.runs):
            context.progress(f"verify: {name}, run {number + 1} of {context.runs}")
            reports.append(_verify(name))
        if not all(report.passed for report in reports):
            raise BenchmarkError(f"the suite fails on {name}; see lasskvm verify --backend {name}")
        seconds = median([report.seconds for report in reports])
        rows.append(limited(f"verify, whole suite, {name}", seconds, "s", at_most=bar))
        rows.append(measured(f"verify, {name}", median([one.runs_per_second for one in reports]), "cases/s"))
    context.progress("verify: kvm")
    try:
        rows.append(measured("verify, kvm", _verify("kvm").runs_per_second, "cases/s"))
    except HostError:
        rows.append(measured("verify, kvm", None, "cases/s"))
    return rows


def _verify(name: BackendName) -> Report:
    with Runner(open_backend(name)) as runner:
        began = time.perf_counter()
        results = tuple(runner.run_all(plan(all_cases())))
        return Report(name, results, time.perf_counter() - began)
