"""How an emulated instruction begins and ends: privilege, stepping over it, branching.

Source: Intel SDM volume 3B, 18.3.1.1 (RF) and 18.3.1.4 (single-step traps); volume 2, CALL, JMP, RET, Jcc (near
targets); KVM's ``kvm_skip_emulated_instruction()`` and ``assign_eip()``.
"""

from __future__ import annotations

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import debug_trap, general_protection
from lasskvm.emulator.modes import in_64bit_mode, instruction_pointer_mask, linear_address_bits
from lasskvm.emulator.operation import Handler
from lasskvm.state import CPL, INTERRUPT_SHADOW, LIMIT, RFLAGS, RIP, Words, segment_word
from lasskvm.x86.address import is_canonical
from lasskvm.x86.registers import CS, DR6_BS, RFLAGS_RF, RFLAGS_TF

__all__ = [
    "Handler",
    "branch",
    "check_branch_target",
    "complete",
    "finish",
    "next_rip",
    "require_cpl0",
    "trap_if_single_stepping",
]

_CS_LIMIT = segment_word(CS, LIMIT)


def require_cpl0(words: Words) -> None:
    """#GP(0) at CPL 1 to 3: the check of privileged instructions."""
    if words[CPL]:
        raise general_protection()


def next_rip(words: Words, decoded: Decoded) -> int:
    """The RIP of the instruction behind this one."""
    return words[RIP] + decoded.length & instruction_pointer_mask(words)


def complete(ctx: Emulation, decoded: Decoded) -> None:
    """Step over a completed instruction: RIP moves on, RF and the interrupt shadow end.

    Raises #DB with DR6.BS when RFLAGS.TF is set; the instruction is complete nevertheless.
    """
    finish(ctx, next_rip(ctx.words, decoded))


def finish(ctx: Emulation, rip: int) -> None:
    """Complete an instruction that goes on at *rip*; as :func:`complete`."""
    words = ctx.words
    words[RIP] = rip
    words[RFLAGS] &= ~RFLAGS_RF
    words[INTERRUPT_SHADOW] = 0
    trap_if_single_stepping(words)


def check_branch_target(words: Words, target: int) -> None:
    """#GP(0) for a near branch to *target* outside the code segment, or not canonical. LASS is not asked: the branch
    completes, and the fetch at the target faults."""
    if in_64bit_mode(words):
        if not is_canonical(target, linear_address_bits(words)):
            raise general_protection()
    elif target > words[_CS_LIMIT]:
        raise general_protection()


def branch(ctx: Emulation, target: int) -> None:
    """Complete a near branch to *target*; raises #GP(0) before anything has changed."""
    check_branch_target(ctx.words, target)
    finish(ctx, target)


def trap_if_single_stepping(words: Words) -> None:
    """Raise the single-step trap when RFLAGS.TF is set."""
    if words[RFLAGS] & RFLAGS_TF:
        raise debug_trap(DR6_BS)
