"""Valid guests of a guest hypervisor, in every mode, and VM entries to them that can be spoilt."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

from lasskvm.memory import GuestMemory
from lasskvm.state import CR4_ALLOWED, EFER_ALLOWED, MAXPHYADDR, VcpuState
from lasskvm.vmx.capabilities import VmxCapabilities
from lasskvm.vmx.guest_checks import GuestStateViolation, check_guest_state
from lasskvm.vmx.vmcs import VMCS12_REVISION, Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.cpuid import FEATURES, CpuidEntry, CpuidTable, cr4_allowed, efer_allowed, significant_index
from lasskvm.x86.exceptions import NMI
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_CODE64,
    AR_DATA,
    AR_TSS16_BUSY,
    AR_TSS64_BUSY,
    AR_UNUSABLE,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LASS,
    CR4_PAE,
    CR4_PCIDE,
    CR4_SMAP,
    CR4_VMXE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    RFLAGS_FIXED,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_VM,
)
from lasskvm.x86.vmx_fields import VmcsField as F

Fields = dict[F, int]

MAXIMUM = 1 << 46
KERNEL = 0xFFFF_FFFF_8000_0000
#: Canonical with 57 bits, and not with 48.
FIVE_LEVEL_ADDRESS = 0xFF00_0000_0000_0000
NOT_CANONICAL = 1 << 47
FLAT = 0xFFFF_FFFF
CURRENT, OTHER_VMCS, NO_VMCS, SHADOW_VMCS, PDPT = 0x1000, 0x2000, 0x3000, 0x4000, 0x5020
PDPTES = (0x6001, 0, 0x7001, 0x8001)
#: Bits 2:1 are reserved in a PDPTE, and so are those from MAXPHYADDR up.
BAD_PDPTES = (0x6003, 0x6005, MAXIMUM | 1, 1 << 63 | 1)
EPTP = 0x8000 | vmx.VMX_EPTP_PWL_4 | vmx.MEMORY_TYPE_WB
PAT = 0x0007_0406_0007_0406
BTF = 1 << 1

FEATURES_OF_L1 = (
    "vmx", "lm", "nx", "syscall", "pae", "pcid", "smap", "lass", "lam", "rdtscp", "invpcid"
)  # fmt: skip
SIX = ("ES", "CS", "SS", "DS", "FS", "GS")
DATA = ("ES", "DS", "FS", "GS")


def segment(name: str, selector: int, attributes: int, base: int = 0, limit: int = FLAT) -> Fields:
    values = {"SELECTOR": selector, "BASE": base, "LIMIT": limit, "AR_BYTES": attributes}
    return {F[f"GUEST_{name}_{part}"]: value for part, value in values.items()}


def segments(cs: int, attributes: int, cpl: int = 0) -> Fields:
    """Flat segments, with *attributes* in CS; selectors from *cs* on."""
    result = segment("CS", cs | cpl, attributes | cpl << 5)
    for number, name in enumerate(("SS", *DATA), 1):
        result |= segment(name, cs + 8 * number | cpl, AR_DATA | cpl << 5)
    return result


def each(part: str, *names: str) -> list[tuple[str, F]]:
    """The named segment registers, each with its field that ends in *part*."""
    return [(name, F[f"GUEST_{name}_{part}"]) for name in names]


EVERY_GUEST: Fields = {
    F.GUEST_CR0: CR0_PG | CR0_NE | CR0_PE | CR0_WP,
    F.GUEST_CR4: CR4_VMXE,
    F.GUEST_CR3: PDPT,
    F.GUEST_RFLAGS: RFLAGS_FIXED,
    F.GUEST_RIP: 0x10_0000,
    F.VMCS_LINK_POINTER: vmx.VMCS_NO_POINTER,
    **segment("TR", 0x40, AR_TSS64_BUSY, limit=0x67),
    **segment("LDTR", 0, AR_UNUSABLE),
}
IA32E: Fields = {
    F.VM_ENTRY_CONTROLS: vmx.VM_ENTRY_IA32E_MODE,
    F.GUEST_CR4: CR4_VMXE | CR4_PAE | CR4_PCIDE | CR4_SMAP | CR4_LASS,
}
UNRESTRICTED: Fields = {
    F.CPU_BASED_VM_EXEC_CONTROL: vmx.CPU_BASED_ACTIVATE_SECONDARY_CONTROLS,
    F.SECONDARY_VM_EXEC_CONTROL: vmx.SECONDARY_EXEC_UNRESTRICTED_GUEST | vmx.SECONDARY_EXEC_ENABLE_EPT,
    F.EPT_POINTER: EPTP,
}
PAE: Fields = {F.GUEST_CR4: CR4_VMXE | CR4_PAE, **segments(0x10, AR_CODE32)}
REAL: Fields = {
    **UNRESTRICTED,
    F.GUEST_CR0: CR0_NE,
    F.GUEST_RIP: 0x7C00,
    **segment("TR", 0, AR_TSS16_BUSY, limit=0xFFFF),
}
#: What each adds to :data:`EVERY_GUEST`.
MODES: dict[str, Fields] = {
    "64-bit": {**IA32E, F.GUEST_RIP: KERNEL, **segments(0x10, AR_CODE64)},
    "64-bit user": {**IA32E, **segments(0x10, AR_CODE64, cpl=3)},
    "compatibility": {**IA32E, **segments(0x10, AR_CODE32, cpl=3)},
    "protected": segments(0x10, AR_CODE32),
    "protected user": segments(0x10, AR_CODE32, cpl=3),
    "protected without paging": {**UNRESTRICTED, **segments(0x10, AR_CODE32), F.GUEST_CR0: CR0_NE | CR0_PE},
    "unrestricted 64-bit": {**UNRESTRICTED, **IA32E, **segments(0x10, AR_CODE64)},
    "PAE": PAE,
    "PAE with EPT": {
        **PAE,
        **UNRESTRICTED,
        **dict(zip((F.GUEST_PDPTR0, F.GUEST_PDPTR1, F.GUEST_PDPTR2, F.GUEST_PDPTR3), PDPTES, strict=True)),
    },
    "virtual-8086": {
        F.GUEST_RFLAGS: RFLAGS_FIXED | RFLAGS_VM | RFLAGS_IOPL,
        F.GUEST_RIP: 0x100,
        **{key: value for name in SIX for key, value in segment(name, 0x1234, 0xF3, 0x12340, 0xFFFF).items()},
    },
    "real": {
        **REAL,
        **{key: value for name in SIX for key, value in segment(name, 0xF01F, 0x93, 0xF01F0, 0xFFFF).items()},
    },
}


class Entry:
    """A VM entry to a valid guest of *mode*, to be spoilt."""

    def __init__(
        self, mode: str, fields: Fields | None = None, features: Iterable[str] = FEATURES_OF_L1
    ) -> None:
        leaves: dict[tuple[int, int], list[int]] = {}
        for name in features:
            feature = FEATURES[name]
            registers = leaves.setdefault((feature.leaf, feature.subleaf), [0, 0, 0, 0])
            registers[feature.register] |= 1 << feature.bit
        cpuid = CpuidTable(
            CpuidEntry(*place, significant_index(place[0]), *registers) for place, registers in leaves.items()
        )
        self.words = VcpuState().words
        self.words[MAXPHYADDR] = 46
        self.words[CR4_ALLOWED], self.words[EFER_ALLOWED] = cr4_allowed(cpuid), efer_allowed(cpuid)
        self.capabilities = VmxCapabilities.of(cpuid, self.words[CR4_ALLOWED])
        self.memory = GuestMemory()
        self.memory.set_slot(0, 0, mmap.mmap(-1, 0x10000))
        for number, pdpte in enumerate(PDPTES):
            self.memory.store(PDPT + 8 * number, 8, pdpte)
        self.memory.store(CURRENT, 4, VMCS12_REVISION)
        self.memory.store(OTHER_VMCS, 4, VMCS12_REVISION)
        self.memory.store(SHADOW_VMCS, 4, VMCS12_REVISION | vmx.VMCS_SHADOW_INDICATOR)
        self.vmcs = Vmcs12()
        self.set(EVERY_GUEST | MODES[mode] | (fields or {}))

    def set(self, fields: Fields) -> Entry:
        for key, value in fields.items():
            self.vmcs[key] = value
        return self

    @property
    def violation(self) -> GuestStateViolation | None:
        return check_guest_state(self.vmcs, self.capabilities, self.memory, self.words, CURRENT)


def inject(kind: int, vector: int) -> Fields:
    return {F.VM_ENTRY_INTR_INFO_FIELD: vmx.INTR_INFO_VALID_MASK | kind | vector}


INTERRUPT = inject(vmx.INTR_TYPE_EXT_INTR, 0x20)
AN_NMI = inject(vmx.INTR_TYPE_NMI_INTR, NMI)
ENABLED: Fields = {F.GUEST_RFLAGS: RFLAGS_FIXED | RFLAGS_IF}
STI: Fields = {**ENABLED, F.GUEST_INTERRUPTIBILITY_INFO: vmx.GUEST_INTR_STATE_STI}
MOV_SS: Fields = {F.GUEST_INTERRUPTIBILITY_INFO: vmx.GUEST_INTR_STATE_MOV_SS}
NMI_BLOCKED: Fields = {F.GUEST_INTERRUPTIBILITY_INFO: vmx.GUEST_INTR_STATE_NMI}
HLT: Fields = {F.GUEST_ACTIVITY_STATE: vmx.GUEST_ACTIVITY_HLT}
EFER_LONG = EFER_SCE | EFER_NXE | EFER_LMA | EFER_LME

#: A mode, what is spoilt in a guest of that mode, and what the check says about it.
Rows = list[tuple[str, Fields, str]]


def rows(reason: str, *spoilt: tuple[str, Fields]) -> Rows:
    return [(mode, fields, reason) for mode, fields in spoilt]


def in_64_bit(reason: str, key: F, *values: int) -> Rows:
    return [("64-bit", {key: value}, reason) for value in values]


def loading(mode: str, fields: Fields) -> tuple[str, Fields]:
    """A guest of *mode* with the optional VM-entry controls: it loads *fields*, and proper values of the others."""
    long = MODES[mode].get(F.VM_ENTRY_CONTROLS, 0)
    controls = vmx.VM_ENTRY_LOAD_DEBUG_CONTROLS | vmx.VM_ENTRY_LOAD_IA32_PAT | vmx.VM_ENTRY_LOAD_IA32_EFER
    proper = {F.GUEST_IA32_PAT: PAT, F.GUEST_IA32_EFER: EFER_LONG if long else EFER_NXE}
    return mode, {F.VM_ENTRY_CONTROLS: long | controls, **proper, **fields}
