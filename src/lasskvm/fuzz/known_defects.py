"""The differences between paths that are known, each with its reason.

A mismatch that no entry explains is news. An entry names one cause as narrowly as the end states allow: it must not
hide another. Unless its reason says otherwise, direct execution is the path that is wrong; what a running guest can see
of it is in ``docs/differences.md`` as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from iced_x86 import CpuidFeature, FlowControl, Instruction, MemorySizeInfo, Mnemonic, Register, RegisterInfo

from lasskvm.emulator.decode import Decoded, decode
from lasskvm.emulator.offered import as_offered, is_offered
from lasskvm.fuzz import layout
from lasskvm.fuzz.fpu_registers import names as fpu_names
from lasskvm.fuzz.image import code_offset
from lasskvm.fuzz.judging import Mismatch
from lasskvm.fuzz.paths import EndState, PathKind
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.exceptions import DB, GP, MF, PF, SS, UD, XM
from lasskvm.x86.paging import PTE_A
from lasskvm.x86.registers import RFLAGS_RF

__all__ = ["KNOWN_DEFECTS", "Defect", "explain"]


@dataclass(frozen=True)
class Defect:
    """One known cause of differences. ``applies`` says whether a mismatch is due to it."""

    name: str
    reason: str
    applies: Callable[[Mismatch], bool]


def explain(mismatch: Mismatch) -> str | None:
    """The name of the known defect that explains *mismatch*; None when there is none."""
    return next((defect.name for defect in KNOWN_DEFECTS if defect.applies(mismatch)), None)


# ---------------------------------------------------------------------------------------------------------- helpers

_OPERAND_SIZE_PREFIX = 0x66
_LONGEST_INSTRUCTION = 15
_NEAR_BRANCHES = frozenset(
    (
        FlowControl.UNCONDITIONAL_BRANCH, FlowControl.INDIRECT_BRANCH, FlowControl.CONDITIONAL_BRANCH,
        FlowControl.CALL, FlowControl.INDIRECT_CALL, FlowControl.RETURN, FlowControl.XBEGIN_XABORT_XEND,
    )
)  # fmt: skip
_CMPS = frozenset((Mnemonic.CMPSB, Mnemonic.CMPSW, Mnemonic.CMPSD, Mnemonic.CMPSQ))
_SHORT_RETURNS = frozenset((Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.RETF))
_PORT_STRINGS = frozenset(
    (Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD, Mnemonic.OUTSB, Mnemonic.OUTSW, Mnemonic.OUTSD)
)
_FAR_POINTER_LOADS = frozenset((Mnemonic.LSS, Mnemonic.LFS, Mnemonic.LGS))
_HIGH_BYTE_FLAGS = frozenset((Mnemonic.LAHF, Mnemonic.SAHF))
_APPROXIMATIONS = frozenset((Mnemonic.RCPPS, Mnemonic.RCPSS, Mnemonic.RSQRTPS, Mnemonic.RSQRTSS))
_SSE = frozenset(
    (
        CpuidFeature.SSE, CpuidFeature.SSE2, CpuidFeature.SSE3, CpuidFeature.SSSE3, CpuidFeature.SSE4_1,
        CpuidFeature.SSE4_2, CpuidFeature.AES, CpuidFeature.PCLMULQDQ,
    )
)  # fmt: skip
_X87 = frozenset((CpuidFeature.FPU, CpuidFeature.FPU287, CpuidFeature.FPU387, CpuidFeature.MMX))
_X87_NAMES = frozenset(fpu_names()) - {f"xmm{number}" for number in range(16)} - {"mxcsr"}
_WIDE_BYTES = 16


def _code_at(mismatch: Mismatch, instruction: Instruction) -> bytes:
    start = instruction.ip - mismatch.case.rip
    return mismatch.case.code[start : start + instruction.len]


def _any(mismatch: Mismatch, condition: Callable[[Instruction], bool]) -> bool:
    """Whether one of the case's instructions satisfies *condition*."""
    return any(not instruction.is_invalid and condition(instruction) for instruction in mismatch.instructions)


def _one_of(mismatch: Mismatch, mnemonics: frozenset[int]) -> bool:
    return _any(mismatch, lambda instruction: instruction.mnemonic in mnemonics)


def _features(instruction: Instruction) -> frozenset[int]:
    return frozenset(instruction.cpuid_features())


def _other(mismatch: Mismatch) -> tuple[EndState, EndState]:
    """The end states of direct execution and of the emulator, the way round in which they were asked for."""
    first, second = mismatch.ends
    return (first, second) if mismatch.paths[0] is not PathKind.EMULATOR else (second, first)


def _emulator_vector(mismatch: Mismatch) -> int | None:
    return _other(mismatch)[1].vector(mismatch.case)


@cache
def _cpuid(cpu: str) -> CpuidTable:
    return CpuidTable(parse_cpu(cpu).entries())


# -------------------------------------------------------------------------------------------------------- predicates


def _is_not_offered(mismatch: Mismatch) -> bool:
    """The emulator says #UD, and one of the instructions is not in CPUID, or not an instruction at all."""
    if _emulator_vector(mismatch) != UD:
        return False
    cpuid = _cpuid(mismatch.case.cpu)
    for instruction in mismatch.instructions:
        decoded = decode(mismatch.case.mode.bits, _code_at(mismatch, instruction))
        if not isinstance(decoded, Decoded):
            return True
        if not is_offered(as_offered(decoded, cpuid), cpuid):
            return True
    return False


def _has_short_branch(mismatch: Mismatch) -> bool:
    if mismatch.case.mode.bits != 64:
        return False
    return _any(
        mismatch,
        lambda instruction: (
            instruction.flow_control in _NEAR_BRANCHES
            and _OPERAND_SIZE_PREFIX in _code_at(mismatch, instruction)[: instruction.len - 1]
        ),
    )


def _compares_strings(mismatch: Mismatch) -> bool:
    vectors = set(mismatch.vectors())
    places = {"ending", "cr2", "rip", "rsp", "page tables", "bus"}
    return _one_of(mismatch, _CMPS) and (mismatch.names <= places or vectors <= {GP, SS, PF})


def _is_misaligned(mismatch: Mismatch) -> bool:
    def has_wide_operand(instruction: Instruction) -> bool:
        size = MemorySizeInfo(instruction.memory_size).size
        return size == _WIDE_BYTES and bool(_features(instruction) & _SSE)

    return _emulator_vector(mismatch) == GP and _any(mismatch, has_wide_operand)


def _fetches_ahead(mismatch: Mismatch) -> bool:
    start = code_offset(mismatch.case)
    end = start + len(mismatch.case.code) + _LONGEST_INSTRUCTION
    crosses = start // layout.PAGE != end // layout.PAGE
    return crosses and mismatch.names <= {"page tables"} and _only_bits(mismatch, PTE_A | PTE_A << 32)


def _only_bits(mismatch: Mismatch, bits: int) -> bool:
    """Whether all differences are in *bits* of the words that differ."""
    values = [(difference.first, difference.second) for difference in mismatch.differences]
    return all(first and (int(first, 0) ^ int(second, 0)) & ~bits == 0 for first, second in values)


def _is_between_repetitions(mismatch: Mismatch) -> bool:
    repeated = _any(mismatch, lambda part: part.has_rep_prefix or part.has_repne_prefix)
    stack_only = all("stack" in name or "page" in name for name in mismatch.names)
    flags = RFLAGS_RF | RFLAGS_RF << 32 | RFLAGS_RF >> 16 | RFLAGS_RF << 16 | RFLAGS_RF << 48
    return repeated and stack_only and _only_bits(mismatch, flags)


def _names_breakpoints(mismatch: Mismatch) -> bool:
    return mismatch.names == {"dr6"} and _only_bits(mismatch, 0xF) and mismatch.vectors() == (DB, DB)


def _has_short_return(mismatch: Mismatch) -> bool:
    return mismatch.case.mode.bits == 64 and _one_of(mismatch, _SHORT_RETURNS)


def _moves_high_byte(mismatch: Mismatch) -> bool:
    def has_rex(instruction: Instruction) -> bool:
        return instruction.mnemonic in _HIGH_BYTE_FLAGS and _code_at(mismatch, instruction)[-2:-1] >= b"\x40"

    return mismatch.case.mode.bits == 64 and _any(mismatch, has_rex)


def _does_port_string(mismatch: Mismatch) -> bool:
    return _one_of(mismatch, _PORT_STRINGS)


def _loads_wide_far_pointer(mismatch: Mismatch) -> bool:
    def is_wide(instruction: Instruction) -> bool:
        wide = RegisterInfo(instruction.op0_register).size == 8 if instruction.op0_register else False
        return wide and instruction.mnemonic in _FAR_POINTER_LOADS

    return _any(mismatch, is_wide)


def _lacks_sse_exceptions(mismatch: Mismatch) -> bool:
    uses_sse = _any(mismatch, lambda instruction: bool(_features(instruction) & _SSE))
    return uses_sse and (mismatch.names <= {"mxcsr"} or _emulator_vector(mismatch) == XM)


def _keeps_x87_state(mismatch: Mismatch) -> bool:
    def uses_x87(instruction: Instruction) -> bool:
        registers = (instruction.op_register(number) for number in range(instruction.op_count))
        return bool(_features(instruction) & _X87) or any(
            Register.MM0 <= register <= Register.MM7 for register in registers
        )

    return _any(mismatch, uses_x87) and (mismatch.names <= _X87_NAMES or MF in mismatch.vectors())


def _approximates(mismatch: Mismatch) -> bool:
    return _one_of(mismatch, _APPROXIMATIONS) and all(
        name.startswith("xmm") or name == "mxcsr" for name in mismatch.names
    )


KNOWN_DEFECTS: tuple[Defect, ...] = (
    Defect(
        "instructions that are not offered",
        "The translator executes some instructions that CPUID does not show, such as VEX forms of SSE ones, or raises "
        "#NM for them where it is #UD.",
        _is_not_offered,
    ),
    Defect(
        "operand-size prefix of near branches",
        "In 64-bit mode Intel processors ignore it; the translator does as AMD's and truncates RIP to 16 bits.",
        _has_short_branch,
    ),
    Defect(
        "order of the reads of CMPS",
        "The manual does not say which operand is read first, so which of two faults is reported, and which accessed "
        "bits are set, is open. The translator begins with ES:(R)DI, the emulator, as KVM's, with (R)SI.",
        _compares_strings,
    ),
    Defect(
        "alignment of 16-byte operands",
        "The translator does not check the alignment that most SSE instructions demand.",
        _is_misaligned,
    ),
    Defect(
        "translation ahead of execution",
        "The translator reads code behind the instruction, as processors do speculatively; where that is on the next "
        "page, the page's entries are marked as accessed.",
        _fetches_ahead,
    ),
    Defect(
        "RF between repetitions",
        "A trap after an iteration of a repeated string instruction that is not the last pushes RF = 1 (SDM volume 3B, "
        "18.3.1.1); the translator pushes 0.",
        _is_between_repetitions,
    ),
    Defect(
        "breakpoint bits of a single step",
        "The translator reports the conditions of breakpoints that are not enabled in DR6, which processors may do as "
        "well.",
        _names_breakpoints,
    ),
    Defect(
        "IRET, IRETD and RETF with 16- and 32-bit operands in 64-bit mode",
        "The translator truncates RSP to the size of the stack segment, which does not matter in 64-bit mode.",
        _has_short_return,
    ),
    Defect(
        "LAHF and SAHF with a REX prefix",
        "The translator takes AH for SPL, as if it were an operand of a byte instruction.",
        _moves_high_byte,
    ),
    Defect(
        "INS and OUTS",
        "The translator touches memory before it asks for permission to access the port, and INS writes a zero first.",
        _does_port_string,
    ),
    Defect(
        "LSS, LFS and LGS with REX.W",
        "The translator loads a 32-bit offset, as AMD processors do; Intel's load 64 bits.",
        _loads_wide_far_pointer,
    ),
    Defect(
        "SSE exceptions",
        "The translator neither sets MXCSR's flags nor raises #XM.",
        _lacks_sse_exceptions,
    ),
    Defect(
        "x87 state",
        "The translator does not keep all of the x87 status, tags and pointers, leaves bits 79:64 alone when MMX "
        "registers are written, and raises #MF late or never.",
        _keeps_x87_state,
    ),
    Defect(
        "approximations",
        "RCPPS and RSQRTPS may give any result with a relative error below 1.5 * 2**-12.",
        _approximates,
    ),
)
