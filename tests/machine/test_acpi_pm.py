"""ACPI fixed hardware: the PM timer, its interrupt, the power button, sleep states and the SMI command port."""

import json
import random

import pytest

from lasskvm.kvm.clock import NANOSECONDS_PER_SECOND, VirtualClock
from lasskvm.kvm.iobus import PortBus
from lasskvm.machine.devices.acpi_pm import AcpiPm

STATUS, ENABLE, CONTROL, TIMER = 0x600, 0x602, 0x604, 0x608
GPE_STATUS, GPE_ENABLE = 0xAFE0, 0xAFE2
SMI_COMMAND, SMI_STATUS = 0xB2, 0xB3
TMR, GBL, PWRBTN = 1 << 0, 1 << 5, 1 << 8
SCI_EN, SLP_EN = 1 << 0, 1 << 13
HZ = 3_579_545
#: The first tick whose number has bit 23 set.
HALF = 1 << 23


class Bench:
    """The device on a bus and a clock that moves by hand, and the history of the SCI."""

    def __init__(self) -> None:
        self.blocks = 0
        self.clock = VirtualClock(lambda: self.blocks)
        self.edges: list[bool] = []
        self.power_offs = 0
        self.pm = AcpiPm(self.clock, self.edges.append, self._power_off)
        self.bus = PortBus()
        self.bus.register(self.pm)

    def _power_off(self) -> None:
        self.power_offs += 1

    def get(self, port: int, size: int = 2) -> int:
        return self.bus.read(port, size)

    def put(self, port: int, value: int, size: int = 2) -> None:
        assert self.bus.write(port, size, value)

    def go_to_tick(self, tick: int) -> None:
        """Let time pass up to the first nanosecond of a tick of the PM timer, and run what is due."""
        self.clock.skip_to(-(-tick * NANOSECONDS_PER_SECOND // HZ))
        self.clock.run_due()


@pytest.fixture
def bench():
    return Bench()


def test_the_timer_counts_3579545_ticks_a_second(bench):
    assert bench.get(TIMER, 4) == 0
    bench.clock.skip_to(NANOSECONDS_PER_SECOND)
    assert bench.get(TIMER, 4) == HZ


def test_the_timer_has_24_bits(bench):
    bench.go_to_tick(2 * HALF - 1)
    assert bench.get(TIMER, 4) == 0xFFFFFF
    bench.go_to_tick(2 * HALF + 5)
    assert bench.get(TIMER, 4) == 5


def test_the_timer_can_be_read_in_pieces_and_not_be_written(bench):
    bench.go_to_tick(0x123456)
    assert [bench.get(TIMER + byte, 1) for byte in range(4)] == [0x56, 0x34, 0x12, 0x00]
    assert bench.get(TIMER + 1, 2) == 0x1234
    bench.put(TIMER, 0xFFFFFFFF, 4)
    assert bench.get(TIMER, 4) == 0x123456


@pytest.mark.parametrize("half_periods", [1, 2, 3])
def test_timer_status_is_set_whenever_the_top_bit_changes(bench, half_periods):
    bench.go_to_tick((half_periods - 1) * HALF)
    bench.put(STATUS, TMR)
    bench.go_to_tick(half_periods * HALF - 1)
    assert not bench.get(STATUS) & TMR
    bench.go_to_tick(half_periods * HALF)
    assert bench.get(STATUS) & TMR


def test_timer_status_stays_until_it_is_cleared_by_writing_a_one(bench):
    bench.go_to_tick(HALF)
    bench.put(STATUS, PWRBTN)
    assert bench.get(STATUS) == TMR
    bench.put(STATUS, TMR)
    assert bench.get(STATUS) == 0


def test_the_timer_interrupts_once_in_each_half_period_while_enabled(bench):
    bench.put(ENABLE, TMR)
    for number in (1, 2, 3):
        assert bench.clock.next_deadline() == -(-number * HALF * NANOSECONDS_PER_SECOND // HZ)
        bench.go_to_tick(number * HALF)
        assert bench.edges == [True]
        bench.put(STATUS, TMR)
        assert bench.edges == [True, False]
        bench.edges.clear()


def test_the_clock_has_nothing_to_wait_for_while_the_interrupt_is_off_or_up(bench):
    assert bench.clock.next_deadline() is None
    bench.put(ENABLE, TMR)
    bench.put(ENABLE, 0)
    assert bench.clock.next_deadline() is None
    bench.put(ENABLE, TMR)
    bench.go_to_tick(HALF)
    assert bench.edges == [True]
    assert bench.clock.next_deadline() is None


def test_enabling_an_event_that_has_happened_interrupts_at_once(bench):
    bench.go_to_tick(HALF)
    assert bench.edges == []
    bench.put(ENABLE, TMR)
    assert bench.edges == [True]
    bench.put(ENABLE, 0)
    assert bench.edges == [True, False]


def test_the_power_button_interrupts_a_guest_that_listens(bench):
    bench.put(ENABLE, PWRBTN)
    assert bench.pm.press_power_button()
    assert bench.edges == [True]
    assert bench.get(STATUS) == PWRBTN
    bench.put(STATUS, PWRBTN)
    assert bench.edges == [True, False]


def test_the_power_button_has_no_effect_on_a_guest_that_does_not_listen(bench):
    assert not bench.pm.press_power_button()
    assert bench.get(STATUS) == 0
    bench.put(ENABLE, PWRBTN)
    assert bench.edges == []


def test_enables_are_read_back_also_bytewise(bench):
    bench.put(ENABLE, 0x21, 1)
    bench.put(ENABLE + 1, 0x05, 1)
    assert bench.get(ENABLE) == 0x0521
    assert bench.get(STATUS, 4) == 0x05210000


def test_a_byte_written_to_the_status_clears_only_its_own_bits(bench):
    bench.put(ENABLE, PWRBTN)
    bench.pm.press_power_button()
    bench.go_to_tick(HALF)
    bench.put(STATUS + 1, 0xFF, 1)
    assert bench.get(STATUS) == TMR


def test_sleep_type_0_powers_the_machine_off(bench):
    bench.put(CONTROL, 0x2000)
    assert bench.power_offs == 1


def test_the_enable_bit_of_sleep_may_come_as_a_byte_and_reads_as_0(bench):
    bench.put(CONTROL + 1, SLP_EN >> 8, 1)
    assert bench.power_offs == 1
    assert bench.get(CONTROL) == 0


@pytest.mark.parametrize(("sleep_type", "power_offs"), [*enumerate((1, 0, 1, 0, 0, 0, 0, 0))])
def test_suspend_to_disk_powers_off_too_and_other_sleep_types_do_nothing(bench, sleep_type, power_offs):
    bench.put(CONTROL, SLP_EN | sleep_type << 10)
    assert bench.power_offs == power_offs
    assert bench.get(CONTROL) == sleep_type << 10


def test_a_sleep_type_without_the_enable_bit_is_only_kept(bench):
    bench.put(CONTROL, SCI_EN)
    assert bench.power_offs == 0
    assert bench.get(CONTROL) == SCI_EN


def test_the_smi_command_port_hands_the_events_to_the_os_and_back(bench):
    assert bench.get(CONTROL) & SCI_EN == 0
    bench.put(SMI_COMMAND, 0xF1, 1)
    assert bench.get(CONTROL) & SCI_EN
    bench.put(SMI_COMMAND, 0x55, 1)
    assert bench.get(CONTROL) & SCI_EN
    bench.put(SMI_COMMAND, 0xF0, 1)
    assert bench.get(CONTROL) & SCI_EN == 0
    bench.put(SMI_STATUS, 0x77, 1)
    assert bench.get(SMI_COMMAND) == 0x77F0


def test_general_purpose_events_can_be_enabled_and_never_happen(bench):
    bench.put(GPE_STATUS, 0xFFFFFFFF, 4)
    assert bench.get(GPE_STATUS, 4) == 0xFFFF0000
    bench.put(GPE_ENABLE, 0x12, 1)
    assert (bench.get(GPE_STATUS), bench.get(GPE_ENABLE)) == (0, 0xFF12)
    assert bench.edges == []


def test_the_unused_bytes_between_control_and_timer_read_as_ones(bench):
    assert bench.get(CONTROL, 4) == 0xFFFF0000
    assert bench.get(0x607, 2) == 0x00FF


def test_reset_turns_the_events_off_and_lets_the_timer_run_on(bench):
    bench.put(ENABLE, TMR | PWRBTN)
    bench.put(SMI_COMMAND, 0xF1, 1)
    bench.go_to_tick(HALF + 7)
    bench.pm.reset()
    assert bench.edges == [True, False]
    assert (bench.get(STATUS), bench.get(ENABLE), bench.get(CONTROL)) == (0, 0, 0)
    assert bench.get(TIMER, 4) == HALF + 7
    assert bench.clock.next_deadline() is None


def test_a_saved_device_interrupts_when_it_would_have(bench):
    bench.put(ENABLE, TMR | PWRBTN)
    bench.put(SMI_COMMAND, 0xF1, 1)
    bench.go_to_tick(1000)
    other = Bench()
    other.clock.restore_skipped(bench.clock.skipped_ns)
    other.pm.set_state(json.loads(json.dumps(bench.pm.get_state())))
    assert other.pm.get_state() == bench.pm.get_state()
    assert (other.get(ENABLE), other.get(CONTROL), other.edges) == (TMR | PWRBTN, SCI_EN, [])
    other.go_to_tick(HALF)
    assert other.edges == [True]


def test_random_accesses_leave_one_timer_at_most_and_values_in_range(bench):
    chance = random.Random(600)
    ports = [port + near for span in bench.pm.ports for port in span for near in (-3, 0)]
    for _ in range(100_000):
        port, size = chance.choice(ports), chance.choice((1, 2, 4))
        if chance.random() < 0.5:
            value = bench.bus.read(port, size)
            assert value is None or 0 <= value < 1 << 8 * size
        else:
            bench.bus.write(port, size, chance.getrandbits(8 * size))
        bench.blocks += chance.randrange(1, 200_000)
        bench.clock.run_due()
        assert bench.clock.queue_length < 200
    assert bench.edges
    assert bench.power_offs
