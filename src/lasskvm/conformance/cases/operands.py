"""Instructions of every kind with a memory operand: what they do to it does not matter, only whose address it is."""

from __future__ import annotations

from lasskvm.conformance.case import Case, Effect, completes, fault, gp
from lasskvm.conformance.cases.common import (
    HIGH_SUPERVISOR,
    HIGH_USER,
    LOW_SUPERVISOR,
    LOW_USER,
    Instruction,
    two_sides,
)
from lasskvm.conformance.setup import Words
from lasskvm.x86.exceptions import DE, UD
from lasskvm.x86.registers import MASK64

__all__ = ["CASES"]

_GROUP = "operands"
_W = Effect.WRITTEN
_ONE = (1).to_bytes(8, "little")
_DOUBLE = bytes.fromhex("000000000000f83f")


def _i(name: str, program: str, effect: Effect = Effect.READ, **more: object) -> Instruction:
    return Instruction(name=name, program=program, effect=effect, **more)  # type: ignore[arg-type]


_INTEGER = two_sides(
    _GROUP,
    (
        _i("lock-inc", "access: lock inc qword [rbx]", _W),
        _i("lock-xadd", "access: lock xadd [rbx], rax", _W, registers={"rax": 3}),
        _i("lock-bts", "access: lock bts qword [rbx], 0", _W, content=bytes(8)),
        _i("lock-and", "access: lock and dword [rbx], 0", _W),
        _i("xchg", "access: xchg [rbx], rax", _W, registers={"rax": 3}),
        _i("lock-cmpxchg", "access: lock cmpxchg [rbx], rcx", _W, content=_ONE, registers={"rax": 1, "rcx": 9}),
        _i(
            "lock-cmpxchg-unequal", "access: lock cmpxchg [rbx], rcx", Effect.REWRITTEN, content=_ONE,
            registers={"rax": 2}, mmio=False,
        ),
        _i("cmpxchg8b", "access: lock cmpxchg8b [rbx]", _W, content=_ONE, registers={"rax": 1, "rcx": 7}),
        _i("not", "access: not qword [rbx]", _W),
        _i("adc-16-bit", "access: adc [rbx], ax", _W, registers={"rax": 0x11}),
        _i("shl-by-cl", "access: shl qword [rbx], cl", _W, registers={"rcx": 4}),
        _i("shld", "access: shld [rbx], rax, 8", _W),
        _i("bts-immediate", "access: bts qword [rbx], 9", _W, content=bytes(8)),
        _i("bt-immediate", "access: bt qword [rbx], 9"),
        _i("imul", "access: imul rax, [rbx]"),
        _i("mul", "access: mul qword [rbx]"),
        _i("div", "access: div qword [rbx]", content=_ONE, registers={"rax": 9, "rdx": 0}),
        _i("cmp-immediate", "access: cmp dword [rbx], 5"),
        _i("test-byte", "access: test byte [rbx], 5"),
        _i("setcc", "access: sete byte [rbx]", _W),
        _i("cmovcc-not-taken", "access: cmove rax, [rbx]"),
        _i("movzx", "access: movzx eax, byte [rbx]"),
        _i("movsxd", "access: movsxd rax, dword [rbx]"),
        _i("bsf", "access: bsf rax, [rbx]"),
        _i("movnti", "access: movnti [rbx], rax", _W, registers={"rax": 0x77}),
        _i("movbe", "access: movbe rax, [rbx]", needs=("movbe",)),
        _i("popcnt", "access: popcnt rax, [rbx]", needs=("popcnt",)),
        _i("xlatb", "access: db 0xd7", registers={"rax": 0}),
        _i("idiv", "access: idiv dword [rbx]", content=_ONE, registers={"rax": 0, "rdx": 0}),
        _i("mov-to-segment", "access: mov fs, [rbx]", content=bytes(8)),
        _i("mov-from-segment", "access: mov [rbx], cs", _W),
    ),
)  # fmt: skip

_VECTOR = two_sides(
    _GROUP,
    (
        _i("movups-load", "access: movups xmm1, [rbx]"),
        _i("movups-store", "pxor xmm1, xmm1; access: movups [rbx], xmm1", _W),
        _i("movaps-load", "access: movaps xmm1, [rbx]"),
        _i("movaps-store", "pxor xmm1, xmm1; access: movaps [rbx], xmm1", _W),
        _i("movdqu-load", "access: movdqu xmm1, [rbx]"),
        _i("movdqa-store", "pxor xmm1, xmm1; access: movdqa [rbx], xmm1", _W),
        _i("movntdq", "pxor xmm1, xmm1; access: movntdq [rbx], xmm1", _W),
        _i("movq-store", "pxor xmm1, xmm1; access: movq [rbx], xmm1", _W),
        _i("movss-load", "access: movss xmm1, dword [rbx]"),
        _i("movhps-load", "access: movhps xmm1, [rbx]"),
        _i("paddb", "access: paddb xmm1, [rbx]"),
        _i("pinsrw", "access: pinsrw xmm1, [rbx], 3"),
        _i("pextrq", "pxor xmm1, xmm1; access: pextrq [rbx], xmm1, 0", _W, needs=("sse4_1",)),
        _i("lddqu", "access: lddqu xmm1, [rbx]", needs=("pni",)),
        _i("cvtsi2sd", "access: cvtsi2sd xmm1, dword [rbx]"),
        _i("movq-mmx-load", "access: movq mm1, [rbx]; emms"),
        _i(
            "maskmovdqu", "pcmpeqb xmm1, xmm1; pxor xmm0, xmm0; access: db 0x66, 0x0f, 0xf7, 0xc1", _W, at="rdi",
        ),
        _i("pcmpistri", "access: pcmpistri xmm1, [rbx], 0", needs=("sse4_2",)),
    ),
)  # fmt: skip

_X87 = two_sides(
    _GROUP,
    (
        _i("fld-double", "fninit; access: fld qword [rbx]", content=_DOUBLE),
        _i("fld-extended", "fninit; access: fld tbyte [rbx]", content=bytes(10)),
        _i("fstp-double", "fninit; fldz; access: fstp qword [rbx]", _W),
        _i("fstp-extended", "fninit; fldz; access: fstp tbyte [rbx]", _W),
        _i("fild", "fninit; access: fild dword [rbx]"),
        _i("fistp", "fninit; fldz; access: fistp qword [rbx]", _W),
        _i("fbstp", "fninit; fldz; access: fbstp tbyte [rbx]", _W),
    ),
)

_FAR = (LOW_SUPERVISOR - HIGH_SUPERVISOR) & MASK64
_SPECIAL = (
    Case(
        id=f"{_GROUP}/cmpxchg16b-supervisor", group=_GROUP, words="CMPXCHG16B below the split",
        program="access: lock cmpxchg16b [rdi]",
        registers={"rdi": LOW_SUPERVISOR, "rax": 1, "rdx": 2, "rbx": 3, "rcx": 4},
        setup=(Words(LOW_SUPERVISOR, (1, 2)),), operand=LOW_SUPERVISOR, mmio=(LOW_SUPERVISOR,),
        needs=frozenset({"cx16"}), lass=gp(),
        off=completes(_W).but(memory={LOW_SUPERVISOR: 3, LOW_SUPERVISOR + 8: 4}),
    ),
    Case(
        id=f"{_GROUP}/cmpxchg16b-user", group=_GROUP, words="CMPXCHG16B above the split at CPL 3", cpl=3,
        program="access: cmpxchg16b [rdi]", registers={"rdi": HIGH_USER, "rax": 1, "rdx": 2, "rbx": 3, "rcx": 4},
        setup=(Words(HIGH_USER, (1, 2)),), operand=HIGH_USER, mmio=(HIGH_USER,), needs=frozenset({"cx16"}),
        lass=gp(), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/xlatb-crosses-by-al", group=_GROUP, words="XLATB: table plus AL, and FS base, is the address",
        program="access: db 0x64, 0xd7", registers={"rbx": LOW_SUPERVISOR - 0x40, "rax": 0x40},
        operand=LOW_SUPERVISOR, mmio=(LOW_SUPERVISOR,), lass=gp(), off=completes(Effect.READ),
    ),
    Case(
        id=f"{_GROUP}/bt-reaches-down", group=_GROUP,
        words="BT with a register bit offset: the word it reaches is below the split, its base above",
        program="access: bt [rbx], rcx", registers={"rbx": HIGH_SUPERVISOR, "rcx": (_FAR << 3) & MASK64},
        operand=LOW_SUPERVISOR, mmio=(LOW_SUPERVISOR,), lass=gp(), off=completes(Effect.READ),
    ),
    Case(
        id=f"{_GROUP}/bts-reaches-up", group=_GROUP, cpl=3,
        words="BTS with a register bit offset by a user program: base below, word above the split",
        program="access: bts [rbx], rcx",
        registers={"rbx": LOW_USER, "rcx": (((HIGH_USER - LOW_USER) & MASK64) << 3) & MASK64},
        setup=(Words(HIGH_USER, (0,)),), operand=HIGH_USER, mmio=(HIGH_USER,), lass=gp(), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/btr-reaches-its-own-half", group=_GROUP,
        words="BTR whose base is below the split and whose word is above: allowed",
        program="access: lock btr [rbx], rcx",
        registers={"rbx": LOW_SUPERVISOR, "rcx": (((HIGH_SUPERVISOR - LOW_SUPERVISOR) & MASK64) << 3) & MASK64},
        setup=(Words(HIGH_SUPERVISOR, (1,)),), operand=HIGH_SUPERVISOR, mmio=(HIGH_SUPERVISOR,),
        lass=completes(_W), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/violation-before-divide-error", group=_GROUP,
        words="a divisor that may not be read is #GP(0), not #DE", program="access: div qword [rbx]",
        registers={"rbx": LOW_SUPERVISOR, "rax": 1, "rdx": 0}, setup=(Words(LOW_SUPERVISOR, (0,)),),
        operand=LOW_SUPERVISOR, lass=gp(), off=fault(DE).but(effect=Effect.READ),
    ),
    Case(
        id=f"{_GROUP}/undefined-before-violation", group=_GROUP,
        words="an undefined instruction is #UD whatever its operand", program="access: db 0x0f, 0xff, 0x03",
        registers={"rbx": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR, forced=False,
        lass=fault(UD), off=fault(UD),
    ),
    Case(
        id=f"{_GROUP}/lea", group=_GROUP, words="LEA accesses nothing", program="access: lea rax, [rbx + 8]",
        registers={"rbx": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR,
        lass=completes(Effect.NONE, rax=LOW_SUPERVISOR + 8), off=completes(Effect.NONE),
    ),
    Case(
        id=f"{_GROUP}/jmp-through-low-memory", group=_GROUP, words="the operand of an indirect JMP is data",
        program="access: jmp qword [rbx]; int3; next: nop", registers={"rbx": LOW_SUPERVISOR},
        setup=(Words(LOW_SUPERVISOR, ("next",)),), operand=LOW_SUPERVISOR, mmio=(LOW_SUPERVISOR,),
        lass=gp(), off=completes(Effect.READ),
    ),
    Case(
        id=f"{_GROUP}/call-through-high-memory-user", group=_GROUP, cpl=3,
        words="the operand of an indirect CALL is data, too", program="access: call qword [rbx]; int3; next: nop",
        registers={"rbx": HIGH_USER}, setup=(Words(HIGH_USER, ("next",)),), operand=HIGH_USER, mmio=(HIGH_USER,),
        lass=gp(), off=completes(Effect.READ),
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_INTEGER, *_VECTOR, *_X87, *_SPECIAL)
