"""Switching the guest off and restarting it; interrupts through the APICs, time by kvm-clock, tables of ACPI."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LassKvm = Callable[..., Any]

RESTARTED = 42
ENDED_WITHOUT_STATUS = 1


def test_poweroff_ends_the_process_with_0(lasskvm: LassKvm) -> None:
    run = lasskvm(typed="poweroff\n")
    assert "reboot: Power down" in run.console
    assert run.status == 0


@pytest.mark.parametrize("way", ["a", "k", "t"])
def test_reboot_boots_again_whichever_way_the_kernel_takes(
    lasskvm: LassKvm, guest_program: Callable[[str], Path], way: str
) -> None:
    """By ACPI's reset register, the keyboard controller, a triple fault."""
    options = ("--on-reset", "reset", "--on-shutdown", "reset", "--append", f"reboot={way}")
    run = lasskvm("-q", *options, "--", guest_program("reboot"))
    assert run.console.index("restarting") < run.console.index("restarted")
    assert run.status == RESTARTED


def test_with_a_program_a_restart_ends_the_run(
    lasskvm: LassKvm, guest_program: Callable[[str], Path]
) -> None:
    run = lasskvm("-q", "--", guest_program("reboot"))
    assert "restarted" not in run.console
    assert "the guest asked for a reset before the program had ended" in run.errors
    assert run.status == ENDED_WITHOUT_STATUS


SEEN = ("grep", "-hE", "timer|ttyS0|^kvm-clock|^tsc|^LOC", "/proc/interrupts")
CLOCK = "/sys/devices/system/clocksource/clocksource0/current_clocksource"


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        ("", ("IO-APIC     4-edge      ttyS0", "kvm-clock")),
        # The timer interrupt of the PIT by way of the IOAPIC, from which the APIC timer is calibrated.
        ("lapic=notscdeadline", ("IO-APIC     2-edge      timer", "kvm-clock")),
        ("noapic", ("XT-PIC          ttyS0", "kvm-clock")),
        ("acpi=off", ("XT-PIC          timer", "kvm-clock")),
        ("acpi=off nolapic noapic no-kvmclock", ("XT-PIC          timer", "tsc")),
    ],
)
def test_linux_uses_the_apics_and_kvm_clock_and_does_without_each(
    lasskvm: LassKvm, busybox: Path, words: str, seen: tuple[str, ...]
) -> None:
    run = lasskvm("-q", "--append", words, "--", busybox, *SEEN, CLOCK)
    assert run.status == 0
    for text in seen:
        assert text in run.console


def test_linux_recognizes_kvm_and_powers_on_by_acpi(lasskvm: LassKvm, busybox: Path) -> None:
    run = lasskvm("--", busybox, "true")
    for line in (
        "Hypervisor detected: KVM",
        "ACPI: Using IOAPIC for interrupt routing",
        "ACPI: PM: (supports S0 S5)",
    ):
        assert line in run.console, line
