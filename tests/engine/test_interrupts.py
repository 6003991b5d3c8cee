"""NMIs, maskable interrupts and their shadows, HLT."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import KERNEL_CODE, USER_CS
from lasskvm.kvm import ExecutionEngine, HltExit, IntrExit, IoExit
from lasskvm.x86.exceptions import NMI
from lasskvm.x86.registers import RFLAGS_IF

HANDLER = KERNEL_CODE + 0x1000
#: The two 8259As at vectors 20H and 28H, all lines open; then EOI is OUT 20H, 20H.
PROGRAM_PICS = "; ".join(
    f"mov al, {value:#x}; out {port:#x}, al"
    for port, value in (
        (0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0xA0, 0x11), (0xA1, 0x28), (0xA1, 2), (0xA1, 1),
        (0x21, 0), (0xA1, 0),
    )
)  # fmt: skip
IRQ1_VECTOR = 0x21


@pytest.fixture(scope="module")
def interrupt_guest() -> Guest:
    """A guest with an interrupt controller."""
    return Guest(irqchip=True)


@pytest.fixture
def irq(interrupt_guest: Guest) -> Iterator[Guest]:
    """The same, with its controller programmed by the guest and no line raised."""
    interrupt_guest.reset()
    assert interrupt_guest.execute(PROGRAM_PICS).completed
    yield interrupt_guest
    interrupt_guest.vm.irq_line(1, False)


def test_nmi_comes_at_once_and_blocks_the_next_until_iret(guest: Guest) -> None:
    guest.start(
        "loop: jmp loop; handler: inc r8; out 0x99, al; out 0x99, al; iretq", handlers={NMI: "handler"}
    )
    guest.vcpu.nmi()
    for _ in range(2):
        assert isinstance(guest.vcpu.run(), IoExit)
        assert guest.vcpu.get_regs().r8 == 1
        guest.vcpu.nmi()
    while isinstance(guest.vcpu.run(), IntrExit):
        pass
    assert guest.vcpu.get_regs().r8 == 2
    assert guest.stack(guest.vcpu.get_regs().rsp, 1) == [KERNEL_CODE]


@pytest.mark.parametrize("engine", ["jit", "emulator"])
def test_blocked_nmi_comes_right_behind_iret(engine: ExecutionEngine) -> None:
    guest = Guest(engine=engine)
    guest.start(
        "loop: inc rcx; jmp loop; handler: inc r8; mov r9, rcx; out 0x99, al; iretq",
        handlers={NMI: "handler"},
    )
    guest.vcpu.nmi()
    assert isinstance(guest.vcpu.run(), IoExit)
    guest.vcpu.nmi()
    while isinstance(guest.vcpu.run(), IntrExit):
        pass
    assert (guest.vcpu.get_regs().r8, guest.vcpu.get_regs().r9) == (2, 0)


def test_hlt_with_interrupts_off_exits(guest: Guest) -> None:
    outcome = guest.execute("hlt; after: nop")
    assert outcome.exit == HltExit(interrupts_enabled=False)
    assert outcome.label == "after"


def test_nmi_wakes_a_halted_guest(guest: Guest) -> None:
    guest.execute("hlt; after: nop")
    guest.vcpu.nmi()
    outcome = guest.run()
    assert (outcome.vector, outcome.label) == (NMI, "after")


def test_maskable_interrupt_is_taken_when_interrupts_are_on(irq: Guest) -> None:
    irq.vm.irq_line(1, True)
    outcome = irq.execute("here: nop", rflags=RFLAGS_IF)
    assert (outcome.vector, outcome.error_code, outcome.label) == (IRQ1_VECTOR, None, "here")


def test_maskable_interrupt_waits_while_interrupts_are_off(irq: Guest) -> None:
    irq.vm.irq_line(1, True)
    assert irq.execute("nop; nop").completed


def test_sti_takes_effect_behind_the_next_instruction(irq: Guest) -> None:
    irq.vm.irq_line(1, True)
    outcome = irq.execute("sti; inc rax; after: inc rax")
    assert (outcome.vector, outcome.label, outcome.registers.rax) == (IRQ1_VECTOR, "after", 1)


def test_sti_does_not_delay_when_interrupts_are_on_already(irq: Guest) -> None:
    program = irq.start("sti; here: inc rax", rflags=RFLAGS_IF)
    irq.vm.irq_line(1, True)
    outcome = irq.run()
    assert outcome.vector == IRQ1_VECTOR
    assert outcome.rip == program.address


def test_sti_hlt_is_woken_by_a_pending_interrupt(irq: Guest) -> None:
    irq.vm.irq_line(1, True)
    outcome = irq.execute("sti; hlt; after: nop")
    assert (outcome.vector, outcome.label) == (IRQ1_VECTOR, "after")


def test_sti_cli_lets_nothing_in(irq: Guest) -> None:
    irq.vm.irq_line(1, True)
    assert irq.execute("sti; cli; nop").completed


def test_mov_ss_holds_back_interrupts_for_one_instruction(irq: Guest) -> None:
    irq.vm.irq_line(1, True)
    outcome = irq.execute(
        "pushfq; bts qword [rsp], 9; mov ss, ebx; popfq; after: inc rax", rbx=layout.KERNEL_SS
    )
    assert (outcome.vector, outcome.label) == (IRQ1_VECTOR, "after")


def test_popf_with_iopl_3_opens_interrupts_in_compatibility_mode(irq: Guest) -> None:
    irq.vm.irq_line(1, True)
    outcome = irq.execute("pushfd; bts dword [esp], 9; popfd; here: nop", cpl=3, bits=32, rflags=3 << 12)
    assert (outcome.vector, outcome.label) == (IRQ1_VECTOR, "here")


def test_interrupt_is_taken_in_a_loop_without_any_exit(irq: Guest) -> None:
    irq.start("loop: jmp loop", rflags=RFLAGS_IF)
    assert isinstance(irq.vcpu.run(), IntrExit)
    irq.vm.irq_line(1, True)
    outcome = irq.run()
    assert (outcome.vector, outcome.label) == (IRQ1_VECTOR, "loop")


def test_interrupt_switches_from_user_mode_to_the_kernels_stack(irq: Guest) -> None:
    irq.vm.irq_line(1, True)
    outcome = irq.execute("here: nop", cpl=3, rflags=RFLAGS_IF)
    assert (outcome.vector, outcome.cs, outcome.label) == (IRQ1_VECTOR, USER_CS, "here")


def test_handler_acknowledges_and_the_program_goes_on(irq: Guest) -> None:
    irq.vm.irq_line(1, True)
    irq.place(assemble("inc r8; mov al, 0x20; out 0x20, al; iretq", HANDLER))
    layout.set_gate(irq.memory, IRQ1_VECTOR, HANDLER)
    outcome = irq.execute("nop; cli", rflags=RFLAGS_IF)
    assert outcome.completed
    assert outcome.registers.r8 == 1
