"""Events and what becomes of them: delivery in every mode, faults during delivery, double and triple faults.

Source: Intel SDM volume 3A, 7.15 (interrupt 8: table 7-5, shutdown), 7.7 (NMI); volume 3B, 18.2.3 and 18.3.1;
KVM's ``kvm_multiple_exception()`` and ``kvm_deliver_exception_payload()``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from lasskvm.emulator import delivery
from lasskvm.emulator.delivery import deliver64
from lasskvm.emulator.faults import EptFault, GuestFault, TripleFault, raise_linear_fault
from lasskvm.emulator.legacy_delivery import deliver_legacy
from lasskvm.emulator.modes import in_ia32e_mode
from lasskvm.emulator.virtual_8086 import is_redirected, redirect_interrupt
from lasskvm.state import CR2, DR6, DR7, NMI_BLOCKED, RIP, Words
from lasskvm.x86.exceptions import DB, DF, makes_double_fault
from lasskvm.x86.paging import PhysicalMemory
from lasskvm.x86.registers import DR6_B0, DR6_FIXED, DR7_GD

__all__ = ["Event", "EventKind", "EventWatch", "deliver_event"]

_DR6_BREAKPOINTS = DR6_B0 * 0xF


class EventKind(Enum):
    """What kind of event it is; the interruption types of VMX (SDM volume 3C, 25.8.3)."""

    #: A processor-detected exception, or INT1.
    EXCEPTION = "exception"
    #: INT n.
    SOFTWARE = "software interrupt"
    #: INT3 or INTO.
    SOFTWARE_EXCEPTION = "software exception"
    EXTERNAL = "external interrupt"
    NMI = "NMI"


_DELIVERY_KINDS = {
    EventKind.EXCEPTION: delivery.EXCEPTION,
    EventKind.SOFTWARE: delivery.SOFTWARE,
    EventKind.SOFTWARE_EXCEPTION: delivery.SOFTWARE,
    EventKind.EXTERNAL: delivery.EXTERNAL,
    EventKind.NMI: delivery.EXTERNAL,
}


@dataclass(frozen=True)
class Event:
    """An event to deliver.

    ``error_code`` is None when none is pushed. ``return_rip`` is the RIP to push; None means the current one,
    which is right for all but software events. ``cr2`` (of a #PF) and ``dr6`` (bits that a #DB sets) are put
    into their registers at delivery and not before, as KVM does with exception payloads.
    """

    vector: int
    kind: EventKind = EventKind.EXCEPTION
    error_code: int | None = None
    return_rip: int | None = None
    cr2: int | None = None
    dr6: int | None = None

    @classmethod
    def of_fault(cls, fault: GuestFault) -> Event:
        """The exception that *fault* asks for."""
        return cls(fault.vector, EventKind.EXCEPTION, fault.error_code, cr2=fault.cr2, dr6=fault.dr6)


class EventWatch(Protocol):
    """Who is asked before anything is delivered: a hypervisor about its guest's events."""

    def before_event(self, event: Event, vectoring: Event | None) -> None:
        """*event* is due, *vectoring* was being delivered when it came up. An exception ends the delivery."""


def deliver_event(
    words: Words,
    memory: PhysicalMemory,
    event: Event,
    watch: EventWatch | None = None,
    *,
    injected: bool = False,
) -> None:
    """Deliver *event*, and whatever exception its delivery raises in turn.

    *watch* is asked about each, but not about an event that it has *injected* itself, which leaves DR7 alone, too.
    Raises :class:`TripleFault` when #DF cannot be delivered, :class:`Unhandleable` for a task gate, and
    :class:`EptFault` with ``vectoring`` set.
    """
    if event.kind is EventKind.NMI:
        words[NMI_BLOCKED] = 1
    if not injected:
        _begin(words, event, None, watch)
    while True:
        try:
            _deliver(words, memory, event)
            return
        except GuestFault as fault:
            raised = Event.of_fault(fault)
            combined = _combine(event, raised)
            if combined is not raised and watch is not None:
                # A hypervisor sees the exception itself before it counts towards a double or triple fault.
                watch.before_event(raised, event)
            if combined is None:
                raise TripleFault from fault
            _begin(words, combined, event, watch)
            event = combined
        except EptFault as fault:
            fault.vectoring = event
            raise


def _begin(words: Words, event: Event, vectoring: Event | None, watch: EventWatch | None) -> None:
    """What comes before the delivery of *event*."""
    if watch is not None:
        watch.before_event(event, vectoring)
    _load_payload(words, event)


def _deliver(words: Words, memory: PhysicalMemory, event: Event) -> None:
    kind = _DELIVERY_KINDS[event.kind]
    return_rip = words[RIP] if event.return_rip is None else event.return_rip
    if not in_ia32e_mode(words):
        if event.kind is EventKind.SOFTWARE and is_redirected(words, memory, event.vector):
            redirect_interrupt(words, memory, event.vector, return_rip)
            return
        deliver_legacy(words, memory, event.vector, event.error_code, kind, return_rip)
        return
    has_error_code = event.error_code is not None
    raise_linear_fault(
        *deliver64(words, memory, event.vector, event.error_code or 0, has_error_code, kind, return_rip)
    )


def _load_payload(words: Words, event: Event) -> None:
    if event.cr2 is not None:
        words[CR2] = event.cr2
    if event.kind is EventKind.EXCEPTION and event.vector == DB:
        if event.dr6 is not None:
            # The breakpoint bits are those of this #DB; the others accumulate until software clears them.
            words[DR6] = words[DR6] & ~_DR6_BREAKPOINTS | DR6_FIXED | event.dr6
        words[DR7] &= ~DR7_GD


def _combine(event: Event, raised: Event) -> Event | None:
    """What is delivered after *raised* came up during the delivery of *event*; None for a triple fault.

    Source: SDM volume 3A, table 7-5.
    """
    if event.kind is EventKind.EXCEPTION:
        if event.vector == DF:
            return None
        if makes_double_fault(event.vector, raised.vector):
            return Event(DF, error_code=0)
    return raised
