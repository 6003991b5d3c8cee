"""The local APIC's timer: one-shot and periodic countdown, and the TSC deadline.

The countdown follows the clock, with integer arithmetic on its nanoseconds: the count that is read and the moment at
which the timer expires always agree. The APIC's bus has a cycle of 1 ns, and the TSC makes one tick each nanosecond,
too, whatever value it has.

Source: Intel SDM volume 3A, 11.5.4 (APIC timer) and 11.5.4.1 (TSC-deadline mode); the KVM functions named below.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from operator import index

from lasskvm.kvm.clock import Clock, Timer
from lasskvm.kvm.iobus import DeviceState
from lasskvm.kvm.irqchip.apic_registers import DIVIDE_BITS
from lasskvm.x86.registers import MASK32, MASK64

__all__ = ["ApicTimer", "TimerMode"]

#: One count at divisor 1 (KVM's ``apic_bus_cycle_ns``).
BUS_CYCLE_NS = 1
#: Periodic interrupts are at least this far apart, whatever the guest programs (KVM's ``min_timer_period_us``).
MINIMUM_PERIOD_NS = 200_000
#: The clock is asked for no later moment than this far ahead, some 13 days; a TSC deadline may lie 584 years off.
#: What waits for the host can then count milliseconds in 31 bits.
MAXIMUM_WAIT_NS = 1 << 50

# How the divide configuration encodes a power of two: bit 3 is the upper one of three, and all ones are 0.
_DIVIDE_LOW = 0b0011
_DIVIDE_HIGH = 0b1000
_DIVIDE_EXPONENTS = 8


class TimerMode(IntEnum):
    """Bits 18:17 of the timer's entry in the local vector table."""

    ONE_SHOT = 0
    PERIODIC = 1
    TSC_DEADLINE = 2
    RESERVED = 3


_COUNTING_MODES = (TimerMode.ONE_SHOT, TimerMode.PERIODIC)


class ApicTimer:
    """The timer. ``expire`` is called each time it expires; whether that is masked is not the timer's business.

    ``guest_tsc`` returns what RDTSC reads. One callback at most waits in the clock's queue.
    """

    __slots__ = (
        "_clock",
        "_expire",
        "_guest_tsc",
        "_target_ns",
        "_waiting",
        "divide_configuration",
        "initial_count",
        "mode",
        "tsc_deadline",
    )

    def __init__(self, clock: Clock, guest_tsc: Callable[[], int], expire: Callable[[], None]) -> None:
        self._clock = clock
        self._guest_tsc = guest_tsc
        self._expire = expire
        self._waiting: Timer | None = None
        self._target_ns: int | None = None
        self.reset()

    def reset(self) -> None:
        """The state after power-on or INIT: stopped, one-shot (SDM volume 3A, 11.4.7.1)."""
        self.mode = TimerMode.ONE_SHOT
        self.divide_configuration = 0
        self._stop()

    def set_mode(self, mode: TimerMode) -> None:
        """Follow the mode in the local vector table. KVM: ``apic_update_lvtt``.

        The count goes on between one-shot and periodic; every other change of mode disarms the timer.
        """
        if mode == self.mode:
            return
        goes_on = mode in _COUNTING_MODES and self.mode in _COUNTING_MODES
        self.mode = mode
        if not goes_on:
            self._stop()

    def write_initial_count(self, count: int) -> None:
        """Start the countdown from *count* (32 bits), or stop it with 0. Ignored in TSC-deadline mode."""
        if self.mode not in _COUNTING_MODES:
            return
        self._stop()
        self.initial_count = count
        if count:
            self._count_down(self._clock.now() + self._period_ns())

    def write_divide_configuration(self, value: int) -> None:
        """Set the divisor. A count that is under way goes on from its value. KVM: ``update_target_expiration``."""
        before = self._count_ns()
        self.divide_configuration = value & DIVIDE_BITS
        after = self._count_ns()
        if self._target_ns is not None and after != before:
            now = self._clock.now()
            self._count_down(now + max(0, self._target_ns - now) * after // before)

    def current_count(self) -> int:
        """What is left of the count; 0 when it does not count. KVM: ``apic_get_tmcct``."""
        if self._target_ns is None:
            return 0
        left_ns = self._target_ns - self._clock.now()
        if self.mode == TimerMode.PERIODIC:
            # The expiry may be a little late. The counter itself was reloaded in time, and never reads 0 for long.
            left_ns = (left_ns - 1) % self._period_ns() + 1
        return min(max(0, left_ns) // self._count_ns(), self.initial_count)

    def write_deadline(self, tsc: int) -> None:
        """Expire once the TSC has reached *tsc*, at once if it has; 0 disarms. Ignored in the counting modes.

        The deadline reads 0 as soon as the timer has expired. KVM: ``kvm_set_lapic_tscdeadline_msr``.
        """
        if self.mode != TimerMode.TSC_DEADLINE:
            return
        self._stop()
        self.tsc_deadline = tsc
        if tsc:
            self._await_deadline()

    def tsc_changed(self) -> None:
        """The TSC has jumped: wait for the armed deadline by its new value (SDM volume 3A, 11.5.4.1)."""
        if self.tsc_deadline:
            self._cancel()
            self._await_deadline()

    def restart(self, initial_count: int, current_count: int) -> None:
        """Go on counting from *current_count*, of *initial_count*. KVM: ``__start_apic_timer`` with ``APIC_TMCCT``.

        A periodic timer whose current count is 0 begins a new period; a one-shot timer expires, since nobody knows
        whether it had done so. One in TSC-deadline mode is left alone.
        """
        self.write_initial_count(initial_count)
        if self._target_ns is None or (self.mode == TimerMode.PERIODIC and not current_count):
            return
        left = min(current_count, initial_count)
        self._count_down(self._clock.now() + left * self._count_ns())

    def get_state(self) -> DeviceState:
        """Every register; times are those of the clock."""
        return {
            "mode": int(self.mode),
            "divide_configuration": self.divide_configuration,
            "initial_count": self.initial_count,
            "tsc_deadline": self.tsc_deadline,
            "target_ns": self._target_ns,
            "timer": None if self._waiting is None else self._waiting.state,
        }

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`, on a clock that reads the same time."""
        self._stop()
        self.mode = TimerMode(state["mode"])
        self.divide_configuration = index(state["divide_configuration"]) & DIVIDE_BITS
        self.initial_count = index(state["initial_count"]) & MASK32
        self.tsc_deadline = index(state["tsc_deadline"]) & MASK64
        if self.tsc_deadline and self.mode != TimerMode.TSC_DEADLINE:
            raise ValueError("an APIC timer with a TSC deadline in another mode")
        target_ns, timer = state["target_ns"], state["timer"]
        if target_ns is not None:
            if self.mode not in _COUNTING_MODES or not self.initial_count:
                raise ValueError("an APIC timer that counts down from nothing")
            self._target_ns = index(target_ns)
        if timer is not None:
            if target_ns is None and not self.tsc_deadline:
                raise ValueError("an APIC timer that waits for nothing")
            self._waiting = self._clock.restore(timer, self._due)

    def _count_ns(self) -> int:
        encoded = self.divide_configuration
        exponent = (encoded & _DIVIDE_LOW | (encoded & _DIVIDE_HIGH) >> 1) + 1
        return BUS_CYCLE_NS << exponent % _DIVIDE_EXPONENTS

    def _period_ns(self) -> int:
        period_ns = self.initial_count * self._count_ns()
        return max(period_ns, MINIMUM_PERIOD_NS) if self.mode == TimerMode.PERIODIC else period_ns

    def _cancel(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _stop(self) -> None:
        self._cancel()
        self.initial_count = 0
        self.tsc_deadline = 0
        self._target_ns = None

    def _count_down(self, target_ns: int) -> None:
        self._cancel()
        self._target_ns = target_ns
        self._waiting = self._clock.call_at(target_ns, self._due)

    def _await_deadline(self) -> None:
        left = self.tsc_deadline - self._guest_tsc()
        if left > 0:
            self._waiting = self._clock.call_at(self._clock.now() + min(left, MAXIMUM_WAIT_NS), self._due)
        else:
            self.tsc_deadline = 0
            self._expire()

    def _due(self) -> None:
        self._waiting = None
        if self.mode == TimerMode.TSC_DEADLINE:
            self._await_deadline()
            return
        target_ns, self._target_ns = self._target_ns, None
        if target_ns is not None and self.mode == TimerMode.PERIODIC:
            # Periods that went by unnoticed give one interrupt together, as in KVM, and the phase stays.
            period_ns = self._period_ns()
            missed = max(0, self._clock.now() - target_ns) // period_ns
            self._count_down(target_ns + (missed + 1) * period_ns)
        self._expire()
