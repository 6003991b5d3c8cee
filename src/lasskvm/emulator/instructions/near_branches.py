"""Near control transfers: JMP, CALL, RET, Jcc, JCXZ and LOOP.

The target is checked before anything changes, so a #GP(0) comes with the stack pointer and the count as they were. In
64-bit mode the operand size is 64 bits whatever prefixes say (as on Intel processors; the decoder knows); elsewhere a
16-bit operand size truncates the target to 16 bits. The far forms of the same mnemonics are not here.

Source: Intel SDM volume 2, the instructions by name; KVM's ``jmp_rel()`` and ``em_call()``.
"""

from __future__ import annotations

from iced_x86 import ConditionCode, Mnemonic, OpKind

from lasskvm.emulator.accessors import Reader, Writer, reader
from lasskvm.emulator.completion import branch, check_branch_target, finish, next_rip
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import Unhandleable
from lasskvm.emulator.flags import condition_of
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.emulator.stack import Stack, pusher, top_loader
from lasskvm.emulator.string_registers import add_to_register
from lasskvm.state import INTERRUPT_SHADOW, RCX, RFLAGS, RIP, RSP
from lasskvm.x86.registers import MASK64, RFLAGS_RF, RFLAGS_TF

__all__ = ["TRANSFERS"]

_RELATIVE = (OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32, OpKind.NEAR_BRANCH64)
_INDIRECT_SIZES = (2, 4, 8)
#: In 48 bits, addresses are canonical whose distance from the lowest canonical one, taken as signed, has 48 bits.
_CANONICAL_BITS = 48
_LOWEST_CANONICAL = 1 << _CANONICAL_BITS - 1
#: Flags that give an instruction's completion something to do.
_ENDING_FLAGS = RFLAGS_RF | RFLAGS_TF


def _jmp(decoded: Decoded) -> Executor:
    if decoded.instruction.op0_kind in _RELATIVE:
        return _jump(decoded)
    target_of = _target(decoded)
    return lambda ctx: branch(ctx, target_of(ctx))


def _call(decoded: Decoded) -> Executor:
    size = -decoded.instruction.stack_pointer_increment
    push, target_of, length = pusher(decoded, size), _target(decoded), decoded.length
    if decoded.bits != 64:
        return _call_legacy(decoded, push, target_of, (1 << 8 * size) - 1)

    def call(ctx: Emulation) -> None:
        words = ctx.words
        target = target_of(ctx)
        if (target + _LOWEST_CANONICAL & MASK64) >> _CANONICAL_BITS:
            check_branch_target(words, target)
        push(ctx, words[RIP] + length & MASK64)
        _go_on(ctx, target)

    return call


def _call_legacy(decoded: Decoded, push: Writer, target_of: Reader, mask: int) -> Executor:
    def call(ctx: Emulation) -> None:
        target = target_of(ctx)
        check_branch_target(ctx.words, target)
        push(ctx, next_rip(ctx.words, decoded) & mask)
        finish(ctx, target)

    return call


def _ret(decoded: Decoded) -> Executor:
    """RET, and RET imm16, which releases that many bytes more."""
    size = decoded.instruction.op_code().operand_size // 8
    released: int = decoded.instruction.stack_pointer_increment
    if decoded.bits != 64:
        return _ret_legacy(size, released - size)
    load_target = top_loader(decoded, size)

    def ret(ctx: Emulation) -> None:
        words = ctx.words
        target = load_target(ctx)
        if (target + _LOWEST_CANONICAL & MASK64) >> _CANONICAL_BITS:
            check_branch_target(words, target)
        words[RSP] = words[RSP] + released & MASK64
        _go_on(ctx, target)

    return ret


def _ret_legacy(size: int, parameters: int) -> Executor:
    def ret(ctx: Emulation) -> None:
        stack = Stack(ctx)
        target = stack.pop(size)
        check_branch_target(ctx.words, target)
        stack.skip(parameters)
        stack.commit()
        finish(ctx, target)

    return ret


def _jcc(decoded: Decoded) -> Executor:
    holds, jump, step = condition_of(decoded), _jump(decoded), _step_over(decoded)

    def jump_if(ctx: Emulation) -> None:
        if holds(ctx.words[RFLAGS]):
            jump(ctx)
        else:
            step(ctx)

    return jump_if


def _jcxz(decoded: Decoded) -> Executor:
    mask, jump, step = _count_mask(decoded), _jump(decoded), _step_over(decoded)

    def jump_if_zero(ctx: Emulation) -> None:
        if ctx.words[RCX] & mask:
            step(ctx)
        else:
            jump(ctx)

    return jump_if_zero


def _loop(decoded: Decoded) -> Executor:
    """LOOP, LOOPE and LOOPNE. The count is as wide as addresses; a 32-bit one clears the upper half of RCX."""
    mask, distance, target_mask = _count_mask(decoded), _distance(decoded), _target_mask(decoded)
    conditional = decoded.instruction.condition_code != ConditionCode.NONE
    holds = condition_of(decoded) if conditional else None

    def loop(ctx: Emulation) -> None:
        words = ctx.words
        target = next_rip(words, decoded)
        if words[RCX] - 1 & mask and (holds is None or holds(words[RFLAGS])):
            target = words[RIP] + distance & target_mask
            check_branch_target(words, target)
        add_to_register(words, RCX, -1, mask)
        finish(ctx, target)

    return loop


def _jump(decoded: Decoded) -> Executor:
    """Branches to the target in the instruction."""
    distance, mask = _distance(decoded), _target_mask(decoded)
    if decoded.bits != 64:
        return lambda ctx: branch(ctx, ctx.words[RIP] + distance & mask)

    def jump(ctx: Emulation) -> None:
        words = ctx.words
        target = words[RIP] + distance & MASK64
        if (target + _LOWEST_CANONICAL & MASK64) >> _CANONICAL_BITS:
            check_branch_target(words, target)
        if words[RFLAGS] & _ENDING_FLAGS or words[INTERRUPT_SHADOW]:
            finish(ctx, target)
        else:
            words[RIP] = target

    return jump


def _step_over(decoded: Decoded) -> Executor:
    length = decoded.length
    if decoded.bits == 64:
        return lambda ctx: _go_on(ctx, ctx.words[RIP] + length & MASK64)
    return lambda ctx: finish(ctx, next_rip(ctx.words, decoded))


def _go_on(ctx: Emulation, rip: int) -> None:
    """``finish()``, quicker where nothing ends with the instruction."""
    words = ctx.words
    if words[RFLAGS] & _ENDING_FLAGS or words[INTERRUPT_SHADOW]:
        finish(ctx, rip)
    else:
        words[RIP] = rip


def _target(decoded: Decoded) -> Reader:
    """Gives the target, unchecked."""
    instruction, memory = decoded.instruction, decoded.operand
    if instruction.op0_kind in _RELATIVE:
        distance, mask = _distance(decoded), _target_mask(decoded)
        return lambda ctx: ctx.words[RIP] + distance & mask
    if instruction.op0_kind != OpKind.REGISTER and (memory is None or memory.size not in _INDIRECT_SIZES):
        raise Unhandleable(f'"{instruction}" is not a near branch')
    return reader(decoded, 0)


def _distance(decoded: Decoded) -> int:
    """The target's distance from the start of the instruction, modulo the operand size."""
    return int(decoded.instruction.near_branch_target)


def _target_mask(decoded: Decoded) -> int:
    return (1 << int(decoded.instruction.op_code().operand_size)) - 1


def _count_mask(decoded: Decoded) -> int:
    return (1 << int(decoded.instruction.op_code().address_size)) - 1


_CONDITIONAL_JUMPS = (
    Mnemonic.JO, Mnemonic.JNO, Mnemonic.JB, Mnemonic.JAE, Mnemonic.JE, Mnemonic.JNE, Mnemonic.JBE, Mnemonic.JA,
    Mnemonic.JS, Mnemonic.JNS, Mnemonic.JP, Mnemonic.JNP, Mnemonic.JL, Mnemonic.JGE, Mnemonic.JLE, Mnemonic.JG,
)  # fmt: skip

#: The builders of this module, by ``iced_x86.Mnemonic``.
TRANSFERS: dict[int, Builder] = {
    Mnemonic.JMP: _jmp,
    Mnemonic.CALL: _call,
    Mnemonic.RET: _ret,
    **dict.fromkeys(_CONDITIONAL_JUMPS, _jcc),
    Mnemonic.JCXZ: _jcxz,
    Mnemonic.JECXZ: _jcxz,
    Mnemonic.JRCXZ: _jcxz,
    Mnemonic.LOOP: _loop,
    Mnemonic.LOOPE: _loop,
    Mnemonic.LOOPNE: _loop,
}
