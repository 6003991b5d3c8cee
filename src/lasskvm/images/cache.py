"""The cache of pulled images: one folder per image and version under the XDG cache folder.

An image appears in the cache at once and complete, or not at all: it is written into a staging folder
beside its place, forced to disk, and renamed. One process at a time changes the cache; reading needs no
lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lasskvm.errors import HostError

__all__ = [
    "BUSYBOX_FILE",
    "FIRMWARE_FILE",
    "KERNEL_FILE",
    "MODULE_SUFFIX",
    "Image",
    "ImageCache",
    "Manifest",
]

#: What the files of an image are for goes by their names.
KERNEL_FILE = "vmlinuz"
BUSYBOX_FILE = "busybox"
FIRMWARE_FILE = "firmware.rom"
MODULE_SUFFIX = ".ko"
_MANIFEST_FILE = "manifest.json"
_LOCK_FILE = "lock"
_STAGING_PREFIX = ".staging-"


@dataclass(frozen=True)
class Manifest:
    """What is known about a pulled image; kept as JSON beside its files."""

    name: str
    #: The release of a Linux kernel, as ``uname -r`` prints it; of anything else, the version of its package.
    version: str
    suite: str
    #: Package name to package version.
    packages: dict[str, str]
    #: File name to SHA-256, in hexadecimal.
    sha256: dict[str, str]
    #: When it was pulled, in UTC (ISO 8601).
    date: str

    def to_json(self) -> str:
        """The manifest as it is stored."""
        return json.dumps(vars(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The inverse of :meth:`to_json`; raises ValueError when *text* is something else."""
        try:
            manifest = cls(**json.loads(text))
        except TypeError as error:
            raise ValueError("not an image manifest") from error
        strings = (manifest.name, manifest.version, manifest.suite, manifest.date)
        tables = (manifest.packages, manifest.sha256)
        if not all(isinstance(value, str) for value in strings):
            raise ValueError("not an image manifest")
        if not all(isinstance(table, dict) for table in tables):
            raise ValueError("not an image manifest")
        return manifest


@dataclass(frozen=True)
class Image:
    """What to run and where it comes from: a *kernel*, or a *firmware* for the reset vector; exactly one of them.

    A kernel given by its path has no *busybox* and no *manifest*. *modules* are kernel modules of an image's kernel,
    whose release is *version*.
    """

    name: str
    version: str
    kernel: Path | None = None
    busybox: Path | None = None
    manifest: Manifest | None = None
    firmware: Path | None = None
    modules: tuple[Path, ...] = ()

    @property
    def path(self) -> Path:
        """The file of the kernel or firmware."""
        path = self.kernel or self.firmware
        assert path is not None
        return path

    def is_intact(self) -> bool:
        """Whether all files have the SHA-256 of the manifest; reads them, so it takes a while."""
        if self.manifest is None:
            return self.path.is_file()
        folder = self.path.parent
        try:
            return all(_sha256(folder / name) == digest for name, digest in self.manifest.sha256.items())
        except OSError:
            return False


class ImageCache:
    """The images under *root*, by default ``lasskvm/images`` in the XDG cache folder."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or _default_root()).absolute()

    def images(self, name: str | None = None) -> list[Image]:
        """All complete images, or those called *name*, the one pulled last at the end."""
        found = []
        for path in sorted(self.root.glob(f"{name or '[!.]*'}/*/{_MANIFEST_FILE}")):
            image = _read_image(path)
            if image is not None:
                found.append(image)
        return sorted(found, key=lambda image: image.manifest.date if image.manifest else "")

    @contextmanager
    def staging(self, progress: Callable[[str], None]) -> Iterator[Path]:
        """Hold the cache's lock and give an empty folder on its disk, which is gone afterwards.

        Calls *progress* when another process has the lock and this one waits for it. Raises
        :class:`HostError` for every OSError in the block: no space, no permission.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with self._locked(progress):
                # What a process that was killed left behind; nobody else can be using it under the lock
                for stale in self.root.glob(f"{_STAGING_PREFIX}*"):
                    shutil.rmtree(stale, ignore_errors=True)
                with tempfile.TemporaryDirectory(prefix=_STAGING_PREFIX, dir=self.root) as folder:
                    yield Path(folder)
        except OSError as error:
            raise HostError(
                f"the image cache {self.root} cannot be written ({error.strerror or error}); "
                "make room there or set XDG_CACHE_HOME to a folder on another disk"
            ) from error

    def install(self, folder: Path, manifest: Manifest) -> Image:
        """Move *folder*, made inside that of :meth:`staging`, and *manifest* to their place in the cache.

        SHA-256 are computed here. Images of the same name and version are removed once this one is there.
        """
        names = sorted(path.name for path in folder.iterdir())
        complete = Manifest(**{**vars(manifest), "sha256": {name: _sha256(folder / name) for name in names}})
        (folder / _MANIFEST_FILE).write_text(complete.to_json())
        for path in folder.iterdir():
            _flush_to_disk(path)
        _flush_to_disk(folder)
        superseded = [image for image in self.images(manifest.name) if image.version == manifest.version]
        # The random part of the staging folder's name keeps two pulls of one version apart
        serial = folder.parent.name.removeprefix(_STAGING_PREFIX)
        place = self.root / manifest.name / f"{manifest.version}.{serial}"
        place.parent.mkdir(exist_ok=True)
        folder.rename(place)
        _flush_to_disk(place.parent)
        for image in superseded:
            shutil.rmtree(image.path.parent, ignore_errors=True)
        return _image(place, complete)

    @contextmanager
    def _locked(self, progress: Callable[[str], None]) -> Iterator[None]:
        with (self.root / _LOCK_FILE).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("waiting for another process that changes the image cache")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _default_root() -> Path:
    # The XDG base directory specification has relative paths ignored
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        base = configured if configured.is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise HostError("this user has no home folder for the image cache; set XDG_CACHE_HOME") from error
    return base / "lasskvm" / "images"


def _read_image(manifest_path: Path) -> Image | None:
    """The image of a manifest; None for one that is damaged or incomplete, which is as good as not pulled."""
    try:
        manifest = Manifest.from_json(manifest_path.read_text())
    except (OSError, ValueError):
        return None
    folder = manifest_path.parent
    is_complete = all((folder / name).is_file() for name in manifest.sha256)
    return _image(folder, manifest) if is_complete and _is_runnable(manifest) else None


def _is_runnable(manifest: Manifest) -> bool:
    return (KERNEL_FILE in manifest.sha256) != (FIRMWARE_FILE in manifest.sha256)


def _image(folder: Path, manifest: Manifest) -> Image:
    def file(name: str) -> Path | None:
        return folder / name if name in manifest.sha256 else None

    modules = tuple(folder / name for name in sorted(manifest.sha256) if name.endswith(MODULE_SUFFIX))
    return Image(
        manifest.name,
        manifest.version,
        file(KERNEL_FILE),
        file(BUSYBOX_FILE),
        manifest,
        file(FIRMWARE_FILE),
        modules,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
