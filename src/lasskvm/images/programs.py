"""Pulling what runs without an operating system: SeaBIOS, a firmware, and memtest86+, which is loaded like a kernel."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lasskvm.errors import HostError, ImageError
from lasskvm.images.cache import FIRMWARE_FILE, KERNEL_FILE, Image, ImageCache
from lasskvm.images.catalog import MEMTEST, SEABIOS
from lasskvm.images.packages import DEFAULT_SUITE, Wanted, start_pull
from lasskvm.machine.boot import load_firmware, probe_image

__all__ = ["pull_program"]


@dataclass(frozen=True)
class _Program:
    wanted: Wanted
    #: Raises :class:`ImageError` when the file cannot be started.
    check: Callable[[Path], object]


_PROGRAMS = {
    SEABIOS: _Program(
        # The build that QEMU's PC starts with.
        Wanted("seabios", re.compile(r"\./usr/share/seabios/bios-256k\.bin"), FIRMWARE_FILE),
        load_firmware,
    ),
    MEMTEST: _Program(
        # The name of the file differs from release to release.
        Wanted("memtest86+", re.compile(r"\./boot/(mt86\+x64|memtest86\+x64\.bin)"), KERNEL_FILE),
        probe_image,
    ),
}


def pull_program(
    name: str,
    cache: ImageCache | None = None,
    *,
    suite: str = DEFAULT_SUITE,
    mirror: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Image:
    """Get the image *name*, ``SEABIOS`` or ``MEMTEST``, from *suite* into *cache*; the image, now the one pulled last.

    Parameters and errors are those of :func:`~lasskvm.images.packages.start_pull`.
    """
    program = _PROGRAMS[name]

    def check(folder: Path) -> None:
        try:
            program.check(folder / program.wanted.file)
        except ImageError as error:
            raise HostError(
                f"package {program.wanted.package} of {suite} has a {program.wanted.file} that cannot be started; "
                "pull again or from another suite"
            ) from error

    with start_pull(cache, suite, mirror, progress) as started:
        return started.install(name, [program.wanted], check)
