"""Kernel modules in an initramfs: where modprobe finds them, with what it has to know about them.

``depmod`` writes ``modules.dep`` on an installed system, from what the modules say themselves; so does this.

Source: modules.dep(5); Documentation/kbuild/modules.rst for ``.modinfo``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from lasskvm.errors import ImageError
from lasskvm.images.cache import MODULE_SUFFIX
from lasskvm.images.initramfs import Initramfs

__all__ = ["KernelModules"]

_FOLDER = "lib/modules"
_DEPENDENCIES_FILE = "modules.dep"
_INFORMATION_SECTION = ".modinfo"
_DEPENDS = b"depends="
_FILE_MODE = 0o644


@dataclass(frozen=True)
class KernelModules:
    """Modules, as *files*, of the kernel *release* (what ``uname -r`` prints), all to be loaded at the start."""

    release: str
    files: Sequence[Path]

    def add_to(self, initramfs: Initramfs) -> str:
        """Put them into *initramfs*; the shell command that loads them.

        A parameter of a module is read from the kernel's command line, as ``kvm_intel.ept=0``. Raises
        :class:`ImageError` when a file is no module.
        """
        folder = f"{_FOLDER}/{self.release}"
        direct: dict[str, list[str]] = {}
        for path in self.files:
            data = _read(path)
            direct[_name(path)] = _depends(path, data)
            initramfs.add_file(f"{folder}/{path.name}", data, mode=_FILE_MODE)
        needed = {name: _closure(name, direct) for name in direct}
        files = {_name(path): path.name for path in self.files}
        lines = (f"{files[name]}: {' '.join(files[other] for other in needed[name])}\n" for name in files)
        initramfs.add_file(f"{folder}/{_DEPENDENCIES_FILE}", "".join(lines).encode(), mode=_FILE_MODE)
        last = sorted(direct.keys() - {name for names in direct.values() for name in names})
        return f"/bin/busybox modprobe -a {' '.join(last)}\n"


def _name(path: Path) -> str:
    """The name of the module in *path*: modules are named with underscores, their files with either."""
    return path.name.removesuffix(MODULE_SUFFIX).replace("-", "_")


def _closure(name: str, direct: Mapping[str, Sequence[str]]) -> list[str]:
    """What *name* needs, and what that needs, the nearest first."""
    found: list[str] = []
    for other in direct[name]:
        for each in (other, *_closure(other, direct)):
            if each in found:
                found.remove(each)
            found.append(each)
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror}); pull the image again") from error


def _depends(path: Path, data: bytes) -> list[str]:
    """The modules that *data*, the contents of *path*, says it needs."""
    try:
        section = ELFFile(io.BytesIO(data)).get_section_by_name(_INFORMATION_SECTION)
        information = b"" if section is None else section.data()
    except ELFError as error:
        raise ImageError(f"{path} is no kernel module ({error}); pull the image again") from error
    for entry in information.split(b"\0"):
        if entry.startswith(_DEPENDS):
            return [
                name.replace("-", "_") for name in entry.removeprefix(_DEPENDS).decode().split(",") if name
            ]
    raise ImageError(f"{path} is no kernel module (it does not say what it depends on); pull the image again")
