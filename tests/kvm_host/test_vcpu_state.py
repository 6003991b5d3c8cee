"""A vCPU's state goes through the host's KVM and comes back."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from provided import CODE, Machine

from lasskvm.conformance.assembler import assemble
from lasskvm.kvm.exits import MsrExit
from lasskvm.kvm.host import KvmIoctlError
from lasskvm.kvm.host.capabilities import KVM_CAP_NESTED_STATE
from lasskvm.kvm.structures import DebugRegs, Fpu, MpState, MsrFilterRange, VcpuEvents
from lasskvm.x86.cpuid import FEATURES, CpuidTable
from lasskvm.x86.exceptions import GP, UD
from lasskvm.x86.msr import (
    MSR_IA32_FS_BASE,
    MSR_IA32_KERNEL_GS_BASE,
    MSR_IA32_LSTAR,
    MSR_IA32_STAR,
    MSR_IA32_SYSENTER_EIP,
    MSR_IA32_TSC,
)
from lasskvm.x86.registers import CR0_PG, CR4_LASS, CR4_PAE, RFLAGS_IF

HLT = b"\xf4"
VECTOR = 0x20
NO_SUCH_MSR = 0x4B564DFF


def test_supported_cpuid_is_a_table_of_a_64_bit_processor(host_machine: Machine) -> None:
    table = CpuidTable(host_machine.system.get_supported_cpuid())
    assert table.has("lm")
    assert table.has("sse2")
    assert table.maxphyaddr >= 36


def test_the_time_stamp_counter_has_a_frequency(host_machine: Machine) -> None:
    assert host_machine.host_vcpu.get_tsc_khz() > 100_000


def test_cpuid_comes_back_and_the_guest_sees_it(host_machine: Machine) -> None:
    entries = [
        replace(entry, ebx=0x6C737361) if entry.function == 0 else entry
        for entry in host_machine.system.get_supported_cpuid()
    ]
    host_machine.vcpu.set_cpuid2(entries)
    assert [entry.function for entry in host_machine.vcpu.get_cpuid2()] == [
        entry.function for entry in entries
    ]
    host_machine.long_mode(assemble("xor eax, eax; cpuid; hlt", CODE).code)
    assert host_machine.run_to_halt().rbx == 0x6C737361


def test_cpuid_cannot_change_once_the_vcpu_has_run(host_machine: Machine) -> None:
    host_machine.real_mode(HLT)
    host_machine.run_to_halt()
    smaller = [entry for entry in host_machine.system.get_supported_cpuid() if entry.function == 0]
    with pytest.raises(KvmIoctlError, match="KVM_SET_CPUID2") as refusal:
        host_machine.vcpu.set_cpuid2(smaller)
    assert refusal.value.errno == errno.EINVAL


def test_cr4_lass_is_refused_with_einval_when_cpuid_lacks_lass(host_machine: Machine) -> None:
    entries = host_machine.system.get_supported_cpuid()
    lass = FEATURES["lass"]
    entries = [
        replace(entry, eax=entry.eax & ~(1 << lass.bit))
        if (entry.function, entry.index) == (lass.leaf, lass.subleaf)
        else entry
        for entry in entries
    ]
    host_machine.vcpu.set_cpuid2(entries)
    sregs = host_machine.vcpu.get_sregs()
    sregs.cr4 = CR4_LASS
    with pytest.raises(KvmIoctlError, match=r"KVM_SET_SREGS: .*CPUID") as refusal:
        host_machine.vcpu.set_sregs(sregs)
    assert refusal.value.errno == errno.EINVAL


def test_segments_and_control_registers_come_back(host_machine: Machine) -> None:
    host_machine.long_mode(HLT)
    sregs = host_machine.vcpu.get_sregs()
    sregs.fs = replace(sregs.fs, base=0x7F00_1234_5000)
    sregs.cr2, sregs.cr8 = 0xFFFF_8000_0000_1000, 3
    host_machine.vcpu.set_sregs(sregs)
    assert host_machine.vcpu.get_sregs() == sregs


def test_sregs2_come_back_with_the_pdptes_of_pae_paging(host_machine: Machine) -> None:
    tables = 0x10_8000
    present = tables + 0x1000 | 1
    host_machine.vm.memory.store(tables, 8, present)
    host_machine.protected_mode(HLT)
    sregs = host_machine.vcpu.get_sregs2()
    sregs.cr0, sregs.cr3, sregs.cr4 = sregs.cr0 | CR0_PG, tables, CR4_PAE
    sregs.pdptrs_valid, sregs.pdptrs = True, (present, 0, 0, 0)
    host_machine.vcpu.set_sregs2(sregs)
    if not host_machine.vcpu.get_sregs2().cr0 & CR0_PG:
        pytest.skip("this KVM has no paging outside long mode, and ignores CR0.PG there")
    assert host_machine.vcpu.get_sregs2() == sregs


def test_sregs2_come_back_in_long_mode(host_machine: Machine) -> None:
    host_machine.long_mode(HLT)
    sregs = host_machine.vcpu.get_sregs2()
    sregs.gs = replace(sregs.gs, base=0xFFFF_8880_0000_0000)
    host_machine.vcpu.set_sregs2(sregs)
    assert host_machine.vcpu.get_sregs2() == sregs
    assert not sregs.pdptrs_valid


def test_msrs_come_back_in_one_batch(host_machine: Machine) -> None:
    values = {
        MSR_IA32_LSTAR: 0xFFFF_8000_0000_2000,
        MSR_IA32_STAR: 0x0023_0010_0000_0000,
        MSR_IA32_KERNEL_GS_BASE: 0xFFFF_8880_0000_0000,
        MSR_IA32_SYSENTER_EIP: 0xFFFF_FFFF_8100_0000,
        MSR_IA32_FS_BASE: 0x1000,
    }
    assert host_machine.vcpu.set_msrs(values) == len(values)
    assert host_machine.vcpu.get_msrs(values) == values


def test_msr_access_stops_at_the_first_that_does_not_exist(host_machine: Machine) -> None:
    wanted = {MSR_IA32_LSTAR: 0x1000, NO_SUCH_MSR: 1, MSR_IA32_STAR: 0}
    assert host_machine.vcpu.set_msrs(wanted) == 1
    assert host_machine.vcpu.get_msrs(wanted) == {MSR_IA32_LSTAR: 0x1000}


def test_more_msrs_than_one_call_takes_are_read_in_several(host_machine: Machine) -> None:
    indices = [MSR_IA32_STAR] * 300 + [MSR_IA32_LSTAR]
    assert host_machine.vcpu.get_msrs(indices).keys() == {MSR_IA32_STAR, MSR_IA32_LSTAR}
    assert host_machine.vcpu.get_msrs([*indices, NO_SUCH_MSR]).keys() == {MSR_IA32_STAR, MSR_IA32_LSTAR}


def test_the_msrs_of_the_index_list_can_be_read(host_machine: Machine) -> None:
    indices = host_machine.system.get_msr_index_list()
    assert MSR_IA32_TSC in indices
    assert MSR_IA32_STAR in indices


@pytest.mark.parametrize("error", [False, True])
def test_a_filtered_rdmsr_leaves_for_the_vmm(host_machine: Machine, error: bool) -> None:
    deny = MsrFilterRange(MSR_IA32_STAR, nmsrs=1, bitmap=b"\0", read=True, write=False)
    host_machine.vm.set_msr_filter([deny])
    host_machine.long_mode(assemble("rdmsr; hlt", CODE).code, rcx=MSR_IA32_STAR)
    vm_exit = host_machine.run()
    assert vm_exit == MsrExit(MSR_IA32_STAR, write=False, data=0, error=True)
    assert isinstance(vm_exit, MsrExit)
    vm_exit.data, vm_exit.error = 0x1122_3344_5566_7788, error
    if error:
        host_machine.vcpu.immediate_exit = True
        host_machine.run()
        events = host_machine.vcpu.get_vcpu_events()
        assert GP in (events.exception, events.pending_exception)
    else:
        regs = host_machine.run_to_halt()
        assert (regs.rdx, regs.rax) == (0x1122_3344, 0x5566_7788)


def test_a_filtered_wrmsr_brings_its_data(host_machine: Machine) -> None:
    deny = MsrFilterRange(MSR_IA32_STAR, nmsrs=1, bitmap=b"\0", read=False, write=True)
    host_machine.vm.set_msr_filter([deny])
    host_machine.long_mode(
        assemble("wrmsr; rdmsr; hlt", CODE).code, rcx=MSR_IA32_STAR, rdx=0xAABB, rax=0xCCDD
    )
    vm_exit = host_machine.run()
    assert vm_exit == MsrExit(MSR_IA32_STAR, write=True, data=0xAABB_0000_CCDD)
    assert isinstance(vm_exit, MsrExit)
    vm_exit.error = False
    assert host_machine.run_to_halt().rdx == 0


def test_fpu_registers_come_back(host_machine: Machine) -> None:
    fpu = Fpu(
        fpr=[0x3FFF_8000_0000_0000_0000 + index for index in range(8)],
        fcw=0x27F,
        fsw=0x3800,
        ftwx=0xFF,
        xmm=[0x0102_0304_0506_0708_090A_0B0C_0D0E_0F00 + index for index in range(16)],
        mxcsr=0,
    )
    host_machine.vcpu.set_fpu(fpu)
    assert host_machine.vcpu.get_fpu() == fpu


def test_the_xsave_region_holds_the_xmm_registers(host_machine: Machine) -> None:
    xmm0, xstate_bv, sse = 160, 512, 1 << 1
    region = bytearray(host_machine.vcpu.get_xsave())
    assert len(region) >= 4096
    region[xmm0 : xmm0 + 2] = bytes.fromhex("aa55")
    region[xstate_bv] |= sse
    host_machine.vcpu.set_xsave(bytes(region))
    assert host_machine.vcpu.get_fpu().xmm[0] == 0x55AA
    assert host_machine.vcpu.get_xsave()[xmm0 : xmm0 + 2] == bytes.fromhex("aa55")


def test_xcr0_and_debug_registers_come_back(host_machine: Machine) -> None:
    vcpu = host_machine.vcpu
    x87_and_sse = 3
    vcpu.set_xcrs({0: x87_and_sse})
    assert vcpu.get_xcrs() == {0: x87_and_sse}
    registers = DebugRegs(db=(0x1000, 0x2000, 0x3000, 0x4000), dr6=0xFFFF0FF1, dr7=0x401)
    vcpu.set_debugregs(registers)
    assert vcpu.get_debugregs() == registers


@pytest.mark.parametrize(
    "events",
    [
        VcpuEvents(),
        VcpuEvents(exception=GP, exception_error_code=0x18),
        VcpuEvents(pending_exception=UD),
        VcpuEvents(pending_exception=14, exception_error_code=2, exception_payload=0x5000),
        VcpuEvents(interrupt=VECTOR),
        VcpuEvents(interrupt_shadow=1, nmi_masked=True),
        VcpuEvents(nmi_injected=True),
        VcpuEvents(nmi_pending=True),
        VcpuEvents(triple_fault_pending=True),
    ],
    ids=repr,
)
def test_vcpu_events_come_back(host_machine: Machine, events: VcpuEvents) -> None:
    host_machine.vcpu.set_vcpu_events(events)
    assert host_machine.vcpu.get_vcpu_events() == events


def test_a_new_vcpu_is_runnable(host_machine: Machine) -> None:
    assert host_machine.vcpu.get_mp_state() is MpState.RUNNABLE
    host_machine.vcpu.set_mp_state(MpState.RUNNABLE)


def test_mp_state_halted_needs_an_irqchip(irqchip_machine: Machine) -> None:
    irqchip_machine.vcpu.set_mp_state(MpState.HALTED)
    assert irqchip_machine.vcpu.get_mp_state() is MpState.HALTED


def test_nested_state_comes_back(host_machine: Machine) -> None:
    if not host_machine.system.check_extension(KVM_CAP_NESTED_STATE):
        pytest.skip("this KVM offers no nested virtualization")
    state = host_machine.vcpu.get_nested_state()
    host_machine.vcpu.set_nested_state(state)
    assert host_machine.vcpu.get_nested_state() == state


def test_nested_state_is_refused_with_a_sentence_where_there_is_none(host_machine: Machine) -> None:
    if host_machine.system.check_extension(KVM_CAP_NESTED_STATE):
        pytest.skip("this KVM offers nested virtualization")
    vcpu = host_machine.vcpu
    for name, call in (("GET", vcpu.get_nested_state), ("SET", lambda: vcpu.set_nested_state(b""))):
        with pytest.raises(KvmIoctlError, match=f"KVM_{name}_NESTED_STATE: .* no nested") as refusal:
            call()
        assert refusal.value.errno == errno.ENOTTY


def test_translate_follows_the_guests_page_tables(host_machine: Machine) -> None:
    host_machine.long_mode(HLT)
    translation = host_machine.vcpu.translate(0x12_3456)
    assert (translation.valid, translation.physical_address) == (True, 0x12_3456)
    assert not host_machine.vcpu.translate(0xFFFF_8000_0000_0000).valid


# ------------------------------------------------------------------------------------------------------ interrupts


def real_mode_handler(machine: Machine, vector: int) -> None:
    """A handler at 0:2000H, which puts 7 into BX and returns."""
    machine.vm.memory.store(4 * vector, 4, 0x2000)
    machine.vm.memory.write(0x2000, bytes.fromhex("bb0700 cf"))  # mov bx, 7; iret


def test_an_injected_interrupt_goes_through_the_vector_table(host_machine: Machine) -> None:
    real_mode_handler(host_machine, VECTOR)
    host_machine.real_mode(b"\x90" + HLT, rflags=RFLAGS_IF | 2)
    host_machine.vcpu.interrupt(VECTOR)
    assert host_machine.run_to_halt().rbx == 7


def test_an_nmi_goes_through_vector_2(host_machine: Machine) -> None:
    real_mode_handler(host_machine, 2)
    host_machine.real_mode(b"\x90" + HLT)
    host_machine.vcpu.nmi()
    assert host_machine.run_to_halt().rbx == 7


def test_an_interrupt_cannot_be_injected_beside_an_irqchip(irqchip_machine: Machine) -> None:
    with pytest.raises(KvmIoctlError, match=r"irq_line\(\)") as refusal:
        irqchip_machine.vcpu.interrupt(VECTOR)
    assert refusal.value.errno == errno.ENXIO


def test_a_line_of_the_irqchip_wakes_a_halted_guest(irqchip_machine: Machine) -> None:
    line, base = 4, 0x20
    real_mode_handler(irqchip_machine, base + line)
    # ICW1 to ICW4 and the mask of the first 8259A; STI; HLT; then out of the machine with BX.
    setup = "b011 e620 b020 e621 b004 e621 b001 e621 b0ef e621 fb f4 fa 89d8 e7f0"
    irqchip_machine.real_mode(bytes.fromhex(setup))
    irqchip_machine.run(0.05)
    assert irqchip_machine.vcpu.get_mp_state() is MpState.HALTED
    irqchip_machine.vm.irq_line(line, True)
    irqchip_machine.vm.irq_line(line, False)
    vm_exit = irqchip_machine.run()
    assert getattr(vm_exit, "port", None) == 0xF0, vm_exit
    assert irqchip_machine.vcpu.get_regs().rbx == 7
