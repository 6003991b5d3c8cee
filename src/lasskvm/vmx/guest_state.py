"""Guest state between a VMCS and the state words: what VM entry loads and VM exit saves.

The access rights of a VMCS and the attributes of a segment in the state words are the same bits. CR2, DR0 to DR3, DR6
and the general-purpose registers but RSP are in no VMCS: L1 and L2 share them.

Source: Intel SDM volume 3C, 27.3.2 (loading guest state), 27.7.1 and 27.7.2 (interruptibility and activity state), 28.3
(saving guest state); KVM's ``prepare_vmcs02()`` and ``sync_vmcs02_to_vmcs12()``.
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from operator import and_, itemgetter

from lasskvm import state as s
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.delivery import EXCEPTION, EXTERNAL, SOFTWARE, pushed_flags
from lasskvm.emulator.msrs import MSRS
from lasskvm.state import Words, segment_word
from lasskvm.vmx.entry_checks import secondary_controls
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.guest_mode import SEGMENT_FIELDS, guest_pdptes, is_ia32e_guest
from lasskvm.vmx.injection import is_vectoring
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import registers as r
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import DB
from lasskvm.x86.msr import DEBUGCTL_BTF, MSR_IA32_DEBUGCTL
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import FIELD_BYTES, VmcsField, field_width

__all__ = ["CR0_UNCHANGED", "load_guest_state", "save_guest_state", "uses_pae_paging"]

#: What neither VM entry nor VM exit changes in CR0: ET, NW, CD, and the reserved bits.
CR0_UNCHANGED = r.MASK64 & ~(
    r.CR0_PE | r.CR0_MP | r.CR0_EM | r.CR0_TS | r.CR0_NE | r.CR0_WP | r.CR0_AM | r.CR0_PG
)
#: Bits of DR7 that are always 0: RTM, which needs a feature that is not virtualized, 12, 14 and 15.
_DR7_ZEROS = 1 << 11 | 1 << 12 | 3 << 14
_PDPTES = (VmcsField.GUEST_PDPTR0, VmcsField.GUEST_PDPTR1, VmcsField.GUEST_PDPTR2, VmcsField.GUEST_PDPTR3)
_REGISTER_FIELDS = {
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
_BASES_OF_32_BITS = (VmcsField.GUEST_ES_BASE, VmcsField.GUEST_SS_BASE, VmcsField.GUEST_DS_BASE)


def _kept_bits(field: VmcsField) -> int:
    """The bits of *field* that the register has and the field has room for."""
    if field in _BASES_OF_32_BITS:
        return r.MASK32
    if field.name.endswith("_AR_BYTES"):
        return vmx.SEGMENT_AR_WRITABLE
    return (1 << 8 * FIELD_BYTES[field_width(field)]) - 1


# Fields that are loaded and saved as they are, but for the bits of _kept_bits(): in bulk, because a VM exit takes as
# long as there are lines here. Segment registers are one run of state words, and the same ones come again and again.
_REGISTER_KEYS, _REGISTER_WORDS = tuple(map(int, _REGISTER_FIELDS)), tuple(_REGISTER_FIELDS.values())
_REGISTER_BITS = tuple(map(_kept_bits, _REGISTER_FIELDS))
_register_values, _register_words = itemgetter(*_REGISTER_KEYS), itemgetter(*_REGISTER_WORDS)
_SEGMENTS = slice(s.SEGMENTS, s.SEGMENTS + s.SEGMENT_WORDS * len(SEGMENT_FIELDS))
_SEGMENT_FIELDS = tuple(field for fields in SEGMENT_FIELDS for field in fields)
_SEGMENT_KEYS = tuple(map(int, _SEGMENT_FIELDS))
_SEGMENT_BITS = tuple(map(_kept_bits, _SEGMENT_FIELDS))
_segment_values = itemgetter(*_SEGMENT_KEYS)
_KNOWN_SEGMENTS = 256


@lru_cache(_KNOWN_SEGMENTS)
def _loaded_segments(values: tuple[int, ...]) -> memoryview[int]:
    """The state words of segment registers with *values* in the VMCS."""
    return memoryview(array("Q", map(and_, values, _SEGMENT_BITS)))


@lru_cache(_KNOWN_SEGMENTS)
def _saved_segments(words: bytes, cpl: int) -> dict[int, int]:
    """The fields for segment registers whose state words are *words*."""
    fields = dict(zip(_SEGMENT_KEYS, map(and_, memoryview(words).cast("Q"), _SEGMENT_BITS), strict=True))
    # The privilege level is SS.DPL to VMX, whatever SYSRET has left in the register.
    rights = fields[VmcsField.GUEST_SS_AR_BYTES] & ~r.AR_DPL
    fields[VmcsField.GUEST_SS_AR_BYTES] = rights | cpl << r.AR_DPL_SHIFT
    return fields


_LDTR_BASE, _LDTR_ATTRIBUTES = segment_word(r.LDTR, s.BASE), segment_word(r.LDTR, s.ATTRIBUTES)
_SS_ATTRIBUTES = segment_word(r.SS, s.ATTRIBUTES)

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
    """Whether the PDPTE registers are in use: PAE paging, outside IA-32e mode."""
    is_pae = words[s.CR0] & r.CR0_PG and words[s.CR4] & r.CR4_PAE
    return bool(is_pae and not words[s.EFER] & r.EFER_LMA)


# -------------------------------------------------------------------------------------------------------- loading


def load_guest_state(ctx: Emulation, vmcs: Vmcs12) -> None:
    """Make L2 of *vmcs*, whose guest state has been found right, the running state (27.3.2).

    The activity state is ``ctx.halted``. The event to inject, pending debug exceptions and the MSR list are for others;
    with an event the interrupt shadow and HLT are over.
    """
    words = ctx.words
    pdptes = guest_pdptes(vmcs, ctx.memory)
    words[s.CR0] = words[s.CR0] & CR0_UNCHANGED | vmcs[VmcsField.GUEST_CR0] & ~CR0_UNCHANGED
    words[s.RFLAGS] = vmcs[VmcsField.GUEST_RFLAGS]
    words[_SEGMENTS] = _loaded_segments(_segment_values(vmcs))
    for word, value in zip(_REGISTER_WORDS, _register_values(vmcs), strict=True):
        words[word] = value
    words[s.CPL] = (words[_SS_ATTRIBUTES] & r.AR_DPL) >> r.AR_DPL_SHIFT
    if words[_LDTR_ATTRIBUTES] & r.AR_UNUSABLE:
        # Nobody has looked at the field, and the register is always canonical.
        words[_LDTR_BASE] = 0
    _load_controlled_registers(ctx, vmcs)
    for number, pdpte in enumerate(pdptes or ()):
        words[s.PDPTR0 + number] = pdpte
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
        # While paging is off, in an unrestricted guest, LME says nothing about the mode, and stays.
        modified = r.EFER_LMA | r.EFER_LME if words[s.CR0] & r.CR0_PG else r.EFER_LMA
        words[s.EFER] = words[s.EFER] & ~modified | modified * is_ia32e_guest(vmcs)


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
    values = map(and_, _register_words(words), _REGISTER_BITS)
    vmcs.update(zip(_REGISTER_KEYS, values, strict=True))
    vmcs.update(_saved_segments(words[_SEGMENTS].tobytes(), words[s.CPL]))
    vmcs.update({VmcsField.GUEST_CR0: words[s.CR0], VmcsField.GUEST_RFLAGS: _saved_rflags(words, record)})
    _save_controlled_registers(ctx, vmcs)
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


def _save_non_register_state(ctx: Emulation, vmcs: Vmcs12, record: NestedExit, pending_debug: int) -> None:
    words = ctx.words
    blocking = _shadow_kind(words) if words[s.INTERRUPT_SHADOW] else 0
    mov_ss = blocking & vmx.GUEST_INTR_STATE_MOV_SS
    if words[s.NMI_BLOCKED]:
        blocking |= vmx.GUEST_INTR_STATE_NMI
    if mov_ss and not _is_debug_exception(record):
        saved = pending_debug | (vmx.PENDING_DEBUG_BS if _is_single_stepped(words, vmcs) else 0)
    else:
        saved = pending_debug if record.reason in _DEBUG_SAVING_EXITS else 0
    vmcs.update(
        {
            VmcsField.GUEST_INTERRUPTIBILITY_INFO: blocking,
            VmcsField.GUEST_ACTIVITY_STATE: vmx.GUEST_ACTIVITY_HLT
            if ctx.halted
            else vmx.GUEST_ACTIVITY_ACTIVE,
            VmcsField.GUEST_PENDING_DBG_EXCEPTIONS: saved,
        }
    )


def _is_single_stepped(words: Words, vmcs: Vmcs12) -> bool:
    """Whether the step over MOV SS is still to be reported: the next VM entry insists on seeing it, or not."""
    steps_branches = vmcs[VmcsField.GUEST_IA32_DEBUGCTL] & DEBUGCTL_BTF
    return bool(words[s.RFLAGS] & r.RFLAGS_TF and not steps_branches)


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
