"""`lasskvm images`: what is there, how it gets there, and what can go wrong on the way."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from cli_support import Cli, bzimage

KERNEL_PACKAGE = "linux-binary-7.2.13+deb14-cloud-amd64"
RELEASE = "7.2.13+deb14-cloud-amd64"
FILE_SIZE_LIMIT = 1 << 16

#: Stand-ins for apt and dpkg; $SAYS and $STATUS are what `apt-get update` does.
TOOLS = {
    "apt-config": """echo "main='$SOURCES'"; echo "parts='/nonexistent'" """,
    "apt-get": """
for word; do case $word in indextargets|update|download) command=$word;; esac; done
case $command in
indextargets) echo http://mirror.example/debian/;;
update) echo "$SAYS" >&2; exit ${STATUS:-0};;
download) cp "$PACKAGES"/*.deb .;;
esac""",
    "apt-cache": f"echo {KERNEL_PACKAGE}",
    "dpkg-deb": """
for last; do :; done
case $1 in
--show) basename "$last" .deb | tr '_\\n' ' \\0' | tr -d '\\0';;
--fsys-tarfile) cat "$last";;
esac""",
}


def write_package(path: Path, name: str, data: bytes) -> None:
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with apt and a Debian mirror; the folder of its image cache."""
    tools, packages, sources = tmp_path / "bin", tmp_path / "packages", tmp_path / "sources.list"
    tools.mkdir()
    packages.mkdir()
    for name, script in TOOLS.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    kernel = bzimage(struct.pack("<I", 0) * FILE_SIZE_LIMIT)
    write_package(packages / f"{KERNEL_PACKAGE}_7.2.13-1.deb", f"./usr/lib/modules/{RELEASE}/vmlinuz", kernel)
    write_package(packages / "busybox-static_1.38.deb", "./usr/bin/busybox", b"busybox")
    sources.write_text("deb http://mirror.example/debian stable main\n")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("SOURCES", str(sources))
    monkeypatch.setenv("PACKAGES", str(packages))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lasskvm" / "images"


def left_in(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.name != "lock"]


def test_a_pull_says_what_it_does_on_standard_error(cli: Cli, host: Path) -> None:
    result = cli("images", "pull", "debian")
    assert (result.status, result.out) == (0, "")
    assert "http://mirror.example/debian" in result.err
    assert f"debian {RELEASE}" in result.err
    assert str(host) in result.err


def test_pulled_images_are_listed(cli: Cli, host: Path) -> None:
    cli("images", "pull", "debian", "--suite", "forky")
    table = cli("images", "list")
    assert (table.status, table.err) == (0, "")
    assert {"debian", RELEASE, "forky"} <= set(table.out.replace("│", " ").split())
    (image,) = json.loads(cli("images", "list", "--format", "json").out)
    assert (image["name"], image["version"], image["suite"]) == ("debian", RELEASE, "forky")
    assert Path(image["kernel"]).is_file()
    assert Path(image["busybox"]).read_bytes() == b"busybox"
    assert image["modules"] == []
    assert image["packages"] == {KERNEL_PACKAGE: "7.2.13-1", "busybox-static": "1.38"}


def test_an_empty_cache_is_an_empty_list(cli: Cli, host: Path) -> None:
    table = cli("images", "list")
    assert (table.status, table.out) == (0, "")
    assert "lasskvm images pull" in table.err
    assert json.loads(cli("images", "list", "--format", "json").out) == []


def test_an_unknown_image_is_told_the_nearest(cli: Cli, host: Path) -> None:
    result = cli("images", "pull", "debain")
    assert result.status == 2
    assert 'did you mean "debian"?' in result.error


def test_without_apt_a_pull_is_one_sentence(
    cli: Cli, host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    result = cli("images", "pull", "debian")
    assert result.status == 2
    assert "apt-get was not found" in result.error
    assert left_in(host) == []


@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        ("E: You don't have enough free space in /var/cache.", "there is no space left"),
        ("E: Failed to fetch http://mirror.example  Could not resolve host", "check the network"),
        ("E: The repository is not signed.", "signature"),
    ],
)
def test_what_apt_complains_about_is_said(
    cli: Cli, host: Path, monkeypatch: pytest.MonkeyPatch, says: str, sentence: str
) -> None:
    monkeypatch.setenv("SAYS", says)
    monkeypatch.setenv("STATUS", "100")
    result = cli("images", "pull", "debian")
    assert result.status == 2
    lines = result.err.splitlines()
    assert sentence in lines[-1]
    assert lines[-1].startswith("lasskvm: ")
    assert "Traceback" not in result.err
    assert left_in(host) == []


def test_a_full_disk_while_unpacking_leaves_nothing_behind(host: Path) -> None:
    # A limit on the size of files is the part of a full disk that needs no root: the kernel cannot be
    # written.
    code = (
        "import resource, sys;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({FILE_SIZE_LIMIT}, {FILE_SIZE_LIMIT}));"
        "from lasskvm.cli import main; main(['images', 'pull', 'debian'], prog_name='lasskvm')"
    )
    # The package is copied by a tool that would meet the limit, too.
    packages = Path(os.environ["PACKAGES"])
    (host.parents[2] / "bin" / "apt-get").write_text(
        (host.parents[2] / "bin" / "apt-get")
        .read_text()
        .replace('cp "$PACKAGES"/*.deb .', f"ln -s {packages}/*.deb .")
    )
    result = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert "cannot be written" in lines[-1]
    assert "Traceback" not in result.stderr
    assert left_in(host) == []
