"""The canonical rule comes before LASS and holds without it, and outlives whatever LASS allows."""

from __future__ import annotations

from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Expected, completes, gp, pf, ss
from lasskvm.conformance.cases.common import HIGH_SUPERVISOR, LOW_SUPERVISOR
from lasskvm.conformance.setup import Map
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.exceptions import PF_I, PF_U
from lasskvm.x86.registers import RFLAGS_AC

__all__ = ["CASES"]

_GROUP = "canonical"
#: The first address that is not canonical, and the last.
_LOWEST, _HIGHEST = 1 << 47, (1 << 64) - (1 << 47) - 1
#: The pages on either side of the hole.
_LAST_LOW, _FIRST_HIGH = _LOWEST - PAGE_SIZE, _HIGHEST + 1
_READ = "access: mov rax, [rbx]"


def _both(name: str, words: str, program: str, outcome: Expected, **more: Any) -> Case:
    """A case whose outcome LASS does not change."""
    return Case(
        id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, lass=outcome, off=outcome, **more
    )


def _case(name: str, words: str, program: str, lass: Expected, off: Expected, **more: Any) -> Case:
    return Case(id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, lass=lass, off=off, **more)


def _rbx(address: int) -> dict[str, Any]:
    return {"registers": {"rbx": address}}


_HOLE = (
    _both("supervisor-read", "a supervisor read of the hole's first address", _READ, gp(), **_rbx(_LOWEST)),
    _both("supervisor-read-upper", "a supervisor read of the hole's last address", _READ, gp(), **_rbx(_HIGHEST)),
    _both("supervisor-read-ac1", "AC=1 opens the lower half, but not the hole", _READ, gp(), rflags=RFLAGS_AC,
          **_rbx(_LOWEST)),
    _both("supervisor-read-no-smap", "without CR4.SMAP the lower half is open, but not the hole",
          _READ, gp(), smap=False, **_rbx(_LOWEST)),
    _both("supervisor-write-upper", "a write of the upper part of the hole", "access: mov [rbx], rax", gp(),
          **_rbx(0xFFFF_0000_0000_0000)),
    _both("user-read", "a user read of the hole's first address", _READ, gp(), cpl=3, **_rbx(_LOWEST)),
    _both("user-read-upper", "a user read of the hole's last address", _READ, gp(), cpl=3, **_rbx(_HIGHEST)),
    _both("user-write", "a user write", "access: mov [rbx], eax", gp(), cpl=3, **_rbx(0x1234_0000_0000_0000)),
    _both("push", "a push into the hole is #SS(0)", "access: push rax", ss(), registers={"rsp": _LOWEST + 0x100}),
    _both("push-user", "a user program's push into the hole is #SS(0)", "access: push rax", ss(), cpl=3,
          registers={"rsp": _LOWEST + 0x100}),
    _both("rbp-operand", "an operand based on RBP is #SS(0)", "access: mov rax, [rbp]", ss(), cpl=3,
          registers={"rbp": _HIGHEST - 0x100}),
    _both("fs-rbp-operand", "an operand based on RBP with an FS override is #GP(0)",
          "access: mov rax, fs:[rbp]", gp(), cpl=3,
          registers={"rbp": _HIGHEST - 0x100}),
    _both("crossing-up-user", "a user access from the lower half's last byte into the hole", _READ, gp(), cpl=3,
          setup=(Map(_LAST_LOW, layout.SPARE_GPA, layout.USER_PAGE),), operand=_LAST_LOW, **_rbx(_LOWEST - 4)),
    _both("crossing-up-supervisor", "a supervisor access there, with AC=1", _READ, gp(), rflags=RFLAGS_AC,
          setup=(Map(_LAST_LOW, layout.SPARE_GPA),), operand=_LAST_LOW, **_rbx(_LOWEST - 1)),
    _both("crossing-out-of-the-hole", "an access that begins in the hole and ends in the upper half", _READ, gp(),
          setup=(Map(_FIRST_HIGH, layout.SPARE_GPA),), operand=_FIRST_HIGH, **_rbx(_HIGHEST - 3)),
    _both("movsb", "a string instruction", "access: movsb", gp(), registers={"rsi": _LOWEST, "rdi": HIGH_SUPERVISOR}),
    _both("clflush", "CLFLUSH", "access: clflush [rbx]", gp(), **_rbx(_LOWEST)),
    _both("lgdt-operand", "LGDT's operand", "access: lgdt [rbx]", gp(), **_rbx(_LOWEST)),
    _both("prefetch", "a prefetch does not care", "access: prefetcht0 [rbx]", completes(), **_rbx(_LOWEST)),
    _both("nop", "a NOP does not care", "access: nop dword [rbx]", completes(), **_rbx(_LOWEST)),
)  # fmt: skip

_EDGES = (
    _both("last-low-user", "the last 8 bytes before the hole are a user program's own", _READ, completes(Effect.READ),
          cpl=3, setup=(Map(_LAST_LOW, layout.SPARE_GPA, layout.USER_PAGE),), operand=_LAST_LOW, **_rbx(_LOWEST - 8)),
    _both("first-high-supervisor", "the first byte behind it is the kernel's", _READ, completes(Effect.READ),
          setup=(Map(_FIRST_HIGH, layout.SPARE_GPA),), operand=_FIRST_HIGH, **_rbx(_FIRST_HIGH)),
    _case("last-low-supervisor", "the kernel may not touch the last byte before the hole", "access: mov al, [rbx]",
          gp(), completes(Effect.READ), setup=(Map(_LAST_LOW, layout.SPARE_GPA),), operand=_LAST_LOW,
          **_rbx(_LOWEST - 1)),
    _case("first-high-user", "a user program may not touch the first byte behind it", "access: mov al, [rbx]",
          gp(), completes(Effect.READ), cpl=3, setup=(Map(_FIRST_HIGH, layout.SPARE_GPA, layout.USER_PAGE),),
          operand=_FIRST_HIGH, **_rbx(_FIRST_HIGH)),
)  # fmt: skip

_BRANCHES = (
    _both("jump", "a near JMP into the hole faults itself: RIP is the JMP", "access: jmp rbx", gp(), **_rbx(_LOWEST)),
    _both("jump-user", "a near JMP into the hole in user mode", "access: jmp rbx", gp(), cpl=3, **_rbx(_HIGHEST)),
    _both("call", "a near CALL into the hole: nothing is pushed", "access: call rbx", gp(), **_rbx(_LOWEST)),
    _both("ret", "RET into the hole: nothing is popped", "push rbx; access: ret", gp(), cpl=3, **_rbx(_LOWEST)),
)  # fmt: skip

#: With five levels of page tables the hole lies between 2^56 and 2^64 - 2^56.
_LA57 = {"levels": 5, "needs": frozenset({"la57"})}
_HIGH_57 = 0xFF00_0000_0000_0000
_LOW_57 = 0x00FF_0000_0000_0000
_FIVE_LEVELS = (
    _case("la57-user-high", "57-bit addresses: a user read above the split, where 48 bits have their hole", _READ,
          gp(), pf(PF_U, _HIGH_57), cpl=3, **_LA57, **_rbx(_HIGH_57)),
    _case("la57-supervisor-low", "a supervisor read below it", _READ, gp(), pf(0, _LOW_57), **_LA57, **_rbx(_LOW_57)),
    _both("la57-user-low", "a user read below it is no violation", _READ, pf(PF_U, _LOW_57), cpl=3, **_LA57,
          **_rbx(_LOW_57)),
    _both("la57-supervisor-high", "57-bit addresses: a supervisor read above the split is no violation",
          _READ, pf(0, _HIGH_57), **_LA57,
          **_rbx(_HIGH_57)),
    _both("la57-hole", "in the 57-bit hole it is the canonical rule", _READ, gp(), rflags=RFLAGS_AC, **_LA57,
          **_rbx(1 << 56)),
    _case("la57-fetch", "a supervisor fetch below the split", "access: jmp rbx", gp(_LOW_57),
          pf(PF_I, _LOW_57, _LOW_57), **_LA57, **_rbx(_LOW_57)),
    _case("la57-low-supervisor", "below the split everything is as with 48 bits", _READ, gp(), completes(Effect.READ),
          operand=LOW_SUPERVISOR, **_LA57, **_rbx(LOW_SUPERVISOR)),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_HOLE, *_EDGES, *_BRANCHES, *_FIVE_LEVELS)
