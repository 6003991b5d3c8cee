"""`lasskvm explain`: the steps lead to the verdict of the rule, for every kind of access."""

from __future__ import annotations

import itertools
import json

import pytest
from cli_support import Cli

from lasskvm.cli.explanation import Access, Verdict, explain
from lasskvm.lass import BRANCH, DT_LOAD, FETCH, IMPLICIT, INVLPG, MSR, STACK, WRITE, is_lass_violation
from lasskvm.x86.address import is_canonical

LOW, HIGH = 0x1000, 0xFFFF_8000_0000_0000
LAST_LOW, LAST_HIGH = 0x7FFF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF
HOLE = 0x0000_8000_0000_0000
FIVE_LEVEL_ONLY = 0x0080_0000_0000_0000
ADDRESSES = (0, LOW, LAST_LOW - 7, LAST_LOW, HOLE, FIVE_LEVEL_ONLY, HIGH, LAST_HIGH - 7, LAST_HIGH)
KINDS = (0, WRITE, FETCH, STACK, WRITE | STACK, IMPLICIT, IMPLICIT | WRITE)
NAMED = (INVLPG, MSR, DT_LOAD, BRANCH)
BOTH = (False, True)


def every_access() -> list[Access]:
    return [
        Access(cpl, address, size, flags, smap, ac, lass, long_mode, la57)
        for cpl, address, size, flags, smap, ac, lass, long_mode, la57 in itertools.product(
            (0, 1, 2, 3), ADDRESSES, (0, 1, 8), (*KINDS, *NAMED), BOTH, BOTH, BOTH, BOTH, BOTH
        )
    ]


def violates(access: Access) -> bool:
    return is_lass_violation(
        access.address, access.size, access.flags, access.cpl, access.cr4, access.efer, access.rflags
    )


def test_the_step_that_decides_agrees_with_the_rule_for_every_access() -> None:
    accesses = every_access()
    verdicts = set()
    for access in accesses:
        explanation = explain(access)
        *earlier, last = explanation.steps
        assert [step.verdict for step in earlier] == [None] * len(earlier), access
        assert last.verdict is explanation.verdict, access
        if explanation.verdict is not Verdict.NOT_CANONICAL:
            assert (last.verdict is Verdict.VIOLATION) == violates(access), access
        verdicts.add(explanation.verdict)
    assert verdicts == set(Verdict)


def test_what_is_not_canonical_faults_before_lass_is_asked() -> None:
    for access in every_access():
        bits = 57 if access.la57 else 48
        canonical = is_canonical(access.address, bits) and is_canonical(access.last, bits)
        asked = access.long_mode and not access.flags & INVLPG
        expected = asked and not canonical
        explanation = explain(access)
        assert (explanation.verdict is Verdict.NOT_CANONICAL) == expected, access
        if expected:
            assert len(explanation.steps) == 1


def test_only_stack_accesses_raise_a_stack_fault() -> None:
    for access in every_access():
        expected = None
        explanation = explain(access)
        if explanation.verdict is not Verdict.PASSES:
            expected = "#SS(0)" if access.flags & STACK else "#GP(0)"
        assert explanation.exception == expected, access


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--cpl 3 --access read --address 0xffff800000000000", "LASS violation: #GP(0)."),
        ("--cpl 3 --access write --address 0xffff800000000000 --stack", "LASS violation: #SS(0)."),
        ("--cpl 0 --access read --address 0x1000", "LASS violation: #GP(0)."),
        ("--cpl 0 --access read --address 0x1000 --ac", "pass."),
        ("--cpl 0 --access read --address 0x1000 --ac --implicit", "does not help an implicit access"),
        ("--cpl 0 --access fetch --address 0x1000 --ac --no-smap", "LASS violation: #GP(0)."),
        ("--cpl 0 --access read --address 0x1000 --no-smap", "pass."),
        ("--cpl 3 --access read --address 0xffff800000000000 --no-lass", "Paging comes next"),
        ("--cpl 0 --access fetch --address 0x1000 --no-long-mode", "without effect outside IA-32e mode"),
        ("--cpl 0 --access read --address 0xfffffffffffffffc", "wraps past 2^64"),
        ("--cpl 0 --access read --address 0xfffffffffffffffc --size 4", "pass."),
        ("--cpl 3 --address 0x800000000000", "Not canonical: #GP(0), whatever LASS says."),
        ("--cpl 3 --address 0x800000000000 --la57", "pass."),
        ("--cpl 3 --address 0x7ffffffffffc", "its last byte, 0x800000000003,"),
        ("--cpl 0 --address 0x1000 --named invlpg", "only named, by INVLPG"),
        ("--cpl 0 --address 0x1000 --named branch", "the fetch at its target is another access"),
        ("--cpl 0 --address 0x1000 --named msr", "The instruction goes on."),
        ("--cpl 0 --address 0x1000 --named dt-load", "base of a descriptor table"),
        ("--cpl 3 --address 0xffffffffffffffff --named msr", "pass."),
        ("--cpl 3 --access read --address 0xffff800000000000", "CR2 is unchanged"),
    ],
)
def test_an_access_in_words(cli: Cli, words: str, said: str) -> None:
    result = cli("explain", *words.split())
    assert result.status == 0
    assert said in " ".join(result.out.split())


def test_an_explanation_as_json(cli: Cli) -> None:
    result = cli(*["explain", "--cpl", "3", "--address", "0xffff800000000000", "--stack", "--format", "json"])
    explanation = json.loads(result.out)
    assert explanation["violation"] is True
    assert (explanation["exception"], explanation["vector"], explanation["error_code"]) == ("#SS(0)", 12, 0)
    assert explanation["last_byte"] == "0xffff800000000007"
    assert [step["question"] for step in explanation["steps"]][:2] == [
        "Is the address canonical?",
        "Is LASS active?",
    ]


def test_a_passing_access_as_json_has_no_exception(cli: Cli) -> None:
    result = cli(*["explain", "--cpl", "0", "--address", "0xffff800000000000", "--format", "json"])
    explanation = json.loads(result.out)
    assert (explanation["violation"], explanation["exception"], explanation["vector"]) == (False, None, None)
    assert explanation["error_code"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--cpl 4 --address 0", "--cpl"),
        ("--cpl 3 --address kernel", "is not a number"),
        ("--cpl 3 --address 0x10000000000000000", "does not fit into 64 bits"),
        ("--cpl 3 --address -1", "does not fit into 64 bits"),
        ("--cpl 3 --address 0 --access raed", "raed"),
        ("--cpl 3 --address 0 --access fetch --stack", "a fetch is neither"),
        ("--cpl 3 --address 0 --named msr --size 8", "only named"),
        ("--cpl 3 --address 0x100000000 --no-long-mode", "32 bits"),
        ("--cpl 3 --address 0 --size -1", "--size"),
        ("--address 0", "--cpl"),
    ],
)
def test_an_access_that_makes_no_sense_is_refused(cli: Cli, words: str, said: str) -> None:
    result = cli("explain", *words.split())
    assert result.status == 2
    assert said in " ".join(result.err.replace("│", " ").split())
    assert result.out == ""
