"""What the operands of an instruction are: the questions that choose between the general and a quicker way to execute.

Whole registers (of 32 and 64 bits) are where the quick ways are: writing one replaces its state word.
"""

from __future__ import annotations

from iced_x86 import OpKind, Register

from lasskvm.emulator.accessors import immediate, operand_bytes
from lasskvm.emulator.decode import Decoded, register_info
from lasskvm.state import RAX

__all__ = [
    "ACCUMULATORS",
    "HIGH_HALVES",
    "constant",
    "is_memory",
    "operand_bits",
    "register_word",
    "signed",
    "whole_register",
]

#: The accumulator by operand size in bytes, and the register above it in double-width products and dividends.
ACCUMULATORS = {1: Register.AL, 2: Register.AX, 4: Register.EAX, 8: Register.RAX}
HIGH_HALVES = {1: Register.AH, 2: Register.DX, 4: Register.EDX, 8: Register.RDX}

_WHOLE_BYTES = (4, 8)


def register_word(register: int) -> int:
    """The state word that holds general-purpose *register* (``iced_x86.Register``)."""
    return int(RAX + register_info(register).full_register - Register.RAX)


def whole_register(decoded: Decoded, number: int) -> int | None:
    """The state word of operand *number* when it is a register of 32 or 64 bits, else None."""
    instruction = decoded.instruction
    if instruction.op_kind(number) != OpKind.REGISTER:
        return None
    register = instruction.op_register(number)
    return register_word(register) if register_info(register).size in _WHOLE_BYTES else None


def constant(decoded: Decoded, number: int) -> int | None:
    """Operand *number* in the size of operand 0 when it is an immediate, else None."""
    if decoded.instruction.op_kind(number) in (OpKind.REGISTER, OpKind.MEMORY):
        return None
    return immediate(decoded.instruction, number, operand_bytes(decoded, 0))


def is_memory(decoded: Decoded, number: int) -> bool:
    """Whether operand *number* is in memory."""
    return bool(decoded.instruction.op_kind(number) == OpKind.MEMORY)


def operand_bits(decoded: Decoded, number: int) -> int:
    """The size of operand *number* in bits."""
    return 8 * operand_bytes(decoded, number)


def signed(value: int, bits: int) -> int:
    """*value*, of *bits* bits, as a signed number."""
    return value - (value >> bits - 1 << bits)
