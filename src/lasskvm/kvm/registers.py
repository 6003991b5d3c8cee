"""``struct kvm_regs``, ``kvm_sregs`` and ``kvm_sregs2``: their way into the state words and back."""

from __future__ import annotations

import errno
from typing import Any

from lasskvm import state as s
from lasskvm.emulator.control import is_legal_cr3, load_pdptes
from lasskvm.kvm.structures import DescriptorTable, Regs, Sregs, Sregs2
from lasskvm.memory import GuestMemory
from lasskvm.state import VcpuState, Words
from lasskvm.x86.registers import (
    AR_DPL,
    AR_DPL_SHIFT,
    AR_L,
    CR0_CD,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    CS,
    DS,
    EFER_LMA,
    EFER_LME,
    ES,
    FS,
    GS,
    LDTR,
    MASK32,
    SS,
    TR,
)

__all__ = ["get_regs", "get_sregs", "get_sregs2", "set_regs", "set_sregs", "set_sregs2"]


_SEGMENT_FIELDS = {"cs": CS, "ds": DS, "es": ES, "fs": FS, "gs": GS, "ss": SS, "tr": TR, "ldt": LDTR}
_CONTROL_FIELDS = {
    "cr0": s.CR0, "cr2": s.CR2, "cr3": s.CR3, "cr4": s.CR4, "cr8": s.CR8, "efer": s.EFER,
}  # fmt: skip
_REGS_WORDS = 18
_PDPTES = 4


def get_regs(state: VcpuState) -> Regs:
    """``KVM_GET_REGS``."""
    return Regs(*state.words[:_REGS_WORDS])


def set_regs(state: VcpuState, regs: Regs) -> None:
    """``KVM_SET_REGS``."""
    for index, value in enumerate(vars(regs).values()):
        state.words[index] = value


def _fields_of(state: VcpuState) -> dict[str, Any]:
    words = state.words
    fields: dict[str, Any] = {name: state.segment(number) for name, number in _SEGMENT_FIELDS.items()}
    fields |= {name: words[index] for name, index in _CONTROL_FIELDS.items()}
    fields["apic_base"] = words[s.APIC_BASE]
    fields["gdt"] = DescriptorTable(words[s.GDT_BASE], words[s.GDT_LIMIT])
    fields["idt"] = DescriptorTable(words[s.IDT_BASE], words[s.IDT_LIMIT])
    return fields


def get_sregs(state: VcpuState) -> Sregs:
    """``KVM_GET_SREGS``."""
    return Sregs(**_fields_of(state))


def get_sregs2(state: VcpuState) -> Sregs2:
    """``KVM_GET_SREGS2``; the PDPTEs count in PAE paging only."""
    words = state.words
    sregs = Sregs2(**_fields_of(state))
    if _is_pae_paging(words[s.CR0], words[s.CR4], words[s.EFER]):
        first, second, third, fourth = words[s.PDPTR0 : s.PDPTR0 + _PDPTES]
        sregs.pdptrs_valid, sregs.pdptrs = True, (first, second, third, fourth)
    return sregs


def set_sregs(state: VcpuState, memory: GuestMemory, sregs: Sregs) -> None:
    """``KVM_SET_SREGS``. The privilege level is SS.DPL, and PAE paging loads the PDPTEs from *memory*.

    Raises OSError with EINVAL for what KVM's ``kvm_is_valid_sregs()`` refuses: CR4 or EFER bits that the guest's CPUID
    does not give, CR4.LASS among them; CR0 and EFER that contradict themselves, each other, or CS.L; a CR3 or an APIC
    base beyond the physical address width.
    """
    _set_sregs(state, sregs, "KVM_SET_SREGS")
    if _is_pae_paging(sregs.cr0, sregs.cr4, sregs.efer):
        load_pdptes(state.words, memory, sregs.cr3)


def set_sregs2(state: VcpuState, memory: GuestMemory, sregs: Sregs2) -> None:
    """``KVM_SET_SREGS2``: as :func:`set_sregs`, with the PDPTEs given when ``pdptrs_valid`` is set.

    EINVAL also for PDPTEs without PAE paging.
    """
    pae_paging = _is_pae_paging(sregs.cr0, sregs.cr4, sregs.efer)
    if sregs.pdptrs_valid and not pae_paging:
        raise _refusal("KVM_SET_SREGS2", "there are PDPTEs in PAE paging only")
    _set_sregs(state, sregs, "KVM_SET_SREGS2")
    if sregs.pdptrs_valid:
        for number, value in enumerate(sregs.pdptrs):
            state.words[s.PDPTR0 + number] = value
    elif pae_paging:
        load_pdptes(state.words, memory, sregs.cr3)


def _set_sregs(state: VcpuState, sregs: Sregs, ioctl: str) -> None:
    words = state.words
    _check(words, sregs, ioctl)
    for name, number in _SEGMENT_FIELDS.items():
        state.set_segment(number, getattr(sregs, name))
    for name, index in _CONTROL_FIELDS.items():
        words[index] = getattr(sregs, name)
    words[s.GDT_BASE], words[s.GDT_LIMIT] = sregs.gdt.base, sregs.gdt.limit
    words[s.IDT_BASE], words[s.IDT_LIMIT] = sregs.idt.base, sregs.idt.limit
    words[s.CPL] = (sregs.ss.attributes & AR_DPL) >> AR_DPL_SHIFT
    words[s.TLB_FLUSH] = 1


def _check(words: Words, sregs: Sregs, ioctl: str) -> None:
    """KVM's ``kvm_is_valid_sregs()`` and ``kvm_set_apic_base()``."""
    cr0, cr4, efer = sregs.cr0, sregs.cr4, sregs.efer
    if cr4 & ~words[s.CR4_ALLOWED]:
        raise _refusal(ioctl, f"the guest's CPUID does not allow CR4 {cr4:#x}")
    if efer & ~(words[s.EFER_ALLOWED] | EFER_LMA):
        raise _refusal(ioctl, f"the guest's CPUID does not allow EFER {efer:#x}")
    if cr0 > MASK32 or (cr0 & CR0_PG and not cr0 & CR0_PE) or (cr0 & CR0_NW and not cr0 & CR0_CD):
        raise _refusal(ioctl, f"CR0 {cr0:#x} contradicts itself")
    if efer & EFER_LME and cr0 & CR0_PG:
        if not cr4 & CR4_PAE or not efer & EFER_LMA:
            raise _refusal(ioctl, "paging with EFER.LME takes CR4.PAE and EFER.LMA")
        if not is_legal_cr3(words, sregs.cr3):
            raise _refusal(ioctl, f"CR3 {sregs.cr3:#x} has bits beyond the physical address width")
    elif efer & EFER_LMA or sregs.cs.attributes & AR_L:
        raise _refusal(ioctl, "EFER.LMA and CS.L take paging with EFER.LME")


def _refusal(ioctl: str, reason: str) -> OSError:
    return OSError(errno.EINVAL, f"{ioctl}: {reason}")


def _is_pae_paging(cr0: int, cr4: int, efer: int) -> bool:
    return bool(cr0 & CR0_PG and cr4 & CR4_PAE and not efer & EFER_LMA)
