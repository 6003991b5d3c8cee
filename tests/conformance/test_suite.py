"""The suite itself: every case on every backend of this package, and what the host's KVM has to say."""

from __future__ import annotations

import pytest

from lasskvm.conformance.backends import BackendName, open_backend
from lasskvm.conformance.cases import all_cases
from lasskvm.conformance.runner import Result, Runner, Status
from lasskvm.conformance.variants import plan
from lasskvm.errors import HostError
from lasskvm.kvm import host

NO_LASS = "the KVM of this host does not offer LASS to guests"


def run_suite(name: BackendName) -> list[Result]:
    with Runner(open_backend(name)) as runner:
        return list(runner.run_all(plan(all_cases())))


@pytest.fixture(scope="module")
def results() -> dict[str, list[Result]]:
    return {name: run_suite(name) for name in ("jit", "emulator")}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jit", "emulator"])
def test_every_case_passes(results: dict[str, list[Result]], backend: str) -> None:
    bad = [f"{result.name}: {result.reason}" for result in results[backend] if result.status.is_bad]
    assert bad == []
    assert sum(result.status is Status.PASS for result in results[backend]) > 3000


@pytest.mark.slow
def test_the_two_engines_agree_case_by_case(results: dict[str, list[Result]]) -> None:
    for direct, emulated in zip(results["jit"], results["emulator"], strict=True):
        assert (direct.name, direct.status) == (emulated.name, emulated.status)
        # What becomes of a page is compared where a case looks at it.
        assert direct.got.partition(", page")[0] == emulated.got.partition(", page")[0], direct.name


@pytest.mark.slow
def test_only_missing_features_are_skipped(results: dict[str, list[Result]]) -> None:
    skipped = [result for result in results["jit"] if result.status is Status.SKIP]
    assert all(result.reason.startswith("the processor of this provider lacks") for result in skipped)
    assert len(skipped) < 50


def test_the_hosts_kvm_is_judged_as_far_as_it_goes() -> None:
    """Enumeration and the reserved bit can be verified on any KVM; what it cannot do is said, not passed."""
    try:
        host.System().close()
    except HostError as error:
        pytest.skip(str(error))
    results = run_suite("kvm")
    enumeration = [
        result for result in results if result.id.startswith("enumeration/") and result.variant == "lass"
    ]
    made = [result for result in enumeration if result.status is not Status.SKIP]
    assert made
    assert [f"{result.name}: {result.reason}" for result in made if result.status is not Status.PASS] == []
    assert all(result.reason for result in results if result.status is Status.SKIP)
    if any(result.reason == NO_LASS for result in results):
        rest = [result for result in results if result.group not in ("enumeration", "modes", "nested")]
        assert {result.status for result in rest} == {Status.SKIP}
