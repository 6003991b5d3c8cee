"""Every encoding of a mnemonic that the assembler of iced-x86 knows, with a choice of operands: what to try out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from iced_x86 import Code, Decoder, Encoder, Instruction, OpCodeInfo, OpCodeOperandKind, OpKind, Register

#: The memory operand is at [rDI]; these registers are operands.
POINTER = {64: Register.RDI, 32: Register.EDI}
_BY_SIZE = {
    8: (Register.AL, Register.CL, Register.DL, Register.BL),
    16: (Register.AX, Register.CX, Register.DX, Register.BX),
    32: (Register.EAX, Register.ECX, Register.EDX, Register.EBX),
    64: (Register.RAX, Register.RCX, Register.RDX, Register.RBX),
}
_HIGH_BYTES = (Register.AH, Register.CH, Register.DH, Register.BH)
_FIXED_REGISTERS = ("AL", "AX", "EAX", "RAX", "CL", "DX")
_KIND_NAMES = {getattr(OpCodeOperandKind, name): name for name in dir(OpCodeOperandKind) if name.isupper()}
_IMMEDIATE_KINDS = {
    "IMM8": OpKind.IMMEDIATE8, "IMM16": OpKind.IMMEDIATE16, "IMM32": OpKind.IMMEDIATE32,
    "IMM64": OpKind.IMMEDIATE64, "IMM8SEX16": OpKind.IMMEDIATE8TO16, "IMM8SEX32": OpKind.IMMEDIATE8TO32,
    "IMM8SEX64": OpKind.IMMEDIATE8TO64, "IMM32SEX64": OpKind.IMMEDIATE32TO64, "IMM8_CONST_1": OpKind.IMMEDIATE8,
}  # fmt: skip
#: The encoding of instructions that only processors of AMD have.
_AMD_ENCODING = "XOP"
_COUNTS = (0, 1, 2, 7, 8, 9, 15, 16, 17, 18, 31, 32, 33, 63, 64, 255)
_IMMEDIATES = {
    "IMM8": _COUNTS, "IMM16": (0, 1, 0x7FFF, 0x8000, 0xFFFF), "IMM32": (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF),
    "IMM64": (0, 1, (1 << 64) - 1, 1 << 63, 0x123456789), "IMM8SEX16": (0, 1, 127, -128, -1),
    "IMM8SEX32": (0, 1, 127, -128, -1), "IMM8SEX64": (0, 1, 127, -128, -1),
    "IMM32SEX64": (0, 1, 0x7FFFFFFF, -0x80000000, -1), "IMM8_CONST_1": (1,),
}  # fmt: skip


_IMMEDIATES_TRIED = 1


@dataclass(frozen=True)
class _Choice:
    """Numbers of the registers for operands in ModRM.rm (None: memory), ModRM.reg and VEX.vvvv."""

    rm: int | None
    reg: int
    vvvv: int
    high_bytes: bool = False
    lock: bool = False


_REGISTER_CHOICES = (_Choice(2, 3, 1), _Choice(2, 2, 2), _Choice(0, 1, 3), _Choice(1, 3, 3, high_bytes=True))
_MEMORY_CHOICES = (_Choice(None, 3, 1), _Choice(None, 2, 2, lock=True), _Choice(None, 0, 2, high_bytes=True))


def forms(mnemonics: frozenset[int], bits: int, memory: int, rng: random.Random) -> Iterator[bytes]:
    """The machine code of every form of *mnemonics* in *bits*-bit code, with a few immediates each.

    Memory operands are at the pointer; *memory* is the address that it holds.
    """
    seen = set()
    for name in sorted(dir(Code)):
        code = getattr(Code, name)
        if not name.isupper() or name.startswith(_AMD_ENCODING) or OpCodeInfo(code).mnemonic not in mnemonics:
            continue
        for encoded in _forms_of(code, bits, memory, rng):
            # Some encodings belong to other processors, or to prefetches among the reserved no-operations.
            if encoded not in seen and Decoder(bits, encoded).decode().mnemonic in mnemonics:
                seen.add(encoded)
                yield encoded


def _forms_of(code: int, bits: int, memory: int, rng: random.Random) -> Iterator[bytes]:
    info = OpCodeInfo(code)  # type: ignore[arg-type]
    if not info.is_instruction or not info.is_available_in_mode(bits):
        return
    names = [_KIND_NAMES[kind] for kind in info.op_kinds()]
    if any(name.startswith(("SEG_", "SREG", "CR_", "DR_", "TR_")) for name in names):
        return
    takes_memory = any("MEM" in name for name in names)
    takes_registers = not any(name in ("MEM", "MEM_OFFS") for name in names)
    choices = (_REGISTER_CHOICES if takes_registers else ()) + (_MEMORY_CHOICES if takes_memory else ())
    immediates = [_IMMEDIATES[name] for name in names if name in _IMMEDIATES]
    for choice in choices:
        if choice.lock and not info.can_use_lock_prefix:
            continue
        values = immediates[0] if immediates else (0,)
        for value in rng.sample(values, min(_IMMEDIATES_TRIED, len(values))):
            instruction = _make(info, names, choice, value, bits, memory)
            encoder = Encoder(bits)
            try:
                encoder.encode(instruction, 0)
            except ValueError:
                # A high byte register beside a REX prefix.
                continue
            yield encoder.take_buffer()


def _make(
    info: OpCodeInfo, names: list[str], choice: _Choice, value: int, bits: int, memory: int
) -> Instruction:
    instruction = Instruction()
    instruction.code = info.code
    instruction.has_lock_prefix = choice.lock
    for number, name in enumerate(names):
        if name in _IMMEDIATE_KINDS:
            instruction.set_op_kind(number, _IMMEDIATE_KINDS[name])
            if name == "IMM64":
                instruction.set_immediate_u64(number, value)
            else:
                instruction.set_immediate_i32(number, value - (1 << 32 if value >> 31 > 0 else 0))
        elif name == "MEM_OFFS" or ("MEM" in name and choice.rm is None):
            instruction.set_op_kind(number, OpKind.MEMORY)
            if name == "MEM_OFFS":
                instruction.memory_displacement = memory
                instruction.memory_displ_size = bits // 8
            else:
                instruction.memory_base = POINTER[bits]
        else:
            instruction.set_op_kind(number, OpKind.REGISTER)
            instruction.set_op_register(number, _register(name, choice))
    return instruction


def _register(name: str, choice: _Choice) -> Register:
    if name in _FIXED_REGISTERS:
        return getattr(Register, name)  # type: ignore[no-any-return]
    size, _, place = name.partition("_")
    number = choice.vvvv if place == "VVVV" else choice.reg if place in ("REG", "OPCODE") else choice.rm
    assert number is not None
    if size == "R8" and choice.high_bytes:
        return _HIGH_BYTES[number]
    return _BY_SIZE[int(size[1:])][number]
