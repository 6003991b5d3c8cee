"""The processor as a case finds it: the state words that a :class:`~lasskvm.fuzz.case.Case` stands for.

Words are written as they are, without the checks of ``KVM_SET_SREGS``: a case may ask for what no VMM would set up, as
long as a processor can be in that state.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lasskvm import state as s
from lasskvm.fuzz import layout
from lasskvm.fuzz.case import Case, Paging
from lasskvm.fuzz.image import Image, page_table_root
from lasskvm.state import Segment, segment_word
from lasskvm.x86.descriptors import TSS64_BYTES
from lasskvm.x86.registers import (
    AR_LDT,
    AR_P,
    AR_TSS64_BUSY,
    CR0_PE,
    LDTR,
    RFLAGS_DF,
    RFLAGS_IF,
    RFLAGS_TF,
    TR,
)

__all__ = ["CR2_UNTOUCHED", "start_words"]

#: CR2 before each case, so that a case shows whether it was written.
CR2_UNTOUCHED = 0xBAD0_0CE2
_STAR = layout.KERNEL_CS << 32 | layout.USER_CS32 << 48
_SYSCALL_VECTOR, _COMPATIBILITY_SYSCALL_VECTOR, _SYSENTER_VECTOR = 0x86, 0x87, 0x88
_PDPTES = 4
_TSC_AUX = 0x1234_5678


def start_words(case: Case, power_on: NDArray[np.uint64], image: Image) -> NDArray[np.uint64]:
    """The state words of *case*. *power_on* are those of a vCPU after reset, which gives what a case leaves open; the
    PDPTE registers come from *image*."""
    array = power_on.copy()
    words = array.data.cast("B").cast("Q")
    for number, value in enumerate(case.registers):
        words[number] = value
    words[s.RIP], words[s.RFLAGS], words[s.CPL] = case.rip, case.rflags, case.cpl
    words[s.CR0], words[s.CR2], words[s.CR4] = case.cr0, CR2_UNTOUCHED, case.cr4
    words[s.CR3], words[s.EFER] = page_table_root(case.paging), case.efer
    for number, segment in enumerate(case.segments):
        _set_segment(words, number, segment)
    _set_tables(words, case)
    words[s.STAR], words[s.SFMASK] = _STAR, RFLAGS_IF | RFLAGS_DF | RFLAGS_TF
    handlers = layout.handlers_base(case.mode)
    words[s.LSTAR] = handlers + _SYSCALL_VECTOR * layout.HANDLER_BYTES
    words[s.CSTAR] = handlers + _COMPATIBILITY_SYSCALL_VECTOR * layout.HANDLER_BYTES
    words[s.SYSENTER_CS] = layout.KERNEL_CS if case.mode.is_ia32e else layout.KERNEL_CS32
    words[s.SYSENTER_EIP] = handlers + _SYSENTER_VECTOR * layout.HANDLER_BYTES
    base = layout.UPPER if case.mode.is_ia32e else 0
    words[s.SYSENTER_ESP] = base + layout.KERNEL_STACK_GPA + layout.STACK_BYTES
    words[s.KERNEL_GS_BASE], words[s.TSC_AUX] = case.kernel_gs_base, _TSC_AUX
    if case.paging is Paging.PAE:
        for number in range(_PDPTES):
            gpa = layout.TABLES_GPA + 8 * number
            words[s.PDPTR0 + number] = int.from_bytes(image[gpa : gpa + 8].tobytes(), "little")
    words[s.TLB_FLUSH] = 1
    return array


def _set_segment(words: memoryview[int], number: int, segment: Segment) -> None:
    first = segment_word(number, s.SELECTOR)
    words[first + s.SELECTOR], words[first + s.BASE] = segment.selector, segment.base
    words[first + s.LIMIT], words[first + s.ATTRIBUTES] = segment.limit, segment.attributes


def _set_tables(words: memoryview[int], case: Case) -> None:
    is_long = case.mode.is_ia32e
    base = layout.UPPER if is_long else 0
    tss = layout.TSS64_GPA if is_long else layout.TSS32_GPA
    limit = TSS64_BYTES + layout.IO_BITMAP_BYTES - 1
    _set_segment(words, TR, Segment(layout.TSS_SELECTOR, base + tss, limit, AR_TSS64_BUSY))
    local = Segment(layout.LDT_SELECTOR, base + layout.LDT_GPA, layout.LDT_BYTES - 1, AR_LDT | AR_P)
    _set_segment(words, LDTR, local)
    words[s.GDT_BASE] = base + (layout.GDT_GPA if is_long else layout.LEGACY_GDT_GPA)
    words[s.GDT_LIMIT] = layout.GDT_BYTES - 1
    if is_long:
        idt = layout.IDT_GPA if case.own_stacks else layout.SHARED_STACK_IDT_GPA
        words[s.IDT_BASE], words[s.IDT_LIMIT] = base + idt, 16 * layout.VECTORS - 1
    elif case.cr0 & CR0_PE:
        words[s.IDT_BASE], words[s.IDT_LIMIT] = layout.LEGACY_IDT_GPA, 8 * layout.VECTORS - 1
    else:
        words[s.IDT_BASE], words[s.IDT_LIMIT] = layout.IVT_GPA, 4 * layout.VECTORS - 1
