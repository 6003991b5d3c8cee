"""The group ``nested``: that it asks about what it should, and that L1 does what the testbed tells it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lasskvm.conformance import layout, nested_layout
from lasskvm.conformance.backends import SoftBackend
from lasskvm.conformance.case import Case, Ending, completes, gp, vm_exit, vm_fail
from lasskvm.conformance.cases import all_cases
from lasskvm.conformance.nested import Ept, Nested, Stage
from lasskvm.conformance.nested_layout import EptTables
from lasskvm.conformance.nested_testbed import NestedTestbed
from lasskvm.conformance.runner import Result, Runner, Status
from lasskvm.conformance.testbed import NotOfferedError, ProviderError
from lasskvm.conformance.variants import Variant, VariantRun, plan
from lasskvm.kvm import Vm
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86 import vmx
from lasskvm.x86.cpuid import CpuidEntry
from lasskvm.x86.ept import EPT_R, EPT_TYPE_SHIFT, EPT_W, EPT_X
from lasskvm.x86.msr import MSR_IA32_VMX_PROCBASED_CTLS2
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField

CASES = {case.id.removeprefix("nested/"): case for case in all_cases() if case.group == "nested"}
READ = CASES["l2-supervisor-read-low"]
OPERANDS = ("vmxon", "vmclear", "vmptrld", "vmptrst", "vmread", "vmwrite", "invept", "invvpid")


class WithoutVmx(SoftBackend):
    """A KVM that has nested virtualization switched off."""

    def cpuid(self, needs: frozenset[str], without: frozenset[str]) -> list[CpuidEntry]:
        return super().cpuid(needs - {"vmx"}, without | {"vmx"})


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner(SoftBackend("emulator")) as made:
        yield made


@pytest.fixture
def testbed() -> NestedTestbed:
    backend = SoftBackend("emulator")
    return NestedTestbed(backend, backend.cpuid(frozenset({"vmx"}), frozenset()), timeout=5)


def run(runner: Runner, case: Case, variant: Variant = Variant.LASS) -> Result:
    return runner.run(VariantRun(case, variant))


# ------------------------------------------------------------------------------------------------------- the cases


def test_there_are_many_cases_at_every_stage() -> None:
    stages = Counter(case.nested.stage for case in CASES.values() if case.nested is not None)
    assert len(CASES) > 200
    assert stages[Stage.GUEST] > 120
    assert all(stages[stage] > 4 for stage in Stage)


@pytest.mark.parametrize("instruction", OPERANDS)
def test_every_memory_operand_is_asked_about_on_both_sides(instruction: str) -> None:
    low, high, ac1 = (CASES[f"{instruction}-{side}"] for side in ("low", "high", "low-ac1"))
    assert (low.lass.ending, low.lass.vector) == (Ending.EVENT, 13)
    assert low.off is not None
    assert low.off.ending is high.lass.ending is ac1.lass.ending is Ending.COMPLETES
    assert CASES[f"{instruction}-low-rbp"].lass.vector == 12


def test_violations_of_l2_come_delivered_and_intercepted_with_ept_and_without() -> None:
    for name in (
        "l2-user-read-high",
        "l2-supervisor-read-low",
        "l2-user-push-high",
        "l2-supervisor-fetch-low",
    ):
        vector = 12 if "push" in name else 13
        for suffix in ("", "-ept"):
            assert CASES[name + suffix].lass.vector == vector
            intercepted = CASES[f"{name}-intercepted{suffix}"].lass
            assert intercepted.exit_reason == ExitReason.EXCEPTION_NMI
            assert intercepted.state["vm_exit_intr_info"] == 0x8000_0B00 | vector


def test_l2_runs_in_every_variant() -> None:
    variants = Counter(run.variant for run in plan(CASES.values()) if run.case.nested is not None)
    assert all(variants[variant] > 40 for variant in Variant)


# -------------------------------------------------------------------------------------------------- what it reports


@pytest.mark.parametrize(
    "name",
    [
        "cr4-fixed1-with-lass", "cr4-fixed1-without-lass", "vmread-low", "entry-without-host", "entry-without-guest",
        "l2-user-read-high-intercepted-ept", "ept-read", "cr4-emulated", "invept-all", "entry-real",
        "l1-lass-behind-l2-user",
    ],
)  # fmt: skip
def test_cases_of_every_kind_pass_on_the_emulator(runner: Runner, name: str) -> None:
    for variant_run in plan([CASES[name]]):
        result = runner.run(variant_run)
        assert (result.status, result.reason) == (Status.PASS, "")


@pytest.mark.parametrize(
    ("expected", "difference"),
    [
        (completes(), "#GP(0) at access"),
        (vm_exit(ExitReason.EXCEPTION_NMI), "#GP(0) at access"),
        (vm_fail(8), "#GP(0) at access"),
        (gp(l1_cr4_lass=0), "l1_cr4_lass 0x1"),
        (gp(exit_qualification=1), "exit_qualification 0x0"),
    ],
)
def test_another_outcome_fails_and_says_what_differs(runner: Runner, expected, difference: str) -> None:  # type: ignore[no-untyped-def]
    result = run(runner, replace(READ, lass=expected))
    assert result.status is Status.FAIL
    assert difference in result.reason


def test_a_vm_exit_is_reported_by_its_name_and_fails_where_another_is_expected(runner: Runner) -> None:
    case = CASES["cr4-mask-set"]
    assert run(runner, case).expected.startswith("VM exit 28 (CR_ACCESS) at access, ")
    result = run(runner, replace(case, lass=vm_exit(ExitReason.CPUID)))
    assert (result.status, result.got) == (Status.FAIL, "VM exit 28 (CR_ACCESS) at access, page untouched")
    result = run(runner, replace(case, lass=replace(case.lass, state={"exit_qualification": 0x14})))
    assert result.reason == "not as expected: exit_qualification 0x4"


def test_a_failed_vm_entry_is_told_from_an_exit(runner: Runner) -> None:
    failed = run(runner, replace(CASES["entry-without-host"], lass=vm_exit(ExitReason.VMCALL)))
    assert failed.got == "VM entry ends in VMfailValid"
    invalid = run(runner, replace(CASES["entry-without-guest"], lass=vm_exit(ExitReason.VMCALL)))
    assert "VM exit 33 (INVALID_STATE) of a failed VM entry" in invalid.got


def test_without_vmx_the_group_is_skipped_and_says_so() -> None:
    with Runner(WithoutVmx("emulator")) as runner:
        results = [run(runner, case) for case in CASES.values()]
    made = [result for result in results if result.status is not Status.SKIP]
    assert {result.id for result in made} == {
        "nested/cpuid-no-vmx", "nested/no-vmx-msrs", "nested/no-vmx-cr4"
    }  # fmt: skip
    assert {result.status for result in made} == {Status.PASS}
    skipped = {result.reason for result in results if result.status is Status.SKIP}
    assert skipped == {"the processor of this provider lacks vmx"}


def test_a_control_that_is_not_offered_skips_the_case(runner: Runner) -> None:
    reserved = 1 << 31
    result = run(runner, replace(READ, nested=Nested(secondary=reserved)))
    assert result.status is Status.SKIP
    assert result.reason == "the VMX of this provider lacks the controls 0x80000000 of MSR 0x48b"
    assert run(runner, READ).status is Status.PASS


def test_cases_leave_nothing_to_each_other(runner: Runner) -> None:
    """Whatever L1 has had in its VMCS, its EPT tables and its own CR4, a case comes out the same."""
    names = (
        "invept-all",
        "entry-invalid-sets",
        "cr4-emulated",
        "l2-low-idt-gp",
        "vmclear-low",
        "entry-pae-ept",
    )
    for _ in range(2):
        for name in (*names, "l2-supervisor-read-low", "invept-all"):
            assert run(runner, CASES[name]).status is Status.PASS


# ------------------------------------------------------------------------------------------------------------- L1


def test_l1_reads_back_the_fields_it_has_written(testbed: NestedTestbed) -> None:
    testbed.run(CASES["vmread-register"], lass=True)
    fields = {
        VmcsField.GUEST_CR3: 0x1234_5000,
        VmcsField.EXCEPTION_BITMAP: 1 << 13,
        VmcsField.HOST_CS_SELECTOR: 8,
    }
    testbed.l1.write(fields)
    assert testbed.l1.read(fields) == fields


def test_a_vmx_instruction_of_l1_that_fails_is_an_error(testbed: NestedTestbed) -> None:
    testbed.run(CASES["vmread-register"], lass=True)
    with pytest.raises(ProviderError, match=r"^VMCLEAR of L1 ended in VMfailValid$"):
        testbed.l1.make_current(nested_layout.VMXON_GPA)


def test_an_instruction_of_l1_that_faults_is_an_error(testbed: NestedTestbed) -> None:
    testbed.run(CASES["vmxon-user"], lass=True)
    with pytest.raises(ProviderError, match=r"^L1 could not execute VMCLEAR: HltExit"):
        testbed.l1.make_current(nested_layout.VMCS_GPA)


def test_controls_come_from_the_capability_msrs(testbed: NestedTestbed) -> None:
    ept = vmx.SECONDARY_EXEC_ENABLE_EPT << vmx.CONTROL_MSR_MAY_BE_1_SHIFT
    testbed.capabilities[MSR_IA32_VMX_PROCBASED_CTLS2] &= ~ept
    with pytest.raises(NotOfferedError, match="lacks the controls 0x2 of MSR 0x48b"):
        testbed.run(CASES["l2-supervisor-read-low-ept"], lass=True)


def test_ept_tables_map_memory_and_devices_one_to_one_but_for_the_exceptions() -> None:
    vm = Vm("emulator")
    vm.set_user_memory_region(0, 0, vm.allocate(layout.MEMORY_BYTES))
    tables = EptTables(vm.memory)
    hole, execute_only = layout.DATA_GPA, layout.DATA_GPA + PAGE_SIZE
    ept = Ept(((hole, 0), (execute_only, EPT_X)))
    pointer = tables.pointer(ept)
    assert pointer == tables.pointer(ept) != tables.pointer(Ept())
    write_back, everything = vmx.MEMORY_TYPE_WB << EPT_TYPE_SHIFT, EPT_R | EPT_W | EPT_X
    for gpa, entry in (
        (0, everything | write_back),
        (hole, 0),
        (execute_only, execute_only | EPT_X | write_back),
    ):
        assert (
            vm.memory.load(tables.entry(ept, gpa) - layout.UPPER, 8)
            == entry
            == tables.pristine_entry(ept, gpa)
        )
