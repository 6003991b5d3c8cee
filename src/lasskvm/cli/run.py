"""``lasskvm run``: boot a kernel, with a shell, a program or an initrd of one's own."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lasskvm.cli.engine import EngineChoice, EngineOption
from lasskvm.cli.reporting import STATUS_FAILED, ignore, reports_errors, say
from lasskvm.cli.run_options import (
    AppendOption,
    BackendChoice,
    BackendOption,
    ClockChoice,
    ClockOption,
    CmdlineOption,
    CpuOption,
    DeviceOption,
    EpcOption,
    FirmwareOption,
    ImageArgument,
    InitrdOption,
    LoadOption,
    MemoryOption,
    ModuleOption,
    OnEventChoice,
    OnResetOption,
    OnShutdownOption,
    ProgramOption,
    QuietOption,
    SaveAfterOption,
    SaveOption,
    StatsOption,
    TimeoutOption,
)

if TYPE_CHECKING:
    from lasskvm.machine.pc import Ending, Pc

# The machine is imported by the functions that need it: it brings the engine along, and --help should not
# wait for it.

__all__ = ["EXAMPLE", "run"]

EXAMPLE = """[bold]Examples:[/] a shell; a program, whose exit status becomes the command's; one's own kernel; \
a unit-test kernel (multiboot); firmware

lasskvm run debian

lasskvm run debian -- ./lass_test --verbose

lasskvm run bzImage --initrd initramfs.cpio --append mitigations=off

lasskvm run apic.flat --append "timer" --module data.bin,writable

lasskvm run --firmware bios.bin

[bold]Exit status:[/] that of the program or shell; from a bare-metal guest, (value << 1) | 1 for what it \
writes to port 0xf4; 0 when the guest powers off, or restarts with --on-reset exit; 1 when it crashes; 124 at the \
time limit; 130 after Ctrl-C; 2 when something is wrong with the command."""

_DEFAULT_MEMORY = 256
_STATUS_BITS = 0xFF
_STANDARD_OUTPUT = 1
_NANOSECONDS_PER_SECOND = 1_000_000_000
#: What can be said of a machine that is loaded.
_FROM_DEFAULT = "DEFAULT"
_BESIDE_LOAD = frozenset(("load", "save", "save_after", "timeout", "stats", "quiet", "help"))
#: What can be said of a machine that starts in its firmware.
_BESIDE_FIRMWARE = (_BESIDE_LOAD - {"load"}) | frozenset(
    ("firmware", "memory", "cpu", "epc", "device", "on_reset", "on_shutdown", "clock", "engine", "backend")
)


@reports_errors
def run(
    context: typer.Context,
    image: ImageArgument = None,
    program: ProgramOption = None,
    memory: MemoryOption = _DEFAULT_MEMORY,
    cpu: CpuOption = "max",
    epc: EpcOption = None,
    append: AppendOption = "",
    cmdline: CmdlineOption = None,
    initrd: InitrdOption = None,
    module: ModuleOption = None,
    firmware: FirmwareOption = None,
    device: DeviceOption = None,
    on_reset: OnResetOption = None,
    on_shutdown: OnShutdownOption = OnEventChoice.EXIT,
    timeout: TimeoutOption = None,
    clock: ClockOption = None,
    engine: EngineOption = EngineChoice.JIT,
    backend: BackendOption = BackendChoice.SOFT,
    save: SaveOption = None,
    save_after: SaveAfterOption = None,
    load: LoadOption = None,
    stats: StatsOption = False,
    quiet: QuietOption = False,
) -> None:
    """Boot a kernel or firmware with LASS, its console on standard input and output."""
    on_host = backend is BackendChoice.KVM
    _check_saving(save, save_after, on_host)
    if load is not None:
        _refuse_beside(context, _BESIDE_LOAD, "--load goes on with the machine as it was saved")
    elif firmware is not None:
        _refuse_beside(context, _BESIDE_FIRMWARE, "--firmware starts a machine without an image")
    elif image is None:
        raise typer.BadParameter(
            "give an image to boot, a ROM with --firmware, or a saved machine with --load"
        )
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
    from lasskvm import kvm
    from lasskvm.cli.run_machine import MachineChoice, build_machine
    from lasskvm.machine.console import HINT, Console, is_terminal, standard_input
    from lasskvm.machine.pc import Pc

    keyboard = standard_input()
    interactive = not program and is_terminal(keyboard)
    console = Console(input_descriptor=keyboard, output_descriptor=_STANDARD_OUTPUT, raw=interactive)
    if load is not None:
        pc = Pc.load(load, output=console.write, idle=console.idle)
    else:
        choice = MachineChoice(
            memory=memory,
            cpu=cpu,
            epc=epc,
            append=append,
            command_line=cmdline,
            initrd=initrd,
            program=program or (),
            modules=module or (),
            devices=device or (),
            on_reset=on_reset.value if on_reset is not None else "exit" if program else "reset",
            on_shutdown=on_shutdown.value,
            host_clock=not on_host and (clock is ClockChoice.HOST or (clock is None and interactive)),
            engine=engine.value,
            provider="host" if on_host else "soft",
            quiet=quiet,
        )
        pc = build_machine(choice, image, firmware, console)
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


def _refuse_beside(context: typer.Context, allowed: Collection[str], reason: str) -> None:
    """Refuse every parameter that a person has given and that is not *allowed*, for *reason*."""
    for parameter in context.command.params:
        name = parameter.name
        if name is None or name in allowed:
            continue
        source = context.get_parameter_source(name)
        if source is not None and source.name != _FROM_DEFAULT:
            raise typer.BadParameter(f"{reason}; leave {parameter.opts[0]} out")


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


def _status(ending: Ending, has_program: bool) -> int:
    """The exit status for *ending*, after saying what a person cannot see in the guest's own output."""
    from lasskvm.machine.pc import End

    if ending.end in (End.TRIPLE_FAULT, End.INTERNAL_ERROR, End.TIMEOUT):
        say(f"{ending.end.value} ({ending.detail})")
    elif has_program and ending.end in (End.RESET, End.HALTED, End.POWER_OFF):
        say(f"{ending.end.value} before the program had ended")
        return STATUS_FAILED
    return ending.status & _STATUS_BITS


def _print_statistics(pc: Pc) -> None:
    for name, value in pc.statistics().items():
        say(f"{name.replace('_', ' ')}: {value}")
