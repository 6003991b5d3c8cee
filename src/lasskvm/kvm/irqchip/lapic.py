"""The local APIC of the only processor, as KVM's ``arch/x86/kvm/lapic.c`` presents it; its APIC ID is 0.

Two things live in the processor's state words: IA32_APIC_BASE, and bits 7:4 of the task priority, which CR8 is.

Sources: Intel SDM volume 3A, chapter 11 ("APIC"), whose sections are named where they apply, and KVM functions. Errors
are reported as the manual has it; KVM's error status is always 0. Not modelled, as in KVM: SMIs, focus processors,
the remote read register, and the CMCI entry of the local vector table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from lasskvm.emulator import msr_checks
from lasskvm.emulator.faults import general_protection
from lasskvm.kvm.clock import Clock
from lasskvm.kvm.iobus import DeviceState
from lasskvm.kvm.irqchip import apic_registers as apic
from lasskvm.kvm.irqchip.apic_registers import NO_REGISTER, REGISTERS, Shorthand
from lasskvm.kvm.irqchip.lapic_state import APIC_ID, ApicState
from lasskvm.kvm.irqchip.lapic_timer import ApicTimer
from lasskvm.kvm.irqchip.messages import DeliveryMode, InterruptMessage
from lasskvm.state import APIC_BASE, Words
from lasskvm.x86.msr import APIC_BASE_BSP, APIC_BASE_ENABLE, APIC_BASE_X2APIC, MSR_IA32_X2APIC_FIRST
from lasskvm.x86.registers import MASK32, MASK64

__all__ = ["ApicEvents", "LocalApic"]

#: IA32_APIC_BASE after power-on.
APIC_BASE_RESET = 0xFEE00000 | APIC_BASE_ENABLE | APIC_BASE_BSP

_OFFSET_MASK = apic.APIC_PAGE_SIZE - 1
_PAGE_MASK = MASK64 & ~_OFFSET_MASK
_BYTE_IN_STEP = apic.REGISTER_STEP - 1
_PRIORITIZED = (DeliveryMode.FIXED, DeliveryMode.LOWEST_PRIORITY)
#: What a guest may not do to the mode; only a reset leads from x2APIC to xAPIC mode directly (figure 11-27).
_FORBIDDEN_TRANSITIONS = ((apic.MODE_X2APIC, apic.MODE_XAPIC), (apic.MODE_DISABLED, apic.MODE_X2APIC))


class ApicEvents(Protocol):
    """What a local APIC tells its processor."""

    def kick(self) -> None:
        """An interrupt may have become deliverable: look before the guest goes on."""

    def nmi(self) -> None:
        """A non-maskable interrupt has come."""

    def init(self) -> None:
        """INIT has come: reset the processor, and the local APIC by :meth:`LocalApic.init_reset`."""

    def startup(self, vector: int) -> None:
        """A startup IPI has come, to begin at ``vector << 12``. A processor that runs ignores it."""


class LocalApic:
    """The local APIC, an MMIO device of one page at the base that IA32_APIC_BASE has.

    It answers there in every mode: outside of xAPIC mode with all ones (KVM's ``KVM_X86_QUIRK_LAPIC_MMIO_HOLE``).
    ``guest_tsc`` returns what RDTSC reads. The owner sets ``has_x2apic`` and ``has_tsc_deadline`` as CPUID has them;
    ``on_eoi``, called with the vector of a level-triggered interrupt that the guest has ended; and ``on_base_change``,
    called when ``base`` has moved or another mode changes what answers there.
    """

    size = apic.APIC_PAGE_SIZE

    def __init__(self, words: Words, clock: Clock, guest_tsc: Callable[[], int], events: ApicEvents) -> None:
        self.has_x2apic = False
        self.has_tsc_deadline = False
        self.on_eoi: Callable[[int], None] | None = None
        self.on_base_change: Callable[[], None] | None = None
        self._words = words
        self._events = events
        timer = ApicTimer(clock, guest_tsc, partial(self._deliver_local, apic.LVT_TIMER))
        self._state = ApicState(words, timer)
        self._visible_base = APIC_BASE_RESET & (_PAGE_MASK | apic.MODE_BITS)
        self.reset()

    def reset(self) -> None:
        """The state after power-on (11.4.7.1), IA32_APIC_BASE and CR8 included. KVM: ``kvm_lapic_reset``."""
        self._words[APIC_BASE] = APIC_BASE_RESET
        self._state.stored[apic.ID] = APIC_ID << apic.XAPIC_ID_SHIFT
        self.init_reset()

    def init_reset(self) -> None:
        """The state after INIT (11.4.7.3): as after power-on, but IA32_APIC_BASE and the APIC ID stay.

        LINT0 is left open for the 8259A, as KVM does for the boot processor.
        """
        self._state.init_reset()
        self._announce_base()

    # The processor's side

    @property
    def base(self) -> int:
        """The guest-physical address of the APIC page (11.4.4)."""
        return self._words[APIC_BASE] & _PAGE_MASK

    def write_base(self, value: int, host_initiated: bool = False) -> None:
        """WRMSR to IA32_APIC_BASE (11.4.4, 11.12.5). KVM: ``kvm_apic_set_base``.

        Raises #GP(0) for reserved bits, x2APIC mode without the feature or without the enable bit, and the
        transitions that the manual forbids, which a VMM may do by *host_initiated*: from x2APIC to xAPIC mode, and
        from the disabled state to x2APIC mode.
        """
        if value == self._words[APIC_BASE]:
            return
        if not self.is_valid_base(value):
            raise general_protection()
        before, after = self._state.mode, value & apic.MODE_BITS
        if not host_initiated and (before, after) in _FORBIDDEN_TRANSITIONS:
            raise general_protection()
        self._state.set_base(value)
        self._announce_base()
        self._events.kick()

    def is_valid_base(self, value: int) -> bool:
        """Whether IA32_APIC_BASE can hold *value*, whatever it holds now."""
        checked = value & ~APIC_BASE_X2APIC if self.has_x2apic else value
        return msr_checks.apic_base(self._words, checked) and value & apic.MODE_BITS != apic.MODE_INVALID

    def cr8_written(self) -> None:
        """The guest has moved to CR8, which clears the rest of TPR (11.8.6). KVM: ``kvm_lapic_set_tpr``."""
        self._state.vectors.tpr_subclass = 0
        self._kick_if_pending()

    def accepts_pic(self) -> bool:
        """Whether the INTR wire of the 8259A reaches the processor. KVM: ``kvm_apic_accept_pic_intr``."""
        if self._state.mode == apic.MODE_DISABLED:
            return True
        lint0 = self._state.stored[apic.LVT_LINT0]
        return not lint0 & apic.LVT_MASKED and apic.delivery_mode(lint0) == DeliveryMode.EXTINT

    def pending_vector(self) -> int | None:
        """The interrupt to deliver next, if the processor takes interrupts; None if there is none (11.8.3).

        While the APIC is disabled, in whichever way, requests are kept but not delivered.
        """
        vector = self._state.vectors.pending()
        return vector if vector is not None and self._state.enabled else None

    def acknowledge(self) -> int:
        """Take the pending interrupt into service and return its vector. KVM: ``kvm_apic_ack_interrupt``.

        When there is none any more, that is the spurious vector, and nothing is in service (11.9).
        """
        vector = self.pending_vector()
        if vector is None:
            return self._state.stored[apic.SPIV] & apic.VECTOR_MASK
        self._state.vectors.acknowledge(vector)
        return vector

    def read_tsc_deadline(self) -> int:
        """RDMSR of IA32_TSC_DEADLINE (11.5.4.1): 0 if disarmed or in another mode; #GP(0) without the feature."""
        if not self.has_tsc_deadline:
            raise general_protection()
        return self._state.timer.tsc_deadline

    def write_tsc_deadline(self, value: int) -> None:
        """WRMSR to IA32_TSC_DEADLINE: see :meth:`ApicTimer.write_deadline`; #GP(0) without the feature."""
        if not self.has_tsc_deadline:
            raise general_protection()
        if self._state.mode != apic.MODE_DISABLED:
            self._state.timer.write_deadline(value)

    def tsc_changed(self) -> None:
        """The guest has written its TSC or TSC_ADJUST: an armed deadline follows (11.5.4.1)."""
        self._state.timer.tsc_changed()

    # Interrupts from outside

    def receive(self, message: InterruptMessage) -> bool:
        """Take a message of an IOAPIC or an MSI. Returns whether the processor was meant and took it.

        An interrupt that is requested already counts as taken. As in KVM, destination 0xFF is everybody in x2APIC
        mode, too. KVM: ``kvm_apic_match_dest``, ``__apic_accept_irq``.
        """
        destination = message.destination
        if destination == apic.XAPIC_BROADCAST and self._state.mode == apic.MODE_X2APIC:
            destination = apic.X2APIC_BROADCAST
        return self._state.is_destination(destination, message.logical) and self._accept(
            message.mode, message.vector & apic.VECTOR_MASK, message.level_triggered
        )

    def local_nmi(self) -> None:
        """The NMI button: pulse LINT1, which the guest may have masked or programmed for something else.

        A disabled APIC leaves the pin to the processor, whose NMI pin it is then (11.4.3). QEMU:
        ``apic_deliver_nmi``.
        """
        if self._state.mode == apic.MODE_DISABLED:
            self._events.nmi()
        else:
            self._deliver_local(apic.LVT_LINT1)

    # The guest's side

    def read_mmio(self, gpa: int, size: int) -> int:
        """Load 1, 2 or 4 bytes of one register; anything else reads 0 (11.4.1). KVM: ``apic_mmio_read``."""
        all_ones = (1 << 8 * size) - 1
        if self._state.mode != apic.MODE_XAPIC:
            return all_ones
        first_byte = gpa & _BYTE_IN_STEP
        if first_byte + size > apic.REGISTER_BYTES:
            return 0
        offset = gpa & _OFFSET_MASK & ~_BYTE_IN_STEP
        register = REGISTERS.get(offset, NO_REGISTER)
        if register.mmio & apic.READ:
            return self._state.read(offset) >> 8 * first_byte & all_ones
        if register.mmio == apic.ABSENT:
            self._log_error(apic.ESR_ILLEGAL_REGISTER)
        return 0

    def write_mmio(self, gpa: int, size: int, value: int) -> None:
        """Store one register: 32 bits, aligned to 16 bytes; anything else is ignored. KVM: ``apic_mmio_write``."""
        if self._state.mode != apic.MODE_XAPIC or size != apic.REGISTER_BYTES or gpa & _BYTE_IN_STEP:
            return
        offset = gpa & _OFFSET_MASK
        register = REGISTERS.get(offset, NO_REGISTER)
        if register.mmio & apic.WRITE:
            self._write(offset, value & self._settable(offset))
        elif register.mmio == apic.ABSENT:
            self._log_error(apic.ESR_ILLEGAL_REGISTER)

    def read_msr(self, msr: int) -> int:
        """RDMSR of an x2APIC register; #GP(0) if there is none to read, or in another mode (11.12.1.2).

        KVM: ``kvm_x2apic_msr_read``.
        """
        offset = (msr - MSR_IA32_X2APIC_FIRST) * apic.REGISTER_STEP
        if self._state.mode != apic.MODE_X2APIC or not REGISTERS.get(offset, NO_REGISTER).msr & apic.READ:
            raise general_protection()
        if offset == apic.ICR:
            return (
                self._state.stored[apic.ICR] | self._state.stored[apic.ICR2] << apic.X2APIC_DESTINATION_SHIFT
            )
        return self._state.read(offset)

    def write_msr(self, msr: int, value: int) -> None:
        """WRMSR to an x2APIC register; #GP(0) as for RDMSR, and for reserved bits (11.12.1.3).

        KVM: ``kvm_x2apic_msr_write``, which lets most reserved bits pass.
        """
        offset = (msr - MSR_IA32_X2APIC_FIRST) * apic.REGISTER_STEP
        register = REGISTERS.get(offset, NO_REGISTER)
        if self._state.mode != apic.MODE_X2APIC or not register.msr & apic.WRITE:
            raise general_protection()
        low = value & MASK32 if offset == apic.ICR else value
        if low & ~(self._settable(offset) | register.ignored):
            raise general_protection()
        if offset == apic.ICR:
            self._state.stored[apic.ICR2] = value >> apic.X2APIC_DESTINATION_SHIFT
        self._write(offset, low & self._settable(offset))

    # State

    def get_registers(self) -> bytes:
        """``KVM_GET_LAPIC``: the first KiB of the APIC page as xAPIC mode has it, with the current count."""
        return self._state.get_page()

    def set_registers(self, registers: bytes) -> None:
        """``KVM_SET_LAPIC``, the inverse; ValueError when it is not a KiB.

        A countdown goes on. ID and LDR stay in x2APIC mode. IA32_TSC_DEADLINE is to be set afterwards.
        """
        self._state.set_page(registers)
        self._events.kick()

    def get_state(self) -> DeviceState:
        """Everything but IA32_APIC_BASE and CR8, which are the processor's."""
        return self._state.get_state()

    def set_state(self, state: DeviceState) -> None:
        """The inverse, behind the processor's state; KeyError, TypeError or ValueError for what is no state."""
        self._state.set_state(state)
        self._announce_base()

    def _settable(self, offset: int) -> int:
        bits = REGISTERS[offset].bits
        if offset == apic.LVT_TIMER and not self.has_tsc_deadline:
            bits &= ~apic.LVT_TIMER_TSC_DEADLINE
        return bits

    def _announce_base(self) -> None:
        visible = self._words[APIC_BASE] & (_PAGE_MASK | apic.MODE_BITS)
        if visible != self._visible_base:
            self._visible_base = visible
            if self.on_base_change is not None:
                self.on_base_change()

    def _kick_if_pending(self) -> None:
        if self.pending_vector() is not None:
            self._events.kick()

    def _write(self, offset: int, value: int) -> None:
        """A writable register of either mode; *value* has only bits that can be set. KVM: ``kvm_lapic_reg_write``."""
        stored = self._state.stored
        if offset == apic.EOI:
            self._end_of_interrupt()
        elif offset == apic.TPR:
            self._state.vectors.tpr = value
            self._kick_if_pending()
        elif offset == apic.INITIAL_COUNT:
            self._state.timer.write_initial_count(value)
        elif offset == apic.DIVIDE_CONFIGURATION:
            self._state.timer.write_divide_configuration(value)
        elif offset in apic.LVT_REGISTERS:
            self._write_lvt(offset, value)
        elif offset == apic.SPIV:
            stored[apic.SPIV] = value
            if not value & apic.SPIV_ENABLE:
                for entry in apic.LVT_REGISTERS:
                    stored[entry] |= apic.LVT_MASKED
            self._kick_if_pending()
        elif offset == apic.ESR:
            stored[apic.ESR], self._state.errors = self._state.errors, 0
        elif offset == apic.ICR:
            stored[apic.ICR] = value
            self._send_ipi(value)
        elif offset == apic.SELF_IPI:
            self._send_ipi(value | Shorthand.SELF << apic.ICR_SHORTHAND_SHIFT)
        elif offset == apic.DFR:
            stored[apic.DFR] = value | apic.DFR_FIXED
        else:
            stored[offset] = value

    def _write_lvt(self, offset: int, value: int) -> None:
        if not self._state.stored[apic.SPIV] & apic.SPIV_ENABLE:
            value |= apic.LVT_MASKED
        self._state.stored[offset] = value
        if offset == apic.LVT_TIMER:
            self._state.timer.set_mode(self._state.timer_mode)
        elif offset == apic.LVT_LINT0 and self.accepts_pic():
            self._events.kick()

    def _end_of_interrupt(self) -> None:
        """End what is in service, and tell the IOAPIC if that was level triggered (11.8.5)."""
        vector = self._state.vectors.end()
        if vector is None:
            return
        if self.on_eoi is not None and self._state.vectors.level_triggered >> vector & 1:
            self.on_eoi(vector)
        self._kick_if_pending()

    def _send_ipi(self, command: int) -> None:
        """Carry out the low half of an ICR (11.6.1). KVM: ``kvm_apic_send_ipi``."""
        mode, vector = apic.delivery_mode(command), command & apic.VECTOR_MASK
        if mode in _PRIORITIZED and vector < apic.FIRST_VECTOR:
            self._log_error(apic.ESR_SEND_ILLEGAL_VECTOR)
        level_triggered = bool(command & apic.ICR_LEVEL_TRIGGERED)
        if level_triggered and not command & apic.ICR_ASSERT and mode in (*_PRIORITIZED, DeliveryMode.INIT):
            # The de-assertion of a level. That of INIT once set arbitration IDs, which are no more.
            return
        shorthand = Shorthand(command >> apic.ICR_SHORTHAND_SHIFT & apic.ICR_SHORTHAND_MASK)
        if shorthand == Shorthand.NONE:
            destination = self._state.stored[apic.ICR2]
            if self._state.mode != apic.MODE_X2APIC:
                destination >>= apic.XAPIC_ID_SHIFT
            meant = self._state.is_destination(destination, bool(command & apic.ICR_LOGICAL))
        else:
            meant = shorthand != Shorthand.OTHERS
        if meant:
            self._accept(mode, vector, level_triggered)

    def _accept(self, mode: DeliveryMode, vector: int, level_triggered: bool) -> bool:
        """Take an interrupt that is meant for this APIC; False if it is lost. KVM: ``__apic_accept_irq``."""
        if self._state.mode == apic.MODE_DISABLED:
            return False
        if mode in _PRIORITIZED:
            if not self._state.enabled:
                return False
            if vector < apic.FIRST_VECTOR:
                self._log_error(apic.ESR_RECEIVE_ILLEGAL_VECTOR)
            else:
                self._state.vectors.request(vector, level_triggered)
                self._kick_if_pending()
        elif mode == DeliveryMode.NMI:
            self._events.nmi()
        elif mode == DeliveryMode.INIT:
            self._events.init()
        elif mode == DeliveryMode.STARTUP:
            self._events.startup(vector)
        else:
            # There is no SMM, and an ExtINT comes by the wire of the 8259A.
            return False
        return True

    def _deliver_local(self, offset: int) -> None:
        """Do what an entry of the local vector table says (11.5.1). KVM: ``kvm_apic_local_deliver``."""
        entry = self._state.stored[offset]
        mode = apic.delivery_mode(entry)
        # A startup is no delivery mode here. Of the local interrupts only LINT0 can be level triggered.
        if not entry & apic.LVT_MASKED and mode != DeliveryMode.STARTUP:
            self._accept(mode, entry & apic.VECTOR_MASK, level_triggered=False)

    def _log_error(self, error: int) -> None:
        """Note an error for the next write to ESR, and interrupt if it is a new one (11.5.3)."""
        if not self._state.errors & error:
            self._state.errors |= error
            self._deliver_local(apic.LVT_ERROR)
