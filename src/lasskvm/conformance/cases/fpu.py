"""FXSAVE and its relatives: operands of many bytes, judged as one access or several, but judged."""

from __future__ import annotations

from typing import Any

from lasskvm.conformance.case import Case, Effect, completes, gp
from lasskvm.conformance.cases.common import (
    HIGH_SUPERVISOR,
    LOW_SUPERVISOR,
    LOW_USER,
    Instruction,
    two_sides,
)
from lasskvm.conformance.setup import Bytes
from lasskvm.x86.registers import CR4_OSXSAVE, RFLAGS_AC

__all__ = ["CASES"]

_GROUP = "fpu"
_W = Effect.WRITTEN
#: Images of a processor just reset: control words that mask everything, all else zeros.
_FX_IMAGE = bytes.fromhex("7f03") + bytes(22) + (0x1F80).to_bytes(4, "little") + bytes(484)
_X87_IMAGE = bytes.fromhex("7f03ffff0000ffffffffffff") + bytes(96)
_XSAVE_IMAGE = _FX_IMAGE + (1).to_bytes(8, "little") + bytes(56)
_XSAVE: dict[str, Any] = {
    "needs": ("xsave",),
    "registers": {"rax": 1, "rdx": 0},
    "more": {"cr4": CR4_OSXSAVE},
}
_XSAVEOPT = {**_XSAVE, "needs": ("xsave", "xsaveopt")}


def _i(name: str, program: str, effect: Effect = Effect.READ, **more: object) -> Instruction:
    return Instruction(name=name, program=program, effect=effect, **more)  # type: ignore[arg-type]


_INSTRUCTIONS = two_sides(
    _GROUP,
    (
        _i("fxsave", "access: fxsave [rbx]", _W),
        _i("fxsave64", "access: fxsave64 [rbx]", _W),
        _i("fxrstor", "access: fxrstor [rbx]", content=_FX_IMAGE),
        _i("fxrstor64", "access: fxrstor64 [rbx]", content=_FX_IMAGE),
        _i("fxsave-rbp", "access: fxsave [rbp]", _W, at="rbp", stack=True),
        _i("fnsave", "access: db 0xdd, 0x33", _W),
        _i("frstor", "access: db 0xdd, 0x23", content=_X87_IMAGE),
        _i("fnstenv", "fninit; access: db 0xd9, 0x33", _W),
        _i("fldenv", "access: db 0xd9, 0x23", content=_X87_IMAGE),
        _i("fnstcw", "fninit; access: fnstcw [rbx]", _W),
        _i("fldcw", "access: fldcw [rbx]", content=_X87_IMAGE[:2]),
        _i("fnstsw", "fninit; access: fnstsw [rbx]", _W),
        _i("ldmxcsr", "access: ldmxcsr [rbx]", content=(0x1F80).to_bytes(4, "little")),
        _i("stmxcsr", "access: stmxcsr [rbx]", _W),
        _i("xsave", "access: xsave [rbx]", _W, content=bytes(576), **_XSAVE),
        _i("xsave64", "access: xsave64 [rbx]", _W, content=bytes(576), **_XSAVE),
        _i("xsave-rbp", "access: xsave [rbp]", _W, at="rbp", stack=True, content=bytes(576), **_XSAVE),
        _i("xsaveopt", "fninit; fld1; access: xsaveopt [rbx]", _W, content=bytes(576), **_XSAVEOPT),
        _i("xrstor", "access: xrstor [rbx]", content=_XSAVE_IMAGE, **_XSAVE),
        _i("xrstor64", "access: xrstor64 [rbx]", content=_XSAVE_IMAGE, **_XSAVE),
        _i("xrstor-rbp", "access: xrstor [rbp]", at="rbp", stack=True, content=_XSAVE_IMAGE, **_XSAVE),
    ),
)

_SPECIAL = (
    Case(
        id=f"{_GROUP}/fxsave-ac1", group=_GROUP, words="with AC=1 the kernel saves to user memory",
        program="access: fxsave [rbx]", registers={"rbx": LOW_USER}, rflags=RFLAGS_AC, operand=LOW_USER,
        mmio=(LOW_USER,), lass=completes(_W), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/fxsave-own-half", group=_GROUP, words="the kernel saves to its own memory",
        program="access: fxsave [rbx]", registers={"rbx": HIGH_SUPERVISOR}, operand=HIGH_SUPERVISOR,
        mmio=(HIGH_SUPERVISOR,), lass=completes(_W), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/fxsave-misaligned", group=_GROUP,
        words="a misaligned operand is #GP(0), too; nothing is written", program="access: fxsave [rbx]",
        registers={"rbx": LOW_SUPERVISOR + 8}, operand=LOW_SUPERVISOR, lass=gp(), off=gp(),
    ),
    Case(
        id=f"{_GROUP}/xsave-ac1", group=_GROUP, words="with AC=1 the kernel saves extended state to user memory",
        program="access: xsave [rbx]", registers={"rbx": LOW_USER, "rax": 1, "rdx": 0}, rflags=RFLAGS_AC,
        operand=LOW_USER, mmio=(LOW_USER,), cr4=CR4_OSXSAVE, needs=frozenset({"xsave"}),
        lass=completes(_W), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/xrstor-own-half", group=_GROUP, words="the kernel restores extended state from its own memory",
        program="access: xrstor [rbx]", registers={"rbx": HIGH_SUPERVISOR, "rax": 1, "rdx": 0},
        setup=(Bytes(HIGH_SUPERVISOR, _XSAVE_IMAGE),), operand=HIGH_SUPERVISOR, mmio=(HIGH_SUPERVISOR,),
        cr4=CR4_OSXSAVE, needs=frozenset({"xsave"}), lass=completes(Effect.READ), off=completes(Effect.READ),
    ),
    Case(
        id=f"{_GROUP}/xsave-misaligned", group=_GROUP,
        words="an operand that is not aligned to 64 bytes is #GP(0), too; nothing is written",
        program="access: xsave [rbx]", registers={"rbx": LOW_SUPERVISOR + 32, "rax": 1, "rdx": 0},
        operand=LOW_SUPERVISOR, cr4=CR4_OSXSAVE, needs=frozenset({"xsave"}), lass=gp(), off=gp(),
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_INSTRUCTIONS, *_SPECIAL)
