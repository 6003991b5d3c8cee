"""Forms of instructions that do not exist, and that the translator executes nevertheless.

It ignores prefixes that the manual forbids (``NP`` in front of an opcode) or that make another instruction, and takes a
register for a memory operand or the reverse where only one of them is defined. A processor raises #UD.

Source: Intel SDM volume 2, the opcode columns of the instructions by name, and 3.1.1.1 (``NP``).
"""

from lasskvm.x86.opcodes import has_opcode, opcode_mask

__all__ = ["is_undefined_form", "may_be_undefined_form"]

_MOD_REGISTER, _REGISTER_SHIFT = 0xC0, 3

# Second opcode bytes, behind 0F
_GROUP7, _CLAC, _STAC = 0x01, 0xCA, 0xCB
_MOVLPD, _MOVHPD = 0x12, 0x16
_MOVMSK, _SHIFTS_FIRST, _SHIFTS_LAST = 0x50, 0x71, 0x73
_GROUP15, _GROUP15_STMXCSR, _GROUP15_LFENCE = 0xAE, 3, 5
_MOVNTI, _MOVDQ2Q = 0xC3, 0xD6

_CANDIDATES = opcode_mask(
    (
        _GROUP7, _MOVLPD, _MOVHPD, _MOVMSK, *range(_SHIFTS_FIRST, _SHIFTS_LAST + 1), _GROUP15, _MOVNTI, _MOVDQ2Q
    )
)  # fmt: skip


def may_be_undefined_form(second: int) -> bool:
    """Whether the ModRM byte behind 0F *second* has to be looked at."""
    return has_opcode(_CANDIDATES, second)


def is_undefined_form(second: int, modrm: int, operand_size: bool, repeat: bool) -> bool:
    """Whether 0F *second* with this ModRM byte is undefined; the flags tell of prefix 66, and of F2 or F3."""
    in_register = modrm & _MOD_REGISTER == _MOD_REGISTER
    operation = (modrm >> _REGISTER_SHIFT) & 7
    prefixed = operand_size or repeat
    if second == _GROUP7:
        # With a prefix they are ERETS, ERETU or nothing.
        return prefixed and (modrm == _CLAC or modrm == _STAC)
    if second == _MOVLPD or second == _MOVHPD:
        # Without a prefix, registers make MOVHLPS and MOVLHPS; with F2 or F3, MOVDDUP and its like.
        return in_register and operand_size and not repeat
    if second == _MOVMSK or (second >= _SHIFTS_FIRST and second <= _SHIFTS_LAST):
        return not in_register
    if second == _GROUP15:
        # Fences, which prefixes make INCSSP, TPAUSE, UMONITOR or UMWAIT; FXSAVE, FXRSTOR, LDMXCSR, STMXCSR.
        if in_register:
            return prefixed and operation >= _GROUP15_LFENCE
        return prefixed and operation <= _GROUP15_STMXCSR
    if second == _MOVNTI:
        return prefixed
    return second == _MOVDQ2Q and repeat and not in_register
