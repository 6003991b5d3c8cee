"""Switching the guest off and restarting it; interrupts through the APICs, time by kvm-clock, tables of ACPI."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lasskvm.images.catalog import DEBIAN

LassKvm = Callable[..., Any]
GoesOn = Callable[..., Any]

RESTARTED = 42
ENDED_WITHOUT_STATUS = 1


def test_poweroff_ends_the_process_with_0(at_prompt: GoesOn) -> None:
    run = at_prompt("poweroff\n")
    assert "reboot: Power down" in run.console
    assert run.status == 0


@pytest.mark.parametrize("way", ["a", "t"])
def test_reboot_boots_again_whichever_way_the_kernel_takes(
    until: Callable[..., str], guest_program: Callable[[str], Path], way: str
) -> None:
    """By ACPI's reset register, a triple fault."""
    options = ("--on-reset", "reset", "--on-shutdown", "reset", "--append", f"reboot={way}")
    until(DEBIAN, "Linux version", *options, "--", str(guest_program("reboot")), behind="restarting")


def test_reboot_by_the_keyboard_controller_starts_the_program_again(
    lasskvm: LassKvm, guest_program: Callable[[str], Path]
) -> None:
    """It tells the second time by a byte of the CMOS memory."""
    options = ("--on-reset", "reset", "--append", "reboot=k")
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
        # The timer interrupt of the PIT by way of the IOAPIC, from which the APIC timer is calibrated.
        ("lapic=notscdeadline", ("IO-APIC     2-edge      timer", "kvm-clock")),
        ("noapic", ("XT-PIC          ttyS0", "kvm-clock")),
        ("acpi=off", ("XT-PIC          timer", "kvm-clock")),
        ("acpi=off nolapic noapic no-kvmclock", ("XT-PIC          timer", "tsc")),
    ],
)
def test_linux_does_without_each_of_the_apics_and_kvm_clock(
    lasskvm: LassKvm, busybox: Path, words: str, seen: tuple[str, ...]
) -> None:
    run = lasskvm("-q", "--append", words, "--", busybox, *SEEN, CLOCK)
    assert run.status == 0
    for text in seen:
        assert text in run.console


def test_linux_uses_the_apics_and_kvm_clock(at_prompt: GoesOn) -> None:
    run = at_prompt(f"cat /proc/interrupts {CLOCK}\n")
    assert run.status == 0
    assert "IO-APIC     4-edge      ttyS0" in run.console
    assert "kvm-clock" in run.lines


def test_linux_recognizes_kvm_and_powers_on_by_acpi(whole_boot: tuple[tuple[str, ...], Any]) -> None:
    _, run = whole_boot
    for line in (
        "Hypervisor detected: KVM",
        "ACPI: Using IOAPIC for interrupt routing",
        "ACPI: PM: (supports S0 S5)",
    ):
        assert line in run.console, line
