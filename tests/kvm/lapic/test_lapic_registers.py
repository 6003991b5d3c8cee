"""The local APIC's base and registers in xAPIC mode, and its state for KVM and for snapshots."""

import json
import struct

import pytest

from lasskvm.emulator.faults import GuestFault
from lasskvm.kvm.irqchip.apic_registers import (
    APR,
    CURRENT_COUNT,
    DFR,
    DIVIDE_CONFIGURATION,
    EOI,
    ESR,
    ICR,
    ICR2,
    ID,
    INITIAL_COUNT,
    IRR,
    ISR,
    LDR,
    LVT_ERROR,
    LVT_LINT0,
    LVT_LINT1,
    LVT_PERFORMANCE,
    LVT_THERMAL,
    LVT_TIMER,
    LVT_TIMER_PERIODIC,
    LVT_TIMER_TSC_DEADLINE,
    PPR,
    SELF_IPI,
    SPIV,
    TMR,
    TPR,
    VERSION,
)
from lasskvm.kvm.irqchip.messages import DeliveryMode, InterruptMessage
from lasskvm.state import APIC_BASE, CR8, MAXPHYADDR
from lasskvm.x86.msr import APIC_BASE_BSP, APIC_BASE_ENABLE

BASE = 0xFEE00000
NMI = 0x400


# IA32_APIC_BASE


def test_the_base_moves_and_its_owner_hears_of_every_change_once(machine, lapic) -> None:
    bases: list[int] = []
    lapic.on_base_change = lambda: bases.append(machine.words[APIC_BASE])
    steps = [
        0xFED40000 | APIC_BASE_ENABLE,
        0xFED40000 | APIC_BASE_ENABLE | APIC_BASE_BSP,
        0xFED40000,
        0xFED40000,
    ]
    for value in steps:
        lapic.write_base(value)
    assert bases == [steps[0], steps[2]], "APIC_BASE_BSP changes nothing"
    lapic.reset()
    assert bases[2:] == [BASE | APIC_BASE_ENABLE | APIC_BASE_BSP]


@pytest.mark.parametrize("bit", [0, 7, 9, 46, 63])
def test_reserved_bits_of_the_base_fault_whoever_writes_them(machine, lapic, bit: int) -> None:
    assert machine.words[MAXPHYADDR] == 46
    for host_initiated in (False, True):
        with pytest.raises(GuestFault, match=r"#GP\(0x0\)"):
            lapic.write_base(BASE | APIC_BASE_ENABLE | APIC_BASE_BSP | 1 << bit, host_initiated)
    assert machine.words[APIC_BASE] == BASE | APIC_BASE_ENABLE | APIC_BASE_BSP


# Registers


def test_the_registers_are_where_the_manual_has_them() -> None:
    offsets = (ID, VERSION, TPR, APR, PPR, EOI, LDR, DFR, SPIV, ISR, TMR, IRR, ESR, ICR, ICR2)
    assert offsets == (
        0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0, 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
    )  # fmt: skip
    assert (INITIAL_COUNT, CURRENT_COUNT, DIVIDE_CONFIGURATION, SELF_IPI) == (0x380, 0x390, 0x3E0, 0x3F0)
    lvts = (LVT_TIMER, LVT_THERMAL, LVT_PERFORMANCE, LVT_LINT0, LVT_LINT1, LVT_ERROR)
    assert lvts == tuple(range(0x320, 0x380, 0x10))


def test_parts_of_a_register_read_but_only_whole_ones_are_written(machine, lapic) -> None:
    assert [lapic.read_mmio(BASE + VERSION + byte, 1) for byte in range(5)] == [0x14, 0, 5, 0, 0]
    assert [lapic.read_mmio(BASE + VERSION + byte, 2) for byte in (0, 2, 3)] == [0x14, 5, 0]
    assert (lapic.read_mmio(BASE + VERSION, 8), lapic.read_mmio(BASE + VERSION + 4, 4)) == (0, 0)
    for place, size in ((0, 1), (0, 2), (0, 8), (1, 4), (4, 4)):
        lapic.write_mmio(BASE + TPR + place, size, 0x33)
    assert machine[TPR] == 0
    assert machine.errors() == 0


@pytest.mark.parametrize(
    "offset, settable",
    [
        (ID, 0xFF000000), (TPR, 0xFF), (LDR, 0xFF000000), (ICR2, 0xFF000000), (SPIV, 0x3FF),
        (DIVIDE_CONFIGURATION, 0xB),
        (LVT_TIMER, 0x700FF), (LVT_THERMAL, 0x107FF), (LVT_PERFORMANCE, 0x107FF), (LVT_LINT0, 0x1A7FF),
        (LVT_LINT1, 0x1A7FF), (LVT_ERROR, 0x100FF), (INITIAL_COUNT, 0),
    ],
)  # fmt: skip
def test_a_register_keeps_its_own_bits(machine, offset: int, settable: int) -> None:
    # The initial count has none: the reserved timer mode of all ones is set first.
    machine[LVT_TIMER] = 0xFFFF_FFFF
    machine[offset] = 0xFFFF_FFFF
    assert machine[offset] == settable
    assert machine.errors() == 0


@pytest.mark.parametrize("offset", [VERSION, APR, PPR, ISR, TMR + 0x70, IRR + 0x30, CURRENT_COUNT])
def test_a_read_only_register_stays_without_an_error(machine, offset: int) -> None:
    before = machine[offset]
    machine[offset] = 0xFFFF_FFFF
    assert (machine[offset], machine.errors()) == (before, 0)


def test_the_eoi_register_reads_zero(machine) -> None:
    assert (machine[EOI], machine.errors()) == (0, 0)


def test_without_the_feature_the_timer_has_no_tsc_deadline_mode(machine, lapic) -> None:
    lapic.has_tsc_deadline = False
    machine[LVT_TIMER] = LVT_TIMER_TSC_DEADLINE | 0x41
    assert machine[LVT_TIMER] == 0x41
    with pytest.raises(GuestFault):
        lapic.read_tsc_deadline()
    with pytest.raises(GuestFault):
        lapic.write_tsc_deadline(0)


# State


@pytest.fixture
def busy(new_machine):
    """A machine with something in every register that software sees."""
    machine = new_machine(start_ns=777)
    for offset, value in (
        (ID, 3 << 24), (LDR, 2 << 24), (DFR, 0), (TPR, 0x27), (LVT_TIMER, LVT_TIMER_PERIODIC | 0x61), (LVT_LINT1, NMI),
        (LVT_ERROR, 0x71), (DIVIDE_CONFIGURATION, 0b1011), (INITIAL_COUNT, 1_000_000), (ICR2, 9 << 24), (ICR, 0x41),
    ):  # fmt: skip
        machine[offset] = value
    for vector, level in ((0x35, True), (0x80, False), (0x91, True)):
        machine.lapic.receive(InterruptMessage(vector, DeliveryMode.FIXED, 3, level_triggered=level))
    machine.lapic.acknowledge()
    machine.clock.skip_to(777 + 400_000)
    return machine


def test_the_kvm_registers_are_the_apic_page(busy) -> None:
    page = busy.lapic.get_registers()
    assert len(page) == 1024
    readable = [offset for offset in range(0, 0x400, 0x10) if struct.unpack_from("<I", page, offset)[0]]
    assert {ID, VERSION, TPR, PPR, IRR + 0x10, ISR + 0x40, TMR + 0x10, ICR2, CURRENT_COUNT} <= set(readable)
    for offset in readable:
        assert struct.unpack_from("<I", page, offset)[0] == busy[offset], hex(offset)
    assert busy[CURRENT_COUNT] == 600_000


def test_another_apic_goes_on_from_the_kvm_registers(busy, machine) -> None:
    page = busy.lapic.get_registers()
    machine.events.clear()
    machine.lapic.set_registers(page)
    assert machine.lapic.get_registers() == page
    assert (machine.words[CR8], machine.events) == (2, ["kick"])
    assert machine.clock.next_deadline() == machine.clock.now() + 600_000
    machine[EOI] = 0
    assert machine.ended == [0x91]
    assert machine.deliver() == [0x80]


def test_the_kvm_registers_cannot_bring_an_illegal_vector_or_bit(machine) -> None:
    machine.lapic.set_registers(b"\xff" * 1024)
    machine[TPR] = 0
    assert (machine[IRR], machine[ISR], machine[SPIV], machine[ID]) == (
        0xFFFF0000,
        0xFFFF0000,
        0x3FF,
        0xFF000000,
    )


@pytest.mark.parametrize("size", [0, 1023, 4096])
def test_kvm_registers_of_another_size_are_refused(lapic, size: int) -> None:
    with pytest.raises(ValueError, match="1024 bytes"):
        lapic.set_registers(bytes(size))


def through_json(state: dict[str, object]) -> dict[str, object]:
    copy: dict[str, object] = json.loads(json.dumps(state))
    return copy


def test_another_apic_goes_on_from_a_state(busy, new_machine) -> None:
    original, copy = busy, new_machine(start_ns=400_777)
    original.send(2)
    original.events.clear()
    copy.words[CR8] = original.words[CR8]
    copy.events.clear()
    copy.lapic.set_state(through_json(original.lapic.get_state()))
    assert copy.events == [], "restoring is no event"
    assert copy.lapic.get_state() == original.lapic.get_state()
    for machine in (original, copy):
        machine.clock.skip_to(1_000_777)
        machine.clock.run_due()
        machine[EOI] = 0
        machine[EOI] = 0
    assert copy.deliver() == original.deliver() == [0x80]
    assert copy.lapic.get_registers() == original.lapic.get_registers()


def test_a_restored_base_is_announced(machine, lapic) -> None:
    announced: list[int] = []
    lapic.on_base_change = lambda: announced.append(lapic.base)
    machine.words[APIC_BASE] = 0xFED40000 | APIC_BASE_ENABLE
    lapic.set_state(lapic.get_state())
    assert announced == [0xFED40000]


@pytest.mark.parametrize(
    "lie", [{"registers": {}}, {"errors": "7"}, {"vectors": {"irr": "x"}}, {"timer": None}]
)
def test_what_is_no_state_is_refused(lapic, lie: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        lapic.set_state(lapic.get_state() | lie)
