"""Privilege levels 1 and 2: supervisor mode, for paging and for LASS."""

from __future__ import annotations

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Expected, completes, gp, pf, ss
from lasskvm.conformance.cases.common import HIGH_SUPERVISOR, HIGH_USER, LOW_ABSENT, LOW_SUPERVISOR, LOW_USER
from lasskvm.x86.exceptions import PF_P, PF_W
from lasskvm.x86.registers import RFLAGS_AC

__all__ = ["CASES"]

_GROUP = "rings"
_READ, _WRITE, _PUSH, _FETCH = (
    "access: mov rax, [rbx]",
    "access: mov [rbx], rax",
    "access: push rcx",
    "access: jmp rbx",
)
_PAGE_LOW, _PAGE_HIGH = layout.LOW_SUPERVISOR, layout.HIGH_SUPERVISOR

# name, program, address, SMAP, AC, with LASS, without
_ROWS: tuple[tuple[str, str, int, int, int, Expected, Expected], ...] = (
    ("read-low-supervisor", _READ, LOW_SUPERVISOR, 1, 0, gp(), completes(Effect.READ)),
    ("read-low-supervisor-ac1", _READ, LOW_SUPERVISOR, 1, 1, completes(Effect.READ), completes(Effect.READ)),
    ("read-low-supervisor-no-smap", _READ, LOW_SUPERVISOR, 0, 0, completes(Effect.READ), completes(Effect.READ)),
    ("read-low-user", _READ, LOW_USER, 1, 0, gp(), pf(PF_P, LOW_USER)),
    ("read-low-absent", _READ, LOW_ABSENT, 1, 0, gp(), pf(0, LOW_ABSENT)),
    ("read-high-supervisor", _READ, HIGH_SUPERVISOR, 1, 0, completes(Effect.READ), completes(Effect.READ)),
    ("read-high-user", _READ, HIGH_USER, 1, 0, pf(PF_P, HIGH_USER), pf(PF_P, HIGH_USER)),
    ("write-low-supervisor", _WRITE, LOW_SUPERVISOR, 1, 0, gp(), completes(Effect.WRITTEN)),
    ("write-low-user", _WRITE, LOW_USER, 1, 0, gp(), pf(PF_P | PF_W, LOW_USER)),
    ("write-low-user-ac1", _WRITE, LOW_USER, 1, 1, completes(Effect.WRITTEN), completes(Effect.WRITTEN)),
    ("push-low-supervisor", _PUSH, LOW_SUPERVISOR, 1, 0, ss(), completes(Effect.WRITTEN)),
    ("push-low-supervisor-ac1", _PUSH, LOW_SUPERVISOR, 1, 1, completes(Effect.WRITTEN), completes(Effect.WRITTEN)),
    ("fetch-low-supervisor", _FETCH, _PAGE_LOW, 1, 0, gp(_PAGE_LOW), completes(Effect.READ)),
    ("fetch-low-supervisor-ac1", _FETCH, _PAGE_LOW, 1, 1, gp(_PAGE_LOW), completes(Effect.READ)),
    ("fetch-low-supervisor-no-smap", _FETCH, _PAGE_LOW, 0, 0, gp(_PAGE_LOW), completes(Effect.READ)),
    ("fetch-high-supervisor", _FETCH, _PAGE_HIGH, 1, 0, completes(Effect.READ), completes(Effect.READ)),
)  # fmt: skip


def _case(
    cpl: int, name: str, program: str, address: int, smap: int, ac: int, lass: Expected, off: Expected
) -> Case:
    is_push = program == _PUSH
    is_fetch = program == _FETCH
    present = address != LOW_ABSENT
    return Case(
        id=f"{_GROUP}/cpl{cpl}-{name}",
        group=_GROUP,
        words=f"at CPL {cpl}: {name.replace('-', ' ')}",
        program=program,
        cpl=cpl,
        # A push stores below its stack pointer.
        registers={"rsp": address + 8, "rcx": 0x5A5A} if is_push else {"rbx": address, "rax": 0x5A5A},
        rflags=RFLAGS_AC * ac,
        smap=bool(smap),
        operand=address,
        mmio=(address,) if present and not is_fetch else (),
        lass=lass,
        off=off,
    )


CASES: tuple[Case, ...] = tuple(_case(cpl, *row) for cpl in (1, 2) for row in _ROWS)
