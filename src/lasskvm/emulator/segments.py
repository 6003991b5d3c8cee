"""Loading segment registers, LDTR and TR, with every check on the selector and its descriptor.

CS is not checked here: it changes only with control transfers (:mod:`lasskvm.emulator.code_segments`). Everything
raises :class:`GuestFault` before anything has changed, except that the descriptor's accessed bit may be set.

Source: Intel SDM volume 2A, MOV (operation), LLDT, LTR; volume 3A, 3.4, 6.6 and 6.7; KVM's
``__load_segment_descriptor()``.
"""

from __future__ import annotations

from lasskvm.emulator.faults import GuestFault, general_protection, raise_linear_fault
from lasskvm.emulator.mmu import load_linear, next_linear
from lasskvm.emulator.modes import (
    in_64bit_mode,
    in_ia32e_mode,
    in_protected_mode,
    in_virtual_8086_mode,
    linear_address_bits,
)
from lasskvm.emulator.tables import (
    is_null_selector,
    load_descriptor,
    locate_descriptor,
    selector_error_code,
    store_descriptor,
)
from lasskvm.lass import IMPLICIT
from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    CPL,
    LIMIT,
    SELECTOR,
    Segment,
    Words,
    segment_word,
)
from lasskvm.x86.address import is_canonical
from lasskvm.x86.descriptors import (
    DESCRIPTOR_ACCESSED,
    DESCRIPTOR_BYTES,
    DESCRIPTOR_BYTES64,
    DESCRIPTOR_TSS_BUSY,
    SELECTOR_RPL,
    SELECTOR_TI,
    SYS_LDT,
    SYS_TSS16_AVAILABLE,
    SYS_TSS_AVAILABLE,
    SYS_TSS_BUSY_BIT,
    high_is_valid,
    segment_attributes,
    segment_base,
    segment_base64,
    segment_limit,
)
from lasskvm.x86.exceptions import GP, NP
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.paging import PhysicalMemory
from lasskvm.x86.registers import (
    AR_CODE,
    AR_CONFORMING,
    AR_DPL_SHIFT,
    AR_P,
    AR_READABLE,
    AR_REAL_MODE,
    AR_S,
    AR_TYPE,
    AR_UNUSABLE,
    AR_WRITABLE,
    DS,
    ES,
    FS,
    GS,
    LDTR,
    SS,
    TR,
)

__all__ = [
    "descriptor_privilege_level",
    "fetch_descriptor",
    "load_ldtr",
    "load_segment",
    "load_tr",
    "loaded_segment",
    "null_privileged_segments",
    "null_stack_segment",
    "real_mode_segment",
    "segment_from_descriptor",
    "set_accessed",
    "set_segment",
    "stack_segment",
    "virtual_8086_segment",
]

_DPL = 3
_MASK16 = 0xFFFF
_PARAGRAPH_SHIFT = 4


def load_segment(words: Words, memory: PhysicalMemory, number: int, selector: int) -> None:
    """Load ES, SS, DS, FS or GS as MOV and POP do, by the rules of the current mode."""
    set_segment(words, number, loaded_segment(words, memory, number, selector))


def loaded_segment(words: Words, memory: PhysicalMemory, number: int, selector: int) -> Segment:
    """What loading *selector* makes of ES, SS, DS, FS or GS; the register is not changed yet."""
    if not in_protected_mode(words):
        return real_mode_segment(words, number, selector)
    if number == SS:
        return stack_segment(words, memory, selector, words[CPL], in_64bit_mode(words))
    if is_null_selector(selector):
        return Segment(selector, 0, 0, AR_UNUSABLE)
    descriptor = fetch_descriptor(words, memory, selector)
    attributes = segment_attributes(descriptor)
    _check_data_segment(words, selector, attributes)
    if not attributes & AR_P:
        raise GuestFault(NP, selector_error_code(selector))
    return segment_from_descriptor(selector, set_accessed(words, memory, selector, descriptor))


def stack_segment(
    words: Words, memory: PhysicalMemory, selector: int, cpl: int, allows_null: bool
) -> Segment:
    """What loading *selector* makes of SS at privilege level *cpl*.

    *allows_null* says that 64-bit code will run on it: below CPL 3 it can do without a stack segment.
    """
    if is_null_selector(selector):
        if not allows_null or cpl == _DPL or selector & SELECTOR_RPL != cpl:
            raise general_protection()
        return null_stack_segment(cpl)
    descriptor = fetch_descriptor(words, memory, selector)
    attributes = segment_attributes(descriptor)
    _check_stack_segment(selector, attributes, cpl)
    if not attributes & AR_P:
        raise GuestFault(STACK_FAULT, selector_error_code(selector))
    return segment_from_descriptor(selector, set_accessed(words, memory, selector, descriptor))


def null_stack_segment(cpl: int) -> Segment:
    """The SS without a segment that 64-bit code has at privilege level *cpl*, 0 to 2."""
    return Segment(cpl, 0, 0, AR_UNUSABLE | cpl << AR_DPL_SHIFT)


def null_privileged_segments(words: Words) -> None:
    """Take from a less privileged program, at the new CPL, the data segments that it must not have.

    Null selectors lose their RPL too. What FS and GS have as a base with a null selector stays, as 64-bit software
    expects.
    """
    for number in (ES, DS, FS, GS):
        first = segment_word(number, SELECTOR)
        attributes = words[first + ATTRIBUTES]
        if is_null_selector(words[first]):
            words[first] = 0
            words[first + ATTRIBUTES] = attributes | AR_UNUSABLE
            continue
        is_conforming_code = attributes & (AR_CODE | AR_CONFORMING) == AR_CODE | AR_CONFORMING
        if descriptor_privilege_level(attributes) < words[CPL] and not is_conforming_code:
            set_segment(words, number, Segment(0, 0, 0, AR_UNUSABLE))


def fetch_descriptor(words: Words, memory: PhysicalMemory, selector: int) -> int:
    """The descriptor of *selector*, which is not null; #GP with the selector when it lies outside its table."""
    descriptor, *fault = load_descriptor(words, memory, selector)
    raise_linear_fault(*fault)
    return descriptor


def real_mode_segment(words: Words, number: int, selector: int) -> Segment:
    """What loading *selector* in real or virtual-8086 mode makes of segment register *number*.

    Real mode changes selector and base only, so limits set in protected mode live on; virtual-8086 mode fixes
    them.
    """
    if in_virtual_8086_mode(words):
        return virtual_8086_segment(selector)
    first = segment_word(number, SELECTOR)
    base = selector << _PARAGRAPH_SHIFT
    return Segment(selector, base, words[first + LIMIT], words[first + ATTRIBUTES])


def virtual_8086_segment(selector: int) -> Segment:
    """Any segment register with *selector* in virtual-8086 mode."""
    return Segment(selector, selector << _PARAGRAPH_SHIFT, _MASK16, AR_REAL_MODE | _DPL << AR_DPL_SHIFT)


def segment_from_descriptor(selector: int, descriptor: int) -> Segment:
    """The segment register that *descriptor* makes."""
    return Segment(
        selector, segment_base(descriptor), segment_limit(descriptor), segment_attributes(descriptor)
    )


def set_segment(words: Words, number: int, segment: Segment) -> None:
    """Write all fields of segment register *number*."""
    first = segment_word(number, SELECTOR)
    words[first + SELECTOR] = segment.selector
    words[first + BASE] = segment.base
    words[first + LIMIT] = segment.limit
    words[first + ATTRIBUTES] = segment.attributes


def set_accessed(
    words: Words, memory: PhysicalMemory, selector: int, descriptor: int, external: int = 0
) -> int:
    """Set the accessed bit in *selector*'s descriptor in the table; returns the descriptor with it."""
    if not descriptor & DESCRIPTOR_ACCESSED:
        descriptor |= DESCRIPTOR_ACCESSED
        raise_linear_fault(*store_descriptor(words, memory, selector, descriptor), external)
    return descriptor


def descriptor_privilege_level(attributes: int) -> int:
    """The DPL in *attributes*."""
    return attributes >> AR_DPL_SHIFT & _DPL


def load_ldtr(words: Words, memory: PhysicalMemory, selector: int) -> None:
    """LLDT. A null selector makes LDTR unusable, and every selector with TI set a #GP."""
    if is_null_selector(selector):
        set_segment(words, LDTR, Segment(selector, 0, 0, AR_UNUSABLE))
        return
    segment, _ = _system_segment(words, memory, selector, (SYS_LDT,))
    set_segment(words, LDTR, segment)


def load_tr(words: Words, memory: PhysicalMemory, selector: int) -> None:
    """LTR. The TSS must be available, and becomes busy in the GDT."""
    if is_null_selector(selector):
        raise general_protection()
    types = (SYS_TSS_AVAILABLE,) if in_ia32e_mode(words) else (SYS_TSS16_AVAILABLE, SYS_TSS_AVAILABLE)
    segment, descriptor = _system_segment(words, memory, selector, types)
    raise_linear_fault(*store_descriptor(words, memory, selector, descriptor | DESCRIPTOR_TSS_BUSY))
    busy = segment.attributes | SYS_TSS_BUSY_BIT
    set_segment(words, TR, Segment(selector, segment.base, segment.limit, busy))


def _check_stack_segment(selector: int, attributes: int, cpl: int) -> None:
    writable_data = attributes & (AR_S | AR_CODE | AR_WRITABLE) == AR_S | AR_WRITABLE
    if selector & SELECTOR_RPL != cpl or not writable_data or descriptor_privilege_level(attributes) != cpl:
        raise general_protection(selector_error_code(selector))


def _check_data_segment(words: Words, selector: int, attributes: int) -> None:
    is_code = attributes & AR_CODE
    if not attributes & AR_S or (is_code and not attributes & AR_READABLE):
        raise general_protection(selector_error_code(selector))
    if is_code and attributes & AR_CONFORMING:
        return
    dpl = descriptor_privilege_level(attributes)
    if selector & SELECTOR_RPL > dpl or words[CPL] > dpl:
        raise general_protection(selector_error_code(selector))


def _system_segment(
    words: Words, memory: PhysicalMemory, selector: int, types: tuple[int, ...]
) -> tuple[Segment, int]:
    """The LDT or TSS that *selector* names, and the first 8 bytes of its descriptor."""
    error_code = selector_error_code(selector)
    if selector & SELECTOR_TI:
        raise general_protection(error_code)
    long_mode = in_ia32e_mode(words)
    size = DESCRIPTOR_BYTES64 if long_mode else DESCRIPTOR_BYTES
    address, vector = locate_descriptor(words, selector, size)
    if vector:
        raise general_protection(error_code)
    descriptor, *fault = load_linear(words, memory, address, DESCRIPTOR_BYTES, IMPLICIT, 0, 0)
    raise_linear_fault(*fault)
    attributes = segment_attributes(descriptor)
    if attributes & AR_S or attributes & AR_TYPE not in types:
        raise general_protection(error_code)
    if not attributes & AR_P:
        raise GuestFault(NP, error_code)
    base = segment_base(descriptor)
    if long_mode:
        high, *fault = load_linear(
            words, memory, next_linear(words, address, DESCRIPTOR_BYTES), DESCRIPTOR_BYTES, IMPLICIT, 0, 0
        )
        raise_linear_fault(*fault)
        base = segment_base64(descriptor, high)
        if not high_is_valid(high) or not is_canonical(base, linear_address_bits(words)):
            raise GuestFault(GP, error_code)
    return Segment(selector, base, segment_limit(descriptor), attributes), descriptor
