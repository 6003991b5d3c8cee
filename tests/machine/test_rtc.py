"""The real-time clock: what time it shows and takes, and when it interrupts."""

import pytest

from lasskvm.kvm.clock import NANOSECONDS_PER_SECOND, VIRTUAL_EPOCH, VirtualClock
from lasskvm.machine.devices.rtc import Rtc, next_alarm

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
A, B, C, D, CENTURY = 0x0A, 0x0B, 0x0C, 0x0D, 0x32
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
PF, AF, UF, IRQF = 0x40, 0x20, 0x10, 0x80
ANY = 0xFF
SECOND = NANOSECONDS_PER_SECOND


class Bench:
    """An RTC on a clock that moves by hand, and the history of IRQ 8."""

    def __init__(self) -> None:
        self.clock = VirtualClock(lambda: 0)
        self.edges: list[bool] = []
        self.rtc = Rtc(self.clock, self.edges.append)

    def put(self, register: int, value: int) -> None:
        self.rtc.write_port(0x70, 1, register)
        self.rtc.write_port(0x71, 1, value)

    def get(self, register: int) -> int:
        self.rtc.write_port(0x70, 1, register)
        return self.rtc.read_port(0x71, 1)

    def time(self) -> tuple[int, ...]:
        return tuple(self.get(register) for register in (CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS))

    def set_time(self, *values: int) -> None:
        control = self.get(B)
        self.put(B, control | SET)
        for register, value in zip((CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS), values, strict=True):
            self.put(register, value)
        self.put(B, control)

    def set_alarm(self, hours: int, minutes: int, seconds: int) -> None:
        for register, value in ((HOURS_ALARM, hours), (MINUTES_ALARM, minutes), (SECONDS_ALARM, seconds)):
            self.put(register, value)

    def run_to(self, ns: int) -> list[int]:
        """Go from deadline to deadline, read C after each interrupt; return the times of the interrupts."""
        times = []
        deadline = self.clock.next_deadline()
        while deadline is not None and deadline <= ns:
            self.clock.skip_to(deadline)
            self.clock.run_due()
            if self.edges and self.edges[-1]:
                times.append(self.clock.now())
                assert self.get(C) & IRQF
            deadline = self.clock.next_deadline()
        self.clock.skip_to(ns)
        return times


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_virtual_epoch_in_bcd(bench):
    assert bench.time() == (0x20, 0x27, 0x01, 0x15, 0x08, 0x00, 0x00)
    assert bench.get(WEEKDAY) == 6, "2027-01-15 is a Friday, and Sunday is 1"


def test_the_virtual_epoch_in_binary(bench):
    bench.put(B, BINARY | H24)
    assert bench.time() == (20, 27, 1, 15, 8, 0, 0)


@pytest.mark.parametrize(
    ("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)]
)
def test_twelve_hour_mode_marks_the_afternoon(bench, hour, shown):
    bench.clock.skip_to(((hour - 8) % 24) * 3600 * SECOND)
    bench.put(B, 0)
    assert bench.get(HOURS) == shown
    bench.set_time(0x20, 0x27, 0x03, 0x04, shown, 0x05, 0x06)
    bench.put(B, H24)
    assert bench.get(HOURS) == hour // 10 << 4 | hour % 10


def test_time_moves_on(bench):
    bench.clock.skip_to(((16 * 60 + 1) * 60 + 5) * SECOND)
    assert bench.time() == (0x20, 0x27, 0x01, 0x16, 0x00, 0x01, 0x05)


def test_a_set_time_runs_on_over_the_end_of_a_century_and_a_leap_day(bench):
    bench.set_time(0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59)
    bench.clock.skip_to(SECOND)
    assert bench.time() == (0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00)
    bench.set_time(0x20, 0x28, 0x02, 0x28, 0x23, 0x59, 0x59)
    bench.clock.skip_to(2 * SECOND)
    assert bench.time() == (0x20, 0x28, 0x02, 0x29, 0x00, 0x00, 0x00)


def test_set_freezes_the_time_registers(bench):
    bench.put(B, SET | H24)
    bench.clock.skip_to(5 * SECOND)
    assert bench.get(SECONDS) == 0
    bench.put(SECONDS, 0x30)
    bench.put(B, H24)
    assert bench.get(SECONDS) == 0x30
    bench.clock.skip_to(6 * SECOND)
    assert bench.get(SECONDS) == 0x31


def test_a_time_register_can_be_written_while_time_runs(bench):
    bench.put(MINUTES, 0x45)
    bench.clock.skip_to(2 * SECOND)
    assert bench.time() == (0x20, 0x27, 0x01, 0x15, 0x08, 0x45, 0x02)


def test_the_format_can_change_together_with_the_end_of_set(bench):
    bench.put(B, SET | H24)
    bench.put(MINUTES, 59)
    bench.put(B, BINARY | H24)
    assert bench.get(MINUTES) == 59


@pytest.mark.parametrize("garbage", [0x00, 0x5A, 0xAA, 0xFF])
def test_garbage_in_the_time_registers_gives_some_date_and_runs_on(bench, garbage):
    for control in (0, H24, BINARY, BINARY | H24):
        bench.put(B, control)
        bench.set_time(*[garbage] * 7)
        before = bench.time()
        bench.clock.skip_to(bench.clock.now() + SECOND)
        assert bench.time() != before


def test_the_calendar_starts_again_behind_its_last_day(bench):
    bench.set_time(0x99, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59)
    bench.clock.skip_to(SECOND)
    assert bench.time() == (0x00, 0x01, 0x01, 0x01, 0x00, 0x00, 0x00)


def test_uip_is_up_for_244_microseconds_before_each_update(bench):
    seen = []
    for ns in (0, SECOND - 244_001, SECOND - 244_000, SECOND - 1, SECOND):
        bench.clock.skip_to(ns)
        seen.append(bench.get(A) >> 7)
    assert seen == [0, 0, 1, 1, 0]
    bench.clock.skip_to(2 * SECOND - 1)
    bench.put(B, SET | H24)
    assert bench.get(A) >> 7 == 0


def test_the_index_is_write_only_and_carries_the_nmi_mask(bench):
    bench.put(0x40, 0x77)
    bench.rtc.write_port(0x70, 1, 0x80 | 0x40)
    assert bench.rtc.nmi_disabled
    assert bench.rtc.read_port(0x71, 1) == 0x77
    assert bench.rtc.read_port(0x70, 1) == 0xFF
    bench.rtc.write_port(0x70, 1, 0x40)
    assert not bench.rtc.nmi_disabled


def test_cmos_memory_keeps_what_is_written_and_survives_reset(bench):
    for index in (0x0E, 0x31, 0x33, 0x7F):
        bench.put(index, index ^ 0xFF)
    bench.put(B, PIE | AIE | UIE | H24)
    bench.rtc.reset()
    assert [bench.get(index) for index in (0x0E, 0x31, 0x33, 0x7F)] == [0xF1, 0xCE, 0xCC, 0x80]
    assert bench.get(B) == H24, "RESET clears the interrupt enables"


def test_registers_c_and_d_cannot_be_written(bench):
    bench.put(C, 0xFF)
    bench.put(D, 0x00)
    assert (bench.get(C), bench.get(D)) == (0, 0x80)


def test_update_ended_interrupts_at_each_second(bench):
    bench.clock.skip_to(SECOND // 2)
    bench.put(B, UIE | H24)
    assert bench.run_to(3 * SECOND) == [SECOND, 2 * SECOND, 3 * SECOND]


def test_an_interrupt_that_is_not_read_comes_once_and_keeps_no_timer_busy(bench):
    bench.put(A, 0x20)
    bench.put(B, UIE | H24)
    bench.clock.skip_to(SECOND)
    bench.clock.run_due()
    assert bench.edges == [True]
    assert bench.clock.next_deadline() is None
    bench.clock.skip_to(10 * SECOND)
    assert bench.get(C) == IRQF | UF
    assert bench.edges == [True, False]
    assert bench.clock.next_deadline() == 11 * SECOND


def test_reading_c_clears_all_flags(bench):
    bench.clock.skip_to(SECOND)
    assert bench.get(C) == PF | UF
    assert bench.get(C) == 0


def test_flags_are_set_without_interrupts_being_enabled(bench):
    bench.set_alarm(ANY, ANY, ANY)
    bench.clock.skip_to(SECOND)
    assert bench.get(C) == PF | AF | UF
    assert bench.edges == []


@pytest.mark.parametrize(("rate", "hertz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)])
def test_periodic_interrupts_come_at_the_programmed_rate(bench, rate, hertz):
    bench.put(A, 0x20 | rate)
    bench.put(B, PIE | H24)
    times = bench.run_to(SECOND)
    assert len(times) == hertz
    assert times[-1] == SECOND


def test_rate_0_switches_the_periodic_interrupt_off(bench):
    bench.put(B, PIE | H24)
    assert bench.clock.next_deadline() is not None
    bench.put(A, 0x20)
    assert bench.clock.next_deadline() is None


def test_an_alarm_goes_off_at_its_time_once_a_day(bench):
    bench.set_alarm(0x09, 0x30, 0x15)
    bench.put(B, AIE | H24)
    first = (90 * 60 + 15) * SECOND
    assert bench.run_to(49 * 3600 * SECOND) == [first + day * 86400 * SECOND for day in range(2)]


def test_alarm_registers_can_match_anything(bench):
    bench.set_alarm(ANY, ANY, 0x10)
    bench.put(B, AIE | H24)
    assert bench.run_to(150 * SECOND) == [10 * SECOND, 70 * SECOND, 130 * SECOND]


def test_an_alarm_follows_the_time_that_is_set(bench):
    bench.set_alarm(0x23, 0x00, 0x00)
    bench.put(B, AIE | H24)
    bench.set_time(0x20, 0x30, 0x06, 0x01, 0x22, 0x59, 0x58)
    assert bench.run_to(3600 * SECOND) == [2 * SECOND]


def test_an_alarm_in_twelve_hour_binary_format(bench):
    bench.put(B, BINARY)
    bench.set_alarm(0x80 | 1, 0, 0)
    bench.put(B, AIE | BINARY)
    assert bench.run_to(24 * 3600 * SECOND) == [5 * 3600 * SECOND]


@pytest.mark.parametrize("nonsense", [(0x24, 0, 0), (0, 0x60, 0), (0, 0, 0x60)])
def test_an_alarm_that_no_time_matches_never_goes_off(bench, nonsense):
    bench.set_alarm(*nonsense)
    bench.put(B, AIE | H24)
    assert bench.clock.next_deadline() is None


def test_set_stops_updates_and_alarms_and_clears_uie(bench):
    bench.set_alarm(ANY, ANY, ANY)
    bench.put(B, SET | AIE | UIE | H24)
    assert bench.get(B) == SET | AIE | H24
    bench.clock.skip_to(5 * SECOND)
    assert bench.get(C) & (AF | UF) == 0


def test_disabling_an_interrupt_lowers_the_line(bench):
    bench.put(B, UIE | H24)
    bench.run_to(SECOND // 2)
    bench.clock.skip_to(SECOND)
    bench.clock.run_due()
    bench.put(B, H24)
    assert bench.edges == [True, False]
    bench.put(B, UIE | H24)
    assert bench.edges == [True, False, True], "the flag was still set"


def test_next_alarm_looks_strictly_ahead():
    day = range(24), range(60), range(60)
    assert next_alarm(VIRTUAL_EPOCH, *day) == VIRTUAL_EPOCH + 1
    assert next_alarm(VIRTUAL_EPOCH, range(8, 9), range(1), range(1)) == VIRTUAL_EPOCH + 86400
    assert next_alarm(VIRTUAL_EPOCH, range(7, 8), range(59, 60), range(59, 60)) == VIRTUAL_EPOCH + 86399
    assert next_alarm(VIRTUAL_EPOCH, range(0), range(60), range(60)) is None
