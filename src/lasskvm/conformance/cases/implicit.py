"""Implicit accesses: LDT, GDT, IDT and TSS are read as supervisor at any CPL, and RFLAGS.AC does not help.

A GDT, IDT or TSS that lies wholly below the split makes every exception a triple fault. So these cases put the tables
at the very end of the address space: what they need themselves lies above, and what is under test has wrapped to 0 and
lies below.
"""

from __future__ import annotations

from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Expected, Mode, completes, fault, gp, halts, pf, shutdown
from lasskvm.conformance.cases.common import HIGH_SUPERVISOR, LAST_PAGE, LOW_USER, last_and_first_page
from lasskvm.conformance.setup import Descriptor, EveryGate, Gate, GdtImage, Map, Step, TssWord, Words
from lasskvm.kvm.structures import DescriptorTable, Segment
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.descriptors import (
    SYS_INTERRUPT_GATE,
    TSS64_BYTES,
    TSS64_IO_MAP_BASE,
    TSS64_IST1,
    TSS64_IST7,
    make_gate,
    make_segment,
)
from lasskvm.x86.exceptions import PF_P, UD
from lasskvm.x86.registers import (
    AR_CODE64,
    AR_DATA,
    AR_DPL_SHIFT,
    AR_LDT,
    AR_P,
    AR_TSS64_BUSY,
    MASK32,
    RFLAGS_AC,
)

__all__ = ["CASES"]

_GROUP = "implicit"
_READ = Effect.READ
_AVAILABLE_TSS = AR_P | 9
_TOP = 1 << 64

# ------------------------------------------------------------------------------------------------------------ LDT

_LDT_ENTRY = layout.LDT_DATA & layout.SELECTOR_INDEX
_LDT_LIMIT = 0x1F


def _ldt(page: int) -> dict[str, Any]:
    """LDTR at *page*, with its one data segment."""
    return {
        "sregs": {"ldt": Segment(layout.LDT_SELECTOR, page, _LDT_LIMIT, AR_LDT)},
        "setup": (Words(page + _LDT_ENTRY, (layout.ldt_data_descriptor(),)),),
        "operand": page,
    }


def _case(name: str, words: str, program: str, lass: Expected, off: Expected, **more: Any) -> Case:
    return Case(id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, lass=lass, off=off, **more)


_SELECTOR = {"rax": layout.LDT_DATA}
_LOAD = "access: mov fs, eax"
_LOW, _HIGH = layout.LOW_SUPERVISOR, layout.HIGH_SUPERVISOR
_LDT_CASES = (
    _case(
        "ldt-low", "a segment from an LDT below the split", _LOAD, gp(fs=0), completes(_READ), registers=_SELECTOR,
        **_ldt(_LOW),
    ),
    _case(
        "ldt-low-ac1", "AC=1 does not help an implicit access", _LOAD, gp(), completes(_READ), registers=_SELECTOR,
        rflags=RFLAGS_AC, **_ldt(_LOW),
    ),
    _case(
        "ldt-low-no-smap", "without CR4.SMAP an LDT below the split is allowed", _LOAD,
        completes(_READ, fs=layout.LDT_DATA), completes(_READ), registers=_SELECTOR, smap=False, **_ldt(_LOW),
    ),
    _case(
        "ldt-low-user", "at CPL 3, too, the LDT is read as supervisor: below the split a violation", _LOAD, gp(),
        completes(_READ), registers=_SELECTOR, cpl=3, **_ldt(_LOW),
    ),
    _case(
        "ldt-low-user-ac1", "at CPL 3, AC=1 does not help the read of an LDT below the split",
        _LOAD, gp(), completes(_READ), registers=_SELECTOR, cpl=3,
        rflags=RFLAGS_AC, **_ldt(_LOW),
    ),
    _case(
        "ldt-low-user-page", "an LDT on a low user page: violation, or SMAP's page fault", _LOAD, gp(),
        pf(PF_P, layout.LOW_USER + _LDT_ENTRY), registers=_SELECTOR, **_ldt(layout.LOW_USER),
    ),
    _case(
        "ldt-low-user-page-ac1", "SMAP does not look at AC for an LDT on a low user page, either", _LOAD, gp(),
        pf(PF_P, layout.LOW_USER + _LDT_ENTRY), registers=_SELECTOR, rflags=RFLAGS_AC, **_ldt(layout.LOW_USER),
    ),
    _case(
        "ldt-high", "an LDT above the split is where it belongs", _LOAD, completes(_READ, fs=layout.LDT_DATA),
        completes(_READ), registers=_SELECTOR, **_ldt(_HIGH),
    ),
    _case(
        "ldt-high-user", "an LDT above the split serves a user program that may not touch it itself", _LOAD,
        completes(_READ, fs=layout.LDT_DATA), completes(_READ), registers=_SELECTOR, cpl=3, **_ldt(_HIGH),
    ),
    _case(
        "ldt-high-user-page", "an LDT on a user page above the split: SMAP's page fault, no violation", _LOAD,
        pf(PF_P, layout.HIGH_USER + _LDT_ENTRY), pf(PF_P, layout.HIGH_USER + _LDT_ENTRY), registers=_SELECTOR,
        cpl=3, **_ldt(layout.HIGH_USER),
    ),
    _case(
        "ldt-low-pop", "POP to a segment register", f"push {layout.LDT_DATA}; access: pop fs", gp(fs=0),
        completes(_READ), **_ldt(_LOW),
    ),
    _case(
        "ldt-low-verr", "VERR: a violation and not just ZF=0", "access: verr ax", gp(), completes(_READ, zf=1),
        registers=_SELECTOR, **_ldt(_LOW),
    ),
    _case(
        "ldt-low-verw-user", "VERW at CPL 3", "access: verw ax", gp(), completes(_READ, zf=1),
        registers=_SELECTOR, cpl=3, **_ldt(_LOW),
    ),
    _case(
        "ldt-low-lar", "LAR", "access: lar ecx, eax", gp(), completes(_READ, zf=1), registers=_SELECTOR, **_ldt(_LOW),
    ),
    _case(
        "ldt-low-lsl-user", "LSL at CPL 3", "access: lsl ecx, eax", gp(), completes(_READ, zf=1, rcx=MASK32),
        registers=_SELECTOR, cpl=3, **_ldt(_LOW),
    ),
    _case(
        "ldt-low-null-selector", "a null selector needs no descriptor", _LOAD, completes(Effect.NONE),
        completes(Effect.NONE), registers={"rax": 0}, **_ldt(_LOW),
    ),
    _case(
        "ldt-low-compatibility", "a 32-bit program with an LDT below the split", _LOAD, gp(), completes(_READ),
        registers=_SELECTOR, cpl=3, mode=Mode.COMPATIBILITY, **_ldt(_LOW),
    ),
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------ GDT

#: GDTR here leaves the usual selectors above the split; those from 100H on have wrapped to address 0.
_GDT = _TOP - layout.GDT_BYTES
_WRAPPED = layout.GDT_BYTES
_GDTR = {"gdt": DescriptorTable(_GDT, 2 * layout.GDT_BYTES - 1)}


def _code(cpl: int) -> int:
    return make_segment(0, MASK32, AR_CODE64 | cpl << AR_DPL_SHIFT)


def _gdt(
    name: str, words: str, program: str, off: Expected, descriptor: int, *, high: int | None = None,
    selector: int = _WRAPPED, setup: tuple[Step, ...] = (), lass: Expected | None = None, **more: Any,
) -> Case:  # fmt: skip
    """A case whose *descriptor* at *selector* lies below the split."""
    return _case(
        f"gdt-{name}", words, program, lass or gp(), off, sregs=_GDTR, operand=0,
        setup=(*last_and_first_page(), GdtImage(_GDT), Descriptor(selector, descriptor, high, _GDT), *setup), **more,
    )  # fmt: skip


_LDT_DESCRIPTOR = make_segment(layout.LDT & MASK32, _LDT_LIMIT, AR_LDT)
_FLAT = make_segment(0, MASK32, AR_DATA | 3 << AR_DPL_SHIFT)
_USER_SELECTOR = _WRAPPED | 3
_FAR_POINTER_USER, _FAR_POINTER = LOW_USER, HIGH_SUPERVISOR
_GDT_CASES = (
    _gdt("mov-fs", "a data segment from a GDT entry below the split", "access: mov fs, eax", completes(_READ), _FLAT,
         registers={"rax": _WRAPPED}),
    _gdt("mov-fs-ac1", "AC=1 does not help", "access: mov fs, eax", completes(_READ), _FLAT,
         registers={"rax": _WRAPPED}, rflags=RFLAGS_AC),
    _gdt("mov-fs-no-smap", "without CR4.SMAP it is allowed", "access: mov fs, eax", completes(_READ), _FLAT,
         registers={"rax": _WRAPPED}, smap=False, lass=completes(_READ)),
    _gdt("mov-ds-user", "at CPL 3", "access: mov ds, eax", completes(_READ), _FLAT,
         registers={"rax": _USER_SELECTOR}, cpl=3),
    _gdt("mov-ds-user-ac1", "at CPL 3 with AC=1", "access: mov ds, eax", completes(_READ), _FLAT,
         registers={"rax": _USER_SELECTOR}, cpl=3, rflags=RFLAGS_AC),
    _gdt("mov-ss", "a stack segment: #GP(0), as it is no stack access", "access: mov ss, eax", completes(_READ),
         make_segment(0, MASK32, AR_DATA), registers={"rax": _WRAPPED}),
    _gdt("pop-gs", "POP GS", f"push {_WRAPPED}; access: pop gs", completes(_READ), _FLAT),
    _gdt("verr", "VERR", "access: verr ax", completes(_READ, zf=1), _FLAT, registers={"rax": _WRAPPED}),
    _gdt("lar-user", "LAR at CPL 3", "access: lar ecx, eax", completes(_READ, zf=1), _FLAT,
         registers={"rax": _USER_SELECTOR}, cpl=3),
    _gdt("lsl", "LSL", "access: lsl ecx, eax", completes(_READ, zf=1), _FLAT, registers={"rax": _WRAPPED}),
    _gdt("far-jump", "a far JMP: RIP is the JMP, for the descriptor comes before the branch",
         "access: jmp tbyte [rbx]; next: nop", completes(_READ), _code(0), registers={"rbx": _FAR_POINTER},
         setup=(Words(_FAR_POINTER, ("next", _WRAPPED)),)),
    _gdt("far-jump-user", "a far JMP at CPL 3", "access: jmp tbyte [rbx]; next: nop", completes(_READ), _code(3),
         registers={"rbx": _FAR_POINTER_USER}, setup=(Words(_FAR_POINTER_USER, ("next", _USER_SELECTOR)),), cpl=3),
    _gdt("far-call", "a far CALL: nothing is pushed", "access: call tbyte [rbx]; next: nop", completes(_READ),
         _code(0), registers={"rbx": _FAR_POINTER}, setup=(Words(_FAR_POINTER, ("next", _WRAPPED)),)),
    _gdt("far-return", "a far RET: nothing is popped", f"lea rax, [rip + next]; push {_WRAPPED}; push rax; "
         "access: retfq; next: nop", completes(_READ), _code(0)),
    _gdt("iret", "IRET", f"lea rcx, [rip + next]; mov rdx, rsp; push {layout.KERNEL_SS}; push rdx; push 2; "
         f"push {_WRAPPED}; push rcx; access: iretq; next: nop", completes(_READ), _code(0)),
    _gdt("iret-to-user", "IRET to user mode", f"push {layout.USER_SS}; push {layout.USER_STACK_TOP}; push 2; "
         f"push {_USER_SELECTOR}; push {layout.LOW_USER}; access: iretq", completes(_READ), _code(3)),
    _gdt("lldt", "LLDT", "access: lldt ax", completes(_READ, ldt=_WRAPPED), _LDT_DESCRIPTOR,
         high=layout.LDT >> 32, registers={"rax": _WRAPPED}),
    _gdt("lldt-ac1", "LLDT with AC=1", "access: lldt ax", completes(_READ), _LDT_DESCRIPTOR,
         high=layout.LDT >> 32, registers={"rax": _WRAPPED}, rflags=RFLAGS_AC),
    _gdt("lldt-crosses", "LLDT whose 16-byte descriptor is half above and half below", "access: lldt ax",
         completes(_READ), _LDT_DESCRIPTOR, high=layout.LDT >> 32,
         selector=_WRAPPED - 8, registers={"rax": _WRAPPED - 8}),
    _gdt("ltr", "LTR", "access: ltr ax", completes(Effect.WRITTEN, tr=_WRAPPED),
         make_segment(layout.TSS & MASK32, layout.TSS_LIMIT, _AVAILABLE_TSS), high=layout.TSS >> 32,
         registers={"rax": _WRAPPED}),
    _gdt("own-half", "a selector whose descriptor lies above", "access: mov fs, eax", completes(Effect.NONE), _FLAT,
         registers={"rax": layout.USER_SS}, lass=completes(Effect.NONE)),
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------ IDT

#: IDTR here leaves the gates of exceptions above the split; those from vector 32 on have wrapped to address 0.
_IDT = _TOP - 0x200
_IDTR = {"idt": DescriptorTable(_IDT, layout.VECTORS * layout.GATE_BYTES - 1)}
_LOW_VECTOR = 0x20
_IDT_PAGES: tuple[Step, ...] = (
    Map(LAST_PAGE, layout.SPARE_GPA), Map(0, layout.SPARE_GPA + PAGE_SIZE),
)  # fmt: skip


def _idt_image() -> tuple[Step, ...]:
    """The usual gates at ``_IDT``, as far as the last page and the first reach."""
    steps: list[Step] = [*_IDT_PAGES]
    for vector in (*range(32), _LOW_VECTOR, _LOW_VECTOR + 1):
        handler = layout.HANDLERS + vector * layout.HANDLER_BYTES
        attributes = SYS_INTERRUPT_GATE | AR_P | 3 << AR_DPL_SHIFT
        gate = make_gate(handler, layout.KERNEL_CS, attributes, layout.IST), handler >> 32
        steps.append(Words((_IDT + vector * layout.GATE_BYTES) % _TOP, gate))
    return tuple(steps)


_IDT_CASES = tuple(
    _case(
        f"idt-int-{name}", f"INT n through a gate below the split, {words}", f"access: int {_LOW_VECTOR:#x}; next: nop",
        lass, fault(_LOW_VECTOR, None, "next"), sregs=_IDTR, setup=_idt_image(), operand=0, **more,
    )
    for name, words, lass, more in (
        ("supervisor", "CPL 0", gp(), {}),
        ("supervisor-ac1", "CPL 0, AC=1", gp(), {"rflags": RFLAGS_AC}),
        ("user", "CPL 3", gp(), {"cpl": 3}),
        ("user-ac1", "CPL 3, AC=1", gp(), {"cpl": 3, "rflags": RFLAGS_AC}),
        ("no-smap", "without CR4.SMAP", fault(_LOW_VECTOR, None, "next"), {"smap": False}),
        ("user-no-smap", "CPL 3, without CR4.SMAP", fault(_LOW_VECTOR, None, "next"), {"smap": False, "cpl": 3}),
        ("compatibility", "by a 32-bit program", gp(), {"cpl": 3, "mode": Mode.COMPATIBILITY}),
    )
)  # fmt: skip
_OWN_GATE = _case(
    "idt-own-half", "INT3 through a gate above the split, from the same IDT", "access: int3; next: nop",
    fault(3, None, "next"), fault(3, None, "next"), sregs=_IDTR, setup=_idt_image(), operand=0, cpl=3,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------ TSS

#: TR here leaves RSP0 and IST1 above the split; IST7 and the I/O map have wrapped to address 0 and up.
_TSS = _TOP - 0x50
_TSS_LIMIT = TSS64_BYTES + 0x2000
_TR = {"tr": Segment(layout.TSS_SELECTOR, _TSS, _TSS_LIMIT, AR_TSS64_BUSY)}
_VECTOR = 0x81
_TSS_PAGES: tuple[Step, ...] = (
    *last_and_first_page(),
    Map(PAGE_SIZE, layout.SPARE_GPA + 2 * PAGE_SIZE, pages=2),
    TssWord(0x04, layout.RING0_STACK_TOP, _TSS),
    TssWord(TSS64_IST1, layout.IST_STACK_TOP, _TSS),
    TssWord(TSS64_IST7, layout.KERNEL_STACK_TOP, _TSS),
)  # fmt: skip


def _tss(
    name: str, words: str, lass: Expected, off: Expected, program: str, setup: tuple[Step, ...], **more: Any
) -> Case:
    return _case(
        f"tss-{name}", words, program, lass, off, sregs=_TR, operand=0, setup=(*_TSS_PAGES, *setup), **more
    )


_IST7 = (Gate(_VECTOR, layout.HANDLERS + _VECTOR * layout.HANDLER_BYTES, ist=7),)
_INT = f"access: int {_VECTOR:#x}; next: nop"
_ARRIVES = fault(_VECTOR, None, "next")
#: A map that allows every port, and its last byte of ones.
_IO_MAP = (
    TssWord(TSS64_IO_MAP_BASE, TSS64_BYTES, _TSS),
    *(TssWord(TSS64_BYTES + 8 * number, 0, _TSS) for number in range(0x18)),
)
_TSS_CASES = (
    _tss("ist", "an IST stack pointer below the split", gp(), _ARRIVES, _INT, _IST7),
    _tss("ist-ac1", "an IST stack pointer below the split with AC=1", gp(), _ARRIVES, _INT, _IST7, rflags=RFLAGS_AC),
    _tss("ist-user", "an IST stack pointer below the split at CPL 3", gp(), _ARRIVES, _INT, _IST7, cpl=3),
    _tss("ist-no-smap", "an IST stack pointer below the split is allowed without CR4.SMAP",
         _ARRIVES, _ARRIVES, _INT, _IST7, smap=False),
    _tss("own-half", "an IST stack pointer above the split, from the same TSS", _ARRIVES, _ARRIVES, _INT,
         (Gate(_VECTOR, layout.HANDLERS + _VECTOR * layout.HANDLER_BYTES, ist=1),), cpl=3),
    _tss("io-map", "an I/O permission bitmap below the split: a violation, though it would allow the port", gp(),
         completes(_READ), "access: in al, dx", _IO_MAP, cpl=3, registers={"rdx": 0x40}),
    _tss("io-map-ac1", "an I/O permission bitmap below the split with AC=1",
         gp(), completes(_READ), "access: in al, dx", _IO_MAP, cpl=3,
         registers={"rdx": 0x40}, rflags=RFLAGS_AC),
    _tss("io-map-no-smap", "an I/O permission bitmap below the split is allowed without CR4.SMAP",
         completes(_READ), completes(_READ), "access: out dx, al",
         _IO_MAP, cpl=3, registers={"rdx": 0x40}, smap=False),
    _tss("io-map-not-asked", "at CPL 0 nobody asks the bitmap", completes(Effect.NONE), completes(Effect.NONE),
         "access: in al, dx", _IO_MAP, registers={"rdx": 0x40}),
)  # fmt: skip

# ------------------------------------------------------------------------------------- wholly below the split

_LOW_GDT = {"gdt": DescriptorTable(_LOW, layout.GDT_BYTES - 1)}
_LOW_TR = {"tr": Segment(layout.TSS_SELECTOR, _LOW + 0x800, TSS64_BYTES - 1, AR_TSS64_BUSY)}
_LOW_TSS: tuple[Step, ...] = (
    TssWord(0x04, layout.RING0_STACK_TOP, _LOW + 0x800),
    TssWord(TSS64_IST1, layout.IST_STACK_TOP, _LOW + 0x800),
)
_UNUSED = halts("halted").but(effect=Effect.NONE)
_WHOLE = (
    _case(
        "whole-gdt-low", "with the GDT below the split no exception can be delivered: triple fault",
        "access: ud2; next: nop", shutdown(), fault(UD).but(effect=_READ), sregs=_LOW_GDT,
        setup=(GdtImage(_LOW),), operand=_LOW, forced=False,
    ),
    _case(
        "whole-gdt-low-unused", "a GDT below the split harms nobody until it is used", "access: nop; hlt; halted: nop",
        _UNUSED, _UNUSED, sregs=_LOW_GDT, setup=(GdtImage(_LOW),), operand=_LOW,
    ),
    _case(
        "whole-tss-low", "with the TSS below the split no exception of a user program can be delivered",
        "access: ud2", shutdown(), fault(UD).but(effect=_READ), sregs=_LOW_TR,
        setup=_LOW_TSS, operand=_LOW + 0x800, cpl=3,
        forced=False,
    ),
    _case(
        "whole-tss-low-without-stack-switch",
        "with the TSS below the split an exception without a stack switch can be delivered",
        "access: mov rax, [rbx]", gp(), completes(Effect.NONE), sregs=_LOW_TR, setup=(*_LOW_TSS, EveryGate(0)),
        operand=_LOW + 0x800, registers={"rbx": layout.LOW_SUPERVISOR + PAGE_SIZE},
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_LDT_CASES, *_GDT_CASES, *_IDT_CASES, _OWN_GATE, *_TSS_CASES, *_WHOLE)
