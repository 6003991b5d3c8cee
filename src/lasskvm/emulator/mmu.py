"""From linear to physical: LAM, the canonical rule, LASS, and the page walk, in a processor's order.

Plain functions over integers. The TLB fill of direct execution calls them compiled; event delivery and the emulator
call them compiled or as they are. A fault is returned, not raised: ``vector`` is 0 (no fault), or #GP or #SS with
error code 0 for an address that is not canonical or violates LASS, or #PF with its error code. In a nested guest it
can also be ``EPT_EXIT``, no fault but a VM exit; the state words ``EPT_FAULT_GPA`` and ``EPT_OUTCOME`` tell it then.

*flags* describe the access (:mod:`lasskvm.lass`); *cpl* and *rflags* are given, not read from the state, because
direct execution keeps them elsewhere while the guest runs, and because event delivery pushes with a CPL of its own.

Addresses are given as the program forms them: each function takes LAM's metadata off by itself, byte for byte, by
:func:`untagged`. Whoever reports an address that was accessed (CR2, breakpoints) asks that function, too.
Source: Intel SDM volume 3A, chapter 5 (paging), volume 1, 3.3.7 (canonical), 6.4.5 (page-crossing accesses).
"""

from lasskvm.lass import FETCH, IMPLICIT, STACK, WRITE, is_lass_violation
from lasskvm.state import (
    CR0,
    CR3,
    CR4,
    EFER,
    EPT_FAULT_GPA,
    EPT_OUTCOME,
    EPTP,
    MAXPHYADDR,
    PDPTR0,
    PKRS,
    PKRU,
    Words,
)
from lasskvm.x86.address import is_canonical, linear_bits, untag
from lasskvm.x86.ept import EPT_EXIT
from lasskvm.x86.exceptions import GP, PF, SS
from lasskvm.x86.paging import PhysicalMemory, load_physical, store_physical, walk
from lasskvm.x86.registers import EFER_LMA, MASK64, RFLAGS_AC

__all__ = ["check_linear", "load_linear", "locate", "next_linear", "store_linear", "translate", "untagged"]

_PAGE_OFFSET = 0xFFF
_PAGE_SIZE = 0x1000
_MASK32 = 0xFFFFFFFF


def untagged(state: Words, address: int, flags: int) -> int:
    """What an access of kind *flags* at *address* really accesses: the address without LAM's metadata."""
    return untag(address, flags, state[CR3], state[CR4])


def check_linear(state: Words, address: int, size: int, flags: int, cpl: int, rflags: int) -> int:
    """The vector of the fault that an access of *size* bytes at *address* raises before paging; 0 when none.

    Outside IA-32e mode linear addresses are 32 bits wide and nothing is checked here.
    """
    if state[EFER] & EFER_LMA == 0:
        return 0
    bits = linear_bits(state[CR4])
    last = (address + size - (size != 0)) & MASK64
    if (
        is_canonical(untagged(state, address, flags), bits)
        and is_canonical(untagged(state, last, flags), bits)
        and not is_lass_violation(address, size, flags, cpl, state[CR4], state[EFER], rflags)
    ):
        return 0
    if flags & STACK != 0:
        return SS
    return GP


def translate(
    state: Words, memory: PhysicalMemory, address: int, size: int, flags: int, cpl: int, rflags: int
) -> tuple[int, int, int, int]:
    """Translate an access of *size* bytes that does not cross a page: ``(gpa, permissions, vector, error_code)``.

    *permissions* (``PERM_*`` of :mod:`lasskvm.x86.paging`) are what accesses of the same kind may do to the page
    until something changes. Accessed and dirty bits are set.
    """
    vector = check_linear(state, address, size, flags, cpl, rflags)
    if vector != 0:
        return 0, 0, vector, 0
    address = untagged(state, address, flags)
    explicit = flags & IMPLICIT == 0
    user = explicit and cpl == 3
    ac = explicit and rflags & RFLAGS_AC != 0
    pdpte = state[PDPTR0 + ((address >> 30) & 3)]
    gpa, permissions, error_code, outcome = walk(
        memory, address, flags & (WRITE | FETCH), user, state[CR0], state[CR3], state[CR4], state[EFER], ac,
        state[MAXPHYADDR], pdpte, state[PKRU], state[PKRS],
        state[EPTP],
    )  # fmt: skip
    if outcome != 0:
        state[EPT_FAULT_GPA] = gpa
        state[EPT_OUTCOME] = outcome
        return 0, 0, EPT_EXIT, 0
    if permissions == 0:
        return 0, 0, PF, error_code
    return gpa, permissions, 0, 0


def next_linear(state: Words, address: int, distance: int) -> int:
    """*address* + *distance*, wrapped at the width of linear addresses in the current mode."""
    moved = (address + distance) & MASK64
    if state[EFER] & EFER_LMA == 0:
        moved &= _MASK32
    return moved


def locate(
    state: Words, memory: PhysicalMemory, address: int, size: int, flags: int, cpl: int, rflags: int
) -> tuple[int, int, int, int, int]:
    """Where the bytes of an access of 1 to 4096 bytes lie: ``(gpa, rest_gpa, vector, error_code, fault_address)``.

    *rest_gpa* is that of the bytes on the second page, when there are any. Everything is checked before anything is
    accessed, so that an access across a page end happens as a whole or not at all. *fault_address* is what CR2 gets.
    """
    reported = untagged(state, address, flags)
    vector = check_linear(state, address, size, flags, cpl, rflags)
    if vector != 0:
        return 0, 0, vector, 0, reported
    first = _PAGE_SIZE - (address & _PAGE_OFFSET)
    if first >= size:
        gpa, _, vector, error_code = translate(state, memory, address, size, flags, cpl, rflags)
        return gpa, 0, vector, error_code, reported
    gpa, _, vector, error_code = translate(state, memory, address, first, flags, cpl, rflags)
    if vector != 0:
        return 0, 0, vector, error_code, reported
    rest = next_linear(state, address, first)
    rest_gpa, _, vector, error_code = translate(state, memory, rest, size - first, flags, cpl, rflags)
    return gpa, rest_gpa, vector, error_code, untagged(state, rest, flags)


def load_linear(
    state: Words, memory: PhysicalMemory, address: int, size: int, flags: int, cpl: int, rflags: int
) -> tuple[int, int, int, int]:
    """Load 1 to 8 bytes, also across a page end: ``(value, vector, error_code, fault_address)``."""
    gpa, rest_gpa, vector, error_code, fault_address = locate(
        state, memory, address, size, flags, cpl, rflags
    )
    if vector != 0:
        return 0, vector, error_code, fault_address
    first = _PAGE_SIZE - (address & _PAGE_OFFSET)
    if first >= size:
        return load_physical(memory, gpa, size), 0, 0, 0
    low = load_physical(memory, gpa, first)
    return low | (load_physical(memory, rest_gpa, size - first) << (8 * first)), 0, 0, 0


def store_linear(
    state: Words,
    memory: PhysicalMemory,
    address: int,
    size: int,
    value: int,
    flags: int,
    cpl: int,
    rflags: int,
) -> tuple[int, int, int]:
    """Store 1 to 8 bytes, all or nothing: ``(vector, error_code, fault_address)``; *flags* without ``WRITE``."""
    gpa, rest_gpa, vector, error_code, fault_address = locate(
        state, memory, address, size, flags | WRITE, cpl, rflags
    )
    if vector != 0:
        return vector, error_code, fault_address
    first = _PAGE_SIZE - (address & _PAGE_OFFSET)
    if first >= size:
        store_physical(memory, gpa, size, value)
        return 0, 0, 0
    store_physical(memory, gpa, first, value & ((1 << (8 * first)) - 1))
    store_physical(memory, rest_gpa, size - first, value >> (8 * first))
    return 0, 0, 0
