"""Telling implicit accesses from explicit ones where the TLB cannot.

The translator reads descriptor tables through its supervisor TLBs. At CPL 3 that says that the access is implicit.
Below CPL 3 with RFLAGS.AC set, the same TLB serves explicit accesses, which SMAP and LASS then allow, and implicit
ones, which they do not. So pages with a descriptor table or a TSS in them get no lasting entry in that case, and each
access is judged by the instruction that makes it. Most instructions that make implicit accesses do not get here: they
are left to the emulator (:mod:`lasskvm.engine.translation`), outside 64-bit mode all but VERR and VERW.
"""

from typing import Any

from lasskvm.engine.opcode import TWO_BYTE, opcode_at_rip
from lasskvm.state import (
    BASE,
    CR4,
    GDT_BASE,
    GDT_LIMIT,
    LIMIT,
    SEGMENT_WORDS,
    SEGMENTS,
    Words,
)
from lasskvm.x86.registers import CR4_SMAP, LDTR, MASK64, RFLAGS_AC, TR

__all__ = ["is_implicit", "may_be_implicit", "touches_system_table"]

_LDTR = SEGMENTS + SEGMENT_WORDS * LDTR
_TR = SEGMENTS + SEGMENT_WORDS * TR
_PAGE_SHIFT = 12

# Opcodes that read a descriptor: one byte, and behind 0F
_MOV_SREG, _IRET = 0x8E, 0xCF
_GROUP6, _LSS, _LFS, _LGS, _POP_FS, _POP_GS = 0x00, 0xB2, 0xB4, 0xB5, 0xA1, 0xA9


def may_be_implicit(state: Words, address: int, rflags: int) -> bool:
    """Whether a supervisor access to this page has to be judged by its instruction."""
    return rflags & RFLAGS_AC != 0 and state[CR4] & CR4_SMAP != 0 and touches_system_table(state, address)


def touches_system_table(state: Words, address: int) -> bool:
    """Whether a part of the GDT, the LDT or the TSS lies on the page of *address*."""
    return (
        _page_of_table(state[GDT_BASE], state[GDT_LIMIT], address)
        or _page_of_table(state[_LDTR + BASE], state[_LDTR + LIMIT], address)
        or _page_of_table(state[_TR + BASE], state[_TR + LIMIT], address)
    )


def _page_of_table(base: int, limit: int, address: int) -> bool:
    last = (base + limit) & MASK64
    page = address >> _PAGE_SHIFT
    if last < base:
        return page >= base >> _PAGE_SHIFT or page <= last >> _PAGE_SHIFT
    return base >> _PAGE_SHIFT <= page <= last >> _PAGE_SHIFT


def is_implicit(env: int, state: Words, memory: Any) -> bool:
    """Whether the instruction at RIP loads or inspects a segment descriptor."""
    opcode, _, _, _ = opcode_at_rip(env, state, memory)
    if opcode < TWO_BYTE:
        return opcode == _MOV_SREG or opcode == _IRET
    second = opcode - TWO_BYTE
    return (
        second == _GROUP6 or second == _LSS or second == _LFS or second == _LGS
        or second == _POP_FS or second == _POP_GS
    )  # fmt: skip
