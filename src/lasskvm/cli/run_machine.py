"""From the options of ``lasskvm run`` to a machine that is ready to run."""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lasskvm.cli.sizes import parse_size
from lasskvm.errors import CpuFeatureError, ImageError
from lasskvm.kvm import HostClock
from lasskvm.machine.boot import BootProtocol, Entry, Module, load_firmware, load_image, probe_image
from lasskvm.machine.optional_devices import DEBUG_CONSOLE, PC_TESTDEV, DeviceRequest, parse_device
from lasskvm.machine.pc import OnEvent, Pc
from lasskvm.x86.cpu_models import CpuModel, parse_cpu

if TYPE_CHECKING:
    from lasskvm.images import Image, KernelModules
    from lasskvm.kvm import ExecutionEngine
    from lasskvm.kvm.providers import Provider
    from lasskvm.machine.console import Console

__all__ = ["KERNEL_WORDS", "MachineChoice", "build_machine"]

#: What Linux is told unless --cmdline says otherwise. The TSC is to be trusted: on the host's clock timer interrupts
#: come late when the host is busy, and Linux would take the TSC to be wrong.
KERNEL_WORDS = "console=ttyS0 tsc=reliable"
#: A panic restarts, where that ends the run.
_PANIC_ENDS = "panic=-1"
#: The console from the first line on, and as little as possible on it.
_EARLY_CONSOLE = "earlyprintk=serial,ttyS0,115200"
_QUIET = "quiet"

_MIB = 1 << 20
#: The EPC of a processor with SGX when nobody says how large.
_DEFAULT_EPC = 8 * _MIB
_EXECUTABLE_BITS = 0o111
#: Where SeaBIOS writes what it does.
_FIRMWARE_CONSOLE = DeviceRequest(DEBUG_CONSOLE, 0x402)
#: What of a choice is for a kernel.
_KERNEL_OPTIONS = {
    "append": "--append",
    "command_line": "--cmdline",
    "initrd": "--initrd",
    "modules": "--module",
    "program": "the program",
}
_LINUX_PROTOCOLS = (BootProtocol.LINUX64, BootProtocol.LINUX32)


@dataclass(frozen=True)
class MachineChoice:
    """What a person has chosen.

    *memory* is in MiB, *epc* as :func:`parse_size` takes it; *command_line* stands in place of the usual words and
    *append*.
    """

    memory: int
    cpu: str
    epc: str | None = None
    append: str = ""
    command_line: str | None = None
    initrd: Path | None = None
    program: Sequence[str] = ()
    modules: Sequence[str] = ()
    devices: Sequence[str] = ()
    on_reset: OnEvent = "reset"
    on_shutdown: OnEvent = "exit"
    host_clock: bool = False
    engine: ExecutionEngine = "jit"
    provider: Provider = "soft"
    quiet: bool = False


def build_machine(choice: MachineChoice, image: str | None, firmware: Path | None, console: Console) -> Pc:
    """The machine that *choice* describes, about to start *image* (a name or a file) or *firmware*, on *console*.

    Raises :class:`~lasskvm.errors.LassKvmError` for whatever is wrong with any of it.
    """
    if firmware is not None:
        return _build(choice, console, load_firmware(firmware))
    from lasskvm import images

    assert image is not None
    resolved = images.resolve(image)
    if resolved.firmware is not None:
        _refuse_kernel_options(choice, image)
        return _build(choice, console, load_firmware(resolved.firmware))
    kernel = resolved.kernel
    assert kernel is not None
    protocol = probe_image(kernel)
    if protocol is BootProtocol.MULTIBOOT:
        choice = replace(choice, devices=(*choice.devices, PC_TESTDEV))
    pc = _build(choice, console)
    pc.boot(_loader(choice, pc, kernel, protocol, _initrd(choice, resolved)))
    return pc


def _refuse_kernel_options(choice: MachineChoice, image: str) -> None:
    for name, option in _KERNEL_OPTIONS.items():
        if getattr(choice, name):
            raise ImageError(f"{image} is firmware, which is given no kernel; leave {option} out")


def _build(choice: MachineChoice, console: Console, firmware: bytes | None = None) -> Pc:
    requests = [parse_device(device) for device in choice.devices]
    if firmware is not None:
        requests.append(_FIRMWARE_CONSOLE)
    cpu = parse_cpu(choice.cpu)
    return Pc(
        choice.memory * _MIB,
        cpu,
        output=console.write,
        idle=console.idle,
        clock=HostClock() if choice.host_clock else None,
        engine=choice.engine,
        provider=choice.provider,
        firmware=firmware,
        devices=requests,
        epc_size=_epc_size(choice, cpu),
        on_reset=choice.on_reset,
        on_shutdown=choice.on_shutdown,
    )


def _epc_size(choice: MachineChoice, cpu: CpuModel) -> int:
    """The bytes of the guest's EPC; 0 without SGX. On /dev/kvm the machine refuses one that is asked for."""
    has_sgx = "sgx" in cpu.features
    if choice.epc is None:
        return _DEFAULT_EPC if has_sgx and choice.provider == "soft" else 0
    if not has_sgx:
        raise CpuFeatureError(
            "--epc is for a processor with SGX; add it with --cpu max,+sgx, or leave --epc out"
        )
    size = parse_size(choice.epc, "--epc")
    if not size:
        raise CpuFeatureError(
            "a processor with SGX has an EPC; give --epc a size, such as 8M, or leave +sgx out"
        )
    return size


def _loader(
    choice: MachineChoice, pc: Pc, kernel: Path, protocol: BootProtocol, initrd: Path | bytes | None
) -> Callable[[int], Entry]:
    modules = [Module.parse(module) for module in choice.modules]
    command_line = _command_line(choice, protocol)

    def load(rsdp: int) -> Entry:
        return load_image(
            kernel,
            pc.vm.memory,
            command_line=command_line,
            initrd=initrd,
            modules=modules,
            rsdp=rsdp,
            e820=pc.memory_map,
        ).entry

    return load


def _command_line(choice: MachineChoice, protocol: BootProtocol) -> str:
    if choice.command_line is not None:
        return choice.command_line
    if protocol not in _LINUX_PROTOCOLS:
        return choice.append
    verbosity = _QUIET if choice.quiet else _EARLY_CONSOLE
    panic = _PANIC_ENDS if choice.on_reset == "exit" else ""
    return " ".join(filter(None, (KERNEL_WORDS, panic, verbosity, choice.append)))


def _initrd(choice: MachineChoice, image: Image) -> Path | bytes | None:
    """What the guest boots into: an initrd of one's own, a program, or for a pulled Linux a shell, or nothing."""
    from lasskvm import images

    if choice.initrd is not None:
        return choice.initrd
    if choice.program:
        path = Path(choice.program[0])
        _check_executable(path)
        return images.program_initramfs(_busybox(image), path, list(choice.program[1:]), _modules(image))
    if image.busybox is None:
        return None
    return images.shell_initramfs(_busybox(image), _modules(image))


def _busybox(image: Image) -> bytes:
    """The busybox that belongs to *image*, or for a kernel file that of the pulled image."""
    from lasskvm import images

    path = image.busybox
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


def _modules(image: Image) -> KernelModules | None:
    """The modules that come with *image*."""
    from lasskvm import images

    return images.KernelModules(image.version, image.modules) if image.modules else None


def _check_executable(program: Path) -> None:
    """Refuse a file that the host would not execute either; what else is wrong is found where it is read."""
    try:
        mode = program.stat().st_mode
    except OSError:
        return
    if stat.S_ISREG(mode) and not mode & _EXECUTABLE_BITS:
        raise ImageError(f"program {program} is not executable; run `chmod +x {program}` if it should be")
