"""Far JMP, CALL and RET: direct, through memory, through call gates, in every mode.

Each function is a :data:`~lasskvm.emulator.completion.Handler`. Stack accesses are those of the current privilege
level, descriptor reads are implicit. CS, SS, CPL and RSP change when nothing can fault any more.

Source: Intel SDM volume 2A, JMP and CALL; volume 2B, RET; KVM's ``em_jmp_far()``, ``em_call_far()`` and
``em_ret_far()``.
"""

from __future__ import annotations

from iced_x86 import Code, Mnemonic

from lasskvm.emulator.call_gates import call_on_gate_stack, call_target, jump_target, read_call_gate
from lasskvm.emulator.code_segments import (
    CodeTarget,
    direct_target,
    fetch_target_descriptor,
    return_target,
)
from lasskvm.emulator.completion import Handler, check_branch_target, finish, next_rip
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.far_pointers import far_pointer, offset_bytes
from lasskvm.emulator.far_returns import return_on_current_stack, return_to_popped_stack
from lasskvm.emulator.modes import in_64bit_mode, in_protected_mode
from lasskvm.emulator.segments import real_mode_segment, set_segment
from lasskvm.emulator.stack import Stack
from lasskvm.state import CPL, SELECTOR, segment_word
from lasskvm.x86.descriptors import segment_attributes
from lasskvm.x86.registers import AR_S, CS

__all__ = ["BY_CODE", "HANDLERS"]

_SELECTOR = 0xFFFF
_CS_SELECTOR = segment_word(CS, SELECTOR)


def _jmp(ctx: Emulation, decoded: Decoded) -> None:
    words, memory = ctx.words, ctx.memory
    selector, offset = far_pointer(ctx, decoded)
    if not in_protected_mode(words):
        check_branch_target(words, offset)
        set_segment(words, CS, real_mode_segment(words, CS, selector))
        finish(ctx, offset)
        return
    descriptor = fetch_target_descriptor(words, memory, selector)
    if segment_attributes(descriptor) & AR_S:
        target = direct_target(words, selector, descriptor)
    else:
        gate = read_call_gate(words, memory, selector, descriptor)
        target, offset = jump_target(words, memory, gate), gate.entry
    rip = target.instruction_pointer(words, offset)
    target.enter(words, target.accessed_segment(ctx))
    finish(ctx, rip)


def _call(ctx: Emulation, decoded: Decoded) -> None:
    words, memory = ctx.words, ctx.memory
    size, return_rip = offset_bytes(decoded), next_rip(words, decoded)
    selector, offset = far_pointer(ctx, decoded)
    if not in_protected_mode(words):
        stack = _stack_with_return_address(ctx, size, return_rip)
        check_branch_target(words, offset)
        stack.commit()
        set_segment(words, CS, real_mode_segment(words, CS, selector))
        finish(ctx, offset)
        return
    descriptor = fetch_target_descriptor(words, memory, selector)
    if segment_attributes(descriptor) & AR_S:
        target = direct_target(words, selector, descriptor)
    else:
        gate = read_call_gate(words, memory, selector, descriptor)
        target, size, offset = call_target(words, memory, gate), gate.size, gate.entry
        if target.cpl != words[CPL] or target.is_64bit != in_64bit_mode(words):
            finish(ctx, call_on_gate_stack(ctx, gate, target, return_rip))
            return
    finish(ctx, _call_on_current_stack(ctx, target, size, offset, return_rip))


def _call_on_current_stack(
    ctx: Emulation, target: CodeTarget, size: int, offset: int, return_rip: int
) -> int:
    """Push the return address, load CS and RSP; returns the new RIP."""
    words = ctx.words
    stack = _stack_with_return_address(ctx, size, return_rip)
    rip = target.instruction_pointer(words, offset)
    segment = target.accessed_segment(ctx)
    stack.commit()
    target.enter(words, segment)
    return rip


def _stack_with_return_address(ctx: Emulation, size: int, return_rip: int) -> Stack:
    """The current stack with CS and *return_rip* pushed; room for them is checked before the target's RIP is."""
    stack = Stack(ctx)
    stack.push(size, ctx.words[_CS_SELECTOR])
    stack.push(size, return_rip)
    stack.check()
    return stack


def _retf(ctx: Emulation, decoded: Decoded) -> None:
    words, instruction = ctx.words, decoded.instruction
    size = instruction.op_code().operand_size // 8
    released = instruction.immediate16 if instruction.op_count else 0
    stack = Stack(ctx)
    rip, selector = stack.pop(size), stack.pop(size) & _SELECTOR
    stack.skip(released)
    if not in_protected_mode(words):
        check_branch_target(words, rip)
        stack.commit()
        set_segment(words, CS, real_mode_segment(words, CS, selector))
        finish(ctx, rip)
        return
    target = return_target(words, ctx.memory, selector)
    if target.cpl == words[CPL]:
        finish(ctx, return_on_current_stack(ctx, target, rip, stack))
    else:
        finish(ctx, return_to_popped_stack(ctx, target, rip, stack, size, released))


#: The handlers of this module, by ``iced_x86.Mnemonic``.
HANDLERS: dict[int, Handler] = {Mnemonic.RETF: _retf}

#: The far forms of JMP and CALL, by ``iced_x86.Code``.
BY_CODE: dict[int, Handler] = {
    Code.JMP_PTR1616: _jmp,
    Code.JMP_PTR1632: _jmp,
    Code.JMP_M1616: _jmp,
    Code.JMP_M1632: _jmp,
    Code.JMP_M1664: _jmp,
    Code.CALL_PTR1616: _call,
    Code.CALL_PTR1632: _call,
    Code.CALL_M1616: _call,
    Code.CALL_M1632: _call,
    Code.CALL_M1664: _call,
}
