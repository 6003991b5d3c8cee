"""What the benchmarks share: how often to measure, the guest to boot, a place for files."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.rows import BenchmarkError
from lasskvm.images import Image, Initramfs, resolve

__all__ = ["GUEST_MEMORY_MIB", "MARKER", "Context"]

GUEST_MEMORY_MIB = 256
#: The first line of every /init below.
MARKER = "benchmark: /init runs"

#: Major and minor number (Documentation/admin-guide/devices.txt).
_CONSOLE_DEVICE = (5, 1)
_EXECUTABLE = 0o755
_GUESTS = Path(__file__).parent.parent / "guests"
#: `reboot=k` on the command line makes this a keyboard-controller reset, which ends both VMMs.
_INIT = f"#!/bin/sh\necho '{MARKER}'\n{{command}}\n/bin/busybox reboot -f\n"


@dataclass(frozen=True)
class Context:
    """One run of the benchmarks."""

    #: How often each measurement is repeated; results are medians.
    runs: int
    #: A folder for files, removed at the end.
    folder: Path
    #: Called with a short line before each step.
    progress: Callable[[str], None]
    #: The QEMU to compare with; None when there is none.
    qemu: str | None = None
    #: Seconds after which a VMM is given up.
    timeout: float = 300.0

    @cached_property
    def image(self) -> Image:
        """The Debian kernel and its busybox; raises ``ImageError`` when it has not been pulled."""
        return resolve("debian")

    def initramfs(self, name: str, command: str = "", program: Path | None = None) -> Path:
        """An initramfs file whose /init prints the marker, runs the shell *command* and resets the machine.

        *program*, a static one, is in its root folder.
        """
        initramfs = Initramfs()
        initramfs.add_device("dev/console", stat.S_IFCHR, *_CONSOLE_DEVICE)
        initramfs.add_file("bin/busybox", self.busybox("busybox").read_bytes())
        initramfs.add_symlink("bin/sh", "busybox")
        initramfs.add_file("init", _INIT.format(command=command).encode())
        if program is not None:
            initramfs.add_file(program.name, program.read_bytes())
        path = self.folder / f"{name}.cpio"
        path.write_bytes(initramfs.build())
        return path

    def busybox(self, name: str) -> Path:
        """The image's busybox as a program called *name*, which makes it the command of that name."""
        if self.image.busybox is None:
            raise BenchmarkError("the image has no busybox; pull it again with `lasskvm images pull debian`")
        path = self.folder / name
        path.write_bytes(self.image.busybox.read_bytes())
        path.chmod(_EXECUTABLE)
        return path

    def guest_program(self, name: str) -> Path:
        """The program guests/NAME.c, built with the host's compiler."""
        path = self.folder / name
        command = ["make", "-s", "-C", str(_GUESTS), f"OUT={self.folder}", str(path)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise BenchmarkError(
                f"make cannot be started ({error.strerror}); install make and gcc"
            ) from error
        if result.returncode:
            raise BenchmarkError(f"guests/{name}.c cannot be built: {result.stderr.strip()}")
        return path
