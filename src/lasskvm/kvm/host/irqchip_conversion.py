"""Between what the KVM API says of interrupt chips and the kernel's structures."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from lasskvm.kvm.host import abi
from lasskvm.kvm.host import irqchip_abi as chips
from lasskvm.kvm.irqchip.routing import ChipRoute, IrqChip, Route
from lasskvm.x86.registers import MASK32

__all__ = ["chip_from", "chip_to", "msi_structure", "routing_structure"]

# KVM_IRQ_ROUTING_*
_ROUTING_IRQCHIP = 1
_ROUTING_MSI = 2

_ADDRESS_HIGH_SHIFT = 32


def _state_of(raw: chips.Irqchip) -> ctypes.Structure:
    """The part of *raw* that is the chip's own structure."""
    state: ctypes.Structure = raw.chip.ioapic if raw.chip_id == IrqChip.IOAPIC else raw.chip.pic
    return state


def chip_from(raw: chips.Irqchip) -> bytes:
    """The state in a ``struct kvm_irqchip``: a ``struct kvm_pic_state`` or ``struct kvm_ioapic_state``."""
    return bytes(_state_of(raw))


def chip_to(chip: IrqChip, state: bytes) -> chips.Irqchip:
    """*state* of *chip* as ``struct kvm_irqchip``; ValueError when it has not the size that it has there."""
    raw = chips.Irqchip(chip_id=chip)
    place = memoryview(_state_of(raw)).cast("B")
    if len(place) != len(state):
        raise ValueError(f"the state of {chip.name} has {len(place)} bytes, not {len(state)}")
    place[:] = state
    return raw


def routing_structure(routes: Sequence[Route]) -> ctypes.Structure:
    """*routes* as ``struct kvm_irq_routing``."""
    raw = abi.with_entries(chips.IrqRouting, chips.IrqRoutingEntry, len(routes))
    raw.nr = len(routes)
    for place, route in zip(raw.entries, routes, strict=True):
        place.gsi = route.gsi
        if isinstance(route, ChipRoute):
            place.type = _ROUTING_IRQCHIP
            place.u.irqchip.irqchip, place.u.irqchip.pin = route.chip, route.pin
        else:
            place.type = _ROUTING_MSI
            place.u.msi.address_lo = route.address & MASK32
            place.u.msi.address_hi = route.address >> _ADDRESS_HIGH_SHIFT
            place.u.msi.data = route.data
    structure: ctypes.Structure = raw
    return structure


def msi_structure(address: int, data: int) -> chips.Msi:
    """The MSI of *address* and *data* as ``struct kvm_msi``."""
    return chips.Msi(address_lo=address & MASK32, address_hi=address >> _ADDRESS_HIGH_SHIFT, data=data)
