"""Reading and writing the operands of a decoded instruction: general-purpose registers and memory.

Source: Intel SDM volume 1, 3.4.1.1 (a 32-bit result clears the upper half of a register, narrower ones leave
it).
"""

from __future__ import annotations

from iced_x86 import OpKind, Register

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import load, store
from lasskvm.emulator.decode import Decoded, MemoryOperand, effective_address, register_info, stack_flag
from lasskvm.state import RAX, Words
from lasskvm.x86.registers import MASK32, MASK64

__all__ = [
    "is_register_operand",
    "load_memory_operand",
    "operand_size",
    "read_operand",
    "read_register",
    "store_memory_operand",
    "write_operand",
    "write_register",
]

_HIGH_BYTE_REGISTERS = (Register.AH, Register.CH, Register.DH, Register.BH)


def read_register(words: Words, register: int) -> int:
    """The value of general-purpose *register* (``iced_x86.Register``), of any width."""
    info = register_info(register)
    value = words[RAX + info.full_register - Register.RAX]
    if register in _HIGH_BYTE_REGISTERS:
        value >>= 8
    return value & (1 << 8 * info.size) - 1


def write_register(words: Words, register: int, value: int) -> None:
    """Write the low bits of *value* to general-purpose *register*; a 32-bit write clears the upper half."""
    info = register_info(register)
    word = RAX + info.full_register - Register.RAX
    mask = (1 << 8 * info.size) - 1
    if info.size == 4:
        words[word] = value & MASK32
        return
    shift = 8 if register in _HIGH_BYTE_REGISTERS else 0
    words[word] = words[word] & (MASK64 ^ mask << shift) | (value & mask) << shift


def is_register_operand(decoded: Decoded, number: int) -> bool:
    """Whether operand *number* is a register."""
    return bool(decoded.instruction.op_kind(number) == OpKind.REGISTER)


def operand_size(decoded: Decoded, number: int) -> int:
    """The size of register or memory operand *number*, in bytes."""
    if is_register_operand(decoded, number):
        return int(register_info(decoded.instruction.op_register(number)).size)
    assert decoded.operand is not None
    return decoded.operand.size


def load_memory_operand(ctx: Emulation, decoded: Decoded, size: int) -> int:
    """Load *size* bytes at the instruction's explicit memory operand; raises :class:`GuestFault`."""
    operand, offset, flags = _place(ctx, decoded)
    return load(ctx, operand.segment, offset, size, flags)


def store_memory_operand(ctx: Emulation, decoded: Decoded, size: int, value: int) -> None:
    """Store *size* bytes at the instruction's explicit memory operand; raises :class:`GuestFault`."""
    operand, offset, flags = _place(ctx, decoded)
    store(ctx, operand.segment, offset, size, value, flags)


def read_operand(ctx: Emulation, decoded: Decoded, number: int) -> int:
    """The value of operand *number*, a general-purpose register or memory; raises :class:`GuestFault`."""
    if is_register_operand(decoded, number):
        return read_register(ctx.words, decoded.instruction.op_register(number))
    return load_memory_operand(ctx, decoded, operand_size(decoded, number))


def write_operand(ctx: Emulation, decoded: Decoded, number: int, value: int) -> None:
    """Write *value* to operand *number*, a general-purpose register or memory; raises :class:`GuestFault`."""
    if is_register_operand(decoded, number):
        write_register(ctx.words, decoded.instruction.op_register(number), value)
    else:
        store_memory_operand(ctx, decoded, operand_size(decoded, number), value)


def _place(ctx: Emulation, decoded: Decoded) -> tuple[MemoryOperand, int, int]:
    operand = decoded.operand
    assert operand is not None
    offset = effective_address(ctx.words, operand)
    return operand, offset, stack_flag(decoded)
