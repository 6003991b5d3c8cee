"""Real kernels through the real command line: the Debian image, the programs of guests/, and a way to run both.

The image is pulled and the programs are built once, whatever the number of test processes. A host on which that is
impossible skips these tests and says why; in CI (``CI=true``) it fails them.
"""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lasskvm.errors import LassKvmError
from lasskvm.images import Image, ImageCache, pull, pull_debian

GUESTS = Path(__file__).parents[2] / "guests"
#: Far more than a run takes, also on a busy host that has to compile the engine first.
RUN_SECONDS = 200
_CHUNK = 4096


@dataclass(frozen=True)
class Run:
    """What one call of the command line came to."""

    status: int
    console: str
    errors: str

    @property
    def lines(self) -> list[str]:
        """The console's lines, as a person reads them."""
        return self.console.replace("\r", "").splitlines()


LassKvm = Callable[..., Run]
Until = Callable[..., str]
GuestProgram = Callable[[str], Path]


def give_up(reason: str) -> None:
    """Skip, but fail in CI, which is there to boot real kernels."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test session have in common."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "boot"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def debian(shared_folder: Path) -> Image:
    """The Debian image in the cache, pulled if there is none."""
    with locked(shared_folder):
        pulled = [image for image in ImageCache().images("debian") if image.is_intact()]
        if pulled:
            return pulled[-1]
        failure = shared_folder / "no-image"
        if not failure.exists():
            try:
                return pull_debian(progress=print)
            except LassKvmError as error:
                failure.write_text(str(error))
        give_up(f"no Debian kernel to boot: {failure.read_text()}")
        raise AssertionError


@pytest.fixture(scope="session")
def guest_program(shared_folder: Path, debian: Image) -> GuestProgram:
    """A function that gives the path of a program of guests/, built for the Debian image."""

    def build(name: str) -> Path:
        program = shared_folder / name
        target = [str(program)]
        if name == "lass_supervisor":
            target = ["module", f"KERNEL={debian.kernel}", f"PYTHON={sys.executable}"]
        with locked(shared_folder):
            if not program.exists():
                make(f"OUT={shared_folder}", *target)
        return program

    return build


def make(*arguments: str) -> None:
    try:
        result = subprocess.run(
            ["make", "-s", "-C", str(GUESTS), *arguments], capture_output=True, text=True, check=False
        )
    except OSError as error:
        give_up(f"the guest programs take make and gcc: {error}")
        raise
    if result.returncode:
        give_up(f"the guest programs cannot be built: {result.stderr.strip()}")


@pytest.fixture(scope="session")
def busybox(debian: Image, shared_folder: Path) -> Path:
    """The image's busybox as a program to run: its first argument is the command."""
    program = shared_folder / "busybox"
    with locked(shared_folder):
        if not program.exists():
            assert debian.busybox is not None
            program.write_bytes(debian.busybox.read_bytes())
            program.chmod(0o755)
    return program


@pytest.fixture(scope="session")
def lasskvm(debian: Image) -> LassKvm:
    """A function that runs ``lasskvm run debian`` with more words, and with *typed* as its standard input."""

    def run(*words: str | Path, typed: str | None = None) -> Run:
        return run_lasskvm("debian", *words, typed=typed)

    return run


@pytest.fixture(scope="session")
def lasskvm_load() -> LassKvm:
    """A function that runs ``lasskvm run --load`` with the path of a snapshot and more words."""

    def load(*words: str | Path) -> Run:
        return run_lasskvm("--load", *words)

    return load


def run_lasskvm(*words: str | Path, typed: str | None = None) -> Run:
    process = subprocess.run(
        [sys.executable, "-m", "lasskvm", "run", *map(str, words)],
        stdin=subprocess.DEVNULL if typed is None else None,
        input=None if typed is None else typed.encode(),
        capture_output=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert b"Traceback" not in process.stderr, process.stderr.decode()
    return Run(process.returncode, process.stdout.decode(errors="replace"), process.stderr.decode())


@pytest.fixture(scope="session")
def until(shared_folder: Path) -> Until:
    """A function that runs an image of Debian's, by its name, until its output has a text, and gives what it said.

    More words of the command line may follow. The image is pulled if there is none.
    """

    def run(name: str, text: str, *words: str) -> str:
        pull_if_missing(name, shared_folder)
        return output_until(text, [sys.executable, "-m", "lasskvm", "run", name, *words])

    return run


@pytest.fixture(scope="session")
def lasskvm_image(shared_folder: Path) -> LassKvm:
    """A function that runs ``lasskvm run`` with an image of Debian's, by its name, and more words.

    The image is pulled if there is none.
    """

    def run(name: str, *words: str | Path) -> Run:
        pull_if_missing(name, shared_folder)
        return run_lasskvm(name, *words)

    return run


def pull_if_missing(name: str, shared_folder: Path) -> None:
    with locked(shared_folder):
        if not any(image.is_intact() for image in ImageCache().images(name)):
            try:
                pull(name, progress=print)
            except LassKvmError as error:
                give_up(f"no {name} to start: {error}")


def output_until(text: str, command: list[str]) -> str:
    deadline = time.monotonic() + RUN_SECONDS
    output = b""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            while text not in output.decode(errors="replace"):
                remaining = max(0.0, deadline - time.monotonic())
                if not select.select([process.stdout], [], [], remaining)[0]:
                    break
                chunk = os.read(process.stdout.fileno(), _CHUNK)
                if not chunk:
                    break
                output += chunk
        finally:
            process.kill()
    said = output.decode(errors="replace")
    assert text in said, said
    return said


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these boot a kernel, and the first may pull it."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.network)
