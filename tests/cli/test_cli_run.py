"""`lasskvm run`: exit statuses, the console, and one sentence for everything a person can get wrong."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from cli_support import Boot, Cli, Result, bzimage, elf, kernel

from lasskvm.cli.run_machine import KERNEL_WORDS
from lasskvm.images import Manifest

#: 13 bytes.
HELLO = "mov dx, 0x3f8; mov al, 72; out dx, al; mov al, 105; out dx, al; mov al, 10; out dx, al;"
SPIN = "again: jmp again"
#: Sends back what it receives, and ends with status 9 when that is a "q". Receive interrupts are on in the
#: UART, but not in the processor: it looks every now and then.
ECHO = """
    mov dx, 0x3f9; mov al, 1; out dx, al
    mov dx, 0x3f8; mov al, 62; out dx, al
wait:
    mov ecx, 10000
pass:
    dec ecx; jne pass
    mov dx, 0x3fd; in al, dx; test al, 1; je wait
    mov dx, 0x3f8; in al, dx; out dx, al
    cmp al, 113; jne wait
    mov al, 9; out 0xf8, al
"""
COMMAND_LINE_POINTER = 0x228
#: Writes the kernel command line to the debug console.
SHOW_COMMAND_LINE = f"""
    mov esi, [rsi + {COMMAND_LINE_POINTER}]
next:
    mov al, [rsi]; inc rsi; out 0xe9, al
    test al, al; jne next
    out 0xf8, al
"""
PATIENCE = "60"


@pytest.fixture
def boot(tmp_path: Path, cli: Cli) -> Boot:
    """Boot a kernel given as assembly, with more words on the command line."""

    def run(source: str, *words: object) -> Result:
        image = tmp_path / "kernel.elf"
        image.write_bytes(kernel(source))
        return cli("run", image, "--timeout", PATIENCE, *words)

    return run


# ----------------------------------------------------------------------------------------------- how runs end


def test_the_guests_console_is_standard_output_and_nothing_else_is(boot: Boot) -> None:
    result = boot(HELLO + "xor eax, eax; out 0xf8, al", "--stats")
    assert (result.status, result.out) == (0, "Hi\n")
    assert "executed blocks" in result.err


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("mov al, 42; out 0xf8, al", 42),
        ("mov al, 0; out 0xf4, al", 1),
        ("mov al, 0x10; out 0xf4, al", 33),
        ("mov eax, 0x1000; out 0xf4, eax", 1),
        ("cli; hlt", 0),
        ("mov dx, 0x604; mov ax, 0x2000; out dx, ax", 0),
    ],
)
def test_the_exit_status_is_the_guests(boot: Boot, source: str, status: int) -> None:
    assert boot(source, "-q").status == status


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        ("ud2", 1, "triple-faulted (RIP 0x10000d"),
        ("mov eax, 0x80000000; jmp rax", 1, "0x80000000, where there is no memory"),
    ],
)
def test_a_crash_is_said_with_its_place(boot: Boot, source: str, status: int, said: str) -> None:
    result = boot(HELLO + source, "-q")
    assert result.status == status
    assert result.out == "Hi\n"
    assert said in result.error


def test_a_guest_that_never_ends_is_ended_at_the_time_limit(boot: Boot) -> None:
    result = boot(SPIN, "-q", "--timeout", 1)
    assert result.status == 124
    assert "time limit" in result.error
    assert "RIP 0x100000" in result.error


# ------------------------------------------------------------------------------------- what the guest is told


def test_the_default_command_line_names_the_console(boot: Boot) -> None:
    result = boot(SHOW_COMMAND_LINE)
    assert result.out.startswith(KERNEL_WORDS)
    assert "earlyprintk=serial" in result.out


def test_append_adds_to_the_command_line_and_cmdline_replaces_it(boot: Boot) -> None:
    assert boot(SHOW_COMMAND_LINE, "--append", "mitigations=off").out.endswith(" mitigations=off\0")
    assert boot(SHOW_COMMAND_LINE, "--cmdline", "only this").out == "only this\0"


def test_quiet_is_passed_on_to_linux(boot: Boot) -> None:
    result = boot(SHOW_COMMAND_LINE, "--quiet")
    assert "quiet" in result.out.rstrip("\0").split()
    assert "earlyprintk" not in result.out
    assert result.err == ""


def test_the_cpu_is_what_was_asked_for(boot: Boot) -> None:
    source = "mov eax, 7; mov ecx, 1; cpuid; shr eax, 6; and al, 1; out 0xf8, al"
    assert boot(source).status == 1
    assert boot(source, "--cpu", "max,-lass").status == 0


def test_the_cpus_can_be_listed_without_an_image(cli: Cli) -> None:
    result = cli("run", "--cpu", "list")
    assert result.status == 0
    assert {"max", "lass", "la57"} <= set(result.out.split())
    assert result.err == ""


def test_the_clock_of_the_host_can_be_asked_for(boot: Boot) -> None:
    assert boot(HELLO + "mov al, 3; out 0xf8, al", "--clock", "host").status == 3


# -------------------------------------------------------------------------------------------------- bad input


def refused(result: Result) -> str:
    """The sentence of an error, which is all there is."""
    assert result.status == 2
    assert result.out == ""
    return str(result.error)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (b"", "is empty"),
        (b"#!/bin/sh\n", "neither a bzImage nor an ELF file"),
        (bzimage(b"payload")[:600], "truncated bzImage"),
        (bzimage(b"payload")[:-3], "truncated bzImage"),
        (bzimage(b"payload", xloadflags=0), "neither a 64-bit Linux kernel nor a 32-bit entry point"),
        (bzimage(b"payload"), "unknown format"),
        (elf(b"\xf4", elf_class=1), "32-bit ELF file"),
        (elf(b"\xf4")[:70], "truncated ELF file"),
        (elf(b"\xf4", address=0x7000_0000), "not all guest RAM"),
        (elf(b"\xf4", address=0x2000), "the loader's own data"),
    ],
)
def test_a_bad_kernel_is_one_sentence(cli: Cli, tmp_path: Path, image: bytes, said: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(image)
    sentence = refused(cli("run", path))
    assert said in sentence
    assert str(path) in sentence


def test_a_missing_file_is_one_sentence(cli: Cli, tmp_path: Path) -> None:
    assert "there is no file" in refused(cli("run", tmp_path / "nowhere"))


def test_a_folder_is_one_sentence(cli: Cli, tmp_path: Path) -> None:
    assert str(tmp_path) in refused(cli("run", tmp_path))


def test_an_unknown_image_name_is_told_the_known_ones(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "give a kernel file or debian, debian-kvm, seabios, memtest86+" in refused(cli("run", "debain"))


def test_an_image_that_was_not_pulled_is_told_how(cli: Cli, empty_cache: Path) -> None:
    assert "lasskvm images pull debian" in refused(cli("run", "debian"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--memory", 3), "at least 4"),
        (("--memory", 0), "at least 4"),
        (("--memory", -1), "at least 4"),
        (("--memory", 1 << 30), "this host has"),
        (("--memory", 1 << 70), "this host has"),
        (("--cpu", "max,-las"), 'did you mean "lass"'),
        (("--cpu", "max,+avx2"), "does not virtualize it yet"),
        (("--cpu", "mx"), 'did you mean "max"'),
        (("--cmdline", "x" * 5000), "shorten it"),
        (("--initrd", "/nowhere/initrd"), "cannot be read"),
    ],
)
def test_a_bad_option_is_one_sentence(boot: Boot, words: tuple[object, ...], said: str) -> None:
    assert said in refused(boot("hlt", *words))


def test_an_initrd_larger_than_memory_is_one_sentence(boot: Boot, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    with initrd.open("wb") as stream:
        stream.truncate(9 << 20)
    assert "does not fit" in refused(boot("hlt", "--initrd", initrd, "--memory", 8))


def test_options_that_exclude_each_other_are_refused(boot, tmp_path: Path) -> None:
    for words in (("--cmdline", "a", "--append", "b"), ("--initrd", tmp_path, "--", "./program")):
        result = boot("hlt", *words)
        assert result.status == 2
        assert "Traceback" not in result.err


@pytest.fixture
def busybox(empty_cache: Path) -> Path:
    """A pulled image whose files are as small as can be."""
    folder = empty_cache / "debian" / "1.0.x"
    folder.mkdir(parents=True)
    (folder / "vmlinuz").write_bytes(kernel("mov al, 5; out 0xf8, al"))
    (folder / "busybox").write_bytes(b"busybox")
    manifest = Manifest(
        "debian",
        "1.0",
        "sid",
        packages={},
        sha256=dict.fromkeys(("vmlinuz", "busybox"), ""),
        date="2026-01-01",
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (None, 0, "cannot be read"),
        (elf(b"\xf4"), 0o644, "chmod +x"),
        (elf(b"\xf4", interpreter=True), 0o755, "-static"),
        (b"#!/bin/sh\n", 0o755, "is not an ELF file"),
    ],
)
def test_a_program_that_cannot_run_is_one_sentence(
    cli: Cli, busybox: Path, tmp_path: Path, content: bytes | None, mode: int, said: str
) -> None:
    program = tmp_path / "program"
    if content is not None:
        program.write_bytes(content)
        program.chmod(mode)
    sentence = refused(cli("run", "debian", "--", program))
    assert said in sentence
    assert str(program) in sentence


def test_a_folder_as_program_is_one_sentence(cli: Cli, busybox: Path, tmp_path: Path) -> None:
    assert str(tmp_path) in refused(cli("run", "debian", "--", tmp_path))


def test_a_program_without_a_busybox_is_told_where_to_get_one(
    cli: Cli, empty_cache: Path, tmp_path: Path
) -> None:
    image, program = tmp_path / "kernel.elf", tmp_path / "program"
    image.write_bytes(kernel("hlt"))
    program.write_bytes(elf(b"\xf4"))
    program.chmod(0o755)
    assert "lasskvm images pull debian" in refused(cli("run", image, "--", program))


def test_a_pulled_image_runs_a_program_with_options_of_its_own(
    cli: Cli, busybox: Path, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.write_bytes(elf(b"\xf4"))
    program.chmod(0o755)
    result = cli("run", "debian", "-q", "--timeout", PATIENCE, "--", program, "--memory", "3", "-x")
    assert (result.status, result.err) == (5, "")


def test_a_guest_that_ends_before_its_program_has_failed(cli: Cli, busybox: Path, tmp_path: Path) -> None:
    (busybox / "vmlinuz").write_bytes(kernel("cli; hlt"))
    program = tmp_path / "program"
    program.write_bytes(elf(b"\xf4"))
    program.chmod(0o755)
    result = cli("run", "debian", "-q", "--timeout", PATIENCE, "--", program)
    assert result.status == 1
    assert "before the program had ended" in result.error


# ---------------------------------------------------------------------------------- real processes, terminals


def start(image: Path, *words: str, **descriptors: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "lasskvm", "run", str(image), *words], **descriptors)


def wait_for(descriptor: int, text: bytes) -> bytes:
    """Read until *text* has come."""
    received = b""
    deadline = time.monotonic() + float(PATIENCE)
    while text not in received:
        assert select.select([descriptor], [], [], max(0, deadline - time.monotonic()))[0], received
        piece = os.read(descriptor, 4096)
        assert piece, received
        received += piece
    return received


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    image = tmp_path / "echo.elf"
    image.write_bytes(kernel(ECHO))
    return image


def test_a_pipe_feeds_the_guest_until_its_end(echo: Path) -> None:
    command = [sys.executable, "-m", "lasskvm", "run", str(echo), "-q", "--timeout", PATIENCE]
    result = subprocess.run(command, input=b"abcq", capture_output=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (9, b">abcq", b"")


def test_the_end_of_input_reaches_the_guest(echo: Path) -> None:
    command = [sys.executable, "-m", "lasskvm", "run", str(echo), "-q", "--timeout", "1"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert result.returncode == 124
    assert result.stdout.startswith(b">\x04")


def test_a_person_types_to_the_guest_and_leaves_with_control_a_x(echo: Path) -> None:
    near, far = pty.openpty()
    before = termios.tcgetattr(far)
    with start(echo, stdin=far, stdout=far, stderr=subprocess.PIPE) as process:
        wait_for(near, b">")
        os.write(near, b"\x03z")
        wait_for(near, b"\x03z")
        os.write(near, b"\x01x")
        assert process.wait(float(PATIENCE)) == 0
        assert process.stderr is not None
        assert b"Ctrl-A X leaves" in process.stderr.read()
    assert termios.tcgetattr(far) == before
    os.close(near)
    os.close(far)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_run_and_restores_the_terminal(echo: Path, number: int, status: int) -> None:
    near, far = pty.openpty()
    before = termios.tcgetattr(far)
    with start(echo, "-q", stdin=far, stdout=far, stderr=subprocess.PIPE) as process:
        wait_for(near, b">")
        assert termios.tcgetattr(far) != before
        process.send_signal(number)
        assert process.wait(float(PATIENCE)) == status
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert termios.tcgetattr(far) == before
    os.close(near)
    os.close(far)


def test_a_reader_that_leaves_ends_the_run_without_a_traceback(tmp_path: Path) -> None:
    image = tmp_path / "chatter.elf"
    image.write_bytes(kernel("mov dx, 0x3f8; mov al, 10; again: out dx, al; jmp again"))
    with start(image, "-q", "--timeout", PATIENCE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"\n"
        process.stdout.close()
        assert process.wait(float(PATIENCE)) == 141
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_a_full_disk_under_the_output_is_one_sentence(tmp_path: Path) -> None:
    image = tmp_path / "hello.elf"
    image.write_bytes(kernel(HELLO + "hlt"))
    command = [sys.executable, "-m", "lasskvm", "run", str(image), "-q"]
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert result.returncode == 2
    assert b"No space left" in result.stderr
    assert result.stderr.count(b"\n") == 1
