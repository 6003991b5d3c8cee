"""Linux finds the features that the CPU model offers, uses them from its first line on, and reaches user space."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

LassKvm = Callable[..., Any]
GoesOn = Callable[..., Any]

OFFERED = {
    "pcid", "invpcid", "umip", "fsgsbase", "rdpid", "lass", "smap", "smep", "apic", "x2apic", "tsc_adjust",
    "tsc_deadline_timer", "arat", "xsave", "xsaveopt",
}  # fmt: skip
KEYS = {"pku", "ospke"}


def flags(at_prompt: GoesOn, **options: str) -> set[str]:
    run = at_prompt("grep -m 1 ^flags /proc/cpuinfo\n", **options)
    assert run.status == 0
    return set(run.console.split())


def test_linux_shows_what_is_offered(at_prompt: GoesOn) -> None:
    assert flags(at_prompt) >= OFFERED | KEYS


def test_linux_uses_pcids_with_page_table_isolation(at_prompt: GoesOn) -> None:
    assert flags(at_prompt, append="pti=on") >= OFFERED | {"pti"}


def test_linux_does_without_protection_keys(at_prompt: GoesOn) -> None:
    shown = flags(at_prompt, cpu="max,-lass,-pku")
    assert shown >= OFFERED - {"lass"}
    assert not shown & KEYS


def test_linux_takes_the_model_amd_for_a_processor_of_amd(lasskvm: LassKvm, busybox: Path) -> None:
    program = (busybox, "grep", "-E", "-m", "2", "^vendor|^flags", "/proc/cpuinfo")
    run = lasskvm("-q", "--cpu", "amd", "--", *program)
    assert run.status == 0
    words = run.console.split()
    assert "AuthenticAMD" in words
    assert "lass" not in words
    assert set(words) >= OFFERED - {"lass"}
