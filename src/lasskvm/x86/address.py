"""Linear addresses: canonical form, and pointers that carry metadata (linear-address masking, LAM).

All functions are in the compiled subset. Source: Intel SDM volume 1, 3.3.7.1 (canonical addresses); Intel Architecture
Instruction Set Extensions Programming Reference, chapter "Linear Address Masking"; KVM's ``vmx_get_untagged_addr()``.
"""

from lasskvm.lass import BRANCH, DT_LOAD, FETCH, IMPLICIT, INVLPG, MSR
from lasskvm.x86.registers import CR3_LAM_U48, CR3_LAM_U57, CR4_LA57, CR4_LAM_SUP, MASK64

__all__ = ["is_canonical", "linear_bits", "untag"]

#: What LAM does not apply to: code, the processor's own accesses, and addresses that are only named.
_NOT_MASKED = FETCH | IMPLICIT | INVLPG | MSR | DT_LOAD | BRANCH
_CR3_LAM = CR3_LAM_U48 | CR3_LAM_U57

# With LAM48, bit 47 takes the place of bits 62:48; with LAM57, bit 56 that of bits 62:57. Bit 63 is kept.
_LAM48_SIGN, _LAM48_METADATA = 47, (1 << 63) - (1 << 48)
_LAM57_SIGN, _LAM57_METADATA = 56, (1 << 63) - (1 << 57)


def linear_bits(cr4: int) -> int:
    """How many bits of a linear address are significant in IA-32e mode: 48, or 57 where *cr4* has LA57.

    With the CR4 bits that a processor allows in place of its CR4, how wide its linear addresses can be.
    """
    bits = 48
    if cr4 & CR4_LA57 != 0:
        bits = 57
    return bits


def is_canonical(address: int, linear_address_bits: int) -> bool:
    """Whether bits 63 to ``linear_address_bits - 1`` of *address* are all equal (48 bits, or 57 with CR4.LA57)."""
    upper = address >> (linear_address_bits - 1)
    return (upper == 0) | (upper == (1 << (65 - linear_address_bits)) - 1)


def untag(address: int, flags: int, cr3: int, cr4: int) -> int:
    """Linear *address* as an access of kind *flags* uses it: with LAM, without the metadata in its upper bits.

    *flags* is a union of the access flags of :mod:`lasskvm.lass`; only explicit data accesses are masked. A pointer
    with bit 63 clear is a user pointer, which CR3.LAM_U57 and CR3.LAM_U48 are for (the former counts when both are
    set); one with bit 63 set is a supervisor pointer, for which CR4.LAM_SUP takes the width from CR4.LA57. The
    privilege level does not matter, and neither does the mode: an address of 32 bits has nothing to mask.

    The result need not be canonical, and bit 63 is never changed.

    >>> hex(untag(0x2A00_7FFF_0000_1000, 0, cr3=1 << 62, cr4=0))
    '0x7fff00001000'
    """
    if (cr3 & _CR3_LAM) | (cr4 & CR4_LAM_SUP) == 0 or flags & _NOT_MASKED != 0:
        return address
    sign, metadata = _LAM48_SIGN, _LAM48_METADATA
    if address >> 63 != 0:
        if cr4 & CR4_LAM_SUP == 0:
            return address
        if cr4 & CR4_LA57 != 0:
            sign, metadata = _LAM57_SIGN, _LAM57_METADATA
    elif cr3 & CR3_LAM_U57 != 0:
        sign, metadata = _LAM57_SIGN, _LAM57_METADATA
    elif cr3 & CR3_LAM_U48 == 0:
        return address
    if (address >> sign) & 1 != 0:
        return address | metadata
    return address & (MASK64 ^ metadata)
