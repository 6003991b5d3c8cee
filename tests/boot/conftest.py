"""Real kernels through the real command line: the Debian image, the programs of guests/, and ways to run both.

The image is pulled and the programs are built once, whatever the number of test processes. A host on which that is
impossible skips these tests and says why; in CI (``CI=true``) it fails them.

A boot takes far longer than what most tests do after it. So machines that differ in nothing but what is typed are
booted and saved once (:func:`at_prompt`, :func:`in_program`), and each test goes on with such a machine. Tests of the
boot itself, of its options and of saving boot one of their own (:func:`lasskvm`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from lasskvm.errors import LassKvmError
from lasskvm.images import Image, ImageCache, pull, pull_debian, shell_initramfs
from lasskvm.images.initramfs import Initramfs

GUESTS = Path(__file__).parents[2] / "guests"
#: Far more than a run takes, also on a busy host that has to compile the engine first.
RUN_SECONDS = 200
_CHUNK = 4096
#: Guest seconds after which a boot has long come to rest. Idle time is skipped.
_AT_REST = "5"
#: Programs of guests/ that a machine at its prompt has in /program.
PROGRAMS = ("lass_user", "lass_supervisor", "selfmod", "exact", "debug", "fp")
#: What such a machine is started with: a triple fault restarts it, as everything else does.
_PROMPT_WORDS = ("-q", "--on-shutdown", "reset")
#: A program that shows its arguments and then does what is typed; its exit status is that of the last command.
_READER = 'printf "[%s]\\n" "$@"; while read -r line; do eval "$line"; done'
ARGUMENTS = ("two words", "it's", "$HOME", "*")


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
#: Takes what is typed, and words of the command line.
GoesOn = Callable[..., Run]
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
def locked(folder: Path, name: str = "folder") -> Iterator[None]:
    """No other process of this test session is at the thing *name* in *folder* meanwhile."""
    with (folder / f"{name}.lock").open("w") as lock:
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


@pytest.fixture(scope="session")
def prompt_initrd(debian: Image, guest_program: GuestProgram, shared_folder: Path) -> Path:
    """The initramfs of ``lasskvm run debian`` with :data:`PROGRAMS` in /program."""
    assert debian.busybox is not None
    programs = Initramfs()
    for name in PROGRAMS:
        programs.add_file(f"program/{name}", guest_program(name).read_bytes())
    initrd = shared_folder / "prompt.cpio"
    with locked(shared_folder):
        if not initrd.exists():
            # The kernel unpacks one archive after the other.
            initrd.write_bytes(shell_initramfs(debian.busybox.read_bytes()) + programs.build())
    return initrd


@pytest.fixture(scope="session")
def at_prompt(prompt_initrd: Path, shared_folder: Path) -> GoesOn:
    """A function that goes on with a machine whose shell waits for input, and types *typed* there.

    *cpu* and *append* are the options of the boot. The shell ends behind *typed*, and its status is that of the last
    command; the console is what came after the prompt.
    """

    def go_on(typed: str, *words: str, cpu: str = "max", append: str = "") -> Run:
        options = (*_PROMPT_WORDS, "--cpu", cpu, "--append", append, "--initrd", prompt_initrd)
        snapshot, _ = saved_at_rest(shared_folder, *options)
        return run_lasskvm("--load", snapshot, *words, typed=typed)

    return go_on


@pytest.fixture(scope="session")
def in_program(debian: Image, busybox: Path, shared_folder: Path) -> GoesOn:
    """A function that goes on with a machine whose program, started with :data:`ARGUMENTS`, does what is typed.

    The console is all of it, from the beginning.
    """
    words = ("-q", "--", busybox, "sh", "-c", _READER, "sh", *ARGUMENTS)

    def go_on(typed: str, *more: str) -> Run:
        snapshot, console = saved_at_rest(shared_folder, *words)
        run = run_lasskvm("--load", snapshot, *more, typed=typed)
        return replace(run, console=console + run.console)

    return go_on


def saved_at_rest(folder: Path, *words: str | Path) -> tuple[Path, str]:
    """A machine that ``lasskvm run debian`` has booted with *words* until it waited for input.

    It is in a file, and its console until then is text. The first of all processes boots it.
    """
    snapshot = folder / hashlib.sha256(shlex.join(map(str, words)).encode()).hexdigest()
    console = snapshot.with_suffix(".txt")
    with locked(folder, snapshot.name):
        if not console.exists():
            command = ("debian", "--save", snapshot, "--save-after", _AT_REST, *words)
            # Standard input stays open: its end would end the shell.
            reading, writing = os.pipe()
            try:
                run = finished(command, reading, None)
            finally:
                os.close(reading)
                os.close(writing)
            assert (run.status, snapshot.exists()) == (0, True), run
            console.write_text(run.console, newline="")
    return snapshot, console.read_bytes().decode()


@pytest.fixture(scope="session")
def whole_boot(lasskvm: LassKvm, busybox: Path, shared_folder: Path) -> tuple[tuple[str | Path, ...], Run]:
    """A boot with everything the kernel prints, its program included: the words of the command line, and the run."""
    words = ("--stats", "--", busybox, "sh", "-c", "cat /proc/uptime /proc/interrupts; exit 5")
    kept = shared_folder / "whole_boot.json"
    with locked(shared_folder, "whole_boot"):
        if not kept.exists():
            kept.write_text(json.dumps(asdict(lasskvm(*words))))
    return words, Run(**json.loads(kept.read_text()))


def run_lasskvm(*words: str | Path, typed: str | None = None) -> Run:
    return finished(words, subprocess.DEVNULL if typed is None else subprocess.PIPE, typed)


def finished(words: Sequence[str | Path], stdin: int, typed: str | None) -> Run:
    """``lasskvm run`` with *words*, until it ends."""
    command = [sys.executable, "-m", "lasskvm", "run", *map(str, words)]
    with subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            output, errors = process.communicate(None if typed is None else typed.encode(), RUN_SECONDS)
        except BaseException:
            process.kill()
            raise
    assert b"Traceback" not in errors, errors.decode()
    return Run(process.returncode, output.decode(errors="replace"), errors.decode())


@pytest.fixture(scope="session")
def until(shared_folder: Path) -> Until:
    """A function that runs an image of Debian's, by its name, until its output has a text, and gives what it said.

    More words of the command line may follow. The text has to come after the text *behind*. The image is pulled if
    there is none.
    """

    def run(name: str, text: str, *words: str, behind: str = "") -> str:
        pull_if_missing(name, shared_folder)
        return output_until(text, [sys.executable, "-m", "lasskvm", "run", name, *words], behind)

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


def output_until(text: str, command: list[str], behind: str = "") -> str:
    deadline = time.monotonic() + RUN_SECONDS
    output = b""

    def is_there() -> bool:
        said = output.decode(errors="replace")
        return behind in said and text in said[said.index(behind) :]

    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            while not is_there():
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
    assert is_there(), said
    return said


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these boot a kernel, and the first may pull it."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.network)
