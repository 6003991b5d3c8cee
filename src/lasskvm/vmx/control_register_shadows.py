"""CR0 and CR4 in L2: what it sees and writes when L1 owns bits of them by the guest/host masks.

Source: Intel SDM volume 3C, 25.6.6 (masks and read shadows), 26.3 (MOV from CR, SMSW, MOV to CR, LMSW, CLTS); KVM's
``nested_read_cr0()`` and ``nested_read_cr4()``.
"""

from __future__ import annotations

from lasskvm.state import CR0, CR4, Words
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["keep_owned_bits", "visible_cr0", "visible_cr4"]


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


def _visible(register: int, mask: int, shadow: int) -> int:
    return register & ~mask | shadow & mask
