"""CR0 and CR4 in VMX operation: the fixed bits, and what L2 sees and writes when L1 owns bits by the guest/host masks.

Source: Intel SDM volume 3C, 24.8 and appendix A.7 and A.8 (fixed bits), 25.6.6 (masks and read shadows), 26.3 (MOV from
CR, SMSW, MOV to CR, LMSW, CLTS); KVM's ``nested_read_cr0()``, ``nested_read_cr4()``, ``nested_guest_cr0_valid()`` and
``nested_host_cr0_valid()``.
"""

from __future__ import annotations

from lasskvm.emulator.faults import general_protection
from lasskvm.state import CR0, CR4, Words
from lasskvm.vmx.capabilities import VmxCapabilities
from lasskvm.vmx.guest_mode import is_unrestricted_guest
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86.registers import CR0_PE, CR0_PG
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["keep_owned_bits", "visible_cr0", "visible_cr4", "written_in_guest", "written_in_root"]


def visible_cr0(vmcs: Vmcs12, words: Words) -> int:
    """What MOV from CR0 and SMSW give L2."""
    return _visible(words[CR0], vmcs[VmcsField.CR0_GUEST_HOST_MASK], vmcs[VmcsField.CR0_READ_SHADOW])


def visible_cr4(vmcs: Vmcs12, words: Words) -> int:
    """What MOV from CR4 gives L2."""
    return _visible(words[CR4], vmcs[VmcsField.CR4_GUEST_HOST_MASK], vmcs[VmcsField.CR4_READ_SHADOW])


def keep_owned_bits(value: int, mask: int, register: int) -> int:
    """What MOV to CR0 or CR4 with *value*, which has not caused an exit, writes to *register*: the bits of *mask* stay.

    The exits are those of :mod:`lasskvm.vmx.intercepts_cr`. CLTS and LMSW do the same with the bits they write.
    """
    return register & mask | value & ~mask


def written_in_root(capabilities: VmxCapabilities, number: int, value: int) -> int:
    """What L1 writes to CR0 or CR4 in VMX operation: *value*, or #GP(0) as :class:`GuestFault` for the fixed bits."""
    fixed = capabilities.cr4 if number else capabilities.cr0
    if not fixed.allow(value):
        raise general_protection()
    return value


def written_in_guest(
    vmcs: Vmcs12, capabilities: VmxCapabilities, words: Words, number: int, value: int
) -> int:
    """What MOV to CR0 or CR4 with *value* writes in L2; #GP(0) as :class:`GuestFault` for the fixed bits."""
    if number:
        value = keep_owned_bits(value, vmcs[VmcsField.CR4_GUEST_HOST_MASK], words[CR4])
        fixed, exempt = capabilities.cr4, 0
    else:
        value = keep_owned_bits(value, vmcs[VmcsField.CR0_GUEST_HOST_MASK], words[CR0])
        fixed, exempt = capabilities.cr0, CR0_PE | CR0_PG if is_unrestricted_guest(vmcs) else 0
    if not fixed.allow(value, exempt=exempt):
        raise general_protection()
    return value


def _visible(register: int, mask: int, shadow: int) -> int:
    return register & ~mask | shadow & mask
