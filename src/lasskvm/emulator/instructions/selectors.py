"""Instructions that inspect selectors and descriptors: LAR, LSL, VERR, VERW, and ARPL.

Each function is a :data:`~lasskvm.emulator.completion.Handler`. They need protected mode. A selector that cannot be
used is no fault but clears ZF; the descriptor reads are implicit accesses and can fault.

Source: Intel SDM volume 2A, ARPL, LAR, LSL; volume 2B, VERR/VERW.
"""

from __future__ import annotations

from iced_x86 import Mnemonic, OpKind, Register

from lasskvm.emulator.accessors import register_reader, register_writer, update_reader, writer
from lasskvm.emulator.completion import Handler, complete
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded, register_info
from lasskvm.emulator.faults import invalid_opcode, raise_linear_fault
from lasskvm.emulator.modes import in_ia32e_mode, in_protected_mode
from lasskvm.emulator.operands import read_operand, read_register, write_register
from lasskvm.emulator.segments import descriptor_privilege_level
from lasskvm.emulator.tables import is_null_selector, load_system, locate_descriptor
from lasskvm.state import CPL, RFLAGS, Words
from lasskvm.x86.descriptors import (
    DESCRIPTOR_BYTES,
    SELECTOR_RPL,
    SYS_CALL_GATE,
    SYS_CALL_GATE16,
    SYS_LDT,
    SYS_TASK_GATE,
    SYS_TSS16_AVAILABLE,
    SYS_TSS16_BUSY,
    SYS_TSS_AVAILABLE,
    SYS_TSS_BUSY,
    segment_attributes,
    segment_limit,
)
from lasskvm.x86.registers import (
    AR_CODE,
    AR_CONFORMING,
    AR_READABLE,
    AR_S,
    AR_TYPE,
    AR_WRITABLE,
    RFLAGS_ZF,
)

__all__ = ["HANDLERS"]

_SELECTOR = 0xFFFF
#: The descriptor's second doubleword with base and limit masked out.
_ACCESS_RIGHTS_SHIFT = 32
_ACCESS_RIGHTS = 0x00F0FF00

# System descriptors that have a limit, outside IA-32e mode and in it, and gates that have access rights besides. The
# manual's table for LAR omits LDTs in IA-32e mode; processors take them, and so does direct execution.
_WITH_LIMIT = (SYS_TSS16_AVAILABLE, SYS_LDT, SYS_TSS16_BUSY, SYS_TSS_AVAILABLE, SYS_TSS_BUSY)
_WITH_LIMIT_IA32E = (SYS_LDT, SYS_TSS_AVAILABLE, SYS_TSS_BUSY)
_WITH_RIGHTS = (*_WITH_LIMIT, SYS_CALL_GATE16, SYS_TASK_GATE, SYS_CALL_GATE)
_WITH_RIGHTS_IA32E = (*_WITH_LIMIT_IA32E, SYS_CALL_GATE)


def _lar(ctx: Emulation, decoded: Decoded) -> None:
    descriptor = _usable_descriptor(ctx, decoded, 1, _WITH_RIGHTS, _WITH_RIGHTS_IA32E)
    rights = None if descriptor is None else descriptor >> _ACCESS_RIGHTS_SHIFT & _ACCESS_RIGHTS
    _write_if_usable(ctx, decoded, rights)


def _lsl(ctx: Emulation, decoded: Decoded) -> None:
    descriptor = _usable_descriptor(ctx, decoded, 1, _WITH_LIMIT, _WITH_LIMIT_IA32E)
    _write_if_usable(ctx, decoded, None if descriptor is None else segment_limit(descriptor))


def _write_if_usable(ctx: Emulation, decoded: Decoded, value: int | None) -> None:
    if value is not None:
        write_register(ctx.words, decoded.instruction.op0_register, value)
    _complete_with_zf(ctx, decoded, value is not None)


def _verr(ctx: Emulation, decoded: Decoded) -> None:
    """VERR: whether a read through the selector would be allowed; presence does not matter."""
    descriptor = _usable_descriptor(ctx, decoded, 0, (), ())
    is_readable = descriptor is not None and _is_readable(segment_attributes(descriptor))
    _complete_with_zf(ctx, decoded, is_readable)


def _verw(ctx: Emulation, decoded: Decoded) -> None:
    """VERW: whether a write through the selector would be allowed."""
    descriptor = _usable_descriptor(ctx, decoded, 0, (), ())
    is_writable = (
        descriptor is not None
        and segment_attributes(descriptor) & (AR_S | AR_CODE | AR_WRITABLE) == AR_S | AR_WRITABLE
    )
    _complete_with_zf(ctx, decoded, is_writable)


def _is_readable(attributes: int) -> bool:
    return not attributes & AR_CODE or attributes & AR_READABLE != 0


def _arpl(ctx: Emulation, decoded: Decoded) -> None:
    """ARPL: raise the RPL of the destination to that of the source. The destination is written in any case."""
    words = ctx.words
    _require_protected_mode(words)
    instruction = decoded.instruction
    if instruction.op0_kind == OpKind.MEMORY:
        read, write = update_reader(decoded, 0), writer(decoded, 0)
    else:
        # The operand is 16 bits wide, whatever the operand size.
        register = Register.AX + register_info(instruction.op0_register).number
        read, write = register_reader(register), register_writer(register)
    selector = read(ctx)
    rpl = read_register(words, instruction.op1_register) & SELECTOR_RPL
    is_lower = selector & SELECTOR_RPL < rpl
    write(ctx, selector & ~SELECTOR_RPL | rpl if is_lower else selector)
    _complete_with_zf(ctx, decoded, is_lower)


def _usable_descriptor(
    ctx: Emulation,
    decoded: Decoded,
    operand: int,
    legacy_types: tuple[int, ...],
    ia32e_types: tuple[int, ...],
) -> int | None:
    """The descriptor that *operand* selects, if the current program may use it.

    None for a null selector, one outside its table, a system descriptor of none of the given types, and what DPL
    forbids to CPL or RPL.
    """
    words = ctx.words
    _require_protected_mode(words)
    selector = read_operand(ctx, decoded, operand) & _SELECTOR
    if is_null_selector(selector):
        return None
    address, vector = locate_descriptor(words, selector, DESCRIPTOR_BYTES)
    if vector:
        return None
    descriptor, *fault = load_system(words, ctx.memory, address, DESCRIPTOR_BYTES)
    raise_linear_fault(*fault)
    attributes = segment_attributes(descriptor)
    if not attributes & AR_S:
        types = ia32e_types if in_ia32e_mode(words) else legacy_types
        if attributes & AR_TYPE not in types:
            return None
    elif attributes & (AR_CODE | AR_CONFORMING) == AR_CODE | AR_CONFORMING:
        return descriptor
    if descriptor_privilege_level(attributes) < max(words[CPL], selector & SELECTOR_RPL):
        return None
    return descriptor


def _complete_with_zf(ctx: Emulation, decoded: Decoded, is_set: bool) -> None:
    words = ctx.words
    words[RFLAGS] = words[RFLAGS] & ~RFLAGS_ZF | (RFLAGS_ZF if is_set else 0)
    complete(ctx, decoded)


def _require_protected_mode(words: Words) -> None:
    if not in_protected_mode(words):
        raise invalid_opcode()


#: The handlers of this module, by ``iced_x86.Mnemonic``.
HANDLERS: dict[int, Handler] = {
    Mnemonic.LAR: _lar,
    Mnemonic.LSL: _lsl,
    Mnemonic.VERR: _verr,
    Mnemonic.VERW: _verw,
    Mnemonic.ARPL: _arpl,
}
