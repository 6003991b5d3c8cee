"""XSAVE's state components and where they are in an XSAVE area of the standard format.

Only the components that this VMM virtualizes: x87 and SSE state, which share the legacy region (an FXSAVE image), and
PKRU.

Source: Intel SDM volume 1, 13.1 (state components) and 13.4 (the XSAVE area).
"""

from __future__ import annotations

from lasskvm.x86.cpuid import EAX, EDX, LEAF_XSAVE, CpuidTable

__all__ = [
    "COMPONENTS",
    "COMPONENT_PKRU",
    "COMPONENT_SSE",
    "COMPONENT_X87",
    "PKRU_BYTES",
    "PKRU_OFFSET",
    "XSAVE_HEADER",
    "XSAVE_HEADER_BYTES",
    "is_valid_xcr0",
    "supported_components",
]

# State components, as bits of XCR0, XSTATE_BV and instruction masks
COMPONENT_X87 = 1 << 0
COMPONENT_SSE = 1 << 1
COMPONENT_PKRU = 1 << 9
COMPONENTS = COMPONENT_X87 | COMPONENT_SSE | COMPONENT_PKRU

#: Where the header is, behind the legacy region: XSTATE_BV and XCOMP_BV, then reserved bytes.
XSAVE_HEADER = 512
XSAVE_HEADER_BYTES = 64
#: Where PKRU is, and how much room it has (CPUID.(EAX=0DH,ECX=9):EBX and EAX).
PKRU_OFFSET = 2688
PKRU_BYTES = 8

_EDX_SHIFT = 32


def supported_components(cpuid: CpuidTable) -> int:
    """The components that a guest with this CPUID may have in XCR0: those of leaf 0DH, and x87 always.

    KVM's ``cpuid_get_supported_xcr0()``.
    """
    enumerated = cpuid.word(LEAF_XSAVE, 0, EAX) | cpuid.word(LEAF_XSAVE, 0, EDX) << _EDX_SHIFT
    return enumerated & COMPONENTS | COMPONENT_X87


def is_valid_xcr0(value: int, cpuid: CpuidTable) -> bool:
    """Whether XCR0 can be *value* in a guest with this CPUID; x87 state must be in it (KVM's ``__kvm_set_xcr()``)."""
    return value & COMPONENT_X87 != 0 and not value & ~supported_components(cpuid)
