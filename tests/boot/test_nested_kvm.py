"""Linux's own KVM as a guest hypervisor: kvm_intel in the Debian guest (L1), and a guest of its own (L2)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lasskvm.images.catalog import DEBIAN_KVM

GuestProgram = Callable[[str], Path]

#: What L2 says of itself, from its first line on when it starts in real mode.
REAL_MODE = "L2: real mode"
LONG_MODE = [
    "L2: long mode, upper half",
    "L2: a string by one OUTS",
    "L2: CPUID names KVMKVMKVM",
    "L2: #PF arrives at its handler",
    "L1: L2 rings the doorbell",
]
LASS_IN_L2 = {
    "L1: KVM offers LASS to L2": "L2: LASS refuses a supervisor read of the lower half",
    "L1: KVM offers no LASS to L2": "L2: LASS is not offered, CR4.LASS is reserved",
}
END = ["L1: L2 halts with status 42", "L1: its timer has interrupted meanwhile"]


@pytest.fixture(scope="module")
def runner(guest_program: GuestProgram) -> Path:
    return guest_program("l2_runner")


@pytest.fixture
def run(lasskvm_image: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs the image with KVM's modules, with more words of the command line."""

    def run(*words: str | Path) -> Any:
        return lasskvm_image(DEBIAN_KVM, *words)

    return run


def transcript(run: Any) -> list[str]:
    """What L1's program and L2 print."""
    return [line for line in run.lines if line.startswith(("L1: ", "L2: "))]


def check(run: Any, start: list[str]) -> None:
    """L2 has begun with *start*, and has run to its end."""
    lines = transcript(run)
    assert lines[0] == "L1: LASS is on", run.console
    assert lines[2:] == [*start, *LONG_MODE, LASS_IN_L2[lines[1]], *END], run.console
    assert run.status == 0


def test_l2_runs_to_its_end_under_linux_kvm_with_lass_on_in_l1_every_time_alike(
    run: Callable[..., Any], runner: Path
) -> None:
    """Not quiet: kvm_intel says what a VM entry failed for, and Linux what it is warned of."""
    first, second = (run("--append", "kvm_intel.dump_invalid_vmcs=1", "--", runner) for _ in range(2))
    check(first, [REAL_MODE])
    assert not re.search(r"kvm(_intel)?:.*|WARNING:|BUG:", first.console[first.console.index("Run /init") :])
    assert first.console == second.console


@pytest.mark.parametrize(
    "parameters",
    [
        "ept=0 vpid=0",
        "unrestricted_guest=0 emulate_invalid_guest_state=0 eptad=0 vnmi=0 flexpriority=0 preemption_timer=0",
    ],
)
def test_l2_runs_whatever_kvm_leaves_unused(run: Callable[..., Any], runner: Path, parameters: str) -> None:
    """Shadow paging, real mode as virtual-8086 mode with CR4.VME, and the like."""
    words = " ".join(f"kvm_intel.{parameter}" for parameter in parameters.split())
    check(run("-q", "--append", words, "--", runner), [REAL_MODE])


def test_l2_may_begin_in_long_mode(run: Callable[..., Any], runner: Path) -> None:
    check(run("-q", "--", runner, "long"), [])


def test_kvm_does_not_load_where_cpuid_hides_vmx(run: Callable[..., Any], runner: Path) -> None:
    result = run("-q", "--cpu", "max,-vmx", "--", runner)
    assert "can't load module kvm_intel" in result.console
    assert "/dev/kvm: No such file or directory" in result.console
    assert result.status == 1
