"""Timers and devices of a PC interrupt the guest: PIT, local APIC, TSC deadline, RTC, serial port."""

from __future__ import annotations

import pytest
from pc_guests import DATA, ENGINES, USE_APICS, ioapic_entry, run, write_msr

from lasskvm.kvm import ExecutionEngine
from lasskvm.machine.ending import End, Ending

EOI = "mov dword [rbx + 0xb0], 0;"
#: ESI counts interrupts; the end is its count.
COUNT_AND_RETURN = f"count: inc esi; {EOI} iretq"
LEAVE = "mov eax, esi; out 0xf8, al;"
#: Counter 0 of the PIT with 11932, 100 Hz.
PIT_100_HZ = "mov al, 0x34; out 0x43, al; mov al, 0x9c; out 0x40, al; mov al, 0x2e; out 0x40, al;"


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> ExecutionEngine:
    """Each engine in turn."""
    return request.param


def status(count: int) -> Ending:
    return Ending(End.PROGRAM, count)


@pytest.mark.parametrize("host_clock", [False, True])
def test_the_pit_is_pin_2_of_the_ioapic(engine: ExecutionEngine, host_clock: bool) -> None:
    ending, _, vm = run(
        f"""
        {USE_APICS} {ioapic_entry(0, 0x50)} {ioapic_entry(2, 0x40)}
        {PIT_100_HZ} xor esi, esi
        wait: sti; hlt; cli; cmp esi, 3; jne wait
        {LEAVE}
        {COUNT_AND_RETURN}
        """,
        handlers={0x40: "count"},
        engine=engine,
        host_clock=host_clock,
    )
    assert ending == status(3)
    assert vm.clock.now() >= 30_000_000


def test_the_pit_reaches_the_processor_through_the_8259a_and_lint0(engine: ExecutionEngine) -> None:
    # The local APIC is in use, with LINT0 as it is behind power-on.
    ending, _, _ = run(
        f"""
        mov ebx, 0xfee00000; mov dword [rbx + 0xf0], 0x1ff
        mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al
        mov al, 1; out 0x21, al; mov al, 0xfe; out 0x21, al
        {PIT_100_HZ} xor esi, esi
        wait: sti; hlt; cli; cmp esi, 2; jne wait
        mov dword [rbx + 0x350], 0x10700
        sti; mov ecx, 30000; spin: dec ecx; jne spin; cli
        {LEAVE}
        count: inc esi; mov al, 0x20; out 0x20, al; iretq
        """,
        handlers={0x20: "count"},
        engine=engine,
    )
    # Masked in LINT0, nothing comes any more, though the time of another interrupt passes.
    assert ending == status(2)


@pytest.mark.parametrize("host_clock", [False, True])
def test_the_apic_timer_wakes_a_halted_processor(engine: ExecutionEngine, host_clock: bool) -> None:
    ending, _, vm = run(
        f"""
        {USE_APICS}
        mov dword [rbx + 0x3e0], 0xb; mov dword [rbx + 0x320], 0x40
        xor esi, esi
        again: mov dword [rbx + 0x380], 1000000
        sti; hlt; cli
        cmp esi, 3; jne again
        {LEAVE}
        {COUNT_AND_RETURN}
        """,
        handlers={0x40: "count"},
        engine=engine,
        host_clock=host_clock,
    )
    assert ending == status(3)
    assert vm.clock.now() >= 3_000_000


def test_the_apic_timer_interrupts_a_loop_without_any_exit(engine: ExecutionEngine) -> None:
    ending, _, vm = run(
        f"""
        {USE_APICS}
        mov dword [rbx + 0x3e0], 0xb; mov dword [rbx + 0x320], 0x20040; mov dword [rbx + 0x380], 250000
        xor esi, esi; sti
        wait: cmp esi, 4; jne wait
        {LEAVE}
        {COUNT_AND_RETURN}
        """,
        handlers={0x40: "count"},
        engine=engine,
    )
    assert ending == status(4)
    assert vm.clock.now() == pytest.approx(1_000_000, rel=0.05)


def test_the_apic_timer_counts_down_with_the_time_stamp_counter(engine: ExecutionEngine) -> None:
    ending, _, vm = run(
        f"""
        {USE_APICS}
        mov dword [rbx + 0x3e0], 3; mov dword [rbx + 0x320], 0x10040; mov dword [rbx + 0x380], 0xffffffff
        rdtsc; mov r8d, eax; mov r9d, [rbx + 0x390]
        mov ecx, 10000; spin: dec ecx; jne spin
        sub r9d, [rbx + 0x390]; rdtsc; sub eax, r8d
        mov [{DATA:#x}], r9d; mov [{DATA + 4:#x}], eax
        out 0xf8, al
        """,
        engine=engine,
    )
    assert ending.end is End.PROGRAM
    count, ticks = vm.memory.load(DATA, 4), vm.memory.load(DATA + 4, 4)
    # Divided by 16.
    assert count * 16 == pytest.approx(ticks, rel=0.05)


@pytest.mark.parametrize("host_clock", [False, True])
def test_the_tsc_deadline_wakes_a_halted_processor(engine: ExecutionEngine, host_clock: bool) -> None:
    ending, _, vm = run(
        f"""
        {USE_APICS}
        mov dword [rbx + 0x320], 0x40040
        xor esi, esi
        again:
        rdtsc; shl rdx, 32; or rax, rdx; add rax, 2000000; mov r8, rax
        mov rdx, rax; shr rdx, 32; mov ecx, 0x6e0; wrmsr
        sti; hlt; cli
        rdtsc; shl rdx, 32; or rax, rdx; cmp rax, r8; jb early
        mov ecx, 0x6e0; rdmsr; or eax, edx; jne early
        cmp esi, 3; jne again
        {LEAVE}
        early: mov al, 99; out 0xf8, al
        {COUNT_AND_RETURN}
        """,
        handlers={0x40: "count"},
        engine=engine,
        host_clock=host_clock,
    )
    assert ending == status(3)
    assert vm.clock.now() >= 6_000_000


def test_moving_the_time_stamp_counter_moves_the_deadline(engine: ExecutionEngine) -> None:
    # A deadline that is years away is reached by setting the counter behind it.
    ending, _, vm = run(
        f"""
        {USE_APICS}
        mov dword [rbx + 0x320], 0x40040
        {write_msr(0x6E0, 1 << 60)}
        xor esi, esi; sti
        {write_msr(0x10, (1 << 60) + 1)}
        nop
        {LEAVE}
        {COUNT_AND_RETURN}
        """,
        handlers={0x40: "count"},
        engine=engine,
    )
    assert ending == status(1)
    assert vm.clock.now() < 1_000_000


def test_the_rtc_is_pin_8(engine: ExecutionEngine) -> None:
    ending, _, vm = run(
        f"""
        {USE_APICS} {ioapic_entry(8, 0x48)}
        mov al, 0xa; out 0x70, al; mov al, 0x26; out 0x71, al
        mov al, 0xb; out 0x70, al; mov al, 0x42; out 0x71, al
        xor esi, esi
        wait: sti; hlt; cli; cmp esi, 5; jne wait
        {LEAVE}
        count: inc esi; mov al, 0xc; out 0x70, al; in al, 0x71; {EOI} iretq
        """,
        handlers={0x48: "count"},
        engine=engine,
    )
    assert ending == status(5)
    # 1024 Hz.
    assert vm.clock.now() == pytest.approx(5e9 / 1024, rel=0.25)


def test_the_serial_port_is_pin_4(engine: ExecutionEngine) -> None:
    # "The transmitter is empty", as soon as that may interrupt.
    ending, _, _ = run(
        f"""
        {USE_APICS} {ioapic_entry(4, 0x44)}
        xor esi, esi
        mov dx, 0x3fc; mov al, 8; out dx, al
        sti; mov dx, 0x3f9; mov al, 2; out dx, al
        wait: test esi, esi; je wait
        {LEAVE}
        count: inc esi; mov dx, 0x3fa; in al, dx; cmp al, 0xc2; je right; cmp al, 2; je right
        mov esi, 99
        right: {EOI} iretq
        """,
        handlers={0x44: "count"},
        engine=engine,
    )
    assert ending == status(1)
