"""MSR filters: what the guest may not access leaves for the VMM, on either engine and on its native paths."""

from __future__ import annotations

import errno

import pytest

from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import KERNEL_CODE
from lasskvm.kvm import IntrExit, MsrExit, MsrFilterRange, VcpuEvents, Vm
from lasskvm.kvm.msr_filter import MsrFilter
from lasskvm.x86.exceptions import GP
from lasskvm.x86.msr import (
    MSR_IA32_FS_BASE,
    MSR_IA32_GS_BASE,
    MSR_IA32_KERNEL_GS_BASE,
    MSR_IA32_STAR,
    MSR_IA32_TSC,
)


def deny(index: int, *, read: bool = True, write: bool = True) -> MsrFilterRange:
    return MsrFilterRange(index, nmsrs=1, bitmap=b"\0", read=read, write=write)


def msr_exit(guest: Guest) -> MsrExit:
    vm_exit = guest.vcpu.run()
    assert isinstance(vm_exit, MsrExit), vm_exit
    return vm_exit


def test_a_denied_rdmsr_reads_what_the_vmm_answers(guest: Guest) -> None:
    guest.vm.set_msr_filter([deny(MSR_IA32_STAR, write=False)])
    guest.start("rdmsr; nop", rcx=MSR_IA32_STAR)
    vm_exit = msr_exit(guest)
    assert vm_exit == MsrExit(MSR_IA32_STAR, write=False, data=0, error=True)
    assert guest.vcpu.get_regs().rip == KERNEL_CODE
    vm_exit.data, vm_exit.error = 0x1122_3344_5566_7788, False
    outcome = guest.run()
    assert (outcome.completed, outcome.registers.rdx, outcome.registers.rax) == (
        True,
        0x1122_3344,
        0x5566_7788,
    )


def test_a_refused_access_is_a_general_protection_fault_at_the_instruction(guest: Guest) -> None:
    guest.vm.set_msr_filter([deny(MSR_IA32_STAR)])
    guest.start("nop; fault: rdmsr", rcx=MSR_IA32_STAR)
    msr_exit(guest)
    guest.vcpu.immediate_exit = True
    assert guest.vcpu.run() == IntrExit()
    assert guest.vcpu.get_vcpu_events() == VcpuEvents(pending_exception=GP, exception_error_code=0)
    guest.vcpu.immediate_exit = False
    outcome = guest.run()
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


@pytest.mark.parametrize(
    "index", [MSR_IA32_FS_BASE, MSR_IA32_GS_BASE, MSR_IA32_KERNEL_GS_BASE, MSR_IA32_STAR]
)
def test_a_denied_wrmsr_leaves_with_its_data_and_writes_nothing(guest: Guest, index: int) -> None:
    # Segment bases are written natively where nothing filters them.
    guest.vcpu.set_msr(index, 0)
    guest.vm.set_msr_filter([deny(index, read=False)])
    guest.start("wrmsr; rdmsr", rcx=index, rdx=0xAABB, rax=0xCCDD)
    guest.vcpu.set_msr(index, 0x1000)
    vm_exit = msr_exit(guest)
    assert vm_exit == MsrExit(index, write=True, data=0xAABB_0000_CCDD)
    vm_exit.error = False
    outcome = guest.run()
    assert (outcome.completed, outcome.registers.rdx, outcome.registers.rax) == (True, 0, 0x1000)


def test_a_filter_can_be_set_and_taken_back_between_two_runs(guest: Guest) -> None:
    guest.start("again: wrmsr; out 0x99, al; jmp again", rcx=MSR_IA32_KERNEL_GS_BASE, rdx=0, rax=0x1000)
    guest.vcpu.run()
    guest.vm.set_msr_filter([deny(MSR_IA32_KERNEL_GS_BASE)])
    msr_exit(guest).error = False
    guest.vm.set_msr_filter([])
    for _ in range(2):
        assert not isinstance(guest.vcpu.run(), MsrExit)


def test_what_the_filter_allows_is_done_as_ever(guest: Guest) -> None:
    guest.vm.set_msr_filter([deny(MSR_IA32_STAR, write=False)])
    outcome = guest.execute("wrmsr", rcx=MSR_IA32_STAR, rdx=1, rax=2)
    assert outcome.completed
    assert guest.vcpu.get_msr(MSR_IA32_STAR) == 1 << 32 | 2


def test_the_filter_does_not_concern_the_vmm(guest: Guest) -> None:
    guest.vm.set_msr_filter([deny(MSR_IA32_STAR)])
    assert guest.vcpu.set_msrs({MSR_IA32_STAR: 7}) == 1
    assert guest.vcpu.get_msrs([MSR_IA32_STAR]) == {MSR_IA32_STAR: 7}


def test_privilege_comes_before_the_filter(guest: Guest) -> None:
    guest.vm.set_msr_filter([deny(MSR_IA32_STAR)])
    assert str(guest.execute("fault: rdmsr", cpl=3, rcx=MSR_IA32_STAR)) == "#GP(0x0) at fault"


def test_a_filter_set_before_the_vcpu_is_made_holds() -> None:
    vm = Vm("emulator")
    vm.set_msr_filter([deny(MSR_IA32_TSC)])
    permission = vm.create_vcpu().emulation.msr_permission
    assert permission is not None
    assert not permission(MSR_IA32_TSC, False)


def test_the_first_range_that_covers_an_access_decides() -> None:
    filter_ = MsrFilter(
        [
            MsrFilterRange(0x100, nmsrs=10, bitmap=b"\x02\x02"),
            MsrFilterRange(0x100, nmsrs=16, bitmap=b"\xff\xff", write=False),
        ],
        default_allow=False,
    )
    assert [filter_.allows(index, True) for index in (0x100, 0x101, 0x109, 0x10A)] == [
        False,
        True,
        True,
        False,
    ]
    assert [filter_.allows(index, False) for index in (0x100, 0x10A, 0x110)] == [False, True, False]


def test_the_x2apic_is_never_filtered() -> None:
    filter_ = MsrFilter([deny(0x10)], default_allow=False)
    assert filter_.allows(0x808, True)
    assert not filter_.allows(0x900, True)


@pytest.mark.parametrize(
    ("ranges", "default_allow", "number"),
    [
        ([deny(0x10)] * 17, True, errno.E2BIG),
        ([], False, errno.EINVAL),
        ([MsrFilterRange(0, nmsrs=9, bitmap=b"\0")], True, errno.EINVAL),
        ([MsrFilterRange(0, nmsrs=0x3001, bitmap=bytes(0x601))], True, errno.EINVAL),
    ],
)
def test_filters_that_kvm_refuses_are_refused(
    ranges: list[MsrFilterRange], default_allow: bool, number: int
) -> None:
    with pytest.raises(OSError, match="KVM_X86_SET_MSR_FILTER") as refusal:
        Vm().set_msr_filter(ranges, default_allow=default_allow)
    assert refusal.value.errno == number
