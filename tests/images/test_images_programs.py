"""Pulling SeaBIOS and memtest86+: with stand-ins for apt and dpkg, and once for real."""

from __future__ import annotations

import io
import os
import struct
import tarfile
from pathlib import Path

import pytest

from lasskvm.errors import HostError
from lasskvm.images import ImageCache, pull, resolve
from lasskvm.machine.boot import BootProtocol, load_firmware, probe_image

#: Each tool does what a host with one Debian source would; `apt-get download` delivers what lies in $FAKE_DEBS.
FAKE_TOOLS = {
    "apt-config": """echo "main='$FAKE_SOURCES'"; echo "parts='/nonexistent'" """,
    "apt-get": """
for argument; do case $argument in indextargets|update|download) command=$argument;; esac; done
case $command in
indextargets) echo http://mirror.example/debian;;
download) echo "$*" >> "$FAKE_LOG"; cp "$FAKE_DEBS"/*.deb .;;
esac""",
    "apt-cache": "true",
    "dpkg-deb": """
for last; do :; done
case $1 in
--show) basename "$last" .deb | tr '_\\n' ' \\0' | tr -d '\\0';;
--fsys-tarfile) cat "$last";;
esac""",
}
ROM = bytes(range(256)) * 1024


def make_memtest() -> bytes:
    """As much of memtest86+ as tells how it is started: a setup header with a 32-bit entry, and no payload."""
    image = bytearray(4096)
    image[0x1F1] = 1
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x200:0x206] = b"\xeb\x66HdrS"
    struct.pack_into("<H", image, 0x206, 0x20C)
    image[0x211] = 1
    struct.pack_into("<I", image, 0x214, 0x100000)
    return bytes(image)


#: What is in the packages, by package and version.
PACKAGES = {
    "seabios_1.17.0-1": {
        "./usr/share/seabios/bios-256k.bin": ROM,
        "./usr/share/seabios/vgabios.bin": b"other",
    },
    "memtest86+_8.10-2": {"./boot/mt86+ia32": b"other", "./boot/mt86+x64": make_memtest()},
}


def write_package(folder: Path, name: str, files: dict[str, bytes]) -> None:
    with tarfile.open(folder / f"{name}.deb", "w") as archive:
        for path, data in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with apt, dpkg and a Debian source; the folder of what the mirror delivers."""
    tools, folder = tmp_path / "bin", tmp_path / "debs"
    tools.mkdir()
    folder.mkdir()
    for name, script in FAKE_TOOLS.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    sources = tmp_path / "sources.list"
    sources.write_text("deb http://mirror.example/debian stable main\n")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SOURCES", str(sources))
    monkeypatch.setenv("FAKE_DEBS", str(folder))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return folder


def test_seabios_is_a_firmware_with_the_version_of_its_package(packages: Path, tmp_path: Path) -> None:
    write_package(packages, "seabios_1.17.0-1", PACKAGES["seabios_1.17.0-1"])
    cache = ImageCache(tmp_path / "cache")
    image = pull("seabios", cache, suite="forky")
    assert (image.name, image.version, image.kernel) == ("seabios", "1.17.0-1", None)
    assert image.firmware is not None
    assert image.firmware.read_bytes() == ROM
    assert image.manifest is not None
    assert (image.manifest.suite, image.manifest.packages) == ("forky", {"seabios": "1.17.0-1"})
    assert image.is_intact()
    assert resolve("seabios", cache) == image
    assert (tmp_path / "log").read_text().rstrip().endswith("download seabios")


@pytest.mark.parametrize("member", ["./boot/mt86+x64", "./boot/memtest86+x64.bin"])
def test_memtest_is_a_kernel_whatever_its_file_is_called(packages: Path, tmp_path: Path, member: str) -> None:
    write_package(packages, "memtest86+_8.10-2", {member: make_memtest()})
    cache = ImageCache(tmp_path / "cache")
    image = pull("memtest86+", cache)
    assert (image.name, image.version, image.firmware) == ("memtest86+", "8.10-2", None)
    assert image.kernel is not None
    assert image.kernel.read_bytes() == make_memtest()
    assert probe_image(image.kernel) is BootProtocol.LINUX32
    assert resolve("memtest86+", cache) == image


@pytest.mark.parametrize(
    ("name", "package", "files"),
    [
        ("seabios", "seabios_1", {"./usr/share/seabios/bios-256k.bin": ROM[:1000]}),
        ("memtest86+", "memtest86+_1", {"./boot/mt86+x64": b"no kernel"}),
    ],
)
def test_a_package_with_something_that_cannot_be_started_is_refused(
    packages: Path, tmp_path: Path, name: str, package: str, files: dict[str, bytes]
) -> None:
    write_package(packages, package, files)
    with pytest.raises(HostError, match=r"of sid has a .* that cannot be started; pull again") as caught:
        pull(name, ImageCache(tmp_path / "cache"))
    assert "staging" not in str(caught.value)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.name != "lock"] == []


def test_a_package_that_was_not_delivered_is_missed(packages: Path, tmp_path: Path) -> None:
    write_package(packages, "seabios_1.17.0-1", PACKAGES["seabios_1.17.0-1"])
    with pytest.raises(HostError, match=r"apt did not deliver memtest86\+; pull again"):
        pull("memtest86+", ImageCache(tmp_path / "cache"))


@pytest.mark.network
@pytest.mark.slow
def test_a_real_pull_gives_a_firmware_and_a_kernel_that_can_be_started(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    firmware, memtest = pull("seabios", cache).firmware, pull("memtest86+", cache).kernel
    assert firmware is not None
    assert b"SeaBIOS" in load_firmware(firmware)
    assert memtest is not None
    assert probe_image(memtest) is BootProtocol.LINUX32
    assert b"Memtest86+" in memtest.read_bytes()
    assert {image.name for image in cache.images()} == {"seabios", "memtest86+"}
