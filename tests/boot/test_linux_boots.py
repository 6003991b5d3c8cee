"""Debian's kernel from its first line to a shell, a program and an exit status."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LassKvm = Callable[..., Any]
GoesOn = Callable[..., Any]

FLAGS = "grep -m 1 ^flags /proc/cpuinfo\n"


def test_boot_reaches_a_shell_that_answers(lasskvm: LassKvm) -> None:
    run = lasskvm("-q", typed="echo answer $((6 * 7))\nexit 9\n")
    assert "answer 42" in run.lines
    assert run.status == 9


def test_linux_finds_lass_and_switches_it_on(at_prompt: GoesOn) -> None:
    flags = at_prompt(FLAGS)
    assert flags.status == 0
    assert "lass" in flags.console.split()


def test_linux_finds_no_lass_where_cpuid_hides_it(at_prompt: GoesOn) -> None:
    flags = at_prompt(FLAGS, cpu="max,-lass,-pku")
    assert flags.status == 0
    assert "smap" in flags.console.split()
    assert "lass" not in flags.console.split()


@pytest.mark.parametrize("status", (0, 1, 42, 255))
def test_exit_status_is_the_programs(in_program: GoesOn, status: int) -> None:
    assert in_program(f"exit {status}\n").status == status


def test_arguments_reach_the_program_as_they_are(in_program: GoesOn) -> None:
    shown = [line for line in in_program("exit\n").lines if line.startswith("[") and line.endswith("]")]
    assert shown == ["[two words]", "[it's]", "[$HOME]", "[*]"]


def test_two_runs_print_the_same_transcript(
    lasskvm: LassKvm, whole_boot: tuple[tuple[str, ...], Any]
) -> None:
    words, first = whole_boot
    second = lasskvm(*words)
    # The kernel's time stamps and its measurements of time are part of it.
    assert re.search(r"^\[ +\d+\.\d{6}\] Linux version", first.console, re.MULTILINE)
    assert first.console == second.console
    assert first.status == second.status


def test_idle_time_is_skipped(in_program: GoesOn) -> None:
    """A guest that sleeps for ten minutes would otherwise outlast the time limit of the test."""
    run = in_program("sleep 600; cut -d. -f1 /proc/uptime; exit\n")
    assert run.status == 0
    assert int(run.lines[-1]) >= 600


def test_boots_with_page_table_isolation(at_prompt: GoesOn) -> None:
    run = at_prompt("dmesg | grep isolation; exit 5\n", append="pti=on")
    assert run.status == 5
    assert "Kernel/User page tables isolation: enabled" in run.console


def test_boots_without_mitigations(lasskvm: LassKvm, busybox: Path) -> None:
    vulnerabilities = "cat /sys/devices/system/cpu/vulnerabilities/*; exit 5"
    run = lasskvm("--append", "mitigations=off", "--", busybox, "sh", "-c", vulnerabilities)
    assert run.status == 5
    assert "Vulnerable" in run.console


def test_page_table_isolation_leaves_lass_as_it_is(at_prompt: GoesOn) -> None:
    run = at_prompt("/program/lass_user\n", append="pti=on")
    assert "LASS is on, linear addresses have 48 bits" in run.lines
    assert any(
        line.startswith("ok") and "read kernel text" in line and "trap 13 error 0" in line
        for line in run.lines
    )


def test_time_limit_ends_a_guest_that_does_not(in_program: GoesOn) -> None:
    run = in_program("while true; do true; done\n", "--timeout", "3")
    assert run.status == 124
    assert "the time limit was reached" in run.errors


def test_panic_ends_the_run_with_a_status_of_its_own(lasskvm: LassKvm, busybox: Path) -> None:
    run = lasskvm("--", busybox, "sh", "-c", "echo c > /proc/sysrq-trigger")
    assert "Kernel panic" in run.console
    assert run.status == 1
    assert "before the program had ended" in run.errors
