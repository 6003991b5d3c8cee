"""The devices by which unit-test kernels talk to the machine, as a guest sees them."""

from __future__ import annotations

import pytest
from pc_guests import DATA, ENGINES, Output, build, run

from lasskvm.errors import DeviceError
from lasskvm.kvm import ExecutionEngine
from lasskvm.machine.ending import End, Ending
from lasskvm.machine.optional_devices import DeviceRequest, parse_device

PC_TESTDEV = DeviceRequest("pc-testdev")
TEST_MEMORY = 0xFF000000
DONE = "xor eax, eax; out 0xf8, al"


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> ExecutionEngine:
    """Each engine in turn."""
    return request.param


# ---------------------------------------------------------------------------------------------------- pc-testdev


def test_the_register_is_reached_at_once_and_byte_by_byte(engine: ExecutionEngine) -> None:
    ending, _, vm = run(
        f"""
        mov eax, 0x12345678; out 0xe0, eax
        xor eax, eax; in al, 0xe9; mov [{DATA:#x}], eax
        xor eax, eax; in al, 0xea; mov [{DATA + 4:#x}], eax
        mov al, 0x9a; out 0xeb, al
        in eax, 0xe0; mov [{DATA + 8:#x}], eax
        mov ax, 0xbeef; out 0xe0, ax
        in eax, 0xe0; mov [{DATA + 12:#x}], eax
        {DONE}
        """,
        engine=engine,
        devices=[PC_TESTDEV],
    )
    assert ending.end is End.PROGRAM
    assert vm.memory.load(DATA + 4, 4) == 0x34
    assert vm.memory.load(DATA + 8, 4) == 0x9A345678
    assert vm.memory.load(DATA + 12, 4) == 0x9A34BEEF


def test_the_debug_console_has_its_port_amid_the_registers(engine: ExecutionEngine) -> None:
    ending, output, _ = run(
        f"mov eax, 0x55555555; out 0xe0, eax; mov al, 65; out 0xe9, al; in al, 0xe9; out 0xe9, al; {DONE}",
        engine=engine,
        devices=[PC_TESTDEV],
    )
    assert ending.end is End.PROGRAM
    assert output == b"A\xe9"


def test_the_test_memory_keeps_what_is_stored_in_every_width(engine: ExecutionEngine) -> None:
    ending, _, vm = run(
        f"""
        mov ebx, {TEST_MEMORY:#x}
        mov rax, 0x1122334455667788; mov [rbx], rax
        mov byte [rbx + 1], 0xaa
        mov word [rbx + 2], 0xbbbb
        mov dword [rbx + 0xfffc], 0xdddddddd
        mov rax, [rbx]; mov [{DATA:#x}], rax
        movzx eax, byte [rbx + 1]; mov [{DATA + 8:#x}], rax
        movzx eax, word [rbx + 1]; mov [{DATA + 16:#x}], rax
        mov eax, [rbx + 0xfffc]; mov [{DATA + 24:#x}], rax
        lock xadd [rbx + 8], rax; lock add qword [rbx + 8], 1
        mov rax, [rbx + 8]; mov [{DATA + 32:#x}], rax
        {DONE}
        """,
        engine=engine,
        devices=[PC_TESTDEV],
    )
    assert ending.end is End.PROGRAM
    assert vm.memory.load(DATA, 8) == 0x11223344BBBBAA88
    assert vm.memory.load(DATA + 8, 8) == 0xAA
    assert vm.memory.load(DATA + 16, 8) == 0xBBAA
    assert vm.memory.load(DATA + 24, 8) == 0xDDDDDDDD
    assert vm.memory.load(DATA + 32, 8) == 0xDDDDDDDE


def test_strings_move_to_and_from_the_test_memory(engine: ExecutionEngine) -> None:
    ending, _, vm = run(
        f"""
        lea rsi, [rip + text]; mov edi, {TEST_MEMORY + 0x100:#x}; mov ecx, 16; rep movsb
        mov esi, {TEST_MEMORY + 0x100:#x}; mov edi, {DATA:#x}; mov ecx, 2; rep movsq
        {DONE}
        text: dq 0x0807060504030201, 0x100f0e0d0c0b0a09
        """,
        engine=engine,
        devices=[PC_TESTDEV],
    )
    assert ending.end is End.PROGRAM
    assert vm.memory.read(DATA, 16) == bytes(range(1, 17))


def test_beside_the_test_memory_is_nothing(engine: ExecutionEngine) -> None:
    ending, _, vm = run(
        f"""
        mov ebx, {TEST_MEMORY + 0x10000:#x}
        mov dword [rbx], 0x12345678; mov eax, [rbx]; mov [{DATA:#x}], eax
        {DONE}
        """,
        engine=engine,
        devices=[PC_TESTDEV],
    )
    assert ending.end is End.PROGRAM
    assert vm.memory.load(DATA, 4) == 0xFFFFFFFF


def test_the_port_that_flushes_a_page_changes_nothing_that_a_guest_sees() -> None:
    ending, output, _ = run(
        f"mov eax, {DATA:#x}; mov byte [rax], 66; out 0xe4, eax; mov al, [{DATA:#x}]; out 0xe9, al; {DONE}",
        devices=[PC_TESTDEV],
    )
    assert ending.end is End.PROGRAM
    assert output == b"B"


@pytest.mark.parametrize("source", ["in eax, 0xe0", f"mov ebx, {TEST_MEMORY:#x}; mov eax, [rbx]"])
def test_without_the_device_nobody_answers(source: str) -> None:
    _, _, vm = run(f"{source}; mov [{DATA:#x}], eax; {DONE}")
    assert vm.memory.load(DATA, 4) == 0xFFFFFFFF


# --------------------------------------------------------------------------------- consoles and exits elsewhere


def test_a_second_debug_console_writes_to_the_same_output(engine: ExecutionEngine) -> None:
    ending, output, _ = run(
        f"mov al, 65; out 0xe9, al; mov dx, 0x402; mov al, 66; out dx, al; in al, dx; out dx, al; {DONE}",
        engine=engine,
        devices=[parse_device("isa-debugcon,iobase=0x402")],
    )
    assert ending.end is End.PROGRAM
    assert sorted(output) == sorted(b"AB\xe9")


@pytest.mark.parametrize(("port", "size"), [(0x501, "al"), (0x501, "ax"), (0xF4, "eax")])
def test_an_exit_port_can_be_elsewhere_and_the_usual_one_stays(port: int, size: str) -> None:
    ending, _, _ = run(
        f"mov dx, {port:#x}; mov eax, 0x21; out dx, {size}",
        devices=[parse_device("isa-debug-exit,iobase=0x501,iosize=2")],
    )
    assert ending == Ending(End.DEBUG_EXIT, 0x43)


@pytest.mark.parametrize("text", ["isa-debug-exit,iobase=0xf4,iosize=4", "isa-debugcon", "pc-testdev"])
def test_a_device_that_is_there_already_may_be_named(text: str) -> None:
    ending, output, _ = run(
        "mov al, 67; out 0xe9, al; xor eax, eax; out 0xf4, al",
        devices=[parse_device(text), parse_device(text)],
    )
    assert ending == Ending(End.DEBUG_EXIT, 1)
    assert output == b"C"


@pytest.mark.parametrize(
    "text",
    [
        "isa-debugcon,iobase=0xf4",
        "isa-debug-exit,iobase=0xe9",
        "isa-debug-exit,iobase=0xf4,iosize=2",
        # These have their ports on the bus inside the VM.
        "isa-debugcon,iobase=0x3f8",
        "isa-debug-exit,iobase=0x510",
        "isa-debugcon,iobase=0x40",
        "isa-debugcon,iobase=0x71",
    ],
)
def test_a_device_on_ports_that_are_taken_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(DeviceError, match=r"already used by .* give .* another base port"):
        build(DONE, Output(), devices=[parse_device(text)])


# ---------------------------------------------------------------------------------------------------- its lines


def test_a_line_of_the_test_device_is_a_gsi(engine: ExecutionEngine) -> None:
    # IRQ 10 through the 8259As: vector 2AH.
    ending, _, _ = run(
        """
        mov al, 0x11; out 0x20, al; out 0xa0, al
        mov al, 0x20; out 0x21, al; mov al, 0x28; out 0xa1, al
        mov al, 4; out 0x21, al; mov al, 2; out 0xa1, al
        mov al, 1; out 0x21, al; out 0xa1, al
        mov al, 0; out 0x21, al; out 0xa1, al
        mov dx, 0x200a; mov al, 1; out dx, al
        sti; nop; nop
        mov al, 99; out 0xf8, al
        irq: mov al, 10; out 0xf8, al
        """,
        handlers={0x2A: "irq"},
        engine=engine,
        devices=[PC_TESTDEV],
    )
    assert ending == Ending(End.PROGRAM, 10)
