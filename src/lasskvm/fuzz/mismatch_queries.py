"""Asking a mismatch for what tells its cause: instructions, vectors, and which differences are of a kind.

What the predicates of :mod:`lasskvm.fuzz.control_signs` and :mod:`lasskvm.fuzz.operand_signs` are made of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce
from operator import or_

from iced_x86 import (
    CpuidFeature,
    Instruction,
    InstructionInfoFactory,
)

from lasskvm.fuzz.comparison import Difference
from lasskvm.fuzz.judging import Mismatch
from lasskvm.fuzz.paths import EndState, PathKind
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable

__all__ = [
    "SSE",
    "Differences",
    "any_encoded",
    "any_instruction",
    "cpuid_of",
    "emulator_vector",
    "ends",
    "information",
    "one_of",
    "uses",
    "with_bits",
    "with_names",
]

Differences = tuple[Difference, ...]
#: Where an entry or image can begin in a word of memory, or in the one in front.
_SHIFTS = range(-56, 64, 8)

#: Features of instructions on XMM registers.
SSE = frozenset(
    (
        CpuidFeature.SSE, CpuidFeature.SSE2, CpuidFeature.SSE3, CpuidFeature.SSSE3, CpuidFeature.SSE4_1,
        CpuidFeature.SSE4_2, CpuidFeature.AES, CpuidFeature.PCLMULQDQ,
    )
)  # fmt: skip

#: What instructions access.
information = InstructionInfoFactory()

# ------------------------------------------------------------------------------------- asking about a mismatch


def any_instruction(mismatch: Mismatch, condition: Callable[[Instruction], bool]) -> bool:
    """Whether one of the case's instructions satisfies *condition*."""
    return any_encoded(mismatch, lambda instruction, code: condition(instruction))


def any_encoded(mismatch: Mismatch, condition: Callable[[Instruction, bytes], bool]) -> bool:
    """Whether one of the case's instructions, with its bytes, satisfies *condition*."""
    return any(
        not part.instruction.is_invalid and condition(part.instruction, part.code)
        for part in mismatch.instructions
    )


def one_of(mismatch: Mismatch, mnemonics: frozenset[int]) -> bool:
    """Whether one of the case's instructions is one of *mnemonics*."""
    return any_instruction(mismatch, lambda instruction: instruction.mnemonic in mnemonics)


def uses(mismatch: Mismatch, features: frozenset[int]) -> bool:
    """Whether one of the case's instructions belongs to one of *features* (``iced_x86.CpuidFeature``)."""
    return any_instruction(
        mismatch, lambda instruction: not features.isdisjoint(instruction.cpuid_features())
    )


def ends(mismatch: Mismatch) -> tuple[EndState, EndState]:
    """The end states of direct execution and of the emulator, whatever the order they were asked for in."""
    first, second = mismatch.ends
    return (second, first) if mismatch.paths[0] is PathKind.EMULATOR else (first, second)


def emulator_vector(mismatch: Mismatch) -> int | None:
    """The vector whose handler the emulator has reached."""
    return ends(mismatch)[1].vector(mismatch.case)


def with_names(mismatch: Mismatch, condition: Callable[[str], bool]) -> Differences:
    """The differences whose name, or region of memory, satisfies *condition*."""
    return tuple(difference for difference in mismatch.differences if condition(difference.region))


def with_bits(mismatch: Mismatch, bit: int, regions: Callable[[str], bool]) -> Differences:
    """The differences in *regions* that consist of *bit*, wherever in a word of memory it can be."""
    bits = reduce(or_, (bit << shift if shift > 0 else bit >> -shift for shift in _SHIFTS))
    return tuple(
        difference
        for difference in with_names(mismatch, regions)
        if difference.first and (int(difference.first, 0) ^ int(difference.second, 0)) & ~bits == 0
    )


@cache
def cpuid_of(cpu: str) -> CpuidTable:
    """The CPUID of CPU model *cpu*."""
    return CpuidTable(parse_cpu(cpu).entries())
