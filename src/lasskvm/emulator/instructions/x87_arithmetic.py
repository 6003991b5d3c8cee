"""x87 arithmetic and comparisons, exact and rounded as the control word says.

Each function is a builder of plain instructions (:mod:`lasskvm.emulator.operation`). Transcendental functions, FPREM,
FSCALE and FXTRACT are not among them.

Source: Intel SDM volume 2, the instructions by name; volume 1, 4.8.3.5 (which NaN results), 4.9.2 (which exception
comes first), 8.1.5.2 (precision control).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from iced_x86 import Mnemonic

from lasskvm.emulator.accessors import memory_loader, operand_bytes
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.flags import KEPT
from lasskvm.emulator.fpu import Fpu
from lasskvm.emulator.instructions.forms import is_memory
from lasskvm.emulator.instructions.x87 import stack_number
from lasskvm.emulator.instructions.x87_stack import (
    INDEFINITE,
    UNDERFLOW,
    blocks_result,
    instruction,
    is_empty,
    pop,
    rounding,
    set_st,
    signal,
    st,
    unmasked,
)
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.emulator.softfloat import (
    DOUBLE,
    EXTENDED,
    FINITE,
    INFINITY,
    QNAN,
    SINGLE,
    SNAN,
    UNSUPPORTED,
    ZERO,
    Number,
    add,
    compare,
    divide,
    from_integer,
    is_nan,
    multiply,
    pack_nan,
    round_number,
    square_root,
    to_integer,
    unpack,
    zero,
)
from lasskvm.state import RFLAGS
from lasskvm.x86.fpu import (
    EXCEPTION_DE,
    EXCEPTION_IE,
    FCW_PC_SHIFT,
    FSW_C0,
    FSW_C1,
    FSW_C2,
    FSW_C3,
    FSW_CONDITIONS,
)
from lasskvm.x86.registers import RFLAGS_CF, RFLAGS_PF, RFLAGS_ZF

__all__ = ["PLAIN"]

#: Bits of precision by the control word's PC field; 01 is reserved.
_PRECISIONS = (24, 64, 53, 64)
_PRECISION_MASK = 3
_FLOATS = {4: SINGLE, 8: DOUBLE}

#: An operation: left, right, rounding; a number and exceptions.
Operation = Callable[[Number, Number, int], tuple[Number, int]]
#: Gives an operand as a number, and whether it is an empty register.
Source = Callable[[Emulation, Fpu], tuple[Number, bool]]


def _subtract(left: Number, right: Number, mode: int) -> tuple[Number, int]:
    return add(left, right._replace(sign=right.sign ^ 1), mode)


def _multiply(left: Number, right: Number, mode: int) -> tuple[Number, int]:
    return multiply(left, right)


def _divide(left: Number, right: Number, mode: int) -> tuple[Number, int]:
    return divide(left, right)


def _reversed(operation: Operation) -> Operation:
    return lambda left, right, mode: operation(right, left, mode)


# -------------------------------------------------------------------------------------------------------- operands


def _stack_source(number: int) -> Source:
    return lambda ctx, fpu: (unpack(EXTENDED, st(fpu, number)), is_empty(fpu, number))


def _memory_source(decoded: Decoded, is_integer: bool) -> Source:
    size = operand_bytes(decoded, 0)
    load = memory_loader(decoded, size)
    if not is_integer:
        form = _FLOATS[size]
        return lambda ctx, fpu: (unpack(form, load(ctx)), False)
    sign = 1 << 8 * size - 1
    return lambda ctx, fpu: (from_integer((load(ctx) ^ sign) - sign), False)


def _sources(decoded: Decoded, is_integer: bool) -> tuple[int, Source]:
    """Which register is the destination, and where the other operand comes from."""
    if is_memory(decoded, 0):
        return 0, _memory_source(decoded, is_integer)
    return stack_number(decoded, 0), _stack_source(stack_number(decoded, 1))


# ------------------------------------------------------------------------------------------------------ arithmetic


def _arithmetic(
    decoded: Decoded, operation: Operation, *, pops: bool = False, is_integer: bool = False
) -> Executor:
    """Operand 0, a register, becomes the operation of itself and the other operand."""
    destination, source = _sources(decoded, is_integer)

    def body(ctx: Emulation, fpu: Fpu) -> None:
        other, other_empty = source(ctx, fpu)
        if other_empty or is_empty(fpu, destination):
            bits, flags = INDEFINITE, UNDERFLOW
        else:
            bits, flags = _computed(fpu, operation, unpack(EXTENDED, st(fpu, destination)), other)
        _finish(fpu, destination, bits, flags, pops)

    return instruction(decoded, body)


def _finish(fpu: Fpu, destination: int, bits: int, flags: int, pops: bool = False) -> None:
    blocked = blocks_result(fpu, flags)
    signal(fpu, flags)
    if not blocked:
        set_st(fpu, destination, bits)
        if pops:
            pop(fpu)


def _computed(fpu: Fpu, operation: Operation, left: Number, right: Number) -> tuple[int, int]:
    """The result of *operation* in the extended format, and its exceptions."""
    special = _special(left, right)
    if special is not None:
        return special
    mode = rounding(fpu)
    result, flags = operation(left, right, mode)
    if flags & EXCEPTION_IE:
        return INDEFINITE, flags
    if not flags and (left.is_denormal or right.is_denormal):
        flags = EXCEPTION_DE
    if flags & unmasked(fpu):
        return INDEFINITE, flags
    precision = _PRECISIONS[fpu.fcw >> FCW_PC_SHIFT & _PRECISION_MASK]
    bits, rounding_flags = round_number(EXTENDED, result, mode, precision=precision, unmasked=unmasked(fpu))
    return bits, flags | rounding_flags


def _special(left: Number, right: Number) -> tuple[int, int] | None:
    """The result when an operand is unsupported or a NaN."""
    if UNSUPPORTED in (left.kind, right.kind):
        return INDEFINITE, EXCEPTION_IE
    nans = [number for number in (left, right) if is_nan(number)]
    if not nans:
        return None
    flags = EXCEPTION_IE if any(number.kind == SNAN for number in nans) else 0
    # A quiet one before a signaling one, then the larger significand, then the positive one.
    quiet = [number for number in nans if number.kind == QNAN]
    chosen = max(quiet or nans, key=lambda number: (number.significand, -number.sign))
    return pack_nan(EXTENDED, chosen), flags


def _unary(decoded: Decoded, operation: Operation) -> Executor:
    """FSQRT and FRNDINT: ST(0) becomes the operation of itself."""

    def body(ctx: Emulation, fpu: Fpu) -> None:
        bits, flags = INDEFINITE, UNDERFLOW
        if not is_empty(fpu, 0):
            number = unpack(EXTENDED, st(fpu, 0))
            bits, flags = _computed(fpu, operation, number, number)
        _finish(fpu, 0, bits, flags)

    return instruction(decoded, body)


def _square_root(number: Number, same: Number, mode: int) -> tuple[Number, int]:
    return square_root(number)


def _frndint(decoded: Decoded) -> Executor:
    """FRNDINT, which precision control does not concern."""

    def body(ctx: Emulation, fpu: Fpu) -> None:
        bits, flags = INDEFINITE, UNDERFLOW
        if not is_empty(fpu, 0):
            bits, flags = _rounded_to_integer(st(fpu, 0), rounding(fpu))
        _finish(fpu, 0, bits, flags)

    return instruction(decoded, body)


def _rounded_to_integer(bits: int, mode: int) -> tuple[int, int]:
    number = unpack(EXTENDED, bits)
    if number.kind == UNSUPPORTED:
        return INDEFINITE, EXCEPTION_IE
    if is_nan(number):
        return pack_nan(EXTENDED, number), EXCEPTION_IE if number.kind == SNAN else 0
    if number.kind != FINITE or number.exponent >= 0:
        return bits, 0
    value, flags = to_integer(number, mode)
    if value == 0:
        result = zero(EXTENDED, number.sign)
    else:
        result, _ = round_number(EXTENDED, from_integer(value), mode)
    return result, flags | (EXCEPTION_DE if number.is_denormal else 0)


# ----------------------------------------------------------------------------------------------------- comparisons

_UNORDERED = FSW_C3 | FSW_C2 | FSW_C0
#: Where FCOMI puts what FCOM puts in C3, C2 and C0.
_TO_RFLAGS = {
    0: 0,
    FSW_C0: RFLAGS_CF,
    FSW_C3: RFLAGS_ZF,
    _UNORDERED: RFLAGS_ZF | RFLAGS_PF | RFLAGS_CF,
}


def _compare(
    decoded: Decoded,
    *,
    pops: int = 0,
    quiet: bool = False,
    is_integer: bool = False,
    to_rflags: bool = False,
    with_zero: bool = False,
) -> Executor:
    """FCOM, FUCOM, FTST and their like: ST(0) with another operand. *quiet* ones take exception at SNaNs only."""
    if with_zero:
        source: Source = lambda ctx, fpu: (Number(ZERO, 0), False)  # noqa: E731 -- one of several kinds of source
    elif decoded.instruction.op_count == 0:
        source = _stack_source(1)
    else:
        source = _sources(decoded, is_integer)[1]

    def body(ctx: Emulation, fpu: Fpu) -> None:
        other, other_empty = source(ctx, fpu)
        if other_empty or is_empty(fpu, 0):
            conditions, flags = _UNORDERED, UNDERFLOW
        else:
            conditions, flags = _compared(unpack(EXTENDED, st(fpu, 0)), other, quiet)
        blocked = blocks_result(fpu, flags)
        signal(fpu, flags)
        if blocked:
            return
        if to_rflags:
            ctx.words[RFLAGS] = ctx.words[RFLAGS] & KEPT | _TO_RFLAGS[conditions]
        else:
            fpu.fsw = fpu.fsw & ~FSW_CONDITIONS | conditions
        for _ in range(pops):
            pop(fpu)

    return instruction(decoded, body)


def _compared(left: Number, right: Number, quiet: bool) -> tuple[int, int]:
    kinds = left.kind, right.kind
    if UNSUPPORTED in kinds or SNAN in kinds:
        return _UNORDERED, EXCEPTION_IE
    if QNAN in kinds:
        return _UNORDERED, 0 if quiet else EXCEPTION_IE
    flags = EXCEPTION_DE if left.is_denormal or right.is_denormal else 0
    order = compare(left, right)
    if order == 0:
        return FSW_C3, flags
    return (FSW_C0 if order < 0 else 0), flags


def _fxam(decoded: Decoded) -> Executor:
    """FXAM: the class of ST(0) in C3, C2 and C0, its sign in C1."""

    def body(ctx: Emulation, fpu: Fpu) -> None:
        bits = st(fpu, 0)
        number = unpack(EXTENDED, bits)
        if is_empty(fpu, 0):
            conditions = FSW_C3 | FSW_C0
        elif number.is_denormal:
            conditions = FSW_C3 | FSW_C2
        else:
            conditions = _CLASSES[number.kind]
        fpu.fsw = fpu.fsw & ~FSW_CONDITIONS | conditions | (FSW_C1 if number.sign else 0)

    return instruction(decoded, body)


_CLASSES = {
    UNSUPPORTED: 0,
    QNAN: FSW_C0,
    SNAN: FSW_C0,
    FINITE: FSW_C2,
    INFINITY: FSW_C2 | FSW_C0,
    ZERO: FSW_C3,
}

_OPERATIONS: dict[str, Operation] = {
    "ADD": add,
    "MUL": _multiply,
    "SUB": _subtract,
    "SUBR": _reversed(_subtract),
    "DIV": _divide,
    "DIVR": _reversed(_divide),
}


def _arithmetic_table() -> dict[int, Builder]:
    """FADD, FADDP, FIADD, and the same of the other operations."""
    table: dict[int, Builder] = {}
    for name, operation in _OPERATIONS.items():
        table[getattr(Mnemonic, f"F{name}")] = partial(_arithmetic, operation=operation)
        table[getattr(Mnemonic, f"F{name}P")] = partial(_arithmetic, operation=operation, pops=True)
        table[getattr(Mnemonic, f"FI{name}")] = partial(_arithmetic, operation=operation, is_integer=True)
    return table


#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    **_arithmetic_table(),
    Mnemonic.FSQRT: partial(_unary, operation=_square_root),
    Mnemonic.FRNDINT: _frndint,
    Mnemonic.FCOM: _compare,
    Mnemonic.FCOMP: partial(_compare, pops=1),
    Mnemonic.FCOMPP: partial(_compare, pops=2),
    Mnemonic.FUCOM: partial(_compare, quiet=True),
    Mnemonic.FUCOMP: partial(_compare, quiet=True, pops=1),
    Mnemonic.FUCOMPP: partial(_compare, quiet=True, pops=2),
    Mnemonic.FICOM: partial(_compare, is_integer=True),
    Mnemonic.FICOMP: partial(_compare, is_integer=True, pops=1),
    Mnemonic.FTST: partial(_compare, with_zero=True),
    Mnemonic.FCOMI: partial(_compare, to_rflags=True),
    Mnemonic.FCOMIP: partial(_compare, to_rflags=True, pops=1),
    Mnemonic.FUCOMI: partial(_compare, to_rflags=True, quiet=True),
    Mnemonic.FUCOMIP: partial(_compare, to_rflags=True, quiet=True, pops=1),
    Mnemonic.FXAM: _fxam,
}
