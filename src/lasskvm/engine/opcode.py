"""The opcode of the instruction at RIP, for native handlers that must know what made an event.

Only prefixes and opcode bytes are looked at; whatever needs operands goes to the decoder of :mod:`lasskvm.emulator`.
"""

from typing import Any

from lasskvm.emulator.mmu import load_linear
from lasskvm.engine.private import guest_cpl, guest_linear_rip, guest_runs_64bit_code
from lasskvm.lass import FETCH
from lasskvm.state import Words
from lasskvm.x86.registers import MASK64

__all__ = ["TWO_BYTE", "opcode_at_rip"]

#: Added to the second byte of opcodes behind 0F.
TWO_BYTE = 0x100

_ESCAPE = 0x0F
_LONGEST_PREFIXES = 14
_OPERAND_SIZE, _ADDRESS_SIZE, _LOCK, _REPNE, _REP = 0x66, 0x67, 0xF0, 0xF2, 0xF3
_SEG_ES, _SEG_CS, _SEG_SS, _SEG_DS, _SEG_FS, _SEG_GS = 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65
_REX_FIRST, _REX_LAST = 0x40, 0x4F


def opcode_at_rip(env: int, state: Words, memory: Any) -> tuple[int, int, int, int]:
    """``(opcode, modrm, length, rex)``: *opcode* with ``TWO_BYTE`` added behind 0F, the byte behind it, the length of
    prefixes and opcode in bytes, and the REX prefix (0 without one).

    Opcode 0 is reported where the bytes cannot be read; they were there when the instruction was translated.
    """
    rip = guest_linear_rip(env)
    cpl = guest_cpl(env)
    code64 = guest_runs_64bit_code(env)
    length = 0
    rex = 0
    byte = _code_byte(state, memory, rip, cpl)
    while length < _LONGEST_PREFIXES and _is_prefix(byte, code64):
        rex = 0
        if code64 and byte >= _REX_FIRST and byte <= _REX_LAST:
            rex = byte
        length += 1
        byte = _code_byte(state, memory, rip + length, cpl)
    length += 1
    if byte == _ESCAPE:
        byte = TWO_BYTE + _code_byte(state, memory, rip + length, cpl)
        length += 1
    return byte, _code_byte(state, memory, rip + length, cpl), length, rex


def _is_prefix(byte: int, code64: bool) -> bool:
    return (
        (code64 and byte >= _REX_FIRST and byte <= _REX_LAST)
        or byte == _OPERAND_SIZE or byte == _ADDRESS_SIZE or byte == _LOCK or byte == _REPNE or byte == _REP
        or byte == _SEG_ES or byte == _SEG_CS or byte == _SEG_SS or byte == _SEG_DS
        or byte == _SEG_FS or byte == _SEG_GS
    )  # fmt: skip


def _code_byte(state: Words, memory: Any, address: int, cpl: int) -> int:
    value, _, _, _ = load_linear(state, memory, address & MASK64, 1, FETCH, cpl, 0)
    return value
