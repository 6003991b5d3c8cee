"""Instructions that move or change single flags, and those that do nothing at all.

The latter are NOP in all lengths, hints (PAUSE, CLDEMOTE) and the opcodes that are reserved for hints: a processor that
does not have what they were given to later (ENDBR and RDSSP of CET) does nothing either. They name memory operands,
but do not access them.

Source: Intel SDM volume 2, the instructions by name; appendix A, table A-3 (reserved NOPs).
"""

from __future__ import annotations

from iced_x86 import Mnemonic, Register

from lasskvm.emulator.accessors import register_reader, register_writer
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.state import RFLAGS
from lasskvm.x86.registers import (
    RFLAGS_AF,
    RFLAGS_CF,
    RFLAGS_DF,
    RFLAGS_FIXED,
    RFLAGS_PF,
    RFLAGS_SF,
    RFLAGS_ZF,
)

__all__ = ["PLAIN"]

#: The flags that LAHF and SAHF move.
_IN_AH = RFLAGS_SF | RFLAGS_ZF | RFLAGS_AF | RFLAGS_PF | RFLAGS_CF
_NOT_IN_AH = ~_IN_AH
_BYTE = 0xFF


def _clear(flag: int) -> Builder:
    kept = ~flag

    def build(decoded: Decoded) -> Executor:
        def run(ctx: Emulation) -> None:
            ctx.words[RFLAGS] &= kept

        return run

    return build


def _set(flag: int) -> Builder:
    def build(decoded: Decoded) -> Executor:
        def run(ctx: Emulation) -> None:
            ctx.words[RFLAGS] |= flag

        return run

    return build


def _cmc(decoded: Decoded) -> Executor:
    def run(ctx: Emulation) -> None:
        ctx.words[RFLAGS] ^= RFLAGS_CF

    return run


def _lahf(decoded: Decoded) -> Executor:
    write = register_writer(Register.AH)
    return lambda ctx: write(ctx, ctx.words[RFLAGS] & _IN_AH | RFLAGS_FIXED)


def _sahf(decoded: Decoded) -> Executor:
    read = register_reader(Register.AH)

    def run(ctx: Emulation) -> None:
        words = ctx.words
        words[RFLAGS] = words[RFLAGS] & _NOT_IN_AH | read(ctx) & _IN_AH

    return run


def _salc(decoded: Decoded) -> Executor:
    """SALC, which the manual does not describe: AL is all ones if CF is set, else 0."""
    write = register_writer(Register.AL)
    return lambda ctx: write(ctx, _BYTE if ctx.words[RFLAGS] & RFLAGS_CF else 0)


def _nothing(decoded: Decoded) -> Executor:
    def run(ctx: Emulation) -> None:
        return

    return run


#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    Mnemonic.CLC: _clear(RFLAGS_CF),
    Mnemonic.CLD: _clear(RFLAGS_DF),
    Mnemonic.STC: _set(RFLAGS_CF),
    Mnemonic.STD: _set(RFLAGS_DF),
    Mnemonic.CMC: _cmc,
    Mnemonic.LAHF: _lahf,
    Mnemonic.SAHF: _sahf,
    Mnemonic.SALC: _salc,
    Mnemonic.NOP: _nothing,
    Mnemonic.RESERVEDNOP: _nothing,
    Mnemonic.PAUSE: _nothing,
    Mnemonic.CLDEMOTE: _nothing,
    Mnemonic.ENDBR32: _nothing,
    Mnemonic.ENDBR64: _nothing,
    Mnemonic.RDSSPD: _nothing,
    Mnemonic.RDSSPQ: _nothing,
}
