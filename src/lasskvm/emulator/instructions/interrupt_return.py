"""IRET, IRETD and IRETQ in every mode.

Stack accesses are those of the current privilege level, and descriptor reads are implicit. CS, SS, CPL, RSP and RFLAGS
change when nothing can fault any more; only the blocking of NMIs ends also when IRET faults.

RFLAGS comes from the stack, and that has two consequences for how IRET completes: RF is taken from the image and holds
for the next instruction, and whether IRET is single-stepped depends on the TF that it began with.

Source: Intel SDM volume 2A, IRET/IRETD/IRETQ; volume 3A, 7.7.1 (NMIs), 7.14.3 (64-bit mode), 21.2.7 and 21.3
(virtual-8086 mode); volume 3B, 18.3.1 (RF, TF).
"""

from __future__ import annotations

from iced_x86 import Mnemonic

from lasskvm.emulator.code_segments import return_target
from lasskvm.emulator.completion import Handler, check_branch_target
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.far_returns import return_on_current_stack, return_to_popped_stack
from lasskvm.emulator.faults import Unhandleable, debug_trap, general_protection
from lasskvm.emulator.modes import in_64bit_mode, in_ia32e_mode, in_real_mode, in_virtual_8086_mode
from lasskvm.emulator.segments import real_mode_segment, set_segment, virtual_8086_segment
from lasskvm.emulator.stack import Stack
from lasskvm.emulator.virtual_8086 import has_virtual_interrupts, set_virtual_interrupts
from lasskvm.state import CPL, INTERRUPT_SHADOW, NMI_BLOCKED, RFLAGS, RIP, RSP, Words
from lasskvm.x86.registers import (
    CS,
    DR6_BS,
    DS,
    ES,
    FS,
    GS,
    MASK32,
    MASK64,
    RFLAGS_AC,
    RFLAGS_ARITHMETIC,
    RFLAGS_DF,
    RFLAGS_FIXED,
    RFLAGS_ID,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_IOPL_SHIFT,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VIF,
    RFLAGS_VIP,
    RFLAGS_VM,
    SS,
)

__all__ = ["HANDLERS"]

_SELECTOR = 0xFFFF
_REAL_MODE_LIMIT = 0xFFFF
_LOW_FLAGS = 0xFFFF
_WORD16_BYTES, _WORD32_BYTES = 2, 4
_USER_CPL = 3
#: Flags that any program may change; those above bit 15 only with a 32-bit or 64-bit operand size.
_PROGRAM_FLAGS = (
    RFLAGS_ARITHMETIC | RFLAGS_TF | RFLAGS_DF | RFLAGS_NT | RFLAGS_RF | RFLAGS_AC | RFLAGS_ID
)  # fmt: skip
_REAL_MODE_FLAGS = _PROGRAM_FLAGS | RFLAGS_IF | RFLAGS_IOPL
_VIRTUAL_8086_FLAGS = _PROGRAM_FLAGS | RFLAGS_IF
_SUPERVISOR_FLAGS = RFLAGS_IOPL | RFLAGS_VIF | RFLAGS_VIP
#: What a return to virtual-8086 mode takes from the image: every flag there is.
_ALL_FLAGS = _PROGRAM_FLAGS | RFLAGS_IF | RFLAGS_VM | _SUPERVISOR_FLAGS
#: Segments on the stack above SS, in ascending order, for a return to virtual-8086 mode.
_VIRTUAL_8086_POPS = (ES, DS, FS, GS)


def _iret(ctx: Emulation, decoded: Decoded) -> None:
    words = ctx.words
    if ctx.non_root is None or ctx.non_root.iret_unblocks_nmis:
        words[NMI_BLOCKED] = 0
    size = decoded.instruction.op_code().operand_size // 8
    if in_real_mode(words):
        _return_real(ctx, size, _REAL_MODE_FLAGS)
    elif in_virtual_8086_mode(words):
        is_virtual = has_virtual_interrupts(words, size)
        _return_real(ctx, size, _PROGRAM_FLAGS if is_virtual else _VIRTUAL_8086_FLAGS, is_virtual=is_virtual)
    else:
        _return_protected(ctx, size)


def _return_real(ctx: Emulation, size: int, changeable: int, *, is_virtual: bool = False) -> None:
    """Return in real mode, and from virtual-8086 mode to virtual-8086 mode, where VIF may stand for IF."""
    words = ctx.words
    stack = Stack(ctx)
    rip, selector, image = stack.pop(size), stack.pop(size) & _SELECTOR, stack.pop(size)
    check_branch_target(words, rip)
    if is_virtual:
        set_virtual_interrupts(words, image)
    stack.commit()
    set_segment(words, CS, real_mode_segment(words, CS, selector))
    _finish(words, rip, _merged_flags(words, image, size, changeable))


def _return_protected(ctx: Emulation, size: int) -> None:
    words = ctx.words
    if words[RFLAGS] & RFLAGS_NT:
        if in_ia32e_mode(words):
            raise general_protection()
        raise Unhandleable("IRET with RFLAGS.NT returns to a task, and task switches are not implemented")
    stack = Stack(ctx)
    rip, selector, image = stack.pop(size), stack.pop(size) & _SELECTOR, stack.pop(size)
    if size == _WORD16_BYTES:
        image &= _LOW_FLAGS
    if image & RFLAGS_VM and not words[CPL] and not in_ia32e_mode(words):
        _return_to_virtual_8086_mode(ctx, rip, selector, image, stack)
        return
    target = return_target(words, ctx.memory, selector)
    # What may change is up to the privilege level that IRET is executed at.
    flags = _merged_flags(words, image, size, _changeable_flags(words))
    if target.cpl == words[CPL] and not in_64bit_mode(words):
        rip = return_on_current_stack(ctx, target, rip, stack)
    else:
        rip = return_to_popped_stack(ctx, target, rip, stack, size)
    _finish(words, rip, flags)


def _return_to_virtual_8086_mode(ctx: Emulation, rip: int, selector: int, image: int, stack: Stack) -> None:
    """Return from CPL 0 to virtual-8086 mode: all segment registers come from the stack."""
    words = ctx.words
    if rip > _REAL_MODE_LIMIT:
        raise general_protection()
    pointer, stack_selector = stack.pop(_WORD32_BYTES), stack.pop(_WORD32_BYTES) & _SELECTOR
    data_selectors = [stack.pop(_WORD32_BYTES) & _SELECTOR for _ in _VIRTUAL_8086_POPS]
    set_segment(words, CS, virtual_8086_segment(selector))
    set_segment(words, SS, virtual_8086_segment(stack_selector))
    for number, data_selector in zip(_VIRTUAL_8086_POPS, data_selectors, strict=True):
        set_segment(words, number, virtual_8086_segment(data_selector))
    words[RSP] = pointer & MASK32
    words[CPL] = _USER_CPL
    _finish(words, rip, image & _ALL_FLAGS | RFLAGS_FIXED)


def _changeable_flags(words: Words) -> int:
    """The flags that IRET may change in protected and IA-32e mode; the others stay, without a fault."""
    flags = _PROGRAM_FLAGS
    if words[CPL] <= (words[RFLAGS] & RFLAGS_IOPL) >> RFLAGS_IOPL_SHIFT:
        flags |= RFLAGS_IF
    if not words[CPL]:
        flags |= _SUPERVISOR_FLAGS
    return flags


def _merged_flags(words: Words, image: int, size: int, changeable: int) -> int:
    if size == _WORD16_BYTES:
        changeable &= _LOW_FLAGS
    return words[RFLAGS] & (MASK64 ^ changeable) | image & changeable


def _finish(words: Words, rip: int, rflags: int) -> None:
    """Complete IRET, with RF as it is in *rflags*."""
    was_stepped = words[RFLAGS] & RFLAGS_TF
    words[RIP] = rip
    words[RFLAGS] = rflags
    words[INTERRUPT_SHADOW] = 0
    if was_stepped:
        raise debug_trap(DR6_BS)


#: The handlers of this module, by ``iced_x86.Mnemonic``.
HANDLERS: dict[int, Handler] = {
    Mnemonic.IRET: _iret,
    Mnemonic.IRETD: _iret,
    Mnemonic.IRETQ: _iret,
}
