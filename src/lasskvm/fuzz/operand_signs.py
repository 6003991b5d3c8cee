"""How known defects of memory operands and registers show.

:mod:`lasskvm.fuzz.known_defects` has the reasons.
"""

from __future__ import annotations

from iced_x86 import (
    CpuidFeature,
    Instruction,
    MemorySizeInfo,
    Mnemonic,
    OpKind,
    Register,
    RegisterInfo,
)

from lasskvm.fuzz.fpu_registers import names as fpu_names
from lasskvm.fuzz.fpu_registers import start_fpu
from lasskvm.fuzz.judging import Mismatch
from lasskvm.fuzz.mismatch_queries import (
    SSE,
    Differences,
    any_encoded,
    any_instruction,
    emulator_vector,
    information,
    one_of,
    uses,
    with_bits,
    with_names,
)
from lasskvm.fuzz.paths import Ending
from lasskvm.x86.exceptions import AC, GP, MF, PF, SS, XM
from lasskvm.x86.fpu import MXCSR_DAZ, MXCSR_FZ
from lasskvm.x86.registers import AR_UNUSABLE, MASK32, RFLAGS_AC, RFLAGS_ARITHMETIC, RFLAGS_RF

_REX_FIRST, _REX_W, _REX_LAST = 0x40, 0x08, 0x4F
#: CS, DS, ES and SS. Behind as many bytes there are no prefixes any more, most of the time.
_NULL_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E))
_MOST_PREFIXES = 5
_DOUBLEWORD_BYTES, _QUADWORD_BYTES, _WIDE_BYTES = 4, 8, 16
_PORT_STRINGS = frozenset(
    (Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD, Mnemonic.OUTSB, Mnemonic.OUTSW, Mnemonic.OUTSD)
)
#: Bits of RFLAGS that are always 0.
_RESERVED_FLAGS = 0x8028
_PUSH_ALL = frozenset((Mnemonic.PUSHA, Mnemonic.PUSHAD, Mnemonic.POPA, Mnemonic.POPAD))
_PUSH_FLAGS = frozenset((Mnemonic.PUSHF, Mnemonic.PUSHFD, Mnemonic.PUSHFQ))
_HALF_READERS = frozenset(
    (
        Mnemonic.CVTPS2PD, Mnemonic.CVTDQ2PD, Mnemonic.CVTPS2PI, Mnemonic.CVTTPS2PI, Mnemonic.ROUNDSS,
        Mnemonic.ROUNDSD,
    )
)  # fmt: skip
_HORIZONTAL = frozenset(
    (
        Mnemonic.PHADDW, Mnemonic.PHADDD, Mnemonic.PHADDSW, Mnemonic.PHSUBW, Mnemonic.PHSUBD, Mnemonic.PHSUBSW,
        Mnemonic.HADDPS, Mnemonic.HADDPD, Mnemonic.HSUBPS, Mnemonic.HSUBPD,
    )
)  # fmt: skip
_FX_AREAS = frozenset((Mnemonic.FXSAVE, Mnemonic.FXSAVE64, Mnemonic.FXRSTOR, Mnemonic.FXRSTOR64))
#: Floating-point formats: bits, and the magnitude of infinity, above which there are NaNs.
_FLOATS = ((32, 0x7F80_0000), (64, 0x7FF0 << 48))
_X87_COMPARISONS = frozenset((Mnemonic.FCOMI, Mnemonic.FCOMIP, Mnemonic.FUCOMI, Mnemonic.FUCOMIP))
_TEXT_COMPARISONS = frozenset(
    (
        Mnemonic.PCMPESTRI, Mnemonic.PCMPESTRM, Mnemonic.PCMPISTRI, Mnemonic.PCMPISTRM, Mnemonic.PCMPESTRI64,
        Mnemonic.PCMPESTRM64,
    )
)  # fmt: skip
_FAR_POINTER_LOADS = frozenset((Mnemonic.LSS, Mnemonic.LFS, Mnemonic.LGS))
_FLAG_TRANSFERS = frozenset((Mnemonic.LAHF, Mnemonic.SAHF))
_FORGOTTEN_IMMEDIATES = frozenset((Mnemonic.SHLD, Mnemonic.SHRD, Mnemonic.TEST))
_IMMEDIATES = frozenset((OpKind.IMMEDIATE8, OpKind.IMMEDIATE16, OpKind.IMMEDIATE32, OpKind.IMMEDIATE32TO64))
_X87 = frozenset(
    (CpuidFeature.FPU, CpuidFeature.FPU287, CpuidFeature.FPU387, CpuidFeature.MMX, CpuidFeature.FXSR)
)
_X87_NAMES = frozenset(name for name in fpu_names() if not name.startswith("xmm")) - {"mxcsr"}
#: Where x87 instructions leave results, beside their own registers.
_X87_RESULTS = frozenset(("rflags", "rax", "cr2", "page tables", "memory, further"))

# ----------------------------------------------------------------------------------------------------- memory operands


def is_misaligned(mismatch: Mismatch) -> bool:
    """The emulator has refused a case with a 16-byte operand of an SSE instruction."""

    def has_wide_operand(instruction: Instruction) -> bool:
        size = MemorySizeInfo(instruction.memory_size).size
        return size == _WIDE_BYTES and not SSE.isdisjoint(instruction.cpuid_features())

    return emulator_vector(mismatch) in (GP, None) and any_instruction(mismatch, has_wide_operand)


def has_unusable_segment(mismatch: Mismatch) -> bool:
    """Outside 64-bit mode, an operand in a null segment."""
    unusable = [bool(segment.attributes & AR_UNUSABLE) for segment in mismatch.case.segments]
    return any(
        unusable[_SEGMENTS[memory.segment]]
        for part in mismatch.instructions
        if part.bits != 64 and not part.instruction.is_invalid
        for memory in information.info(part.instruction).used_memory()
    )


_SEGMENTS = {
    Register.ES: 0, Register.CS: 1, Register.SS: 2, Register.DS: 3, Register.FS: 4, Register.GS: 5,
}  # fmt: skip


def passes_segment_end(mismatch: Mismatch) -> bool:
    """Outside 64-bit mode the emulator reports a limit violation where direct execution has none, or another fault."""
    if mismatch.case.mode.bits == 64 or emulator_vector(mismatch) not in (GP, SS, None):
        return False
    return any_instruction(mismatch, lambda instruction: bool(information.info(instruction).used_memory()))


def has_immediate_behind_rip_relative(mismatch: Mismatch) -> bool:
    """SHLD, SHRD or TEST of a RIP-relative operand and an immediate."""
    return any_instruction(
        mismatch,
        lambda instruction: (
            instruction.mnemonic in _FORGOTTEN_IMMEDIATES
            and instruction.is_ip_rel_memory_operand
            and any(instruction.op_kind(number) in _IMMEDIATES for number in range(instruction.op_count))
        ),
    )


def begins_alignment_checks(mismatch: Mismatch) -> bool:
    """The emulator has raised #AC, which RFLAGS.AC did not ask for at the start."""
    return emulator_vector(mismatch) == AC and not mismatch.case.rflags & RFLAGS_AC


def enters(mismatch: Mismatch) -> bool:
    """ENTER."""
    return one_of(mismatch, frozenset((Mnemonic.ENTER,)))


def does_port_string(mismatch: Mismatch) -> bool:
    """INS or OUTS."""
    return one_of(mismatch, _PORT_STRINGS)


def has_null_prefix(mismatch: Mismatch) -> bool:
    """A prefix for CS, DS, ES or SS in 64-bit mode, and a base that is not 0 or an FS or GS prefix as well."""

    return mismatch.case.mode.bits == 64 and any_encoded(
        mismatch, lambda instruction, code: not _NULL_PREFIXES.isdisjoint(code[:_MOST_PREFIXES])
    )


def pushes_all(mismatch: Mismatch) -> bool:
    """PUSHA or POPA has faulted."""
    return one_of(mismatch, _PUSH_ALL) and not {GP, SS, PF}.isdisjoint(mismatch.vectors())


# ----------------------------------------------------------------------------------------------------------- registers


def lost_flags(mismatch: Mismatch) -> Differences:
    """Arithmetic flags, where both paths report the same fault, and an instruction that depends on flags."""
    first, second = mismatch.vectors()
    shut_down = all(end.ending is Ending.SHUTDOWN for end in mismatch.ends)
    if first != second or (first not in (PF, GP, SS) and not shut_down):
        return ()
    if not any_instruction(mismatch, lambda instruction: bool(instruction.rflags_read)):
        return ()
    return with_bits(
        mismatch,
        RFLAGS_ARITHMETIC | _RESERVED_FLAGS,
        lambda region: region == "rflags" or "stack" in region or "page" in region,
    )


def pushes_rf(mismatch: Mismatch) -> Differences:
    """RF in memory, and a PUSHF."""
    if not one_of(mismatch, _PUSH_FLAGS):
        return ()
    return with_bits(mismatch, RFLAGS_RF, lambda region: "stack" in region or "page" in region)


def negates_locked(mismatch: Mismatch) -> Differences:
    """RFLAGS, and a NEG with LOCK."""
    if not any_instruction(mismatch, lambda part: part.mnemonic == Mnemonic.NEG and part.has_lock_prefix):
        return ()
    return with_bits(mismatch, RFLAGS_ARITHMETIC, lambda region: region == "rflags" or "stack" in region)


def exchanges_register(mismatch: Mismatch) -> bool:
    """CMPXCHG of a 32-bit register."""
    return any_instruction(
        mismatch,
        lambda instruction: (
            instruction.mnemonic == Mnemonic.CMPXCHG
            and instruction.op0_kind == OpKind.REGISTER
            and RegisterInfo(instruction.op0_register).size == _DOUBLEWORD_BYTES
        ),
    )


def accesses_halves(mismatch: Mismatch) -> Differences:
    """XMM registers and data, where both paths have refused an SSE instruction."""
    first, second = mismatch.vectors()
    if first != second or first not in (PF, GP, SS) or not uses(mismatch, SSE):
        return ()
    return with_names(mismatch, lambda name: name.startswith(("xmm", "data page")) or "stack" in name)


def chooses_nan(mismatch: Mismatch) -> Differences:
    """XMM registers that differ in elements which are NaNs on both paths."""
    if not uses(mismatch, SSE):
        return ()
    return tuple(
        difference
        for difference in with_names(mismatch, lambda name: name.startswith("xmm"))
        if any(
            _differs_in_nans(int(difference.first, 0), int(difference.second, 0), *kind) for kind in _FLOATS
        )
    )


def _differs_in_nans(first: int, second: int, bits: int, infinity: int) -> bool:
    """Whether all elements of *bits* bits that differ are NaNs: above *infinity*, the sign aside."""
    magnitude = (1 << bits - 1) - 1
    elements = ((first >> shift, second >> shift) for shift in range(0, 8 * _WIDE_BYTES, bits))
    return all(
        (one ^ other) & (1 << bits) - 1 == 0 or min(one & magnitude, other & magnitude) > infinity
        for one, other in elements
    )


def adds_horizontally(mismatch: Mismatch) -> bool:
    """PHADDW and its kin with the same register twice."""
    return any_instruction(
        mismatch,
        lambda instruction: (
            instruction.mnemonic in _HORIZONTAL
            and instruction.op1_kind == OpKind.REGISTER
            and instruction.op0_register == instruction.op1_register
        ),
    )


def stores_decimal(mismatch: Mismatch) -> bool:
    """FBSTP."""
    return one_of(mismatch, frozenset((Mnemonic.FBSTP,)))


def restores_less(mismatch: Mismatch) -> bool:
    """FXSAVE or FXRSTOR, and the emulator has met a fault."""
    return (
        uses(mismatch, frozenset((CpuidFeature.FXSR,)))
        and emulator_vector(mismatch) in (PF, GP, SS)
        and one_of(mismatch, _FX_AREAS)
    )


def repeats_nothing(mismatch: Mismatch) -> Differences:
    """The upper halves of RCX, RSI and RDI, and a repeated string instruction with 32-bit addresses."""
    repeats = any_instruction(mismatch, lambda part: part.has_rep_prefix or part.has_repne_prefix)
    if not repeats or mismatch.case.mode.bits != 64:
        return ()
    return tuple(
        difference
        for difference in with_names(mismatch, lambda name: name in ("rcx", "rsi", "rdi"))
        if int(difference.first, 0) & MASK32 == int(difference.second, 0) & MASK32
    )


def reads_too_much(mismatch: Mismatch) -> bool:
    """A conversion or rounding of 4 or 8 bytes of memory, by an instruction that has a whole register otherwise."""
    return any_instruction(
        mismatch,
        lambda instruction: instruction.mnemonic in _HALF_READERS and instruction.op1_kind == OpKind.MEMORY,
    )


def loads_null_stack(mismatch: Mismatch) -> bool:
    """SS is loaded in 64-bit mode, which the emulator refuses."""

    def loads(instruction: Instruction) -> bool:
        return instruction.mnemonic == Mnemonic.LSS or (
            instruction.op0_kind == OpKind.REGISTER and instruction.op0_register == Register.SS
        )

    return (
        mismatch.case.mode.bits == 64 and emulator_vector(mismatch) == GP and any_instruction(mismatch, loads)
    )


def keeps_denormals(mismatch: Mismatch) -> Differences:
    """XMM registers, and an SSE instruction, with MXCSR.DAZ or MXCSR.FZ."""
    special = start_fpu(mismatch.case.data_seed).mxcsr & (MXCSR_DAZ | MXCSR_FZ)
    if not special or not uses(mismatch, SSE):
        return ()
    return with_names(mismatch, lambda name: name.startswith("xmm"))


def compares_text(mismatch: Mismatch) -> bool:
    """PCMPESTRI and its kin."""
    return one_of(mismatch, _TEXT_COMPARISONS)


def moves_high_byte(mismatch: Mismatch) -> bool:
    """LAHF or SAHF behind a REX prefix."""

    def has_rex(instruction: Instruction, code: bytes) -> bool:
        return instruction.mnemonic in _FLAG_TRANSFERS and any(
            _REX_FIRST <= prefix <= _REX_LAST for prefix in code[:-1]
        )

    return mismatch.case.mode.bits == 64 and any_encoded(mismatch, has_rex)


def loads_wide_far_pointer(mismatch: Mismatch) -> bool:
    """LSS, LFS or LGS of a 64-bit register."""

    def is_wide(instruction: Instruction) -> bool:
        return (
            instruction.mnemonic in _FAR_POINTER_LOADS
            and RegisterInfo(instruction.op0_register).size == _QUADWORD_BYTES
        )

    return any_instruction(mismatch, is_wide)


def lacks_sse_exceptions(mismatch: Mismatch) -> Differences:
    """MXCSR, or all of it where the emulator has raised #XM, or #UD in its place, or LDMXCSR is involved."""
    if not uses(mismatch, SSE | {CpuidFeature.FXSR}):
        return ()
    loads = one_of(mismatch, frozenset((Mnemonic.LDMXCSR, Mnemonic.FXRSTOR, Mnemonic.FXRSTOR64)))
    if emulator_vector(mismatch) == XM or (loads and emulator_vector(mismatch) == GP):
        return mismatch.differences
    return with_names(mismatch, lambda name: name == "mxcsr")


def differs_in_x87(mismatch: Mismatch) -> Differences:
    """x87 registers, and what x87 instructions leave elsewhere; all of it behind #MF, or flags that others read."""

    def uses_mmx(instruction: Instruction) -> bool:
        if instruction.mnemonic in (Mnemonic.CVTPI2PS, Mnemonic.CVTPI2PD):
            return True
        registers = (instruction.op_register(number) for number in range(instruction.op_count))
        return any(Register.MM0 <= register <= Register.MM7 for register in registers)

    if not uses(mismatch, _X87) and not any_instruction(mismatch, uses_mmx):
        return ()
    if MF in mismatch.vectors() or one_of(mismatch, _X87_COMPARISONS):
        return mismatch.differences

    def is_result(name: str) -> bool:
        return (
            name in _X87_NAMES
            or name in _X87_RESULTS
            or name.startswith(("xmm", "data page"))
            or "stack" in name
        )

    return with_names(mismatch, is_result)
