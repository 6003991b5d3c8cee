"""``lasskvm run``: boot a kernel, with a shell, a program or an initrd of one's own."""

from __future__ import annotations

import stat
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lasskvm.cli.cpu import LIST, print_models
from lasskvm.cli.engine import EngineChoice, EngineOption
from lasskvm.cli.reporting import STATUS_FAILED, ignore, reports_errors, say
from lasskvm.errors import ImageError
from lasskvm.x86.cpu_models import parse_cpu

if TYPE_CHECKING:
    from lasskvm.images import Image
    from lasskvm.machine.pc import Ending, Pc

# The machine is imported by the functions that need it: it brings the engine along, and --help should not
# wait for it.

__all__ = ["EXAMPLE", "LINUX_COMMAND_LINE", "run"]

EXAMPLE = """[bold]Examples:[/] a shell; a program, whose exit status becomes the command's; one's own kernel

lasskvm run debian

lasskvm run debian -- ./lass_test --verbose

lasskvm run bzImage --initrd initramfs.cpio --append mitigations=off

[bold]Exit status:[/] that of the program or shell; from a bare-metal guest, (value << 1) | 1 for what it \
writes to port 0xf4; 0 when the guest powers off or restarts; 1 when it crashes; 124 at the time limit; 130 \
after Ctrl-C; 2 when something is wrong with the command."""

#: What Linux is told unless --cmdline says otherwise. That there is no PCI, no APIC and no keyboard it finds out
#: in no time; without ACPI tables it would complain about the firmware. The TSC is to be trusted: on the host's
#: clock timer interrupts come late when the host is busy, and Linux would take the TSC to be wrong. A panic
#: restarts, which ends the run.
LINUX_COMMAND_LINE = "console=ttyS0 acpi=off tsc=reliable panic=-1 reboot=k"
#: The console from the first line on, and as little as possible on it.
_EARLY_CONSOLE = "earlyprintk=serial,ttyS0,115200"
_QUIET = "quiet"

_MIB = 1 << 20
_DEFAULT_MEMORY = 256
_EXECUTABLE_BITS = 0o111
_STATUS_BITS = 0xFF
_STANDARD_OUTPUT = 1
_NANOSECONDS_PER_SECOND = 1_000_000_000
#: What can be said of a machine that is loaded.
_FROM_DEFAULT = "DEFAULT"
_BESIDE_LOAD = ("load", "save", "save_after", "timeout", "stats", "quiet", "help")


class ClockChoice(StrEnum):
    """Which time the guest sees."""

    VIRTUAL = "virtual"
    HOST = "host"


class BackendChoice(StrEnum):
    """Whose KVM runs the guest."""

    SOFT = "soft"
    KVM = "kvm"


def _list_cpus(cpu: str) -> str:
    if cpu == LIST:
        print_models()
        raise typer.Exit
    return cpu


_ImageArgument = Annotated[
    str | None,
    typer.Argument(
        help="A kernel file (bzImage, vmlinux, ELF), or a pulled image: debian. None with --load.",
        metavar="IMAGE",
        show_default=False,
    ),
]
_Program = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- PROGRAM ARGS", help="A static program to run as the guest's only one."),
]
_Memory = Annotated[int, typer.Option(help="Guest memory in MiB.", metavar="MIB")]
_Cpu = Annotated[
    str,
    typer.Option(
        help=f'CPU model and features, such as "max,-lass"; "{LIST}" prints them.',
        callback=_list_cpus,
        is_eager=True,
        metavar="MODEL[,±FEATURE]...",
    ),
]
_Append = Annotated[
    str, typer.Option(help="Words to add to the default command line of the kernel.", metavar="TEXT")
]
_Cmdline = Annotated[
    str | None,
    typer.Option(help="The command line of the kernel, instead of the default one.", metavar="TEXT"),
]
_Initrd = Annotated[Path | None, typer.Option(help="An initrd or initramfs for the kernel.", metavar="FILE")]
_Timeout = Annotated[
    float | None,
    typer.Option(help="End the run after so many seconds, with status 124.", min=0, metavar="SECONDS"),
]
_Clock = Annotated[
    ClockChoice | None,
    typer.Option(
        help="The guest's time: deterministic, skipping idle time; or the host's.",
        show_default="virtual, but host when a person types to the guest",
    ),
]
_Backend = Annotated[
    BackendChoice,
    typer.Option(
        help="Whose KVM runs the guest: that of lasskvm, or /dev/kvm, with what the host's processor has."
    ),
]
_Save = Annotated[
    Path | None,
    typer.Option(
        help="Save the machine when --save-after says so, or else when the time limit or the console ends the run.",
        metavar="FILE",
    ),
]
_SaveAfter = Annotated[
    float | None,
    typer.Option(help="Save after so many seconds of the guest's time, and end.", min=0, metavar="SECONDS"),
]
_LoadOption = Annotated[
    Path | None,
    typer.Option(help="Go on with a machine that --save has saved, as it was.", metavar="FILE"),
]
_Stats = Annotated[bool, typer.Option("--stats", help="Print counters on standard error at the end.")]
_Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help='No messages but errors; "quiet" for the kernel, too.')
]


@reports_errors
def run(
    context: typer.Context,
    image: _ImageArgument = None,
    program: _Program = None,
    memory: _Memory = _DEFAULT_MEMORY,
    cpu: _Cpu = "max",
    append: _Append = "",
    cmdline: _Cmdline = None,
    initrd: _Initrd = None,
    timeout: _Timeout = None,
    clock: _Clock = None,
    engine: EngineOption = EngineChoice.JIT,
    backend: _Backend = BackendChoice.SOFT,
    save: _Save = None,
    save_after: _SaveAfter = None,
    load: _LoadOption = None,
    stats: _Stats = False,
    quiet: _Quiet = False,
) -> None:
    """Boot a kernel with LASS, its console on standard input and output."""
    on_host = backend is BackendChoice.KVM
    _check_saving(save, save_after, on_host)
    if load is not None:
        _refuse_beside_load(context)
    if program and initrd is not None:
        raise typer.BadParameter(
            "an initrd and a program exclude each other: the program gets an initramfs of its own"
        )
    if append and cmdline is not None:
        raise typer.BadParameter("--cmdline replaces what --append would add to; give one of them")
    if on_host and clock is ClockChoice.VIRTUAL:
        raise typer.BadParameter("a guest on /dev/kvm lives by the host's time; leave --clock virtual out")
    if on_host and engine is not EngineChoice.JIT:
        raise typer.BadParameter("--engine is for --backend soft; leave one of them out")
    from lasskvm import images, kvm
    from lasskvm.machine.console import HINT, Console, is_terminal, standard_input
    from lasskvm.machine.pc import Pc

    keyboard = standard_input()
    interactive = not program and is_terminal(keyboard)
    console = Console(input_descriptor=keyboard, output_descriptor=_STANDARD_OUTPUT, raw=interactive)
    if load is not None:
        pc = Pc.load(load, output=console.write, idle=console.idle)
    elif image is None:
        raise typer.BadParameter("give an image to boot, or a saved machine with --load")
    else:
        model = parse_cpu(cpu)
        kernel = images.resolve(image)
        ramdisk = _initramfs(kernel, program) if initrd is None else initrd
        host_clock = clock is ClockChoice.HOST or (clock is None and interactive)
        pc = Pc(
            memory * _MIB,
            model,
            output=console.write,
            idle=console.idle,
            clock=kvm.HostClock() if host_clock else None,
            engine=engine.value,
            provider="host" if on_host else "soft",
        )
        _load(pc, kernel, ramdisk, _command_line(append, cmdline, quiet))
    console.connect(pc.uart, pc.clock.now, pc.stop)
    if pc.missing_features() and not quiet:
        say(f"this host's KVM lacks: {', '.join(pc.missing_features())}")
    if isinstance(pc.vm, kvm.Vm) and pc.vm.engine == "jit":
        kvm.prepare(ignore if quiet else say)
    if save is not None and save_after is not None:
        pc.save_at(save, int(save_after * _NANOSECONDS_PER_SECOND))
    if console.is_raw and not quiet:
        say(HINT)
    with console:
        ending = pc.run(timeout)
    if save is not None:
        ending = _finish_saving(pc, save, ending, quiet)
    if stats:
        _print_statistics(pc)
    raise typer.Exit(_status(ending, bool(program)))


def _check_saving(save: Path | None, save_after: float | None, on_host: bool) -> None:
    """Refuse what could not be saved in the end before anything is run."""
    if save is None:
        if save_after is not None:
            raise typer.BadParameter("--save-after says when to save; say where to, with --save")
        return
    if on_host:
        raise typer.BadParameter("a machine on /dev/kvm cannot be saved; leave --save or --backend kvm out")
    if save.is_dir() or not save.parent.is_dir():
        raise typer.BadParameter(f"{save} cannot be a file; give --save one in a folder that exists")


def _refuse_beside_load(context: typer.Context) -> None:
    """A saved machine is what it is: refuse everything that would make another one of it."""
    for parameter in context.command.params:
        name = parameter.name
        if name is None or name in _BESIDE_LOAD:
            continue
        source = context.get_parameter_source(name)
        if source is not None and source.name != _FROM_DEFAULT:
            raise typer.BadParameter(
                f"--load goes on with the machine as it was saved; leave {parameter.opts[0]} out"
            )


def _finish_saving(pc: Pc, path: Path, ending: Ending, quiet: bool) -> Ending:
    """Save what the time limit or the console has stopped, and say what has become of *path*."""
    from lasskvm.machine.pc import End
    from lasskvm.machine.pc import Ending as PcEnding

    if ending.end in (End.TIMEOUT, End.STOPPED):
        pc.save(path)
        ending = PcEnding(End.SAVED, 0)
    if ending.end is not End.SAVED:
        say(f"the run was over before the machine was saved; {path} was not written")
    elif not quiet:
        say(f"the machine is in {path}; `lasskvm run --load {path}` goes on with it")
    return ending


def _command_line(append: str, cmdline: str | None, quiet: bool) -> str:
    if cmdline is not None:
        return cmdline
    return " ".join(filter(None, (LINUX_COMMAND_LINE, _QUIET if quiet else _EARLY_CONSOLE, append)))


def _load(pc: Pc, kernel: Image, initrd: Path | bytes | None, command_line: str) -> None:
    from lasskvm.machine.boot import load_image

    pc.enter(load_image(kernel.kernel, pc.vm.memory, command_line=command_line, initrd=initrd).entry)


def _initramfs(kernel: Image, program: list[str] | None) -> bytes | None:
    """What the guest boots into: *program*, or for a pulled image a shell, or nothing."""
    from lasskvm import images

    if program:
        path = Path(program[0])
        _check_executable(path)
        return images.program_initramfs(_busybox(kernel), path, program[1:])
    if kernel.busybox is None:
        return None
    return images.shell_initramfs(_busybox(kernel))


def _busybox(kernel: Image) -> bytes:
    """The busybox that belongs to *kernel*, or for a kernel file that of the pulled image."""
    from lasskvm import images

    path = kernel.busybox
    if path is None:
        try:
            path = images.resolve(images.IMAGE_NAMES[0]).busybox
        except ImageError as error:
            raise ImageError(
                "running a program takes a busybox, and none is there; "
                f"run `lasskvm images pull {images.IMAGE_NAMES[0]}`"
            ) from error
    assert path is not None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror}); pull the image again") from error


def _check_executable(program: Path) -> None:
    """Refuse a file that the host would not execute either; what else is wrong is found where it is read."""
    try:
        mode = program.stat().st_mode
    except OSError:
        return
    if stat.S_ISREG(mode) and not mode & _EXECUTABLE_BITS:
        raise ImageError(f"program {program} is not executable; run `chmod +x {program}` if it should be")


def _status(ending: Ending, has_program: bool) -> int:
    """The exit status for *ending*, after saying what a person cannot see in the guest's own output."""
    from lasskvm.machine.pc import End

    if ending.end in (End.TRIPLE_FAULT, End.INTERNAL_ERROR, End.TIMEOUT):
        say(f"{ending.end.value} ({ending.detail})")
    elif has_program and ending.end in (End.RESET, End.HALTED):
        say(f"{ending.end.value} before the program had ended")
        return STATUS_FAILED
    return ending.status & _STATUS_BITS


def _print_statistics(pc: Pc) -> None:
    for name, value in pc.statistics().items():
        say(f"{name.replace('_', ' ')}: {value}")
