"""A PC saved and loaded goes on as if nothing had happened, byte for byte."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from lasskvm.conformance.assembler import assemble
from lasskvm.errors import SnapshotError
from lasskvm.kvm import ExecutionEngine, HostClock, Vm
from lasskvm.kvm.vcpu import CHECKPOINT_NS
from lasskvm.machine.boot.entry import prepare_long_mode
from lasskvm.machine.devices.rtc import Rtc
from lasskvm.machine.devices.uart16550 import Uart16550
from lasskvm.machine.pc import End, Pc
from lasskvm.x86.cpu_models import parse_cpu

MIB = 1 << 20
CODE = 0x100000
PATIENCE = 60.0
#: Changes its own code now and then, runs it many times, waits for a timer interrupt, and prints: what the code gave,
#: the time-stamp counter, how many interrupts there were, an entry of its page tables, what the PIT counts, and a
#: number that it keeps in an x87 register. It clears the accessed bit of that entry without a word to the processor, so
#: the bit comes back when translations have been forgotten for other reasons. Ends with status 0.
PROGRAM = """
    lidt [rip + idtr]
    mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al
    mov al, 1; out 0x21, al; mov al, 0xfe; out 0x21, al
    mov al, 0x34; out 0x43, al; mov al, 0; out 0x40, al; mov al, 0x40; out 0x40, al
    lea rbx, [rip + timer]
    lea rcx, [rip + gate]
    mov [rcx], bx; shr rbx, 16; mov [rcx + 6], bx; shr rbx, 16; mov [rcx + 8], ebx
    fldz; fld1
    mov rsi, cr3
    mov r14, [rsi]
    and r14, -4096
    mov r15d, ROUNDS
round:
    test r15d, 15
    jne unchanged
    add dword [rip + patched + 1], 1
unchanged:
    and qword [r14], -33
    mov ecx, LOOPS
spin:
patched:
    mov eax, 0
    dec ecx
    jne spin
    mov r13, [r14]
    call print
    fadd st1, st0
    sti; hlt; cli
    rdtsc
    call print
    mov eax, [rip + ticks]
    call print
    mov rax, r13
    call print
    mov al, 0; out 0x43, al; in al, 0x40; mov ah, al; in al, 0x40
    call print
    sub rsp, 8; fld st1; fstp qword [rsp]; pop rax; shr rax, 32
    call print
    dec r15d
    jne round
    xor eax, eax
    out 0xf8, al
print:
    mov ecx, 8
    mov dx, 0x3f8
digit:
    rol eax, 4
    mov ebx, eax
    and al, 15
    add al, 48
    out dx, al
    mov eax, ebx
    dec ecx
    jne digit
    mov al, 10
    out dx, al
    ret
timer:
    push rax
    inc dword [rip + ticks]
    mov al, 0x20
    out 0x20, al
    pop rax
    iretq
ticks: dd 0
idtr: dw 0xfff
    dq 0x108000
"""
IDT, VECTOR = 0x108000, 0x20
LOOPS = {"jit": 300_000, "emulator": 2_000}
ROUNDS = {"jit": 60, "emulator": 60}


class Output:
    """What the guest wrote."""

    def __init__(self) -> None:
        self.data = b""

    def __call__(self, data: bytes) -> None:
        self.data += data


def build(engine: ExecutionEngine, output: Output, *, host_clock: bool = False) -> Pc:
    pc = Pc(
        8 * MIB,
        parse_cpu("max,-lass"),
        output=output,
        clock=HostClock() if host_clock else None,
        engine=engine,
    )
    gate = IDT + 16 * VECTOR
    source = PROGRAM.replace("LOOPS", str(LOOPS[engine])).replace("ROUNDS", str(ROUNDS[engine]))
    source = source.replace("lea rcx, [rip + gate]", f"mov ecx, {gate:#x}")
    pc.vm.memory.write(CODE, assemble(source, CODE).code)
    entry = prepare_long_mode(pc.vm.memory, CODE)
    # An interrupt gate for the timer; the program adds the address.
    pc.vm.memory.store(gate + 2, 2, entry.code_segment.selector)
    pc.vm.memory.store(gate + 5, 1, 0x8E)
    pc.enter(entry)
    return pc


@pytest.mark.parametrize("engine", ["jit", "emulator"])
def test_a_saved_machine_goes_on_as_if_it_had_never_been_saved(
    tmp_path: Path, engine: ExecutionEngine
) -> None:
    whole = Output()
    pc = build(engine, whole)
    assert pc.run(PATIENCE).end is End.PROGRAM
    length = pc.clock.now()
    assert length > 3 * CHECKPOINT_NS
    for part in (0.2, 0.5, 0.8):
        first, second = Output(), Output()
        saved = build(engine, first)
        saved.save_at(tmp_path / "pc", int(length * part))
        assert saved.run(PATIENCE).end is End.SAVED
        loaded = Pc.load(tmp_path / "pc", output=second)
        assert loaded.run(PATIENCE).end is End.PROGRAM
        assert first.data
        assert first.data + second.data == whole.data
        assert loaded.clock.now() == length


def test_a_machine_can_be_saved_again_and_again(tmp_path: Path) -> None:
    whole = Output()
    assert build("jit", whole).run(PATIENCE).end is End.PROGRAM
    output = Output()
    pc = build("jit", output)
    for number in itertools.count(1):
        pc.save_at(tmp_path / "pc", number * CHECKPOINT_NS)
        if pc.run(PATIENCE).end is End.PROGRAM:
            break
        pc = Pc.load(tmp_path / "pc", output=output)
    assert number > 3
    assert output.data == whole.data


def test_a_machine_saved_at_its_time_limit_goes_on_where_it_was(tmp_path: Path) -> None:
    output = Output()
    pc = build("jit", output, host_clock=True)
    assert pc.run(0.01).end is End.TIMEOUT
    pc.save(tmp_path / "pc")
    loaded = Pc.load(tmp_path / "pc", output=output)
    assert loaded.clock.now() >= pc.clock.now() - 1_000_000_000
    assert loaded.vcpu.get_regs() == pc.vcpu.get_regs()
    assert loaded.run(PATIENCE).end is End.PROGRAM
    assert len(output.data.splitlines()) == 6 * ROUNDS["jit"]


def test_a_machine_can_be_saved_before_it_runs(tmp_path: Path) -> None:
    output = Output()
    build("jit", Output()).save(tmp_path / "pc")
    assert Pc.load(tmp_path / "pc", output=output).run(PATIENCE).end is End.PROGRAM
    assert len(output.data.splitlines()) == 6 * ROUNDS["jit"]


def test_a_machine_at_its_end_is_not_saved(tmp_path: Path) -> None:
    pc = build("jit", Output())
    pc.run(PATIENCE)
    with pytest.raises(SnapshotError, match="at its end: the program ended"):
        pc.save(tmp_path / "pc")
    assert not (tmp_path / "pc").exists()


def test_vms_and_machines_are_not_taken_for_each_other(tmp_path: Path) -> None:
    build("emulator", Output()).save(tmp_path / "pc")
    with pytest.raises(SnapshotError, match="run --load"):
        Vm.load(tmp_path / "pc")
    vm = Vm("emulator")
    vm.create_vcpu()
    vm.save(tmp_path / "vm")
    with pytest.raises(SnapshotError, match=r"Vm\.load"):
        Pc.load(tmp_path / "vm", output=Output())


# ---------------------------------------------------------------------------------------------------------- devices


def test_a_serial_port_keeps_registers_and_unread_input() -> None:
    levels: list[bool] = []
    uart = Uart16550(levels.append, Output())
    for offset, value in ((3, 0x83), (0, 1), (1, 0), (3, 3), (2, 0xC7), (4, 0xB), (1, 1), (7, 0x5A)):
        uart.write_port(uart.base + offset, 1, value)
    uart.receive(bytes(range(40)))
    output = Output()
    other = Uart16550(levels.append, output)
    other.set_state(uart.get_state())
    assert [other.read_port(other.base + offset, 1) for offset in (1, 2, 3, 4, 5, 7)] == [
        uart.read_port(uart.base + offset, 1) for offset in (1, 2, 3, 4, 5, 7)
    ]
    assert [other.read_port(other.base, 1) for _ in range(40)] == list(range(40))
    other.write_port(other.base, 1, 65)
    assert output.data == b"A"


def test_a_clock_chip_keeps_time_memory_and_its_next_interrupt() -> None:
    pc, other = build("emulator", Output()), build("emulator", Output())
    line: list[bool] = []
    rtc, copy = Rtc(pc.clock, line.append), Rtc(other.clock, line.append)
    for register, value in ((9, 0x31), (0x20, 0x77), (0x0B, 0x42)):
        rtc.write_port(0x70, 1, register)
        rtc.write_port(0x71, 1, value)
    copy.set_state(rtc.get_state())
    assert copy.get_state() == rtc.get_state()
    assert other.clock.next_deadline() == pc.clock.next_deadline() is not None
    for register in (9, 0x20, 0x0B):
        copy.write_port(0x70, 1, register)
        rtc.write_port(0x70, 1, register)
        assert copy.read_port(0x71, 1) == rtc.read_port(0x71, 1)
