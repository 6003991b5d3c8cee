"""Instruction fetches: the branch completes, and the fetch at its target is judged; RIP is the target."""

from __future__ import annotations

from lasskvm.conformance import layout
from lasskvm.conformance.case import COMPLETION_CODE, Case, Effect, Expected, completes, gp, pf
from lasskvm.conformance.cases.common import LAST_PAGE, last_and_first_page
from lasskvm.conformance.setup import Bytes, Map
from lasskvm.x86.exceptions import PF_I, PF_P, PF_U
from lasskvm.x86.registers import RFLAGS_AC

__all__ = ["CASES"]

_GROUP = "fetch"
_PAGES = {
    "low-user": layout.LOW_USER,
    "low-supervisor": layout.LOW_SUPERVISOR,
    "low-absent": layout.LOW_ABSENT,
    "high-user": layout.HIGH_USER,
    "high-supervisor": layout.HIGH_SUPERVISOR,
    "high-absent": layout.HIGH_ABSENT,
}

# CPL, page          SMEP SMAP AC  with LASS, without; letters as in cases/data.py
_ROWS = (
    (0, "low-user",        1, 1, 0, "V", "F"),
    (0, "low-user",        1, 1, 1, "V", "F"),
    (0, "low-user",        1, 0, 0, "V", "F"),
    (0, "low-user",        0, 1, 0, "V", "ok"),
    (0, "low-user",        0, 1, 1, "V", "ok"),
    (0, "low-user",        0, 0, 0, "V", "ok"),
    (0, "low-user",        0, 0, 1, "V", "ok"),
    (0, "low-supervisor",  1, 1, 0, "V", "ok"),
    (0, "low-supervisor",  1, 1, 1, "V", "ok"),
    (0, "low-supervisor",  1, 0, 0, "V", "ok"),
    (0, "low-supervisor",  0, 1, 0, "V", "ok"),
    (0, "low-supervisor",  0, 0, 1, "V", "ok"),
    (0, "low-absent",      1, 1, 0, "V", "N"),
    (0, "low-absent",      0, 0, 1, "V", "N"),
    (0, "high-user",       1, 1, 0, "F", "F"),
    (0, "high-user",       0, 1, 0, "ok", "ok"),
    (0, "high-supervisor", 1, 1, 0, "ok", "ok"),
    (0, "high-supervisor", 0, 0, 1, "ok", "ok"),
    (0, "high-absent",     1, 1, 0, "N", "N"),
    (3, "low-user",        1, 1, 0, "ok", "ok"),
    (3, "low-user",        0, 0, 1, "ok", "ok"),
    (3, "low-supervisor",  1, 1, 0, "F", "F"),
    (3, "low-absent",      1, 1, 0, "N", "N"),
    (3, "high-user",       1, 1, 0, "V", "ok"),
    (3, "high-user",       0, 0, 0, "V", "ok"),
    (3, "high-user",       1, 1, 1, "V", "ok"),
    (3, "high-supervisor", 1, 1, 0, "V", "F"),
    (3, "high-supervisor", 0, 0, 1, "V", "F"),
    (3, "high-absent",     1, 1, 0, "V", "N"),
)  # fmt: skip


def _outcome(letter: str, cpl: int, target: int) -> Expected:
    if letter == "ok":
        return completes(Effect.READ)
    if letter == "V":
        return gp(target)
    return pf(PF_I | (PF_U if cpl == 3 else 0) | (PF_P if letter == "F" else 0), target, target)


def _case(cpl: int, page: str, smep: int, smap: int, ac: int, lass: str, off: str) -> Case:
    target = _PAGES[page]
    name = "user" if cpl == 3 else "supervisor"
    return Case(
        id=f"{_GROUP}/{name}-{page}-smep{smep}-smap{smap}-ac{ac}",
        group=_GROUP,
        words=f"{name}-mode fetch from a {page.replace('-', ' ')} page, SMEP={smep}, SMAP={smap}, AC={ac}",
        program="access: jmp rbx",
        cpl=cpl,
        registers={"rbx": target},
        rflags=RFLAGS_AC * ac,
        smep=bool(smep),
        smap=bool(smap),
        operand=target,
        lass=_outcome(lass, cpl, target),
        off=_outcome(off, cpl, target),
    )


_NOP = b"\x90"
#: Three bytes.
_MOV_RAX_RAX = b"\x48\x89\xc0"
_SPECIAL = (
    Case(
        id=f"{_GROUP}/running-off-the-end", group=_GROUP,
        words="straight-line code that runs off the end of the address space is fetched from 0",
        program="access: jmp rbx", forced=False,
        registers={"rbx": (1 << 64) - 1}, setup=(*last_and_first_page(), Bytes((1 << 64) - 1, _NOP)),
        operand=0, lass=gp(0), off=completes(Effect.READ),
    ),
    Case(
        id=f"{_GROUP}/instruction-across-the-end", group=_GROUP,
        words="an instruction whose last bytes lie at 0 is a violation, reported at its start",
        program="access: jmp rbx", forced=False,
        registers={"rbx": (1 << 64) - 2},
        setup=(
            *last_and_first_page(),
            Bytes((1 << 64) - 2, _MOV_RAX_RAX[:2]), Bytes(0, _MOV_RAX_RAX[2:] + COMPLETION_CODE),
        ),
        operand=0, lass=gp((1 << 64) - 2), off=completes(Effect.READ),
    ),
    Case(
        id=f"{_GROUP}/user-code-at-the-top-of-the-lower-half", group=_GROUP, cpl=3,
        words="a fetch just below the split's lower end is a user's own",
        program="access: jmp rbx", registers={"rbx": 0x7FFF_FFFF_F000},
        setup=(Map(0x7FFF_FFFF_F000, layout.SPARE_GPA, layout.USER_PAGE),), operand=0x7FFF_FFFF_F000,
        lass=completes(Effect.READ), off=completes(Effect.READ),
    ),
    Case(
        id=f"{_GROUP}/supervisor-code-at-the-bottom-of-the-upper-half", group=_GROUP,
        words="a fetch from the upper half's first page is a supervisor's own",
        program="access: jmp rbx", registers={"rbx": layout.UPPER}, setup=(Map(layout.UPPER, layout.SPARE_GPA),),
        operand=layout.UPPER, lass=completes(Effect.READ), off=completes(Effect.READ),
    ),
    Case(
        id=f"{_GROUP}/supervisor-code-in-the-last-page", group=_GROUP,
        words="a fetch from the last page of the address space is a supervisor's own",
        program="access: jmp rbx", registers={"rbx": LAST_PAGE}, setup=last_and_first_page(),
        operand=LAST_PAGE, lass=completes(Effect.READ), off=completes(Effect.READ),
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*(_case(*row) for row in _ROWS), *_SPECIAL)
