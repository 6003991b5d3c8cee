"""The initial state of a case in each processor mode, and the frames that events leave in each.

Besides the layout of :mod:`lasskvm.conformance.layout`, which is for IA-32e mode, there are an interrupt table for real
mode, an IDT for protected mode, and page tables for PAE paging that map the first megabytes one to one. In all of them
the handler of a vector is where IA-32e mode has it, in guest-physical terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lasskvm.conformance import layout
from lasskvm.conformance.case import Mode
from lasskvm.kvm.structures import DescriptorTable, Segment, Sregs
from lasskvm.memory import PAGE_SIZE, GuestMemory
from lasskvm.x86.descriptors import SYS_INTERRUPT_GATE, make_gate
from lasskvm.x86.exceptions import has_error_code
from lasskvm.x86.paging import PTE_P, PTE_PS, PTE_W
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_DATA,
    AR_DPL_SHIFT,
    AR_P,
    AR_REAL_MODE,
    CR0_PE,
    CR0_PG,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    MASK32,
)

__all__ = ["Frame", "event_frame", "handler_vector", "initial_state", "program_place", "write_legacy_tables"]

#: RIP, CS, RFLAGS, RSP and SS of the interrupted program; the last two are None where the event pushed none.
Frame = tuple[int, int, int, int | None, int | None]

#: Interrupt gates for protected mode, and behind them the PDPTEs of PAE paging.
_IDT32_GPA, _PDPT_GPA = 0x7000, 0x7800
_PAGE_DIRECTORY_GPA = layout.TABLES_END
_LARGE_PAGE = 2 << 20
#: Code for real mode, in its first segment.
_REAL_CODE, _REAL_STACK = 0xA000, 0xF000
_LEGACY_STACK = layout.KERNEL_STACK_GPA + 2 * PAGE_SIZE
_REAL_LIMIT = 0xFFFF
_PARAGRAPH_SHIFT = 4
_VECTOR_BYTES32 = 8
_VECTOR_BYTES16 = 4
_FRAME_WORDS = 5


def write_legacy_tables(memory: GuestMemory) -> None:
    """Write what the modes other than IA-32e mode need."""
    for vector in range(layout.VECTORS):
        handler = layout.HANDLERS_GPA + vector * layout.HANDLER_BYTES
        gate = make_gate(handler, layout.KERNEL_CS32, SYS_INTERRUPT_GATE | AR_P, 0)
        memory.store(_IDT32_GPA + vector * _VECTOR_BYTES32, _VECTOR_BYTES32, gate)
        segment = layout.HANDLERS_GPA >> _PARAGRAPH_SHIFT
        offset = vector * layout.HANDLER_BYTES
        memory.store(vector * _VECTOR_BYTES16, _VECTOR_BYTES16, segment << 16 | offset)
    memory.store(_PDPT_GPA, 8, _PAGE_DIRECTORY_GPA | PTE_P)
    for number in range(layout.MEMORY_BYTES // _LARGE_PAGE):
        entry = number * _LARGE_PAGE | PTE_P | PTE_W | PTE_PS
        memory.store(_PAGE_DIRECTORY_GPA + 8 * number, 8, entry)


def program_place(mode: Mode, cpl: int) -> tuple[int, int]:
    """Where programs are, and the top of their stack."""
    if mode is Mode.REAL:
        return _REAL_CODE, _REAL_STACK
    if not mode.is_ia32e:
        return layout.KERNEL_CODE_GPA, _LEGACY_STACK
    if cpl == 3 or mode is Mode.COMPATIBILITY:
        return layout.USER_CODE, layout.USER_STACK_TOP
    return layout.KERNEL_CODE, layout.KERNEL_STACK_TOP


def initial_state(mode: Mode, template: Sregs, cpl: int, cr3: int) -> Sregs:
    """The special registers in *mode*; *cr3* is the root of the page tables of IA-32e mode."""
    if mode.is_ia32e:
        return layout.initial_sregs(template, cpl, mode.bits, cr3)
    long_mode = layout.initial_sregs(template, 0, 32, cr3)
    if mode is Mode.REAL:
        segment = Segment(0, 0, _REAL_LIMIT, AR_REAL_MODE)
        return replace(
            long_mode,
            cs=segment, ss=segment, ds=segment, es=segment, fs=segment, gs=segment,
            idt=DescriptorTable(0, layout.VECTORS * _VECTOR_BYTES16 - 1),
            cr0=long_mode.cr0 & ~(CR0_PE | CR0_PG), cr3=0, efer=0,
        )  # fmt: skip
    data = Segment(layout.KERNEL_SS, 0, MASK32, AR_DATA)
    paged = mode is Mode.PAE
    return replace(
        long_mode,
        cs=Segment(layout.KERNEL_CS32, 0, MASK32, AR_CODE32 | cpl << AR_DPL_SHIFT),
        ss=data, ds=data, es=data, fs=data, gs=data,
        gdt=DescriptorTable(layout.GDT_GPA, layout.GDT_BYTES - 1),
        idt=DescriptorTable(_IDT32_GPA, layout.VECTORS * _VECTOR_BYTES32 - 1),
        tr=replace(long_mode.tr, base=layout.TSS_GPA), ldt=replace(long_mode.ldt, base=layout.LDT_GPA),
        cr0=long_mode.cr0 if paged else long_mode.cr0 & ~CR0_PG,
        cr3=_PDPT_GPA if paged else 0, efer=long_mode.efer & ~(EFER_LME | EFER_LMA | EFER_NXE),
    )  # fmt: skip


def handler_vector(rip: int, cs_base: int, *, long_mode: bool) -> int | None:
    """The vector whose handler has just executed its HLT; None when *rip* is not behind one."""
    first = layout.HANDLERS if long_mode else layout.HANDLERS_GPA
    offset = rip + cs_base - 1 - first
    vector, rest = divmod(offset, layout.HANDLER_BYTES)
    return vector if rest == 0 and 0 <= vector < layout.VECTORS else None


def event_frame(
    read: Callable[[int, int], int], vector: int, sp: int, *, long_mode: bool, real_mode: bool
) -> tuple[int | None, Frame]:
    """The error code and frame at stack pointer *sp*; ``read(address, size)`` reads the stack.

    On the IST stack the number of words says whether there is an error code; elsewhere the vector does, which is wrong
    for INT *n* of an exception's vector.
    """
    size = 8 if long_mode else 2 if real_mode else 4
    with_code = has_error_code(vector) and not real_mode
    pushed = layout.IST_STACK_TOP - sp
    if long_mode and pushed in (size * _FRAME_WORDS, size * (_FRAME_WORDS + 1)):
        with_code = pushed > size * _FRAME_WORDS
    error_code = read(sp, size) if with_code else None
    words = [
        read(sp + size * (with_code + number), size) for number in range(_FRAME_WORDS if long_mode else 3)
    ]
    rip, cs, rflags = words[:3]
    if long_mode:
        return error_code, (rip, cs, rflags, words[3], words[4])
    return error_code, (rip, cs, rflags, None, None)
