"""VMX as it is going on in one vCPU: whether L1 is in VMX operation, which VMCS is current, and whether L2 runs.

Of the VMCSs that L1 has made active only the current one is cached. It is written to its page when another one becomes
current, on VMCLEAR, and on VMXOFF; until then what the page says does not matter, as the manual allows.

Nothing is checked here: :mod:`lasskvm.vmx.instructions` does that.

Source: Intel SDM volume 3C, 25.1 (states of a VMCS), 25.11.1 (software use of a VMCS region); KVM's
``struct nested_vmx`` and ``nested_release_vmcs12()``.
"""

from __future__ import annotations

from dataclasses import dataclass

from lasskvm.memory import GuestMemory
from lasskvm.vmx.capabilities import VmxCapabilities
from lasskvm.vmx.vmcs import Vmcs12, set_clear
from lasskvm.x86.vmx import VMCS_NO_POINTER

__all__ = ["NestedVmx"]


@dataclass
class NestedVmx:
    """VMX of one vCPU; KVM's ``struct nested_vmx``. As it is made, the processor is outside VMX operation.

    ``capabilities`` is what L1 has been told, and changes with its CPUID. ``vmxon_gpa`` and ``current_gpa`` are the
    VMXON pointer and the current-VMCS pointer, guest-physical and page-aligned, or ``VMCS_NO_POINTER``. ``current`` is
    the current VMCS, and is there exactly when ``current_gpa`` is a pointer. ``in_guest`` says that L2 is running (VMX
    non-root operation); who enters and leaves L2 sets it.
    """

    capabilities: VmxCapabilities
    vmxon_gpa: int = VMCS_NO_POINTER
    current_gpa: int = VMCS_NO_POINTER
    current: Vmcs12 | None = None
    in_guest: bool = False

    @property
    def in_vmx_operation(self) -> bool:
        """Whether VMXON has been executed, and VMXOFF not yet."""
        return self.vmxon_gpa != VMCS_NO_POINTER

    def enter_operation(self, gpa: int) -> None:
        """VMXON with the region at *gpa*: there is no current VMCS."""
        self.vmxon_gpa = gpa

    def leave_operation(self, memory: GuestMemory) -> None:
        """VMXOFF. The current VMCS goes to its page, where software that skipped VMCLEAR still finds it."""
        self._release_current(memory)
        self.vmxon_gpa = VMCS_NO_POINTER

    def make_current(self, memory: GuestMemory, gpa: int) -> None:
        """VMPTRLD of the region at *gpa*: its fields are copied, unless it is the current VMCS already."""
        if gpa == self.current_gpa:
            return
        self._release_current(memory)
        self.current_gpa, self.current = gpa, Vmcs12.load(memory, gpa)

    def clear(self, memory: GuestMemory, gpa: int) -> None:
        """VMCLEAR of the region at *gpa*: all its data is in memory, and its launch state is "clear"."""
        if gpa == self.current_gpa:
            self._release_current(memory)
        set_clear(memory, gpa)

    def store_current(self, memory: GuestMemory) -> None:
        """Write the current VMCS to its page, if there is one; it stays current."""
        if self.current is not None:
            self.current.store(memory, self.current_gpa)

    def _release_current(self, memory: GuestMemory) -> None:
        self.store_current(memory)
        self.current_gpa, self.current = VMCS_NO_POINTER, None
