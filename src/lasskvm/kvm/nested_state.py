"""The state of nested virtualization as data: ``KVM_GET_NESTED_STATE``, ``KVM_SET_NESTED_STATE``, and in snapshots.

The ioctls speak KVM's ``struct kvm_nested_state``: a header of 128 bytes, and while a VMCS is current its page, in the
format of :mod:`lasskvm.vmx.vmcs`. Cached VMCS and state words go together in L2: the page has L2's registers as a VM
exit would save them, and setting it loads them. What is in no VMCS, and what L1's controls neither save nor load, the
VMM sets with the other ioctls, before or behind.

A snapshot has the state words themselves, so it keeps what else there is, exactly.

Source: ``Documentation/virt/kvm/api.rst`` 4.114 and 4.115; KVM's ``vmx_get_nested_state()`` and
``vmx_set_nested_state()``.
"""

from __future__ import annotations

import errno
import struct
from array import array
from typing import TYPE_CHECKING, NamedTuple

from lasskvm.kvm.snapshot import Document
from lasskvm.memory import PAGE_MASK, PAGE_SIZE
from lasskvm.state import EFER, MAXPHYADDR
from lasskvm.vmx.entry_checks import check_controls_and_host_state
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.guest_checks import check_guest_state
from lasskvm.vmx.guest_mode import is_ia32e_guest
from lasskvm.vmx.guest_state import load_guest_state, save_guest_state
from lasskvm.vmx.nested import NestedVmx
from lasskvm.vmx.transitions import update_entry_controls
from lasskvm.vmx.vmcs import VMCS12_REVISION, Vmcs12, VmFailValid
from lasskvm.x86 import vmx
from lasskvm.x86.registers import EFER_LMA, EFER_LME, MASK64
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField

if TYPE_CHECKING:
    from lasskvm.kvm.nested import NestedOperation
    from lasskvm.kvm.vcpu_state import StatefulVcpu

__all__ = [
    "NESTED_STATE_BYTES",
    "get_nested_state",
    "nested_document",
    "restore_nested",
    "set_nested_state",
]

_IOCTL = "KVM_SET_NESTED_STATE"
#: ``KVM_STATE_NESTED_*``. There are no enlightened VMCSs, and no SMM.
_GUEST_MODE, _RUN_PENDING, _MTF_PENDING = 1 << 0, 1 << 1, 1 << 3
_FLAGS = _GUEST_MODE | _RUN_PENDING | _MTF_PENDING
_FORMAT_VMX = 0
#: ``KVM_STATE_VMX_PREEMPTION_TIMER_DEADLINE``
_TIMER_DEADLINE = 1 << 0
#: Flags, format, size; VMXON pointer, current-VMCS pointer, flags of SMM, padding, flags of the rest, deadline.
_HEADER = struct.Struct("<HHI QQHHIQ")
_HEADER_BYTES = 128
#: What ``KVM_CAP_NESTED_STATE`` says: no state is longer.
NESTED_STATE_BYTES = _HEADER_BYTES + PAGE_SIZE

#: VM-entry controls by which L2 gets values of the VMCS that VM exits need not have saved there.
_LOADED_BY_CONTROL = (
    vmx.VM_ENTRY_LOAD_DEBUG_CONTROLS | vmx.VM_ENTRY_LOAD_IA32_PAT | vmx.VM_ENTRY_LOAD_IA32_EFER
)
#: What VM entry takes from the VMCS at its end, and until then is nowhere else.
_ENTRY_STATE = (
    VmcsField.GUEST_INTERRUPTIBILITY_INFO,
    VmcsField.GUEST_ACTIVITY_STATE,
    VmcsField.GUEST_PENDING_DBG_EXCEPTIONS,
    VmcsField.VM_ENTRY_INTR_INFO_FIELD,
)


class _State(NamedTuple):
    """``struct kvm_nested_state``, taken apart. ``vmcs`` is None when no VMCS is current."""

    flags: int = 0
    vmxon_gpa: int = vmx.VMCS_NO_POINTER
    current_gpa: int = vmx.VMCS_NO_POINTER
    deadline: int | None = None
    vmcs: Vmcs12 | None = None


# ------------------------------------------------------------------------------------------------------ the ioctls


def get_nested_state(vcpu: StatefulVcpu) -> bytes:
    """``KVM_GET_NESTED_STATE``: 128 bytes, and 4096 more while a VMCS is current.

    The preemption timer's deadline is in the timer's ticks, of L1's time-stamp counter.
    """
    nested = vcpu.nested
    if nested.vmx is None or not nested.vmx.in_vmx_operation:
        return _packed(_State())
    flags = 0
    if nested.vmx.in_guest:
        flags |= _GUEST_MODE
        flags |= _RUN_PENDING * nested.run_pending | _MTF_PENDING * nested.monitor_trap_pending
    deadline = nested.preemption_deadline
    if deadline is not None:
        deadline = deadline + vcpu.emulation.msrs.tsc_offset & MASK64
        deadline >>= nested.vmx.capabilities.misc & vmx.VMX_MISC_PREEMPTION_TIMER_RATE
    return _packed(
        _State(flags, nested.vmx.vmxon_gpa, nested.vmx.current_gpa, deadline, _complete_vmcs(vcpu, nested))
    )


def set_nested_state(vcpu: StatefulVcpu, state: bytes) -> None:
    """``KVM_SET_NESTED_STATE``: leave VMX operation, then be where *state* says.

    Raises OSError with EINVAL for what is no such state, and for an L2 that could not be entered; in this case the vCPU
    is outside VMX operation.
    """
    wanted = _unpacked(state)
    nested = vcpu.nested
    if wanted.vmxon_gpa == vmx.VMCS_NO_POINTER:
        if wanted != _State():
            raise _invalid("outside VMX operation there is no VMCS, no L2 and no timer; clear their fields")
        nested.reset()
        return
    if nested.vmx is None:
        raise _invalid("this vCPU has no VMX; give it a CPUID with VMX first")
    _check_pointers(vcpu, wanted)
    nested.reset()
    if wanted.flags & _GUEST_MODE:
        _check_l2(vcpu, nested.vmx, wanted)
    nested.vmx.vmxon_gpa, nested.vmx.current_gpa = wanted.vmxon_gpa, wanted.current_gpa
    nested.vmx.current = wanted.vmcs
    if wanted.flags & _GUEST_MODE:
        _resume(vcpu, nested, nested.vmx, wanted)


def _complete_vmcs(vcpu: StatefulVcpu, nested: NestedOperation) -> Vmcs12 | None:
    """The current VMCS with the state of the L2 that runs, which is in the state words."""
    assert nested.vmx is not None
    current = nested.vmx.current
    if current is None or not nested.vmx.in_guest:
        return current
    vmcs = current.copy()
    # As the exit of an event between two instructions would save it.
    save_guest_state(vcpu.emulation, vmcs, NestedExit(ExitReason.PREEMPTION_TIMER))
    update_entry_controls(vcpu.emulation, vmcs)
    if nested.run_pending:
        for field in _ENTRY_STATE:
            vmcs[field] = current[field]
    return vmcs


def _check_pointers(vcpu: StatefulVcpu, wanted: _State) -> None:
    bits = vcpu.state.words[MAXPHYADDR]
    if wanted.vmxon_gpa & PAGE_MASK or wanted.vmxon_gpa >> bits:
        raise _invalid(f"the VMXON pointer {wanted.vmxon_gpa:#x} is not the address of a page")
    if wanted.vmcs is None:
        if wanted.current_gpa != vmx.VMCS_NO_POINTER or wanted.flags:
            raise _invalid("the page of the current VMCS is missing; let it follow the header")
        return
    if wanted.current_gpa & PAGE_MASK or wanted.current_gpa >> bits or wanted.current_gpa == wanted.vmxon_gpa:
        raise _invalid(f"the current-VMCS pointer {wanted.current_gpa:#x} is not the address of a VMCS")


def _check_l2(vcpu: StatefulVcpu, nested: NestedVmx, wanted: _State) -> None:
    """EINVAL unless the controls, L1's state and L2's pass the checks of a VM entry."""
    assert wanted.vmcs is not None
    memory = vcpu.vm.memory
    # The words may be L2's already; the mode that L1 has entered from is that of its exit controls.
    entering = memoryview(array("Q", vcpu.state.words))
    ia32e = wanted.vmcs[VmcsField.VM_EXIT_CONTROLS] & vmx.VM_EXIT_HOST_ADDR_SPACE_SIZE
    entering[EFER] = entering[EFER] & ~EFER_LMA | (EFER_LMA if ia32e else 0)
    try:
        check_controls_and_host_state(wanted.vmcs, nested.capabilities, memory, entering)
    except VmFailValid as failure:
        raise _invalid(f"the VMCS cannot be entered: {failure}") from None
    vmcs = wanted.vmcs if wanted.flags & _RUN_PENDING else _without_loads(wanted.vmcs)
    violation = check_guest_state(vmcs, nested.capabilities, memory, entering, wanted.current_gpa)
    if violation is not None:
        raise _invalid(f"the VMCS cannot be entered: {violation.reason}")


def _resume(vcpu: StatefulVcpu, nested: NestedOperation, state: NestedVmx, wanted: _State) -> None:
    assert wanted.vmcs is not None
    ctx, words = vcpu.emulation, vcpu.state.words
    if wanted.flags & _RUN_PENDING:
        load_guest_state(ctx, wanted.vmcs)
    else:
        efer = words[EFER] & ~(EFER_LME | EFER_LMA)
        if is_ia32e_guest(wanted.vmcs):
            efer |= EFER_LME | EFER_LMA
        load_guest_state(ctx, _without_loads(wanted.vmcs))
        words[EFER] = efer
    nested.start_running()
    nested.run_pending = bool(wanted.flags & _RUN_PENDING)
    nested.monitor_trap_pending = bool(wanted.flags & _MTF_PENDING)
    if wanted.deadline is not None:
        rate = state.capabilities.misc & vmx.VMX_MISC_PREEMPTION_TIMER_RATE
        nested.start_timer((wanted.deadline << rate) - ctx.msrs.tsc_offset)


def _without_loads(vmcs: Vmcs12) -> Vmcs12:
    """*vmcs* without what only a VM entry does: it loads controlled registers, and delivers an event."""
    stripped = vmcs.copy()
    stripped[VmcsField.VM_ENTRY_CONTROLS] &= ~_LOADED_BY_CONTROL
    stripped[VmcsField.VM_ENTRY_INTR_INFO_FIELD] &= ~vmx.INTR_INFO_VALID_MASK
    return stripped


def _packed(state: _State) -> bytes:
    page = b"" if state.vmcs is None else state.vmcs.pack().ljust(PAGE_SIZE, b"\0")
    header = _HEADER.pack(
        state.flags,
        _FORMAT_VMX,
        _HEADER_BYTES + len(page),
        state.vmxon_gpa,
        state.current_gpa,
        0,
        0,
        0 if state.deadline is None else _TIMER_DEADLINE,
        state.deadline or 0,
    )
    return header.ljust(_HEADER_BYTES, b"\0") + page


def _unpacked(data: bytes) -> _State:
    if len(data) < _HEADER_BYTES:
        raise _invalid(f"{len(data)} bytes are too few; the header has {_HEADER_BYTES}")
    flags, format_, size, vmxon_gpa, current_gpa, smm_flags, _, timer_flags, deadline = _HEADER.unpack_from(
        data
    )
    if format_ != _FORMAT_VMX:
        raise _invalid(f"format {format_} is not that of VMX, {_FORMAT_VMX}")
    if flags & ~_FLAGS or smm_flags or timer_flags & ~_TIMER_DEADLINE:
        raise _invalid("there are flags that mean nothing here; clear those of SMM and of other vendors")
    if flags & ~_GUEST_MODE and not flags & _GUEST_MODE:
        raise _invalid("nothing of L2 is pending unless L2 runs; set KVM_STATE_NESTED_GUEST_MODE, too")
    if not _HEADER_BYTES <= size <= len(data):
        raise _invalid(f"its size is said to be {size}, but there are {len(data)} bytes")
    vmcs = None
    if size >= NESTED_STATE_BYTES:
        page = data[_HEADER_BYTES:NESTED_STATE_BYTES]
        revision = int.from_bytes(page[:4], "little")
        if revision != VMCS12_REVISION:
            raise _invalid(f"the VMCS has revision {revision:#x}; this processor's is {VMCS12_REVISION:#x}")
        vmcs = Vmcs12.unpack(page)
    return _State(flags, vmxon_gpa, current_gpa, deadline if timer_flags else None, vmcs)


def _invalid(reason: str) -> OSError:
    return OSError(errno.EINVAL, f"{_IOCTL}: {reason}")


# ------------------------------------------------------------------------------------------------------- snapshots


def nested_document(nested: NestedOperation) -> Document | None:
    """VMX of one vCPU for a snapshot, beside its state words; None when its CPUID has no VMX."""
    if nested.vmx is None:
        return None
    current = nested.vmx.current
    return {
        "vmxon": nested.vmx.vmxon_gpa,
        "current": nested.vmx.current_gpa,
        "vmcs": None if current is None else current.pack().hex(),
        "in_guest": nested.vmx.in_guest,
        "run_pending": nested.run_pending,
        "monitor_trap_pending": nested.monitor_trap_pending,
        "preemption_timer": nested.timer_state,
    }


def restore_nested(nested: NestedOperation, document: Document | None) -> None:
    """Be where *document*, of :func:`nested_document`, says; the state words and CPUID are there already.

    Raises KeyError, TypeError, ValueError or OverflowError for what is no such document.
    """
    if document is None:
        if nested.vmx is not None:
            raise ValueError("no state of VMX")
        return
    if nested.vmx is None:
        raise ValueError("a state of VMX without VMX")
    page = document["vmcs"]
    if (page is None) != (document["current"] == vmx.VMCS_NO_POINTER) or (document["in_guest"] and not page):
        raise ValueError("no current VMCS")
    nested.vmx.vmxon_gpa, nested.vmx.current_gpa = int(document["vmxon"]), int(document["current"])
    nested.vmx.current = None if page is None else _vmcs_of(bytes.fromhex(page))
    if not document["in_guest"]:
        return
    nested.start_running()
    nested.run_pending = bool(document["run_pending"])
    nested.monitor_trap_pending = bool(document["monitor_trap_pending"])
    if document["preemption_timer"] is not None:
        nested.restore_timer(document["preemption_timer"])


def _vmcs_of(region: bytes) -> Vmcs12:
    try:
        return Vmcs12.unpack(region)
    except struct.error as error:
        raise ValueError(f"no VMCS: {error}") from None
