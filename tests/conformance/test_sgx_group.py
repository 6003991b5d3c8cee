"""The conformance cases about SGX: what they cover, that both engines pass them, and that they find faults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lasskvm.conformance import enclaves
from lasskvm.conformance.backends import BackendName, HostBackend, SoftBackend, open_backend
from lasskvm.conformance.case import Case, Ending
from lasskvm.conformance.cases import all_cases, sgx_nested, sgx_operands
from lasskvm.conformance.cases.sgx_common import CALLS, GOOD_SIGSTRUCT, MEASUREMENT
from lasskvm.conformance.enclaves import Built, Side
from lasskvm.conformance.runner import Result, Runner, Status
from lasskvm.conformance.signing import NO_TOKEN, mrenclave, secinfo, secs_page
from lasskvm.conformance.variants import Variant, VariantRun, plan, why_not
from lasskvm.sgx import leaves_build, operands
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidEntry
from lasskvm.x86.sgx import SGX1_ENCLS_LEAVES, EnclsLeaf

SGX_CASES = [case for case in all_cases() if case.group == "sgx"]
BY_ID = {case.id: case for case in SGX_CASES}
#: What a failure of a case about an operand is not about.
SIDES = ("low", "low-ac1", "low-no-smap", "high")


def results_of(backend: BackendName, cases: list[Case]) -> list[Result]:
    with Runner(open_backend(backend)) as runner:
        return list(runner.run_all(plan(cases)))


def bad(results: list[Result]) -> list[str]:
    return [f"{result.name}: {result.reason}" for result in results if result.status is not Status.PASS]


# -------------------------------------------------------------------------------------------------------- what there is


def test_there_are_more_cases_than_asked_for() -> None:
    assert len(SGX_CASES) >= 40


@pytest.mark.parametrize("leaf", sorted(SGX1_ENCLS_LEAVES), ids=lambda leaf: EnclsLeaf(leaf).name)
def test_every_leaf_function_has_operands_on_both_sides_of_the_split(leaf: EnclsLeaf) -> None:
    found = [operand for operand in sgx_operands.OPERANDS if operand.leaf is leaf]
    assert found
    for operand in found:
        assert {f"sgx/{operand.id}-{side}" for side in SIDES} <= BY_ID.keys()


def test_every_operand_of_the_tests_of_the_package_is_in_the_suite() -> None:
    """EWB and the leaf functions that build enclaves have inner pointers, too."""
    for leaf in (EnclsLeaf.ECREATE, EnclsLeaf.EADD, EnclsLeaf.EWB, EnclsLeaf.ELDU):
        fields = {operand.field for operand in sgx_operands.OPERANDS if operand.leaf is leaf}
        assert fields >= {"rbx", "rcx", "source", "secinfo"}, leaf


def test_without_lass_the_low_half_is_as_good_as_the_high_one() -> None:
    for operand in sgx_operands.OPERANDS:
        low, high = BY_ID[f"sgx/{operand.id}-low"], BY_ID[f"sgx/{operand.id}-high"]
        assert low.lass.ending is Ending.EVENT
        assert low.off == high.off == high.lass


def test_the_measurement_is_the_one_that_the_manual_gives() -> None:
    """The good SIGSTRUCT carries it, at the offset of ENCLAVEHASH."""
    assert mrenclave(enclaves.SIZE, 1, [enclaves.MEMBER]) == MEASUREMENT
    assert GOOD_SIGSTRUCT[960:992] == MEASUREMENT
    assert len(GOOD_SIGSTRUCT) == 1808
    assert (len(NO_TOKEN), len(secinfo(0)), len(secs_page(0x2000, 0))) == (304, 64, 4096)


def test_structures_and_epc_have_places_of_their_own() -> None:
    places = (
        enclaves.PAGEINFO, enclaves.SECINFO, enclaves.SOURCE, enclaves.SIGSTRUCT, enclaves.TOKEN, enclaves.PCMD,
        enclaves.ORDINARY, enclaves.ABSENT, enclaves.SECS, enclaves.REGULAR, enclaves.VERSIONS, enclaves.FREE,
    )  # fmt: skip
    assert len(set(places)) == len(places)
    assert all(side.at(0) % 4096 == 0 for side in Side)
    assert set(CALLS) == SGX1_ENCLS_LEAVES


# -------------------------------------------------------------------------------------------------- who passes, who not


@pytest.mark.parametrize("backend", ["jit", "emulator"])
def test_an_enclave_is_built_from_either_half_as_lass_and_ac_allow(backend: BackendName) -> None:
    cases = [case for case in SGX_CASES if case.id.startswith(("sgx/build-", "sgx/einit-good", "sgx/l2-"))]
    assert bad(results_of(backend, cases)) == []


class WithoutEpc(SoftBackend):
    """A provider whose processor has SGX, and that has no EPC to give."""

    def why_no_epc(self) -> str:
        return "no EPC here"


def test_a_provider_without_an_epc_is_skipped_with_the_reason() -> None:
    with Runner(WithoutEpc("emulator")) as runner:
        result = runner.run(VariantRun(BY_ID["sgx/epa-page-high"], Variant.LASS))
    assert (result.status, result.reason) == (Status.SKIP, "no EPC here")


def test_a_provider_without_sgx_is_skipped_with_the_reason() -> None:
    entries: list[CpuidEntry] = list(parse_cpu("max").entries())
    run = VariantRun(BY_ID["sgx/epa-page-high"], Variant.LASS)
    assert "lacks sgx" in why_not(run, SoftBackend("emulator"), entries, b"")


def test_the_hosts_kvm_has_no_epc_to_give() -> None:
    backend = HostBackend.__new__(HostBackend)
    assert "/dev/sgx_vepc" in backend.why_no_epc()


def test_an_enclave_that_cannot_be_prepared_is_an_error_and_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where EADD is broken, cases about other leaf functions cannot be asked."""
    monkeypatch.setattr(leaves_build, "check_secinfo", lambda *_: _raise())
    with Runner(open_backend("emulator")) as runner:
        result = runner.run(VariantRun(BY_ID["sgx/eblock-page-high"], Variant.LASS))
    assert result.status is Status.ERROR
    assert "cannot prepare the case" in result.reason or "KVM_RUN raised" in result.reason


def _raise() -> None:
    raise RuntimeError("broken")


@contextmanager
def broken_operands(monkeypatch: pytest.MonkeyPatch, name: str, replacement: object) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(operands, name, replacement)
        yield


def failures(cases: list[Case]) -> set[str]:
    return {result.id for result in results_of("emulator", cases) if result.status is Status.FAIL}


def test_operands_that_are_not_located_as_data_accesses_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KVM that reads structures without asking about LASS, as one does that forgets ``sgx_get_encls_gva()``."""
    original = operands.load_bytes

    def unchecked(ctx: object, segment: int, offset: int, size: int, flags: int) -> bytes:
        from lasskvm.state import RFLAGS

        words = ctx.words  # type: ignore[attr-defined]
        former = words[RFLAGS]
        words[RFLAGS] = former | 1 << 18
        try:
            return original(ctx, segment, offset, size, flags)  # type: ignore[arg-type]
        finally:
            words[RFLAGS] = former

    cases = [BY_ID[f"sgx/{name}-low"] for name in ("ecreate-pageinfo", "eadd-secinfo", "einit-sigstruct")]
    with broken_operands(monkeypatch, "load_bytes", unchecked):
        assert failures(cases) == {case.id for case in cases}
    assert failures(cases) == set()


def test_a_missing_check_of_alignment_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [BY_ID["sgx/ecreate-pageinfo-misaligned-high"], BY_ID["sgx/ecreate-srcpge-misaligned-absent"]]
    with broken_operands(monkeypatch, "is_aligned", lambda *_: True):
        assert failures(cases) == {case.id for case in cases}


def test_nested_cases_say_which_leaf_functions_exit() -> None:
    exits = {case.id for case in sgx_nested.CASES if case.lass.ending is Ending.VM_EXIT}
    assert {"sgx/l2-exits", "sgx/l2-far-leaf-exits", "sgx/l2-exit-before-violation"} <= exits
    assert all(case.nested is not None and case.sgx is not None for case in sgx_nested.CASES)
    assert all(case.sgx.built is not Built.EVICTED for case in sgx_nested.CASES if case.sgx)
