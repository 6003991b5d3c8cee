"""How a PC ends: by the guest's own word, by its crash, or because it does not end."""

from __future__ import annotations

import time

import pytest

from lasskvm.conformance.assembler import assemble
from lasskvm.errors import MemoryLayoutError
from lasskvm.kvm import HostClock
from lasskvm.machine.boot.entry import prepare_long_mode
from lasskvm.machine.pc import End, Ending, Pc
from lasskvm.x86.cpu_models import parse_cpu

MIB = 1 << 20
CODE = 0x100000
#: More than any of these guests takes, so that a hang is a failed test and not a hung one.
PATIENCE = 60.0


class Output:
    """What the guest wrote."""

    def __init__(self) -> None:
        self.data = b""

    def __call__(self, data: bytes) -> None:
        self.data += data


def build(source: str, output: Output, *, memory: int = 8 * MIB, host_clock: bool = False) -> Pc:
    pc = Pc(memory, parse_cpu("max"), output=output, clock=HostClock() if host_clock else None)
    pc.vm.memory.write(CODE, assemble(source, CODE).code)
    pc.enter(prepare_long_mode(pc.vm.memory, CODE))
    return pc


def run(source: str, *, timeout: float = PATIENCE, **options: bool) -> tuple[Ending, bytes]:
    output = Output()
    ending = build(source, output, **options).run(timeout)
    return ending, output.data


def test_the_serial_port_and_the_debug_console_are_output() -> None:
    ending, output = run("""
        mov dx, 0x3f8; mov al, 72; out dx, al
        mov al, 105; out 0xe9, al
        xor eax, eax; out 0xf8, al
    """)
    assert output == b"Hi"
    assert ending == Ending(End.PROGRAM, 0)


@pytest.mark.parametrize("status", [0, 1, 2, 255])
def test_a_byte_to_the_program_status_port_is_the_status(status: int) -> None:
    ending, _ = run(f"mov al, {status}; out 0xf8, al")
    assert ending == Ending(End.PROGRAM, status)


@pytest.mark.parametrize(("value", "status"), [(0, 1), (0x10, 33), (0x7F, 255)])
def test_the_debug_exit_port_makes_every_status_odd(value: int, status: int) -> None:
    ending, _ = run(f"mov eax, {value}; out 0xf4, eax")
    assert ending == Ending(End.DEBUG_EXIT, status)


@pytest.mark.parametrize("behind", ["int3", "out 0xf4, al", "cli; hlt"])
def test_what_stands_behind_a_reset_in_the_code_does_not_happen(behind: str) -> None:
    ending, _ = run(f"mov dx, 0xcf9; mov al, 6; out dx, al; {behind}")
    assert ending == Ending(End.RESET, 0)


def test_a_halt_with_interrupts_off_is_the_end() -> None:
    ending, _ = run("cli; hlt")
    assert ending == Ending(End.HALTED, 0)


@pytest.mark.parametrize(
    "source",
    [
        "mov al, 0xfe; out 0x64, al",
        "mov al, 1; out 0x92, al",
        "mov dx, 0xcf9; mov al, 6; out dx, al",
    ],
)
def test_a_reset_is_the_end_of_what_cannot_start_again(source: str) -> None:
    ending, _ = run(source)
    assert ending == Ending(End.RESET, 0)


def test_a_triple_fault_is_a_crash_that_says_where() -> None:
    # There is no IDT, so neither #UD nor the #DF behind it can be delivered.
    ending, _ = run("ud2")
    assert (ending.end, ending.status) == (End.TRIPLE_FAULT, 1)
    assert f"RIP {CODE:#x}" in ending.detail


def test_a_jump_to_a_hole_in_memory_is_a_crash_that_says_where() -> None:
    ending, _ = run("mov eax, 0x80000000; jmp rax")
    assert (ending.end, ending.status) == (End.INTERNAL_ERROR, 1)
    assert "0x80000000" in ending.detail


@pytest.mark.parametrize("host_clock", [False, True])
@pytest.mark.parametrize(
    "source",
    [
        "again: jmp again",
        "again: out 0xe9, al; jmp again",
        "again: in al, 0x64; jmp again",
        "again: mov dx, 0x3fd; in al, dx; jmp again",
        "again: cpuid; jmp again",
        "again: sti; hlt; jmp again",
    ],
)
def test_a_loop_ends_at_the_time_limit(source: str, host_clock: bool) -> None:
    ending, _ = run(source, timeout=0.2, host_clock=host_clock)
    assert (ending.end, ending.status) == (End.TIMEOUT, 124)
    assert "RIP 0x100" in ending.detail


def test_writing_and_reading_every_port_ends_nothing() -> None:
    # A write to 0xf4 or 0xf8 does end the run, and so does a wide one that reaches them. What is written to
    # 0x64 and 0x92 here does not.
    ending, _ = run("""
        cli
        xor edx, edx
    next:
        xor eax, eax
        cmp edx, 0xf1
        jb touch
        cmp edx, 0xf8
        jbe skip
    touch:
        out dx, al
        in al, dx
        cmp edx, 0x400
        jae skip
        xor eax, eax
        out dx, ax
        out dx, eax
        in ax, dx
        in eax, dx
    skip:
        inc edx
        cmp edx, 0x10000
        jb next
        mov al, 42
        out 0xf8, al
    """)
    assert ending == Ending(End.PROGRAM, 42)


def test_writing_every_msr_is_refused_or_done_but_ends_nothing() -> None:
    idt, gates = 0x200000, 256
    source = f"""
        mov edi, {idt}; xor eax, eax; mov ecx, {gates * 16 // 4}; rep stosd
        lea rax, [handler]
        mov edi, {idt + 13 * 16}
        mov [rdi], ax
        mov word [rdi + 2], 0x10
        mov word [rdi + 4], 0x8e00
        shr rax, 16
        mov [rdi + 6], ax
        sub rsp, 16
        mov word [rsp], {gates * 16 - 1}
        mov qword [rsp + 2], {idt}
        lidt [rsp]
        mov ecx, 0
        call touch
        mov ecx, 0x40000000
        call touch
        mov ecx, 0xc0000000
        call touch
        mov al, 7
        out 0xf8, al
    touch:
        lea esi, [rcx + 0x1100]
    next:
        cmp ecx, 0xc0000080
        je skip
        xor edx, edx
        mov eax, 0x4
        wrmsr
        rdmsr
    skip:
        inc ecx
        cmp ecx, esi
        jb next
        ret
    handler:
        add rsp, 8
        add qword [rsp], 2
        iretq
    """
    ending, _ = run(source)
    assert ending == Ending(End.PROGRAM, 7)


def test_two_runs_on_the_virtual_clock_see_the_same_time() -> None:
    source = """
        mov ecx, 1000
    again:
        dec ecx
        jne again
        rdtsc
        mov ecx, 8
    show:
        out 0xe9, al
        shr rax, 4
        loop show
        out 0xf8, al
    """
    first, second = run(source), run(source)
    assert first == second
    assert len(first[1]) == 8


def test_memory_beyond_the_device_hole_continues_at_four_gib() -> None:
    output = Output()
    pc = build("hlt", output, memory=0xC010_0000)
    pc.vm.memory.store(0x1_0000_0000, 8, 0x1234)
    assert pc.vm.memory.load(0x1_0000_0000, 8) == 0x1234
    assert pc.vm.memory_size == 0xC010_0000


@pytest.mark.parametrize(
    ("size", "said"), [(3 * MIB, "at least 4"), (0, "at least 4"), (1 << 50, "this host has")]
)
def test_impossible_memory_sizes_are_refused(size: int, said: str) -> None:
    with pytest.raises(MemoryLayoutError, match=said):
        Pc(size, parse_cpu("max"), output=Output())


def test_a_failing_output_ends_the_run_with_its_own_error() -> None:
    def refuse(data: bytes) -> None:
        raise BrokenPipeError

    pc = Pc(8 * MIB, parse_cpu("max"), output=refuse)
    pc.vm.memory.write(CODE, assemble("mov dx, 0x3f8; out dx, al; hlt", CODE).code)
    pc.enter(prepare_long_mode(pc.vm.memory, CODE))
    with pytest.raises(BrokenPipeError):
        pc.run(PATIENCE)


def test_the_console_can_stop_a_run() -> None:
    pc: Pc

    def idle(nanoseconds: int | None) -> None:
        pc.stop()

    pc = Pc(8 * MIB, parse_cpu("max"), output=Output(), idle=idle)
    pc.vm.memory.write(CODE, assemble("again: jmp again", CODE).code)
    pc.enter(prepare_long_mode(pc.vm.memory, CODE))
    assert pc.run(PATIENCE) == Ending(End.STOPPED, 0)


def test_statistics_count_blocks_and_guest_time() -> None:
    pc = build("mov ecx, 1000; again: dec ecx; jne again; out 0xf8, al", Output())
    started = time.monotonic()
    pc.run(PATIENCE)
    statistics = pc.statistics()
    assert statistics["executed_blocks"] >= 1000
    assert statistics["guest_nanoseconds"] >= 10 * 1000
    assert time.monotonic() - started < PATIENCE
    assert "fills" in statistics
