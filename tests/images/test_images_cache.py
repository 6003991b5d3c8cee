"""The image cache: complete images or none, one writer at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lasskvm.errors import HostError, ImageError
from lasskvm.images import Image, ImageCache, Manifest, resolve

MANIFEST = Manifest(
    "debian", "7.2.0-cloud-amd64", "sid", {"kernel": "7.2.0-1"}, {}, "2026-01-02T03:04:05+00:00"
)


FIRMWARE = replace(MANIFEST, name="seabios", version="1.17.0-1", packages={"seabios": "1.17.0-1"})


def quiet(line: str) -> None:
    """Progress that nobody looks at."""


def install(cache: ImageCache, manifest: Manifest = MANIFEST, kernel: bytes = b"kernel") -> Image:
    with cache.staging(quiet) as staging:
        folder = staging / "image"
        folder.mkdir()
        (folder / "vmlinuz").write_bytes(kernel)
        (folder / "busybox").write_bytes(b"busybox")
        return cache.install(folder, manifest)


def install_files(cache: ImageCache, manifest: Manifest, files: dict[str, bytes]) -> Image:
    with cache.staging(quiet) as staging:
        folder = staging / "image"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return cache.install(folder, manifest)


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} - {"lock"}


def test_an_installed_image_is_listed_and_intact(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    image = install(cache)
    assert cache.images() == [image]
    assert image.path.read_bytes() == b"kernel"
    assert image.busybox is not None
    assert image.busybox.read_bytes() == b"busybox"
    assert image.is_intact()


def test_a_firmware_is_an_image_without_a_kernel(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    image = install_files(cache, FIRMWARE, {"firmware.rom": b"rom"})
    assert (image.kernel, image.busybox, image.firmware) == (None, None, image.path)
    assert image.path.read_bytes() == b"rom"
    assert resolve("seabios", cache) == image
    assert image.is_intact()
    image.path.write_bytes(b"ram")
    assert not image.is_intact()


def test_a_kernel_needs_no_busybox(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    image = install_files(cache, replace(FIRMWARE, name="memtest86+"), {"vmlinuz": b"kernel"})
    assert (image.kernel, image.busybox, image.firmware) == (image.path, None, None)
    assert resolve("memtest86+", cache) == image


@pytest.mark.parametrize("files", [{"busybox": b""}, {"vmlinuz": b"", "firmware.rom": b""}, {}])
def test_a_folder_with_nothing_or_too_much_to_start_counts_as_not_pulled(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    cache = ImageCache(tmp_path)
    install_files(cache, FIRMWARE, files)
    assert cache.images() == []


def test_the_manifest_has_the_sha_256_of_every_file(tmp_path: Path) -> None:
    image = install(ImageCache(tmp_path))
    stored = json.loads((image.path.parent / "manifest.json").read_text())
    contents = {"vmlinuz": b"kernel", "busybox": b"busybox"}
    assert stored["sha256"] == {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    assert stored["version"] == "7.2.0-cloud-amd64"
    assert stored["packages"] == {"kernel": "7.2.0-1"}


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    image = install(ImageCache(tmp_path))
    image.path.write_bytes(b"kernel!")
    assert not image.is_intact()


def test_a_second_pull_of_a_version_replaces_the_first(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    first = install(cache)
    second = install(cache, kernel=b"kernel of the next package revision")
    assert cache.images() == [second]
    assert not first.path.exists()


def test_the_image_pulled_last_is_the_one_its_name_means(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    install(cache, replace(MANIFEST, version="7.3.0", date="2026-03-01T00:00:00+00:00"))
    last = install(cache, replace(MANIFEST, version="7.2.9", date="2026-04-01T00:00:00+00:00"))
    assert resolve("debian", cache) == last
    assert len(cache.images("debian")) == 2


def test_an_image_that_was_not_pulled_is_refused_with_the_command_to_pull_it(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="has not been pulled; run `lasskvm images pull debian`"):
        resolve("debian", ImageCache(tmp_path))


def test_a_kernel_file_resolves_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "bzImage"
    path.write_bytes(b"kernel")
    assert resolve(str(path), ImageCache(tmp_path)) == Image("bzImage", "", path)


def test_neither_a_file_nor_an_image_name_is_refused(tmp_path: Path) -> None:
    sentence = (
        r"there is no file fedora, nor an image of that name; "
        r"give a kernel file or debian, debian-kvm, seabios, memtest86\+"
    )
    with pytest.raises(ImageError, match=sentence):
        resolve("fedora", ImageCache(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"name": 1}', "null", json.dumps({**vars(MANIFEST), "date": 5})]
)
def test_an_image_with_a_damaged_manifest_counts_as_not_pulled(tmp_path: Path, text: str) -> None:
    cache = ImageCache(tmp_path)
    image = install(cache)
    (image.path.parent / "manifest.json").write_text(text)
    assert cache.images() == []


def test_an_image_with_a_missing_file_counts_as_not_pulled(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    install(cache).path.unlink()
    assert cache.images() == []


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(HostError, match=r"cannot be written \(No space left on device\); make room there"):
        install(ImageCache(tmp_path))
    assert files_below(tmp_path) == set()


def test_a_file_size_limit_while_writing_is_one_sentence_and_keeps_the_old_image(tmp_path: Path) -> None:
    old = install(ImageCache(tmp_path))
    script = (
        "import resource, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from test_images_cache import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        f"    install(ImageCache(Path({str(tmp_path)!r})), kernel=bytes(65536))\n"
        "except HostError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "cannot be written (File too large); make room there" in result.stdout
    assert ImageCache(tmp_path).images() == [old]
    assert old.is_intact()


def test_a_user_without_a_home_folder_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(HostError, match="no home folder for the image cache; set XDG_CACHE_HOME"):
        ImageCache()


def test_an_error_in_the_block_removes_the_staging_folder(tmp_path: Path) -> None:
    def fail() -> None:
        with ImageCache(tmp_path).staging(quiet) as folder:
            (folder / "half").write_bytes(b"...")
            raise HostError("no network")

    with pytest.raises(HostError, match="no network"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    image = install(cache)
    stale = tmp_path / ".staging-killed"
    stale.mkdir()
    image.path.parent.rename(stale / "image")
    assert cache.images() == []
    install(cache)
    assert not stale.exists()


def test_a_cache_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HostError, match=r"cannot be written \(Not a directory\)"):
        install(ImageCache(tmp_path / "file" / "cache"))


def test_a_second_process_waits_for_the_lock_and_says_so(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from lasskvm.images import ImageCache\n"
        f"with ImageCache(Path({str(tmp_path)!r})).staging(lambda line: print(line, flush=True)):\n"
        "    print('entered', flush=True)\n"
    )
    with ImageCache(tmp_path).staging(quiet):
        other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert "waiting for another process" in other.stdout.readline()
    with other:
        assert other.stdout.readline() == "entered\n"
    assert other.returncode == 0


@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        ("/somewhere", lambda home: Path("/somewhere/lasskvm/images")),
        ("", lambda home: home / ".cache/lasskvm/images"),
        ("relative", lambda home: home / ".cache/lasskvm/images"),
    ],
)
def test_the_cache_lies_in_the_xdg_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configured: str, expected: Callable[[Path], Path]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", configured)
    assert ImageCache().root == expected(tmp_path)
