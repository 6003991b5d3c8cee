"""The lists of MSRs that VM entry loads, and VM exit stores and loads.

A list is an array of 16-byte entries in L1's memory: index, four reserved bytes, value. A failure is told by the number
of the entry, 1 for the first; what stands before it has happened.

Source: Intel SDM volume 3C, 25.7.2 (format), 27.4 (loading on VM entry), 28.4 (saving), 28.6 (loading on VM exit);
KVM's ``nested_vmx_load_msr()`` and ``nested_vmx_store_msr()``.
"""

from __future__ import annotations

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.msrs import read_msr, write_msr
from lasskvm.x86 import msr
from lasskvm.x86.vmx import VMX_MSR_ENTRY_BYTES, VMX_MSR_ENTRY_RESERVED, VMX_MSR_ENTRY_VALUE

__all__ = ["load_msrs", "store_msrs"]

_VALUE_BYTES = 8
#: Microcode is not updated in passing. (MSRs of SMM, which are refused too, do not exist here.)
_REFUSED = frozenset((msr.MSR_IA32_BIOS_UPDT_TRIG, msr.MSR_IA32_BIOS_SIGN_ID))
#: Bases that the guest-state and host-state areas load.
_NOT_LOADED = _REFUSED | {msr.MSR_IA32_FS_BASE, msr.MSR_IA32_GS_BASE}


def load_msrs(ctx: Emulation, gpa: int, count: int, limit: int) -> int:
    """Load the *count* MSRs of the list at *gpa*: 0, or the number of the entry that fails.

    An entry fails where WRMSR at CPL 0 would be #GP(0) in the state that has been loaded before, and for registers that
    lists are not for. *limit* is how long the processor lets a list be; the first entry beyond it fails.
    """
    for number in range(1, count + 1):
        index, reserved, value = _entry(ctx, gpa + (number - 1) * VMX_MSR_ENTRY_BYTES)
        if number > limit or reserved or not _is_permitted(ctx, index, is_write=True):
            return number
        try:
            write_msr(ctx, index, value)
        except GuestFault:
            return number
    return 0


def store_msrs(ctx: Emulation, gpa: int, count: int, limit: int) -> int:
    """Store the *count* MSRs of the list at *gpa* into it: 0, or the number of the entry that fails.

    The same as :func:`load_msrs` with RDMSR, but for the bases of FS and GS, which can be stored.
    """
    for number in range(1, count + 1):
        place = gpa + (number - 1) * VMX_MSR_ENTRY_BYTES
        index, reserved, _ = _entry(ctx, place)
        if number > limit or reserved or not _is_permitted(ctx, index, is_write=False):
            return number
        try:
            value = read_msr(ctx, index)
        except GuestFault:
            return number
        ctx.memory.store(place + VMX_MSR_ENTRY_VALUE, _VALUE_BYTES, value)
    return 0


def _entry(ctx: Emulation, gpa: int) -> tuple[int, int, int]:
    """Index, reserved bytes and value; where there is no memory, the reserved bytes are not 0."""
    data = ctx.memory.read(gpa, VMX_MSR_ENTRY_BYTES)
    index, reserved = data[:VMX_MSR_ENTRY_RESERVED], data[VMX_MSR_ENTRY_RESERVED:VMX_MSR_ENTRY_VALUE]
    return (
        int.from_bytes(index, "little"),
        int.from_bytes(reserved, "little"),
        int.from_bytes(data[VMX_MSR_ENTRY_VALUE:], "little"),
    )


def _is_permitted(ctx: Emulation, index: int, *, is_write: bool) -> bool:
    """Whether a list may have MSR *index*; what the VMM filters, it may not."""
    if index in (_NOT_LOADED if is_write else _REFUSED):
        return False
    if msr.MSR_IA32_X2APIC_FIRST <= index <= msr.MSR_IA32_X2APIC_LAST:
        return False
    return ctx.msr_permission is None or ctx.msr_permission(index, is_write)
