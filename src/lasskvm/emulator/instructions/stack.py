"""Instructions on the stack, and those on RFLAGS that IOPL guards: PUSH, POP, PUSHF, ENTER, LEAVE, CLI, STI and kin.

The primitives are those of :mod:`lasskvm.emulator.stack`. PUSH and POP of segment registers are not here.

Source: Intel SDM volume 2, the instructions by name; volume 3A, 7.8.1 and 21.2.5 (IOPL), 7.8.3 (shadow of STI);
KVM's ``em_push()``, ``emulate_popf()``, ``em_enter()`` and ``em_sti()``.
"""

from __future__ import annotations

from iced_x86 import Mnemonic, OpKind, Register

from lasskvm.emulator.accessors import immediate, memory_storer, reader, register_writer
from lasskvm.emulator.completion import Handler, complete, next_rip
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import touch
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import Interruption, debug_trap, general_protection
from lasskvm.emulator.modes import in_real_mode, in_virtual_8086_mode
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.emulator.stack import (
    Stack,
    pusher,
    set_stack_pointer,
    set_stack_register,
    stack_flags,
    stack_loader,
    top_loader,
)
from lasskvm.emulator.virtual_8086 import (
    flags_with_virtual_interrupts,
    has_virtual_interrupts,
    set_virtual_interrupts,
)
from lasskvm.lass import WRITE
from lasskvm.state import (
    CPL,
    CR4,
    INTERRUPT_SHADOW,
    RAX,
    RBP,
    RBX,
    RCX,
    RDI,
    RDX,
    RFLAGS,
    RIP,
    RSI,
    RSP,
    Words,
)
from lasskvm.x86.registers import (
    CR4_PVI,
    DR6_BS,
    MASK64,
    RFLAGS_AC,
    RFLAGS_ARITHMETIC,
    RFLAGS_DF,
    RFLAGS_ID,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_IOPL_SHIFT,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VM,
    SS,
)

__all__ = ["HANDLERS", "PLAIN"]

_USER_CPL = 3
_V86_IOPL = 3
#: CLI and STI have no operand; virtual interrupts are there for both sizes.
_ANY_SIZE = 2
_NESTING_LEVELS = 32
#: In the order of PUSHA.
_ALL_REGISTERS = (RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI)
#: What POPF changes at any privilege level.
_POPF_FLAGS = RFLAGS_ARITHMETIC | RFLAGS_TF | RFLAGS_DF | RFLAGS_NT | RFLAGS_AC | RFLAGS_ID


# ----------------------------------------------------------------------------------------------- PUSH and POP


def _push(decoded: Decoded) -> Executor:
    instruction = decoded.instruction
    size = -instruction.stack_pointer_increment
    push = pusher(decoded, size)
    if instruction.op0_kind in (OpKind.REGISTER, OpKind.MEMORY):
        read = reader(decoded, 0)
        return lambda ctx: push(ctx, read(ctx))
    value = immediate(instruction, 0, size)
    return lambda ctx: push(ctx, value)


def _pop(decoded: Decoded) -> Executor:
    """POP. The address of a memory operand based on RSP counts from the RSP behind the pop."""
    instruction = decoded.instruction
    size: int = instruction.stack_pointer_increment
    load_top = top_loader(decoded, size)
    release = _releaser(decoded, size)
    if instruction.op0_kind == OpKind.REGISTER:
        write_register = register_writer(instruction.op0_register)

        def pop(ctx: Emulation) -> None:
            value = load_top(ctx)
            release(ctx)
            write_register(ctx, value)

        return pop
    store_operand = memory_storer(decoded, size)

    def pop_to_memory(ctx: Emulation) -> None:
        words = ctx.words
        value, pointer = load_top(ctx), words[RSP]
        release(ctx)
        try:
            store_operand(ctx, value)
        except Interruption:
            words[RSP] = pointer
            raise

    return pop_to_memory


def _releaser(decoded: Decoded, size: int) -> Executor:
    """Moves the stack pointer up by *size* bytes."""

    def release_flat(ctx: Emulation) -> None:
        words = ctx.words
        words[RSP] = words[RSP] + size & MASK64

    def release(ctx: Emulation) -> None:
        set_stack_pointer(ctx.words, ctx.words[RSP] + size)

    return release_flat if decoded.bits == 64 else release


def _pusha(decoded: Decoded) -> Executor:
    """PUSHA: the RSP that is pushed is the one before."""
    size = -decoded.instruction.stack_pointer_increment // len(_ALL_REGISTERS)

    def push_all(ctx: Emulation) -> None:
        stack = Stack(ctx)
        for register in _ALL_REGISTERS:
            stack.push(size, ctx.words[register])
        stack.commit()

    return push_all


def _popa(decoded: Decoded) -> Executor:
    """POPA: the place of RSP is skipped."""
    size = decoded.instruction.stack_pointer_increment // len(_ALL_REGISTERS)
    kept = MASK64 ^ (1 << 8 * size) - 1 if size == 2 else 0

    def pop_all(ctx: Emulation) -> None:
        words, stack = ctx.words, Stack(ctx)
        values = {}
        for register in reversed(_ALL_REGISTERS):
            if register == RSP:
                stack.skip(size)
            else:
                values[register] = stack.pop(size)
        stack.commit()
        for register, value in values.items():
            words[register] = words[register] & kept | value

    return pop_all


# ---------------------------------------------------------------------------------------------- stack frames


def _enter(decoded: Decoded) -> Executor:
    """ENTER. It ends with the checks of a write at the new top of the stack, which nothing is written to."""
    instruction = decoded.instruction
    size = instruction.op_code().operand_size // 8
    allocated, level = instruction.immediate16, instruction.immediate8_2nd % _NESTING_LEVELS

    def enter(ctx: Emulation) -> None:
        words, stack = ctx.words, Stack(ctx)
        stack.push(size, words[RBP])
        frame = stack.pointer
        for number in range(1, level):
            # The push before faults before this load does.
            stack.check()
            stack.push(size, stack.load(words[RBP] - size * number, size))
        if level:
            stack.push(size, frame)
        stack.skip(-allocated)
        stack.check()
        hits = ctx.watch_hits
        touch(ctx, SS, stack.pointer, size, stack_flags(words) | WRITE)
        ctx.watch_hits = hits
        stack.commit()
        set_stack_register(words, RBP, frame)

    return enter


def _leave(decoded: Decoded) -> Executor:
    size = decoded.instruction.op_code().operand_size // 8
    load_frame = stack_loader(decoded, size, RBP)
    write_rbp = register_writer({2: Register.BP, 4: Register.EBP, 8: Register.RBP}[size])
    if decoded.bits == 64:

        def leave(ctx: Emulation) -> None:
            words = ctx.words
            value = load_frame(ctx)
            words[RSP] = words[RBP] + size & MASK64
            write_rbp(ctx, value)

        return leave

    def leave_legacy(ctx: Emulation) -> None:
        value = load_frame(ctx)
        set_stack_pointer(ctx.words, ctx.words[RBP] + size)
        write_rbp(ctx, value)

    return leave_legacy


# ----------------------------------------------------------------------------------------------------- RFLAGS


def _pushf(ctx: Emulation, decoded: Decoded) -> None:
    """PUSHF: RF and VM are pushed as 0."""
    words = ctx.words
    size = -decoded.instruction.stack_pointer_increment
    is_virtual = has_virtual_interrupts(words, size)
    flags = flags_with_virtual_interrupts(words) if is_virtual else words[RFLAGS]
    stack = Stack(ctx)
    stack.push(size, flags & ~(RFLAGS_RF | RFLAGS_VM))
    stack.commit()
    complete(ctx, decoded)


def _popf(ctx: Emulation, decoded: Decoded) -> None:
    """POPF: flags that this privilege level may not change stay as they are, without a fault.

    It is single-stepped by the TF that it began with.
    """
    words = ctx.words
    size: int = decoded.instruction.stack_pointer_increment
    is_virtual = has_virtual_interrupts(words, size)
    stack = Stack(ctx)
    value = stack.pop(size)
    if is_virtual:
        set_virtual_interrupts(words, value)
    stack.commit()
    before = words[RFLAGS]
    changed = (_POPF_FLAGS if is_virtual else _popf_flags(words)) & (1 << 8 * size) - 1
    words[RFLAGS] = (before & (MASK64 ^ changed) | value & changed) & ~RFLAGS_RF
    words[RIP] = next_rip(words, decoded)
    words[INTERRUPT_SHADOW] = 0
    if before & RFLAGS_TF:
        raise debug_trap(DR6_BS)


def _popf_flags(words: Words) -> int:
    """The flags that POPF may change: IF where CLI may, IOPL at CPL 0 only."""
    if in_virtual_8086_mode(words):
        return _POPF_FLAGS | RFLAGS_IF
    if in_real_mode(words) or not words[CPL]:
        return _POPF_FLAGS | RFLAGS_IF | RFLAGS_IOPL
    if words[CPL] <= _iopl(words):
        return _POPF_FLAGS | RFLAGS_IF
    return _POPF_FLAGS


def _cli(ctx: Emulation, decoded: Decoded) -> None:
    words = ctx.words
    if _is_for_virtual_interrupts(words):
        set_virtual_interrupts(words, 0)
    else:
        words[RFLAGS] &= ~RFLAGS_IF
    complete(ctx, decoded)


def _sti(ctx: Emulation, decoded: Decoded) -> None:
    """STI: interrupts that it enables wait for one more instruction; virtual ones do not."""
    words = ctx.words
    if _is_for_virtual_interrupts(words):
        set_virtual_interrupts(words, RFLAGS_IF)
        complete(ctx, decoded)
        return
    enables = not words[RFLAGS] & RFLAGS_IF
    words[RFLAGS] |= RFLAGS_IF
    complete(ctx, decoded)
    words[INTERRUPT_SHADOW] = int(enables)


def _is_for_virtual_interrupts(words: Words) -> bool:
    """Whether CLI and STI change VIF, not IF; #GP(0) above the privilege level that IOPL gives I/O to."""
    if has_virtual_interrupts(words, _ANY_SIZE):
        return True
    if in_real_mode(words) or in_virtual_8086_mode(words) or words[CPL] <= _iopl(words):
        return False
    if words[CPL] == _USER_CPL and words[CR4] & CR4_PVI:
        return True
    raise general_protection()


def _iopl(words: Words) -> int:
    return (words[RFLAGS] & RFLAGS_IOPL) >> RFLAGS_IOPL_SHIFT


#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    Mnemonic.PUSH: _push,
    Mnemonic.POP: _pop,
    Mnemonic.PUSHA: _pusha,
    Mnemonic.PUSHAD: _pusha,
    Mnemonic.POPA: _popa,
    Mnemonic.POPAD: _popa,
    Mnemonic.ENTER: _enter,
    Mnemonic.LEAVE: _leave,
}
#: The handlers of this module, by ``iced_x86.Mnemonic``.
HANDLERS: dict[int, Handler] = {
    Mnemonic.PUSHF: _pushf,
    Mnemonic.PUSHFD: _pushf,
    Mnemonic.PUSHFQ: _pushf,
    Mnemonic.POPF: _popf,
    Mnemonic.POPFD: _popf,
    Mnemonic.POPFQ: _popf,
    Mnemonic.CLI: _cli,
    Mnemonic.STI: _sti,
}
