"""`lasskvm run`: firmware, multiboot kernels with modules, devices, and what follows a reset."""

from __future__ import annotations

from pathlib import Path

import pytest
from boot_builders import Load, make_elf32, make_multiboot_header
from cli_support import Cli, Result, elf, kernel

from lasskvm.conformance.assembler import assemble
from lasskvm.images import Manifest

PATIENCE = "60"
KIB, MIB = 1 << 10, 1 << 20
DONE = "xor eax, eax; out 0xf4, eax"
#: Counts starts in memory that no image is in, and shows the count; ends at the third with status 3.
COUNT = """
    inc dword [0x300000]; mov al, [0x300000]; add al, 48; out 0xe9, al
    cmp al, 51; je done
"""
ENOUGH = "hang: jmp hang; done: mov al, 3; out 0xf8, al"
RESET, TRIPLE_FAULT = "mov al, 0xfe; out 0x64, al;", "ud2;"
#: Where a ROM's program is, in its last 64 KiB, and the jump to it at the reset vector.
ENTRY, RESET_VECTOR = 0xE000, 0xFFF0
JUMP_TO_ENTRY = b"\xe9" + ((ENTRY - RESET_VECTOR - 3) & 0xFFFF).to_bytes(2, "little")
LOAD_ADDRESS = 0x40_0000


def refused(result: Result) -> str:
    """The sentence of an error, which is all there is."""
    assert result.status == 2
    assert result.out == ""
    return str(result.error)


def refused_usage(result: Result) -> str:
    """What is said of options that do not go together."""
    assert result.status == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    return " ".join(result.err.replace("│", " ").split())


def rom(source: str, size: int = 64 * KIB) -> bytes:
    image = bytearray(size)
    code = assemble(source, ENTRY, bits=16).code
    start = size - 64 * KIB
    image[start + ENTRY : start + ENTRY + len(code)] = code
    image[start + RESET_VECTOR : start + RESET_VECTOR + len(JUMP_TO_ENTRY)] = JUMP_TO_ENTRY
    return bytes(image)


def multiboot(source: str, flags: int = 3) -> bytes:
    header = make_multiboot_header(flags)
    code = assemble(source, LOAD_ADDRESS + len(header), bits=32).code
    return make_elf32(Load(LOAD_ADDRESS, header + code), entry=LOAD_ADDRESS + len(header))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "image"


# ------------------------------------------------------------------------------------------------------ firmware

PRINT_EVERYWHERE = """
    mov dx, 0x3f8; mov al, 83; out dx, al; mov al, 10; out dx, al
    mov al, 69; out 0xe9, al; mov al, 10; out 0xe9, al
    mov dx, 0x402; mov al, 66; out dx, al; mov al, 10; out dx, al
    mov al, 0x10; out 0xf4, al
"""


@pytest.mark.parametrize("size", [64 * KIB, 256 * KIB, 16 * MIB])
def test_firmware_prints_on_every_console_and_ends_by_the_exit_port(cli: Cli, image: Path, size: int) -> None:
    image.write_bytes(rom(PRINT_EVERYWHERE, size))
    result = cli("run", "--firmware", image, "-q", "--timeout", PATIENCE)
    assert (result.status, result.err) == (33, "")
    assert sorted(result.out.splitlines()) == ["B", "E", "S"]


def test_firmware_starts_again_at_a_reset_unless_told_otherwise(cli: Cli, image: Path) -> None:
    source = COUNT.replace("0x300000", "0x600") + RESET + ENOUGH
    image.write_bytes(rom("xor ax, ax; mov ds, ax;" + source))
    result = cli("run", "--firmware", image, "-q", "--timeout", PATIENCE)
    assert (result.status, result.out) == (3, "123")
    result = cli("run", "--firmware", image, "-q", "--timeout", PATIENCE, "--on-reset", "exit")
    assert (result.status, result.out) == (0, "1")


@pytest.mark.parametrize("size", [0, 1, 64 * KIB - 1, 64 * KIB + 1, 100_000, 16 * MIB + 64 * KIB])
def test_a_rom_of_odd_size_is_one_sentence(cli: Cli, image: Path, size: int) -> None:
    with image.open("wb") as stream:
        stream.truncate(size)
    sentence = refused(cli("run", "--firmware", image))
    assert f"{image} has {size} bytes" in sentence
    assert "64 KiB to 16 MiB" in sentence


def test_a_rom_that_cannot_be_read_is_one_sentence(cli: Cli, tmp_path: Path) -> None:
    assert "cannot be read" in refused(cli("run", "--firmware", tmp_path / "nowhere"))
    assert str(tmp_path) in refused(cli("run", "--firmware", tmp_path))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["kernel"], "image"),
        (["--append", "x"], "--append"),
        (["--cmdline", "x"], "--cmdline"),
        (["--initrd", "x"], "--initrd"),
        (["--module", "x"], "--module"),
        (["kernel", "--", "./program"], "image"),
        (["--load", "x"], "--firmware"),
    ],
)
def test_firmware_is_not_given_a_kernel(cli: Cli, image: Path, words: list[str], named: str) -> None:
    image.write_bytes(rom("hlt"))
    assert f"leave {named} out" in refused_usage(cli("run", "--firmware", image, *words))


@pytest.fixture
def pulled_firmware(empty_cache: Path) -> Path:
    folder = empty_cache / "seabios" / "1.0.x"
    folder.mkdir(parents=True)
    (folder / "firmware.rom").write_bytes(rom(PRINT_EVERYWHERE))
    manifest = Manifest("seabios", "1.0", "sid", packages={}, sha256={"firmware.rom": ""}, date="2026-01-01")
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def test_pulled_firmware_runs_by_its_name(cli: Cli, pulled_firmware: Path) -> None:
    result = cli("run", "seabios", "-q", "--timeout", PATIENCE)
    assert (result.status, sorted(result.out.splitlines())) == (33, ["B", "E", "S"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--append", "x"], "--append"),
        (["--cmdline", "x"], "--cmdline"),
        (["--initrd", "x"], "--initrd"),
        (["--module", "x"], "--module"),
        (["--", "./program"], "the program"),
    ],
)
def test_pulled_firmware_is_not_given_a_kernel_either(
    cli: Cli, pulled_firmware: Path, words: list[str], named: str
) -> None:
    assert f"seabios is firmware, which is given no kernel; leave {named} out" in refused(
        cli("run", "seabios", *words)
    )


# ----------------------------------------------------------------------------------------------------- multiboot

#: Prints its command line, then that of each module with the first byte of its content, and ends with their number.
SHOW_EVERYTHING = """
    mov esp, 0x500000
    mov esi, [ebx + 16]; call show
    mov ebp, [ebx + 20]; mov edi, [ebx + 24]
    test ebp, ebp; je done
    next: mov esi, [edi + 8]; call show
    mov esi, [edi]; mov al, [esi]; out 0xe9, al
    mov al, 10; out 0xe9, al
    add edi, 16; dec ebp; jne next
    done: mov eax, [ebx + 20]; out 0xf4, eax
    show: mov al, [esi]; inc esi; test al, al; je shown; out 0xe9, al; jmp show
    shown: mov al, 10; out 0xe9, al; ret
"""


def test_a_multiboot_kernel_gets_its_command_line_and_modules(cli: Cli, image: Path, tmp_path: Path) -> None:
    image.write_bytes(multiboot(SHOW_EVERYTHING))
    for name in "abc":
        (tmp_path / name).write_text(name.upper())
    result = cli(
        "run", image, "-q", "--timeout", PATIENCE, "--append", "smap pku",
        "--module", tmp_path / "a", "--module", f"{tmp_path / 'b'},with words,and more", "--initrd", tmp_path / "c",
    )  # fmt: skip
    assert result.status == 3 << 1 | 1
    assert result.out.splitlines() == [
        f"{image} smap pku",
        f"{tmp_path / 'c'}",
        "C",
        f"{tmp_path / 'a'}",
        "A",
        f"{tmp_path / 'b'} with words,and more",
        "B",
    ]


def test_a_multiboot_kernel_has_the_test_device_and_others_do_not(cli: Cli, image: Path) -> None:
    touch = "mov eax, 0x12345678; out 0xe0, eax; in eax, 0xe0; shr eax, 24; out 0xf8, al"
    image.write_bytes(multiboot(touch))
    assert cli("run", image, "-q", "--timeout", PATIENCE).status == 0x12
    image.write_bytes(kernel(touch))
    assert cli("run", image, "-q", "--timeout", PATIENCE).status == 0xFF
    assert cli("run", image, "-q", "--timeout", PATIENCE, "--device", "pc-testdev").status == 0x12


def test_a_multiboot_kernel_uses_the_uart_and_the_status_is_from_the_exit_port(cli: Cli, image: Path) -> None:
    image.write_bytes(
        multiboot("""
            mov ecx, 3
            next: mov dx, 0x3fd
            ready: in al, dx; test al, 0x20; je ready
            mov dx, 0x3f8; mov al, 80; out dx, al; dec ecx; jne next
            mov eax, 5; out 0xf4, eax
        """)
    )
    result = cli("run", image, "-q", "--timeout", PATIENCE)
    assert (result.status, result.out, result.err) == (11, "PPP", "")


def overlapping_elf32() -> bytes:
    header = make_multiboot_header(3)
    return make_elf32(
        Load(LOAD_ADDRESS, header + b"\xf4" * 100), Load(LOAD_ADDRESS + 50, b"\xf4"), entry=LOAD_ADDRESS + 12
    )


def raw_multiboot(*addresses: int) -> bytes:
    return make_multiboot_header(1 << 16, *addresses) + b"\xf4" * 64


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (raw_multiboot(0x400000, 0x400000, 0x400000 + (1 << 20), 0, 0x400020), "but the file has"),
        (raw_multiboot(0x400000, 0x400000, 0x3F0000, 0, 0x400020), "not behind its load address"),
        (raw_multiboot(0x400000, 0x400000, 0, 0x400010, 0x400020), "behind the end of its bss"),
        (raw_multiboot(0x400000, 0x400000, 0, 0, 0x500000), "entry point at 0x500000 is outside"),
        (raw_multiboot(0x500000, 0x400000, 0, 0, 0x400020), "bytes into the file"),
        (raw_multiboot(0x400000, 0x400000, 0, 0xF000_0000, 0x400020), "not all guest RAM"),
        (make_multiboot_header(1 << 16), "ends inside its multiboot header"),
        (make_multiboot_header(3) + bytes(64), "not an ELF file"),
        (multiboot("hlt", flags=1 << 9), "requires what does not exist"),
        (overlapping_elf32(), "segments that overlap"),
        (multiboot("hlt")[:70], "truncated ELF file"),
    ],
)
def test_a_multiboot_kernel_that_lies_is_one_sentence(
    cli: Cli, image: Path, content: bytes, said: str
) -> None:
    image.write_bytes(content)
    sentence = refused(cli("run", image))
    assert said in sentence
    assert str(image) in sentence


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("/nowhere/module", "module /nowhere/module cannot be read"),
        ("/nowhere/module,with words", "module /nowhere/module cannot be read"),
        (",words", "has no file; write FILE[,ARGS]"),
        ("", "has no file; write FILE[,ARGS]"),
        ("/", "module / cannot be read"),
    ],
)
def test_a_module_that_cannot_be_read_is_one_sentence(cli: Cli, image: Path, module: str, said: str) -> None:
    image.write_bytes(multiboot(DONE))
    assert said in refused(cli("run", image, "--module", module))


def test_a_module_larger_than_memory_is_one_sentence(cli: Cli, image: Path, tmp_path: Path) -> None:
    image.write_bytes(multiboot(DONE))
    with (tmp_path / "module").open("wb") as stream:
        stream.truncate(20 * MIB)
    sentence = refused(cli("run", image, "--memory", 16, "--module", tmp_path / "module"))
    assert "does not fit beside the image" in sentence


def test_a_linux_kernel_takes_no_modules(cli: Cli, image: Path) -> None:
    image.write_bytes(kernel("hlt"))
    assert "give it an initrd" in refused(cli("run", image, "--module", image))


# ------------------------------------------------------------------------------------------------------- devices


def test_devices_can_be_added(cli: Cli, image: Path) -> None:
    image.write_bytes(kernel("mov dx, 0x402; mov al, 66; out dx, al; mov dx, 0x501; mov al, 3; out dx, al"))
    result = cli(
        "run", image, "-q", "--timeout", PATIENCE,
        "--device", "isa-debugcon,iobase=0x402", "--device", "isa-debug-exit,iobase=0x501,iosize=2",
    )  # fmt: skip
    assert (result.status, result.out) == (7, "B")


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("floppy", "choose from: pc-testdev, isa-debug-exit, isa-debugcon"),
        ("isa-debug-ext", 'did you mean "isa-debug-exit"'),
        ("", "choose from"),
        ("pc-testdev,iobase=3", "has no property"),
        ("isa-debugcon,iobase=high", "is no number"),
        ("isa-debugcon,iobase=0", "can be 1 to 0xffff"),
        ("isa-debugcon,iobase=0xf4", "already used by DebugExit"),
        ("isa-debugcon,iobase=0x3f8", "already used by Uart16550"),
        ("isa-debug-exit,iobase=0x40", "already used by Pit"),
    ],
)
def test_a_device_that_cannot_be_is_one_sentence(cli: Cli, image: Path, device: str, said: str) -> None:
    image.write_bytes(kernel("hlt"))
    assert said in refused(cli("run", image, "--device", device))


# ------------------------------------------------------------------------------- what follows resets and shutdowns


@pytest.mark.parametrize(
    ("how", "words", "status", "output"),
    [
        (RESET, (), 3, "123"),
        (RESET, ("--on-reset", "reset"), 3, "123"),
        (RESET, ("--on-reset", "exit"), 0, "1"),
        (RESET, ("--on-reset", "exit", "--on-shutdown", "reset"), 0, "1"),
        (TRIPLE_FAULT, (), 1, "1"),
        (TRIPLE_FAULT, ("--on-shutdown", "exit"), 1, "1"),
        (TRIPLE_FAULT, ("--on-shutdown", "reset"), 3, "123"),
        (TRIPLE_FAULT, ("--on-shutdown", "reset", "--on-reset", "exit"), 3, "123"),
    ],
)
def test_a_reset_and_a_triple_fault_start_again_or_end_the_run(
    cli: Cli, image: Path, how: str, words: tuple[str, ...], status: int, output: str
) -> None:
    image.write_bytes(kernel(COUNT + how + ENOUGH))
    result = cli("run", image, "-q", "--timeout", PATIENCE, *words)
    assert (result.status, result.out) == (status, output)


@pytest.mark.parametrize("option", ["--on-reset", "--on-shutdown"])
def test_nothing_else_can_follow(cli: Cli, image: Path, option: str) -> None:
    image.write_bytes(kernel("hlt"))
    assert "'panic' is not one of 'reset', 'exit'" in refused_usage(cli("run", image, option, "panic"))


def test_a_guest_that_starts_again_for_ever_is_ended_at_the_time_limit(cli: Cli, image: Path) -> None:
    image.write_bytes(kernel(TRIPLE_FAULT))
    result = cli("run", image, "-q", "--timeout", 1, "--on-shutdown", "reset")
    assert result.status == 124
    assert "time limit" in result.error


#: Writes the kernel command line to the debug console.
SHOW_COMMAND_LINE = (
    "mov esi, [rsi + 0x228]; next: mov al, [rsi]; inc rsi; out 0xe9, al; test al, al; jne next; out 0xf8, al"
)


def test_a_panic_of_linux_restarts_at_once_where_that_ends_the_run(cli: Cli, image: Path) -> None:
    image.write_bytes(kernel(SHOW_COMMAND_LINE))
    assert "panic" not in cli("run", image, "--timeout", PATIENCE).out
    assert "panic=-1" in cli("run", image, "--timeout", PATIENCE, "--on-reset", "exit").out.split()


@pytest.fixture
def program(empty_cache: Path, tmp_path: Path) -> Path:
    """A program to run, and a pulled image with something to run it."""
    folder = empty_cache / "debian" / "1.0.x"
    folder.mkdir(parents=True)
    (folder / "vmlinuz").write_bytes(kernel(COUNT + RESET + ENOUGH))
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
    path = tmp_path / "program"
    path.write_bytes(elf(b"\xf4"))
    path.chmod(0o755)
    return path


def test_a_reset_under_a_program_ends_the_run_with_a_sentence(cli: Cli, program: Path) -> None:
    result = cli("run", "debian", "-q", "--timeout", PATIENCE, "--", program)
    assert (result.status, result.out) == (1, "1")
    assert "asked for a reset before the program had ended" in result.error


def test_a_reset_under_a_program_can_start_again(cli: Cli, program: Path) -> None:
    result = cli("run", "debian", "-q", "--timeout", PATIENCE, "--on-reset", "reset", "--", program)
    assert (result.status, result.out) == (3, "123")


def test_a_machine_that_was_saved_ends_at_a_reset(cli: Cli, image: Path, tmp_path: Path) -> None:
    image.write_bytes(kernel("mov ecx, 20000000; spin: dec ecx; jne spin;" + RESET + "hang: jmp hang"))
    saved = tmp_path / "saved"
    assert cli("run", image, "-q", "--timeout", PATIENCE, "--save", saved, "--save-after", "0.1").status == 0
    assert cli("run", "--load", saved, "-q", "--timeout", PATIENCE).status == 0
