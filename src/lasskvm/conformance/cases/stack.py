"""Stack accesses: a violation is #SS(0), and everything about the stack pointer stays as it was.

In 64-bit mode these are pushes, pops, CALL, RET, ENTER, LEAVE and operands based on RSP or RBP. CS, DS, ES and SS
overrides are ignored; FS and GS overrides make an operand one of FS or GS.
"""

from __future__ import annotations

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, completes, gp, ss
from lasskvm.conformance.cases.common import (
    HIGH_SUPERVISOR,
    HIGH_USER,
    LOW_SUPERVISOR,
    LOW_USER,
    Instruction,
    two_sides,
)
from lasskvm.conformance.setup import Words
from lasskvm.x86.registers import RFLAGS_AC

__all__ = ["CASES"]

_GROUP = "stack"
_W, _R = Effect.WRITTEN, Effect.READ


def _push(name: str, program: str, size: int = 8, **more: object) -> Instruction:
    return Instruction(name=name, program=program, at="rsp", bias=size, stack=True, effect=_W, **more)  # type: ignore[arg-type]


def _pop(name: str, program: str, content: int = 0, **more: object) -> Instruction:
    data = content.to_bytes(8, "little")
    return Instruction(name=name, program=program, at="rsp", stack=True, content=data, **more)  # type: ignore[arg-type]


def _operand(name: str, program: str, at: str = "rbp", **more: object) -> Instruction:
    return Instruction(name=name, program=program, at=at, **{"stack": True, **more})  # type: ignore[arg-type]


#: Where CALL goes: the label behind it, so that what it returns to does not matter.
_CALLS_ON = "access: call next; next: nop"
_REGISTERS = {"rax": 0x1234, "rcx": 0}

_PUSHES = two_sides(
    _GROUP,
    (
        _push("push-register", "access: push rax", registers=_REGISTERS),
        _push("push-immediate", "access: push 5"),
        _push("push-16-bit", "access: push ax", size=2, registers=_REGISTERS),
        _push("push-segment", "access: push fs"),
        _push("pushfq", "access: pushfq"),
        _push("call", _CALLS_ON),
        _push("call-register", "lea rax, [rip + next]; access: call rax; next: nop"),
        _push("enter", "access: enter 0, 0", registers={"rbp": 0x77}),
        _push("enter-with-frame", "access: enter 0x20, 0", registers={"rbp": 0x77}),
        _pop("pop-register", "access: pop rax"),
        _pop("pop-segment", "access: pop fs"),
        _pop("popfq", "access: popfq", content=2),
        Instruction(
            name="leave", program="access: leave", at="rbp", stack=True, content=bytes(8), state={"rbp": 0}
        ),
    ),
)

_OPERANDS = two_sides(
    _GROUP,
    (
        _operand("rbp", "access: mov rax, [rbp]"),
        _operand("rbp-write", "access: mov [rbp], rax", effect=_W),
        _operand("rbp-displacement", "access: mov rax, [rbp - 8]", bias=8),
        _operand("rbp-index", "access: mov rax, [rbp + rcx * 8]"),
        _operand("rsp", "access: mov rax, [rsp]", at="rsp"),
        _operand("rsp-write", "access: mov [rsp], rcx", at="rsp", effect=_W),
        _operand("rsp-index", "access: mov rax, [rsp + rcx * 4]", at="rsp"),
        _operand("rsp-add", "access: add qword [rsp], 1", at="rsp", effect=_W),
        _operand("ds-rbp", "access: mov rax, ds:[rbp]"),
        _operand("es-rbp", "access: mov rax, es:[rbp]"),
        _operand("cs-rbp", "access: mov rax, cs:[rbp]"),
        _operand("ss-rbp", "access: mov rax, ss:[rbp]"),
        _operand("fs-rbp", "access: mov rax, fs:[rbp]", stack=False),
        _operand("gs-rbp", "access: mov rax, gs:[rbp]", stack=False),
        _operand("gs-rsp", "access: mov rax, gs:[rsp]", at="rsp", stack=False),
        _operand("ss-rax", "access: mov rcx, ss:[rax]", at="rax", stack=False),
        _operand("ss-rsi-write", "access: mov ss:[rsi], rcx", at="rsi", stack=False, effect=_W),
        _operand("rbp-is-index", "access: mov rax, [rcx + rbp * 1]", stack=False),
        _operand("r13", "access: mov rax, [r13]", at="r13", stack=False),
        _operand("r12", "access: mov rax, [r12]", at="r12", stack=False),
    ),
)  # fmt: skip

_POINTERS = (
    Case(
        id=f"{_GROUP}/jump-through-rbp", group=_GROUP, words="the operand of a jump through [RBP] is on the stack",
        program="access: jmp qword [rbp]; int3; next: nop", registers={"rbp": LOW_SUPERVISOR},
        setup=(Words(LOW_SUPERVISOR, ("next",)),), operand=LOW_SUPERVISOR, mmio=(LOW_SUPERVISOR,),
        lass=ss(), off=completes(_R),
    ),
    Case(
        id=f"{_GROUP}/ret-supervisor-low", group=_GROUP, words="RET with RSP below the split",
        program="access: ret; next: nop", registers={"rsp": LOW_SUPERVISOR},
        setup=(Words(LOW_SUPERVISOR, ("next",)),), operand=LOW_SUPERVISOR, mmio=(LOW_SUPERVISOR,),
        lass=ss(), off=completes(_R),
    ),
    Case(
        id=f"{_GROUP}/ret-user-high", group=_GROUP, words="RET at CPL 3 with RSP above the split", cpl=3,
        program="access: ret 0x10; next: nop", registers={"rsp": HIGH_USER},
        setup=(Words(HIGH_USER, ("next",)),), operand=HIGH_USER, mmio=(HIGH_USER,),
        lass=ss(), off=completes(_R, rsp=HIGH_USER + 0x18),
    ),
    Case(
        id=f"{_GROUP}/push-memory-bad-operand", group=_GROUP,
        words="PUSH of a memory operand: a bad operand is #GP(0)", program="access: push qword [rbx]",
        registers={"rbx": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR, mmio=(LOW_SUPERVISOR,),
        lass=gp(), off=completes(_R),
    ),
    Case(
        id=f"{_GROUP}/push-memory-bad-stack", group=_GROUP,
        words="PUSH of a memory operand: a bad stack is #SS(0), though the operand can be read",
        program="access: push qword [rbx]", registers={"rbx": HIGH_SUPERVISOR, "rsp": LOW_SUPERVISOR + 8},
        operand=LOW_SUPERVISOR, mmio=(HIGH_SUPERVISOR,), lass=ss(), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/pop-memory-bad-operand", group=_GROUP,
        words="POP to memory: a bad operand is #GP(0), and RSP stays", program="access: pop qword [rbx]",
        registers={"rbx": LOW_SUPERVISOR, "rsp": HIGH_SUPERVISOR}, operand=LOW_SUPERVISOR,
        setup=(Words(HIGH_SUPERVISOR, (0x1234,)),), mmio=(LOW_SUPERVISOR,), lass=gp(), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/pop-memory-bad-stack", group=_GROUP, words="POP to memory: a bad stack is #SS(0)", cpl=3,
        program="access: pop qword [rbx]", registers={"rbx": LOW_USER, "rsp": HIGH_USER}, operand=HIGH_USER,
        mmio=(HIGH_USER,), lass=ss(), off=completes(_R),
    ),
    Case(
        id=f"{_GROUP}/call-memory-bad-stack", group=_GROUP,
        words="CALL through memory with a bad stack: #SS(0), RIP is the CALL",
        program="access: call qword [rbx]; next: nop",
        registers={"rbx": HIGH_SUPERVISOR, "rsp": LOW_SUPERVISOR + 8}, setup=(Words(HIGH_SUPERVISOR, ("next",)),),
        operand=LOW_SUPERVISOR, mmio=(HIGH_SUPERVISOR,), lass=ss(), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/enter-nested-reads", group=_GROUP,
        words="ENTER of nesting level 2 reads the outer frame through RBP", program="access: enter 0, 2",
        registers={"rbp": LOW_SUPERVISOR + 8}, operand=LOW_SUPERVISOR, lass=ss(), off=completes(_R),
    ),
    Case(
        id=f"{_GROUP}/enter-nested-reads-user", group=_GROUP, cpl=3,
        words="ENTER's nested frame reads at CPL 3", program="access: enter 0x10, 3",
        registers={"rbp": HIGH_USER + 8}, operand=HIGH_USER, lass=ss(), off=completes(_R),
    ),
    Case(
        id=f"{_GROUP}/enter-nested-pushes", group=_GROUP,
        words="ENTER of nesting level 2 with RSP below the split", program="access: enter 0, 2",
        registers={"rbp": HIGH_SUPERVISOR + 8, "rsp": LOW_SUPERVISOR + 8}, operand=LOW_SUPERVISOR,
        lass=ss(), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/push-ac1", group=_GROUP, words="RFLAGS.AC allows pushes below the split as it allows data",
        program="access: push rax", registers={"rsp": LOW_SUPERVISOR + 8}, rflags=RFLAGS_AC,
        operand=LOW_SUPERVISOR, mmio=(LOW_SUPERVISOR,), lass=completes(_W), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/push-no-smap", group=_GROUP, words="without CR4.SMAP pushes below the split are allowed",
        program="access: push rax", registers={"rsp": LOW_SUPERVISOR + 8}, smap=False,
        operand=LOW_SUPERVISOR, mmio=(LOW_SUPERVISOR,), lass=completes(_W), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/lea-rsp", group=_GROUP, cpl=3, words="LEA computes any address",
        program="access: lea rax, [rsp + 8]", registers={"rsp": HIGH_USER}, operand=HIGH_USER,
        lass=completes(Effect.NONE, rax=HIGH_USER + 8), off=completes(Effect.NONE),
    ),
    Case(
        id=f"{_GROUP}/stack-pointer-alone", group=_GROUP, cpl=3,
        words="a stack pointer above the split harms nobody who does not use it",
        program="mov rsp, rbx; access: add rsp, 8", registers={"rbx": HIGH_USER},
        lass=completes(rsp=HIGH_USER + 8), off=completes(rsp=HIGH_USER + 8),
    ),
    Case(
        id=f"{_GROUP}/ebp-32-bit-address", group=_GROUP, words="[EBP] with a 32-bit address size is a stack access",
        program="access: mov rax, [ebp]", registers={"rbp": 0xFFFF_FFFF_0000_0000 | LOW_SUPERVISOR},
        operand=LOW_SUPERVISOR, mmio=(LOW_SUPERVISOR,), lass=ss(), off=completes(_R),
    ),
    Case(
        id=f"{_GROUP}/retfq-supervisor-low", group=_GROUP, words="a far RET with RSP below the split",
        program="access: retfq; next: nop", registers={"rsp": LOW_SUPERVISOR},
        setup=(Words(LOW_SUPERVISOR, ("next", layout.KERNEL_CS)),), operand=LOW_SUPERVISOR,
        lass=ss(), off=completes(_R),
    ),
    Case(
        id=f"{_GROUP}/retfq-user-high", group=_GROUP, cpl=3, words="a far RET at CPL 3 with RSP above the split",
        program="access: retfq; next: nop", registers={"rsp": HIGH_USER},
        setup=(Words(HIGH_USER, ("next", layout.USER_CS)),), operand=HIGH_USER, lass=ss(), off=completes(_R),
    ),
    Case(
        id=f"{_GROUP}/iretq-supervisor-low", group=_GROUP, words="IRET with RSP below the split",
        program="access: iretq; next: nop", registers={"rsp": LOW_SUPERVISOR},
        setup=(Words(LOW_SUPERVISOR, ("next", layout.KERNEL_CS, 2, layout.KERNEL_STACK_TOP, layout.KERNEL_SS)),),
        operand=LOW_SUPERVISOR, lass=ss(), off=completes(_R),
    ),
    Case(
        id=f"{_GROUP}/iretq-user-high", group=_GROUP, cpl=3, words="IRET at CPL 3 with RSP above the split",
        program="access: iretq; next: nop", registers={"rsp": HIGH_USER},
        setup=(Words(HIGH_USER, ("next", layout.USER_CS, 2, layout.USER_STACK_TOP, layout.USER_SS)),),
        operand=HIGH_USER, lass=ss(), off=completes(_R),
    ),
    Case(
        id=f"{_GROUP}/far-call-supervisor-low", group=_GROUP, words="a far CALL with RSP below the split",
        program="access: call tbyte [rbx]; next: nop",
        registers={"rsp": LOW_SUPERVISOR + 16, "rbx": HIGH_SUPERVISOR},
        setup=(Words(HIGH_SUPERVISOR, ("next", layout.KERNEL_CS)),), operand=LOW_SUPERVISOR,
        lass=ss(), off=completes(_W),
    ),
    Case(
        id=f"{_GROUP}/far-call-user-high", group=_GROUP, cpl=3, words="a far CALL at CPL 3 with RSP above the split",
        program="access: call tbyte [rbx]; next: nop", registers={"rsp": HIGH_USER + 16, "rbx": LOW_USER},
        setup=(Words(LOW_USER, ("next", layout.USER_CS)),), operand=HIGH_USER, lass=ss(), off=completes(_W),
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_PUSHES, *_OPERANDS, *_POINTERS)
