"""Instructions that save, load and control x87 and SSE state as a whole.

Each function is a builder of plain instructions (:mod:`lasskvm.emulator.operation`). Areas in memory are loaded and
stored as one access: all of it or nothing.

Source: Intel SDM volume 2, the instructions by name; volume 1, 8.1.3 to 8.1.10 and 10.5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from iced_x86 import Code, Mnemonic

from lasskvm.emulator.accessors import memory_loader, memory_storer, writer
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import general_protection
from lasskvm.emulator.fpu import initialize, set_control_word, status_word
from lasskvm.emulator.fpu_images import (
    FXSAVE_BYTES,
    FXSAVE_MXCSR,
    FXSAVE_REGISTERS,
    FXSAVE_XMM,
    environment_bytes,
    environment_image,
    fxsave_image,
    image_mxcsr,
    load_environment,
    load_fxsave_image,
    load_stack_image,
    saved_xmm_registers,
    stack_image,
)
from lasskvm.emulator.instructions.areas import Area
from lasskvm.emulator.instructions.availability import (
    check_mmx,
    check_sse,
    check_wait,
    check_x87,
    check_x87_control,
)
from lasskvm.emulator.modes import in_protected_mode
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.lass import WRITE
from lasskvm.state import CR4
from lasskvm.x86.fpu import EXCEPTIONS, FSW_B, FSW_ES, FSW_SF, MXCSR_WRITABLE
from lasskvm.x86.registers import CR4_OSFXSR

__all__ = ["PLAIN"]

_WIDE_POINTERS = frozenset((Code.FXSAVE64_M512BYTE, Code.FXRSTOR64_M512BYTE))
_MXCSR_BYTES = 4
_STACK_BYTES = 80
#: Environments with fields of two bytes; those of the other forms have four.
_NARROW_ENVIRONMENTS = frozenset(
    (Code.FNSTENV_M14BYTE, Code.FLDENV_M14BYTE, Code.FNSAVE_M94BYTE, Code.FRSTOR_M94BYTE)
)

_Check = Callable[[Emulation], None]


# ------------------------------------------------------------------------------------------------ FXSAVE, FXRSTOR


def _fxsave(decoded: Decoded) -> Executor:
    """FXSAVE. The bytes behind the XMM registers are left alone, and with CR4.OSFXSR clear the SSE state is too."""
    area, count = Area(decoded, FXSAVE_BYTES), saved_xmm_registers(decoded.bits)
    wide = decoded.instruction.code in _WIDE_POINTERS

    def save(ctx: Emulation) -> None:
        check_x87_control(ctx)
        area.check_aligned(ctx, WRITE)
        area.touch(ctx)
        image = fxsave_image(ctx.fpu, wide_pointers=wide, xmm_registers=count)
        if ctx.words[CR4] & CR4_OSFXSR:
            area.store(ctx, image)
        else:
            area.store(ctx, image[:FXSAVE_MXCSR])
            area.store(ctx, image[FXSAVE_REGISTERS:FXSAVE_XMM], FXSAVE_REGISTERS)

    return save


def _fxrstor(decoded: Decoded) -> Executor:
    """FXRSTOR: #GP(0) for reserved bits of MXCSR, with nothing loaded."""
    area, count = Area(decoded, FXSAVE_BYTES), saved_xmm_registers(decoded.bits)
    wide = decoded.instruction.code in _WIDE_POINTERS

    def restore(ctx: Emulation) -> None:
        check_x87_control(ctx)
        area.check_aligned(ctx)
        image = area.load(ctx)
        with_sse = ctx.words[CR4] & CR4_OSFXSR != 0
        if with_sse and image_mxcsr(image) & ~MXCSR_WRITABLE:
            raise general_protection()
        load_fxsave_image(
            ctx.fpu, image, wide_pointers=wide, xmm_registers=count if with_sse else 0, with_mxcsr=with_sse
        )

    return restore


def _ldmxcsr(decoded: Decoded) -> Executor:
    load = memory_loader(decoded, _MXCSR_BYTES)

    def run(ctx: Emulation) -> None:
        check_sse(ctx)
        value = load(ctx)
        if value & ~MXCSR_WRITABLE:
            raise general_protection()
        ctx.fpu.mxcsr = value

    return run


def _stmxcsr(decoded: Decoded) -> Executor:
    store = memory_storer(decoded, _MXCSR_BYTES)

    def run(ctx: Emulation) -> None:
        check_sse(ctx)
        store(ctx, ctx.fpu.mxcsr)

    return run


# ----------------------------------------------------------------------------------------------- x87 environment


def _field_width(decoded: Decoded) -> int:
    return 2 if decoded.instruction.code in _NARROW_ENVIRONMENTS else 4


def _has_real_mode_format(ctx: Emulation) -> bool:
    """Whether the environment has the format of real and virtual-8086 mode."""
    return not in_protected_mode(ctx.words)


def _fnstenv(decoded: Decoded) -> Executor:
    """FNSTENV stores the environment, then masks all exceptions."""
    width = _field_width(decoded)
    area = Area(decoded, environment_bytes(width))

    def store(ctx: Emulation) -> None:
        check_x87_control(ctx)
        fpu = ctx.fpu
        area.store(ctx, environment_image(fpu, width, real_mode=_has_real_mode_format(ctx)))
        set_control_word(fpu, fpu.fcw | EXCEPTIONS)

    return store


def _fldenv(decoded: Decoded) -> Executor:
    width = _field_width(decoded)
    area = Area(decoded, environment_bytes(width))

    def load(ctx: Emulation) -> None:
        check_x87(ctx)
        load_environment(ctx.fpu, area.load(ctx), width, real_mode=_has_real_mode_format(ctx))

    return load


def _fnsave(decoded: Decoded) -> Executor:
    """FNSAVE stores environment and registers, then initializes both as FNINIT does."""
    width = _field_width(decoded)
    area = Area(decoded, environment_bytes(width) + _STACK_BYTES)

    def save(ctx: Emulation) -> None:
        check_x87_control(ctx)
        fpu = ctx.fpu
        environment = environment_image(fpu, width, real_mode=_has_real_mode_format(ctx))
        area.store(ctx, environment + stack_image(fpu))
        initialize(fpu)

    return save


def _frstor(decoded: Decoded) -> Executor:
    width = _field_width(decoded)
    size = environment_bytes(width)
    area = Area(decoded, size + _STACK_BYTES)

    def restore(ctx: Emulation) -> None:
        check_x87(ctx)
        image = area.load(ctx)
        load_environment(ctx.fpu, image, width, real_mode=_has_real_mode_format(ctx))
        load_stack_image(ctx.fpu, image[size:])

    return restore


# -------------------------------------------------------------------------------------------- control and status


def _fldcw(decoded: Decoded) -> Executor:
    load = memory_loader(decoded, 2)

    def run(ctx: Emulation) -> None:
        check_x87(ctx)
        set_control_word(ctx.fpu, load(ctx))

    return run


def _fnstcw(decoded: Decoded) -> Executor:
    store = memory_storer(decoded, 2)

    def run(ctx: Emulation) -> None:
        check_x87_control(ctx)
        store(ctx, ctx.fpu.fcw)

    return run


def _fnstsw(decoded: Decoded) -> Executor:
    """FNSTSW, to memory or to AX."""
    write = writer(decoded, 0)

    def run(ctx: Emulation) -> None:
        check_x87_control(ctx)
        write(ctx, status_word(ctx.fpu))

    return run


def _fninit(decoded: Decoded) -> Executor:
    def run(ctx: Emulation) -> None:
        check_x87_control(ctx)
        initialize(ctx.fpu)

    return run


def _fnclex(decoded: Decoded) -> Executor:
    """FNCLEX: no exception has happened; the condition codes and TOP stay."""

    def run(ctx: Emulation) -> None:
        check_x87_control(ctx)
        ctx.fpu.fsw &= ~(EXCEPTIONS | FSW_SF | FSW_ES | FSW_B)

    return run


def _emms(decoded: Decoded) -> Executor:
    """EMMS: all x87 registers are empty."""

    def run(ctx: Emulation) -> None:
        check_mmx(ctx)
        ctx.fpu.ftw = 0

    return run


def _no_operation(decoded: Decoded, check: _Check) -> Executor:
    """FWAIT and FNOP, which only wait for exceptions, and FNENI, FNDISI and FNSETPM, which meant something once."""
    return check


#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    Mnemonic.FXSAVE: _fxsave,
    Mnemonic.FXSAVE64: _fxsave,
    Mnemonic.FXRSTOR: _fxrstor,
    Mnemonic.FXRSTOR64: _fxrstor,
    Mnemonic.LDMXCSR: _ldmxcsr,
    Mnemonic.STMXCSR: _stmxcsr,
    Mnemonic.FNSTENV: _fnstenv,
    Mnemonic.FLDENV: _fldenv,
    Mnemonic.FNSAVE: _fnsave,
    Mnemonic.FRSTOR: _frstor,
    Mnemonic.FLDCW: _fldcw,
    Mnemonic.FNSTCW: _fnstcw,
    Mnemonic.FNSTSW: _fnstsw,
    Mnemonic.FNINIT: _fninit,
    Mnemonic.FNCLEX: _fnclex,
    Mnemonic.EMMS: _emms,
    Mnemonic.WAIT: partial(_no_operation, check=check_wait),
    Mnemonic.FNOP: partial(_no_operation, check=check_x87),
    Mnemonic.FNENI: partial(_no_operation, check=check_x87_control),
    Mnemonic.FNDISI: partial(_no_operation, check=check_x87_control),
    Mnemonic.FNSETPM: partial(_no_operation, check=check_x87_control),
}
