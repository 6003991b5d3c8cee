"""The 8254: what its counters read, when its outputs change, and when channel 0 interrupts."""

import pytest

from lasskvm.kvm.clock import NANOSECONDS_PER_SECOND, VirtualClock
from lasskvm.kvm.irqchip.pit import PIT_FREQUENCY, REFRESH_PERIOD_NS, Pit

CONTROL, SPEAKER = 0x43, 0x61
LOW, HIGH, LOW_HIGH = 0x10, 0x20, 0x30
GATE2, REFRESH, OUT2 = 0x01, 0x10, 0x20


class Bench:
    """A PIT, a clock that moves by hand, and the times at which IRQ 0 rose."""

    def __init__(self) -> None:
        self.clock = VirtualClock(lambda: 0)
        self.interrupts: list[int] = []
        self.levels: list[bool] = []
        self.pit = Pit(self.clock, self._irq)

    def _irq(self, level: bool) -> None:
        self.levels.append(level)
        if level:
            self.interrupts.append(self.clock.now())

    def control(self, value: int) -> None:
        self.pit.write_port(CONTROL, 1, value)

    def program(self, channel: int, mode: int, count: int, bcd: bool = False) -> None:
        self.control(channel << 6 | LOW_HIGH | mode << 1 | bcd)
        self.pit.write_port(0x40 + channel, 1, count & 0xFF)
        self.pit.write_port(0x40 + channel, 1, count >> 8)

    def count(self, channel: int = 0) -> int:
        self.control(channel << 6)
        return self.read(channel) | self.read(channel) << 8

    def read(self, channel: int = 0) -> int:
        return self.pit.read_port(0x40 + channel, 1)

    def status(self, channel: int = 0) -> int:
        self.control(0xE0 | 2 << channel)
        return self.read(channel)

    def out(self, channel: int = 0) -> int:
        return self.status(channel) >> 7

    def gate2(self, level: bool) -> None:
        self.pit.write_port(SPEAKER, 1, GATE2 if level else 0)

    def at(self, tick: int) -> None:
        """Move to the first nanosecond at which the oscillator has made ``tick`` ticks."""
        self.clock.skip_to(time_of(tick))

    def idle_until(self, ns: int) -> None:
        """Go from deadline to deadline, as a guest does that halts."""
        deadline = self.clock.next_deadline()
        while deadline is not None and deadline <= ns:
            self.clock.skip_to(deadline)
            self.clock.run_due()
            deadline = self.clock.next_deadline()
        self.clock.skip_to(ns)


def time_of(tick: int) -> int:
    return -(-tick * NANOSECONDS_PER_SECOND // PIT_FREQUENCY)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_mode_0_goes_high_at_the_terminal_count_and_interrupts_once(bench):
    bench.program(0, 0, 1000)
    bench.at(999)
    bench.clock.run_due()
    assert (bench.out(), bench.count(), bench.interrupts) == (0, 1, [])
    bench.at(1000)
    bench.clock.run_due()
    assert (bench.out(), bench.count(), bench.interrupts) == (1, 0, [time_of(1000)])
    bench.idle_until(NANOSECONDS_PER_SECOND)
    assert len(bench.interrupts) == 1


def test_mode_0_goes_on_counting_below_zero(bench):
    bench.program(0, 0, 1000)
    bench.at(1010)
    assert bench.count() == 0x10000 - 10


def test_mode_2_is_low_for_the_last_tick_and_reloads(bench):
    bench.program(0, 2, 100)
    seen = []
    for tick in (0, 1, 98, 99, 100, 101):
        bench.at(tick)
        seen.append((bench.count(), bench.out()))
    assert seen == [(100, 1), (99, 1), (2, 1), (1, 0), (100, 1), (99, 1)]


@pytest.mark.parametrize(
    ("period", "expected"),
    [
        (6, [(6, 1), (4, 1), (2, 1), (6, 0), (4, 0), (2, 0), (6, 1)]),
        (5, [(4, 1), (2, 1), (0, 1), (4, 0), (2, 0), (4, 1), (2, 1)]),
    ],
)
def test_mode_3_counts_by_two_and_an_odd_count_is_high_for_longer(bench, period, expected):
    bench.program(0, 3, period)
    seen = []
    for tick in range(len(expected)):
        bench.at(tick)
        seen.append((bench.count(), bench.out()))
    assert seen == expected


def test_mode_4_strobes_low_for_one_tick_and_interrupts_when_it_rises(bench):
    bench.program(0, 4, 50)
    outs = []
    for tick in (0, 49, 50, 51, 500):
        bench.at(tick)
        bench.clock.run_due()
        outs.append(bench.out())
    assert outs == [1, 1, 0, 1, 1]
    assert bench.interrupts == [time_of(51)]


def test_mode_1_waits_for_its_gate_and_can_be_triggered_again(bench):
    bench.program(2, 1, 100)
    bench.at(500)
    assert bench.out(2) == 1
    bench.gate2(True)
    assert (bench.out(2), bench.count(2)) == (0, 100)
    bench.at(560)
    bench.gate2(False)
    bench.gate2(True)
    bench.at(650)
    assert (bench.out(2), bench.count(2)) == (0, 10)
    bench.at(660)
    assert bench.out(2) == 1


def test_mode_1_takes_a_new_count_at_the_next_trigger(bench):
    bench.program(2, 1, 100)
    bench.gate2(True)
    bench.pit.write_port(0x42, 1, 7)
    bench.pit.write_port(0x42, 1, 0)
    bench.at(10)
    assert bench.count(2) == 90
    bench.gate2(False)
    bench.gate2(True)
    assert bench.count(2) == 7


def test_mode_5_strobes_after_a_trigger(bench):
    bench.program(2, 5, 20)
    bench.at(100)
    bench.gate2(True)
    outs = []
    for tick in (119, 120, 121):
        bench.at(tick)
        outs.append(bench.out(2))
    assert outs == [1, 0, 1]


def test_channel_0_never_interrupts_in_the_gate_triggered_modes(bench):
    for mode in (1, 5):
        bench.program(0, mode, 10)
        assert bench.clock.next_deadline() is None


def test_a_closed_gate_holds_a_mode_0_count(bench):
    bench.gate2(True)
    bench.program(2, 0, 100)
    bench.at(40)
    bench.gate2(False)
    bench.at(1000)
    assert bench.count(2) == 60
    bench.gate2(True)
    bench.at(1059)
    assert bench.out(2) == 0
    bench.at(1060)
    assert bench.out(2) == 1


def test_opening_the_gate_restarts_a_rate_generator(bench):
    bench.gate2(True)
    bench.program(2, 2, 100)
    bench.at(30)
    bench.gate2(False)
    assert bench.out(2) == 1
    bench.at(77)
    bench.gate2(True)
    assert bench.count(2) == 100
    bench.at(87)
    assert bench.count(2) == 90


def test_linux_calibrates_the_tsc_on_channel_2_through_port_61(bench):
    """What pit_calibrate_tsc() does: gate on, speaker off, mode 0, then wait for OUT2 in port 0x61."""
    pit = bench.pit
    pit.write_port(SPEAKER, 1, pit.read_port(SPEAKER, 1) & ~0x02 | GATE2)
    bench.control(0xB0)
    latch = PIT_FREQUENCY // 20
    pit.write_port(0x42, 1, latch & 0xFF)
    assert not pit.read_port(SPEAKER, 1) & OUT2
    pit.write_port(0x42, 1, latch >> 8)
    bench.at(latch - 1)
    assert not pit.read_port(SPEAKER, 1) & OUT2
    bench.at(latch)
    assert pit.read_port(SPEAKER, 1) & OUT2


def test_the_refresh_bit_toggles(bench):
    levels = []
    for period in range(4):
        bench.clock.skip_to(period * REFRESH_PERIOD_NS)
        levels.append(bench.pit.read_port(SPEAKER, 1) & REFRESH)
    assert levels == [0, REFRESH, 0, REFRESH]


def test_a_count_of_0_stands_for_65536(bench):
    bench.program(0, 2, 0)
    bench.at(1)
    assert bench.count() == 0xFFFF
    assert bench.clock.next_deadline() == time_of(0x10000)


def test_bcd_counts_in_decimal(bench):
    bench.program(0, 2, 0x1234, bcd=True)
    bench.at(35)
    assert bench.count() == 0x1199
    bench.program(0, 2, 0, bcd=True)
    bench.at(36)
    assert bench.count() == 0x9999


def test_low_and_high_byte_access(bench):
    bench.control(LOW | 2 << 1)
    bench.pit.write_port(0x40, 1, 200)
    bench.at(100)
    assert [bench.read(), bench.read()] == [100, 100]
    bench.control(HIGH | 2 << 1)
    bench.pit.write_port(0x40, 1, 0x12)
    assert (bench.read(), bench.clock.next_deadline()) == (0x12, time_of(100 + 0x1200))


def test_low_high_reads_alternate_on_the_running_count(bench):
    bench.program(0, 2, 0x1234)
    assert [bench.read() for _ in range(4)] == [0x34, 0x12, 0x34, 0x12]


def test_a_latched_count_stays_until_both_bytes_are_read(bench):
    bench.program(0, 2, 0x1234)
    bench.control(0x00)
    bench.at(0x100)
    bench.control(0x00)
    assert [bench.read(), bench.read()] == [0x34, 0x12], "the second latch command is ignored"
    assert bench.count() == 0x1134


def test_read_back_gives_the_status_before_the_count(bench):
    bench.program(0, 3, 0x1234)
    bench.control(0xC2)
    assert bench.read() == 0x80 | LOW_HIGH | 3 << 1
    assert [bench.read(), bench.read()] == [0x34, 0x12]


def test_read_back_can_select_several_channels(bench):
    for channel in range(3):
        bench.program(channel, 2, 0x0101 * (channel + 1))
    bench.control(0xD0 | 0x0E)
    bench.at(50)
    assert [bench.read(channel) for channel in range(3)] == [1, 2, 3]


def test_the_null_count_bit_tells_that_no_count_was_loaded(bench):
    bench.control(LOW_HIGH | 2 << 1)
    assert bench.status() & 0x40
    bench.pit.write_port(0x40, 1, 1)
    assert bench.status() & 0x40
    bench.pit.write_port(0x40, 1, 1)
    assert not bench.status() & 0x40


def test_modes_6_and_7_are_modes_2_and_3(bench):
    bench.control(LOW_HIGH | 6 << 1)
    assert bench.status() & 0x0E == 2 << 1
    bench.control(LOW_HIGH | 7 << 1)
    assert bench.status() & 0x0E == 3 << 1


@pytest.mark.parametrize("mode", [2, 3])
def test_periodic_interrupts_do_not_drift(bench, mode):
    period = PIT_FREQUENCY // 1000
    bench.program(0, mode, period)
    bench.idle_until(10 * NANOSECONDS_PER_SECOND)
    ticks = 10 * PIT_FREQUENCY // period
    assert bench.interrupts == [time_of(number * period) for number in range(1, ticks + 1)]


def test_each_interrupt_is_an_edge(bench):
    bench.program(0, 2, 10_000)
    bench.idle_until(time_of(20_000))
    assert bench.levels == [True, False, True, False]


def test_a_new_count_takes_over_at_the_end_of_the_cycle(bench):
    bench.program(0, 2, 1000)
    bench.at(300)
    bench.pit.write_port(0x40, 1, 2000 & 0xFF)
    bench.pit.write_port(0x40, 1, 2000 >> 8)
    assert bench.count() == 700
    assert bench.status() & 0x40
    bench.idle_until(time_of(5000))
    assert bench.interrupts == [time_of(1000), time_of(3000), time_of(5000)]
    assert bench.count() == 2000


def test_a_control_word_stops_the_interrupts(bench):
    bench.program(0, 2, 1000)
    bench.control(LOW_HIGH)
    assert bench.clock.next_deadline() is None


def test_half_a_mode_0_count_stops_the_old_one(bench):
    bench.program(0, 0, 1000)
    bench.pit.write_port(0x40, 1, 1)
    assert bench.clock.next_deadline() is None
    assert bench.out() == 0


def test_ticks_that_are_a_little_late_are_made_up_for_one_at_a_time(bench):
    period = PIT_FREQUENCY // 1000
    bench.program(0, 2, period)
    bench.at(5 * period)
    bench.clock.run_due()
    assert len(bench.interrupts) == 1, "the guest must get to run between two interrupts"
    bench.idle_until(time_of(20 * period))
    assert len(bench.interrupts) == 20
    assert bench.interrupts[-1] == time_of(20 * period)


def test_ticks_that_are_badly_late_are_dropped(bench):
    period = PIT_FREQUENCY // 1000
    bench.program(0, 2, period)
    bench.at(5000 * period + 7)
    bench.idle_until(time_of(5003 * period))
    assert bench.interrupts == [time_of(tick) for tick in (5000 * period + 7,)] + [
        time_of(number * period) for number in (5001, 5002, 5003)
    ]


def test_a_hostile_period_cannot_flood_the_guest(bench):
    bench.program(0, 2, 1)
    bench.idle_until(NANOSECONDS_PER_SECOND // 10)
    assert 100 <= len(bench.interrupts) <= 501


def test_reset_stops_everything(bench):
    bench.program(0, 2, 100)
    bench.gate2(True)
    bench.pit.reset()
    assert bench.clock.next_deadline() is None
    assert bench.pit.read_port(SPEAKER, 1) & ~REFRESH == 0
