"""What a VM entry delivers to L2 at once."""

from __future__ import annotations

import pytest
from nested_guests import KERNEL, Fields
from transition_guest import Nested

from lasskvm.emulator.events import Event, EventKind
from lasskvm.state import RIP
from lasskvm.vmx.guest_state import load_guest_state
from lasskvm.vmx.injection import event_to_deliver, has_pending_monitor_trap, is_vectoring, pending_debug_trap
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import BP, DB, GP, NMI, UD
from lasskvm.x86.vmx_fields import VmcsField as F

BS, ENABLED = vmx.PENDING_DEBUG_BS, vmx.PENDING_DEBUG_ENABLED_BREAKPOINT


def event(kind: int, vector: int, extra: int = 0) -> Fields:
    return {F.VM_ENTRY_INTR_INFO_FIELD: vmx.INTR_INFO_VALID_MASK | kind | vector | extra}


def delivered(fields: Fields, mode: str = "64-bit") -> Event | None:
    guest = Nested(mode, fields)
    load_guest_state(guest.ctx, guest.vmcs)
    return event_to_deliver(guest.vmcs, guest.words)


@pytest.mark.parametrize(
    "fields, expected",
    [
        (event(vmx.INTR_TYPE_EXT_INTR, 0x20), Event(0x20, EventKind.EXTERNAL)),
        (event(vmx.INTR_TYPE_NMI_INTR, NMI), Event(NMI, EventKind.NMI)),
        (event(vmx.INTR_TYPE_HARD_EXCEPTION, UD), Event(UD)),
        (
            event(vmx.INTR_TYPE_HARD_EXCEPTION, GP, vmx.INTR_INFO_DELIVER_CODE_MASK)
            | {F.VM_ENTRY_EXCEPTION_ERROR_CODE: 0x18},
            Event(GP, error_code=0x18),
        ),
        (
            event(vmx.INTR_TYPE_SOFT_INTR, 0x80) | {F.VM_ENTRY_INSTRUCTION_LEN: 2},
            Event(0x80, EventKind.SOFTWARE, return_rip=KERNEL + 2),
        ),
        (
            event(vmx.INTR_TYPE_SOFT_EXCEPTION, BP) | {F.VM_ENTRY_INSTRUCTION_LEN: 1},
            Event(BP, EventKind.SOFTWARE_EXCEPTION, return_rip=KERNEL + 1),
        ),
        (
            event(vmx.INTR_TYPE_PRIV_SW_EXCEPTION, DB) | {F.VM_ENTRY_INSTRUCTION_LEN: 1},
            Event(DB, return_rip=KERNEL + 1),
        ),
    ],
)
def test_events_are_delivered_as_what_they_are(fields: Fields, expected: Event) -> None:
    assert delivered(fields) == expected


def test_software_event_returns_within_the_width_of_the_instruction_pointer() -> None:
    fields = event(vmx.INTR_TYPE_SOFT_INTR, 0x80) | {F.VM_ENTRY_INSTRUCTION_LEN: 2, F.GUEST_RIP: 0xFFFF_FFFF}
    result = delivered(fields, "protected")
    assert result is not None
    assert result.return_rip == 1


def test_nothing_is_delivered_without_the_valid_bit() -> None:
    fields = {F.VM_ENTRY_INTR_INFO_FIELD: vmx.INTR_TYPE_EXT_INTR | 0x20}
    assert delivered(fields) is None
    assert not is_vectoring(Nested("64-bit", fields).vmcs)


def test_pending_monitor_trap_is_no_event_of_the_guest() -> None:
    fields = event(vmx.INTR_TYPE_OTHER_EVENT, 0)
    vmcs = Nested("64-bit", fields).vmcs
    assert has_pending_monitor_trap(vmcs)
    assert not is_vectoring(vmcs)
    assert delivered(fields) is None
    assert not has_pending_monitor_trap(Nested("64-bit", event(vmx.INTR_TYPE_EXT_INTR, 0x20)).vmcs)


@pytest.mark.parametrize(
    "pending, dr6",
    [(0, 0), (3, 0), (BS, BS), (ENABLED | 2, 2), (ENABLED | BS | 1, BS | 1), (ENABLED, 0)],
)
def test_pending_debug_exceptions_need_a_cause(pending: int, dr6: int) -> None:
    assert pending_debug_trap(Nested("64-bit", {F.GUEST_PENDING_DBG_EXCEPTIONS: pending}).vmcs) == dr6


def test_mov_ss_and_events_hold_pending_debug_exceptions_back_and_sti_does_not() -> None:
    pending = {F.GUEST_PENDING_DBG_EXCEPTIONS: BS}
    for kind, dr6 in ((vmx.GUEST_INTR_STATE_MOV_SS, 0), (vmx.GUEST_INTR_STATE_STI, BS)):
        vmcs = Nested("64-bit", pending | {F.GUEST_INTERRUPTIBILITY_INFO: kind}).vmcs
        assert pending_debug_trap(vmcs) == dr6
    assert pending_debug_trap(Nested("64-bit", pending | event(vmx.INTR_TYPE_EXT_INTR, 0x20)).vmcs) == 0


def test_events_leave_the_instruction_pointer_to_the_delivery() -> None:
    guest = Nested("64-bit", event(vmx.INTR_TYPE_EXT_INTR, 0x20))
    load_guest_state(guest.ctx, guest.vmcs)
    assert guest.words[RIP] == KERNEL
