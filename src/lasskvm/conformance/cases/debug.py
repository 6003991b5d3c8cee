"""Single-stepping and breakpoints: an access that is a violation has not happened, a branch that completed has."""

from __future__ import annotations

from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Expected, completes, fault, gp, ss
from lasskvm.conformance.cases.common import HIGH_SUPERVISOR, HIGH_USER, LOW_SUPERVISOR
from lasskvm.x86.exceptions import DB
from lasskvm.x86.registers import DR6_B0, DR6_BS, DR6_FIXED, RFLAGS_TF

__all__ = ["CASES"]

_GROUP = "debug"
_LOW = layout.LOW_SUPERVISOR
#: DR7: breakpoint 0 for instructions, and for 8 bytes of data read or written.
_ON_INSTRUCTION, _ON_DATA = 0x401, 0x401 | 0xB << 16
_STEPPED, _HIT = DR6_FIXED | DR6_BS, DR6_FIXED | DR6_B0
#: Behind the hit of a data breakpoint single-stepping is not on.
_SET = "mov dr0, rbx; mov dr7, rcx; "


def _case(name: str, words: str, program: str, lass: Expected, off: Expected, **more: Any) -> Case:
    return Case(
        id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, lass=lass, off=off,
        **{"forced": False, **more},
    )  # fmt: skip


_STEPPING = (
    _case(
        "step-own-half", "single-step of an access that is allowed: #DB behind it",
        "access: mov rax, [rbx]; next: nop", fault(DB, None, "next", dr6=_STEPPED).but(effect=Effect.READ),
        fault(DB, None, "next", dr6=_STEPPED), rflags=RFLAGS_TF,
        registers={"rbx": HIGH_SUPERVISOR}, operand=HIGH_SUPERVISOR,
        mmio=(HIGH_SUPERVISOR,),
    ),
    _case(
        "step-violation", "single-step of a violation: #GP(0), no #DB, and TF is in its frame",
        "access: mov rax, [rbx]; next: nop", gp(tf=1, dr6=DR6_FIXED),
        fault(DB, None, "next", dr6=_STEPPED).but(effect=Effect.READ), rflags=RFLAGS_TF,
        registers={"rbx": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR, mmio=(),
    ),
    _case(
        "step-violation-user", "single-step of a violation at CPL 3",
        "access: mov [rbx], rax; next: nop", gp(tf=1, dr6=DR6_FIXED),
        fault(DB, None, "next").but(effect=Effect.WRITTEN), rflags=RFLAGS_TF, cpl=3, registers={"rbx": HIGH_USER},
        operand=HIGH_USER,
    ),
    _case(
        "step-stack-violation", "single-step of a push that is a violation",
        "access: push rax; next: nop", ss(tf=1, dr6=DR6_FIXED),
        fault(DB, None, "next").but(effect=Effect.WRITTEN), rflags=RFLAGS_TF, cpl=3,
        registers={"rsp": HIGH_USER + 8}, operand=HIGH_USER,
    ),
    _case(
        "step-branch", "a branch below the split has completed: #DB at its target comes before the fetch there",
        "access: jmp rbx", fault(DB, None, _LOW, dr6=_STEPPED).but(effect=Effect.NONE),
        fault(DB, None, _LOW, dr6=_STEPPED), rflags=RFLAGS_TF, registers={"rbx": _LOW}, operand=_LOW,
    ),
    _case(
        "step-branch-user", "a branch above the split at CPL 3 has completed: #DB at its target comes first",
        "access: call rbx",
        fault(DB, None, layout.HIGH_USER, dr6=_STEPPED).but(effect=Effect.NONE),
        fault(DB, None, layout.HIGH_USER, dr6=_STEPPED), rflags=RFLAGS_TF, cpl=3,
        registers={"rbx": layout.HIGH_USER}, operand=layout.HIGH_USER,
    ),
)  # fmt: skip

_BREAKPOINTS = (
    _case(
        "data-breakpoint-violation", "a data breakpoint on an address that may not be accessed is not hit",
        f"{_SET}access: mov rax, [rbx]; next: nop", gp(dr6=DR6_FIXED),
        fault(DB, None, "next", dr6=_HIT).but(effect=Effect.READ),
        registers={"rbx": LOW_SUPERVISOR, "rcx": _ON_DATA}, operand=LOW_SUPERVISOR,
    ),
    _case(
        "data-breakpoint-own-half", "one on an address that may be is", f"{_SET}access: mov [rbx], rax; next: nop",
        fault(DB, None, "next", dr6=_HIT).but(effect=Effect.WRITTEN), fault(DB, None, "next", dr6=_HIT),
        registers={"rbx": HIGH_SUPERVISOR, "rcx": _ON_DATA}, operand=HIGH_SUPERVISOR,
    ),
    _case(
        "instruction-breakpoint", "an instruction breakpoint at a branch target comes before the fetch there",
        f"{_SET}access: jmp rbx", fault(DB, None, _LOW, dr6=_HIT).but(effect=Effect.NONE),
        fault(DB, None, _LOW, dr6=_HIT),
        registers={"rbx": _LOW, "rcx": _ON_INSTRUCTION}, operand=_LOW,
    ),
    _case(
        "breakpoint-address-low", "an address below the split may be loaded into a debug register",
        "access: mov dr0, rbx; mov rax, dr0", completes(rax=LOW_SUPERVISOR), completes(rax=LOW_SUPERVISOR),
        registers={"rbx": LOW_SUPERVISOR}, forced=True,
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_STEPPING, *_BREAKPOINTS)
