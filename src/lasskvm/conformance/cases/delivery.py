"""Delivering events: tables are read implicitly, the frame is pushed as a stack access, the handler is fetched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import (
    Case,
    Effect,
    Expected,
    Mode,
    completes,
    fault,
    gp,
    halts,
    pf,
    shutdown,
    ss,
)
from lasskvm.conformance.cases.common import HIGH_USER, LAST_PAGE, LOW_ABSENT, last_and_first_page
from lasskvm.conformance.setup import Bytes, Gate, IdtImage, Step, TssWord
from lasskvm.kvm.structures import DescriptorTable
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.descriptors import TSS64_IST1, TSS64_RSP0, TSS64_STACK_BYTES
from lasskvm.x86.exceptions import BP, DB, DE, DF, ERROR_EXT, GP, PF, PF_U, SS, UD
from lasskvm.x86.registers import RFLAGS_AC, RFLAGS_TF

__all__ = ["CASES"]

_GROUP = "delivery"
_READ = Effect.READ
_LOW = layout.LOW_SUPERVISOR
#: Programs of any privilege level may use its gate.
_VECTOR = layout.DONE_VECTOR
_INT = f"access: int {_VECTOR:#x}; next: nop"
_ARRIVES = fault(_VECTOR, None, "next")
_IST2 = TSS64_IST1 + TSS64_STACK_BYTES


def _case(name: str, words: str, program: str, lass: Expected, off: Expected, **more: Any) -> Case:
    return Case(id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, lass=lass, off=off, **more)


def _handler(vector: int) -> int:
    return layout.HANDLERS + vector * layout.HANDLER_BYTES


_LOW_IDT: dict[str, Any] = {
    "sregs": {"idt": DescriptorTable(_LOW, layout.VECTORS * layout.GATE_BYTES - 1)},
    "setup": (IdtImage(_LOW),),
    "operand": _LOW,
}


def _low_idt(name: str, words: str, program: str, off: Expected, **more: Any) -> Case:
    """A case with the IDT below the split: no event can be delivered, not even the #GP and the #DF about that."""
    lass, effect = more.pop("lass", shutdown()), more.pop("off_effect", _READ)
    return _case(f"idt-low-{name}", words, program, lass, off.but(effect=effect), **{**_LOW_IDT, **more})


_HALTS = halts("halted").but(effect=Effect.NONE)
_LOW_IDT_CASES = (
    _low_idt("int", "INT n with the IDT below the split: triple fault", _INT, _ARRIVES),
    _low_idt("int-ac1", "INT n with the IDT below the split and AC=1, which does not help an implicit access",
            _INT, _ARRIVES, rflags=RFLAGS_AC),
    _low_idt("int-user", "INT n at CPL 3 with the IDT below the split", _INT, _ARRIVES, cpl=3),
    _low_idt("int-compatibility", "INT n of a 32-bit program with the IDT below the split",
            _INT, _ARRIVES, cpl=3, mode=Mode.COMPATIBILITY),
    _low_idt("int3", "INT3", "access: int3; next: nop", fault(BP, None, "next"), cpl=3),
    _low_idt("ud", "#UD", "access: ud2; next: nop", fault(UD), forced=False),
    _low_idt("divide-error", "#DE", "access: div ecx", fault(DE), registers={"rcx": 0}),
    _low_idt("page-fault", "#PF", "access: mov rax, [rbx]", pf(PF_U, LOW_ABSENT), cpl=3,
             registers={"rbx": LOW_ABSENT}),
    _low_idt("violation", "a violation itself", "access: mov rax, [rbx]", completes(), cpl=3,
             registers={"rbx": HIGH_USER}),
    _low_idt("single-step", "#DB", "access: nop; next: nop", fault(DB, None, "next"), rflags=RFLAGS_TF, forced=False),
    _low_idt("int-no-smap", "without CR4.SMAP the IDT may be below the split", _INT, _ARRIVES, smap=False,
             lass=_ARRIVES.but(effect=_READ)),
    _low_idt("unused", "an IDT below the split harms nobody who has no event", "access: nop; hlt; halted: nop",
             halts("halted"), lass=_HALTS, off_effect=Effect.NONE),
)  # fmt: skip


def _stacks(
    name: str, words: str, program: str, lass: Expected, off: Expected, *setup: Step, **more: Any
) -> Case:
    return _case(f"stack-{name}", words, program, lass, off, setup=setup, **more)


_STACK_TOP = _LOW + PAGE_SIZE
_ON_RSP0 = Gate(_VECTOR, _handler(_VECTOR), ist=0)
_ON_IST2 = Gate(_VECTOR, _handler(_VECTOR), ist=2)
_RSP0_LOW, _IST2_LOW = TssWord(TSS64_RSP0, _STACK_TOP), TssWord(_IST2, _STACK_TOP)
_WATCHED = {"operand": _LOW}
_ON_LOW_STACK = fault(_VECTOR, None, "next").but(effect=Effect.WRITTEN)
_STACK_CASES = (
    _stacks("rsp0-low", "an interrupt of a user program whose kernel stack is below the split: #SS(0)", _INT, ss(),
            _ON_LOW_STACK, _ON_RSP0, _RSP0_LOW, cpl=3, **_WATCHED),
    _stacks("ist-low", "an interrupt of a user program whose IST stack is below the split: #SS(0)",
            _INT, ss(), _ON_LOW_STACK, _ON_IST2, _IST2_LOW, cpl=3, **_WATCHED),
    _stacks("ist-low-supervisor", "an interrupt of the kernel on an IST stack below the split", _INT, ss(),
            _ON_LOW_STACK, _ON_IST2, _IST2_LOW, **_WATCHED),
    _stacks("same-stack-low", "an interrupt of the kernel while its stack is below the split", _INT, ss(),
            _ON_LOW_STACK, _ON_RSP0, registers={"rsp": _STACK_TOP}, **_WATCHED),
    _stacks("ist-low-no-smap", "without CR4.SMAP the frame may be below the split", _INT, _ON_LOW_STACK,
            _ON_LOW_STACK, _ON_IST2, _IST2_LOW, smap=False, **_WATCHED),
    _stacks("user-stack-high", "where a user program's stack pointer is does not matter to its interrupts", _INT,
            _ARRIVES.but(rsp=HIGH_USER), _ARRIVES, _ON_RSP0, cpl=3, registers={"rsp": HIGH_USER}),
    _stacks("pf-becomes-df", "#PF, whose frame cannot be pushed: #DF", "access: mov rax, [rbx]",
            replace(fault(DF, 0), cr2=LOW_ABSENT), pf(PF_U, LOW_ABSENT).but(effect=Effect.WRITTEN),
            Gate(PF, _handler(PF), ist=2), _IST2_LOW, cpl=3, registers={"rbx": LOW_ABSENT},
            **_WATCHED),
)  # fmt: skip

_DOUBLE_FAULTS = (
    _case(
        "gp-becomes-df", "a violation whose own frame cannot be pushed: #DF, and RIP is the access",
        "access: mov rax, [rbx]", fault(DF, 0), completes(Effect.NONE),
        setup=(Gate(GP, _handler(GP), ist=2), _IST2_LOW), cpl=3, registers={"rbx": HIGH_USER}, operand=_LOW,
    ),
    _case(
        "ss-becomes-df", "a stack violation whose own frame cannot be pushed: #DF",
        "access: push rax", fault(DF, 0), completes(Effect.NONE),
        setup=(Gate(SS, _handler(SS), ist=2), _IST2_LOW), cpl=3, registers={"rsp": HIGH_USER + 8}, operand=_LOW,
    ),
    _case(
        "df-becomes-shutdown", "if #DF's frame cannot be pushed, either: triple fault", "access: mov rax, [rbx]",
        shutdown(), completes(Effect.NONE),
        setup=(Gate(GP, _handler(GP), ist=2), Gate(DF, _handler(DF), ist=2), _IST2_LOW), cpl=3,
        registers={"rbx": HIGH_USER}, operand=_LOW,
    ),
    _case(
        "ud-becomes-ss", "#UD is benign: what its delivery raises is raised by itself, with EXT in its error code",
        "access: ud2", fault(SS, ERROR_EXT), fault(UD).but(effect=Effect.WRITTEN),
        setup=(Gate(UD, _handler(UD), ist=2), _IST2_LOW), cpl=3, operand=_LOW, forced=False,
    ),
)  # fmt: skip

_HANDLERS = (
    _case(
        "handler-low", "a handler below the split: the event is delivered, its first fetch faults", _INT,
        gp(_LOW, cs=layout.KERNEL_CS), completes(_READ), setup=(Gate(_VECTOR, _LOW),), operand=_LOW,
    ),
    _case(
        "handler-low-user", "a handler below the split for an event of a user program",
        _INT, gp(_LOW, cs=layout.KERNEL_CS),
        completes(_READ), setup=(Gate(_VECTOR, _LOW),), operand=_LOW, cpl=3,
    ),
    _case(
        "handler-low-ac1", "a handler below the split with AC=1",
        _INT, gp(_LOW, ac=1), completes(_READ), setup=(Gate(_VECTOR, _LOW),),
        operand=_LOW, rflags=RFLAGS_AC,
    ),
    _case(
        "handler-last-page", "a handler in the last page of the address space is the kernel's own", _INT,
        completes(_READ), completes(_READ), setup=(*last_and_first_page(), Gate(_VECTOR, LAST_PAGE)),
        operand=LAST_PAGE, cpl=3,
    ),
    _case(
        "frame-of-a-violation", "the frame of a violation: error code 0, and RF is set", "access: mov rax, [rbx]",
        gp(rf=1, cs=layout.USER_CS, ss=layout.USER_SS), completes(_READ), cpl=3, registers={"rbx": HIGH_USER},
        operand=HIGH_USER,
    ),
    _case(
        "handler-continues", "a handler that repairs the address and returns: the access is made again",
        "access: mov rax, [rbx]; jmp end; fixup: mov rbx, rcx; add rsp, 8; iretq; end: nop", completes(_READ),
        completes(Effect.NONE), registers={"rbx": _LOW + 0x800, "rcx": layout.HIGH_SUPERVISOR + 0x800},
        setup=(Gate(GP, "fixup", dpl=0), Bytes(_LOW + 0x800, bytes(8))), operand=layout.HIGH_SUPERVISOR,
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_LOW_IDT_CASES, *_STACK_CASES, *_DOUBLE_FAULTS, *_HANDLERS)
