"""Time in L2: the VMX-preemption timer, and the offset of its time-stamp counter.

*tsc* is always the counter that nobody writes to (``Emulation.read_tsc``). A running timer is one number, the tick of
that counter at which it expires, so that a snapshot has it too.

Source: Intel SDM volume 3C, 26.5.1 (preemption timer), 25.6.5 (TSC offset), 28.3.4 (saving the timer).
"""

from __future__ import annotations

from lasskvm.vmx.capabilities import VmxCapabilities
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["save_timer", "timer_deadline", "tsc_offset"]


def tsc_offset(vmcs: Vmcs12) -> int:
    """What RDTSC, RDTSCP and RDMSR in L2 add to L1's time-stamp counter, modulo 2**64."""
    if vmcs[VmcsField.CPU_BASED_VM_EXEC_CONTROL] & vmx.CPU_BASED_USE_TSC_OFFSETTING:
        return vmcs[VmcsField.TSC_OFFSET]
    return 0


def timer_deadline(vmcs: Vmcs12, capabilities: VmxCapabilities, tsc: int) -> int | None:
    """When the preemption timer that starts at *tsc* expires; None when it is not active.

    It counts down whenever a bit of the time-stamp counter changes, which is not always a whole period away.
    """
    if not vmcs[VmcsField.PIN_BASED_VM_EXEC_CONTROL] & vmx.PIN_BASED_VMX_PREEMPTION_TIMER:
        return None
    rate = _rate(capabilities)
    return (tsc >> rate) + vmcs[VmcsField.VMX_PREEMPTION_TIMER_VALUE] << rate


def save_timer(vmcs: Vmcs12, capabilities: VmxCapabilities, tsc: int, deadline: int) -> None:
    """Store what a VM exit at *tsc* finds in the timer that expires at *deadline*, if the VM-exit controls ask."""
    if vmcs[VmcsField.VM_EXIT_CONTROLS] & vmx.VM_EXIT_SAVE_VMX_PREEMPTION_TIMER:
        rate = _rate(capabilities)
        vmcs[VmcsField.VMX_PREEMPTION_TIMER_VALUE] = max(0, (deadline >> rate) - (tsc >> rate))


def _rate(capabilities: VmxCapabilities) -> int:
    return capabilities.misc & vmx.VMX_MISC_PREEMPTION_TIMER_RATE
