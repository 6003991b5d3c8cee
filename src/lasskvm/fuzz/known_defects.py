"""The differences between paths that are known, each with its reason.

A mismatch is explained when the entries that apply to it cover all of its differences between them; what none covers is
news. An entry names one cause as narrowly as the end states allow: it must not hide another. Unless its reason says
otherwise, direct execution is the path that is wrong; what a running guest can notice of it is in
``docs/differences.md`` as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lasskvm.fuzz import control_signs, operand_signs
from lasskvm.fuzz.comparison import Difference
from lasskvm.fuzz.judging import Mismatch

__all__ = ["KNOWN_DEFECTS", "Defect", "explain"]

Differences = tuple[Difference, ...]


@dataclass(frozen=True)
class Defect:
    """One known cause of differences. ``covers`` gives those differences of a mismatch that are due to it."""

    name: str
    reason: str
    covers: Callable[[Mismatch], Differences]


def explain(mismatch: Mismatch) -> str | None:
    """The names of the known defects that explain *mismatch*; None when something about it is unexplained."""
    names: list[str] = []
    open_differences = set(mismatch.differences)
    for defect in KNOWN_DEFECTS:
        covered = open_differences.intersection(defect.covers(mismatch))
        if covered:
            names.append(defect.name)
            open_differences -= covered
        if not open_differences:
            return " and ".join(names) or None
    return None


def _all_if(condition: Callable[[Mismatch], bool]) -> Callable[[Mismatch], Differences]:
    """For a cause that changes the course of things, so that anything can differ."""
    return lambda mismatch: mismatch.differences if condition(mismatch) else ()


KNOWN_DEFECTS: tuple[Defect, ...] = (
    # Open in the architecture: both paths may be right.
    Defect(
        "translation ahead of execution",
        "The translator reads code behind the instruction, as processors do speculatively; where that is on the next "
        "page, the page's entries are marked as accessed.",
        control_signs.fetched_ahead,
    ),
    Defect(
        "accessed bit of a page that may not be written",
        "A read-modify-write that may read the page but not write it: the translator reads it, which sets the accessed "
        "bit, before it faults. Processors may do either.",
        control_signs.accessed_by_update,
    ),
    Defect(
        "read-modify-write that faults",
        "Which of two pages is reported, and which dirty bit is set, where one may not be written and the other not "
        "read: the translator reads both before it writes, the emulator, as processors do, asks for writing at once.",
        control_signs.updated_over_page_end,
    ),
    Defect(
        "order of the reads of CMPS",
        "The manual does not say which operand is read first, so which of two faults is reported, and which accessed "
        "bits are set, is open. The translator begins with ES:(R)DI, the emulator, as KVM's, with (R)SI.",
        _all_if(control_signs.compares_strings),
    ),
    Defect(
        "breakpoint bits of a single step",
        "The translator reports the conditions of breakpoints that are not enabled in DR6, which processors may do as "
        "well.",
        control_signs.names_breakpoints,
    ),
    Defect(
        "extent of FXSAVE and FXRSTOR",
        "Whether they access the parts of their 512 bytes that hold nothing is left to the processor; the emulator "
        "does, at once, the translator does not.",
        _all_if(operand_signs.restores_less),
    ),
    Defect(
        "approximations",
        "RCPPS and RSQRTPS may give any result with a relative error below 1.5 * 2**-12.",
        control_signs.approximated,
    ),
    Defect(
        "FXSAVE and FXRSTOR with CR4.OSFXSR = 0",
        "Whether they then access XMM registers and MXCSR is left to the processor: the translator does not.",
        _all_if(control_signs.saves_without_sse),
    ),
    Defect(
        "fetch of the forced emulation prefix",
        'On the path "forced" the prefix is fetched first, so a fault in that reports its address.',
        control_signs.fetches_prefix,
    ),
    # Decoding and control flow
    Defect(
        "instructions that are not offered",
        "The translator executes some instructions that CPUID does not show, such as VEX forms of SSE ones, raises #NM "
        "for them where it is #UD, or #UD before all of their bytes have been fetched.",
        _all_if(control_signs.is_not_offered),
    ),
    Defect(
        "operand-size prefix of near branches",
        "In 64-bit mode Intel processors ignore it; the translator does as AMD's and truncates RIP to 16 bits.",
        _all_if(control_signs.has_short_branch),
    ),
    Defect(
        "RET with 8000H or more",
        "The translator takes the number of bytes to release for a signed one.",
        _all_if(control_signs.releases_much),
    ),
    Defect(
        "EIP beyond 32 bits",
        "Outside 64-bit mode the translator does not truncate the target of a relative branch; it shows when nothing "
        "can be fetched there, or in IA-32e mode in a frame.",
        control_signs.has_wide_eip,
    ),
    Defect(
        "fetch of the rest of what is #UD",
        "The translator raises #UD or #NM as soon as the opcode is known; processors fetch the whole instruction, "
        "which may fault.",
        _all_if(control_signs.refuses_before_fetch),
    ),
    Defect(
        "66H together with REX.W, F2H or F3H",
        "REX.W decides the operand size, and the last of F2H and F3H which SSE instruction it is; the translator lets "
        "66H do it, and F3H before F2H.",
        _all_if(control_signs.has_competing_prefixes),
    ),
    Defect(
        "single step of a branch to a target that is not canonical",
        "The branch faults on a processor; the translator completes it, and RFLAGS.TF comes first.",
        _all_if(control_signs.steps_over_wild_branch),
    ),
    Defect(
        "CALL of a target that is not canonical",
        "The target is checked first. The translator pushes first, which may fault; the fault at the target then "
        "undoes what it has done to RSP, but not what it has pushed.",
        _all_if(control_signs.calls_wild_target),
    ),
    Defect(
        "stores to the code that is being executed",
        "A read-modify-write of the page it is on is executed again once the page's translations are gone, with the "
        "flags that it has left.",
        _all_if(control_signs.stores_to_code),
    ),
    Defect(
        "IRET, IRETD and RETF with 16- and 32-bit operands in 64-bit mode",
        "The translator truncates RSP to the size of the stack segment, which does not matter in 64-bit mode.",
        _all_if(control_signs.has_short_return),
    ),
    Defect(
        "single step of PAUSE",
        "The translator leaves its loop on PAUSE, and RFLAGS.TF is not looked at.",
        _all_if(control_signs.steps_over_pause),
    ),
    Defect(
        "flags behind LOOPE and LOOPNE",
        "Where (R)CX ends the loop, the translator takes for RFLAGS what it has kept to work them out from.",
        control_signs.leaves_loop,
    ),
    Defect(
        "RF behind an instruction",
        "RF ends with the instruction behind IRET; in the translator it lasts until the next block.",
        control_signs.keeps_rf,
    ),
    Defect(
        "RF between repetitions",
        "A trap after an iteration of a repeated string instruction that is not the last pushes RF = 1 (SDM volume 3B, "
        "18.3.1.1); the translator pushes 0.",
        control_signs.trapped_between_repetitions,
    ),
    # Memory operands
    Defect(
        "alignment of 16-byte operands",
        "The translator does not check the alignment that most SSE instructions demand.",
        _all_if(operand_signs.is_misaligned),
    ),
    Defect(
        "#AC behind what switches it on",
        "Cases with alignment checks are emulated, but direct execution goes on to the end of its block when POPF or "
        "IRET sets RFLAGS.AC.",
        _all_if(operand_signs.begins_alignment_checks),
    ),
    Defect(
        "unusable data segments",
        "Outside 64-bit mode, direct execution lets accesses through null segments pass; ordinary 32-bit programs have "
        "them in FS and GS, so they are no reason to emulate.",
        _all_if(operand_signs.has_unusable_segment),
    ),
    Defect(
        "the end of a flat segment",
        "Outside 64-bit mode, an access that begins below 4 GiB and ends above exceeds the segment's limit; direct "
        "execution makes it.",
        _all_if(operand_signs.passes_segment_end),
    ),
    Defect(
        "immediates behind RIP-relative operands",
        "The translator forgets them in SHLD, SHRD and the second encoding of TEST (F6H and F7H, /1): its address is "
        "too low by their size.",
        _all_if(operand_signs.has_immediate_behind_rip_relative),
    ),
    Defect(
        "ENTER",
        "The translator does not check that the stack can be written at the new RSP, and makes the accesses of nested "
        "levels one by one.",
        _all_if(operand_signs.enters),
    ),
    Defect(
        "INS and OUTS",
        "The translator touches memory before it asks for permission to access the port, and INS writes a zero first.",
        _all_if(operand_signs.does_port_string),
    ),
    Defect(
        "segment prefixes in 64-bit mode",
        "CS, DS, ES and SS prefixes mean nothing; the translator adds the base that the segment has from another mode, "
        "and forgets an FS or GS prefix in front.",
        _all_if(operand_signs.has_null_prefix),
    ),
    Defect(
        "PUSHA and POPA that fault",
        "The translator begins at the lowest address, so it may report another of several faults, and it has changed "
        "registers by then.",
        _all_if(operand_signs.pushes_all),
    ),
    # Registers
    Defect(
        "flags behind a fault",
        "An instruction that depends on flags has the translator work them out, or has changed them, when its memory "
        "operand faults; what is left of them is not what they were. A repeated CMPS or SCAS that faults has to leave "
        "those from before it (SDM volume 2, REP).",
        operand_signs.lost_flags,
    ),
    Defect(
        "flags of LOCK NEG",
        "The translator works them out from a value that is not the operand's.",
        operand_signs.negates_locked,
    ),
    Defect(
        "CMPXCHG of a 32-bit register",
        "When the comparison fails the register stays as it is; the translator clears its upper half.",
        _all_if(operand_signs.exchanges_register),
    ),
    Defect(
        "operands of 4 and 8 bytes",
        "CVTPS2PD, CVTDQ2PD, CVTPS2PI and CVTTPS2PI read 8 bytes of memory, ROUNDSS 4 and ROUNDSD 8; the translator "
        "reads 16.",
        _all_if(operand_signs.reads_too_much),
    ),
    Defect(
        "RF in PUSHF's image",
        "PUSHF pushes RF = 0; the translator pushes it as it is.",
        operand_signs.pushes_rf,
    ),
    Defect(
        "string comparisons of SSE4.2",
        "The translator gets some of the aggregations and polarities wrong.",
        _all_if(operand_signs.compares_text),
    ),
    Defect(
        "LAHF and SAHF with a REX prefix",
        "The translator takes AH for SPL, as if it were an operand of a byte instruction.",
        _all_if(operand_signs.moves_high_byte),
    ),
    Defect(
        "null selector in SS",
        "In 64-bit mode SS can be null below CPL 3 if its RPL is the CPL; the translator does not look at RPL.",
        _all_if(operand_signs.loads_null_stack),
    ),
    Defect(
        "LSS, LFS and LGS with REX.W",
        "The translator loads a 32-bit offset, as AMD processors do; Intel's load 64 bits.",
        _all_if(operand_signs.loads_wide_far_pointer),
    ),
    Defect(
        "SSE exceptions",
        "The translator neither sets MXCSR's flags nor raises #XM, and LDMXCSR takes reserved bits.",
        operand_signs.lacks_sse_exceptions,
    ),
    Defect(
        "halves of 16-byte accesses",
        "The translator accesses 8 bytes at a time; when the second half faults, the first is done.",
        operand_signs.accesses_halves,
    ),
    Defect(
        "choice of a NaN",
        "Of two NaNs an SSE instruction returns the first; the translator follows x87's rule.",
        operand_signs.chooses_nan,
    ),
    Defect(
        "horizontal additions of a register to itself",
        "The translator overwrites the source with the first half of the result.",
        _all_if(operand_signs.adds_horizontally),
    ),
    Defect(
        "REP with ECX = 0 and 32-bit addresses",
        "In 64-bit mode Intel processors clear the upper halves of RCX, RSI and RDI (KVM: "
        "``string_registers_quirk()``); the translator leaves them.",
        operand_signs.repeats_nothing,
    ),
    Defect(
        "FBSTP",
        "The translator stores byte by byte, the last one first, and none where the address wraps.",
        _all_if(operand_signs.stores_decimal),
    ),
    Defect(
        "denormals",
        "With MXCSR.DAZ a denormal operand counts as zero, also as the result of MIN and MAX; with MXCSR.FZ a denormal "
        "result becomes zero. The translator knows the one in part, the other not at all.",
        operand_signs.keeps_denormals,
    ),
    Defect(
        "x87 and MMX state",
        "The translator has no stack faults, does not keep all of the status, tags and pointers, leaves bits 79:64 "
        "alone when MMX registers are written, computes with 53 bits at times, and raises #MF late or never.",
        operand_signs.differs_in_x87,
    ),
)
