"""Event delivery outside IA-32e mode: the real-mode vector table, 16-bit and 32-bit gates, virtual-8086 mode.

Only boot code runs here, so this is plain Python and raises :class:`GuestFault` when delivery faults. Task
gates are not implemented: they raise :class:`Unhandleable`, which ends in an internal-error exit, as in KVM's
emulator.

Source: Intel SDM volume 2A, INT n (operation); volume 3A, 7.12 (procedure calls), 21.1.4 (real mode) and 21.3
(virtual-8086 mode).
"""

from __future__ import annotations

from lasskvm.emulator.delivery import SOFTWARE, gate_code_segment, pushed_flags
from lasskvm.emulator.entry_stacks import current_stack, load_structure, stack_from_tss
from lasskvm.emulator.faults import GuestFault, Unhandleable, raise_linear_fault
from lasskvm.emulator.modes import in_real_mode
from lasskvm.emulator.segments import (
    descriptor_privilege_level,
    segment_from_descriptor,
    set_accessed,
    set_segment,
)
from lasskvm.emulator.tables import selector_error_code
from lasskvm.state import (
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
    gate_offset16,
    gate_offset32,
    gate_selector,
    segment_attributes,
)
from lasskvm.x86.exceptions import ERROR_EXT, ERROR_IDT, GP, NP
from lasskvm.x86.paging import PhysicalMemory
from lasskvm.x86.registers import (
    AR_P,
    AR_S,
    AR_TYPE,
    AR_UNUSABLE,
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
    entry = load_structure(words, memory, words[IDT_BASE] + offset & MASK32, _REAL_MODE_ENTRY_BYTES, external)
    instruction_pointer, selector = entry & _MASK16, entry >> 16
    if instruction_pointer > words[segment_word(CS, LIMIT)]:
        raise GuestFault(GP, external)
    stack = current_stack(words, external)
    frame = [words[RFLAGS], words[segment_word(CS, SELECTOR)], return_rip]
    stack.push(words, memory, _WORD16_BYTES, frame)
    stack.commit(words)
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
        stack = current_stack(words, external)
        frame: list[int] = []
    else:
        stack = stack_from_tss(words, memory, new_cpl, external)
        frame = [words[segment_word(SS, SELECTOR)], words[RSP]]
        if from_virtual_8086:
            frame = [words[segment_word(number, SELECTOR)] for number in _VIRTUAL_8086_PUSHES] + frame
    frame += [pushed_flags(words, vector, kind), words[segment_word(CS, SELECTOR)], return_rip]
    if error_code is not None:
        frame.append(error_code)
    size = _WORD32_BYTES if is_gate32 else _WORD16_BYTES
    stack.check_room(words, size, len(frame))
    if entry > code.limit:
        raise GuestFault(GP, external)
    stack.push(words, memory, size, frame)
    descriptor = set_accessed(words, memory, selector, descriptor, external)

    stack.commit(words)
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
    gate = load_structure(words, memory, words[IDT_BASE] + offset & MASK32, DESCRIPTOR_BYTES, external)
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
