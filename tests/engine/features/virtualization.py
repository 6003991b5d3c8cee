"""VMX: a guest may be a hypervisor. What that means in detail is tested in ``tests/vmx`` and ``tests/kvm``."""

from __future__ import annotations

from nested_machine import NestedMachine

from features.probe import Probe, all_of, has_no_msr, is_undefined, refuses_cr4
from lasskvm.conformance.guest import Guest
from lasskvm.x86.msr import MSR_IA32_VMX_BASIC, MSR_IA32_VMX_EPT_VPID_CAP, MSR_IA32_VMX_TRUE_ENTRY_CTLS
from lasskvm.x86.registers import CR4_VMXE
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField


def _vmx(guest: Guest) -> None:
    """A guest of the guest runs, on memory by EPT, comes back for what its hypervisor has to do, and goes on."""
    machine = NestedMachine(guest).reset()
    machine.use_ept()
    found = machine.launch("mov ebx, 3; start: cpuid; inc ebx")
    assert (found.reason, found.label, found.registers.rbx) == (ExitReason.CPUID, "start", 3)
    found = machine.enter(resume=True, rbx=3, fields={VmcsField.GUEST_RIP: found.rip + 2})
    assert found.completed
    assert found.registers.rbx == 4


PROBES = {
    "vmx": Probe(
        _vmx,
        all_of(
            refuses_cr4(CR4_VMXE),
            is_undefined("vmxon [rbx]", "vmxoff", "vmlaunch", "vmread rax, rbx", "invept rax, xmmword [rbx]"),
            has_no_msr(MSR_IA32_VMX_BASIC, MSR_IA32_VMX_EPT_VPID_CAP, MSR_IA32_VMX_TRUE_ENTRY_CTLS),
        ),
    ),
}
