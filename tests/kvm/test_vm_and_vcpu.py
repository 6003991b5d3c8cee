"""The KVM API of the soft provider: what KVM promises of these calls."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from lasskvm.errors import LassKvmError, MemoryLayoutError
from lasskvm.kvm import HltExit, InternalErrorExit, IoExit, Regs, ShutdownExit, Vcpu, Vm
from lasskvm.kvm.structures import Translation
from lasskvm.state import PDPTR0
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.msr import MSR_IA32_EFER, MSR_IA32_LSTAR
from lasskvm.x86.registers import CR0_PE, CR0_PG, CR4_LASS, CR4_PAE, EFER_LMA, EFER_LME

CODE = 0x1000
HLT, UD2 = b"\xf4", b"\x0f\x0b"


@pytest.fixture
def vm() -> Vm:
    vm = Vm()
    vm.set_user_memory_region(0, 0, vm.allocate(1 << 20))
    return vm


def real_mode(vm: Vm, code: bytes, **registers: int) -> Vcpu:
    """A vCPU at 0:0x1000 in real mode, before its first instruction."""
    vm.memory.write(CODE, code)
    vcpu = vm.vcpu or vm.create_vcpu()
    sregs = vcpu.get_sregs()
    sregs.cs = replace(sregs.cs, selector=0, base=0)
    vcpu.set_sregs(sregs)
    vcpu.set_regs(Regs(rip=CODE, rsp=0x8000, **registers))
    return vcpu


def test_registers_come_back_as_they_were_set(vm: Vm) -> None:
    vcpu = vm.create_vcpu()
    regs = Regs(*range(100, 116), rip=0xFFFF_8000_0000_1234, rflags=0x246)
    vcpu.set_regs(regs)
    assert vcpu.get_regs() == regs
    sregs = vcpu.get_sregs()
    assert (sregs.cs.base, sregs.cs.selector) == (0xFFFF0000, 0xF000)


def test_cr4_lass_is_refused_with_einval_when_cpuid_lacks_lass(vm: Vm) -> None:
    vcpu = vm.create_vcpu()
    sregs = vcpu.get_sregs()
    sregs.cr4 = CR4_LASS
    vcpu.set_sregs(sregs)
    assert vcpu.get_sregs().cr4 == CR4_LASS
    sregs.cr4 = 0
    vcpu.set_sregs(sregs)
    vcpu.set_cpuid2(parse_cpu("max,-lass").entries())
    sregs.cr4 = CR4_LASS
    with pytest.raises(OSError, match="CPUID") as refusal:
        vcpu.set_sregs(sregs)
    assert refusal.value.errno == errno.EINVAL
    assert vcpu.get_sregs().cr4 == 0


@pytest.mark.parametrize(
    ("cr0", "efer"), [(CR0_PG, 0), (CR0_PE | CR0_PG, EFER_LME), (CR0_PE, EFER_LME | EFER_LMA)]
)
def test_contradictory_modes_are_refused(vm: Vm, cr0: int, efer: int) -> None:
    vcpu = vm.create_vcpu()
    sregs = vcpu.get_sregs()
    sregs.cr0, sregs.cr4, sregs.efer = cr0, CR4_PAE, efer
    with pytest.raises(OSError, match="KVM_SET_SREGS"):
        vcpu.set_sregs(sregs)


def test_cpuid_cannot_change_once_the_vcpu_has_run(vm: Vm) -> None:
    vcpu = real_mode(vm, HLT)
    vcpu.set_cpuid2(parse_cpu("max").entries())
    assert isinstance(vcpu.run(), HltExit)
    vcpu.set_cpuid2(parse_cpu("max").entries())
    with pytest.raises(OSError, match="KVM_SET_CPUID2") as refusal:
        vcpu.set_cpuid2(parse_cpu("max,-lass").entries())
    assert refusal.value.errno == errno.EINVAL


def test_setting_sregs_in_pae_mode_loads_the_pdptes(vm: Vm) -> None:
    vm.memory.store(0x3000, 8, 0x5001)
    vcpu = vm.create_vcpu()
    sregs = vcpu.get_sregs()
    sregs.cr0, sregs.cr4, sregs.cr3 = CR0_PE | CR0_PG, CR4_PAE, 0x3000
    vcpu.set_sregs(sregs)
    assert vcpu.state.words[PDPTR0] == 0x5001


def test_msrs_are_read_and_written_and_unknown_ones_refused(vm: Vm) -> None:
    vcpu = vm.create_vcpu()
    vcpu.set_msr(MSR_IA32_LSTAR, 0xFFFF_8000_0000_0000)
    assert vcpu.get_msr(MSR_IA32_LSTAR) == 0xFFFF_8000_0000_0000
    with pytest.raises(OSError, match="no MSR"):
        vcpu.get_msr(0x12345)
    with pytest.raises(OSError, match="cannot be set"):
        vcpu.set_msr(MSR_IA32_LSTAR, 1 << 63)
    with pytest.raises(OSError, match="cannot be set"):
        vcpu.set_msr(MSR_IA32_EFER, 1 << 40)


def test_translate_without_paging_is_the_identity(vm: Vm) -> None:
    assert vm.create_vcpu().translate(0x1234) == Translation(0x1234, valid=True)


def test_hlt_without_an_irqchip_returns_and_the_next_run_goes_on_behind_it(vm: Vm) -> None:
    vcpu = real_mode(vm, HLT + b"\x40" + HLT)  # hlt; inc ax; hlt
    assert vcpu.run() == HltExit(interrupts_enabled=False)
    assert vcpu.get_regs().rax == 0
    assert isinstance(vcpu.run(), HltExit)
    assert vcpu.get_regs().rax == 1


def test_unclaimed_port_input_takes_the_answer_of_the_vmm(vm: Vm) -> None:
    vcpu = real_mode(vm, b"\xe4\x99" + HLT, rax=0x5500)  # in al, 0x99
    io_exit = vcpu.run()
    assert io_exit == IoExit(port=0x99, size=1, write=False, data=0xFF)
    assert isinstance(io_exit, IoExit)
    io_exit.data = 0x42
    assert isinstance(vcpu.run(), HltExit)
    assert vcpu.get_regs().rax == 0x5542


def test_triple_fault_is_a_shutdown(vm: Vm) -> None:
    vcpu = real_mode(vm, UD2)
    sregs = vcpu.get_sregs()
    sregs.idt = replace(sregs.idt, limit=0)
    vcpu.set_sregs(sregs)
    assert isinstance(vcpu.run(), ShutdownExit)


def test_fetch_where_no_memory_is_ends_in_an_internal_error(vm: Vm) -> None:
    vcpu = vm.create_vcpu()  # at the reset vector, with no ROM there
    result = vcpu.run()
    assert isinstance(result, InternalErrorExit)
    assert "no memory" in result.detail


def test_a_vm_has_one_vcpu_and_needs_an_irqchip_for_interrupts(vm: Vm) -> None:
    vm.create_vcpu()
    with pytest.raises(LassKvmError, match="one processor"):
        vm.create_vcpu()
    with pytest.raises(LassKvmError, match="create_irqchip"):
        vm.irq_line(4, True)
    with pytest.raises(LassKvmError, match="create_irqchip"):
        vm.create_pit2()


def test_memory_slots_may_not_overlap_and_can_be_deleted(vm: Vm) -> None:
    with pytest.raises(MemoryLayoutError, match="overlaps"):
        vm.set_user_memory_region(1, 0x80000, vm.allocate(1 << 20))
    vm.set_user_memory_region(0, 0, None)
    assert vm.memory_size == 0
