"""The command: runs the benchmarks and prints one table.

    python -m benchmarks [--runs N] [--only NAME] [--qemu PATH] [--json FILE]

The exit status is 0 when every bar holds that could be judged, 1 otherwise, and 2 when a benchmark could not
be made.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from benchmarks import boot, emulator, engine, guest, machines, nested, unit, verify
from benchmarks.context import Context
from benchmarks.rows import BenchmarkError, Row
from benchmarks.table import notes, render
from lasskvm.errors import LassKvmError

#: The benchmarks, by the name for ``--only``, in the order of the table.
BENCHMARKS: dict[str, Callable[[Context], list[Row]]] = {
    "boot": boot.run,
    "unit": unit.run,
    "guest": guest.run,
    "engine": engine.run,
    "emulator": emulator.run,
    "nested": nested.run,
    "verify": verify.run,
}

_DEFAULT_RUNS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Speed and memory against QEMU's TCG."
    )
    parser.add_argument(
        "--runs", type=int, default=_DEFAULT_RUNS, metavar="N", help="repetitions (default %(default)s)"
    )
    parser.add_argument(
        "--only", choices=list(BENCHMARKS), action="append", help="run this one; may be repeated"
    )
    parser.add_argument(
        "--qemu",
        type=Path,
        metavar="PATH",
        help=f"compare with this QEMU (default: {machines.QEMU} on the path)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE, too")
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error("--runs needs a number of at least 1")
    try:
        qemu = machines.find_qemu(options.qemu)
    except BenchmarkError as error:
        parser.error(str(error))

    output, progress = Console(), Console(stderr=True)
    rows: list[Row] = []
    failed = False
    with tempfile.TemporaryDirectory() as folder, progress.status("") as status:
        context = Context(options.runs, Path(folder), status.update, qemu)
        for name in options.only or BENCHMARKS:
            try:
                rows += BENCHMARKS[name](context)
            except (BenchmarkError, LassKvmError) as error:
                failed = True
                rows.append(Row(name, None, None, "", None, None, None, note=str(error)))
    facts = environment(options.runs, qemu)
    output.print(render(rows))
    for line in (*notes(rows), ", ".join(facts.values())):
        output.print(line, markup=False, highlight=False, soft_wrap=True)
    if options.json is not None:
        options.json.write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    if failed:
        return 2
    return 1 if any(row.holds is False for row in rows) else 0


def environment(runs: int, qemu: str | None) -> dict[str, str]:
    """Where and when: what a reader needs to know to compare the table with another one."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{_cpu_model()}, {os.cpu_count()} CPUs",
        "python": f"Python {platform.python_version()}",
        "lasskvm": machines.lasskvm_version(),
        "qemu": machines.qemu_version(qemu),
        "runs": f"median of {runs}" if runs > 1 else "one run",
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
