"""VM exits for events: exceptions of L2, and what comes between two of its instructions.

:func:`exception_exit` is asked before an exception of L2 is delivered, :func:`interrupt_exit` at each boundary between
two instructions of L2 at which something waits, also while L2 is halted.

Source: Intel SDM volume 3C, 26.2 (other causes of VM exits), 25.6.1 (pin-based controls), 25.6.3 (exception bitmap),
26.5.1 (preemption timer), 26.5.2 (monitor trap flag), 28.2.1 and 28.2.2 (what is recorded); volume 3A, 7.9 (priority
among simultaneous events); KVM's ``nested_vmx_is_exception_vmexit()`` and ``vmx_check_nested_events()``.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple

from lasskvm.emulator.events import Event
from lasskvm.emulator.modes import in_real_mode
from lasskvm.state import INTERRUPT_SHADOW, NMI_BLOCKED, RFLAGS, Words
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import DB, NMI, PF
from lasskvm.x86.registers import RFLAGS_IF
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField

__all__ = [
    "L2Event",
    "PendingEvents",
    "exception_exit",
    "intercept_exception",
    "interrupt_exit",
    "may_intercept_page_faults",
    "software_exception_exit",
]


# --------------------------------------------------------------------------------------------------------- exceptions


def intercept_exception(vector: int, error_code: int | None, vmcs: Vmcs12) -> bool:
    """Whether exception *vector* (below 32, not that of an NMI) of L2 causes a VM exit.

    The bit in the exception bitmap decides. For #PF it is turned around by the mask and match of the error code: where
    ``error_code & mask`` is not ``match``, a bit of 0 is what causes exits.
    """
    selected = bool(vmcs[VmcsField.EXCEPTION_BITMAP] >> vector & 1)
    if vector != PF:
        return selected
    masked = (error_code or 0) & vmcs[VmcsField.PAGE_FAULT_ERROR_CODE_MASK]
    return selected == (masked == vmcs[VmcsField.PAGE_FAULT_ERROR_CODE_MATCH])


def may_intercept_page_faults(vmcs: Vmcs12) -> bool:
    """Whether there is an error code whose #PF causes a VM exit."""
    mask, match = vmcs[VmcsField.PAGE_FAULT_ERROR_CODE_MASK], vmcs[VmcsField.PAGE_FAULT_ERROR_CODE_MATCH]
    if vmcs[VmcsField.EXCEPTION_BITMAP] >> PF & 1:
        return not match & ~mask
    return bool(mask or match)


def exception_exit(words: Words, event: Event, vmcs: Vmcs12) -> NestedExit | None:
    """The VM exit that the hardware exception *event* of L2 causes instead of being delivered, if it does.

    CR2 and DR6 stay as they are then: the exit qualification has the linear address of a #PF, and the bits that a #DB
    would have set in DR6. *words* is L2's state. When another one was being delivered, the caller adds it to the
    record, and asks about the #DF where one is due. Exceptions of INT3, INTO and INT1 are those of
    :func:`software_exception_exit`.
    """
    if not intercept_exception(event.vector, event.error_code, vmcs):
        return None
    information = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_HARD_EXCEPTION | event.vector
    error_code = 0
    # In real mode no error code would be delivered.
    if event.error_code is not None and not in_real_mode(words):
        information |= vmx.INTR_INFO_DELIVER_CODE_MASK
        error_code = event.error_code
    qualification = {PF: event.cr2, DB: event.dr6}.get(event.vector)
    return NestedExit(
        ExitReason.EXCEPTION_NMI,
        qualification=qualification or 0,
        interruption_information=information,
        interruption_error_code=error_code,
    )


def software_exception_exit(vmcs: Vmcs12, vector: int, instruction_length: int) -> NestedExit | None:
    """The VM exit that INT3 (#BP), INTO (#OF) or INT1 (#DB), *instruction_length* bytes long, causes, if it does.

    It comes before the check of the gate's DPL. INT1's #DB has no bits for DR6.
    """
    if not intercept_exception(vector, None, vmcs):
        return None
    kind = vmx.INTR_TYPE_PRIV_SW_EXCEPTION if vector == DB else vmx.INTR_TYPE_SOFT_EXCEPTION
    return NestedExit(
        ExitReason.EXCEPTION_NMI,
        instruction_length=instruction_length,
        interruption_information=vmx.INTR_INFO_VALID_MASK | kind | vector,
    )


# ------------------------------------------------------------------------------------------------ between instructions


class L2Event(Enum):
    """An event that L1 leaves to L2: it is delivered through L2's IDT, and marked as taken where it came from."""

    NMI = auto()
    INTERRUPT = auto()


class PendingEvents(NamedTuple):
    """What waits for the next boundary between two instructions of L2.

    ``monitor_trap``: "monitor trap flag" is set and an instruction or event of L2 has completed since the VM entry, or
    the entry has injected this exit. ``preemption_timer``: it is active and has reached 0. ``interrupt``: the local
    APIC or the PIC has an interrupt for the processor.
    """

    init: bool = False
    monitor_trap: bool = False
    preemption_timer: bool = False
    nmi: bool = False
    interrupt: bool = False


def interrupt_exit(
    words: Words, vmcs: Vmcs12, pending: PendingEvents, acknowledge: Callable[[], int]
) -> NestedExit | L2Event | None:
    """What happens at a boundary between two instructions of L2: a VM exit, an event for L2, or nothing.

    The first that is not blocked, in the order of their priority: INIT, monitor trap flag, preemption timer, NMI
    window, NMI, interrupt window, interrupt. Traps of the previous instruction come between the second and the third;
    they are the caller's: with a monitor trap pending they become pending debug exceptions, otherwise they go first.

    *words* is L2's state. *acknowledge* takes the interrupt from the interrupt controller and returns its vector; it is
    called only for an exit with "acknowledge interrupt on exit". Otherwise the interrupt, and in any case the NMI,
    is as pending as before.
    """
    if pending.init:
        return NestedExit(ExitReason.INIT_SIGNAL)
    if pending.monitor_trap:
        return NestedExit(ExitReason.MONITOR_TRAP_FLAG)
    if pending.preemption_timer:
        return NestedExit(ExitReason.PREEMPTION_TIMER)
    # STI and MOV SS hold back the rest. For NMIs and their window, STI may or may not.
    if words[INTERRUPT_SHADOW]:
        return None
    controls = vmcs[VmcsField.CPU_BASED_VM_EXEC_CONTROL]
    if controls & vmx.CPU_BASED_NMI_WINDOW_EXITING and not words[NMI_BLOCKED]:
        return NestedExit(ExitReason.NMI_WINDOW)
    if pending.nmi and not _blocks_nmi(words, vmcs):
        return _nmi(vmcs)
    if controls & vmx.CPU_BASED_INTR_WINDOW_EXITING and words[RFLAGS] & RFLAGS_IF:
        return NestedExit(ExitReason.INTERRUPT_WINDOW)
    if pending.interrupt:
        return _interrupt(words, vmcs, acknowledge)
    return None


def _blocks_nmi(words: Words, vmcs: Vmcs12) -> bool:
    """With virtual NMIs the blocking is that of L2's virtual ones, and NMIs are never blocked."""
    return bool(words[NMI_BLOCKED] and not _pin_based(vmcs) & vmx.PIN_BASED_VIRTUAL_NMIS)


def _nmi(vmcs: Vmcs12) -> NestedExit | L2Event:
    if not _pin_based(vmcs) & vmx.PIN_BASED_NMI_EXITING:
        return L2Event.NMI
    information = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_NMI_INTR | NMI
    return NestedExit(ExitReason.EXCEPTION_NMI, interruption_information=information)


def _interrupt(words: Words, vmcs: Vmcs12, acknowledge: Callable[[], int]) -> NestedExit | L2Event | None:
    """RFLAGS.IF is for interrupts that go to L2; it does not hold back an exit."""
    if not _pin_based(vmcs) & vmx.PIN_BASED_EXT_INTR_MASK:
        return L2Event.INTERRUPT if words[RFLAGS] & RFLAGS_IF else None
    information = 0
    if vmcs[VmcsField.VM_EXIT_CONTROLS] & vmx.VM_EXIT_ACK_INTR_ON_EXIT:
        information = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_EXT_INTR | acknowledge()
    return NestedExit(ExitReason.EXTERNAL_INTERRUPT, interruption_information=information)


def _pin_based(vmcs: Vmcs12) -> int:
    return vmcs[VmcsField.PIN_BASED_VM_EXEC_CONTROL]
