"""Cache-line instructions, prefetches and hints: CLFLUSH and its like read; prefetches and hints never fault."""

from __future__ import annotations

from lasskvm.conformance.case import Case, Effect, completes, gp, pf
from lasskvm.conformance.cases.common import (
    HIGH_ABSENT,
    HIGH_SUPERVISOR,
    HIGH_USER,
    LOW_ABSENT,
    LOW_SUPERVISOR,
    LOW_USER,
    Instruction,
    two_sides,
)
from lasskvm.x86.exceptions import PF_P, PF_U
from lasskvm.x86.registers import RFLAGS_AC

__all__ = ["CASES"]

_GROUP = "cache"

_FLUSHES = two_sides(
    _GROUP,
    (
        Instruction(name="clflush", program="access: clflush [rbx]", mmio=False),
        Instruction(name="clflush-rsp", program="access: clflush [rsp]", at="rsp", stack=True, mmio=False),
        Instruction(name="clflush-fs", program="access: clflush fs:[rbp]", at="rbp", mmio=False),
        Instruction(name="clflushopt", program="access: clflushopt [rbx]", mmio=False, needs=("clflushopt",)),
        Instruction(name="clwb", program="access: clwb [rbx]", mmio=False, needs=("clwb",)),
    ),
)
_SPECIAL = (
    Case(
        id=f"{_GROUP}/clflush-ac1", group=_GROUP, words="CLFLUSH is a data access: AC=1 allows it",
        program="access: clflush [rbx]", registers={"rbx": LOW_USER}, rflags=RFLAGS_AC, operand=LOW_USER,
        lass=completes(Effect.READ), off=completes(Effect.READ),
    ),
    Case(
        id=f"{_GROUP}/clflush-smap", group=_GROUP, words="CLFLUSH of a low user page: violation or page fault",
        program="access: clflush [rbx]", registers={"rbx": LOW_USER}, operand=LOW_USER, lass=gp(),
        off=pf(PF_P, LOW_USER),
    ),
    Case(
        id=f"{_GROUP}/clflush-absent", group=_GROUP, cpl=3, words="CLFLUSH of a page that is not there: as a read",
        program="access: clflush [rbx]", registers={"rbx": HIGH_ABSENT}, operand=HIGH_ABSENT, lass=gp(),
        off=pf(PF_U, HIGH_ABSENT),
    ),
    Case(
        id=f"{_GROUP}/clflush-own-half", group=_GROUP, words="CLFLUSH of the kernel's own memory",
        program="access: clflush [rbx]", registers={"rbx": HIGH_SUPERVISOR}, operand=HIGH_SUPERVISOR,
        lass=completes(Effect.READ), off=completes(Effect.READ),
    ),
)  # fmt: skip

#: Never a fault, whatever the address; with LASS on a violating one is not even looked up.
_HINTS = {
    "prefetcht0": "prefetcht0 [rbx]",
    "prefetcht1": "prefetcht1 [rbx]",
    "prefetcht2": "prefetcht2 [rbx]",
    "prefetchnta": "prefetchnta [rbx]",
    "prefetchw": "prefetchw [rbx]",
    "prefetch-rsp": "prefetcht0 [rsp]",
    "nop": "nop dword [rbx]",
    "hint-nop-1c": "db 0x0f, 0x1c, 0x03",
    "hint-nop-1d": "db 0x0f, 0x1d, 0x03",
    "hint-nop-19": "db 0x0f, 0x19, 0x03",
}
_HINT_CASES = tuple(
    Case(
        id=f"{_GROUP}/{name}-{side}",
        group=_GROUP,
        words=f"{name} of an address on the wrong side does nothing",
        program=f"access: {program}",
        cpl=cpl,
        registers={"rsp" if "rsp" in program else "rbx": address},
        operand=address,
        lass=completes(Effect.NONE),
        # Without LASS a processor may look the address up.
        off=completes(),
    )
    for name, program in _HINTS.items()
    for cpl, address, side in (
        (0, LOW_SUPERVISOR, "supervisor-low"),
        (0, LOW_ABSENT, "supervisor-low-absent"),
        (3, HIGH_USER, "user-high"),
    )
)

CASES: tuple[Case, ...] = (*_FLUSHES, *_SPECIAL, *_HINT_CASES)
