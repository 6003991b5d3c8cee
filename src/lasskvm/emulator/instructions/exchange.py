"""Exchanges: XCHG, BSWAP, XADD, CMPXCHG, CMPXCHG8B and CMPXCHG16B.

With one vCPU, nothing comes between the read and the write of an instruction, LOCK or not. The comparing ones write
memory in any case, with what was there before when the comparison fails.

Source: Intel SDM volume 2, the instructions by name.
"""

from __future__ import annotations

from iced_x86 import Mnemonic, Register

from lasskvm.emulator.accessors import (
    address_of,
    memory_loader,
    memory_storer,
    operand_bytes,
    reader,
    register_reader,
    register_writer,
    update_reader,
    writer,
)
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import general_protection
from lasskvm.emulator.flags import KEPT, carry_flags
from lasskvm.emulator.instructions.forms import ACCUMULATORS, operand_bits, register_word
from lasskvm.emulator.linearize import linear_address
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.lass import WRITE
from lasskvm.state import RFLAGS
from lasskvm.x86.registers import RFLAGS_ZF

__all__ = ["PLAIN"]

_WORD = 2
_NOT_ZF = ~RFLAGS_ZF


def _xchg(decoded: Decoded) -> Executor:
    read, read_register = update_reader(decoded, 0), reader(decoded, 1)
    write, write_register = writer(decoded, 0), writer(decoded, 1)

    def run(ctx: Emulation) -> None:
        value = read(ctx)
        write(ctx, read_register(ctx))
        write_register(ctx, value)

    return run


def _bswap(decoded: Decoded) -> Executor:
    """BSWAP. What its 16-bit form does is undefined; processors make the 16 bits zero."""
    size = operand_bytes(decoded, 0)
    if size == _WORD:
        write = register_writer(decoded.instruction.op_register(0))
        return lambda ctx: write(ctx, 0)
    word, mask = register_word(decoded.instruction.op_register(0)), (1 << 8 * size) - 1

    def run(ctx: Emulation) -> None:
        words = ctx.words
        words[word] = int.from_bytes((words[word] & mask).to_bytes(size, "little"), "big")

    return run


def _xadd(decoded: Decoded) -> Executor:
    bits = operand_bits(decoded, 0)
    mask, flags = (1 << bits) - 1, carry_flags(bits)
    read, read_register = update_reader(decoded, 0), reader(decoded, 1)
    write, write_register = writer(decoded, 0), writer(decoded, 1)
    to_memory = decoded.operand is not None

    def run(ctx: Emulation) -> None:
        value, addend = read(ctx), read_register(ctx)
        total = value + addend
        if to_memory:
            write(ctx, total & mask)
            write_register(ctx, value)
        else:
            # With one register for both operands the sum is what stays.
            write_register(ctx, value)
            write(ctx, total & mask)
        words = ctx.words
        words[RFLAGS] = words[RFLAGS] & KEPT | flags(value, addend, total)

    return run


def _cmpxchg(decoded: Decoded) -> Executor:
    """CMPXCHG. A register that is not to change is not written, so that it keeps its upper half too."""
    size = operand_bytes(decoded, 0)
    flags = carry_flags(8 * size)
    read, read_new, write = update_reader(decoded, 0), reader(decoded, 1), writer(decoded, 0)
    read_accumulator = register_reader(ACCUMULATORS[size])
    write_accumulator = register_writer(ACCUMULATORS[size])
    to_memory = decoded.operand is not None

    def run(ctx: Emulation) -> None:
        old, expected = read(ctx), read_accumulator(ctx)
        if old == expected:
            write(ctx, read_new(ctx))
        else:
            if to_memory:
                write(ctx, old)
            write_accumulator(ctx, old)
        words = ctx.words
        words[RFLAGS] = words[RFLAGS] & KEPT | flags(expected, old, expected - old)

    return run


def _cmpxchg8b(decoded: Decoded) -> Executor:
    return _compare_pair(decoded, Register.EAX, Register.EDX, Register.EBX, Register.ECX)


def _cmpxchg16b(decoded: Decoded) -> Executor:
    """CMPXCHG16B: #GP(0) for an operand that is not aligned, before anything else is asked of its address."""
    exchange = _compare_pair(decoded, Register.RAX, Register.RDX, Register.RBX, Register.RCX)
    operand, offset_of = decoded.operand, address_of(decoded)
    assert operand is not None
    segment, alignment = operand.segment, operand.size

    def run(ctx: Emulation) -> None:
        if linear_address(ctx.words, segment, offset_of(ctx.words)) % alignment:
            raise general_protection()
        exchange(ctx)

    return run


def _compare_pair(decoded: Decoded, low: int, high: int, new_low: int, new_high: int) -> Executor:
    """Memory gets *new_high*:*new_low* if it equals *high*:*low*; otherwise these get what it holds."""
    size = operand_bytes(decoded, 0)
    half_bits = 4 * size
    half_mask = (1 << half_bits) - 1
    load, store = memory_loader(decoded, size, WRITE), memory_storer(decoded, size)
    read_low, read_high = register_reader(low), register_reader(high)
    read_new_low, read_new_high = register_reader(new_low), register_reader(new_high)
    write_low, write_high = register_writer(low), register_writer(high)

    def run(ctx: Emulation) -> None:
        words, old = ctx.words, load(ctx)
        if old == read_high(ctx) << half_bits | read_low(ctx):
            store(ctx, read_new_high(ctx) << half_bits | read_new_low(ctx))
            words[RFLAGS] |= RFLAGS_ZF
            return
        store(ctx, old)
        write_low(ctx, old & half_mask)
        write_high(ctx, old >> half_bits)
        words[RFLAGS] &= _NOT_ZF

    return run


#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    Mnemonic.XCHG: _xchg,
    Mnemonic.BSWAP: _bswap,
    Mnemonic.XADD: _xadd,
    Mnemonic.CMPXCHG: _cmpxchg,
    Mnemonic.CMPXCHG8B: _cmpxchg8b,
    Mnemonic.CMPXCHG16B: _cmpxchg16b,
}
