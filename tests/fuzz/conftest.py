"""Cases made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from lasskvm.fuzz import layout
from lasskvm.fuzz.case import Case, Mode
from lasskvm.fuzz.segments import plain_segments
from lasskvm.x86.registers import CR0_ET, CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME, RFLAGS_FIXED


def _case_of(code: str, *, rflags: int = 0, **registers: int) -> Case:
    """A case of user code in 64-bit mode on an ordinary machine."""
    order = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
    values = {"rsp": layout.USER_STACK + layout.STACK_BYTES} | registers
    case = Case(
        mode=Mode.LONG64, code=bytes.fromhex(code),
        registers=(*(values.get(name, 0) for name in order), *(0,) * 8), rip=layout.USER_CODE + 0x100,
        rflags=RFLAGS_FIXED | rflags, cpl=3, cr0=CR0_PE | CR0_ET | CR0_PG, cr4=CR4_PAE, efer=EFER_LME | EFER_LMA,
        segments=(), pages=(layout.PAGE_PLAIN,) * layout.DATA_PAGES,
    )  # fmt: skip
    return replace(case, segments=plain_segments(case))


@pytest.fixture(scope="session")
def case_of() -> Callable[..., Case]:
    """Makes a case from code in hexadecimal, RFLAGS and registers."""
    return _case_of
