"""Bit fields (BMI1 and BMI2: ANDN, BEXTR, BLSI, BLSMSK, BLSR, BZHI, PDEP, PEXT) and CRC32.

Source: Intel SDM volume 2, the instructions by name. CRC32 is the CRC-32C of RFC 3720 without its inversions.
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Mnemonic

from lasskvm.emulator.accessors import operand_bytes, reader, writer
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.flags import KEPT, result_flags
from lasskvm.emulator.instructions.forms import operand_bits
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.state import RFLAGS
from lasskvm.x86.registers import MASK32, RFLAGS_CF, RFLAGS_SF, RFLAGS_ZF

__all__ = ["PLAIN"]

_BYTE = 0xFF
_BYTE_BITS = 8
#: The Castagnoli polynomial with the lowest power in the highest bit.
_CRC32C = 0x82F63B78


def _andn(decoded: Decoded) -> Executor:
    bits = operand_bits(decoded, 0)
    mask, flags = (1 << bits) - 1, result_flags(bits)
    write, read_inverted, read = writer(decoded, 0), reader(decoded, 1), reader(decoded, 2)

    def run(ctx: Emulation) -> None:
        result = (read_inverted(ctx) ^ mask) & read(ctx)
        write(ctx, result)
        words = ctx.words
        words[RFLAGS] = words[RFLAGS] & KEPT | flags(result)

    return run


def _bextr(decoded: Decoded) -> Executor:
    """BEXTR: the field of operand 1 that operand 2 gives: start in bits 7:0, length in bits 15:8."""
    flags = result_flags(operand_bits(decoded, 0))
    write, read, read_field = writer(decoded, 0), reader(decoded, 1), reader(decoded, 2)

    def run(ctx: Emulation) -> None:
        value, field = read(ctx), read_field(ctx)
        length = field >> _BYTE_BITS & _BYTE
        result = value >> (field & _BYTE) & (1 << length) - 1
        write(ctx, result)
        words = ctx.words
        words[RFLAGS] = words[RFLAGS] & KEPT | flags(result)

    return run


def _lowest_bit(operation: Callable[[int], int], *, carry_if_zero: bool) -> Builder:
    """The builder of BLSI, BLSMSK or BLSR. CF tells whether the source is 0, or for BLSI that it is not."""

    def build(decoded: Decoded) -> Executor:
        bits = operand_bits(decoded, 0)
        mask, sign = (1 << bits) - 1, 1 << bits - 1
        write, read = writer(decoded, 0), reader(decoded, 1)

        def run(ctx: Emulation) -> None:
            value = read(ctx)
            result = operation(value) & mask
            write(ctx, result)
            words = ctx.words
            words[RFLAGS] = (
                words[RFLAGS] & KEPT
                | (RFLAGS_CF if (value == 0) == carry_if_zero else 0)
                | (0 if result else RFLAGS_ZF)
                | (RFLAGS_SF if result & sign else 0)
            )

        return run

    return build


def _bzhi(decoded: Decoded) -> Executor:
    """BZHI: operand 1 without the bits from number operand 2 on; CF tells that there is no such bit."""
    bits = operand_bits(decoded, 0)
    sign = 1 << bits - 1
    write, read, read_number = writer(decoded, 0), reader(decoded, 1), reader(decoded, 2)

    def run(ctx: Emulation) -> None:
        value, number = read(ctx), read_number(ctx) & _BYTE
        result = value & (1 << number) - 1
        write(ctx, result)
        words = ctx.words
        words[RFLAGS] = (
            words[RFLAGS] & KEPT
            | (RFLAGS_CF if number >= bits else 0)
            | (0 if result else RFLAGS_ZF)
            | (RFLAGS_SF if result & sign else 0)
        )

    return run


def _pdep(decoded: Decoded) -> Executor:
    write, read, read_mask = writer(decoded, 0), reader(decoded, 1), reader(decoded, 2)

    def run(ctx: Emulation) -> None:
        value, places, result = read(ctx), read_mask(ctx), 0
        while places:
            place = places & -places
            if value & 1:
                result |= place
            value >>= 1
            places ^= place
        write(ctx, result)

    return run


def _pext(decoded: Decoded) -> Executor:
    write, read, read_mask = writer(decoded, 0), reader(decoded, 1), reader(decoded, 2)

    def run(ctx: Emulation) -> None:
        value, places, result, bit = read(ctx), read_mask(ctx), 0, 1
        while places:
            place = places & -places
            if value & place:
                result |= bit
            bit <<= 1
            places ^= place
        write(ctx, result)

    return run


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(1 << _BYTE_BITS):
        remainder = byte
        for _ in range(_BYTE_BITS):
            remainder = remainder >> 1 ^ (_CRC32C if remainder & 1 else 0)
        table.append(remainder)
    return tuple(table)


_CRC_TABLE = _crc_table()


def _crc32(decoded: Decoded) -> Executor:
    size = operand_bytes(decoded, 1)
    read_old, read, write = reader(decoded, 0), reader(decoded, 1), writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        remainder = read_old(ctx) & MASK32
        for byte in read(ctx).to_bytes(size, "little"):
            remainder = remainder >> _BYTE_BITS ^ _CRC_TABLE[(remainder ^ byte) & _BYTE]
        write(ctx, remainder)

    return run


#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    Mnemonic.ANDN: _andn,
    Mnemonic.BEXTR: _bextr,
    Mnemonic.BLSI: _lowest_bit(lambda value: value & -value, carry_if_zero=False),
    Mnemonic.BLSMSK: _lowest_bit(lambda value: value ^ value - 1, carry_if_zero=True),
    Mnemonic.BLSR: _lowest_bit(lambda value: value & value - 1, carry_if_zero=True),
    Mnemonic.BZHI: _bzhi,
    Mnemonic.CRC32: _crc32,
    Mnemonic.PDEP: _pdep,
    Mnemonic.PEXT: _pext,
}
