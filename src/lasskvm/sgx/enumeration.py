"""CPUID leaf 12H: what it says of an enclave page cache, and what it allows enclaves to be.

Which features there are (``sgx``, ``sgx1``, ``sgx_lc``) is a matter of the CPU model; where the EPC is, of the VM.

Source: Intel SDM volume 3D, 34.7.2 (enumeration of SGX); KVM's ``kvm_vcpu_after_set_cpuid()`` and
``__handle_encls_ecreate()``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lasskvm.sgx.epc import Epc
from lasskvm.x86 import sgx
from lasskvm.x86.cpuid import (
    EAX,
    EBX,
    ECX,
    EDX,
    LEAF_SGX,
    SIGNIFICANT_INDEX,
    CpuidEntry,
    CpuidTable,
)
from lasskvm.x86.registers import MASK32
from lasskvm.x86.xsave import supported_components

__all__ = ["Limits", "with_epc"]

#: Enclaves are smaller than 2 to the power of these: as on the first processors with SGX.
_MAX_SIZE_NOT64_BITS, _MAX_SIZE_64_BITS = 31, 36
_MAX_SIZES = (
    _MAX_SIZE_NOT64_BITS << sgx.CPUID_MAX_SIZE_NOT64_SHIFT | _MAX_SIZE_64_BITS << sgx.CPUID_MAX_SIZE_64_SHIFT
)
#: No part of MISCSELECT: EXINFO came with SGX2.
_MISCSELECT = 0
_HIGH_HALF_SHIFT = 32
_CAPABILITIES, _ATTRIBUTES = 0, 1


def with_epc(entries: Iterable[CpuidEntry], epc: Epc) -> tuple[CpuidEntry, ...]:
    """The CPUID *entries* of a processor with SGX, and all of leaf 12H: sizes, attributes and the section *epc*.

    Without the feature ``sgx`` they are returned as they are. XFRM can have what leaf 0DH offers for XCR0.

    >>> from lasskvm.x86.cpu_models import parse_cpu
    >>> table = CpuidTable(with_epc(parse_cpu("max,+sgx").entries(), Epc(0x1_0000_0000, 0x80_0000)))
    >>> [hex(value) for value in table.lookup(0x12, 2)]
    ['0x1', '0x1', '0x800001', '0x0']
    """
    entries = tuple(entries)
    table = CpuidTable(entries)
    if not table.has("sgx"):
        return entries
    xfrm = supported_components(table) | sgx.XFRM_REQUIRED
    leaves = {
        _CAPABILITIES: (table.word(LEAF_SGX, _CAPABILITIES, EAX), _MISCSELECT, 0, _MAX_SIZES),
        _ATTRIBUTES: (*_halves(sgx.ATTRIBUTES_OFFERED), *_halves(xfrm)),
        sgx.CPUID_EPC_SUBLEAF: sgx.cpuid_epc_section(epc.base, epc.size),
    }
    made = [CpuidEntry(LEAF_SGX, index, SIGNIFICANT_INDEX, *words) for index, words in leaves.items()]
    others = [entry for entry in entries if entry.function != LEAF_SGX]
    return tuple(sorted((*others, *made), key=lambda entry: (entry.function, entry.index)))


def _halves(value: int) -> tuple[int, int]:
    return value & MASK32, value >> _HIGH_HALF_SHIFT


@dataclass(frozen=True, slots=True)
class Limits:
    """What leaf 12H allows an enclave to have, as ECREATE asks."""

    #: Bits of ATTRIBUTES without XFRM, of XFRM, and of MISCSELECT.
    attributes: int
    xfrm: int
    miscselect: int
    _max_sizes: int

    @classmethod
    def of(cls, cpuid: CpuidTable) -> Limits:
        """The limits of a processor with *cpuid*. XFRM is also limited by what XCR0 can be."""
        low, high, xfrm_low, xfrm_high = (
            cpuid.word(LEAF_SGX, _ATTRIBUTES, part) for part in (EAX, EBX, ECX, EDX)
        )
        return cls(
            attributes=low | high << _HIGH_HALF_SHIFT,
            xfrm=(xfrm_low | xfrm_high << _HIGH_HALF_SHIFT) & supported_components(cpuid) | sgx.XFRM_REQUIRED,
            miscselect=cpuid.word(LEAF_SGX, _CAPABILITIES, EBX),
            _max_sizes=cpuid.word(LEAF_SGX, _CAPABILITIES, EDX),
        )

    def enclave_size(self, is_64bit: bool) -> int:
        """What enclaves have to be smaller than, in bytes."""
        shift = sgx.CPUID_MAX_SIZE_64_SHIFT if is_64bit else sgx.CPUID_MAX_SIZE_NOT64_SHIFT
        return 1 << (self._max_sizes >> shift & sgx.CPUID_MAX_SIZE_MASK)
