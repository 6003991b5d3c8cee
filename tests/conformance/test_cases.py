"""The conformance cases as data: names, groups, and that they say something."""

from __future__ import annotations

from collections import Counter

import pytest

from lasskvm.conformance.case import ACCESS, Case, Effect, Ending
from lasskvm.conformance.cases import all_cases
from lasskvm.conformance.testbed import assemble_case
from lasskvm.conformance.variants import Variant, plan

GROUPS = {
    "enumeration", "modes", "data", "fetch", "rings", "stack", "segments", "strings", "operands", "fpu", "cache",
    "invalidation", "tables", "implicit", "wrap", "canonical", "branches", "syscalls", "compatibility", "delivery",
    "debug", "msr", "lam", "nested", "sgx",
}  # fmt: skip


def test_there_are_more_cases_than_asked_for() -> None:
    assert len(all_cases()) > 900


def test_every_group_has_cases_of_its_own_name_only() -> None:
    assert {case.group for case in all_cases()} == GROUPS
    for case in all_cases():
        assert case.id.startswith(f"{case.group}/")


def test_ids_are_unique() -> None:
    counts = Counter(case.id for case in all_cases())
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_programs_assemble_and_mark_the_instruction_under_test(group: str) -> None:
    for case in all_cases():
        if case.group == group:
            program = assemble_case(case)
            assert ACCESS in program.labels, case.id
            assert program.labels[ACCESS] < program.end


def test_most_cases_have_a_contrast_and_most_contrasts_differ() -> None:
    contrasts = [case for case in all_cases() if case.off is not None]
    different = [case for case in contrasts if vars(case.lass)["ending"] != vars(case.off)["ending"]]
    assert len(contrasts) > 800
    assert len(different) > 500


def is_violation(case: Case) -> bool:
    return case.lass.ending is Ending.EVENT and case.lass.vector in (12, 13) and case.lass.error_code == 0


def test_a_violation_changes_neither_cr2_nor_the_page() -> None:
    violations = [case for case in all_cases() if is_violation(case) and case.lass.effect is Effect.NONE]
    assert len(violations) > 500
    assert all(case.lass.cr2 is None for case in violations)


def test_variants_of_a_case() -> None:
    runs = list(plan(case for case in all_cases() if case.id == "data/user-read-high-user-smap1-ac0"))
    assert [run.variant for run in runs] == [Variant.LASS, Variant.OFF, Variant.FORCED, Variant.MMIO]
    assert [run.lass for run in runs] == [True, False, True, True]
    assert [run.expected.ending for run in runs] == [
        Ending.EVENT, Ending.COMPLETES, Ending.EVENT, Ending.EVENT,
    ]  # fmt: skip


def test_every_variant_is_used_often() -> None:
    counts = Counter(run.variant for run in plan(all_cases()))
    assert all(counts[variant] > 400 for variant in Variant)


def test_the_mmio_variant_watches_or_moves_an_operand() -> None:
    for case in all_cases():
        if case.mmio:
            assert case.operand is not None, case.id
