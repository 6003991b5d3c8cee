"""The x87 register stack, its exceptions, and the frame of the instructions on it.

An exception that is masked gets a default result; an unmasked one leaves the destination alone (or, when it is noticed
only behind the computation, mostly not) and sets FSW.ES, for which the next waiting instruction raises #MF.

Source: Intel SDM volume 1, 8.1.2 (register stack), 8.1.8 (last instruction), 8.4 and 8.5 (exceptions).
"""

from __future__ import annotations

from collections.abc import Callable

from lasskvm.emulator.accessors import address_of
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.fpu import X87_REGISTERS, Fpu
from lasskvm.emulator.instructions.availability import check_x87
from lasskvm.emulator.operation import Executor
from lasskvm.emulator.softfloat import EXTENDED, indefinite
from lasskvm.state import RIP, SELECTOR, segment_word
from lasskvm.x86.fpu import (
    EXCEPTION_DE,
    EXCEPTION_IE,
    EXCEPTION_OE,
    EXCEPTION_UE,
    EXCEPTION_ZE,
    EXCEPTIONS,
    FCW_RC_SHIFT,
    FSW_B,
    FSW_C1,
    FSW_ES,
    FSW_SF,
    ROUNDING_MASK,
)
from lasskvm.x86.registers import CS

__all__ = [
    "INDEFINITE",
    "OVERFLOW",
    "UNDERFLOW",
    "blocks_result",
    "blocks_store",
    "free",
    "instruction",
    "is_empty",
    "pop",
    "push",
    "rounding",
    "set_st",
    "signal",
    "st",
    "unmasked",
]

#: The default result of an invalid operation.
INDEFINITE = indefinite(EXTENDED)
#: A push onto a register in use, and a read of an empty one.
OVERFLOW = EXCEPTION_IE | FSW_SF | FSW_C1
UNDERFLOW = EXCEPTION_IE | FSW_SF

_CS_SELECTOR = segment_word(CS, SELECTOR)
_NUMBER_MASK = X87_REGISTERS - 1
_BEFORE_COMPUTATION = EXCEPTION_IE | EXCEPTION_DE | EXCEPTION_ZE

Body = Callable[[Emulation, Fpu], None]


def instruction(decoded: Decoded, body: Body) -> Executor:
    """*body* behind the checks of an x87 instruction; C1 is clear unless the body sets it.

    Where it is, and where its operand is in memory, is noted for handlers of exceptions.
    """
    operand = decoded.operand

    def run(ctx: Emulation) -> None:
        check_x87(ctx)
        fpu, words = ctx.fpu, ctx.words
        body(ctx, fpu)
        fpu.fip, fpu.fcs = words[RIP], words[_CS_SELECTOR]

    if operand is None:
        return run
    offset_of, selector = address_of(decoded), segment_word(operand.segment, SELECTOR)

    def run_with_operand(ctx: Emulation) -> None:
        run(ctx)
        fpu, words = ctx.fpu, ctx.words
        fpu.fdp, fpu.fds = offset_of(words), words[selector]

    return run_with_operand


def st(fpu: Fpu, number: int) -> int:
    """``ST(number)``, whether it is in use or not."""
    return fpu.registers[fpu.top + number & _NUMBER_MASK]


def set_st(fpu: Fpu, number: int, value: int) -> None:
    """Set ``ST(number)``, which is in use from now on."""
    physical = fpu.top + number & _NUMBER_MASK
    fpu.registers[physical] = value
    fpu.ftw |= 1 << physical


def is_empty(fpu: Fpu, number: int) -> bool:
    """Whether ``ST(number)`` is not in use."""
    return not fpu.ftw >> (fpu.top + number & _NUMBER_MASK) & 1


def free(fpu: Fpu, number: int) -> None:
    """Make ``ST(number)`` empty; it keeps its bits."""
    fpu.ftw &= ~(1 << (fpu.top + number & _NUMBER_MASK))


def push(fpu: Fpu, value: int, flags: int = 0) -> None:
    """Push *value*, computed with exceptions *flags*, or what a stack overflow or an exception makes of it."""
    if not is_empty(fpu, _NUMBER_MASK):
        value, flags = INDEFINITE, OVERFLOW
    blocked = blocks_result(fpu, flags)
    signal(fpu, flags)
    if not blocked:
        fpu.top = fpu.top - 1 & _NUMBER_MASK
        set_st(fpu, 0, value)


def pop(fpu: Fpu) -> None:
    """Pop ST(0)."""
    free(fpu, 0)
    fpu.top = fpu.top + 1 & _NUMBER_MASK


def rounding(fpu: Fpu) -> int:
    """The rounding control (``ROUND_*``)."""
    return fpu.fcw >> FCW_RC_SHIFT & ROUNDING_MASK


def unmasked(fpu: Fpu) -> int:
    """The exceptions that are not masked."""
    return ~fpu.fcw & EXCEPTIONS


def blocks_result(fpu: Fpu, flags: int) -> bool:
    """Whether *flags* hold an unmasked exception that leaves a register destination as it was."""
    return flags & ~fpu.fcw & _BEFORE_COMPUTATION != 0


def blocks_store(fpu: Fpu, flags: int) -> bool:
    """The same for a destination in memory, which is not written for unmasked overflow and underflow either."""
    return flags & ~fpu.fcw & (_BEFORE_COMPUTATION | EXCEPTION_OE | EXCEPTION_UE) != 0


def signal(fpu: Fpu, flags: int) -> None:
    """Note exceptions in the status word, with SF and C1, which is cleared if it is not among *flags*."""
    status = fpu.fsw & ~FSW_C1 | flags
    if flags & ~fpu.fcw & EXCEPTIONS:
        status |= FSW_ES | FSW_B
    fpu.fsw = status
