"""Host state from a VMCS into the state words: what VM exit, or a VM entry that fails late, gives back to L1.

Source: Intel SDM volume 3C, 28.5 (loading host state), 28.7 (VMX aborts); KVM's ``load_vmcs12_host_state()``.
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from operator import itemgetter

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
_SEGMENT_FIELDS = (
    VmcsField.HOST_ES_SELECTOR, VmcsField.HOST_CS_SELECTOR, VmcsField.HOST_SS_SELECTOR, VmcsField.HOST_DS_SELECTOR,
    VmcsField.HOST_FS_SELECTOR, VmcsField.HOST_GS_SELECTOR, VmcsField.HOST_TR_SELECTOR, VmcsField.HOST_FS_BASE,
    VmcsField.HOST_GS_BASE, VmcsField.HOST_TR_BASE,
)  # fmt: skip
_segment_values = itemgetter(*map(int, _SEGMENT_FIELDS))
_SEGMENTS = slice(s.SEGMENTS, s.SEGMENTS + s.SEGMENT_WORDS * (r.TR + 1))
#: A hypervisor has the same ones at every exit.
_KNOWN_SEGMENTS = 64


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
    words[_SEGMENTS] = _segments(_segment_values(vmcs), ia32e)
    words[s.CPL] = 0
    words[s.INTERRUPT_SHADOW] = 0
    ctx.halted = False
    words[s.TLB_FLUSH] = 1
    if uses_pae_paging(words) and load_pdptes(words, ctx.memory, words[s.CR3]):
        raise VmxAborted(VmxAbort.HOST_PDPTE_FAIL)


@lru_cache(_KNOWN_SEGMENTS)
def _segments(values: tuple[int, ...], ia32e: bool) -> memoryview[int]:
    """The state words of all segment registers. Without descriptors, only the selector is given of most (28.5.2).

    *values* are the fields of :data:`_SEGMENT_FIELDS`.
    """
    es, cs, ss, ds, fs, gs, tr, fs_base, gs_base, tr_base = values
    words = array("Q", _data_segment(es))
    words.extend((cs, 0, _FLAT_LIMIT, r.AR_CODE64 if ia32e else r.AR_CODE32))
    for selector, base in ((ss, 0), (ds, 0), (fs, fs_base), (gs, gs_base)):
        words.extend(_data_segment(selector, base))
    words.extend((0, 0, 0, r.AR_UNUSABLE))
    words.extend((tr, tr_base, _TSS_LIMIT, r.AR_TSS64_BUSY))
    return memoryview(words)


def _data_segment(selector: int, base: int = 0) -> tuple[int, int, int, int]:
    """64-bit software uses the bases of FS and GS without segments, and the manual has them loaded."""
    return (selector, base, _FLAT_LIMIT, r.AR_DATA) if selector else (0, base, 0, r.AR_UNUSABLE)
