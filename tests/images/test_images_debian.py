"""Pulling from Debian: with stand-ins for apt and dpkg, and once for real."""

from __future__ import annotations

import io
import lzma
import mmap
import os
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lasskvm.errors import HostError
from lasskvm.images import ImageCache, pull, pull_debian, resolve
from lasskvm.images.debian import MINIMUM_KERNEL, newest_kernel_package
from lasskvm.machine.boot import load_image
from lasskvm.memory import GuestMemory

RELEASE = "7.2.13+deb14-cloud-amd64"
KERNEL_PACKAGE, MODULES_PACKAGE = f"linux-binary-{RELEASE}", f"linux-modules-{RELEASE}"
MODULES = {
    "arch/x86/kvm/kvm.ko": b"kvm",
    "arch/x86/kvm/kvm-intel.ko": b"intel",
    "arch/x86/kvm/kvm-amd.ko": b"amd",
    "virt/lib/irqbypass.ko": b"irqbypass",
}
PACKAGES = (
    f"linux-binary-unsigned-7.2.13+deb14-cloud-amd64 linux-binary-7.2.9+deb14-cloud-amd64 {KERNEL_PACKAGE}"
)

#: Each tool leaves its command line in $LOG and does what $FAKE_* say.
FAKE_TOOLS = {
    "apt-config": """echo "main='$FAKE_SOURCES'"; echo "parts='/nonexistent'" """,
    "apt-get": """
for argument; do case $argument in indextargets|update|download) command=$argument;; esac; done
case $command in
indextargets) echo "$FAKE_URIS";;
update) echo "$FAKE_UPDATE_SAYS" >&2; exit ${FAKE_UPDATE_STATUS:-0};;
download) cp "$FAKE_DEBS"/*.deb . ; exit ${FAKE_DOWNLOAD_STATUS:-0};;
esac""",
    "apt-cache": "echo $FAKE_PACKAGES | tr ' ' '\\n'",
    "dpkg-deb": """
for last; do :; done
case $1 in
--show) basename "$last" .deb | tr '_\\n' ' \\0' | tr -d '\\0';;
--fsys-tarfile) cat "$last";;
esac""",
}


def make_kernel() -> bytes:
    """As much of a bzImage as a pull looks at: a header and a payload that lies in the file."""
    image = bytearray(2048)
    image[0x1F1] = 1
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x201] = 0x6A
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x20F)
    struct.pack_into("<H", image, 0x236, 1)
    struct.pack_into("<II", image, 0x248, 0, 1024)
    return bytes(image)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with apt, dpkg and a Debian source; the folder of its tools."""
    tools, packages = tmp_path / "bin", tmp_path / "debs"
    tools.mkdir()
    packages.mkdir()
    for name, script in FAKE_TOOLS.items():
        (tools / name).write_text(f'#!/bin/sh\necho "$(basename "$0") $*" >> {tmp_path}/log\n{script}\n')
        (tools / name).chmod(0o755)
    write_tar(
        packages / f"{KERNEL_PACKAGE}_7.2.13-1.deb",
        {
            "./usr/lib/modules/7.2.13+deb14-cloud-amd64/vmlinuz": make_kernel(),
            "./usr/share/doc/readme": b"text",
        },
    )
    write_tar(packages / "busybox-static_1.38.deb", {"./usr/bin/busybox": b"busybox"})
    sources = tmp_path / "sources.list"
    sources.write_text("deb http://mirror.example/debian stable main\n")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SOURCES", str(sources))
    monkeypatch.setenv("FAKE_URIS", "http://mirror.example/debian/")
    monkeypatch.setenv("FAKE_PACKAGES", PACKAGES)
    monkeypatch.setenv("FAKE_DEBS", str(packages))
    return tools


def write_modules(tmp_path: Path, compress: Callable[[bytes], bytes], suffix: str) -> None:
    files = {
        f"./usr/lib/modules/{RELEASE}/kernel/{name}{suffix}": compress(data) for name, data in MODULES.items()
    }
    write_tar(tmp_path / "debs" / f"{MODULES_PACKAGE}_7.2.13-1.deb", files)


def left_in(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.name != "lock"]


def test_a_pull_gets_the_newest_kernel_and_busybox(host: Path, tmp_path: Path) -> None:
    cache, steps = ImageCache(tmp_path / "cache"), []
    image = pull_debian(cache, progress=steps.append)
    assert image.version == "7.2.13+deb14-cloud-amd64"
    assert image.path.read_bytes() == make_kernel()
    assert image.busybox is not None
    assert image.busybox.read_bytes() == b"busybox"
    assert image.manifest is not None
    assert image.manifest.suite == "sid"
    assert image.manifest.packages == {KERNEL_PACKAGE: "7.2.13-1", "busybox-static": "1.38"}
    assert resolve("debian", cache) == image
    assert any("http://mirror.example/debian" in step for step in steps)


@pytest.mark.parametrize(("compress", "suffix"), [(lzma.compress, ".xz"), (bytes, "")])
def test_a_pull_with_kvm_also_gets_its_modules_ready_to_be_loaded(
    host: Path, tmp_path: Path, compress: Callable[[bytes], bytes], suffix: str
) -> None:
    write_modules(tmp_path, compress, suffix)
    cache = ImageCache(tmp_path / "cache")
    image = pull("debian-kvm", cache)
    assert (image.name, image.version) == ("debian-kvm", RELEASE)
    assert image.path.read_bytes() == make_kernel()
    assert {path.name: path.read_bytes() for path in image.modules} == {
        "irqbypass.ko": b"irqbypass", "kvm.ko": b"kvm", "kvm-intel.ko": b"intel",
    }  # fmt: skip
    assert image.manifest is not None
    assert image.manifest.packages[MODULES_PACKAGE] == "7.2.13-1"
    assert resolve("debian-kvm", cache) == image
    assert pull("debian", cache).modules == ()


def test_a_pull_without_kvm_asks_for_no_modules(host: Path, tmp_path: Path) -> None:
    pull("debian", ImageCache(tmp_path / "cache"))
    assert MODULES_PACKAGE not in (tmp_path / "log").read_text()


def test_a_damaged_module_is_refused(host: Path, tmp_path: Path) -> None:
    write_modules(tmp_path, lambda data: b"no xz" + data, ".xz")
    with pytest.raises(HostError, match=f"{re.escape(MODULES_PACKAGE)}.* is damaged; pull again"):
        pull("debian-kvm", ImageCache(tmp_path / "cache"))
    assert left_in(tmp_path / "cache") == []


def test_a_pull_keeps_apts_state_to_itself_and_never_switches_signatures_off(
    host: Path, tmp_path: Path
) -> None:
    pull_debian(ImageCache(tmp_path / "cache"))
    log = (tmp_path / "log").read_text()
    for line in log.splitlines():
        if line.startswith(("apt-get", "apt-cache")) and "indextargets" not in line:
            assert f"-oDir::State::lists={tmp_path}/cache" in line
            assert f"-oDir::Etc::sourcelist={tmp_path}/cache" in line
            assert "-oDir::Etc::sourceparts=-" in line
    assert "unauthenticated" not in log.lower()
    assert "trusted" not in log.lower()


def test_another_mirror_and_suite_can_be_named(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_UPDATE_STATUS", "100")
    monkeypatch.setenv("FAKE_UPDATE_SAYS", "E: Could not resolve 'other.example'")
    with pytest.raises(
        HostError, match=r"for suite forky of http://other\.example/debian \(Could not resolve"
    ):
        pull_debian(ImageCache(tmp_path / "cache"), suite="forky", mirror="http://other.example/debian/")


@pytest.mark.parametrize("tool", ["apt-get", "apt-cache", "apt-config", "dpkg-deb"])
def test_a_host_without_apt_or_dpkg_is_told_so(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    (host / tool).unlink()
    monkeypatch.setenv("PATH", str(host))
    with pytest.raises(HostError, match=f"^{tool} was not found, and images are pulled with apt and dpkg"):
        pull_debian(ImageCache(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        (
            "W: GPG error: x sid InRelease: NO_PUBKEY 0123\n"
            "E: The repository 'x sid InRelease' is not signed.",
            r"the signature of suite sid .* is not good \(The repository 'x sid InRelease' is not signed\)",
        ),
        ("E: GPG error: x: The following signatures were invalid: BADSIG 0123", "the signature of suite sid"),
        ("W: OpenPGP signature verification failed: x: Missing key 0123", "the signature of suite sid"),
        (
            "E: The repository 'x nosuch Release' does not have a Release file.",
            "was not found .* check the suite",
        ),
        ("E: Release file for x is expired (invalid since 3d).", "out of date .* check this host's clock"),
        (
            "E: Failed to fetch x  Error writing to file - write (28: No space left on device)",
            "no space left",
        ),
        (
            "E: Failed to fetch x  Temporary failure resolving 'x'",
            "`apt-get update` failed .* check the network",
        ),
        ("", r"`apt-get update` failed .* \(status 100\)"),
    ],
)
def test_an_update_that_fails_is_explained_in_one_sentence_and_leaves_no_cache(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, sentence: str
) -> None:
    monkeypatch.setenv("FAKE_UPDATE_STATUS", "100")
    monkeypatch.setenv("FAKE_UPDATE_SAYS", says)
    with pytest.raises(HostError, match=sentence) as caught:
        pull_debian(ImageCache(tmp_path / "cache"))
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path / "cache") == []


def test_a_download_that_fails_leaves_no_cache(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DOWNLOAD_STATUS", "100")
    with pytest.raises(HostError, match="`apt-get download` failed"):
        pull_debian(ImageCache(tmp_path / "cache"))
    assert left_in(tmp_path / "cache") == []


def test_a_download_without_the_kernel_is_refused(host: Path, tmp_path: Path) -> None:
    (tmp_path / "debs" / f"{KERNEL_PACKAGE}_7.2.13-1.deb").unlink()
    with pytest.raises(HostError, match=f"apt did not deliver {re.escape(KERNEL_PACKAGE)}; pull again"):
        pull_debian(ImageCache(tmp_path / "cache"))


def test_a_failed_pull_keeps_the_image_that_was_there(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ImageCache(tmp_path / "cache")
    image = pull_debian(cache)
    monkeypatch.setenv("FAKE_UPDATE_STATUS", "100")
    with pytest.raises(HostError):
        pull_debian(cache)
    assert cache.images() == [image]
    assert image.is_intact()


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"./usr/share/doc/readme": b"text"}, "does not have the file that was expected"),
        (
            {"./usr/lib/modules/7.2/vmlinuz": b"MZ"},
            "the kernel of linux-binary-7.2.13.* is a truncated bzImage",
        ),
    ],
)
def test_a_package_with_unexpected_contents_is_refused(
    host: Path, tmp_path: Path, files: dict[str, bytes], sentence: str
) -> None:
    write_tar(tmp_path / "debs" / f"{KERNEL_PACKAGE}_7.2.13-1.deb", files)
    with pytest.raises(HostError, match=sentence):
        pull_debian(ImageCache(tmp_path / "cache"))
    assert left_in(tmp_path / "cache") == []


def test_a_damaged_package_is_refused(host: Path, tmp_path: Path) -> None:
    package = tmp_path / "debs" / f"{KERNEL_PACKAGE}_7.2.13-1.deb"
    package.write_bytes(package.read_bytes()[:1000])
    with pytest.raises(HostError, match="is damaged; pull again"):
        pull_debian(ImageCache(tmp_path / "cache"))


def test_the_highest_version_wins_by_number_not_by_letter() -> None:
    names = [
        f"linux-binary-{version}-cloud-amd64" for version in ("7.2.9+deb14", "7.2.13+deb14", "7.10+deb14")
    ]
    assert newest_kernel_package(names, "sid") == (names[2], "7.10+deb14-cloud-amd64")
    assert newest_kernel_package(names[:2], "sid")[0] == names[1]


def test_a_later_build_for_the_same_upstream_version_wins() -> None:
    names = [f"linux-binary-7.2.13+deb14{build}-cloud-amd64" for build in ("", "+2", "+1")]
    assert newest_kernel_package(names, "sid")[0] == names[1]


def test_other_packages_are_not_taken_for_kernels() -> None:
    names = [
        "linux-binary-unsigned-7.9-cloud-amd64",
        "linux-binary-7.9-amd64",
        "linux-binary-7.9-cloud-amd64-dbg",
        "linux-binary-7.9-cloud-arm64",
    ]
    with pytest.raises(HostError, match=r"suite trixie has no package linux-binary-.*; pull from sid"):
        newest_kernel_package(names, "trixie")


def test_a_suite_whose_kernel_is_too_old_for_lass_is_refused() -> None:
    with pytest.raises(
        HostError, match=r"is 6\.12\.5\+deb13, and LASS asks for 7\.2 or newer; pull from sid"
    ):
        newest_kernel_package(["linux-binary-6.12.5+deb13-cloud-amd64"], "trixie")


@pytest.mark.network
@pytest.mark.slow
def test_a_real_pull_gives_a_kernel_that_loads(tmp_path: Path) -> None:
    image = pull_debian(ImageCache(tmp_path))
    assert image.is_intact()
    memory = GuestMemory()
    memory.set_slot(0, 0, mmap.mmap(-1, 256 << 20))
    loaded = load_image(image.path, memory, command_line="console=ttyS0")
    assert loaded.format == "bzImage"
    assert loaded.version.startswith(image.version)
    assert tuple(map(int, image.version.split("+")[0].split(".")[:2])) >= MINIMUM_KERNEL
    assert image.busybox is not None
    assert image.busybox.read_bytes().startswith(b"\x7fELF")
