"""How x87 and SSE registers lie in memory: FXSAVE images, which are also the first part of XSAVE areas, and the x87
environment of FNSTENV and FNSAVE.

Pure functions between an :class:`~lasskvm.emulator.fpu.Fpu` and bytes. Reserved places are stored as zeros.

Source: Intel SDM volume 1, 8.1.10 (figures 8-9 to 8-12), 10.5.1 (FXSAVE area), 13.4.1 (legacy region of an XSAVE area)
and 13.6 (initial configurations).
"""

from __future__ import annotations

import struct

from lasskvm.emulator.fpu import (
    X87_BYTES,
    X87_REGISTERS,
    X87_SPACING,
    XMM_BYTES,
    XMM_REGISTERS,
    Fpu,
    abridged_tags,
    full_tag_word,
    initialize,
    set_control_word,
    set_status_word,
    status_word,
)
from lasskvm.x86.fpu import FCW_INITIAL, FOP_MASK, MXCSR_WRITABLE
from lasskvm.x86.registers import MASK32
from lasskvm.x86.xsave import COMPONENT_SSE, COMPONENT_X87

__all__ = [
    "FXSAVE_BYTES",
    "FXSAVE_MXCSR",
    "FXSAVE_REGISTERS",
    "FXSAVE_XMM",
    "components_in_use",
    "environment_bytes",
    "environment_image",
    "fxsave_image",
    "image_mxcsr",
    "initialize_components",
    "load_environment",
    "load_fxsave_image",
    "load_stack_image",
    "saved_xmm_registers",
    "stack_image",
]

#: The size of the area, and where in it MXCSR, ST(0) and XMM0 are.
FXSAVE_BYTES = 512
FXSAVE_MXCSR = 24
FXSAVE_REGISTERS = 32
FXSAVE_XMM = 160
_LEGACY_XMM_REGISTERS, _LONG_MODE_BITS = 8, 64
#: FCW, FSW, FTW (abridged), FOP, FIP and FDP (64 bits each), MXCSR, MXCSR_MASK.
_FXSAVE_HEADER = struct.Struct("<HHBxHQQII")

#: Where selectors stand behind offsets of 32 bits.
_SELECTOR_SHIFT = 32

#: Environments: seven fields of four or of two bytes.
_ENVIRONMENTS = {4: struct.Struct("<7I"), 2: struct.Struct("<7H")}
_MASK16 = 0xFFFF
_OPCODE_SHIFT = 16
#: In real-mode formats, address bits 16 and up stand from bit 12 on.
_REAL_MODE_SHIFT = 12
_REAL_MODE_UPPER = {4: _MASK16, 2: 0xF}


#: The parts of an image that hold x87 state, where that is in its initial configuration.
_INITIAL_X87_CONTROL = FCW_INITIAL.to_bytes(FXSAVE_MXCSR, "little")
_INITIAL_X87_REGISTERS = bytes(FXSAVE_XMM - FXSAVE_REGISTERS)


def saved_xmm_registers(bits: int) -> int:
    """How many XMM registers code of *bits* bits (16, 32 or 64) saves and restores."""
    return XMM_REGISTERS if bits == _LONG_MODE_BITS else _LEGACY_XMM_REGISTERS


def fxsave_image(fpu: Fpu, *, wide_pointers: bool, xmm_registers: int = XMM_REGISTERS) -> bytes:
    """The part of an FXSAVE image that is written, from its start: everything up to the last XMM register.

    *wide_pointers* stores the offsets of instruction and operand in 64 bits (FXSAVE64), otherwise in 32 with selectors.
    """
    fip, fdp = fpu.fip, fpu.fdp
    if not wide_pointers:
        fip, fdp = fip & MASK32 | fpu.fcs << _SELECTOR_SHIFT, fdp & MASK32 | fpu.fds << _SELECTOR_SHIFT
    control = _FXSAVE_HEADER.pack(
        fpu.fcw, status_word(fpu), fpu.ftw, fpu.fop, fip, fdp, fpu.mxcsr, MXCSR_WRITABLE
    )
    return control + _rotated(fpu.x87_image(), fpu.top) + fpu.xmm_image(xmm_registers)


def image_mxcsr(image: bytes) -> int:
    """The MXCSR in an FXSAVE image."""
    return int.from_bytes(image[FXSAVE_MXCSR : FXSAVE_MXCSR + 4], "little")


def load_fxsave_image(
    fpu: Fpu,
    image: bytes,
    *,
    wide_pointers: bool,
    xmm_registers: int = XMM_REGISTERS,
    with_mxcsr: bool = True,
    with_x87: bool = True,
) -> None:
    """Load the registers from an FXSAVE image whose MXCSR has been checked."""
    if with_x87:
        _load_x87_state(fpu, image, wide_pointers)
    if with_mxcsr:
        fpu.mxcsr = image_mxcsr(image)
    if xmm_registers:
        fpu.load_xmm_image(image[FXSAVE_XMM : FXSAVE_XMM + XMM_BYTES * xmm_registers])


def _load_x87_state(fpu: Fpu, image: bytes, wide_pointers: bool) -> None:
    fcw, fsw, ftw, fop, fip, fdp, _, _ = _FXSAVE_HEADER.unpack_from(image)
    set_control_word(fpu, fcw)
    set_status_word(fpu, fsw)
    fpu.ftw, fpu.fop = ftw, fop & FOP_MASK
    fpu.fip, fpu.fdp, fpu.fcs, fpu.fds = fip, fdp, 0, 0
    if not wide_pointers:
        fpu.fip, fpu.fcs = fip & MASK32, fip >> _SELECTOR_SHIFT & _MASK16
        fpu.fdp, fpu.fds = fdp & MASK32, fdp >> _SELECTOR_SHIFT & _MASK16
    fpu.load_x87_image(_rotated(image[FXSAVE_REGISTERS:FXSAVE_XMM], X87_REGISTERS - fpu.top))


def _rotated(registers: bytes, count: int) -> bytes:
    """x87 registers in another order, from the one at place *count* on: from physical to stack order, and back."""
    start = X87_SPACING * count
    return registers[start:] + registers[:start]


def components_in_use(image: bytes) -> int:
    """Which of x87 and SSE state are not in their initial configuration, as XSAVE's bits.

    *image* is what :func:`fxsave_image` gives. MXCSR does not count (SDM volume 1, 13.6).
    """
    in_use = 0
    if (
        image[:FXSAVE_MXCSR] != _INITIAL_X87_CONTROL
        or image[FXSAVE_REGISTERS:FXSAVE_XMM] != _INITIAL_X87_REGISTERS
    ):
        in_use = COMPONENT_X87
    if image.count(0, FXSAVE_XMM) != len(image) - FXSAVE_XMM:
        in_use |= COMPONENT_SSE
    return in_use


def initialize_components(fpu: Fpu, components: int, xmm_registers: int = XMM_REGISTERS) -> None:
    """Put x87 and SSE state, as XSAVE's bits in *components* say, into their initial configurations; MXCSR stays."""
    if components & COMPONENT_X87:
        initialize(fpu)
        fpu.load_x87_image(bytes(X87_SPACING * X87_REGISTERS))
    if components & COMPONENT_SSE:
        fpu.load_xmm_image(bytes(XMM_BYTES * xmm_registers))


def environment_bytes(width: int) -> int:
    """The size of an x87 environment with fields of *width* bytes, 4 or 2: 28 or 14."""
    return _ENVIRONMENTS[width].size


def environment_image(fpu: Fpu, width: int, *, real_mode: bool) -> bytes:
    """The x87 environment with fields of *width* bytes; *real_mode* is the format of real and virtual-8086 mode."""
    if real_mode:
        upper = _REAL_MODE_UPPER[width]
        instruction, data = (fpu.fcs << 4) + fpu.fip, (fpu.fds << 4) + fpu.fdp
        pointers = (
            instruction & _MASK16,
            (instruction >> 16 & upper) << _REAL_MODE_SHIFT | fpu.fop,
            data & _MASK16,
            (data >> 16 & upper) << _REAL_MODE_SHIFT,
        )
    elif width == 4:
        pointers = (fpu.fip & MASK32, fpu.fop << _OPCODE_SHIFT | fpu.fcs, fpu.fdp & MASK32, fpu.fds)
    else:
        pointers = (fpu.fip & _MASK16, fpu.fcs, fpu.fdp & _MASK16, fpu.fds)
    return _ENVIRONMENTS[width].pack(fpu.fcw, status_word(fpu), full_tag_word(fpu), *pointers)


def load_environment(fpu: Fpu, image: bytes, width: int, *, real_mode: bool) -> None:
    """Load the x87 environment; the inverse of :func:`environment_image`."""
    fcw, fsw, tags, fip, fip_upper, fdp, fdp_upper = _ENVIRONMENTS[width].unpack_from(image)
    set_control_word(fpu, fcw & _MASK16)
    set_status_word(fpu, fsw & _MASK16)
    fpu.ftw = abridged_tags(tags)
    if real_mode:
        # Linear addresses, which leave no selectors to load.
        upper = _REAL_MODE_UPPER[width]
        fpu.fop, fpu.fcs, fpu.fds = fip_upper & FOP_MASK, 0, 0
        fip = fip & _MASK16 | (fip_upper >> _REAL_MODE_SHIFT & upper) << 16
        fdp = fdp & _MASK16 | (fdp_upper >> _REAL_MODE_SHIFT & upper) << 16
    else:
        fpu.fop = fip_upper >> _OPCODE_SHIFT & FOP_MASK
        fpu.fcs, fpu.fds = fip_upper & _MASK16, fdp_upper & _MASK16
    fpu.fip, fpu.fdp = fip, fdp


def stack_image(fpu: Fpu) -> bytes:
    """ST(0) to ST(7) as FNSAVE stores them behind the environment: ten bytes each."""
    return b"".join(fpu.registers[number].to_bytes(X87_BYTES, "little") for number in _stack_order(fpu))


def load_stack_image(fpu: Fpu, image: bytes) -> None:
    """The inverse of :func:`stack_image`; TOP must have been loaded."""
    for place, number in enumerate(_stack_order(fpu)):
        start = X87_BYTES * place
        fpu.registers[number] = int.from_bytes(image[start : start + X87_BYTES], "little")


def _stack_order(fpu: Fpu) -> list[int]:
    """The physical numbers of ST(0) to ST(7)."""
    return [(fpu.top + place) % X87_REGISTERS for place in range(X87_REGISTERS)]
