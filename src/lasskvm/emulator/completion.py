"""How an emulated instruction begins and ends: privilege, and stepping over it.

Source: Intel SDM volume 3B, 18.3.1.1 (RF) and 18.3.1.4 (single-step traps); KVM's
``kvm_skip_emulated_instruction()``.
"""

from __future__ import annotations

from collections.abc import Callable

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import debug_trap, general_protection
from lasskvm.emulator.modes import instruction_pointer_mask
from lasskvm.state import CPL, INTERRUPT_SHADOW, RFLAGS, RIP, Words
from lasskvm.x86.registers import DR6_BS, RFLAGS_RF, RFLAGS_TF

__all__ = ["Handler", "complete", "next_rip", "require_cpl0", "trap_if_single_stepping"]

#: A function that executes one instruction on the state words. It raises :class:`GuestFault` with the state
#: as it was (accessed and dirty bits aside), or completes the instruction; only a #DB trap is raised after
#: completion.
Handler = Callable[[Emulation, Decoded], None]


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
    words = ctx.words
    words[RIP] = next_rip(words, decoded)
    words[RFLAGS] &= ~RFLAGS_RF
    words[INTERRUPT_SHADOW] = 0
    trap_if_single_stepping(words)


def trap_if_single_stepping(words: Words) -> None:
    """Raise the single-step trap when RFLAGS.TF is set."""
    if words[RFLAGS] & RFLAGS_TF:
        raise debug_trap(DR6_BS)
