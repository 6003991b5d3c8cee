"""`lasskvm run --save` and `--load`."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_support import Cli, kernel

from lasskvm.kvm.snapshot import FORMAT_VERSION

#: Prints A to Z with a pause before each, and ends with status 7.
ALPHABET = """
    mov ebx, 65
next:
    mov ecx, 1000000
pause:
    dec ecx; jne pause
    mov eax, ebx; mov dx, 0x3f8; out dx, al
    inc ebx; cmp ebx, 91; jne next
    mov al, 7; out 0xf8, al
"""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SPIN = "again: jmp again"
PATIENCE = "60"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "kernel.elf"
    path.write_bytes(kernel(ALPHABET))
    return path


def test_a_run_is_saved_at_a_time_of_the_guest_and_gone_on_with(
    tmp_path: Path, image: Path, cli: Cli
) -> None:
    saved = tmp_path / "saved"
    first = cli("run", image, "--timeout", PATIENCE, "--save", saved, "--save-after", "0.1")
    assert first.status == 0
    assert f"lasskvm run --load {saved}` goes on with it" in first.err
    second = cli("run", "--load", saved, "--timeout", PATIENCE)
    assert second.status == 7
    assert first.out
    assert second.out
    assert first.out + second.out == LETTERS


def test_a_run_is_saved_when_the_time_limit_ends_it(tmp_path: Path, cli: Cli) -> None:
    image, saved = tmp_path / "kernel.elf", tmp_path / "saved"
    image.write_bytes(kernel(SPIN))
    for words in ((image,), ("--load", saved)):
        result = cli("run", *words, "--timeout", "0.1", "--save", saved, "-q")
        assert (result.status, result.err) == (0, "")
    assert cli("run", "--load", saved, "--timeout", "0.1").status == 124


def test_a_run_that_ends_by_itself_is_not_saved_and_says_so(tmp_path: Path, image: Path, cli: Cli) -> None:
    saved = tmp_path / "saved"
    result = cli("run", image, "--timeout", PATIENCE, "--save", saved, "--save-after", "1000")
    assert (result.status, result.out) == (7, LETTERS)
    assert "was not written" in result.err
    assert not saved.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["kernel.elf", "--save-after", "1"], "--save-after says when to save"),
        (["kernel.elf", "--save", "x", "--backend", "kvm"], "cannot be saved"),
        (["kernel.elf", "--save", "missing/x"], "a folder that exists"),
        (["kernel.elf", "--save", "."], "cannot be a file"),
        (["--load", "x", "kernel.elf"], "leave image out"),
        (["--load", "x", "--memory", "512"], "leave --memory out"),
        (["--load", "x", "--engine", "jit"], "leave --engine out"),
        ([], "give an image to boot"),
        (["--load", "missing"], "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_with_status_2(cli: Cli, words: list[str], sentence: str) -> None:
    result = cli("run", *words)
    assert result.status == 2
    assert sentence in " ".join(result.err.replace("│", " ").split())


def test_a_damaged_file_is_refused_with_a_sentence(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "saved").write_bytes(b"LASSKVM\x1a" + FORMAT_VERSION.to_bytes(4, "little"))
    result = cli("run", "--load", tmp_path / "saved")
    assert result.status == 2
    assert result.err.startswith("lasskvm: the snapshot")
    assert "damaged or incomplete" in result.err
