"""The options of ``lasskvm run``: their types and what ``--help`` says of them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lasskvm.cli.cpu import LIST, print_models

__all__ = [
    "AppendOption",
    "BackendChoice",
    "BackendOption",
    "ClockChoice",
    "ClockOption",
    "CmdlineOption",
    "CpuOption",
    "DeviceOption",
    "EpcOption",
    "FirmwareOption",
    "ImageArgument",
    "InitrdOption",
    "LoadOption",
    "MemoryOption",
    "ModuleOption",
    "OnEventChoice",
    "OnResetOption",
    "OnShutdownOption",
    "ProgramOption",
    "QuietOption",
    "SaveAfterOption",
    "SaveOption",
    "StatsOption",
    "TimeoutOption",
]


class ClockChoice(StrEnum):
    """Which time the guest sees."""

    VIRTUAL = "virtual"
    HOST = "host"


class BackendChoice(StrEnum):
    """Whose KVM runs the guest."""

    SOFT = "soft"
    KVM = "kvm"


class OnEventChoice(StrEnum):
    """What becomes of a machine."""

    RESET = "reset"
    EXIT = "exit"


def _list_cpus(cpu: str) -> str:
    if cpu == LIST:
        print_models()
        raise typer.Exit
    return cpu


ImageArgument = Annotated[
    str | None,
    typer.Argument(
        help="A kernel file (bzImage, vmlinux, ELF, multiboot, PVH), or a pulled image: debian, debian-kvm, seabios, "
        "memtest86+. None with --firmware and --load.",
        metavar="IMAGE",
        show_default=False,
    ),
]
ProgramOption = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- PROGRAM ARGS", help="A static program to run as the guest's only one."),
]
MemoryOption = Annotated[int, typer.Option(help="Guest memory in MiB.", metavar="MIB")]
CpuOption = Annotated[
    str,
    typer.Option(
        help=f'CPU model and features, such as "max,-lass"; "{LIST}" prints them.',
        callback=_list_cpus,
        is_eager=True,
        metavar="MODEL[,±FEATURE]...",
    ),
]
AppendOption = Annotated[
    str, typer.Option(help="Words to add to the default command line of the kernel.", metavar="TEXT")
]
CmdlineOption = Annotated[
    str | None,
    typer.Option(help="The command line of the kernel, instead of the default one.", metavar="TEXT"),
]
InitrdOption = Annotated[
    Path | None, typer.Option(help="An initrd or initramfs for the kernel.", metavar="FILE")
]
ModuleOption = Annotated[
    list[str] | None,
    typer.Option(
        "--module",
        help="A module for a multiboot or PVH kernel, with its arguments; repeatable.",
        metavar="FILE[,ARGS]",
    ),
]
EpcOption = Annotated[
    str | None,
    typer.Option(
        help="Memory for enclaves, a multiple of 4K; for a CPU with +sgx.",
        show_default="8M with +sgx, else none",
        metavar="SIZE",
    ),
]
FirmwareOption = Annotated[
    Path | None,
    typer.Option(help="A ROM to start at the reset vector instead of an image.", metavar="FILE"),
]
DeviceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        help="A device to add, as for QEMU: pc-testdev (multiboot kernels have it), isa-debug-exit, isa-debugcon.",
        metavar="NAME[,iobase=PORT]",
    ),
]
OnShutdownOption = Annotated[
    OnEventChoice, typer.Option("--on-shutdown", help="What follows a triple fault: the end, or a reset.")
]
OnResetOption = Annotated[
    OnEventChoice | None,
    typer.Option(
        "--on-reset",
        help="What follows a reset that the guest asks for.",
        show_default="reset, but exit when a program is run",
    ),
]
TimeoutOption = Annotated[
    float | None,
    typer.Option(help="End the run after so many seconds, with status 124.", min=0, metavar="SECONDS"),
]
ClockOption = Annotated[
    ClockChoice | None,
    typer.Option(
        help="The guest's time: deterministic, skipping idle time; or the host's.",
        show_default="virtual, but host when a person types to the guest",
    ),
]
BackendOption = Annotated[
    BackendChoice,
    typer.Option(
        help="Whose KVM runs the guest: that of lasskvm, or /dev/kvm, with what the host's processor has."
    ),
]
SaveOption = Annotated[
    Path | None,
    typer.Option(
        help="Save the machine when --save-after says so, or else when the time limit or the console ends the run.",
        metavar="FILE",
    ),
]
SaveAfterOption = Annotated[
    float | None,
    typer.Option(help="Save after so many seconds of the guest's time, and end.", min=0, metavar="SECONDS"),
]
LoadOption = Annotated[
    Path | None,
    typer.Option(help="Go on with a machine that --save has saved, as it was.", metavar="FILE"),
]
StatsOption = Annotated[bool, typer.Option("--stats", help="Print counters on standard error at the end.")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help='No messages but errors; "quiet" for the kernel, too.')
]
