"""Reading the descriptor tables: GDT, LDT, IDT and the task-state segment.

Plain functions over integers, in the compiled subset. All these accesses are implicit supervisor-mode
accesses: LASS, SMAP and paging judge them as such at any CPL. A fault is returned as ``(vector, error_code,
fault_address)`` with the error code as the access raises it; whoever delivers an event adds the EXT bit.

Source: Intel SDM volume 3A, 3.5.1 (descriptor tables), 5.6 (implicit supervisor-mode accesses); KVM's
``get_descriptor_ptr()`` and ``linear_read_system()``.
"""

from lasskvm.emulator.mmu import load_linear, next_linear, store_linear, translate
from lasskvm.lass import IMPLICIT
from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    GDT_BASE,
    GDT_LIMIT,
    LIMIT,
    SEGMENT_WORDS,
    SEGMENTS,
    SELECTOR,
    Words,
)
from lasskvm.x86.descriptors import DESCRIPTOR_BYTES, SELECTOR_OFFSET, SELECTOR_TI
from lasskvm.x86.exceptions import GP
from lasskvm.x86.exceptions import TS as INVALID_TSS
from lasskvm.x86.paging import PhysicalMemory, load_physical
from lasskvm.x86.registers import AR_UNUSABLE, LDTR, TR

__all__ = [
    "is_null_selector",
    "load_descriptor",
    "load_stack_pointer64",
    "load_system",
    "load_system_pair",
    "locate_descriptor",
    "selector_error_code",
    "store_descriptor",
]

_LDTR = SEGMENTS + SEGMENT_WORDS * LDTR
_TR = SEGMENTS + SEGMENT_WORDS * TR
_PAGE_OFFSET = 0xFFF
_PAGE_SIZE = 0x1000
_PAIR_BYTES = 16
_WORD_BYTES = 8


def is_null_selector(selector: int) -> bool:
    """Whether *selector* is one of the four null selectors."""
    return selector & (SELECTOR_OFFSET | SELECTOR_TI) == 0


def selector_error_code(selector: int) -> int:
    """The error code that reports *selector*: its index and TI bit."""
    return selector & (SELECTOR_OFFSET | SELECTOR_TI)


def load_system(state: Words, memory: PhysicalMemory, address: int, size: int) -> tuple[int, int, int, int]:
    """Load 1 to 8 bytes of a system structure: ``(value, vector, error_code, fault_address)``."""
    return load_linear(state, memory, address, size, IMPLICIT, 0, 0)


def load_system_pair(state: Words, memory: PhysicalMemory, address: int) -> tuple[int, int, int, int, int]:
    """Load 16 bytes of a system structure as two words: ``(low, high, vector, error_code, fault_address)``.

    One page walk where they lie in one page, as IDT entries nearly always do.
    """
    if address & _PAGE_OFFSET <= _PAGE_SIZE - _PAIR_BYTES:
        gpa, _, vector, error_code = translate(state, memory, address, _PAIR_BYTES, IMPLICIT, 0, 0)
        if vector != 0:
            return 0, 0, vector, error_code, address
        low = load_physical(memory, gpa, _WORD_BYTES)
        return low, load_physical(memory, gpa + _WORD_BYTES, _WORD_BYTES), 0, 0, 0
    low, vector, error_code, fault_address = load_linear(state, memory, address, _WORD_BYTES, IMPLICIT, 0, 0)
    if vector != 0:
        return 0, 0, vector, error_code, fault_address
    second = next_linear(state, address, _WORD_BYTES)
    high, vector, error_code, fault_address = load_linear(state, memory, second, _WORD_BYTES, IMPLICIT, 0, 0)
    return low, high, vector, error_code, fault_address


def load_stack_pointer64(state: Words, memory: PhysicalMemory, field: int) -> tuple[int, int, int, int]:
    """Load the stack pointer at offset *field* of the 64-bit TSS: ``(rsp, vector, error_code, fault_address)``.

    #TS with the selector of the TSS when it does not reach that far.
    """
    if field + _WORD_BYTES - 1 > state[_TR + LIMIT]:
        return 0, INVALID_TSS, selector_error_code(state[_TR + SELECTOR]), 0
    return load_system(state, memory, next_linear(state, state[_TR + BASE], field), _WORD_BYTES)


def locate_descriptor(state: Words, selector: int, size: int) -> tuple[int, int]:
    """Where the descriptor of *selector* lies: ``(address, vector)``.

    *vector* is #GP when the *size* bytes do not fit into the table, or when the selector is of an LDT and
    there is none.
    """
    offset = selector & SELECTOR_OFFSET
    base = state[GDT_BASE]
    limit = state[GDT_LIMIT]
    if selector & SELECTOR_TI != 0:
        if state[_LDTR + ATTRIBUTES] & AR_UNUSABLE != 0:
            return 0, GP
        base = state[_LDTR + BASE]
        limit = state[_LDTR + LIMIT]
    if offset + size - 1 > limit:
        return 0, GP
    return next_linear(state, base, offset), 0


def load_descriptor(state: Words, memory: PhysicalMemory, selector: int) -> tuple[int, int, int, int]:
    """Load the descriptor of *selector*: ``(descriptor, vector, error_code, fault_address)``.

    Outside its table: #GP with the selector as error code. A null selector is the caller's business.
    """
    address, vector = locate_descriptor(state, selector, DESCRIPTOR_BYTES)
    if vector != 0:
        return 0, vector, selector_error_code(selector), 0
    return load_linear(state, memory, address, DESCRIPTOR_BYTES, IMPLICIT, 0, 0)


def store_descriptor(
    state: Words, memory: PhysicalMemory, selector: int, descriptor: int
) -> tuple[int, int, int]:
    """Write back *descriptor*, accessed or busy now: ``(vector, error_code, fault_address)``."""
    address, vector = locate_descriptor(state, selector, DESCRIPTOR_BYTES)
    if vector != 0:
        return vector, selector_error_code(selector), 0
    return store_linear(state, memory, address, DESCRIPTOR_BYTES, descriptor, IMPLICIT, 0, 0)
