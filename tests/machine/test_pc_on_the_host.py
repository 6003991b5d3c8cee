"""The PC on /dev/kvm: the same board, whose devices answer from exits and whose interrupts come from the kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from lasskvm.conformance.assembler import assemble
from lasskvm.errors import HostError
from lasskvm.kvm import host
from lasskvm.machine.boot.entry import prepare_long_mode
from lasskvm.machine.pc import End, Ending, Pc
from lasskvm.machine.provider import offered_cpu
from lasskvm.x86.cpu_models import CpuModel, parse_cpu
from lasskvm.x86.cpuid import FEATURES, CpuidEntry, CpuidTable

MIB = 1 << 20
CODE = 0x100000
#: More than any of these guests takes, so that a hang is a failed test and not a hung one.
PATIENCE = 30.0

Run = Callable[..., tuple[Ending, bytes]]


@pytest.fixture
def run() -> Iterator[Run]:
    """Run a program on a PC of /dev/kvm."""
    try:
        host.System().close()
    except HostError as error:
        pytest.skip(str(error))
    machines = []

    def run_program(source: str, timeout: float = PATIENCE, received: bytes = b"") -> tuple[Ending, bytes]:
        output = bytearray()
        pc = Pc(8 * MIB, parse_cpu("max"), output=output.extend, provider="host")
        machines.append(pc)
        pc.vm.memory.write(CODE, assemble(source, CODE).code)
        pc.enter(prepare_long_mode(pc.vm.memory, CODE))
        pc.uart.receive(received)
        return pc.run(timeout), bytes(output)

    yield run_program
    for pc in machines:
        pc.close()


def test_the_serial_port_and_the_debug_console_are_output(run: Run) -> None:
    ending, output = run("""
        mov dx, 0x3f8; mov al, 72; out dx, al
        mov al, 105; out 0xe9, al
        xor eax, eax; out 0xf8, al
    """)
    assert (ending, output) == (Ending(End.PROGRAM, 0), b"Hi")


def test_the_serial_port_is_input(run: Run) -> None:
    ending, _ = run("mov dx, 0x3f8; in al, dx; out 0xf8, al", received=b"\x2a")
    assert ending == Ending(End.PROGRAM, 0x2A)


def test_a_port_that_nobody_answers_reads_all_ones(run: Run) -> None:
    ending, _ = run("mov dx, 0x5c0; in eax, dx; inc eax; out 0xf8, al")
    assert ending == Ending(End.PROGRAM, 0)


def test_memory_that_is_not_there_reads_all_ones(run: Run) -> None:
    ending, _ = run("mov ebx, 0xd0000000; mov [rbx], ebx; mov eax, [rbx]; inc eax; out 0xf8, al")
    assert ending == Ending(End.PROGRAM, 0)


def test_a_time_limit_ends_a_guest_that_spins(run: Run) -> None:
    started = time.monotonic()
    ending, _ = run("again: jmp again", timeout=0.2)
    assert (ending.end, ending.status) == (End.TIMEOUT, 124)
    assert time.monotonic() - started >= 0.2


def test_halting_with_interrupts_off_is_the_end(run: Run) -> None:
    assert run("cli; hlt")[0] == Ending(End.HALTED, 0)


def test_halting_with_interrupts_on_waits_for_the_time_limit(run: Run) -> None:
    assert run("sti; nop; hlt", timeout=0.2)[0].end is End.TIMEOUT


def test_a_triple_fault_is_a_crash_that_says_where(run: Run) -> None:
    ending, _ = run("ud2")
    assert (ending.end, ending.status) == (End.TRIPLE_FAULT, 1)
    assert f"RIP {CODE:#x}" in ending.detail


def test_a_reset_is_the_end(run: Run) -> None:
    assert run("mov al, 0xfe; out 0x64, al; hlt")[0] == Ending(End.RESET, 0)


#: An interrupt gate for vector 20H + IRQ, the 8259As, and an idle loop; the handler reports the status 7.
INTERRUPT_SETUP = """
    lea rax, [handler]; mov rbx, {gate}
    mov [rbx], ax; mov word [rbx + 2], 0x10; mov word [rbx + 4], 0x8e00
    shr rax, 16; mov [rbx + 6], ax; shr rax, 16; mov [rbx + 8], rax
    mov word [0x6000], 0xfff; mov qword [0x6002], 0x5000; lidt [0x6000]
    mov al, 0x11; out 0x20, al; out 0xa0, al; mov al, 0x20; out 0x21, al; mov al, 0x28; out 0xa1, al
    mov al, 4; out 0x21, al; mov al, 2; out 0xa1, al; mov al, 1; out 0x21, al; out 0xa1, al
    mov al, {first_mask}; out 0x21, al; mov al, {second_mask}; out 0xa1, al
    {device}
    sti
idle: hlt; jmp idle
handler: mov al, 7; out 0xf8, al
"""


def interrupt_program(irq: int, device: str) -> str:
    masks = 0xFFFF & ~(1 << irq) & ~(1 << 2)
    return INTERRUPT_SETUP.format(
        gate=0x5000 + 16 * (0x20 + irq), first_mask=masks & 0xFF, second_mask=masks >> 8, device=device
    )


def test_the_timer_of_the_kernel_interrupts_a_halted_guest(run: Run) -> None:
    program = interrupt_program(0, "mov al, 0x34; out 0x43, al; mov al, 0; out 0x40, al; out 0x40, al")
    assert run(program)[0] == Ending(End.PROGRAM, 7)


def test_input_on_the_serial_port_interrupts_a_halted_guest(run: Run) -> None:
    enable = "mov dx, 0x3f9; mov al, 1; out dx, al; mov dx, 0x3fc; mov al, 8; out dx, al"
    assert run(interrupt_program(4, enable), received=b"x")[0] == Ending(End.PROGRAM, 7)


def test_the_clock_chip_interrupts_a_halted_guest_in_the_hosts_time(run: Run) -> None:
    enable_periodic = "mov al, 0xb; out 0x70, al; mov al, 0x42; out 0x71, al"
    assert run(interrupt_program(8, enable_periodic))[0] == Ending(End.PROGRAM, 7)


# --------------------------------------------------------------------------------------------------------- the CPU


def host_entries(*features: str) -> tuple[CpuidEntry, ...]:
    cpu = CpuModel("host", frozenset(features), vendor="AuthenticAMD", signature=0xA20F10, maxphyaddr=40)
    return cpu.entries()


def test_a_guest_is_offered_what_both_the_model_and_the_host_have() -> None:
    offered = offered_cpu(parse_cpu("max"), host_entries("lm", "sse2", "avx"), tsc_khz=2_500_000)
    assert offered.features == {"lm", "sse2"}
    assert (offered.vendor, offered.signature, offered.maxphyaddr) == ("AuthenticAMD", 0xA20F10, 40)


def test_the_guest_reads_the_hosts_frequency() -> None:
    intel = CpuModel("host", frozenset({"lm"})).entries()
    offered = offered_cpu(parse_cpu("max"), intel, tsc_khz=2_500_000)
    denominator, numerator, crystal, _ = CpuidTable(offered.entries()).lookup(0x15, 0)
    assert crystal * numerator // denominator == 2_500_000_000


def test_lass_is_not_offered_where_the_host_lacks_it() -> None:
    without = offered_cpu(parse_cpu("max"), host_entries("lm"), tsc_khz=1)
    having = offered_cpu(parse_cpu("max"), host_entries("lm", "lass"), tsc_khz=1)
    assert ("lass" in without.features, "lass" in having.features) == (False, True)
    assert FEATURES["lass"].leaf == 7
