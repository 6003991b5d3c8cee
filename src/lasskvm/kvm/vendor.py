"""Vendor operations: what differs between processors of Intel and of AMD; KVM's ``struct kvm_x86_ops``.

KVM has one such table for each module, ``kvm_intel`` and ``kvm_amd``; here the vendor in the guest's CPUID chooses.
LASS is Intel's: its operation is optional, and AMD's table has none, so a guest with an AMD processor is not offered
LASS, whatever its CPUID entries say. Neither is it offered VMX. ``docs/adr/0007-vendor-ops.md`` tells how the operation
reaches instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lasskvm.lass import is_lass_violation
from lasskvm.x86.cpuid import EBX, ECX, EDX, LEAF_MAX_BASIC, CpuidEntry, CpuidTable, without_features

__all__ = ["Amd", "Intel", "LassRule", "VendorOps", "vendor_ops"]

#: ``(address, size, flags, cpl, cr4, efer, rflags)``: :func:`lasskvm.lass.is_lass_violation`.
LassRule = Callable[[int, int, int, int, int, int, int], bool]

_AMD_VENDORS = (b"AuthenticAMD", b"HygonGenuine")


@dataclass(frozen=True)
class VendorOps:
    """The operations of one vendor's processors; None where the vendor has no such thing."""

    name: str
    is_lass_violation: LassRule | None = None
    #: Features that no processor of this vendor has, and that something beside CPUID depends on.
    lacking: tuple[str, ...] = ()

    def offered(self, entries: Iterable[CpuidEntry]) -> tuple[CpuidEntry, ...]:
        """The CPUID *entries* without the features that this vendor does not have."""
        return without_features(entries, self.lacking)


Intel = VendorOps("Intel", is_lass_violation)
Amd = VendorOps("AMD", lacking=("lass", "vmx"))


def vendor_ops(entries: Iterable[CpuidEntry]) -> VendorOps:
    """The operations for a guest with the CPUID *entries*: AMD's for AMD and Hygon, Intel's for everybody else.

    >>> from lasskvm.x86.cpu_models import parse_cpu
    >>> vendor_ops(parse_cpu("max").entries()).name
    'Intel'
    """
    table = CpuidTable(entries)
    name = b"".join(table.word(LEAF_MAX_BASIC, 0, part).to_bytes(4, "little") for part in (EBX, EDX, ECX))
    return Amd if name in _AMD_VENDORS else Intel
