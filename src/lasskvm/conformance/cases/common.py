"""What the case tables share: addresses, and the pair of cases that most instructions get.

Every page of the layout can be jumped to: it begins with what ends a program. The other bytes are not zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Expected, completes, gp, ss
from lasskvm.conformance.setup import Bytes, Map, Step
from lasskvm.memory import PAGE_SIZE

__all__ = [
    "HIGH_ABSENT", "HIGH_SUPERVISOR", "HIGH_USER", "LAST_PAGE", "LOW_ABSENT", "LOW_SUPERVISOR", "LOW_USER", "PAGES",
    "Instruction", "last_and_first_page", "two_sides",
]  # fmt: skip

#: Where in their pages operands are.
_OFFSET = 0x800
LOW_USER, LOW_SUPERVISOR, LOW_ABSENT, HIGH_USER, HIGH_SUPERVISOR, HIGH_ABSENT = (
    page + _OFFSET
    for page in (
        layout.LOW_USER,
        layout.LOW_SUPERVISOR,
        layout.LOW_ABSENT,
        layout.HIGH_USER,
        layout.HIGH_SUPERVISOR,
        layout.HIGH_ABSENT,
    )
)
#: An operand in a page of every kind, and the kind's name.
PAGES = {
    "low-user": LOW_USER,
    "low-supervisor": LOW_SUPERVISOR,
    "low-absent": LOW_ABSENT,
    "high-user": HIGH_USER,
    "high-supervisor": HIGH_SUPERVISOR,
    "high-absent": HIGH_ABSENT,
}
#: The last page of the address space; address 0 is next to it.
LAST_PAGE = (1 << 64) - PAGE_SIZE


def last_and_first_page(*, user: bool = False) -> tuple[Step, ...]:
    """Map the last page of the address space and the page at 0, which is behind it: supervisor pages, or user pages."""
    flags = layout.USER_PAGE if user else 0
    return Map(LAST_PAGE, layout.SPARE_GPA, flags), Map(0, layout.SPARE_GPA + PAGE_SIZE, flags)


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """An instruction with a memory operand: a row of :func:`two_sides`.

    *program* finds the operand's address plus *bias* in the register *at*. *content* is at the operand. *registers* are
    further ones. The operand is *offset* bytes into its page.
    """

    name: str
    program: str
    effect: Effect | None = Effect.READ
    at: str = "rbx"
    bias: int = 0
    stack: bool = False
    content: bytes = b""
    registers: Mapping[str, int | str] | None = None
    offset: int = _OFFSET
    mmio: bool = True
    forced: bool = True
    #: CPL 0 only.
    privileged: bool = False
    needs: Sequence[str] = ()
    #: What else is to be seen without LASS.
    state: Mapping[str, int | str] | None = None
    #: More of the case, as :class:`Case` has it.
    more: Mapping[str, Any] | None = None


def two_sides(group: str, instructions: Sequence[Instruction]) -> tuple[Case, ...]:
    """Each instruction at CPL 0 with a supervisor page below the split, and at CPL 3 with a user page above it.

    Paging allows both. With LASS each is a violation (supervisor-mode data: SMAP is on and AC is 0).
    """
    cases = []
    for instruction in instructions:
        for side, cpl, page in (
            ("supervisor-low", 0, layout.LOW_SUPERVISOR),
            ("user-high", 3, layout.HIGH_USER),
        ):
            if cpl and instruction.privileged:
                continue
            operand = page + instruction.offset
            setup = (Bytes(operand, instruction.content),) if instruction.content else ()
            violation: Expected = ss() if instruction.stack else gp()
            fields: dict[str, Any] = {
                "registers": {instruction.at: operand + instruction.bias, **(instruction.registers or {})},
                "mmio": (operand,) if instruction.mmio else (),
                "forced": instruction.forced,
                "needs": frozenset(instruction.needs),
                "setup": setup,
            }
            cases.append(
                Case(
                    id=f"{group}/{instruction.name}-{side}",
                    group=group,
                    words=f"{instruction.name} in {side.replace('-', ' mode, ')} half",
                    program=instruction.program,
                    cpl=cpl,
                    operand=operand,
                    lass=violation,
                    off=completes(instruction.effect, **(instruction.state or {})),
                    **{**fields, **(instruction.more or {})},
                )
            )
    return tuple(cases)
