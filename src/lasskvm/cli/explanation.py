"""One access against the LASS rule, step by step and in words.

The steps are the manual's, in the order in which a processor takes them. The verdict is that of
:func:`lasskvm.lass.is_lass_violation`; a test compares it with where the steps lead for every kind of access.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum

from lasskvm.lass import BRANCH, DT_LOAD, FETCH, IMPLICIT, INVLPG, MSR, STACK, WRITE, is_lass_violation
from lasskvm.x86.address import is_canonical
from lasskvm.x86.exceptions import GP, SS, vector_name
from lasskvm.x86.registers import (
    CR4_LA57,
    CR4_LASS,
    CR4_SMAP,
    EFER_LMA,
    EFER_LME,
    MASK64,
    RFLAGS_AC,
    RFLAGS_FIXED,
)

__all__ = ["Access", "Explanation", "Named", "Step", "Verdict", "explain"]

_USER_CPL = 3
_LINEAR_BITS, _LINEAR_BITS_LA57 = 48, 57
_TOP_BIT = 63


class Named(StrEnum):
    """What only names a linear address without accessing it."""

    INVLPG = "invlpg"
    MSR = "msr"
    DT_LOAD = "dt-load"
    BRANCH = "branch"

    @property
    def flag(self) -> int:
        """The access flag of :mod:`lasskvm.lass`."""
        return {Named.INVLPG: INVLPG, Named.MSR: MSR, Named.DT_LOAD: DT_LOAD, Named.BRANCH: BRANCH}[self]


_NAMED_BY = {
    INVLPG: "by INVLPG, INVPCID or INVVPID",
    MSR: "as the value of a model-specific register",
    DT_LOAD: "as the base of a descriptor table",
    BRANCH: "as the target of a branch",
}


@dataclass(frozen=True)
class Access:
    """An access and the processor that makes it; *flags* are those of :mod:`lasskvm.lass`."""

    cpl: int
    address: int
    size: int = 8
    flags: int = 0
    smap: bool = True
    ac: bool = False
    lass: bool = True
    long_mode: bool = True
    la57: bool = False

    @property
    def last(self) -> int:
        """The address of the last byte; an access of size 0 is about the one address."""
        return (self.address + max(self.size, 1) - 1) & MASK64

    @property
    def wraps(self) -> bool:
        """Whether the access goes past the top of the address space."""
        return self.last < self.address

    @property
    def is_user(self) -> bool:
        """Whether this is a user-mode access."""
        return self.cpl == _USER_CPL and not self.flags & IMPLICIT

    @property
    def cr4(self) -> int:
        """The CR4 bits that matter."""
        return CR4_LASS * self.lass | CR4_SMAP * self.smap | CR4_LA57 * self.la57

    @property
    def efer(self) -> int:
        """The EFER bits that matter."""
        return (EFER_LME | EFER_LMA) * self.long_mode

    @property
    def rflags(self) -> int:
        """The RFLAGS bits that matter."""
        return RFLAGS_FIXED | RFLAGS_AC * self.ac

    @property
    def fault_vector(self) -> int:
        """What a violation of LASS or of the canonical rule raises."""
        return SS if self.flags & STACK else GP


class Verdict(Enum):
    """How an access fares before paging."""

    PASSES = "passes"
    VIOLATION = "LASS violation"
    NOT_CANONICAL = "not canonical"


@dataclass(frozen=True)
class Step:
    """One question and its answer; *verdict* is set in the step that decides."""

    question: str
    answer: str
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Explanation:
    """The steps up to the one that decides, the verdict, the exception's vector if any, and what follows."""

    steps: tuple[Step, ...]
    verdict: Verdict
    vector: int | None
    consequences: tuple[str, ...]

    @property
    def exception(self) -> str | None:
        """The exception as manuals write it, such as "#GP(0)"; None when there is none."""
        return None if self.vector is None else f"{vector_name(self.vector)}(0)"


def explain(access: Access) -> Explanation:
    """Take the steps of the rule for *access*.

    >>> explain(Access(cpl=3, address=0xFFFF_8000_0000_0000)).exception
    '#GP(0)'
    """
    steps = []
    for step in _steps(access):
        steps.append(step)
        if step.verdict is not None:
            break
    verdict = _verdict(access, steps[-1])
    vector = None if verdict is Verdict.PASSES else access.fault_vector
    return Explanation(tuple(steps), verdict, vector, _consequences(access, verdict))


def _verdict(access: Access, last_step: Step) -> Verdict:
    if last_step.verdict is Verdict.NOT_CANONICAL:
        return Verdict.NOT_CANONICAL
    violates = is_lass_violation(
        access.address, access.size, access.flags, access.cpl, access.cr4, access.efer, access.rflags
    )
    return Verdict.VIOLATION if violates else Verdict.PASSES


def _steps(access: Access) -> Iterator[Step]:
    yield _canonical(access)
    yield _active(access)
    yield _accessed(access)
    yield _mode(access)
    yield _half(access)
    yield _smap(access)


def _canonical(access: Access) -> Step:
    question = "Is the address canonical?"
    if not access.long_mode:
        return Step(question, "Not asked: outside IA-32e mode linear addresses have 32 bits.")
    if access.flags & INVLPG:
        return Step(question, "Not asked: INVLPG does nothing for an address that is not.")
    bits = _LINEAR_BITS_LA57 if access.la57 else _LINEAR_BITS
    for what, address in (
        ("the address", access.address),
        (f"its last byte, {access.last:#x},", access.last),
    ):
        if not is_canonical(address, bits):
            answer = (
                f"No: bits {_TOP_BIT} to {bits - 1} of {what} are not all equal. This is checked before LASS."
            )
            return Step(question, answer, Verdict.NOT_CANONICAL)
    value = access.address >> _TOP_BIT
    return Step(question, f"Yes: bits {_TOP_BIT} to {bits - 1} are all {value}. This is checked before LASS.")


def _active(access: Access) -> Step:
    question = "Is LASS active?"
    if not access.lass:
        return Step(question, "No: CR4.LASS is 0.", Verdict.PASSES)
    if not access.long_mode:
        answer = "No: CR4.LASS is 1, but without effect outside IA-32e mode (EFER.LMA is 0)."
        return Step(question, answer, Verdict.PASSES)
    return Step(question, "Yes: CR4.LASS is 1 and EFER.LMA is 1, 64-bit or compatibility mode.")


def _accessed(access: Access) -> Step:
    question = "Is the address accessed?"
    for flag, named_by in _NAMED_BY.items():
        if access.flags & flag:
            return Step(question, f"No: it is only named, {named_by}.", Verdict.PASSES)
    if access.flags & FETCH:
        kind = "an instruction is fetched from it"
    else:
        kind = "it is written to" if access.flags & WRITE else "it is read"
    return Step(question, f"Yes: {kind}{', as part of the stack' if access.flags & STACK else ''}.")


def _mode(access: Access) -> Step:
    question = "User-mode or supervisor-mode access?"
    if access.is_user:
        return Step(question, "User-mode: the CPL is 3 and the access is not implicit.")
    if access.flags & IMPLICIT:
        reason = "it is implicit (GDT, LDT, IDT, TSS), which is supervisor-mode at any CPL"
    else:
        reason = f"the CPL is {access.cpl}"
    return Step(question, f"Supervisor-mode: {reason}.")


def _half(access: Access) -> Step:
    question = "Is every byte in its own half?"
    first_upper, last_upper = bool(access.address >> _TOP_BIT), bool(access.last >> _TOP_BIT)
    where = _whereabouts(access, first_upper, last_upper)
    if access.is_user:
        if first_upper or last_upper:
            return Step(question, f"No: {where}, and the lower one is the user's.", Verdict.VIOLATION)
        return Step(question, f"Yes: {where}, the user's.", Verdict.PASSES)
    if first_upper and last_upper:
        return Step(question, f"Yes: {where}, the supervisor's.", Verdict.PASSES)
    answer = f"No: {where}, and the upper one is the supervisor's."
    if access.flags & FETCH:
        return Step(
            question, f"{answer} For a fetch SMAP, SMEP and RFLAGS.AC do not matter.", Verdict.VIOLATION
        )
    return Step(question, answer)


def _whereabouts(access: Access, first_upper: bool, last_upper: bool) -> str:
    """Which half, or halves, the bytes of *access* are in."""
    half = {False: "lower", True: "upper"}
    if first_upper == last_upper:
        if access.last == access.address:
            return f"bit {_TOP_BIT} is {int(first_upper)}, so the address is in the {half[first_upper]} half"
        extent = f"the {access.size} bytes up to {access.last:#x}"
        return f"bit {_TOP_BIT} is {int(first_upper)}, so {extent} are in the {half[first_upper]} half"
    way = "wraps past 2^64" if access.wraps else "goes on"
    return f"the access starts in the {half[first_upper]} half and {way} into the {half[last_upper]} one"


def _smap(access: Access) -> Step:
    question = "Do SMAP and RFLAGS.AC allow it?"
    if not access.smap:
        answer = "Yes: CR4.SMAP is 0, so LASS does not apply to supervisor-mode data accesses."
        return Step(question, answer, Verdict.PASSES)
    if access.ac and not access.flags & IMPLICIT:
        return Step(question, "Yes: RFLAGS.AC is 1 (STAC), and the access is not implicit.", Verdict.PASSES)
    reason = "RFLAGS.AC is 1, but does not help an implicit access" if access.ac else "RFLAGS.AC is 0"
    return Step(question, f"No: CR4.SMAP is 1 and {reason}.", Verdict.VIOLATION)


def _consequences(access: Access, verdict: Verdict) -> tuple[str, ...]:
    if verdict is not Verdict.PASSES:
        kind = "a stack access" if access.flags & STACK else "not a stack access"
        return (
            f"{vector_name(access.fault_vector)} with error code 0, since this is {kind}.",
            "CR2 is unchanged, and no accessed or dirty bit is set: the page tables are not looked at.",
        )
    if access.flags & BRANCH:
        return ("The branch is done; the fetch at its target is another access.",)
    if access.flags & (INVLPG | MSR | DT_LOAD):
        return ("The instruction goes on.",)
    return ("Paging comes next and may still raise #PF.",)
