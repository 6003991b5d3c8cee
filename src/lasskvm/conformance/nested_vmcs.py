"""The VMCS that L1 writes for a case: VMCS fields and their values, by the capability MSRs of the provider.

Controls are what the case wants and what the processor insists on. A control that the provider does not offer makes the
case impossible there: :class:`~lasskvm.conformance.testbed.NotOfferedError`.
"""

from __future__ import annotations

from collections.abc import Mapping

from lasskvm.conformance import nested_layout as place
from lasskvm.conformance.nested import Nested
from lasskvm.conformance.testbed import NotOfferedError
from lasskvm.kvm.structures import Regs, Segment, Sregs
from lasskvm.memory import GuestMemory
from lasskvm.x86 import msr, vmx
from lasskvm.x86.registers import CR0_PG, DR7_FIXED, EFER_LMA, MASK32
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["CAPABILITY_MSRS", "OBSERVED", "changed_by_entry_and_exit", "guest_pdptes", "vmcs_fields"]

#: What :func:`vmcs_fields` has to know, as KVM_GET_MSRS gives it.
CAPABILITY_MSRS = (
    msr.MSR_IA32_VMX_BASIC, msr.MSR_IA32_VMX_TRUE_PINBASED_CTLS, msr.MSR_IA32_VMX_TRUE_PROCBASED_CTLS,
    msr.MSR_IA32_VMX_PROCBASED_CTLS2, msr.MSR_IA32_VMX_TRUE_EXIT_CTLS, msr.MSR_IA32_VMX_TRUE_ENTRY_CTLS,
)  # fmt: skip
#: What is looked at behind a VM exit.
OBSERVED = (
    VmcsField.VM_INSTRUCTION_ERROR, VmcsField.VM_EXIT_REASON, VmcsField.EXIT_QUALIFICATION,
    VmcsField.VM_EXIT_INTR_INFO, VmcsField.VM_EXIT_INTR_ERROR_CODE, VmcsField.IDT_VECTORING_INFO_FIELD,
    VmcsField.IDT_VECTORING_ERROR_CODE, VmcsField.VM_EXIT_INSTRUCTION_LEN, VmcsField.GUEST_LINEAR_ADDRESS,
    VmcsField.GUEST_PHYSICAL_ADDRESS, VmcsField.GUEST_RIP, VmcsField.GUEST_RSP, VmcsField.GUEST_RFLAGS,
    VmcsField.GUEST_CR0, VmcsField.GUEST_CR4, VmcsField.GUEST_IA32_EFER, VmcsField.GUEST_CS_SELECTOR,
    VmcsField.GUEST_CS_BASE, VmcsField.GUEST_SS_SELECTOR, VmcsField.GUEST_SS_BASE,
)  # fmt: skip

_SEGMENTS = {
    "ES": "es", "CS": "cs", "SS": "ss", "DS": "ds", "FS": "fs", "GS": "gs", "LDTR": "ldt", "TR": "tr",
}  # fmt: skip
#: MSR-bitmap and HLT exits: L1 is to see L2's end, and nothing that is not about the case.
_PRIMARY = vmx.CPU_BASED_HLT_EXITING | vmx.CPU_BASED_USE_MSR_BITMAPS
_SECONDARY = vmx.SECONDARY_EXEC_ENABLE_INVPCID
_VM_EXIT = vmx.VM_EXIT_HOST_ADDR_SPACE_SIZE | vmx.VM_EXIT_SAVE_IA32_EFER | vmx.VM_EXIT_LOAD_IA32_EFER
_VM_ENTRY = vmx.VM_ENTRY_LOAD_IA32_EFER
#: Fields that are 0 unless a case says otherwise.
_ZERO = (
    VmcsField.PAGE_FAULT_ERROR_CODE_MASK, VmcsField.PAGE_FAULT_ERROR_CODE_MATCH, VmcsField.CR3_TARGET_COUNT,
    VmcsField.VM_EXIT_MSR_STORE_COUNT, VmcsField.VM_EXIT_MSR_LOAD_COUNT, VmcsField.VM_ENTRY_MSR_LOAD_COUNT,
    VmcsField.VM_ENTRY_INTR_INFO_FIELD, VmcsField.VM_ENTRY_EXCEPTION_ERROR_CODE,
    VmcsField.VM_ENTRY_INSTRUCTION_LEN, VmcsField.CR0_GUEST_HOST_MASK, VmcsField.CR0_READ_SHADOW,
    VmcsField.GUEST_INTERRUPTIBILITY_INFO, VmcsField.GUEST_ACTIVITY_STATE, VmcsField.GUEST_PENDING_DBG_EXCEPTIONS,
    VmcsField.GUEST_IA32_DEBUGCTL, VmcsField.GUEST_SYSENTER_CS, VmcsField.GUEST_SYSENTER_ESP,
    VmcsField.GUEST_SYSENTER_EIP, VmcsField.HOST_IA32_SYSENTER_CS, VmcsField.HOST_IA32_SYSENTER_ESP,
    VmcsField.HOST_IA32_SYSENTER_EIP,
)  # fmt: skip
_GUEST_FIELDS = tuple(field for name, field in VmcsField.__members__.items() if name.startswith("GUEST_"))
_PAE_PDPTES = 4


def vmcs_fields(
    nested: Nested,
    capabilities: Mapping[int, int],
    host: Sregs,
    guest: Sregs,
    regs: Regs,
    eptp: int,
    exit_rip: int,
) -> dict[VmcsField, int]:
    """All fields of the VMCS for L2 with *guest* and *regs*, and L1 with *host*, which exits come to at *exit_rip*.

    *eptp* is the EPT pointer, where L1 uses EPT.
    """
    found = dict.fromkeys(_ZERO, 0)
    found |= (
        _controls(nested, capabilities, guest, eptp) | _host_state(host, exit_rip) | _guest_state(guest, regs)
    )
    return {**found, **nested.fields}


def changed_by_entry_and_exit() -> tuple[VmcsField, ...]:
    """The fields that a VM entry and the exit behind it may change."""
    return (*_GUEST_FIELDS, VmcsField.VM_ENTRY_CONTROLS, VmcsField.VM_ENTRY_INTR_INFO_FIELD)


def guest_pdptes(memory: GuestMemory, cr3: int) -> dict[VmcsField, int]:
    """The PDPTE fields, which L2 with PAE paging and EPT takes its PDPTEs from."""
    return {
        VmcsField[f"GUEST_PDPTR{number}"]: memory.load(cr3 + 8 * number, 8) for number in range(_PAE_PDPTES)
    }


def _controls(
    nested: Nested, capabilities: Mapping[int, int], guest: Sregs, eptp: int
) -> dict[VmcsField, int]:
    secondary = nested.secondary | (_SECONDARY & capabilities.get(msr.MSR_IA32_VMX_PROCBASED_CTLS2, 0) >> 32)
    found: dict[VmcsField, int] = {}
    if nested.ept is not None:
        secondary |= vmx.SECONDARY_EXEC_ENABLE_EPT
        found[VmcsField.EPT_POINTER] = eptp
    if nested.vpid:
        secondary |= vmx.SECONDARY_EXEC_ENABLE_VPID
        found[VmcsField.VIRTUAL_PROCESSOR_ID] = nested.vpid
    if not guest.cr0 & CR0_PG:
        secondary |= vmx.SECONDARY_EXEC_UNRESTRICTED_GUEST
    primary = _PRIMARY
    if secondary:
        primary |= vmx.CPU_BASED_ACTIVATE_SECONDARY_CONTROLS
        index = msr.MSR_IA32_VMX_PROCBASED_CTLS2
        found[VmcsField.SECONDARY_VM_EXEC_CONTROL] = _allowed(capabilities, index, secondary)
    entry = _VM_ENTRY | (vmx.VM_ENTRY_IA32E_MODE if guest.efer & EFER_LMA else 0)
    return found | {
        VmcsField.PIN_BASED_VM_EXEC_CONTROL: _allowed(capabilities, msr.MSR_IA32_VMX_TRUE_PINBASED_CTLS, 0),
        VmcsField.CPU_BASED_VM_EXEC_CONTROL: _allowed(
            capabilities, msr.MSR_IA32_VMX_TRUE_PROCBASED_CTLS, primary
        ),
        VmcsField.VM_EXIT_CONTROLS: _allowed(capabilities, msr.MSR_IA32_VMX_TRUE_EXIT_CTLS, _VM_EXIT),
        VmcsField.VM_ENTRY_CONTROLS: _allowed(capabilities, msr.MSR_IA32_VMX_TRUE_ENTRY_CTLS, entry),
        VmcsField.MSR_BITMAP: place.MSR_BITMAP_GPA,
        VmcsField.EXCEPTION_BITMAP: nested.exceptions,
        VmcsField.CR4_GUEST_HOST_MASK: nested.cr4_mask,
        VmcsField.CR4_READ_SHADOW: nested.cr4_shadow,
        VmcsField.VMCS_LINK_POINTER: vmx.VMCS_NO_POINTER,
    }


def _allowed(capabilities: Mapping[int, int], index: int, wanted: int) -> int:
    """*wanted* with the bits that must be 1."""
    value = capabilities.get(index, 0)
    missing = wanted & ~(value >> vmx.CONTROL_MSR_MAY_BE_1_SHIFT)
    if missing:
        raise NotOfferedError(f"the VMX of this provider lacks the controls {missing:#x} of MSR {index:#x}")
    return wanted | value & MASK32


def _host_state(host: Sregs, exit_rip: int) -> dict[VmcsField, int]:
    selectors = {
        VmcsField[f"HOST_{name}_SELECTOR"]: _segment(host, name).selector
        for name in _SEGMENTS
        if name != "LDTR"
    }
    return selectors | {
        VmcsField.HOST_CR0: host.cr0, VmcsField.HOST_CR3: host.cr3, VmcsField.HOST_CR4: host.cr4,
        VmcsField.HOST_FS_BASE: host.fs.base, VmcsField.HOST_GS_BASE: host.gs.base,
        VmcsField.HOST_TR_BASE: host.tr.base,
        VmcsField.HOST_GDTR_BASE: host.gdt.base, VmcsField.HOST_IDTR_BASE: host.idt.base,
        VmcsField.HOST_IA32_EFER: host.efer, VmcsField.HOST_RSP: place.STACK_TOP, VmcsField.HOST_RIP: exit_rip,
    }  # fmt: skip


def _guest_state(guest: Sregs, regs: Regs) -> dict[VmcsField, int]:
    found = {}
    for name in _SEGMENTS:
        segment = _segment(guest, name)
        found[VmcsField[f"GUEST_{name}_SELECTOR"]] = segment.selector
        found[VmcsField[f"GUEST_{name}_BASE"]] = segment.base
        found[VmcsField[f"GUEST_{name}_LIMIT"]] = segment.limit
        found[VmcsField[f"GUEST_{name}_AR_BYTES"]] = segment.attributes
    return found | {
        VmcsField.GUEST_CR0: guest.cr0, VmcsField.GUEST_CR3: guest.cr3, VmcsField.GUEST_CR4: guest.cr4,
        VmcsField.GUEST_GDTR_BASE: guest.gdt.base, VmcsField.GUEST_GDTR_LIMIT: guest.gdt.limit,
        VmcsField.GUEST_IDTR_BASE: guest.idt.base, VmcsField.GUEST_IDTR_LIMIT: guest.idt.limit,
        VmcsField.GUEST_IA32_EFER: guest.efer, VmcsField.GUEST_DR7: DR7_FIXED,
        VmcsField.GUEST_RIP: regs.rip, VmcsField.GUEST_RSP: regs.rsp, VmcsField.GUEST_RFLAGS: regs.rflags,
    }  # fmt: skip


def _segment(sregs: Sregs, name: str) -> Segment:
    segment = getattr(sregs, _SEGMENTS[name])
    assert isinstance(segment, Segment)
    return segment
