"""The soft provider as a system: what it says that it offers."""

from __future__ import annotations

import pytest

from lasskvm.kvm import open_system
from lasskvm.kvm.system import System
from lasskvm.x86.cpuid import EAX, CpuidTable
from lasskvm.x86.msr import MSR_IA32_EFER, MSR_IA32_LSTAR, MSR_IA32_PRED_CMD, MSR_IA32_TSC

CAP_NR_MEMSLOTS, CAP_NESTED_STATE, CAP_SREGS2 = 10, 157, 200
LASS_BIT = 1 << 6


def test_the_supported_cpuid_has_lass_in_leaf_7_1() -> None:
    table = CpuidTable(System().get_supported_cpuid())
    assert table.word(7, 1, EAX) & LASS_BIT


@pytest.mark.parametrize(
    ("capability", "value"), [(CAP_NR_MEMSLOTS, 32), (CAP_SREGS2, 1), (CAP_NESTED_STATE, 128 + 4096)]
)
def test_capabilities_are_what_is_there(capability: int, value: int) -> None:
    assert System().check_extension(capability) == value


def test_every_msr_of_the_index_list_can_be_saved_and_restored() -> None:
    system = System()
    indices = system.get_msr_index_list()
    assert {MSR_IA32_EFER, MSR_IA32_LSTAR, MSR_IA32_TSC} <= set(indices)
    assert MSR_IA32_PRED_CMD not in indices
    vcpu = system.create_vm().create_vcpu()
    values = vcpu.get_msrs(indices)
    assert list(values) == indices
    assert vcpu.set_msrs(values) == len(values)


def test_open_system_gives_the_soft_provider() -> None:
    system = open_system("soft")
    assert system.provider == "soft"
    with System() as soft, soft.create_vm("emulator", forced_emulation=True) as vm:
        assert (vm.engine, vm.forced_emulation) == ("emulator", True)


def test_a_closed_vm_does_not_run_and_has_no_memory() -> None:
    vm = System().create_vm()
    vm.set_user_memory_region(0, 0, vm.allocate(0x1000))
    vcpu = vm.create_vcpu()
    vm.close()
    vm.close()
    assert vm.memory_size == 0
    with pytest.raises(OSError, match="KVM_RUN: the vCPU has been closed"):
        vcpu.run()
