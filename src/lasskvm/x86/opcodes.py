"""Sets of opcodes, cheap enough to be asked for every instruction that is looked at.

A set of opcode bytes is four 64-bit words, one bit for each byte, so that compiled code can ask it
(:func:`has_opcode`).

*Read-modify-write.* A processor asks for write permission already on the read half of a read-modify-write, so a page
fault there reports W=1. Direct execution faults on the read, without the bit. ``ONE_BYTE_RMW`` and ``TWO_BYTE_RMW`` are
the cheap filter that tells whether the faulting instruction is worth decoding: some form of each of these opcodes reads
and writes its memory operand. Forms that do not, and instructions that share the opcode (``80 /7`` is CMP), are told
apart by decoding. The three-byte maps (0F38H, 0F3AH) have no such instruction that a guest of this VMM can execute.

*Prefixes* and *lockable instructions* are what direct execution asks for before it translates an instruction.

Source: Intel SDM volume 2, 2.1.1 (prefixes), LOCK in chapter 3, appendix A (opcode maps).
"""

__all__ = [
    "ONE_BYTE_RMW",
    "OPCODE_MASK",
    "TWO_BYTE",
    "TWO_BYTE_RMW",
    "has_opcode",
    "is_lockable",
    "is_prefix",
    "is_rex",
    "may_be_lockable",
    "opcode_mask",
]

#: Added to the second byte of opcodes behind 0F.
TWO_BYTE = 0x100
#: The opcode byte itself.
OPCODE_MASK = 0xFF

_WORDS = 4
_WORD_SHIFT = 6
_WORD_BITS = 64

_ONE_BYTE = (
    0x00, 0x01, 0x08, 0x09, 0x10, 0x11, 0x18, 0x19,  # ADD, OR, ADC, SBB
    0x20, 0x21, 0x28, 0x29, 0x30, 0x31,  # AND, SUB, XOR
    0x63,  # ARPL, outside 64-bit mode
    0x80, 0x81, 0x82, 0x83,  # the same with an immediate
    0x86, 0x87,  # XCHG
    0xC0, 0xC1, 0xD0, 0xD1, 0xD2, 0xD3,  # shifts and rotates
    0xF6, 0xF7, 0xFE, 0xFF,  # NOT, NEG, INC, DEC
)  # fmt: skip

_TWO_BYTE = (
    0x01,  # RSTORSSP
    0xA4, 0xA5, 0xAC, 0xAD,  # SHLD, SHRD
    0xAB, 0xB3, 0xBA, 0xBB,  # BTS, BTR, BTC
    0xAE,  # XSAVE, XSAVEOPT (they update the header), CLRSSBSY
    0xB0, 0xB1, 0xC0, 0xC1, 0xC7,  # CMPXCHG, XADD, CMPXCHG8B and CMPXCHG16B
)  # fmt: skip

#: Operand and address size, LOCK, REPNE, REP, and the segment overrides.
_LEGACY_PREFIXES = (0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65)
_REX_FIRST, _REX_LAST = 0x40, 0x4F

_ONE_BYTE_LOCKABLE = (
    0x00, 0x01, 0x08, 0x09, 0x10, 0x11, 0x18, 0x19,  # ADD, OR, ADC, SBB
    0x20, 0x21, 0x28, 0x29, 0x30, 0x31,  # AND, SUB, XOR
    0x80, 0x81, 0x82, 0x83,  # the same with an immediate
    0x86, 0x87,  # XCHG
    0xF6, 0xF7, 0xFE, 0xFF,  # NOT, NEG, INC, DEC
)  # fmt: skip
_TWO_BYTE_LOCKABLE = (
    0xAB, 0xB3, 0xBA, 0xBB,  # BTS, BTR, BTC
    0xB0, 0xB1, 0xC0, 0xC1, 0xC7,  # CMPXCHG, XADD, CMPXCHG8B and CMPXCHG16B
)  # fmt: skip
# Opcodes that stand for several instructions, told apart by bits 5:3 of the ModRM byte
_GROUP1_FIRST, _GROUP1_LAST, _GROUP1_CMP = 0x80, 0x83, 7
_GROUP3_FIRST, _GROUP3_LAST, _GROUP3_NOT, _GROUP3_NEG = 0xF6, 0xF7, 2, 3
_GROUP4, _GROUP5, _GROUP45_DEC = 0xFE, 0xFF, 1
_GROUP8, _GROUP8_BTS = TWO_BYTE + 0xBA, 5
_GROUP9, _GROUP9_CMPXCHG = TWO_BYTE + 0xC7, 1
_MOD_REGISTER, _REGISTER_SHIFT = 0xC0, 3


def opcode_mask(opcodes: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The set of these opcode bytes: bit ``n % 64`` of word ``n // 64`` for opcode *n*."""
    words = [0] * _WORDS
    for opcode in opcodes:
        words[opcode // _WORD_BITS] |= 1 << opcode % _WORD_BITS
    return words[0], words[1], words[2], words[3]


#: One-byte opcodes that read, modify and write.
ONE_BYTE_RMW: tuple[int, int, int, int] = opcode_mask(_ONE_BYTE)
#: The same behind the escape byte 0FH.
TWO_BYTE_RMW: tuple[int, int, int, int] = opcode_mask(_TWO_BYTE)


_PREFIXES = opcode_mask(_LEGACY_PREFIXES)
_LOCKABLE = opcode_mask(_ONE_BYTE_LOCKABLE)
_LOCKABLE_TWO_BYTE = opcode_mask(_TWO_BYTE_LOCKABLE)


def has_opcode(mask: tuple[int, int, int, int], opcode: int) -> bool:
    """Whether the set *mask* has the opcode byte *opcode*."""
    return ((mask[opcode >> _WORD_SHIFT] >> (opcode & (_WORD_BITS - 1))) & 1) != 0


def is_rex(byte: int, code64: bool) -> bool:
    """Whether *byte* is a REX prefix; *code64* says that the code runs in 64-bit mode."""
    return code64 and byte >= _REX_FIRST and byte <= _REX_LAST


def is_prefix(byte: int, code64: bool) -> bool:
    """Whether *byte* is a legacy prefix or, in 64-bit mode, a REX prefix."""
    return has_opcode(_PREFIXES, byte) or is_rex(byte, code64)


def may_be_lockable(opcode: int) -> bool:
    """Whether some form of *opcode* (``TWO_BYTE`` added behind 0F) may have a LOCK prefix."""
    if opcode >= TWO_BYTE:
        return has_opcode(_LOCKABLE_TWO_BYTE, opcode - TWO_BYTE)
    return has_opcode(_LOCKABLE, opcode)


def is_lockable(opcode: int, modrm: int) -> bool:
    """Whether the form of *opcode* that *modrm* selects may have a LOCK prefix: it reads and writes memory."""
    operation = (modrm >> _REGISTER_SHIFT) & 7
    if not may_be_lockable(opcode) or modrm & _MOD_REGISTER == _MOD_REGISTER:
        return False
    if opcode >= _GROUP1_FIRST and opcode <= _GROUP1_LAST:
        return operation != _GROUP1_CMP
    if opcode >= _GROUP3_FIRST and opcode <= _GROUP3_LAST:
        return operation >= _GROUP3_NOT and operation <= _GROUP3_NEG
    if opcode >= _GROUP4 and opcode <= _GROUP5:
        return operation <= _GROUP45_DEC
    if opcode == _GROUP8:
        return operation >= _GROUP8_BTS
    if opcode == _GROUP9:
        return operation == _GROUP9_CMPXCHG
    return True
