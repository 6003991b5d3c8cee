"""Pulling a Debian guest: the newest cloud kernel and a static busybox, from the host's own Debian mirror.

In Debian the package that holds the kernel's image is ``linux-binary-VERSION-cloud-amd64``;
``linux-image-cloud-amd64`` and ``linux-image-VERSION-cloud-amd64`` only depend on it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from lasskvm.errors import HostError, ImageError
from lasskvm.images.apt import PrivateApt, require_tools, run_tool
from lasskvm.images.apt_sources import DebianArchive, choose_archive, parse_sources
from lasskvm.images.cache import BUSYBOX_FILE, KERNEL_FILE, Image, ImageCache, Manifest
from lasskvm.images.catalog import DEBIAN
from lasskvm.machine.boot.bzimage import read_bzimage

__all__ = ["DEFAULT_SUITE", "MINIMUM_KERNEL", "newest_kernel_package", "pull"]

DEFAULT_SUITE = "sid"
#: The first Linux that is known to run with LASS here.
MINIMUM_KERNEL = (7, 2)

_KERNEL_PREFIX = "linux-binary-"
_KERNEL_PACKAGE = re.compile(
    _KERNEL_PREFIX + r"(?P<version>(?P<numbers>\d+(\.\d+)+)(?P<rest>[^-]*))-cloud-amd64"
)
_BUSYBOX_PACKAGE = "busybox-static"

# Where the packages have their files
_KERNEL_MEMBER = re.compile(r"\./usr/lib/modules/[^/]+/vmlinuz")
_BUSYBOX_MEMBER = re.compile(r"\./usr/bin/busybox")


def pull(
    cache: ImageCache | None = None,
    *,
    suite: str = DEFAULT_SUITE,
    mirror: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Image:
    """Get the newest kernel of *suite* and a busybox into *cache*; the image, now the one pulled last.

    *mirror* is the URI of a Debian archive, by default the one that apt on this host is configured for.
    *progress* is called with a short line before each step. Raises :class:`HostError` when apt or dpkg is
    missing, the mirror cannot be reached, a signature is not good, the disk is full, or the suite has no
    kernel that is new enough.
    """
    cache = cache or ImageCache()
    report = progress or (lambda line: None)
    require_tools()
    archive = _configured_archive() if mirror is None else DebianArchive.at(mirror)
    with cache.staging(report) as folder:
        apt_folder, image_folder = folder / "apt", folder / "image"
        apt_folder.mkdir()
        image_folder.mkdir()
        apt = PrivateApt(apt_folder, archive, suite)
        report(f"getting the package lists of {suite} from {archive.uri}")
        apt.update()
        kernel_package, version = newest_kernel_package(apt.package_names(_KERNEL_PREFIX), suite)
        report(f"getting {kernel_package} and {_BUSYBOX_PACKAGE}")
        packages = {}
        for path in apt.download([kernel_package, _BUSYBOX_PACKAGE]):
            name, package_version = _identify(path)
            packages[name] = (path, package_version)
        for name in (kernel_package, _BUSYBOX_PACKAGE):
            if name not in packages:
                raise HostError(f"apt did not deliver {name}; pull again")
        versions = {name: package_version for name, (_, package_version) in sorted(packages.items())}
        report(f"unpacking {version}")
        _unpack(packages[kernel_package][0], _KERNEL_MEMBER, image_folder / KERNEL_FILE)
        _unpack(packages[_BUSYBOX_PACKAGE][0], _BUSYBOX_MEMBER, image_folder / BUSYBOX_FILE)
        _check_kernel(image_folder / KERNEL_FILE, kernel_package)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return cache.install(image_folder, Manifest(DEBIAN, version, suite, versions, {}, date))


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


def _numbers(match: re.Match[str]) -> tuple[int, ...]:
    return tuple(map(int, match["numbers"].split(".")))


def _version_key(match: re.Match[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The upstream version, then the numbers in Debian's own suffix."""
    return _numbers(match), tuple(map(int, re.findall(r"\d+", match["rest"])))


def _configured_archive() -> DebianArchive:
    listed = run_tool(
        "apt-get", "indextargets", "--format", "$(REPO_URI)",
        "Created-By: Packages", "Origin: Debian", "Label: Debian", "Component: main",
    )  # fmt: skip
    known = [uri for uri in listed.stdout.split() if not uri.startswith("cdrom:")]
    return choose_archive([archive for path in _source_files() for archive in parse_sources(path)], known)


def _source_files() -> list[Path]:
    places = run_tool(
        "apt-config", "shell", "main", "Dir::Etc::sourcelist/f", "parts", "Dir::Etc::sourceparts/d"
    )
    values = dict(line.partition("=")[::2] for line in places.stdout.splitlines())
    main, parts = (Path(values.get(key, "").strip("'")) for key in ("main", "parts"))
    return [main, *sorted(parts.glob("*.list")), *sorted(parts.glob("*.sources"))]


def _identify(package: Path) -> tuple[str, str]:
    """The name and version that the package's own control file gives."""
    fields = run_tool("dpkg-deb", "--show", "--showformat=${Package} ${Version}", str(package))
    name, _, version = fields.stdout.partition(" ")
    if fields.returncode or not version:
        raise HostError(f"dpkg-deb cannot read {package.name}; pull again")
    return name, version


def _unpack(package: Path, member: re.Pattern[str], target: Path) -> None:
    """Write the one file of *package* whose path matches *member* to *target*."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            found = _copy_member(process.stdout, member, target)
        except (tarfile.TarError, EOFError) as error:
            raise HostError(f"package {package.name} is damaged; pull again") from error
        finally:
            process.stdout.close()
    if not found:
        raise HostError(f"package {package.name} does not have the file that was expected; try another suite")


def _copy_member(stream: IO[bytes], member: re.Pattern[str], target: Path) -> bool:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for entry in archive:
            if entry.isreg() and member.fullmatch(entry.name):
                content = archive.extractfile(entry)
                assert content is not None
                with content, target.open("wb") as output:
                    shutil.copyfileobj(content, output)
                return True
    return False


def _check_kernel(path: Path, package: str) -> None:
    try:
        with path.open("rb") as stream:
            read_bzimage(stream)
    except ImageError as error:
        raise HostError(f"the kernel of {package} {error}") from error
