"""The two VMMs under comparison, as command lines for the same guest."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.context import GUEST_MEMORY_MIB
from benchmarks.rows import BenchmarkError

__all__ = [
    "COMMAND_LINE",
    "QEMU",
    "QEMU_MISSING",
    "WITHOUT_KVM_CLOCK",
    "WITH_APIC_AND_ACPI",
    "find_qemu",
    "lasskvm",
    "lasskvm_image",
    "lasskvm_program",
    "lasskvm_version",
    "qemu",
    "qemu_image",
    "qemu_version",
]

QEMU = "qemu-system-x86_64"
QEMU_MISSING = f"{QEMU} not found: install qemu-system-x86, or give --qemu"

#: What both kernels are told: a serial console from the first line on, no probing for hardware that neither
#: machine has, the clock of the machine as it is, and a reset at the end that both take for the end of it.
COMMAND_LINE = (
    "console=ttyS0 earlyprintk=serial,ttyS0,115200 nokaslr noapic nolapic acpi=off pci=off nosmp "
    "tsc=reliable no_timer_check mitigations=off nohz=off highres=off audit=0 cryptomgr.notests "
    "panic=-1 reboot=k i8042.noaux i8042.nokbd 8250.nr_uarts=1 rdinit=/init"
)


#: The same without a word against what a PC has: interrupts by the APICs, tables of ACPI; and without kvm-clock.
WITH_APIC_AND_ACPI = COMMAND_LINE.replace("noapic nolapic acpi=off ", "")
WITHOUT_KVM_CLOCK = f"{COMMAND_LINE} no-kvmclock"


def lasskvm(
    kernel: Path,
    initrd: Path,
    *,
    lass: bool = True,
    clock: str | None = None,
    command_line: str = COMMAND_LINE,
) -> list[str]:
    """This package; *clock* is that of ``--clock``."""
    command = [sys.executable, "-m", "lasskvm", "run", str(kernel), "--initrd", str(initrd)]
    command += ["--memory", str(GUEST_MEMORY_MIB), "--cmdline", command_line, "--on-reset", "exit"]
    if not lass:
        command += ["--cpu", "max,-lass"]
    if clock is not None:
        command += ["--clock", clock]
    return command


def lasskvm_program(image: str, program: Path) -> list[str]:
    """This package as people use it: ``lasskvm run IMAGE -- PROGRAM``."""
    return [sys.executable, "-m", "lasskvm", "run", image, "--quiet", "--", str(program)]


def lasskvm_image(image: Path) -> list[str]:
    """This package with the multiboot *image*, which gets its test devices by default."""
    return [sys.executable, "-m", "lasskvm", "run", str(image), "--memory", str(GUEST_MEMORY_MIB)]


def qemu(program: str | None, kernel: Path, initrd: Path) -> list[str] | None:
    """QEMU's TCG with every CPU feature it knows; None when *program*, from :func:`find_qemu`, is None."""
    if program is None:
        return None
    return [*_tcg(program, kernel), "-initrd", str(initrd), "-append", COMMAND_LINE]


def qemu_image(program: str | None, image: Path) -> list[str] | None:
    """The same with a multiboot *image*, and with the devices that tests expect."""
    if program is None:
        return None
    devices = ["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-device", "pc-testdev"]
    return [*_tcg(program, image), *devices]


def _tcg(program: str, kernel: Path) -> list[str]:
    machine = [program, "-accel", "tcg", "-cpu", "max", "-m", str(GUEST_MEMORY_MIB)]
    console = ["-nographic", "-nodefaults", "-serial", "stdio", "-no-reboot"]
    return [*machine, *console, "-kernel", str(kernel)]


def find_qemu(path: Path | None) -> str | None:
    """The QEMU to compare with: *path*, or without one that of the search path; None when it is not installed.

    Raises :class:`BenchmarkError` when *path* is no program.
    """
    if path is None:
        return shutil.which(QEMU)
    program = shutil.which(path.absolute())
    if program is None:
        raise BenchmarkError(f"{path} cannot be run; give --qemu the path of a {QEMU}")
    return program


def qemu_version(program: str | None) -> str:
    """The first line of *program*'s ``--version``, or why there is none."""
    if program is None:
        return QEMU_MISSING
    output = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    return output.partition("\n")[0]


def lasskvm_version() -> str:
    """This package's version."""
    return f"lasskvm {version('lasskvm')}"
