"""The chips of ``KVM_CREATE_IRQCHIP`` together: the 8259As, the IOAPIC, the vCPU's local APIC, and the wires between.

An external interrupt reaches the processor on one of two ways: from the 8259As, where the local APIC lets them through
(virtual wire), or as a message to the local APIC. KVM asks in that order, and so does this.

Source: KVM's ``kvm_cpu_has_interrupt()`` and ``kvm_cpu_get_interrupt()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lasskvm.kvm.iobus import DeviceState
from lasskvm.kvm.irqchip.ioapic import Ioapic
from lasskvm.kvm.irqchip.lapic import LocalApic
from lasskvm.kvm.irqchip.messages import InterruptMessage
from lasskvm.kvm.irqchip.pic import Pic
from lasskvm.kvm.irqchip.routing import GsiRouter, Route, message_of_msi

__all__ = ["InterruptChips"]


class InterruptChips:
    """All interrupt chips of a VM. *kick* is called when an interrupt may have become due."""

    def __init__(self, kick: Callable[[], None]) -> None:
        self._kick = kick
        self.pic = Pic(self._pic_output_changed)
        self.ioapic = Ioapic(self._send)
        self.router = GsiRouter(self.pic, self.ioapic, self._send)
        #: The local APIC of the vCPU; None until there is one.
        self.lapic: LocalApic | None = None

    def connect(self, lapic: LocalApic) -> None:
        """Let *lapic*, the vCPU's, receive what the others send."""
        self.lapic = lapic
        lapic.on_eoi = self.ioapic.end_of_interrupt

    def has_interrupt(self) -> bool:
        """Whether an external interrupt waits that the processor would take if RFLAGS.IF lets it."""
        lapic = self.lapic
        if lapic is None:
            return self.pic.pending()
        return lapic.pending_vector() is not None or (self.pic.pending() and lapic.accepts_pic())

    def acknowledge(self) -> int:
        """The vector of the interrupt that is due, which is in service from now on."""
        lapic = self.lapic
        if lapic is None or (self.pic.pending() and lapic.accepts_pic()):
            return self.pic.acknowledge()
        return lapic.acknowledge()

    def set_routes(self, routes: Sequence[Route]) -> None:
        """``KVM_SET_GSI_ROUTING``."""
        self.router.set_routes(routes)

    def set_line(self, gsi: int, level: bool) -> None:
        """``KVM_IRQ_LINE``."""
        self.router.set_line(gsi, level)

    def signal_msi(self, address: int, data: int) -> bool:
        """``KVM_SIGNAL_MSI``: whether a processor has taken the message."""
        return self._send(message_of_msi(address, data))

    def get_state(self) -> DeviceState:
        """The 8259As and the IOAPIC; the local APIC is part of the vCPU, the routes are the VMM's."""
        return {"pic": self.pic.get_state(), "ioapic": self.ioapic.get_state()}

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`."""
        self.pic.set_state(state["pic"])
        self.ioapic.set_state(state["ioapic"])

    def _send(self, message: InterruptMessage) -> bool:
        return self.lapic is not None and self.lapic.receive(message)

    def _pic_output_changed(self, level: bool) -> None:
        if level:
            self._kick()
