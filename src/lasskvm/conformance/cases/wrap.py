"""Accesses at the end of the address space: every byte counts, and behind the last one comes address 0."""

from __future__ import annotations

from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Expected, completes, gp, ss
from lasskvm.conformance.cases.common import HIGH_SUPERVISOR, LAST_PAGE, last_and_first_page
from lasskvm.conformance.setup import Bytes, TableRegister, Words
from lasskvm.x86.registers import RFLAGS_AC

__all__ = ["CASES"]

_GROUP = "wrap"
_R, _W = Effect.READ, Effect.WRITTEN
_TOP = 1 << 64


def _case(
    name: str, words: str, program: str, lass: Expected, off: Expected, *, user: bool = False, **more: Any
) -> Case:
    """A case in which the last page and the first are mapped. The first is watched: only what wraps touches it."""
    setup = (*last_and_first_page(user=user), *more.pop("setup", ()))
    return Case(
        id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, lass=lass, off=off, setup=setup,
        cpl=3 if user else 0, operand=more.pop("operand", 0), **more,
    )  # fmt: skip


def _at(address: int) -> dict[str, Any]:
    return {"registers": {"rbx": address % _TOP, "rax": 0x1122_3344_5566_7788}, "mmio": (0,)}


_DATA = (
    _case("read-8", "a supervisor read of 8 bytes at 2^64 - 4: its last bytes are below the split",
          "access: mov rax, [rbx]", gp(), completes(_R), **_at(-4)),
    _case("write-8", "a supervisor write there: nothing of it happens", "access: mov [rbx], rax", gp(),
          completes(_W), **_at(-4)),
    _case("read-8-one-byte", "one byte below the split is enough", "access: mov rax, [rbx]", gp(), completes(_R),
          **_at(-7)),
    _case("read-2", "two bytes, one on either side", "access: mov ax, [rbx]", gp(), completes(_R), **_at(-1)),
    _case("read-4", "four bytes", "access: mov eax, [rbx]", gp(), completes(_R), **_at(-2)),
    _case("read-16", "16 bytes", "access: movups xmm0, [rbx]", gp(), completes(_R), **_at(-8)),
    _case("write-16", "16 bytes written", "pxor xmm0, xmm0; access: movups [rbx], xmm0", gp(), completes(_W),
          **_at(-1)),
    _case("add", "a read-modify-write", "access: add [rbx], rax", gp(), completes(_W), **_at(-3)),
    _case("lock-xadd", "a locked one", "access: lock xadd [rbx], eax", gp(), completes(_W), **_at(-2)),
    _case("x87-10-bytes", "10 bytes of x87", "fninit; fldz; access: fstp tbyte [rbx]", gp(), completes(_W), **_at(-6)),
    _case("sgdt-10-bytes", "10 bytes of SGDT", "access: sgdt [rbx]", gp(), completes(_W), **_at(-2)),
    _case("ac1", "with AC=1 the lower half is open, also to this", "access: mov rax, [rbx]", completes(_R),
          completes(_R), rflags=RFLAGS_AC, **_at(-4)),
    _case("no-smap", "without CR4.SMAP, too", "access: mov [rbx], rax", completes(_W), completes(_W), smap=False,
          **_at(-4)),
    _case("fits-exactly", "8 bytes that end at the end are the kernel's own", "access: mov [rbx], rax",
          completes(Effect.NONE), completes(Effect.NONE), registers={"rbx": _TOP - 8}),
    _case("last-byte", "the last byte of the address space is the kernel's own",
          "access: mov [rbx], al", completes(Effect.NONE),
          completes(Effect.NONE), registers={"rbx": _TOP - 1}),
    _case("first-byte", "the first byte of the address space is below the split", "access: mov al, [rbx]", gp(),
          completes(_R), **_at(0)),
    _case("lgdt", "LGDT's operand across the end: GDTR stays", "access: lgdt [rbx]", gp(gdt_base=layout.GDT),
          completes(_R), setup=(TableRegister(_TOP - 4, layout.GDT, layout.GDT_BYTES - 1),),
          registers={"rbx": _TOP - 4}),
    _case("fxsave", "FXSAVE of 512 bytes, 256 of them on either side", "access: fxsave [rbx]", gp(), completes(_W),
          registers={"rbx": _TOP - 256}),
    _case("fxrstor", "FXRSTOR from there", "access: fxrstor [rbx]", gp(), completes(_R),
          setup=(Bytes(_TOP - 256, bytes(256)), Bytes(0, bytes(256))), registers={"rbx": _TOP - 256}),
    _case("cmpsq", "the second operand of CMPSQ", "access: cmpsq", gp(), completes(_R),
          registers={"rsi": HIGH_SUPERVISOR, "rdi": _TOP - 4}),
    _case("movsq-destination", "the destination of MOVSQ", "access: movsq", gp(), completes(_W),
          registers={"rsi": HIGH_SUPERVISOR, "rdi": _TOP - 4}),
    _case("bt-register-offset", "BT with a register offset: the word it reaches straddles", "access: bt [rbx], ecx",
          gp(), completes(_R), registers={"rbx": _TOP - 6, "rcx": 32}),
)  # fmt: skip

#: The rule is asked about the whole access before paging is: the page above the split stays untouched, too.
_FIRST_PART = (
    _case("read-8-upper-part", "a read across the end leaves no accessed bit above the split", "access: mov rax, [rbx]",
          gp(), completes(_R), operand=LAST_PAGE, registers={"rbx": _TOP - 4}),
    _case("write-8-upper-part", "a write across the end leaves no dirty bit, and no byte of it is stored",
          "access: mov [rbx], rax", gp(), completes(_W), operand=LAST_PAGE, registers={"rbx": _TOP - 4, "rax": 0}),
    _case("add-upper-part", "a read-modify-write across the end leaves nothing above the split",
          "access: add [rbx], rax", gp(), completes(_W),
          operand=LAST_PAGE, registers={"rbx": _TOP - 7, "rax": 1}),
    _case("push-upper-part", "a push across the end leaves nothing above the split",
          "access: push rax", ss(), completes(_W), operand=LAST_PAGE,
          registers={"rsp": 4, "rax": 0}),
    _case("movsq-upper-part", "MOVSQ across the end leaves nothing above the split",
          "access: movsq", gp(), completes(_W), operand=LAST_PAGE,
          registers={"rsi": HIGH_SUPERVISOR, "rdi": _TOP - 4}),
)  # fmt: skip

_USER = (
    _case("user-read", "a user read of 8 bytes at 2^64 - 4 begins above the split", "access: mov rax, [rbx]", gp(),
          completes(_R), user=True, **_at(-4)),
    _case("user-write", "a user write likewise", "access: mov [rbx], rax", gp(), completes(_W), user=True, **_at(-4)),
    _case("user-first-page", "address 0 is a user program's own", "access: mov rax, [rbx]", completes(_R),
          completes(_R), user=True, **_at(0)),
    _case("user-last-page", "the last page is not", "access: mov al, [rbx]", gp(), completes(_R), user=True,
          registers={"rbx": _TOP - 1}, operand=LAST_PAGE, mmio=(LAST_PAGE,)),
    _case("user-push", "a user's push that wraps downwards from 4", "access: push rax", ss(), completes(_W), user=True,
          registers={"rsp": 4}),
)  # fmt: skip

_STACK = (
    _case("push", "PUSH with RSP = 4 stores at 2^64 - 4", "access: push rax", ss(), completes(_W),
          registers={"rsp": 4}),
    _case("pop", "POP with RSP = 2^64 - 4", "access: pop rax", ss(), completes(_R), registers={"rsp": _TOP - 4}),
    _case("call", "CALL with RSP = 4", "access: call next; next: nop", ss(), completes(_W), registers={"rsp": 4}),
    _case("ret", "RET with RSP = 2^64 - 4", "access: ret; next: nop", ss(), completes(_R),
          registers={"rsp": _TOP - 4}, setup=(Words(_TOP - 4, ("next",)),)),
    _case("enter", "ENTER with RSP = 4", "access: enter 0, 0", ss(), completes(_W), registers={"rsp": 4}),
    _case("leave", "LEAVE with RBP = 2^64 - 4", "access: leave", ss(), completes(_R), registers={"rbp": _TOP - 4}),
    _case("pushfq", "PUSHFQ with RSP = 2", "access: pushfq", ss(), completes(_W), registers={"rsp": 2}),
    _case("push-to-the-end", "PUSH with RSP = 0 stores the last 8 bytes: the kernel's own", "access: push rax",
          completes(Effect.NONE), completes(Effect.NONE), registers={"rsp": 0}),
    _case("rbp-operand", "an operand at [RBP] across the end", "access: mov rax, [rbp]", ss(), completes(_R),
          registers={"rbp": _TOP - 1}),
    _case("iretq", "IRETQ whose frame reaches across the end: its third word is below", "access: iretq; next: nop",
          ss(), completes(_R), registers={"rsp": _TOP - 16},
          setup=(Words(_TOP - 16, ("next", layout.KERNEL_CS)),
                 Words(0, (2, layout.KERNEL_STACK_TOP, layout.KERNEL_SS)))),
    _case("retfq", "a far RET whose second word is below", "access: retfq; next: nop", ss(), completes(_R),
          registers={"rsp": _TOP - 8}, setup=(Words(_TOP - 8, ("next",)), Words(0, (layout.KERNEL_CS,)))),
    _case("far-jump-operand", "the operand of a far JMP", "access: jmp tbyte [rbx]; next: nop", gp(), completes(_R),
          registers={"rbx": _TOP - 8}, setup=(Words(_TOP - 8, ("next",)), Words(0, (layout.KERNEL_CS,)))),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_DATA, *_FIRST_PART, *_USER, *_STACK)
