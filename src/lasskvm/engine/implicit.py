"""Telling implicit accesses from explicit ones where the TLB cannot.

The translator reads descriptor tables and the TSS through its supervisor TLBs. At CPL 3 that says that the access is
implicit, except for the stacks of far transfers. Below CPL 3 with RFLAGS.AC set, the same TLB serves explicit
accesses, which SMAP and LASS then allow, and implicit ones, which they do not. So pages with a descriptor table or a
TSS in them get no lasting entry in that case, and each access is judged by the instruction that makes it.
"""

from typing import Any

from lasskvm.engine.opcode import TWO_BYTE, opcode_at_rip
from lasskvm.engine.private import guest_rsp, guest_runs_64bit_code
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

__all__ = ["is_far_transfer_stack", "is_implicit", "may_be_implicit", "touches_system_table"]

_LDTR = SEGMENTS + SEGMENT_WORDS * LDTR
_TR = SEGMENTS + SEGMENT_WORDS * TR
_PAGE_SHIFT = 12
#: No far transfer touches its stack further than this from RSP.
_FAR_FRAME = 64

# Opcodes that read a descriptor: one byte, and behind 0F
_MOV_SREG, _IRET, _RETF, _RETF_IMM = 0x8E, 0xCF, 0xCB, 0xCA
_POP_ES, _POP_SS, _POP_DS, _CALL_FAR, _JMP_FAR, _LES, _LDS = 0x07, 0x17, 0x1F, 0x9A, 0xEA, 0xC4, 0xC5
_GROUP5, _GROUP5_CALL_FAR, _GROUP5_JMP_FAR = 0xFF, 3, 5
_GROUP6, _LAR, _LSL, _LSS, _LFS, _LGS, _POP_FS, _POP_GS = 0x00, 0x02, 0x03, 0xB2, 0xB4, 0xB5, 0xA1, 0xA9


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


def is_far_transfer_stack(env: int, state: Words, memory: Any, address: int) -> bool:
    """Whether *address* is the stack of a far CALL, far RET or IRET at RIP.

    The translator makes these stack accesses like descriptor reads, in supervisor mode at any CPL; they are not.
    """
    distance = (address - guest_rsp(env) + _FAR_FRAME) & MASK64
    if distance >= 2 * _FAR_FRAME:
        return False
    opcode, modrm, _, _ = opcode_at_rip(env, state, memory)
    far_call = opcode == _CALL_FAR or (opcode == _GROUP5 and (modrm >> 3) & 7 == _GROUP5_CALL_FAR)
    return far_call or opcode == _IRET or opcode == _RETF or opcode == _RETF_IMM


def is_implicit(env: int, state: Words, memory: Any) -> bool:
    """Whether the instruction at RIP loads or inspects a segment descriptor."""
    opcode, modrm, _, _ = opcode_at_rip(env, state, memory)
    if opcode >= TWO_BYTE:
        second = opcode - TWO_BYTE
        return (
            second == _GROUP6 or second == _LAR or second == _LSL or second == _LSS
            or second == _LFS or second == _LGS or second == _POP_FS or second == _POP_GS
        )  # fmt: skip
    if opcode == _GROUP5:
        operation = (modrm >> 3) & 7
        return operation == _GROUP5_CALL_FAR or operation == _GROUP5_JMP_FAR
    if opcode == _MOV_SREG or opcode == _IRET or opcode == _RETF or opcode == _RETF_IMM:
        return True
    return not guest_runs_64bit_code(env) and (
        opcode == _POP_ES or opcode == _POP_SS or opcode == _POP_DS or opcode == _CALL_FAR
        or opcode == _JMP_FAR or opcode == _LES or opcode == _LDS
    )  # fmt: skip
