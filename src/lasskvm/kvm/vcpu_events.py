"""Giving events to the guest: exceptions that the VMM has queued, and interrupts from wherever they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lasskvm.emulator.events import Event, deliver_event
from lasskvm.kvm.events import EventQueue
from lasskvm.state import VcpuState

if TYPE_CHECKING:
    from lasskvm.emulator.context import Emulation
    from lasskvm.kvm.vm import Vm

__all__ = ["InterruptibleVcpu"]


class InterruptibleVcpu:
    """The part of :class:`~lasskvm.kvm.vcpu.Vcpu` that delivers."""

    vm: Vm
    state: VcpuState
    events: EventQueue
    emulation: Emulation

    def deliver(self, event: Event, *, injected: bool = False) -> None:
        """Deliver *event* to the guest; *injected* by the hypervisor of a nested one, which is not asked again."""
        self.emulation.halted = False
        deliver_event(self.state.words, self.vm.memory, event, self.emulation.non_root, injected=injected)

    def deliver_queued_exceptions(self) -> None:
        """Deliver what the VMM has queued for the guest, but for an external interrupt."""
        while self.events.waiting and not self.events.has_interrupt:
            event = self.events.next_event()
            if event is not None:
                self.deliver(event)

    def has_interrupt(self) -> bool:
        """Whether an external interrupt waits: one that the VMM has queued, or of the interrupt chips."""
        chips = self.vm.irqchip
        return self.events.has_interrupt or (chips is not None and chips.has_interrupt())

    def acknowledge_interrupt(self) -> int:
        """Take the external interrupt that waits, and return its vector."""
        if self.events.has_interrupt:
            return self.events.take_interrupt()
        assert self.vm.irqchip is not None
        return self.vm.irqchip.acknowledge()
