"""The local APIC's timer: what it counts, when it expires, and the TSC deadline."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasskvm.kvm.clock import VirtualClock
from lasskvm.kvm.irqchip.lapic_timer import MAXIMUM_WAIT_NS, MINIMUM_PERIOD_NS, ApicTimer, TimerMode

ONE_SHOT, PERIODIC, TSC_DEADLINE, RESERVED = TimerMode
DIVIDE_BY_1, DIVIDE_BY_2, DIVIDE_BY_16 = 0b1011, 0b0000, 0b0011
LONG = 1_000_000


class Bench:
    """A timer with divisor 1, a clock that moves by hand, and the times at which the timer expired."""

    def __init__(self, start_ns: int = 0) -> None:
        self.clock = VirtualClock(lambda: 0)
        self.clock.skip_to(start_ns)
        self.tsc_offset = 0
        self.expiries: list[int] = []
        self.timer = ApicTimer(self.clock, self.tsc, lambda: self.expiries.append(self.clock.now()))
        self.timer.write_divide_configuration(DIVIDE_BY_1)

    def tsc(self) -> int:
        return self.clock.now() + self.tsc_offset

    def idle(self, ns: int) -> None:
        """Let time pass, from deadline to deadline."""
        end = self.clock.now() + ns
        deadline = self.clock.next_deadline()
        while deadline is not None and deadline <= end:
            self.clock.skip_to(deadline)
            self.clock.run_due()
            deadline = self.clock.next_deadline()
        self.clock.skip_to(end)


@pytest.fixture
def bench() -> Bench:
    return Bench(start_ns=12_345)


def test_a_one_shot_count_expires_once_and_then_reads_zero(bench: Bench) -> None:
    bench.timer.write_initial_count(LONG)
    assert bench.timer.current_count() == LONG, "no time has passed since the write"
    bench.idle(LONG // 4)
    assert bench.timer.current_count() == LONG * 3 // 4
    bench.idle(10 * LONG)
    assert bench.expiries == [12_345 + LONG]
    assert (bench.timer.current_count(), bench.timer.initial_count) == (0, LONG)


@pytest.mark.parametrize(
    "encoded, divisor",
    [
        (0b0000, 2),
        (0b0001, 4),
        (0b0010, 8),
        (0b0011, 16),
        (0b1000, 32),
        (0b1001, 64),
        (0b1010, 128),
        (0b1011, 1),
    ],
)
def test_the_divide_configuration_has_the_encoding_of_the_manual(
    bench: Bench, encoded: int, divisor: int
) -> None:
    bench.timer.write_divide_configuration(encoded)
    bench.timer.write_initial_count(1000)
    bench.idle(divisor)
    assert bench.timer.current_count() == 999
    bench.idle(1000 * divisor)
    assert bench.expiries == [12_345 + 1000 * divisor]


def test_the_reserved_bit_2_of_the_divide_configuration_reads_zero(bench: Bench) -> None:
    bench.timer.write_divide_configuration(0xFFFF_FFFF)
    assert bench.timer.divide_configuration == DIVIDE_BY_1


def test_a_periodic_count_starts_over_without_drift(bench: Bench) -> None:
    bench.timer.set_mode(PERIODIC)
    bench.timer.write_initial_count(LONG)
    bench.idle(3 * LONG + LONG // 4)
    assert bench.expiries == [12_345 + LONG * number for number in (1, 2, 3)]
    assert bench.timer.current_count() == LONG * 3 // 4


def test_periods_that_were_missed_expire_once_and_keep_the_phase(bench: Bench) -> None:
    bench.timer.set_mode(PERIODIC)
    bench.timer.write_initial_count(LONG)
    bench.clock.skip_to(12_345 + 5 * LONG + 7)
    bench.clock.run_due()
    assert len(bench.expiries) == 1
    assert bench.clock.next_deadline() == 12_345 + 6 * LONG
    assert bench.timer.current_count() == LONG - 7


def test_a_period_that_is_over_but_unnoticed_reads_as_the_next_one(bench: Bench) -> None:
    bench.timer.set_mode(PERIODIC)
    bench.timer.write_initial_count(LONG)
    bench.clock.skip_to(12_345 + LONG + 10)
    assert bench.timer.current_count() == LONG - 10


def test_a_tiny_period_is_stretched(bench: Bench) -> None:
    bench.timer.set_mode(PERIODIC)
    bench.timer.write_initial_count(1)
    assert bench.timer.current_count() <= 1
    bench.idle(10 * MINIMUM_PERIOD_NS)
    assert len(bench.expiries) == 10


def test_a_tiny_one_shot_count_is_not_stretched(bench: Bench) -> None:
    bench.timer.write_initial_count(1)
    bench.idle(1)
    assert bench.expiries == [12_346]


def test_an_initial_count_of_zero_stops_the_timer(bench: Bench) -> None:
    bench.timer.write_initial_count(LONG)
    bench.timer.write_initial_count(0)
    bench.idle(2 * LONG)
    assert bench.expiries == []
    assert bench.clock.next_deadline() is None


def test_the_count_goes_on_when_one_shot_becomes_periodic(bench: Bench) -> None:
    bench.timer.write_initial_count(LONG)
    bench.idle(LONG * 3 // 4)
    bench.timer.set_mode(PERIODIC)
    assert bench.timer.current_count() == LONG // 4
    bench.idle(LONG // 2)
    assert bench.timer.current_count() == LONG * 3 // 4, "it was reloaded"


def test_the_count_ends_when_periodic_becomes_one_shot(bench: Bench) -> None:
    bench.timer.set_mode(PERIODIC)
    bench.timer.write_initial_count(LONG)
    bench.idle(LONG + LONG // 2)
    bench.timer.set_mode(ONE_SHOT)
    bench.idle(5 * LONG)
    assert bench.expiries == [12_345 + LONG, 12_345 + 2 * LONG]


def test_an_expired_one_shot_count_does_not_start_over_in_periodic_mode(bench: Bench) -> None:
    bench.timer.write_initial_count(LONG)
    bench.idle(LONG)
    bench.timer.set_mode(PERIODIC)
    bench.idle(5 * LONG)
    assert (bench.timer.current_count(), len(bench.expiries)) == (0, 1)


def test_another_divisor_scales_what_is_left(bench: Bench) -> None:
    bench.timer.write_initial_count(LONG)
    bench.idle(LONG // 2)
    bench.timer.write_divide_configuration(DIVIDE_BY_16)
    assert bench.timer.current_count() == LONG // 2
    bench.idle(16 * LONG)
    assert bench.expiries == [12_345 + LONG // 2 + 8 * LONG]


@pytest.mark.parametrize("mode", [TSC_DEADLINE, RESERVED])
def test_leaving_the_counting_modes_stops_the_count_and_clears_the_registers(
    bench: Bench, mode: TimerMode
) -> None:
    bench.timer.write_initial_count(LONG)
    bench.timer.set_mode(mode)
    bench.timer.write_initial_count(LONG)
    assert (bench.timer.initial_count, bench.timer.current_count()) == (0, 0)
    bench.idle(2 * LONG)
    assert bench.expiries == []


def test_a_tsc_deadline_expires_when_the_tsc_reaches_it_and_then_reads_zero(bench: Bench) -> None:
    bench.timer.set_mode(TSC_DEADLINE)
    bench.tsc_offset = 7_000_000
    bench.timer.write_deadline(bench.tsc() + LONG)
    assert bench.timer.tsc_deadline == 7_000_000 + 12_345 + LONG
    bench.idle(LONG - 1)
    assert bench.expiries == []
    bench.idle(1)
    assert (bench.expiries, bench.timer.tsc_deadline) == ([12_345 + LONG], 0)


def test_a_tsc_deadline_in_the_past_expires_before_the_write_is_over(bench: Bench) -> None:
    bench.timer.set_mode(TSC_DEADLINE)
    bench.timer.write_deadline(bench.tsc())
    assert (bench.expiries, bench.timer.tsc_deadline) == ([12_345], 0)


def test_a_tsc_deadline_of_zero_disarms(bench: Bench) -> None:
    bench.timer.set_mode(TSC_DEADLINE)
    bench.timer.write_deadline(LONG)
    bench.timer.write_deadline(0)
    bench.idle(2 * LONG)
    assert bench.expiries == []


def test_a_tsc_deadline_is_ignored_in_the_counting_modes(bench: Bench) -> None:
    bench.timer.write_deadline(1)
    assert (bench.timer.tsc_deadline, bench.expiries) == (0, [])


def test_leaving_tsc_deadline_mode_disarms(bench: Bench) -> None:
    bench.timer.set_mode(TSC_DEADLINE)
    bench.timer.write_deadline(LONG)
    bench.timer.set_mode(ONE_SHOT)
    bench.idle(2 * LONG)
    assert (bench.expiries, bench.timer.tsc_deadline) == ([], 0)


@pytest.mark.parametrize("jump, expiry", [(LONG // 2, 12_345 + LONG // 2), (-LONG, 12_345 + 2 * LONG)])
def test_an_armed_deadline_follows_a_tsc_that_was_written(bench: Bench, jump: int, expiry: int) -> None:
    bench.timer.set_mode(TSC_DEADLINE)
    bench.timer.write_deadline(bench.tsc() + LONG)
    bench.tsc_offset += jump
    bench.timer.tsc_changed()
    bench.idle(5 * LONG)
    assert bench.expiries == [expiry]


def test_a_tsc_that_jumps_over_the_deadline_expires_it_at_once(bench: Bench) -> None:
    bench.timer.set_mode(TSC_DEADLINE)
    bench.timer.write_deadline(bench.tsc() + LONG)
    bench.tsc_offset += 2 * LONG
    bench.timer.tsc_changed()
    assert bench.expiries == [12_345]
    bench.timer.tsc_changed()
    assert len(bench.expiries) == 1


def test_a_deadline_far_off_waits_in_steps_and_does_not_expire_early(bench: Bench) -> None:
    bench.timer.set_mode(TSC_DEADLINE)
    bench.timer.write_deadline(12_345 + 3 * MAXIMUM_WAIT_NS + 5_000)
    assert bench.clock.next_deadline() == 12_345 + MAXIMUM_WAIT_NS
    bench.idle(4 * MAXIMUM_WAIT_NS)
    assert bench.expiries == [12_345 + 3 * MAXIMUM_WAIT_NS + 5_000]


def test_a_restart_goes_on_from_the_current_count(bench: Bench) -> None:
    bench.timer.restart(LONG, LONG // 4)
    assert (bench.timer.initial_count, bench.timer.current_count()) == (LONG, LONG // 4)
    bench.idle(LONG)
    assert bench.expiries == [12_345 + LONG // 4]


def test_a_restart_does_not_go_beyond_the_initial_count(bench: Bench) -> None:
    bench.timer.restart(LONG, 5 * LONG)
    assert bench.timer.current_count() == LONG


@pytest.mark.parametrize("mode, first_expiry", [(ONE_SHOT, 0), (PERIODIC, LONG)])
def test_a_restart_at_zero_expires_a_one_shot_and_begins_a_period(
    bench: Bench, mode: TimerMode, first_expiry: int
) -> None:
    bench.timer.set_mode(mode)
    bench.timer.restart(LONG, 0)
    bench.idle(LONG)
    assert bench.expiries == [12_345 + first_expiry]


def test_a_reset_stops_everything(bench: Bench) -> None:
    bench.timer.set_mode(TSC_DEADLINE)
    bench.timer.write_deadline(LONG)
    bench.timer.reset()
    assert (bench.timer.mode, bench.timer.divide_configuration) == (ONE_SHOT, DIVIDE_BY_2)
    bench.idle(2 * LONG)
    assert bench.expiries == []


COUNTS = st.sampled_from([0, 1, 999, 12_345, LONG, 0xFFFF_FFFF])
actions = st.lists(
    st.one_of(
        st.tuples(st.just("mode"), st.sampled_from(TimerMode)),
        st.tuples(st.just("count"), COUNTS),
        st.tuples(st.just("divide"), st.integers(0, 15)),
        st.tuples(st.just("deadline"), COUNTS),
        st.tuples(st.just("tsc"), st.integers(-LONG, LONG)),
        st.tuples(st.just("idle"), st.integers(0, 3 * LONG)),
    ),
    max_size=25,
)


def drive(bench: Bench, steps: list[tuple[str, int]]) -> list[int]:
    seen = []
    for name, value in steps:
        if name == "mode":
            bench.timer.set_mode(TimerMode(value))
        elif name == "count":
            bench.timer.write_initial_count(value)
        elif name == "divide":
            bench.timer.write_divide_configuration(value)
        elif name == "deadline":
            bench.timer.write_deadline(value)
        elif name == "tsc":
            bench.tsc_offset += value
            bench.timer.tsc_changed()
        else:
            bench.idle(value)
        seen += [bench.timer.current_count(), bench.timer.tsc_deadline, len(bench.expiries)]
    return seen


@settings(max_examples=150, deadline=None)
@given(actions, actions)
def test_the_timer_goes_on_from_a_state(before: list[tuple[str, int]], after: list[tuple[str, int]]) -> None:
    original = Bench()
    drive(original, before)
    original.expiries.clear()
    copy = Bench(start_ns=original.clock.now())
    copy.tsc_offset = original.tsc_offset
    copy.timer.set_state(json.loads(json.dumps(original.timer.get_state())))
    assert drive(copy, after) == drive(original, after)
    assert copy.expiries == original.expiries


@pytest.mark.parametrize(
    "lie",
    [
        {"mode": 4},
        {"target_ns": 5},
        {"timer": [5, 1]},
        {"tsc_deadline": 5},
        {"initial_count": "9"},
        {"mode": TSC_DEADLINE, "initial_count": 1, "target_ns": 5},
    ],
)
def test_what_is_no_state_of_a_timer_is_refused(bench: Bench, lie: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        bench.timer.set_state(bench.timer.get_state() | lie)
