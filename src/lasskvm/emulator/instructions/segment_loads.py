"""MOV, PUSH and POP of segment registers, and LDS, LES, LFS, LGS and LSS.

Each function is a :data:`~lasskvm.emulator.completion.Handler`. The checks on selectors and descriptors are in
:mod:`lasskvm.emulator.segments`; the descriptor reads are implicit accesses.

Source: Intel SDM volume 2, MOV, PUSH, POP, LDS/LES/LFS/LGS/LSS; volume 3A, 7.8.3 (shadow of MOV SS and POP SS); KVM's
``em_mov_sreg_rm()``, ``em_push_sreg()``, ``em_pop_sreg()`` and ``em_lseg()``.
"""

from __future__ import annotations

from iced_x86 import Code, Mnemonic

from lasskvm.emulator.completion import Handler, complete, next_rip
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import SEGMENT_NUMBERS, Decoded
from lasskvm.emulator.far_pointers import far_pointer
from lasskvm.emulator.operands import read_operand, write_operand, write_register
from lasskvm.emulator.segments import load_segment, loaded_segment, set_segment
from lasskvm.emulator.stack import Stack
from lasskvm.state import INTERRUPT_SHADOW, RFLAGS, RIP, SELECTOR, segment_word
from lasskvm.x86.registers import DS, ES, FS, GS, RFLAGS_RF, SS

__all__ = ["BY_CODE", "HANDLERS"]

_SELECTOR = 0xFFFF
#: Segment registers that a far pointer is loaded into.
_POINTER_SEGMENTS: dict[int, int] = {
    Mnemonic.LDS: DS,
    Mnemonic.LES: ES,
    Mnemonic.LFS: FS,
    Mnemonic.LGS: GS,
    Mnemonic.LSS: SS,
}


def _mov_to_segment(ctx: Emulation, decoded: Decoded) -> None:
    """MOV to a segment register: 16 bits of the source count, and of memory no more are read."""
    number = SEGMENT_NUMBERS[decoded.instruction.op0_register]
    load_segment(ctx.words, ctx.memory, number, read_operand(ctx, decoded, 1) & _SELECTOR)
    _complete_load(ctx, decoded, number)


def _mov_from_segment(ctx: Emulation, decoded: Decoded) -> None:
    """MOV from a segment register: 16 bits to memory, zero-extended to a wider register."""
    number = SEGMENT_NUMBERS[decoded.instruction.op1_register]
    write_operand(ctx, decoded, 0, ctx.words[segment_word(number, SELECTOR)])
    complete(ctx, decoded)


def _push_segment(ctx: Emulation, decoded: Decoded) -> None:
    """PUSH of a segment register writes the whole slot, as direct execution does.

    The manual leaves open whether the upper half of a 32-bit slot is written.
    """
    instruction = decoded.instruction
    number = SEGMENT_NUMBERS[instruction.op0_register]
    stack = Stack(ctx)
    stack.push(-instruction.stack_pointer_increment, ctx.words[segment_word(number, SELECTOR)])
    stack.commit()
    complete(ctx, decoded)


def _pop_segment(ctx: Emulation, decoded: Decoded) -> None:
    instruction = decoded.instruction
    number = SEGMENT_NUMBERS[instruction.op0_register]
    stack = Stack(ctx)
    selector = stack.pop(instruction.stack_pointer_increment) & _SELECTOR
    segment = loaded_segment(ctx.words, ctx.memory, number, selector)
    # POP SS moves the stack pointer by the width that the stack had.
    stack.commit()
    set_segment(ctx.words, number, segment)
    _complete_load(ctx, decoded, number)


def _load_far_pointer(ctx: Emulation, decoded: Decoded) -> None:
    """LDS and its kin. LSS has no shadow: it loads SS and the stack pointer at once."""
    instruction = decoded.instruction
    selector, offset = far_pointer(ctx, decoded)
    load_segment(ctx.words, ctx.memory, _POINTER_SEGMENTS[instruction.mnemonic], selector)
    write_register(ctx.words, instruction.op0_register, offset)
    complete(ctx, decoded)


def _complete_load(ctx: Emulation, decoded: Decoded, number: int) -> None:
    """Complete a load of segment register *number*.

    Behind a load of SS, interrupts and debug exceptions wait for one more instruction, the single-step trap among
    them; of consecutive loads only the first has that shadow.
    """
    if number != SS:
        complete(ctx, decoded)
        return
    words = ctx.words
    words[RIP] = next_rip(words, decoded)
    words[RFLAGS] &= ~RFLAGS_RF
    words[INTERRUPT_SHADOW] ^= 1


#: The handlers of this module, by ``iced_x86.Mnemonic``.
HANDLERS: dict[int, Handler] = dict.fromkeys(_POINTER_SEGMENTS, _load_far_pointer)

_MOVES_TO_SEGMENTS = (Code.MOV_SREG_RM16, Code.MOV_SREG_R32M16, Code.MOV_SREG_R64M16)
_MOVES_FROM_SEGMENTS = (Code.MOV_RM16_SREG, Code.MOV_R32M16_SREG, Code.MOV_R64M16_SREG)
_PUSHES = (
    Code.PUSHW_ES, Code.PUSHW_CS, Code.PUSHW_SS, Code.PUSHW_DS, Code.PUSHW_FS, Code.PUSHW_GS,
    Code.PUSHD_ES, Code.PUSHD_CS, Code.PUSHD_SS, Code.PUSHD_DS, Code.PUSHD_FS, Code.PUSHD_GS,
    Code.PUSHQ_FS, Code.PUSHQ_GS,
)  # fmt: skip
_POPS = (
    Code.POPW_ES, Code.POPW_SS, Code.POPW_DS, Code.POPW_FS, Code.POPW_GS,
    Code.POPD_ES, Code.POPD_SS, Code.POPD_DS, Code.POPD_FS, Code.POPD_GS,
    Code.POPQ_FS, Code.POPQ_GS,
)  # fmt: skip

#: The forms of MOV, PUSH and POP that belong here, by ``iced_x86.Code``.
BY_CODE: dict[int, Handler] = {
    **dict.fromkeys(_MOVES_TO_SEGMENTS, _mov_to_segment),
    **dict.fromkeys(_MOVES_FROM_SEGMENTS, _mov_from_segment),
    **dict.fromkeys(_PUSHES, _push_segment),
    **dict.fromkeys(_POPS, _pop_segment),
}
