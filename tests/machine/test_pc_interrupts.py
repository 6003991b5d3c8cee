"""Interrupts of a whole PC: from lines of the I/O APIC and the 8259As, and by messages."""

from __future__ import annotations

import pytest
from pc_guests import (
    DATA,
    ENGINES,
    PATIENCE,
    PIC_OFF,
    USE_APICS,
    USE_X2APIC,
    build,
    ioapic_entry,
    run,
    write_msr,
)

from lasskvm.kvm import ExecutionEngine, Vcpu
from lasskvm.machine.ending import End, Ending
from lasskvm.machine.optional_devices import DeviceRequest

PC_TESTDEV = DeviceRequest("pc-testdev")
#: Lines of pc-testdev, at AL's level.
LINE_5 = "mov dx, 0x2005; out dx, al;"
EOI = "mov dword [rbx + 0xb0], 0;"
#: ESI counts interrupts; the end is its count.
COUNT_AND_RETURN = f"count: inc esi; {EOI} iretq"
LEAVE = "mov eax, esi; out 0xf8, al;"
LEVEL, MASKED = 1 << 15, 1 << 16
#: The interrupt command register: to oneself; NMI, INIT to APIC ID 0.
TO_SELF, SEND_NMI, SEND_INIT = 1 << 18, 0x4400, 0x4500


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> ExecutionEngine:
    """Each engine in turn."""
    return request.param


def status(count: int) -> Ending:
    return Ending(End.PROGRAM, count)


# ------------------------------------------------------------------------------------------- lines of the IOAPIC


def test_an_edge_interrupts_once_until_the_line_has_been_down(engine: ExecutionEngine) -> None:
    ending, output, _ = run(
        f"""
        {USE_APICS} {ioapic_entry(5, 0x45)}
        xor esi, esi; sti
        mov al, 1; {LINE_5} nop
        mov eax, esi; add al, 48; out 0xe9, al
        mov al, 1; {LINE_5} nop
        mov eax, esi; add al, 48; out 0xe9, al
        mov al, 0; {LINE_5} mov al, 1; {LINE_5} nop
        {LEAVE}
        {COUNT_AND_RETURN}
        """,
        handlers={0x45: "count"},
        engine=engine,
        devices=[PC_TESTDEV],
    )
    assert output == b"11"
    assert ending == status(2)


def test_a_level_interrupts_until_the_line_is_down(engine: ExecutionEngine) -> None:
    ending, output, _ = run(
        f"""
        {USE_APICS} {ioapic_entry(5, 0x45 | LEVEL)}
        xor esi, esi; sti
        mov al, 1; {LINE_5} nop; nop
        cli; mov eax, [rdi + 16]; shr eax, 14; and al, 1; add al, 48; out 0xe9, al
        {LEAVE}
        count: inc esi
        mov eax, [rdi + 16]; shr eax, 14; and al, 1; add al, 48; out 0xe9, al
        cmp esi, 3; jne leave_it_up
        mov al, 0; {LINE_5}
        leave_it_up: {EOI} iretq
        """,
        handlers={0x45: "count"},
        engine=engine,
        devices=[PC_TESTDEV],
    )
    # Remote IRR is set in each handler, and clear behind the last end of interrupt.
    assert output == b"1110"
    assert ending == status(3)


def test_a_masked_level_comes_when_it_is_unmasked_and_a_masked_edge_does_not(engine: ExecutionEngine) -> None:
    ending, output, _ = run(
        f"""
        {USE_APICS} {ioapic_entry(5, 0x45 | MASKED)} {ioapic_entry(6, 0x46 | LEVEL | MASKED)}
        xor esi, esi; sti
        mov al, 1; {LINE_5} mov dx, 0x2006; out dx, al
        {ioapic_entry(5, 0x45)} nop
        mov eax, esi; add al, 48; out 0xe9, al
        {ioapic_entry(6, 0x46 | LEVEL)} nop
        {LEAVE}
        count: inc esi; mov dx, 0x2006; mov al, 0; out dx, al; {EOI} iretq
        """,
        handlers={0x45: "count", 0x46: "count"},
        engine=engine,
        devices=[PC_TESTDEV],
    )
    assert output == b"0"
    assert ending == status(1)


def test_lines_above_15_are_those_of_the_ioapic_alone(engine: ExecutionEngine) -> None:
    ending, _, _ = run(
        f"""
        {USE_APICS} {ioapic_entry(23, 0x57)}
        xor esi, esi; sti
        mov dx, 0x2017; mov al, 1; out dx, al; nop
        {LEAVE}
        {COUNT_AND_RETURN}
        """,
        handlers={0x57: "count"},
        engine=engine,
        devices=[PC_TESTDEV],
    )
    assert ending == status(1)


def test_an_entry_can_deliver_an_nmi(engine: ExecutionEngine) -> None:
    ending, _, _ = run(
        f"""
        {USE_APICS} {ioapic_entry(5, 0x400)}
        xor esi, esi
        mov al, 1; {LINE_5} nop
        {LEAVE}
        nmi: inc esi; iretq
        """,
        handlers={2: "nmi"},
        engine=engine,
        devices=[PC_TESTDEV],
    )
    assert ending == status(1)


# ----------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("command", [0x40 | TO_SELF, 0x40, 0x40 | 2 << 18], ids=["self", "ID 0", "all"])
def test_the_processor_interrupts_itself(engine: ExecutionEngine, command: int) -> None:
    ending, _, _ = run(
        f"""
        {USE_APICS}
        xor esi, esi; sti
        mov dword [rbx + 0x310], 0; mov dword [rbx + 0x300], {command:#x}; nop
        {LEAVE}
        {COUNT_AND_RETURN}
        """,
        handlers={0x40: "count"},
        engine=engine,
    )
    assert ending == status(1)


@pytest.mark.parametrize(
    "command",
    [write_msr(0x83F, 0x40), write_msr(0x830, 0x40 | TO_SELF), write_msr(0x830, 0x40)],
    ids=["SELF IPI", "ICR to self", "ICR to ID 0"],
)
def test_the_processor_interrupts_itself_in_x2apic_mode(engine: ExecutionEngine, command: str) -> None:
    ending, _, _ = run(
        f"""
        {USE_X2APIC}
        xor esi, esi; sti
        {command} nop
        {command} nop
        {LEAVE}
        count: inc esi; {write_msr(0x80B, 0)} iretq
        """,
        handlers={0x40: "count"},
        engine=engine,
    )
    assert ending == status(2)


def test_the_ioapic_and_the_timer_work_in_x2apic_mode(engine: ExecutionEngine) -> None:
    ending, _, _ = run(
        f"""
        {USE_X2APIC} {ioapic_entry(5, 0x45 | LEVEL)}
        xor esi, esi
        {write_msr(0x83E, 0xB)} {write_msr(0x832, 0x40)} {write_msr(0x838, 1_000_000)}
        sti; hlt; cli
        mov al, 1; {LINE_5}
        sti; nop; cli
        {LEAVE}
        line: mov dx, 0x2005; mov al, 0; out dx, al
        count: inc esi; {write_msr(0x80B, 0)} iretq
        """,
        handlers={0x40: "count", 0x45: "line"},
        engine=engine,
        devices=[PC_TESTDEV],
    )
    assert ending == status(2)


def test_the_page_of_the_local_apic_is_gone_in_x2apic_mode(engine: ExecutionEngine) -> None:
    ending, _, vm = run(
        f"{USE_X2APIC} mov ebx, 0xfee00000; mov eax, [rbx + 0x30]; mov [{DATA:#x}], eax; out 0xf8, al",
        engine=engine,
    )
    assert ending.end is End.PROGRAM
    assert vm.memory.load(DATA, 4) == 0xFFFFFFFF


@pytest.mark.parametrize("enable", [USE_APICS, USE_X2APIC], ids=["xAPIC", "x2APIC"])
def test_the_task_priority_holds_an_interrupt_back(engine: ExecutionEngine, enable: str) -> None:
    send = f"mov dword [rbx + 0x300], {0x45 | TO_SELF:#x};" if enable is USE_APICS else write_msr(0x83F, 0x45)
    ending, output, _ = run(
        f"""
        {enable}
        xor esi, esi; sti
        mov eax, 4; mov cr8, rax
        {send} nop
        mov eax, esi; add al, 48; out 0xe9, al
        mov eax, 3; mov cr8, rax; nop
        {LEAVE}
        count: inc esi; iretq
        """,
        handlers={0x45: "count"},
        engine=engine,
    )
    assert output == b"0"
    assert ending == status(1)


def test_the_higher_of_two_vectors_comes_first_and_may_interrupt_the_lower(engine: ExecutionEngine) -> None:
    ending, output, _ = run(
        f"""
        {USE_APICS}
        mov dword [rbx + 0x300], {0x40 | TO_SELF:#x}; mov dword [rbx + 0x300], {0x60 | TO_SELF:#x}
        sti; nop; cli
        out 0xf8, al
        low: mov al, 108; out 0xe9, al
        mov dword [rbx + 0x300], {0x50 | TO_SELF:#x}; mov dword [rbx + 0x300], {0x41 | TO_SELF:#x}
        sti; nop; cli
        mov al, 76; out 0xe9, al; {EOI} iretq
        same: mov al, 115; out 0xe9, al; {EOI} iretq
        middle: mov al, 109; out 0xe9, al; {EOI} iretq
        high: mov al, 104; out 0xe9, al; {EOI} iretq
        """,
        handlers={0x40: "low", 0x41: "same", 0x50: "middle", 0x60: "high"},
        engine=engine,
    )
    assert ending.end is End.PROGRAM
    assert output == b"hlmLs"


def test_an_nmi_to_oneself_comes_with_interrupts_off(engine: ExecutionEngine) -> None:
    ending, _, _ = run(
        f"""
        {USE_APICS}
        xor esi, esi
        mov dword [rbx + 0x310], 0; mov dword [rbx + 0x300], {SEND_NMI:#x}; nop
        {LEAVE}
        nmi: inc esi; iretq
        """,
        handlers={2: "nmi"},
        engine=engine,
    )
    assert ending == status(1)


@pytest.mark.parametrize(
    ("lint1", "count"), [(0x400, 1), (0x1_0400, 0), (0x45, 2)], ids=["NMI", "masked", "a vector"]
)
def test_the_nmi_button_does_what_lint1_says(engine: ExecutionEngine, lint1: int, count: int) -> None:
    def press(data: bytes) -> None:
        assert isinstance(pc.vcpu, Vcpu)
        lapic = pc.vcpu.devices.lapic
        assert lapic is not None
        lapic.local_nmi()

    pc = build(
        f"""
        {USE_APICS} mov dword [rbx + 0x360], {lint1:#x}
        xor esi, esi; sti
        mov al, 65; out 0xe9, al; nop
        {LEAVE}
        nmi: mov esi, 1; iretq
        vector: mov esi, 2; {EOI} iretq
        """,
        press,
        handlers={2: "nmi", 0x45: "vector"},
        engine=engine,
    )
    assert pc.run(PATIENCE) == status(count)


def test_an_edge_that_is_over_still_counts_at_the_8259a(engine: ExecutionEngine) -> None:
    ending, _, _ = run(
        f"""
        mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al
        mov al, 1; out 0x21, al; mov al, 0; out 0x21, al
        xor esi, esi
        mov al, 1; {LINE_5} mov al, 0; {LINE_5}
        sti; nop; cli
        {LEAVE}
        count: inc esi; iretq
        """,
        handlers={0x25: "count"},
        engine=engine,
        devices=[PC_TESTDEV],
    )
    assert ending == status(1)


def test_an_illegal_vector_raises_the_error_interrupt(engine: ExecutionEngine) -> None:
    ending, _, vm = run(
        f"""
        {USE_APICS} mov dword [rbx + 0x370], 0x4e
        xor esi, esi; sti
        mov dword [rbx + 0x300], {0x0F | TO_SELF:#x}; nop
        {LEAVE}
        count: inc esi; mov dword [rbx + 0x280], 0; mov eax, [rbx + 0x280]; mov [{DATA:#x}], eax; {EOI} iretq
        """,
        handlers={0x4E: "count"},
        engine=engine,
    )
    assert ending == status(1)
    # Send illegal vector, receive illegal vector.
    assert vm.memory.load(DATA, 4) & 0x20


def test_a_disabled_apic_leaves_the_8259as_alone_with_the_processor(engine: ExecutionEngine) -> None:
    ending, _, _ = run(
        f"""
        {write_msr(0x1B, 0xFEE0_0100)}
        mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al
        mov al, 1; out 0x21, al; mov al, 0; out 0x21, al
        xor esi, esi; sti
        mov al, 1; {LINE_5} nop
        {LEAVE}
        count: inc esi; iretq
        """,
        handlers={0x25: "count"},
        engine=engine,
        devices=[PC_TESTDEV],
    )
    assert ending == status(1)


def test_a_processor_that_halts_with_interrupts_off_has_come_to_its_end(engine: ExecutionEngine) -> None:
    ending, _, _ = run(f"{PIC_OFF} cli; hlt", engine=engine)
    assert ending == Ending(End.HALTED, 0)
