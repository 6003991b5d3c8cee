"""Which opcodes can read, modify and write a memory operand.

A processor asks for write permission already on the read half of a read-modify-write, so a page fault there
reports W=1. Direct execution faults on the read, without the bit. These masks are the cheap filter that tells
whether the faulting instruction is worth decoding: bit *n* is set when some form of opcode *n* reads and
writes its memory operand. Forms that do not, and instructions that share the opcode (``80 /7`` is CMP), are
told apart by decoding.

The three-byte maps (0F38H, 0F3AH) have no such instruction that a guest of this VMM can execute.

Source: Intel SDM volume 2, appendix A (opcode maps).
"""

__all__ = ["ONE_BYTE_RMW", "TWO_BYTE_RMW", "is_rmw_opcode"]

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


def _mask(opcodes: tuple[int, ...]) -> tuple[int, int, int, int]:
    words = [0] * _WORDS
    for opcode in opcodes:
        words[opcode // _WORD_BITS] |= 1 << opcode % _WORD_BITS
    return words[0], words[1], words[2], words[3]


#: One-byte opcodes: bit ``n % 64`` of word ``n // 64``.
ONE_BYTE_RMW: tuple[int, int, int, int] = _mask(_ONE_BYTE)
#: Opcodes behind the escape byte 0FH.
TWO_BYTE_RMW: tuple[int, int, int, int] = _mask(_TWO_BYTE)


def is_rmw_opcode(mask: tuple[int, int, int, int], opcode: int) -> bool:
    """Whether *mask* (``ONE_BYTE_RMW`` or ``TWO_BYTE_RMW``) has the opcode byte *opcode*."""
    return ((mask[opcode >> _WORD_SHIFT] >> (opcode & (_WORD_BITS - 1))) & 1) != 0
