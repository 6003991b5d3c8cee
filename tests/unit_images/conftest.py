"""The unit-test images of guests/unit, built once, and a way to run one as a person does."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "guests" / "unit"
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each of these starts a process with an engine of its own."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
