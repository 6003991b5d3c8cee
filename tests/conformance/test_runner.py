"""The runner: providers that are right, wrong, hung, broken or poor, and what it says of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lasskvm.conformance.backends import HostBackend, SoftBackend
from lasskvm.conformance.case import Case, completes, gp
from lasskvm.conformance.cases import all_cases
from lasskvm.conformance.runner import Result, Runner, Status
from lasskvm.conformance.testbed import Testbed
from lasskvm.conformance.variants import Variant, VariantRun
from lasskvm.kvm.exits import Exit, HltExit, InternalErrorExit, MmioExit
from lasskvm.kvm.interface import VcpuInterface
from lasskvm.x86.cpuid import CpuidEntry

BY_ID = {case.id: case for case in all_cases()}
READ = BY_ID["data/supervisor-read-low-supervisor-smap1-ac0"]


class Backend(SoftBackend):
    """The emulator, with a different opinion now and then."""

    def __init__(self) -> None:
        super().__init__("emulator")
        self.vms = 0

    def create_vm(self):  # type: ignore[no-untyped-def]
        self.vms += 1
        return super().create_vm()


class Broken(Backend):
    """Its first run ends in *ending*; None is a timeout."""

    def __init__(self, ending: Exit | Exception | None) -> None:
        super().__init__()
        self._endings = [ending]

    def run(self, vcpu: VcpuInterface, seconds: float) -> Exit | None:
        if not self._endings:
            return super().run(vcpu, seconds)
        ending = self._endings.pop()
        if isinstance(ending, Exception):
            raise ending
        return ending


class Poor(Backend):
    """A KVM whose processor lacks features, and that emulates as the kernel's does."""

    emulates_like_kvm = True

    def __init__(self, *lacking: str) -> None:
        super().__init__()
        self._lacking = frozenset(lacking)

    def cpuid(self, needs: frozenset[str], without: frozenset[str]) -> list[CpuidEntry]:
        return super().cpuid(needs - self._lacking, without | self._lacking)


def run(case: Case, backend: Backend, variant: Variant = Variant.LASS, timeout: float = 5.0) -> Result:
    with Runner(backend, timeout) as runner:
        return runner.run(VariantRun(case, variant))


def test_a_case_that_comes_out_as_expected_passes() -> None:
    result = run(READ, Backend())
    assert (result.status, result.got, result.reason) == (Status.PASS, "#GP(0) at access, page untouched", "")
    assert result.disassembly == "mov rax, [rbx]"


@pytest.mark.parametrize(
    ("expected", "difference"),
    [
        (completes(), "#GP(0) at access"),
        (gp("access").but(rbx=1), "rbx 0x600800"),
        (gp(0x1234), "RIP access"),
        (replace(gp(), cr2=0x55), "CR2 0xffff8bad00000ce2"),
        (gp().but(memory={READ.registers["rbx"]: 1}), "[0x600800]"),  # type: ignore[dict-item]
    ],
)
def test_a_case_that_does_not_fails_and_says_what_differs(expected, difference: str) -> None:  # type: ignore[no-untyped-def]
    result = run(replace(READ, lass=expected), Backend())
    assert result.status is Status.FAIL
    assert difference in result.reason


def test_a_register_that_a_fault_has_changed_is_noticed() -> None:
    case = replace(READ, program="access: mov rax, [rbx]", registers={"rbx": READ.registers["rbx"]})
    runner = Runner(Backend())
    observed = Testbed(Backend(), Backend().cpuid(frozenset(), frozenset()), timeout=1).run(case, lass=True)
    runner.close()
    observed.regs.rdx = 0x77
    from lasskvm.conformance.observation import differences

    assert differences(case.lass, observed) == ["rdx 0x77"]


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        (None, "timeout: the guest was still running after 5 s"),
        (InternalErrorExit("it cannot be emulated"), "internal error: it cannot be emulated"),
        (OSError(14, "KVM_RUN: Bad address"), "KVM_RUN: Bad address"),
        (ValueError("surprise"), "KVM_RUN raised ValueError: surprise"),
        (MmioExit(0xDEAD000, 4, write=False, data=0), "unexpected exit: MmioExit"),
    ],
)
def test_what_a_provider_cannot_execute_is_an_error_and_the_suite_goes_on(
    ending: Exit | Exception | None, words: str
) -> None:
    backend = Broken(ending)
    with Runner(backend) as runner:
        broken = runner.run(VariantRun(READ, Variant.LASS))
        following = runner.run(VariantRun(READ, Variant.LASS))
    assert broken.status is Status.ERROR
    assert words in broken.reason
    assert following.status is Status.PASS
    assert backend.vms == 2


def test_a_guest_that_never_ends_is_a_timeout() -> None:
    endless = replace(READ, program="access: jmp access")
    result = run(endless, Backend(), timeout=0.2)
    assert result.status is Status.ERROR
    assert "timeout" in result.reason


def test_halting_somewhere_else_is_no_pass() -> None:
    result = run(replace(READ, program="hlt; access: mov rax, [rbx]"), Backend())
    assert result.status is Status.FAIL
    assert result.got.startswith("halts")


def test_one_vm_serves_all_cases_of_a_processor() -> None:
    backend = Backend()
    cases = [case for case in all_cases() if case.group in ("data", "stack")]
    with Runner(backend) as runner:
        statuses = {runner.run(VariantRun(case, Variant.LASS)).status for case in cases}
    assert statuses == {Status.PASS}
    assert backend.vms == 1


def test_a_run_leaves_nothing_to_the_next() -> None:
    """Whatever ran before, a case comes out the same."""
    cases = [
        BY_ID[name] for name in ("implicit/gdt-ltr", "delivery/idt-low-int", "fpu/fxrstor-supervisor-low")
    ]
    with Runner(Backend()) as runner:
        for _ in range(2):
            for case in (*cases, READ):
                assert runner.run(VariantRun(case, Variant.OFF)).status is Status.PASS


def test_without_lass_enumeration_runs_and_the_rest_is_skipped() -> None:
    backend = Poor("lass")
    with Runner(backend) as runner:
        results = [runner.run(VariantRun(case, Variant.LASS)) for case in all_cases()]
    made = [result for result in results if result.status is not Status.SKIP]
    assert len(made) > 10
    assert {result.group for result in made} == {"enumeration", "lam", "modes", "nested"}
    assert {result.status for result in made} == {Status.PASS}
    reasons = {result.reason for result in results if result.status is Status.SKIP}
    assert reasons == {"the KVM of this host does not offer LASS to guests"}


def test_a_missing_feature_is_named() -> None:
    result = run(BY_ID["invalidation/invpcid-target-low"], Poor("invpcid"))
    assert (result.status, result.reason) == (Status.SKIP, "the processor of this provider lacks invpcid")


def test_instructions_that_kvms_emulator_does_not_know_are_not_forced_on_it() -> None:
    case = BY_ID["operands/cmpxchg16b-supervisor"]
    assert run(case, Poor(), Variant.LASS).status is Status.PASS
    assert run(case, Poor(), Variant.FORCED).reason == "KVM's emulator does not know this instruction"
    # The violation comes from the processor, before anything has to be emulated.
    assert run(case, Poor(), Variant.MMIO).status is Status.PASS


@pytest.mark.parametrize(
    ("content", "allowed"), [("0\n", False), ("1\n", True), ("2\n", True), ("N\n", False)]
)
def test_forced_emulation_is_a_parameter_of_kvm(
    tmp_path: Path, content: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class System:
        def get_supported_cpuid(self) -> list[CpuidEntry]:
            return []

    monkeypatch.setattr("lasskvm.conformance.backends.open_system", lambda provider: System())
    parameter = tmp_path / "force_emulation_prefix"
    parameter.write_text(content)
    assert (HostBackend(parameter).why_not_forced() == "") is allowed
    assert "cannot be read" in HostBackend(tmp_path / "missing").why_not_forced()


def test_features_are_taken_from_the_hosts_cpuid(monkeypatch: pytest.MonkeyPatch) -> None:
    class System:
        def get_supported_cpuid(self) -> list[CpuidEntry]:
            return [CpuidEntry(7, 1, 1, 1 << 6 | 1 << 4, 0, 0, 0)]

    monkeypatch.setattr("lasskvm.conformance.backends.open_system", lambda provider: System())
    backend = HostBackend()
    assert backend.cpuid(frozenset(), frozenset({"lass"})) == [CpuidEntry(7, 1, 1, 1 << 4, 0, 0, 0)]
    assert backend.cpuid(frozenset(), frozenset()) == System().get_supported_cpuid()


def test_halt_exits_are_what_ends_a_run() -> None:
    result = run(READ, Broken(HltExit(interrupts_enabled=False)))
    assert result.status is Status.FAIL
