"""How known defects of decoding and control flow show, and what the architecture leaves open.

:mod:`lasskvm.fuzz.known_defects` has the reasons.
"""

from __future__ import annotations

from iced_x86 import (
    CpuidFeature,
    FlowControl,
    Instruction,
    Mnemonic,
    OpAccess,
)

from lasskvm.emulator.decode import Decoded, decode
from lasskvm.emulator.offered import as_offered, is_offered
from lasskvm.fuzz import layout
from lasskvm.fuzz.image import FORCED_EMULATION_PREFIX, case_image
from lasskvm.fuzz.judging import Mismatch
from lasskvm.fuzz.mismatch_queries import (
    SSE,
    Differences,
    any_encoded,
    any_instruction,
    cpuid_of,
    emulator_vector,
    ends,
    information,
    one_of,
    uses,
    with_bits,
    with_names,
)
from lasskvm.fuzz.paths import PathKind
from lasskvm.x86.exceptions import DB, GP, NM, PF, PF_P, PF_RSVD, PF_W, SS, UD
from lasskvm.x86.paging import PTE_A, PTE_D
from lasskvm.x86.registers import CR4_OSFXSR, MASK32, RFLAGS_RF

_OPERAND_SIZE_PREFIX = 0x66
_REX_FIRST, _REX_W, _REX_LAST = 0x40, 0x08, 0x4F
_ESCAPE = 0x0F
_REPEAT_PREFIXES = frozenset((0xF2, 0xF3))
_LONGEST_INSTRUCTION = 15
#: Where an instruction pointer can begin in a word of memory.
_WORDS = (0, 16, 32, 48)
_SIGN_BIT16 = 0x8000
_DR6_HITS = 0xF
_NEAR_BRANCHES = frozenset(
    (
        FlowControl.UNCONDITIONAL_BRANCH, FlowControl.INDIRECT_BRANCH, FlowControl.CONDITIONAL_BRANCH,
        FlowControl.CALL, FlowControl.INDIRECT_CALL, FlowControl.RETURN, FlowControl.XBEGIN_XABORT_XEND,
    )
)  # fmt: skip
_CMPS = frozenset((Mnemonic.CMPSB, Mnemonic.CMPSW, Mnemonic.CMPSD, Mnemonic.CMPSQ))
_RETURNS = frozenset((Mnemonic.RET, Mnemonic.RETF))
_SHORT_RETURNS = frozenset((Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.RETF))
_WIDE_COUNTS = frozenset((Mnemonic.POPCNT, Mnemonic.LZCNT, Mnemonic.TZCNT))
_APPROXIMATIONS = frozenset((Mnemonic.RCPPS, Mnemonic.RCPSS, Mnemonic.RSQRTPS, Mnemonic.RSQRTSS))
_UPDATES = frozenset((OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE))

# ----------------------------------------------------------------------------------- what the architecture leaves open


def fetched_ahead(mismatch: Mismatch) -> Differences:
    """Accessed bits, where the code ends so close to a page's end that more than it may have been read."""
    start = layout.code_offset(mismatch.case)
    end = start + len(mismatch.case.code) + _LONGEST_INSTRUCTION
    if start // layout.PAGE == end // layout.PAGE:
        return ()
    return with_bits(mismatch, PTE_A, lambda region: region == "page tables")


def accessed_by_update(mismatch: Mismatch) -> Differences:
    """Accessed bits, where there is a read-modify-write."""
    if not any_instruction(mismatch, _updates_memory):
        return ()
    return with_bits(mismatch, PTE_A, lambda region: region == "page tables")


def _updates_memory(instruction: Instruction) -> bool:
    return any(used.access in _UPDATES for used in information.info(instruction).used_memory())


def updated_over_page_end(mismatch: Mismatch) -> Differences:
    """What a page fault tells, and accessed and dirty bits, where a read-modify-write has faulted."""
    if mismatch.vectors() != (PF, PF) or not any_instruction(mismatch, _updates_memory):
        return ()
    fault = with_names(mismatch, lambda name: name == "cr2")
    error_code = with_bits(mismatch, PF_P | PF_W | PF_RSVD, lambda region: "stack" in region)
    return fault + error_code + with_bits(mismatch, PTE_A | PTE_D, lambda region: region == "page tables")


def fetches_prefix(mismatch: Mismatch) -> Differences:
    """Addresses that are those of the forced emulation prefix on one path, and of the instruction on the other."""
    if PathKind.FORCED not in mismatch.paths:
        return ()
    places = with_names(mismatch, lambda name: name in ("rip", "cr2") or "stack" in name or "page" in name)
    distance = len(FORCED_EMULATION_PREFIX)
    return tuple(
        difference
        for difference in places
        if difference.first
        and abs(int(difference.first, 0) - int(difference.second, 0))
        in [distance << shift for shift in _WORDS]
    )


def compares_strings(mismatch: Mismatch) -> bool:
    """CMPS, and what differs is a fault or what comes of it."""
    faults = {GP, SS, PF, None}
    return one_of(mismatch, _CMPS) and set(mismatch.vectors()) <= faults


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
        with_names(mismatch, lambda name: name.startswith("xmm")) if one_of(mismatch, _APPROXIMATIONS) else ()
    )


def saves_without_sse(mismatch: Mismatch) -> bool:
    """FXSAVE or FXRSTOR with CR4.OSFXSR clear."""
    return not mismatch.case.cr4 & CR4_OSFXSR and uses(mismatch, frozenset((CpuidFeature.FXSR,)))


# --------------------------------------------------------------------------------------------- decoding, control flow


def is_not_offered(mismatch: Mismatch) -> bool:
    """One of the instructions is not in CPUID, or not an instruction at all."""
    if emulator_vector(mismatch) not in (UD, PF, GP, None):
        return False
    cpuid = cpuid_of(mismatch.case.cpu)
    for part in mismatch.instructions:
        decoded = decode(part.bits, part.code)
        if not isinstance(decoded, Decoded) or not is_offered(as_offered(decoded, cpuid), cpuid):
            return True
    return False


def has_short_branch(mismatch: Mismatch) -> bool:
    """A near branch with an operand-size prefix in 64-bit mode."""
    return mismatch.case.mode.bits == 64 and any_encoded(
        mismatch,
        lambda instruction, code: (
            instruction.flow_control in _NEAR_BRANCHES and _OPERAND_SIZE_PREFIX in code[:-1]
        ),
    )


def releases_much(mismatch: Mismatch) -> bool:
    """RET with a number of bytes that is negative as a signed one."""
    return any_instruction(
        mismatch,
        lambda instruction: (
            instruction.mnemonic in _RETURNS
            and instruction.op_count > 0
            and bool(instruction.immediate16 & _SIGN_BIT16)
        ),
    )


def has_wide_eip(mismatch: Mismatch) -> Differences:
    """Outside 64-bit mode, EIP, or its image in a frame, differs above bit 31 only."""
    if mismatch.case.mode.bits == 64:
        return ()
    found = [
        difference
        for difference in with_names(mismatch, lambda name: name == "rip" or "stack" in name)
        if int(difference.first, 0) & MASK32 == int(difference.second, 0) & MASK32
    ]
    if any(difference.name == "rip" for difference in found):
        found += with_names(mismatch, lambda name: name == "ending")
    return tuple(found)


def refuses_before_fetch(mismatch: Mismatch) -> bool:
    """Direct execution has refused the opcode, the emulator has faulted in fetching over a page's end."""
    vectors = tuple(end.vector(mismatch.case) for end in ends(mismatch))
    start = layout.code_offset(mismatch.case)
    end = start + len(mismatch.case.code)
    crosses = start // layout.PAGE != (end - 1) // layout.PAGE
    return crosses and vectors[0] in (UD, NM, GP) and vectors[1] in (PF, GP)


def has_competing_prefixes(mismatch: Mismatch) -> bool:
    """66H and REX.W on POPCNT, two of 66H, F2H and F3H on an SSE instruction."""

    def competes(instruction: Instruction, code: bytes) -> bool:
        prefixes = code[: code.index(_ESCAPE)] if _ESCAPE in code else b""
        if set(prefixes) >= _REPEAT_PREFIXES and not SSE.isdisjoint(instruction.cpuid_features()):
            return True
        if _OPERAND_SIZE_PREFIX not in prefixes:
            return False
        if instruction.mnemonic in _WIDE_COUNTS:
            return any(_REX_FIRST + _REX_W <= prefix <= _REX_LAST for prefix in prefixes)
        return not _REPEAT_PREFIXES.isdisjoint(prefixes)

    return any_encoded(mismatch, competes)


def steps_over_wild_branch(mismatch: Mismatch) -> bool:
    """A near branch under RFLAGS.TF that the emulator refuses."""
    vectors = tuple(end.vector(mismatch.case) for end in ends(mismatch))
    branches = any_instruction(mismatch, lambda instruction: instruction.flow_control in _NEAR_BRANCHES)
    return mismatch.case.is_stepped and branches and vectors == (DB, GP)


def calls_wild_target(mismatch: Mismatch) -> bool:
    """A near CALL that the emulator refuses, and direct execution has done its push, or faulted there."""
    vectors = tuple(end.vector(mismatch.case) for end in ends(mismatch))
    calls = any_instruction(mismatch, lambda instruction: instruction.mnemonic == Mnemonic.CALL)
    return calls and mismatch.case.mode.bits == 64 and vectors[1] == GP and vectors[0] in (GP, SS, PF)


def stores_to_code(mismatch: Mismatch) -> bool:
    """One of the paths has changed the code."""
    code = slice(layout.CODE_GPA, layout.CODE_GPA + layout.CODE_BYTES)
    before = case_image(mismatch.case)[code].tobytes()
    return any(end.memory[code].tobytes() != before for end in mismatch.ends)


def leaves_loop(mismatch: Mismatch) -> Differences:
    """RFLAGS, or an image of it, and a LOOPE or LOOPNE."""
    if not one_of(mismatch, frozenset((Mnemonic.LOOPE, Mnemonic.LOOPNE))):
        return ()
    return with_names(mismatch, lambda name: name == "rflags" or "stack" in name)


def keeps_rf(mismatch: Mismatch) -> Differences:
    """RF, which was set at the start."""
    if not mismatch.case.rflags & RFLAGS_RF:
        return ()
    return with_bits(
        mismatch, RFLAGS_RF, lambda region: region == "rflags" or "stack" in region or "page" in region
    )


def has_short_return(mismatch: Mismatch) -> bool:
    """A far return that pops 16 or 32 bits at a time in 64-bit mode."""
    return mismatch.case.mode.bits == 64 and one_of(mismatch, _SHORT_RETURNS)


def steps_over_pause(mismatch: Mismatch) -> bool:
    """PAUSE under RFLAGS.TF, or one that is not at the end."""
    return one_of(mismatch, frozenset((Mnemonic.PAUSE,)))


def trapped_between_repetitions(mismatch: Mismatch) -> Differences:
    """RF in a frame, and a repeated string instruction."""
    if not any_instruction(mismatch, lambda part: part.has_rep_prefix or part.has_repne_prefix):
        return ()
    return with_bits(mismatch, RFLAGS_RF, lambda region: "stack" in region or "page" in region)
