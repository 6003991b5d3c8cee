"""How known defects show: predicates over mismatches, for :mod:`lasskvm.fuzz.known_defects`, which has the reasons."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from iced_x86 import (
    CpuidFeature,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    MemorySizeInfo,
    Mnemonic,
    OpAccess,
    OpKind,
    Register,
    RegisterInfo,
)

from lasskvm.emulator.decode import Decoded, decode
from lasskvm.emulator.offered import as_offered, is_offered
from lasskvm.fuzz import layout
from lasskvm.fuzz.comparison import Difference
from lasskvm.fuzz.fpu_registers import names as fpu_names
from lasskvm.fuzz.judging import Mismatch
from lasskvm.fuzz.paths import EndState, PathKind
from lasskvm.state import Segment
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.exceptions import DB, GP, MF, NM, PF, SS, UD, XM
from lasskvm.x86.paging import PTE_A
from lasskvm.x86.registers import AR_UNUSABLE, CR4_OSFXSR, MASK32, RFLAGS_RF

Differences = tuple[Difference, ...]

_OPERAND_SIZE_PREFIX = 0x66
_REX_FIRST, _REX_W, _REX_LAST = 0x40, 0x08, 0x4F
_ESCAPE = 0x0F
_REPEAT_PREFIXES = frozenset((0xF2, 0xF3))
#: CS, DS, ES and SS. Behind as many bytes there are no prefixes any more, most of the time.
_NULL_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E))
_MOST_PREFIXES = 5
_LONGEST_INSTRUCTION = 15
_WIDE_BYTES = 16
_SIGN_BIT16 = 0x8000
_DR6_HITS = 0xF
#: A bit of an entry or image at any place where one can begin in a word of memory.
_SHIFTS = (0, 16, 32, 48)
_NEAR_BRANCHES = frozenset(
    (
        FlowControl.UNCONDITIONAL_BRANCH, FlowControl.INDIRECT_BRANCH, FlowControl.CONDITIONAL_BRANCH,
        FlowControl.CALL, FlowControl.INDIRECT_CALL, FlowControl.RETURN, FlowControl.XBEGIN_XABORT_XEND,
    )
)  # fmt: skip
_CMPS = frozenset((Mnemonic.CMPSB, Mnemonic.CMPSW, Mnemonic.CMPSD, Mnemonic.CMPSQ))
_RETURNS = frozenset((Mnemonic.RET, Mnemonic.RETF))
_SHORT_RETURNS = frozenset((Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.RETF))
_PORT_STRINGS = frozenset(
    (Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD, Mnemonic.OUTSB, Mnemonic.OUTSW, Mnemonic.OUTSD)
)
_PUSH_ALL = frozenset((Mnemonic.PUSHA, Mnemonic.PUSHAD, Mnemonic.POPA, Mnemonic.POPAD))
_PUSH_FLAGS = frozenset((Mnemonic.PUSHF, Mnemonic.PUSHFD, Mnemonic.PUSHFQ))
_ROTATES = frozenset((Mnemonic.RCL, Mnemonic.RCR))
_WIDE_COUNTS = frozenset((Mnemonic.POPCNT, Mnemonic.LZCNT, Mnemonic.TZCNT))
_TEXT_COMPARISONS = frozenset(
    (
        Mnemonic.PCMPESTRI, Mnemonic.PCMPESTRM, Mnemonic.PCMPISTRI, Mnemonic.PCMPISTRM, Mnemonic.PCMPESTRI64,
        Mnemonic.PCMPESTRM64,
    )
)  # fmt: skip
_FAR_POINTER_LOADS = frozenset((Mnemonic.LSS, Mnemonic.LFS, Mnemonic.LGS))
_FLAG_TRANSFERS = frozenset((Mnemonic.LAHF, Mnemonic.SAHF))
_DOUBLE_SHIFTS = frozenset((Mnemonic.SHLD, Mnemonic.SHRD))
_APPROXIMATIONS = frozenset((Mnemonic.RCPPS, Mnemonic.RCPSS, Mnemonic.RSQRTPS, Mnemonic.RSQRTSS))
_SSE = frozenset(
    (
        CpuidFeature.SSE, CpuidFeature.SSE2, CpuidFeature.SSE3, CpuidFeature.SSSE3, CpuidFeature.SSE4_1,
        CpuidFeature.SSE4_2, CpuidFeature.AES, CpuidFeature.PCLMULQDQ,
    )
)  # fmt: skip
_X87 = frozenset(
    (CpuidFeature.FPU, CpuidFeature.FPU287, CpuidFeature.FPU387, CpuidFeature.MMX, CpuidFeature.FXSR)
)
_X87_NAMES = frozenset(name for name in fpu_names() if not name.startswith("xmm")) - {"mxcsr"}
#: Where x87 instructions leave results, beside their own registers.
_X87_RESULTS = frozenset(("rflags", "rax", "cr2", "page tables"))
_UPDATES = frozenset((OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE))
_information = InstructionInfoFactory()

# ------------------------------------------------------------------------------------- asking about a mismatch


def _code_at(mismatch: Mismatch, instruction: Instruction) -> bytes:
    start = instruction.ip - mismatch.case.rip
    return mismatch.case.code[start : start + instruction.len]


def _any(mismatch: Mismatch, condition: Callable[[Instruction], bool]) -> bool:
    """Whether one of the case's instructions satisfies *condition*."""
    return any(not instruction.is_invalid and condition(instruction) for instruction in mismatch.instructions)


def _one_of(mismatch: Mismatch, mnemonics: frozenset[int]) -> bool:
    return _any(mismatch, lambda instruction: instruction.mnemonic in mnemonics)


def _uses(mismatch: Mismatch, features: frozenset[int]) -> bool:
    return _any(mismatch, lambda instruction: not features.isdisjoint(instruction.cpuid_features()))


def _ends(mismatch: Mismatch) -> tuple[EndState, EndState]:
    """The end states of direct execution and of the emulator, whatever the order they were asked for in."""
    first, second = mismatch.ends
    return (second, first) if mismatch.paths[0] is PathKind.EMULATOR else (first, second)


def _emulator_vector(mismatch: Mismatch) -> int | None:
    return _ends(mismatch)[1].vector(mismatch.case)


def _with_names(mismatch: Mismatch, condition: Callable[[str], bool]) -> Differences:
    return tuple(difference for difference in mismatch.differences if condition(difference.region))


def _with_bits(mismatch: Mismatch, bit: int, regions: Callable[[str], bool]) -> Differences:
    """The differences in *regions* that consist of *bit*, wherever in a word of memory it can be."""
    bits = sum(bit << shift for shift in _SHIFTS)
    return tuple(
        difference
        for difference in _with_names(mismatch, regions)
        if difference.first and (int(difference.first, 0) ^ int(difference.second, 0)) & ~bits == 0
    )


@cache
def _cpuid(cpu: str) -> CpuidTable:
    return CpuidTable(parse_cpu(cpu).entries())


# ----------------------------------------------------------------------------------- what the architecture leaves open


def fetched_ahead(mismatch: Mismatch) -> Differences:
    """Accessed bits, where the code ends so close to a page's end that more than it may have been read."""
    start = layout.code_offset(mismatch.case)
    end = start + len(mismatch.case.code) + _LONGEST_INSTRUCTION
    if start // layout.PAGE == end // layout.PAGE:
        return ()
    return _with_bits(mismatch, PTE_A, lambda region: region == "page tables")


def accessed_by_update(mismatch: Mismatch) -> Differences:
    """Accessed bits, where a read-modify-write has faulted."""

    def updates(instruction: Instruction) -> bool:
        return any(used.access in _UPDATES for used in _information.info(instruction).used_memory())

    if _emulator_vector(mismatch) != PF or not _any(mismatch, updates):
        return ()
    return _with_bits(mismatch, PTE_A, lambda region: region == "page tables")


def compares_strings(mismatch: Mismatch) -> bool:
    """CMPS, and what differs is a fault or what comes of it."""
    faults = {GP, SS, PF, None}
    return _one_of(mismatch, _CMPS) and set(mismatch.vectors()) <= faults


def names_breakpoints(mismatch: Mismatch) -> Differences:
    """The low bits of DR6 after a #DB."""
    if mismatch.vectors() != (DB, DB):
        return ()
    return tuple(
        difference
        for difference in mismatch.differences
        if difference.name == "dr6"
        and (int(difference.first, 0) ^ int(difference.second, 0)) & ~_DR6_HITS == 0
    )


def approximated(mismatch: Mismatch) -> Differences:
    """XMM registers, and an instruction that approximates."""
    return (
        _with_names(mismatch, lambda name: name.startswith("xmm"))
        if _one_of(mismatch, _APPROXIMATIONS)
        else ()
    )


def saves_without_sse(mismatch: Mismatch) -> bool:
    """FXSAVE or FXRSTOR with CR4.OSFXSR clear."""
    return not mismatch.case.cr4 & CR4_OSFXSR and _uses(mismatch, frozenset((CpuidFeature.FXSR,)))


# --------------------------------------------------------------------------------------------- decoding, control flow


def is_not_offered(mismatch: Mismatch) -> bool:
    """One of the instructions is not in CPUID, or not an instruction at all."""
    if _emulator_vector(mismatch) not in (UD, PF, GP, None):
        return False
    cpuid = _cpuid(mismatch.case.cpu)
    for instruction in mismatch.instructions:
        decoded = decode(mismatch.case.mode.bits, _code_at(mismatch, instruction))
        if not isinstance(decoded, Decoded) or not is_offered(as_offered(decoded, cpuid), cpuid):
            return True
    return False


def has_short_branch(mismatch: Mismatch) -> bool:
    """A near branch with an operand-size prefix in 64-bit mode."""
    return mismatch.case.mode.bits == 64 and _any(
        mismatch,
        lambda instruction: (
            instruction.flow_control in _NEAR_BRANCHES
            and _OPERAND_SIZE_PREFIX in _code_at(mismatch, instruction)[:-1]
        ),
    )


def releases_much(mismatch: Mismatch) -> bool:
    """RET with a number of bytes that is negative as a signed one."""
    return _any(
        mismatch,
        lambda instruction: (
            instruction.mnemonic in _RETURNS
            and instruction.op_count > 0
            and bool(instruction.immediate16 & _SIGN_BIT16)
        ),
    )


def has_wide_eip(mismatch: Mismatch) -> Differences:
    """EIP differs above bit 31 only, and both paths could not fetch there."""
    first, second = (end.rip for end in mismatch.ends)
    if mismatch.case.mode.bits == 64 or first & MASK32 != second & MASK32:
        return ()
    return _with_names(mismatch, lambda name: name in ("rip", "ending"))


def refuses_before_fetch(mismatch: Mismatch) -> bool:
    """Direct execution has raised #UD or #NM, the emulator has faulted in fetching over a page's end."""
    vectors = tuple(end.vector(mismatch.case) for end in _ends(mismatch))
    start = layout.code_offset(mismatch.case)
    end = start + len(mismatch.case.code)
    crosses = start // layout.PAGE != (end - 1) // layout.PAGE
    return crosses and vectors[0] in (UD, NM) and vectors[1] in (PF, GP)


def has_competing_prefixes(mismatch: Mismatch) -> bool:
    """66H and REX.W on POPCNT, 66H and a repeat prefix on an SSE instruction."""

    def competes(instruction: Instruction) -> bool:
        code = _code_at(mismatch, instruction)
        prefixes = code[: code.index(_ESCAPE)] if _ESCAPE in code else b""
        if _OPERAND_SIZE_PREFIX not in prefixes:
            return False
        if instruction.mnemonic in _WIDE_COUNTS:
            return any(_REX_FIRST + _REX_W <= prefix <= _REX_LAST for prefix in prefixes)
        return not _REPEAT_PREFIXES.isdisjoint(prefixes)

    return _any(mismatch, competes)


def steps_over_wild_branch(mismatch: Mismatch) -> bool:
    """A near branch under RFLAGS.TF that the emulator refuses."""
    vectors = tuple(end.vector(mismatch.case) for end in _ends(mismatch))
    branches = _any(mismatch, lambda instruction: instruction.flow_control in _NEAR_BRANCHES)
    return mismatch.case.is_stepped and branches and vectors == (DB, GP)


def stores_to_code(mismatch: Mismatch) -> bool:
    """The code has become another."""
    return any(difference.region == "code" for difference in mismatch.differences)


def has_short_return(mismatch: Mismatch) -> bool:
    """A far return that pops 16 or 32 bits at a time in 64-bit mode."""
    return mismatch.case.mode.bits == 64 and _one_of(mismatch, _SHORT_RETURNS)


def steps_over_pause(mismatch: Mismatch) -> bool:
    """PAUSE under RFLAGS.TF, or one that is not at the end."""
    return _one_of(mismatch, frozenset((Mnemonic.PAUSE,)))


def trapped_between_repetitions(mismatch: Mismatch) -> Differences:
    """RF in a frame, and a repeated string instruction."""
    if not _any(mismatch, lambda part: part.has_rep_prefix or part.has_repne_prefix):
        return ()
    return _with_bits(mismatch, RFLAGS_RF, lambda region: "stack" in region or "page" in region)


# ----------------------------------------------------------------------------------------------------- memory operands


def is_misaligned(mismatch: Mismatch) -> bool:
    """The emulator has refused a case with a 16-byte operand of an SSE instruction."""

    def has_wide_operand(instruction: Instruction) -> bool:
        size = MemorySizeInfo(instruction.memory_size).size
        return size == _WIDE_BYTES and not _SSE.isdisjoint(instruction.cpuid_features())

    return _emulator_vector(mismatch) == GP and _any(mismatch, has_wide_operand)


def has_unusable_segment(mismatch: Mismatch) -> bool:
    """Outside 64-bit mode, an operand in a null segment."""

    def is_unusable(segment: Segment) -> bool:
        return bool(segment.attributes & AR_UNUSABLE)

    segments = mismatch.case.segments

    def uses_one(instruction: Instruction) -> bool:
        used = (memory.segment for memory in _information.info(instruction).used_memory())
        return any(is_unusable(segments[_SEGMENTS[register]]) for register in used)

    return mismatch.case.mode.bits != 64 and _any(mismatch, uses_one)


_SEGMENTS = {
    Register.ES: 0, Register.CS: 1, Register.SS: 2, Register.DS: 3, Register.FS: 4, Register.GS: 5,
}  # fmt: skip


def passes_segment_end(mismatch: Mismatch) -> bool:
    """Outside 64-bit mode the emulator reports a limit violation where direct execution has none, or another fault."""
    if mismatch.case.mode.bits == 64 or _emulator_vector(mismatch) not in (GP, SS):
        return False
    return _any(mismatch, lambda instruction: bool(_information.info(instruction).used_memory()))


def shifts_relative_to_rip(mismatch: Mismatch) -> bool:
    """A double shift by an immediate, of a RIP-relative operand."""
    return _any(
        mismatch,
        lambda instruction: (
            instruction.mnemonic in _DOUBLE_SHIFTS
            and instruction.is_ip_rel_memory_operand
            and instruction.op2_kind == OpKind.IMMEDIATE8
        ),
    )


def enters(mismatch: Mismatch) -> bool:
    """ENTER."""
    return _one_of(mismatch, frozenset((Mnemonic.ENTER,)))


def does_port_string(mismatch: Mismatch) -> bool:
    """INS or OUTS."""
    return _one_of(mismatch, _PORT_STRINGS)


def has_null_prefix(mismatch: Mismatch) -> bool:
    """A prefix for CS, DS, ES or SS in 64-bit mode, and a base that is not 0 or an FS or GS prefix as well."""

    def has_prefix(instruction: Instruction) -> bool:
        prefixes = _code_at(mismatch, instruction)[:_MOST_PREFIXES]
        return not _NULL_PREFIXES.isdisjoint(prefixes)

    return mismatch.case.mode.bits == 64 and _any(mismatch, has_prefix)


def pushes_all(mismatch: Mismatch) -> bool:
    """PUSHA or POPA has faulted."""
    return _one_of(mismatch, _PUSH_ALL) and not {GP, SS, PF}.isdisjoint(mismatch.vectors())


# ----------------------------------------------------------------------------------------------------------- registers


def rotates_and_faults(mismatch: Mismatch) -> bool:
    """RCL or RCR that both paths have refused."""
    first, second = mismatch.vectors()
    return _one_of(mismatch, _ROTATES) and first == second and first in (PF, GP, SS)


def pushes_rf(mismatch: Mismatch) -> Differences:
    """RF in memory, and a PUSHF."""
    if not _one_of(mismatch, _PUSH_FLAGS):
        return ()
    return _with_bits(mismatch, RFLAGS_RF, lambda region: "stack" in region or "page" in region)


def compares_text(mismatch: Mismatch) -> bool:
    """PCMPESTRI and its kin."""
    return _one_of(mismatch, _TEXT_COMPARISONS)


def moves_high_byte(mismatch: Mismatch) -> bool:
    """LAHF or SAHF behind a REX prefix."""

    def has_rex(instruction: Instruction) -> bool:
        prefixes = _code_at(mismatch, instruction)[:-1]
        return instruction.mnemonic in _FLAG_TRANSFERS and any(
            _REX_FIRST <= prefix <= _REX_LAST for prefix in prefixes
        )

    return mismatch.case.mode.bits == 64 and _any(mismatch, has_rex)


def loads_wide_far_pointer(mismatch: Mismatch) -> bool:
    """LSS, LFS or LGS of a 64-bit register."""

    def is_wide(instruction: Instruction) -> bool:
        return instruction.mnemonic in _FAR_POINTER_LOADS and RegisterInfo(instruction.op0_register).size == 8

    return _any(mismatch, is_wide)


def lacks_sse_exceptions(mismatch: Mismatch) -> Differences:
    """MXCSR, or all of it where the emulator has raised #XM, or #UD in its place, or LDMXCSR is involved."""
    if not _uses(mismatch, _SSE | {CpuidFeature.FXSR}):
        return ()
    loads = _one_of(mismatch, frozenset((Mnemonic.LDMXCSR, Mnemonic.FXRSTOR, Mnemonic.FXRSTOR64)))
    if _emulator_vector(mismatch) == XM or (loads and _emulator_vector(mismatch) == GP):
        return mismatch.differences
    return _with_names(mismatch, lambda name: name == "mxcsr")


def differs_in_x87(mismatch: Mismatch) -> Differences:
    """x87 registers, and what x87 instructions leave elsewhere; all of it where one path has raised #MF."""

    def uses_mmx(instruction: Instruction) -> bool:
        if instruction.mnemonic in (Mnemonic.CVTPI2PS, Mnemonic.CVTPI2PD):
            return True
        registers = (instruction.op_register(number) for number in range(instruction.op_count))
        return any(Register.MM0 <= register <= Register.MM7 for register in registers)

    if not _uses(mismatch, _X87) and not _any(mismatch, uses_mmx):
        return ()
    if MF in mismatch.vectors():
        return mismatch.differences

    def is_result(name: str) -> bool:
        return (
            name in _X87_NAMES
            or name in _X87_RESULTS
            or name.startswith(("xmm", "data page"))
            or "stack" in name
        )

    return _with_names(mismatch, is_result)
