"""Branch targets are not checked: every kind of branch completes, and the fetch at its target faults there."""

from __future__ import annotations

from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import COMPLETION_CODE, Case, Effect, Expected, Mode, Value, completes, gp
from lasskvm.conformance.cases.common import HIGH_SUPERVISOR, LAST_PAGE, LOW_USER, last_and_first_page
from lasskvm.conformance.setup import Bytes, Words
from lasskvm.x86.registers import RFLAGS_AC, RFLAGS_ZF

__all__ = ["CASES"]

_GROUP = "branches"
_READ = Effect.READ
#: Where a register or memory holds the target: memory of the program's own side.
_SIDES = (
    ("supervisor", 0, layout.LOW_SUPERVISOR, HIGH_SUPERVISOR, layout.KERNEL_CS),
    ("user", 3, layout.HIGH_USER, LOW_USER, layout.USER_CS),
)


def _case(name: str, words: str, program: str, target: int, lass: Expected, **more: Any) -> Case:
    return Case(
        id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, operand=target, lass=lass,
        off=completes(_READ), **more,
    )  # fmt: skip


def _both_sides() -> list[Case]:
    found = []
    for side, cpl, target, own, cs in _SIDES:
        stack = layout.USER_STACK_TOP if cpl else layout.KERNEL_STACK_TOP
        ss = layout.USER_SS if cpl else layout.KERNEL_SS
        pushed: dict[int, Value] = {stack - 8: "next"}
        frame = Words(stack - 40, (target, cs, 2, stack - 0x100, ss))
        kinds: tuple[tuple[str, str, Expected, dict[str, Any]], ...] = (
            ("jmp-register", "access: jmp rbx", gp(target, rsp=stack), {}),
            ("jmp-memory", "access: jmp qword [rcx]", gp(target, rsp=stack), {"setup": (Words(own, (target,)),)}),
            ("call-register", "access: call rbx; next: nop", gp(target, rsp=stack - 8).but(memory=pushed), {}),
            ("call-memory", "access: call qword [rcx]; next: nop", gp(target, rsp=stack - 8).but(memory=pushed),
             {"setup": (Words(own, (target,)),)}),
            ("ret", "push rbx; access: ret", gp(target, rsp=stack), {}),
            ("ret-immediate", "push rbx; access: ret 0x20", gp(target, rsp=stack + 0x20), {}),
            ("far-jump", "access: jmp tbyte [rcx]", gp(target, cs=cs, rsp=stack),
             {"setup": (Words(own, (target, cs)),)}),
            ("far-call", "access: call tbyte [rcx]; next: nop",
             gp(target, cs=cs, rsp=stack - 16).but(memory={stack - 16: "next", stack - 8: cs}),
             {"setup": (Words(own, (target, cs)),)}),
            ("far-return", f"push {cs}; push rbx; access: retfq", gp(target, cs=cs, rsp=stack), {}),
            ("iretq", "access: iretq", gp(target, cs=cs, rsp=stack - 0x100),
             {"setup": (frame,), "registers": {"rbx": target, "rcx": own, "rsp": stack - 40}}),
        )  # fmt: skip
        for name, program, outcome, more in kinds:
            fields = {"registers": {"rbx": target, "rcx": own}, **more}
            found.append(
                _case(f"{name}-{side}", f"{name.replace('-', ' ')} across the split, {side} mode", program, target,
                      outcome, cpl=cpl, **fields)
            )  # fmt: skip
    return found


#: Near the end of the address space a relative branch reaches across the split.
_HIGH_CODE = LAST_PAGE + 0xFD0
_LOW_CODE = 0x40
#: Within reach of 8-bit displacements, and not.
_NEAR = (0x20, LAST_PAGE + 0xFD8)
_FAR = (0x820, LAST_PAGE + 0x7A0)


def _relative(
    name: str, program: str, targets: tuple[int, int], *, user: bool, state: dict[str, Value], **more: Any
) -> Case:
    """A relative branch upwards from the last page (supervisor), or downwards from the first (user)."""
    target = targets[user]
    landing = Bytes(target, COMPLETION_CODE)
    return _case(
        f"{name}-{'user' if user else 'supervisor'}", f"{name.replace('-', ' ')} across the split",
        program.format(target=f"{target:#x}"), target, gp(target, **state),
        at=_LOW_CODE if user else _HIGH_CODE, cpl=3 if user else 0,
        setup=(*last_and_first_page(user=user), landing), **more,
    )  # fmt: skip


def _relatives() -> list[Case]:
    kinds: tuple[tuple[str, str, tuple[int, int], dict[str, Value], dict[str, Any]], ...] = (
        ("jmp-short", "access: jmp {target}", _NEAR, {}, {}),
        ("jmp-relative", "access: jmp {target}", _FAR, {}, {}),
        ("jcc-short", "access: je {target}", _NEAR, {}, {"rflags": RFLAGS_ZF}),
        ("jcc-relative", "access: je {target}", _FAR, {}, {"rflags": RFLAGS_ZF}),
        ("loop", "access: loop {target}", _NEAR, {"rcx": 4}, {"registers": {"rcx": 5}}),
        ("jrcxz", "access: jrcxz {target}", _NEAR, {"rcx": 0}, {"registers": {"rcx": 0}}),
        ("call-relative", "access: call {target}", _FAR, {}, {}),
    )
    return [
        _relative(name, program, targets, user=user, state=state, **more)
        for name, program, targets, state, more in kinds
        for user in (False, True)
    ]


_LOW = layout.LOW_SUPERVISOR
_SPECIAL = (
    Case(
        id=f"{_GROUP}/jcc-not-taken", group=_GROUP, words="a branch that is not taken has no target",
        program="access: je 0x20", at=_HIGH_CODE, setup=last_and_first_page(), operand=0,
        lass=completes(Effect.NONE), off=completes(Effect.NONE),
    ),
    _case(
        "jmp-ac1", "RFLAGS.AC makes no difference to a fetch", "access: jmp rbx", _LOW, gp(_LOW),
        registers={"rbx": _LOW}, rflags=RFLAGS_AC,
    ),
    _case(
        "call-no-smap", "CR4.SMAP makes no difference to a fetch",
        "access: call rbx", _LOW, gp(_LOW), registers={"rbx": _LOW}, smap=False,
    ),
    _case(
        "iretq-to-user-high", "IRET to user mode above the split: the fault is the user's", "access: iretq",
        layout.HIGH_USER, gp(layout.HIGH_USER, cs=layout.USER_CS, ss=layout.USER_SS, rsp=layout.USER_STACK_TOP),
        registers={"rsp": HIGH_SUPERVISOR},
        setup=(Words(HIGH_SUPERVISOR, (
            layout.HIGH_USER, layout.USER_CS, 2, layout.USER_STACK_TOP, layout.USER_SS)),),
    ),
    _case(
        "retfq-to-user-high", "a far RET to user mode above the split", "access: retfq", layout.HIGH_USER,
        gp(layout.HIGH_USER, cs=layout.USER_CS, ss=layout.USER_SS), registers={"rsp": HIGH_SUPERVISOR},
        setup=(Words(HIGH_SUPERVISOR, (layout.HIGH_USER, layout.USER_CS, layout.USER_STACK_TOP, layout.USER_SS)),),
    ),
    _case(
        "iretq-to-user-low", "IRET to user mode below the split: where it belongs", "access: iretq", layout.LOW_USER,
        completes(_READ), registers={"rsp": HIGH_SUPERVISOR},
        setup=(Words(HIGH_SUPERVISOR, (
            layout.LOW_USER, layout.USER_CS, 2, layout.USER_STACK_TOP, layout.USER_SS)),),
    ),
    _case(
        "iretq-with-high-user-stack", "a user stack pointer above the split is loaded without a check",
        "access: iretq", layout.LOW_USER, completes(_READ, rsp=layout.HIGH_USER + 0x100),
        registers={"rsp": HIGH_SUPERVISOR},
        setup=(Words(HIGH_SUPERVISOR, (
            layout.LOW_USER, layout.USER_CS, 2, layout.HIGH_USER + 0x100, layout.USER_SS)),),
    ),
    _case(
        "iretq-to-compatibility-mode", "IRET to a 32-bit program", "access: iretq", layout.LOW_USER,
        completes(_READ, cs=layout.USER_CS32), registers={"rsp": HIGH_SUPERVISOR},
        setup=(Words(HIGH_SUPERVISOR, (
            layout.LOW_USER, layout.USER_CS32, 2, layout.USER_STACK_TOP, layout.USER_SS)),),
    ),
    _case(
        "jmp-in-compatibility-mode", "a 32-bit program jumps within the lower half", "access: jmp ebx",
        layout.LOW_USER, completes(_READ), registers={"rbx": layout.LOW_USER}, cpl=3, mode=Mode.COMPATIBILITY,
    ),
    _case(
        "far-jump-to-64-bit-mode", "a 32-bit program jumps to 64-bit code below the split",
        "access: jmp fword [ebx]", layout.LOW_USER, completes(_READ, cs=layout.USER_CS), cpl=3,
        mode=Mode.COMPATIBILITY, registers={"rbx": LOW_USER},
        setup=(Bytes(LOW_USER, layout.LOW_USER.to_bytes(4, "little") + layout.USER_CS.to_bytes(2, "little")),),
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_both_sides(), *_relatives(), *_SPECIAL)
