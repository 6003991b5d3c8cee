"""Debian's kernel from its first line to a shell, a program and an exit status."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LassKvm = Callable[..., Any]

BOOTS_IN_A_ROW = 8


@pytest.mark.parametrize("number", range(1, BOOTS_IN_A_ROW + 1))
def test_boot_reaches_a_shell_that_answers(lasskvm: LassKvm, number: int) -> None:
    run = lasskvm("-q", typed=f"echo answer $((6 * 7)) of boot {number}\nexit {number}\n")
    assert f"answer 42 of boot {number}" in run.lines
    assert run.status == number


def test_linux_finds_lass_and_switches_it_on(lasskvm: LassKvm, busybox: Path) -> None:
    flags = lasskvm("-q", "--", busybox, "grep", "-m", "1", "^flags", "/proc/cpuinfo")
    assert flags.status == 0
    assert "lass" in flags.console.split()


def test_linux_finds_no_lass_where_cpuid_hides_it(lasskvm: LassKvm, busybox: Path) -> None:
    flags = lasskvm("-q", "--cpu", "max,-lass", "--", busybox, "grep", "-m", "1", "^flags", "/proc/cpuinfo")
    assert flags.status == 0
    assert "smap" in flags.console.split()
    assert "lass" not in flags.console.split()


@pytest.mark.parametrize("status", (0, 1, 42, 255))
def test_exit_status_is_the_programs(lasskvm: LassKvm, busybox: Path, status: int) -> None:
    assert lasskvm("-q", "--", busybox, "sh", "-c", f"exit {status}").status == status


def test_arguments_reach_the_program_as_they_are(lasskvm: LassKvm, busybox: Path) -> None:
    run = lasskvm("-q", "--", busybox, "printf", "[%s]\\n", "two words", "it's", "$HOME", "*")
    assert run.lines[-4:] == ["[two words]", "[it's]", "[$HOME]", "[*]"]


def test_two_runs_print_the_same_transcript(lasskvm: LassKvm, guest_program: Callable[[str], Path]) -> None:
    first, second = (lasskvm("--", guest_program("lass_user")) for _ in range(2))
    # The kernel's time stamps and its measurements of time are part of it.
    assert re.search(r"^\[ +\d+\.\d{6}\] Linux version", first.console, re.MULTILINE)
    assert first.console == second.console
    assert first.status == second.status


def test_idle_time_is_skipped(lasskvm: LassKvm, busybox: Path) -> None:
    """A guest that sleeps for ten minutes would otherwise outlast the time limit of the test."""
    run = lasskvm("-q", "--", busybox, "sh", "-c", "sleep 600; cut -d. -f1 /proc/uptime")
    assert run.status == 0
    assert int(run.lines[-1]) >= 600


@pytest.mark.parametrize(
    ("option", "message"),
    (
        ("pti=on", "Kernel/User page tables isolation: enabled"),
        ("mitigations=off", "Vulnerable"),
    ),
)
def test_boots_with(lasskvm: LassKvm, busybox: Path, option: str, message: str) -> None:
    vulnerabilities = "cat /sys/devices/system/cpu/vulnerabilities/*; exit 5"
    run = lasskvm("--append", option, "--", busybox, "sh", "-c", vulnerabilities)
    assert run.status == 5
    assert message in run.console


def test_page_table_isolation_leaves_lass_as_it_is(
    lasskvm: LassKvm, guest_program: Callable[[str], Path]
) -> None:
    run = lasskvm("-q", "--append", "pti=on", "--", guest_program("lass_user"))
    assert "LASS is on, linear addresses have 48 bits" in run.lines
    assert any(
        line.startswith("ok") and "read kernel text" in line and "trap 13 error 0" in line
        for line in run.lines
    )


def test_time_limit_ends_a_guest_that_does_not(lasskvm: LassKvm, busybox: Path) -> None:
    run = lasskvm("-q", "--timeout", "3", "--", busybox, "sh", "-c", "while true; do true; done")
    assert run.status == 124
    assert "the time limit was reached" in run.errors


def test_panic_ends_the_run_with_a_status_of_its_own(lasskvm: LassKvm, busybox: Path) -> None:
    run = lasskvm("--", busybox, "sh", "-c", "echo c > /proc/sysrq-trigger")
    assert "Kernel panic" in run.console
    assert run.status == 1
    assert "before the program had ended" in run.errors
