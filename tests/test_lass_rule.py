"""The LASS rule: its whole truth table, sizes and wrap, the array form, and properties."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasskvm.lass import (
    BRANCH,
    DT_LOAD,
    FETCH,
    IMPLICIT,
    INVLPG,
    MSR,
    STACK,
    WRITE,
    is_lass_violation,
    lass_violations,
)
from lasskvm.x86.registers import CR4_LASS, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_LME, RFLAGS_AC

READ = 0
LOWER = 0x0000_7FFF_FFFF_F000
UPPER = 0xFFFF_8000_0000_0000
TOP = (1 << 64) - 1
LAST_LOWER = (1 << 63) - 1
FIRST_UPPER = 1 << 63
ACTIVE_EFER = EFER_LME | EFER_LMA

ACCESSES = {"read": READ, "write": WRITE, "fetch": FETCH, "push": WRITE | STACK, "pop": STACK}
BOOLEANS = (False, True)


def oracle(
    *, cpl: int, upper: bool, kind: str, implicit: bool, smap: bool, ac: bool, long_mode: bool, enabled: bool
) -> bool:
    """The rule, told row by row as the manual's table has it."""
    if not enabled:
        return False
    if not long_mode:
        return False
    user_mode_access = cpl == 3 and not implicit
    if user_mode_access:
        return upper
    if upper:
        return False
    if kind == "fetch":
        return True
    if not smap:
        return False
    if implicit:
        return True
    return not ac


@pytest.mark.parametrize("cpl", range(4))
@pytest.mark.parametrize("kind", ACCESSES)
@pytest.mark.parametrize("upper", BOOLEANS, ids=["lower", "upper"])
def test_the_whole_truth_table(cpl: int, kind: str, upper: bool) -> None:
    for implicit, smap, ac, long_mode, enabled in itertools.product(BOOLEANS, repeat=5):
        violates = is_lass_violation(
            UPPER if upper else LOWER,
            8,
            ACCESSES[kind] | (IMPLICIT if implicit else 0),
            cpl,
            (CR4_LASS if enabled else 0) | (CR4_SMAP if smap else 0),
            EFER_LMA if long_mode else 0,
            RFLAGS_AC if ac else 0,
        )
        expected = oracle(
            cpl=cpl,
            upper=upper,
            kind=kind,
            implicit=implicit,
            smap=smap,
            ac=ac,
            long_mode=long_mode,
            enabled=enabled,
        )
        assert violates == expected, (implicit, smap, ac, long_mode, enabled)


def violates(
    address: int, size: int = 8, flags: int = READ, *, cpl: int = 0, smap: bool = True, ac: bool = False
) -> bool:
    """With LASS active."""
    cr4 = CR4_LASS | (CR4_SMAP if smap else 0)
    return bool(is_lass_violation(address, size, flags, cpl, cr4, ACTIVE_EFER, RFLAGS_AC if ac else 0))


# ------------------------------------------------------------------------------------------ rows of the table


def test_user_mode_may_not_touch_the_upper_half() -> None:
    assert violates(UPPER, flags=READ, cpl=3)
    assert violates(UPPER, flags=WRITE, cpl=3)
    assert violates(UPPER, flags=FETCH, cpl=3)
    assert not violates(LOWER, cpl=3)


def test_user_mode_violates_whatever_smap_and_ac_say() -> None:
    for smap, ac in itertools.product(BOOLEANS, repeat=2):
        assert violates(UPPER, cpl=3, smap=smap, ac=ac)


def test_supervisor_fetch_below_the_split_faults_even_with_ac() -> None:
    for smap, ac in itertools.product(BOOLEANS, repeat=2):
        assert violates(LOWER, 1, FETCH, smap=smap, ac=ac)


def test_supervisor_data_below_the_split_needs_ac_or_no_smap() -> None:
    assert violates(LOWER)
    assert not violates(LOWER, ac=True)
    assert not violates(LOWER, smap=False)


def test_ac_does_not_help_an_implicit_access() -> None:
    assert violates(LOWER, flags=IMPLICIT, ac=True)


def test_an_implicit_access_at_cpl_3_is_a_supervisor_access() -> None:
    assert not violates(UPPER, flags=IMPLICIT, cpl=3)
    assert violates(LOWER, flags=IMPLICIT | WRITE, cpl=3)


def test_compatibility_mode_is_covered_and_legacy_mode_is_not() -> None:
    arguments = (LOWER, 4, FETCH, 0, CR4_LASS)
    assert is_lass_violation(*arguments, EFER_LMA, 0)
    assert not is_lass_violation(*arguments, EFER_LME, 0)


def test_smep_makes_no_difference() -> None:
    for flags, cpl in itertools.product((READ, WRITE, FETCH), (0, 3)):
        for address in (LOWER, UPPER):
            without = is_lass_violation(address, 1, flags, cpl, CR4_LASS, EFER_LMA, 0)
            assert is_lass_violation(address, 1, flags, cpl, CR4_LASS | CR4_SMEP, EFER_LMA, 0) == without


@pytest.mark.parametrize("flag", [INVLPG, MSR, DT_LOAD, BRANCH], ids=["INVLPG", "MSR", "DT_LOAD", "BRANCH"])
def test_an_address_that_is_only_named_never_violates(flag: int) -> None:
    for address, cpl, smap, ac in itertools.product((LOWER, UPPER, TOP), range(4), BOOLEANS, BOOLEANS):
        for other in (READ, WRITE, FETCH, IMPLICIT, STACK):
            assert not violates(address, 8, flag | other, cpl=cpl, smap=smap, ac=ac)


def test_a_stack_access_violates_like_any_other() -> None:
    for address, cpl in itertools.product((LOWER, UPPER), (0, 3)):
        assert violates(address, flags=WRITE | STACK, cpl=cpl) == violates(address, flags=WRITE, cpl=cpl)


def test_the_flags_are_distinct_bits() -> None:
    flags = [WRITE, FETCH, IMPLICIT, INVLPG, MSR, DT_LOAD, BRANCH, STACK]
    assert len(set(flags)) == len(flags)
    assert all(flag.bit_count() == 1 for flag in flags)


# ---------------------------------------------------------------------------------------------- size and wrap


def test_a_supervisor_access_that_wraps_into_the_lower_half_violates() -> None:
    assert not violates(TOP, 1)
    assert violates(TOP, 2)
    assert not violates(TOP - 7, 8)
    assert violates(TOP - 7, 9)
    assert violates(TOP - 7, 512)


def test_a_user_access_that_reaches_over_the_split_violates() -> None:
    assert not violates(LAST_LOWER, 1, cpl=3)
    assert violates(LAST_LOWER, 2, cpl=3)
    assert not violates(LAST_LOWER - 7, 8, cpl=3)
    assert violates(LAST_LOWER - 7, 9, cpl=3)


def test_a_supervisor_access_that_reaches_over_the_split_violates() -> None:
    assert violates(LAST_LOWER, 2)
    assert not violates(FIRST_UPPER, 2)


def test_a_user_access_that_wraps_into_the_lower_half_violates_with_its_first_byte() -> None:
    assert violates(TOP, 2, cpl=3)


@pytest.mark.parametrize("address", [0, 1, LAST_LOWER, FIRST_UPPER, TOP])
@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("flags", [READ, FETCH])
def test_size_0_means_the_one_address(address: int, cpl: int, flags: int) -> None:
    assert violates(address, 0, flags, cpl=cpl) == violates(address, 1, flags, cpl=cpl)


# ------------------------------------------------------------------------------------------------- properties

boundaries = st.sampled_from([0, 1 << 47, LAST_LOWER, FIRST_UPPER, UPPER, TOP])
addresses = st.one_of(
    st.integers(0, TOP),
    st.builds(lambda base, offset: (base + offset) & TOP, boundaries, st.integers(-600, 600)),
)
sizes = st.one_of(st.integers(0, 600), st.integers(0, LAST_LOWER))
access_flags = st.integers(0, 255)
accesses = st.tuples(
    addresses,
    sizes,
    access_flags,
    st.integers(0, 3),
    st.integers(0, (1 << 32) - 1),
    st.sampled_from([0, EFER_LME, ACTIVE_EFER, 0xD01]),
    st.integers(0, (1 << 22) - 1),
)


@given(accesses)
def test_without_lass_nothing_violates(access: tuple[int, ...]) -> None:
    address, size, flags, cpl, cr4, efer, rflags = access
    assert not is_lass_violation(address, size, flags, cpl, cr4 & ~CR4_LASS, efer, rflags)


@given(accesses)
def test_outside_ia_32e_mode_nothing_violates(access: tuple[int, ...]) -> None:
    address, size, flags, cpl, cr4, efer, rflags = access
    assert not is_lass_violation(address, size, flags, cpl, cr4, efer & ~EFER_LMA, rflags)


@given(addresses, st.integers(1, 600), st.sampled_from([READ, WRITE, FETCH, STACK]))
def test_a_user_access_violates_exactly_when_a_byte_is_in_the_upper_half(
    address: int, size: int, flags: int
) -> None:
    any_upper = any((address + byte & TOP) >> 63 for byte in range(size))
    assert violates(address, size, flags, cpl=3) == any_upper


@given(addresses, st.integers(1, 600), st.integers(0, 2))
def test_a_supervisor_fetch_violates_exactly_when_a_byte_is_in_the_lower_half(
    address: int, size: int, cpl: int
) -> None:
    any_lower = any(not (address + byte & TOP) >> 63 for byte in range(size))
    assert violates(address, size, FETCH, cpl=cpl, ac=True) == any_lower


@given(accesses, st.integers(0, 600), st.integers(0, 600))
def test_a_larger_access_violates_where_a_smaller_one_does(
    access: tuple[int, ...], size: int, more: int
) -> None:
    address, _, flags, cpl, cr4, efer, rflags = access
    if is_lass_violation(address, size, flags, cpl, cr4, efer, rflags):
        assert is_lass_violation(address, size + more, flags, cpl, cr4, efer, rflags)


@given(accesses)
def test_setting_ac_never_makes_a_violation(access: tuple[int, ...]) -> None:
    address, size, flags, cpl, cr4, efer, rflags = access
    if is_lass_violation(address, size, flags, cpl, cr4, efer, rflags | RFLAGS_AC):
        assert is_lass_violation(address, size, flags, cpl, cr4, efer, rflags & ~RFLAGS_AC)


@given(accesses)
def test_only_the_named_bits_of_the_state_matter(access: tuple[int, ...]) -> None:
    address, size, flags, cpl, cr4, efer, rflags = access
    reduced = (cr4 & (CR4_LASS | CR4_SMAP), efer & EFER_LMA, rflags & RFLAGS_AC)
    full = is_lass_violation(address, size, flags, cpl, cr4, efer, rflags)
    assert full == is_lass_violation(address, size, flags & ~(WRITE | STACK), cpl, *reduced)


@given(accesses)
def test_the_rule_answers_with_a_boolean(access: tuple[int, ...]) -> None:
    assert type(is_lass_violation(*access)) is bool


# --------------------------------------------------------------------------------------------- the array form


@given(st.lists(accesses, min_size=1, max_size=50))
def test_the_array_form_agrees_element_by_element(cases: list[tuple[int, ...]]) -> None:
    columns = [np.array(column, np.uint64) for column in zip(*cases, strict=True)]
    result = lass_violations(*columns)
    assert result.dtype == np.bool_
    assert result.tolist() == [is_lass_violation(*case) for case in cases]


def test_the_array_form_takes_plain_integers() -> None:
    assert lass_violations(TOP, 2, WRITE, 0, CR4_LASS | CR4_SMAP, EFER_LMA, 0).tolist() == [True]
    assert lass_violations(TOP, 1, WRITE, 0, CR4_LASS | CR4_SMAP, EFER_LMA, 0).tolist() == [False]


def test_the_array_form_broadcasts() -> None:
    lanes = np.array([LOWER, UPPER], np.uint64)
    privilege = np.array([[0], [3]])
    result = lass_violations(lanes, 1, FETCH, privilege, CR4_LASS, EFER_LMA, 0)
    assert result.tolist() == [[True, False], [False, True]]


def test_the_array_form_refuses_shapes_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="shape"):
        lass_violations([1, 2], [1, 2, 3], 0, 0, 0, 0, 0)


def test_the_array_form_covers_the_whole_address_space() -> None:
    step = 1 << 44
    lanes = np.arange(1 << 20, dtype=np.uint64) * np.uint64(step)
    result = lass_violations(lanes, 8, READ, 3, CR4_LASS, EFER_LMA, 0)
    assert np.array_equal(result, lanes >= np.uint64(FIRST_UPPER))
