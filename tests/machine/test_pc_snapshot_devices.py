"""A PC that is saved amid the use of its interrupt chips, clocks and firmware interfaces goes on the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from pc_guests import (
    DATA,
    ENGINES,
    PATIENCE,
    USE_APICS,
    USE_X2APIC,
    Output,
    build,
    ioapic_entry,
    write_msr,
)

from lasskvm.kvm import ExecutionEngine
from lasskvm.kvm.vcpu import CHECKPOINT_NS
from lasskvm.machine.ending import End, Ending
from lasskvm.machine.optional_devices import DeviceRequest
from lasskvm.machine.pc import Pc

PC_TESTDEV = DeviceRequest("pc-testdev")
TEST_MEMORY = 0xFF000000
SYSTEM_TIME = DATA + 0x1000
LEVEL = 1 << 15
#: The line's is the lowest class: it stays in service, and the others come none the less.
LINE, SCI, TIMER = 0x45, 0x59, 0x60
#: Prints a number in EAX as eight characters; changes EAX, ECX, DX and EBP.
PRINT = """
print: mov ecx, 8; mov dx, 0x3f8
digit: rol eax, 4; mov ebp, eax; and al, 15; add al, 48; out dx, al; mov eax, ebp; dec ecx; jne digit
    mov al, 10; out dx, al; ret
"""
#: Uses the APIC timer, two lines of the I/O APIC of which one is in service with its line up, kvmclock, the PM timer's
#: interrupt, a fw_cfg item that it reads byte by byte, a "Shutdown" that it finishes in the end, and pc-testdev.
#: Prints, ROUNDS times, what it can see of all of that.
PROGRAM = f"""
    {USE_APICS}
    {ioapic_entry(5, LINE | LEVEL)} {ioapic_entry(9, SCI | LEVEL)}
    mov dword [rbx + 0x3e0], 0xb; mov dword [rbx + 0x320], {0x20000 | TIMER:#x}; mov dword [rbx + 0x380], 20000000
    mov eax, 2; mov cr8, rax
    {write_msr(0x4B564D01, SYSTEM_TIME | 1)}
    mov dx, 0x602; mov ax, 1; out dx, ax
    mov dx, 0x510; mov ax, 0x19; out dx, ax
    mov dx, 0x8900; mov al, 83; out dx, al; mov al, 104; out dx, al
    mov eax, 0x12345678; out 0xe0, eax
    mov r8d, {TEST_MEMORY:#x}; mov qword [r8 + 0x20], 0x55
    xor r12d, r12d; xor r13d, r13d; xor r14d, r14d
    mov dx, 0x2005; mov al, 1; out dx, al
    mov r15d, ROUNDS
round:
    mov ecx, LOOPS
spin: dec ecx; jne spin
    sti; hlt; cli
    mov eax, r12d; call print
    mov eax, r13d; call print
    mov eax, r14d; call print
    mov eax, [rbx + 0x390]; call print
    mov eax, [rbx + 0x120]; call print
    mov dword [rdi], 0x1a; mov eax, [rdi + 16]; call print
    mov dx, 0x608; in eax, dx; call print
    mov dx, 0x600; in eax, dx; call print
    mov dx, 0x511; in al, dx; call print
    mov eax, [{SYSTEM_TIME + 8:#x}]; call print
    in eax, 0xe0; call print
    mov r8d, {TEST_MEMORY:#x}; inc qword [r8 + 0x20]; mov rax, [r8 + 0x20]; call print
    dec r15d
    jne_rel32_64 round
    lea rsi, [rip + rest]; mov ecx, 6; mov dx, 0x8900; rep outsb
    mov al, 99; out 0xf8, al
    rest: db 117, 116, 100, 111, 119, 110
{PRINT}
timer: inc r12d; mov dword [rbx + 0xb0], 0; iretq
line: inc r13d; iretq
sci: inc r14d; push rax; push rdx
    mov dx, 0x600; mov ax, 1; out dx, ax; mov dword [rbx + 0xb0], 0
    pop rdx; pop rax; iretq
"""
HANDLERS = {TIMER: "timer", LINE: "line", SCI: "sci"}
LOOPS = {"jit": 10_000, "emulator": 500}
#: A PM timer's interrupt comes every 2.3 seconds, the APIC timer's every 20 ms.
ROUNDS = 140
LINES_PER_ROUND = 12


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> ExecutionEngine:
    """Each engine in turn."""
    return request.param


def start(engine: ExecutionEngine, output: Output) -> Pc:
    source = PROGRAM.replace("LOOPS", str(LOOPS[engine])).replace("ROUNDS", str(ROUNDS))
    return build(source, output, handlers=HANDLERS, engine=engine, devices=[PC_TESTDEV])


def number(line: bytes) -> int:
    """What the guest has printed as *line*."""
    return int("".join(f"{digit - ord('0'):x}" for digit in line), 16)


def test_interrupt_chips_clocks_and_firmware_interfaces_go_on_as_they_were(
    tmp_path: Path, engine: ExecutionEngine
) -> None:
    whole = Output()
    pc = start(engine, whole)
    assert pc.run(PATIENCE) == Ending(End.POWER_OFF, 0)
    length = pc.clock.now()
    assert length > 20 * CHECKPOINT_NS
    lines = whole.data.splitlines()
    assert len(lines) == ROUNDS * LINES_PER_ROUND
    timers, interrupts_of_the_line, interrupts_of_the_pm_timer = map(number, lines[-LINES_PER_ROUND:][:3])
    assert timers > ROUNDS // 2
    assert (interrupts_of_the_line, interrupts_of_the_pm_timer) == (1, 1)
    for part in (0.1, 0.45, 0.9):
        first, second = Output(), Output()
        saved = start(engine, first)
        saved.save_at(tmp_path / "pc", int(length * part))
        assert saved.run(PATIENCE).end is End.SAVED
        loaded = Pc.load(tmp_path / "pc", output=second)
        assert loaded.run(PATIENCE) == Ending(End.POWER_OFF, 0)
        assert first.data
        assert first.data + second.data == whole.data
        assert loaded.clock.now() == length


def test_x2apic_mode_and_an_armed_deadline_come_back(tmp_path: Path, engine: ExecutionEngine) -> None:
    source = f"""
        {USE_X2APIC} {write_msr(0x832, 0x40000 | TIMER)}
        rdtsc; shl rdx, 32; or rax, rdx; mov r8, 2000000000; add rax, r8
        mov rdx, rax; shr rdx, 32; mov ecx, 0x6e0; wrmsr
        mov al, 33; out 0xe9, al
        sti; hlt; cli
        mov al, 99; out 0xf8, al
        timer: mov ecx, 0x802; rdmsr; mov ecx, 0x80b; xor eax, eax; xor edx, edx; wrmsr
        mov al, 5; out 0xf8, al
    """
    pc = build(source, Output(), handlers={TIMER: "timer"}, engine=engine)
    pc.save_at(tmp_path / "pc", 10 * CHECKPOINT_NS)
    assert pc.run(PATIENCE).end is End.SAVED
    loaded = Pc.load(tmp_path / "pc", output=Output())
    assert loaded.run(PATIENCE) == Ending(End.PROGRAM, 5)
    assert loaded.clock.now() == pytest.approx(2e9, rel=0.001)


def test_a_message_that_waits_is_delivered_by_the_loaded_machine(
    tmp_path: Path, engine: ExecutionEngine
) -> None:
    # Two vectors wait, with interrupts off.
    source = f"""
        {USE_APICS} mov dword [rbx + 0x300], 0x40050; mov dword [rbx + 0x300], 0x40060
        mov ecx, LOOPS; spin: dec ecx; jne spin
        sti; nop; nop; cli
        out 0xf8, al
        low: mov al, 108; out 0xe9, al; mov dword [rbx + 0xb0], 0; iretq
        high: mov al, 104; out 0xe9, al; mov dword [rbx + 0xb0], 0; iretq
    """
    loops = {"jit": 30_000_000, "emulator": 100_000}
    source = source.replace("LOOPS", str(loops[engine]))
    pc = build(source, Output(), handlers={0x50: "low", 0x60: "high"}, engine=engine, host_clock=True)
    assert pc.run(0.01).end is End.TIMEOUT
    pc.save(tmp_path / "pc")
    output = Output()
    assert Pc.load(tmp_path / "pc", output=output).run(PATIENCE).end is End.PROGRAM
    assert output.data == b"hl"


@pytest.mark.parametrize(
    ("source", "end"),
    [("mov al, 0xfe; out 0x64, al", End.RESET), ("lidt [0x200020]; ud2", End.TRIPLE_FAULT)],
)
def test_a_loaded_machine_has_no_image_to_start_again(tmp_path: Path, source: str, end: End) -> None:
    pc = build(f"mov ecx, 1000; spin: dec ecx; jne spin; {source}", Output(), on_shutdown="reset")
    pc.save(tmp_path / "pc")
    assert Pc.load(tmp_path / "pc", output=Output()).run(PATIENCE).end is end


def test_added_devices_are_there_again(tmp_path: Path) -> None:
    pc = build(
        "mov al, 66; mov dx, 0x402; out dx, al; mov dx, 0x501; out dx, al",
        Output(),
        devices=[DeviceRequest("isa-debugcon", 0x402), DeviceRequest("isa-debug-exit", 0x501, 2)],
    )
    pc.save(tmp_path / "pc")
    output = Output()
    assert Pc.load(tmp_path / "pc", output=output).run(PATIENCE) == Ending(End.DEBUG_EXIT, 133)
    assert output.data == b"B"
