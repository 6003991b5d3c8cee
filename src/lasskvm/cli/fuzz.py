"""``lasskvm fuzz``: random cases on two execution paths that must agree."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from lasskvm.cli.reporting import STATUS_FAILED, nearest, reports_errors, say
from lasskvm.x86.exceptions import vector_name

if TYPE_CHECKING:
    from lasskvm.fuzz.campaign import Finding, Summary
    from lasskvm.fuzz.case import Case, Mode
    from lasskvm.fuzz.judging import Judge, Verdict
    from lasskvm.fuzz.paths import PathKind

# The fuzzer is imported by the functions that need it: it brings the engine along, and --help should not wait for it.

__all__ = ["EXAMPLE", "fuzz"]

EXAMPLE = """[bold]Examples:[/] look for cases on which direct execution and the emulator disagree; run one again

lasskvm fuzz --cases 20000 --seed random --output findings

lasskvm fuzz --replay findings/case-1234.json

[bold]Exit status:[/] 0 when every difference is explained by a known defect, 1 when one is not."""

_RANDOM = "random"
_RANDOM_SEED_BYTES = 4
#: Groups of findings that are shrunk and shown.
_SHOWN_FINDINGS = 12
#: Vectors from here on are not exceptions.
_FIRST_FREE_VECTOR = 32

_Paths = Annotated[
    str,
    typer.Option(help='Two of "jit", "emulator" and "forced" (direct execution that is told to emulate).'),
]
_Cases = Annotated[int, typer.Option(help="How many cases to run.", min=1)]
_Seed = Annotated[
    str, typer.Option(help=f'Any text; the same seed gives the same cases. "{_RANDOM}" draws one.')
]
_Workers = Annotated[int | None, typer.Option(help="Processes.", min=1, show_default="one for each CPU")]
_Output = Annotated[
    Path | None, typer.Option(help="Directory for unexplained cases, shrunk, as JSON.", metavar="DIR")
]
_Replay = Annotated[
    Path | None, typer.Option(help="Run this case instead, and show what differs.", metavar="FILE")
]
_Modes = Annotated[
    str | None, typer.Option(help='Modes to draw from, such as "64,compat32".', show_default="all")
]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]


@reports_errors
def fuzz(
    paths: _Paths = "jit,emulator",
    cases: _Cases = 10_000,
    seed: _Seed = "1",
    workers: _Workers = None,
    output: _Output = None,
    replay: _Replay = None,
    modes: _Modes = None,
    quiet: _Quiet = False,
) -> None:
    """Run random instructions in random states on two execution paths, and report where they differ.

    Differences that are known are counted by their cause; any other is shrunk to a small case and shown.
    """
    kinds = _parse_paths(paths)
    chosen = _parse_modes(modes)
    if replay is not None:
        _replay(replay, kinds)
        return
    if seed == _RANDOM:
        seed = secrets.token_hex(_RANDOM_SEED_BYTES)
        say(f"the seed is {seed}")
    _fuzz(kinds, cases, seed, chosen, workers or os.cpu_count() or 1, output, quiet)


def _parse_paths(text: str) -> tuple[PathKind, PathKind]:
    from lasskvm.fuzz.paths import PathKind

    names = [part.strip() for part in text.split(",")]
    known = tuple(kind.value for kind in PathKind)
    for name in names:
        if name not in known:
            raise typer.BadParameter(
                f'there is no path "{name}"; {nearest(name, known)}', param_hint="--paths"
            )
    if len(names) != 2:
        raise typer.BadParameter('give two paths, such as "jit,emulator"', param_hint="--paths")
    return PathKind(names[0]), PathKind(names[1])


def _parse_modes(text: str | None) -> tuple[Mode, ...]:
    from lasskvm.fuzz.case import Mode

    known = tuple(mode.value for mode in Mode)
    names = known if text is None else tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in known:
            raise typer.BadParameter(
                f'there is no mode "{name}"; {nearest(name, known)}', param_hint="--modes"
            )
    return tuple(Mode(name) for name in names)


def _fuzz(
    kinds: tuple[PathKind, PathKind],
    cases: int,
    seed: str,
    modes: tuple[Mode, ...],
    workers: int,
    output: Path | None,
    quiet: bool,
) -> None:
    from lasskvm.fuzz.campaign import Campaign, run_campaign

    campaign = Campaign(seed, cases, kinds, modes)
    with Progress(
        TextColumn("lasskvm: cases"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(file=sys.stderr), disable=quiet or not sys.stderr.isatty(), transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("cases", total=cases)
        summary = run_campaign(campaign, workers, lambda done: bar.update(task, completed=done))
    console = Console(highlight=False)
    _print_summary(console, summary)
    if summary.findings:
        _print_findings(console, summary, kinds, output)
        raise typer.Exit(STATUS_FAILED)


def _print_summary(console: Console, summary: Summary) -> None:
    from lasskvm.fuzz.judging import Kind

    table = Table("", Column("cases", justify="right"))
    for kind in Kind:
        style = "bold red" if kind is Kind.UNEXPLAINED and summary.kinds[kind] else ""
        table.add_row(Text(kind.value, style=style), Text(str(summary.kinds[kind]), style=style))
    table.add_section()
    for mode, count in sorted(summary.modes.items()):
        table.add_row(f"mode {mode}", str(count))
    table.add_section()
    for vector, count in sorted(summary.vectors.items(), key=lambda item: -item[1]):
        name = "no event" if vector is None else vector_name(vector)
        if vector is None or vector < _FIRST_FREE_VECTOR:
            table.add_row(name, str(count))
    for title, counts in (("explained by", summary.explained), ("not implemented:", summary.unimplemented)):
        if counts:
            table.add_section()
        for name, count in counts.most_common():
            table.add_row(f"{title} {name}", str(count))
    console.print(table)


def _print_findings(
    console: Console, summary: Summary, kinds: tuple[PathKind, PathKind], output: Path | None
) -> None:
    from lasskvm.fuzz.judging import Judge
    from lasskvm.fuzz.known_defects import explain

    judge = Judge(kinds, explain)
    first: dict[str, Finding] = {}
    for finding in summary.findings:
        first.setdefault(finding.group, finding)
    for group, count in summary.groups.most_common(_SHOWN_FINDINGS):
        finding = first[group]
        console.print(Text(f"\n{count} x {group}", style="bold red"))
        case = finding.case if finding.died else _shrunk(judge, finding.case)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            file = output / f"case-{finding.index}.json"
            file.write_text(case.to_json())
            console.print(f"lasskvm fuzz --replay {file} --paths {','.join(kinds)}", soft_wrap=True)
        if not finding.died:
            _print_case(console, case, judge.judge(case), kinds)
    hidden = len(summary.groups) - _SHOWN_FINDINGS
    if hidden > 0:
        console.print(f"\n... and {hidden} more groups of unexplained cases")


def _shrunk(judge: Judge, case: Case) -> Case:
    from lasskvm.fuzz.judging import Kind
    from lasskvm.fuzz.shrinking import shrink

    return shrink(case, lambda candidate: judge.judge(candidate).kind is Kind.UNEXPLAINED)


def _print_case(console: Console, case: Case, verdict: Verdict, kinds: tuple[PathKind, PathKind]) -> None:
    from lasskvm.fuzz.description import describe

    for line in describe(case):
        console.print(line, soft_wrap=True, markup=False)
    if verdict.mismatch is None:
        console.print(f"The case is {verdict.kind} {verdict.detail}.")
        return
    table = Table("", *(kind.value for kind in kinds))
    for difference in verdict.mismatch.differences:
        table.add_row(Text(difference.name), Text(difference.first), Text(difference.second))
    console.print(table)
    console.print(f"The case is {verdict.kind}{f' by {verdict.detail}' if verdict.detail else ''}.")


def _replay(file: Path, kinds: tuple[PathKind, PathKind]) -> None:
    from lasskvm.fuzz.case import Case, CaseFormatError
    from lasskvm.fuzz.judging import Judge, Kind
    from lasskvm.fuzz.known_defects import explain

    try:
        case = Case.from_json(file.read_text())
    except (OSError, UnicodeDecodeError, CaseFormatError) as error:
        raise typer.BadParameter(f"{file} cannot be replayed: {error}", param_hint="--replay") from None
    verdict = Judge(kinds, explain).judge(case)
    _print_case(Console(highlight=False), case, verdict, kinds)
    if verdict.kind is Kind.UNEXPLAINED:
        raise typer.Exit(STATUS_FAILED)
