"""Modes other than 64-bit mode for a :class:`emulator_guest.Guest`, with segments of their own.

Memory is identity-mapped in all of them. Code, data and stack segments have different bases outside compatibility mode,
so that an access through the wrong one goes elsewhere.
"""

from __future__ import annotations

from emulator_guest import DPL3, USER_CS32, USER_SS, Guest

from lasskvm.emulator.decode import fetch_instruction
from lasskvm.emulator.execution import execute
from lasskvm.emulator.linearize import linear_address
from lasskvm.state import CPL, CR0, CR4, EFER, RFLAGS, RIP, RSP, Segment
from lasskvm.x86.registers import (
    AR_CODE,
    AR_CODE32,
    AR_DATA,
    AR_DB,
    AR_REAL_MODE,
    CR0_ET,
    CR0_PE,
    CS,
    DS,
    ES,
    FS,
    GS,
    RFLAGS_FIXED,
    RFLAGS_VM,
    SS,
)

CODE_BASE, DATA_BASE, EXTRA_BASE, STACK_BASE = 0x10000, 0x20000, 0x30000, 0x40000
START, STACK_TOP = 0x100, 0x800
LIMIT16 = 0xFFFF
LIMIT32 = 0xFFFFFFFF


def enter_real_mode(guest: Guest) -> None:
    """Real-address mode: 16-bit code, segments of 64 KiB."""
    words = guest.words
    words[CR0], words[CR4], words[EFER] = CR0_ET, 0, 0
    words[CPL], words[RFLAGS] = 0, RFLAGS_FIXED
    _set_segments(guest, AR_REAL_MODE | AR_CODE, AR_REAL_MODE, LIMIT16)


def enter_virtual_8086_mode(guest: Guest, iopl: int) -> None:
    """Virtual-8086 mode, without paging."""
    enter_real_mode(guest)
    words = guest.words
    words[CR0] |= CR0_PE
    words[CPL], words[RFLAGS] = 3, RFLAGS_FIXED | RFLAGS_VM | iopl << 12
    _set_segments(guest, AR_REAL_MODE | AR_CODE | DPL3, AR_REAL_MODE | DPL3, LIMIT16)


def enter_protected_mode(guest: Guest, bits: int, stack_bits: int | None = None) -> None:
    """Protected mode at CPL 0 without paging: 16-bit or 32-bit code, and a stack segment of the same kind or not."""
    enter_real_mode(guest)
    words = guest.words
    words[CR0] |= CR0_PE
    limit = LIMIT32 if bits == 32 else LIMIT16
    code, data = AR_CODE32, AR_DATA
    if bits == 16:
        code, data = code & ~AR_DB, data & ~AR_DB
    _set_segments(guest, code, data, limit)
    if stack_bits is not None:
        attributes = AR_DATA if stack_bits == 32 else AR_DATA & ~AR_DB
        guest.state.set_segment(SS, Segment(0x10, STACK_BASE, LIMIT32, attributes))


def enter_compatibility_mode(guest: Guest) -> None:
    """32-bit user code in IA-32e mode, flat."""
    words = guest.words
    guest.enter_user()
    guest.state.set_segment(CS, Segment(USER_CS32, 0, LIMIT32, AR_CODE32 | DPL3))
    for number in (DS, ES, FS, GS, SS):
        guest.state.set_segment(number, Segment(USER_SS, 0, LIMIT32, AR_DATA | DPL3))
    assert words[EFER]


def _set_segments(guest: Guest, code: int, data: int, limit: int) -> None:
    set_segment = guest.state.set_segment
    set_segment(CS, Segment(CODE_BASE >> 4, CODE_BASE, limit, code))
    set_segment(SS, Segment(STACK_BASE >> 4, STACK_BASE, limit, data))
    set_segment(DS, Segment(DATA_BASE >> 4, DATA_BASE, limit, data))
    set_segment(ES, Segment(EXTRA_BASE >> 4, EXTRA_BASE, limit, data))
    for number in (FS, GS):
        set_segment(number, Segment(0, 0, limit, data))
    guest.words[RIP], guest.words[RSP] = START, STACK_TOP


def run(guest: Guest, code: str) -> None:
    """Execute the instruction *code* (hexadecimal) at CS:RIP; a fault is raised."""
    guest.memory.write(linear_address(guest.words, CS, guest.words[RIP]), bytes.fromhex(code))
    execute(guest.ctx, fetch_instruction(guest.ctx))
