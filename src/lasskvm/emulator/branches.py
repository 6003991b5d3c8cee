"""Undoing a near branch to an address that is not canonical.

A processor faults on the branch itself; direct execution has already branched when the fetch at the target fails. (A
target that LASS forbids is different: the branch completes and the fetch faults, so nothing is undone.)
Source: Intel SDM volume 2, CALL, JMP and RET (near), "#GP(0): if the memory address is in a non-canonical form".
"""

from __future__ import annotations

from iced_x86 import FlowControl, Mnemonic

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded, fetch_instruction
from lasskvm.emulator.faults import Interruption
from lasskvm.state import RIP, RSP
from lasskvm.x86.registers import MASK64

__all__ = ["undo_near_branch"]

#: Instructions in the longest block that is searched for its branch.
_BLOCK_INSTRUCTIONS = 512
_SLOT = 8
_SEQUENTIAL = (FlowControl.NEXT, FlowControl.CONDITIONAL_BRANCH)
_NEAR_BRANCHES = (FlowControl.UNCONDITIONAL_BRANCH, FlowControl.INDIRECT_BRANCH)


def undo_near_branch(ctx: Emulation, block_start: int) -> bool:
    """Set RIP and RSP back to the near branch that ended the block at *block_start*.

    Returns False, with the state untouched, when the block does not end in one (IRET and far transfers have changed
    more than can be undone here).
    """
    words = ctx.words
    target = words[RIP]
    branch = _last_instruction(ctx, block_start)
    if branch is None or branch.bits != 64:
        words[RIP] = target
        return False
    instruction = branch.instruction
    flow = instruction.flow_control
    if flow in (FlowControl.CALL, FlowControl.INDIRECT_CALL) and not instruction.is_call_far_indirect:
        words[RSP] = words[RSP] + _SLOT & MASK64
        return True
    if instruction.mnemonic == Mnemonic.RET:
        released = _SLOT + (instruction.immediate16 if instruction.op_count else 0)
        words[RSP] = words[RSP] - released & MASK64
        return True
    if flow in _NEAR_BRANCHES and not instruction.is_jmp_far_indirect:
        return True
    words[RIP] = target
    return False


def _last_instruction(ctx: Emulation, block_start: int) -> Decoded | None:
    """Move RIP to the instruction that ends the block at *block_start*."""
    words = ctx.words
    words[RIP] = block_start
    for _ in range(_BLOCK_INSTRUCTIONS):
        try:
            decoded = fetch_instruction(ctx)
        except Interruption:
            return None
        if decoded.instruction.flow_control not in _SEQUENTIAL:
            return decoded
        words[RIP] = words[RIP] + decoded.length & MASK64
    return None
