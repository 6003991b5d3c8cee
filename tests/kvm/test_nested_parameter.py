"""KVM's module parameter ``nested``: without it, nothing tells of VMX."""

from __future__ import annotations

import pytest

from lasskvm.kvm import System
from lasskvm.kvm.system_capabilities import KVM_CAP_NESTED_STATE
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.msr import FEATURE_CONTROL_VMX_OUTSIDE_SMX, MSR_IA32_FEATURE_CONTROL, MSR_IA32_VMX_BASIC


def test_with_it_vmx_is_offered() -> None:
    system = System()
    assert CpuidTable(system.get_supported_cpuid()).has("vmx")
    assert system.check_extension(KVM_CAP_NESTED_STATE)
    assert MSR_IA32_VMX_BASIC in system.get_msr_index_list()
    vcpu = system.create_vm().create_vcpu()
    assert vcpu.get_msr(MSR_IA32_FEATURE_CONTROL) & FEATURE_CONTROL_VMX_OUTSIDE_SMX
    assert len(vcpu.get_msrs(system.get_msr_index_list())) == len(system.get_msr_index_list())


def test_without_it_vmx_is_hidden_even_from_a_vcpu_whose_cpuid_asks_for_it() -> None:
    system = System(nested=False)
    assert not CpuidTable(system.get_supported_cpuid()).has("vmx")
    assert not system.check_extension(KVM_CAP_NESTED_STATE)
    assert MSR_IA32_VMX_BASIC not in system.get_msr_index_list()
    vcpu = system.create_vm().create_vcpu()
    vcpu.set_cpuid2(parse_cpu("max").entries())
    assert not CpuidTable(vcpu.get_cpuid2()).has("vmx")
    assert not vcpu.get_msr(MSR_IA32_FEATURE_CONTROL) & FEATURE_CONTROL_VMX_OUTSIDE_SMX
    with pytest.raises(OSError, match="no MSR"):
        vcpu.get_msr(MSR_IA32_VMX_BASIC)
