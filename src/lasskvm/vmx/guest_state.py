"""Guest state between a VMCS and the state words: what VM entry loads and VM exit saves.

The access rights of a VMCS and the attributes of a segment in the state words are the same bits. CR2, DR0 to DR3, DR6
and the general-purpose registers but RSP are in no VMCS: L1 and L2 share them.

Source: Intel SDM volume 3C, 27.3.2 (loading guest state), 27.7.1 and 27.7.2 (interruptibility and activity state), 28.3
(saving guest state); KVM's ``prepare_vmcs02()`` and ``sync_vmcs02_to_vmcs12()``.
"""

from __future__ import annotations

from lasskvm import state as s
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.control import load_pdptes
from lasskvm.emulator.delivery import EXCEPTION, EXTERNAL, SOFTWARE, pushed_flags
from lasskvm.emulator.msrs import MSRS
from lasskvm.state import Words, segment_word
from lasskvm.vmx.entry_checks import secondary_controls
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.injection import is_vectoring
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import registers as r
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import DB
from lasskvm.x86.msr import MSR_IA32_DEBUGCTL
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["CR0_UNCHANGED", "load_guest_state", "save_guest_state", "uses_pae_paging"]

#: What neither VM entry nor VM exit changes in CR0: ET, NW, CD, and the reserved bits.
CR0_UNCHANGED = r.MASK64 & ~(
    r.CR0_PE | r.CR0_MP | r.CR0_EM | r.CR0_TS | r.CR0_NE | r.CR0_WP | r.CR0_AM | r.CR0_PG
)
#: Bits of DR7 that are always 0: RTM, which needs a feature that is not virtualized, 12, 14 and 15.
_DR7_ZEROS = 1 << 11 | 1 << 12 | 3 << 14
_PDPTES = (VmcsField.GUEST_PDPTR0, VmcsField.GUEST_PDPTR1, VmcsField.GUEST_PDPTR2, VmcsField.GUEST_PDPTR3)

#: Fields that are loaded and saved as they are, and their state words.
_PLAIN_FIELDS = {
    VmcsField.GUEST_CR3: s.CR3,
    VmcsField.GUEST_CR4: s.CR4,
    VmcsField.GUEST_RSP: s.RSP,
    VmcsField.GUEST_RIP: s.RIP,
    VmcsField.GUEST_GDTR_BASE: s.GDT_BASE,
    VmcsField.GUEST_GDTR_LIMIT: s.GDT_LIMIT,
    VmcsField.GUEST_IDTR_BASE: s.IDT_BASE,
    VmcsField.GUEST_IDTR_LIMIT: s.IDT_LIMIT,
    VmcsField.GUEST_SYSENTER_CS: s.SYSENTER_CS,
    VmcsField.GUEST_SYSENTER_ESP: s.SYSENTER_ESP,
    VmcsField.GUEST_SYSENTER_EIP: s.SYSENTER_EIP,
}
#: Segment registers, and the fields of selector, base, limit and access rights.
_SEGMENT_FIELDS = {
    r.ES: (
        VmcsField.GUEST_ES_SELECTOR, VmcsField.GUEST_ES_BASE, VmcsField.GUEST_ES_LIMIT,
        VmcsField.GUEST_ES_AR_BYTES,
    ),
    r.CS: (
        VmcsField.GUEST_CS_SELECTOR, VmcsField.GUEST_CS_BASE, VmcsField.GUEST_CS_LIMIT,
        VmcsField.GUEST_CS_AR_BYTES,
    ),
    r.SS: (
        VmcsField.GUEST_SS_SELECTOR, VmcsField.GUEST_SS_BASE, VmcsField.GUEST_SS_LIMIT,
        VmcsField.GUEST_SS_AR_BYTES,
    ),
    r.DS: (
        VmcsField.GUEST_DS_SELECTOR, VmcsField.GUEST_DS_BASE, VmcsField.GUEST_DS_LIMIT,
        VmcsField.GUEST_DS_AR_BYTES,
    ),
    r.FS: (
        VmcsField.GUEST_FS_SELECTOR, VmcsField.GUEST_FS_BASE, VmcsField.GUEST_FS_LIMIT,
        VmcsField.GUEST_FS_AR_BYTES,
    ),
    r.GS: (
        VmcsField.GUEST_GS_SELECTOR, VmcsField.GUEST_GS_BASE, VmcsField.GUEST_GS_LIMIT,
        VmcsField.GUEST_GS_AR_BYTES,
    ),
    r.LDTR: (
        VmcsField.GUEST_LDTR_SELECTOR, VmcsField.GUEST_LDTR_BASE, VmcsField.GUEST_LDTR_LIMIT,
        VmcsField.GUEST_LDTR_AR_BYTES,
    ),
    r.TR: (
        VmcsField.GUEST_TR_SELECTOR, VmcsField.GUEST_TR_BASE, VmcsField.GUEST_TR_LIMIT,
        VmcsField.GUEST_TR_AR_BYTES,
    ),
}  # fmt: skip
#: Their bases have 32 bits, in use or not.
_SEGMENTS_WITH_32BIT_BASES = (r.ES, r.SS, r.DS)

#: What exits at an instruction boundary, where RFLAGS.RF is saved as it is. All other exits with a basic reason that
#: :func:`_saved_rflags` does not name are those of instructions.
_BOUNDARY_EXITS = frozenset(
    (
        ExitReason.EXTERNAL_INTERRUPT,
        ExitReason.TRIPLE_FAULT,
        ExitReason.INIT_SIGNAL,
        ExitReason.SIPI_SIGNAL,
        ExitReason.INTERRUPT_WINDOW,
        ExitReason.NMI_WINDOW,
        ExitReason.MONITOR_TRAP_FLAG,
        ExitReason.TPR_BELOW_THRESHOLD,
        ExitReason.PREEMPTION_TIMER,
    )
)
#: These save debug exceptions that are pending at the boundary.
_DEBUG_SAVING_EXITS = frozenset(
    (ExitReason.INIT_SIGNAL, ExitReason.MONITOR_TRAP_FLAG, ExitReason.TPR_BELOW_THRESHOLD)
)
#: Kinds of delivery, which decide on RF in the RFLAGS image, by interruption type.
_DELIVERY_KINDS = {
    vmx.INTR_TYPE_EXT_INTR: EXTERNAL,
    vmx.INTR_TYPE_NMI_INTR: EXTERNAL,
    vmx.INTR_TYPE_HARD_EXCEPTION: EXCEPTION,
    vmx.INTR_TYPE_SOFT_INTR: SOFTWARE,
    vmx.INTR_TYPE_PRIV_SW_EXCEPTION: EXCEPTION,
    vmx.INTR_TYPE_SOFT_EXCEPTION: SOFTWARE,
}


def uses_pae_paging(words: Words) -> bool:
    """Whether the PDPTE registers are in use: PAE paging outside IA-32e mode."""
    is_pae = words[s.CR0] & r.CR0_PG and words[s.CR4] & r.CR4_PAE
    return bool(is_pae and not words[s.EFER] & r.EFER_LMA)


# -------------------------------------------------------------------------------------------------------- loading


def load_guest_state(ctx: Emulation, vmcs: Vmcs12) -> None:
    """Make L2 of *vmcs*, whose guest state has been found right, the running state (27.3.2).

    The activity state is ``ctx.halted``. The event to inject, pending debug exceptions and the MSR list are for others;
    with an event the interrupt shadow and HLT are over.
    """
    words = ctx.words
    words[s.CR0] = words[s.CR0] & CR0_UNCHANGED | vmcs[VmcsField.GUEST_CR0] & ~CR0_UNCHANGED
    for field, word in _PLAIN_FIELDS.items():
        words[word] = vmcs[field]
    words[s.RFLAGS] = vmcs[VmcsField.GUEST_RFLAGS]
    _load_controlled_registers(ctx, vmcs)
    _load_segments(words, vmcs)
    if uses_pae_paging(words):
        _load_guest_pdptes(ctx, vmcs)
    _load_non_register_state(ctx, vmcs)
    words[s.TLB_FLUSH] = 1


def _load_controlled_registers(ctx: Emulation, vmcs: Vmcs12) -> None:
    """DR7, IA32_DEBUGCTL, IA32_PAT, IA32_EFER: by the VM-entry controls."""
    words, controls = ctx.words, vmcs[VmcsField.VM_ENTRY_CONTROLS]
    if controls & vmx.VM_ENTRY_LOAD_DEBUG_CONTROLS:
        words[s.DR7] = vmcs[VmcsField.GUEST_DR7] & ~_DR7_ZEROS | r.DR7_FIXED
        # Bits that do not stick when WRMSR writes them do not stick here.
        kept = MSRS[MSR_IA32_DEBUGCTL].writable
        ctx.msrs.values[MSR_IA32_DEBUGCTL] = vmcs[VmcsField.GUEST_IA32_DEBUGCTL] & kept
    if controls & vmx.VM_ENTRY_LOAD_IA32_PAT:
        words[s.PAT] = vmcs[VmcsField.GUEST_IA32_PAT]
    if controls & vmx.VM_ENTRY_LOAD_IA32_EFER:
        words[s.EFER] = vmcs[VmcsField.GUEST_IA32_EFER]
    else:
        ia32e = controls & vmx.VM_ENTRY_IA32E_MODE != 0
        # Without paging, only an unrestricted guest, LME may be set while LMA is not: it stays.
        modified = r.EFER_LMA | r.EFER_LME if words[s.CR0] & r.CR0_PG else r.EFER_LMA
        words[s.EFER] = words[s.EFER] & ~modified | modified * ia32e


def _load_segments(words: Words, vmcs: Vmcs12) -> None:
    for number, (selector, base, limit, access_rights) in _SEGMENT_FIELDS.items():
        attributes = vmcs[access_rights] & vmx.SEGMENT_AR_WRITABLE
        address = vmcs[base]
        if number in _SEGMENTS_WITH_32BIT_BASES:
            address &= r.MASK32
        elif number == r.LDTR and attributes & r.AR_UNUSABLE:
            # Anything canonical: VM entry has not looked at it.
            address = 0
        words[segment_word(number, s.SELECTOR)] = vmcs[selector]
        words[segment_word(number, s.BASE)] = address
        words[segment_word(number, s.LIMIT)] = vmcs[limit]
        words[segment_word(number, s.ATTRIBUTES)] = attributes
    words[s.CPL] = (vmcs[VmcsField.GUEST_SS_AR_BYTES] & r.AR_DPL) >> r.AR_DPL_SHIFT


def _load_guest_pdptes(ctx: Emulation, vmcs: Vmcs12) -> None:
    """The PDPTE registers: from the VMCS with EPT, else from the table, which the checks have found right."""
    words = ctx.words
    if secondary_controls(vmcs) & vmx.SECONDARY_EXEC_ENABLE_EPT:
        for number, field in enumerate(_PDPTES):
            words[s.PDPTR0 + number] = vmcs[field]
    else:
        load_pdptes(words, ctx.memory, words[s.CR3])


def _load_non_register_state(ctx: Emulation, vmcs: Vmcs12) -> None:
    """What is blocked, and whether L2 is halted (27.7.1, 27.7.2).

    NMI_BLOCKED is about virtual NMIs when there are any: physical ones all exit then, and are never blocked.
    """
    words, blocking = ctx.words, vmcs[VmcsField.GUEST_INTERRUPTIBILITY_INFO]
    words[s.NMI_BLOCKED] = int(blocking & vmx.GUEST_INTR_STATE_NMI != 0)
    if is_vectoring(vmcs):
        words[s.INTERRUPT_SHADOW], ctx.halted = 0, False
        return
    shadow = blocking & (vmx.GUEST_INTR_STATE_STI | vmx.GUEST_INTR_STATE_MOV_SS)
    words[s.INTERRUPT_SHADOW] = int(shadow != 0)
    ctx.halted = vmcs[VmcsField.GUEST_ACTIVITY_STATE] == vmx.GUEST_ACTIVITY_HLT


# --------------------------------------------------------------------------------------------------------- saving


def save_guest_state(ctx: Emulation, vmcs: Vmcs12, record: NestedExit, pending_debug: int = 0) -> None:
    """Save the running state, L2's, into *vmcs* for the VM exit *record* (28.3).

    RIP is already what the exit is to show: that of the instruction that exits or faults, or the next one for what
    exits between instructions. *pending_debug* are the debug exceptions (``PENDING_DEBUG_*``) that such an exit finds
    pending; other exits clear them.
    """
    words = ctx.words
    vmcs[VmcsField.GUEST_CR0] = words[s.CR0]
    for field, word in _PLAIN_FIELDS.items():
        vmcs[field] = words[word]
    vmcs[VmcsField.GUEST_RFLAGS] = _saved_rflags(words, record)
    _save_controlled_registers(ctx, vmcs)
    _save_segments(words, vmcs)
    if secondary_controls(vmcs) & vmx.SECONDARY_EXEC_ENABLE_EPT and uses_pae_paging(words):
        for number, field in enumerate(_PDPTES):
            vmcs[field] = words[s.PDPTR0 + number]
    _save_non_register_state(ctx, vmcs, record, pending_debug)


def _saved_rflags(words: Words, record: NestedExit) -> int:
    """RFLAGS, with RF as it would be on the stack behind an event, 0 at an instruction that exits (28.3.3)."""
    rflags = words[s.RFLAGS]
    event = record.interruption_information
    if record.reason in (ExitReason.EPT_VIOLATION, ExitReason.EPT_MISCONFIG, ExitReason.TASK_SWITCH):
        event = record.idt_vectoring_information
    if event & vmx.INTR_INFO_VALID_MASK:
        kind = _DELIVERY_KINDS[event & vmx.INTR_INFO_INTR_TYPE_MASK]
        return pushed_flags(words, event & vmx.INTR_INFO_VECTOR_MASK, kind)
    if record.reason in _BOUNDARY_EXITS:
        return rflags
    if record.reason in (ExitReason.EPT_VIOLATION, ExitReason.EPT_MISCONFIG):
        return rflags | r.RFLAGS_RF
    return rflags & ~r.RFLAGS_RF


def _save_controlled_registers(ctx: Emulation, vmcs: Vmcs12) -> None:
    """DR7, IA32_DEBUGCTL, IA32_PAT, IA32_EFER: by the VM-exit controls."""
    words, controls = ctx.words, vmcs[VmcsField.VM_EXIT_CONTROLS]
    if controls & vmx.VM_EXIT_SAVE_DEBUG_CONTROLS:
        vmcs[VmcsField.GUEST_DR7] = words[s.DR7]
        vmcs[VmcsField.GUEST_IA32_DEBUGCTL] = ctx.msrs.values[MSR_IA32_DEBUGCTL]
    if controls & vmx.VM_EXIT_SAVE_IA32_PAT:
        vmcs[VmcsField.GUEST_IA32_PAT] = words[s.PAT]
    if controls & vmx.VM_EXIT_SAVE_IA32_EFER:
        vmcs[VmcsField.GUEST_IA32_EFER] = words[s.EFER]


def _save_segments(words: Words, vmcs: Vmcs12) -> None:
    for number, (selector, base, limit, access_rights) in _SEGMENT_FIELDS.items():
        vmcs[selector] = words[segment_word(number, s.SELECTOR)]
        vmcs[base] = words[segment_word(number, s.BASE)]
        vmcs[limit] = words[segment_word(number, s.LIMIT)]
        vmcs[access_rights] = words[segment_word(number, s.ATTRIBUTES)] & vmx.SEGMENT_AR_WRITABLE
    # The privilege level is SS.DPL to VMX, whatever SYSRET has left in the register.
    ss_rights = vmcs[VmcsField.GUEST_SS_AR_BYTES] & ~r.AR_DPL
    vmcs[VmcsField.GUEST_SS_AR_BYTES] = ss_rights | words[s.CPL] << r.AR_DPL_SHIFT


def _save_non_register_state(ctx: Emulation, vmcs: Vmcs12, record: NestedExit, pending_debug: int) -> None:
    words = ctx.words
    blocking = _shadow_kind(words) if words[s.INTERRUPT_SHADOW] else 0
    mov_ss = blocking & vmx.GUEST_INTR_STATE_MOV_SS
    if words[s.NMI_BLOCKED]:
        blocking |= vmx.GUEST_INTR_STATE_NMI
    vmcs[VmcsField.GUEST_INTERRUPTIBILITY_INFO] = blocking
    vmcs[VmcsField.GUEST_ACTIVITY_STATE] = (
        vmx.GUEST_ACTIVITY_HLT if ctx.halted else vmx.GUEST_ACTIVITY_ACTIVE
    )
    if mov_ss and not _is_debug_exception(record):
        # The single step over MOV SS is still to be reported, and VM entry insists on seeing it.
        saved = pending_debug | (vmx.PENDING_DEBUG_BS if words[s.RFLAGS] & r.RFLAGS_TF else 0)
    else:
        saved = pending_debug if record.reason in _DEBUG_SAVING_EXITS else 0
    vmcs[VmcsField.GUEST_PENDING_DBG_EXCEPTIONS] = saved


def _shadow_kind(words: Words) -> int:
    """Which instruction has cast the interrupt shadow, as far as that shows.

    The state words do not tell. Behind STI, IF is set, and TF is not, or #DB would have ended the shadow.
    """
    if words[s.RFLAGS] & r.RFLAGS_IF and not words[s.RFLAGS] & r.RFLAGS_TF:
        return vmx.GUEST_INTR_STATE_STI
    return vmx.GUEST_INTR_STATE_MOV_SS


def _is_debug_exception(record: NestedExit) -> bool:
    event = record.interruption_information
    return (
        record.reason == ExitReason.EXCEPTION_NMI
        and event & vmx.INTR_INFO_INTR_TYPE_MASK == vmx.INTR_TYPE_HARD_EXCEPTION
        and event & vmx.INTR_INFO_VECTOR_MASK == DB
    )
