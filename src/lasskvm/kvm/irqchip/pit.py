"""The 8254 interval timer and port 0x61, as KVM's ``arch/x86/kvm/i8254.c`` presents them.

All three channels count ticks of one oscillator, derived from the clock with integer arithmetic, so a counter
that is read, an output that is sampled and an interrupt that fires always agree and nothing drifts. Channel 0
pulses IRQ 0 on each rising edge of its output; channel 2 is gated and heard through port 0x61.

Sources: Intel 8254 data sheet (231164); KVM function names are given where they apply.
"""

from __future__ import annotations

from lasskvm.kvm.clock import NANOSECONDS_PER_SECOND, Clock, Timer
from lasskvm.kvm.iobus import DeviceState, IrqLine

__all__ = ["PIT_FREQUENCY", "PIT_IRQ", "Pit"]

#: The oscillator, in Hz.
PIT_FREQUENCY = 1_193_182
PIT_IRQ = 0

CHANNEL_PORTS = range(0x40, 0x43)
CONTROL_PORT = 0x43
#: NMI status and control register: gate of channel 2, speaker, refresh toggle.
SPEAKER_PORT = 0x61

SPEAKER_GATE2 = 1 << 0
SPEAKER_WRITABLE = 0x0F
SPEAKER_REFRESH = 1 << 4
SPEAKER_OUT2 = 1 << 5
#: DRAM refresh, and with it the toggle, every 15.085 us.
REFRESH_PERIOD_NS = 15_085

# Control word
SELECT_SHIFT = 6
SELECT_READ_BACK = 3
ACCESS_SHIFT = 4
ACCESS_MASK = 3
ACCESS_LATCH, ACCESS_LOW, ACCESS_HIGH, ACCESS_LOW_HIGH = range(4)
MODE_SHIFT = 1
MODE_MASK = 7
MODE_ALIAS = 3
CONTROL_BCD = 1 << 0
READ_BACK_NO_COUNT = 1 << 5
READ_BACK_NO_STATUS = 1 << 4
READ_BACK_FIRST_CHANNEL = 1 << 1
STATUS_OUT = 1 << 7
STATUS_NULL_COUNT = 1 << 6

(
    INTERRUPT_ON_TERMINAL_COUNT,
    ONE_SHOT,
    RATE_GENERATOR,
    SQUARE_WAVE,
    SOFTWARE_STROBE,
    HARDWARE_STROBE,
) = range(6)
PERIODIC_MODES = (RATE_GENERATOR, SQUARE_WAVE)
GATE_TRIGGERED_MODES = (ONE_SHOT, HARDWARE_STROBE)

BINARY_MODULUS = 0x10000
BCD_MODULUS = 10_000
BYTE_MASK = 0xFF

#: Two interrupts are at least this far apart, whatever the guest programs (KVM's ``min_timer_period_us``).
MINIMUM_INTERVAL_NS = 200_000
#: A periodic tick that is later than this is dropped; up to then ticks are made up for one by one.
BADLY_LATE_TICKS = PIT_FREQUENCY // 20


class Pit:
    """The three channels. ``irq`` is the IRQ 0 line."""

    ports = (range(CHANNEL_PORTS.start, CONTROL_PORT + 1), range(SPEAKER_PORT, SPEAKER_PORT + 1))
    register_size = 1
    __slots__ = ("_clock", "_edge_tick", "_irq", "_timer", "channels", "speaker")

    def __init__(self, clock: Clock, irq: IrqLine) -> None:
        self._clock = clock
        self._irq = irq
        self._timer: Timer | None = None
        self._edge_tick = 0
        self.reset()

    def reset(self) -> None:
        """Power-on state: no channel counts, the gate of channel 2 is closed."""
        self.channels = (Channel(gate=True), Channel(gate=True), Channel(gate=False))
        self.speaker = 0
        self._stop()

    def get_state(self) -> DeviceState:
        """All channels and port 0x61; times are those of the clock."""
        return {
            "channels": [channel.get_state() for channel in self.channels],
            "speaker": self.speaker,
            "edge_tick": self._edge_tick,
            "timer": None if self._timer is None else self._timer.state,
        }

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`, on a clock that reads the same time."""
        self._stop()
        for channel, values in zip(self.channels, state["channels"], strict=True):
            channel.set_state(values)
        self.speaker = state["speaker"] & SPEAKER_WRITABLE
        self._edge_tick = state["edge_tick"]
        if state["timer"] is not None:
            self._timer = self._clock.restore(state["timer"], self._rising_edge)

    def read_port(self, port: int, size: int) -> int:
        """Read a counter, a latched value or port 0x61. KVM: ``pit_ioport_read``, ``speaker_ioport_read``."""
        tick = self._tick()
        if port in CHANNEL_PORTS:
            return self.channels[port - CHANNEL_PORTS.start].read(tick)
        if port == CONTROL_PORT:
            return 0
        value = self.speaker
        if self._clock.now() // REFRESH_PERIOD_NS & 1:
            value |= SPEAKER_REFRESH
        if self.channels[2].output(tick):
            value |= SPEAKER_OUT2
        return value

    def write_port(self, port: int, size: int, value: int) -> None:
        """Write a count, a control word or port 0x61. KVM: ``pit_ioport_write``, ``speaker_ioport_write``."""
        tick = self._tick()
        if port in CHANNEL_PORTS:
            number = port - CHANNEL_PORTS.start
            if self.channels[number].write(value, tick) and number == 0:
                self._start(tick)
        elif port == CONTROL_PORT:
            self._control(value, tick)
        else:
            self.speaker = value & SPEAKER_WRITABLE
            self.channels[2].set_gate(bool(value & SPEAKER_GATE2), tick)

    def _control(self, value: int, tick: int) -> None:
        select = value >> SELECT_SHIFT
        if select == SELECT_READ_BACK:
            for number, channel in enumerate(self.channels):
                if value & READ_BACK_FIRST_CHANNEL << number:
                    if not value & READ_BACK_NO_COUNT:
                        channel.latch_count(tick)
                    if not value & READ_BACK_NO_STATUS:
                        channel.latch_status(tick)
        elif value >> ACCESS_SHIFT & ACCESS_MASK == ACCESS_LATCH:
            self.channels[select].latch_count(tick)
        else:
            self.channels[select].program(value, tick)
            if select == 0:
                self._stop()

    def _tick(self) -> int:
        return self._clock.now() * PIT_FREQUENCY // NANOSECONDS_PER_SECOND

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self, tick: int) -> None:
        """Wait for the first rising edge behind ``tick``, if there will be one."""
        self._stop()
        edge = self.channels[0].next_edge(tick)
        if edge is not None:
            self._wait(edge, 0)

    def _wait(self, edge: int, not_before_ns: int) -> None:
        self._edge_tick = edge
        deadline_ns = -(-edge * NANOSECONDS_PER_SECOND // PIT_FREQUENCY)
        self._timer = self._clock.call_at(max(deadline_ns, not_before_ns), self._rising_edge)

    def _rising_edge(self) -> None:
        """Pulse IRQ 0 and wait for the next edge. See KVM's ``pit_timer_fn`` and ``pit_do_work``."""
        self._timer = None
        self._irq(True)
        self._irq(False)
        tick = self._tick()
        if tick - self._edge_tick > BADLY_LATE_TICKS:
            self._edge_tick = tick
        edge = self.channels[0].next_edge(self._edge_tick)
        if edge is not None:
            self._wait(edge, self._clock.now() + MINIMUM_INTERVAL_NS)


class Channel:
    """One counter. Times are ticks of the oscillator since the clock started."""

    __slots__ = (
        "access",
        "bcd",
        "count",
        "gate",
        "held",
        "latched_count",
        "latched_status",
        "loaded",
        "mode",
        "next_count",
        "origin",
        "read_high",
        "switch_tick",
        "triggered",
        "write_low",
    )

    def __init__(self, gate: bool) -> None:
        self.gate = gate
        self.origin = 0
        self.count = BINARY_MODULUS
        self.switch_tick = 0
        self.program(ACCESS_LOW_HIGH << ACCESS_SHIFT, 0)

    def program(self, control: int, tick: int) -> None:
        """Take a control word: OUT goes to its initial level and nothing counts until a count is written."""
        mode = control >> MODE_SHIFT & MODE_MASK
        self.mode = mode if mode <= HARDWARE_STROBE else mode & MODE_ALIAS
        self.access = control >> ACCESS_SHIFT & ACCESS_MASK
        self.bcd = bool(control & CONTROL_BCD)
        self.loaded = False
        self.triggered = False
        #: A count that was written but does not count yet.
        self.next_count: int | None = None
        #: Ticks counted so far while the gate stops the counter.
        self.held: int | None = None
        self.latched_count = b""
        self.latched_status: int | None = None
        self.read_high = False
        self.write_low: int | None = None

    def get_state(self) -> DeviceState:
        """Every register."""
        state = {name: getattr(self, name) for name in self.__slots__}
        return state | {"latched_count": self.latched_count.hex()}

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`."""
        if not state["count"] or state["next_count"] == 0:
            raise ValueError("a counter that counts from 0")
        for name in self.__slots__:
            setattr(self, name, state[name])
        self.latched_count = bytes.fromhex(state["latched_count"])

    def write(self, value: int, tick: int) -> bool:
        """Take one byte of a count. Returns whether the times of the output's edges changed."""
        if self.access == ACCESS_LOW:
            return self._load(value, tick)
        if self.access == ACCESS_HIGH:
            return self._load(value << 8, tick)
        if self.write_low is None:
            self.write_low = value
            if self.mode == INTERRUPT_ON_TERMINAL_COUNT:
                # "Writing the first byte disables counting. OUT is set low immediately."
                self.loaded = self.triggered = False
                return True
            return False
        low, self.write_low = self.write_low, None
        return self._load(value << 8 | low, tick)

    def read(self, tick: int) -> int:
        """Return the next byte: a latched status, then a latched count, else the running count."""
        if self.latched_status is not None:
            status, self.latched_status = self.latched_status, None
            return status
        if self.latched_count:
            value, self.latched_count = self.latched_count[0], self.latched_count[1:]
            return value
        value = self.value(tick)
        if self.access == ACCESS_LOW_HIGH:
            high = self.read_high
            self.read_high = not high
        else:
            high = self.access == ACCESS_HIGH
        return value >> 8 if high else value & BYTE_MASK

    def latch_count(self, tick: int) -> None:
        """Counter latch command: hold the count for the next reads. Ignored while an earlier one waits."""
        if not self.latched_count:
            value = self.value(tick).to_bytes(2, "little")
            if self.access == ACCESS_LOW:
                value = value[:1]
            elif self.access == ACCESS_HIGH:
                value = value[1:]
            self.latched_count = value

    def latch_status(self, tick: int) -> None:
        """Read-back command: hold the status byte for the next read. Ignored while an earlier one waits."""
        if self.latched_status is None:
            status = self.access << ACCESS_SHIFT | self.mode << MODE_SHIFT | self.bcd
            if self.output(tick):
                status |= STATUS_OUT
            if not self.loaded or self.next_count is not None:
                status |= STATUS_NULL_COUNT
            self.latched_status = status

    def set_gate(self, level: bool, tick: int) -> None:
        """Drive the GATE input. See KVM's ``pit_set_gate``."""
        elapsed = self._elapsed(tick)
        rises, falls = level and not self.gate, self.gate and not level
        self.gate = level
        if self.mode in GATE_TRIGGERED_MODES:
            if rises and self.loaded:
                self._restart(tick)
                self.triggered = True
        elif self.mode in PERIODIC_MODES:
            if rises:
                self._restart(tick)
            elif falls:
                self.held = 0
        elif falls:
            self.held = elapsed
        elif rises and self.held is not None:
            self.origin = tick - self.held
            self.held = None

    def value(self, tick: int) -> int:
        """Return the counting element, as 16 bits or four BCD digits. See KVM's ``pit_get_count``."""
        elapsed = self._elapsed(tick)
        if not self.loaded:
            return 0
        if not self.triggered:
            count = self.count
        elif self.mode == RATE_GENERATOR:
            count = self.count - elapsed % self.count
        elif self.mode == SQUARE_WAVE:
            # Counts down by two from the even part, once for each half of the wave; an odd count's high half
            # is the longer one.
            half = (self.count + 1) // 2
            count = (self.count & ~1) - 2 * (elapsed % self.count % half)
        else:
            count = self.count - elapsed
        return _to_bcd(count % BCD_MODULUS) if self.bcd else count % BINARY_MODULUS

    def output(self, tick: int) -> bool:
        """Return the level of OUT. See KVM's ``pit_get_out``."""
        elapsed = self._elapsed(tick)
        if not self.loaded:
            return self.mode != INTERRUPT_ON_TERMINAL_COUNT
        if self.mode == INTERRUPT_ON_TERMINAL_COUNT:
            return elapsed >= self.count
        if (self.mode in PERIODIC_MODES and self.held is not None) or not self.triggered:
            return True
        if self.mode == ONE_SHOT:
            return elapsed >= self.count
        if self.mode == RATE_GENERATOR:
            return elapsed % self.count != self.count - 1
        if self.mode == SQUARE_WAVE:
            return elapsed % self.count < (self.count + 1) // 2
        return elapsed != self.count

    def next_edge(self, tick: int) -> int | None:
        """Return the tick of OUT's first rising edge behind ``tick`` if the gate stays, or ``None``."""
        self._switch(tick)
        if not self.triggered:
            return None
        if self.mode in PERIODIC_MODES:
            return self._cycle_end(tick)
        # The strobe of the modes 4 and 5 is low for one tick, at the terminal count.
        strobe = self.mode != INTERRUPT_ON_TERMINAL_COUNT
        edge = self.origin + self.count + strobe
        return edge if edge > tick else None

    def _load(self, written: int, tick: int) -> bool:
        """Take a whole count. Returns whether it counts from now on. See KVM's ``pit_load_count``."""
        count = (_from_bcd(written) or BCD_MODULUS) if self.bcd else (written or BINARY_MODULUS)
        self._switch(tick)
        if self.mode in GATE_TRIGGERED_MODES:
            self.next_count = count
            if not self.loaded:
                self.count = count
                self.loaded = True
            return False
        if self.mode in PERIODIC_MODES and self.loaded and self.held is None:
            # The current cycle ends as it began.
            self.next_count = count
            self.switch_tick = self._cycle_end(tick)
            return False
        self.next_count = count
        self._restart(tick)
        self.held = None if self.gate else 0
        self.loaded = self.triggered = True
        return True

    def _restart(self, tick: int) -> None:
        if self.next_count is not None:
            self.count, self.next_count = self.next_count, None
        self.origin = tick
        self.held = None

    def _switch(self, tick: int) -> None:
        """Go over to a count that was written during an earlier cycle of a periodic mode."""
        if (
            self.next_count is not None
            and self.mode in PERIODIC_MODES
            and self.held is None
            and tick >= self.switch_tick
        ):
            self._restart(self.switch_tick)

    def _elapsed(self, tick: int) -> int:
        self._switch(tick)
        return tick - self.origin if self.held is None else self.held

    def _cycle_end(self, tick: int) -> int:
        return self.origin + ((tick - self.origin) // self.count + 1) * self.count


def _from_bcd(value: int) -> int:
    return sum((value >> 4 * digit & 0xF) * 10**digit for digit in range(4))


def _to_bcd(value: int) -> int:
    return sum(value // 10**digit % 10 << 4 * digit for digit in range(4))
