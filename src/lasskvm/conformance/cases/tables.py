"""Descriptor-table instructions: their operands are data; the bases that they load are named, not accessed."""

from __future__ import annotations

from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Expected, completes, gp
from lasskvm.conformance.cases.common import (
    HIGH_SUPERVISOR,
    LOW_SUPERVISOR,
    LOW_USER,
    Instruction,
    two_sides,
)
from lasskvm.conformance.setup import TableRegister
from lasskvm.x86.registers import CR4_UMIP, RFLAGS_AC

__all__ = ["CASES"]

_GROUP = "tables"
_W = Effect.WRITTEN
_GDT_LIMIT, _IDT_LIMIT = layout.GDT_BYTES - 1, layout.VECTORS * 16 - 1


def _operand(base: int, limit: int) -> bytes:
    return limit.to_bytes(2, "little") + base.to_bytes(8, "little")


_NULL_SELECTOR = bytes(2)
_OPERANDS = two_sides(
    _GROUP,
    (
        Instruction(name="sgdt", program="access: sgdt [rbx]", effect=_W),
        Instruction(name="sidt", program="access: sidt [rbx]", effect=_W),
        Instruction(name="sgdt-rsp", program="access: sgdt [rsp]", effect=_W, at="rsp", stack=True),
        Instruction(name="sldt", program="access: sldt word [rbx]", effect=_W),
        Instruction(name="str", program="access: str word [rbx]", effect=_W),
        Instruction(name="smsw", program="access: smsw word [rbx]", effect=_W),
        Instruction(name="verr", program="access: verr word [rbx]", content=_NULL_SELECTOR),
        Instruction(name="verw", program="access: verw word [rbx]", content=_NULL_SELECTOR),
        Instruction(name="lar", program="access: lar eax, word [rbx]", content=_NULL_SELECTOR),
        Instruction(name="lsl", program="access: lsl eax, word [rbx]", content=_NULL_SELECTOR),
        Instruction(
            name="lgdt", program="access: lgdt [rbx]", content=_operand(layout.GDT, _GDT_LIMIT), privileged=True
        ),
        Instruction(
            name="lidt", program="access: lidt [rbx]", content=_operand(layout.IDT, _IDT_LIMIT), privileged=True
        ),
        Instruction(
            name="lgdt-rbp", program="access: lgdt [rbp]", content=_operand(layout.GDT, _GDT_LIMIT), privileged=True,
            at="rbp", stack=True,
        ),
        Instruction(name="lldt", program="access: lldt word [rbx]", content=_NULL_SELECTOR, privileged=True),
        Instruction(
            name="lmsw", program="access: lmsw word [rbx]", content=(0x31).to_bytes(2, "little"), privileged=True
        ),
    ),
)  # fmt: skip


def _case(name: str, words: str, program: str, lass: Expected, off: Expected, **more: Any) -> Case:
    return Case(id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, lass=lass, off=off, **more)


_BACK = HIGH_SUPERVISOR + 0x40
_NOT_CANONICAL = 1 << 47
_LOADS = (
    _case(
        "lgdt-ac1", "LGDT's operand is data: AC=1 allows it below the split", "access: lgdt [rbx]",
        completes(Effect.READ), completes(Effect.READ), registers={"rbx": LOW_USER}, rflags=RFLAGS_AC,
        setup=(TableRegister(LOW_USER, layout.GDT, _GDT_LIMIT),), operand=LOW_USER, mmio=(LOW_USER,),
    ),
    _case(
        "lidt-no-smap", "LIDT's operand is data: allowed below the split without SMAP",
        "access: lidt [rbx]", completes(Effect.READ),
        completes(Effect.READ), registers={"rbx": LOW_SUPERVISOR}, smap=False,
        setup=(TableRegister(LOW_SUPERVISOR, layout.IDT, _IDT_LIMIT),), operand=LOW_SUPERVISOR,
        mmio=(LOW_SUPERVISOR,),
    ),
    _case(
        "lgdt-base-low", "LGDT loads a base below the split: no access, no violation",
        "access: lgdt [rbx]; lgdt [rcx]", completes(Effect.READ, gdt_base=layout.GDT), completes(Effect.READ),
        registers={"rbx": HIGH_SUPERVISOR, "rcx": _BACK}, operand=HIGH_SUPERVISOR,
        setup=(
            TableRegister(HIGH_SUPERVISOR, LOW_SUPERVISOR, _GDT_LIMIT), TableRegister(_BACK, layout.GDT, _GDT_LIMIT),
        ),
    ),
    _case(
        "lidt-base-low", "LIDT likewise", "access: lidt [rbx]; lidt [rcx]",
        completes(Effect.READ, idt_base=layout.IDT), completes(Effect.READ),
        registers={"rbx": HIGH_SUPERVISOR, "rcx": _BACK}, operand=HIGH_SUPERVISOR,
        setup=(
            TableRegister(HIGH_SUPERVISOR, LOW_SUPERVISOR, _IDT_LIMIT), TableRegister(_BACK, layout.IDT, _IDT_LIMIT),
        ),
    ),
    _case(
        "lgdt-base-not-canonical", "a base that is not canonical is #GP(0), and GDTR stays", "access: lgdt [rbx]",
        gp(gdt_base=layout.GDT).but(effect=Effect.READ), gp(gdt_base=layout.GDT).but(effect=Effect.READ),
        registers={"rbx": HIGH_SUPERVISOR}, operand=HIGH_SUPERVISOR,
        setup=(TableRegister(HIGH_SUPERVISOR, _NOT_CANONICAL, _GDT_LIMIT),),
    ),
    _case(
        "lgdt-violation-keeps-gdtr", "a violation leaves GDTR as it is", "access: lgdt [rbx]",
        gp(gdt_base=layout.GDT), completes(Effect.READ), registers={"rbx": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR,
        setup=(TableRegister(LOW_SUPERVISOR, layout.GDT, _GDT_LIMIT),),
    ),
    _case(
        "lidt-violation-keeps-idtr", "a violation leaves IDTR as it is", "access: lidt [rbx]", gp(idt_base=layout.IDT),
        completes(Effect.READ), registers={"rbx": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR,
        setup=(TableRegister(LOW_SUPERVISOR, layout.IDT, _IDT_LIMIT),),
    ),
    _case(
        "lgdt-user", "LGDT at CPL 3 is #GP(0) for its privilege", "access: lgdt [rbx]", gp(), gp(), cpl=3,
        registers={"rbx": LOW_USER},
    ),
    _case(
        "sgdt-umip", "with CR4.UMIP, SGDT at CPL 3 is #GP(0) before its operand is looked at", "access: sgdt [rbx]",
        gp(), gp(), cpl=3, cr4=CR4_UMIP, needs=frozenset({"umip"}), registers={"rbx": LOW_USER}, operand=LOW_USER,
    ),
    _case(
        "sgdt-register-forms", "SLDT to a register accesses nothing", "access: sldt eax", completes(), completes(),
        cpl=3,
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_OPERANDS, *_LOADS)
