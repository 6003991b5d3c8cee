"""IN, OUT, INS and OUTS, split where the VMM answers: :func:`begin` says what is asked, :func:`finish_element` goes on.

Permission (IOPL, I/O bitmap) is checked before, by direct execution or the caller.
Source: Intel SDM volume 2, the four instructions; KVM's ``emulator_pio_in_out()``.
"""

from __future__ import annotations

from dataclasses import dataclass

from iced_x86 import Mnemonic, OpKind, Register

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import load, store
from lasskvm.emulator.decode import Decoded, effective_address, fetch_instruction
from lasskvm.emulator.faults import Unhandleable
from lasskvm.emulator.operands import read_register, write_register
from lasskvm.state import RCX, RDI, RDX, RFLAGS, RSI, Words
from lasskvm.x86.registers import MASK32, MASK64, RFLAGS_DF

__all__ = ["PortAccess", "PortAccessNeeded", "begin", "finish_element"]

_PORT_MASK = 0xFFFF
_INS = {Mnemonic.INSB: 1, Mnemonic.INSW: 2, Mnemonic.INSD: 4}
_OUTS = {Mnemonic.OUTSB: 1, Mnemonic.OUTSW: 2, Mnemonic.OUTSD: 4}
_ACCUMULATORS = {Register.AL: 1, Register.AX: 2, Register.EAX: 4}


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


def begin(ctx: Emulation) -> PortAccess:
    """The access that the instruction at RIP makes next; reads OUTS's source. Raises :class:`GuestFault`."""
    decoded = fetch_instruction(ctx)
    instruction = decoded.instruction
    words = ctx.words
    mnemonic = instruction.mnemonic
    port = words[RDX] & _PORT_MASK
    if mnemonic in _INS:
        return PortAccess(decoded, port, _INS[mnemonic], write=False, value=0)
    if mnemonic in _OUTS:
        size = _OUTS[mnemonic]
        source = next(operand for operand in decoded.accesses if operand.reads)
        value = load(ctx, source.segment, effective_address(words, source), size)
        return PortAccess(decoded, port, size, write=True, value=value)
    if mnemonic not in (Mnemonic.IN, Mnemonic.OUT):
        raise Unhandleable(f"port I/O by {instruction}")
    write = mnemonic == Mnemonic.OUT
    port_operand, data_operand = (0, 1) if write else (1, 0)
    if instruction.op_kind(port_operand) == OpKind.IMMEDIATE8:
        port = instruction.immediate8
    accumulator = instruction.op_register(data_operand)
    value = read_register(words, accumulator) if write else 0
    return PortAccess(decoded, port, _ACCUMULATORS[accumulator], write, value)


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
    # iced-x86 lists the string operand among the accesses; its width is that of the address size.
    operand = next(operand for operand in decoded.accesses if operand.reads == access.write)
    if not access.write:
        store(ctx, operand.segment, effective_address(words, operand), access.size, value)
    mask = operand.address_mask
    step = -access.size if words[RFLAGS] & RFLAGS_DF else access.size
    index = RSI if access.write else RDI
    _step(words, index, step, mask)
    if not (decoded.instruction.has_rep_prefix or decoded.instruction.has_repne_prefix):
        return True
    _step(words, RCX, -1, mask)
    return words[RCX] & mask == 0


def _step(words: Words, index: int, step: int, mask: int) -> None:
    """Add *step* to the part of a register that the address size uses; a 32-bit part clears the upper half."""
    value = words[index] + step & mask
    kept = 0 if mask == MASK32 else words[index] & (MASK64 ^ mask)
    words[index] = kept | value
