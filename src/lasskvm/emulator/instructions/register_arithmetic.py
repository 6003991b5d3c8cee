"""The additions, subtractions, comparisons and logical operations that guests execute most: on whole registers.

They do what :mod:`lasskvm.emulator.instructions.arithmetic` does for operands of any kind, in one function each,
without accessors: half of the instructions of a typical loop are here, and every call would cost a tenth of its time.
The functions differ in little; what they share is in the constants that :class:`_Form` has worked out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lasskvm.emulator.accessors import operand_bytes
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.flags import CARRIES, KEPT, PARITY, SF_BIT
from lasskvm.emulator.instructions.forms import constant, whole_register
from lasskvm.emulator.operation import Executor
from lasskvm.state import RFLAGS
from lasskvm.x86.registers import RFLAGS_AF, RFLAGS_CF, RFLAGS_PF, RFLAGS_SF, RFLAGS_ZF

__all__ = [
    "add_whole",
    "compare_whole",
    "logic_whole",
    "step_whole",
    "subtract_whole",
    "test_whole",
    "zero_whole",
]

_BYTE = 0xFF
_ZERO_RESULT = RFLAGS_ZF | RFLAGS_PF
_KEPT_BY_STEPS = KEPT | RFLAGS_CF


@dataclass(frozen=True, slots=True)
class _Form:
    """Operand 0 is the register in state word ``target``; operand 1 the one in ``source``, or ``value``.

    ``mask`` covers the operand size, ``sign`` is the number of its sign bit, ``to_sf`` the way from there to SF.
    """

    target: int
    source: int | None
    value: int
    mask: int
    sign: int
    to_sf: int


def _form(decoded: Decoded) -> _Form | None:
    target = whole_register(decoded, 0)
    if target is None:
        return None
    bits = 8 * operand_bytes(decoded, 0)
    mask, sign, to_sf = (1 << bits) - 1, bits - 1, bits - 1 - SF_BIT
    if decoded.instruction.op_count == 1:
        return _Form(target, None, 1, mask, sign, to_sf)
    source, value = whole_register(decoded, 1), constant(decoded, 1)
    if source is None and value is None:
        return None
    return _Form(target, source, value or 0, mask, sign, to_sf)


def add_whole(decoded: Decoded) -> Executor | None:
    """ADD of a register or an immediate to a register; None where the operands are others, here and below."""
    form = _form(decoded)
    if form is None:
        return None
    target, mask, sign, to_sf = form.target, form.mask, form.sign, form.to_sf
    if form.source is None:
        addend = form.value

        def add_constant(ctx: Emulation) -> None:
            words = ctx.words
            value = words[target] & mask
            total = value + addend
            carries = value ^ addend ^ total
            words[target] = result = total & mask
            words[RFLAGS] = (
                words[RFLAGS] & KEPT
                | CARRIES[carries >> sign]
                | carries & RFLAGS_AF
                | PARITY[result & _BYTE]
                | (result >> to_sf & RFLAGS_SF if result else RFLAGS_ZF)
            )

        return add_constant
    source = form.source

    def add(ctx: Emulation) -> None:
        words = ctx.words
        value, addend = words[target] & mask, words[source] & mask
        total = value + addend
        carries = value ^ addend ^ total
        words[target] = result = total & mask
        words[RFLAGS] = (
            words[RFLAGS] & KEPT
            | CARRIES[carries >> sign]
            | carries & RFLAGS_AF
            | PARITY[result & _BYTE]
            | (result >> to_sf & RFLAGS_SF if result else RFLAGS_ZF)
        )

    return add


def subtract_whole(decoded: Decoded) -> Executor | None:
    """SUB of a register or an immediate from a register."""
    form = _form(decoded)
    if form is None:
        return None
    target, mask, sign, to_sf = form.target, form.mask, form.sign, form.to_sf
    if form.source is None:
        subtrahend = form.value

        def subtract_constant(ctx: Emulation) -> None:
            words = ctx.words
            value = words[target] & mask
            difference = value - subtrahend
            borrows = value ^ subtrahend ^ difference
            words[target] = result = difference & mask
            words[RFLAGS] = (
                words[RFLAGS] & KEPT
                | CARRIES[borrows >> sign]
                | borrows & RFLAGS_AF
                | PARITY[result & _BYTE]
                | (result >> to_sf & RFLAGS_SF if result else RFLAGS_ZF)
            )

        return subtract_constant
    source = form.source

    def subtract(ctx: Emulation) -> None:
        words = ctx.words
        value, subtrahend = words[target] & mask, words[source] & mask
        difference = value - subtrahend
        borrows = value ^ subtrahend ^ difference
        words[target] = result = difference & mask
        words[RFLAGS] = (
            words[RFLAGS] & KEPT
            | CARRIES[borrows >> sign]
            | borrows & RFLAGS_AF
            | PARITY[result & _BYTE]
            | (result >> to_sf & RFLAGS_SF if result else RFLAGS_ZF)
        )

    return subtract


def compare_whole(decoded: Decoded) -> Executor | None:
    """CMP of a register with a register or an immediate."""
    form = _form(decoded)
    if form is None:
        return None
    target, mask, sign, to_sf = form.target, form.mask, form.sign, form.to_sf
    if form.source is None:
        subtrahend = form.value

        def compare_constant(ctx: Emulation) -> None:
            words = ctx.words
            value = words[target] & mask
            difference = value - subtrahend
            borrows = value ^ subtrahend ^ difference
            words[RFLAGS] = (
                words[RFLAGS] & KEPT
                | CARRIES[borrows >> sign]
                | borrows & RFLAGS_AF
                | PARITY[difference & _BYTE]
                | (difference >> to_sf & RFLAGS_SF if difference else RFLAGS_ZF)
            )

        return compare_constant
    source = form.source

    def compare(ctx: Emulation) -> None:
        words = ctx.words
        value, subtrahend = words[target] & mask, words[source] & mask
        difference = value - subtrahend
        borrows = value ^ subtrahend ^ difference
        words[RFLAGS] = (
            words[RFLAGS] & KEPT
            | CARRIES[borrows >> sign]
            | borrows & RFLAGS_AF
            | PARITY[difference & _BYTE]
            | (difference >> to_sf & RFLAGS_SF if difference else RFLAGS_ZF)
        )

    return compare


def logic_whole(decoded: Decoded, operation: Callable[[int, int], int]) -> Executor | None:
    """AND, OR or XOR (*operation*) of a register with a register or an immediate."""
    form = _form(decoded)
    if form is None:
        return None
    target, mask, to_sf = form.target, form.mask, form.to_sf
    if form.source is None:
        operand = form.value

        def combine_constant(ctx: Emulation) -> None:
            words = ctx.words
            words[target] = result = operation(words[target] & mask, operand)
            words[RFLAGS] = (
                words[RFLAGS] & KEPT
                | PARITY[result & _BYTE]
                | (result >> to_sf & RFLAGS_SF if result else RFLAGS_ZF)
            )

        return combine_constant
    source = form.source

    def combine(ctx: Emulation) -> None:
        words = ctx.words
        words[target] = result = operation(words[target], words[source]) & mask
        words[RFLAGS] = (
            words[RFLAGS] & KEPT
            | PARITY[result & _BYTE]
            | (result >> to_sf & RFLAGS_SF if result else RFLAGS_ZF)
        )

    return combine


def test_whole(decoded: Decoded) -> Executor | None:
    """TEST of a register with a register or an immediate."""
    form = _form(decoded)
    if form is None:
        return None
    target, mask, to_sf = form.target, form.mask, form.to_sf
    if form.source is None:
        operand = form.value

        def test_constant(ctx: Emulation) -> None:
            words = ctx.words
            result = words[target] & operand
            words[RFLAGS] = (
                words[RFLAGS] & KEPT
                | PARITY[result & _BYTE]
                | (result >> to_sf & RFLAGS_SF if result else RFLAGS_ZF)
            )

        return test_constant
    source = form.source

    def test(ctx: Emulation) -> None:
        words = ctx.words
        result = words[target] & words[source] & mask
        words[RFLAGS] = (
            words[RFLAGS] & KEPT
            | PARITY[result & _BYTE]
            | (result >> to_sf & RFLAGS_SF if result else RFLAGS_ZF)
        )

    return test


def zero_whole(decoded: Decoded) -> Executor | None:
    """XOR or SUB of a register with itself: how compilers clear one."""
    form = _form(decoded)
    if form is None or form.source != form.target:
        return None
    target = form.target

    def zero(ctx: Emulation) -> None:
        words = ctx.words
        words[target] = 0
        words[RFLAGS] = words[RFLAGS] & KEPT | _ZERO_RESULT

    return zero


def step_whole(decoded: Decoded, step: int) -> Executor | None:
    """INC (*step* 1) or DEC (*step* -1) of a register. Both leave CF."""
    form = _form(decoded)
    if form is None:
        return None
    target, mask, sign, to_sf = form.target, form.mask, form.sign, form.to_sf

    def run(ctx: Emulation) -> None:
        words = ctx.words
        value = words[target] & mask
        total = value + step
        carries = value ^ 1 ^ total
        words[target] = result = total & mask
        words[RFLAGS] = (
            words[RFLAGS] & _KEPT_BY_STEPS
            | CARRIES[carries >> sign] & ~RFLAGS_CF
            | carries & RFLAGS_AF
            | PARITY[result & _BYTE]
            | (result >> to_sf & RFLAGS_SF if result else RFLAGS_ZF)
        )

    return run
