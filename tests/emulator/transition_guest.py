"""A guest for the tests of transitions: L1 as in :mod:`emulator_guest`, and a valid VMCS of an L2 in each mode."""

from __future__ import annotations

from emulator_guest import CODE, GDT, IDT, KERNEL_CS, KERNEL_SS, KERNEL_STACK, TSS, TSS_SELECTOR, Guest

from lasskvm.state import CR3, CR4, CR4_ALLOWED
from lasskvm.vmx.capabilities import VmxCapabilities
from lasskvm.vmx.entry_checks import check_controls_and_host_state
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.guest_checks import check_guest_state
from lasskvm.vmx.transitions import leave_guest
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_CODE64,
    AR_DATA,
    AR_DPL_SHIFT,
    AR_TSS16_BUSY,
    AR_TSS64_BUSY,
    AR_UNUSABLE,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LASS,
    CR4_PAE,
    CR4_VMXE,
    RFLAGS_FIXED,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_VM,
)
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField as F

Fields = dict[F, int]

#: L1's VM-exit handler; guest-physical addresses of the VMCS, of MSR lists and of a page-directory-pointer table.
EXIT_HANDLER = CODE + 0x2000
VMCS_GPA, ENTRY_LOAD, EXIT_STORE, EXIT_LOAD, PDPT = 0x100000, 0x101000, 0x102000, 0x103000, 0x104020
GUEST_PAT, HOST_PAT = 0x0606_0606_0606_0606, 0x0007_0406_0007_0406
PDPTES = (0x6001, 0, 0x7001, 0x8001)
PDPTE_FIELDS = (F.GUEST_PDPTR0, F.GUEST_PDPTR1, F.GUEST_PDPTR2, F.GUEST_PDPTR3)
SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS")
FLAT = 0xFFFFFFFF


def segment(name: str, selector: int, attributes: int, base: int = 0, limit: int = FLAT) -> Fields:
    values = {"SELECTOR": selector, "BASE": base, "LIMIT": limit, "AR_BYTES": attributes}
    return {F[f"GUEST_{name}_{part}"]: value for part, value in values.items()}


def flat_segments(code: int, cpl: int = 0) -> Fields:
    """CS with the attributes *code*, and data segments."""
    dpl = cpl << AR_DPL_SHIFT
    fields = segment("CS", 0x10 | cpl, code | dpl)
    for number, name in enumerate(("SS", "ES", "DS", "FS", "GS")):
        fields |= segment(name, 0x18 + 8 * number | cpl, AR_DATA | dpl)
    return fields


def paragraphs(selector: int, attributes: int) -> Fields:
    """Segments of real or virtual-8086 mode."""
    fields: Fields = {}
    for name in SEGMENTS:
        fields |= segment(name, selector, attributes, selector << 4, 0xFFFF)
    return fields


UNRESTRICTED: Fields = {
    F.CPU_BASED_VM_EXEC_CONTROL: vmx.CPU_BASED_ACTIVATE_SECONDARY_CONTROLS,
    F.SECONDARY_VM_EXEC_CONTROL: vmx.SECONDARY_EXEC_UNRESTRICTED_GUEST | vmx.SECONDARY_EXEC_ENABLE_EPT,
    F.EPT_POINTER: 0x8000 | vmx.VMX_EPTP_PWL_4 | vmx.MEMORY_TYPE_WB,
}
LONG: Fields = {
    F.VM_ENTRY_CONTROLS: vmx.VM_ENTRY_IA32E_MODE,
    F.GUEST_CR4: CR4_VMXE | CR4_PAE | CR4_LASS,
}
PAE: Fields = {F.GUEST_CR4: CR4_VMXE | CR4_PAE, F.GUEST_CR3: PDPT, **flat_segments(AR_CODE32)}
#: What L2 is in each mode, beside :data:`EVERY_GUEST`.
MODES: dict[str, Fields] = {
    "64-bit": {**LONG, **flat_segments(AR_CODE64), F.GUEST_RIP: 0xFFFF_8000_0001_0000},
    "64-bit user": {**LONG, **flat_segments(AR_CODE64, cpl=3)},
    "compatibility": {**LONG, **flat_segments(AR_CODE32, cpl=3)},
    "protected": flat_segments(AR_CODE32),
    "PAE": PAE,
    "PAE with EPT": {**PAE, **UNRESTRICTED, **dict(zip(PDPTE_FIELDS, PDPTES, strict=True))},
    "virtual-8086": {
        **paragraphs(0x1234, 0xF3),
        F.GUEST_RFLAGS: RFLAGS_FIXED | RFLAGS_VM | RFLAGS_IOPL,
    },
    "real": {
        **UNRESTRICTED,
        **paragraphs(0xF000, 0x93),
        **segment("TR", 0, AR_TSS16_BUSY, limit=0xFFFF),
        F.GUEST_CR0: CR0_NE,
    },
}
EVERY_GUEST: Fields = {
    F.GUEST_CR0: CR0_PG | CR0_NE | CR0_PE | CR0_WP,
    F.GUEST_CR3: 0x5000,
    F.GUEST_CR4: CR4_VMXE,
    F.GUEST_RFLAGS: RFLAGS_FIXED | RFLAGS_IF,
    F.GUEST_RIP: 0x1000,
    F.GUEST_RSP: 0x2000,
    F.GUEST_DR7: 0x400,
    F.GUEST_IA32_PAT: GUEST_PAT,
    F.VMCS_LINK_POINTER: vmx.VMCS_NO_POINTER,
    **segment("TR", 0x40, AR_TSS64_BUSY, limit=0x67),
    **segment("LDTR", 0, AR_UNUSABLE),
}
#: L1 as it is while it runs.
HOST: Fields = {
    F.HOST_CR0: CR0_PG | CR0_NE | CR0_PE | CR0_WP,
    F.HOST_RIP: EXIT_HANDLER,
    F.HOST_RSP: KERNEL_STACK,
    F.HOST_CS_SELECTOR: KERNEL_CS,
    F.HOST_SS_SELECTOR: KERNEL_SS,
    F.HOST_TR_SELECTOR: TSS_SELECTOR,
    F.HOST_TR_BASE: TSS,
    F.HOST_GDTR_BASE: GDT,
    F.HOST_IDTR_BASE: IDT,
    F.HOST_IA32_PAT: HOST_PAT,
}

#: An exit at an instruction boundary, and one of an instruction.
WINDOW = NestedExit(ExitReason.INTERRUPT_WINDOW)
CPUID = NestedExit(ExitReason.CPUID, instruction_length=2)


class Nested(Guest):
    """L1, a 64-bit kernel in VMX operation, and ``vmcs``, which passes all checks."""

    def __init__(self, mode: str = "64-bit", fields: Fields | None = None) -> None:
        super().__init__()
        self.words[CR4_ALLOWED] |= CR4_VMXE
        self.words[CR4] |= CR4_VMXE
        self.capabilities = VmxCapabilities.of(self.cpuid, self.words[CR4_ALLOWED])
        for number, pdpte in enumerate(PDPTES):
            self.memory.store(PDPT + 8 * number, 8, pdpte)
        offered = self.capabilities
        self.vmcs = Vmcs12()
        self.set(EVERY_GUEST | HOST | {F.HOST_CR3: self.words[CR3], F.HOST_CR4: self.words[CR4]})
        self.set(MODES[mode])
        self.add(
            {
                F.PIN_BASED_VM_EXEC_CONTROL: offered.pin_based.must_be_1,
                F.CPU_BASED_VM_EXEC_CONTROL: offered.cpu_based.must_be_1,
                F.VM_EXIT_CONTROLS: offered.vm_exit.must_be_1 | vmx.VM_EXIT_HOST_ADDR_SPACE_SIZE,
                F.VM_ENTRY_CONTROLS: offered.vm_entry.must_be_1,
            }
        )
        self.set(fields or {})

    def set(self, fields: Fields) -> Nested:
        for field, value in fields.items():
            self.vmcs[field] = value
        return self

    def add(self, controls: Fields) -> Nested:
        """Set more bits of fields."""
        return self.set({field: self.vmcs[field] | bits for field, bits in controls.items()})

    def guest_fields(self) -> Fields:
        """The guest-state area."""
        return {field: self.vmcs[field] for field in F if field.name.startswith(("GUEST_", "VMX_PREEMPT"))}

    def exit(self, record: NestedExit = CPUID, *, pending_debug: int = 0) -> None:
        """A VM exit, with no preemption timer running."""
        leave_guest(self.ctx, self.vmcs, self.capabilities, record, pending_debug=pending_debug)

    def check(self) -> None:
        """All checks of a VM entry; *words* must be L1's."""
        check_controls_and_host_state(self.vmcs, self.capabilities, self.memory, self.words)
        violation = check_guest_state(self.vmcs, self.capabilities, self.memory, self.words, VMCS_GPA)
        assert violation is None, violation
