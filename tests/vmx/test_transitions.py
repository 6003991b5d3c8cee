"""From L1 to L2 and back, on state words."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nested_guests import MODES, PDPT, Fields
from transition_guest import (
    CPUID,
    ENTRY_LOAD,
    EXIT_HANDLER,
    EXIT_LOAD,
    EXIT_STORE,
    HOST_PAT,
    Nested,
)

from lasskvm import state as s
from lasskvm.state import segment_word
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.guest_time import timer_deadline
from lasskvm.vmx.host_state import VmxAborted
from lasskvm.vmx.transitions import enter_guest, fail_entry, leave_guest, record_exit
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import msr, vmx
from lasskvm.x86.exceptions import NMI, UD
from lasskvm.x86.registers import CR4_LASS, EFER_LMA, EFER_LME, RFLAGS_FIXED, TR
from lasskvm.x86.vmx import VmEntryFailure, VmxAbort
from lasskvm.x86.vmx_exits import EXIT_REASON_FAILED_VMENTRY, ExitReason
from lasskvm.x86.vmx_fields import FieldType, field_type
from lasskvm.x86.vmx_fields import VmcsField as F

UNKNOWN_MSR = 0x1234_5678
TIMER = vmx.PIN_BASED_VMX_PREEMPTION_TIMER
TIMER_PERIOD = 32
NMI_CONTROLS = vmx.PIN_BASED_NMI_EXITING | vmx.PIN_BASED_VIRTUAL_NMIS
NMI_EXIT = NestedExit(
    ExitReason.EXCEPTION_NMI,
    interruption_information=vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_NMI_INTR | NMI,
)


def entered(guest: Nested) -> Nested:
    guest.check()
    assert enter_guest(guest.ctx, guest.vmcs, guest.capabilities)
    return guest


def msr_list(guest: Nested, gpa: int, *entries: tuple[int, int]) -> None:
    """Put a list of (index, value) at *gpa*, which says what it is for, and name it in the VMCS."""
    for number, (index, value) in enumerate(entries):
        guest.memory.store(gpa + 16 * number, 8, index)
        guest.memory.store(gpa + 16 * number + 8, 8, value)
    address, count = {
        ENTRY_LOAD: (F.VM_ENTRY_MSR_LOAD_ADDR, F.VM_ENTRY_MSR_LOAD_COUNT),
        EXIT_STORE: (F.VM_EXIT_MSR_STORE_ADDR, F.VM_EXIT_MSR_STORE_COUNT),
        EXIT_LOAD: (F.VM_EXIT_MSR_LOAD_ADDR, F.VM_EXIT_MSR_LOAD_COUNT),
    }[gpa]
    guest.set({address: gpa, count: len(entries)})


def information_fields(vmcs: Vmcs12) -> Fields:
    return {field: vmcs[field] for field in F if field_type(field) == FieldType.READ_ONLY}


# ------------------------------------------------------------------------------------------------ the round trip


@pytest.mark.parametrize("mode", MODES)
def test_l1_is_as_it_was_but_at_its_handler(mode: str) -> None:
    guest = Nested(mode)
    guest.add({F.VM_EXIT_CONTROLS: vmx.VM_EXIT_LOAD_IA32_EFER | vmx.VM_EXIT_LOAD_IA32_PAT})
    guest.set({F.HOST_IA32_EFER: guest.words[s.EFER], F.HOST_IA32_PAT: HOST_PAT})
    before = guest.state.array.copy()
    entered(guest)
    assert guest.snapshot() != before.tobytes()
    guest.exit()
    changed = set((guest.state.array != before).nonzero()[0].tolist())
    assert guest.words[s.RIP] == EXIT_HANDLER
    # What a VMCS has no host fields for is the same after every exit, or unused in L1.
    segments = range(s.SEGMENTS, segment_word(TR, s.ATTRIBUTES) + 1)
    pdptes = range(s.PDPTR0, s.PDPTR0 + 4)
    assert changed <= {s.RIP, s.RFLAGS, s.GDT_LIMIT, s.IDT_LIMIT, s.TLB_FLUSH, *segments, *pdptes}
    assert guest.vmcs[F.VM_EXIT_REASON] == ExitReason.CPUID


@pytest.mark.parametrize("mode", MODES)
def test_l2_goes_on_where_it_has_left_without_l1_doing_anything(mode: str) -> None:
    guest = entered(Nested(mode))
    l2 = guest.snapshot()
    for _ in range(3):
        guest.exit()
        assert guest.snapshot() != l2
        entered(guest)
        guest.words[s.TLB_FLUSH] = 1
        assert guest.snapshot() == l2


def test_lass_of_l2_is_the_business_of_l2() -> None:
    guest = Nested()
    guest.words[s.CR4] &= ~CR4_LASS
    guest.vmcs[F.HOST_CR4] &= ~CR4_LASS
    entered(guest)
    assert guest.words[s.CR4] & CR4_LASS
    guest.words[s.CR4] &= ~CR4_LASS
    guest.exit()
    assert not guest.words[s.CR4] & CR4_LASS
    assert not guest.vmcs[F.GUEST_CR4] & CR4_LASS


def test_translations_are_forgotten_both_ways() -> None:
    guest = entered(Nested())
    assert guest.words[s.TLB_FLUSH] == 1
    guest.words[s.TLB_FLUSH] = 0
    guest.exit()
    assert guest.words[s.TLB_FLUSH] == 1


def test_entry_marks_the_vmcs_as_launched() -> None:
    guest = Nested()
    assert not guest.vmcs.launched
    assert entered(guest).vmcs.launched


def test_the_mode_that_l2_leaves_in_is_the_one_it_is_entered_in_next() -> None:
    guest = entered(Nested("real"))
    guest.words[s.EFER] |= EFER_LME | EFER_LMA
    guest.exit()
    assert guest.vmcs[F.VM_ENTRY_CONTROLS] & vmx.VM_ENTRY_IA32E_MODE
    guest = entered(Nested("64-bit"))
    guest.words[s.EFER] &= ~(EFER_LME | EFER_LMA)
    guest.exit()
    assert not guest.vmcs[F.VM_ENTRY_CONTROLS] & vmx.VM_ENTRY_IA32E_MODE


def test_an_exit_takes_back_the_event_to_inject() -> None:
    event = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_HARD_EXCEPTION | UD
    guest = entered(Nested("64-bit", {F.VM_ENTRY_INTR_INFO_FIELD: event}))
    guest.exit()
    assert guest.vmcs[F.VM_ENTRY_INTR_INFO_FIELD] == event & ~vmx.INTR_INFO_VALID_MASK


def test_pending_debug_exceptions_of_a_monitor_trap_are_saved() -> None:
    guest = entered(Nested())
    guest.exit(NestedExit(ExitReason.MONITOR_TRAP_FLAG), pending_debug=vmx.PENDING_DEBUG_BS)
    assert guest.vmcs[F.GUEST_PENDING_DBG_EXCEPTIONS] == vmx.PENDING_DEBUG_BS


# ----------------------------------------------------------------------------------------- exit information


def test_every_part_of_a_record_has_its_field() -> None:
    names = NestedExit._fields
    values = {name: number for number, name in enumerate(names, 100)}
    values["reason"] = ExitReason.EPT_VIOLATION
    vmcs = Vmcs12()
    record_exit(vmcs, NestedExit(**values))  # type: ignore[arg-type]
    recorded = information_fields(vmcs)
    assert recorded.pop(F.VM_INSTRUCTION_ERROR) == 0
    assert recorded == {
        F.VM_EXIT_REASON: values["reason"],
        F.EXIT_QUALIFICATION: values["qualification"],
        F.VMX_INSTRUCTION_INFO: values["instruction_information"],
        F.VM_EXIT_INSTRUCTION_LEN: values["instruction_length"],
        F.VM_EXIT_INTR_INFO: values["interruption_information"],
        F.VM_EXIT_INTR_ERROR_CODE: values["interruption_error_code"],
        F.GUEST_LINEAR_ADDRESS: values["guest_linear_address"],
        F.GUEST_PHYSICAL_ADDRESS: values["guest_physical_address"],
        F.IDT_VECTORING_INFO_FIELD: values["idt_vectoring_information"],
        F.IDT_VECTORING_ERROR_CODE: values["idt_vectoring_error_code"],
    }


def test_nothing_of_an_earlier_exit_is_left() -> None:
    vmcs = Vmcs12()
    for field in information_fields(vmcs):
        vmcs[field] = 1
    record_exit(vmcs, NestedExit(ExitReason.HLT))
    expected = dict.fromkeys(information_fields(vmcs), 0)
    expected |= {F.VM_EXIT_REASON: ExitReason.HLT, F.VM_INSTRUCTION_ERROR: 1}
    assert information_fields(vmcs) == expected


# --------------------------------------------------------------------------------------------------------- NMIs


@pytest.mark.parametrize("controls", [0, NMI_CONTROLS])
def test_nmi_that_exits_blocks_the_next_one_in_l1_only(controls: int) -> None:
    guest = entered(Nested().add({F.PIN_BASED_VM_EXEC_CONTROL: controls}))
    guest.exit(NMI_EXIT)
    assert guest.words[s.NMI_BLOCKED] == 1
    assert not guest.vmcs[F.GUEST_INTERRUPTIBILITY_INFO] & vmx.GUEST_INTR_STATE_NMI


def test_exception_that_exits_does_not_block_nmis() -> None:
    information = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_HARD_EXCEPTION | UD
    guest = entered(Nested())
    guest.exit(NestedExit(ExitReason.EXCEPTION_NMI, interruption_information=information))
    assert guest.words[s.NMI_BLOCKED] == 0


@pytest.mark.parametrize("controls, in_l1", [(0, 1), (NMI_CONTROLS, 0)])
def test_blocking_of_nmis_outlives_other_exits_unless_it_is_virtual(controls: int, in_l1: int) -> None:
    fields = {F.GUEST_INTERRUPTIBILITY_INFO: vmx.GUEST_INTR_STATE_NMI}
    guest = entered(Nested("64-bit", fields).add({F.PIN_BASED_VM_EXEC_CONTROL: controls}))
    assert guest.words[s.NMI_BLOCKED] == 1
    guest.exit()
    assert guest.words[s.NMI_BLOCKED] == in_l1
    assert guest.vmcs[F.GUEST_INTERRUPTIBILITY_INFO] == vmx.GUEST_INTR_STATE_NMI


# ---------------------------------------------------------------------------------------------------- MSR lists


def test_msr_lists_switch_registers() -> None:
    guest = Nested()
    msr_list(guest, ENTRY_LOAD, (msr.MSR_IA32_STAR, 2))
    msr_list(guest, EXIT_STORE, (msr.MSR_IA32_STAR, 0))
    msr_list(guest, EXIT_LOAD, (msr.MSR_IA32_STAR, 1))
    guest.words[s.STAR] = 1
    entered(guest)
    assert guest.words[s.STAR] == 2
    guest.words[s.STAR] = 3
    guest.exit()
    assert guest.words[s.STAR] == 1
    assert guest.memory.load(EXIT_STORE + 8, 8) == 3


def test_msr_list_wins_over_the_host_state_area() -> None:
    guest = entered(Nested())
    msr_list(guest, EXIT_LOAD, (msr.MSR_IA32_SYSENTER_CS, 0x18))
    guest.set({F.HOST_IA32_SYSENTER_CS: 0x10})
    guest.exit()
    assert guest.words[s.SYSENTER_CS] == 0x18


def test_wrong_entry_of_the_list_fails_the_vm_entry() -> None:
    guest = Nested()
    msr_list(guest, ENTRY_LOAD, (msr.MSR_IA32_STAR, 2), (UNKNOWN_MSR, 0))
    guest.words[s.NMI_BLOCKED] = 1
    area = guest.guest_fields()
    assert not enter_guest(guest.ctx, guest.vmcs, guest.capabilities)
    assert guest.vmcs[F.VM_EXIT_REASON] == EXIT_REASON_FAILED_VMENTRY | ExitReason.MSR_LOAD_FAIL
    assert guest.vmcs[F.EXIT_QUALIFICATION] == 2
    assert (guest.words[s.RIP], guest.words[s.RFLAGS]) == (EXIT_HANDLER, RFLAGS_FIXED)
    assert guest.words[s.NMI_BLOCKED] == 1
    assert guest.guest_fields() == area
    assert not guest.vmcs.launched


# ----------------------------------------------------------------------------------------- late failures, aborts


def test_wrong_guest_state_returns_to_l1_with_no_more_than_reason_and_qualification() -> None:
    event = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_EXT_INTR | 0x20
    guest = Nested("64-bit", {F.VM_ENTRY_INTR_INFO_FIELD: event})
    msr_list(guest, EXIT_STORE, (msr.MSR_IA32_STAR, 0x55))
    msr_list(guest, EXIT_LOAD, (msr.MSR_IA32_STAR, 7))
    for field in information_fields(guest.vmcs):
        guest.vmcs[field] = 1
    area = guest.guest_fields()
    fail_entry(
        guest.ctx, guest.vmcs, guest.capabilities, ExitReason.INVALID_STATE, VmEntryFailure.VMCS_LINK_PTR
    )
    information = dict.fromkeys(information_fields(guest.vmcs), 1)
    information[F.VM_EXIT_REASON] = EXIT_REASON_FAILED_VMENTRY | ExitReason.INVALID_STATE
    information[F.EXIT_QUALIFICATION] = VmEntryFailure.VMCS_LINK_PTR
    assert information_fields(guest.vmcs) == information
    assert guest.guest_fields() == area
    assert guest.vmcs[F.VM_ENTRY_INTR_INFO_FIELD] == event
    assert guest.memory.load(EXIT_STORE + 8, 8) == 0x55
    assert (guest.words[s.RIP], guest.words[s.STAR]) == (EXIT_HANDLER, 7)


def spoil_store(guest: Nested) -> None:
    msr_list(guest, EXIT_STORE, (UNKNOWN_MSR, 0))


def spoil_load(guest: Nested) -> None:
    msr_list(guest, EXIT_LOAD, (UNKNOWN_MSR, 0))


def spoil_mode(guest: Nested) -> None:
    guest.vmcs[F.VM_EXIT_CONTROLS] &= ~vmx.VM_EXIT_HOST_ADDR_SPACE_SIZE


def spoil_pdptes(guest: Nested) -> None:
    spoil_mode(guest)
    guest.words[s.EFER] = 0
    guest.vmcs[F.HOST_CR3] = PDPT
    guest.memory.store(PDPT, 8, 0x6003)


@pytest.mark.parametrize(
    "spoil, indicator",
    [
        (spoil_store, VmxAbort.SAVE_GUEST_MSR_FAIL),
        (spoil_load, VmxAbort.LOAD_HOST_MSR_FAIL),
        (spoil_mode, VmxAbort.HOST_ADDR_SPACE_SIZE),
        (spoil_pdptes, VmxAbort.HOST_PDPTE_FAIL),
    ],
)
def test_exit_that_fails_aborts(spoil: Callable[[Nested], None], indicator: VmxAbort) -> None:
    guest = entered(Nested())
    spoil(guest)
    with pytest.raises(VmxAborted) as caught:
        guest.exit()
    assert caught.value.indicator is indicator
    assert guest.vmcs.abort == indicator
    assert guest.vmcs[F.VM_EXIT_REASON] == ExitReason.CPUID


def test_entry_that_fails_aborts_when_l1_cannot_be_loaded() -> None:
    guest = Nested()
    spoil_load(guest)
    with pytest.raises(VmxAborted):
        fail_entry(
            guest.ctx, guest.vmcs, guest.capabilities, ExitReason.INVALID_STATE, VmEntryFailure.DEFAULT
        )
    assert guest.vmcs.abort == VmxAbort.LOAD_HOST_MSR_FAIL


@settings(max_examples=100)
@given(seed=st.randoms(use_true_random=False), enters=st.booleans())
def test_whatever_a_vmcs_has_nothing_worse_than_an_abort_happens(seed: Random, enters: bool) -> None:
    guest = Nested()
    for field in F:
        if seed.random() < 0.5:
            guest.vmcs[field] = seed.getrandbits(64)
    guest.words[s.EFER] &= ~(EFER_LMA if seed.random() < 0.5 else 0)
    indicator = 0
    try:
        if enters:
            enter_guest(guest.ctx, guest.vmcs, guest.capabilities)
        guest.exit()
    except VmxAborted as abort:
        indicator = abort.indicator
    assert guest.vmcs.abort == indicator


# ------------------------------------------------------------------------------------------- preemption timer


@pytest.mark.parametrize("saves, expected", [(vmx.VM_EXIT_SAVE_VMX_PREEMPTION_TIMER, 7), (0, 10)])
def test_preemption_timer_is_saved_where_the_controls_ask(saves: int, expected: int) -> None:
    guest = Nested("64-bit", {F.VMX_PREEMPTION_TIMER_VALUE: 10})
    guest.add({F.PIN_BASED_VM_EXEC_CONTROL: TIMER, F.VM_EXIT_CONTROLS: saves})
    deadline = timer_deadline(guest.vmcs, guest.capabilities, guest.tsc)
    entered(guest)
    guest.tsc += 3 * TIMER_PERIOD
    leave_guest(guest.ctx, guest.vmcs, guest.capabilities, CPUID, timer_deadline=deadline)
    assert guest.vmcs[F.VMX_PREEMPTION_TIMER_VALUE] == expected
