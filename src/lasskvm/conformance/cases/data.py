"""Loads, stores and read-modify-writes: every kind of page, privilege level, CR4.SMAP and RFLAGS.AC.

Each row says what the manual says: first for CR4.LASS = 1, then for CR4.LASS = 0. Letters: ``V`` a LASS violation,
#GP(0); ``F`` a page fault of a page that is there (protection), ``N`` one of a page that is not; ``ok``.
"""

from __future__ import annotations

from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import COMPLETION_CODE, Case, Effect, Expected, completes, gp, pf
from lasskvm.conformance.cases.common import HIGH_SUPERVISOR, HIGH_USER, LOW_SUPERVISOR, LOW_USER, PAGES
from lasskvm.conformance.setup import Bytes, Gate
from lasskvm.x86.exceptions import PF_P, PF_U, PF_W
from lasskvm.x86.registers import RFLAGS_AC

__all__ = ["CASES"]

_GROUP = "data"

#: Kinds of access: program, effect, whether page faults report a write.
_ACCESSES = {
    "read": ("access: mov rax, [rbx]", Effect.READ, False),
    "write": ("access: mov [rbx], rax", Effect.WRITTEN, True),
    "add": ("access: add [rbx], rax", Effect.WRITTEN, True),
}

# page               SMAP AC  with LASS, without
_SUPERVISOR = (
    ("low-user",        1, 0, "V", "F"),
    ("low-user",        1, 1, "ok", "ok"),
    ("low-user",        0, 0, "ok", "ok"),
    ("low-supervisor",  1, 0, "V", "ok"),
    ("low-supervisor",  1, 1, "ok", "ok"),
    ("low-supervisor",  0, 0, "ok", "ok"),
    ("low-absent",      1, 0, "V", "N"),
    ("low-absent",      1, 1, "N", "N"),
    ("low-absent",      0, 0, "N", "N"),
    ("high-user",       1, 0, "F", "F"),
    ("high-user",       1, 1, "ok", "ok"),
    ("high-user",       0, 0, "ok", "ok"),
    ("high-supervisor", 1, 0, "ok", "ok"),
    ("high-supervisor", 1, 1, "ok", "ok"),
    ("high-supervisor", 0, 0, "ok", "ok"),
    ("high-absent",     1, 0, "N", "N"),
    ("high-absent",     1, 1, "N", "N"),
    ("high-absent",     0, 1, "N", "N"),
)  # fmt: skip
_USER = (
    ("low-user",        1, 0, "ok", "ok"),
    ("low-user",        0, 1, "ok", "ok"),
    ("low-supervisor",  1, 0, "F", "F"),
    ("low-absent",      1, 0, "N", "N"),
    ("high-user",       1, 0, "V", "ok"),
    ("high-user",       1, 1, "V", "ok"),
    ("high-user",       0, 0, "V", "ok"),
    ("high-supervisor", 1, 0, "V", "F"),
    ("high-supervisor", 1, 1, "V", "F"),
    ("high-supervisor", 0, 0, "V", "F"),
    ("high-absent",     1, 0, "V", "N"),
    ("high-absent",     0, 1, "V", "N"),
)  # fmt: skip


def _outcome(letter: str, access: str, cpl: int, address: int) -> Expected:
    _, effect, writes = _ACCESSES[access]
    if letter == "ok":
        return completes(effect)
    if letter == "V":
        return gp()
    code = (PF_W if writes else 0) | (PF_U if cpl == 3 else 0) | (PF_P if letter == "F" else 0)
    return pf(code, address)


def _case(cpl: int, access: str, page: str, smap: int, ac: int, lass: str, off: str) -> Case:
    address = PAGES[page]
    name = "user" if cpl == 3 else "supervisor"
    return Case(
        id=f"{_GROUP}/{name}-{access}-{page}-smap{smap}-ac{ac}",
        group=_GROUP,
        words=f"{name}-mode {access} of a {page.replace('-', ' ')} page, CR4.SMAP={smap}, AC={ac}",
        program=_ACCESSES[access][0],
        cpl=cpl,
        registers={"rax": 0x1234_5678_9ABC_DEF1, "rbx": address},
        rflags=RFLAGS_AC * ac,
        smap=bool(smap),
        operand=address,
        mmio=() if "absent" in page else (address,),
        lass=_outcome(lass, access, cpl, address),
        off=_outcome(off, access, cpl, address),
    )


def _sizes() -> list[Case]:
    """The last byte before the split's first page and its like: every operand size is checked."""
    found = []
    for register, size in (("al", 1), ("ax", 2), ("eax", 4)):
        for cpl, address, side in ((0, LOW_SUPERVISOR, "supervisor-low"), (3, HIGH_USER, "user-high")):
            for access, program, effect in (
                ("read", f"access: mov {register}, [rbx]", Effect.READ),
                ("write", f"access: mov [rbx], {register}", Effect.WRITTEN),
            ):
                found.append(
                    Case(
                        id=f"{_GROUP}/{side}-{access}-of-{size}",
                        group=_GROUP,
                        words=f"{access} of {size} byte(s), {side.replace('-', ', ')} half",
                        program=program,
                        cpl=cpl,
                        registers={"rbx": address},
                        operand=address,
                        mmio=(address,),
                        lass=gp(),
                        off=completes(effect),
                    )
                )
    return found


def _after_stac() -> list[Case]:
    """AC counts as it is when the instruction runs, not when the page was first used."""
    read = "mov rcx, [rbx]"
    common: dict[str, Any] = {
        "group": _GROUP,
        "registers": {"rbx": LOW_USER},
        "operand": LOW_USER,
        "mmio": (LOW_USER,),
    }
    page_fault = pf(PF_P, LOW_USER).but(effect=Effect.READ)
    return [
        Case(
            id=f"{_GROUP}/stac-then-read", words="STAC allows a supervisor to read a low user page",
            program="stac; access: mov rax, [rbx]",
            lass=completes(Effect.READ), off=completes(Effect.READ), **common,
        ),
        Case(
            id=f"{_GROUP}/clac-closes-again", words="after CLAC the same address is a violation again",
            program=f"stac; {read}; clac; access: mov rax, [rbx]",
            lass=gp().but(effect=Effect.READ), off=page_fault, **{**common, "mmio": ()},
        ),
        Case(
            id=f"{_GROUP}/popfq-closes-again", words="POPFQ that clears AC has the same consequence",
            program=f"pushfq; stac; {read}; popfq; access: mov rax, [rbx]",
            lass=gp().but(effect=Effect.READ), off=page_fault, **{**common, "mmio": ()},
        ),
        Case(
            id=f"{_GROUP}/write-after-allowed-read",
            words="a page read with AC=1 is not open to a write with AC=0",
            program=f"stac; {read}; clac; access: mov [rbx], rax",
            lass=gp().but(effect=Effect.READ),
            off=pf(PF_P | PF_W, LOW_USER).but(effect=Effect.READ), **{**common, "mmio": ()},
        ),
        Case(
            id=f"{_GROUP}/high-supervisor-data-needs-no-ac", group=_GROUP,
            words="kernel data stays open whatever AC is", program=f"stac; {read}; clac; access: mov rax, [rbx]",
            registers={"rbx": HIGH_SUPERVISOR}, operand=HIGH_SUPERVISOR,
            lass=completes(Effect.READ), off=completes(Effect.READ),
        ),
    ]  # fmt: skip


_READ_RBX = bytes.fromhex("488b03")
#: Below and above the split, code of the other privilege level that reads at RBX.
_USER_CODE, _KERNEL_CODE = layout.LOW_USER, layout.HIGH_SUPERVISOR
_ACROSS_PRIVILEGES = (
    Case(
        id=f"{_GROUP}/user-behind-kernel", group=_GROUP,
        words="what the kernel has just read with AC=1 is not open to the user program that it returns to",
        program=f"stac; mov rax, [rbx]; push {layout.USER_SS}; push {layout.USER_STACK_TOP}; push {RFLAGS_AC | 2:#x}; "
        f"push {layout.USER_CS}; push {_USER_CODE}; access: iretq",
        registers={"rbx": HIGH_SUPERVISOR}, setup=(Bytes(_USER_CODE, _READ_RBX + COMPLETION_CODE),), forced=False,
        lass=gp(_USER_CODE, cs=layout.USER_CS), off=pf(PF_P | PF_U, HIGH_SUPERVISOR, _USER_CODE),
    ),
    Case(
        id=f"{_GROUP}/kernel-behind-user", group=_GROUP, cpl=3,
        words="what a user program has just read is not open to the kernel that it calls",
        program=f"mov rax, [rbx]; access: int {layout.DONE_VECTOR:#x}", registers={"rbx": LOW_USER},
        setup=(
            Gate(layout.DONE_VECTOR, _KERNEL_CODE),
            Bytes(_KERNEL_CODE, _READ_RBX + COMPLETION_CODE),
        ),
        forced=False, lass=gp(_KERNEL_CODE, cs=layout.KERNEL_CS), off=pf(PF_P, LOW_USER, _KERNEL_CODE),
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (
    *(_case(0, access, *row) for access in _ACCESSES for row in _SUPERVISOR),
    *(_case(3, access, *row) for access in _ACCESSES for row in _USER),
    *_sizes(),
    *_after_stac(),
    *_ACROSS_PRIVILEGES,
)
