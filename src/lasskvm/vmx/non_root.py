"""VMX non-root operation: what L1's controls mean for L2 while it runs, from one VM entry to the next VM exit.

:class:`NonRootOperation` is what the emulator asks about L2's instructions and events (``Emulation.non_root``). Its
answers are those of :mod:`lasskvm.vmx.intercepts` and its neighbours; a VM exit is raised as
:class:`~lasskvm.vmx.exit_record.VmExit` and goes through to the run loop.

Source: Intel SDM volume 3C, chapter 26 (VMX non-root operation), 28.2 (what VM exits record).
"""

from __future__ import annotations

from collections.abc import Callable

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.events import Event, EventKind
from lasskvm.emulator.faults import EptFault
from lasskvm.memory import GuestMemory
from lasskvm.state import CR8, EPT_FAULT_GPA, EPT_OUTCOME, RIP, Words
from lasskvm.vmx.control_register_shadows import visible_cr0, visible_cr4
from lasskvm.vmx.entry_checks import secondary_controls
from lasskvm.vmx.exit_record import NestedExit, VmExit
from lasskvm.vmx.guest_time import tsc_offset
from lasskvm.vmx.intercepts import intercept_of, is_sensitive
from lasskvm.vmx.intercepts_events import exception_exit, may_intercept_page_faults
from lasskvm.vmx.intercepts_faults import faults_before_exit
from lasskvm.vmx.tpr_shadow import read_cr8, tpr_threshold_exit, uses_tpr_shadow, write_cr8
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.ept import exit_qualification, exit_reason
from lasskvm.x86.exceptions import DB, DF
from lasskvm.x86.registers import MASK64
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["NonRootOperation", "ept_exit", "with_vectoring"]

#: Instructions have at most 15 bytes.
_INSTRUCTION_LENGTH = 0xF
_INTERRUPTION_TYPES = {
    EventKind.EXTERNAL: vmx.INTR_TYPE_EXT_INTR,
    EventKind.NMI: vmx.INTR_TYPE_NMI_INTR,
    EventKind.EXCEPTION: vmx.INTR_TYPE_HARD_EXCEPTION,
    EventKind.SOFTWARE: vmx.INTR_TYPE_SOFT_INTR,
    EventKind.SOFTWARE_EXCEPTION: vmx.INTR_TYPE_SOFT_EXCEPTION,
}


class NonRootOperation:
    """L2 of *vmcs* between two transitions: a :class:`~lasskvm.emulator.context.NonRoot`.

    *words* is L2's state, *memory* L1's. ``trap_exit`` is a VM exit that is due behind the instruction that causes it;
    *trap_is_due* is called then. A VMCS with a task priority below the threshold cannot be entered: where L2 of one
    goes on, its exit is due.
    """

    def __init__(
        self,
        vmcs: Vmcs12,
        words: Words,
        memory: GuestMemory,
        trap_is_due: Callable[[], None] = lambda: None,
    ) -> None:
        self.vmcs = vmcs
        self._words = words
        self.tsc_offset = tsc_offset(vmcs)
        self._memory = memory
        self._trap_is_due = trap_is_due
        self._uses_tpr_shadow = uses_tpr_shadow(vmcs)
        self.trap_exit: NestedExit | None = None
        #: Whether some #PF is a VM exit.
        self.page_faults_may_exit = may_intercept_page_faults(vmcs)
        #: The controls, which do not change while L2 runs.
        self.pin_based = pin_based = vmcs[VmcsField.PIN_BASED_VM_EXEC_CONTROL]
        self.primary = vmcs[VmcsField.CPU_BASED_VM_EXEC_CONTROL]
        self.secondary = secondary_controls(vmcs)
        #: Physical NMIs that exit are not L2's to unblock, unless it has virtual ones.
        self.iret_unblocks_nmis = bool(
            pin_based & vmx.PIN_BASED_VIRTUAL_NMIS or not pin_based & vmx.PIN_BASED_NMI_EXITING
        )

        self.begin()

    def begin(self) -> None:
        """L2 goes on."""
        self.trap_exit = tpr_threshold_exit(self.vmcs, self._memory) if self._uses_tpr_shadow else None

    def is_sensitive(self, decoded: Decoded) -> bool:
        """Whether :meth:`before_instruction` has to be asked about *decoded*."""
        return is_sensitive(decoded)

    def before_instruction(self, ctx: Emulation, decoded: Decoded) -> None:
        """Raise the fault or the :class:`VmExit` that L2 gets instead of executing *decoded*, if it does."""
        faults_before_exit(ctx, decoded, self.vmcs)
        record = intercept_of(ctx, decoded, self.vmcs)
        if record is not None:
            raise VmExit(record)

    def before_event(self, event: Event, vectoring: Event | None) -> None:
        """Raise :class:`VmExit` if L1 intercepts the exception *event*.

        Exceptions of INT1 have been asked about as instructions, and interrupts of all kinds are not exceptions.
        """
        if event.kind is not EventKind.EXCEPTION or _is_int1(event):
            return
        record = exception_exit(self._words, event, self.vmcs)
        if record is None:
            return
        # A double fault that exits is not seen as an event that came up during the delivery of another.
        if vectoring is not None and event.vector != DF:
            record = with_vectoring(record, vectoring, self._words)
        raise VmExit(record)

    def visible_control_register(self, words: Words, number: int) -> int:
        """What L2 reads from CR0, CR4 or CR8."""
        if number == 0:
            return visible_cr0(self.vmcs, words)
        if number == 4:
            return visible_cr4(self.vmcs, words)
        return read_cr8(self.vmcs, self._memory) if self._uses_tpr_shadow else words[CR8]

    def write_task_priority(self, value: int) -> bool:
        """MOV to CR8 by the TPR shadow; False without one. #GP(0) as :class:`GuestFault` for reserved bits."""
        if not self._uses_tpr_shadow:
            return False
        self.trap_exit = write_cr8(self.vmcs, self._memory, value)
        if self.trap_exit is not None:
            self._trap_is_due()
        return True


def ept_exit(words: Words, fault: EptFault) -> NestedExit:
    """The VM exit for *fault*: an EPT violation or misconfiguration."""
    outcome = words[EPT_OUTCOME]
    record = NestedExit(
        ExitReason(exit_reason(outcome)),
        qualification=exit_qualification(outcome),
        guest_linear_address=fault.address & MASK64,
        guest_physical_address=words[EPT_FAULT_GPA],
    )
    return record if fault.vectoring is None else with_vectoring(record, fault.vectoring, words)


def with_vectoring(record: NestedExit, event: Event, words: Words) -> NestedExit:
    """*record* of an exit that came up while *event* was being delivered, with RIP as before (28.2.4)."""
    kind = vmx.INTR_TYPE_PRIV_SW_EXCEPTION if _is_int1(event) else _INTERRUPTION_TYPES[event.kind]
    information = vmx.INTR_INFO_VALID_MASK | kind | event.vector
    if event.error_code is not None:
        information |= vmx.INTR_INFO_DELIVER_CODE_MASK
    length = record.instruction_length
    if event.return_rip is not None:
        length = event.return_rip - words[RIP] & _INSTRUCTION_LENGTH
    return record._replace(
        idt_vectoring_information=information,
        idt_vectoring_error_code=event.error_code or 0,
        instruction_length=length,
    )


def _is_int1(event: Event) -> bool:
    """Whether *event* is the #DB of an instruction, which returns behind it."""
    return event.kind is EventKind.EXCEPTION and event.vector == DB and event.return_rip is not None
