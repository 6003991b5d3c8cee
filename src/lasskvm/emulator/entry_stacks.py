"""The stacks that event delivery and call gates push on: the current one, or one that the TSS has for another level.

Pushes are accesses of the privilege level that will run on the stack, which is not the current one yet; so neither
CPL nor SS:RSP is looked at. Nothing but memory changes here: who pushes commits the new stack pointer.

Source: Intel SDM volume 3A, 6.8.5 (stack switching), 6.14.4 and 7.14.2 (64-bit mode); volume 2A, CALL and INT n.
"""

from __future__ import annotations

from dataclasses import dataclass

from lasskvm.emulator.faults import GuestFault, raise_linear_fault
from lasskvm.emulator.linearize import check_limit
from lasskvm.emulator.mmu import check_linear, store_linear
from lasskvm.emulator.segments import (
    descriptor_privilege_level,
    null_stack_segment,
    segment_from_descriptor,
    set_accessed,
    set_segment,
)
from lasskvm.emulator.tables import (
    is_null_selector,
    load_descriptor,
    load_stack_pointer64,
    load_system,
    selector_error_code,
)
from lasskvm.lass import STACK, WRITE
from lasskvm.state import ATTRIBUTES, BASE, CPL, LIMIT, RFLAGS, RSP, SELECTOR, Segment, Words, segment_word
from lasskvm.x86.descriptors import (
    SELECTOR_RPL,
    SYS_TSS16_BUSY,
    TSS16_SP0,
    TSS16_STACK_BYTES,
    TSS16_STACK_SS,
    TSS32_ESP0,
    TSS32_STACK_BYTES,
    TSS32_STACK_SS,
    TSS64_RSP0,
    TSS64_STACK_BYTES,
    segment_attributes,
)
from lasskvm.x86.exceptions import ERROR_EXT, GP
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.exceptions import TS as INVALID_TSS
from lasskvm.x86.paging import PhysicalMemory
from lasskvm.x86.registers import (
    AR_CODE,
    AR_DB,
    AR_P,
    AR_S,
    AR_TYPE,
    AR_WRITABLE,
    MASK32,
    MASK64,
    SS,
    TR,
)

__all__ = ["EntryStack", "current_stack", "load_structure", "stack_from_tss", "stack_from_tss64"]

_MASK16 = 0xFFFF
_SELECTOR_BYTES = 2


@dataclass
class EntryStack:
    """A stack being pushed on: its segment, its pointer, and the privilege level of the pushes.

    ``error_code`` is that of the #SS when a push leaves the segment. ``is_64bit``: the pointer is a linear address,
    and the segment does not matter.
    """

    segment: Segment
    pointer: int
    cpl: int
    error_code: int = 0
    is_64bit: bool = False

    def check_room(self, words: Words, size: int, count: int) -> None:
        """#SS unless *count* pushes of *size* bytes stay within the segment or, in 64-bit mode, are canonical."""
        offsets = self._offsets(size, count)
        if self.is_64bit:
            flags = WRITE | STACK
            has_room = not check_linear(words, offsets[-1], size * count, flags, self.cpl, words[RFLAGS])
        else:
            attributes, limit = self.segment.attributes, self.segment.limit
            has_room = all(check_limit(attributes, limit, offset, size) for offset in offsets)
        if not has_room:
            raise GuestFault(STACK_FAULT, self.error_code)

    def push(self, words: Words, memory: PhysicalMemory, size: int, values: list[int]) -> None:
        """Push *values* of *size* bytes each; the room for all of them is checked before the first is stored."""
        self.check_room(words, size, len(values))
        offsets = self._offsets(size, len(values))
        for offset, value in zip(offsets, values, strict=True):
            address = offset if self.is_64bit else self.segment.base + offset & MASK32
            value &= (1 << 8 * size) - 1
            fault = store_linear(words, memory, address, size, value, STACK, self.cpl, words[RFLAGS])
            raise_linear_fault(*fault, ERROR_EXT & self.error_code)
        self.pointer = self.pointer & (MASK64 ^ self._mask) | offsets[-1]

    def commit(self, words: Words) -> None:
        """Make this the current stack, and its privilege level the current one."""
        set_segment(words, SS, self.segment)
        words[RSP] = self.pointer if self.is_64bit else self.pointer & MASK32
        words[CPL] = self.cpl

    @property
    def _mask(self) -> int:
        if self.is_64bit:
            return MASK64
        return MASK32 if self.segment.attributes & AR_DB else _MASK16

    def _offsets(self, size: int, count: int) -> list[int]:
        """Where the next *count* pushes go."""
        return [self.pointer - size * (number + 1) & self._mask for number in range(count)]


def current_stack(words: Words, error_code: int = 0, *, is_64bit: bool = False) -> EntryStack:
    """SS:RSP at the current privilege level."""
    first = segment_word(SS, SELECTOR)
    segment = Segment(words[first], words[first + BASE], words[first + LIMIT], words[first + ATTRIBUTES])
    return EntryStack(segment, words[RSP], words[CPL], error_code, is_64bit)


def stack_from_tss64(words: Words, memory: PhysicalMemory, cpl: int) -> EntryStack:
    """The stack of privilege level *cpl* in the 64-bit TSS. SS becomes null.

    Raises :class:`GuestFault`: #TS with the TSS's selector when the TSS is too short.
    """
    pointer, *fault = load_stack_pointer64(words, memory, TSS64_RSP0 + cpl * TSS64_STACK_BYTES)
    raise_linear_fault(*fault)
    return EntryStack(null_stack_segment(cpl), pointer, cpl, is_64bit=True)


def stack_from_tss(words: Words, memory: PhysicalMemory, cpl: int, external: int = 0) -> EntryStack:
    """The stack of privilege level *cpl* in the 16-bit or 32-bit TSS.

    *external* is ``ERROR_EXT`` for external events. Raises :class:`GuestFault`: #TS with the TSS's selector or the
    stack's, #SS with the stack's when it is not present.
    """
    tss_selector = words[segment_word(TR, SELECTOR)]
    if words[segment_word(TR, ATTRIBUTES)] & AR_TYPE <= SYS_TSS16_BUSY:
        offset, pointer_bytes = TSS16_SP0 + cpl * TSS16_STACK_BYTES, TSS16_STACK_SS
    else:
        offset, pointer_bytes = TSS32_ESP0 + cpl * TSS32_STACK_BYTES, TSS32_STACK_SS
    if offset + pointer_bytes + _SELECTOR_BYTES - 1 > words[segment_word(TR, LIMIT)]:
        raise GuestFault(INVALID_TSS, selector_error_code(tss_selector) | external)
    address = words[segment_word(TR, BASE)] + offset
    pointer = load_structure(words, memory, address & MASK32, pointer_bytes, external)
    selector = load_structure(words, memory, address + pointer_bytes & MASK32, _SELECTOR_BYTES, external)

    if is_null_selector(selector):
        raise GuestFault(INVALID_TSS, external)
    error_code = selector_error_code(selector) | external
    descriptor, vector, fault_code, fault_address = load_descriptor(words, memory, selector)
    if vector == GP:
        # The selector points outside its table; nothing else raises #GP here.
        raise GuestFault(INVALID_TSS, error_code)
    raise_linear_fault(vector, fault_code, fault_address, external)
    attributes = segment_attributes(descriptor)
    writable_data = attributes & (AR_S | AR_CODE | AR_WRITABLE) == AR_S | AR_WRITABLE
    if selector & SELECTOR_RPL != cpl or descriptor_privilege_level(attributes) != cpl or not writable_data:
        raise GuestFault(INVALID_TSS, error_code)
    if not attributes & AR_P:
        raise GuestFault(STACK_FAULT, error_code)
    descriptor = set_accessed(words, memory, selector, descriptor, external)
    return EntryStack(segment_from_descriptor(selector, descriptor), pointer, cpl, error_code)


def load_structure(words: Words, memory: PhysicalMemory, address: int, size: int, external: int) -> int:
    """Load from the vector table, IDT or TSS, as the implicit access it is; raises its fault."""
    value, vector, error_code, fault_address = load_system(words, memory, address, size)
    raise_linear_fault(vector, error_code, fault_address, external)
    return value
