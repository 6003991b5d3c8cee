"""What far RET and IRET have in common: returning to code of the same or of a less privileged level.

Source: Intel SDM volume 2B, RET (RETURN-TO-SAME- and RETURN-TO-OUTER-PRIVILEGE-LEVEL); volume 2A, IRET.
"""

from __future__ import annotations

from lasskvm.emulator.code_segments import CodeTarget
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.segments import null_privileged_segments, set_segment, stack_segment
from lasskvm.emulator.stack import Stack, set_stack_pointer
from lasskvm.state import CPL
from lasskvm.x86.registers import SS

__all__ = ["return_on_current_stack", "return_to_popped_stack"]

_SELECTOR = 0xFFFF


def return_on_current_stack(ctx: Emulation, target: CodeTarget, rip: int, stack: Stack) -> int:
    """Return to *target* at *rip*, on *stack* as it has been popped so far; CS and RSP change.

    Returns RIP as the target uses it; raises :class:`GuestFault` with nothing changed.
    """
    words = ctx.words
    rip = target.instruction_pointer(words, rip)
    segment = target.accessed_segment(ctx)
    stack.commit()
    target.enter(words, segment)
    return rip


def return_to_popped_stack(
    ctx: Emulation, target: CodeTarget, rip: int, stack: Stack, size: int, released: int = 0
) -> int:
    """Return to *target* at *rip*, on a stack whose pointer and segment are popped off *stack*.

    CS, CPL, SS and RSP change. *size* is the operand size in bytes, *released* what the return releases of the new
    stack. A less privileged target loses the data segments that it must not have. Returns RIP as the target uses it;
    raises :class:`GuestFault` with nothing changed.
    """
    words, memory = ctx.words, ctx.memory
    pointer = stack.pop(size)
    selector = stack.pop(size) & _SELECTOR
    new_stack = stack_segment(words, memory, selector, target.cpl, target.is_64bit)
    rip = target.instruction_pointer(words, rip)
    code = target.accessed_segment(ctx)
    is_outer = target.cpl != words[CPL]
    target.enter(words, code)
    set_segment(words, SS, new_stack)
    # A 16-bit stack leaves the upper bits as they were: those of the more privileged program.
    set_stack_pointer(words, pointer + released)
    if is_outer:
        null_privileged_segments(words)
    return rip
