"""The transitions between L1 and L2: VM entry behind its checks, VM exit, and a VM entry that fails late.

What comes before: the controls, the host state (:mod:`lasskvm.vmx.entry_checks`) and the guest state
(:mod:`lasskvm.vmx.guest_checks`) have been checked. What comes behind: whoever enters L2 delivers the event to inject
(:mod:`lasskvm.vmx.injection`), starts the preemption timer and applies the TSC offset (:mod:`lasskvm.vmx.guest_time`),
and knows from then on that L2 is running.

A VM exit that fails in turn raises :class:`~lasskvm.vmx.host_state.VmxAborted`, which ends in shutdown wherever nobody
knows better; ``Vmcs12.abort`` has the indicator then, and the owner of the VMCS pointer writes it to memory.

Source: Intel SDM volume 3C, chapter 27 (VM entries) from 27.3.2, chapter 28 (VM exits) from 28.2; KVM's
``nested_vmx_enter_non_root_mode()`` and ``nested_vmx_vmexit()``.
"""

from __future__ import annotations

from operator import attrgetter

from lasskvm.emulator.context import Emulation
from lasskvm.state import EFER, NMI_BLOCKED
from lasskvm.vmx.capabilities import VmxCapabilities
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.guest_state import load_guest_state, save_guest_state
from lasskvm.vmx.guest_time import save_timer
from lasskvm.vmx.host_state import VmxAborted, load_host_state
from lasskvm.vmx.msr_lists import load_msrs, store_msrs
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.registers import EFER_LMA
from lasskvm.x86.vmx import VmxAbort
from lasskvm.x86.vmx_exits import EXIT_REASON_FAILED_VMENTRY, ExitReason
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["enter_guest", "fail_entry", "leave_guest", "record_exit", "update_entry_controls"]

#: The VM-exit information fields, and what of a record goes into them.
_RECORDED = {
    VmcsField.VM_EXIT_REASON: "reason",
    VmcsField.EXIT_QUALIFICATION: "qualification",
    VmcsField.GUEST_LINEAR_ADDRESS: "guest_linear_address",
    VmcsField.GUEST_PHYSICAL_ADDRESS: "guest_physical_address",
    VmcsField.VM_EXIT_INTR_INFO: "interruption_information",
    VmcsField.VM_EXIT_INTR_ERROR_CODE: "interruption_error_code",
    VmcsField.IDT_VECTORING_INFO_FIELD: "idt_vectoring_information",
    VmcsField.IDT_VECTORING_ERROR_CODE: "idt_vectoring_error_code",
    VmcsField.VM_EXIT_INSTRUCTION_LEN: "instruction_length",
    VmcsField.VMX_INSTRUCTION_INFO: "instruction_information",
}
_EXIT_FIELDS = tuple(map(int, _RECORDED))
_record_values = attrgetter(*_RECORDED.values())


def enter_guest(ctx: Emulation, vmcs: Vmcs12, capabilities: VmxCapabilities) -> bool:
    """Load L2 and the MSR list of the VM entry, and mark the VMCS as launched; whether that succeeded.

    When it did not, an entry of the list was wrong, and L1 is at its VM-exit handler with exit reason 34. Raises
    :class:`VmxAborted` as :func:`fail_entry`.
    """
    nmi_blocked = ctx.words[NMI_BLOCKED]
    load_guest_state(ctx, vmcs)
    count = vmcs[VmcsField.VM_ENTRY_MSR_LOAD_COUNT]
    failed = count and load_msrs(
        ctx, vmcs[VmcsField.VM_ENTRY_MSR_LOAD_ADDR], count, capabilities.msr_list_entries
    )
    if failed:
        # Whatever L2 would have had blocked, it has not run.
        ctx.words[NMI_BLOCKED] = nmi_blocked
        fail_entry(ctx, vmcs, capabilities, ExitReason.MSR_LOAD_FAIL, failed)
        return False
    vmcs.launched = True
    return True


def fail_entry(
    ctx: Emulation, vmcs: Vmcs12, capabilities: VmxCapabilities, reason: ExitReason, qualification: int
) -> None:
    """End a VM entry whose guest state or MSR list is wrong: L1 is at its VM-exit handler (27.8).

    That looks like a VM exit, but saves nothing of L2 and reports nothing but *reason* and *qualification*. Raises
    :class:`VmxAborted` when L1's state cannot be loaded.
    """
    vmcs[VmcsField.VM_EXIT_REASON] = reason | EXIT_REASON_FAILED_VMENTRY
    vmcs[VmcsField.EXIT_QUALIFICATION] = qualification
    try:
        _return_to_host(ctx, vmcs, capabilities)
    except VmxAborted as abort:
        vmcs.abort = abort.indicator
        raise


def leave_guest(
    ctx: Emulation,
    vmcs: Vmcs12,
    capabilities: VmxCapabilities,
    record: NestedExit,
    *,
    timer_deadline: int | None = None,
    pending_debug: int = 0,
) -> None:
    """A VM exit: L2 is in *vmcs*, and L1 at its VM-exit handler.

    The state words are L2's, with RIP as the exit is to show it. *timer_deadline* is that of the preemption timer while
    one is running, *pending_debug* as for :func:`~lasskvm.vmx.guest_state.save_guest_state`. Raises
    :class:`VmxAborted` when an MSR list is wrong or L1's state cannot be loaded.
    """
    record_exit(vmcs, record)
    update_entry_controls(ctx, vmcs)
    save_guest_state(ctx, vmcs, record, pending_debug)
    if timer_deadline is not None:
        save_timer(vmcs, capabilities, ctx.read_tsc(), timer_deadline)
    try:
        _store_msrs(ctx, vmcs, capabilities)
        _block_nmis(ctx, vmcs, record)
        _return_to_host(ctx, vmcs, capabilities)
    except VmxAborted as abort:
        vmcs.abort = abort.indicator
        raise


def record_exit(vmcs: Vmcs12, record: NestedExit) -> None:
    """Fill in the VM-exit information fields (28.2)."""
    vmcs.update(zip(_EXIT_FIELDS, _record_values(record), strict=True))


def update_entry_controls(ctx: Emulation, vmcs: Vmcs12) -> None:
    """The next VM entry injects nothing by itself, and enters the mode that L2 has left in (28.2, IA32_VMX_MISC)."""
    controls = vmcs[VmcsField.VM_ENTRY_CONTROLS] & ~vmx.VM_ENTRY_IA32E_MODE
    if ctx.words[EFER] & EFER_LMA:
        controls |= vmx.VM_ENTRY_IA32E_MODE
    information = vmcs[VmcsField.VM_ENTRY_INTR_INFO_FIELD] & ~vmx.INTR_INFO_VALID_MASK
    vmcs.update({VmcsField.VM_ENTRY_CONTROLS: controls, VmcsField.VM_ENTRY_INTR_INFO_FIELD: information})


def _store_msrs(ctx: Emulation, vmcs: Vmcs12, capabilities: VmxCapabilities) -> None:
    count = vmcs[VmcsField.VM_EXIT_MSR_STORE_COUNT]
    if count and store_msrs(
        ctx, vmcs[VmcsField.VM_EXIT_MSR_STORE_ADDR], count, capabilities.msr_list_entries
    ):
        raise VmxAborted(VmxAbort.SAVE_GUEST_MSR_FAIL)


def _block_nmis(ctx: Emulation, vmcs: Vmcs12, record: NestedExit) -> None:
    """An NMI that exits blocks the next one; other exits leave physical NMIs as they are (28.5.5).

    In L2 with virtual NMIs, physical ones are never blocked, and the state word is about the virtual ones.
    """
    kind = record.interruption_information & vmx.INTR_INFO_INTR_TYPE_MASK
    if kind == vmx.INTR_TYPE_NMI_INTR:
        ctx.words[NMI_BLOCKED] = 1
    elif vmcs[VmcsField.PIN_BASED_VM_EXEC_CONTROL] & vmx.PIN_BASED_VIRTUAL_NMIS:
        ctx.words[NMI_BLOCKED] = 0


def _return_to_host(ctx: Emulation, vmcs: Vmcs12, capabilities: VmxCapabilities) -> None:
    load_host_state(ctx, vmcs)
    count = vmcs[VmcsField.VM_EXIT_MSR_LOAD_COUNT]
    if count and load_msrs(ctx, vmcs[VmcsField.VM_EXIT_MSR_LOAD_ADDR], count, capabilities.msr_list_entries):
        raise VmxAborted(VmxAbort.LOAD_HOST_MSR_FAIL)
