"""A VMM as a subprocess: when did its guest print what, and how much memory did it take."""

from __future__ import annotations

import os
import re
import selectors
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.rows import BenchmarkError

__all__ = ["Session", "watch"]

_CHUNK = 1 << 16
_KIB = 1 << 10
_COMMAND_LINE = re.compile(r"Command line: (.*)")
#: How much of a console is worth quoting in an error.
_LINES_QUOTED = 3


@dataclass
class Session:
    """One run of a VMM: its console with host times, the time it took and its peak resident memory."""

    name: str
    #: Host time of the start, and of the end, in seconds of the same clock as *arrivals*.
    started: float
    ended: float = 0.0
    #: Peak resident set in bytes.
    peak_memory: int = 0
    status: int = 0
    errors: str = ""
    console: bytearray = field(default_factory=bytearray)
    #: Length of the console and host time after each piece of output.
    arrivals: list[tuple[int, float]] = field(default_factory=list)

    @property
    def duration(self) -> float:
        """Seconds from the start of the process to its end."""
        return self.ended - self.started

    def when(self, marker: str) -> float:
        """Host time at which *marker* had been printed; raises :class:`BenchmarkError` when it never was."""
        position = self.console.find(marker.encode())
        if position < 0:
            raise BenchmarkError(f"{self.name} never printed {marker!r}: {self.last_words()}")
        end = position + len(marker)
        return next(moment for length, moment in self.arrivals if length >= end)

    def text(self) -> str:
        """The whole console."""
        return self.console.decode("utf-8", "replace").replace("\r", "")

    def kernel_command_line(self) -> str:
        """What the kernel says its command line was; empty when it did not say."""
        found = _COMMAND_LINE.search(self.text())
        return found[1].strip() if found else ""

    def last_words(self) -> str:
        """How the run ended, for an error message: status and the end of its stderr, or of the console."""
        lines = (self.errors.strip() or self.text().strip()).splitlines()[-_LINES_QUOTED:]
        return f"status {self.status}, its last words: {' / '.join(lines) or 'none'}"


def watch(name: str, command: Sequence[str], timeout: float) -> Session:
    """Run *command*, called *name* in errors, to its end and record its standard output as it comes.

    Raises :class:`BenchmarkError` when it cannot be started or takes longer than *timeout* seconds; then it
    is killed.
    """
    with tempfile.TemporaryFile() as errors:
        session = Session(name, started=time.monotonic())
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, bufsize=0
            )
        except OSError as error:
            raise BenchmarkError(f"{name} cannot be started ({error.strerror}): {command[0]}") from error
        try:
            _record(process, session, timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        # wait4 and not wait: it is the one that tells about this child alone
        _, status, usage = os.wait4(process.pid, 0)
        session.ended = time.monotonic()
        process.returncode = session.status = os.waitstatus_to_exitcode(status)
        session.peak_memory = usage.ru_maxrss * _KIB
        errors.seek(0)
        session.errors = errors.read().decode("utf-8", "replace")
    return session


def _record(process: subprocess.Popen[bytes], session: Session, timeout: float) -> None:
    assert process.stdout is not None
    deadline = session.started + timeout
    with process.stdout as stream, selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise BenchmarkError(
                    f"{session.name} was still running after {timeout:.0f} s: {session.last_words()}"
                )
            piece = os.read(stream.fileno(), _CHUNK)
            if not piece:
                return
            session.console += piece
            session.arrivals.append((len(session.console), time.monotonic()))
