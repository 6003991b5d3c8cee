"""The XSAVE feature set: XSAVE, XSAVEOPT and XRSTOR of x87 and SSE state and PKRU, and XCR0.

Areas have the standard format. A component counts as in use when it is not in its initial configuration; XSAVEOPT saves
no others, and does not look at whether a component has been modified.

Source: Intel SDM volume 1, 13.3 to 13.9 and 13.13; volume 2, the instructions by name; KVM's ``__kvm_set_xcr()``.
"""

from __future__ import annotations

import struct

from iced_x86 import Code, Mnemonic

from lasskvm.emulator.completion import Handler, complete, require_cpl0
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.control import set_pkru
from lasskvm.emulator.data_access import load_located, store_located
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import general_protection, invalid_opcode
from lasskvm.emulator.fpu_images import (
    FXSAVE_MXCSR,
    FXSAVE_REGISTERS,
    FXSAVE_XMM,
    components_in_use,
    fxsave_image,
    image_mxcsr,
    initialize_components,
    load_fxsave_image,
    saved_xmm_registers,
)
from lasskvm.emulator.instructions.areas import Area
from lasskvm.emulator.instructions.availability import check_not_switched
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.lass import WRITE
from lasskvm.state import CR4, PKRU, RAX, RCX, RDX, XCR0, Words
from lasskvm.x86.fpu import MXCSR_WRITABLE
from lasskvm.x86.registers import CR4_OSXSAVE, MASK32
from lasskvm.x86.xsave import (
    COMPONENT_PKRU,
    COMPONENT_SSE,
    COMPONENT_X87,
    PKRU_BYTES,
    PKRU_OFFSET,
    XSAVE_HEADER,
    is_valid_xcr0,
)

__all__ = ["HANDLERS", "PLAIN"]

_ALIGNMENT = 64
_WIDE_POINTERS = frozenset((Code.XSAVE64_MEM, Code.XSAVEOPT64_MEM, Code.XRSTOR64_MEM))
_LEGACY = COMPONENT_X87 | COMPONENT_SSE
#: The only field of the header that is written; the fields that XRSTOR checks: XSTATE_BV, XCOMP_BV, reserved.
_XSTATE_BV_BYTES = 8
_CHECKED_HEADER = struct.Struct("<QQQ")
_XCR0_INDEX, _XINUSE_INDEX = 0, 1
_HIGH_SHIFT = 32


# ------------------------------------------------------------------------------------------------- XSAVE, XSAVEOPT


def _xsave(decoded: Decoded, *, optimized: bool = False) -> Executor:
    """XSAVE; *optimized* is XSAVEOPT.

    The legacy region, where it is asked for, and the header lie on the pages of its first byte and of the header, so
    both are located as one.
    """
    count = saved_xmm_registers(decoded.bits)
    wide = decoded.instruction.code in _WIDE_POINTERS
    area = Area(decoded, XSAVE_HEADER + _XSTATE_BV_BYTES)
    header_only = Area(decoded, _XSTATE_BV_BYTES, XSAVE_HEADER)
    pkru = Area(decoded, PKRU_BYTES, PKRU_OFFSET)

    def save(ctx: Emulation) -> None:
        _check_enabled(ctx)
        area.check_aligned(ctx, WRITE, _ALIGNMENT)
        words = ctx.words
        requested = words[XCR0] & _edx_eax(words)
        image = fxsave_image(ctx.fpu, wide_pointers=wide, xmm_registers=count)
        in_use = _in_use(words, image)
        saved = requested & in_use if optimized else requested
        if requested & _LEGACY:
            pieces, header = area.locate(ctx), XSAVE_HEADER
        else:
            pieces, header = header_only.locate(ctx), 0
        if saved & COMPONENT_PKRU:
            pkru_pieces = pkru.locate(ctx)
        before = int.from_bytes(load_located(ctx, pieces, header, _XSTATE_BV_BYTES), "little")
        for start, part in _parts(image, saved, with_mxcsr=requested & COMPONENT_SSE != 0):
            store_located(ctx, pieces, start, part)
        after = before & ~requested | in_use & requested
        store_located(ctx, pieces, header, after.to_bytes(_XSTATE_BV_BYTES, "little"))
        if saved & COMPONENT_PKRU:
            store_located(ctx, pkru_pieces, 0, words[PKRU].to_bytes(PKRU_BYTES, "little"))

    return save


def _xsaveopt(decoded: Decoded) -> Executor:
    return _xsave(decoded, optimized=True)


def _parts(image: bytes, components: int, *, with_mxcsr: bool) -> list[tuple[int, bytes]]:
    """The parts of the legacy region that hold *components*, by position. MXCSR and its mask are a matter apart."""
    if components & _LEGACY == _LEGACY:
        return [(0, image)]
    parts = []
    if components & COMPONENT_X87:
        parts.append((0, image[:FXSAVE_MXCSR]))
        parts.append((FXSAVE_REGISTERS, image[FXSAVE_REGISTERS:FXSAVE_XMM]))
    if with_mxcsr:
        parts.append((FXSAVE_MXCSR, image[FXSAVE_MXCSR:FXSAVE_REGISTERS]))
    if components & COMPONENT_SSE:
        parts.append((FXSAVE_XMM, image[FXSAVE_XMM:]))
    return parts


def _in_use(words: Words, image: bytes) -> int:
    """The components that are not in their initial configuration: XINUSE."""
    in_use = components_in_use(image)
    return in_use | COMPONENT_PKRU if words[PKRU] else in_use


# --------------------------------------------------------------------------------------------------------- XRSTOR


def _xrstor(decoded: Decoded) -> Executor:
    """XRSTOR: nothing is loaded before everything has been read and judged.

    MXCSR is loaded whenever SSE state is asked for, also where the XMM registers are only cleared.
    """
    count = saved_xmm_registers(decoded.bits)
    wide = decoded.instruction.code in _WIDE_POINTERS
    area = Area(decoded, XSAVE_HEADER + _CHECKED_HEADER.size)
    header_only = Area(decoded, _CHECKED_HEADER.size, XSAVE_HEADER)
    pkru = Area(decoded, PKRU_BYTES, PKRU_OFFSET)

    def restore(ctx: Emulation) -> None:
        _check_enabled(ctx)
        area.check_aligned(ctx, 0, _ALIGNMENT)
        words = ctx.words
        requested = words[XCR0] & _edx_eax(words)
        image = area.load(ctx) if requested & _LEGACY else b""
        xstate_bv, xcomp_bv, reserved = _CHECKED_HEADER.unpack(image[XSAVE_HEADER:] or header_only.load(ctx))
        if xstate_bv & ~words[XCR0] or xcomp_bv or reserved:
            raise general_protection()
        with_sse = requested & COMPONENT_SSE != 0
        if with_sse and image_mxcsr(image) & ~MXCSR_WRITABLE:
            raise general_protection()
        loaded = requested & xstate_bv
        rights = int.from_bytes(pkru.load(ctx), "little") & MASK32 if loaded & COMPONENT_PKRU else 0
        load_fxsave_image(
            ctx.fpu,
            image,
            wide_pointers=wide,
            xmm_registers=count if loaded & COMPONENT_SSE else 0,
            with_mxcsr=with_sse,
            with_x87=loaded & COMPONENT_X87 != 0,
        )
        initialize_components(ctx.fpu, requested & ~xstate_bv, count)
        if requested & COMPONENT_PKRU and rights != words[PKRU]:
            set_pkru(words, rights)
            # Translations that the interpreter keeps are stale for the next instruction already.
            ctx.leave_block = True

    return restore


# ----------------------------------------------------------------------------------------------------------- XCR0


def _xgetbv(ctx: Emulation, decoded: Decoded) -> None:
    """With ECX = 1 it tells which of the components in XCR0 are in use, where CPUID has that."""
    words = ctx.words
    _check_osxsave(words)
    index = words[RCX] & MASK32
    if index == _XCR0_INDEX:
        value = words[XCR0]
    elif index == _XINUSE_INDEX and ctx.cpuid.has("xgetbv1"):
        count = saved_xmm_registers(decoded.bits)
        image = fxsave_image(ctx.fpu, wide_pointers=False, xmm_registers=count)
        value = words[XCR0] & _in_use(words, image)
    else:
        raise general_protection()
    words[RAX], words[RDX] = value & MASK32, value >> _HIGH_SHIFT
    complete(ctx, decoded)


def _xsetbv(ctx: Emulation, decoded: Decoded) -> None:
    words = ctx.words
    _check_osxsave(words)
    require_cpl0(words)
    value = _edx_eax(words)
    if words[RCX] & MASK32 != _XCR0_INDEX or not is_valid_xcr0(value, ctx.cpuid):
        raise general_protection()
    words[XCR0] = value
    complete(ctx, decoded)


# ------------------------------------------------------------------------------------------------------- together


def _check_enabled(ctx: Emulation) -> None:
    _check_osxsave(ctx.words)
    check_not_switched(ctx)


def _check_osxsave(words: Words) -> None:
    if not words[CR4] & CR4_OSXSAVE:
        raise invalid_opcode()


def _edx_eax(words: Words) -> int:
    return (words[RDX] & MASK32) << _HIGH_SHIFT | words[RAX] & MASK32


#: Plain instructions, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    Mnemonic.XSAVE: _xsave,
    Mnemonic.XSAVE64: _xsave,
    Mnemonic.XSAVEOPT: _xsaveopt,
    Mnemonic.XSAVEOPT64: _xsaveopt,
    Mnemonic.XRSTOR: _xrstor,
    Mnemonic.XRSTOR64: _xrstor,
}

#: The handlers of this module, by ``iced_x86.Mnemonic``.
HANDLERS: dict[int, Handler] = {
    Mnemonic.XGETBV: _xgetbv,
    Mnemonic.XSETBV: _xsetbv,
}
