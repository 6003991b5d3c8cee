"""The TPR shadow: CR8 of L2 in the virtual-APIC page, and the exit when it falls below the threshold.

With "use TPR shadow", MOV from and to CR8 of L2 that L1 does not intercept use the task-priority register of the
virtual-APIC page. The processor's own CR8 is not involved, nor is the local APIC told.

Source: Intel SDM volume 3C, 30.1.1 (virtual-APIC page), 30.1.2 (TPR virtualization), 30.3 (CR8-based TPR accesses);
KVM's ``nested_vmx_check_tpr_shadow_controls()``.
"""

from __future__ import annotations

from lasskvm.emulator.faults import general_protection
from lasskvm.memory import GuestMemory
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["read_cr8", "tpr_threshold_exit", "uses_tpr_shadow", "write_cr8"]

#: The register in the page: 32 bits, of which bits 7:4 are the priority class, CR8.
_VTPR_OFFSET, _VTPR_BYTES = 0x80, 4
_VTPR_CLASS_SHIFT = 4
_CLASS = 0xF


def uses_tpr_shadow(vmcs: Vmcs12) -> bool:
    """Whether CR8 of L2 is that of the virtual-APIC page."""
    return vmcs[VmcsField.CPU_BASED_VM_EXEC_CONTROL] & vmx.CPU_BASED_TPR_SHADOW != 0


def read_cr8(vmcs: Vmcs12, memory: GuestMemory) -> int:
    """MOV from CR8 with the TPR shadow; *memory* is L1's."""
    return _vtpr(vmcs, memory) >> _VTPR_CLASS_SHIFT & _CLASS


def write_cr8(vmcs: Vmcs12, memory: GuestMemory, value: int) -> NestedExit | None:
    """MOV of *value* to CR8 with the TPR shadow; *memory* is L1's.

    Raises #GP(0) as :class:`GuestFault` when *value* has reserved bits. The exit that it may cause is trap-like: the
    instruction is completed first.
    """
    if value & ~_CLASS:
        raise general_protection()
    address = vmcs[VmcsField.VIRTUAL_APIC_PAGE_ADDR] + _VTPR_OFFSET
    memory.store(address, _VTPR_BYTES, value << _VTPR_CLASS_SHIFT)
    return tpr_threshold_exit(vmcs, memory)


def tpr_threshold_exit(vmcs: Vmcs12, memory: GuestMemory) -> NestedExit | None:
    """The exit when the task priority is below the threshold, with RIP behind the instruction that made it so."""
    if read_cr8(vmcs, memory) < vmcs[VmcsField.TPR_THRESHOLD] & _CLASS:
        return NestedExit(ExitReason.TPR_BELOW_THRESHOLD)
    return None


def _vtpr(vmcs: Vmcs12, memory: GuestMemory) -> int:
    return memory.load(vmcs[VmcsField.VIRTUAL_APIC_PAGE_ADDR] + _VTPR_OFFSET, _VTPR_BYTES)
