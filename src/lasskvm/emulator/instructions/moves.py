"""Moves of integers: MOV and its kin, LEA, CMOVcc and SETcc, XLAT, and the extensions of the accumulator.

None of them changes flags. MOV of segment, control and debug registers is elsewhere.

Source: Intel SDM volume 2, the instructions by name; volume 1, 3.4.1.1 (a 32-bit result clears the upper half of the
register).
"""

from __future__ import annotations

from iced_x86 import ConditionCode, Mnemonic, Register

from lasskvm.emulator.accessors import (
    address_of,
    memory_loader,
    operand_bytes,
    reader,
    register_reader,
    register_writer,
    writer,
)
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.flags import condition_of
from lasskvm.emulator.instructions.forms import (
    ACCUMULATORS,
    HIGH_HALVES,
    constant,
    operand_bits,
    signed,
    whole_register,
)
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.state import RFLAGS
from lasskvm.x86.registers import MASK32

__all__ = ["PLAIN"]

_QUADWORD = 8
_NO_WORD = -1


def _mov(decoded: Decoded) -> Executor:
    """MOV of general-purpose registers, memory and immediates. 32- and 64-bit registers have functions of their own."""
    target = whole_register(decoded, 0)
    if target is not None:
        return _move_to_whole_register(decoded, target)
    source = whole_register(decoded, 1)
    write = writer(decoded, 0)
    if source is not None and operand_bytes(decoded, 0) == _QUADWORD:
        return lambda ctx: write(ctx, ctx.words[source])
    value = constant(decoded, 1)
    if value is not None:
        return lambda ctx: write(ctx, value)
    read = reader(decoded, 1)
    return lambda ctx: write(ctx, read(ctx))


def _move_to_whole_register(decoded: Decoded, target: int) -> Executor:
    source, value = whole_register(decoded, 1), constant(decoded, 1)
    if value is not None:

        def move_constant(ctx: Emulation) -> None:
            ctx.words[target] = value

        return move_constant
    if source is None:
        return _load_whole_register(decoded, target)
    if operand_bytes(decoded, 1) == _QUADWORD:

        def move(ctx: Emulation) -> None:
            words = ctx.words
            words[target] = words[source]

        return move

    def move_low_half(ctx: Emulation) -> None:
        words = ctx.words
        words[target] = words[source] & MASK32

    return move_low_half


def _load_whole_register(decoded: Decoded, target: int) -> Executor:
    """Operand 1, extended with zeros, to the register in state word *target*."""
    read = reader(decoded, 1)

    def run(ctx: Emulation) -> None:
        ctx.words[target] = read(ctx)

    return run


def _movzx(decoded: Decoded) -> Executor:
    target = whole_register(decoded, 0)
    if target is not None:
        return _load_whole_register(decoded, target)
    read, write = reader(decoded, 1), writer(decoded, 0)
    return lambda ctx: write(ctx, read(ctx))


def _movsx(decoded: Decoded) -> Executor:
    """MOVSX, and MOVSXD, whose operands may also be of one size: MOV then."""
    read, write = reader(decoded, 1), writer(decoded, 0)
    sign = 1 << operand_bits(decoded, 1) - 1
    mask = (1 << operand_bits(decoded, 0)) - 1
    return lambda ctx: write(ctx, (read(ctx) ^ sign) - sign & mask)


def _movbe(decoded: Decoded) -> Executor:
    size = operand_bytes(decoded, 0)
    read, write = reader(decoded, 1), writer(decoded, 0)
    return lambda ctx: write(ctx, int.from_bytes(read(ctx).to_bytes(size, "little"), "big"))


def _xlatb(decoded: Decoded) -> Executor:
    """AL from the table at rBX; iced-x86 has [rBX + AL] as an explicit operand, with AL as its index."""
    read, write = memory_loader(decoded, 1), register_writer(Register.AL)
    return lambda ctx: write(ctx, read(ctx))


def _lea(decoded: Decoded) -> Executor:
    """LEA: the offset in the segment, cut to the address size and then to the operand size."""
    operand, target = decoded.operand, whole_register(decoded, 0)
    assert operand is not None
    mask = operand.address_mask & (1 << operand_bits(decoded, 0)) - 1
    base, index, scale, displacement = operand.base, operand.index, operand.scale, operand.displacement
    if target is None or base == _NO_WORD:
        offset_of, write = address_of(decoded), writer(decoded, 0)
        return lambda ctx: write(ctx, offset_of(ctx.words) & mask)
    # Carries go upwards only, so registers need not be cut to the address size before they are added.
    if index == _NO_WORD:

        def add_displacement(ctx: Emulation) -> None:
            words = ctx.words
            words[target] = words[base] + displacement & mask

        return add_displacement

    def add_index(ctx: Emulation) -> None:
        words = ctx.words
        words[target] = words[base] + words[index] * scale + displacement & mask

    return add_index


def _cmov(decoded: Decoded) -> Executor:
    """CMOVcc: the source is read in any case, and a 32-bit destination loses its upper half in any case."""
    holds, read, write = condition_of(decoded), reader(decoded, 1), writer(decoded, 0)
    # What a false condition moves: the destination itself.
    read_old = reader(decoded, 0)

    def run(ctx: Emulation) -> None:
        value = read(ctx)
        write(ctx, value if holds(ctx.words[RFLAGS]) else read_old(ctx))

    return run


def _set(decoded: Decoded) -> Executor:
    holds, write = condition_of(decoded), writer(decoded, 0)
    return lambda ctx: write(ctx, 1 if holds(ctx.words[RFLAGS]) else 0)


def _widen_accumulator(size: int) -> Builder:
    """CBW, CWDE and CDQE: the accumulator of half of *size* bytes, sign-extended to *size*."""
    half_bits, mask = 4 * size, (1 << 8 * size) - 1

    def build(decoded: Decoded) -> Executor:
        read, write = register_reader(ACCUMULATORS[size // 2]), register_writer(ACCUMULATORS[size])
        return lambda ctx: write(ctx, signed(read(ctx), half_bits) & mask)

    return build


def _spread_sign(size: int) -> Builder:
    """CWD, CDQ and CQO: the sign of the accumulator of *size* bytes fills the register above it."""
    sign, ones = 8 * size - 1, (1 << 8 * size) - 1

    def build(decoded: Decoded) -> Executor:
        read, write = register_reader(ACCUMULATORS[size]), register_writer(HIGH_HALVES[size])
        return lambda ctx: write(ctx, ones if read(ctx) >> sign else 0)

    return build


_CONDITION_NAMES = [name for name in dir(ConditionCode) if name.isupper() and name != "NONE"]

#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    Mnemonic.MOV: _mov,
    Mnemonic.MOVNTI: _mov,
    Mnemonic.MOVZX: _movzx,
    Mnemonic.MOVSX: _movsx,
    Mnemonic.MOVSXD: _movsx,
    Mnemonic.MOVBE: _movbe,
    Mnemonic.XLATB: _xlatb,
    Mnemonic.LEA: _lea,
    Mnemonic.CBW: _widen_accumulator(2),
    Mnemonic.CWDE: _widen_accumulator(4),
    Mnemonic.CDQE: _widen_accumulator(8),
    Mnemonic.CWD: _spread_sign(2),
    Mnemonic.CDQ: _spread_sign(4),
    Mnemonic.CQO: _spread_sign(8),
    **{getattr(Mnemonic, f"CMOV{name}"): _cmov for name in _CONDITION_NAMES},
    **{getattr(Mnemonic, f"SET{name}"): _set for name in _CONDITION_NAMES},
}
