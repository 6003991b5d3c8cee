"""32-bit programs: LASS is active in compatibility mode, too; all that they can address is below the split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Expected, Mode, completes, fault, gp, pf, ss
from lasskvm.conformance.cases.common import LOW_ABSENT, LOW_SUPERVISOR, LOW_USER
from lasskvm.kvm.structures import Segment
from lasskvm.x86.exceptions import PF_I, PF_P, PF_U, PF_W
from lasskvm.x86.registers import AR_DATA, AR_DPL_SHIFT, AR_WRITABLE, MASK32

__all__ = ["CASES"]

_GROUP = "compatibility"
_R, _W = Effect.READ, Effect.WRITTEN


def _both(
    name: str, words: str, program: str, outcome: Expected, *, operand: int | None = None, **more: Any
) -> Case:
    """A case of a 32-bit user program whose outcome LASS does not change."""
    return Case(
        id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, lass=outcome, off=outcome,
        mode=Mode.COMPATIBILITY, cpl=3, operand=operand, **more,
    )  # fmt: skip


def _data(address: int, **more: Any) -> dict[str, Any]:
    return {"operand": address, "registers": {"rbx": address, "rax": 0x7654_3210}, **more}


def _segment(base: int, limit: int = MASK32) -> Segment:
    return Segment(layout.USER_SS, base, limit, AR_DATA | 3 << AR_DPL_SHIFT)


_USER = (
    _both("read", "a 32-bit program reads its own memory", "access: mov eax, [ebx]", completes(_R),
          mmio=(LOW_USER,), **_data(LOW_USER)),
    _both("write", "a 32-bit program writes its own memory",
          "access: mov [ebx], eax", completes(_W), mmio=(LOW_USER,), **_data(LOW_USER)),
    _both("add", "a 32-bit program changes its own memory",
          "access: add [ebx], eax", completes(_W), mmio=(LOW_USER,), **_data(LOW_USER)),
    _both("read-supervisor", "a low supervisor page is a page fault", "access: mov eax, [ebx]",
          pf(PF_P | PF_U, LOW_SUPERVISOR), **_data(LOW_SUPERVISOR)),
    _both("write-supervisor", "a write of a low supervisor page is a page fault",
          "access: mov [ebx], eax", pf(PF_P | PF_U | PF_W, LOW_SUPERVISOR),
          **_data(LOW_SUPERVISOR)),
    _both("read-absent", "a page that is not there is a page fault", "access: mov eax, [ebx]", pf(PF_U, LOW_ABSENT),
          **_data(LOW_ABSENT)),
    _both("push", "a push", "access: push eax", completes(_W), operand=LOW_USER,
          registers={"rsp": LOW_USER + 4, "rax": 5}),
    _both("push-supervisor", "a push to a low supervisor page is a page fault", "access: push eax",
          pf(PF_P | PF_U | PF_W, LOW_SUPERVISOR), operand=LOW_SUPERVISOR, registers={"rsp": LOW_SUPERVISOR + 4}),
    _both("fetch", "a fetch", "access: jmp ebx", completes(_R), operand=layout.LOW_USER,
          registers={"rbx": layout.LOW_USER}),
    _both("fetch-supervisor", "a fetch from a low supervisor page is a page fault", "access: jmp ebx",
          pf(PF_P | PF_U | PF_I, layout.LOW_SUPERVISOR, layout.LOW_SUPERVISOR), operand=layout.LOW_SUPERVISOR,
          registers={"rbx": layout.LOW_SUPERVISOR}),
    _both("highest-address", "the highest 32-bit address is below the split", "access: mov al, [ebx]",
          pf(PF_U, 0xFFFF_FFFF), registers={"rbx": 0xFFFF_FFFF}),
    _both("segment-base", "base and offset wrap at 2^32, not beyond", "access: mov eax, fs:[ebx]", completes(_R),
          operand=LOW_USER, sregs={"fs": _segment(0xFFFF_F000)}, registers={"rbx": LOW_USER + 0x1000},
          mmio=(LOW_USER,)),
    _both("limit", "a limit is #GP(0), as ever", "access: mov eax, fs:[ebx]", gp(),
          sregs={"fs": _segment(0, 0xFFF)}, registers={"rbx": 0x1000}),
    _both("limit-last-byte", "a limit is #GP(0) also when only the last byte is beyond it",
          "access: mov eax, fs:[ebx]", gp(),
          sregs={"fs": _segment(0, LOW_USER + 2)}, registers={"rbx": LOW_USER}, operand=LOW_USER),
    _both("read-only-segment", "a write through a read-only segment is #GP(0)", "access: mov fs:[ebx], eax", gp(),
          sregs={"fs": replace(_segment(0), attributes=AR_DATA & ~AR_WRITABLE | 3 << AR_DPL_SHIFT)},
          operand=LOW_USER, registers={"rbx": LOW_USER}),
    _both("stack-limit", "that of the stack is #SS(0)", "access: mov eax, [ebp]", ss(),
          sregs={"ss": _segment(0, 0xFFFFFF)}, registers={"rbp": 0x0100_0000}),
    _both("string", "REP MOVSD", "access: rep movsd", completes(_W), operand=LOW_USER,
          registers={"rsi": layout.USER_CODE + 0x1000, "rdi": LOW_USER, "rcx": 4}),
    _both("int3", "INT3 and back to 64-bit code", "access: int3; next: nop",
          fault(3, None, "next", cs=layout.USER_CS32)),
    _both("clflush", "CLFLUSH", "access: clflush [ebx]", completes(_R), **_data(LOW_USER)),
    _both("bound", "an instruction that 64-bit mode does not have", "access: pusha; popa", completes()),
)  # fmt: skip

CASES: tuple[Case, ...] = _USER
