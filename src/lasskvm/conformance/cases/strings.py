"""String instructions: each element is an access of its own, and a fault leaves the registers at the faulting one."""

from __future__ import annotations

from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Expected, completes, gp, pf
from lasskvm.conformance.cases.common import (
    HIGH_SUPERVISOR,
    HIGH_USER,
    LAST_PAGE,
    LOW_SUPERVISOR,
    LOW_USER,
    Instruction,
    last_and_first_page,
    two_sides,
)
from lasskvm.conformance.setup import Bytes
from lasskvm.kvm.structures import Segment
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.exceptions import PF_U, PF_W
from lasskvm.x86.registers import AR_DATA, MASK32, MASK64, RFLAGS_AC, RFLAGS_DF, RFLAGS_IOPL

__all__ = ["CASES"]

_GROUP = "strings"
_R, _W = Effect.READ, Effect.WRITTEN
#: A port that no device claims.
_PORT = 0x5C0
_TOP = 1 << 64

#: Operands that the other side of an instruction with two may have: user pages below, supervisor pages above.
_ONE_SIDED = two_sides(
    _GROUP,
    (
        Instruction(name="lodsq", program="access: lodsq", at="rsi"),
        Instruction(name="stosq", program="access: stosq", at="rdi", effect=_W, registers={"rax": 1}),
        Instruction(name="scasb", program="access: scasb", at="rdi"),
        Instruction(name="rep-lodsb", program="access: rep lodsb", at="rsi", registers={"rcx": 4}),
        Instruction(name="rep-stosd", program="access: rep stosd", at="rdi", effect=_W, registers={"rcx": 4, "rax": 1}),
        Instruction(
            name="outsb", program="access: outsb", at="rsi", registers={"rdx": _PORT}, more={"rflags": RFLAGS_IOPL}
        ),
        Instruction(
            name="insb", program="access: insb", at="rdi", effect=_W, registers={"rdx": _PORT},
            more={"rflags": RFLAGS_IOPL},
        ),
        Instruction(
            name="rep-insd", program="access: rep insd", at="rdi", effect=_W, registers={"rdx": _PORT, "rcx": 2},
            more={"rflags": RFLAGS_IOPL},
        ),
    ),
)  # fmt: skip


def _two_operands() -> list[Case]:
    """MOVS and CMPS with one operand that is a violation and one that is not; the good one may be MMIO."""
    found = []
    for cpl, bad, good, side in (
        (0, LOW_SUPERVISOR, HIGH_SUPERVISOR, "supervisor"),
        (3, HIGH_USER, LOW_USER, "user"),
    ):
        for name, program, first, second, effect in (
            ("movsb-source", "access: movsb", bad, good, _R),
            ("movsq-destination", "access: movsq", good, bad, _W),
            ("rep-movsb-source", "access: rep movsb", bad, good, _R),
            ("rep-movsq-destination", "access: rep movsq", good, bad, _W),
            ("cmpsb-source", "access: cmpsb", bad, good, _R),
            ("cmpsb-destination", "access: cmpsb", good, bad, _R),
            ("repe-cmpsq-destination", "access: repe cmpsq", good, bad, _R),
        ):
            found.append(
                Case(
                    id=f"{_GROUP}/{name}-{side}",
                    group=_GROUP,
                    words=f"{side} mode: {name.replace('-', ' ')} is on the wrong side",
                    program=program,
                    cpl=cpl,
                    registers={"rsi": first, "rdi": second, "rcx": 3},
                    operand=bad,
                    # The other operand: with it in MMIO, KVM emulates and must find the violation by itself.
                    mmio=(good,),
                    lass=gp(),
                    off=completes(effect),
                )
            )
    return found


def _no_elements() -> list[Case]:
    """With RCX = 0 nothing is accessed."""
    programs = ("rep movsb", "rep stosq", "rep lodsb", "repe cmpsb", "repne scasw", "rep outsb", "rep insb")
    return [
        Case(
            id=f"{_GROUP}/{program.replace(' ', '-')}-no-elements-{side}",
            group=_GROUP,
            words=f"{side} mode: {program.upper()} with RCX=0 accesses nothing",
            program=f"access: {program}",
            cpl=cpl,
            rflags=RFLAGS_IOPL,
            registers={"rsi": address, "rdi": address, "rcx": 0, "rdx": _PORT},
            operand=address,
            lass=completes(Effect.NONE, rsi=address, rdi=address, rcx=0),
            off=completes(Effect.NONE, rsi=address, rdi=address, rcx=0),
        )
        for program in programs
        for cpl, address, side in ((0, LOW_SUPERVISOR, "supervisor"), (3, HIGH_USER, "user"))
    ]


def _middle(
    name: str, words: str, program: str, registers: dict[str, int], lass: Expected, off: Expected, **more: Any
) -> Case:
    return Case(
        id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, registers=registers, lass=lass, off=off,
        operand=more.pop("operand", 0), setup=more.pop("setup", last_and_first_page()), **more,
    )  # fmt: skip


_MIDDLE = (
    _middle(
        "rep-stosb-runs-off-the-end", "REP STOSB over the end of the address space: stops at address 0",
        "access: rep stosb", {"rdi": _TOP - 4, "rcx": 8, "rax": 0xEE}, gp(rdi=0, rcx=4),
        completes(_W, rdi=4, rcx=0),
    ),
    _middle(
        "rep-stosb-keeps-what-it-wrote", "what REP STOSB has written before the violation stays",
        "access: rep stosb", {"rdi": _TOP - 8, "rcx": 12, "rax": 0xEE},
        gp(rdi=0, rcx=4).but(effect=Effect.WRITTEN, memory={_TOP - 8: 0xEEEE_EEEE_EEEE_EEEE}), completes(_W, rcx=0),
        operand=LAST_PAGE,
    ),
    _middle(
        "rep-stosq-runs-off-the-end", "REP STOSQ likewise", "access: rep stosq",
        {"rdi": _TOP - 16, "rcx": 4, "rax": 1}, gp(rdi=0, rcx=2), completes(_W, rdi=16, rcx=0),
    ),
    _middle(
        "rep-stosq-element-wraps", "an element that itself wraps is a violation before its first byte",
        "access: rep stosq", {"rdi": _TOP - 12, "rcx": 3, "rax": 1}, gp(rdi=_TOP - 4, rcx=2),
        completes(_W, rdi=12, rcx=0),
    ),
    _middle(
        "rep-movsb-source-runs-off-the-end", "REP MOVSB whose source runs off the end", "access: rep movsb",
        {"rsi": _TOP - 3, "rdi": HIGH_SUPERVISOR, "rcx": 9}, gp(rsi=0, rdi=HIGH_SUPERVISOR + 3, rcx=6),
        completes(_R, rsi=6, rcx=0),
    ),
    _middle(
        "rep-movsd-destination-runs-off-the-end", "REP MOVSD whose destination does", "access: rep movsd",
        {"rsi": HIGH_SUPERVISOR, "rdi": _TOP - 8, "rcx": 5}, gp(rsi=HIGH_SUPERVISOR + 8, rdi=0, rcx=3),
        completes(_W, rdi=12, rcx=0),
    ),
    _middle(
        "rep-lodsb-runs-off-the-end", "REP LODSB", "access: rep lodsb", {"rsi": _TOP - 2, "rcx": 5},
        gp(rsi=0, rcx=3, rax=0xEE).but(), completes(_R, rsi=3, rcx=0), setup=(*last_and_first_page(),
        Bytes(_TOP - 2, b"\xee\xee")),
    ),
    _middle(
        "repne-scasb-runs-off-the-end", "REPNE SCASB finds nothing up to the end and then faults",
        "access: repne scasb", {"rdi": _TOP - 4, "rcx": 100, "rax": 0}, gp(rdi=0, rcx=96),
        completes(_R, rcx=0, rdi=96),
    ),
    _middle(
        "repe-cmpsb-runs-off-the-end", "REPE CMPSB of equal bytes up to the end", "access: repe cmpsb",
        {"rsi": HIGH_SUPERVISOR, "rdi": _TOP - 4, "rcx": 6}, gp(rsi=HIGH_SUPERVISOR + 4, rdi=0, rcx=2),
        completes(_R, rdi=2, rcx=0),
        setup=(*last_and_first_page(), Bytes(_TOP - 4, bytes(4)), Bytes(0, bytes(8)), Bytes(HIGH_SUPERVISOR, bytes(8))),
    ),
    _middle(
        "std-stosb-runs-off-the-start", "REP STOSB downwards by a user program: stops in the last page",
        "access: rep stosb", {"rdi": 3, "rcx": 8, "rax": 0xEE}, gp(rdi=MASK64, rcx=4),
        completes(_W, rdi=MASK64 - 4, rcx=0), cpl=3, rflags=RFLAGS_DF, operand=LAST_PAGE,
        setup=last_and_first_page(user=True),
    ),
    _middle(
        "std-lodsw-runs-off-the-start", "REP LODSW downwards by a user program", "access: rep lodsw",
        {"rsi": 2, "rcx": 4, "rax": 0}, gp(rsi=MASK64 - 1, rcx=2, rax=0), completes(_R, rcx=0), cpl=3,
        rflags=RFLAGS_DF, operand=LAST_PAGE,
        setup=(*last_and_first_page(user=True), Bytes(0, bytes(4))),
    ),
    _middle(
        "rep-stosb-ac1", "with AC=1 the kernel goes on in the lower half", "access: rep stosb",
        {"rdi": _TOP - 4, "rcx": 8, "rax": 0xEE}, completes(_W, rdi=4, rcx=0), completes(_W, rdi=4, rcx=0),
        rflags=RFLAGS_AC,
    ),
    _middle(
        "page-fault-in-the-middle", "LASS does not hide a page fault in the middle of a user's own REP STOSQ",
        "access: rep stosq", {"rdi": layout.LOW_USER + 2 * PAGE_SIZE - 16, "rcx": 5, "rax": 1},
        pf(PF_U | PF_W, layout.LOW_USER + 2 * PAGE_SIZE, rdi=layout.LOW_USER + 2 * PAGE_SIZE, rcx=3).but(effect=_W),
        pf(PF_U | PF_W, layout.LOW_USER + 2 * PAGE_SIZE, rdi=layout.LOW_USER + 2 * PAGE_SIZE, rcx=3).but(effect=_W),
        cpl=3, operand=layout.LOW_USER + PAGE_SIZE, setup=(),
    ),
    _middle(
        "page-fault-in-the-middle-supervisor",
        "LASS does not hide a page fault in the middle of the kernel's own REP MOVSQ",
        "access: rep movsq",
        {"rsi": HIGH_SUPERVISOR, "rdi": layout.HIGH_SUPERVISOR + 2 * PAGE_SIZE - 8, "rcx": 4},
        pf(PF_W, layout.HIGH_SUPERVISOR + 2 * PAGE_SIZE, rdi=layout.HIGH_SUPERVISOR + 2 * PAGE_SIZE, rcx=3,
           rsi=HIGH_SUPERVISOR + 8).but(effect=_W),
        pf(PF_W, layout.HIGH_SUPERVISOR + 2 * PAGE_SIZE, rdi=layout.HIGH_SUPERVISOR + 2 * PAGE_SIZE, rcx=3,
           rsi=HIGH_SUPERVISOR + 8).but(effect=_W),
        operand=layout.HIGH_SUPERVISOR + PAGE_SIZE, setup=(),
    ),
)  # fmt: skip

_FS = Segment(layout.USER_SS, HIGH_SUPERVISOR - LOW_SUPERVISOR, MASK32, AR_DATA)
_ADDRESSES = (
    Case(
        id=f"{_GROUP}/fs-override-of-the-source", group=_GROUP,
        words="an FS override moves the source of MOVSB to the upper half", program="access: db 0x64, 0xa4",
        sregs={"fs": _FS}, registers={"rsi": LOW_SUPERVISOR, "rdi": HIGH_SUPERVISOR + 0x100},
        operand=HIGH_SUPERVISOR, mmio=(HIGH_SUPERVISOR,), lass=completes(_W), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/no-override-of-the-destination", group=_GROUP,
        words="the destination of MOVSB has no override", program="access: db 0x64, 0xa4",
        sregs={"fs": _FS}, registers={"rsi": LOW_SUPERVISOR, "rdi": LOW_SUPERVISOR + 0x100},
        operand=LOW_SUPERVISOR, lass=gp(), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/32-bit-addresses-supervisor", group=_GROUP,
        words="with a 32-bit address size STOSB goes to the lower half", program="access: db 0x67, 0xaa",
        registers={"rdi": 0xFFFF_8000_0000_0000 | LOW_SUPERVISOR, "rax": 0}, operand=LOW_SUPERVISOR,
        mmio=(LOW_SUPERVISOR,), lass=gp(), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/32-bit-addresses-user", group=_GROUP, cpl=3,
        words="with a 32-bit address size a user program's STOSB goes to its own half", program="access: db 0x67, 0xaa",
        registers={"rdi": 0xFFFF_8000_0000_0000 | LOW_USER, "rax": 0}, operand=LOW_USER, mmio=(LOW_USER,),
        lass=completes(_W), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/32-bit-count", group=_GROUP,
        words="with a 32-bit address size ECX counts: 0 is no access", program="access: db 0x67, 0xf3, 0xaa",
        registers={"rdi": LOW_SUPERVISOR, "rcx": 0xFFFF_FFFF_0000_0000}, operand=LOW_SUPERVISOR,
        lass=completes(Effect.NONE), off=completes(Effect.NONE),
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_ONE_SIDED, *_two_operands(), *_no_elements(), *_MIDDLE, *_ADDRESSES)
