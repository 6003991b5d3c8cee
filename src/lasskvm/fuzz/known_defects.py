"""The differences between paths that are known, each with its reason.

A mismatch that no entry explains is news. An entry names one cause as narrowly as the end states allow: it must not
hide another. Which of the two paths is right is said in the reason; what remains wrong in a running guest is in
``docs/differences.md`` as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lasskvm.fuzz.judging import Mismatch

__all__ = ["KNOWN_DEFECTS", "Defect", "explain"]


@dataclass(frozen=True)
class Defect:
    """One known cause of differences. ``applies`` says whether a mismatch is due to it."""

    name: str
    reason: str
    applies: Callable[[Mismatch], bool]


KNOWN_DEFECTS: tuple[Defect, ...] = ()


def explain(mismatch: Mismatch) -> str | None:
    """The name of the known defect that explains *mismatch*; None when there is none."""
    return next((defect.name for defect in KNOWN_DEFECTS if defect.applies(mismatch)), None)
