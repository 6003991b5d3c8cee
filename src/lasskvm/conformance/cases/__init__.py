"""The conformance cases, by group.

A module has ``CASES``, all of one group, which for a large one is split over several modules; :func:`all_cases`
collects them in the order of ``_MODULES``, which is that of the reports.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from lasskvm.conformance.case import Case

__all__ = ["all_cases"]

_MODULES = (
    "enumeration",
    "modes",
    "data",
    "fetch",
    "rings",
    "stack",
    "segments",
    "strings",
    "operands",
    "fpu",
    "cache",
    "invalidation",
    "tables",
    "implicit",
    "wrap",
    "canonical",
    "lam",
    "branches",
    "syscalls",
    "compatibility",
    "delivery",
    "debug",
    "msr",
    "nested_enumeration",
    "nested_operands",
    "nested_entry",
    "nested_guest",
    "nested_paging",
    "nested_cr4",
    "sgx_enumeration",
    "sgx_operands",
    "sgx_places",
    "sgx_enclaves",
    "sgx_nested",
)


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case there is, group by group."""
    return tuple(case for name in _MODULES for case in import_module(f"{__name__}.{name}").CASES)
