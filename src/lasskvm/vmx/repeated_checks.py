"""The checks of a VM entry, without those whose answer is known from the last VM entry.

A hypervisor enters its guest again and again with a VMCS in which a handful of fields have changed. What a check finds
depends on fields, on the capabilities, on L1's mode, and in three cases on memory; so a group of checks that was passed
is passed again as long as its fields hold the same values. Nothing else is assumed: not even that what a VM exit saves
would be right.
"""

from __future__ import annotations

from operator import itemgetter

from lasskvm.emulator.modes import in_ia32e_mode
from lasskvm.memory import GuestMemory
from lasskvm.state import Words
from lasskvm.vmx.capabilities import VmxCapabilities
from lasskvm.vmx.entry_checks import check_controls_and_host_state, check_tpr_shadow
from lasskvm.vmx.guest_checks import GuestStateViolation, check_guest_state, check_volatile_guest_state
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86.registers import RFLAGS_VM
from lasskvm.x86.vmx_fields import FieldType, VmcsField, field_type

__all__ = ["RepeatedChecks"]

#: What the checks of every VM entry look at, because it changes with every instruction of the guest.
_VOLATILE = (
    VmcsField.GUEST_RIP,
    VmcsField.GUEST_RSP,
    VmcsField.GUEST_RFLAGS,
    VmcsField.GUEST_INTERRUPTIBILITY_INFO,
    VmcsField.GUEST_ACTIVITY_STATE,
    VmcsField.GUEST_PENDING_DBG_EXCEPTIONS,
)


def _fields(*kinds: FieldType) -> tuple[int, ...]:
    return tuple(int(field) for field in VmcsField if field_type(field) in kinds and field not in _VOLATILE)


_controls_and_host = itemgetter(*_fields(FieldType.CONTROL, FieldType.HOST_STATE))
_guest = itemgetter(*_fields(FieldType.GUEST_STATE))


class RepeatedChecks:
    """What was found right at the last VM entry of one vCPU."""

    def __init__(self) -> None:
        self._capabilities: VmxCapabilities | None = None
        #: L1's mode, which it can change between VMXOFF and VMXON.
        self._ia32e = False
        #: The fields that decide what VMX operation with the VMCS is like; the same object while they are the same.
        self.controls_and_host: tuple[int, ...] | None = None
        self._guest: tuple[object, ...] | None = None

    def controls_and_host_state(
        self, vmcs: Vmcs12, capabilities: VmxCapabilities, memory: GuestMemory, words: Words
    ) -> None:
        """:func:`~lasskvm.vmx.entry_checks.check_controls_and_host_state`."""
        values = _controls_and_host(vmcs)
        ia32e = in_ia32e_mode(words)
        known = self._capabilities is capabilities and self._ia32e == ia32e
        if known and self.controls_and_host == values:
            check_tpr_shadow(vmcs, memory, words)
            return
        self._guest = self.controls_and_host = None
        check_controls_and_host_state(vmcs, capabilities, memory, words)
        self._capabilities, self._ia32e, self.controls_and_host = capabilities, ia32e, values

    def guest_state(
        self,
        vmcs: Vmcs12,
        capabilities: VmxCapabilities,
        memory: GuestMemory,
        words: Words,
        current_gpa: int,
    ) -> GuestStateViolation | None:
        """:func:`~lasskvm.vmx.guest_checks.check_guest_state`, behind :meth:`controls_and_host_state`."""
        values = _guest(vmcs), vmcs[VmcsField.GUEST_RFLAGS] & RFLAGS_VM
        if self._guest == values:
            return check_volatile_guest_state(vmcs, capabilities, memory, words, current_gpa)
        self._guest = None
        violation = check_guest_state(vmcs, capabilities, memory, words, current_gpa)
        if violation is None:
            self._guest = values
        return violation
