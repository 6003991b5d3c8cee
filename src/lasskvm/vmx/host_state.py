"""Host state from a VMCS into the state words: what VM exit, or a VM entry that fails late, gives back to L1.

Source: Intel SDM volume 3C, 28.5 (loading host state), 28.7 (VMX aborts); KVM's ``load_vmcs12_host_state()``.
"""

from __future__ import annotations

from array import array

from lasskvm import state as s
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.control import load_pdptes
from lasskvm.emulator.faults import TripleFault
from lasskvm.vmx.guest_state import CR0_UNCHANGED, uses_pae_paging
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import registers as r
from lasskvm.x86 import vmx
from lasskvm.x86.msr import MSR_IA32_DEBUGCTL
from lasskvm.x86.vmx import VmxAbort
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["VmxAborted", "load_host_state"]

_FLAT_LIMIT = r.MASK32
_TSS_LIMIT = 0x67
_DESCRIPTOR_TABLE_LIMIT = 0xFFFF
_MODE_BITS = r.EFER_LMA | r.EFER_LME

_REGISTER_FIELDS = {
    VmcsField.HOST_CR3: s.CR3,
    VmcsField.HOST_RSP: s.RSP,
    VmcsField.HOST_RIP: s.RIP,
    VmcsField.HOST_GDTR_BASE: s.GDT_BASE,
    VmcsField.HOST_IDTR_BASE: s.IDT_BASE,
    VmcsField.HOST_IA32_SYSENTER_CS: s.SYSENTER_CS,
    VmcsField.HOST_IA32_SYSENTER_ESP: s.SYSENTER_ESP,
    VmcsField.HOST_IA32_SYSENTER_EIP: s.SYSENTER_EIP,
}
#: Selector and base of each segment register, ES to TR, where there are fields for them.
_SEGMENTS = (
    (VmcsField.HOST_ES_SELECTOR, None),
    (VmcsField.HOST_CS_SELECTOR, None),
    (VmcsField.HOST_SS_SELECTOR, None),
    (VmcsField.HOST_DS_SELECTOR, None),
    (VmcsField.HOST_FS_SELECTOR, VmcsField.HOST_FS_BASE),
    (VmcsField.HOST_GS_SELECTOR, VmcsField.HOST_GS_BASE),
    (None, None),
    (VmcsField.HOST_TR_SELECTOR, VmcsField.HOST_TR_BASE),
)


class VmxAborted(TripleFault):
    """L1 cannot be given back: the processor shuts down with *indicator*, which is to go into the VMCS region."""

    def __init__(self, indicator: VmxAbort) -> None:
        self.indicator = indicator
        super().__init__(f"VMX abort {indicator}: {indicator.name}")


def load_host_state(ctx: Emulation, vmcs: Vmcs12) -> None:
    """Make L1 the running state, at its VM-exit handler (28.5).

    What is blocked for NMIs, and the MSR list, are for others. Raises :class:`VmxAborted` when L2 is in IA-32e mode and
    L1 would not be, with nothing changed, and when L1's PDPTEs have reserved bits.
    """
    words, controls = ctx.words, vmcs[VmcsField.VM_EXIT_CONTROLS]
    ia32e = controls & vmx.VM_EXIT_HOST_ADDR_SPACE_SIZE != 0
    if words[s.EFER] & r.EFER_LMA and not ia32e:
        raise VmxAborted(VmxAbort.HOST_ADDR_SPACE_SIZE)
    words[s.CR0] = words[s.CR0] & CR0_UNCHANGED | vmcs[VmcsField.HOST_CR0] & ~CR0_UNCHANGED
    cr4 = vmcs[VmcsField.HOST_CR4]
    words[s.CR4] = cr4 | r.CR4_PAE if ia32e else cr4 & ~r.CR4_PCIDE
    for field, word in _REGISTER_FIELDS.items():
        words[word] = vmcs[field]
    words[s.RFLAGS] = r.RFLAGS_FIXED
    words[s.DR7] = r.DR7_FIXED
    ctx.msrs.values[MSR_IA32_DEBUGCTL] = 0
    if controls & vmx.VM_EXIT_LOAD_IA32_PAT:
        words[s.PAT] = vmcs[VmcsField.HOST_IA32_PAT]
    if controls & vmx.VM_EXIT_LOAD_IA32_EFER:
        words[s.EFER] = vmcs[VmcsField.HOST_IA32_EFER]
    else:
        words[s.EFER] = words[s.EFER] & ~_MODE_BITS | _MODE_BITS * ia32e
    words[s.GDT_LIMIT] = words[s.IDT_LIMIT] = _DESCRIPTOR_TABLE_LIMIT
    _load_segments(words, vmcs, ia32e)
    words[s.INTERRUPT_SHADOW] = 0
    ctx.halted = False
    words[s.TLB_FLUSH] = 1
    if uses_pae_paging(words) and load_pdptes(words, ctx.memory, words[s.CR3]):
        raise VmxAborted(VmxAbort.HOST_PDPTE_FAIL)


def _load_segments(words: memoryview[int], vmcs: Vmcs12, ia32e: bool) -> None:
    """Segments without descriptors: of most registers only the selector is given (28.5.2)."""
    code = r.AR_CODE64 if ia32e else r.AR_CODE32
    values = array("Q")
    for selector_field, base_field in _SEGMENTS:
        selector = 0 if selector_field is None else vmcs.fields[selector_field]
        base = 0 if base_field is None else vmcs.fields[base_field]
        if selector_field == VmcsField.HOST_CS_SELECTOR:
            values.extend((selector, 0, _FLAT_LIMIT, code))
        elif selector_field == VmcsField.HOST_TR_SELECTOR:
            values.extend((selector, base, _TSS_LIMIT, r.AR_TSS64_BUSY))
        elif selector:
            values.extend((selector, base, _FLAT_LIMIT, r.AR_DATA))
        else:
            # 64-bit software uses the bases of FS and GS without segments, and the manual has them loaded.
            values.extend((0, base, 0, r.AR_UNUSABLE))
    words[s.SEGMENTS : s.SEGMENTS + s.SEGMENT_WORDS * len(_SEGMENTS)] = values
    words[s.CPL] = 0
