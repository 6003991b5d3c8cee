"""Judging a case: what counts as agreement, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from lasskvm.fuzz import layout
from lasskvm.fuzz.case import Case
from lasskvm.fuzz.comparison import differences
from lasskvm.fuzz.generator import generate
from lasskvm.fuzz.judging import Judge, Kind
from lasskvm.fuzz.known_defects import explain
from lasskvm.fuzz.paths import Ending, Path, PathKind
from lasskvm.kvm import InternalErrorExit, Vcpu
from lasskvm.state import RAX, RFLAGS
from lasskvm.x86.registers import (
    RFLAGS_CF,
    RFLAGS_SF,
    RFLAGS_TF,
)

Make = Callable[..., Case]
EMULATED_TWICE = (PathKind.EMULATOR, PathKind.EMULATOR)
BOTH = (PathKind.JIT, PathKind.EMULATOR)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(BOTH, explain)


def test_case_ends_in_the_handler_of_its_fault(judge: Judge, case_of: Make) -> None:
    verdict = judge.judge(case_of("488b03", rbx=1 << 63))  # mov rax, [rbx]
    assert (verdict.kind, verdict.vector) == (Kind.AGREED, 13)


def test_stepped_case_ends_behind_its_first_instruction(judge: Judge, case_of: Make) -> None:
    verdict = judge.judge(case_of("90 0f0b", rflags=RFLAGS_TF))  # nop; ud2
    assert (verdict.kind, verdict.vector) == (Kind.AGREED, 1)


def test_endless_loop_is_inconclusive(judge: Judge, case_of: Make) -> None:
    assert judge.judge(case_of("ebfe")).kind is Kind.INCONCLUSIVE  # jmp $


def test_known_defect_is_named(judge: Judge, case_of: Make) -> None:
    verdict = judge.judge(case_of("489f"))  # rex.w lahf
    assert verdict.kind is Kind.EXPLAINED
    assert verdict.detail == "LAHF and SAHF with a REX prefix"


def test_cases_do_not_depend_on_what_ran_before(judge: Judge, case_of: Make) -> None:
    case = case_of("4801d8 50 c3", rax=5, rbx=7)  # add rax, rbx; push rax; ret
    before = [judge.judge(case).vector]
    for index in range(60):
        judge.judge(generate("noise", index))
    assert [judge.judge(case).vector] == before


def test_instruction_that_a_path_lacks_is_no_agreement(
    monkeypatch: pytest.MonkeyPatch, case_of: Make
) -> None:
    missing = InternalErrorExit('the instruction "frob eax" is not implemented by the emulator')
    monkeypatch.setattr(Vcpu, "run", lambda self: missing)
    verdict = Judge(EMULATED_TWICE, explain).judge(case_of("90"))
    assert (verdict.kind, verdict.detail) == (Kind.UNIMPLEMENTED, "frob")


def test_exception_out_of_run_is_never_agreement(monkeypatch: pytest.MonkeyPatch, case_of: Make) -> None:
    def run(self: Vcpu) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(Vcpu, "run", run)
    verdict = Judge(EMULATED_TWICE, explain).judge(case_of("90"))
    assert verdict.kind is Kind.UNEXPLAINED
    assert verdict.mismatch is not None
    assert {end.ending for end in verdict.mismatch.ends} == {Ending.CRASHED}


def test_undefined_flags_are_no_difference(case_of: Make) -> None:
    case = case_of("f7e3")  # mul ebx: SF is undefined, CF is not
    path = Path(PathKind.EMULATOR)
    end = path.run(case)
    for flag, names in ((RFLAGS_SF, []), (RFLAGS_CF, ["rflags"])):
        other = replace(end, words=end.words.copy(), memory=end.memory.copy())
        other.words[RFLAGS] ^= flag
        # The frame of the handler has them too.
        other.memory[layout.IST_STACK_GPA + layout.STACK_BYTES - 24] ^= flag
        found = [difference.region for difference in differences(case, end, other)]
        assert found == names + ["IST stack"] * bool(names)


def test_every_kind_of_state_is_compared(case_of: Make) -> None:
    case = case_of("90")
    end = Path(PathKind.EMULATOR).run(case)
    words, memory = end.words.copy(), end.memory.copy()
    words[RAX] ^= 1
    memory[layout.frame_of(3)] ^= 1
    changed = replace(
        end,
        words=words,
        memory=memory,
        fpu=(1, *end.fpu[1:]),
        msrs=end.msrs | {0x10A: 1},
        ending=Ending.SHUTDOWN,
    )
    regions = {difference.region for difference in differences(case, end, changed)}
    assert regions == {"ending", "rax", "data page", "xmm0", "MSR 0x10a"}


def test_forced_emulation_ends_as_direct_execution_does(case_of: Make) -> None:
    forced = Judge((PathKind.FORCED, PathKind.EMULATOR), explain)
    for code in ("90", "488b03", "50", "f4"):
        assert forced.judge(case_of(code, rbx=layout.data_pages(case_of("90").paging)[0])).kind is Kind.AGREED
