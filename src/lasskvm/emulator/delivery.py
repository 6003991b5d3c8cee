"""Event delivery through a 64-bit IDT: gates, stack switching by TSS and IST, the frame.

:func:`deliver64` is in the compiled subset: direct execution calls it for every page fault and interrupt of
the guest without leaving native code. What to do about a fault during delivery, and delivery outside IA-32e
mode, is in :mod:`lasskvm.emulator.events`.

Reads of IDT, GDT, LDT and TSS are implicit supervisor-mode accesses. Pushes are not: they are accesses of the
new privilege level, to which RFLAGS.AC still applies; on a stack LASS or the canonical rule forbids they
raise #SS.

Source: Intel SDM volume 3A, 7.12 to 7.14 (procedure calls, error codes, 64-bit mode), volume 2A, INT n
(operation).
"""

from lasskvm.emulator.mmu import next_linear, store_linear, translate, untagged
from lasskvm.emulator.modes import in_ia32e_mode, linear_address_bits
from lasskvm.emulator.tables import (
    is_null_selector,
    load_descriptor,
    load_stack_pointer64,
    load_system_pair,
    selector_error_code,
    store_descriptor,
)
from lasskvm.lass import STACK, WRITE
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
    SEGMENT_WORDS,
    SEGMENTS,
    SELECTOR,
    Words,
)
from lasskvm.x86.address import is_canonical
from lasskvm.x86.descriptors import (
    DESCRIPTOR_ACCESSED,
    SELECTOR_RPL,
    SYS_INTERRUPT_GATE,
    SYS_TRAP_GATE,
    TSS64_IST1,
    TSS64_RSP0,
    TSS64_STACK_BYTES,
    gate_ist,
    gate_offset64,
    gate_selector,
    segment_attributes,
    segment_limit,
)
from lasskvm.x86.exceptions import (
    AC,
    BR,
    CP,
    DE,
    ERROR_EXT,
    ERROR_IDT,
    GP,
    MF,
    NM,
    NP,
    PF,
    UD,
    VE,
    XM,
)
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.exceptions import TS as INVALID_TSS
from lasskvm.x86.paging import PhysicalMemory, store_physical
from lasskvm.x86.registers import (
    AR_CODE,
    AR_CONFORMING,
    AR_DB,
    AR_DPL_SHIFT,
    AR_L,
    AR_P,
    AR_S,
    AR_TYPE,
    AR_UNUSABLE,
    CS,
    MASK64,
    RFLAGS_IF,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VM,
    SS,
    TR,
)

__all__ = [
    "EXCEPTION",
    "EXTERNAL",
    "FAULT_VECTORS",
    "SOFTWARE",
    "deliver64",
    "gate_code_segment",
    "pushed_flags",
]

# What kind of event is delivered
#: A processor-detected exception; INT1 is delivered as one too.
EXCEPTION = 0
#: INT n, INT3 or INTO: the gate's DPL must allow it, and faults on the way do not set EXT.
SOFTWARE = 1
#: An external interrupt or NMI.
EXTERNAL = 2

#: Bit *v* is set when exception *v* is a fault. #DB is left out: as a fault it does not set RF either (SDM
#: volume 3B, 18.3.1.1; KVM's ``exception_type()`` and the comment on it in
#: ``kvm_check_and_inject_events()``).
FAULT_VECTORS = (
    1 << DE | 1 << BR | 1 << UD | 1 << NM | 1 << INVALID_TSS | 1 << NP | 1 << STACK_FAULT | 1 << GP | 1 << PF
    | 1 << MF | 1 << AC | 1 << XM | 1 << VE | 1 << CP
)  # fmt: skip

_CS = SEGMENTS + SEGMENT_WORDS * CS
_SS = SEGMENTS + SEGMENT_WORDS * SS
_TR = SEGMENTS + SEGMENT_WORDS * TR
_DPL = 3
_GATE_SHIFT = 4
_GATE_LAST = 15
_VECTOR_SHIFT = 3
_FIRST_INTERRUPT_VECTOR = 32
_WORD_BYTES = 8
_FRAME_BYTES = 40
_STACK_ALIGNMENT = 16
_PAGE_OFFSET = 0xFFF
_PAGE_SIZE = 0x1000
#: Flags that delivery clears besides IF.
_CLEARED = RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM


def deliver64(
    state: Words,
    memory: PhysicalMemory,
    vector: int,
    error_code: int,
    has_error_code: int,
    kind: int,
    return_rip: int,
) -> tuple[int, int, int]:
    """Deliver event *vector* in IA-32e mode: ``(0, 0, 0)`` with the new state committed.

    Otherwise the vector, error code and address (a #PF's CR2) of the fault that prevented it, with the state
    untouched. *kind* is ``EXCEPTION``, ``SOFTWARE`` or ``EXTERNAL``; *return_rip* is pushed. Nothing but a
    frame is made here: CR2, DR6 and NMI blocking are set by the caller.
    """
    external = ERROR_EXT
    if kind == SOFTWARE:
        external = 0
    gate_error = (vector << _VECTOR_SHIFT) | ERROR_IDT | external
    offset = vector << _GATE_SHIFT
    if offset + _GATE_LAST > state[IDT_LIMIT]:
        return GP, gate_error, 0
    gate, gate_high, nested, nested_error, address = load_system_pair(
        state, memory, next_linear(state, state[IDT_BASE], offset)
    )
    if nested != 0:
        return _nested(nested, nested_error, external, address)
    attributes = segment_attributes(gate)
    gate_type = attributes & (AR_S | AR_TYPE)
    cpl = state[CPL]
    if gate_type != SYS_INTERRUPT_GATE and gate_type != SYS_TRAP_GATE:
        return GP, gate_error, 0
    if kind == SOFTWARE and (attributes >> AR_DPL_SHIFT) & _DPL < cpl:
        return GP, gate_error, 0
    if attributes & AR_P == 0:
        return NP, gate_error, 0

    selector = gate_selector(gate)
    descriptor, new_cpl, nested, nested_error, address = gate_code_segment(state, memory, selector, external)
    if nested != 0:
        return nested, nested_error, address

    new_rsp = state[RSP]
    ist = gate_ist(gate)
    if ist != 0 or new_cpl != cpl:
        field = TSS64_RSP0 + new_cpl * TSS64_STACK_BYTES
        if ist != 0:
            field = TSS64_IST1 + (ist - 1) * TSS64_STACK_BYTES
        new_rsp, nested, nested_error, address = load_stack_pointer64(state, memory, field)
        if nested != 0:
            return _nested(nested, nested_error, external, address)
    entry = gate_offset64(gate, gate_high)
    if not is_canonical(entry, linear_address_bits(state)):
        return GP, external, 0

    top = new_rsp & (MASK64 ^ (_STACK_ALIGNMENT - 1))
    new_rsp, nested, nested_error, address = _push_frame(
        state, memory, top, new_cpl, return_rip, pushed_flags(state, vector, kind), error_code,
        has_error_code,
    )  # fmt: skip
    if nested != 0:
        return _nested(nested, nested_error, external, address)
    if descriptor & DESCRIPTOR_ACCESSED == 0:
        descriptor = descriptor | DESCRIPTOR_ACCESSED
        nested, nested_error, address = store_descriptor(state, memory, selector, descriptor)
        if nested != 0:
            return _nested(nested, nested_error, external, address)

    state[RSP] = new_rsp
    state[RIP] = entry
    state[_CS + SELECTOR] = (selector & (MASK64 ^ SELECTOR_RPL)) | new_cpl
    state[_CS + BASE] = 0
    state[_CS + LIMIT] = segment_limit(descriptor)
    state[_CS + ATTRIBUTES] = segment_attributes(descriptor)
    if new_cpl != cpl:
        state[_SS + SELECTOR] = new_cpl
        state[_SS + BASE] = 0
        state[_SS + LIMIT] = 0
        state[_SS + ATTRIBUTES] = AR_UNUSABLE | (new_cpl << AR_DPL_SHIFT)
        state[CPL] = new_cpl
    cleared = _CLEARED
    if gate_type == SYS_INTERRUPT_GATE:
        cleared = _CLEARED | RFLAGS_IF
    state[RFLAGS] = state[RFLAGS] & (MASK64 ^ cleared)
    state[INTERRUPT_SHADOW] = 0
    return 0, 0, 0


def gate_code_segment(
    state: Words, memory: PhysicalMemory, selector: int, external: int
) -> tuple[int, int, int, int, int]:
    """The code segment that an interrupt or trap gate leads to.

    Returns ``(descriptor, new_cpl, vector, error_code, fault_address)``. A handler must not be less
    privileged than the interrupted program, and in IA-32e mode it must be 64-bit code. Legacy delivery uses
    this too.
    """
    if is_null_selector(selector):
        return 0, 0, GP, external, 0
    descriptor, vector, error_code, address = load_descriptor(state, memory, selector)
    if vector != 0:
        vector, error_code, address = _nested(vector, error_code, external, address)
        return 0, 0, vector, error_code, address
    cpl = state[CPL]
    attributes = segment_attributes(descriptor)
    dpl = (attributes >> AR_DPL_SHIFT) & _DPL
    error_code = selector_error_code(selector) | external
    if attributes & (AR_S | AR_CODE) != AR_S | AR_CODE or dpl > cpl:
        return 0, 0, GP, error_code, 0
    if in_ia32e_mode(state) and attributes & (AR_L | AR_DB) != AR_L:
        return 0, 0, GP, error_code, 0
    if attributes & AR_P == 0:
        return 0, 0, NP, error_code, 0
    if attributes & AR_CONFORMING == 0:
        cpl = dpl
    return descriptor, cpl, 0, 0, 0


def pushed_flags(state: Words, vector: int, kind: int) -> int:
    """The RFLAGS image to push: RF is 1 for fault-class exceptions, 0 for INT n, else as it is.

    An instruction resumed after a fault must not hit its own instruction breakpoint again (SDM volume 3B,
    18.3.1.1).
    """
    rflags = state[RFLAGS]
    if kind == SOFTWARE:
        rflags = rflags & (MASK64 ^ RFLAGS_RF)
    elif kind == EXCEPTION and vector < _FIRST_INTERRUPT_VECTOR and (FAULT_VECTORS >> vector) & 1 != 0:
        rflags = rflags | RFLAGS_RF
    return rflags


def _nested(vector: int, error_code: int, external: int, address: int) -> tuple[int, int, int]:
    """A fault during delivery: selector error codes tell whether the event was external to the program."""
    if vector == PF:
        return vector, error_code, address
    return vector, error_code | external, address


def _push_frame(
    state: Words,
    memory: PhysicalMemory,
    top: int,
    cpl: int,
    return_rip: int,
    rflags: int,
    error_code: int,
    has_error_code: int,
) -> tuple[int, int, int, int]:
    """Push SS, RSP, RFLAGS, CS, RIP, error code: ``(new_rsp, vector, error_code, fault_address)``."""
    size = _FRAME_BYTES
    if has_error_code != 0:
        size = _FRAME_BYTES + _WORD_BYTES
    base = (top - size) & MASK64
    pushed = state[_SS + SELECTOR], state[RSP], rflags, state[_CS + SELECTOR], return_rip, error_code
    if base & _PAGE_OFFSET <= _PAGE_SIZE - size:
        gpa, _, vector, fault_code = translate(state, memory, base, size, WRITE | STACK, cpl, state[RFLAGS])
        if vector != 0:
            return 0, vector, fault_code, untagged(state, (top - _WORD_BYTES) & MASK64, STACK)
        where = gpa + size
        for value in pushed:
            if where != gpa:
                where = where - _WORD_BYTES
                store_physical(memory, where, _WORD_BYTES, value)
        return base, 0, 0, 0
    address = top
    for value in pushed:
        # Without an error code the last of them is not pushed.
        if address != base:
            address = (address - _WORD_BYTES) & MASK64
            vector, fault_code, fault_address = store_linear(
                state, memory, address, _WORD_BYTES, value, STACK, cpl, state[RFLAGS]
            )
            if vector != 0:
                return 0, vector, fault_code, fault_address
    return base, 0, 0, 0
