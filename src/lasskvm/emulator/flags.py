"""The arithmetic flags of RFLAGS: what results set, and the conditions that branches, CMOVcc and SETcc test.

The functions that :func:`carry_flags` and :func:`result_flags` make return CF, PF, AF, ZF, SF and OF of one operation,
ready to be joined with the rest of RFLAGS. What depends on the operand size alone is settled when they are made.

Source: Intel SDM volume 1, 3.4.3.1 (status flags) and appendix B (condition codes).
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import ConditionCode

from lasskvm.emulator.decode import Decoded
from lasskvm.x86.registers import (
    RFLAGS_AF,
    RFLAGS_ARITHMETIC,
    RFLAGS_CF,
    RFLAGS_OF,
    RFLAGS_PF,
    RFLAGS_SF,
    RFLAGS_ZF,
)

__all__ = [
    "CARRIES",
    "CONDITIONS",
    "KEPT",
    "PARITY",
    "SF_BIT",
    "Condition",
    "carry_flags",
    "condition_of",
    "result_flags",
]

#: Tells from RFLAGS whether a condition holds.
Condition = Callable[[int], bool]

#: What an instruction that sets all the arithmetic flags leaves of RFLAGS.
KEPT = ~RFLAGS_ARITHMETIC
#: PF of a result, by its low byte: set when the number of ones is even.
PARITY = tuple(0 if byte.bit_count() & 1 else RFLAGS_PF for byte in range(256))

#: CF and OF of a sum, by the carries into its sign bit (bit 0 of the index) and out of it (bit 1): they differ where
#: the sum overflows as a signed number. The borrows of a difference that is negative go on for ever: -1 and -2 in
#: place of 3 and 2, which index the same entries.
CARRIES = (0, RFLAGS_OF, RFLAGS_CF | RFLAGS_OF, RFLAGS_CF)

_BYTE = 0xFF
#: Where SF stands in RFLAGS, and OF from there.
SF_BIT = 7
_SF_TO_OF = 4


def result_flags(bits: int) -> Callable[[int], int]:
    """Makes the function that gives PF, ZF and SF of a result of *bits* bits, with CF, AF and OF clear.

    That is what AND, OR, XOR and TEST set: AF, undefined by the manual, is clear on the processors there are.
    """
    # The sign bit goes to bit 7 of RFLAGS; for bytes it is there already.
    to_sf = bits - 1 - SF_BIT

    def flags(result: int) -> int:
        if result:
            return PARITY[result & _BYTE] | result >> to_sf & RFLAGS_SF
        return RFLAGS_ZF | RFLAGS_PF

    return flags


def carry_flags(bits: int) -> Callable[[int, int, int], int]:
    """Makes the function of ``a``, ``b`` and ``total`` that gives the flags of a sum or difference in *bits* bits.

    ``total`` is ``a + b`` or ``a - b``, with the carry or borrow that came in, as Python has it: it may exceed *bits*
    bits, or be negative.
    """
    mask = (1 << bits) - 1
    sign = bits - 1
    to_sf = sign - SF_BIT

    def flags(a: int, b: int, total: int) -> int:
        result = total & mask
        carries = a ^ b ^ total
        return (
            CARRIES[carries >> sign]
            | carries & RFLAGS_AF
            | PARITY[result & _BYTE]
            | (result >> to_sf & RFLAGS_SF if result else RFLAGS_ZF)
        )

    return flags


def _is_less(rflags: int) -> bool:
    return (rflags >> _SF_TO_OF ^ rflags) & RFLAGS_SF != 0


def _is_less_or_equal(rflags: int) -> bool:
    return rflags & RFLAGS_ZF != 0 or (rflags >> _SF_TO_OF ^ rflags) & RFLAGS_SF != 0


#: The sixteen conditions, by ``iced_x86.ConditionCode``.
CONDITIONS: dict[int, Condition] = {
    ConditionCode.O: lambda rflags: rflags & RFLAGS_OF != 0,
    ConditionCode.NO: lambda rflags: rflags & RFLAGS_OF == 0,
    ConditionCode.B: lambda rflags: rflags & RFLAGS_CF != 0,
    ConditionCode.AE: lambda rflags: rflags & RFLAGS_CF == 0,
    ConditionCode.E: lambda rflags: rflags & RFLAGS_ZF != 0,
    ConditionCode.NE: lambda rflags: rflags & RFLAGS_ZF == 0,
    ConditionCode.BE: lambda rflags: rflags & (RFLAGS_CF | RFLAGS_ZF) != 0,
    ConditionCode.A: lambda rflags: rflags & (RFLAGS_CF | RFLAGS_ZF) == 0,
    ConditionCode.S: lambda rflags: rflags & RFLAGS_SF != 0,
    ConditionCode.NS: lambda rflags: rflags & RFLAGS_SF == 0,
    ConditionCode.P: lambda rflags: rflags & RFLAGS_PF != 0,
    ConditionCode.NP: lambda rflags: rflags & RFLAGS_PF == 0,
    ConditionCode.L: _is_less,
    ConditionCode.GE: lambda rflags: not _is_less(rflags),
    ConditionCode.LE: _is_less_or_equal,
    ConditionCode.G: lambda rflags: not _is_less_or_equal(rflags),
}


def condition_of(decoded: Decoded) -> Condition:
    """The condition in the opcode of *decoded*: a Jcc, CMOVcc or SETcc (or LOOPcc, whose count is not part of it)."""
    return CONDITIONS[decoded.instruction.condition_code]
