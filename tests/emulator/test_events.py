"""Nested faults, double and triple faults, NMI and the payloads of #PF and #DB."""

from __future__ import annotations

import pytest
from emulator_guest import (
    CODE,
    DPL3,
    IDT,
    KERNEL_STACK,
    RING0_STACK,
    TSS,
    UPPER,
    USER_CODE,
    USER_STACK,
    Guest,
)

from lasskvm.emulator.events import Event, EventKind, deliver_event
from lasskvm.emulator.faults import GuestFault, TripleFault
from lasskvm.state import CR2, DR6, DR7, IDT_BASE, NMI_BLOCKED, RFLAGS, RIP, RSP
from lasskvm.x86.descriptors import SYS_INTERRUPT_GATE, TSS64_RSP0
from lasskvm.x86.exceptions import BP, DB, DF, ERROR_EXT, ERROR_IDT, GP, NMI, NP, PF, PF_W, UD
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.registers import AR_P, DR6_B0, DR6_BS, DR6_FIXED, DR7_FIXED, DR7_GD, RFLAGS_RF

ABSENT = SYS_INTERRUPT_GATE


def handler(vector: int) -> int:
    return CODE + 16 * vector


def deliver(guest: Guest, event: Event) -> None:
    deliver_event(guest.words, guest.memory, event)


def test_page_fault_loads_cr2_and_pushes_its_error_code(guest: Guest) -> None:
    deliver(guest, Event(PF, error_code=PF_W, cr2=0x1234))
    assert guest.words[RIP] == handler(PF)
    assert guest.words[CR2] == 0x1234
    assert guest.frame(2) == [PF_W, CODE]


def test_other_exceptions_leave_cr2_alone(guest: Guest) -> None:
    guest.words[CR2] = 0x5555
    deliver(guest, Event(GP, error_code=0))
    assert guest.words[CR2] == 0x5555


def test_absent_gate_of_a_benign_exception_delivers_not_present(guest: Guest) -> None:
    guest.set_gate(UD, CODE, attributes=ABSENT)
    deliver(guest, Event(UD))
    assert guest.words[RIP] == handler(NP)
    assert guest.frame(2) == [UD << 3 | ERROR_IDT | ERROR_EXT, CODE]


def test_contributory_fault_during_a_contributory_fault_is_a_double_fault(guest: Guest) -> None:
    guest.set_gate(GP, CODE, attributes=ABSENT)
    deliver(guest, Event(GP, error_code=0))
    assert guest.words[RIP] == handler(DF)
    assert guest.frame(2) == [0, CODE]


def test_contributory_fault_during_a_page_fault_is_a_double_fault(guest: Guest) -> None:
    guest.set_gate(PF, CODE, attributes=ABSENT)
    deliver(guest, Event(PF, error_code=0, cr2=0x77))
    assert guest.words[RIP] == handler(DF)
    assert guest.words[CR2] == 0x77


def test_page_fault_during_a_page_fault_is_a_double_fault_with_the_second_address_lost(user: Guest) -> None:
    user.store(TSS + TSS64_RSP0, 8, RING0_STACK)
    user.unmap(RING0_STACK - 8)
    user.set_gate(DF, handler(DF), ist=1)
    deliver(user, Event(PF, error_code=4, cr2=0x77))
    assert user.words[RIP] == handler(DF)
    assert user.words[CR2] == 0x77


def test_page_fault_during_a_general_protection_is_delivered_by_itself(user: Guest) -> None:
    user.unmap(RING0_STACK - 8)
    user.set_gate(PF, handler(PF), ist=1)
    deliver(user, Event(GP, error_code=0))
    assert user.words[RIP] == handler(PF)
    assert user.words[CR2] == RING0_STACK - 8
    assert user.frame(2) == [PF_W, USER_CODE]


def test_fault_while_delivering_a_double_fault_is_a_triple_fault(guest: Guest) -> None:
    guest.set_gate(GP, CODE, attributes=ABSENT)
    guest.set_gate(DF, CODE, attributes=ABSENT)
    before = guest.words[RIP], guest.words[RSP]
    with pytest.raises(TripleFault):
        deliver(guest, Event(GP, error_code=0))
    assert (guest.words[RIP], guest.words[RSP]) == before


def test_low_idt_with_lass_ends_in_a_triple_fault(guest: Guest) -> None:
    guest.words[IDT_BASE] = IDT - UPPER
    with pytest.raises(TripleFault):
        deliver(guest, Event(UD))


def test_low_kernel_stack_with_lass_turns_a_user_fault_into_a_stack_fault(user: Guest) -> None:
    user.store(TSS + TSS64_RSP0, 8, USER_STACK)
    user.set_gate(STACK_FAULT, handler(STACK_FAULT), ist=1)
    deliver(user, Event(UD))
    assert user.words[RIP] == handler(STACK_FAULT)
    assert user.frame(2) == [ERROR_EXT, USER_CODE]


def test_low_kernel_stack_turns_a_user_page_fault_into_a_double_fault(user: Guest) -> None:
    user.store(TSS + TSS64_RSP0, 8, USER_STACK)
    user.set_gate(DF, handler(DF), ist=1)
    deliver(user, Event(PF, error_code=4, cr2=0))
    assert user.words[RIP] == handler(DF)


def test_software_interrupt_pushes_the_next_rip(guest: Guest) -> None:
    deliver(guest, Event(0x80, EventKind.SOFTWARE, return_rip=CODE + 2))
    assert guest.words[RIP] == handler(0x80)
    assert guest.frame(1) == [CODE + 2]


def test_fault_of_a_software_interrupt_pushes_the_rip_of_the_instruction(user: Guest) -> None:
    deliver(user, Event(BP, EventKind.SOFTWARE, return_rip=USER_CODE + 1))
    assert user.words[RIP] == handler(GP)
    assert user.frame(2) == [BP << 3 | ERROR_IDT, USER_CODE]
    assert user.frame(4)[3] & RFLAGS_RF


def test_software_interrupt_of_a_contributory_vector_does_not_make_a_double_fault(user: Guest) -> None:
    user.set_gate(GP, handler(GP), attributes=AR_P | SYS_INTERRUPT_GATE | DPL3)
    user.set_gate(0x80, CODE, attributes=ABSENT | DPL3)
    deliver(user, Event(0x80, EventKind.SOFTWARE, return_rip=USER_CODE + 2))
    assert user.words[RIP] == handler(NP)


def test_external_interrupt_on_a_contributory_vector_is_benign(guest: Guest) -> None:
    guest.set_gate(GP, CODE, attributes=ABSENT)
    deliver(guest, Event(GP, EventKind.EXTERNAL))
    assert guest.words[RIP] == handler(NP)


def test_nmi_blocks_further_ones_until_iret(guest: Guest) -> None:
    deliver(guest, Event(NMI, EventKind.NMI))
    assert guest.words[NMI_BLOCKED] == 1
    assert guest.words[RIP] == handler(NMI)


def test_int_2_does_not_block_nmis(guest: Guest) -> None:
    deliver(guest, Event(NMI, EventKind.SOFTWARE, return_rip=CODE + 2))
    assert guest.words[NMI_BLOCKED] == 0


def test_debug_exception_replaces_breakpoint_bits_and_accumulates_the_others(guest: Guest) -> None:
    guest.words[DR6] = DR6_FIXED | DR6_B0 << 1
    deliver(guest, Event(DB, dr6=DR6_BS))
    assert guest.words[DR6] == DR6_FIXED | DR6_BS
    deliver(guest, Event(DB, dr6=DR6_B0))
    assert guest.words[DR6] == DR6_FIXED | DR6_BS | DR6_B0


def test_debug_exception_clears_general_detect(guest: Guest) -> None:
    guest.words[DR7] = DR7_FIXED | DR7_GD
    deliver(guest, Event(DB, dr6=0))
    assert guest.words[DR7] == DR7_FIXED


def test_event_of_a_fault_carries_everything(guest: Guest) -> None:
    event = Event.of_fault(GuestFault(PF, 6, cr2=0x99))
    assert event == Event(PF, EventKind.EXCEPTION, 6, cr2=0x99)
    assert Event.of_fault(GuestFault(DB, dr6=DR6_BS)).dr6 == DR6_BS


class Intercepted(Exception):
    """Somebody wants to see the event instead of its delivery."""


class Watch:
    """Keeps what it is asked about; intercepts exception *intercepted* where it comes up during a delivery."""

    def __init__(self, intercepted: int | None = None) -> None:
        self.asked: list[tuple[int, int | None]] = []
        self.intercepted = intercepted

    def before_event(self, event: Event, vectoring: Event | None) -> None:
        self.asked.append((event.vector, None if vectoring is None else vectoring.vector))
        if vectoring is not None and event.vector == self.intercepted:
            raise Intercepted


def test_watch_sees_a_page_fault_before_it_becomes_a_double_fault(user: Guest) -> None:
    """A hypervisor with shadow paging needs that: the second page fault is its own doing, not its guest's."""
    user.store(TSS + TSS64_RSP0, 8, RING0_STACK)
    user.unmap(RING0_STACK - 8)
    user.set_gate(DF, handler(DF), ist=1)
    fault, watch = Event(PF, error_code=4, cr2=0x77), Watch(intercepted=PF)
    with pytest.raises(Intercepted):
        deliver_event(user.words, user.memory, fault, watch)
    assert watch.asked == [(PF, None), (PF, PF)]
    watch = Watch()
    deliver_event(user.words, user.memory, fault, watch)
    assert watch.asked == [(PF, None), (PF, PF), (DF, PF)]
    assert user.words[RIP] == handler(DF)


def test_watch_sees_an_exception_before_it_becomes_a_triple_fault(guest: Guest) -> None:
    guest.set_gate(DF, CODE, attributes=ABSENT)
    watch = Watch()
    with pytest.raises(TripleFault):
        deliver_event(guest.words, guest.memory, Event(DF, error_code=0), watch)
    assert watch.asked == [(DF, None), (NP, DF)]


def test_watch_is_asked_once_about_what_is_delivered_by_itself(guest: Guest) -> None:
    guest.set_gate(UD, CODE, attributes=ABSENT)
    watch = Watch()
    deliver_event(guest.words, guest.memory, Event(UD), watch)
    assert watch.asked == [(UD, None), (NP, UD)]


def test_watch_is_not_asked_about_what_it_injects(guest: Guest) -> None:
    watch = Watch()
    deliver_event(guest.words, guest.memory, Event(UD), watch, injected=True)
    assert watch.asked == []


def test_nested_exceptions_always_end(guest: Guest) -> None:
    guest.unmap(IDT)
    for vector in range(32):
        before = guest.words[RFLAGS]
        with pytest.raises(TripleFault):
            deliver(guest, Event(vector, error_code=0))
        assert guest.words[RFLAGS] == before
    assert guest.words[RSP] == KERNEL_STACK
