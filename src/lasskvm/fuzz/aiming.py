"""Making addresses hit: registers and displacements that let memory operands end in the data pages."""

from __future__ import annotations

import random
from dataclasses import replace

from iced_x86 import ConstantOffsets, Decoder, Instruction, OpKind, Register, RegisterInfo

from lasskvm.fuzz import layout
from lasskvm.fuzz.case import Case, Mode
from lasskvm.x86.registers import ES, MASK32, MASK64

__all__ = ["aim", "pointer"]

_SEGMENTS = {
    Register.ES: 0, Register.CS: 1, Register.SS: 2, Register.DS: 3, Register.FS: 4, Register.GS: 5,
}  # fmt: skip
_MASK16 = 0xFFFF
_REAL_MODES = (Mode.REAL, Mode.VIRTUAL8086)
_RSI, _RDI = 6, 7
_STRING_SOURCES = frozenset((OpKind.MEMORY_SEG_SI, OpKind.MEMORY_SEG_ESI, OpKind.MEMORY_SEG_RSI))
_STRING_DESTINATIONS = frozenset(
    (
        OpKind.MEMORY_ESDI, OpKind.MEMORY_ESEDI, OpKind.MEMORY_ESRDI, OpKind.MEMORY_SEG_DI, OpKind.MEMORY_SEG_EDI,
        OpKind.MEMORY_SEG_RDI,
    )
)  # fmt: skip


def pointer(rng: random.Random, case: Case) -> int:
    """An address in or near a data page, as a linear one: at its start, close to its end, or anywhere in it."""
    gva = layout.interesting_address(rng.choice(layout.data_pages(case.paging)))
    kind = rng.random()
    if kind < 0.40:
        offset = rng.randrange(layout.PAGE // 16) * 16
    elif kind < 0.65:
        offset = layout.PAGE - rng.randrange(1, 17)
    elif kind < 0.72:
        offset = -rng.randrange(1, 9)
    else:
        offset = rng.randrange(layout.PAGE)
    address = gva + offset
    if kind > 0.985:
        # Not canonical.
        address ^= 1 << rng.randrange(48, 63)
    return address & MASK64


def aim(rng: random.Random, case: Case) -> Case:
    """*case* with registers changed, or the displacement, so that its first instruction's memory operands hit."""
    decoder = Decoder(case.mode.bits, case.code, ip=case.rip)
    instruction = decoder.decode()
    if instruction.is_invalid or rng.random() < 0.1:
        return case
    registers = list(case.registers)
    code = case.code
    for number in range(instruction.op_count):
        kind = instruction.op_kind(number)
        if kind in _STRING_SOURCES:
            registers[_RSI] = _offset(rng, case, _SEGMENTS[instruction.memory_segment])
        elif kind in _STRING_DESTINATIONS:
            segment = ES if kind in (OpKind.MEMORY_ESDI, OpKind.MEMORY_ESEDI, OpKind.MEMORY_ESRDI) else 3
            registers[_RDI] = _offset(rng, case, segment)
        elif kind == OpKind.MEMORY:
            code = _aim_operand(rng, case, instruction, decoder.get_constant_offsets(instruction), registers)
    mask = MASK64 if case.mode is Mode.LONG64 else MASK32
    return replace(case, code=code, registers=tuple(value & mask for value in registers))


def _offset(rng: random.Random, case: Case, segment: int) -> int:
    """An offset into *segment* that leads to a pointer, or with small segments somewhere into those."""
    base = case.segments[segment].base
    if case.mode in _REAL_MODES and rng.random() < 0.9:
        return rng.choice((rng.randrange(_MASK16), rng.randrange(0x1000), _MASK16 - rng.randrange(16)))
    if case.mode is Mode.LONG64 and segment < _SEGMENTS[Register.FS]:
        base = 0
    return pointer(rng, case) - base & MASK64


def _aim_operand(
    rng: random.Random, case: Case, instruction: Instruction, constants: ConstantOffsets, registers: list[int]
) -> bytes:
    """Set base and index registers; the result is the code, where a displacement may have been set."""
    base, index = instruction.memory_base, instruction.memory_index
    target = _offset(rng, case, _SEGMENTS[instruction.memory_segment])
    if base in (Register.NONE, Register.RIP, Register.EIP) and index == Register.NONE:
        return _aim_displacement(case, instruction, constants, target)
    scaled = 0
    if index != Register.NONE and index != base:
        value = rng.choice((0, 1, 2, 4, MASK64))
        _set(registers, index, value)
        scaled = value * instruction.memory_index_scale
    if base not in (Register.NONE, Register.RIP, Register.EIP):
        _set(registers, base, target - instruction.memory_displacement - scaled & MASK64)
    return case.code


def _aim_displacement(case: Case, instruction: Instruction, constants: ConstantOffsets, target: int) -> bytes:
    size = constants.displacement_size
    if not size:
        return case.code
    if instruction.is_ip_rel_memory_operand:
        target -= case.rip + instruction.len
    at = constants.displacement_offset
    return case.code[:at] + (target % (1 << 8 * size)).to_bytes(size, "little") + case.code[at + size :]


def _set(registers: list[int], register: int, value: int) -> None:
    info = RegisterInfo(register)  # type: ignore[arg-type]
    number = info.full_register - Register.RAX
    if 0 <= number < len(registers):
        registers[number] = value
