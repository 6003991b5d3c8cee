"""The checks of a VM entry that end in exit reason 33: the state that L2 is to start with.

They come after those of :mod:`lasskvm.vmx.entry_checks`, and :func:`check_guest_state` makes all of them. Each group is
a generator of sentences, one for every rule that the VMCS breaks. *words* is the state of L1, which says what the
processor has: how wide addresses are, which bits of IA32_EFER exist.

CR4.LASS is one of the bits that the fixed-bit registers judge, and has no say in any address: L2 may start at a
supervisor's privilege level with a user address in RIP, and faults at its first fetch. State of control-flow
enforcement is not loaded, so SSP is not looked at.

Source: Intel SDM volume 3C, 27.3.1 (checks on the guest state), 27.8 (qualification of the exit); KVM's
``nested_vmx_check_guest_state()``, which leaves most of them to the processor. The manual leaves the order open; a
check that it lets processors make or not is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lasskvm.emulator import msr_checks
from lasskvm.emulator.control import is_legal_cr3
from lasskvm.emulator.msrs import MSRS
from lasskvm.memory import PAGE_MASK, GuestMemory
from lasskvm.state import CR4_ALLOWED, EFER_ALLOWED, MAXPHYADDR, Words
from lasskvm.vmx.capabilities import VmxCapabilities
from lasskvm.vmx.guest_mode import (
    InjectedEvent,
    guest_pdptes,
    injected_event,
    is_ia32e_guest,
    is_unrestricted_guest,
)
from lasskvm.vmx.guest_segment_checks import segment_dpl, segment_violations
from lasskvm.vmx.vmcs import VMCS12_REVISION, Vmcs12, revision_id
from lasskvm.x86 import vmx
from lasskvm.x86.address import is_canonical, linear_bits
from lasskvm.x86.exceptions import DB, MC
from lasskvm.x86.msr import DEBUGCTL_BTF, MSR_IA32_DEBUGCTL
from lasskvm.x86.paging import pdpte_reserved
from lasskvm.x86.registers import (
    AR_L,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_CET,
    CR4_PAE,
    CR4_PCIDE,
    EFER_LMA,
    EFER_LME,
    RFLAGS_AC,
    RFLAGS_ARITHMETIC,
    RFLAGS_DF,
    RFLAGS_FIXED,
    RFLAGS_ID,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VIF,
    RFLAGS_VIP,
    RFLAGS_VM,
)
from lasskvm.x86.vmx import VmEntryFailure
from lasskvm.x86.vmx_fields import VmcsField

__all__ = [
    "GuestStateViolation",
    "check_guest_state",
    "check_volatile_guest_state",
    "descriptor_table_violations",
    "link_pointer_violations",
    "nmi_violations",
    "non_register_violations",
    "pdpte_violations",
    "register_violations",
    "rip_and_rflags_violations",
]

_LOW_HALF_BITS = 32
_DESCRIPTOR_TABLE_LIMIT = 0xFFFF

_RFLAGS_DEFINED = (
    RFLAGS_FIXED | RFLAGS_ARITHMETIC | RFLAGS_TF | RFLAGS_IF | RFLAGS_DF | RFLAGS_IOPL | RFLAGS_NT | RFLAGS_RF
    | RFLAGS_VM | RFLAGS_AC | RFLAGS_VIF | RFLAGS_VIP | RFLAGS_ID
)  # fmt: skip
_DEBUGCTL_DEFINED = MSRS[MSR_IA32_DEBUGCTL].writable | MSRS[MSR_IA32_DEBUGCTL].ignored

#: Activity states, and the bits of IA32_VMX_MISC that say they are supported. The active state needs none.
_INACTIVE_STATES = {
    vmx.GUEST_ACTIVITY_HLT: vmx.VMX_MISC_ACTIVITY_HLT,
    vmx.GUEST_ACTIVITY_SHUTDOWN: vmx.VMX_MISC_ACTIVITY_SHUTDOWN,
    vmx.GUEST_ACTIVITY_WAIT_SIPI: vmx.VMX_MISC_ACTIVITY_WAIT_SIPI,
}
_SHADOWS = vmx.GUEST_INTR_STATE_STI | vmx.GUEST_INTR_STATE_MOV_SS
_INTERRUPTIBILITY_DEFINED = (
    _SHADOWS | vmx.GUEST_INTR_STATE_SMI | vmx.GUEST_INTR_STATE_NMI | vmx.GUEST_INTR_STATE_ENCLAVE_INTR
)
#: Bus locks and transactional regions, bits 11 and 16, raise no #DB without features that are not offered.
_PENDING_DEBUG_DEFINED = (
    vmx.PENDING_DEBUG_BREAKPOINTS | vmx.PENDING_DEBUG_ENABLED_BREAKPOINT | vmx.PENDING_DEBUG_BS
)


class GuestStateViolation(NamedTuple):
    """Why the guest state is invalid: the exit qualification, and a sentence for people."""

    qualification: VmEntryFailure
    reason: str


def check_guest_state(
    vmcs: Vmcs12, capabilities: VmxCapabilities, memory: GuestMemory, words: Words, current_gpa: int
) -> GuestStateViolation | None:
    """What is wrong with the guest state, or None when L2 may start.

    *memory* is L1's, where the VMCS link pointer and, without EPT, CR3 point to; *current_gpa* is the address of *vmcs*
    in it. Nothing is changed. The controls have been checked.
    """
    lasting = (
        register_violations(vmcs, capabilities, words),
        segment_violations(vmcs, words),
        descriptor_table_violations(vmcs, words),
    )
    for violations in lasting:
        for reason in violations:
            return GuestStateViolation(VmEntryFailure.DEFAULT, reason)
    return check_volatile_guest_state(vmcs, capabilities, memory, words, current_gpa)


def check_volatile_guest_state(
    vmcs: Vmcs12, capabilities: VmxCapabilities, memory: GuestMemory, words: Words, current_gpa: int
) -> GuestStateViolation | None:
    """The part of :func:`check_guest_state` about what changes while a guest runs, or depends on memory."""
    for reason in rip_and_rflags_violations(vmcs, words):
        return GuestStateViolation(VmEntryFailure.DEFAULT, reason)
    if _has_non_register_state(vmcs):
        for reason in non_register_violations(vmcs, capabilities):
            return GuestStateViolation(VmEntryFailure.DEFAULT, reason)
        for reason in nmi_violations(vmcs):
            return GuestStateViolation(VmEntryFailure.NMI, reason)
    for reason in link_pointer_violations(vmcs, memory, words, current_gpa):
        return GuestStateViolation(VmEntryFailure.VMCS_LINK_PTR, reason)
    for reason in pdpte_violations(vmcs, memory, words):
        return GuestStateViolation(VmEntryFailure.PDPTE, reason)
    return None


def _has_non_register_state(vmcs: Vmcs12) -> bool:
    """Whether L2 is anything but active, with nothing blocked, pending, or injected. Then nothing can be wrong."""
    return bool(
        vmcs[VmcsField.GUEST_INTERRUPTIBILITY_INFO]
        or vmcs[VmcsField.GUEST_ACTIVITY_STATE]
        or vmcs[VmcsField.GUEST_PENDING_DBG_EXCEPTIONS]
        or vmcs[VmcsField.VM_ENTRY_INTR_INFO_FIELD] & vmx.INTR_INFO_VALID_MASK
    )


def _injects(vmcs: Vmcs12, kind: int) -> bool:
    event = injected_event(vmcs)
    return event is not None and event.kind == kind


# ------------------------------------------------------------------------------------- control registers and MSRs


def register_violations(vmcs: Vmcs12, capabilities: VmxCapabilities, words: Words) -> Iterator[str]:
    """What is wrong with control registers, debug registers and MSRs (27.3.1.1)."""
    cr0, cr4 = vmcs[VmcsField.GUEST_CR0], vmcs[VmcsField.GUEST_CR4]
    exempt = CR0_PE | CR0_PG if is_unrestricted_guest(vmcs) else 0
    if not capabilities.cr0.allow(cr0, exempt=exempt):
        yield "guest CR0 has bits that VMX operation does not allow"
    if cr0 & CR0_PG and not cr0 & CR0_PE:
        yield "guest CR0 has PG without PE"
    if not capabilities.cr4.allow(cr4):
        yield "guest CR4 has bits that VMX operation does not allow"
    if cr4 & CR4_CET and not cr0 & CR0_WP:
        yield "guest CR4 has CET without CR0.WP"
    if is_ia32e_guest(vmcs):
        if not cr0 & CR0_PG or not cr4 & CR4_PAE:
            yield "IA-32e mode needs paging, and PAE in guest CR4"
    elif cr4 & CR4_PCIDE:
        yield "guest CR4 has PCIDE outside IA-32e mode"
    if not is_legal_cr3(words, vmcs[VmcsField.GUEST_CR3]):
        yield "guest CR3 is beyond physical memory"
    yield from _msr_violations(vmcs, words)


def _msr_violations(vmcs: Vmcs12, words: Words) -> Iterator[str]:
    controls = vmcs[VmcsField.VM_ENTRY_CONTROLS]
    if controls & vmx.VM_ENTRY_LOAD_DEBUG_CONTROLS:
        if vmcs[VmcsField.GUEST_IA32_DEBUGCTL] & ~_DEBUGCTL_DEFINED:
            yield "guest IA32_DEBUGCTL has reserved bits"
        if vmcs[VmcsField.GUEST_DR7] >> _LOW_HALF_BITS:
            yield "guest DR7 has more than 32 bits"
    for address in (VmcsField.GUEST_SYSENTER_ESP, VmcsField.GUEST_SYSENTER_EIP):
        if not is_canonical(vmcs[address], linear_bits(words[CR4_ALLOWED])):
            yield "a guest SYSENTER address is not canonical"
    if controls & vmx.VM_ENTRY_LOAD_IA32_PAT and not msr_checks.pat(words, vmcs[VmcsField.GUEST_IA32_PAT]):
        yield "guest IA32_PAT has a memory type that does not exist"
    if controls & vmx.VM_ENTRY_LOAD_IA32_EFER:
        efer = vmcs[VmcsField.GUEST_IA32_EFER]
        active, enabled = efer & EFER_LMA != 0, efer & EFER_LME != 0
        if efer & ~words[EFER_ALLOWED]:
            yield "guest IA32_EFER has reserved bits"
        if active != is_ia32e_guest(vmcs):
            yield "guest IA32_EFER has another mode than the controls"
        if vmcs[VmcsField.GUEST_CR0] & CR0_PG and active != enabled:
            yield "guest IA32_EFER has LMA and LME apart while paging is on"


# ----------------------------------------------------------------------------- descriptor tables, RIP and RFLAGS


def descriptor_table_violations(vmcs: Vmcs12, words: Words) -> Iterator[str]:
    """What is wrong with GDTR and IDTR (27.3.1.3)."""
    for name, base, limit in (
        ("GDTR", VmcsField.GUEST_GDTR_BASE, VmcsField.GUEST_GDTR_LIMIT),
        ("IDTR", VmcsField.GUEST_IDTR_BASE, VmcsField.GUEST_IDTR_LIMIT),
    ):
        if not is_canonical(vmcs[base], linear_bits(words[CR4_ALLOWED])):
            yield f"the base of guest {name} is not canonical"
        if vmcs[limit] > _DESCRIPTOR_TABLE_LIMIT:
            yield f"the limit of guest {name} has more than 16 bits"


def rip_and_rflags_violations(vmcs: Vmcs12, words: Words) -> Iterator[str]:
    """What is wrong with RIP and RFLAGS (27.3.1.4)."""
    rip, rflags = vmcs[VmcsField.GUEST_RIP], vmcs[VmcsField.GUEST_RFLAGS]
    if not is_ia32e_guest(vmcs) or not vmcs[VmcsField.GUEST_CS_AR_BYTES] & AR_L:
        if rip >> _LOW_HALF_BITS:
            yield "guest RIP has more than 32 bits outside 64-bit mode"
    # One bit more than a canonical address has: L2 may have run off the end of the lower half, and faults there.
    elif not is_canonical(rip, linear_bits(words[CR4_ALLOWED]) + 1):
        yield "guest RIP has more bits than linear addresses have"
    if rflags & ~_RFLAGS_DEFINED or not rflags & RFLAGS_FIXED:
        yield "guest RFLAGS has reserved bits, or lacks bit 1"
    if rflags & RFLAGS_VM and (is_ia32e_guest(vmcs) or not vmcs[VmcsField.GUEST_CR0] & CR0_PE):
        yield "guest RFLAGS has VM in IA-32e mode or without CR0.PE"
    if _injects(vmcs, vmx.INTR_TYPE_EXT_INTR) and not rflags & RFLAGS_IF:
        yield "an interrupt is to be injected while guest RFLAGS.IF is 0"


# ------------------------------------------------------------------------------------------- non-register state


def non_register_violations(vmcs: Vmcs12, capabilities: VmxCapabilities) -> Iterator[str]:
    """What is wrong with activity, interruptibility and pending debug exceptions (27.3.1.5)."""
    yield from _activity_violations(vmcs, capabilities)
    yield from _interruptibility_violations(vmcs, capabilities)
    yield from _pending_debug_violations(vmcs)


def _activity_violations(vmcs: Vmcs12, capabilities: VmxCapabilities) -> Iterator[str]:
    activity = vmcs[VmcsField.GUEST_ACTIVITY_STATE]
    if activity == vmx.GUEST_ACTIVITY_ACTIVE:
        return
    if not capabilities.misc & _INACTIVE_STATES.get(activity, 0):
        yield "the activity state is not supported"
    if activity == vmx.GUEST_ACTIVITY_HLT and segment_dpl(vmcs[VmcsField.GUEST_SS_AR_BYTES]):
        yield "the guest has halted at a privilege level that cannot"
    if vmcs[VmcsField.GUEST_INTERRUPTIBILITY_INFO] & _SHADOWS:
        yield "the guest is not active in the shadow of an instruction"
    event = injected_event(vmcs)
    if event is not None and not _gets_through(activity, event):
        yield "the activity state blocks the event to inject"


def _gets_through(activity: int, event: InjectedEvent) -> bool:
    """Whether *event* can happen in an *activity* state other than active."""
    kind, vector = event
    is_machine_check = kind == vmx.INTR_TYPE_HARD_EXCEPTION and vector == MC
    if activity == vmx.GUEST_ACTIVITY_SHUTDOWN:
        return kind == vmx.INTR_TYPE_NMI_INTR or is_machine_check
    if activity != vmx.GUEST_ACTIVITY_HLT:
        return False
    if kind == vmx.INTR_TYPE_OTHER_EVENT:
        return vector == 0
    is_debug_exception = kind == vmx.INTR_TYPE_HARD_EXCEPTION and vector == DB
    return kind in (vmx.INTR_TYPE_EXT_INTR, vmx.INTR_TYPE_NMI_INTR) or is_debug_exception or is_machine_check


def _interruptibility_violations(vmcs: Vmcs12, capabilities: VmxCapabilities) -> Iterator[str]:
    blocking = vmcs[VmcsField.GUEST_INTERRUPTIBILITY_INFO]
    if blocking & ~_INTERRUPTIBILITY_DEFINED:
        yield "reserved bits of the interruptibility state are set"
    if blocking & _SHADOWS == _SHADOWS:
        yield "STI and MOV SS cannot both be blocking"
    if blocking & vmx.GUEST_INTR_STATE_STI and not vmcs[VmcsField.GUEST_RFLAGS] & RFLAGS_IF:
        yield "STI is blocking while guest RFLAGS.IF is 0"
    if blocking & _SHADOWS and _injects(vmcs, vmx.INTR_TYPE_EXT_INTR):
        yield "an interrupt is to be injected into the shadow of an instruction"
    if _injects(vmcs, vmx.INTR_TYPE_NMI_INTR):
        if blocking & vmx.GUEST_INTR_STATE_MOV_SS:
            yield "an NMI is to be injected into the shadow of MOV SS"
        virtual_nmis = vmcs[VmcsField.PIN_BASED_VM_EXEC_CONTROL] & vmx.PIN_BASED_VIRTUAL_NMIS
        if virtual_nmis and blocking & vmx.GUEST_INTR_STATE_NMI:
            yield "an NMI is to be injected while virtual NMIs are blocked"
    if blocking & vmx.GUEST_INTR_STATE_SMI:
        yield "SMIs are blocked outside SMM"
    if blocking & vmx.GUEST_INTR_STATE_ENCLAVE_INTR:
        # The control is there exactly when SGX is.
        if not capabilities.secondary.may_be_1 & vmx.SECONDARY_EXEC_ENCLS_EXITING:
            yield "an enclave is interrupted, and there are no enclaves"
        if blocking & vmx.GUEST_INTR_STATE_MOV_SS:
            yield "an enclave is interrupted in the shadow of MOV SS, which it cannot execute"


def _pending_debug_violations(vmcs: Vmcs12) -> Iterator[str]:
    pending = vmcs[VmcsField.GUEST_PENDING_DBG_EXCEPTIONS]
    if pending & ~_PENDING_DEBUG_DEFINED:
        yield "reserved bits of the pending debug exceptions are set"
    # Without a shadow and without HLT nothing holds a single step back, and L2 may start with one or without.
    holds_back = (
        vmcs[VmcsField.GUEST_INTERRUPTIBILITY_INFO] & _SHADOWS
        or vmcs[VmcsField.GUEST_ACTIVITY_STATE] == vmx.GUEST_ACTIVITY_HLT
    )
    single_steps = vmcs[VmcsField.GUEST_RFLAGS] & RFLAGS_TF != 0
    steps_branches = vmcs[VmcsField.GUEST_IA32_DEBUGCTL] & DEBUGCTL_BTF != 0
    if holds_back and (single_steps and not steps_branches) != (pending & vmx.PENDING_DEBUG_BS != 0):
        yield "the pending single step does not agree with guest RFLAGS.TF and IA32_DEBUGCTL.BTF"


def nmi_violations(vmcs: Vmcs12) -> Iterator[str]:
    """Whether an NMI is to be injected into the shadow of STI (27.3.1.5), which processors may allow or not."""
    blocking = vmcs[VmcsField.GUEST_INTERRUPTIBILITY_INFO]
    if blocking & vmx.GUEST_INTR_STATE_STI and _injects(vmcs, vmx.INTR_TYPE_NMI_INTR):
        yield "an NMI is to be injected into the shadow of STI"


def link_pointer_violations(
    vmcs: Vmcs12, memory: GuestMemory, words: Words, current_gpa: int
) -> Iterator[str]:
    """What is wrong with the VMCS link pointer (27.3.1.5); *current_gpa* is where *vmcs* is."""
    pointer = vmcs[VmcsField.VMCS_LINK_POINTER]
    if pointer == vmx.VMCS_NO_POINTER:
        return
    if pointer & PAGE_MASK or pointer >> words[MAXPHYADDR]:
        yield "the VMCS link pointer is not the address of a page"
    # Without VMCS shadowing, a shadow VMCS is not what it may point to: bit 31 is compared with the rest.
    elif revision_id(memory, pointer) != VMCS12_REVISION:
        yield "the VMCS link pointer does not point to a VMCS"
    if pointer == current_gpa:
        yield "the VMCS link pointer points to the current VMCS"


def pdpte_violations(vmcs: Vmcs12, memory: GuestMemory, words: Words) -> Iterator[str]:
    """What is wrong with the PDPTEs (27.3.1.6), as when MOV to CR3 loads them."""
    for number, pdpte in enumerate(guest_pdptes(vmcs, memory) or ()):
        if pdpte_reserved(pdpte, words[MAXPHYADDR]):
            yield f"guest PDPTE {number} has reserved bits"
