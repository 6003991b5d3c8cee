"""What the tables of cases in L2 share: intercepted violations, and the pair of a case with EPT and without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lasskvm.conformance.case import ACCESS, Case, Effect, Expected, Value, vm_exit
from lasskvm.conformance.nested import Ept, Nested
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import has_error_code
from lasskvm.x86.vmx_exits import ExitReason

__all__ = ["IDENTITY", "exception_exit", "guest_case", "with_and_without_ept"]

_GROUP = "nested"
#: EPT tables that change nothing.
IDENTITY = Ept()


def exception_exit(vector: int, error_code: int = 0, rip: Value | None = ACCESS, **state: Value) -> Expected:
    """L1 intercepts exception *vector* of L2; for all but page faults, the qualification is 0. No page is touched."""
    information = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_HARD_EXCEPTION | vector
    if has_error_code(vector):
        information |= vmx.INTR_INFO_DELIVER_CODE_MASK
        state = {"vm_exit_intr_error_code": error_code, **state}
    found = {
        "vm_exit_intr_info": information,
        "exit_qualification": 0,
        "idt_vectoring_info_field": 0,
        **state,
    }
    return vm_exit(ExitReason.EXCEPTION_NMI, rip, **found).but(effect=Effect.NONE)


def guest_case(
    name: str, words: str, program: str, lass: Expected, off: Expected | None = None, **more: Any
) -> Case:
    """A case of the group whose program is L2."""
    fields: dict[str, Any] = {"needs": frozenset({"vmx"}), "nested": Nested(), **more}
    return Case(
        id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, lass=lass, off=off, **fields
    )


def with_and_without_ept(case: Case) -> tuple[Case, Case]:
    """*case*, and the same with EPT tables that change nothing."""
    assert case.nested is not None
    ept = replace(
        case, id=f"{case.id}-ept", words=f"{case.words} (EPT)", nested=replace(case.nested, ept=IDENTITY)
    )
    return case, ept
