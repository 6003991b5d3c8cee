"""ACPI fixed hardware: PM1 event and control blocks, the PM timer, GPE0, and the SMI command port.

Ports, values and what is behind them are those of the PIIX4 on QEMU's pc machine. The PM1 block is one range of
twelve ports here, little-endian, accessed in any width; its two unused bytes read as ones.

The timer's status bit is worked out when somebody looks: it is 1 from the tick on at which the timer's top bit
changes. A clock's timer waits for that tick only while the guest wants an interrupt for it. Nothing causes general
purpose events: GPE0's status stays 0.

Sources: ACPI specification, "ACPI Hardware Specification"; Intel 82371AB (PIIX4) data sheet.
"""

from __future__ import annotations

from collections.abc import Callable

from lasskvm.kvm.clock import NANOSECONDS_PER_SECOND, Clock, Timer
from lasskvm.kvm.iobus import ALL_ONES, DeviceState, IrqLine

__all__ = [
    "ACPI_DISABLE",
    "ACPI_ENABLE",
    "GPE0_LENGTH",
    "GPE0_PORT",
    "PM1_CONTROL_LENGTH",
    "PM1_CONTROL_PORT",
    "PM1_EVENT_LENGTH",
    "PM1_EVENT_PORT",
    "PM_TIMER_HZ",
    "PM_TIMER_LENGTH",
    "PM_TIMER_PORT",
    "SCI_IRQ",
    "SMI_COMMAND_PORT",
    "AcpiPm",
]

SCI_IRQ = 9

PM1_EVENT_PORT = 0x600
PM1_EVENT_LENGTH = 4
PM1_CONTROL_PORT = 0x604
PM1_CONTROL_LENGTH = 2
PM_TIMER_PORT = 0x608
PM_TIMER_LENGTH = 4
GPE0_PORT = 0xAFE0
GPE0_LENGTH = 4
SMI_COMMAND_PORT = 0xB2
SMI_LENGTH = 2

#: Commands to the SMI command port: who handles the fixed hardware's events, the OS or firmware.
ACPI_ENABLE = 0xF1
ACPI_DISABLE = 0xF0

PM_TIMER_HZ = 3_579_545
PM_TIMER_MASK = (1 << 24) - 1
#: The timer's top bit changes every so many ticks.
HALF_PERIOD = 1 << 23

# Bytes of the PM1 block, from PM1_EVENT_PORT on
STATUS_LOW, STATUS_HIGH, ENABLE_LOW, ENABLE_HIGH, CONTROL_LOW, CONTROL_HIGH, UNUSED = range(7)
TIMER = 8

# Bits of the PM1 status and enable registers
TIMER_EVENT = 1 << 0
GLOBAL_LOCK_EVENT = 1 << 5
POWER_BUTTON_EVENT = 1 << 8
RTC_EVENT = 1 << 10
EVENTS = TIMER_EVENT | GLOBAL_LOCK_EVENT | POWER_BUTTON_EVENT | RTC_EVENT

# Bits of the PM1 control register
SCI_ENABLE = 1 << 0
SLEEP_TYPE_SHIFT = 10
SLEEP_TYPE_MASK = 7
SLEEP_ENABLE = 1 << 13

#: Sleep types that switch the machine off: soft-off, and "suspend to disk", whose image the OS has written before.
SOFT_OFF = 0
SUSPEND_TO_DISK = 2
OFF_TYPES = frozenset((SOFT_OFF, SUSPEND_TO_DISK))

BYTE_MASK = 0xFF

#: Registers and what else is kept as a number.
_STATE = (
    "control",
    "enable",
    "gpe_enable",
    "irq_level",
    "overflow_tick",
    "smi_command",
    "smi_status",
    "status",
)


class AcpiPm:
    """The fixed hardware. ``irq`` is the SCI; ``power_off`` is called when the guest goes to sleep type 0 or 2."""

    ports = (
        range(PM1_EVENT_PORT, PM1_CONTROL_PORT + PM1_CONTROL_LENGTH),
        range(PM_TIMER_PORT, PM_TIMER_PORT + PM_TIMER_LENGTH),
        range(GPE0_PORT, GPE0_PORT + GPE0_LENGTH),
        range(SMI_COMMAND_PORT, SMI_COMMAND_PORT + SMI_LENGTH),
    )
    register_size = 4
    __slots__ = (
        "_clock",
        "_irq",
        "_power_off",
        "_timer",
        "control",
        "enable",
        "gpe_enable",
        "irq_level",
        "overflow_tick",
        "smi_command",
        "smi_status",
        "status",
    )

    def __init__(self, clock: Clock, irq: IrqLine, power_off: Callable[[], None]) -> None:
        self._clock = clock
        self._irq = irq
        self._power_off = power_off
        self._timer: Timer | None = None
        self.irq_level = False
        self.reset()

    def reset(self) -> None:
        """Power-on state: no events, firmware in charge. The PM timer runs on."""
        self.status = 0
        self.enable = 0
        self.control = 0
        self.gpe_enable = 0
        self.smi_command = 0
        self.smi_status = 0
        #: The tick at which TMR_STS is set, counted from the clock's start.
        self.overflow_tick = _next_overflow(self._ticks())
        self._update()

    def get_state(self) -> DeviceState:
        """Registers, when the timer's status bit is set, and the clock's timer for it."""
        timer = None if self._timer is None else self._timer.state
        return {name: getattr(self, name) for name in _STATE} | {"timer": timer}

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`, on a clock that reads the same time."""
        for name in _STATE:
            setattr(self, name, int(state[name]))
        self.irq_level = bool(state["irq_level"])
        self._stop_timer()
        if state["timer"] is not None:
            self._timer = self._clock.restore(state["timer"], self._expire)

    def press_power_button(self) -> bool:
        """Press and release the button. Returns whether the guest listens to it; if not, nothing happens."""
        if not self.enable & POWER_BUTTON_EVENT:
            return False
        self.status |= POWER_BUTTON_EVENT
        self._update()
        return True

    def read_port(self, port: int, size: int) -> int:
        """Read registers; what lies between them reads as ones."""
        if port == PM_TIMER_PORT:
            return self._ticks() & PM_TIMER_MASK & ALL_ONES[size]
        if port >= GPE0_PORT:
            block, offset = self.gpe_enable << 8 * GPE0_LENGTH // 2, port - GPE0_PORT
        elif port >= PM1_EVENT_PORT:
            block, offset = self._pm1_block(), port - PM1_EVENT_PORT
        else:
            block, offset = self.smi_command | self.smi_status << 8, port - SMI_COMMAND_PORT
        return block >> 8 * offset & ALL_ONES[size]

    def write_port(self, port: int, size: int, value: int) -> None:
        """Write registers, byte by byte from the lowest port. The PM timer cannot be written."""
        if port >= GPE0_PORT:
            for byte in range(size):
                self._write_gpe0(port - GPE0_PORT + byte, value >> 8 * byte & BYTE_MASK)
        elif port >= PM1_EVENT_PORT:
            for byte in range(size):
                self._write_pm1(port - PM1_EVENT_PORT + byte, value >> 8 * byte & BYTE_MASK)
            self._update()
        else:
            for byte in range(size):
                self._write_smi(port - SMI_COMMAND_PORT + byte, value >> 8 * byte & BYTE_MASK)

    def _ticks(self) -> int:
        return self._clock.now() * PM_TIMER_HZ // NANOSECONDS_PER_SECOND

    def _pm1_block(self) -> int:
        """The bytes of the PM1 block as one little-endian number."""
        self._collect()
        return (
            self.status
            | self.enable << 8 * ENABLE_LOW
            | self.control << 8 * CONTROL_LOW
            | ALL_ONES[TIMER - UNUSED] << 8 * UNUSED
            | (self._ticks() & PM_TIMER_MASK) << 8 * TIMER
        )

    def _write_pm1(self, offset: int, value: int) -> None:
        if offset <= STATUS_HIGH:
            self._clear_status(value << 8 * offset)
        elif offset <= ENABLE_HIGH:
            self.enable = _with_byte(self.enable, offset - ENABLE_LOW, value)
        elif offset <= CONTROL_HIGH:
            self._write_control(_with_byte(self.control, offset - CONTROL_LOW, value))

    def _clear_status(self, ones: int) -> None:
        self._collect()
        if self.status & ones & TIMER_EVENT:
            self.overflow_tick = _next_overflow(self._ticks())
        self.status &= ~ones

    def _write_control(self, value: int) -> None:
        # SLP_EN is write-only: it triggers, and reads as 0.
        self.control = value & ~SLEEP_ENABLE
        if value & SLEEP_ENABLE and value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK in OFF_TYPES:
            self._power_off()

    def _write_gpe0(self, offset: int, value: int) -> None:
        # The lower half is the status, whose bits are cleared by writing ones; they are 0 anyway.
        if offset >= GPE0_LENGTH // 2:
            self.gpe_enable = _with_byte(self.gpe_enable, offset - GPE0_LENGTH // 2, value)

    def _write_smi(self, offset: int, value: int) -> None:
        if offset:
            self.smi_status = value
            return
        self.smi_command = value
        if value == ACPI_ENABLE:
            self.control |= SCI_ENABLE
        elif value == ACPI_DISABLE:
            self.control &= ~SCI_ENABLE

    def _collect(self) -> None:
        """Set the timer's status bit if its top bit has changed."""
        if self._ticks() >= self.overflow_tick:
            self.status |= TIMER_EVENT

    def _update(self) -> None:
        """Bring the interrupt line and the timer up to date."""
        self._collect()
        level = bool(self.status & self.enable & EVENTS)
        if self.enable & TIMER_EVENT and not self.status & TIMER_EVENT:
            self._start_timer()
        else:
            self._stop_timer()
        if level != self.irq_level:
            self.irq_level = level
            self._irq(level)

    def _start_timer(self) -> None:
        deadline_ns = -(-self.overflow_tick * NANOSECONDS_PER_SECOND // PM_TIMER_HZ)
        if self._timer is not None:
            if self._timer.deadline_ns == deadline_ns:
                return
            self._timer.cancel()
        self._timer = self._clock.call_at(deadline_ns, self._expire)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        self._update()


def _next_overflow(tick: int) -> int:
    """The first tick behind *tick* at which the timer's top bit changes."""
    return (tick // HALF_PERIOD + 1) * HALF_PERIOD


def _with_byte(value: int, index: int, byte: int) -> int:
    return value & ~(BYTE_MASK << 8 * index) | byte << 8 * index
