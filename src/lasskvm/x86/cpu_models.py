"""CPU models: what a guest's processor offers, and how to ask for a feature more or less.

:data:`SUPPORTED` are the features this VMM virtualizes. A :class:`CpuModel` makes the CPUID entries that
``KVM_SET_CPUID2`` takes; :func:`parse_cpu` reads what people write behind ``--cpu``.

Sources: Intel SDM volume 2A, CPUID.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lasskvm.errors import CpuFeatureError
from lasskvm.x86.cpuid import (
    ALIASES,
    EDX,
    FEATURES,
    LEAF_ADDRESS_SIZES,
    LEAF_BRAND,
    LEAF_CACHES,
    LEAF_DESCRIPTORS,
    LEAF_EXTENDED_FEATURES,
    LEAF_FEATURES,
    LEAF_FREQUENCY,
    LEAF_HYPERVISOR,
    LEAF_KVM_FEATURES,
    LEAF_L1_CACHES,
    LEAF_L2_CACHE,
    LEAF_MAX_BASIC,
    LEAF_MAX_EXTENDED,
    LEAF_STRUCTURED_FEATURES,
    LEAF_TOPOLOGY,
    LEAF_TSC,
    LEAF_XSAVE,
    CpuidEntry,
    packed_words,
    significant_index,
)
from lasskvm.x86.kvm_para import KVM_SIGNATURE
from lasskvm.x86.xsave import (
    COMPONENT_PKRU,
    COMPONENT_SSE,
    COMPONENT_X87,
    PKRU_BYTES,
    PKRU_OFFSET,
    XSAVE_HEADER,
    XSAVE_HEADER_BYTES,
)

__all__ = ["SUPPORTED", "CpuModel", "list_models", "parse_cpu"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Features this VMM virtualizes.
SUPPORTED: frozenset[str] = _names("""
    fpu vme de pse tsc msr pae cx8 apic sep mtrr pge cmov pat pse36 clflush mmx fxsr sse sse2
    pni pclmulqdq ssse3 cx16 pcid sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave hypervisor
    arat vmx
    fsgsbase tsc_adjust smep erms invpcid adx smap umip pku la57 rdpid cldemote pks fsrm serialize lass lam
    xsaveopt xgetbv1
    sgx sgx1 sgx_lc
    kvmclock kvm_nopiodelay kvmclock2 kvmclock_stable_bit
    syscall nx pdpe1gb rdtscp lm lahf_lm 3dnowprefetch nonstop_tsc wbnoinvd""")
#: Supported, but only on request:
#:
#: - Five-level paging makes every page walk longer.
#: - With ERMS and FSRM, kernels clear and copy pages by REP STOSB and REP MOVSB, which direct execution does byte by
#:   byte; without, eight bytes at a time.
#: - SERIALIZE leaves direct execution; what kernels use in its place does not.
#: - Kernels have no use for protection keys of supervisor pages.
#: - Hardly any processor has LAM yet.
#: - SGX needs an enclave page cache.
#: - Where the TSC never stops, Linux prefers it to kvm-clock; QEMU leaves the feature to be asked for, too.
_ON_REQUEST = _names("la57 erms fsrm serialize pks lam sgx sgx1 sgx_lc nonstop_tsc")
#: What no AMD processor has. (The TSC deadline and TSC_ADJUST, which they lack as well, KVM gives to their guests.)
_INTEL_ONLY = _names("vmx lass lam pks cldemote serialize sgx sgx1 sgx_lc")

#: What a feature cannot be without: one or more others.
_NEEDS: dict[str, str] = {
    "mmx": "fpu", "fxsr": "fpu", "sse": "fxsr", "sse2": "sse", "pni": "sse2", "ssse3": "pni",
    "sse4_1": "ssse3", "sse4_2": "sse4_1", "aes": "sse2", "pclmulqdq": "sse2", "cx16": "cx8",
    "xsave": "sse", "xsaveopt": "xsave", "xgetbv1": "xsave",
    "pse36": "pse", "nx": "pae", "lm": "pae", "syscall": "lm", "lahf_lm": "lm", "pdpe1gb": "lm",
    "la57": "lm", "lass": "lm", "lam": "lm", "pcid": "lm", "fsgsbase": "lm", "pku": "lm", "pks": "lm",
    "mtrr": "msr", "vmx": "msr pae", "rdtscp": "tsc", "nonstop_tsc": "tsc", "tsc_adjust": "tsc",
    "x2apic": "apic", "arat": "apic", "tsc_deadline_timer": "apic tsc",
    "kvmclock": "hypervisor tsc", "kvmclock2": "hypervisor tsc", "kvmclock_stable_bit": "hypervisor tsc",
    "kvm_nopiodelay": "hypervisor", "sgx": "msr", "sgx1": "sgx", "sgx_lc": "sgx",
}  # fmt: skip
#: Features that are of no use without each other: asking for one asks for all.
_TOGETHER = (_names("sgx sgx1 sgx_lc"),)

_INTEL, _AMD = "GenuineIntel", "AuthenticAMD"
#: Vendors whose processors have the leaves of AMD's.
_AMD_VENDORS = (_AMD, "HygonGenuine")
_BRAND = "lasskvm virtual CPU"
_BRAND_BYTES = 48
#: Family 6, model 6AH, stepping 6: Ice Lake-SP.
_SIGNATURE = 0x606A6
#: Family 19H, model 1, stepping 1: Milan.
_AMD_SIGNATURE = 0xA00F11
#: Leaf 15H names the crystal clock, and the manual says that it drives the APIC timer, too, so Linux takes its
#: frequency for that of the APIC timer. KVM's APIC timer counts nanoseconds, and so does ours.
_CRYSTAL_HZ = 1_000_000_000
_BUS_MHZ = 100
_KHZ_PER_MHZ = 1000
_LINE_BYTES = 64
#: Leaf 0BH: one thread, and one core; ECX has the level's number, and its type in bits 15:8 (1 SMT, 2 core).
_TOPOLOGY_LEVELS = (1 << 8, 2 << 8 | 1)
_PROCESSORS = 1
#: The processor's x2APIC ID; its initial APIC ID, in leaf 1 EBX[31:24], is the same.
_APIC_ID = 0
#: Leaf 1 EBX: CLFLUSH line size in 8-byte units, how many logical processors, and the initial APIC ID.
_LEAF1_EBX = (_LINE_BYTES // 8) << 8 | _PROCESSORS << 16 | _APIC_ID << 24
#: Leaf 2: one lookup is enough; caches are described by leaf 4 (descriptor FFH); 64-byte prefetch (F0H).
_LEAF2_EAX, _LEAF2_EDX = 0xFF01, 0xF0
#: Leaf 4: type (1 data, 2 instruction, 3 unified), level, ways, sets.
_CACHES = ((1, 1, 12, 64), (2, 1, 8, 64), (3, 2, 16, 2048))
_CACHE_SELF_INITIALIZING = 1 << 8
#: Leaf 80000006H ECX: the L2 cache again, in KiB; 8 is the code of 16 ways.
_L2_ECX = (16 * 2048 * _LINE_BYTES >> 10) << 16 | 8 << 12 | _LINE_BYTES
#: AMD's caches in leaves 80000005H (L1: KiB, ways) and 80000006H; there, a tag stands for one line.
_L1D_ECX, _L1I_EDX = (kib << 24 | ways << 16 | 1 << 8 | _LINE_BYTES for kib, ways in ((48, 12), (32, 8)))
_AMD_L2_ECX = _L2_ECX | 1 << 8
#: Bits of leaf 1 EDX that AMD's 80000001H EDX repeats: FPU to APIC, MTRR to PSE36, MMX, FXSR.
_AMD_REPEATED_BITS = 0x0183F3FF
_MAX_STRUCTURED_SUBLEAF = 1

# Leaf 0DH: the XSAVE area
_PKRU_SUBLEAF = COMPONENT_PKRU.bit_length() - 1
_LEGACY_XSAVE_BYTES = XSAVE_HEADER + XSAVE_HEADER_BYTES


#: What leaves return: EAX to EDX by leaf and subleaf.
_Leaves = dict[tuple[int, int], tuple[int, int, int, int]]


@dataclass(frozen=True)
class CpuModel:
    """A CPU as a guest sees it. *features* are names of :data:`FEATURES`; *signature* is CPUID.1:EAX.

    The leaves are those of the *vendor*. It changes nothing else: instructions behave as on Intel's processors. On
    AMD's, SYSCALL also exists in compatibility mode, where here it is #UD, and SYSENTER is #UD in IA-32e mode, where
    here it works; so 32-bit programs that enter a 64-bit kernel by ``__kernel_vsyscall`` need an Intel model.
    """

    name: str
    features: frozenset[str]
    vendor: str = _INTEL
    signature: int = _SIGNATURE
    maxphyaddr: int = 46
    tsc_khz: int = 1_000_000

    @property
    def linear_address_bits(self) -> int:
        """How wide linear addresses can be: 57 with five-level paging, else 48."""
        return 57 if "la57" in self.features else 48

    @property
    def available(self) -> frozenset[str]:
        """The features that a processor of this vendor can be given."""
        return SUPPORTED - _INTEL_ONLY if self._is_amd else SUPPORTED

    @property
    def _is_amd(self) -> bool:
        return self.vendor in _AMD_VENDORS

    def entries(self) -> tuple[CpuidEntry, ...]:
        """The CPUID entries of this model, in ascending order, as ``KVM_SET_CPUID2`` takes them."""
        leaves: dict[tuple[int, int], list[int]] = {}
        for name in self.features:
            feature = FEATURES[name]
            registers = leaves.setdefault((feature.leaf, feature.subleaf), [0, 0, 0, 0])
            registers[feature.register] |= 1 << feature.bit
        for place, values in self._described().items():
            registers = leaves.setdefault(place, [0, 0, 0, 0])
            leaves[place] = [a | b for a, b in zip(registers, values, strict=True)]
        if self._is_amd:
            repeated = leaves[LEAF_FEATURES, 0][EDX] & _AMD_REPEATED_BITS
            leaves[LEAF_EXTENDED_FEATURES, 0][EDX] |= repeated
        return tuple(
            CpuidEntry(leaf, subleaf, significant_index(leaf), *registers)
            for (leaf, subleaf), registers in sorted(leaves.items())
        )

    def _described(self) -> _Leaves:
        """Everything but feature bits."""
        leaves: _Leaves = {
            (LEAF_FEATURES, 0): (self.signature, _LEAF1_EBX, 0, 0),
            (LEAF_STRUCTURED_FEATURES, 0): (_MAX_STRUCTURED_SUBLEAF, 0, 0, 0),
            (LEAF_STRUCTURED_FEATURES, 1): (0, 0, 0, 0),
            (LEAF_MAX_EXTENDED, 0): (LEAF_ADDRESS_SIZES, 0, 0, 0),
            (LEAF_EXTENDED_FEATURES, 0): (0, 0, 0, 0),
            (LEAF_ADDRESS_SIZES, 0): (self.maxphyaddr | self.linear_address_bits << 8, 0, 0, 0),
        }
        leaves |= self._amd_leaves() if self._is_amd else self._intel_leaves()
        brand = packed_words(_BRAND.encode().ljust(_BRAND_BYTES, b"\0"))
        for part in range(3):
            eax, ebx, ecx, edx = brand[4 * part : 4 * part + 4]
            leaves[LEAF_BRAND + part, 0] = (eax, ebx, ecx, edx)
        if "x2apic" in self.features:
            for subleaf, level in enumerate(_TOPOLOGY_LEVELS):
                leaves[LEAF_TOPOLOGY, subleaf] = (0, _PROCESSORS, level, _APIC_ID)
        if "xsave" in self.features:
            leaves |= self._xsave_leaves()
        if "hypervisor" in self.features:
            leaves[LEAF_HYPERVISOR, 0] = self._hypervisor_leaf()
        return leaves

    def _vendor_leaf(self, maximum: int) -> tuple[int, int, int, int]:
        ebx, edx, ecx = packed_words(self.vendor.encode())
        return maximum, ebx, ecx, edx

    def _intel_leaves(self) -> _Leaves:
        """Caches and frequencies where Intel has them."""
        leaves: _Leaves = {
            (LEAF_MAX_BASIC, 0): self._vendor_leaf(LEAF_FREQUENCY),
            (LEAF_DESCRIPTORS, 0): (_LEAF2_EAX, 0, 0, _LEAF2_EDX),
            (LEAF_L2_CACHE, 0): (0, 0, _L2_ECX, 0),
        }
        for index, (kind, level, ways, sets) in enumerate(_CACHES):
            eax = kind | level << 5 | _CACHE_SELF_INITIALIZING
            leaves[LEAF_CACHES, index] = (eax, (ways - 1) << 22 | (_LINE_BYTES - 1), sets - 1, 0)
        # The exact ratio of TSC and crystal: with it, Linux does not calibrate.
        hertz = self.tsc_khz * 1000
        divisor = math.gcd(hertz, _CRYSTAL_HZ)
        leaves[LEAF_TSC, 0] = (_CRYSTAL_HZ // divisor, hertz // divisor, _CRYSTAL_HZ, 0)
        megahertz = self.tsc_khz // _KHZ_PER_MHZ
        leaves[LEAF_FREQUENCY, 0] = (megahertz, megahertz, _BUS_MHZ, 0)
        return leaves

    def _amd_leaves(self) -> _Leaves:
        """Caches where AMD has them; its processors tell no frequency."""
        return {
            (LEAF_MAX_BASIC, 0): self._vendor_leaf(LEAF_XSAVE),
            (LEAF_L1_CACHES, 0): (0, 0, _L1D_ECX, _L1I_EDX),
            (LEAF_L2_CACHE, 0): (0, 0, _AMD_L2_ECX, 0),
        }

    def _xsave_leaves(self) -> _Leaves:
        """Leaf 0DH but for the sizes that depend on XCR0, which the lookup knows."""
        components, size = COMPONENT_X87 | COMPONENT_SSE, _LEGACY_XSAVE_BYTES
        leaves: _Leaves = {(LEAF_XSAVE, 1): (0, 0, 0, 0)}
        if "pku" in self.features:
            components |= COMPONENT_PKRU
            size = PKRU_OFFSET + PKRU_BYTES
            leaves[LEAF_XSAVE, _PKRU_SUBLEAF] = (PKRU_BYTES, PKRU_OFFSET, 0, 0)
        leaves[LEAF_XSAVE, 0] = (components, _LEGACY_XSAVE_BYTES, size, 0)
        return leaves

    def _hypervisor_leaf(self) -> tuple[int, int, int, int]:
        """KVM's signature; without any of KVM's features, a hypervisor without a name and other leaves.

        Without this entry the whole range would answer like the highest basic leaf.
        """
        if not any(FEATURES[name].leaf == LEAF_KVM_FEATURES for name in self.features):
            return 0, 0, 0, 0
        ebx, ecx, edx = packed_words(KVM_SIGNATURE)
        return LEAF_KVM_FEATURES, ebx, ecx, edx


_MODELS = (
    CpuModel("max", SUPPORTED - _ON_REQUEST),
    CpuModel("amd", SUPPORTED - _ON_REQUEST - _INTEL_ONLY, vendor=_AMD, signature=_AMD_SIGNATURE),
)


def list_models() -> tuple[CpuModel, ...]:
    """The CPU models there are.

    ``max`` has everything that this VMM virtualizes and that costs nothing; ``amd`` the same for guests that insist on
    a processor of AMD, without what only Intel has, LASS first of all.
    """
    return _MODELS


def parse_cpu(text: str) -> CpuModel:
    """The model described by ``MODEL[,+FEATURE|,-FEATURE]...``; the last word on a feature counts.

    Taking a feature away takes away what needs it (``-sse2`` also removes ``ssse3``); ``sgx``, ``sgx1`` and ``sgx_lc``
    come together, unless one is taken away. Asking for a feature without what it needs raises
    :class:`CpuFeatureError`, and so do unknown models, unknown features, features that this VMM does not virtualize,
    and those of Intel on a processor of AMD. LASS without SMAP is allowed: it then checks fetches and user-mode
    accesses only.

    >>> "lass" in parse_cpu("max,-lass").features, parse_cpu("max,+la57").linear_address_bits
    (False, 57)
    """
    name, *changes = (part.strip().lower() for part in text.split(","))
    models = {model.name: model for model in _MODELS}
    if name not in models:
        advice = _suggestion(name, models, f"choose from: {', '.join(models)}")
        raise CpuFeatureError(f'there is no CPU model "{name}"; {advice}')
    model = models[name]
    wanted: dict[str, bool] = {}
    for change in changes:
        sign, feature = change[:1], change[1:]
        if not feature:
            raise CpuFeatureError(f'"{text}" lacks a feature behind a comma; write it like "max,-lass"')
        if sign not in ("+", "-"):
            raise CpuFeatureError(f'"{change}" in "{text}" has no sign; write "+{change}" or "-{change}"')
        if feature not in FEATURES:
            advice = _suggestion(feature, FEATURES, "write names as Linux does in /proc/cpuinfo")
            raise CpuFeatureError(f'there is no CPU feature "{feature}"; {advice}')
        feature = ALIASES.get(feature, feature)
        if sign == "+" and feature not in SUPPORTED:
            raise CpuFeatureError(
                f'the CPU feature "{feature}" exists, but lasskvm does not virtualize it yet; leave it out'
            )
        if sign == "+" and feature not in model.available:
            raise CpuFeatureError(
                f'"{feature}" is a feature of Intel\'s processors, which the CPU model "{name}" is not; '
                f"leave it out or take another model: {', '.join(_models_with(feature))}"
            )
        wanted[feature] = sign == "+"
    requested = {feature for feature, on in wanted.items() if on}
    added = requested.union(*(group - wanted.keys() for group in _TOGETHER if group & requested))
    features = (model.features | added) - (wanted.keys() - added)
    return replace(model, name=text, features=_complete(frozenset(features), requested))


def _models_with(feature: str) -> list[str]:
    return [model.name for model in _MODELS if feature in model.available]


def _complete(features: frozenset[str], requested: Iterable[str]) -> frozenset[str]:
    """*features* without those that lack what they need; raises when one of them was *requested*."""
    while True:
        lacking = {
            name: need
            for name in features & _NEEDS.keys()
            for need in _NEEDS[name].split()
            if need not in features
        }
        for feature in sorted(lacking.keys() & set(requested)):
            raise CpuFeatureError(
                f'the CPU feature "{feature}" needs "{lacking[feature]}", which this CPU lacks; '
                f'add "+{lacking[feature]}" or leave "{feature}" out'
            )
        if not lacking:
            return features
        features -= lacking.keys()


def _suggestion(name: str, known: Iterable[str], otherwise: str) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f'did you mean "{nearest[0]}"?' if nearest else otherwise
