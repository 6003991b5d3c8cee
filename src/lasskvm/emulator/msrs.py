"""Model-specific registers: which exist, what they hold at reset, and what may be written to them.

:data:`MSRS` is the whole list. Registers that instructions use live in the state words, the others in an
:class:`MsrFile`; what devices own (the local APIC, paravirtual clocks) is attached to the file by its owner.
An MSR that does not exist, that CPUID does not give, or that is written with a reserved bit is #GP(0), as
with KVM's default ``ignore_msrs=0``.

Source: Intel SDM volume 4; KVM's ``kvm_get_msr_common()``, ``kvm_set_msr_common()``, ``kvm_mtrr_set_msr()``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lasskvm.emulator import msr_checks as check
from lasskvm.emulator.control import set_efer
from lasskvm.emulator.faults import general_protection
from lasskvm.emulator.modes import linear_address_bits
from lasskvm.state import (
    APIC_BASE,
    BASE,
    CSTAR,
    EFER,
    KERNEL_GS_BASE,
    LSTAR,
    MISC_ENABLE,
    PAT,
    PKRS,
    SFMASK,
    STAR,
    SYSENTER_CS,
    SYSENTER_EIP,
    SYSENTER_ESP,
    TLB_FLUSH,
    TSC_AUX,
    Words,
    segment_word,
)
from lasskvm.x86 import msr
from lasskvm.x86.address import is_canonical
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.exceptions import GP
from lasskvm.x86.registers import FS, GS, MASK32, MASK64

if TYPE_CHECKING:
    from lasskvm.emulator.context import Emulation
    from lasskvm.emulator.decode import Decoded

__all__ = [
    "MSRS",
    "NOT_A_BASE_MSR",
    "AttachedMsr",
    "Msr",
    "MsrAccessNeeded",
    "MsrFile",
    "guest_tsc",
    "read_msr",
    "visible_tsc",
    "visible_tsc_offset",
    "write_base_msr",
    "write_msr",
]

_FS_BASE = segment_word(FS, BASE)
_GS_BASE = segment_word(GS, BASE)
_MSR_FS_BASE = msr.MSR_IA32_FS_BASE
_MSR_GS_BASE = msr.MSR_IA32_GS_BASE
_MSR_KERNEL_GS_BASE = msr.MSR_IA32_KERNEL_GS_BASE

#: :func:`write_base_msr`'s answer for every other MSR; no vector is this large.
NOT_A_BASE_MSR = 1 << 8


@dataclass(frozen=True, slots=True)
class Msr:
    """One model-specific register, as :data:`MSRS` describes it.

    ``word`` is the state word that holds it, or None for the MSR file. ``default`` is its reset value in the
    file. ``writable`` are the bits WRMSR may change; an attempt to change another is #GP(0), except for the
    bits in ``ignored``, which keep their value. ``features`` are CPUID features of which one must be there, and
    ``enabled_by`` are bits of IA32_FEATURE_CONTROL, once that is locked, without which the guest cannot write.
    ``check(words, value)`` says whether a value is allowed at all. A ``write_only`` register cannot be read; a
    write to one that ``translates`` makes direct execution forget its translations.
    """

    word: int | None = None
    default: int = 0
    writable: int = 0
    ignored: int = 0
    features: tuple[str, ...] = ()
    enabled_by: int = 0
    check: Callable[[Words, int], bool] | None = None
    write_only: bool = False
    translates: bool = False


#: Microcode revision 1, in the upper half as the manual has it; KVM shows Intel guests the same.
_MICROCODE_REVISION = 1 << 32
#: CPUID faulting is available (MSR_PLATFORM_INFO bit 31), and its enable bit in MISC_FEATURE_ENABLES.
_PLATFORM_CPUID_FAULTING = 1 << 31
_MISC_FEATURE_CPUID_FAULTING = 1 << 0
#: Eight variable ranges, fixed ranges, write combining.
_MTRR_VARIABLE_RANGES = 8
_MTRR_CAPABILITIES = _MTRR_VARIABLE_RANGES | 1 << 8 | 1 << 10
#: Immune to: Meltdown, L1TF at VM entry, MDS, page-size machine checks, TAA, the three MMIO stale-data forms,
#: BHI, GDS, RFDS. Nothing here executes speculatively.
_ARCH_CAPABILITIES = sum(1 << bit for bit in (0, 3, 5, 6, 8, 13, 14, 15, 20, 26, 27))
_SPEC_CTRL_BITS = 0b111
_PRED_CMD_IBPB = 1 << 0
_FLUSH_CMD_L1D = 1 << 0
_MCG_STATUS_BITS = 0b1111
_MISC_ENABLE_WRITABLE = (
    msr.MISC_ENABLE_FAST_STRINGS
    | msr.MISC_ENABLE_MONITOR
    | msr.MISC_ENABLE_LIMIT_CPUID
    | msr.MISC_ENABLE_XD_DISABLE
)
#: IA32_SGXLEPUBKEYHASH0 to 3 at reset: SHA-256 of the key that Intel signs its launch enclave with.
_SGX_LAUNCH_KEY_HASH = (0xA6053E051270B7AC, 0x6CFBE8BA8B3B413D, 0xC4916D99F2B3735D, 0xD4F8C05909F9BB3B)
_MTRR = ("mtrr",)
_SPEC_CTRL_FEATURES = ("spec_ctrl", "intel_stibp", "ssbd")


def _msr_table() -> dict[int, Msr]:
    table = {
        # In the state words
        msr.MSR_IA32_FS_BASE: Msr(_FS_BASE, writable=MASK64, features=("lm",), check=check.canonical),
        msr.MSR_IA32_GS_BASE: Msr(_GS_BASE, writable=MASK64, features=("lm",), check=check.canonical),
        msr.MSR_IA32_KERNEL_GS_BASE: Msr(
            KERNEL_GS_BASE, writable=MASK64, features=("lm",), check=check.canonical
        ),
        msr.MSR_IA32_STAR: Msr(STAR, writable=MASK64, features=("syscall",)),
        msr.MSR_IA32_LSTAR: Msr(LSTAR, writable=MASK64, features=("lm",), check=check.canonical),
        msr.MSR_IA32_CSTAR: Msr(CSTAR, writable=MASK64, features=("lm",), check=check.canonical),
        msr.MSR_IA32_SFMASK: Msr(SFMASK, writable=MASK32, features=("syscall",)),
        msr.MSR_IA32_SYSENTER_CS: Msr(SYSENTER_CS, writable=MASK32),
        msr.MSR_IA32_SYSENTER_ESP: Msr(SYSENTER_ESP, writable=MASK64, check=check.canonical),
        msr.MSR_IA32_SYSENTER_EIP: Msr(SYSENTER_EIP, writable=MASK64, check=check.canonical),
        msr.MSR_IA32_TSC_AUX: Msr(TSC_AUX, writable=MASK32, features=("rdtscp", "rdpid")),
        msr.MSR_IA32_PKRS: Msr(PKRS, writable=MASK32, features=("pks",), translates=True),
        msr.MSR_IA32_PAT: Msr(PAT, writable=MASK64, check=check.pat),
        msr.MSR_IA32_MISC_ENABLE: Msr(MISC_ENABLE, writable=_MISC_ENABLE_WRITABLE),
        msr.MSR_IA32_APIC_BASE: Msr(APIC_BASE, writable=MASK64, check=check.apic_base),
        # The processor itself
        msr.MSR_IA32_P5_MC_ADDR: Msr(),
        msr.MSR_IA32_P5_MC_TYPE: Msr(),
        msr.MSR_IA32_PLATFORM_ID: Msr(),
        msr.MSR_SMI_COUNT: Msr(),
        # Firmware has locked it (feature_control()).
        msr.MSR_IA32_FEATURE_CONTROL: Msr(default=msr.FEATURE_CONTROL_LOCK),
        # Loading microcode does nothing; software writes 0 here before it asks CPUID for the revision.
        msr.MSR_IA32_BIOS_UPDT_TRIG: Msr(writable=MASK64, write_only=True),
        msr.MSR_IA32_BIOS_SIGN_ID: Msr(default=_MICROCODE_REVISION, ignored=MASK64),
        msr.MSR_PLATFORM_INFO: Msr(default=_PLATFORM_CPUID_FAULTING),
        msr.MSR_MISC_FEATURE_ENABLES: Msr(writable=_MISC_FEATURE_CPUID_FAULTING),
        # Speculation controls
        msr.MSR_IA32_SPEC_CTRL: Msr(writable=_SPEC_CTRL_BITS, features=_SPEC_CTRL_FEATURES),
        msr.MSR_IA32_PRED_CMD: Msr(writable=_PRED_CMD_IBPB, features=("spec_ctrl",), write_only=True),
        msr.MSR_IA32_FLUSH_CMD: Msr(writable=_FLUSH_CMD_L1D, features=("flush_l1d",), write_only=True),
        msr.MSR_IA32_ARCH_CAPABILITIES: Msr(default=_ARCH_CAPABILITIES, features=("arch_capabilities",)),
        # Machine check, without banks
        msr.MSR_IA32_MCG_CAP: Msr(),
        msr.MSR_IA32_MCG_STATUS: Msr(writable=_MCG_STATUS_BITS),
        # Debugging and performance: nothing is recorded, so the two enable bits do not stick.
        msr.MSR_IA32_DEBUGCTL: Msr(ignored=msr.DEBUGCTL_LBR | msr.DEBUGCTL_BTF),
        msr.MSR_IA32_PERF_STATUS: Msr(),
        msr.MSR_IA32_PERF_CTL: Msr(),
        msr.MSR_RAPL_POWER_UNIT: Msr(),
        msr.MSR_PKG_ENERGY_STATUS: Msr(),
        msr.MSR_DRAM_ENERGY_STATUS: Msr(),
        msr.MSR_PP0_ENERGY_STATUS: Msr(),
        # AMD's, which KVM gives to all guests
        msr.MSR_AMD64_SYSCFG: Msr(),
        msr.MSR_K7_HWCR: Msr(
            default=msr.HWCR_TSC_FREQUENCY_SELECT,
            writable=msr.HWCR_MC_STATUS_WRITE_ENABLE | msr.HWCR_TSC_FREQUENCY_SELECT,
            ignored=msr.HWCR_TLB_CACHE_DISABLE | msr.HWCR_FLUSH_FILTER_DISABLE | msr.HWCR_IGNNE_EMULATION,
        ),
        msr.MSR_AMD64_NB_CFG: Msr(ignored=MASK64),
        msr.MSR_AMD64_DE_CFG: Msr(default=msr.DE_CFG_LFENCE_SERIALIZE),
        # Memory types: kept, and without effect
        msr.MSR_IA32_MTRRCAP: Msr(default=_MTRR_CAPABILITIES, features=_MTRR),
        msr.MSR_IA32_MTRR_DEF_TYPE: Msr(
            writable=check.MTRR_DEF_TYPE_BITS, features=_MTRR, check=check.mtrr_default_type
        ),
    }
    for number in range(_MTRR_VARIABLE_RANGES):
        base, mask = msr.MSR_IA32_MTRR_PHYSBASE0 + 2 * number, msr.MSR_IA32_MTRR_PHYSMASK0 + 2 * number
        table[base] = Msr(writable=MASK64, features=_MTRR, check=check.mtrr_base)
        table[mask] = Msr(writable=MASK64, features=_MTRR, check=check.mtrr_mask)
    for number, part in enumerate(_SGX_LAUNCH_KEY_HASH):
        table[msr.MSR_IA32_SGXLEPUBKEYHASH0 + number] = Msr(
            default=part,
            writable=MASK64,
            features=("sgx_lc",),
            enabled_by=msr.FEATURE_CONTROL_SGX_LAUNCH_CONTROL,
        )
    fixed = [
        msr.MSR_IA32_MTRR_FIX64K_00000,
        msr.MSR_IA32_MTRR_FIX16K_80000,
        msr.MSR_IA32_MTRR_FIX16K_A0000,
        *range(msr.MSR_IA32_MTRR_FIX4K_C0000, msr.MSR_IA32_MTRR_FIX4K_F8000 + 1),
    ]
    return table | {index: Msr(writable=MASK64, features=_MTRR, check=check.mtrr_fixed) for index in fixed}


#: Every MSR with a value of its own, by index. EFER, TSC and TSC_ADJUST, which are computed, are not among
#: them.
MSRS: dict[int, Msr] = _msr_table()


class AttachedMsr(NamedTuple):
    """An MSR that a device owns. Both may raise :class:`GuestFault`; ``host_write`` is for a VMM's ``KVM_SET_MSRS``."""

    read: Callable[[], int]
    write: Callable[[int], None]
    host_write: Callable[[int], None]


def _nobody() -> None:
    """What a change of the time-stamp counter means to nobody."""


class MsrFile:
    """The MSRs of one vCPU that are not state words.

    ``values`` holds them by index. ``tsc_offset`` is added to the host's time-stamp counter, and ``tsc_changed`` is
    called when it has changed. ``attached`` holds the MSRs that devices own.
    """

    def __init__(self, cpuid: CpuidTable) -> None:
        self.values = {index: entry.default for index, entry in MSRS.items() if entry.word is None}
        self.use_cpuid(cpuid)
        self.tsc_offset = 0
        self.tsc_adjust = 0
        self.tsc_changed: Callable[[], None] = _nobody
        self.attached: dict[int, AttachedMsr] = {}

    def use_cpuid(self, cpuid: CpuidTable) -> None:
        """Be the MSRs of a processor with *cpuid*: what firmware has locked depends on it, the others stay."""
        self.cpuid = cpuid
        self.values[msr.MSR_IA32_FEATURE_CONTROL] = feature_control(cpuid)

    def attach(
        self,
        index: int,
        read: Callable[[], int],
        write: Callable[[int], None],
        host_write: Callable[[int], None] | None = None,
    ) -> None:
        """Let *read* and *write* answer for MSR *index*; *host_write* for the VMM's writes, if they differ."""
        self.attached[index] = AttachedMsr(read, write, host_write or write)

    def move_tsc(self, offset: int, adjust: int) -> None:
        """Set the time-stamp counter's offset, and what IA32_TSC_ADJUST says of it."""
        self.tsc_offset, self.tsc_adjust = offset & MASK64, adjust & MASK64
        self.tsc_changed()

    @property
    def cpuid_faulting(self) -> bool:
        """Whether CPUID is #GP(0) at CPL 1 to 3 (MISC_FEATURE_ENABLES)."""
        return bool(self.values[msr.MSR_MISC_FEATURE_ENABLES] & _MISC_FEATURE_CPUID_FAULTING)


def feature_control(cpuid: CpuidTable) -> int:
    """What firmware leaves in IA32_FEATURE_CONTROL: everything that the processor has is enabled, and locked."""
    value = msr.FEATURE_CONTROL_LOCK
    if cpuid.has("vmx"):
        value |= msr.FEATURE_CONTROL_VMX_OUTSIDE_SMX
    if cpuid.has("sgx"):
        value |= msr.FEATURE_CONTROL_SGX_ENABLE
    if cpuid.has("sgx_lc"):
        value |= msr.FEATURE_CONTROL_SGX_LAUNCH_CONTROL
    return value


class MsrAccessNeeded(Exception):
    """RDMSR (*value* is None) or WRMSR of MSR *index*, which the VM's filter leaves to the VMM. Nothing has changed."""

    def __init__(self, decoded: Decoded, index: int, value: int | None) -> None:
        self.decoded = decoded
        self.index = index
        self.value = value
        super().__init__(f"access to MSR {index:#x}")


def guest_tsc(ctx: Emulation) -> int:
    """The guest's time-stamp counter, which its devices go by."""
    return ctx.read_tsc() + ctx.msrs.tsc_offset & MASK64


def visible_tsc(ctx: Emulation) -> int:
    """The time-stamp counter as instructions read it: in a nested guest, with its hypervisor's offset."""
    return ctx.read_tsc() + visible_tsc_offset(ctx) & MASK64


def visible_tsc_offset(ctx: Emulation) -> int:
    """What :func:`visible_tsc` is ahead of the counter that nobody writes to."""
    offset = ctx.msrs.tsc_offset
    return offset if ctx.non_root is None else offset + ctx.non_root.tsc_offset & MASK64


def read_msr(ctx: Emulation, index: int, *, host_initiated: bool = False) -> int:
    """RDMSR; raises #GP(0) as :class:`GuestFault` when there is no such register.

    *host_initiated* is a VMM's ``KVM_GET_MSRS``, to which CPUID is no obstacle.
    """
    if index in ctx.msrs.attached:
        return ctx.msrs.attached[index].read()
    if index == msr.MSR_IA32_EFER:
        return ctx.words[EFER]
    if index == msr.MSR_IA32_TSC:
        return guest_tsc(ctx) if host_initiated else visible_tsc(ctx)
    if index == msr.MSR_IA32_TSC_ADJUST and _has_any(ctx, ("tsc_adjust",), host_initiated):
        return ctx.msrs.tsc_adjust
    entry = MSRS.get(index)
    if entry is None or entry.write_only or not _has_any(ctx, entry.features, host_initiated):
        raise general_protection()
    return ctx.msrs.values[index] if entry.word is None else ctx.words[entry.word]


def write_msr(ctx: Emulation, index: int, value: int, *, host_initiated: bool = False) -> None:
    """WRMSR; raises #GP(0) as :class:`GuestFault` with nothing changed.

    *host_initiated* is a VMM's ``KVM_SET_MSRS``: it may also write what is read-only to the guest, and sets the
    time-stamp counter and IA32_TSC_ADJUST each without the other.
    """
    words, msrs = ctx.words, ctx.msrs
    if index in msrs.attached:
        attached = msrs.attached[index]
        (attached.host_write if host_initiated else attached.write)(value)
    elif index == msr.MSR_IA32_EFER:
        set_efer(words, value)
    elif index == msr.MSR_IA32_TSC:
        offset = value - ctx.read_tsc()
        adjusted = 0 if host_initiated else offset - msrs.tsc_offset
        msrs.move_tsc(offset, msrs.tsc_adjust + adjusted)
    elif index == msr.MSR_IA32_TSC_ADJUST and _has_any(ctx, ("tsc_adjust",), host_initiated):
        moved = 0 if host_initiated else value - msrs.tsc_adjust
        msrs.move_tsc(msrs.tsc_offset + moved, value)
    else:
        _write_entry(ctx, index, value, host_initiated)


def _write_entry(ctx: Emulation, index: int, value: int, host_initiated: bool) -> None:
    entry = MSRS.get(index)
    if entry is None or not _has_any(ctx, entry.features, host_initiated):
        raise general_protection()
    old = ctx.msrs.values[index] if entry.word is None else ctx.words[entry.word]
    if not host_initiated:
        if not entry.writable | entry.ignored or not _is_enabled(ctx.msrs, entry):
            raise general_protection()
        value = value & ~entry.ignored | old & entry.ignored
        if (value ^ old) & ~entry.writable:
            raise general_protection()
    if entry.check is not None and not entry.check(ctx.words, value):
        raise general_protection()
    if entry.write_only:
        return
    if entry.word is None:
        ctx.msrs.values[index] = value
    else:
        ctx.words[entry.word] = value
    if entry.translates:
        ctx.words[TLB_FLUSH] = 1


def _is_enabled(msrs: MsrFile, entry: Msr) -> bool:
    control = msrs.values[msr.MSR_IA32_FEATURE_CONTROL]
    return not control & msr.FEATURE_CONTROL_LOCK or control & entry.enabled_by == entry.enabled_by


def _has_any(ctx: Emulation, features: tuple[str, ...], host_initiated: bool) -> bool:
    return host_initiated or not features or any(map(ctx.cpuid.has, features))


def write_base_msr(state: Words, index: int, value: int) -> int:
    """WRMSR at CPL 0 to one of the three segment-base MSRs, which kernels write at every context switch.

    In the compiled subset. Returns 0, #GP's vector for a value that is not canonical, or
    :data:`NOT_A_BASE_MSR`.
    """
    if index != _MSR_FS_BASE and index != _MSR_GS_BASE and index != _MSR_KERNEL_GS_BASE:
        return NOT_A_BASE_MSR
    if not is_canonical(value, linear_address_bits(state)):
        return GP
    if index == _MSR_FS_BASE:
        state[_FS_BASE] = value
    elif index == _MSR_GS_BASE:
        state[_GS_BASE] = value
    else:
        state[KERNEL_GS_BASE] = value
    return 0
