"""The opcode of the instruction at RIP, for native handlers that must know what made an event.

Only prefixes and opcode bytes are looked at; whatever needs operands goes to the decoder of :mod:`lasskvm.emulator`.
"""

from typing import Any

from lasskvm.emulator.mmu import load_linear
from lasskvm.engine.private import guest_cpl, guest_linear_rip, guest_runs_64bit_code
from lasskvm.lass import FETCH
from lasskvm.state import Words
from lasskvm.x86.opcodes import TWO_BYTE, is_prefix, is_rex
from lasskvm.x86.registers import MASK64

__all__ = ["TWO_BYTE", "begins_with_rep", "opcode_at_rip"]

_ESCAPE = 0x0F
_LONGEST_PREFIXES = 14
_REP = 0xF3


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
    while length < _LONGEST_PREFIXES and is_prefix(byte, code64):
        rex = 0
        if is_rex(byte, code64):
            rex = byte
        length += 1
        byte = _code_byte(state, memory, rip + length, cpl)
    length += 1
    if byte == _ESCAPE:
        byte = TWO_BYTE + _code_byte(state, memory, rip + length, cpl)
        length += 1
    return byte, _code_byte(state, memory, rip + length, cpl), length, rex


def begins_with_rep(env: int, state: Words, memory: Any) -> bool:
    """Whether the first byte of the instruction at RIP is the prefix F3."""
    return _code_byte(state, memory, guest_linear_rip(env), guest_cpl(env)) == _REP


def _code_byte(state: Words, memory: Any, address: int, cpl: int) -> int:
    value, _, _, _ = load_linear(state, memory, address & MASK64, 1, FETCH, cpl, 0)
    return value
