"""CPUID: where the feature bits are, and how a vCPU's table answers a lookup.

Features carry the names of Linux's ``/proc/cpuinfo`` (``lass``, ``smap``, ``pni``), and those of KVM's own leaf the
names that QEMU gives them (``kvmclock``, ``kvm_steal_time``); :data:`FEATURES` says where each one is found. A
:class:`CpuidTable` holds the entries that ``KVM_SET_CPUID2`` takes and answers as KVM's ``kvm_cpuid()`` does.
:mod:`lasskvm.x86.cpu_models` makes such entries.

Sources: Intel SDM volume 2A, CPUID, and volume 1, 13.2 and 13.4 (leaf 0DH); the instruction-set extensions reference
for leaf 7, subleaf 1; Linux's documentation of KVM's CPUID leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from lasskvm.x86 import registers as reg

__all__ = [
    "ALIASES",
    "FEATURES",
    "FEATURE_WORDS",
    "SIGNIFICANT_INDEX",
    "CpuidEntry",
    "CpuidTable",
    "Feature",
    "cr4_allowed",
    "efer_allowed",
    "feature_word",
    "packed_words",
    "significant_index",
    "without_features",
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
LEAF_KVM_FEATURES = 0x40000001
LEAF_MAX_EXTENDED = 0x80000000
LEAF_EXTENDED_FEATURES = 0x80000001
LEAF_BRAND = 0x80000002
LEAF_L1_CACHES = 0x80000005
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
    (LEAF_KVM_FEATURES, 0, EAX): """
        kvmclock kvm_nopiodelay kvm_mmu kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt
        . kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi
        kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id
        . . . . . . . .
        kvmclock_stable_bit""",
    (LEAF_EXTENDED_FEATURES, 0, ECX): """
        lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse
        3dnowprefetch osvw""",
    (LEAF_EXTENDED_FEATURES, 0, EDX): """
        . . . . . . . .
        . . . syscall . . . .
        . . . . nx . mmxext .
        . fxsr_opt pdpe1gb rdtscp . lm""",
    (LEAF_ADVANCED_POWER, 0, EDX): ". . . . . . . . nonstop_tsc",
    (LEAF_ADDRESS_SIZES, 0, EBX): ". . . . . . . . . wbnoinvd",
}

#: Second names: Linux shows the invariant TSC twice, and SSE3 under the name of its code name.
ALIASES = {"constant_tsc": "nonstop_tsc", "sse3": "pni"}


def _feature_table() -> dict[str, Feature]:
    table = {
        name: Feature(*place, bit)
        for place, names in _BITS.items()
        for bit, name in enumerate(names.split())
        if name != "."
    }
    return table | {alias: table[name] for alias, name in ALIASES.items()}


#: The registers of a CPUID entry by number.
_REGISTER_NAMES = ("eax", "ebx", "ecx", "edx")
#: Every feature that has a name here, and where it is found.
FEATURES: dict[str, Feature] = _feature_table()


def significant_index(leaf: int) -> int:
    """The flags of an entry for *leaf*: ``SIGNIFICANT_INDEX`` for leaves that differ by subleaf, else 0."""
    return SIGNIFICANT_INDEX if leaf in _SUBLEAF_LEAVES else 0


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


def packed_words(data: bytes) -> tuple[int, ...]:
    """*data*, a text that CPUID returns, as the little-endian 32-bit words it is returned in."""
    return tuple(int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4))


_MAXPHYADDR_UNKNOWN = 36
#: The XSAVE area: the legacy region and the header, which are always there; then the components from this bit of XCR0
#: on, each described by the subleaf of that number. Its ECX bit 1 aligns it in the compacted format.
_XSAVE_LEGACY_AND_HEADER = 512 + 64
_XSAVE_FIRST_COMPONENT = 2
_XSAVE_COMPONENTS_END = 63
_XSAVE_ALIGNED = 1 << 1
_XSAVE_ALIGNMENT = 64
#: XCR0 after reset: x87.
_XCR0_RESET = 1 << 0
#: Lookups that a table remembers; a guest can ask for any of 2**64.
_KEPT_ANSWERS = 256


class CpuidTable:
    """The CPUID of one vCPU.

    >>> CpuidTable([CpuidEntry(1, 0, 0, 0, 0, 0, edx=1 << 25)]).has("sse")
    True
    """

    def __init__(self, entries: Iterable[CpuidEntry]) -> None:
        self.entries = tuple(entries)
        self._by_place: dict[tuple[int, int | None], CpuidEntry] = {}
        self._answers: dict[tuple[int, int, bool, bool, bool, int], tuple[int, int, int, int]] = {}
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
        xcr0: int = _XCR0_RESET,
    ) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX and EDX of ``CPUID(EAX=leaf, ECX=subleaf)``, as KVM's ``kvm_cpuid()`` finds them.

        A leaf behind the end of its range returns the highest basic leaf on Intel processors and zeros on
        AMD's; a gap within it returns zeros. What follows the vCPU's state is filled in: *osxsave* and *ospke* are
        CR4.OSXSAVE and CR4.PKE, *apic_enabled* is the global enable bit of IA32_APIC_BASE, and *xcr0* says how large
        the XSAVE area is (leaf 0DH, EBX).
        """
        state = leaf, subleaf, osxsave, ospke, apic_enabled, xcr0
        if state not in self._answers:
            if len(self._answers) >= _KEPT_ANSWERS:
                self._answers.clear()
            self._answers[state] = self._lookup(*state)
        return self._answers[state]

    def _lookup(
        self, leaf: int, subleaf: int, osxsave: bool, ospke: bool, apic_enabled: bool, xcr0: int
    ) -> tuple[int, int, int, int]:
        entry = self._find(leaf, subleaf)
        if entry is None and self._is_out_of_range(leaf):
            leaf = self._maximum(LEAF_MAX_BASIC)
            entry = self._find(leaf, subleaf)
        if entry is None:
            return self._topology_without_levels(leaf, subleaf)
        ebx, ecx, edx = entry.ebx, entry.ecx, entry.edx
        if leaf == LEAF_FEATURES:
            ecx = _with_bit(ecx, "osxsave", osxsave and self.has("xsave"))
            edx = _with_bit(edx, "apic", apic_enabled and self.has("apic"))
        elif leaf == LEAF_STRUCTURED_FEATURES and subleaf == 0:
            ecx = _with_bit(ecx, "ospke", ospke and self.has("pku"))
        elif leaf == LEAF_XSAVE and subleaf == 0:
            ebx = self.xsave_bytes(xcr0)
        elif leaf == LEAF_XSAVE and subleaf == 1 and (self.has("xsavec") or self.has("xsaves")):
            ebx = self.xsave_bytes(xcr0, compacted=True)
        return entry.eax, ebx, ecx, edx

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

    def xsave_bytes(self, components: int, *, compacted: bool = False) -> int:
        """The size of an XSAVE area with the *components* of XCR0, in bytes (``xstate_required_size()``)."""
        end = _XSAVE_LEGACY_AND_HEADER
        for component in range(_XSAVE_FIRST_COMPONENT, _XSAVE_COMPONENTS_END):
            entry = self._find(LEAF_XSAVE, component) if components >> component & 1 else None
            if entry is None:
                continue
            offset = entry.ebx
            if compacted:
                alignment = _XSAVE_ALIGNMENT if entry.ecx & _XSAVE_ALIGNED else 1
                offset = -(-end // alignment) * alignment
            end = max(end, offset + entry.eax)
        return end

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
_ZEROS_OUT_OF_RANGE = (packed_words(b"AuthenticAMD"), packed_words(b"HygonGenuine"))


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


def without_features(entries: Iterable[CpuidEntry], names: Iterable[str]) -> tuple[CpuidEntry, ...]:
    """*entries* without the features *names* (keys of :data:`FEATURES`)."""
    cleared: dict[tuple[int, int], dict[str, int]] = {}
    for name in names:
        feature = FEATURES[name]
        registers = cleared.setdefault((feature.leaf, feature.subleaf), {})
        register = _REGISTER_NAMES[feature.register]
        registers[register] = registers.get(register, 0) | 1 << feature.bit
    return tuple(_without_bits(entry, cleared.get((entry.function, entry.index), {})) for entry in entries)


def _without_bits(entry: CpuidEntry, bits: Mapping[str, int]) -> CpuidEntry:
    return replace(entry, **{register: getattr(entry, register) & ~mask for register, mask in bits.items()})


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
