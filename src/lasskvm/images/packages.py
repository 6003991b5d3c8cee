"""Files out of Debian packages: from the mirror this host is configured for into the image cache."""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from lasskvm.errors import HostError
from lasskvm.images.apt import PrivateApt, require_tools, run_tool
from lasskvm.images.apt_sources import DebianArchive, choose_archive, parse_sources
from lasskvm.images.cache import Image, ImageCache, Manifest

__all__ = ["DEFAULT_SUITE", "Pull", "Wanted", "start_pull"]

DEFAULT_SUITE = "sid"
_XZ_SUFFIX = ".xz"


@dataclass(frozen=True)
class Wanted:
    """The file of *package* whose path matches *member*, to be called *file* in the cache.

    One that is compressed with xz, as its path says, is decompressed.
    """

    package: str
    member: re.Pattern[str]
    file: str


class Pull:
    """A pull in progress: packages of one suite, on their way into the cache; made by :func:`start_pull`."""

    def __init__(
        self,
        cache: ImageCache,
        folder: Path,
        archive: DebianArchive,
        suite: str,
        report: Callable[[str], None],
    ) -> None:
        apt_folder, self._image_folder = folder / "apt", folder / "image"
        apt_folder.mkdir()
        self._image_folder.mkdir()
        self._cache, self._suite, self._report = cache, suite, report
        self._apt = PrivateApt(apt_folder, archive, suite)
        report(f"getting the package lists of {suite} from {archive.uri}")
        self._apt.update()

    def package_names(self, prefix: str) -> list[str]:
        """The packages of the suite whose name starts with *prefix*."""
        return self._apt.package_names(prefix)

    def install(
        self,
        name: str,
        wanted: Sequence[Wanted],
        check: Callable[[Path], None],
        version: str | None = None,
    ) -> Image:
        """Get the *wanted* files and put them into the cache as image *name*.

        *check* is called with their folder before and raises for a file that is not what it should be. *version* is
        that of the first package unless it is given.
        """
        names = list(dict.fromkeys(file.package for file in wanted))
        self._report(f"getting {' and '.join(names)}")
        packages = {}
        for path in self._apt.download(names):
            package, package_version = _identify(path)
            packages[package] = (path, package_version)
        for package in names:
            if package not in packages:
                raise HostError(f"apt did not deliver {package}; pull again")
        versions = {package: package_version for package, (_, package_version) in sorted(packages.items())}
        version = version or versions[names[0]]
        self._report(f"unpacking {name} {version}")
        for file in wanted:
            _unpack(packages[file.package][0], file.member, self._image_folder / file.file)
        check(self._image_folder)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return self._cache.install(
            self._image_folder, Manifest(name, version, self._suite, versions, {}, date)
        )


@contextmanager
def start_pull(
    cache: ImageCache | None, suite: str, mirror: str | None, progress: Callable[[str], None] | None
) -> Iterator[Pull]:
    """Hold the cache's lock and get the package lists of *suite*; *cache* is by default the user's.

    *mirror* is the URI of a Debian archive, by default the one that apt on this host is configured for.
    *progress* is called with a short line before each step. Raises :class:`HostError` when apt or dpkg is
    missing, the mirror cannot be reached, a signature is not good, or the disk is full.
    """
    cache = cache or ImageCache()
    report = progress or (lambda line: None)
    require_tools()
    archive = _configured_archive() if mirror is None else DebianArchive.at(mirror)
    with cache.staging(report) as folder:
        yield Pull(cache, folder, archive, suite, report)


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
        except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
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
                with _plain(content, entry.name) as plain, target.open("wb") as output:
                    shutil.copyfileobj(plain, output)
                return True
    return False


@contextmanager
def _plain(content: IO[bytes], name: str) -> Iterator[IO[bytes]]:
    """What the file *name* is made of, decompressed if it is an xz file."""
    with content:
        if not name.endswith(_XZ_SUFFIX):
            yield content
            return
        with lzma.open(content) as plain:
            yield plain
