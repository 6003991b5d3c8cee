"""`lasskvm run --backend kvm`: the same command on /dev/kvm, and what it says where that cannot be."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_support import Boot, Cli, Result, kernel

from lasskvm.errors import HostError
from lasskvm.kvm import host

HELLO = "mov dx, 0x3f8; mov al, 72; out dx, al; mov al, 105; out dx, al; mov al, 10; out dx, al;"
SPIN = "again: jmp again"
PATIENCE = "30"


@pytest.fixture
def boot(tmp_path: Path, cli: Cli) -> Boot:
    """Boot a kernel given as assembly on /dev/kvm."""
    try:
        host.System().close()
    except HostError as error:
        pytest.skip(str(error))

    def run(source: str, *words: object) -> Result:
        image = tmp_path / "kernel.elf"
        image.write_bytes(kernel(source))
        return cli("run", image, "--backend", "kvm", "--timeout", PATIENCE, "--quiet", *words)

    return run


def test_output_and_status_are_the_guests(boot: Boot) -> None:
    result = boot(HELLO + "mov al, 5; out 0xf8, al")
    assert (result.status, result.out, result.err) == (5, "Hi\n", "")


def test_the_time_limit_is_status_124_and_says_where(boot: Boot) -> None:
    result = boot(HELLO + SPIN, "--timeout", "0.3")
    assert (result.status, result.out) == (124, "Hi\n")
    assert "time limit" in result.error


def test_statistics_count_exits(boot: Boot) -> None:
    result = boot(HELLO + "xor eax, eax; out 0xf8, al", "--stats")
    assert "exits: 4" in result.err


def test_what_the_host_lacks_is_said_once(boot: Boot, tmp_path: Path, cli: Cli) -> None:
    boot("hlt")
    result = cli("run", tmp_path / "kernel.elf", "--backend", "kvm", "--timeout", PATIENCE)
    assert result.err.count("lacks") <= 1


def test_ctrl_c_ends_a_guest_that_never_leaves_by_itself(boot: Boot, tmp_path: Path) -> None:
    boot("hlt")
    image = tmp_path / "spin.elf"
    image.write_bytes(kernel(HELLO + SPIN))
    command = [sys.executable, "-m", "lasskvm", "run", image, "--backend", "kvm", "--timeout", PATIENCE, "-q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"Hi\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(float(PATIENCE)) == 130


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOENT, "load kvm_intel or kvm_amd"), (errno.EACCES, "join the group")]
)
def test_without_a_usable_dev_kvm_the_status_is_2_and_the_sentence_helps(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    image = tmp_path / "kernel.elf"
    image.write_bytes(kernel(SPIN))
    really_open = os.open

    def refuse(path: str, *rest: int, **options: int) -> int:
        if path == host.DEVICE:
            raise OSError(number, os.strerror(number))
        return really_open(path, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    result = cli("run", image, "--backend", "kvm")
    assert result.status == 2
    assert advice in result.error


@pytest.mark.parametrize("words", [("--clock", "virtual"), ("--engine", "emulator")])
def test_options_of_the_soft_provider_are_refused(tmp_path: Path, cli: Cli, words: tuple[str, str]) -> None:
    image = tmp_path / "kernel.elf"
    image.write_bytes(kernel(SPIN))
    result = cli("run", image, "--backend", "kvm", *words)
    assert result.status == 2
    assert words[0] in result.err
