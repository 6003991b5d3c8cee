"""Compiled callbacks on disk, so that they are compiled once for a machine and not in every process.

An object file is kept under ``lasskvm/native`` in the XDG cache folder, in a folder named after everything that decides
the machine code: the sources that take part, the versions of the compiler's parts, and the host's processor. Other
code has another name, so nothing there is ever wrong, only unused; and a digest in front of the code tells files that
are damaged. What cannot be read is compiled again. What cannot be written is compiled in every process.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

import llvmlite

import lasskvm
from lasskvm.engine import machine_code

__all__ = ["CodeFile", "is_writable", "location"]

_PACKAGE = Path(lasskvm.__file__).parent
#: The sources whose text decides whether cached machine code is still right.
_NATIVE_SOURCES = ("lass.py", "memory.py", "state.py", "x86", "emulator", "engine")
#: How many folders of other versions stay.
_KEPT_FOLDERS = 3
_NAME_DIGITS = 16
_DIGEST_BYTES = hashlib.sha256().digest_size


class CodeFile:
    """The object file that holds the callbacks *names*."""

    def __init__(self, names: Sequence[str]) -> None:
        digest = hashlib.sha256(f"{_version()} {' '.join(sorted(names))}".encode())
        self._key = digest.digest()
        self._path = location() / f"callbacks-{digest.hexdigest()[:_NAME_DIGITS]}.o"

    def read(self) -> bytes | None:
        """The machine code; None when there is none, or none that can be trusted."""
        try:
            content = self._path.read_bytes()
        except OSError:
            return None
        digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return code if digest == self._digest(code) else None

    def renew(self, make: Callable[[], bytes]) -> bytes:
        """The machine code from *make*, which is kept if it can be.

        One process at a time makes it; those that have waited take what is there then.
        """
        before = self.read()
        with _alone():
            code = self.read()
            if code is not None and code != before:
                return code
            code = make()
            self._write(code)
        return code

    def _write(self, code: bytes) -> None:
        new = self._path.with_suffix(f".{os.getpid()}.new")
        try:
            new.write_bytes(self._digest(code) + code)
            new.replace(self._path)
        except OSError:
            with suppress(OSError):
                new.unlink(missing_ok=True)

    def _digest(self, code: bytes) -> bytes:
        return hashlib.sha256(self._key + code).digest()


@cache
def location() -> Path:
    """The folder of this version's machine code; it need not be there yet."""
    return _root() / _version()[:_NAME_DIGITS]


def is_writable() -> bool:
    """Whether machine code can be kept; makes the folder, and removes those of versions long gone."""
    folder = location()
    if not folder.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return False
        _remove_former(folder.parent)
    return os.access(folder, os.W_OK | os.X_OK)


def _remove_former(root: Path) -> None:
    with suppress(OSError):
        former = sorted(root.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in former[_KEPT_FOLDERS:]:
            shutil.rmtree(old, ignore_errors=True)


def _root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "lasskvm" / "native"


@cache
def _version() -> str:
    """A hash of everything that decides the machine code, for as long as this process runs."""
    from importlib.metadata import version

    parts = (version("numba"), version("numpy"), llvmlite.__version__, sys.version, machine_code.host())
    digest = hashlib.sha256("\n".join(parts).encode())
    for name in _NATIVE_SOURCES:
        path = _PACKAGE / name
        for source in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()


@contextmanager
def _alone() -> Iterator[None]:
    """No other process is in here meanwhile, where the file system has locks; others compile more than they need."""
    with ExitStack() as stack:
        if is_writable():
            with suppress(OSError):
                lock = stack.enter_context(open(location() / "lock", "w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
