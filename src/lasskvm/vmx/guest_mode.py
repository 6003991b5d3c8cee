"""What kind of guest a VMCS describes: its mode, its segment registers, its PDPTEs, the event it is entered with.

Questions that checks and transitions ask of a :class:`~lasskvm.vmx.vmcs.Vmcs12`. They take the VMCS as it is, valid or
not.

Source: Intel SDM volume 3C, 27.3.1.2 (terms for the guest's mode), 27.3.1.6 (PAE paging), 25.8.3 (events).
"""

from __future__ import annotations

from typing import NamedTuple

from lasskvm.memory import GuestMemory
from lasskvm.state import Segment
from lasskvm.vmx.entry_checks import secondary_controls
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.registers import CR0_PG, CR4_PAE, RFLAGS_VM
from lasskvm.x86.vmx_fields import VmcsField

__all__ = [
    "SEGMENT_FIELDS",
    "InjectedEvent",
    "guest_pdptes",
    "guest_segment",
    "injected_event",
    "is_ia32e_guest",
    "is_unrestricted_guest",
    "is_virtual_8086_guest",
]

_SEGMENT_REGISTERS = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
#: The fields of each segment register, in the order of :class:`Segment`.
SEGMENT_FIELDS = tuple(
    tuple(VmcsField[f"GUEST_{name}_{part}"] for part in ("SELECTOR", "BASE", "LIMIT", "AR_BYTES"))
    for name in _SEGMENT_REGISTERS
)

_PDPTES = (VmcsField.GUEST_PDPTR0, VmcsField.GUEST_PDPTR1, VmcsField.GUEST_PDPTR2, VmcsField.GUEST_PDPTR3)
_PDPT_ADDRESS = 0xFFFFFFE0
_PDPTE_BYTES = 8


class InjectedEvent(NamedTuple):
    """An event that VM entry delivers: its type, ``INTR_TYPE_*`` of :mod:`lasskvm.x86.vmx`, and its vector."""

    kind: int
    vector: int


def is_ia32e_guest(vmcs: Vmcs12) -> bool:
    """Whether L2 will be in IA-32e mode."""
    return vmcs[VmcsField.VM_ENTRY_CONTROLS] & vmx.VM_ENTRY_IA32E_MODE != 0


def is_unrestricted_guest(vmcs: Vmcs12) -> bool:
    """Whether L2 may run in real mode, or without paging."""
    return secondary_controls(vmcs) & vmx.SECONDARY_EXEC_UNRESTRICTED_GUEST != 0


def is_virtual_8086_guest(vmcs: Vmcs12) -> bool:
    """Whether L2 will be in virtual-8086 mode."""
    return vmcs[VmcsField.GUEST_RFLAGS] & RFLAGS_VM != 0


def guest_segment(vmcs: Vmcs12, number: int) -> Segment:
    """Segment register *number* (``x86.registers.ES`` to ``TR``) of L2; attributes with all bits of the field."""
    selector, base, limit, attributes = SEGMENT_FIELDS[number]
    return Segment(vmcs[selector], vmcs[base], vmcs[limit], vmcs[attributes])


def guest_pdptes(vmcs: Vmcs12, memory: GuestMemory) -> tuple[int, ...] | None:
    """The four PDPTE registers that L2 starts with, or None when it does not use PAE paging.

    With EPT they are in the VMCS, else where CR3 points to in *memory*, L1's.
    """
    if is_ia32e_guest(vmcs) or not vmcs[VmcsField.GUEST_CR0] & CR0_PG:
        return None
    if not vmcs[VmcsField.GUEST_CR4] & CR4_PAE:
        return None
    if secondary_controls(vmcs) & vmx.SECONDARY_EXEC_ENABLE_EPT:
        return tuple(vmcs[field] for field in _PDPTES)
    table = vmcs[VmcsField.GUEST_CR3] & _PDPT_ADDRESS
    return tuple(memory.load(table + _PDPTE_BYTES * number, _PDPTE_BYTES) for number in range(len(_PDPTES)))


def injected_event(vmcs: Vmcs12) -> InjectedEvent | None:
    """The event that VM entry delivers, if there is one."""
    information = vmcs[VmcsField.VM_ENTRY_INTR_INFO_FIELD]
    if not information & vmx.INTR_INFO_VALID_MASK:
        return None
    return InjectedEvent(information & vmx.INTR_INFO_INTR_TYPE_MASK, information & vmx.INTR_INFO_VECTOR_MASK)
