"""Guest time: order of timers, progress under hostile periods, the virtual clock's arithmetic."""

import time

from lasskvm.kvm.clock import (
    MAX_CALLBACKS_PER_RUN,
    MINIMUM_STEP_NS,
    NANOSECONDS_PER_BLOCK,
    NANOSECONDS_PER_SECOND,
    VIRTUAL_EPOCH,
    Clock,
    HostClock,
    VirtualClock,
)


def idle_clock() -> VirtualClock:
    return VirtualClock(lambda: 0)


def test_timers_run_in_deadline_order_and_equal_deadlines_in_insertion_order():
    clock = idle_clock()
    ran = []
    for name, deadline in (("late", 300), ("first", 100), ("second", 100), ("between", 200)):
        clock.call_at(deadline, lambda name=name: ran.append(name))
    clock.skip_to(300)
    assert clock.run_due() == 4
    assert ran == ["first", "second", "between", "late"]


def test_a_timer_does_not_run_one_nanosecond_early():
    clock = idle_clock()
    ran = []
    clock.call_at(100, lambda: ran.append(clock.now()))
    clock.skip_to(99)
    assert clock.run_due() == 0
    clock.skip_to(100)
    assert clock.run_due() == 1
    assert ran == [100]


def test_a_cancelled_timer_never_runs_and_is_no_deadline():
    clock = idle_clock()
    ran = []
    timer = clock.call_at(100, lambda: ran.append("cancelled"))
    clock.call_at(200, lambda: ran.append("kept"))
    timer.cancel()
    assert not timer.pending
    assert clock.next_deadline() == 200
    clock.skip_to(1000)
    assert clock.run_due() == 1
    assert ran == ["kept"]
    assert clock.next_deadline() is None


def test_cancelling_a_timer_that_has_run_does_nothing():
    clock = idle_clock()
    timer = clock.call_at(0, lambda: None)
    assert clock.run_due() == 1
    timer.cancel()
    assert clock.queue_length == 0


def test_a_callback_can_cancel_a_timer_that_is_due_at_the_same_time():
    clock = idle_clock()
    ran = []
    victims = []
    clock.call_at(10, lambda: victims[0].cancel())
    victims.append(clock.call_at(10, lambda: ran.append("victim")))
    clock.skip_to(10)
    assert clock.run_due() == 1
    assert ran == []


def test_a_callback_that_schedules_again_runs_again_in_the_same_call_when_that_is_due():
    clock = idle_clock()
    ran = []

    def tick() -> None:
        ran.append(len(ran))
        clock.call_at((len(ran) + 1) * 10_000, tick)

    clock.call_at(10_000, tick)
    clock.skip_to(35_000)
    assert clock.run_due() == 3
    assert clock.next_deadline() == 40_000


def test_a_period_of_zero_moves_on_and_cannot_hang_the_queue():
    clock = idle_clock()

    def tick() -> None:
        clock.call_at(0, tick)

    clock.call_at(0, tick)
    assert clock.run_due() == 1
    assert clock.next_deadline() == MINIMUM_STEP_NS
    clock.skip_to(NANOSECONDS_PER_SECOND)
    assert clock.run_due() == MAX_CALLBACKS_PER_RUN
    assert clock.queue_length == 1


def test_what_one_run_leaves_over_stays_due():
    clock = idle_clock()
    ran = []
    for number in range(MAX_CALLBACKS_PER_RUN + 5):
        clock.call_at(0, lambda number=number: ran.append(number))
    assert clock.run_due() == MAX_CALLBACKS_PER_RUN
    assert clock.run_due() == 5
    assert ran == list(range(MAX_CALLBACKS_PER_RUN + 5))


def test_run_due_from_within_a_callback_does_nothing():
    clock = idle_clock()
    nested = []
    clock.call_at(0, lambda: nested.append(clock.run_due()))
    clock.call_at(0, lambda: None)
    assert clock.run_due() == 2
    assert nested == [0]


def test_cancelled_timers_do_not_pile_up():
    clock = idle_clock()
    kept = clock.call_at(10**18, lambda: None)
    for _ in range(10_000):
        clock.call_at(10**18, lambda: None).cancel()
    assert clock.queue_length < 200
    assert kept.pending
    assert clock.next_deadline() == 10**18


def test_the_virtual_clock_counts_blocks_and_skipped_idle_time():
    blocks = [7]
    clock = VirtualClock(lambda: blocks[0])
    assert clock.now() == 7 * NANOSECONDS_PER_BLOCK
    clock.skip_to(1_000)
    assert clock.now() == 1_000
    blocks[0] += 3
    assert clock.now() == 1_000 + 3 * NANOSECONDS_PER_BLOCK


def test_skipping_to_the_past_changes_nothing():
    clock = idle_clock()
    clock.skip_to(500)
    clock.skip_to(100)
    assert clock.now() == 500


def test_blocks_until_rounds_up_so_that_the_deadline_has_come_after_them():
    blocks = [0]
    clock = VirtualClock(lambda: blocks[0])
    assert clock.blocks_until(100) == 10
    assert clock.blocks_until(101) == 11
    blocks[0] += clock.blocks_until(101)
    assert clock.now() >= 101


def test_blocks_until_a_past_deadline_still_lets_the_guest_move_on():
    clock = idle_clock()
    clock.skip_to(1_000)
    assert clock.blocks_until(0) == 1


def test_the_virtual_time_of_day_starts_at_the_documented_epoch():
    clock = idle_clock()
    assert time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(clock.wall_clock())) == "2027-01-15T08:00:00Z"
    clock.skip_to(2_500_000_000)
    assert clock.wall_clock() == VIRTUAL_EPOCH + 2
    assert clock.wall_clock_ns() % NANOSECONDS_PER_SECOND == 500_000_000


def test_the_host_clock_starts_at_zero_never_runs_backwards_and_knows_utc():
    clock = HostClock()
    readings = [clock.now() for _ in range(100)]
    assert readings == sorted(readings)
    assert 0 <= readings[0] < 60 * NANOSECONDS_PER_SECOND
    assert abs(clock.wall_clock() - time.time()) < 60


def test_a_clock_reads_its_source():
    clock = Clock(lambda: 42, epoch_ns=3 * NANOSECONDS_PER_SECOND)
    assert (clock.now(), clock.wall_clock()) == (42, 3)
