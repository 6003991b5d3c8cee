"""Decimal adjustments: AAA, AAS, AAM, AAD, DAA and DAS, which 64-bit mode does not have.

Source: Intel SDM volume 2, the instructions by name.
"""

from __future__ import annotations

from iced_x86 import Mnemonic, Register

from lasskvm.emulator.accessors import immediate, register_reader, register_writer
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.flags import KEPT, result_flags
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.state import RFLAGS
from lasskvm.x86.exceptions import DE
from lasskvm.x86.registers import RFLAGS_AF, RFLAGS_CF

__all__ = ["PLAIN"]

_BYTE, _MASK16, _NIBBLE = 0xFF, 0xFFFF, 0xF
_BYTE_BITS = 8
_LAST_DIGIT = 9
_LAST_PACKED = 0x99
#: What makes a hexadecimal digit carry where a decimal one would, in the low and the high digit.
_ADJUST_LOW, _ADJUST_HIGH = 0x06, 0x60
_AH_ONE = 1 << _BYTE_BITS
_CARRIES = RFLAGS_AF | RFLAGS_CF
_KEPT_BY_ASCII = ~_CARRIES

_byte_flags = result_flags(_BYTE_BITS)
_read_al, _write_al = register_reader(Register.AL), register_writer(Register.AL)
_read_ax, _write_ax = register_reader(Register.AX), register_writer(Register.AX)


def _needs_low_adjustment(al: int, rflags: int) -> bool:
    return al & _NIBBLE > _LAST_DIGIT or rflags & RFLAGS_AF != 0


def _adjust_ascii(adjustment: int) -> Builder:
    """AAA and AAS: *adjustment* is what AX gets when the low digit of AL is none."""

    def run(ctx: Emulation) -> None:
        words, ax = ctx.words, _read_ax(ctx)
        carries = 0
        if _needs_low_adjustment(ax & _BYTE, words[RFLAGS]):
            ax = ax + adjustment & _MASK16
            carries = _CARRIES
        _write_ax(ctx, ax & (_MASK16 ^ _BYTE | _NIBBLE))
        words[RFLAGS] = words[RFLAGS] & _KEPT_BY_ASCII | carries

    return lambda decoded: run


def _aam(decoded: Decoded) -> Executor:
    """AAM: AL in base *immediate*, the high digit to AH; #DE in base 0."""
    base = immediate(decoded.instruction, 0, 1)

    def run(ctx: Emulation) -> None:
        if not base:
            raise GuestFault(DE)
        words = ctx.words
        high, low = divmod(_read_al(ctx), base)
        _write_ax(ctx, high << _BYTE_BITS | low)
        words[RFLAGS] = words[RFLAGS] & KEPT | _byte_flags(low)

    return run


def _aad(decoded: Decoded) -> Executor:
    """AAD: the two digits in AH and AL, in base *immediate*, become a number in AX."""
    base = immediate(decoded.instruction, 0, 1)

    def run(ctx: Emulation) -> None:
        words, ax = ctx.words, _read_ax(ctx)
        result = (ax & _BYTE) + (ax >> _BYTE_BITS) * base & _BYTE
        _write_ax(ctx, result)
        words[RFLAGS] = words[RFLAGS] & KEPT | _byte_flags(result)

    return run


def _daa(decoded: Decoded) -> Executor:
    def run(ctx: Emulation) -> None:
        words, old = ctx.words, _read_al(ctx)
        rflags, al, carries = words[RFLAGS], old, 0
        if _needs_low_adjustment(old, rflags):
            al += _ADJUST_LOW
            carries = RFLAGS_AF
        if old > _LAST_PACKED or rflags & RFLAGS_CF:
            al += _ADJUST_HIGH
            carries |= RFLAGS_CF
        al &= _BYTE
        _write_al(ctx, al)
        words[RFLAGS] = rflags & KEPT | carries | _byte_flags(al)

    return run


def _das(decoded: Decoded) -> Executor:
    def run(ctx: Emulation) -> None:
        words, old = ctx.words, _read_al(ctx)
        rflags, al, carries = words[RFLAGS], old, 0
        if _needs_low_adjustment(old, rflags):
            al -= _ADJUST_LOW
            # Unlike DAA, a borrow of the low digit alone reaches CF.
            carries = RFLAGS_AF | (RFLAGS_CF if al < 0 else 0)
        if old > _LAST_PACKED or rflags & RFLAGS_CF:
            al -= _ADJUST_HIGH
            carries |= RFLAGS_CF
        al &= _BYTE
        _write_al(ctx, al)
        words[RFLAGS] = rflags & KEPT | carries | _byte_flags(al)

    return run


#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    Mnemonic.AAA: _adjust_ascii(_AH_ONE + _ADJUST_LOW),
    Mnemonic.AAS: _adjust_ascii(-_AH_ONE - _ADJUST_LOW),
    Mnemonic.AAM: _aam,
    Mnemonic.AAD: _aad,
    Mnemonic.DAA: _daa,
    Mnemonic.DAS: _das,
}
