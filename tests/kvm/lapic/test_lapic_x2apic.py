"""The local APIC in x2APIC mode: its MSRs, what they refuse, destinations, and the ways into and out of the mode."""

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
    PPR,
    SELF_IPI,
    SPIV,
    TMR,
    TPR,
    VERSION,
)
from lasskvm.kvm.irqchip.messages import DeliveryMode, InterruptMessage
from lasskvm.state import APIC_BASE, CR8

DISABLED, XAPIC, INVALID, X2APIC = (0xFEE00100 | mode for mode in (0, 1 << 11, 1 << 10, 3 << 10))
FIRST, LAST = 0x800, 0x8FF
TO_SELF = 1 << 18
BANKS = [bank + 0x10 * number for bank in (ISR, TMR, IRR) for number in range(8)]
READ_ONLY = [ID, VERSION, PPR, LDR, CURRENT_COUNT, *BANKS]
WRITE_ONLY = [EOI, SELF_IPI]
BOTH = [
    TPR, SPIV, ESR, ICR, LVT_TIMER, LVT_THERMAL, LVT_PERFORMANCE, LVT_LINT0, LVT_LINT1, LVT_ERROR, INITIAL_COUNT,
    DIVIDE_CONFIGURATION,
]  # fmt: skip


@pytest.fixture
def machine(new_machine):
    return new_machine(x2apic=True)


def faults(function, *arguments) -> bool:
    """Whether *function* raises #GP(0)."""
    try:
        function(*arguments)
    except GuestFault as fault:
        return str(fault) == "#GP(0x0)"
    return False


# The modes


@pytest.mark.parametrize(
    "before, after, allowed, allowed_to_the_host",
    [
        (XAPIC, X2APIC, True, True),
        (XAPIC, DISABLED, True, True),
        (XAPIC, INVALID, False, False),
        (X2APIC, XAPIC, False, True),
        (X2APIC, DISABLED, True, True),
        (X2APIC, INVALID, False, False),
        (DISABLED, XAPIC, True, True),
        (DISABLED, X2APIC, False, True),
        (DISABLED, INVALID, False, False),
    ],
)
def test_the_mode_changes_only_along_the_manuals_arrows(
    new_machine, before: int, after: int, allowed: bool, allowed_to_the_host: bool
) -> None:
    for host_initiated, expected in ((False, allowed), (True, allowed_to_the_host)):
        machine = new_machine()
        machine.lapic.write_base(before, host_initiated=True)
        assert faults(machine.lapic.write_base, after, host_initiated) != expected
        assert machine.words[APIC_BASE] == (after if expected else before)


def test_without_the_feature_there_is_no_x2apic_mode(new_machine) -> None:
    machine = new_machine()
    machine.lapic.has_x2apic = False
    assert faults(machine.lapic.write_base, X2APIC)
    assert faults(machine.lapic.write_base, X2APIC, True)


def test_entering_the_mode_keeps_the_registers_but_id_and_ldr(new_machine) -> None:
    machine = new_machine()
    machine[ID] = 9 << 24
    machine[LDR] = 8 << 24
    machine[TPR] = 0x57
    machine[LVT_ERROR] = 0x71
    machine.lapic.receive(InterruptMessage(0x81, DeliveryMode.FIXED, 9))
    machine.lapic.write_base(X2APIC)
    assert [machine[offset] for offset in (ID, LDR, TPR, LVT_ERROR, IRR + 0x40)] == [0, 1, 0x57, 0x71, 2]


def test_the_page_reads_all_ones_and_ignores_writes(machine) -> None:
    lapic = machine.lapic
    lapic.write_mmio(lapic.base + TPR, 4, 0x20)
    assert [lapic.read_mmio(lapic.base + TPR, size) for size in (1, 4, 8)] == [0xFF, 2**32 - 1, 2**64 - 1]
    assert machine[TPR] == 0


def test_init_leaves_mode_and_logical_id(machine) -> None:
    machine[TPR] = 0x20
    machine.lapic.init_reset()
    assert (machine.words[APIC_BASE], machine[LDR], machine[TPR], machine[SPIV]) == (X2APIC, 1, 0, 0xFF)


def test_a_reset_ends_the_mode(machine) -> None:
    machine.lapic.reset()
    assert machine.words[APIC_BASE] == XAPIC
    assert (machine[LDR], machine[VERSION]) == (0, 0x50014)


# The MSRs


def test_exactly_the_manuals_msrs_can_be_read(machine) -> None:
    readable = {FIRST + (offset >> 4) for offset in READ_ONLY + BOTH}
    assert {msr for msr in range(FIRST - 8, LAST + 8) if not faults(machine.lapic.read_msr, msr)} == readable


def test_exactly_the_manuals_msrs_can_be_written(machine) -> None:
    writable = {FIRST + (offset >> 4) for offset in WRITE_ONLY + BOTH}
    machine[SPIV] = 0xFF
    assert {
        msr for msr in range(FIRST - 8, LAST + 8) if not faults(machine.lapic.write_msr, msr, 0)
    } == writable


@pytest.mark.parametrize("mode", [XAPIC, DISABLED])
def test_no_msr_is_there_in_another_mode(machine, mode: int) -> None:
    machine.lapic.write_base(mode, host_initiated=True)
    for msr in range(FIRST, LAST + 1):
        assert faults(machine.lapic.read_msr, msr)
        assert faults(machine.lapic.write_msr, msr, 0)


@pytest.mark.parametrize(
    "offset, accepted",
    [
        (TPR, 0xFF), (EOI, 0), (SPIV, 0x3FF), (ESR, 0), (LVT_TIMER, 0x710FF), (LVT_THERMAL, 0x117FF),
        (LVT_PERFORMANCE, 0x117FF), (LVT_LINT0, 0x1F7FF), (LVT_LINT1, 0x1F7FF), (LVT_ERROR, 0x110FF),
        (INITIAL_COUNT, 0xFFFFFFFF), (DIVIDE_CONFIGURATION, 0xB), (SELF_IPI, 0xFF),
    ],
)  # fmt: skip
def test_each_reserved_bit_faults(machine, offset: int, accepted: int) -> None:
    msr = FIRST + (offset >> 4)
    refused = sum(1 << bit for bit in range(64) if faults(machine.lapic.write_msr, msr, 1 << bit))
    assert refused == 2**64 - 1 & ~accepted


def test_the_tsc_deadline_bit_is_reserved_without_the_feature(machine) -> None:
    machine.lapic.has_tsc_deadline = False
    assert faults(machine.lapic.write_msr, 0x832, 1 << 18 | 0x41)
    assert machine[LVT_TIMER] == 1 << 16


def test_the_icr_is_one_register_of_64_bits(machine) -> None:
    machine[ICR] = 0xDEADBEEF_00000041 | 1 << 12
    assert machine[ICR] == 0xDEADBEEF_00000041, "it is never pending"
    for bit in (13, 16, 17, *range(20, 32)):
        assert faults(machine.lapic.write_msr, FIRST + (ICR >> 4), 1 << bit), bit


def test_a_refused_write_changes_nothing_and_is_no_logged_error(machine) -> None:
    before = machine.lapic.get_state()
    for offset in (ICR, TPR, APR, DFR, ICR2, ID, SELF_IPI):
        assert faults(machine.lapic.write_msr, FIRST + (offset >> 4), 1 << 40 | 1 << 20)
    assert machine.lapic.get_state() == before


def test_tpr_is_cr8(machine) -> None:
    machine[TPR] = 0x9A
    assert (machine.words[CR8], machine[PPR]) == (9, 0x9A)


def test_an_eoi_ends_the_interrupt(machine) -> None:
    machine.send(0x41, level_triggered=True)
    machine.deliver()
    assert machine[ISR + 0x20] == 2
    machine[EOI] = 0
    assert (machine[ISR + 0x20], machine.ended) == (0, [0x41])


# Messages


@pytest.mark.parametrize(
    "destination, logical, taken",
    [
        (0, False, True),
        (1, False, False),
        (0x100, False, False),
        (0xFF, False, True),
        (0xFFFFFFFF, False, True),
        (0x00000001, True, True),
        (0x00000002, True, False),
        (0x00010001, True, False),
        (0xFFFFFFFF, True, True),
    ],
)
def test_an_external_message_finds_the_apic_by_its_fixed_ids(
    machine, destination: int, logical: bool, taken: bool
) -> None:
    assert machine.lapic.receive(InterruptMessage(0x41, DeliveryMode.FIXED, destination, logical)) == taken


def test_an_ipi_to_0xff_is_to_one_apic_and_not_to_all(machine) -> None:
    machine[ICR] = 0xFF << 32 | 0x41
    assert machine.deliver() == []
    machine[ICR] = 0xFFFFFFFF << 32 | 0x41
    assert machine.deliver() == [0x41]


def test_a_self_ipi_is_one_write(machine) -> None:
    machine[SELF_IPI] = 0x41
    assert machine.deliver() == [0x41]
    assert machine[ICR] == 0
    machine[SELF_IPI] = 0x0F
    assert machine.errors() == 0x60, "illegal both to send and to receive"


def test_an_nmi_to_oneself(machine) -> None:
    machine[ICR] = TO_SELF | 0x400
    assert machine.events == ["nmi"]


# State


def test_the_kvm_registers_go_to_another_apic_in_the_mode(new_machine, machine) -> None:
    machine[ICR] = 0x12345678_00000041
    machine[TPR] = 0x20
    page = machine.lapic.get_registers()
    copy = new_machine(x2apic=True)
    copy.lapic.set_registers(page)
    assert (copy[ICR], copy[LDR], copy[TPR]) == (0x12345678_00000041, 1, 0x20)
    assert copy.lapic.get_registers() == page


def test_a_state_goes_to_another_apic_in_the_mode(new_machine, machine) -> None:
    machine[ICR] = 0x12345678_00000041
    copy = new_machine()
    copy.words[APIC_BASE] = X2APIC
    copy.lapic.set_state(machine.lapic.get_state())
    assert (copy[ICR], copy[LDR]) == (0x12345678_00000041, 1)
