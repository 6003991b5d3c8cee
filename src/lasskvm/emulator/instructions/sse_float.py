"""SSE floating-point arithmetic, comparisons and conversions, exact in their results and exceptions.

Each function is a builder of plain instructions (:mod:`lasskvm.emulator.operation`). An unmasked exception of any
element leaves the destination as it was; the exceptions are in MXCSR nevertheless. DPPS and DPPD are not among them.

Source: Intel SDM volume 2, the instructions by name; volume 1, 11.5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from iced_x86 import Mnemonic

from lasskvm.emulator.accessors import operand_bytes
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import GuestFault, invalid_opcode
from lasskvm.emulator.flags import KEPT
from lasskvm.emulator.instructions.vector_operands import XMM_BITS, executor, reader, writer
from lasskvm.emulator.lanes import joiner, splitter
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.emulator.softfloat import DOUBLE, SINGLE, Format
from lasskvm.emulator.sse_arithmetic import (
    Control,
    ElementOperation,
    added,
    as_integer,
    compared,
    control_of,
    converted,
    divided,
    from_signed,
    maximum,
    minimum,
    multiplied,
    ordered,
    reciprocal,
    reciprocal_root,
    root,
    rounded_to_integer,
    subtracted,
)
from lasskvm.state import CR4, RFLAGS
from lasskvm.x86.exceptions import XM
from lasskvm.x86.fpu import ROUND_TRUNCATE, ROUNDING_MASK
from lasskvm.x86.registers import CR4_OSXMMEXCPT, RFLAGS_CF, RFLAGS_PF, RFLAGS_ZF

__all__ = ["PLAIN"]

#: ROUNDPS: bit 2 of the immediate takes the rounding from MXCSR, bit 3 suppresses inexactness.
_ROUND_BY_MXCSR = 1 << 2
_ROUND_SILENTLY = 1 << 3
_PREDICATE_MASK = 7

#: Makes an instruction of an operation on elements.
_Build = Callable[[Decoded, Format, ElementOperation], Executor]
#: Control, bits of a source element: bits of a result element, and exceptions.
_Conversion = Callable[[Control, int], tuple[int, int]]


def _signal(ctx: Emulation, control: Control, flags: int) -> None:
    """Note *flags* in MXCSR; #XM, or #UD without CR4.OSXMMEXCPT, when one of them is not masked."""
    if flags:
        fpu = ctx.fpu
        fpu.mxcsr |= flags
        if flags & control.unmasked:
            raise GuestFault(XM) if ctx.words[CR4] & CR4_OSXMMEXCPT else invalid_opcode()


# -------------------------------------------------------------------------------------------------------- two operands


def _packed(decoded: Decoded, form: Format, operation: ElementOperation) -> Executor:
    """ADDPS and its like: every element of operand 0 with that of operand 1."""
    return _elementwise(decoded, form, (operation,) * (XMM_BITS // form.size))


def _alternating(decoded: Decoded, form: Format) -> Executor:
    """ADDSUBPS and ADDSUBPD: differences and sums by turns."""
    return _elementwise(decoded, form, (subtracted, added) * (XMM_BITS // form.size // 2))


def _elementwise(decoded: Decoded, form: Format, operations: tuple[ElementOperation, ...]) -> Executor:
    split, join = splitter(form.size, XMM_BITS, signed=False), joiner(form.size)
    current, read, write = reader(decoded, 0), reader(decoded, 1), writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        control = control_of(ctx.fpu.mxcsr)
        pairs = zip(operations, split(current(ctx)), split(read(ctx)), strict=True)
        results = [operation(form, control, left, right) for operation, left, right in pairs]
        _signal(ctx, control, _union(results))
        write(ctx, join([bits for bits, _ in results]))

    return executor(decoded, run)


def _horizontal(decoded: Decoded, form: Format, operation: ElementOperation) -> Executor:
    """HADDPS and its like: neighbours of operand 0, then of operand 1."""
    split, join = splitter(form.size, XMM_BITS, signed=False), joiner(form.size)
    current, read, write = reader(decoded, 0), reader(decoded, 1), writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        control = control_of(ctx.fpu.mxcsr)
        elements = split(current(ctx)) + split(read(ctx))
        pairs = zip(elements[::2], elements[1::2], strict=True)
        results = [operation(form, control, left, right) for left, right in pairs]
        _signal(ctx, control, _union(results))
        write(ctx, join([bits for bits, _ in results]))

    return executor(decoded, run)


def _union(results: list[tuple[int, int]]) -> int:
    flags = 0
    for _, raised in results:
        flags |= raised
    return flags


def _scalar(decoded: Decoded, form: Format, operation: ElementOperation) -> Executor:
    """ADDSS and its like: the lowest element; the others stay."""
    mask = (1 << form.size) - 1
    current, read, write = reader(decoded, 0), reader(decoded, 1), writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        control = control_of(ctx.fpu.mxcsr)
        old = current(ctx)
        bits, flags = operation(form, control, old & mask, read(ctx) & mask)
        _signal(ctx, control, flags)
        write(ctx, old & ~mask | bits)

    return executor(decoded, run)


def _compare(decoded: Decoded, form: Format, build: _Build) -> Executor:
    """CMPPS and its like, by the immediate."""
    return build(decoded, form, compared(int(decoded.instruction.immediate8) & _PREDICATE_MASK))


def _compare_to_flags(decoded: Decoded, form: Format, *, signaling: bool) -> Executor:
    """COMISS, UCOMISS and those of doubles."""
    mask = (1 << form.size) - 1
    current, read = reader(decoded, 0), reader(decoded, 1)

    def run(ctx: Emulation) -> None:
        control = control_of(ctx.fpu.mxcsr)
        order, flags = ordered(form, control, current(ctx) & mask, read(ctx) & mask, signaling=signaling)
        _signal(ctx, control, flags)
        if order is None:
            result = RFLAGS_ZF | RFLAGS_PF | RFLAGS_CF
        else:
            result = RFLAGS_ZF if order == 0 else RFLAGS_CF if order < 0 else 0
        ctx.words[RFLAGS] = ctx.words[RFLAGS] & KEPT | result

    return executor(decoded, run)


# --------------------------------------------------------------------------------------------------------- conversions


def _convert_packed(decoded: Decoded, source: int, target: int, conversion: _Conversion) -> Executor:
    """As many elements as both operands have room for; the rest of the destination becomes zero.

    *source* and *target* are the sizes of elements in bits.
    """
    count = min(8 * operand_bytes(decoded, 1) // source, 8 * operand_bytes(decoded, 0) // target)
    mask, join = (1 << source) - 1, joiner(target)
    read, write = reader(decoded, 1), writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        control = control_of(ctx.fpu.mxcsr)
        value = read(ctx)
        results = [conversion(control, value >> source * number & mask) for number in range(count)]
        _signal(ctx, control, _union(results))
        write(ctx, join([bits for bits, _ in results]))

    return executor(decoded, run)


def _convert_scalar(decoded: Decoded, source: int, target: int, conversion: _Conversion) -> Executor:
    """The lowest element; the rest of the destination stays."""
    source_mask, target_mask = (1 << source) - 1, (1 << target) - 1
    current, read, write = reader(decoded, 0), reader(decoded, 1), writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        control = control_of(ctx.fpu.mxcsr)
        bits, flags = conversion(control, read(ctx) & source_mask)
        _signal(ctx, control, flags)
        write(ctx, current(ctx) & ~target_mask | bits)

    return executor(decoded, run)


def _convert_pairs_of_integers(decoded: Decoded, form: Format) -> Executor:
    """CVTPI2PS and CVTPI2PD: two integers from an MMX register; CVTPI2PS leaves the upper half."""
    conversion = _from_integers(32, form)
    if form is DOUBLE:
        return _convert_packed(decoded, 32, form.size, conversion)
    read, write, current = reader(decoded, 1), writer(decoded, 0), reader(decoded, 0)
    join = joiner(form.size)
    half = (1 << XMM_BITS // 2) - 1

    def run(ctx: Emulation) -> None:
        control = control_of(ctx.fpu.mxcsr)
        value = read(ctx)
        results = [conversion(control, element) for element in (value & 0xFFFF_FFFF, value >> 32)]
        _signal(ctx, control, _union(results))
        write(ctx, current(ctx) & ~half | join([bits for bits, _ in results]))

    return executor(decoded, run)


def _convert_from_register(decoded: Decoded, form: Format) -> Executor:
    """CVTSI2SS and CVTSI2SD."""
    width = 8 * operand_bytes(decoded, 1)
    return _convert_scalar(decoded, width, form.size, _from_integers(width, form))


def _convert_to_register(decoded: Decoded, form: Format, *, truncates: bool = False) -> Executor:
    """CVTSS2SI, CVTTSD2SI and their like."""
    width = 8 * operand_bytes(decoded, 0)
    conversion = _to_integers(form, width, truncates)
    mask = (1 << form.size) - 1
    read, write = reader(decoded, 1), writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        control = control_of(ctx.fpu.mxcsr)
        value, flags = conversion(control, read(ctx) & mask)
        _signal(ctx, control, flags)
        write(ctx, value)

    return executor(decoded, run)


def _between(source: Format, target: Format) -> _Conversion:
    return lambda control, bits: converted(source, target, control, bits)


def _from_integers(width: int, form: Format) -> _Conversion:
    sign = 1 << width - 1
    return lambda control, bits: from_signed(form, control, (bits ^ sign) - sign)


def _to_integers(form: Format, width: int, truncates: bool = False) -> _Conversion:
    def convert(control: Control, bits: int) -> tuple[int, int]:
        mode = ROUND_TRUNCATE if truncates else control.rounding
        return as_integer(form, control, bits, width, mode)

    return convert


def _round(decoded: Decoded, form: Format) -> Executor:
    """ROUNDPS, ROUNDSS and those of doubles."""
    immediate = int(decoded.instruction.immediate8)

    def operation(form: Format, control: Control, left: int, right: int) -> tuple[int, int]:
        mode = control.rounding if immediate & _ROUND_BY_MXCSR else immediate & ROUNDING_MASK
        return rounded_to_integer(
            form, control, right, mode, exactness_matters=not immediate & _ROUND_SILENTLY
        )

    is_scalar = decoded.instruction.mnemonic in (Mnemonic.ROUNDSS, Mnemonic.ROUNDSD)
    return (_scalar if is_scalar else _packed)(decoded, form, operation)


_OPERATIONS: dict[str, ElementOperation] = {
    "ADD": added,
    "SUB": subtracted,
    "MUL": multiplied,
    "DIV": divided,
    "MIN": minimum,
    "MAX": maximum,
    "SQRT": root,
}
_FORMATS = {"S": SINGLE, "D": DOUBLE}


def _arithmetic_table() -> dict[int, Builder]:
    """ADDPS, ADDSD, CMPSS, ROUNDPD and so on: what exists for both formats, packed and scalar."""
    table: dict[int, Builder] = {}
    for letter, form in _FORMATS.items():
        for kind, build in (("P", _packed), ("S", _scalar)):
            for name, operation in _OPERATIONS.items():
                table[getattr(Mnemonic, name + kind + letter)] = partial(
                    build, form=form, operation=operation
                )
            # CMPSD as a string instruction goes by its code.
            table[getattr(Mnemonic, f"CMP{kind}{letter}")] = partial(_compare, form=form, build=build)
            table[getattr(Mnemonic, f"ROUND{kind}{letter}")] = partial(_round, form=form)
        table[getattr(Mnemonic, f"HADDP{letter}")] = partial(_horizontal, form=form, operation=added)
        table[getattr(Mnemonic, f"HSUBP{letter}")] = partial(_horizontal, form=form, operation=subtracted)
        table[getattr(Mnemonic, f"ADDSUBP{letter}")] = partial(_alternating, form=form)
        table[getattr(Mnemonic, f"COMIS{letter}")] = partial(_compare_to_flags, form=form, signaling=True)
        table[getattr(Mnemonic, f"UCOMIS{letter}")] = partial(_compare_to_flags, form=form, signaling=False)
        table[getattr(Mnemonic, f"CVTSI2S{letter}")] = partial(_convert_from_register, form=form)
        table[getattr(Mnemonic, f"CVTS{letter}2SI")] = partial(_convert_to_register, form=form)
        table[getattr(Mnemonic, f"CVTTS{letter}2SI")] = partial(
            _convert_to_register, form=form, truncates=True
        )
        table[getattr(Mnemonic, f"CVTPI2P{letter}")] = partial(_convert_pairs_of_integers, form=form)
        to_integers = (("CVT", _to_integers(form, 32)), ("CVTT", _to_integers(form, 32, truncates=True)))
        for name, conversion in to_integers:
            for target in ("PI", "DQ"):
                table[getattr(Mnemonic, f"{name}P{letter}2{target}")] = partial(
                    _convert_packed, source=form.size, target=32, conversion=conversion
                )
        table[getattr(Mnemonic, f"CVTDQ2P{letter}")] = partial(
            _convert_packed, source=32, target=form.size, conversion=_from_integers(32, form)
        )
    return table


#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    **_arithmetic_table(),
    Mnemonic.CVTPS2PD: partial(_convert_packed, source=32, target=64, conversion=_between(SINGLE, DOUBLE)),
    Mnemonic.CVTPD2PS: partial(_convert_packed, source=64, target=32, conversion=_between(DOUBLE, SINGLE)),
    Mnemonic.CVTSS2SD: partial(_convert_scalar, source=32, target=64, conversion=_between(SINGLE, DOUBLE)),
    Mnemonic.CVTSD2SS: partial(_convert_scalar, source=64, target=32, conversion=_between(DOUBLE, SINGLE)),
    Mnemonic.RCPPS: partial(_packed, form=SINGLE, operation=reciprocal),
    Mnemonic.RCPSS: partial(_scalar, form=SINGLE, operation=reciprocal),
    Mnemonic.RSQRTPS: partial(_packed, form=SINGLE, operation=reciprocal_root),
    Mnemonic.RSQRTSS: partial(_scalar, form=SINGLE, operation=reciprocal_root),
}
