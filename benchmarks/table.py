"""The results as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from benchmarks.rows import Row

__all__ = ["notes", "render"]

_VERDICTS = {True: "[green]holds[/]", False: "[bold red]missed[/]", None: ""}
#: From here on digits behind the point say nothing.
_LARGE = 100


def render(rows: Sequence[Row]) -> Table:
    """One table of all results; what it has no room for is in :func:`notes`."""
    table = Table(title="lasskvm against QEMU's TCG")
    table.add_column("what")
    for heading in ("lasskvm", "against", "ratio", "bar"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            _number(row.ours, row.unit),
            _number(row.theirs, row.unit),
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if row.bar is None else f"≤ {row.bar:g} {row.bar_unit}".rstrip(),
            _VERDICTS[row.holds],
        )
    return table


def notes(rows: Sequence[Row]) -> list[str]:
    """What the reader has to know about some rows, each thing once, with the rows it is about."""
    subjects: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            subjects.setdefault(row.note, []).append(row.name)
    return [f"{', '.join(names)}: {note}" for note, names in subjects.items()]


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:.{0 if abs(value) >= _LARGE else 2}f} {unit}"
