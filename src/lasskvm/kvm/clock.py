"""Guest time: a nanosecond clock with a queue of timers.

A clock starts at 0 when the machine is made and never runs backwards. Devices ask :meth:`Clock.now` and leave
callbacks with :meth:`Clock.call_at`; the run loop asks :meth:`Clock.next_deadline` for how long the guest may
run and calls :meth:`Clock.run_due` between two runs. Nothing here uses threads or signals.

:class:`VirtualClock` counts executed blocks, so two runs of the same guest see the same time;
:class:`HostClock` follows the host. Both know the wall-clock time that belongs to their zero, for the
battery-backed RTC.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

__all__ = [
    "NANOSECONDS_PER_BLOCK",
    "NANOSECONDS_PER_SECOND",
    "VIRTUAL_EPOCH",
    "Clock",
    "HostClock",
    "Timer",
    "TimerState",
    "VirtualClock",
]

NANOSECONDS_PER_SECOND = 1_000_000_000
#: What one executed block is worth on the virtual clock.
NANOSECONDS_PER_BLOCK = 10
#: Unix time at which every virtual clock starts: 2027-01-15T08:00:00Z.
VIRTUAL_EPOCH = 1_800_000_000

#: A timer set from within a timer's callback fires at least this much later than the one that is running.
MINIMUM_STEP_NS = 1_000
#: Callbacks that one call of :meth:`Clock.run_due` runs at most; the rest stays due.
MAX_CALLBACKS_PER_RUN = 256
#: Cancelled timers are swept out of the queue when there are more of them than this, and more than live ones.
MAX_CANCELLED = 64


#: A waiting timer for snapshots: its deadline, and its place among those with the same.
TimerState = Sequence[int]


class Timer:
    """A callback that waits in a clock's queue for its deadline, in nanoseconds of that clock."""

    __slots__ = ("_callback", "_clock", "deadline_ns", "sequence")

    def __init__(self, clock: Clock, deadline_ns: int, sequence: int, callback: Callable[[], None]) -> None:
        self._clock = clock
        self._callback: Callable[[], None] | None = callback
        self.deadline_ns = deadline_ns
        self.sequence = sequence

    @property
    def state(self) -> TimerState:
        """What :meth:`Clock.restore` takes."""
        return [self.deadline_ns, self.sequence]

    @property
    def pending(self) -> bool:
        """Whether the timer still waits: neither run nor cancelled."""
        return self._callback is not None

    def cancel(self) -> None:
        """Take the timer back. Does nothing if it has run or was cancelled before."""
        if self._callback is not None:
            self._callback = None
            self._clock._forget_one()

    def _take(self) -> Callable[[], None] | None:
        callback, self._callback = self._callback, None
        return callback


class Clock:
    """Nanoseconds since the start, read from ``source``, and the timers that wait for them.

    ``epoch_ns`` is the Unix time, in nanoseconds, at which the clock reads 0.

    >>> nanoseconds = [0]
    >>> clock = Clock(lambda: nanoseconds[0])
    >>> _ = clock.call_at(500, lambda: print("due"))
    >>> clock.next_deadline()
    500
    >>> nanoseconds[0] = 600
    >>> clock.run_due()
    due
    1
    """

    def __init__(
        self, source: Callable[[], int], epoch_ns: int = VIRTUAL_EPOCH * NANOSECONDS_PER_SECOND
    ) -> None:
        self._source = source
        self.epoch_ns = epoch_ns
        #: By deadline, then sequence; the third number tells entries apart that a restored timer has in common.
        self._queue: list[tuple[int, int, int, Timer]] = []
        self._sequence = 0
        self._pushes = 0
        self._cancelled = 0
        self._running_ns: int | None = None

    def now(self) -> int:
        """Return nanoseconds since the clock started."""
        return self._source()

    def wall_clock_ns(self) -> int:
        """Return the time of day as nanoseconds since 1970-01-01T00:00:00Z."""
        return self.epoch_ns + self._source()

    def wall_clock(self) -> int:
        """Return the time of day as whole seconds since 1970-01-01T00:00:00Z."""
        return self.wall_clock_ns() // NANOSECONDS_PER_SECOND

    def call_at(self, deadline_ns: int, callback: Callable[[], None]) -> Timer:
        """Have :meth:`run_due` call ``callback`` once the clock reads ``deadline_ns`` or more.

        From within a callback the deadline is moved to at least ``MINIMUM_STEP_NS`` behind that callback's
        own, so that no period a guest can program, not even 0, keeps the queue busy without time moving on.
        """
        if self._running_ns is not None:
            deadline_ns = max(deadline_ns, self._running_ns + MINIMUM_STEP_NS)
        return self._queue_timer(deadline_ns, self._sequence + 1, callback)

    def restore(self, state: TimerState, callback: Callable[[], None]) -> Timer:
        """Let a timer of a saved machine wait again: :attr:`Timer.state`, of a clock that had the same time.

        Timers with equal deadlines run in the order that they had there, whichever is restored first.
        """
        deadline_ns, sequence = map(int, state)
        return self._queue_timer(deadline_ns, sequence, callback)

    def _queue_timer(self, deadline_ns: int, sequence: int, callback: Callable[[], None]) -> Timer:
        timer = Timer(self, deadline_ns, sequence, callback)
        self._sequence = max(self._sequence, sequence)
        self._pushes += 1
        heappush(self._queue, (deadline_ns, sequence, self._pushes, timer))
        return timer

    def next_deadline(self) -> int | None:
        """Return the earliest deadline that waits, or ``None``. It may lie in the past."""
        queue = self._queue
        while queue:
            deadline_ns, _, _, timer = queue[0]
            if timer.pending:
                return deadline_ns
            heappop(queue)
            self._cancelled -= 1
        return None

    def run_due(self) -> int:
        """Run the callbacks whose deadline has come, and return how many ran.

        They run in the order of their deadlines, and of their insertion where those are equal. "Now" is the
        time of this call. At most ``MAX_CALLBACKS_PER_RUN`` run; what is left over stays due. A call from
        within a callback does nothing.
        """
        queue = self._queue
        if not queue or self._running_ns is not None:
            return 0
        now = self._source()
        ran = 0
        try:
            while queue and queue[0][0] <= now and ran < MAX_CALLBACKS_PER_RUN:
                deadline_ns, _, _, timer = heappop(queue)
                callback = timer._take()
                if callback is None:
                    self._cancelled -= 1
                    continue
                self._running_ns = deadline_ns
                ran += 1
                callback()
        finally:
            self._running_ns = None
        return ran

    @property
    def queue_length(self) -> int:
        """Entries in the queue, cancelled ones that were not swept yet included."""
        return len(self._queue)

    def _forget_one(self) -> None:
        # A guest that reprograms a device in a loop cancels a timer each time. Without the sweep those with a
        # far deadline would pile up.
        self._cancelled += 1
        if self._cancelled > MAX_CANCELLED and self._cancelled * 2 > len(self._queue):
            self._queue[:] = [entry for entry in self._queue if entry[3].pending]
            heapify(self._queue)
            self._cancelled = 0


class VirtualClock(Clock):
    """Deterministic time: ``NANOSECONDS_PER_BLOCK`` for each executed block, plus idle time that was skipped.

    ``counter`` returns the number of blocks executed so far. The time of day starts at ``VIRTUAL_EPOCH``.
    """

    def __init__(self, counter: Callable[[], int]) -> None:
        self._counter = counter
        self._skipped_ns = 0
        super().__init__(self._virtual_ns)

    @property
    def skipped_ns(self) -> int:
        """The idle time that was skipped so far."""
        return self._skipped_ns

    def restore_skipped(self, skipped_ns: int) -> None:
        """Be the clock of a machine that had skipped *skipped_ns* of idle time when it was saved."""
        self._skipped_ns = skipped_ns

    def skip_to(self, deadline_ns: int) -> None:
        """Let idle time pass: the clock reads ``deadline_ns`` now. A deadline in the past changes nothing."""
        self._skipped_ns += max(0, deadline_ns - self._virtual_ns())

    def blocks_until(self, deadline_ns: int) -> int:
        """Return how many blocks to execute until ``deadline_ns``: at least 1, so that the guest moves on."""
        return max(1, -((self._virtual_ns() - deadline_ns) // NANOSECONDS_PER_BLOCK))

    def _virtual_ns(self) -> int:
        return self._counter() * NANOSECONDS_PER_BLOCK + self._skipped_ns


class HostClock(Clock):
    """The host's monotonic time, *elapsed_ns* at the start. The time of day is the host's UTC."""

    def __init__(self, elapsed_ns: int = 0) -> None:
        start_ns = time.monotonic_ns() - elapsed_ns
        super().__init__(lambda: time.monotonic_ns() - start_ns, time.time_ns() - elapsed_ns)
