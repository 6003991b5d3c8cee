"""The unit-test images through the command line: an independent judge of the machine.

Each image prints PASS, FAIL and SKIP lines and a summary, and ends by the exit port, as the KVM community's unit-test
kernels do. What they expect is what the manual says; guests/unit/README.md has what other machines make of them.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

#: Each of these starts a process with an engine of its own.
pytestmark = pytest.mark.slow

SOURCES = Path(__file__).parents[2] / "guests" / "unit"
#: Exit statuses: what the image writes to port 0xf4, times 2, plus 1.
PASSED, FAILED = 1, 3
SUMMARY = re.compile(r"SUMMARY: (\d+) passed, (\d+) failed, (\d+) skipped")

IMAGES = sorted(path.stem for path in SOURCES.glob("*.c"))
#: Needs to be told what to do.
ON_REQUEST = {"reset"}
#: Features that the default CPU model leaves out.
CPUS = {"lam": "max,+lam"}
#: Images about devices, which are the same for every engine.
DEVICE_IMAGES = {"apic", "fw_cfg", "ioapic", "multiboot", "timers"}
#: Far more than a run takes, also on a busy host that has to compile the engine first.
RUN_SECONDS = 280


@dataclass(frozen=True)
class ImageRun:
    """What a run of an image came to."""

    status: int
    console: str
    errors: str

    @property
    def lines(self) -> list[str]:
        return self.console.replace("\r", "").splitlines()

    @property
    def failures(self) -> list[str]:
        """Lines of checks that failed, and of explanations, which are indented."""
        return [line for line in self.lines if line.startswith(("FAIL", " "))]


RunImage = Callable[..., ImageRun]


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the images are; all processes of a test session have it in common."""
    if not (shutil.which("gcc") and shutil.which("objcopy")):
        if os.environ.get("CI") == "true":
            pytest.fail("the images take gcc and binutils", pytrace=False)
        pytest.skip("the images take gcc and binutils")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "unit_images"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "done"
        if not done.exists():
            command = [sys.executable, str(SOURCES / "build.py"), str(folder)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            done.touch()
    return folder


@pytest.fixture(scope="session")
def run_image(image_folder: Path) -> RunImage:
    """A function that runs an image by name, with words of its command line, and options of the command."""

    def run(name: str, *append: str, options: tuple[str, ...] = ()) -> ImageRun:
        words = ["run", str(image_folder / name), *options]
        if append:
            words += ["--append", " ".join(append)]
        process = subprocess.run(
            [sys.executable, "-m", "lasskvm", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=RUN_SECONDS,
            check=False,
        )
        errors = process.stderr.decode()
        assert "Traceback" not in errors, errors
        return ImageRun(process.returncode, process.stdout.decode(errors="replace"), errors)

    return run


@pytest.mark.parametrize(
    "image, engine",
    [
        (image, engine)
        for image in IMAGES
        for engine in ("jit", "emulator")
        if image not in ON_REQUEST and not (engine == "emulator" and image in DEVICE_IMAGES)
    ],
)
def test_every_check_of_the_image_holds(run_image: RunImage, image: str, engine: str) -> None:
    run = run_image(image, options=("--engine", engine, "--cpu", CPUS.get(image, "max")))

    assert run.failures == []
    summary = SUMMARY.fullmatch(run.lines[-1])
    assert summary is not None, run.lines[-3:]
    passes = sum(line.startswith("PASS") for line in run.lines)
    assert int(summary[1]) == passes > 0
    assert run.status == PASSED


@pytest.mark.parametrize("way", ["triple", "cf9", "port92", "keyboard"])
def test_a_reset_keeps_memory(run_image: RunImage, way: str) -> None:
    run = run_image("reset", way, options=("--on-shutdown", "reset"))

    assert run.lines[0] == "resetting"
    assert run.lines[1:] == [
        "PASS: the machine has been reset, and memory is as it was",
        "SUMMARY: 1 passed, 0 failed, 0 skipped",
    ]
    assert run.status == PASSED


def test_a_triple_fault_ends_the_machine_unless_told_otherwise(run_image: RunImage) -> None:
    run = run_image("reset", "triple")

    assert run.lines == ["resetting"]
    assert "triple-faulted" in run.errors


def test_shutdown_written_to_its_port_ends_the_machine(run_image: RunImage) -> None:
    run = run_image("reset", "shutdown")

    assert run.failures == []
    assert run.lines == []
    assert run.status == 0


def test_the_debug_console_is_on_standard_output(run_image: RunImage) -> None:
    run = run_image("devices", "console", options=("--device", "isa-debugcon"))

    assert "written to port E9H" in run.lines
    assert run.failures == []
    assert run.status == PASSED


@pytest.mark.parametrize(
    "image, feature, skipped",
    [
        ("smap", "smap", "CPUID offers no SMAP"),
        ("lass", "lass", "CPUID offers no LASS"),
        ("umip", "umip", "CPUID offers no UMIP"),
        ("pku", "pku", "CPUID offers no PKU"),
        ("lam", "lam", "CPUID offers no LAM"),
        ("pcid", "pcid", "CPUID offers no PCID"),
        ("pcid", "invpcid", "CPUID offers no INVPCID"),
        ("tsc", "tsc_adjust", "CPUID offers no TSC_ADJUST"),
        ("tsc", "rdtscp", "CPUID offers no RDTSCP"),
        ("xsave", "xsave", "CPUID offers no XSAVE"),
        ("apic", "x2apic", "CPUID offers no x2APIC"),
        ("apic", "tsc_deadline_timer", "CPUID offers no TSC deadline"),
        ("msrs", "fsgsbase", "CPUID offers no FSGSBASE"),
    ],
)
def test_what_is_not_offered_faults(run_image: RunImage, image: str, feature: str, skipped: str) -> None:
    run = run_image(image, options=("--cpu", f"max,-{feature}"))

    assert f"SKIP: {skipped}" in run.lines
    assert run.failures == []
    assert run.status == PASSED


def test_a_word_of_the_command_line_selects_a_subject(run_image: RunImage) -> None:
    run = run_image("timers", "pit")

    assert any("mode 0" in line for line in run.lines)
    assert not any("CMOS" in line for line in run.lines)


def test_modules_are_loaded_beside_the_image(run_image: RunImage, tmp_path: Path) -> None:
    module = tmp_path / "module"
    module.write_text("module of some bytes")

    options = ("--module", f"{module},with arguments", "--module", str(module))
    run = run_image("multiboot", "modules", "modules=2", options=options)

    assert run.failures == []
    assert any(line.endswith(f"20 bytes: {module} with arguments") for line in run.lines)
    assert run.status == PASSED


def test_the_firmware_configuration_has_the_size_of_memory(run_image: RunImage) -> None:
    run = run_image("fw_cfg", "memory=96", options=("--memory", "96"))

    assert "PASS: 96 MiB of memory" in run.lines
    assert run.failures == []


def test_no_image_needs_a_header_of_the_host() -> None:
    includes = {
        line.split()[1]
        for path in SOURCES.rglob("*.[chS]")
        for line in path.read_text().splitlines()
        if line.startswith("#include <")
    }

    assert includes <= {"<stdarg.h>", "<stdbool.h>", "<stddef.h>", "<stdint.h>"}
