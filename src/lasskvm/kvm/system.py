"""The software KVM as a system: what it offers, and how a VM is made; ``/dev/kvm``'s counterpart."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from lasskvm.emulator.msrs import MSRS
from lasskvm.kvm.system_capabilities import CAPABILITIES, KVM_CAP_NESTED_STATE
from lasskvm.kvm.vm import ExecutionEngine, Vm
from lasskvm.vmx.capabilities import VmxCapabilities
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidEntry, CpuidTable, cr4_allowed, without_features
from lasskvm.x86.msr import MSR_IA32_EFER, MSR_IA32_TSC, MSR_IA32_TSC_ADJUST

__all__ = ["System"]

#: MSRs that are computed and have no entry in :data:`~lasskvm.emulator.msrs.MSRS`.
_COMPUTED_MSRS = (MSR_IA32_TSC, MSR_IA32_TSC_ADJUST, MSR_IA32_EFER)


class System:
    """The soft provider: it needs nothing of the host, and its processors have LASS.

    Without *nested*, they have no VMX (KVM's module parameter of that name).

    >>> from lasskvm.x86.cpuid import CpuidTable
    >>> with System() as system, system.create_vm() as vm:
    ...     vm.set_user_memory_region(0, 0, vm.allocate(0x10000))
    ...     vcpu = vm.create_vcpu()
    ...     vcpu.set_cpuid2(system.get_supported_cpuid())
    ...     CpuidTable(vcpu.get_cpuid2()).has("lass")
    True
    """

    def __init__(self, *, nested: bool = True) -> None:
        self._nested = nested

    @property
    def provider(self) -> str:
        """``"soft"``."""
        return "soft"

    def check_extension(self, capability: int) -> int:
        """``KVM_CHECK_EXTENSION``: 0 when *capability* (``KVM_CAP_*``) is not there, else what it is worth."""
        if capability == KVM_CAP_NESTED_STATE and not self._nested:
            return 0
        return CAPABILITIES.get(capability, 0)

    def get_supported_cpuid(self) -> list[CpuidEntry]:
        """``KVM_GET_SUPPORTED_CPUID``: the CPU model ``max``, with LASS in leaf 7, subleaf 1, EAX bit 6."""
        entries = parse_cpu("max").entries()
        return list(entries if self._nested else without_features(entries, ("vmx",)))

    def get_msr_index_list(self) -> list[int]:
        """``KVM_GET_MSR_INDEX_LIST``: the MSRs to save and restore."""
        readable = (index for index, entry in MSRS.items() if not entry.write_only)
        cpuid = CpuidTable(self.get_supported_cpuid())
        vmx = VmxCapabilities.of(cpuid, cr4_allowed(cpuid)).msrs() if self._nested else ()
        return sorted((*_COMPUTED_MSRS, *readable, *vmx))

    def create_vm(self, engine: ExecutionEngine = "jit", *, forced_emulation: bool = False) -> Vm:
        """``KVM_CREATE_VM``; *engine* and *forced_emulation* are those of :class:`Vm`."""
        return Vm(engine, forced_emulation=forced_emulation, nested=self._nested)

    def close(self) -> None:
        """Do nothing: VMs live on, as those of /dev/kvm do."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
