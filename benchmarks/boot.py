"""Booting Debian's kernel: time to the first line of /init, LASS on, LASS off and QEMU, and memory."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import machines
from benchmarks.console import Session, watch
from benchmarks.context import GUEST_MEMORY_MIB, MARKER, Context
from benchmarks.rows import BenchmarkError, Row, compared, limited, median

__all__ = ["run"]

#: The kernel's first line: from here on the machines run the same code, whatever loaded it before.
_KERNEL_START = "Linux version"
_MIB = 1 << 20

#: The bars of docs/architecture.md: boot time by that of QEMU, LASS on by off, APICs, ACPI and kvm-clock by without,
#: seconds for a program, MiB beyond guest RAM.
_BOOT_BAR = 0.8
_PROGRAM_BAR = 6.0
_LASS_BAR = 1.02
_APIC_BAR = 1.15
_MEMORY_BAR = 400.0


def run(context: Context) -> list[Row]:
    """Rows for boot time, the whole process and memory."""
    kernel, initrd = context.image.path, context.initramfs("boot")
    commands = {
        "LASS on": machines.lasskvm(kernel, initrd),
        "LASS off": machines.lasskvm(kernel, initrd, lass=False),
        "APIC": machines.lasskvm(kernel, initrd, command_line=machines.WITH_APIC_AND_ACPI),
        "no APIC": machines.lasskvm(kernel, initrd, command_line=machines.WITHOUT_KVM_CLOCK),
    }
    qemu = machines.qemu(context.qemu, kernel, initrd)
    if qemu is not None:
        commands["QEMU"] = qemu
    # The first run may compile and fill caches, which is not what is measured here
    context.progress("boot: warming up")
    watch("lasskvm", commands["LASS on"], context.timeout).when(MARKER)
    sessions: dict[str, list[Session]] = {name: [] for name in commands}
    for number in range(context.runs):
        # Turn and turn about: a machine that gets slower or faster meanwhile does so for everybody
        order = list(commands) if number % 2 == 0 else list(reversed(commands))
        for name in order:
            context.progress(f"boot: {name}, run {number + 1} of {context.runs}")
            sessions[name].append(watch(name, commands[name], context.timeout))
    programs = []
    for number in range(context.runs):
        context.progress(f"boot: a program, run {number + 1} of {context.runs}")
        programs.append(_run_program(context))
    on, off, theirs = sessions["LASS on"], sessions["LASS off"], sessions.get("QEMU", [])
    missing = "" if qemu is not None else machines.QEMU_MISSING
    note = missing or _difference(on[0], theirs[0])
    return [
        compared("boot to /init, against QEMU", _boot(on), _boot(theirs), "s", at_most=_BOOT_BAR, note=note),
        compared("boot to /init, against LASS off", _boot(on), _boot(off), "s", at_most=_LASS_BAR),
        compared(
            "boot with APIC, ACPI and kvm-clock, against without",
            _boot(sessions["APIC"]),
            _boot(sessions["no APIC"]),
            "s",
            at_most=_APIC_BAR,
        ),
        compared("boot, whole process", _whole(on), _whole(theirs), "s", note=missing),
        limited("lasskvm run debian -- true", median(programs), "s", at_most=_PROGRAM_BAR),
        limited(
            "peak memory beyond guest RAM", _memory(on), "MiB", at_most=_MEMORY_BAR, theirs=_memory(theirs)
        ),
    ]


def _run_program(context: Context) -> float:
    session = watch("lasskvm", machines.lasskvm_program("debian", context.busybox("true")), context.timeout)
    if session.status:
        raise BenchmarkError(f"`lasskvm run debian -- true` failed: {session.last_words()}")
    return session.duration


def _boot(sessions: Sequence[Session]) -> float | None:
    return median([session.when(MARKER) - session.when(_KERNEL_START) for session in sessions])


def _whole(sessions: Sequence[Session]) -> float | None:
    return median([session.duration for session in sessions])


def _memory(sessions: Sequence[Session]) -> float | None:
    if not sessions:
        return None
    return max(session.peak_memory for session in sessions) / _MIB - GUEST_MEMORY_MIB


def _difference(ours: Session, theirs: Session) -> str:
    """Which words of the kernel command line only one of the two got: a comparison should say so."""
    left, right = (set(session.kernel_command_line().split()) for session in (ours, theirs))
    parts = [
        f"only {who}: {' '.join(sorted(words))}"
        for who, words in (("ours", left - right), ("QEMU", right - left))
        if words
    ]
    return "; ".join(parts)
