"""A small assembler for short guest programs: Intel syntax in, bytes and label addresses out.

Statements are separated by newlines or ``;``; ``#`` starts a comment. There are labels (``name:``), prefixes (``lock``,
``rep``, ``repne``), ``db``, ``dw``, ``dd`` and ``dq``, ``byte`` to ``xmmword`` before memory operands whose size no
register gives, and an instruction may go by its iced-x86 code name where the mnemonic has several forms (``retfq``).
Which instructions exist, and how they are encoded, is iced-x86's knowledge; a wrong program raises ValueError.

>>> assemble("mov eax, [rbx + 8]; hlt", 0x1000).code.hex()
'8b4308f4'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from iced_x86 import (
    Code,
    Encoder,
    EncodingKind,
    Instruction,
    MemoryOperand,
    MemorySizeInfo,
    Mnemonic,
    OpCodeInfo,
    OpCodeOperandKind,
    Register,
)

from lasskvm.conformance.operands import (
    FarAddress,
    Memory,
    Operand,
    RegisterOperand,
    evaluate,
    parse_operand,
    split_operands,
)

__all__ = ["FORCED_EMULATION", "Assembled", "assemble"]

#: KVM's forced emulation prefix: UD2 and the letters "kvm".
FORCED_EMULATION = "ud2; db 0x6b, 0x76, 0x6d"

_DATA = {"db": 1, "dw": 2, "dd": 4, "dq": 8}
_PREFIXES = {
    "lock": "has_lock_prefix",
    "rep": "has_rep_prefix",
    "repe": "has_repe_prefix",
    "repne": "has_repne_prefix",
}
_STRING_INSTRUCTIONS = frozenset(
    f"{name}{size}" for name in ("movs", "cmps", "scas", "lods", "stos", "ins", "outs") for size in "bwdq"
)
#: Immediate operand kinds: (bits stored, bits they are sign-extended to).
_IMMEDIATES: dict[int, tuple[int, int]] = {
    OpCodeOperandKind.IMM8: (8, 8), OpCodeOperandKind.IMM16: (16, 16), OpCodeOperandKind.IMM32: (32, 32),
    OpCodeOperandKind.IMM64: (64, 64), OpCodeOperandKind.IMM8SEX16: (8, 16), OpCodeOperandKind.IMM8SEX32: (8, 32),
    OpCodeOperandKind.IMM8SEX64: (8, 64), OpCodeOperandKind.IMM32SEX64: (32, 64),
}  # fmt: skip
_SHORT_BRANCHES = frozenset((OpCodeOperandKind.BR16_1, OpCodeOperandKind.BR32_1, OpCodeOperandKind.BR64_1))
_BRANCHES = _SHORT_BRANCHES | {OpCodeOperandKind.BR16_2, OpCodeOperandKind.BR32_4, OpCodeOperandKind.BR64_4}
_FAR_BRANCHES = frozenset((OpCodeOperandKind.FARBR2_2, OpCodeOperandKind.FARBR4_2))
_KIND_NAMES = {getattr(OpCodeOperandKind, name): name for name in dir(OpCodeOperandKind) if name.isupper()}
_LABEL = re.compile(r"\s*(\w+)\s*:")
_ADDRESS_BYTES = {16: 2, 32: 4, 64: 8}


@dataclass(frozen=True)
class Assembled:
    """A program at ``address``; ``labels`` are linear addresses."""

    address: int
    code: bytes
    labels: Mapping[str, int]

    @property
    def end(self) -> int:
        """The address behind the last byte."""
        return self.address + len(self.code)


@lru_cache(maxsize=4096)
def assemble(source: str, address: int, bits: int = 64) -> Assembled:
    """Assemble *source* for 16-, 32- or 64-bit mode (*bits*) to run at linear *address*."""
    statements = _statements(source)
    labels: dict[str, int] = {}
    # Where the labels will be is unknown at first; a name that stands near them has an encoding of the same length.
    draft = {text[:-1]: address for text in statements if text.endswith(":")}
    _encode_all(statements, address, bits, draft, labels)
    code = _encode_all(statements, address, bits, labels, dict(labels))
    return Assembled(address, code, labels)


def _statements(source: str) -> list[str]:
    """The statements of a program; a label is one of its own, with its colon."""
    found = []
    for line in source.splitlines():
        for text in line.partition("#")[0].split(";"):
            while label := _LABEL.match(text):
                found.append(f"{label[1]}:")
                text = text[label.end() :]
            found.append(text.strip())
    return found


def _encode_all(
    statements: list[str], address: int, bits: int, symbols: Mapping[str, int], found: dict[str, int]
) -> bytes:
    """One pass over the program, with *symbols* for names; the labels it meets go to *found*."""
    code = b""
    for text in statements:
        here = address + len(code)
        if text.endswith(":"):
            label = text[:-1]
            if found.setdefault(label, here) != here:
                raise ValueError(f'the label "{label}" moves or is given twice')
        elif text:
            code += _encode_statement(text, here, bits, symbols)
    return code


def _encode_statement(text: str, address: int, bits: int, symbols: Mapping[str, int]) -> bytes:
    word, _, rest = text.partition(" ")
    name = word.lower()
    if name in _DATA:
        size = _DATA[name]
        values = (evaluate(part, symbols) for part in split_operands(rest))
        return b"".join((value % (1 << 8 * size)).to_bytes(size, "little") for value in values)
    prefix = _PREFIXES.get(name)
    if prefix is not None:
        name, _, rest = rest.strip().partition(" ")
    operands = [parse_operand(part, symbols, bits) for part in split_operands(rest)]
    best: tuple[tuple[bool, bool, int], bytes, int] | None = None
    memory_sizes = set()
    for code, instruction in _candidates(name.lower(), operands, address, bits):
        if prefix is not None:
            setattr(instruction, prefix, True)
        try:
            encoder = Encoder(bits)
            encoder.encode(instruction, address % (1 << 64))
            encoded = encoder.take_buffer()
        except ValueError:
            continue
        info = _code_info(code)
        memory_sizes.add(info.memory_bytes)
        key = (info.operand_size == 16 and bits != 16, info.is_short_branch, len(encoded))
        if best is None or key < best[0]:
            best = key, encoded, info.memory_bytes
    if best is None:
        raise ValueError(f'there is no {bits}-bit encoding of "{text}"')
    unsized = [operand for operand in operands if isinstance(operand, Memory) and not operand.size]
    if unsized and len(memory_sizes) > 1:
        raise ValueError(f'the memory operand of "{text}" needs a size, like "qword [...]"')
    return best[1]


def _candidates(name: str, operands: list[Operand], address: int, bits: int) -> list[tuple[int, Instruction]]:
    """Every instruction that *name* with *operands* can mean."""
    if name in _STRING_INSTRUCTIONS and not operands:
        instruction = getattr(Instruction, f"create_{name}")(bits)
        return [(instruction.code, instruction)]
    found = []
    for code in _codes(name):
        info = _code_info(code)
        if bits not in info.modes or len(info.kinds) != len(operands):
            continue
        if all(_matches(kind, operand, info) for kind, operand in zip(info.kinds, operands, strict=True)):
            found.append((code, _create(code, info.kinds, operands, bits)))
    return found


@dataclass(frozen=True)
class _CodeInfo:
    kinds: tuple[int, ...]
    modes: frozenset[int]
    memory_bytes: int
    operand_size: int

    @property
    def is_short_branch(self) -> bool:
        return any(kind in _SHORT_BRANCHES for kind in self.kinds)


@cache
def _code_info(code: int) -> _CodeInfo:
    info = OpCodeInfo(code)  # type: ignore[arg-type]
    return _CodeInfo(
        tuple(info.op_kinds()),
        frozenset(bits for bits in (16, 32, 64) if info.is_available_in_mode(bits)),
        MemorySizeInfo(info.memory_size).size,
        info.operand_size,
    )


@cache
def _codes_by_mnemonic() -> dict[int, list[int]]:
    codes: dict[int, list[int]] = {}
    for name in dir(Code):
        if name.isupper():
            code = getattr(Code, name)
            info = OpCodeInfo(code)
            if info.is_instruction and info.encoding == EncodingKind.LEGACY:
                codes.setdefault(info.mnemonic, []).append(code)
    return codes


def _codes(name: str) -> list[int]:
    code = getattr(Code, name.upper(), None)
    if code is not None and not hasattr(Mnemonic, name.upper()):
        return [code]
    mnemonic = getattr(Mnemonic, name.upper(), None)
    if mnemonic is None:
        raise ValueError(f'there is no instruction "{name}"')
    return _codes_by_mnemonic().get(mnemonic, [])


def _matches(kind: int, operand: Operand, info: _CodeInfo) -> bool:
    name = _KIND_NAMES[kind]
    if isinstance(operand, RegisterOperand):
        if name in operand.classes:
            return True
        # "R64_OR_MEM", "R64_OPCODE", "XMM_REG": a class, and where in the encoding it goes.
        return name.partition("_")[0] in operand.classes and not name.startswith("SEG_")
    if isinstance(operand, Memory):
        takes_memory = "MEM" in name.split("_") and "VSIB" not in name
        return takes_memory and operand.size in (0, info.memory_bytes)
    if isinstance(operand, FarAddress):
        return kind in _FAR_BRANCHES
    if kind in _BRANCHES:
        return True
    if kind == OpCodeOperandKind.IMM8_CONST_1:
        return operand.value == 1
    return kind in _IMMEDIATES and _fits(operand.value, *_IMMEDIATES[kind])


def _fits(value: int, stored: int, extended: int) -> bool:
    if not -(1 << extended - 1) <= value < 1 << extended:
        return False
    if stored == extended:
        return True
    return -(1 << stored - 1) <= _signed(value, extended) < 1 << stored - 1


def _signed(value: int, bits: int) -> int:
    return (value + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def _create(code: int, kinds: tuple[int, ...], operands: list[Operand], bits: int) -> Instruction:
    create: Any = Instruction
    if not operands:
        return create.create(code)  # type: ignore[no-any-return]
    names: list[str] = []
    arguments: list[object] = []
    for kind, operand in zip(kinds, operands, strict=True):
        if isinstance(operand, RegisterOperand):
            names.append("reg")
            arguments.append(operand.register)
        elif isinstance(operand, Memory):
            names.append("mem")
            arguments.append(_memory_operand(operand, bits))
        elif isinstance(operand, FarAddress):
            return create.create_far_branch(code, operand.selector, operand.offset)  # type: ignore[no-any-return]
        elif kind in _BRANCHES:
            return create.create_branch(code, operand.value % (1 << 64))  # type: ignore[no-any-return]
        elif kind == OpCodeOperandKind.IMM64:
            names.append("u64")
            arguments.append(operand.value % (1 << 64))
        else:
            _, extended = _IMMEDIATES.get(kind, (8, 8))
            names.append("i32")
            value = _signed(operand.value, max(extended, 16) if extended < 32 else extended)
            arguments.append(_signed(value, 32))
    return getattr(create, "create_" + "_".join(names))(code, *arguments)  # type: ignore[no-any-return]


def _memory_operand(memory: Memory, bits: int) -> MemoryOperand:
    if memory.base == Register.RIP:
        # iced-x86 takes the target itself.
        size = _ADDRESS_BYTES[bits]
    elif memory.base or memory.index:
        size = 1 if memory.displacement else 0
    else:
        size = _ADDRESS_BYTES[bits]
    return MemoryOperand(
        memory.base,  # type: ignore[arg-type]
        memory.index,  # type: ignore[arg-type]
        memory.scale,
        _signed(memory.displacement, 64),
        size,
        False,
        memory.segment,  # type: ignore[arg-type]
    )
