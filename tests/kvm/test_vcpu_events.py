"""Events that the VMM queues: delivered at the next entry, in the kernel's order, with the kernel's refusals."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from lasskvm.conformance.guest import CR2_UNTOUCHED, Guest
from lasskvm.conformance.layout import KERNEL_CODE
from lasskvm.kvm import FailEntryExit, HltExit, IntrExit, ShutdownExit, VcpuEvents, Vm
from lasskvm.x86.exceptions import BP, DB, GP, NMI, PF, UD
from lasskvm.x86.registers import DR6_BS, RFLAGS_IF

VECTOR = 0x51
#: What an interrupt shadow is reported as: STI's or MOV SS's, which are not told apart.
SHADOW = 3


@pytest.mark.parametrize(
    "events",
    [
        VcpuEvents(),
        VcpuEvents(exception=GP, exception_error_code=0x18),
        VcpuEvents(pending_exception=UD),
        VcpuEvents(pending_exception=PF, exception_error_code=2, exception_payload=0x5000),
        VcpuEvents(interrupt=VECTOR),
        VcpuEvents(interrupt=VECTOR, interrupt_soft=True),
        VcpuEvents(interrupt_shadow=SHADOW, nmi_masked=True),
        VcpuEvents(nmi_injected=True),
        VcpuEvents(nmi_pending=True),
        VcpuEvents(triple_fault_pending=True),
    ],
    ids=repr,
)
def test_events_come_back(guest: Guest, events: VcpuEvents) -> None:
    guest.start("nop")
    guest.vcpu.set_vcpu_events(events)
    assert guest.vcpu.get_vcpu_events() == events


@pytest.mark.parametrize(
    "events",
    [VcpuEvents(exception=32), VcpuEvents(pending_exception=NMI), VcpuEvents(interrupt=256)],
    ids=repr,
)
def test_vectors_that_cannot_be_are_refused(guest: Guest, events: VcpuEvents) -> None:
    with pytest.raises(OSError, match="KVM_SET_VCPU_EVENTS") as refusal:
        guest.vcpu.set_vcpu_events(events)
    assert refusal.value.errno == errno.EINVAL


def test_a_pending_page_fault_is_delivered_with_its_payload_before_the_first_instruction(
    guest: Guest,
) -> None:
    guest.start("nop")
    guest.vcpu.set_vcpu_events(
        VcpuEvents(pending_exception=PF, exception_error_code=5, exception_payload=0x1234)
    )
    outcome = guest.run()
    assert (outcome.vector, outcome.error_code, outcome.rip, outcome.cr2) == (PF, 5, KERNEL_CODE, 0x1234)
    assert guest.vcpu.get_vcpu_events() == VcpuEvents()


def test_an_injected_page_fault_leaves_cr2_alone(guest: Guest) -> None:
    guest.start("nop")
    guest.vcpu.set_vcpu_events(VcpuEvents(exception=PF, exception_error_code=5))
    outcome = guest.run()
    assert (outcome.vector, outcome.error_code, outcome.cr2) == (PF, 5, CR2_UNTOUCHED)


def test_the_payload_of_a_pending_debug_exception_goes_into_dr6(guest: Guest) -> None:
    guest.start("nop")
    guest.vcpu.set_vcpu_events(VcpuEvents(pending_exception=DB, exception_payload=DR6_BS))
    assert guest.run().vector == DB
    assert guest.vcpu.get_debugregs().dr6 & DR6_BS


def test_setting_registers_drops_a_pending_exception_but_not_an_injected_one(guest: Guest) -> None:
    vcpu = guest.vcpu
    guest.start("nop")
    vcpu.set_vcpu_events(VcpuEvents(pending_exception=UD))
    vcpu.set_regs(vcpu.get_regs())
    assert vcpu.get_vcpu_events() == VcpuEvents()
    vcpu.set_vcpu_events(VcpuEvents(exception=UD))
    vcpu.set_regs(vcpu.get_regs())
    assert guest.run().vector == UD


def test_an_injected_exception_comes_before_an_nmi_which_interrupts_its_handler(guest: Guest) -> None:
    guest.start("fault: nop; handler: inc r8; nop", handlers={UD: "handler"})
    guest.vcpu.set_vcpu_events(VcpuEvents(exception=UD, nmi_injected=True))
    outcome = guest.run()
    assert (outcome.vector, outcome.label) == (NMI, "handler")


def test_a_pending_nmi_waits_while_nmis_are_masked(guest: Guest) -> None:
    guest.start("mov r8d, 1")
    guest.vcpu.set_vcpu_events(VcpuEvents(nmi_pending=True, nmi_masked=True))
    assert guest.run().completed
    assert guest.vcpu.get_vcpu_events() == VcpuEvents(nmi_pending=True, nmi_masked=True)


def test_an_injected_nmi_is_delivered_although_nmis_are_masked(guest: Guest) -> None:
    guest.start("nop")
    guest.vcpu.set_vcpu_events(VcpuEvents(nmi_injected=True, nmi_masked=True))
    assert guest.run().vector == NMI


def test_delivering_an_nmi_masks_the_next(guest: Guest) -> None:
    guest.start("nop")
    guest.vcpu.nmi()
    assert guest.vcpu.get_vcpu_events().nmi_pending
    assert guest.run().vector == NMI
    assert guest.vcpu.get_vcpu_events() == VcpuEvents(nmi_masked=True)


def test_a_pending_triple_fault_is_a_shutdown(guest: Guest) -> None:
    guest.start("nop")
    guest.vcpu.set_vcpu_events(VcpuEvents(triple_fault_pending=True))
    assert isinstance(guest.vcpu.run(), ShutdownExit)
    assert guest.run().completed


def test_an_interrupt_is_delivered_when_the_guest_can_take_it(guest: Guest) -> None:
    guest.start("nop", rflags=RFLAGS_IF)
    guest.vcpu.interrupt(VECTOR)
    outcome = guest.run()
    assert (outcome.vector, outcome.rip) == (VECTOR, KERNEL_CODE)


def test_an_interrupt_that_the_guest_cannot_take_fails_the_entry_until_it_can(guest: Guest) -> None:
    guest.start("nop")
    guest.vcpu.interrupt(VECTOR)
    for _ in range(2):
        assert guest.vcpu.run() == FailEntryExit(0x80000021)
    assert guest.vcpu.get_vcpu_events().interrupt == VECTOR
    regs = guest.vcpu.get_regs()
    guest.vcpu.set_regs(replace(regs, rflags=regs.rflags | RFLAGS_IF))
    assert guest.run().vector == VECTOR


def test_an_interrupt_shadow_that_is_set_fails_the_entry_too(guest: Guest) -> None:
    guest.start("nop", rflags=RFLAGS_IF)
    guest.vcpu.set_vcpu_events(VcpuEvents(interrupt=VECTOR, interrupt_shadow=1))
    assert guest.vcpu.run() == FailEntryExit(0x80000021)


def test_interrupts_are_queued_one_at_a_time_and_by_their_vector(guest: Guest) -> None:
    guest.start("nop")
    guest.vcpu.interrupt(VECTOR)
    for vector, number in ((VECTOR, errno.EEXIST), (256, errno.EINVAL)):
        with pytest.raises(OSError, match="KVM_INTERRUPT") as refusal:
            guest.vcpu.interrupt(vector)
        assert refusal.value.errno == number


def test_interrupts_come_from_the_irqchip_where_there_is_one() -> None:
    vm = Vm()
    vm.create_irqchip()
    with pytest.raises(OSError, match=r"irq_line\(\)") as refusal:
        vm.create_vcpu().interrupt(VECTOR)
    assert refusal.value.errno == errno.ENXIO


def test_an_injected_software_interrupt_needs_no_interrupt_flag(guest: Guest) -> None:
    guest.start("nop")
    guest.vcpu.set_vcpu_events(VcpuEvents(interrupt=VECTOR, interrupt_soft=True))
    assert guest.run().vector == VECTOR


def test_a_queued_exception_wakes_a_halted_guest(guest: Guest) -> None:
    guest.start("hlt; after: nop")
    assert isinstance(guest.vcpu.run(), HltExit)
    guest.vcpu.set_vcpu_events(VcpuEvents(pending_exception=BP))
    outcome = guest.run()
    assert (outcome.vector, outcome.label) == (BP, "after")


def test_immediate_exit_returns_before_anything_is_delivered(guest: Guest) -> None:
    guest.start("nop")
    guest.vcpu.set_vcpu_events(VcpuEvents(pending_exception=UD))
    guest.vcpu.immediate_exit = True
    assert [guest.vcpu.run(), guest.vcpu.run()] == [IntrExit(), IntrExit()]
    assert guest.vcpu.get_vcpu_events() == VcpuEvents(pending_exception=UD)
    guest.vcpu.immediate_exit = False
    assert guest.run().vector == UD
