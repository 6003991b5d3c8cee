"""The EPT walk and the page walk under EPT, compiled, against themselves as plain Python, on random tables."""

from __future__ import annotations

import random
from collections import Counter

from compiled_twins import PHYSICAL_BITS, ROUNDS, Twins, native, plain_result, random_mode
from nested_tables import EPT_ROOTS, GUEST_PAGES, INDICES, nested_tables

import lasskvm.engine.physical  # noqa: F401  (gives compiled code its guest memory)
from lasskvm.lass import FETCH, WRITE
from lasskvm.state import CR0, CR4, EFER, PDPTR0
from lasskvm.x86.ept import GPA_OF_LINEAR, GPA_OF_PDPTES, GPA_OF_TABLE, ept_walk, exit_reason
from lasskvm.x86.paging import walk
from lasskvm.x86.vmx import MEMORY_TYPE_WB, VMX_EPTP_AD_ENABLE_BIT, VMX_EPTP_PWL_4
from lasskvm.x86.vmx_exits import ExitReason

#: Random tables that are tried, one after the other; walks mark entries.
MEMORIES = 8


def random_eptp(rng: random.Random) -> int:
    root = rng.choice((*EPT_ROOTS, *EPT_ROOTS, rng.randrange(20))) << 12
    return root | MEMORY_TYPE_WB | VMX_EPTP_PWL_4 | rng.choice((0, VMX_EPTP_AD_ENABLE_BIT))


def random_gpa(rng: random.Random) -> int:
    gpa = rng.randrange(GUEST_PAGES << 12)
    return rng.choice((gpa, gpa, gpa, gpa | rng.choice(INDICES) << 39, rng.getrandbits(52)))


def random_linear(rng: random.Random) -> int:
    """An address whose tables have entries."""
    address = rng.randrange(1 << 12)
    for shift in (12, 21, 30, 39, 48):
        address |= rng.choice(INDICES) << shift
    return address


def test_ept_walk(rng: random.Random) -> None:
    outcomes: Counter[int] = Counter()
    for _ in range(MEMORIES):
        twins = Twins(rng, nested_tables(rng))
        for _ in range(ROUNDS):
            arguments = (
                random_gpa(rng), rng.choice((0, WRITE, FETCH)), random_eptp(rng), rng.choice((36, 46, 52)),
                rng.choice((GPA_OF_LINEAR, GPA_OF_TABLE, GPA_OF_PDPTES)),
            )  # fmt: skip
            plain = ept_walk(twins.memories[0], *arguments)
            assert native(ept_walk, twins.table, *arguments) == plain_result(plain), arguments
            outcomes[exit_reason(plain[2])] += 1
        twins.assert_same_memory()
    assert (
        min(outcomes[reason] for reason in (0, ExitReason.EPT_VIOLATION, ExitReason.EPT_MISCONFIG))
        > ROUNDS // 4
    )


def test_page_walk_under_ept(rng: random.Random) -> None:
    results: Counter[str] = Counter()
    for _ in range(MEMORIES):
        twins = Twins(rng, nested_tables(rng))
        for _ in range(ROUNDS):
            mode = random_mode(rng)
            address = random_linear(rng)
            arguments = (
                address, rng.choice((0, WRITE, FETCH)), rng.choice((False, True)), mode[CR0],
                rng.randrange(GUEST_PAGES) << 12, mode[CR4], mode[EFER], rng.choice((False, True)),
                PHYSICAL_BITS, mode[PDPTR0 + (address >> 30 & 3)], rng.getrandbits(32), rng.getrandbits(32),
                rng.choice((0, random_eptp(rng), random_eptp(rng), random_eptp(rng))),
            )  # fmt: skip
            plain = walk(twins.memories[0], *arguments)
            assert native(walk, twins.table, *arguments) == plain_result(plain), arguments
            results["exit" if plain[3] else "allowed" if plain[1] else "page fault"] += 1
        twins.assert_same_memory()
    assert min(results[kind] for kind in ("exit", "allowed", "page fault")) > ROUNDS // 4, results
