"""The VMM's debugger: single steps, breakpoints and INT3, of which the guest sees nothing."""

from __future__ import annotations

from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import HIGH_SUPERVISOR, KERNEL_CODE
from lasskvm.kvm import DebugExit, GuestDebug, IoExit, MmioExit, VcpuEvents
from lasskvm.kvm.structures import DebugRegs
from lasskvm.x86.exceptions import BP, DB, UD
from lasskvm.x86.paging import PTE_P, PTE_W
from lasskvm.x86.registers import DR6_BS, DR6_FIXED, RFLAGS_RF, RFLAGS_TF

SINGLE_STEP = GuestDebug(enable=True, singlestep=True)
INT3 = GuestDebug(enable=True, use_sw_bp=True)
#: DR7: breakpoint 0 on execution; 0 on execution and 1 on writes of 8 bytes.
ON_EXECUTION, ON_EXECUTION_AND_WRITE = 0x402, 0x90_040A
HOLE_GPA = 0xD000_0000
PORT = 0x99


def debug_exit(guest: Guest) -> DebugExit:
    vm_exit = guest.vcpu.run()
    assert isinstance(vm_exit, DebugExit), vm_exit
    return vm_exit


def breakpoints(guest: Guest, dr7: int, *addresses: int) -> None:
    first, second, third, fourth = (*addresses, 0, 0, 0, 0)[:4]
    guest.vcpu.set_guest_debug(GuestDebug(enable=True, breakpoints=(first, second, third, fourth), dr7=dr7))


# ------------------------------------------------------------------------------------------------------ single steps


def test_a_single_step_ends_behind_each_instruction(guest: Guest) -> None:
    program = guest.start("nop; second: mov eax, 5; third: jmp to; nop; to: nop")
    guest.vcpu.set_guest_debug(SINGLE_STEP)
    exits = [debug_exit(guest) for _ in range(3)]
    assert [step.pc for step in exits] == [program.labels[name] for name in ("second", "third", "to")]
    assert {(step.exception, step.dr6) for step in exits} == {(DB, DR6_BS | DR6_FIXED)}
    guest.vcpu.set_guest_debug(GuestDebug())
    assert guest.run().registers.rax == 5


def test_the_guest_sees_no_trap_flag_while_it_is_stepped(guest: Guest) -> None:
    guest.start("pushfq; pop rax; nop")
    guest.vcpu.set_guest_debug(SINGLE_STEP)
    for _ in range(3):
        debug_exit(guest)
        assert not guest.vcpu.get_regs().rflags & RFLAGS_TF
    assert not guest.vcpu.get_regs().rax & RFLAGS_TF
    assert guest.vcpu.get_debugregs() == DebugRegs()


def test_a_guest_that_steps_itself_gets_its_own_traps_beside_those_of_the_vmm(guest: Guest) -> None:
    program = guest.start("nop; nop; handler: nop", rflags=RFLAGS_TF, handlers={DB: "handler"})
    guest.vcpu.set_guest_debug(SINGLE_STEP)
    assert debug_exit(guest).pc == program.labels["handler"]
    assert guest.stack(guest.vcpu.get_regs().rsp, 1) == [KERNEL_CODE + 1]


def test_a_step_into_a_fault_ends_at_the_handler(guest: Guest) -> None:
    program = guest.start("ud2; handler: nop", handlers={UD: "handler"})
    guest.vcpu.set_guest_debug(SINGLE_STEP)
    assert debug_exit(guest).pc == program.labels["handler"]


def test_a_step_over_port_input_waits_for_the_answer(guest: Guest) -> None:
    program = guest.start(f"in al, {PORT:#x}; after: nop")
    guest.vcpu.set_guest_debug(SINGLE_STEP)
    vm_exit = guest.vcpu.run()
    assert isinstance(vm_exit, IoExit)
    vm_exit.data = 0x42
    assert debug_exit(guest).pc == program.labels["after"]
    assert guest.vcpu.get_regs().rax == 0x42


def test_a_step_over_a_store_to_a_device_is_reported_behind_the_store(guest: Guest) -> None:
    guest.tables.map(HIGH_SUPERVISOR, HOLE_GPA, PTE_P | PTE_W)
    program = guest.start("mov [rbx], rax; after: nop", rbx=HIGH_SUPERVISOR, rax=7)
    guest.vcpu.set_guest_debug(SINGLE_STEP)
    assert guest.vcpu.run() == MmioExit(HOLE_GPA, 8, write=True, data=7)
    assert debug_exit(guest).pc == program.labels["after"]


def test_halting_is_a_step_too(guest: Guest) -> None:
    program = guest.start("hlt; after: nop")
    guest.vcpu.set_guest_debug(SINGLE_STEP)
    assert debug_exit(guest).pc == program.labels["after"]


def test_code_changed_while_stepping_is_executed_as_changed(guest: Guest) -> None:
    guest.start(
        "again: mov eax, 1; place: mov ecx, 1; out 0x99, al; mov dword [rip + place + 1], 2; jmp again",
    )
    guest.tables.map(KERNEL_CODE, 0x10000, PTE_P | PTE_W)
    assert isinstance(guest.vcpu.run(), IoExit)
    guest.vcpu.set_guest_debug(SINGLE_STEP)
    debug_exit(guest)
    debug_exit(guest)
    guest.vcpu.set_guest_debug(GuestDebug())
    assert isinstance(guest.vcpu.run(), IoExit)
    assert guest.vcpu.get_regs().rcx == 2


# ----------------------------------------------------------------------------------------------------- breakpoints


def test_a_breakpoint_stops_before_its_instruction_and_again_unless_rf_is_set(guest: Guest) -> None:
    program = guest.start("nop; nop; here: mov eax, 1; nop")
    here = program.labels["here"]
    breakpoints(guest, ON_EXECUTION, here)
    for _ in range(2):
        vm_exit = debug_exit(guest)
        assert (vm_exit.exception, vm_exit.pc, vm_exit.dr6 & 0xF) == (DB, here, 1)
    regs = guest.vcpu.get_regs()
    assert regs.rax == 0
    regs.rflags |= RFLAGS_RF
    guest.vcpu.set_regs(regs)
    outcome = guest.run()
    assert (outcome.completed, outcome.registers.rax) == (True, 1)


def test_a_breakpoint_on_a_write_stops_behind_it_and_leaves_dr6_alone(guest: Guest) -> None:
    program = guest.start("mov rax, [rbx]; mov [rbx], rcx; after: nop", rbx=HIGH_SUPERVISOR, rcx=9)
    breakpoints(guest, ON_EXECUTION_AND_WRITE, 0, HIGH_SUPERVISOR)
    vm_exit = debug_exit(guest)
    assert (vm_exit.pc, vm_exit.dr6 & 0xF) == (program.labels["after"], 2)
    assert guest.read(HIGH_SUPERVISOR) == 9
    assert guest.vcpu.get_debugregs() == DebugRegs()
    assert guest.run().completed


def test_the_guest_has_its_debug_registers_to_itself(guest: Guest) -> None:
    program = guest.start("mov rax, dr0; mov rcx, dr7; mov dr1, rbx; here: nop", rbx=0x7777)
    guest.vcpu.set_debugregs(DebugRegs((0x1111, 0, 0, 0), DR6_FIXED, 0x400))
    breakpoints(guest, ON_EXECUTION, program.labels["here"])
    assert debug_exit(guest).pc == program.labels["here"]
    regs = guest.vcpu.get_regs()
    assert (regs.rax, regs.rcx) == (0x1111, 0x400)
    assert guest.vcpu.get_debugregs() == DebugRegs((0x1111, 0x7777, 0, 0), DR6_FIXED, 0x400)


def test_the_guests_breakpoints_rest_while_the_vmms_are_in_force(guest: Guest) -> None:
    guest.start("nop; mine: nop; nop")
    guest.vcpu.set_debugregs(DebugRegs((KERNEL_CODE + 1, 0, 0, 0), DR6_FIXED, ON_EXECUTION))
    breakpoints(guest, ON_EXECUTION, KERNEL_CODE + 0x1000)
    assert guest.run().completed
    guest.start("nop; mine: nop; nop")
    guest.vcpu.set_debugregs(DebugRegs((KERNEL_CODE + 1, 0, 0, 0), DR6_FIXED, ON_EXECUTION))
    guest.vcpu.set_guest_debug(GuestDebug())
    outcome = guest.run()
    assert (outcome.vector, outcome.label) == (DB, "mine")


def test_a_trap_of_the_guests_own_goes_to_the_guest_while_the_vmm_has_breakpoints(guest: Guest) -> None:
    guest.start("nop; after: nop", rflags=RFLAGS_TF)
    breakpoints(guest, ON_EXECUTION, KERNEL_CODE + 0x1000)
    outcome = guest.run()
    assert (outcome.vector, outcome.label) == (DB, "after")
    assert guest.vcpu.get_debugregs().dr6 == DR6_FIXED | DR6_BS


def test_a_trap_of_the_guests_own_at_a_breakpoint_comes_after_the_report(guest: Guest) -> None:
    guest.start("mov [rbx], rcx; after: nop", rbx=HIGH_SUPERVISOR, rflags=RFLAGS_TF)
    breakpoints(guest, ON_EXECUTION_AND_WRITE, 0, HIGH_SUPERVISOR)
    assert debug_exit(guest).dr6 & 0xF == 2
    outcome = guest.run()
    assert (outcome.vector, outcome.label) == (DB, "after")
    assert guest.vcpu.get_debugregs().dr6 == DR6_FIXED | DR6_BS


# ------------------------------------------------------------------------------------------------------------- INT3


def test_int3_is_reported_instead_of_delivered(guest: Guest) -> None:
    program = guest.start("nop; here: int3; nop")
    guest.vcpu.set_guest_debug(INT3)
    vm_exit = debug_exit(guest)
    assert (vm_exit.exception, vm_exit.pc) == (BP, program.labels["here"])
    assert guest.vcpu.get_regs().rip == program.labels["here"]


def test_a_reported_int3_can_be_injected_and_returns_behind_itself(guest: Guest) -> None:
    guest.start("int3; after: nop")
    guest.vcpu.set_guest_debug(INT3)
    debug_exit(guest)
    guest.vcpu.set_vcpu_events(VcpuEvents(exception=BP))
    outcome = guest.run()
    assert (outcome.vector, outcome.label) == (BP, "after")


def test_int3_is_the_guests_own_unless_the_vmm_wants_it(guest: Guest) -> None:
    guest.start("int3; after: nop")
    guest.vcpu.set_guest_debug(SINGLE_STEP)
    debug_exit(guest)
    guest.vcpu.set_guest_debug(GuestDebug())
    assert guest.run().vector == BP
