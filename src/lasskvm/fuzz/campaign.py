"""Many cases on several processes, and what they came to.

Case *i* of a seed is the same whoever runs it, so the result does not depend on the number of workers. A worker that
dies (direct execution is machine code: a defect there can take the process along) is replaced, and the case that killed
it counts as a finding.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import Synchronized

from lasskvm.fuzz.case import Case, Mode
from lasskvm.fuzz.generator import MODE_WEIGHTS, generate
from lasskvm.fuzz.judging import Judge, Kind, Mismatch, Verdict
from lasskvm.fuzz.known_defects import explain
from lasskvm.fuzz.paths import PathKind, prepare

__all__ = ["Campaign", "Finding", "Summary", "run_campaign", "run_cases"]

#: Cases that a worker gets at a time, and how long it may take for them.
_CHUNK = 250
_CHUNK_SECONDS = 120
#: Findings of one group that are kept.
_KEPT_IN_GROUP = 3


@dataclass(frozen=True)
class Campaign:
    """What to run: *cases* cases of *seed* in *modes*, on two *paths*."""

    seed: str
    cases: int
    paths: tuple[PathKind, PathKind] = (PathKind.JIT, PathKind.EMULATOR)
    modes: tuple[Mode, ...] = tuple(MODE_WEIGHTS)

    def case(self, index: int) -> Case:
        """Case number *index*."""
        return generate(self.seed, index, self.modes)


@dataclass(frozen=True)
class Finding:
    """An unexplained case. ``group`` is what findings of the same cause have in common, as far as one can tell."""

    index: int
    case: Case
    group: str
    #: Whether it has ended its process, so that it had better not be run in this one.
    died: bool = False


@dataclass
class Summary:
    """What became of a number of cases, counted."""

    kinds: Counter[Kind] = field(default_factory=Counter)
    modes: Counter[Mode] = field(default_factory=Counter)
    #: Handlers reached, by vector; None: the case ended without one.
    vectors: Counter[int | None] = field(default_factory=Counter)
    #: Known defects, by name.
    explained: Counter[str] = field(default_factory=Counter)
    #: Instructions that a path lacks, by mnemonic.
    unimplemented: Counter[str] = field(default_factory=Counter)
    #: Unexplained cases, by group, and the first few of each group.
    groups: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """How many cases there were."""
        return self.kinds.total()

    def add(self, index: int, case: Case, verdict: Verdict) -> None:
        """Count one case."""
        self.kinds[verdict.kind] += 1
        self.modes[case.mode] += 1
        self.vectors[verdict.vector] += 1
        if verdict.kind is Kind.EXPLAINED:
            self.explained[verdict.detail] += 1
        elif verdict.kind is Kind.UNIMPLEMENTED:
            self.unimplemented[verdict.detail] += 1
        elif verdict.kind is Kind.UNEXPLAINED:
            assert verdict.mismatch is not None
            self._found(Finding(index, case, _group_of(verdict.mismatch)))

    def add_death(self, index: int, case: Case) -> None:
        """Count a case that has killed its worker."""
        self.kinds[Kind.UNEXPLAINED] += 1
        self.modes[case.mode] += 1
        self._found(Finding(index, case, "the process died", died=True))

    def _found(self, finding: Finding) -> None:
        self.groups[finding.group] += 1
        if self.groups[finding.group] <= _KEPT_IN_GROUP:
            self.findings.append(finding)

    def merge(self, other: Summary) -> None:
        """Add the counts of *other*."""
        for name in ("kinds", "modes", "vectors", "explained", "unimplemented", "groups"):
            getattr(self, name).update(getattr(other, name))
        kept: Counter[str] = Counter()
        findings, self.findings = sorted([*self.findings, *other.findings], key=lambda found: found.index), []
        for finding in findings:
            kept[finding.group] += 1
            if kept[finding.group] <= _KEPT_IN_GROUP:
                self.findings.append(finding)


def _group_of(mismatch: Mismatch) -> str:
    """The mnemonic and how both paths ended."""
    endings = [difference for difference in mismatch.differences if difference.name == "ending"]
    mnemonic = str(mismatch.instructions[0].instruction).partition(" ")[0]
    if endings:
        return f"{mnemonic}: {endings[0].first} against {endings[0].second}"
    return f"{mnemonic}: {', '.join(sorted(mismatch.names))}"


def run_cases(campaign: Campaign, indices: Iterator[int] | range, judge: Judge | None = None) -> Summary:
    """Run cases of *campaign* in this process."""
    judge = judge or Judge(campaign.paths, explain)
    summary = Summary()
    for index in indices:
        case = campaign.case(index)
        summary.add(index, case, judge.judge(case))
    return summary


def run_campaign(
    campaign: Campaign, workers: int, progress: Callable[[int], None] = lambda done: None
) -> Summary:
    """Run all cases of *campaign* on *workers* processes; *progress* is told how many are done."""
    prepare()
    summary = Summary()
    waiting = [
        range(start, min(start + _CHUNK, campaign.cases)) for start in range(0, campaign.cases, _CHUNK)
    ]
    waiting.reverse()
    team = [_Worker(campaign) for _ in range(min(workers, len(waiting)))]
    try:
        for worker in team:
            worker.begin(waiting.pop())
        while any(worker.chunk for worker in team):
            for worker in _ready(team):
                result = worker.result()
                if result is not None:
                    summary.merge(result)
                else:
                    died_at = worker.replace()
                    summary.add_death(died_at, campaign.case(died_at))
                    waiting += [part for part in worker.rest_of(died_at) if part]
                worker.chunk = range(0)
                if waiting:
                    worker.begin(waiting.pop())
                progress(summary.cases)
    finally:
        for worker in team:
            worker.close()
    return summary


def _ready(team: list[_Worker]) -> list[_Worker]:
    """The workers that are done with their chunk, or dead; one that takes far too long counts as dead."""
    busy = [worker for worker in team if worker.chunk]
    ready = wait([handle for worker in busy for handle in worker.handles], timeout=_CHUNK_SECONDS)
    return [worker for worker in busy if any(handle in ready for handle in worker.handles)] or busy[:1]


class _Worker:
    """A process that runs chunks of cases. ``chunk`` is what it is at, empty when it has nothing to do."""

    def __init__(self, campaign: Campaign) -> None:
        self._campaign = campaign
        self._context = multiprocessing.get_context("spawn")
        self.chunk = range(0)
        self._start()

    def _start(self) -> None:
        self._at: Synchronized[int] = self._context.Value("q", -1)
        self._pipe, other = self._context.Pipe()
        self._process = self._context.Process(
            target=_work, args=(self._campaign, other, self._at), daemon=True
        )
        self._process.start()
        other.close()

    @property
    def handles(self) -> tuple[Connection, int]:
        """What becomes ready when the worker is done or dead."""
        return self._pipe, self._process.sentinel

    def begin(self, chunk: range) -> None:
        """Let the worker run *chunk*."""
        self.chunk = chunk
        self._pipe.send(chunk)

    def result(self) -> Summary | None:
        """The result of the chunk; None when the worker has died, or has nothing to say."""
        try:
            return self._pipe.recv() if self._pipe.poll() else None
        except (EOFError, OSError):
            return None

    def replace(self) -> int:
        """Start a new process in place of one that died or hangs; the case it was at."""
        self._process.kill()
        self._process.join()
        died_at = max(self._at.value, self.chunk.start)
        self._pipe.close()
        self._start()
        return died_at

    def rest_of(self, index: int) -> tuple[range, range]:
        """The chunk without case *index*."""
        return range(self.chunk.start, index), range(index + 1, self.chunk.stop)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _work(campaign: Campaign, pipe: Connection, at: Synchronized[int]) -> None:
    judge = Judge(campaign.paths, explain)

    def noted(chunk: range) -> Iterator[int]:
        for index in chunk:
            at.value = index
            yield index

    while True:
        chunk: range = pipe.recv()
        pipe.send(run_cases(campaign, noted(chunk), judge))
