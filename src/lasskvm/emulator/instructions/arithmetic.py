"""Addition, subtraction, comparison and logic: ADD to XOR, INC, DEC, NEG, NOT, CMP, TEST, ADCX and ADOX.

A read-modify-write of memory reads for writing, stores, and only then changes RFLAGS, so that a fault leaves all as it
was. LOCK makes no difference: nothing comes between the two accesses.

Source: Intel SDM volume 2, the instructions by name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from iced_x86 import Mnemonic

from lasskvm.emulator.accessors import reader, update_reader, writer
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.flags import KEPT, carry_flags, result_flags
from lasskvm.emulator.instructions.forms import operand_bits
from lasskvm.emulator.instructions.register_arithmetic import (
    add_whole,
    compare_whole,
    logic_whole,
    step_whole,
    subtract_whole,
    test_whole,
    zero_whole,
)
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.state import RFLAGS
from lasskvm.x86.registers import RFLAGS_CF, RFLAGS_OF

__all__ = ["PLAIN"]

#: Where CF and OF stand in RFLAGS.
_CF_BIT, _OF_BIT = 0, 11


def _add(decoded: Decoded) -> Executor:
    return add_whole(decoded) or _sum(decoded, 0)


def _adc(decoded: Decoded) -> Executor:
    return _sum(decoded, RFLAGS_CF)


def _sum(decoded: Decoded, carry_in: int) -> Executor:
    """ADD, or with *carry_in* ``RFLAGS_CF`` ADC; that flag is bit 0, so it can be added as it is."""
    bits = operand_bits(decoded, 0)
    mask, flags = (1 << bits) - 1, carry_flags(bits)
    read, read_addend, write = update_reader(decoded, 0), reader(decoded, 1), writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        words = ctx.words
        value, addend = read(ctx), read_addend(ctx)
        total = value + addend + (words[RFLAGS] & carry_in)
        write(ctx, total & mask)
        words[RFLAGS] = words[RFLAGS] & KEPT | flags(value, addend, total)

    return run


def _sub(decoded: Decoded) -> Executor:
    return zero_whole(decoded) or subtract_whole(decoded) or _difference(decoded, 0)


def _sbb(decoded: Decoded) -> Executor:
    return _difference(decoded, RFLAGS_CF)


def _difference(decoded: Decoded, borrow_in: int) -> Executor:
    """SUB, or with *borrow_in* ``RFLAGS_CF`` SBB."""
    bits = operand_bits(decoded, 0)
    mask, flags = (1 << bits) - 1, carry_flags(bits)
    read, read_subtrahend, write = update_reader(decoded, 0), reader(decoded, 1), writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        words = ctx.words
        value, subtrahend = read(ctx), read_subtrahend(ctx)
        difference = value - subtrahend - (words[RFLAGS] & borrow_in)
        write(ctx, difference & mask)
        words[RFLAGS] = words[RFLAGS] & KEPT | flags(value, subtrahend, difference)

    return run


def _cmp(decoded: Decoded) -> Executor:
    quick = compare_whole(decoded)
    if quick is not None:
        return quick
    flags = carry_flags(operand_bits(decoded, 0))
    read, read_subtrahend = reader(decoded, 0), reader(decoded, 1)

    def run(ctx: Emulation) -> None:
        value, subtrahend = read(ctx), read_subtrahend(ctx)
        words = ctx.words
        words[RFLAGS] = words[RFLAGS] & KEPT | flags(value, subtrahend, value - subtrahend)

    return run


def _and(decoded: Decoded) -> Executor:
    return _logic(decoded, operator.and_)


def _or(decoded: Decoded) -> Executor:
    return _logic(decoded, operator.or_)


def _xor(decoded: Decoded) -> Executor:
    return zero_whole(decoded) or _logic(decoded, operator.xor)


def _logic(decoded: Decoded, operation: Callable[[int, int], int]) -> Executor:
    quick = logic_whole(decoded, operation)
    if quick is not None:
        return quick
    flags = result_flags(operand_bits(decoded, 0))
    read, read_operand, write = update_reader(decoded, 0), reader(decoded, 1), writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        result = operation(read(ctx), read_operand(ctx))
        write(ctx, result)
        words = ctx.words
        words[RFLAGS] = words[RFLAGS] & KEPT | flags(result)

    return run


def _test(decoded: Decoded) -> Executor:
    quick = test_whole(decoded)
    if quick is not None:
        return quick
    flags = result_flags(operand_bits(decoded, 0))
    read, read_operand = reader(decoded, 0), reader(decoded, 1)

    def run(ctx: Emulation) -> None:
        result = read(ctx) & read_operand(ctx)
        words = ctx.words
        words[RFLAGS] = words[RFLAGS] & KEPT | flags(result)

    return run


def _inc(decoded: Decoded) -> Executor:
    return step_whole(decoded, 1) or _step(decoded, 1)


def _dec(decoded: Decoded) -> Executor:
    return step_whole(decoded, -1) or _step(decoded, -1)


def _step(decoded: Decoded, step: int) -> Executor:
    """INC or DEC: ADD or SUB of 1 that leaves CF."""
    bits = operand_bits(decoded, 0)
    mask, flags = (1 << bits) - 1, carry_flags(bits)
    read, write = update_reader(decoded, 0), writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        value = read(ctx)
        total = value + step
        write(ctx, total & mask)
        words = ctx.words
        words[RFLAGS] = words[RFLAGS] & (KEPT | RFLAGS_CF) | flags(value, 1, total) & ~RFLAGS_CF

    return run


def _neg(decoded: Decoded) -> Executor:
    bits = operand_bits(decoded, 0)
    mask, flags = (1 << bits) - 1, carry_flags(bits)
    read, write = update_reader(decoded, 0), writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        value = read(ctx)
        write(ctx, -value & mask)
        words = ctx.words
        words[RFLAGS] = words[RFLAGS] & KEPT | flags(0, value, -value)

    return run


def _not(decoded: Decoded) -> Executor:
    mask = (1 << operand_bits(decoded, 0)) - 1
    read, write = update_reader(decoded, 0), writer(decoded, 0)
    return lambda ctx: write(ctx, read(ctx) ^ mask)


def _adcx(decoded: Decoded) -> Executor:
    return _sum_with_one_flag(decoded, _CF_BIT, RFLAGS_CF)


def _adox(decoded: Decoded) -> Executor:
    return _sum_with_one_flag(decoded, _OF_BIT, RFLAGS_OF)


def _sum_with_one_flag(decoded: Decoded, flag_bit: int, flag: int) -> Executor:
    """ADCX and ADOX: the carry comes from and goes to one *flag*, and the other flags stay."""
    bits = operand_bits(decoded, 0)
    mask, kept = (1 << bits) - 1, ~flag
    read, read_addend, write = reader(decoded, 0), reader(decoded, 1), writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        words = ctx.words
        rflags = words[RFLAGS]
        total = read(ctx) + read_addend(ctx) + (rflags >> flag_bit & 1)
        write(ctx, total & mask)
        words[RFLAGS] = rflags & kept | total >> bits << flag_bit

    return run


#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    Mnemonic.ADD: _add,
    Mnemonic.ADC: _adc,
    Mnemonic.ADCX: _adcx,
    Mnemonic.ADOX: _adox,
    Mnemonic.AND: _and,
    Mnemonic.CMP: _cmp,
    Mnemonic.DEC: _dec,
    Mnemonic.INC: _inc,
    Mnemonic.NEG: _neg,
    Mnemonic.NOT: _not,
    Mnemonic.OR: _or,
    Mnemonic.SBB: _sbb,
    Mnemonic.SUB: _sub,
    Mnemonic.TEST: _test,
    Mnemonic.XOR: _xor,
}
