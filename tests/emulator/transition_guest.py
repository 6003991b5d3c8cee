"""A guest for the tests of transitions: L1 as in :mod:`emulator_guest`, and a VMCS for one of :mod:`nested_guests`."""

from __future__ import annotations

from emulator_guest import CODE, GDT, IDT, KERNEL_CS, KERNEL_SS, KERNEL_STACK, TSS, TSS_SELECTOR, Guest
from nested_guests import EVERY_GUEST, MODES, PDPT, PDPTES, Fields

from lasskvm.state import CR3, CR4, CR4_ALLOWED
from lasskvm.vmx.capabilities import VmxCapabilities
from lasskvm.vmx.entry_checks import check_controls_and_host_state
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.guest_checks import check_guest_state
from lasskvm.vmx.transitions import leave_guest
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.registers import CR0_NE, CR0_PE, CR0_PG, CR0_WP, CR4_VMXE
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import FieldType, field_type
from lasskvm.x86.vmx_fields import VmcsField as F

#: L1's VM-exit handler; guest-physical addresses of the VMCS and of MSR lists.
EXIT_HANDLER = CODE + 0x2000
VMCS_GPA, ENTRY_LOAD, EXIT_STORE, EXIT_LOAD = 0x100000, 0x101000, 0x102000, 0x103000
GUEST_PAT, HOST_PAT = 0x0606_0606_0606_0606, 0x0007_0406_0007_0406

#: What :data:`nested_guests.EVERY_GUEST` leaves 0.
GUEST: Fields = {F.GUEST_RSP: 0x2000, F.GUEST_DR7: 0x400, F.GUEST_IA32_PAT: GUEST_PAT}
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
        self.set(EVERY_GUEST | GUEST | HOST | {F.HOST_CR3: self.words[CR3], F.HOST_CR4: self.words[CR4]})
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
        return {field: self.vmcs[field] for field in F if field_type(field) == FieldType.GUEST_STATE}

    def exit(self, record: NestedExit = CPUID, *, pending_debug: int = 0) -> None:
        """A VM exit, with no preemption timer running."""
        leave_guest(self.ctx, self.vmcs, self.capabilities, record, pending_debug=pending_debug)

    def check(self) -> None:
        """All checks of a VM entry; *words* must be L1's."""
        check_controls_and_host_state(self.vmcs, self.capabilities, self.memory, self.words)
        violation = check_guest_state(self.vmcs, self.capabilities, self.memory, self.words, VMCS_GPA)
        assert violation is None, violation
