"""/dev/kvm itself and its VMs: what is offered, memory slots, dirty log, clock, and what is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from provided import CODE, MIB, REAL_MODE_CODE, Machine, unusable

from lasskvm.conformance.assembler import assemble
from lasskvm.errors import HostError, LassKvmError, MemoryLayoutError
from lasskvm.kvm.exits import MmioExit
from lasskvm.kvm.host import KvmIoctlError, System, ioctls
from lasskvm.kvm.host.capabilities import KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_NR_MEMSLOTS
from lasskvm.kvm.host.ioctls import Ioctl
from lasskvm.kvm.structures import MsrFilterRange
from lasskvm.memory import PAGE_SIZE, SLOT_LOG_DIRTY_PAGES, SLOT_READONLY
from lasskvm.x86.msr import MSR_IA32_STAR

SECOND_SLOT_GPA = 16 * MIB
HLT = b"\xf4"
NO_SUCH_CAPABILITY = 0x7FFF


def test_a_missing_device_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"this host has no .*load kvm_intel or kvm_amd.*software provider"):
        System(str(tmp_path / "kvm"))


def test_a_device_that_is_not_kvm_is_an_error_that_says_so() -> None:
    with pytest.raises(HostError, match="is not KVM"):
        System(os.devnull)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_device_that_may_not_be_opened_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HostError, match="join the group"):
        System()


def test_another_version_of_the_api_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older(Ioctl):
        def __call__(self, descriptor: int, argument: object = 0) -> int:
            return 11

    monkeypatch.setattr(ioctls, "KVM_GET_API_VERSION", Older("KVM_GET_API_VERSION", 0))
    with pytest.raises(HostError, match="version 11 of the KVM API, not 12"):
        System(os.devnull)


def test_the_system_tells_its_provider_and_capabilities(host_machine: Machine) -> None:
    system = host_machine.system
    assert system.provider == "host"
    assert system.check_extension(KVM_CAP_IMMEDIATE_EXIT) == 1
    assert system.check_extension(KVM_CAP_NR_MEMSLOTS) >= 32
    assert system.check_extension(NO_SUCH_CAPABILITY) == 0


def test_closing_ends_everything_and_may_be_done_twice(host_machine: Machine) -> None:
    descriptors = set(os.listdir("/proc/self/fd"))
    with System() as system, system.create_vm() as vm:
        vcpu = vm.create_vcpu()
        assert set(os.listdir("/proc/self/fd")) > descriptors
    vm.close()
    assert set(os.listdir("/proc/self/fd")) <= descriptors
    for call in (vcpu.run, vcpu.get_regs, vm.create_irqchip, system.create_vm):
        with pytest.raises(KvmIoctlError) as refusal:
            call()
        assert refusal.value.errno == errno.EBADF


def test_what_is_not_closed_goes_with_its_last_reference() -> None:
    if reason := unusable("host"):
        pytest.skip(reason)
    descriptors = set(os.listdir("/proc/self/fd"))
    vm = System().create_vm()
    vcpu = vm.create_vcpu()
    del vm, vcpu
    assert set(os.listdir("/proc/self/fd")) == descriptors


def test_a_vm_has_one_vcpu(host_machine: Machine) -> None:
    with pytest.raises(LassKvmError, match="one processor"):
        host_machine.vm.create_vcpu()


# --------------------------------------------------------------------------------------------------------- memory


def test_a_slot_is_the_memory_that_the_vmm_gave(host_machine: Machine) -> None:
    vm = host_machine.vm
    vm.set_user_memory_region(1, SECOND_SLOT_GPA, vm.allocate(PAGE_SIZE))
    host_machine.long_mode(
        assemble("mov rax, [rbx]; inc rax; mov [rbx + 8], rax; hlt", CODE).code, rbx=SECOND_SLOT_GPA
    )
    vm.memory.store(SECOND_SLOT_GPA, 8, 41)
    host_machine.run_to_halt()
    assert vm.memory.load(SECOND_SLOT_GPA + 8, 8) == 42


def test_a_deleted_slot_is_a_hole(host_machine: Machine) -> None:
    vm = host_machine.vm
    vm.set_user_memory_region(1, SECOND_SLOT_GPA, vm.allocate(PAGE_SIZE))
    vm.set_user_memory_region(1, SECOND_SLOT_GPA, None)
    host_machine.long_mode(assemble("mov [rbx], al; hlt", CODE).code, rbx=SECOND_SLOT_GPA, rax=5)
    assert host_machine.run() == MmioExit(SECOND_SLOT_GPA, 1, write=True, data=5)
    assert vm.memory.find(SECOND_SLOT_GPA) is None


def test_other_memory_can_take_the_place_of_a_slots_memory(host_machine: Machine) -> None:
    vm = host_machine.vm
    vm.set_user_memory_region(1, SECOND_SLOT_GPA, vm.allocate(PAGE_SIZE))
    vm.set_user_memory_region(1, SECOND_SLOT_GPA, vm.allocate(2 * PAGE_SIZE))
    vm.memory.store(SECOND_SLOT_GPA + PAGE_SIZE, 8, 7)
    host_machine.long_mode(assemble("mov rax, [rbx]; hlt", CODE).code, rbx=SECOND_SLOT_GPA + PAGE_SIZE)
    assert host_machine.run_to_halt().rax == 7


@pytest.mark.parametrize(("gpa", "size"), [(MIB, PAGE_SIZE), (SECOND_SLOT_GPA + 1, PAGE_SIZE)])
def test_a_slot_that_overlaps_or_is_not_aligned_is_refused(
    host_machine: Machine, gpa: int, size: int
) -> None:
    vm = host_machine.vm
    with pytest.raises(MemoryLayoutError):
        vm.set_user_memory_region(1, gpa, vm.allocate(size))


def test_a_slot_that_the_kernel_refuses_is_not_there(host_machine: Machine) -> None:
    vm = host_machine.vm
    unknown_flag = 1 << 20
    with pytest.raises(KvmIoctlError, match="KVM_SET_USER_MEMORY_REGION"):
        vm.set_user_memory_region(1, SECOND_SLOT_GPA, vm.allocate(PAGE_SIZE), unknown_flag)
    assert vm.memory.find(SECOND_SLOT_GPA) is None


def test_a_store_to_a_read_only_slot_is_an_mmio_exit(host_machine: Machine) -> None:
    vm = host_machine.vm
    vm.set_user_memory_region(1, SECOND_SLOT_GPA, vm.allocate(PAGE_SIZE), SLOT_READONLY)
    vm.memory.write(SECOND_SLOT_GPA, b"\x2a")
    host_machine.long_mode(
        assemble("mov al, [rbx]; mov [rbx], cl; mov dl, [rbx]; hlt", CODE).code, rbx=SECOND_SLOT_GPA, rcx=1
    )
    assert host_machine.run() == MmioExit(SECOND_SLOT_GPA, 1, write=True, data=1)
    regs = host_machine.run_to_halt()
    assert (regs.rax, regs.rdx) == (0x2A, 0x2A)


def test_the_dirty_log_has_the_pages_that_the_guest_has_written_since_last_time(
    host_machine: Machine,
) -> None:
    vm = host_machine.vm
    pages = 70
    vm.set_user_memory_region(1, SECOND_SLOT_GPA, vm.allocate(pages * PAGE_SIZE), SLOT_LOG_DIRTY_PAGES)
    host_machine.long_mode(
        assemble(f"mov [rbx + {3 * PAGE_SIZE}], al; mov [rbx + {69 * PAGE_SIZE}], al; hlt", CODE).code,
        rbx=SECOND_SLOT_GPA,
    )
    host_machine.run_to_halt()
    log = vm.get_dirty_log(1)
    assert int.from_bytes(log, "little") == 1 << 3 | 1 << 69
    assert len(log) * 8 >= pages
    assert not any(vm.get_dirty_log(1))


def test_a_slot_without_a_dirty_log_has_none_to_give(host_machine: Machine) -> None:
    for slot in (0, 9):
        with pytest.raises(KvmIoctlError, match="does not log dirty pages") as refusal:
            host_machine.vm.get_dirty_log(slot)
        assert refusal.value.errno == errno.ENOENT


# -------------------------------------------------------------------------------------------------- kernel devices


def test_the_pit_needs_the_irqchip(host_machine: Machine) -> None:
    with pytest.raises(KvmIoctlError, match=r"KVM_CREATE_PIT2: .*create_irqchip\(\)"):
        host_machine.vm.create_pit2()


def test_an_irqchip_and_its_pit_answer_in_the_kernel(host_machine: Machine) -> None:
    with System() as system, system.create_vm() as vm:
        vm.create_irqchip()
        vm.create_pit2()
        vm.irq_line(4, True)
        vm.irq_line(4, False)
        with pytest.raises(KvmIoctlError, match="has its irqchip already"):
            vm.create_irqchip()


def test_a_line_without_an_irqchip_is_refused(host_machine: Machine) -> None:
    with pytest.raises(KvmIoctlError, match=r"create_irqchip\(\)"):
        host_machine.vm.irq_line(4, True)


def test_kvmclock_can_be_set_and_runs_on(host_machine: Machine) -> None:
    vm = host_machine.host_vm
    hour = 3600 * 10**9
    vm.set_clock(hour)
    first, second = vm.get_clock(), vm.get_clock()
    assert hour <= first <= second < 2 * hour


def test_an_msr_filter_has_at_most_16_ranges(host_machine: Machine) -> None:
    one = MsrFilterRange(MSR_IA32_STAR, 1, b"\1")
    with pytest.raises(KvmIoctlError, match="at most 16"):
        host_machine.vm.set_msr_filter([one] * 17)


def test_real_mode_needs_no_setup_by_the_vmm(host_machine: Machine) -> None:
    host_machine.real_mode(HLT)
    assert host_machine.run_to_halt().rip == REAL_MODE_CODE + 1
