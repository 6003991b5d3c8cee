"""CPUID: the feature bits, the CPU models a guest can have, and how an instance answers a lookup.

Features carry the names of Linux's ``/proc/cpuinfo`` (``lass``, ``smap``, ``pni``). :data:`FEATURES` says
where each one is found, :data:`SUPPORTED` which of them this VMM virtualizes. A :class:`CpuModel` makes the
entries that ``KVM_SET_CPUID2`` takes; a :class:`CpuidTable` holds such entries and answers as KVM's
``kvm_cpuid()`` does.

Sources: Intel SDM volume 2A, CPUID; the instruction-set extensions reference for leaf 7, subleaf 1.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from lasskvm.errors import CpuFeatureError
from lasskvm.x86 import registers as reg

__all__ = [
    "FEATURES",
    "FEATURE_WORDS",
    "SIGNIFICANT_INDEX",
    "SUPPORTED",
    "CpuModel",
    "CpuidEntry",
    "CpuidTable",
    "Feature",
    "cr4_allowed",
    "efer_allowed",
    "feature_word",
    "list_models",
    "parse_cpu",
]

#: The flag of an entry that holds one subleaf only, ``KVM_CPUID_FLAG_SIGNIFCANT_INDEX``.
SIGNIFICANT_INDEX = 1 << 0

LEAF_MAX_BASIC = 0x0
LEAF_FEATURES = 0x1
LEAF_DESCRIPTORS = 0x2
LEAF_CACHES = 0x4
LEAF_POWER = 0x6
LEAF_STRUCTURED_FEATURES = 0x7
LEAF_TOPOLOGY = 0xB
LEAF_XSAVE = 0xD
LEAF_SGX = 0x12
LEAF_TSC = 0x15
LEAF_FREQUENCY = 0x16
LEAF_TOPOLOGY_V2 = 0x1F
LEAF_HYPERVISOR = 0x40000000
LEAF_MAX_EXTENDED = 0x80000000
LEAF_EXTENDED_FEATURES = 0x80000001
LEAF_BRAND = 0x80000002
LEAF_L2_CACHE = 0x80000006
LEAF_ADVANCED_POWER = 0x80000007
LEAF_ADDRESS_SIZES = 0x80000008

_SUBLEAF_LEAVES = frozenset({LEAF_CACHES, LEAF_STRUCTURED_FEATURES, LEAF_TOPOLOGY, LEAF_XSAVE, LEAF_SGX})

EAX, EBX, ECX, EDX = range(4)


class Feature(NamedTuple):
    """Where a feature bit is found: ``CPUID(EAX=leaf, ECX=subleaf)``, output register, bit."""

    leaf: int
    subleaf: int
    register: int
    bit: int


# Names in the order of the bits, eight to a line; "." stands for a bit without a feature here.
_BITS: dict[tuple[int, int, int], str] = {
    (LEAF_FEATURES, 0, EDX): """
        fpu vme de pse tsc msr pae mce
        cx8 apic . sep mtrr pge mca cmov
        pat pse36 pn clflush . dts acpi mmx
        fxsr sse sse2 ss ht tm ia64 pbe""",
    (LEAF_FEATURES, 0, ECX): """
        pni pclmulqdq dtes64 monitor ds_cpl vmx smx est
        tm2 ssse3 cid sdbg fma cx16 xtpr pdcm
        . pcid dca sse4_1 sse4_2 x2apic movbe popcnt
        tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor""",
    (LEAF_POWER, 0, EAX): "dtherm ida arat . pln . pts hwp",
    (LEAF_STRUCTURED_FEATURES, 0, EBX): """
        fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep
        bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a
        avx512f avx512dq rdseed adx smap avx512ifma . clflushopt
        clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl""",
    (LEAF_STRUCTURED_FEATURES, 0, ECX): """
        . avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk
        gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq .
        la57 . . . . . rdpid .
        bus_lock_detect cldemote . movdiri movdir64b enqcmd sgx_lc pks""",
    (LEAF_STRUCTURED_FEATURES, 0, EDX): """
        . . avx512_4vnniw avx512_4fmaps fsrm uintr . .
        avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort . tsx_force_abort serialize hybrid_cpu
        tsxldtrk . pconfig arch_lbr ibt . amx_bf16 avx512_fp16
        amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities ssbd""",
    (LEAF_STRUCTURED_FEATURES, 1, EAX): """
        sha512 sm3 sm4 . avx_vnni avx512_bf16 lass cmpccxadd
        arch_perfmon_ext . fzrm fsrs fsrc . . .
        . fred lkgs wrmsrns . amx_fp16 hreset avx_ifma
        . . lam msrlist . . . .""",
    (LEAF_XSAVE, 1, EAX): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (LEAF_SGX, 0, EAX): "sgx1 sgx2",
    (LEAF_EXTENDED_FEATURES, 0, ECX): """
        lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse
        3dnowprefetch osvw""",
    (LEAF_EXTENDED_FEATURES, 0, EDX): """
        . . . . . . . .
        . . . syscall . . . .
        . . . . nx . mmxext .
        . fxsr_opt pdpe1gb rdtscp . lm""",
    (LEAF_ADVANCED_POWER, 0, EDX): ". . . . . . . . nonstop_tsc",
}

#: Second names: Linux shows the invariant TSC twice, and SSE3 under the name of its code name.
_ALIASES = {"constant_tsc": "nonstop_tsc", "sse3": "pni"}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _feature_table() -> dict[str, Feature]:
    table = {
        name: Feature(*place, bit)
        for place, names in _BITS.items()
        for bit, name in enumerate(names.split())
        if name != "."
    }
    return table | {alias: table[name] for alias, name in _ALIASES.items()}


#: Every feature that has a name here, and where it is found.
FEATURES: dict[str, Feature] = _feature_table()

#: Features this VMM virtualizes.
SUPPORTED: frozenset[str] = _names("""
    fpu de pse tsc msr pae cx8 sep pge cmov pat pse36 clflush mmx fxsr sse sse2
    pni pclmulqdq ssse3 cx16 sse4_1 sse4_2 movbe popcnt aes hypervisor
    smep erms adx smap la57 fsrm lass
    syscall nx pdpe1gb rdtscp lm lahf_lm nonstop_tsc""")
#: Supported, but only on request. Five-level paging makes every page walk longer. With the other two, kernels clear and
#: copy pages by REP STOSB and REP MOVSB, which direct execution does byte by byte; without, eight bytes at a time.
_ON_REQUEST = _names("la57 erms fsrm")

#: What a feature cannot be without.
_NEEDS: dict[str, str] = {
    "mmx": "fpu", "fxsr": "fpu", "sse": "fxsr", "sse2": "sse", "pni": "sse2", "ssse3": "pni",
    "sse4_1": "ssse3", "sse4_2": "sse4_1", "aes": "sse2", "pclmulqdq": "sse2", "cx16": "cx8",
    "pse36": "pse", "nx": "pae", "lm": "pae", "syscall": "lm", "lahf_lm": "lm", "pdpe1gb": "lm",
    "la57": "lm", "lass": "lm", "rdtscp": "tsc", "nonstop_tsc": "tsc",
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
_MAXPHYADDR_UNKNOWN = 36
#: Lookups that a table remembers; a guest can ask for any of 2**64.
_KEPT_ANSWERS = 256


@dataclass(frozen=True)
class CpuidEntry:
    """What one leaf, or one subleaf, returns; the fields of ``struct kvm_cpuid_entry2``."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


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
            CpuidEntry(leaf, subleaf, SIGNIFICANT_INDEX if leaf in _SUBLEAF_LEAVES else 0, *registers)
            for (leaf, subleaf), registers in sorted(leaves.items())
        )

    def _described(self) -> dict[tuple[int, int], tuple[int, int, int, int]]:
        """Everything but feature bits."""
        vendor_ebx, vendor_edx, vendor_ecx = _words(self.vendor.encode())
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
        brand = _words(_BRAND.encode().ljust(_BRAND_BYTES, b"\0"))
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
        feature = _ALIASES.get(feature, feature)
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


def _words(data: bytes) -> tuple[int, ...]:
    return tuple(int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4))


class CpuidTable:
    """The CPUID of one vCPU.

    >>> CpuidTable(parse_cpu("max").entries()).has("lass")
    True
    """

    def __init__(self, entries: Iterable[CpuidEntry]) -> None:
        self.entries = tuple(entries)
        self._by_place: dict[tuple[int, int | None], CpuidEntry] = {}
        self._answers: dict[tuple[int, int, bool, bool, bool], tuple[int, int, int, int]] = {}
        for entry in self.entries:
            index = entry.index if entry.flags & SIGNIFICANT_INDEX else None
            self._by_place.setdefault((entry.function, index), entry)

    def lookup(
        self,
        leaf: int,
        subleaf: int,
        *,
        osxsave: bool = False,
        ospke: bool = False,
        apic_enabled: bool = True,
    ) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX and EDX of ``CPUID(EAX=leaf, ECX=subleaf)``, as KVM's ``kvm_cpuid()`` finds them.

        A leaf behind the end of its range returns the highest basic leaf on Intel processors and zeros on
        AMD's; a gap within it returns zeros. The three bits that follow the vCPU's state are filled in:
        *osxsave* and *ospke* are CR4.OSXSAVE and CR4.PKE, *apic_enabled* is the global enable bit of
        IA32_APIC_BASE.
        """
        state = leaf, subleaf, osxsave, ospke, apic_enabled
        if state not in self._answers:
            if len(self._answers) >= _KEPT_ANSWERS:
                self._answers.clear()
            self._answers[state] = self._lookup(*state)
        return self._answers[state]

    def _lookup(
        self, leaf: int, subleaf: int, osxsave: bool, ospke: bool, apic_enabled: bool
    ) -> tuple[int, int, int, int]:
        entry = self._find(leaf, subleaf)
        if entry is None and self._is_out_of_range(leaf):
            leaf = self._maximum(LEAF_MAX_BASIC)
            entry = self._find(leaf, subleaf)
        if entry is None:
            return self._topology_without_levels(leaf, subleaf)
        ecx, edx = entry.ecx, entry.edx
        if leaf == LEAF_FEATURES:
            ecx = _with_bit(ecx, "osxsave", osxsave and self.has("xsave"))
            edx = _with_bit(edx, "apic", apic_enabled and self.has("apic"))
        elif leaf == LEAF_STRUCTURED_FEATURES and subleaf == 0:
            ecx = _with_bit(ecx, "ospke", ospke and self.has("pku"))
        return entry.eax, entry.ebx, ecx, edx

    def has(self, name: str) -> bool:
        """Whether the entries carry the feature *name* (a key of :data:`FEATURES`)."""
        feature = FEATURES[name]
        return bool(self.word(feature.leaf, feature.subleaf, feature.register) >> feature.bit & 1)

    def word(self, leaf: int, subleaf: int, register: int) -> int:
        """One output register (``EAX`` to ``EDX``) as the entries have it; 0 where there is no entry."""
        entry = self._find(leaf, subleaf)
        return (entry.eax, entry.ebx, entry.ecx, entry.edx)[register] if entry is not None else 0

    @property
    def maxphyaddr(self) -> int:
        """Physical address bits; 36 when no leaf tells (KVM: ``cpuid_query_maxphyaddr()``)."""
        entry = self._find(LEAF_ADDRESS_SIZES, 0)
        return entry.eax & 0xFF if entry is not None else _MAXPHYADDR_UNKNOWN

    def _find(self, leaf: int, subleaf: int) -> CpuidEntry | None:
        return self._by_place.get((leaf, subleaf)) or self._by_place.get((leaf, None))

    def _maximum(self, first_leaf: int) -> int:
        entry = self._find(first_leaf, 0)
        return entry.eax if entry is not None else -1

    def _is_out_of_range(self, leaf: int) -> bool:
        """Ranges start at 0, 40000000H (every 100H), 80000000H (``get_out_of_range_cpuid_entry()``)."""
        vendor = self._find(LEAF_MAX_BASIC, 0)
        if vendor is not None and (vendor.ebx, vendor.edx, vendor.ecx) in _ZEROS_OUT_OF_RANGE:
            return False
        if leaf >> 28 == LEAF_HYPERVISOR >> 28:
            return leaf > self._maximum(leaf & 0xFFFFFF00)
        return leaf > self._maximum(leaf & LEAF_MAX_EXTENDED)

    def _topology_without_levels(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """A topology level that does not exist still returns its number and the x2APIC ID."""
        if leaf in (LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2):
            entry = self._find(leaf, 1)
            if entry is not None:
                return 0, 0, subleaf & 0xFF, entry.edx
        return 0, 0, 0, 0


#: EBX, EDX and ECX of leaf 0 on processors that answer zeros for leaves out of range.
_ZEROS_OUT_OF_RANGE = (_words(b"AuthenticAMD"), _words(b"HygonGenuine"))


def _with_bit(value: int, name: str, on: bool) -> int:
    mask = 1 << FEATURES[name].bit
    return value | mask if on else value & ~mask


#: CR4 bits that every processor has since the Pentium Pro; firmware sets some of them without asking CPUID.
_CR4_ALWAYS = (
    reg.CR4_TSD | reg.CR4_DE | reg.CR4_PSE | reg.CR4_PAE | reg.CR4_MCE | reg.CR4_PGE | reg.CR4_PCE
    | reg.CR4_OSFXSR | reg.CR4_OSXMMEXCPT
)  # fmt: skip
_CR4_FEATURES = {
    "vme": reg.CR4_VME | reg.CR4_PVI, "umip": reg.CR4_UMIP, "la57": reg.CR4_LA57, "vmx": reg.CR4_VMXE,
    "fsgsbase": reg.CR4_FSGSBASE, "pcid": reg.CR4_PCIDE, "xsave": reg.CR4_OSXSAVE, "smep": reg.CR4_SMEP,
    "smap": reg.CR4_SMAP, "pku": reg.CR4_PKE, "shstk": reg.CR4_CET, "ibt": reg.CR4_CET, "pks": reg.CR4_PKS,
    "lass": reg.CR4_LASS, "lam": reg.CR4_LAM_SUP,
}  # fmt: skip
_EFER_FEATURES = {"syscall": reg.EFER_SCE, "lm": reg.EFER_LME | reg.EFER_LMA, "nx": reg.EFER_NXE}


#: Where the eight feature words are found that gate direct execution: (leaf, subleaf, output register).
FEATURE_WORDS = (
    (LEAF_FEATURES, 0, EDX), (LEAF_FEATURES, 0, ECX), (LEAF_STRUCTURED_FEATURES, 0, EBX),
    (LEAF_STRUCTURED_FEATURES, 0, ECX), (LEAF_STRUCTURED_FEATURES, 0, EDX),
    (LEAF_STRUCTURED_FEATURES, 1, EAX),
    (LEAF_EXTENDED_FEATURES, 0, EDX), (LEAF_EXTENDED_FEATURES, 0, ECX),
)  # fmt: skip


def feature_word(table: CpuidTable, place: tuple[int, int, int]) -> int:
    """One of the :data:`FEATURE_WORDS` of *table*."""
    return table.word(*place)


def cr4_allowed(table: CpuidTable) -> int:
    """The CR4 bits that a guest with this CPUID may set; the others are reserved: setting one is #GP(0).

    LASS is among them only when the guest's CPUID has it, whatever the host has (``__cr4_reserved_bits()``).
    """
    return _CR4_ALWAYS | _allowed(table, _CR4_FEATURES)


def efer_allowed(table: CpuidTable) -> int:
    """The IA32_EFER bits that a guest with this CPUID may set (KVM: ``kvm_valid_efer()``)."""
    return _allowed(table, _EFER_FEATURES)


def _allowed(table: CpuidTable, bits: dict[str, int]) -> int:
    allowed = 0
    for name, mask in bits.items():
        if table.has(name):
            allowed |= mask
    return allowed
