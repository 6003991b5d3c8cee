"""The layouts and numbers of the x86-64 kernel's KVM API, which are fixed for ever."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from lasskvm.kvm.host import KvmIoctlError, abi, ioctls, irqchip_abi
from lasskvm.kvm.host.run_abi import Run

SIZES = {
    abi.Regs: 144,
    abi.Segment: 24,
    abi.DescriptorTable: 16,
    abi.Sregs: 312,
    abi.Sregs2: 320,
    abi.Fpu: 416,
    abi.Xsave: 4096,
    abi.Xcrs: 392,
    abi.DebugRegs: 128,
    abi.MsrEntry: 16,
    abi.Msrs: 8,
    abi.MsrList: 4,
    abi.CpuidEntry2: 40,
    abi.Cpuid2: 8,
    abi.VcpuEvents: 64,
    abi.MpState: 4,
    abi.GuestDebug: 72,
    abi.Translation: 24,
    abi.Interrupt: 4,
    abi.NestedState: 128,
    abi.SignalMask: 12,
    abi.UserspaceMemoryRegion: 32,
    abi.DirtyLog: 16,
    abi.IrqLevel: 8,
    abi.PitConfig: 64,
    abi.ClockData: 48,
    abi.EnableCap: 104,
    abi.MsrFilterRange: 24,
    abi.MsrFilter: 392,
    irqchip_abi.PicState: 16,
    irqchip_abi.IoapicState: 216,
    irqchip_abi.Irqchip: 520,
    irqchip_abi.PitState2: 112,
    irqchip_abi.LapicState: 1024,
    irqchip_abi.IrqRouting: 8,
    irqchip_abi.IrqRoutingEntry: 48,
    irqchip_abi.Msi: 32,
}


@pytest.mark.parametrize("structure", SIZES, ids=lambda structure: str(structure.__name__))
def test_a_structure_has_the_size_that_the_kernel_gives_it(structure: type[ctypes.Structure]) -> None:
    assert ctypes.sizeof(structure) == SIZES[structure]


def test_kvm_run_begins_as_the_kernel_writes_it() -> None:
    run = Run()
    start = ctypes.addressof(run)
    assert Run.immediate_exit.offset == 1
    assert Run.exit_reason.offset == 8
    assert Run.cr8.offset == 16
    offsets = {
        "io.data_offset": ctypes.addressof(run.io) - start + type(run.io).data_offset.offset,
        "mmio.len": ctypes.addressof(run.mmio) - start + type(run.mmio).len.offset,
        "msr.index": ctypes.addressof(run.msr) - start + type(run.msr).index.offset,
        "msr.data": ctypes.addressof(run.msr) - start + type(run.msr).data.offset,
        "system_event.data": ctypes.addressof(run.system_event) - start + type(run.system_event).data.offset,
        "emulation_failure.insn_size": (
            ctypes.addressof(run.emulation_failure) - start + type(run.emulation_failure).insn_size.offset
        ),
    }
    assert offsets == {
        "io.data_offset": 40,
        "mmio.len": 48,
        "msr.index": 44,
        "msr.data": 48,
        "system_event.data": 40,
        "emulation_failure.insn_size": 48,
    }
    assert ctypes.sizeof(run) == 32 + 256


def test_unions_begin_where_the_kernel_has_them() -> None:
    assert irqchip_abi.Irqchip.chip.offset == 8
    assert irqchip_abi.IrqRoutingEntry.u.offset == 16
    assert irqchip_abi.IoapicState.redirtbl.offset == 24


def test_late_fields_of_vcpu_events_are_where_the_kernel_has_them() -> None:
    assert abi.VcpuEvents.triple_fault_pending.offset == 28
    assert abi.VcpuEvents.exception_has_payload.offset == 55
    assert abi.VcpuEvents.exception_payload.offset == 56


@pytest.mark.parametrize(
    ("request_", "number"),
    [
        (ioctls.KVM_CREATE_VM, 0xAE01),
        (ioctls.KVM_GET_MSR_INDEX_LIST, 0xC004AE02),
        (ioctls.KVM_GET_SUPPORTED_CPUID, 0xC008AE05),
        (ioctls.KVM_SET_USER_MEMORY_REGION, 0x4020AE46),
        (ioctls.KVM_SET_IDENTITY_MAP_ADDR, 0x4008AE48),
        (ioctls.KVM_GET_IRQCHIP, 0xC208AE62),
        (ioctls.KVM_SET_IRQCHIP, 0x8208AE63),
        (ioctls.KVM_SET_GSI_ROUTING, 0x4008AE6A),
        (ioctls.KVM_GET_CLOCK, 0x8030AE7C),
        (ioctls.KVM_RUN, 0xAE80),
        (ioctls.KVM_GET_SREGS, 0x8138AE83),
        (ioctls.KVM_TRANSLATE, 0xC018AE85),
        (ioctls.KVM_SET_SIGNAL_MASK, 0x4004AE8B),
        (ioctls.KVM_GET_FPU, 0x81A0AE8C),
        (ioctls.KVM_GET_LAPIC, 0x8400AE8E),
        (ioctls.KVM_SET_LAPIC, 0x4400AE8F),
        (ioctls.KVM_GET_PIT2, 0x8070AE9F),
        (ioctls.KVM_SET_PIT2, 0x4070AEA0),
        (ioctls.KVM_SIGNAL_MSI, 0x4020AEA5),
        (ioctls.KVM_SET_GUEST_DEBUG, 0x4048AE9B),
        (ioctls.KVM_ENABLE_CAP, 0x4068AEA3),
        (ioctls.KVM_GET_XSAVE, 0x9000AEA4),
        (ioctls.KVM_GET_NESTED_STATE, 0xC080AEBE),
        (ioctls.KVM_X86_SET_MSR_FILTER, 0x4188AEC6),
        (ioctls.KVM_SET_SREGS2, 0x4140AECD),
        (ioctls.KVM_GET_XSAVE2, 0x9000AECF),
    ],
    ids=lambda value: value.name if isinstance(value, ioctls.Ioctl) else "",
)
def test_a_request_has_the_number_of_linux_kvm_h(request_: ioctls.Ioctl, number: int) -> None:
    assert request_.number == number


def test_every_request_is_known_by_its_own_name_and_number() -> None:
    requests = {name: value for name, value in vars(ioctls).items() if isinstance(value, ioctls.Ioctl)}
    assert all(name == request.name for name, request in requests.items())
    assert len({request.number for request in requests.values()}) == len(requests)


def test_entries_follow_their_head_without_a_gap() -> None:
    entries = abi.with_entries(abi.Cpuid2, abi.CpuidEntry2, 3)
    entries.nent = 3
    entries.entries[2].edx = 0x12345678
    raw = bytes(entries)
    assert len(raw) == 8 + 3 * 40
    assert raw[0] == 3
    assert raw[8 + 2 * 40 + 24 :][:4] == bytes.fromhex("78563412")


def test_a_refused_ioctl_is_an_oserror_that_names_itself() -> None:
    descriptor = os.open(os.devnull, os.O_RDWR)
    try:
        with pytest.raises(KvmIoctlError, match=r"KVM_RUN: .*does not know it") as refusal:
            ioctls.KVM_RUN(descriptor)
    finally:
        os.close(descriptor)
    assert isinstance(refusal.value, OSError)
    assert (refusal.value.ioctl, refusal.value.errno) == ("KVM_RUN", errno.ENOTTY)


def test_an_ioctl_on_something_closed_is_ebadf() -> None:
    with pytest.raises(KvmIoctlError, match="closed") as refusal:
        ioctls.KVM_GET_REGS(-1, abi.Regs())
    assert refusal.value.errno == errno.EBADF
