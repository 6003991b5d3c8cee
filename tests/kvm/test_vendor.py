"""Vendor operations: an AMD processor has no LASS, whatever its CPUID entries say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lasskvm.kvm import Vm
from lasskvm.kvm.vendor import Amd, Intel, vendor_ops
from lasskvm.lass import FETCH, is_lass_violation
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidEntry, CpuidTable
from lasskvm.x86.registers import CR0_PE, CR0_PG, CR4_LASS, CR4_PAE, CR4_SMAP, EFER_LMA, EFER_LME

MAX = parse_cpu("max")


def entries(vendor: str) -> tuple[CpuidEntry, ...]:
    """Those of the model max, LASS included, with another vendor."""
    return replace(MAX, vendor=vendor).entries()


@pytest.mark.parametrize(
    ("vendor", "operations"),
    [("GenuineIntel", Intel), ("AuthenticAMD", Amd), ("HygonGenuine", Amd), ("CentaurHauls", Intel)],
)
def test_the_vendor_of_leaf_0_chooses_the_operations(vendor: str, operations: object) -> None:
    assert vendor_ops(entries(vendor)) is operations


def test_intel_asks_the_one_rule_and_amd_has_none() -> None:
    assert Intel.is_lass_violation is is_lass_violation
    assert Amd.is_lass_violation is None


def test_an_amd_guest_is_not_offered_lass() -> None:
    vcpu = Vm().create_vcpu()
    vcpu.set_cpuid2(entries("AuthenticAMD"))
    table = CpuidTable(vcpu.get_cpuid2())
    assert not table.has("lass")
    assert not table.has("vmx")
    assert table.has("smap")
    sregs = vcpu.get_sregs()
    with pytest.raises(OSError, match="CPUID does not allow CR4"):
        vcpu.set_sregs(replace(sregs, cr4=CR4_LASS))


def test_an_intel_guest_keeps_its_cpuid_as_it_is() -> None:
    vcpu = Vm().create_vcpu()
    vcpu.set_cpuid2(entries("GenuineIntel"))
    assert tuple(vcpu.get_cpuid2()) == entries("GenuineIntel")


@pytest.mark.parametrize(("vendor", "violation"), [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_the_vcpu_judges_accesses_in_its_present_state(vendor: str, violation: bool) -> None:
    vcpu = Vm().create_vcpu()
    vcpu.set_cpuid2(entries(vendor))
    sregs = vcpu.get_sregs()
    lass = CR4_LASS if violation else 0
    sregs.cr0, sregs.cr4, sregs.efer = CR0_PE | CR0_PG, CR4_PAE | CR4_SMAP | lass, EFER_LME | EFER_LMA
    vcpu.set_sregs(sregs)
    assert vcpu.is_lass_violation(0x1000, 8, FETCH) is violation
    assert not vcpu.is_lass_violation(1 << 63, 8, FETCH)
