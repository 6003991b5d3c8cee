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
    FEATURES,
    LEAF_ADDRESS_SIZES,
    LEAF_BRAND,
    LEAF_CACHES,
    LEAF_DESCRIPTORS,
    LEAF_EXTENDED_FEATURES,
    LEAF_FEATURES,
    LEAF_FREQUENCY,
    LEAF_HYPERVISOR,
    LEAF_L2_CACHE,
    LEAF_MAX_BASIC,
    LEAF_MAX_EXTENDED,
    LEAF_STRUCTURED_FEATURES,
    LEAF_TSC,
    CpuidEntry,
    packed_words,
    significant_index,
)

__all__ = ["SUPPORTED", "CpuModel", "list_models", "parse_cpu"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Features this VMM virtualizes.
SUPPORTED: frozenset[str] = _names("""
    fpu de pse tsc msr pae cx8 sep pge cmov pat pse36 clflush mmx fxsr sse sse2
    pni pclmulqdq ssse3 cx16 pcid sse4_1 sse4_2 movbe popcnt aes hypervisor
    fsgsbase smep erms invpcid adx smap umip pku la57 rdpid cldemote pks fsrm serialize lass
    syscall nx pdpe1gb rdtscp lm lahf_lm 3dnowprefetch nonstop_tsc wbnoinvd""")
#: Supported, but only on request:
#:
#: - Five-level paging makes every page walk longer.
#: - With ERMS and FSRM, kernels clear and copy pages by REP STOSB and REP MOVSB, which direct execution does byte by
#:   byte; without, eight bytes at a time.
#: - SERIALIZE leaves direct execution; what kernels use in its place does not.
#: - Linux expects XSAVE where there are protection keys, and has no use for those of supervisor pages.
_ON_REQUEST = _names("la57 erms fsrm serialize pku pks")

#: What a feature cannot be without.
_NEEDS: dict[str, str] = {
    "mmx": "fpu", "fxsr": "fpu", "sse": "fxsr", "sse2": "sse", "pni": "sse2", "ssse3": "pni",
    "sse4_1": "ssse3", "sse4_2": "sse4_1", "aes": "sse2", "pclmulqdq": "sse2", "cx16": "cx8",
    "pse36": "pse", "nx": "pae", "lm": "pae", "syscall": "lm", "lahf_lm": "lm", "pdpe1gb": "lm",
    "la57": "lm", "lass": "lm", "pcid": "lm", "fsgsbase": "lm", "pku": "lm", "pks": "lm",
    "rdtscp": "tsc", "nonstop_tsc": "tsc",
}  # fmt: skip

_VENDOR = "GenuineIntel"
_BRAND = "lasskvm virtual CPU"
_BRAND_BYTES = 48
#: Family 6, model 6AH, stepping 6: Ice Lake-SP.
_SIGNATURE = 0x606A6
_CRYSTAL_HZ = 24_000_000
_BUS_MHZ = 100
_KHZ_PER_MHZ = 1000
_LINE_BYTES = 64
#: Leaf 1 EBX: CLFLUSH line size in 8-byte units, and one logical processor; the initial APIC ID is 0.
_LEAF1_EBX = (_LINE_BYTES // 8) << 8 | 1 << 16
#: Leaf 2: one lookup is enough; caches are described by leaf 4 (descriptor FFH); 64-byte prefetch (F0H).
_LEAF2_EAX, _LEAF2_EDX = 0xFF01, 0xF0
#: Leaf 4: type (1 data, 2 instruction, 3 unified), level, ways, sets.
_CACHES = ((1, 1, 12, 64), (2, 1, 8, 64), (3, 2, 16, 2048))
_CACHE_SELF_INITIALIZING = 1 << 8
#: Leaf 80000006H ECX: the L2 cache again, in KiB; 8 is the code of 16 ways.
_L2_ECX = (16 * 2048 * _LINE_BYTES >> 10) << 16 | 8 << 12 | _LINE_BYTES
_MAX_STRUCTURED_SUBLEAF = 1


@dataclass(frozen=True)
class CpuModel:
    """A CPU as a guest sees it. *features* are names of :data:`FEATURES`; *signature* is CPUID.1:EAX."""

    name: str
    features: frozenset[str]
    vendor: str = _VENDOR
    signature: int = _SIGNATURE
    maxphyaddr: int = 46
    tsc_khz: int = 1_000_000

    @property
    def linear_address_bits(self) -> int:
        """How wide linear addresses can be: 57 with five-level paging, else 48."""
        return 57 if "la57" in self.features else 48

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
        return tuple(
            CpuidEntry(leaf, subleaf, significant_index(leaf), *registers)
            for (leaf, subleaf), registers in sorted(leaves.items())
        )

    def _described(self) -> dict[tuple[int, int], tuple[int, int, int, int]]:
        """Everything but feature bits."""
        vendor_ebx, vendor_edx, vendor_ecx = packed_words(self.vendor.encode())
        leaves = {
            (LEAF_MAX_BASIC, 0): (LEAF_FREQUENCY, vendor_ebx, vendor_ecx, vendor_edx),
            (LEAF_FEATURES, 0): (self.signature, _LEAF1_EBX, 0, 0),
            (LEAF_DESCRIPTORS, 0): (_LEAF2_EAX, 0, 0, _LEAF2_EDX),
            (LEAF_STRUCTURED_FEATURES, 0): (_MAX_STRUCTURED_SUBLEAF, 0, 0, 0),
            (LEAF_STRUCTURED_FEATURES, 1): (0, 0, 0, 0),
            (LEAF_MAX_EXTENDED, 0): (LEAF_ADDRESS_SIZES, 0, 0, 0),
            (LEAF_EXTENDED_FEATURES, 0): (0, 0, 0, 0),
            (LEAF_L2_CACHE, 0): (0, 0, _L2_ECX, 0),
            (LEAF_ADDRESS_SIZES, 0): (self.maxphyaddr | self.linear_address_bits << 8, 0, 0, 0),
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
        brand = packed_words(_BRAND.encode().ljust(_BRAND_BYTES, b"\0"))
        for part in range(3):
            eax, ebx, ecx, edx = brand[4 * part : 4 * part + 4]
            leaves[LEAF_BRAND + part, 0] = (eax, ebx, ecx, edx)
        if "hypervisor" in self.features:
            # A hypervisor without a name; without this entry the range would answer like leaf 16H.
            leaves[LEAF_HYPERVISOR, 0] = (0, 0, 0, 0)
        return leaves


_MODELS = (CpuModel("max", SUPPORTED - _ON_REQUEST),)


def list_models() -> tuple[CpuModel, ...]:
    """The CPU models there are. ``max`` has everything that this VMM virtualizes and that costs nothing."""
    return _MODELS


def parse_cpu(text: str) -> CpuModel:
    """The model described by ``MODEL[,+FEATURE|,-FEATURE]...``; the last word on a feature counts.

    Taking a feature away takes away what needs it (``-sse2`` also removes ``ssse3``); asking for a feature
    without what it needs raises :class:`CpuFeatureError`, and so do unknown models, unknown features and
    features that this VMM does not virtualize. LASS without SMAP is allowed: it then checks fetches and
    user-mode accesses only.

    >>> "lass" in parse_cpu("max,-lass").features, parse_cpu("max,+la57").linear_address_bits
    (False, 57)
    """
    name, *changes = (part.strip().lower() for part in text.split(","))
    models = {model.name: model for model in _MODELS}
    if name not in models:
        advice = _suggestion(name, models, f"choose from: {', '.join(models)}")
        raise CpuFeatureError(f'there is no CPU model "{name}"; {advice}')
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
        wanted[feature] = sign == "+"
    added = {feature for feature, on in wanted.items() if on}
    features = (models[name].features | added) - (wanted.keys() - added)
    return replace(models[name], name=text, features=_complete(frozenset(features), added))


def _complete(features: frozenset[str], requested: Iterable[str]) -> frozenset[str]:
    """*features* without those that lack what they need; raises when one of them was *requested*."""
    while True:
        lacking = {name: _NEEDS[name] for name in features & _NEEDS.keys() if _NEEDS[name] not in features}
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
