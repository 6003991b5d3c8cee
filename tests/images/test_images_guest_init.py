"""The initramfs images of `lasskvm run`: a static program with its arguments, or a shell."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from newc import Entry, parse_newc

from lasskvm.errors import ImageError
from lasskvm.images import program_initramfs, shell_initramfs
from lasskvm.images.status_helper import status_helper

BUSYBOX = b"stands for busybox"
ET_REL, ET_EXEC, ET_DYN = 1, 2, 3
PT_LOAD, PT_INTERP = 1, 3


def make_program(kind: int = ET_EXEC, machine: int = 62, segments: tuple[int, ...] = (PT_LOAD,)) -> bytes:
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack(
        "<HHIQQQIHHHHHH", kind, machine, 1, 0x400000, 64, 0, 0, 64, 56, len(segments), 0, 0, 0
    )
    return header + b"".join(struct.pack("<IIQQQQQQ", segment, 5, 0, 0, 0, 16, 16, 1) for segment in segments)


def entries_of(archive: bytes) -> dict[str, Entry]:
    return {entry.name: entry for entry in parse_newc(archive)}


def save(tmp_path: Path, data: bytes, name: str = "program") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_the_program_lies_in_the_initramfs_and_can_be_executed(tmp_path: Path) -> None:
    program = make_program()
    entries = entries_of(program_initramfs(BUSYBOX, save(tmp_path, program, "my test"), []))
    assert entries["program/my test"].data == program
    assert entries["bin/busybox"].data == BUSYBOX
    for name in ("program/my test", "bin/busybox", "bin/lasskvm-status", "init", "session"):
        assert entries[name].fields["mode"] == 0o100755


def test_the_console_exists_before_devtmpfs_is_mounted(tmp_path: Path) -> None:
    console = entries_of(shell_initramfs(BUSYBOX))["dev/console"].fields
    assert (console["mode"] & 0o170000, console["rdevmajor"], console["rdevminor"]) == (0o020000, 5, 1)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["plain", "two words", ""],
        ["it's", '"quoted"', "$HOME", "`id`", "$(id)", "a;b", "a&b|c", "*", "~", "#x", "\\", "-n", "é"],
        ["line\nbreak", "tab\t", "{braces}", "!"],
        ["\udcff"],
    ],
)
def test_the_arguments_reach_the_program_as_they_are(tmp_path: Path, args: list[str]) -> None:
    entries = entries_of(program_initramfs(BUSYBOX, save(tmp_path, make_program(), "it's $me"), args))
    session = entries["session"].data
    command = session.partition(b"trap : INT QUIT\n")[2].partition(b"\n/bin/lasskvm-status")[0]
    words = [b"/program/it's $me", *(arg.encode("utf-8", "surrogateescape") for arg in args)]
    shell = b"record() { for word; do printf '%s\\0' \"$word\"; done; }\nrecord " + command
    output = subprocess.run(["sh"], input=shell, capture_output=True, check=True).stdout
    assert output == b"".join(word + b"\0" for word in words)


def test_the_status_is_handed_over_right_behind_the_program_and_then_the_guest_powers_off(
    tmp_path: Path,
) -> None:
    entries = entries_of(program_initramfs(BUSYBOX, save(tmp_path, make_program()), ["x"]))
    lines = entries["session"].data.splitlines()
    assert lines[-3:] == [b"/program/program x", b"/bin/lasskvm-status $?", b"/bin/busybox poweroff -f"]
    assert entries["bin/lasskvm-status"].data == status_helper()


@pytest.mark.parametrize("name", ["init", "session"])
def test_the_scripts_are_valid_shell(tmp_path: Path, name: str) -> None:
    for archive in (
        shell_initramfs(BUSYBOX),
        program_initramfs(BUSYBOX, save(tmp_path, make_program()), ["'"]),
    ):
        script = entries_of(archive)[name].data
        assert script.startswith(b"#!/bin/sh\n")
        assert subprocess.run(["sh", "-n"], input=script, capture_output=True, check=False).stderr == b""


def test_without_a_program_there_is_a_shell_with_job_control() -> None:
    entries = entries_of(shell_initramfs(BUSYBOX))
    assert b"setsid /bin/busybox cttyhack /session" in entries["init"].data
    assert b"\n/bin/sh\n/bin/lasskvm-status $?\n" in entries["session"].data
    assert entries["bin/sh"].data == b"busybox"


def test_a_static_position_independent_program_is_accepted(tmp_path: Path) -> None:
    program = save(tmp_path, make_program(kind=ET_DYN))
    assert "program/program" in entries_of(program_initramfs(BUSYBOX, program, []))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            make_program(kind=ET_DYN, segments=(PT_LOAD, PT_INTERP)),
            "dynamically linked.*; link it with -static",
        ),
        (make_program(machine=183), r"for another machine \(AARCH64\); build it for x86-64"),
        (make_program(kind=ET_REL), "of ELF type ET_REL and cannot be run"),
        (make_program()[:50], "truncated"),
        (b"#!/bin/sh\n", "is not an ELF file; give an x86-64 ELF executable"),
        (b"", "is not an ELF file"),
        (b"\x7fELF\x01\x01\x01" + bytes(80), "not a 64-bit"),
    ],
)
def test_a_program_that_cannot_run_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence) as caught:
        program_initramfs(BUSYBOX, save(tmp_path, content), [])
    assert str(caught.value).startswith(f"program {tmp_path / 'program'} ")


def test_a_missing_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot be read \(No such file or directory\)"):
        program_initramfs(BUSYBOX, tmp_path / "absent", [])
