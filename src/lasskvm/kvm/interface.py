"""What a provider of the KVM API offers: the interface that the soft and the host provider share.

Whoever drives VMs (the PC, the conformance suite, the fuzzer) is written against these protocols, so it runs on either.
Names and semantics are the kernel's (``Documentation/virt/kvm/api.rst``); an ``ioctl`` that fails is an ``OSError``
with its errno, whose text names the ioctl.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from lasskvm.kvm.exits import Exit
from lasskvm.kvm.iobus import DeviceState
from lasskvm.kvm.irqchip.routing import Route
from lasskvm.kvm.structures import (
    DebugRegs,
    Fpu,
    GuestDebug,
    MpState,
    MsrFilterRange,
    Regs,
    Sregs,
    Sregs2,
    Translation,
    VcpuEvents,
)
from lasskvm.memory import GuestMemory
from lasskvm.x86.cpuid import CpuidEntry

__all__ = ["SystemInterface", "VcpuInterface", "VmInterface"]


class SystemInterface(Protocol):
    """``/dev/kvm``."""

    @property
    def provider(self) -> str:
        """``"soft"`` or ``"host"``."""

    def check_extension(self, capability: int) -> int:
        """``KVM_CHECK_EXTENSION``: 0 when the capability (``KVM_CAP_*``) is not there."""

    def get_supported_cpuid(self) -> list[CpuidEntry]:
        """``KVM_GET_SUPPORTED_CPUID``: what a guest can be given."""

    def get_msr_index_list(self) -> list[int]:
        """``KVM_GET_MSR_INDEX_LIST``: the MSRs to save and restore."""

    def create_vm(self) -> VmInterface:
        """``KVM_CREATE_VM``."""


class VmInterface(Protocol):
    """A virtual machine."""

    memory: GuestMemory

    @staticmethod
    def allocate(size: int) -> mmap.mmap:
        """Zeroed host memory for a slot."""

    def set_user_memory_region(self, slot: int, gpa: int, memory: mmap.mmap | None, flags: int = 0) -> None:
        """``KVM_SET_USER_MEMORY_REGION``; None deletes the slot."""

    def get_dirty_log(self, slot: int) -> bytes:
        """``KVM_GET_DIRTY_LOG``: a bit for each page written since the last call; *slot* logs dirty pages."""

    def create_irqchip(self) -> None:
        """``KVM_CREATE_IRQCHIP``."""

    def create_pit2(self) -> None:
        """``KVM_CREATE_PIT2``."""

    def irq_line(self, line: int, level: bool) -> None:
        """``KVM_IRQ_LINE``."""

    def set_gsi_routing(self, routes: Sequence[Route]) -> None:
        """``KVM_SET_GSI_ROUTING``; EINVAL for routes that contradict each other."""

    def signal_msi(self, address: int, data: int) -> bool:
        """``KVM_SIGNAL_MSI``: whether a vCPU has taken the message."""

    def get_irqchip(self) -> DeviceState:
        """``KVM_GET_IRQCHIP`` of all the VM's interrupt chips, as :meth:`set_irqchip` of the same provider takes it."""

    def set_irqchip(self, state: DeviceState) -> None:
        """``KVM_SET_IRQCHIP``."""

    def get_pit2(self) -> DeviceState:
        """``KVM_GET_PIT2``, as :meth:`set_pit2` of the same provider takes it."""

    def set_pit2(self, state: DeviceState) -> None:
        """``KVM_SET_PIT2``."""

    def set_msr_filter(self, ranges: Sequence[MsrFilterRange], *, default_allow: bool = True) -> None:
        """``KVM_X86_SET_MSR_FILTER``: accesses that the filter denies leave as MSR exits."""

    def create_vcpu(self) -> VcpuInterface:
        """``KVM_CREATE_VCPU``, number 0."""

    def close(self) -> None:
        """Give everything back to the host; no other call is valid afterwards."""


class VcpuInterface(Protocol):
    """A virtual processor."""

    def set_cpuid2(self, entries: Iterable[CpuidEntry]) -> None:
        """``KVM_SET_CPUID2``; EINVAL once the vCPU has run."""

    def get_cpuid2(self) -> list[CpuidEntry]:
        """``KVM_GET_CPUID2``."""

    def get_regs(self) -> Regs:
        """``KVM_GET_REGS``."""

    def set_regs(self, regs: Regs) -> None:
        """``KVM_SET_REGS``; a pending exception is dropped."""

    def get_sregs(self) -> Sregs:
        """``KVM_GET_SREGS``."""

    def set_sregs(self, sregs: Sregs) -> None:
        """``KVM_SET_SREGS``; EINVAL for CR0, CR4 and EFER that CPUID does not allow, CR4.LASS among them."""

    def get_sregs2(self) -> Sregs2:
        """``KVM_GET_SREGS2``."""

    def set_sregs2(self, sregs: Sregs2) -> None:
        """``KVM_SET_SREGS2``."""

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """``KVM_GET_MSRS``: those before the first that does not exist, as the kernel has it."""

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """``KVM_SET_MSRS``: how many were set; it stops at the first that cannot be."""

    def get_fpu(self) -> Fpu:
        """``KVM_GET_FPU``."""

    def set_fpu(self, fpu: Fpu) -> None:
        """``KVM_SET_FPU``."""

    def get_xsave(self) -> bytes:
        """``KVM_GET_XSAVE``: 4096 bytes in XSAVE's standard format."""

    def set_xsave(self, region: bytes) -> None:
        """``KVM_SET_XSAVE``."""

    def get_xcrs(self) -> dict[int, int]:
        """``KVM_GET_XCRS``."""

    def set_xcrs(self, values: Mapping[int, int]) -> None:
        """``KVM_SET_XCRS``."""

    def get_debugregs(self) -> DebugRegs:
        """``KVM_GET_DEBUGREGS``."""

    def set_debugregs(self, registers: DebugRegs) -> None:
        """``KVM_SET_DEBUGREGS``."""

    def get_vcpu_events(self) -> VcpuEvents:
        """``KVM_GET_VCPU_EVENTS``."""

    def set_vcpu_events(self, events: VcpuEvents) -> None:
        """``KVM_SET_VCPU_EVENTS``."""

    def get_mp_state(self) -> MpState:
        """``KVM_GET_MP_STATE``."""

    def set_mp_state(self, state: MpState) -> None:
        """``KVM_SET_MP_STATE``."""

    def get_lapic(self) -> bytes:
        """``KVM_GET_LAPIC``: the 1024 bytes of the local APIC's register page; EINVAL without an irqchip."""

    def set_lapic(self, registers: bytes) -> None:
        """``KVM_SET_LAPIC``."""

    def get_nested_state(self) -> bytes:
        """``KVM_GET_NESTED_STATE``: the header and, in VMX operation, the provider's own format of a VMCS."""

    def set_nested_state(self, state: bytes) -> None:
        """``KVM_SET_NESTED_STATE`` of what the same provider gave."""

    def set_guest_debug(self, debug: GuestDebug) -> None:
        """``KVM_SET_GUEST_DEBUG``; what it catches are :class:`~lasskvm.kvm.exits.DebugExit`."""

    def translate(self, gva: int) -> Translation:
        """``KVM_TRANSLATE``, for a supervisor read."""

    def interrupt(self, vector: int) -> None:
        """``KVM_INTERRUPT``: inject an external interrupt at the next entry; without an irqchip only."""

    def nmi(self) -> None:
        """``KVM_NMI``."""

    @property
    def immediate_exit(self) -> bool:
        """``kvm_run.immediate_exit``: the next run returns :class:`~lasskvm.kvm.exits.IntrExit` at once."""

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        """Set or clear it; any thread may."""

    def run(self) -> Exit:
        """``KVM_RUN``."""
