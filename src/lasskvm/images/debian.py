"""Pulling a Debian guest: the newest cloud kernel and a static busybox, and on request the modules of KVM.

In Debian the package that holds the kernel's image is ``linux-binary-VERSION-cloud-amd64``;
``linux-image-cloud-amd64`` and ``linux-image-VERSION-cloud-amd64`` only depend on it. Its modules
are in ``linux-modules-VERSION-cloud-amd64``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from lasskvm.errors import HostError, ImageError
from lasskvm.images.cache import BUSYBOX_FILE, KERNEL_FILE, MODULE_SUFFIX, Image, ImageCache
from lasskvm.images.catalog import DEBIAN, DEBIAN_KVM
from lasskvm.images.packages import DEFAULT_SUITE, Wanted, start_pull
from lasskvm.machine.boot.bzimage import read_bzimage

__all__ = ["MINIMUM_KERNEL", "newest_kernel_package", "pull"]

#: The first Linux that is known to run with LASS here.
MINIMUM_KERNEL = (7, 2)

_KERNEL_PREFIX, _MODULES_PREFIX = "linux-binary-", "linux-modules-"
_KERNEL_PACKAGE = re.compile(
    _KERNEL_PREFIX + r"(?P<version>(?P<numbers>\d+(\.\d+)+)(?P<rest>[^-]*))-cloud-amd64"
)
_BUSYBOX_PACKAGE = "busybox-static"

# Where the packages have their files
_KERNEL_MEMBER = re.compile(r"\./usr/lib/modules/[^/]+/vmlinuz")
_BUSYBOX_MEMBER = re.compile(r"\./usr/bin/busybox")
_MODULE_MEMBER = r"\./usr/lib/modules/[^/]+/kernel/(?:.*/)?{}\.ko(?:\.xz)?"
#: KVM for Intel's processors, and what it depends on.
_KVM_MODULES = ("irqbypass", "kvm", "kvm-intel")


def pull(
    cache: ImageCache | None = None,
    name: str = DEBIAN,
    *,
    suite: str = DEFAULT_SUITE,
    mirror: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Image:
    """Get the newest kernel of *suite* and a busybox into *cache*; the image, now the one pulled last.

    *name* is ``DEBIAN``, or ``DEBIAN_KVM``, which has modules, too. The other parameters and errors are those of
    :func:`~lasskvm.images.packages.start_pull`; :class:`HostError`, too, when the suite has no kernel that is new
    enough.
    """
    with start_pull(cache, suite, mirror, progress) as started:
        package, version = newest_kernel_package(started.package_names(_KERNEL_PREFIX), suite)

        def check(folder: Path) -> None:
            _check_kernel(folder / KERNEL_FILE, package)

        wanted = [
            Wanted(package, _KERNEL_MEMBER, KERNEL_FILE),
            Wanted(_BUSYBOX_PACKAGE, _BUSYBOX_MEMBER, BUSYBOX_FILE),
        ]
        if name == DEBIAN_KVM:
            wanted += _modules_of(package)
        return started.install(name, wanted, check, version)


def newest_kernel_package(names: Iterable[str], suite: str) -> tuple[str, str]:
    """The package with the highest kernel version among *names*, and that version, as ``uname -r`` will say
    it.

    Raises :class:`HostError` when none is ``MINIMUM_KERNEL`` or newer.
    """
    matches = [match for match in map(_KERNEL_PACKAGE.fullmatch, names) if match]
    wanted = ".".join(map(str, MINIMUM_KERNEL))
    if not matches:
        raise HostError(f"suite {suite} has no package linux-binary-*-cloud-amd64; pull from {DEFAULT_SUITE}")
    best = max(matches, key=_version_key)
    if _numbers(best) < MINIMUM_KERNEL:
        raise HostError(
            f"the newest cloud kernel of suite {suite} is {best['version']}, and LASS asks for {wanted} or "
            f"newer; pull from {DEFAULT_SUITE}"
        )
    return best.group(), f"{best['version']}-cloud-amd64"


def _modules_of(kernel_package: str) -> list[Wanted]:
    package = kernel_package.replace(_KERNEL_PREFIX, _MODULES_PREFIX)
    return [
        Wanted(package, re.compile(_MODULE_MEMBER.format(module)), module + MODULE_SUFFIX)
        for module in _KVM_MODULES
    ]


def _numbers(match: re.Match[str]) -> tuple[int, ...]:
    return tuple(map(int, match["numbers"].split(".")))


def _version_key(match: re.Match[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The upstream version, then the numbers in Debian's own suffix."""
    return _numbers(match), tuple(map(int, re.findall(r"\d+", match["rest"])))


def _check_kernel(path: Path, package: str) -> None:
    try:
        with path.open("rb") as stream:
            read_bzimage(stream).payload()
    except ImageError as error:
        raise HostError(f"the kernel of {package} {error}") from error
