"""The chips of ``KVM_CREATE_IRQCHIP`` and ``KVM_CREATE_PIT2``: interrupt controllers and timer."""

from lasskvm.kvm.irqchip.chips import InterruptChips
from lasskvm.kvm.irqchip.pic import Pic
from lasskvm.kvm.irqchip.pit import Pit

__all__ = ["InterruptChips", "Pic", "Pit"]
