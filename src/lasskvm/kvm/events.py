"""Events that wait for the next entry: exceptions, an injected interrupt, NMIs; ``struct kvm_vcpu_events``.

In KVM everything that the guest gets goes through this queue. Here the emulator delivers on the spot, so the queue
holds what the VMM has put there, and what an exit has left to be decided: the #GP(0) of a refused MSR access.

Source: KVM's ``kvm_check_and_inject_events()``, ``kvm_vcpu_ioctl_x86_set_vcpu_events()``; Intel SDM volume 3C, 26.2.1.3
and 26.3.1.4 (what an injected interrupt asks of the guest).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from lasskvm.emulator.events import Event, EventKind
from lasskvm.emulator.faults import TripleFault
from lasskvm.kvm.structures import VcpuEvents
from lasskvm.state import INTERRUPT_SHADOW, NMI_BLOCKED, RFLAGS, RIP, Words
from lasskvm.x86.exceptions import BP, DB, NMI, OF, PF
from lasskvm.x86.registers import MASK64, RFLAGS_IF

__all__ = ["EntryFailed", "EventQueue", "QueuedException"]

_EXCEPTIONS = 32
_VECTORS = 256
_SOFT_EXCEPTIONS = (BP, OF)
#: ``KVM_X86_SHADOW_INT_MOV_SS`` and ``KVM_X86_SHADOW_INT_STI``. Which of the two it is is not kept, as on AMD, where
#: KVM reports both.
_SHADOW_EITHER = 1 << 0 | 1 << 1
#: The basic exit reason of an entry that fails over the guest's state (SDM volume 3C, 26.8).
_INVALID_GUEST_STATE = 0x80000021


class EntryFailed(Exception):
    """The processor refuses to enter the guest; *reason* is ``hardware_entry_failure_reason``."""

    def __init__(self, reason: int = _INVALID_GUEST_STATE) -> None:
        self.reason = reason
        super().__init__(f"VM entry failed: {reason:#x}")


@dataclass(frozen=True)
class QueuedException:
    """An exception for the next entry. *payload* is CR2 of a #PF, or what a #DB adds to DR6; None changes neither."""

    vector: int
    error_code: int | None = None
    payload: int | None = None


class EventQueue:
    """The queue of one vCPU, over its state words. ``waiting`` says whether :meth:`next_event` has anything to give."""

    def __init__(self, words: Words) -> None:
        self._words = words
        #: What INT3 was long when the VMM's debugger was told of it: an injected #BP returns behind it.
        self.instruction_length = 0
        self.clear()

    def clear(self) -> None:
        """Forget all events."""
        self._injected: QueuedException | None = None
        self._pending: QueuedException | None = None
        self._interrupt: int | None = None
        self._interrupt_is_soft = False
        self.interrupt_is_held = False
        self._nmi_injected = False
        self._triple_fault = False
        self.nmi_pending = False
        self.waiting = False

    def queue_exception(self, exception: QueuedException) -> None:
        """Have *exception* delivered at the next entry."""
        self._pending = exception
        self.waiting = True

    def drop_pending_exception(self) -> None:
        """What ``KVM_SET_REGS`` does to an exception that is not being delivered yet."""
        self._pending = None

    def queue_interrupt(self, vector: int) -> None:
        """``KVM_INTERRUPT``: OSError with EINVAL for what is no vector, with EEXIST while another interrupt waits."""
        if not 0 <= vector < _VECTORS:
            raise OSError(errno.EINVAL, f"KVM_INTERRUPT: {vector} is no vector; give 0 to {_VECTORS - 1}")
        if self._interrupt is not None:
            raise OSError(errno.EEXIST, "KVM_INTERRUPT: an interrupt waits already; run the vCPU first")
        self._interrupt, self._interrupt_is_soft = vector, False
        self.waiting = True

    @property
    def has_interrupt(self) -> bool:
        """Whether an external interrupt waits, rather than another event that comes first."""
        comes_first = self._triple_fault or self._injected is not None or self._nmi_injected
        return self._interrupt is not None and not self._interrupt_is_soft and not comes_first

    def take_interrupt(self) -> int:
        """Take the external interrupt that waits, and return its vector."""
        assert self._interrupt is not None
        vector, self._interrupt = self._interrupt, None
        self.interrupt_is_held = False
        return vector

    def hold_interrupt(self) -> None:
        """The external interrupt that waits has made a nested guest exit: it is its hypervisor's, whenever that takes
        it."""
        self.interrupt_is_held = self._interrupt is not None

    def next_event(self) -> Event | None:
        """Take the event that the processor delivers next; None when nothing (more) waits.

        NMIs that are only pending are not among them. Raises :class:`TripleFault` when that is what waits, and
        :class:`EntryFailed` for an external interrupt that the guest cannot take.
        """
        words = self._words
        if self._triple_fault:
            self._triple_fault = False
            raise TripleFault
        if self._injected is not None:
            exception, self._injected = self._injected, None
            return self._exception_event(exception)
        if self._nmi_injected:
            self._nmi_injected = False
            return Event(NMI, EventKind.NMI)
        if self._interrupt is not None:
            vector = self._interrupt
            if self._interrupt_is_soft:
                self._interrupt = None
                return Event(vector, EventKind.SOFTWARE)
            if words[RFLAGS] & RFLAGS_IF and not words[INTERRUPT_SHADOW]:
                return Event(self.take_interrupt(), EventKind.EXTERNAL)
            if not self.interrupt_is_held:
                raise EntryFailed
        if self._pending is not None:
            exception, self._pending = self._pending, None
            return self._exception_event(exception)
        self.waiting = False
        return None

    def _exception_event(self, exception: QueuedException) -> Event:
        vector, payload = exception.vector, exception.payload
        if vector in _SOFT_EXCEPTIONS:
            return_rip = self._words[RIP] + self.instruction_length & MASK64
            return Event(vector, EventKind.SOFTWARE_EXCEPTION, return_rip=return_rip)
        return Event(
            vector,
            error_code=exception.error_code,
            cr2=payload if vector == PF else None,
            dr6=payload if vector == DB else None,
        )

    def get(self) -> VcpuEvents:
        """``KVM_GET_VCPU_EVENTS``."""
        exception = self._injected or self._pending
        return VcpuEvents(
            exception=None if self._injected is None else self._injected.vector,
            pending_exception=self._pending.vector if self._pending and not self._injected else None,
            exception_error_code=None if exception is None else exception.error_code,
            exception_payload=self._pending.payload if self._pending and not self._injected else None,
            interrupt=self._interrupt,
            interrupt_soft=self._interrupt is not None and self._interrupt_is_soft,
            interrupt_shadow=_SHADOW_EITHER if self._words[INTERRUPT_SHADOW] else 0,
            nmi_injected=self._nmi_injected,
            nmi_pending=self.nmi_pending,
            nmi_masked=bool(self._words[NMI_BLOCKED]),
            triple_fault_pending=self._triple_fault,
        )

    def set(self, events: VcpuEvents) -> None:
        """``KVM_SET_VCPU_EVENTS``; OSError with EINVAL for what is no exception, or no interrupt vector."""
        vector = events.pending_exception if events.exception is None else events.exception
        if vector is not None and (not 0 <= vector < _EXCEPTIONS or vector == NMI):
            raise OSError(
                errno.EINVAL,
                f"KVM_SET_VCPU_EVENTS: vector {vector} is no exception; NMIs have fields of their own",
            )
        if events.interrupt is not None and not 0 <= events.interrupt < _VECTORS:
            raise OSError(errno.EINVAL, f"KVM_SET_VCPU_EVENTS: {events.interrupt} is no interrupt vector")
        self.clear()
        if events.exception is not None:
            self._injected = QueuedException(events.exception, events.exception_error_code)
        elif events.pending_exception is not None:
            self._pending = QueuedException(
                events.pending_exception, events.exception_error_code, events.exception_payload
            )
        self._interrupt, self._interrupt_is_soft = events.interrupt, events.interrupt_soft
        self._nmi_injected, self.nmi_pending = events.nmi_injected, events.nmi_pending
        self._triple_fault = events.triple_fault_pending
        self._words[INTERRUPT_SHADOW] = int(events.interrupt_shadow != 0)
        self._words[NMI_BLOCKED] = int(events.nmi_masked)
        self.waiting = True
