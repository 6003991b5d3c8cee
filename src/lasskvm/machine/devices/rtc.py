"""The MC146818 real-time clock and its 128 bytes of CMOS memory.

The time is the clock's time of day plus an offset that the guest sets by writing the time registers.
Interrupt flags are worked out when somebody looks, from what happened since the last look; a timer waits only
for the next event that may raise IRQ 8.

Sources: Motorola MC146818A data sheet; IBM PC AT technical reference for the ports and the CMOS map. Not
modelled: the divider chain's reset and daylight saving.
"""

from __future__ import annotations

from datetime import date

from lasskvm.kvm.clock import NANOSECONDS_PER_SECOND, Clock, Timer
from lasskvm.kvm.iobus import DeviceState, IrqLine

__all__ = ["RTC_IRQ", "RTC_PORT", "Rtc"]

RTC_PORT = 0x70
RTC_IRQ = 8
CMOS_SIZE = 128

INDEX_MASK = 0x7F
NMI_DISABLED = 1 << 7
WRITE_ONLY = 0xFF

# Registers
SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
DAY_OF_WEEK, DAY, MONTH, YEAR = range(6, 10)
REG_A, REG_B, REG_C, REG_D = range(0x0A, 0x0E)
CENTURY = 0x32
TIME_REGISTERS = frozenset((SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY, MONTH, YEAR, CENTURY))
ALARM_REGISTERS = frozenset((SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM))

A_UPDATE_IN_PROGRESS = 1 << 7
A_RATE = 0x0F
#: A 32.768 kHz crystal, and a periodic interrupt of 1024 Hz.
A_DEFAULT = 0x26
B_SET = 1 << 7
B_BINARY = 1 << 2
B_24_HOURS = 1 << 1
B_DEFAULT = B_24_HOURS
#: RESET clears PIE, AIE, UIE and SQWE.
B_CLEARED_BY_RESET = 0x78
#: Interrupt enables in B and flags in C have the same bits.
PERIODIC = 1 << 6
ALARM = 1 << 5
UPDATE_ENDED = 1 << 4
EVENTS = PERIODIC | ALARM | UPDATE_ENDED
C_IRQ = 1 << 7
D_VALID = 1 << 7

HOUR_PM = 1 << 7
#: An alarm register of this value or above matches everything.
ALARM_ANY = 0xC0

CRYSTAL_HZ = 32_768
#: Rates 1 and 2 stand for the periods of rates 8 and 9 with a 32.768 kHz crystal.
SLOW_RATES = {1: 8, 2: 9}
#: UIP is 1 for this long before the time changes.
UPDATE_WARNING_NS = 244_000

DAY_SECONDS = 86_400
HOUR_SECONDS = 3_600
MINUTE_SECONDS = 60
UNIX_EPOCH_DAY = date(1970, 1, 1).toordinal()
#: The calendar's days, 1 to this; behind the last comes the first again.
CALENDAR_DAYS = date.max.toordinal()
MONTHS = 12
CENTURY_YEARS = 100


#: What is kept as a number, or as yes or no.
_STATE = ("alarm_at", "flags", "index", "irq_level", "nmi_disabled", "offset_s", "seen_ns")


class Rtc:
    """The clock chip. ``irq`` is the IRQ 8 line; the machine may put its own facts into ``cmos``."""

    ports = (range(RTC_PORT, RTC_PORT + 2),)
    register_size = 1
    __slots__ = (
        "_clock",
        "_irq",
        "_timer",
        "alarm_at",
        "cmos",
        "flags",
        "index",
        "irq_level",
        "nmi_disabled",
        "offset_s",
        "seen_ns",
    )

    def __init__(self, clock: Clock, irq: IrqLine) -> None:
        self._clock = clock
        self._irq = irq
        self._timer: Timer | None = None
        self.cmos = bytearray(CMOS_SIZE)
        self.cmos[REG_A] = A_DEFAULT
        self.cmos[REG_B] = B_DEFAULT
        #: RTC time minus the clock's time of day, in seconds.
        self.offset_s = 0
        #: The clock's time of day, in seconds, at which the alarm goes off next.
        self.alarm_at: int | None = None
        self.irq_level = False
        self.reset()

    def reset(self) -> None:
        """Take RESET: interrupts go off, flags are cleared. Time and memory are battery-backed and stay."""
        self.index = 0
        self.nmi_disabled = False
        self.flags = 0
        self.seen_ns = self._clock.wall_clock_ns()
        self.cmos[REG_B] &= ~B_CLEARED_BY_RESET
        self._find_alarm()
        self._update()

    def get_state(self) -> DeviceState:
        """Registers, memory, the guest's time, and the timer."""
        timer = None if self._timer is None else self._timer.state
        state = {name: getattr(self, name) for name in _STATE}
        return state | {"cmos": self.cmos.hex(), "timer": timer}

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`, on a clock that reads the same time."""
        cmos = bytearray.fromhex(state["cmos"])
        if len(cmos) != CMOS_SIZE:
            raise ValueError(f"a CMOS memory of {len(cmos)} bytes")
        for name in _STATE:
            setattr(self, name, state[name])
        self.cmos = cmos
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if state["timer"] is not None:
            self._timer = self._clock.restore(state["timer"], self._expire)

    def read_port(self, port: int, size: int) -> int:
        """Read the indexed register. The index itself cannot be read back."""
        if port == RTC_PORT:
            return WRITE_ONLY
        index = self.index
        if index in TIME_REGISTERS:
            if not self.cmos[REG_B] & B_SET:
                self._show_time()
        elif index == REG_A:
            return self.cmos[REG_A] | (A_UPDATE_IN_PROGRESS if self._update_in_progress() else 0)
        elif index == REG_C:
            return self._read_flags()
        elif index == REG_D:
            return D_VALID
        return self.cmos[index]

    def write_port(self, port: int, size: int, value: int) -> None:
        """Write the index and the NMI mask, or the indexed register."""
        if port == RTC_PORT:
            self.index = value & INDEX_MASK
            self.nmi_disabled = bool(value & NMI_DISABLED)
            return
        index = self.index
        if index in TIME_REGISTERS:
            self._write_time(index, value)
        elif index in ALARM_REGISTERS:
            self._collect()
            self.cmos[index] = value
            self._find_alarm()
            self._update()
        elif index == REG_A:
            self._collect()
            self.cmos[REG_A] = value & ~A_UPDATE_IN_PROGRESS
            self._update()
        elif index == REG_B:
            self._write_b(value)
        elif index not in (REG_C, REG_D):
            self.cmos[index] = value

    def _write_b(self, value: int) -> None:
        self._collect()
        before = self.cmos[REG_B]
        if value & B_SET:
            if not before & B_SET:
                self._show_time()
                # The data sheet has SET, when it goes high, clear UIE.
                value &= ~UPDATE_ENDED
            self.cmos[REG_B] = value
        else:
            # The registers were written in the format that is set now.
            self.cmos[REG_B] = value
            if before & B_SET:
                self._take_time()
        self._find_alarm()
        self._update()

    def _write_time(self, index: int, value: int) -> None:
        if self.cmos[REG_B] & B_SET:
            self.cmos[index] = value
            return
        self._collect()
        self._show_time()
        self.cmos[index] = value
        self._take_time()
        self._find_alarm()
        self._update()

    # Interrupts. "Wall" times are the clock's time of day, without the guest's offset.

    def _read_flags(self) -> int:
        self._collect()
        value = self.flags
        if value & self.cmos[REG_B] & EVENTS:
            value |= C_IRQ
        self.flags = 0
        self._update()
        return value

    def _collect(self) -> None:
        """Set the flags of everything that happened since the last call."""
        before, now = self.seen_ns, self._clock.wall_clock_ns()
        self.seen_ns = now
        period = self._period()
        if period and _crystal_ticks(now) // period != _crystal_ticks(before) // period:
            self.flags |= PERIODIC
        if self.cmos[REG_B] & B_SET:
            return
        second = now // NANOSECONDS_PER_SECOND
        if second != before // NANOSECONDS_PER_SECOND:
            self.flags |= UPDATE_ENDED
        if self.alarm_at is not None and second >= self.alarm_at:
            self.flags |= ALARM
            self._find_alarm()

    def _update(self) -> None:
        """Drive the line, and wait for the next event that may raise it: none before the guest reads C."""
        level = bool(self.flags & self.cmos[REG_B] & EVENTS)
        if level != self.irq_level:
            self.irq_level = level
            self._irq(level)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        event_ns = None if level else self._next_event()
        if event_ns is not None:
            self._timer = self._clock.call_at(event_ns - self._clock.epoch_ns, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self._collect()
        self._update()

    def _next_event(self) -> int | None:
        """Return the wall time of the next enabled event in nanoseconds."""
        control = self.cmos[REG_B]
        times = []
        period = self._period()
        if control & PERIODIC and period:
            tick = (_crystal_ticks(self.seen_ns) // period + 1) * period
            times.append(-(-tick * NANOSECONDS_PER_SECOND // CRYSTAL_HZ))
        if not control & B_SET:
            if control & UPDATE_ENDED:
                times.append((self.seen_ns // NANOSECONDS_PER_SECOND + 1) * NANOSECONDS_PER_SECOND)
            if control & ALARM and self.alarm_at is not None:
                times.append(self.alarm_at * NANOSECONDS_PER_SECOND)
        return min(times, default=None)

    def _period(self) -> int:
        """Return the period of the periodic interrupt in crystal ticks; 0 when it is off."""
        rate = self.cmos[REG_A] & A_RATE
        return 1 << SLOW_RATES.get(rate, rate) - 1 if rate else 0

    def _find_alarm(self) -> None:
        wanted = (
            self._alarm_field(HOURS_ALARM, DAY_SECONDS // HOUR_SECONDS),
            self._alarm_field(MINUTES_ALARM, HOUR_SECONDS // MINUTE_SECONDS),
            self._alarm_field(SECONDS_ALARM, MINUTE_SECONDS),
        )
        alarm = next_alarm(self._clock.wall_clock() + self.offset_s, *wanted)
        self.alarm_at = None if alarm is None else alarm - self.offset_s

    def _alarm_field(self, index: int, limit: int) -> range:
        """Return the values an alarm register matches: all of them, one, or none if it holds nonsense."""
        raw = self.cmos[index]
        if raw >= ALARM_ANY:
            return range(limit)
        value = self._decode_hour(raw) if index == HOURS_ALARM else self._decode(raw)
        return range(value, value + 1) if value < limit else range(0)

    # The time registers

    def _update_in_progress(self) -> bool:
        phase = self._clock.wall_clock_ns() % NANOSECONDS_PER_SECOND
        return not self.cmos[REG_B] & B_SET and phase >= NANOSECONDS_PER_SECOND - UPDATE_WARNING_NS

    def _show_time(self) -> None:
        """Write the running time into the time registers."""
        days, second = divmod(self._clock.wall_clock() + self.offset_s, DAY_SECONDS)
        today = date.fromordinal((days + UNIX_EPOCH_DAY - 1) % CALENDAR_DAYS + 1)
        cmos = self.cmos
        cmos[SECONDS] = self._encode(second % MINUTE_SECONDS)
        cmos[MINUTES] = self._encode(second % HOUR_SECONDS // MINUTE_SECONDS)
        cmos[HOURS] = self._encode_hour(second // HOUR_SECONDS)
        cmos[DAY_OF_WEEK] = self._encode(today.isoweekday() % 7 + 1)
        cmos[DAY] = self._encode(today.day)
        cmos[MONTH] = self._encode(today.month)
        cmos[YEAR] = self._encode(today.year % CENTURY_YEARS)
        cmos[CENTURY] = self._encode(today.year // CENTURY_YEARS)

    def _take_time(self) -> None:
        """Let time run on from the time registers. Values out of range carry over or are clamped."""
        cmos = self.cmos
        year = self._decode(cmos[CENTURY]) * CENTURY_YEARS + self._decode(cmos[YEAR])
        year = min(max(year, date.min.year), date.max.year)
        month = min(max(self._decode(cmos[MONTH]), 1), MONTHS)
        day = max(self._decode(cmos[DAY]), 1)
        days = date(year, month, 1).toordinal() - UNIX_EPOCH_DAY + day - 1
        seconds = (
            days * DAY_SECONDS
            + self._decode_hour(cmos[HOURS]) * HOUR_SECONDS
            + self._decode(cmos[MINUTES]) * MINUTE_SECONDS
            + self._decode(cmos[SECONDS])
        )
        self.offset_s = seconds - self._clock.wall_clock()

    def _encode(self, value: int) -> int:
        return value if self.cmos[REG_B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, raw: int) -> int:
        return raw if self.cmos[REG_B] & B_BINARY else (raw >> 4) * 10 + (raw & 0xF)

    def _encode_hour(self, hour: int) -> int:
        if self.cmos[REG_B] & B_24_HOURS:
            return self._encode(hour)
        return self._encode((hour - 1) % 12 + 1) | (HOUR_PM if hour >= 12 else 0)

    def _decode_hour(self, raw: int) -> int:
        if self.cmos[REG_B] & B_24_HOURS:
            return self._decode(raw)
        return self._decode(raw & ~HOUR_PM) % 12 + (12 if raw & HOUR_PM else 0)


def next_alarm(now: int, hours: range, minutes: range, seconds: range) -> int | None:
    """Return the first second behind ``now`` that all three ranges match; ``None`` if one is empty."""
    if not (hours and minutes and seconds):
        return None
    alarm = now + 1
    while True:
        second = alarm % DAY_SECONDS
        if second // HOUR_SECONDS not in hours:
            alarm += HOUR_SECONDS - second % HOUR_SECONDS
        elif second % HOUR_SECONDS // MINUTE_SECONDS not in minutes:
            alarm += MINUTE_SECONDS - second % MINUTE_SECONDS
        elif second % MINUTE_SECONDS not in seconds:
            alarm += 1
        else:
            return alarm


def _crystal_ticks(wall_ns: int) -> int:
    return wall_ns * CRYSTAL_HZ // NANOSECONDS_PER_SECOND
