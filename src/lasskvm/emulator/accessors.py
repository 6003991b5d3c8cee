"""Operand accessors: closures that read or write one operand of one decoded instruction.

An instruction is compiled once, into a function that is called each time it is executed (``operation.py``); these are
the pieces that such functions are made of. Everything that can be known from the encoding is settled when an accessor
is made. Values are unsigned integers of the operand's size.

Source: Intel SDM volume 1, 3.4.1.1 (a 32-bit result clears the upper half of a register) and 3.7 (operand addressing).
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Instruction, OpKind, Register

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import load, store
from lasskvm.emulator.decode import Decoded, MemoryOperand, effective_address, register_info, stack_flag
from lasskvm.lass import WRITE
from lasskvm.memory import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from lasskvm.state import RAX, RIP, Words
from lasskvm.x86.registers import FS, MASK64

__all__ = [
    "Reader",
    "Writer",
    "address_of",
    "immediate",
    "memory_loader",
    "memory_storer",
    "operand_bytes",
    "reader",
    "register_reader",
    "register_writer",
    "update_reader",
    "writer",
]

Reader = Callable[[Emulation], int]
Writer = Callable[[Emulation, int], None]

_NO_WORD = -1
_HIGH_BYTES = (Register.AH, Register.CH, Register.DH, Register.BH)
_HIGH_BYTE_SHIFT = 8
_BYTE = 0xFF
_FULL_REGISTER_BYTES = 8
_LOW_HALF_BYTES = 4


def operand_bytes(decoded: Decoded, number: int) -> int:
    """The size of operand *number* in bytes: of a register or memory operand, or of the immediate as it is used."""
    instruction = decoded.instruction
    kind = instruction.op_kind(number)
    if kind == OpKind.REGISTER:
        return int(register_info(instruction.op_register(number)).size)
    if kind == OpKind.MEMORY:
        assert decoded.operand is not None
        return decoded.operand.size
    return operand_bytes(decoded, 0)


def immediate(instruction: Instruction, number: int, size: int) -> int:
    """Immediate operand *number*, sign-extended as its encoding says, in *size* bytes."""
    return int(instruction.immediate(number)) & (1 << 8 * size) - 1


def reader(decoded: Decoded, number: int) -> Reader:
    """Reads operand *number*: a general-purpose register, memory, or an immediate (in the size of operand 0)."""
    instruction = decoded.instruction
    kind = instruction.op_kind(number)
    if kind == OpKind.REGISTER:
        return register_reader(instruction.op_register(number))
    if kind == OpKind.MEMORY:
        return memory_loader(decoded, operand_bytes(decoded, number))
    value = immediate(instruction, number, operand_bytes(decoded, 0))
    return lambda ctx: value


def update_reader(decoded: Decoded, number: int) -> Reader:
    """Reads operand *number*, which will be written: for memory, a fault says so, as processors have it."""
    if decoded.instruction.op_kind(number) == OpKind.MEMORY:
        return memory_loader(decoded, operand_bytes(decoded, number), WRITE)
    return reader(decoded, number)


def writer(decoded: Decoded, number: int) -> Writer:
    """Writes operand *number*, a general-purpose register or memory; values must fit into the operand."""
    instruction = decoded.instruction
    if instruction.op_kind(number) == OpKind.REGISTER:
        return register_writer(instruction.op_register(number))
    return memory_storer(decoded, operand_bytes(decoded, number))


def register_reader(register: int) -> Reader:
    """Reads general-purpose *register* (``iced_x86.Register``)."""
    info = register_info(register)
    word = RAX + info.full_register - Register.RAX
    if info.size == _FULL_REGISTER_BYTES:
        return lambda ctx: ctx.words[word]
    if register in _HIGH_BYTES:
        return lambda ctx: ctx.words[word] >> _HIGH_BYTE_SHIFT & _BYTE
    mask = (1 << 8 * info.size) - 1
    return lambda ctx: ctx.words[word] & mask


def register_writer(register: int) -> Writer:
    """Writes general-purpose *register*: 32-bit values clear the upper half, narrower ones keep the rest."""
    info = register_info(register)
    word = RAX + info.full_register - Register.RAX
    if info.size >= _LOW_HALF_BYTES:

        def write(ctx: Emulation, value: int) -> None:
            ctx.words[word] = value

        return write
    shift = _HIGH_BYTE_SHIFT if register in _HIGH_BYTES else 0
    kept = MASK64 ^ (1 << 8 * info.size) - 1 << shift

    def write_part(ctx: Emulation, value: int) -> None:
        words = ctx.words
        words[word] = words[word] & kept | value << shift

    return write_part


def address_of(decoded: Decoded) -> Callable[[Words], int]:
    """Gives the effective address (the offset in its segment) of the explicit memory operand."""
    operand = decoded.operand
    assert operand is not None
    base, index, displacement = operand.base, operand.index, operand.displacement
    if operand.address_mask == MASK64 and index == _NO_WORD:
        if operand.relative_to_rip:
            return lambda words: words[RIP] + displacement & MASK64
        if base != _NO_WORD:
            return lambda words: words[base] + displacement & MASK64
        return lambda words: displacement
    return lambda words: effective_address(words, operand)


def memory_loader(decoded: Decoded, size: int, flags: int = 0) -> Reader:
    """Loads *size* bytes at the explicit memory operand; with ``WRITE`` in *flags*, to store there afterwards."""
    operand = decoded.operand
    assert operand is not None
    segment, flags, offset_of = operand.segment, flags | stack_flag(decoded), address_of(decoded)
    if not _is_flat(decoded, operand) or size > _FULL_REGISTER_BYTES:
        return lambda ctx: load(ctx, segment, offset_of(ctx.words), size, flags)
    last_start = PAGE_SIZE - size
    for_update = flags & WRITE != 0

    def read(ctx: Emulation) -> int:
        offset = offset_of(ctx.words)
        pages = ctx.tlb.stores if for_update else ctx.tlb.loads
        page = pages.get(offset >> PAGE_SHIFT)
        if page is None or offset & PAGE_MASK > last_start:
            return load(ctx, segment, offset, size, flags)
        start = offset + page[1]
        return int.from_bytes(page[0][start : start + size], "little")

    return read


def memory_storer(decoded: Decoded, size: int) -> Writer:
    """Stores *size* bytes at the explicit memory operand."""
    operand = decoded.operand
    assert operand is not None
    segment, flags, offset_of = operand.segment, stack_flag(decoded), address_of(decoded)
    if not _is_flat(decoded, operand) or size > _FULL_REGISTER_BYTES:
        return lambda ctx, value: store(ctx, segment, offset_of(ctx.words), size, value, flags)
    last_start = PAGE_SIZE - size

    def write(ctx: Emulation, value: int) -> None:
        offset = offset_of(ctx.words)
        page = ctx.tlb.stores.get(offset >> PAGE_SHIFT)
        if page is None or offset & PAGE_MASK > last_start:
            store(ctx, segment, offset, size, value, flags)
            return
        start = offset + page[1]
        page[0][start : start + size] = value.to_bytes(size, "little")

    return write


def _is_flat(decoded: Decoded, operand: MemoryOperand) -> bool:
    """Whether the offset is the linear address: 64-bit mode, and not through FS or GS."""
    return decoded.bits == 64 and operand.segment < FS
