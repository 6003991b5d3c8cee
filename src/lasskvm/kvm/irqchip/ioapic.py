"""The I/O APIC: 24 interrupt lines that become messages to a local APIC, as KVM's ``arch/x86/kvm/ioapic.c`` has it.

An entry of the redirection table says for each line which message it is, and whether an edge or the level counts. A
level-triggered line sends one message and then waits for the end of interrupt (Remote IRR). A message that no processor
takes is not sent again by itself.

Source: Intel 82093AA data sheet (290566). Where it disagrees with KVM, KVM is followed and the difference is named next
to the line. Not modelled: KVM's tracking of lost ticks of the RTC, and the break it makes in a storm of interrupts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lasskvm.kvm.iobus import DeviceState, IrqLine
from lasskvm.kvm.irqchip.messages import DeliveryMode, InterruptMessage
from lasskvm.x86.registers import MASK32, MASK64

__all__ = ["IOAPIC_BASE", "IOAPIC_PINS", "Ioapic"]

#: Where the registers are in guest-physical memory.
IOAPIC_BASE = 0xFEC0_0000
IOAPIC_SIZE = 0x1000
IOAPIC_PINS = 24

# The two registers in memory: the number of a register, and a window on that one.
SELECT_OFFSET = 0x00
WINDOW_OFFSET = 0x10

# Registers by number; redirection entry n has its lower half at FIRST_ENTRY + 2 * n, its upper half behind that.
ID_REGISTER = 0x00
VERSION_REGISTER = 0x01
ARBITRATION_REGISTER = 0x02
FIRST_ENTRY = 0x10
HALF_ENTRY_BITS = 32

ID_SHIFT = 24
ID_MASK = 0xF
#: A version without the EOI register of later chips.
VERSION = 0x11
LAST_PIN_SHIFT = 16

# A redirection entry
ENTRY_VECTOR = 0xFF
ENTRY_MODE_SHIFT = 8
ENTRY_MODE_MASK = 0b111
ENTRY_LOGICAL = 1 << 11
ENTRY_DELIVERY_STATUS = 1 << 12
ENTRY_REMOTE_IRR = 1 << 14
ENTRY_LEVEL = 1 << 15
ENTRY_MASKED = 1 << 16
ENTRY_DESTINATION_SHIFT = 56
ENTRY_READ_ONLY = ENTRY_DELIVERY_STATUS | ENTRY_REMOTE_IRR

ACCESS_SIZES = (1, 2, 4, 8)
SELECT_MASK = 0xFF
PINS_MASK = (1 << IOAPIC_PINS) - 1


class Ioapic:
    """The chip and its lines.

    ``send`` takes a message to the processors and returns whether one of them has accepted it.
    """

    base = IOAPIC_BASE
    size = IOAPIC_SIZE
    __slots__ = ("_send", "entries", "id", "lines", "select")

    def __init__(self, send: Callable[[InterruptMessage], bool]) -> None:
        self._send = send
        #: The levels of the lines, bit n for pin n: KVM's ``irr``. A masked edge is thus lost when the line drops.
        self.lines = 0
        self.reset()

    def reset(self) -> None:
        """Power-on state: every pin is masked and edge-triggered. The levels of the lines stay."""
        self.select = 0
        self.id = 0
        self.entries = [ENTRY_MASKED] * IOAPIC_PINS

    def set_irq(self, pin: int, level: bool) -> None:
        """Drive *pin* (0 to 23). See KVM's ``ioapic_set_irq``."""
        bit = 1 << pin
        if not level:
            self.lines &= ~bit
            return
        is_edge = not self.lines & bit
        self.lines |= bit
        if is_edge or self.entries[pin] & ENTRY_LEVEL:
            self._service(pin)

    def line(self, pin: int) -> IrqLine:
        """Return *pin* as a wire to hand to a device."""
        return partial(self.set_irq, pin)

    def end_of_interrupt(self, vector: int) -> None:
        """A local APIC has ended level-triggered interrupt *vector*: lines that are still up ask for it anew.

        See KVM's ``kvm_ioapic_update_eoi``.
        """
        for pin, entry in enumerate(self.entries):
            if entry & ENTRY_VECTOR == vector and entry & ENTRY_LEVEL:
                self.entries[pin] = entry & ~ENTRY_REMOTE_IRR
                if self.lines >> pin & 1:
                    self._service(pin)

    def read_mmio(self, gpa: int, size: int) -> int:
        """Read the select register, or the register that is selected. See KVM's ``ioapic_mmio_read``."""
        if size not in ACCESS_SIZES:
            return 0
        offset = gpa - IOAPIC_BASE
        if offset == SELECT_OFFSET:
            return self.select
        return self._read_register() if offset == WINDOW_OFFSET else 0

    def write_mmio(self, gpa: int, size: int, value: int) -> None:
        """Write the select register, or the register that is selected. See KVM's ``ioapic_mmio_write``.

        What is written counts as 32 bits, whatever its size: the upper half of more is dropped, less is extended by
        zeros.
        """
        if size not in ACCESS_SIZES:
            return
        offset = gpa - IOAPIC_BASE
        if offset == SELECT_OFFSET:
            self.select = value & SELECT_MASK
        elif offset == WINDOW_OFFSET:
            self._write_register(value & MASK32)

    def get_state(self) -> DeviceState:
        """Every register and the levels of the lines."""
        return {"select": self.select, "id": self.id, "lines": self.lines, "entries": list(self.entries)}

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`; nothing is sent again."""
        entries = [entry & MASK64 for entry in state["entries"]]
        if len(entries) != IOAPIC_PINS:
            raise ValueError(f"an I/O APIC with {len(entries)} pins")
        self.select = state["select"] & SELECT_MASK
        self.id = state["id"] & ID_MASK
        self.lines = state["lines"] & PINS_MASK
        self.entries = entries

    def _read_register(self) -> int:
        if self.select == VERSION_REGISTER:
            return IOAPIC_PINS - 1 << LAST_PIN_SHIFT | VERSION
        if self.select in (ID_REGISTER, ARBITRATION_REGISTER):
            return self.id << ID_SHIFT
        pin, upper = self._selected_entry()
        # What is reserved reads as ones in KVM.
        entry = self.entries[pin] if 0 <= pin < IOAPIC_PINS else MASK64
        return entry >> HALF_ENTRY_BITS if upper else entry & MASK32

    def _selected_entry(self) -> tuple[int, bool]:
        """The pin whose entry is selected, or a number that no pin has, and whether the upper half is."""
        return self.select - FIRST_ENTRY >> 1, bool(self.select & 1)

    def _write_register(self, value: int) -> None:
        if self.select == ID_REGISTER:
            self.id = value >> ID_SHIFT & ID_MASK
            return
        pin, upper = self._selected_entry()
        if not 0 <= pin < IOAPIC_PINS:
            return
        former = self.entries[pin]
        if upper:
            entry = former & MASK32 | value << HALF_ENTRY_BITS
        else:
            entry = former & ~(MASK32 & ~ENTRY_READ_ONLY) | value & ~ENTRY_READ_ONLY
        if not entry & ENTRY_LEVEL:
            # Without an EOI register, software makes a pin edge-triggered for a moment to end its interrupt.
            entry &= ~ENTRY_REMOTE_IRR
        self.entries[pin] = entry
        if entry & ENTRY_LEVEL and self.lines >> pin & 1:
            self._service(pin)

    def _service(self, pin: int) -> None:
        """Send the message of *pin* unless it is masked or waits for its end. See KVM's ``ioapic_service``."""
        entry = self.entries[pin]
        is_level = bool(entry & ENTRY_LEVEL)
        if entry & ENTRY_MASKED or (is_level and entry & ENTRY_REMOTE_IRR):
            return
        message = InterruptMessage(
            vector=entry & ENTRY_VECTOR,
            mode=DeliveryMode(entry >> ENTRY_MODE_SHIFT & ENTRY_MODE_MASK),
            destination=entry >> ENTRY_DESTINATION_SHIFT,
            logical=bool(entry & ENTRY_LOGICAL),
            level_triggered=is_level,
        )
        # KVM sets Remote IRR also when there is no such processor; nothing would ever end that interrupt.
        if self._send(message) and is_level:
            self.entries[pin] |= ENTRY_REMOTE_IRR
