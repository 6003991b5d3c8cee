"""Initramfs images that do one job: run a static program, or give a shell.

/init is a shell script for busybox that mounts the usual file systems and starts /session, another one.
When the program or the shell ends, its exit status goes to the VMM through :mod:`.status_helper` (128 + N
for one that signal N killed, as shells say it); under another VMM the guest powers off.
"""

from __future__ import annotations

import io
import os
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path

from lasskvm.errors import ImageError
from lasskvm.images.initramfs import Initramfs
from lasskvm.images.kernel_modules import KernelModules
from lasskvm.images.status_helper import status_helper
from lasskvm.machine.boot.elf import read_elf64

__all__ = ["program_initramfs", "shell_initramfs"]

_STATUS_HELPER = "bin/lasskvm-status"
_PROGRAM_DIRECTORY = "program"

# Device numbers (Documentation/admin-guide/devices.txt)
_CONSOLE, _NULL = (5, 1), (1, 3)

_INIT = """\
#!/bin/sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
exec /bin/busybox setsid /bin/busybox cttyhack /session
"""
#: The session has the console as its controlling terminal, for Ctrl-C and job control. Its leader stays
#: until the status has been handed over: a terminal drops the output it still holds when the leader of its
#: session exits.
_SESSION = """\
#!/bin/sh
export PATH=/bin:/sbin HOME=/root
trap : INT QUIT
{prepare}{command}
/{helper} $?
/bin/busybox poweroff -f
"""
#: What the shell reads first. There are no services that an init would have to stop before these.
_SHELL_FUNCTIONS = "etc/shell"
_AT_ONCE = "".join(
    f'{command}() {{ /bin/busybox {command} -f "$@"; }}\n' for command in ("halt", "poweroff", "reboot")
)
_PREPARE_SHELL = f"export ENV=/{_SHELL_FUNCTIONS}\n/bin/busybox --install -s /bin\n"
_SHELL_COMMAND = "/bin/sh"


def program_initramfs(
    busybox: bytes, program: Path, args: Sequence[str] = (), modules: KernelModules | None = None
) -> bytes:
    """An initramfs that runs the static program *program* with *args* and hands its exit status to the VMM.

    *busybox* is a static busybox with at least sh, mount, setsid, cttyhack and poweroff, and modprobe for *modules*,
    which are loaded before. Raises :class:`ImageError` when the program cannot be read or is not a static x86-64 ELF
    executable, or a module is none.
    """
    path = f"{_PROGRAM_DIRECTORY}/{program.name}"
    command = " ".join(shlex.quote(word) for word in (f"/{path}", *args))
    initramfs = _base(busybox, modules, prepare="", command=command)
    initramfs.add_file(path, _read_static_program(program))
    return initramfs.build()


def shell_initramfs(busybox: bytes, modules: KernelModules | None = None) -> bytes:
    """An initramfs that gives an interactive shell on the console; the guest ends when the shell does.

    *modules* are loaded before, by busybox's modprobe.
    """
    initramfs = _base(busybox, modules, prepare=_PREPARE_SHELL, command=_SHELL_COMMAND)
    initramfs.add_file(_SHELL_FUNCTIONS, _AT_ONCE.encode())
    return initramfs.build()


def _base(busybox: bytes, modules: KernelModules | None, *, prepare: str, command: str) -> Initramfs:
    initramfs = Initramfs()
    if modules is not None:
        prepare += modules.add_to(initramfs)
    for directory in ("proc", "sys", "dev", "tmp", "root"):
        initramfs.add_directory(directory)
    # The kernel opens the console for /init before anything is mounted
    initramfs.add_device("dev/console", stat.S_IFCHR, *_CONSOLE)
    initramfs.add_device("dev/null", stat.S_IFCHR, *_NULL, mode=0o666)
    initramfs.add_file("bin/busybox", busybox)
    initramfs.add_symlink("bin/sh", "busybox")
    initramfs.add_file(_STATUS_HELPER, status_helper())
    session = _SESSION.format(prepare=prepare, command=command, helper=_STATUS_HELPER)
    initramfs.add_file("init", _INIT.encode())
    initramfs.add_file("session", session.encode("utf-8", "surrogateescape"))
    return initramfs


def _read_static_program(program: Path) -> bytes:
    try:
        with program.open("rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ImageError(f"program {program} is not a regular file; give a static x86-64 executable")
            data = stream.read()
    except OSError as error:
        raise ImageError(
            f"program {program} cannot be read ({error.strerror}); give a readable file"
        ) from error
    try:
        elf = read_elf64(io.BytesIO(data))
    except ImageError as error:
        raise ImageError(f"program {program} {error}") from error
    if elf.type not in ("ET_EXEC", "ET_DYN"):
        raise ImageError(
            f"program {program} is of ELF type {elf.type} and cannot be run; link it to an executable"
        )
    if elf.needs_interpreter:
        raise ImageError(
            f"program {program} is dynamically linked, the guest has no libraries; link it with -static"
        )
    return data
