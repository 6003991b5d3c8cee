"""Running the suite: every planned run on a backend, one testbed for each processor, and what came of it.

A run ends as ``pass``, ``fail`` (not the expected outcome), ``skip`` (with the reason why the provider cannot be asked)
or ``error`` (the provider could not execute it, or it took too long). Behind an error the suite goes on with a new VM.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from iced_x86 import Decoder, Formatter, FormatterSyntax

from lasskvm.conformance.backends import Backend
from lasskvm.conformance.case import ACCESS, Case
from lasskvm.conformance.nested_testbed import NestedTestbed
from lasskvm.conformance.observation import describe, differences, summary
from lasskvm.conformance.sgx_testbed import NestedSgxTestbed, SgxTestbed
from lasskvm.conformance.testbed import NotOfferedError, ProviderError, Testbed, assemble_case
from lasskvm.conformance.variants import Variant, VariantRun, why_not
from lasskvm.x86.cpuid import CpuidEntry

__all__ = ["Report", "Result", "Runner", "Status", "disassembly"]

#: Seconds that a run may take.
TIMEOUT = 5.0
#: One instruction cannot be longer.
_LONGEST_INSTRUCTION = 15

#: What tells testbeds apart: features to add and to leave out, the levels of page tables, and whether VMX and SGX are
#: used.
_Key = tuple[frozenset[str], frozenset[str], int, bool, bool]
_TESTBEDS: dict[tuple[bool, bool], type[Testbed]] = {
    (False, False): Testbed,
    (True, False): NestedTestbed,
    (False, True): SgxTestbed,
    (True, True): NestedSgxTestbed,
}


class Status(Enum):
    """How a run has come out."""

    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"
    ERROR = "error"

    @property
    def is_bad(self) -> bool:
        """Whether the suite has not held."""
        return self in (Status.FAIL, Status.ERROR)


@dataclass(frozen=True)
class Result:
    """One run: what was expected, what came, and why it was skipped or failed."""

    id: str
    group: str
    variant: str
    words: str
    status: Status
    expected: str
    got: str
    reason: str
    disassembly: str
    seconds: float

    @property
    def name(self) -> str:
        """The case's id with the variant."""
        return f"{self.id} [{self.variant}]"


@dataclass(frozen=True)
class Report:
    """All results on one backend."""

    backend: str
    results: tuple[Result, ...]
    seconds: float

    @property
    def summary(self) -> dict[str, int]:
        """How many results there are of each status."""
        counts = Counter(result.status for result in self.results)
        return {status.value: counts[status] for status in Status}

    @property
    def passed(self) -> bool:
        """Whether nothing failed or erred."""
        return not any(result.status.is_bad for result in self.results)

    @property
    def runs_per_second(self) -> float:
        """Speed, without what was skipped."""
        run = sum(result.status is not Status.SKIP for result in self.results)
        return run / self.seconds if self.seconds else 0.0


class Runner:
    """Makes runs on *backend*, each within *timeout* seconds. A context manager that gives the VMs back."""

    def __init__(self, backend: Backend, timeout: float = TIMEOUT) -> None:
        self._backend = backend
        self._timeout = timeout
        self._testbeds: dict[_Key, Testbed] = {}
        self._entries: dict[_Key, list[CpuidEntry]] = {}

    def run_all(self, runs: Iterable[VariantRun]) -> Iterator[Result]:
        """The results of *runs*, one by one."""
        for run in runs:
            yield self.run(run)

    def run(self, run: VariantRun) -> Result:
        """One result."""
        began = time.perf_counter()
        case = run.case
        has_vmx, has_epc = case.nested is not None, case.sgx is not None
        key = case.needs & _ON_REQUEST, case.without, case.levels, has_vmx, has_epc
        if key not in self._entries:
            self._entries[key] = self._backend.cpuid(key[0], key[1])
        entries = self._entries[key]
        program = assemble_case(case)
        at = program.labels.get(ACCESS, program.address) - program.address
        code = program.code[at : at + _LONGEST_INSTRUCTION]
        reason = why_not(run, self._backend, entries, code)
        if reason:
            status, got = Status.SKIP, ""
        else:
            status, got, reason = self._execute(run, key, entries)
        return Result(
            case.id, case.group, run.variant.value, case.words, status, describe(run.expected), got, reason,
            disassembly(case, code, program.address + at), time.perf_counter() - began,
        )  # fmt: skip

    def _execute(self, run: VariantRun, key: _Key, entries: list[CpuidEntry]) -> tuple[Status, str, str]:
        """Status, what came, and why that is bad."""
        testbed = self._testbeds.get(key)
        if testbed is None:
            kind = _TESTBEDS[key[-2:]]
            testbed = kind(self._backend, entries, levels=run.case.levels, timeout=self._timeout)
            self._testbeds[key] = testbed
        try:
            observed = testbed.run(
                run.case,
                lass=run.lass,
                forced=run.variant is Variant.FORCED,
                mmio=run.variant is Variant.MMIO,
            )
        except NotOfferedError as error:
            return Status.SKIP, "", str(error)
        except ProviderError as error:
            del self._testbeds[key]
            testbed.close()
            return Status.ERROR, str(error), str(error)
        found = differences(run.expected, observed)
        got = summary(observed)
        if found:
            return Status.FAIL, got, f"not as expected: {', '.join(found)}"
        return Status.PASS, got, ""

    def close(self) -> None:
        """Give the VMs back."""
        for testbed in self._testbeds.values():
            testbed.close()
        self._testbeds.clear()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.close()


#: Features that the soft provider's usual processor lacks, so that asking for one makes another processor.
_ON_REQUEST = frozenset(("la57", "pku", "pks", "erms", "fsrm", "serialize", "lam", "sgx"))


def disassembly(case: Case, code: bytes, address: int) -> str:
    """The instruction under test, whose bytes begin *code*."""
    formatter = Formatter(FormatterSyntax.INTEL)
    formatter.hex_prefix, formatter.hex_suffix = "0x", ""
    formatter.space_after_operand_separator = True
    formatter.show_useless_prefixes = True
    return formatter.format(Decoder(case.bits, code, ip=address).decode())
