"""The conformance cases, one module for each group.

A module has ``CASES``, all of one group; :func:`all_cases` collects them in the order of ``_MODULES``, which is that of
the reports.
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
)


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case there is, group by group."""
    return tuple(case for name in _MODULES for case in import_module(f"{__name__}.{name}").CASES)
