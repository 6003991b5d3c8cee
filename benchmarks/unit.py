"""A test that is over in a moment: a multiboot image of guests/unit, from the start of the process to its status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks import machines
from benchmarks.console import Session, watch
from benchmarks.context import Context
from benchmarks.rows import BenchmarkError, Row, limited, median

__all__ = ["run"]

_BUILD = Path(__file__).parent.parent / "guests" / "unit" / "build.py"
#: An image that has nothing to wait for, and that no machine fails.
_IMAGE = "fw_cfg"
#: What the exit port makes of the 0 that says so.
_PASSED = 1
#: The bar of docs/architecture.md, in seconds.
_BAR = 1.5


def run(context: Context) -> list[Row]:
    """One row: the whole process, its caches warm."""
    image = _build(context)
    commands = {"lasskvm": machines.lasskvm_image(image)}
    qemu = machines.qemu_image(context.qemu, image)
    if qemu is not None:
        commands["QEMU"] = qemu
    sessions: dict[str, list[Session]] = {name: [] for name in commands}
    for name, command in commands.items():
        context.progress(f"unit image: {name}, warming up")
        _watch(context, name, command)
    for number in range(context.runs):
        for name, command in commands.items():
            context.progress(f"unit image: {name}, run {number + 1} of {context.runs}")
            sessions[name].append(_watch(context, name, command))
    ours, theirs = (
        median([session.duration for session in sessions.get(name, [])]) for name in ("lasskvm", "QEMU")
    )
    note = machines.QEMU_MISSING if qemu is None else ""
    return [
        limited("multiboot image, start to exit status", ours, "s", at_most=_BAR, theirs=theirs, note=note)
    ]


def _build(context: Context) -> Path:
    context.progress("unit image: building")
    command = [sys.executable, str(_BUILD), str(context.folder), _IMAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BenchmarkError(f"guests/unit/{_IMAGE}.c cannot be built: {result.stderr.strip()}")
    return context.folder / _IMAGE


def _watch(context: Context, name: str, command: list[str]) -> Session:
    session = watch(name, command, context.timeout)
    if session.status != _PASSED:
        raise BenchmarkError(f"the image {_IMAGE} failed under {name}: {session.last_words()}")
    return session
