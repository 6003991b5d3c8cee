"""Single bits and counts of bits: BT, BTS, BTR, BTC, BSF, BSR, POPCNT, LZCNT and TZCNT.

Of the flags that the manual leaves undefined, the bit tests change none, and the scans and counts give those of direct
execution: SF and PF of the source of a scan, 0 for the rest.

Source: Intel SDM volume 2, the instructions by name.
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Mnemonic

from lasskvm.emulator.accessors import Reader, address_of, operand_bytes, reader, update_reader, writer
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import load, store
from lasskvm.emulator.decode import Decoded, stack_flag
from lasskvm.emulator.flags import KEPT, result_flags
from lasskvm.emulator.instructions.forms import constant, is_memory, operand_bits, signed
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.lass import WRITE
from lasskvm.state import RFLAGS
from lasskvm.x86.registers import RFLAGS_CF, RFLAGS_ZF

__all__ = ["PLAIN"]

_NOT_CF = ~RFLAGS_CF

#: ``change(value, bit)`` with *bit* as a mask of one bit.
_Change = Callable[[int, int], int]

# ---------------------------------------------------------------------------------------------------- bit tests


def _bit_test(change: _Change | None) -> Builder:
    """The builder of BT (*change* None), BTS, BTR or BTC."""

    def build(decoded: Decoded) -> Executor:
        if is_memory(decoded, 0) and constant(decoded, 1) is None:
            return _bit_string_test(decoded, change)
        last_bit = operand_bits(decoded, 0) - 1
        read_number = reader(decoded, 1)
        if change is None:
            return _pure_test(reader(decoded, 0), read_number, last_bit)
        read, write = update_reader(decoded, 0), writer(decoded, 0)

        def run(ctx: Emulation) -> None:
            value, number = read(ctx), read_number(ctx) & last_bit
            write(ctx, change(value, 1 << number))
            words = ctx.words
            words[RFLAGS] = words[RFLAGS] & _NOT_CF | value >> number & 1

        return run

    return build


def _pure_test(read: Reader, read_number: Reader, last_bit: int) -> Executor:
    def run(ctx: Emulation) -> None:
        value, number = read(ctx), read_number(ctx) & last_bit
        words = ctx.words
        words[RFLAGS] = words[RFLAGS] & _NOT_CF | value >> number & 1

    return run


def _bit_string_test(decoded: Decoded, change: _Change | None) -> Executor:
    """A bit test of memory with a register: the bit number, signed, reaches as far as it goes from the operand.

    The access is one of the operand size, at a multiple of it from the address.
    """
    operand, offset_of, read_number = decoded.operand, address_of(decoded), reader(decoded, 1)
    assert operand is not None
    size, bits = operand_bytes(decoded, 0), operand_bits(decoded, 0)
    segment, address_mask = operand.segment, operand.address_mask
    stack = stack_flag(decoded)
    load_flags = stack if change is None else stack | WRITE

    def run(ctx: Emulation) -> None:
        words = ctx.words
        element, number = divmod(signed(read_number(ctx), bits), bits)
        offset = offset_of(words) + element * size & address_mask
        value = load(ctx, segment, offset, size, load_flags)
        if change is not None:
            store(ctx, segment, offset, size, change(value, 1 << number), stack)
        words[RFLAGS] = words[RFLAGS] & _NOT_CF | value >> number & 1

    return run


# ---------------------------------------------------------------------------------------------- scans and counts


def _lowest(value: int, bits: int) -> int:
    """The number of zeros below the lowest one."""
    return (value & -value).bit_length() - 1 if value else bits


def _scan(decoded: Decoded, position: Callable[[int], int]) -> Executor:
    """BSF and BSR: ZF tells whether the source is 0. The destination then keeps its value, but a 32-bit one loses its
    upper half, as it does in direct execution and on older processors."""
    flags = result_flags(operand_bits(decoded, 0))
    read, read_old, write = reader(decoded, 1), reader(decoded, 0), writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        value = read(ctx)
        write(ctx, position(value) if value else read_old(ctx))
        words = ctx.words
        words[RFLAGS] = words[RFLAGS] & KEPT | flags(value)

    return run


def _bsf(decoded: Decoded) -> Executor:
    return _scan(decoded, lambda value: (value & -value).bit_length() - 1)


def _bsr(decoded: Decoded) -> Executor:
    return _scan(decoded, lambda value: value.bit_length() - 1)


def _count(count: Callable[[int, int], int]) -> Builder:
    """The builder of LZCNT and TZCNT: CF tells whether the source is 0, ZF whether the result is."""

    def build(decoded: Decoded) -> Executor:
        bits = operand_bits(decoded, 0)
        read, write = reader(decoded, 1), writer(decoded, 0)

        def run(ctx: Emulation) -> None:
            value = read(ctx)
            result = count(value, bits)
            write(ctx, result)
            words = ctx.words
            words[RFLAGS] = words[RFLAGS] & KEPT | (0 if value else RFLAGS_CF) | (0 if result else RFLAGS_ZF)

        return run

    return build


def _popcnt(decoded: Decoded) -> Executor:
    """POPCNT: all flags are cleared, but for ZF when the source is 0."""
    read, write = reader(decoded, 1), writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        result = read(ctx).bit_count()
        write(ctx, result)
        words = ctx.words
        words[RFLAGS] = words[RFLAGS] & KEPT | (0 if result else RFLAGS_ZF)

    return run


#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    Mnemonic.BT: _bit_test(None),
    Mnemonic.BTS: _bit_test(lambda value, bit: value | bit),
    Mnemonic.BTR: _bit_test(lambda value, bit: value & ~bit),
    Mnemonic.BTC: _bit_test(lambda value, bit: value ^ bit),
    Mnemonic.BSF: _bsf,
    Mnemonic.BSR: _bsr,
    Mnemonic.POPCNT: _popcnt,
    Mnemonic.LZCNT: _count(lambda value, bits: bits - value.bit_length()),
    Mnemonic.TZCNT: _count(_lowest),
}
