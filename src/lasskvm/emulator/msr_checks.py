"""Which values the checked MSRs of :mod:`lasskvm.emulator.msrs` accept.

Each function takes the state words and the value, and says whether WRMSR may write it.

Source: Intel SDM volume 3A, 12.4.4 (IA32_APIC_BASE), 13.11 (MTRRs), 13.12.2 (PAT); KVM's
``kvm_mtrr_valid()``, ``kvm_pat_valid()`` and ``kvm_apic_set_base()``.
"""

from __future__ import annotations

from lasskvm.emulator.modes import linear_address_bits
from lasskvm.state import MAXPHYADDR, Words
from lasskvm.x86 import address
from lasskvm.x86.msr import (
    APIC_BASE_X2APIC,
    MTRR_DEF_TYPE_ENABLE,
    MTRR_DEF_TYPE_FIXED_ENABLE,
)
from lasskvm.x86.registers import MASK64

__all__ = [
    "MTRR_DEF_TYPE_BITS",
    "apic_base",
    "canonical",
    "mtrr_base",
    "mtrr_default_type",
    "mtrr_fixed",
    "mtrr_mask",
    "pat",
]

# Memory types
_UC, _WC, _WT, _WP, _WB, _UC_MINUS = 0, 1, 4, 5, 6, 7
_MTRR_TYPES = (_UC, _WC, _WT, _WP, _WB)
_PAT_TYPES = (*_MTRR_TYPES, _UC_MINUS)

_TYPE = 0xFF
#: IA32_MTRR_DEF_TYPE's defined bits.
MTRR_DEF_TYPE_BITS = _TYPE | MTRR_DEF_TYPE_ENABLE | MTRR_DEF_TYPE_FIXED_ENABLE
_MTRR_BASE_RESERVED = 0xF00
_MTRR_MASK_RESERVED = 0x7FF
_APIC_BASE_RESERVED = 0x2FF


def canonical(words: Words, value: int) -> bool:
    """A canonical linear address."""
    return address.is_canonical(value, linear_address_bits(words))


def pat(words: Words, value: int) -> bool:
    """Eight memory types."""
    return all(memory_type in _PAT_TYPES for memory_type in value.to_bytes(8, "little"))


def mtrr_fixed(words: Words, value: int) -> bool:
    """Eight memory types; the PAT's UC- is not among those of MTRRs."""
    return all(memory_type in _MTRR_TYPES for memory_type in value.to_bytes(8, "little"))


def mtrr_default_type(words: Words, value: int) -> bool:
    """A memory type and the enable bits."""
    return value & _TYPE in _MTRR_TYPES


def mtrr_base(words: Words, value: int) -> bool:
    """A physical page address and a memory type."""
    return value & _TYPE in _MTRR_TYPES and not value & (_MTRR_BASE_RESERVED | _above_maxphyaddr(words))


def mtrr_mask(words: Words, value: int) -> bool:
    """A mask of physical address bits, and the valid bit."""
    return not value & (_MTRR_MASK_RESERVED | _above_maxphyaddr(words))


def apic_base(words: Words, value: int) -> bool:
    """A physical page address, BSP and enable bits. A local APIC with x2APIC mode attaches itself."""
    return not value & (_APIC_BASE_RESERVED | APIC_BASE_X2APIC | _above_maxphyaddr(words))


def _above_maxphyaddr(words: Words) -> int:
    return MASK64 & ~((1 << words[MAXPHYADDR]) - 1)
