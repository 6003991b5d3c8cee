"""Operands of the assembler: registers, memory references, immediates, and the expressions in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from iced_x86 import Register, RegisterInfo

__all__ = [
    "FarAddress",
    "Immediate",
    "Memory",
    "Operand",
    "RegisterOperand",
    "evaluate",
    "parse_operand",
    "split_operands",
]

_SIZES = {"byte": 1, "word": 2, "dword": 4, "fword": 6, "qword": 8, "tbyte": 10, "xmmword": 16}
_REGISTERS = {name.lower(): getattr(Register, name) for name in dir(Register) if name.isupper()}
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
_CLASSES_BY_PREFIX = (("xmm", "XMM"), ("mm", "MM"), ("cr", "CR"), ("dr", "DR"), ("st", "STI"))
_MEMORY = re.compile(
    r"(?:(?P<size>\w+)\s+)?(?:(?P<segment>[c-gs]s)\s*:)?\s*\[(?P<address>[^\]]*)\]$", re.IGNORECASE
)
_FAR = re.compile(r"far\s+(?P<selector>\w+)\s*:\s*(?P<offset>.+)$", re.IGNORECASE)
_SCALE = re.compile(r"\s*\*\s*")
_TERM = re.compile(r"([+-]?)\s*([^+\-\s]+)\s*")


@dataclass(frozen=True)
class RegisterOperand:
    """A register, and the names of the operand kinds that can hold it."""

    register: int
    classes: frozenset[str]


@dataclass(frozen=True)
class Memory:
    """``segment:[base + index * scale + displacement]``; ``size`` in bytes, 0 when not given."""

    size: int
    segment: int
    base: int
    index: int
    scale: int
    displacement: int


@dataclass(frozen=True)
class Immediate:
    """A number, or a branch target."""

    value: int


@dataclass(frozen=True)
class FarAddress:
    """``far selector:offset``."""

    selector: int
    offset: int


Operand = RegisterOperand | Memory | Immediate | FarAddress


def split_operands(text: str) -> list[str]:
    """The operands in *text*, which commas separate."""
    return [part.strip() for part in text.split(",")] if text.strip() else []


def evaluate(text: str, symbols: Mapping[str, int]) -> int:
    """A sum of numbers and *symbols*. Raises ValueError for unknown names."""
    total = 0
    for sign, term in _terms(text):
        value = symbols[term] if term in symbols else int(term, 0)
        total += -value if sign == "-" else value
    return total


def parse_operand(text: str, symbols: Mapping[str, int], bits: int) -> Operand:
    """Parse one operand. Raises ValueError when it makes no sense."""
    lower = text.lower()
    if lower in _REGISTERS:
        return RegisterOperand(_REGISTERS[lower], _register_classes(lower))
    memory = _MEMORY.match(text)
    if memory is not None:
        size = memory["size"]
        segment = memory["segment"]
        return _parse_memory(
            memory["address"],
            symbols,
            _SIZES[size.lower()] if size else 0,
            _REGISTERS[segment.lower()] if segment else Register.NONE,
        )
    far = _FAR.match(text)
    if far is not None:
        return FarAddress(evaluate(far["selector"], symbols), evaluate(far["offset"], symbols))
    return Immediate(evaluate(text, symbols))


def _parse_memory(text: str, symbols: Mapping[str, int], size: int, segment: int) -> Memory:
    base = index = int(Register.NONE)
    scale, displacement = 1, 0
    for sign, term in _terms(_SCALE.sub("*", text)):
        name, _, factor = term.lower().partition("*")
        if name in _REGISTERS:
            if factor or base:
                index, scale = _REGISTERS[name], int(factor or "1")
            else:
                base = _REGISTERS[name]
        else:
            value = symbols[term] if term in symbols else int(term, 0)
            displacement += -value if sign == "-" else value
    return Memory(size, segment, base, index, scale, displacement)


def _terms(text: str) -> list[tuple[str, str]]:
    terms = _TERM.findall(text)
    if not terms or _TERM.sub("", text).strip():
        raise ValueError(f'"{text}" is not an expression')
    return terms


def _register_classes(name: str) -> frozenset[str]:
    if name in _SEGMENTS:
        return frozenset((name.upper(), "SEG_REG"))
    for prefix, kind in _CLASSES_BY_PREFIX:
        if name.startswith(prefix):
            return frozenset((kind, name.upper()))
    return frozenset((f"R{8 * RegisterInfo(_REGISTERS[name]).size}", name.upper()))
