"""IN, OUT, INS and OUTS, split where the answer comes in: :func:`next_access` asks, :func:`finish_element` goes on.

Permission (IOPL, I/O bitmap) is checked before, by direct execution or the caller.
Source: Intel SDM volume 2, the four instructions; KVM's ``emulator_pio_in_out()``.
"""

from __future__ import annotations

from dataclasses import dataclass

from iced_x86 import Mnemonic, OpKind

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import load, store, touch
from lasskvm.emulator.decode import (
    Decoded,
    MemoryOperand,
    effective_address,
    register_info,
)
from lasskvm.emulator.faults import Unhandleable
from lasskvm.emulator.operands import read_register, write_register
from lasskvm.emulator.string_registers import add_to_register, element_step, is_repeated
from lasskvm.lass import WRITE
from lasskvm.state import CR4, DR0, DR7, RCX, RDI, RDX, RSI, Words
from lasskvm.x86.registers import CR4_DE, DR6_B0

__all__ = [
    "PortAccess",
    "PortAccessNeeded",
    "breakpoint_hits",
    "finish_element",
    "locate_port",
    "next_access",
]

_PORT_MASK = 0xFFFF
_BREAKPOINTS = 4
#: DR7: the enable bits of all breakpoints and of one; where R/W and LEN of breakpoint 0 are; R/W for I/O; lengths.
_DR7_ENABLED = 0xFF
_DR7_ENABLE = 3
_DR7_CONDITIONS = 16
_DR7_ON_IO = 2
_DR7_LENGTHS = (1, 2, 8, 4)
_STRING_SIZES = {
    Mnemonic.INSB: 1,
    Mnemonic.INSW: 2,
    Mnemonic.INSD: 4,
    Mnemonic.OUTSB: 1,
    Mnemonic.OUTSW: 2,
    Mnemonic.OUTSD: 4,
}
_OUTPUTS = (Mnemonic.OUT, Mnemonic.OUTSB, Mnemonic.OUTSW, Mnemonic.OUTSD)
#: The operand that is data; the other one is the port.
_DATA_OPERANDS = {Mnemonic.IN: 0, Mnemonic.OUT: 1}


@dataclass(frozen=True, slots=True)
class PortAccess:
    """One element of port I/O. ``value`` is what an output writes."""

    decoded: Decoded
    port: int
    size: int
    write: bool
    value: int


class PortAccessNeeded(Exception):
    """No device on the bus claims *access*; only the VMM can answer it."""

    def __init__(self, access: PortAccess) -> None:
        self.access = access
        super().__init__(f"port I/O at {access.port:#x}")


def locate_port(words: Words, decoded: Decoded) -> tuple[int, int]:
    """The port that *decoded* accesses and the bytes of one access; :class:`Unhandleable` for other instructions."""
    instruction = decoded.instruction
    mnemonic = instruction.mnemonic
    if mnemonic in _STRING_SIZES:
        return words[RDX] & _PORT_MASK, _STRING_SIZES[mnemonic]
    if mnemonic not in _DATA_OPERANDS:
        raise Unhandleable(f"port I/O by {instruction}")
    data = _DATA_OPERANDS[mnemonic]
    size = int(register_info(instruction.op_register(data)).size)
    if instruction.op_kind(1 - data) == OpKind.IMMEDIATE8:
        return int(instruction.immediate8), size
    return words[RDX] & _PORT_MASK, size


def next_access(ctx: Emulation, decoded: Decoded) -> PortAccess:
    """The access that *decoded* makes next.

    Reads OUTS's source, and makes sure that INS can store what it will get. Raises :class:`GuestFault`.
    """
    words, mnemonic = ctx.words, decoded.instruction.mnemonic
    port, size = locate_port(words, decoded)
    write = mnemonic in _OUTPUTS
    value = 0
    if mnemonic in _STRING_SIZES:
        place = _string_operand(decoded, write)
        offset = effective_address(words, place)
        if write:
            value = load(ctx, place.segment, offset, size)
        else:
            touch(ctx, place.segment, offset, size, WRITE)
    elif write:
        value = read_register(words, decoded.instruction.op_register(_DATA_OPERANDS[mnemonic]))
    return PortAccess(decoded, port, size, write, value)


def finish_element(ctx: Emulation, access: PortAccess, value: int) -> bool:
    """Put *value* where an input goes and step a string instruction's registers.

    Returns whether the instruction is complete; a repeated string instruction is not until RCX is 0. RIP is left alone.
    """
    words, decoded = ctx.words, access.decoded
    mnemonic = decoded.instruction.mnemonic
    if mnemonic == Mnemonic.IN:
        write_register(words, decoded.instruction.op_register(0), value)
        return True
    if mnemonic == Mnemonic.OUT:
        return True
    operand = _string_operand(decoded, access.write)
    if not access.write:
        store(ctx, operand.segment, effective_address(words, operand), access.size, value)
    mask = operand.address_mask
    add_to_register(words, RSI if access.write else RDI, element_step(words, access.size), mask)
    if not is_repeated(decoded):
        return True
    add_to_register(words, RCX, -1, mask)
    return words[RCX] & mask == 0


def breakpoint_hits(words: Words, port: int, size: int) -> int:
    """The I/O breakpoints that an access of *size* bytes at *port* meets, as bits 3:0 of DR6.

    Source: Intel SDM volume 3B, 18.2.4 (DR7) and 18.3.1.3; they exist while CR4.DE is set.
    """
    dr7 = words[DR7]
    if not dr7 & _DR7_ENABLED or not words[CR4] & CR4_DE:
        return 0
    hits = 0
    for number in range(_BREAKPOINTS):
        enabled = dr7 >> 2 * number & _DR7_ENABLE
        condition = dr7 >> _DR7_CONDITIONS + 4 * number
        length = _DR7_LENGTHS[condition >> 2 & 3]
        start = words[DR0 + number] & ~(length - 1)
        if enabled and condition & 3 == _DR7_ON_IO and port < start + length and start < port + size:
            hits |= DR6_B0 << number
    return hits


def _string_operand(decoded: Decoded, write: bool) -> MemoryOperand:
    """The memory operand of INS or OUTS: iced-x86 lists it among the accesses, as wide as the address size."""
    return next(operand for operand in decoded.accesses if operand.reads == write)
