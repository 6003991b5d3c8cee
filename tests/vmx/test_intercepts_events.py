"""VM exits for exceptions, interrupts, NMIs, windows and timers: which, in which order, and what they tell."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from l2_guest import L2
from legacy_modes import enter_real_mode

from lasskvm.emulator.events import Event
from lasskvm.emulator.faults import GuestFault, debug_trap
from lasskvm.state import INTERRUPT_SHADOW, NMI_BLOCKED, RFLAGS
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.intercepts_events import (
    L2Event,
    PendingEvents,
    exception_exit,
    intercept_exception,
    interrupt_exit,
)
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import DB, GP, NM, PF, PF_P, PF_U, PF_W, SS, UD
from lasskvm.x86.registers import DR6_B0, DR6_BS, RFLAGS_IF
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField as F

HARD = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_HARD_EXCEPTION
WITH_CODE = vmx.INTR_INFO_DELIVER_CODE_MASK
VECTOR = 0x31


@pytest.fixture
def l2() -> L2:
    return L2()


# --------------------------------------------------------------------------------------------------------- exceptions


@pytest.mark.parametrize("vector", [GP, SS])
def test_a_lass_violation_of_l2_reaches_l1_when_its_vector_is_in_the_bitmap(l2: L2, vector: int) -> None:
    l2.vmcs[F.EXCEPTION_BITMAP] = 0xFFFF_FFFF & ~(1 << vector)
    assert exception_exit(l2.words, Event.of_fault(GuestFault(vector, 0)), l2.vmcs) is None
    l2.vmcs[F.EXCEPTION_BITMAP] = 1 << vector
    assert exception_exit(l2.words, Event.of_fault(GuestFault(vector, 0)), l2.vmcs) == NestedExit(
        ExitReason.EXCEPTION_NMI, interruption_information=HARD | WITH_CODE | vector
    )


def test_an_error_code_is_told_with_the_exception(l2: L2) -> None:
    l2.vmcs[F.EXCEPTION_BITMAP] = 1 << GP
    assert exception_exit(l2.words, Event.of_fault(GuestFault(GP, 0x28)), l2.vmcs) == NestedExit(
        ExitReason.EXCEPTION_NMI,
        interruption_information=HARD | WITH_CODE | GP,
        interruption_error_code=0x28,
    )


@pytest.mark.parametrize("vector", [UD, NM])
def test_exceptions_without_error_code_say_so(l2: L2, vector: int) -> None:
    l2.vmcs[F.EXCEPTION_BITMAP] = 1 << vector
    assert exception_exit(l2.words, Event.of_fault(GuestFault(vector)), l2.vmcs) == NestedExit(
        ExitReason.EXCEPTION_NMI, interruption_information=HARD | vector
    )


def test_in_real_mode_no_exception_has_an_error_code(l2: L2) -> None:
    enter_real_mode(l2)
    l2.vmcs[F.EXCEPTION_BITMAP] = 1 << GP
    assert exception_exit(l2.words, Event.of_fault(GuestFault(GP, 0)), l2.vmcs) == NestedExit(
        ExitReason.EXCEPTION_NMI, interruption_information=HARD | GP
    )


def test_a_page_fault_tells_its_address_in_the_qualification(l2: L2) -> None:
    l2.vmcs[F.EXCEPTION_BITMAP] = 1 << PF
    fault = GuestFault(PF, PF_W | PF_U, cr2=0x7FFF_1234_5678)
    assert exception_exit(l2.words, Event.of_fault(fault), l2.vmcs) == NestedExit(
        ExitReason.EXCEPTION_NMI,
        qualification=0x7FFF_1234_5678,
        interruption_information=HARD | WITH_CODE | PF,
        interruption_error_code=PF_W | PF_U,
    )


def test_a_debug_exception_tells_its_dr6_bits_in_the_qualification(l2: L2) -> None:
    l2.vmcs[F.EXCEPTION_BITMAP] = 1 << DB
    assert exception_exit(l2.words, Event.of_fault(debug_trap(DR6_BS | DR6_B0)), l2.vmcs) == NestedExit(
        ExitReason.EXCEPTION_NMI,
        qualification=DR6_BS | DR6_B0,
        interruption_information=HARD | DB,
    )


@pytest.mark.parametrize(
    "selected, mask, match, error_code, intercepted",
    [
        # Mask and match of 0: the bit decides about all page faults.
        (True, 0, 0, PF_P | PF_W, True),
        (False, 0, 0, PF_P | PF_W, False),
        # Only writes.
        (True, PF_W, PF_W, PF_W | PF_U, True),
        (True, PF_W, PF_W, PF_U, False),
        # Turned around: all but writes.
        (False, PF_W, PF_W, PF_W | PF_U, False),
        (False, PF_W, PF_W, PF_U, True),
        # Only pages that are not present, as KVM asks for.
        (True, PF_P, 0, PF_W, True),
        (True, PF_P, 0, PF_P | PF_W, False),
        # A match that no masked error code has.
        (True, 0, 1, 0, False),
        (False, 0, 1, 0, True),
        (False, 0xFFFF_FFFF, 0xFFFF_FFFF, PF_P, True),
    ],
)
def test_page_faults_are_selected_by_their_error_code(
    l2: L2, selected: bool, mask: int, match: int, error_code: int, intercepted: bool
) -> None:
    l2.vmcs[F.EXCEPTION_BITMAP] = selected << PF
    l2.vmcs[F.PAGE_FAULT_ERROR_CODE_MASK], l2.vmcs[F.PAGE_FAULT_ERROR_CODE_MATCH] = mask, match
    assert intercept_exception(PF, error_code, l2.vmcs) == intercepted


@given(
    st.integers(0, 31).filter(lambda vector: vector != PF), st.integers(0, 0xFFFF_FFFF), st.integers(0, 0xFF)
)
def test_mask_and_match_are_about_page_faults_only(vector: int, bitmap: int, code: int) -> None:
    vmcs = Vmcs12()
    vmcs[F.EXCEPTION_BITMAP] = bitmap
    vmcs[F.PAGE_FAULT_ERROR_CODE_MATCH] = 0xFF
    assert intercept_exception(vector, code, vmcs) == bool(bitmap & 1 << vector)


# -------------------------------------------------------------------------------------------- between instructions


def outcome(l2: L2, **pending: bool) -> NestedExit | L2Event | None:
    """What happens with *pending*, when nobody may acknowledge an interrupt."""

    def acknowledge() -> int:
        raise AssertionError("the interrupt was acknowledged")

    before = l2.snapshot()
    result = interrupt_exit(l2.words, l2.vmcs, PendingEvents(**pending), acknowledge)
    assert l2.snapshot() == before
    return result


def test_when_nothing_waits_nothing_happens(l2: L2) -> None:
    l2.pin_based(0xFFFF_FFFF)
    assert outcome(l2) is None


def test_interrupts_are_l2s_unless_l1_wants_them(l2: L2) -> None:
    assert outcome(l2, interrupt=True) is L2Event.INTERRUPT
    l2.words[RFLAGS] &= ~RFLAGS_IF
    assert outcome(l2, interrupt=True) is None


@pytest.mark.parametrize("enabled", [False, True])
def test_an_interrupt_for_l1_exits_whatever_rflags_if_says_and_stays_pending(l2: L2, enabled: bool) -> None:
    l2.pin_based(vmx.PIN_BASED_EXT_INTR_MASK)
    l2.words[RFLAGS] = l2.words[RFLAGS] & ~RFLAGS_IF | RFLAGS_IF * enabled
    assert outcome(l2, interrupt=True) == NestedExit(ExitReason.EXTERNAL_INTERRUPT)


def test_an_interrupt_acknowledged_on_exit_tells_its_vector(l2: L2) -> None:
    l2.pin_based(vmx.PIN_BASED_EXT_INTR_MASK)
    l2.vmcs[F.VM_EXIT_CONTROLS] |= vmx.VM_EXIT_ACK_INTR_ON_EXIT
    result = interrupt_exit(l2.words, l2.vmcs, PendingEvents(interrupt=True), lambda: VECTOR)
    information = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_EXT_INTR | VECTOR
    assert result == NestedExit(ExitReason.EXTERNAL_INTERRUPT, interruption_information=information)


NMI_EXIT = NestedExit(
    ExitReason.EXCEPTION_NMI,
    interruption_information=vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_NMI_INTR | 2,
)


@pytest.mark.parametrize(
    "controls, blocked, expected",
    [
        (0, False, L2Event.NMI),
        (0, True, None),
        (vmx.PIN_BASED_NMI_EXITING, False, NMI_EXIT),
        (vmx.PIN_BASED_NMI_EXITING, True, None),
        # With virtual NMIs it is those of L2 that are blocked.
        (vmx.PIN_BASED_NMI_EXITING | vmx.PIN_BASED_VIRTUAL_NMIS, True, NMI_EXIT),
    ],
)
def test_nmis_exit_go_to_l2_or_wait(
    l2: L2, controls: int, blocked: bool, expected: NestedExit | L2Event | None
) -> None:
    l2.pin_based(controls)
    l2.words[NMI_BLOCKED] = blocked
    assert outcome(l2, nmi=True) == expected


def test_the_exception_bitmap_has_no_say_in_nmis(l2: L2) -> None:
    l2.vmcs[F.EXCEPTION_BITMAP] = 1 << 2
    assert outcome(l2, nmi=True) is L2Event.NMI


def test_the_interrupt_window_opens_with_rflags_if(l2: L2) -> None:
    l2.primary(vmx.CPU_BASED_INTR_WINDOW_EXITING)
    assert outcome(l2) == NestedExit(ExitReason.INTERRUPT_WINDOW)
    l2.words[RFLAGS] &= ~RFLAGS_IF
    assert outcome(l2) is None


def test_the_nmi_window_opens_when_virtual_nmis_are_not_blocked(l2: L2) -> None:
    l2.pin_based(vmx.PIN_BASED_NMI_EXITING | vmx.PIN_BASED_VIRTUAL_NMIS)
    l2.primary(vmx.CPU_BASED_NMI_WINDOW_EXITING)
    l2.words[RFLAGS] &= ~RFLAGS_IF
    assert outcome(l2) == NestedExit(ExitReason.NMI_WINDOW)
    l2.words[NMI_BLOCKED] = 1
    assert outcome(l2) is None


#: From the highest priority down.
EVENTS = ("init", "monitor_trap", "preemption_timer", "nmi_window", "nmi", "interrupt_window", "interrupt")
EXITS = {
    "init": NestedExit(ExitReason.INIT_SIGNAL),
    "monitor_trap": NestedExit(ExitReason.MONITOR_TRAP_FLAG),
    "preemption_timer": NestedExit(ExitReason.PREEMPTION_TIMER),
    "nmi_window": NestedExit(ExitReason.NMI_WINDOW),
    "nmi": NMI_EXIT,
    "interrupt_window": NestedExit(ExitReason.INTERRUPT_WINDOW),
    "interrupt": NestedExit(ExitReason.EXTERNAL_INTERRUPT),
}
WINDOWS = {
    "nmi_window": vmx.CPU_BASED_NMI_WINDOW_EXITING,
    "interrupt_window": vmx.CPU_BASED_INTR_WINDOW_EXITING,
}
ALL_PIN_BASED = vmx.PIN_BASED_EXT_INTR_MASK | vmx.PIN_BASED_NMI_EXITING | vmx.PIN_BASED_VIRTUAL_NMIS


def among(l2: L2, events: tuple[str, ...]) -> NestedExit | L2Event | None:
    for event in events:
        l2.primary(WINDOWS.get(event, 0))
    return outcome(l2, **{event: True for event in events if event not in WINDOWS})


@pytest.mark.parametrize("higher, lower", list(combinations(EVENTS, 2)))
def test_of_two_events_the_one_with_priority_exits(l2: L2, higher: str, lower: str) -> None:
    l2.pin_based(ALL_PIN_BASED)
    assert among(l2, (higher, lower)) == EXITS[higher]


@pytest.mark.parametrize("event", EVENTS)
def test_sti_and_mov_ss_hold_back_interrupts_nmis_and_their_windows_and_nothing_else(
    l2: L2, event: str
) -> None:
    l2.pin_based(ALL_PIN_BASED)
    l2.words[INTERRUPT_SHADOW] = 1
    is_held_back = EVENTS.index(event) >= EVENTS.index("nmi_window")
    assert among(l2, (event,)) == (None if is_held_back else EXITS[event])


def test_an_nmi_for_l2_comes_before_the_interrupt_window(l2: L2) -> None:
    l2.primary(vmx.CPU_BASED_INTR_WINDOW_EXITING)
    assert outcome(l2, nmi=True, interrupt=True) is L2Event.NMI


def test_a_blocked_nmi_does_not_hold_back_an_interrupt(l2: L2) -> None:
    l2.words[NMI_BLOCKED] = 1
    assert outcome(l2, nmi=True, interrupt=True) is L2Event.INTERRUPT
