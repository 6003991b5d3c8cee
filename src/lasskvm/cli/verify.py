"""``lasskvm verify``: the conformance suite on a provider of the KVM API."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from lasskvm.cli.reporting import STATUS_FAILED, ignore, reports_errors, say

if TYPE_CHECKING:
    from lasskvm.conformance.runner import Report, Result
    from lasskvm.conformance.variants import VariantRun

# The suite is imported by the functions that need it: it brings the engine along, and --help should not wait for it.

__all__ = ["EXAMPLE", "verify"]

EXAMPLE = """[bold]Examples:[/] is LASS right in the software KVM; in the KVM of this host's kernel; in one group

lasskvm verify

lasskvm verify --backend kvm --format json --output report.json

lasskvm verify --backend emulator --select "stack and not mmio"

[bold]Exit status:[/] 0 when nothing failed or erred, 1 when something did, 2 when there is no such KVM."""

#: Bad results that are shown in full.
_SHOWN = 50
_VARIANTS = ("lass", "off", "forced", "mmio")
_STATUSES = ("pass", "fail", "error", "skip")


class BackendChoice(Enum):
    """Where to run; the values are those of :data:`lasskvm.conformance.backends.BackendName`."""

    value: Literal["jit", "emulator", "kvm"]
    JIT = "jit"
    EMULATOR = "emulator"
    KVM = "kvm"


class FormatChoice(Enum):
    """What to write."""

    value: Literal["table", "json", "tap", "junit"]
    TABLE = "table"
    JSON = "json"
    TAP = "tap"
    JUNIT = "junit"


_Backend = Annotated[
    BackendChoice,
    typer.Option(help="What is verified: direct execution, the emulator alone, or the kernel's /dev/kvm."),
]
_Select = Annotated[
    str,
    typer.Option(
        "--select", "-k", metavar="EXPR", help='Only runs whose name fits, like "stack and not mmio".'
    ),
]
_List = Annotated[bool, typer.Option("--list", help="Name the runs, and make none.")]
_Format = Annotated[FormatChoice, typer.Option("--format", help="How to report.")]
_Output = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report there, too.")]
_First = Annotated[bool, typer.Option("--exitfirst", "-x", help="Stop at the first run that is bad.")]
_Timeout = Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="How long one run may take.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]


@reports_errors
def verify(
    backend: _Backend = BackendChoice.JIT,
    select: _Select = "",
    list_runs: _List = False,
    form: _Format = FormatChoice.TABLE,
    output: _Output = None,
    exitfirst: _First = False,
    timeout: _Timeout = 5.0,
    quiet: _Quiet = False,
) -> None:
    """Run the LASS conformance suite on a KVM, and report what is right and what is not.

    A guest is built and driven entirely through the KVM API; the same cases run on any provider.
    """
    from lasskvm.conformance.cases import all_cases
    from lasskvm.conformance.selection import parse_selection
    from lasskvm.conformance.variants import plan

    selector = parse_selection(select)
    runs = [run for run in plan(all_cases()) if selector(f"{run.name} {run.case.group}")]
    if not runs:
        raise typer.BadParameter(f'no run has a name that fits "{select}"; see --list', param_hint="--select")
    if list_runs:
        for run in runs:
            typer.echo(f"{run.name}: {run.case.words}")
        return
    report = _run(backend, runs, exitfirst, timeout, quiet)
    _write(report, form, output)
    if not report.passed:
        raise typer.Exit(STATUS_FAILED)


def _run(
    choice: BackendChoice, runs: Sequence[VariantRun], exitfirst: bool, timeout: float, quiet: bool
) -> Report:
    from lasskvm import kvm
    from lasskvm.conformance.backends import open_backend
    from lasskvm.conformance.runner import Report, Runner

    if choice is BackendChoice.JIT:
        kvm.prepare(ignore if quiet else say)
    results: list[Result] = []
    began = time.perf_counter()
    with (
        Runner(open_backend(choice.value), timeout) as runner,
        Progress(
            TextColumn("lasskvm: {task.description}"), BarColumn(), MofNCompleteColumn(),
            console=Console(file=sys.stderr), disable=quiet or not sys.stderr.isatty(), transient=True,
        ) as bar,
    ):  # fmt: skip
        task = bar.add_task(f"verifying {choice.value}", total=len(runs))
        for result in runner.run_all(runs):
            results.append(result)
            bar.advance(task)
            if exitfirst and result.status.is_bad:
                break
    return Report(choice.value, tuple(results), time.perf_counter() - began)


def _write(report: Report, form: FormatChoice, output: Path | None) -> None:
    if form is FormatChoice.TABLE:
        _print(report, Console(highlight=False))
        if output is not None:
            with output.open("w") as file:
                _print(report, Console(file=file, highlight=False, width=_FILE_WIDTH))
        return
    from lasskvm.conformance.reports import write

    text = write(report, form.value)
    if output is None:
        typer.echo(text, nl=False)
        return
    output.write_text(text)
    say(_conclusion(report))


#: Columns of a table that goes to a file.
_FILE_WIDTH = 120


def _print(report: Report, console: Console) -> None:
    console.print(_table(report))
    bad = [result for result in report.results if result.status.is_bad]
    for result in bad[:_SHOWN]:
        _print_bad(console, result)
    if len(bad) > _SHOWN:
        console.print(f"... and {len(bad) - _SHOWN} more; --format json has them all")
    reasons = Counter(result.reason for result in report.results if result.status.value == "skip")
    for reason, count in reasons.most_common():
        console.print(Text(f"skipped {count}: {reason}"), soft_wrap=True)
    console.print(_conclusion(report))


def _table(report: Report) -> Table:
    """Groups down, variants across; passed of made."""
    table = Table("group", *(Column(name, justify="right") for name in _VARIANTS), "not passed")
    groups: dict[str, list[Result]] = {}
    for result in report.results:
        groups.setdefault(result.group, []).append(result)
    for name, results in groups.items():
        table.add_row(name, *(_cell(results, variant) for variant in _VARIANTS), _not_passed(results))
    if len(groups) > 1:
        table.add_section()
        everything = list(report.results)
        table.add_row("all", *(_cell(everything, variant) for variant in _VARIANTS), _not_passed(everything))
    return table


def _cell(results: Sequence[Result], variant: str) -> Text:
    statuses = Counter(result.status.value for result in results if result.variant == variant)
    made = statuses.total() - statuses["skip"]
    if not made:
        return Text("skipped" if statuses["skip"] else "", style="dim")
    return Text(f"{statuses['pass']}/{made}", style="green" if statuses["pass"] == made else "bold red")


def _not_passed(results: Sequence[Result]) -> Text:
    statuses = Counter(result.status.value for result in results)
    parts = [f"{statuses[name]} {name}" for name in ("fail", "error", "skip") if statuses[name]]
    return Text(", ".join(parts), style="bold red" if statuses["fail"] or statuses["error"] else "dim")


def _print_bad(console: Console, result: Result) -> None:
    console.print(Text(f"\n{result.status.value.upper()} {result.name}", style="bold red"), soft_wrap=True)
    for name, value in (
        ("", result.words),
        ("instruction: ", result.disassembly),
        ("expected:    ", result.expected),
        ("got:         ", result.got),
        ("             ", result.reason if result.reason != result.got else ""),
    ):
        if value:
            console.print(Text(f"  {name}{value}"), soft_wrap=True)


def _conclusion(report: Report) -> str:
    counts = ", ".join(f"{report.summary[name]} {name}" for name in _STATUSES if report.summary[name])
    return (
        f"{report.backend}: {counts} in {report.seconds:.1f} s ({report.runs_per_second:.0f} runs per second)"
    )
