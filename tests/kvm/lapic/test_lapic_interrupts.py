"""The local APIC's own interrupts: the local vector table, interprocessor interrupts, and errors."""

import pytest

from lasskvm.kvm.irqchip.apic_registers import (
    CURRENT_COUNT,
    DIVIDE_CONFIGURATION,
    EOI,
    ESR,
    ESR_ILLEGAL_REGISTER,
    ESR_RECEIVE_ILLEGAL_VECTOR,
    ESR_SEND_ILLEGAL_VECTOR,
    ICR,
    ICR2,
    ICR_ASSERT,
    ICR_LEVEL_TRIGGERED,
    ICR_LOGICAL,
    INITIAL_COUNT,
    IRR,
    LDR,
    LVT_ERROR,
    LVT_LINT0,
    LVT_LINT1,
    LVT_MASKED,
    LVT_TIMER,
    LVT_TIMER_TSC_DEADLINE,
    SELF_IPI,
)
from lasskvm.x86.msr import APIC_BASE_BSP

BASE = 0xFEE00000
EXTINT = 0x700
NMI = 0x400
TO_SELF = 1 << 18
TO_ALL = 2 << 18
TO_OTHERS = 3 << 18


# The local vector table


def test_the_timer_interrupts_unless_masked(machine) -> None:
    for entry, delivered in ((0x61, [0x61]), (LVT_MASKED | 0x61, [])):
        machine[LVT_TIMER] = entry
        machine[DIVIDE_CONFIGURATION] = 0b1011
        machine[INITIAL_COUNT] = 500
        assert machine[CURRENT_COUNT] == 500
        machine.clock.skip_to(machine.clock.now() + 500)
        machine.clock.run_due()
        assert (machine.deliver(), machine[CURRENT_COUNT]) == (delivered, 0)
        machine[EOI] = 0


def test_a_tsc_deadline_that_has_passed_interrupts_before_the_next_instruction(machine, lapic) -> None:
    machine[LVT_TIMER] = LVT_TIMER_TSC_DEADLINE | 0x61
    machine.clock.skip_to(1000)
    lapic.write_tsc_deadline(2000)
    assert (lapic.read_tsc_deadline(), lapic.pending_vector()) == (2000, None)
    lapic.write_tsc_deadline(1000)
    assert (lapic.read_tsc_deadline(), lapic.pending_vector()) == (0, 0x61)


def test_a_globally_disabled_apic_takes_no_tsc_deadline(machine, lapic) -> None:
    machine[LVT_TIMER] = LVT_TIMER_TSC_DEADLINE | 0x61
    lapic.write_base(BASE | APIC_BASE_BSP)
    lapic.write_tsc_deadline(2000)
    assert lapic.read_tsc_deadline() == 0


@pytest.mark.parametrize(
    "entry, accepted", [(EXTINT, True), (EXTINT | LVT_MASKED, False), (0x41, False), (NMI, False)]
)
def test_lint0_lets_the_8259a_through_only_as_extint(machine, lapic, entry: int, accepted: bool) -> None:
    machine.events.clear()
    machine[LVT_LINT0] = entry
    assert lapic.accepts_pic() == accepted
    assert machine.events == ["kick"] * accepted


@pytest.mark.parametrize(
    "entry, events, vectors",
    [
        (NMI, ["nmi"], []),
        (NMI | LVT_MASKED, [], []),
        (0x41, ["kick"], [0x41]),
        (0x500, ["init"], []),
        (0x600 | 0x41, [], []),
        (EXTINT, [], []),
    ],
)
def test_the_nmi_button_pulses_lint1(
    machine, lapic, entry: int, events: list[object], vectors: list[int]
) -> None:
    machine[LVT_LINT1] = entry
    machine.events.clear()
    lapic.local_nmi()
    assert (machine.events, machine.deliver()) == (events, vectors)


def test_the_nmi_button_works_while_the_apic_is_globally_disabled(machine, lapic) -> None:
    lapic.write_base(BASE | APIC_BASE_BSP)
    machine.events.clear()
    lapic.local_nmi()
    assert machine.events == ["nmi"]


# Interprocessor interrupts


@pytest.mark.parametrize(
    "command, high, vectors",
    [
        (TO_SELF | 0x41, 0, [0x41]),
        (TO_ALL | 0x41, 0, [0x41]),
        (TO_OTHERS | 0x41, 0, []),
        (0x41, 0, [0x41]),
        (0x41, 1 << 24, []),
        (0x41, 0xFF << 24, [0x41]),
        (ICR_LOGICAL | 0x41, 0x10 << 24, [0x41]),
        (ICR_LOGICAL | 0x41, 0x20 << 24, []),
        (0x100 | 0x41, 0, [0x41]),
        (TO_SELF | ICR_LEVEL_TRIGGERED | ICR_ASSERT | 0x41, 0, [0x41]),
        (TO_SELF | ICR_LEVEL_TRIGGERED | 0x41, 0, []),
    ],
)
def test_an_ipi_reaches_the_sender_if_it_is_meant(
    machine, command: int, high: int, vectors: list[int]
) -> None:
    machine[LDR] = 0x10 << 24
    machine[ICR2] = high
    machine[ICR] = command | 1 << 12
    assert (machine[ICR], machine[ICR2]) == (command, high), "sent, and no longer pending"
    assert machine.deliver() == vectors


@pytest.mark.parametrize(
    "command, events",
    [
        (0x400, ["nmi"]),
        (0x500 | ICR_ASSERT, ["init"]),
        (0x500 | ICR_LEVEL_TRIGGERED | ICR_ASSERT, ["init"]),
        (0x500 | ICR_LEVEL_TRIGGERED, []),
        (0x69A, [("startup", 0x9A)]),
        (0x200, []),
        (0x700, []),
        (0x400 | TO_OTHERS, []),
    ],
)
def test_an_ipi_may_be_an_nmi_init_or_startup(machine, command: int, events: list[object]) -> None:
    machine.events.clear()
    machine[ICR] = command
    assert machine.events == events


# Errors


@pytest.mark.parametrize("offset", [0x0, 0x40, 0xC0, 0x290, 0x2F0, 0x3A0, SELF_IPI, 0x400, 0xFF0])
def test_a_register_that_does_not_exist_is_an_error(machine, offset: int) -> None:
    assert machine[offset] == 0
    assert machine.errors() == ESR_ILLEGAL_REGISTER
    machine[offset] = 1
    assert machine.errors() == ESR_ILLEGAL_REGISTER


def test_the_error_status_shows_errors_only_after_a_write(machine) -> None:
    machine.send(0x0F)
    assert machine[ESR] == 0
    machine[ESR] = 0xFFFF_FFFF
    assert machine[ESR] == ESR_RECEIVE_ILLEGAL_VECTOR
    machine[ESR] = 0
    assert machine[ESR] == 0


def test_an_illegal_vector_is_never_requested(machine, lapic) -> None:
    assert machine.send(0x0F), "a processor took the message"
    assert (machine[IRR], lapic.pending_vector()) == (0, None)


def test_sending_an_illegal_vector_is_an_error_of_sender_and_receiver(machine) -> None:
    machine[ICR] = TO_OTHERS | 0x0F
    assert machine.errors() == ESR_SEND_ILLEGAL_VECTOR
    machine[ICR] = TO_SELF | 0x0F
    assert machine.errors() == ESR_SEND_ILLEGAL_VECTOR | ESR_RECEIVE_ILLEGAL_VECTOR
    machine[ICR] = TO_SELF | NMI | 2
    assert machine.errors() == 0, "an NMI has no vector"


def test_each_new_error_interrupts_once_until_the_status_is_written(machine) -> None:
    machine[LVT_ERROR] = 0x71
    for expected in ([0x71], []):
        machine.send(3)
        assert machine.deliver() == expected
        machine[EOI] = 0
    assert machine[0x40] == 0
    assert machine.deliver() == [0x71]
    machine[EOI] = 0
    machine[ESR] = 0
    machine.send(3)
    assert machine.deliver() == [0x71]


def test_an_error_interrupt_with_an_illegal_vector_is_an_error_and_no_loop(machine) -> None:
    machine[LVT_ERROR] = 5
    assert machine[0x40] == 0
    assert machine.errors() == ESR_ILLEGAL_REGISTER | ESR_RECEIVE_ILLEGAL_VECTOR
