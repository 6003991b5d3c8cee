"""Instructions of optional features: INVPCID, FSGSBASE, RDPID, protection keys, SMAP and SERIALIZE; UD and RSM.

:mod:`lasskvm.emulator.offered` has asked CPUID before any of them gets here; what they ask themselves is CR4, privilege
and operands. Most leave direct execution by #UD, because the translator does not know them or gets them wrong.

Source: Intel SDM volume 2, the instructions by name; KVM's ``kvm_handle_invpcid()``.
"""

from __future__ import annotations

from iced_x86 import Mnemonic

from lasskvm.emulator.completion import complete, require_cpl0
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.control import set_pkru, set_segment_base
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import general_protection, invalid_opcode
from lasskvm.emulator.modes import linear_address_bits
from lasskvm.emulator.operands import (
    load_memory_operand,
    read_operand,
    write_operand,
    write_register,
)
from lasskvm.emulator.operation import Builder, Executor, Handler
from lasskvm.state import (
    BASE,
    CPL,
    CR4,
    KERNEL_GS_BASE,
    PKRU,
    RAX,
    RCX,
    RDX,
    RFLAGS,
    TLB_FLUSH,
    TSC_AUX,
    segment_word,
)
from lasskvm.x86.address import is_canonical
from lasskvm.x86.registers import CR4_FSGSBASE, CR4_PCIDE, CR4_PKE, FS, GS, MASK32, MASK64, RFLAGS_AC

__all__ = ["HANDLERS", "PLAIN"]

# INVPCID: the types, and its descriptor: a PCID in bits 11:0, reserved bits up to 63, a linear address
_INVPCID_ADDRESS, _INVPCID_CONTEXT, _INVPCID_ALL_GLOBAL, _INVPCID_ALL = range(4)
_INVPCID_BYTES = 16
_PCID_BITS = 12
_INVPCID_ADDRESS_SHIFT = 64

_GS_BASE = segment_word(GS, BASE)
_SEGMENTS = {
    Mnemonic.RDFSBASE: FS,
    Mnemonic.WRFSBASE: FS,
    Mnemonic.RDGSBASE: GS,
    Mnemonic.WRGSBASE: GS,
}


def _invpcid(ctx: Emulation, decoded: Decoded) -> None:
    """The descriptor is a data access; the address in it is only named, so LASS does not apply. All translations go.

    The address is judged with all its 64 bits in every mode.
    """
    words = ctx.words
    require_cpl0(words)
    kind = read_operand(ctx, decoded, 0)
    descriptor = load_memory_operand(ctx, decoded, _INVPCID_BYTES)
    pcid, address = descriptor & MASK64, descriptor >> _INVPCID_ADDRESS_SHIFT
    if kind > _INVPCID_ALL or pcid >> _PCID_BITS:
        raise general_protection()
    if kind in (_INVPCID_ADDRESS, _INVPCID_CONTEXT) and pcid and not words[CR4] & CR4_PCIDE:
        raise general_protection()
    if kind == _INVPCID_ADDRESS and not is_canonical(address, linear_address_bits(words)):
        raise general_protection()
    words[TLB_FLUSH] = 1
    complete(ctx, decoded)


def _read_base(ctx: Emulation, decoded: Decoded) -> None:
    _require_fsgsbase(ctx)
    base = ctx.words[segment_word(_SEGMENTS[decoded.instruction.mnemonic], BASE)]
    write_operand(ctx, decoded, 0, base)
    complete(ctx, decoded)


def _write_base(ctx: Emulation, decoded: Decoded) -> None:
    _require_fsgsbase(ctx)
    if set_segment_base(ctx.words, _SEGMENTS[decoded.instruction.mnemonic], read_operand(ctx, decoded, 0)):
        raise general_protection()
    complete(ctx, decoded)


def _require_fsgsbase(ctx: Emulation) -> None:
    """Outside 64-bit mode the encodings do not exist."""
    if not ctx.words[CR4] & CR4_FSGSBASE:
        raise invalid_opcode()


def _swapgs(ctx: Emulation, decoded: Decoded) -> None:
    words = ctx.words
    require_cpl0(words)
    words[_GS_BASE], words[KERNEL_GS_BASE] = words[KERNEL_GS_BASE], words[_GS_BASE]
    complete(ctx, decoded)


def _rdpid(ctx: Emulation, decoded: Decoded) -> None:
    """At any privilege level, whatever CR4.TSD says."""
    write_register(ctx.words, decoded.instruction.op0_register, ctx.words[TSC_AUX] & MASK32)
    complete(ctx, decoded)


def _rdpkru(ctx: Emulation, decoded: Decoded) -> None:
    words = ctx.words
    _require_protection_keys(ctx)
    words[RAX], words[RDX] = words[PKRU], 0
    complete(ctx, decoded)


def _wrpkru(ctx: Emulation, decoded: Decoded) -> None:
    words = ctx.words
    _require_protection_keys(ctx)
    if words[RDX] & MASK32:
        raise general_protection()
    set_pkru(words, words[RAX] & MASK32)
    complete(ctx, decoded)


def _require_protection_keys(ctx: Emulation) -> None:
    words = ctx.words
    if not words[CR4] & CR4_PKE:
        raise invalid_opcode()
    if words[RCX] & MASK32:
        raise general_protection()


def _stac(ctx: Emulation, decoded: Decoded) -> None:
    _require_cpl0_or_undefined(ctx)
    ctx.words[RFLAGS] |= RFLAGS_AC
    complete(ctx, decoded)


def _clac(ctx: Emulation, decoded: Decoded) -> None:
    _require_cpl0_or_undefined(ctx)
    ctx.words[RFLAGS] &= ~RFLAGS_AC
    complete(ctx, decoded)


def _require_cpl0_or_undefined(ctx: Emulation) -> None:
    if ctx.words[CPL]:
        raise invalid_opcode()


def _undefined(ctx: Emulation, decoded: Decoded) -> None:
    """UD0, UD1 and UD2, which do not touch their operands, and RSM: there is no system-management mode to leave."""
    raise invalid_opcode()


def _no_operation(decoded: Decoded) -> Executor:
    """Prefetches of code do nothing; their operand is not touched, so nothing faults."""
    return lambda ctx: None


#: The handlers of this module, by ``iced_x86.Mnemonic``.
HANDLERS: dict[int, Handler] = {
    Mnemonic.INVPCID: _invpcid,
    Mnemonic.RDFSBASE: _read_base,
    Mnemonic.RDGSBASE: _read_base,
    Mnemonic.WRFSBASE: _write_base,
    Mnemonic.WRGSBASE: _write_base,
    Mnemonic.SWAPGS: _swapgs,
    Mnemonic.RDPID: _rdpid,
    Mnemonic.RDPKRU: _rdpkru,
    Mnemonic.WRPKRU: _wrpkru,
    Mnemonic.STAC: _stac,
    Mnemonic.CLAC: _clac,
    Mnemonic.SERIALIZE: complete,
    Mnemonic.UD0: _undefined,
    Mnemonic.UD1: _undefined,
    Mnemonic.UD2: _undefined,
    Mnemonic.RSM: _undefined,
}

#: Plain instructions, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    Mnemonic.PREFETCHIT0: _no_operation,
    Mnemonic.PREFETCHIT1: _no_operation,
}
