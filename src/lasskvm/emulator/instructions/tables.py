"""Instructions on the descriptor-table registers: LGDT, LIDT, SGDT, SIDT, LLDT, LTR, SLDT, STR.

Each function is a :data:`~lasskvm.emulator.completion.Handler`. The memory operands are ordinary data
accesses of the current CPL, which LASS and paging check; the addresses *in* them are only checked to be
canonical.

Source: Intel SDM volume 2, the instructions by name; volume 3A, 2.4 and 2.5 (UMIP); KVM's ``em_lgdt_lidt()``.
"""

from __future__ import annotations

from iced_x86 import Code, Mnemonic

from lasskvm.emulator.completion import Handler, complete, require_cpl0
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import general_protection, invalid_opcode
from lasskvm.emulator.modes import in_protected_mode, linear_address_bits
from lasskvm.emulator.operands import (
    load_memory_operand,
    read_operand,
    store_memory_operand,
    write_operand,
)
from lasskvm.emulator.segments import load_ldtr, load_tr
from lasskvm.state import (
    CR4,
    GDT_BASE,
    GDT_LIMIT,
    IDT_BASE,
    IDT_LIMIT,
    SELECTOR,
    TLB_FLUSH,
    Words,
    segment_word,
)
from lasskvm.x86.address import is_canonical
from lasskvm.x86.registers import CR4_UMIP, LDTR, TR

__all__ = ["HANDLERS"]

_LIMIT_BITS = 16
_MASK16 = 0xFFFF
#: With a 16-bit operand size, the top byte of the base is not used.
_BASE24 = 0xFFFFFF
_POINTER_BYTES, _POINTER_BYTES64 = 6, 10
_OPERAND16_CODES = (Code.LGDT_M1632_16, Code.LIDT_M1632_16)


def _lgdt(ctx: Emulation, decoded: Decoded) -> None:
    _load_table_register(ctx, decoded, GDT_BASE, GDT_LIMIT)


def _lidt(ctx: Emulation, decoded: Decoded) -> None:
    _load_table_register(ctx, decoded, IDT_BASE, IDT_LIMIT)


def _load_table_register(ctx: Emulation, decoded: Decoded, base_word: int, limit_word: int) -> None:
    words = ctx.words
    require_cpl0(words)
    pointer = load_memory_operand(ctx, decoded, _pointer_bytes(decoded))
    base = pointer >> _LIMIT_BITS
    if decoded.bits == 64:
        if not is_canonical(base, linear_address_bits(words)):
            raise general_protection()
    elif decoded.instruction.code in _OPERAND16_CODES:
        base &= _BASE24
    words[base_word], words[limit_word] = base, pointer & _MASK16
    # Direct execution treats the pages of the tables specially.
    words[TLB_FLUSH] = 1
    complete(ctx, decoded)


def _sgdt(ctx: Emulation, decoded: Decoded) -> None:
    _store_table_register(ctx, decoded, GDT_BASE, GDT_LIMIT)


def _sidt(ctx: Emulation, decoded: Decoded) -> None:
    _store_table_register(ctx, decoded, IDT_BASE, IDT_LIMIT)


def _store_table_register(ctx: Emulation, decoded: Decoded, base_word: int, limit_word: int) -> None:
    """Processors store all 32 bits of the base also with a 16-bit operand size."""
    words = ctx.words
    _check_umip(words)
    pointer = words[base_word] << _LIMIT_BITS | words[limit_word] & _MASK16
    store_memory_operand(ctx, decoded, _pointer_bytes(decoded), pointer)
    complete(ctx, decoded)


def _pointer_bytes(decoded: Decoded) -> int:
    return _POINTER_BYTES64 if decoded.bits == 64 else _POINTER_BYTES


def _lldt(ctx: Emulation, decoded: Decoded) -> None:
    _require_protected_mode(ctx.words)
    require_cpl0(ctx.words)
    load_ldtr(ctx.words, ctx.memory, _selector_operand(ctx, decoded))
    complete(ctx, decoded)


def _ltr(ctx: Emulation, decoded: Decoded) -> None:
    _require_protected_mode(ctx.words)
    require_cpl0(ctx.words)
    load_tr(ctx.words, ctx.memory, _selector_operand(ctx, decoded))
    complete(ctx, decoded)


def _selector_operand(ctx: Emulation, decoded: Decoded) -> int:
    return read_operand(ctx, decoded, 0) & _MASK16


def _sldt(ctx: Emulation, decoded: Decoded) -> None:
    _store_selector(ctx, decoded, LDTR)


def _str(ctx: Emulation, decoded: Decoded) -> None:
    _store_selector(ctx, decoded, TR)


def _store_selector(ctx: Emulation, decoded: Decoded, number: int) -> None:
    words = ctx.words
    _require_protected_mode(words)
    _check_umip(words)
    write_operand(ctx, decoded, 0, words[segment_word(number, SELECTOR)])
    complete(ctx, decoded)


def _require_protected_mode(words: Words) -> None:
    if not in_protected_mode(words):
        raise invalid_opcode()


def _check_umip(words: Words) -> None:
    if words[CR4] & CR4_UMIP:
        require_cpl0(words)


#: The handlers of this module, by ``iced_x86.Mnemonic``.
HANDLERS: dict[int, Handler] = {
    Mnemonic.LGDT: _lgdt,
    Mnemonic.LIDT: _lidt,
    Mnemonic.SGDT: _sgdt,
    Mnemonic.SIDT: _sidt,
    Mnemonic.LLDT: _lldt,
    Mnemonic.LTR: _ltr,
    Mnemonic.SLDT: _sldt,
    Mnemonic.STR: _str,
}
