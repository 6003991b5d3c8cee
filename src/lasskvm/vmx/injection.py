"""What a VM entry delivers to L2 at once: an injected event, pending debug exceptions, a pending monitor trap.

The fields have been checked when these functions read them.

Source: Intel SDM volume 3C, 25.8.3 (the fields), 27.6 (event injection), 27.7.3 (pending debug exceptions); KVM's
``vmcs12_save_pending_event()`` read backwards.
"""

from __future__ import annotations

from lasskvm.emulator.events import Event, EventKind
from lasskvm.emulator.modes import instruction_pointer_mask
from lasskvm.state import RIP, Words
from lasskvm.vmx.guest_mode import injected_event
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["event_to_deliver", "has_pending_monitor_trap", "is_vectoring", "pending_debug_trap"]

_EVENT_KINDS = {
    vmx.INTR_TYPE_EXT_INTR: EventKind.EXTERNAL,
    vmx.INTR_TYPE_NMI_INTR: EventKind.NMI,
    vmx.INTR_TYPE_HARD_EXCEPTION: EventKind.EXCEPTION,
    vmx.INTR_TYPE_SOFT_INTR: EventKind.SOFTWARE,
    vmx.INTR_TYPE_PRIV_SW_EXCEPTION: EventKind.EXCEPTION,
    vmx.INTR_TYPE_SOFT_EXCEPTION: EventKind.SOFTWARE_EXCEPTION,
}
#: Events of instructions that are complete: the handler returns behind them.
_INSTRUCTION_EVENTS = (
    vmx.INTR_TYPE_SOFT_INTR,
    vmx.INTR_TYPE_PRIV_SW_EXCEPTION,
    vmx.INTR_TYPE_SOFT_EXCEPTION,
)


def is_vectoring(vmcs: Vmcs12) -> bool:
    """Whether the VM entry delivers an event through L2's IDT."""
    event = injected_event(vmcs)
    return event is not None and event.kind in _EVENT_KINDS


def has_pending_monitor_trap(vmcs: Vmcs12) -> bool:
    """Whether L2 is to exit with the monitor trap flag before its first instruction (27.6.2)."""
    event = injected_event(vmcs)
    return event is not None and event.kind == vmx.INTR_TYPE_OTHER_EVENT


def event_to_deliver(vmcs: Vmcs12, words: Words) -> Event | None:
    """The event that the VM entry delivers through L2's IDT, or None.

    *words* are L2's. An injected #DB or #PF changes neither DR6, DR7 nor CR2 (27.6.1.1): L1 has set what it wants
    there. Of these three, delivery would take DR7.GD away.
    """
    event = injected_event(vmcs)
    if event is None or event.kind not in _EVENT_KINDS:
        return None
    error_code = return_rip = None
    if vmcs[VmcsField.VM_ENTRY_INTR_INFO_FIELD] & vmx.INTR_INFO_DELIVER_CODE_MASK:
        error_code = vmcs[VmcsField.VM_ENTRY_EXCEPTION_ERROR_CODE]
    if event.kind in _INSTRUCTION_EVENTS:
        return_rip = words[RIP] + vmcs[VmcsField.VM_ENTRY_INSTRUCTION_LEN] & instruction_pointer_mask(words)
    return Event(event.vector, _EVENT_KINDS[event.kind], error_code, return_rip)


def pending_debug_trap(vmcs: Vmcs12) -> int:
    """The DR6 bits of the #DB that L2 gets before its first instruction, or 0 for none.

    MOV SS holds it back, and a single step comes behind the next instruction anyway. An injected event displaces it.
    """
    pending = vmcs[VmcsField.GUEST_PENDING_DBG_EXCEPTIONS]
    mov_ss = vmcs[VmcsField.GUEST_INTERRUPTIBILITY_INFO] & vmx.GUEST_INTR_STATE_MOV_SS
    if mov_ss or is_vectoring(vmcs):
        return 0
    if not pending & (vmx.PENDING_DEBUG_BS | vmx.PENDING_DEBUG_ENABLED_BREAKPOINT):
        return 0
    return pending & (vmx.PENDING_DEBUG_BREAKPOINTS | vmx.PENDING_DEBUG_BS)
