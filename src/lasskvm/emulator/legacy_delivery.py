"""Event delivery outside IA-32e mode: the real-mode vector table, 16-bit and 32-bit gates, virtual-8086 mode.

Only boot code runs here, so this is plain Python and raises :class:`GuestFault` when delivery faults. Task
gates are not implemented: they raise :class:`Unhandleable`, which ends in an internal-error exit, as in KVM's
emulator.

Source: Intel SDM volume 2A, INT n (operation); volume 3A, 7.12 (procedure calls), 21.1.4 (real mode) and 21.3
(virtual-8086 mode).
"""

from __future__ import annotations

from dataclasses import dataclass

from lasskvm.emulator.delivery import SOFTWARE, gate_code_segment, pushed_flags
from lasskvm.emulator.faults import GuestFault, Unhandleable, raise_linear_fault
from lasskvm.emulator.linearize import check_limit
from lasskvm.emulator.mmu import store_linear
from lasskvm.emulator.modes import in_real_mode
from lasskvm.emulator.segments import (
    descriptor_privilege_level,
    segment_from_descriptor,
    set_accessed,
    set_segment,
)
from lasskvm.emulator.tables import is_null_selector, load_descriptor, load_system, selector_error_code
from lasskvm.lass import STACK
from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    CPL,
    IDT_BASE,
    IDT_LIMIT,
    INTERRUPT_SHADOW,
    LIMIT,
    RFLAGS,
    RIP,
    RSP,
    SELECTOR,
    Segment,
    Words,
    segment_word,
)
from lasskvm.x86.descriptors import (
    DESCRIPTOR_BYTES,
    SELECTOR_RPL,
    SYS_INTERRUPT_GATE,
    SYS_INTERRUPT_GATE16,
    SYS_TASK_GATE,
    SYS_TRAP_GATE,
    SYS_TRAP_GATE16,
    SYS_TSS16_BUSY,
    TSS16_SP0,
    TSS16_STACK_BYTES,
    TSS16_STACK_SS,
    TSS32_ESP0,
    TSS32_STACK_BYTES,
    TSS32_STACK_SS,
    gate_offset16,
    gate_offset32,
    gate_selector,
    segment_attributes,
)
from lasskvm.x86.exceptions import ERROR_EXT, ERROR_IDT, GP, NP
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.exceptions import TS as INVALID_TSS
from lasskvm.x86.paging import PhysicalMemory
from lasskvm.x86.registers import (
    AR_CODE,
    AR_DB,
    AR_P,
    AR_S,
    AR_TYPE,
    AR_UNUSABLE,
    AR_WRITABLE,
    CS,
    DS,
    ES,
    FS,
    GS,
    MASK32,
    RFLAGS_AC,
    RFLAGS_IF,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VM,
    SS,
    TR,
)

__all__ = ["deliver_legacy"]

_MASK16 = 0xFFFF
_SELECTOR_BYTES = 2
_WORD16_BYTES, _WORD32_BYTES = 2, 4
_REAL_MODE_ENTRY_BYTES = 4
_PARAGRAPH_SHIFT = 4
_VECTOR_SHIFT = 3
_INTERRUPT_GATES = (SYS_INTERRUPT_GATE, SYS_INTERRUPT_GATE16)
_GATES32 = (SYS_INTERRUPT_GATE, SYS_TRAP_GATE)
_GATES16 = (SYS_INTERRUPT_GATE16, SYS_TRAP_GATE16)
#: The order in which an interrupt from virtual-8086 mode pushes the data segment selectors.
_VIRTUAL_8086_PUSHES = (GS, FS, DS, ES)


@dataclass
class _Stack:
    """A stack being pushed to: its segment, its pointer, and who pushes."""

    segment: Segment
    pointer: int
    cpl: int
    #: The error code of the #SS when a push leaves the segment.
    error_code: int


def deliver_legacy(
    words: Words, memory: PhysicalMemory, vector: int, error_code: int | None, kind: int, return_rip: int
) -> None:
    """Deliver event *vector* outside IA-32e mode; *kind* is one of :mod:`lasskvm.emulator.delivery`'s.

    Raises :class:`GuestFault` with the words unchanged, or :class:`Unhandleable` for a task gate.
    """
    external = 0 if kind == SOFTWARE else ERROR_EXT
    if in_real_mode(words):
        _deliver_real_mode(words, memory, vector, return_rip, external)
    else:
        _deliver_protected_mode(words, memory, vector, error_code, kind, return_rip, external)
    words[INTERRUPT_SHADOW] = 0


def _deliver_real_mode(
    words: Words, memory: PhysicalMemory, vector: int, return_rip: int, external: int
) -> None:
    offset = vector * _REAL_MODE_ENTRY_BYTES
    if offset + _REAL_MODE_ENTRY_BYTES - 1 > words[IDT_LIMIT]:
        raise GuestFault(GP, vector << _VECTOR_SHIFT | ERROR_IDT | external)
    entry = _load(words, memory, words[IDT_BASE] + offset & MASK32, _REAL_MODE_ENTRY_BYTES, external)
    instruction_pointer, selector = entry & _MASK16, entry >> 16
    if instruction_pointer > words[segment_word(CS, LIMIT)]:
        raise GuestFault(GP, external)
    stack = _current_stack(words, external)
    frame = (words[RFLAGS], words[segment_word(CS, SELECTOR)], return_rip)
    _push_all(words, memory, stack, _WORD16_BYTES, frame)
    _set_stack_pointer(words, stack)
    words[segment_word(CS, SELECTOR)] = selector
    words[segment_word(CS, BASE)] = selector << _PARAGRAPH_SHIFT
    words[RIP] = instruction_pointer
    words[RFLAGS] &= ~(RFLAGS_IF | RFLAGS_TF | RFLAGS_AC | RFLAGS_RF)


def _deliver_protected_mode(
    words: Words,
    memory: PhysicalMemory,
    vector: int,
    error_code: int | None,
    kind: int,
    return_rip: int,
    external: int,
) -> None:
    gate, gate_type = _load_gate(words, memory, vector, kind, external)
    is_gate32 = gate_type in _GATES32
    selector = gate_selector(gate)
    descriptor, new_cpl, *fault = gate_code_segment(words, memory, selector, external)
    raise_linear_fault(*fault)
    from_virtual_8086 = bool(words[RFLAGS] & RFLAGS_VM)
    if from_virtual_8086 and new_cpl != 0:
        raise GuestFault(GP, selector_error_code(selector) | external)
    code = segment_from_descriptor(selector & ~SELECTOR_RPL | new_cpl, descriptor)
    entry = gate_offset32(gate) if is_gate32 else gate_offset16(gate)
    if new_cpl == words[CPL]:
        stack = _current_stack(words, external)
        frame: list[int] = []
    else:
        stack = _stack_from_tss(words, memory, new_cpl, external)
        frame = [words[segment_word(SS, SELECTOR)], words[RSP]]
        if from_virtual_8086:
            frame = [words[segment_word(number, SELECTOR)] for number in _VIRTUAL_8086_PUSHES] + frame
    if entry > code.limit:
        raise GuestFault(GP, external)
    frame += [pushed_flags(words, vector, kind), words[segment_word(CS, SELECTOR)], return_rip]
    if error_code is not None:
        frame.append(error_code)
    _push_all(words, memory, stack, _WORD32_BYTES if is_gate32 else _WORD16_BYTES, tuple(frame))
    descriptor = set_accessed(words, memory, selector, descriptor, external)

    if new_cpl != words[CPL]:
        set_segment(words, SS, stack.segment)
        words[CPL] = new_cpl
    _set_stack_pointer(words, stack)
    set_segment(words, CS, segment_from_descriptor(code.selector, descriptor))
    if from_virtual_8086:
        for number in _VIRTUAL_8086_PUSHES:
            set_segment(words, number, Segment(0, 0, 0, AR_UNUSABLE))
    words[RIP] = entry
    words[RFLAGS] &= ~(RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM)
    if gate_type in _INTERRUPT_GATES:
        words[RFLAGS] &= ~RFLAGS_IF


def _load_gate(
    words: Words, memory: PhysicalMemory, vector: int, kind: int, external: int
) -> tuple[int, int]:
    error_code = vector << _VECTOR_SHIFT | ERROR_IDT | external
    offset = vector * DESCRIPTOR_BYTES
    if offset + DESCRIPTOR_BYTES - 1 > words[IDT_LIMIT]:
        raise GuestFault(GP, error_code)
    gate = _load(words, memory, words[IDT_BASE] + offset & MASK32, DESCRIPTOR_BYTES, external)
    attributes = segment_attributes(gate)
    gate_type = attributes & (AR_S | AR_TYPE)
    if gate_type not in (*_GATES32, *_GATES16, SYS_TASK_GATE):
        raise GuestFault(GP, error_code)
    if kind == SOFTWARE and descriptor_privilege_level(attributes) < words[CPL]:
        raise GuestFault(GP, error_code)
    if not attributes & AR_P:
        raise GuestFault(NP, error_code)
    if gate_type == SYS_TASK_GATE:
        raise Unhandleable(f"event {vector} goes through a task gate, and task switches are not implemented")
    return gate, gate_type


def _stack_from_tss(words: Words, memory: PhysicalMemory, cpl: int, external: int) -> _Stack:
    """The stack of privilege level *cpl* in the current TSS (SDM volume 3A, 6.8.5)."""
    tss_selector = words[segment_word(TR, SELECTOR)]
    if words[segment_word(TR, ATTRIBUTES)] & AR_TYPE <= SYS_TSS16_BUSY:
        offset, pointer_bytes = TSS16_SP0 + cpl * TSS16_STACK_BYTES, TSS16_STACK_SS
    else:
        offset, pointer_bytes = TSS32_ESP0 + cpl * TSS32_STACK_BYTES, TSS32_STACK_SS
    if offset + pointer_bytes + _SELECTOR_BYTES - 1 > words[segment_word(TR, LIMIT)]:
        raise GuestFault(INVALID_TSS, selector_error_code(tss_selector) | external)
    address = words[segment_word(TR, BASE)] + offset
    pointer = _load(words, memory, address & MASK32, pointer_bytes, external)
    selector = _load(words, memory, address + pointer_bytes & MASK32, _SELECTOR_BYTES, external)

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
    return _Stack(segment_from_descriptor(selector, descriptor), pointer, cpl, error_code)


def _load(words: Words, memory: PhysicalMemory, address: int, size: int, external: int) -> int:
    """Load from the vector table, IDT or TSS, as the implicit access it is."""
    value, vector, error_code, fault_address = load_system(words, memory, address, size)
    raise_linear_fault(vector, error_code, fault_address, external)
    return value


def _current_stack(words: Words, external: int) -> _Stack:
    first = segment_word(SS, SELECTOR)
    segment = Segment(words[first], words[first + BASE], words[first + LIMIT], words[first + ATTRIBUTES])
    return _Stack(segment, words[RSP], words[CPL], external)


def _push_all(
    words: Words, memory: PhysicalMemory, stack: _Stack, size: int, values: tuple[int, ...]
) -> None:
    """Push *values* of *size* bytes each; the room for all of them is checked before the first is stored."""
    segment = stack.segment
    mask = MASK32 if segment.attributes & AR_DB else _MASK16
    offsets = [stack.pointer - size * (number + 1) & mask for number in range(len(values))]
    if not all(check_limit(segment.attributes, segment.limit, offset, size) for offset in offsets):
        raise GuestFault(STACK_FAULT, stack.error_code)
    for offset, value in zip(offsets, values, strict=True):
        address = segment.base + offset & MASK32
        value &= (1 << 8 * size) - 1
        fault = store_linear(words, memory, address, size, value, STACK, stack.cpl, words[RFLAGS])
        raise_linear_fault(*fault, ERROR_EXT & stack.error_code)
    stack.pointer = stack.pointer & ~mask | offsets[-1]


def _set_stack_pointer(words: Words, stack: _Stack) -> None:
    words[RSP] = stack.pointer & MASK32
