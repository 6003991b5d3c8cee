"""Kernel modules in an initramfs: what modprobe reads there, and which it is told to load."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from newc import parse_newc

from lasskvm.errors import ImageError
from lasskvm.images import Initramfs, KernelModules, program_initramfs, shell_initramfs
from lasskvm.images.status_helper import status_helper

RELEASE = "7.2.13-test"
FOLDER = f"lib/modules/{RELEASE}"
DEPENDS = {"irqbypass": "", "kvm": "irqbypass", "kvm-intel": "kvm"}
SECTION = struct.Struct("<IIQQQQIIQQ")
SHT_PROGBITS, SHT_STRTAB = 1, 3


def make_module(information: bytes) -> bytes:
    """A relocatable ELF file with nothing but a .modinfo section."""
    names = b"\0.modinfo\0.shstrtab\0"
    header = struct.pack(
        "<4sBBBBQHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 0, 1, 62, 1, 0, 0, 64, 0, 64, 0, 0, 64, 3, 2
    )
    data = 64 + 3 * SECTION.size
    sections = [
        bytes(SECTION.size),
        SECTION.pack(1, SHT_PROGBITS, 0, 0, data, len(information), 0, 0, 1, 0),
        SECTION.pack(10, SHT_STRTAB, 0, 0, data + len(information), len(names), 0, 0, 1, 0),
    ]
    return header + b"".join(sections) + information + names


@pytest.fixture
def modules(tmp_path: Path) -> KernelModules:
    files = []
    for name, depends in DEPENDS.items():
        path = tmp_path / f"{name}.ko"
        path.write_bytes(make_module(f"license=GPL\0depends={depends}\0vermagic={RELEASE}\0".encode()))
        files.append(path)
    return KernelModules(RELEASE, files)


def build(modules: KernelModules) -> tuple[str, dict[str, bytes]]:
    initramfs = Initramfs()
    command = modules.add_to(initramfs)
    return command, {entry.name: entry.data for entry in parse_newc(initramfs.build())}


def test_modules_lie_where_modprobe_looks_with_all_that_each_needs(modules: KernelModules) -> None:
    _, files = build(modules)
    for path in modules.files:
        assert files[f"{FOLDER}/{path.name}"] == path.read_bytes()
    assert files[f"{FOLDER}/modules.dep"].decode().splitlines() == [
        "irqbypass.ko: ",
        "kvm.ko: irqbypass.ko",
        "kvm-intel.ko: kvm.ko irqbypass.ko",
    ]


def test_what_nothing_else_needs_is_loaded(modules: KernelModules) -> None:
    command, _ = build(modules)
    assert command == "/bin/busybox modprobe -a kvm_intel\n"


def test_a_dependency_of_two_comes_behind_both(tmp_path: Path) -> None:
    files = []
    for name, depends in (("a", "b,c"), ("b", "c"), ("c", "")):
        files.append(tmp_path / f"{name}.ko")
        files[-1].write_bytes(make_module(f"depends={depends}\0".encode()))
    _, built = build(KernelModules(RELEASE, files))
    assert built[f"{FOLDER}/modules.dep"].startswith(b"a.ko: b.ko c.ko\n")


def test_programs_and_shells_start_behind_the_modules(modules: KernelModules, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(status_helper())
    for archive, command in (
        (program_initramfs(b"busybox", program, [], modules), b"/program/program\n"),
        (shell_initramfs(b"busybox", modules), b"/bin/sh\n"),
    ):
        session = next(entry.data for entry in parse_newc(archive) if entry.name == "session")
        assert session.index(b"modprobe -a kvm_intel\n") < session.rindex(command)


def test_an_image_without_modules_loads_none() -> None:
    entries = {entry.name: entry.data for entry in parse_newc(shell_initramfs(b"busybox"))}
    assert b"modprobe" not in entries["session"]
    assert not any(name.startswith("lib") for name in entries)


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"MZ", make_module(b"license=GPL\0")])
def test_what_is_no_module_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.ko"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"bad\.ko is no kernel module \(.*\); pull the image again"):
        build(KernelModules(RELEASE, [path]))


def test_a_module_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.ko cannot be read \(No such file.*pull the image again"):
        build(KernelModules(RELEASE, [tmp_path / "gone.ko"]))
