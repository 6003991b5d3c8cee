"""What the manual leaves undefined: flags, and a few results, behind each instruction.

Mostly iced-x86's knowledge (``Instruction.rflags_undefined``); the rest, where it depends on the state, is added here.
Source: Intel SDM volume 2, "Flags Affected" of each instruction; volume 1, appendix A.
"""

from __future__ import annotations

from iced_x86 import Decoder, Instruction, Mnemonic, OpKind, RflagsBits

from lasskvm.x86.registers import (
    RFLAGS_AF,
    RFLAGS_ARITHMETIC,
    RFLAGS_CF,
    RFLAGS_OF,
    RFLAGS_PF,
    RFLAGS_SF,
    RFLAGS_ZF,
)

__all__ = ["leaves_flags_undefined", "undefined_flags"]

_FLAGS = {
    RflagsBits.OF: RFLAGS_OF, RflagsBits.SF: RFLAGS_SF, RflagsBits.ZF: RFLAGS_ZF, RflagsBits.AF: RFLAGS_AF,
    RflagsBits.CF: RFLAGS_CF, RflagsBits.PF: RFLAGS_PF,
}  # fmt: skip
_SHIFTS = frozenset((Mnemonic.SHL, Mnemonic.SHR, Mnemonic.SAL, Mnemonic.SAR))
_DOUBLE_SHIFTS = frozenset((Mnemonic.SHLD, Mnemonic.SHRD))
_MOST_INSTRUCTIONS = 16


def leaves_flags_undefined(bits: int, code: bytes) -> bool:
    """Whether some instruction of *code*, executed from its start, leaves a flag undefined."""
    return undefined_flags(bits, code) != 0


def undefined_flags(bits: int, code: bytes) -> int:
    """The RFLAGS bits that the instructions of *code* may leave undefined.

    Those whose operands decide count as if they did, unless the operand is an immediate.
    """
    found = 0
    decoder = Decoder(bits, code)
    for _, instruction in zip(range(_MOST_INSTRUCTIONS), decoder, strict=False):
        if instruction.is_invalid:
            break
        for theirs, ours in _FLAGS.items():
            if instruction.rflags_undefined & theirs:
                found |= ours
        found |= _undefined_by_count(instruction)
    return found


def _undefined_by_count(instruction: Instruction) -> int:
    """Shifts by as much as the operand has bits leave CF undefined; double shifts by more, all flags."""
    if instruction.mnemonic in _SHIFTS and instruction.op_kind(1) == OpKind.REGISTER:
        return RFLAGS_CF | RFLAGS_OF | RFLAGS_AF
    if instruction.mnemonic in _SHIFTS:
        return RFLAGS_CF
    return RFLAGS_ARITHMETIC if instruction.mnemonic in _DOUBLE_SHIFTS else 0
