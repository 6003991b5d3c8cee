"""Multiplication and division: MUL, IMUL, MULX, DIV and IDIV.

The flags that the manual leaves undefined are as in direct execution: SF, ZF and PF those of the low half of a product,
and no change by a division.

Source: Intel SDM volume 2, the instructions by name.
"""

from __future__ import annotations

from iced_x86 import Mnemonic

from lasskvm.emulator.accessors import operand_bytes, reader, register_reader, register_writer, writer
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.flags import KEPT, result_flags
from lasskvm.emulator.instructions.forms import ACCUMULATORS, HIGH_HALVES, operand_bits, signed
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.state import RFLAGS
from lasskvm.x86.exceptions import DE
from lasskvm.x86.registers import RFLAGS_CF, RFLAGS_OF

__all__ = ["PLAIN"]

_TOO_WIDE = RFLAGS_CF | RFLAGS_OF


def _mul(decoded: Decoded) -> Executor:
    return _double_width_product(decoded, is_signed=False)


def _imul(decoded: Decoded) -> Executor:
    if decoded.instruction.op_count == 1:
        return _double_width_product(decoded, is_signed=True)
    bits = operand_bits(decoded, 0)
    mask, flags = (1 << bits) - 1, result_flags(bits)
    last = decoded.instruction.op_count - 1
    read, read_factor, write = reader(decoded, last - 1), reader(decoded, last), writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        product = signed(read(ctx), bits) * signed(read_factor(ctx), bits)
        result = product & mask
        write(ctx, result)
        words = ctx.words
        too_wide = 0 if signed(result, bits) == product else _TOO_WIDE
        words[RFLAGS] = words[RFLAGS] & KEPT | flags(result) | too_wide

    return run


def _double_width_product(decoded: Decoded, *, is_signed: bool) -> Executor:
    """MUL and the one-operand IMUL: the product fills the accumulator and the register above it."""
    size = operand_bytes(decoded, 0)
    bits = 8 * size
    mask, flags = (1 << bits) - 1, result_flags(bits)
    read, read_accumulator = reader(decoded, 0), register_reader(ACCUMULATORS[size])
    write_low, write_high = register_writer(ACCUMULATORS[size]), register_writer(HIGH_HALVES[size])

    def run(ctx: Emulation) -> None:
        factor, accumulator = read(ctx), read_accumulator(ctx)
        if is_signed:
            product = signed(factor, bits) * signed(accumulator, bits)
            fits = product == signed(product & mask, bits)
        else:
            product = factor * accumulator
            fits = product <= mask
        low = product & mask
        write_low(ctx, low)
        write_high(ctx, product >> bits & mask)
        words = ctx.words
        words[RFLAGS] = words[RFLAGS] & KEPT | flags(low) | (0 if fits else _TOO_WIDE)

    return run


def _mulx(decoded: Decoded) -> Executor:
    """MULX: rDX times operand 2; the low half goes to operand 1 and then the high half to operand 0."""
    size = operand_bytes(decoded, 0)
    bits = 8 * size
    mask = (1 << bits) - 1
    read, read_implied = reader(decoded, 2), register_reader(HIGH_HALVES[size])
    write_high, write_low = writer(decoded, 0), writer(decoded, 1)

    def run(ctx: Emulation) -> None:
        product = read(ctx) * read_implied(ctx)
        write_low(ctx, product & mask)
        write_high(ctx, product >> bits)

    return run


def _div(decoded: Decoded) -> Executor:
    return _division(decoded, is_signed=False)


def _idiv(decoded: Decoded) -> Executor:
    return _division(decoded, is_signed=True)


def _division(decoded: Decoded, *, is_signed: bool) -> Executor:
    """DIV and IDIV; #DE when the divisor is 0 or the quotient does not fit."""
    size = operand_bytes(decoded, 0)
    bits = 8 * size
    mask = (1 << bits) - 1
    low, high = ACCUMULATORS[size], HIGH_HALVES[size]
    read, read_low, read_high = reader(decoded, 0), register_reader(low), register_reader(high)
    write_quotient, write_remainder = register_writer(low), register_writer(high)

    def run(ctx: Emulation) -> None:
        divisor = read(ctx)
        dividend = read_high(ctx) << bits | read_low(ctx)
        if not divisor:
            raise GuestFault(DE)
        if is_signed:
            dividend, divisor = signed(dividend, 2 * bits), signed(divisor, bits)
            # Processors round towards zero, Python downwards.
            quotient = abs(dividend) // abs(divisor)
            if (dividend < 0) != (divisor < 0):
                quotient = -quotient
            fits = quotient == signed(quotient & mask, bits)
        else:
            quotient = dividend // divisor
            fits = quotient <= mask
        if not fits:
            raise GuestFault(DE)
        write_quotient(ctx, quotient & mask)
        write_remainder(ctx, dividend - quotient * divisor & mask)

    return run


#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    Mnemonic.MUL: _mul,
    Mnemonic.IMUL: _imul,
    Mnemonic.MULX: _mulx,
    Mnemonic.DIV: _div,
    Mnemonic.IDIV: _idiv,
}
