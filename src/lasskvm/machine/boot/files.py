"""Reading the files that a person names: kernels, initrds, modules and ROMs, with one sentence for what goes wrong."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lasskvm.errors import ImageError

__all__ = ["open_file", "open_image", "size_of"]


@contextmanager
def open_file(path: Path, kind: str) -> Iterator[BinaryIO]:
    """The regular file at *path*, to read; *kind*, such as "initrd", stands before its name in sentences.

    Raises :class:`ImageError`, also for an OSError while it is open.
    """
    try:
        with path.open("rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ImageError(
                    f"{kind} {path} is not a regular file; give a file with a beginning and an end"
                )
            yield stream
    except OSError as error:
        raise ImageError(f"{kind} {path} cannot be read ({error.strerror}); give a readable file") from error


@contextmanager
def open_image(path: Path) -> Iterator[BinaryIO]:
    """The image at *path*; every :class:`ImageError` raised while it is open gets the file's name in front."""
    try:
        with path.open("rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ImageError("is not a regular file; give a kernel image")
            yield stream
    except ImageError as error:
        raise ImageError(f"{path} {error}") from error
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror}); give a readable kernel image") from error


def size_of(stream: BinaryIO) -> int:
    """How many bytes the file has."""
    return os.fstat(stream.fileno()).st_size
