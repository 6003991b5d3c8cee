"""What becomes of a case: both paths run it, and the end states are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from lasskvm.fuzz.case import Case
from lasskvm.fuzz.comparison import Difference, agree, differences
from lasskvm.fuzz.image import case_image
from lasskvm.fuzz.paths import Ending, EndState, Path, PathKind
from lasskvm.fuzz.tracing import Executed, listed, trace

__all__ = ["Explanations", "Judge", "Kind", "Mismatch", "Verdict"]


class Kind(StrEnum):
    """What can become of a case."""

    AGREED = "agreed"
    #: A difference that a known defect explains.
    EXPLAINED = "explained"
    #: A path lacks the instruction.
    UNIMPLEMENTED = "not implemented"
    #: A path was not done in time, so there is nothing to compare.
    INCONCLUSIVE = "inconclusive"
    UNEXPLAINED = "unexplained"


@dataclass(frozen=True)
class Mismatch:
    """A case whose two end states differ, and where."""

    case: Case
    paths: tuple[PathKind, PathKind]
    ends: tuple[EndState, EndState]
    differences: tuple[Difference, ...]

    #: The instructions that the case consists of, and those that it executes beside them.
    instructions: tuple[Executed, ...]

    @cached_property
    def names(self) -> frozenset[str]:
        """What differs: names of registers, and of regions of memory without the offset."""
        return frozenset(difference.region for difference in self.differences)

    def end(self, kind: PathKind) -> EndState:
        """The end state of path *kind*."""
        return self.ends[self.paths.index(kind)]

    def vectors(self) -> tuple[int | None, int | None]:
        """The vectors whose handlers were reached."""
        return self.ends[0].vector(self.case), self.ends[1].vector(self.case)


@dataclass(frozen=True)
class Verdict:
    """What became of a case. ``detail`` names the known defect, or the instruction that is not implemented."""

    kind: Kind
    vector: int | None = None
    detail: str = ""
    mismatch: Mismatch | None = None


#: Gives the name of the known defect that explains a mismatch, or None.
Explanations = Callable[[Mismatch], str | None]


class Judge:
    """Runs cases on two paths. *explain* knows the differences that are no news."""

    def __init__(self, paths: tuple[PathKind, PathKind], explain: Explanations) -> None:
        self.kinds = paths
        self._explain = explain
        self._paths = Path(paths[0]), Path(paths[1])
        # A path of its own: the end states of the others are still looked at.
        self._tracer = Path(PathKind.EMULATOR)

    def judge(self, case: Case) -> Verdict:
        """Run *case* on both paths and compare."""
        image = case_image(case)
        ends = self._paths[0].run(case, image), self._paths[1].run(case, image)
        endings = {end.ending for end in ends}
        vector = ends[1].vector(case)
        if Ending.CRASHED not in endings:
            if Ending.UNIMPLEMENTED in endings:
                return Verdict(Kind.UNIMPLEMENTED, detail=_missing(ends))
            if Ending.ENDLESS in endings:
                return Verdict(Kind.INCONCLUSIVE)
            if agree(*ends):
                return Verdict(Kind.AGREED, vector)
        found = differences(case, *ends)
        if not found and Ending.CRASHED not in endings:
            return Verdict(Kind.AGREED, vector)
        mismatch = Mismatch(case, self.kinds, ends, found, self._instructions(case))
        name = self._explain(mismatch)
        if name is not None:
            return Verdict(Kind.EXPLAINED, vector, name, mismatch)
        return Verdict(Kind.UNEXPLAINED, vector, mismatch=mismatch)

    def _instructions(self, case: Case) -> tuple[Executed, ...]:
        stands = listed(case)
        return *stands, *(
            part for part in trace(case, self._tracer.vcpu(case)) if part.rip not in {p.rip for p in stands}
        )


def _missing(ends: tuple[EndState, EndState]) -> str:
    """The mnemonic that a path lacks, from what it said."""
    detail = next(end.detail for end in ends if end.ending is Ending.UNIMPLEMENTED)
    quoted = detail.split('"')
    return quoted[1].partition(" ")[0] if len(quoted) > 1 else detail
