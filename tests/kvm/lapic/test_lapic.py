"""The local APIC: power-on and INIT, requests, priorities, end of interrupt, destinations."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasskvm.kvm.irqchip.apic_registers import (
    DFR,
    DFR_CLUSTER,
    DFR_FLAT,
    EOI,
    ID,
    INITIAL_COUNT,
    IRR,
    ISR,
    LDR,
    LVT_ERROR,
    LVT_LINT0,
    LVT_MASKED,
    LVT_REGISTERS,
    LVT_TIMER,
    LVT_TIMER_PERIODIC,
    PPR,
    SPIV,
    TMR,
    TPR,
    VERSION,
)
from lasskvm.kvm.irqchip.messages import DeliveryMode, InterruptMessage
from lasskvm.state import APIC_BASE, CR8
from lasskvm.x86.msr import APIC_BASE_BSP, APIC_BASE_ENABLE

BASE = 0xFEE00000
EXTINT = 0x700
SOFTWARE_ENABLED = 0x1FF


# Power-on and INIT


def test_after_power_on_the_apic_is_disabled_by_software_and_lets_the_8259a_through(machine, lapic) -> None:
    lapic.reset()
    assert machine.words[APIC_BASE] == BASE | APIC_BASE_ENABLE | APIC_BASE_BSP
    assert [machine[offset] for offset in (ID, VERSION, TPR, LDR, DFR, SPIV)] == [
        0,
        0x50014,
        0,
        0,
        DFR_FLAT,
        0xFF,
    ]
    assert [machine[offset] for offset in LVT_REGISTERS] == [
        LVT_MASKED,
        LVT_MASKED,
        LVT_MASKED,
        EXTINT,
        LVT_MASKED,
        LVT_MASKED,
    ]
    assert lapic.accepts_pic()
    assert not machine.send(0x40)


def test_init_resets_all_but_base_and_id(machine, lapic) -> None:
    lapic.write_base(0xFED40000 | APIC_BASE_ENABLE | APIC_BASE_BSP)
    machine[ID] = 5 << 24
    machine[LDR] = 1 << 24
    machine[TPR] = 0x57
    machine[LVT_LINT0] = LVT_MASKED
    machine[LVT_TIMER] = LVT_TIMER_PERIODIC | 0x60
    machine[INITIAL_COUNT] = 1000
    lapic.receive(InterruptMessage(0x40, DeliveryMode.FIXED, 5))
    lapic.init_reset()
    assert (lapic.base, machine[ID]) == (0xFED40000, 5 << 24)
    assert [machine[offset] for offset in (LDR, TPR, SPIV, LVT_LINT0, LVT_TIMER, INITIAL_COUNT)] == [
        0, 0, 0xFF, EXTINT, LVT_MASKED, 0,
    ]  # fmt: skip
    assert (machine.words[CR8], machine[IRR + 0x20], machine.clock.next_deadline()) == (0, 0, None)


# Requests and priorities


def test_a_message_requests_an_interrupt_and_kicks(machine, lapic) -> None:
    machine.events.clear()
    assert machine.send(0x41)
    assert machine.events == ["kick"]
    assert (lapic.pending_vector(), machine[IRR + 0x20]) == (0x41, 1 << 1)
    assert lapic.acknowledge() == 0x41
    assert (machine[IRR + 0x20], machine[ISR + 0x20]) == (0, 1 << 1)


def test_requests_for_one_vector_merge_and_both_count_as_taken(machine) -> None:
    assert machine.send(0x41)
    assert machine.send(0x41)
    assert machine.deliver() == [0x41]


def test_the_higher_class_interrupts_the_lower_and_equals_wait(machine) -> None:
    for vector in (0x45, 0x31, 0x48, 0x52):
        machine.send(vector)
    assert machine.deliver() == [0x52]
    machine[EOI] = 0
    assert machine.deliver() == [0x48]
    machine.send(0x4F)
    assert machine.deliver() == [], "the class in service is no lower"
    machine.send(0x60)
    assert machine.deliver() == [0x60]


def test_eoi_ends_the_highest_in_service(machine) -> None:
    machine.send(0x31)
    machine.deliver()
    machine.send(0x52)
    machine.deliver()
    machine[EOI] = 0
    assert (machine[ISR + 0x20], machine[ISR + 0x10]) == (0, 1 << 0x11)
    machine[EOI] = 0xFFFF_FFFF
    assert machine[ISR + 0x10] == 0
    machine[EOI] = 0


@pytest.mark.parametrize(
    "tpr, delivered", [(0x30, [0x41]), (0x3F, [0x41]), (0x40, []), (0x41, []), (0xFF, [])]
)
def test_the_task_priority_holds_back_its_class_and_lower_ones(
    machine, tpr: int, delivered: list[int]
) -> None:
    machine[TPR] = tpr
    machine.send(0x41)
    assert machine.deliver() == delivered


def test_cr8_is_the_upper_half_of_tpr_and_writing_it_clears_the_lower(machine, lapic) -> None:
    machine[TPR] = 0x57
    assert machine.words[CR8] == 5
    machine.words[CR8] = 3
    lapic.cr8_written()
    assert machine[TPR] == 0x30


def test_lowering_the_task_priority_kicks_when_something_waits(machine, lapic) -> None:
    machine[TPR] = 0xF0
    machine.send(0x41)
    machine.events.clear()
    machine[TPR] = 0x50
    assert machine.events == []
    machine.words[CR8] = 0
    lapic.cr8_written()
    assert machine.events == ["kick"]


@pytest.mark.parametrize("tpr, in_service, ppr", [(0x23, 0x41, 0x40), (0x43, 0x41, 0x43), (0x57, 0x41, 0x57)])
def test_the_processor_priority_is_the_higher_of_task_and_service(
    machine, tpr: int, in_service: int, ppr: int
) -> None:
    machine.send(in_service)
    machine.deliver()
    machine[TPR] = tpr
    assert machine[PPR] == ppr


def test_an_interrupt_that_is_gone_is_acknowledged_with_the_spurious_vector(machine, lapic) -> None:
    machine[SPIV] = 0x1EF
    machine.send(0x41)
    machine[TPR] = 0x40
    assert lapic.acknowledge() == 0xEF
    assert machine[ISR + 0x70] == 0, "a spurious interrupt takes no EOI"
    machine[TPR] = 0
    assert machine.deliver() == [0x41]


class Priorities:
    """What the manual says about requests, service and task priority, as sets."""

    def __init__(self) -> None:
        self.requested: set[int] = set()
        self.in_service: set[int] = set()
        self.tpr = 0

    def pending(self) -> int | None:
        barrier = max([self.tpr, *self.in_service]) >> 4
        ready = [vector for vector in self.requested if vector >> 4 > barrier]
        return max(ready, default=None)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("request"), st.integers(16, 255)),
            st.tuples(st.just("tpr"), st.integers(0, 255)),
            st.tuples(st.sampled_from(["take", "end"]), st.just(0)),
        ),
        max_size=60,
    )
)
def test_the_order_of_delivery_is_that_of_the_manual(new_machine, steps: list[tuple[str, int]]) -> None:
    machine, model = new_machine(), Priorities()
    for name, value in steps:
        if name == "request":
            machine.send(value)
            model.requested.add(value)
        elif name == "tpr":
            machine[TPR] = model.tpr = value
        elif name == "end":
            machine[EOI] = 0
            model.in_service -= {max(model.in_service, default=0)}
        elif (vector := model.pending()) is not None:
            assert machine.lapic.acknowledge() == vector
            model.requested.remove(vector)
            model.in_service.add(vector)
        assert machine.lapic.pending_vector() == model.pending()


# End of interrupt


def test_only_a_level_triggered_interrupt_is_ended_at_the_ioapic(machine) -> None:
    machine.send(0x41, level_triggered=True)
    machine.send(0x52)
    assert machine[TMR + 0x20] == 1 << 1
    machine.deliver()
    machine[EOI] = 0
    assert machine.ended == []
    machine.deliver()
    machine[EOI] = 0
    assert machine.ended == [0x41]


def test_an_edge_takes_the_level_mark_of_its_vector_away(machine) -> None:
    machine.send(0x41, level_triggered=True)
    machine.send(0x41)
    machine.deliver()
    machine[EOI] = 0
    assert machine.ended == []


def test_a_line_that_is_still_up_interrupts_again_from_within_the_eoi(machine, lapic) -> None:
    lapic.on_eoi = lambda vector: machine.ended.append(machine.send(vector, level_triggered=True))
    machine.send(0x41, level_triggered=True)
    for _ in range(3):
        assert machine.deliver() == [0x41]
        machine[EOI] = 0
    assert machine.ended == [True] * 3


# Destinations


@pytest.mark.parametrize(
    "own, destination, taken", [(0, 0, True), (0, 1, False), (9, 9, True), (9, 0, False), (9, 0xFF, True)]
)
def test_a_physical_destination_is_an_id_or_everybody(
    machine, lapic, own: int, destination: int, taken: bool
) -> None:
    machine[ID] = own << 24
    assert lapic.receive(InterruptMessage(0x41, DeliveryMode.FIXED, destination)) == taken
    assert machine.deliver() == [0x41] * taken


@pytest.mark.parametrize(
    "model, own, destination, taken",
    [
        (DFR_FLAT, 0x04, 0x06, True),
        (DFR_FLAT, 0x04, 0x03, False),
        (DFR_FLAT, 0x00, 0xFF, True),
        (DFR_CLUSTER, 0x24, 0x26, True),
        (DFR_CLUSTER, 0x24, 0x23, False),
        (DFR_CLUSTER, 0x24, 0x16, False),
        (DFR_CLUSTER, 0x24, 0xFF, True),
        (0x5FFFFFFF, 0x24, 0x24, False),
    ],
)
def test_a_logical_destination_is_a_set_by_the_model_in_dfr(
    machine, lapic, model: int, own: int, destination: int, taken: bool
) -> None:
    machine[DFR] = model & 0xF000_0000
    machine[LDR] = own << 24 | 0xFFFF
    assert (machine[DFR], machine[LDR]) == (model, own << 24)
    message = InterruptMessage(0x41, DeliveryMode.LOWEST_PRIORITY, destination, logical=True)
    assert lapic.receive(message) == taken


@pytest.mark.parametrize(
    "mode, taken, events",
    [
        (DeliveryMode.SMI, False, []),
        (DeliveryMode.RESERVED, False, []),
        (DeliveryMode.NMI, True, ["nmi"]),
        (DeliveryMode.INIT, True, ["init"]),
        (DeliveryMode.STARTUP, True, [("startup", 0x41)]),
        (DeliveryMode.EXTINT, False, []),
    ],
)
def test_other_delivery_modes_do_without_a_request(
    machine, lapic, mode: DeliveryMode, taken: bool, events: list[object]
) -> None:
    machine.events.clear()
    assert lapic.receive(InterruptMessage(0x41, mode, 0)) == taken
    assert (machine.events, lapic.pending_vector()) == (events, None)


# Disabled


def test_a_software_disabled_apic_keeps_requests_and_takes_only_nmi_init_and_startup(machine, lapic) -> None:
    machine.send(0x41)
    machine[SPIV] = 0xFF
    assert lapic.pending_vector() is None
    assert not machine.send(0x52)
    assert lapic.receive(InterruptMessage(0, DeliveryMode.NMI, 0))
    machine[SPIV] = SOFTWARE_ENABLED
    assert machine.deliver() == [0x41]


def test_software_disabling_masks_the_local_vector_table_for_good(machine) -> None:
    for offset in LVT_REGISTERS:
        machine[offset] = 0x41
    machine[SPIV] = 0xFF
    machine[LVT_ERROR] = 0x42
    machine[SPIV] = SOFTWARE_ENABLED
    assert [machine[offset] & LVT_MASKED for offset in LVT_REGISTERS] == [LVT_MASKED] * 6
    machine[LVT_ERROR] = 0x42
    assert machine[LVT_ERROR] == 0x42


def test_a_globally_disabled_apic_reads_all_ones_ignores_writes_and_takes_nothing(machine, lapic) -> None:
    machine[LVT_LINT0] = LVT_MASKED
    machine[TPR] = 0x20
    assert not lapic.accepts_pic()
    lapic.write_base(BASE | APIC_BASE_BSP)
    machine[TPR] = 0
    assert (machine[VERSION], lapic.read_mmio(BASE + 1, 1), lapic.accepts_pic()) == (0xFFFF_FFFF, 0xFF, True)
    assert not lapic.receive(InterruptMessage(0x41, DeliveryMode.NMI, 0xFF))
    lapic.write_base(BASE | APIC_BASE_BSP | APIC_BASE_ENABLE)
    assert (machine[VERSION], machine[TPR], lapic.accepts_pic()) == (0x50014, 0x20, False)


def test_enabling_gives_the_id_back(machine, lapic) -> None:
    machine[ID] = 7 << 24
    lapic.write_base(BASE | APIC_BASE_BSP)
    lapic.write_base(BASE | APIC_BASE_BSP | APIC_BASE_ENABLE)
    assert machine[ID] == 0
