"""``struct kvm_regs`` and ``struct kvm_sregs``: their way into the state words and back."""

from __future__ import annotations

import errno
from typing import Any

from lasskvm import state as s
from lasskvm.kvm.structures import DescriptorTable, Regs, Sregs
from lasskvm.state import VcpuState
from lasskvm.x86.registers import (
    AR_DPL,
    AR_DPL_SHIFT,
    CR0_PE,
    CR0_PG,
    CS,
    DS,
    EFER_LMA,
    EFER_LME,
    ES,
    FS,
    GS,
    LDTR,
    SS,
    TR,
)

__all__ = ["get_regs", "get_sregs", "set_regs", "set_sregs"]


_SEGMENT_FIELDS = {"cs": CS, "ds": DS, "es": ES, "fs": FS, "gs": GS, "ss": SS, "tr": TR, "ldt": LDTR}
_CONTROL_FIELDS = {
    "cr0": s.CR0, "cr2": s.CR2, "cr3": s.CR3, "cr4": s.CR4, "cr8": s.CR8, "efer": s.EFER, "apic_base": s.APIC_BASE,
}  # fmt: skip
_REGS_WORDS = 18


def get_regs(state: VcpuState) -> Regs:
    """``KVM_GET_REGS``."""
    return Regs(*state.words[:_REGS_WORDS])


def set_regs(state: VcpuState, regs: Regs) -> None:
    """``KVM_SET_REGS``."""
    for index, value in enumerate(vars(regs).values()):
        state.words[index] = value
    state.words[s.INTERRUPT_SHADOW] = 0


def get_sregs(state: VcpuState) -> Sregs:
    """``KVM_GET_SREGS``."""
    words = state.words
    fields: dict[str, Any] = {name: state.segment(number) for name, number in _SEGMENT_FIELDS.items()}
    fields |= {name: words[index] for name, index in _CONTROL_FIELDS.items()}
    return Sregs(
        gdt=DescriptorTable(words[s.GDT_BASE], words[s.GDT_LIMIT]),
        idt=DescriptorTable(words[s.IDT_BASE], words[s.IDT_LIMIT]),
        **fields,
    )


def set_sregs(state: VcpuState, sregs: Sregs) -> None:
    """``KVM_SET_SREGS``. The privilege level is SS.DPL.

    Raises OSError with EINVAL for what KVM's ``kvm_is_valid_sregs()`` refuses: CR4 or EFER bits that the guest's CPUID
    does not give, CR4.LASS among them, paging without protection, and an EFER.LMA that contradicts LME and CR0.PG.
    """
    words = state.words
    long_mode = sregs.efer & EFER_LME and sregs.cr0 & CR0_PG
    if (
        sregs.cr4 & ~words[s.CR4_ALLOWED]
        or sregs.efer & ~(words[s.EFER_ALLOWED] | EFER_LMA)
        or (sregs.cr0 & CR0_PG and not sregs.cr0 & CR0_PE)
        or bool(long_mode) != bool(sregs.efer & EFER_LMA)
    ):
        raise OSError(errno.EINVAL, "KVM_SET_SREGS: the guest's CPUID does not allow this CR0, CR4 and EFER")
    for name, number in _SEGMENT_FIELDS.items():
        state.set_segment(number, getattr(sregs, name))
    for name, index in _CONTROL_FIELDS.items():
        words[index] = getattr(sregs, name)
    words[s.GDT_BASE], words[s.GDT_LIMIT] = sregs.gdt.base, sregs.gdt.limit
    words[s.IDT_BASE], words[s.IDT_LIMIT] = sregs.idt.base, sregs.idt.limit
    words[s.CPL] = (sregs.ss.attributes & AR_DPL) >> AR_DPL_SHIFT
    words[s.TLB_FLUSH] = 1
