"""A PC that is switched off: by ACPI, and by the port of Bochs."""

from __future__ import annotations

import pytest
from pc_guests import ENGINES, PIC_OFF, USE_APICS, ioapic_entry, run

from lasskvm.kvm import ExecutionEngine
from lasskvm.machine.ending import End, Ending

GOES_ON = "mov al, 99; out 0xf8, al"
WENT_ON = Ending(End.PROGRAM, 99)
OFF = Ending(End.POWER_OFF, 0)


def out_word(port: int, value: int) -> str:
    return f"mov dx, {port:#x}; mov ax, {value:#x}; out dx, ax;"


def spell(word: str) -> str:
    return "mov dx, 0x8900;" + "".join(f"mov al, {ord(letter)}; out dx, al;" for letter in word)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "source",
    [
        out_word(0x604, 0x2000),
        # The same with the other bits of the register as Linux finds them, and in bytes.
        out_word(0x604, 0x2001),
        "mov dx, 0x605; mov al, 0x20; out dx, al;",
        # Suspend to disk, whose image the guest has written.
        out_word(0x604, 2 << 10 | 0x2000),
        spell("Shutdown"),
    ],
    ids=["soft-off", "soft-off with SCI_EN", "soft-off by bytes", "suspend to disk", "Shutdown"],
)
def test_the_guest_switches_the_machine_off(source: str, engine: ExecutionEngine) -> None:
    ending, _, _ = run(source + GOES_ON, engine=engine)
    assert ending == OFF


def test_the_machine_stays_off_whatever_a_reset_is_to_do() -> None:
    ending, _, _ = run(out_word(0x604, 0x2000) + GOES_ON, on_reset="reset", on_shutdown="reset")
    assert ending == OFF


def test_the_word_may_come_as_a_string() -> None:
    ending, _, _ = run(f"""
        lea rsi, [rip + word]; mov ecx, 8; mov dx, 0x8900; rep outsb
        {GOES_ON}
        word: db 83, 104, 117, 116, 100, 111, 119, 110
    """)
    assert ending == OFF


@pytest.mark.parametrize(
    "source",
    [
        out_word(0x604, 0),
        # A sleep type without the bit that puts the machine to sleep, and a type that is none of this machine's.
        out_word(0x604, 2 << 10),
        out_word(0x604, 5 << 10 | 0x2000),
        # The event block beside it.
        out_word(0x602, 0x2000),
        spell("Shutdow"),
        spell("shutdown"),
        spell("Shut down"),
    ],
)
def test_nothing_else_switches_it_off(source: str) -> None:
    ending, _, _ = run(source + GOES_ON)
    assert ending == WENT_ON


def test_a_word_that_breaks_off_can_begin_anew() -> None:
    ending, _, _ = run(spell("ShutShutdown") + GOES_ON)
    assert ending == OFF


@pytest.mark.parametrize("engine", ENGINES)
def test_acpi_is_enabled_by_the_smi_command_port(engine: ExecutionEngine) -> None:
    ending, output, _ = run(
        """
        mov dx, 0x604; in ax, dx; out 0xe9, al
        mov al, 0xf1; out 0xb2, al; in ax, dx; out 0xe9, al
        mov al, 0xf0; out 0xb2, al; in ax, dx; out 0xe9, al
        out 0xf8, al
        """,
        engine=engine,
    )
    assert ending.end is End.PROGRAM
    assert output == bytes((0, 1, 0))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_pm_timer_interrupts_by_the_sci_once_its_top_bit_has_changed(engine: ExecutionEngine) -> None:
    # SCI, IRQ 9, level triggered: the handler clears TMR_STS, which lowers the line.
    ending, _, vm = run(
        f"""
        {USE_APICS} {ioapic_entry(9, 0x8041)}
        mov dx, 0x602; mov ax, 1; out dx, ax
        xor esi, esi
        wait: sti; hlt; cli
        cmp esi, 2; jne wait
        mov eax, esi; out 0xf8, al
        sci:
        inc esi
        mov dx, 0x600; in ax, dx; test al, 1; je wrong
        mov ax, 1; out dx, ax
        in ax, dx; test al, 1; jne wrong
        mov dword [rbx + 0xb0], 0
        iretq
        wrong: mov al, 99; out 0xf8, al
        """,
        handlers={0x41: "sci"},
        engine=engine,
    )
    assert ending == Ending(End.PROGRAM, 2)
    # Twice 2**23 ticks at 3.579545 MHz.
    assert vm.clock.now() == pytest.approx(2 * 2**23 / 3.579545e6 * 1e9, rel=0.01)


def test_the_pm_timer_and_the_time_stamp_counter_agree() -> None:
    ending, _, vm = run(f"""
        {PIC_OFF}
        mov dx, 0x608
        in eax, dx; mov r8d, eax; rdtsc; mov r9d, eax
        mov ecx, 100000; spin: dec ecx; jne spin
        mov dx, 0x608; in eax, dx; sub eax, r8d; mov [0x200000], eax; rdtsc; sub eax, r9d; mov [0x200008], eax
        out 0xf8, al
    """)
    assert ending.end is End.PROGRAM
    ticks, nanoseconds = vm.memory.load(0x200000, 4), vm.memory.load(0x200008, 4)
    assert ticks / 3.579545e6 == pytest.approx(nanoseconds / 1e9, rel=0.01)
