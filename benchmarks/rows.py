"""Results: one row for each thing measured, with the bar it has to meet."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BenchmarkError", "Row", "compared", "limited", "measured", "median"]


class BenchmarkError(Exception):
    """A measurement that could not be made; ``str(error)`` says why and what to do."""


@dataclass(frozen=True)
class Row:
    """One result. *ours* is this package's, *theirs* what it is compared with; None where there is no number.

    *ratio* is ours by theirs. *bar* is the most that the ratio may be, or with a *bar_unit* our number.
    *holds* says whether it is met, None when there is no bar or no number. *note* is for the reader.
    """

    name: str
    ours: float | None
    theirs: float | None
    unit: str
    ratio: float | None
    bar: float | None
    holds: bool | None
    note: str = ""
    #: Empty for a bar on the ratio.
    bar_unit: str = ""


def compared(
    name: str,
    ours: float | None,
    theirs: float | None,
    unit: str,
    *,
    at_most: float | None = None,
    note: str = "",
) -> Row:
    """A row whose bar, if any, is on the ratio of the two numbers; no number, no verdict."""
    ratio = ours / theirs if ours is not None and theirs else None
    holds = None if ratio is None or at_most is None else ratio <= at_most
    return Row(name, ours, theirs, unit, ratio, at_most, holds, note)


def limited(
    name: str, ours: float | None, unit: str, *, at_most: float, theirs: float | None = None, note: str = ""
) -> Row:
    """A row whose bar is on our number itself; *theirs* and the ratio are there for comparison only."""
    ratio = ours / theirs if ours is not None and theirs else None
    holds = None if ours is None else ours <= at_most
    return Row(name, ours, theirs, unit, ratio, at_most, holds, note, bar_unit=unit)


def measured(name: str, ours: float | None, unit: str) -> Row:
    """A row with a number of ours and nothing to hold it against."""
    return Row(name, ours, None, unit, None, None, None)


def median(values: Sequence[float]) -> float | None:
    """The median; None of no values."""
    return statistics.median(values) if values else None
