"""Events while L2 runs: who gets them, L1 by a VM exit or L2 through its IDT, and what L1 is told; on both engines."""

from __future__ import annotations

import pytest
from nested_machine import CALL, ENGINES, MSR_LIST, VMCS, NestedMachine, nested_machine

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.layout import HIGH_SUPERVISOR, UPPER
from lasskvm.kvm import HltExit, IntrExit, MpState, ShutdownExit
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import DB, NMI, UD
from lasskvm.x86.registers import RFLAGS_IF, RFLAGS_TF
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField as F

VALID = vmx.INTR_INFO_VALID_MASK
VECTOR = 0x44
LOOP = "again: inc rcx; jmp again"
#: Longer than anything that is waited for.
LONG_LOOP = "mov ecx, 100000000; again: dec ecx; jne again"
EXITS_ON_INTERRUPT = {F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_EXT_INTR_MASK}
EXITS_ON_NMI = {F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_NMI_EXITING}
VIRTUAL_NMIS = {F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_NMI_EXITING | vmx.PIN_BASED_VIRTUAL_NMIS}


@pytest.fixture(params=ENGINES)
def machine(request: pytest.FixtureRequest) -> NestedMachine:
    return nested_machine(request.param).reset()


@pytest.fixture(params=ENGINES)
def machine_with_apic(request: pytest.FixtureRequest) -> NestedMachine:
    return nested_machine(request.param, irqchip=True).reset()


def interrupts(machine: NestedMachine, vector: int = VECTOR) -> None:
    """Let an external interrupt come when L2 calls."""
    machine.at_call = lambda: machine.vcpu.interrupt(vector)


# ------------------------------------------------------------------------------------------------ external interrupts


@pytest.mark.parametrize("rflags", [0, RFLAGS_IF])
def test_an_external_interrupt_exits_and_stays_pending_whatever_if_says(
    machine: NestedMachine, rflags: int
) -> None:
    machine.add(EXITS_ON_INTERRUPT)
    interrupts(machine)
    found = machine.launch(f"{CALL}; next: {LOOP}", rflags=rflags)
    assert (found.reason, found.label) == (ExitReason.EXTERNAL_INTERRUPT, "next")
    assert found[F.VM_EXIT_INTR_INFO] == 0
    assert machine.vcpu.get_vcpu_events().interrupt == VECTOR
    assert found[F.VM_EXIT_INSTRUCTION_LEN] == 0


def test_acknowledge_on_exit_takes_the_interrupt_and_tells_its_vector(machine: NestedMachine) -> None:
    machine.add({**EXITS_ON_INTERRUPT, F.VM_EXIT_CONTROLS: vmx.VM_EXIT_ACK_INTR_ON_EXIT})
    interrupts(machine)
    found = machine.launch(f"{CALL}; next: {LOOP}")
    assert (found.reason, found.label) == (ExitReason.EXTERNAL_INTERRUPT, "next")
    assert found[F.VM_EXIT_INTR_INFO] == VALID | vmx.INTR_TYPE_EXT_INTR | VECTOR
    assert machine.vcpu.get_vcpu_events().interrupt is None


def test_without_the_control_an_interrupt_goes_to_l2_when_it_takes_interrupts(machine: NestedMachine) -> None:
    interrupts(machine)
    found = machine.launch(f"{CALL}; xor ebx, ebx; sti; inc ebx; after: {LOOP}")
    assert (found.vector, found.registers.rbx) == (VECTOR, 1)
    assert machine.guest.read(found[F.GUEST_RSP]) == found.program.labels["after"]


def test_an_interrupt_window_exits_when_the_shadow_of_sti_is_over(machine: NestedMachine) -> None:
    machine.add({F.CPU_BASED_VM_EXEC_CONTROL: vmx.CPU_BASED_INTR_WINDOW_EXITING})
    found = machine.launch("mov ecx, 50; a: dec ecx; jne a; sti; nop; open: nop; hlt")
    assert (found.reason, found.label) == (ExitReason.INTERRUPT_WINDOW, "open")


def test_an_interrupt_window_that_is_open_exits_before_the_first_instruction(machine: NestedMachine) -> None:
    machine.add({F.CPU_BASED_VM_EXEC_CONTROL: vmx.CPU_BASED_INTR_WINDOW_EXITING})
    found = machine.launch("start: inc ebx", rflags=RFLAGS_IF, rbx=7)
    assert (found.reason, found.label) == (ExitReason.INTERRUPT_WINDOW, "start")
    assert found.registers.rbx == 7


def test_an_injected_interrupt_comes_before_the_interrupt_window(machine: NestedMachine) -> None:
    machine.add({F.CPU_BASED_VM_EXEC_CONTROL: vmx.CPU_BASED_INTR_WINDOW_EXITING})
    found = machine.launch(
        "start: inc ebx",
        rflags=RFLAGS_IF,
        fields={F.VM_ENTRY_INTR_INFO_FIELD: VALID | vmx.INTR_TYPE_EXT_INTR | VECTOR},
    )
    # The handler runs with interrupts off.
    assert found.vector == VECTOR
    assert found[F.VM_ENTRY_INTR_INFO_FIELD] & VALID == 0


# ---------------------------------------------------------------------------------------------------------------- NMIs


def test_an_nmi_exits_and_blocks_the_next_one_in_l1(machine: NestedMachine) -> None:
    machine.add(EXITS_ON_NMI)
    machine.at_call = machine.vcpu.nmi
    found = machine.launch(f"{CALL}; next: {LOOP}")
    assert (found.reason, found.label) == (ExitReason.EXCEPTION_NMI, "next")
    assert found[F.VM_EXIT_INTR_INFO] == VALID | vmx.INTR_TYPE_NMI_INTR | NMI
    assert found[F.GUEST_INTERRUPTIBILITY_INFO] & vmx.GUEST_INTR_STATE_NMI == 0
    events = machine.vcpu.get_vcpu_events()
    assert (events.nmi_masked, events.nmi_pending) == (True, False)


def test_an_nmi_without_exiting_is_l2s_and_iret_unblocks_the_next(machine: NestedMachine) -> None:
    nmis = iter([machine.vcpu.nmi] * 3)
    machine.at_call = lambda: next(nmis, lambda: None)()
    layout.set_gate(machine.memory, NMI, UPPER + 0xA000)
    machine.memory.write(0xA000, assemble(f"inc ebx; {CALL}; mov edx, ebx; iretq", UPPER + 0xA000).code)
    # Each NMI calls for the next one, which waits for IRET.
    found = machine.launch(f"{CALL}; next: mov esi, edx", rbx=0)
    assert found.completed
    assert (found.registers.rbx, found.registers.rsi) == (3, 3)
    assert not machine.vcpu.get_vcpu_events().nmi_masked


def test_the_nmi_window_opens_with_the_iret_of_a_virtual_nmi(machine: NestedMachine) -> None:
    machine.add(VIRTUAL_NMIS)
    machine.add({F.CPU_BASED_VM_EXEC_CONTROL: vmx.CPU_BASED_NMI_WINDOW_EXITING})
    layout.set_gate(machine.memory, NMI, UPPER + 0xA000)
    machine.memory.write(0xA000, bytes.fromhex("ffc3 48cf"))  # inc ebx; iretq
    found = machine.launch(
        "start: inc ecx; hlt",
        rbx=0,
        rcx=0,
        fields={F.VM_ENTRY_INTR_INFO_FIELD: VALID | vmx.INTR_TYPE_NMI_INTR | NMI},
    )
    assert (found.reason, found.label) == (ExitReason.NMI_WINDOW, "start")
    assert (found.registers.rbx, found.registers.rcx) == (1, 0)
    assert found[F.GUEST_INTERRUPTIBILITY_INFO] & vmx.GUEST_INTR_STATE_NMI == 0


def test_blocking_of_virtual_nmis_is_saved_and_loaded_and_is_not_l1s(machine: NestedMachine) -> None:
    machine.add(VIRTUAL_NMIS)
    blocked = {F.GUEST_INTERRUPTIBILITY_INFO: vmx.GUEST_INTR_STATE_NMI}
    found = machine.launch("cpuid", fields=blocked)
    assert found.reason is ExitReason.CPUID
    assert found[F.GUEST_INTERRUPTIBILITY_INFO] == vmx.GUEST_INTR_STATE_NMI
    assert not machine.vcpu.get_vcpu_events().nmi_masked


def test_with_virtual_nmis_a_physical_nmi_exits_though_virtual_ones_are_blocked(
    machine: NestedMachine,
) -> None:
    machine.add(VIRTUAL_NMIS)
    machine.at_call = machine.vcpu.nmi
    found = machine.launch(
        f"{CALL}; next: {LOOP}", fields={F.GUEST_INTERRUPTIBILITY_INFO: vmx.GUEST_INTR_STATE_NMI}
    )
    assert (found.reason, found.label) == (ExitReason.EXCEPTION_NMI, "next")
    assert found[F.GUEST_INTERRUPTIBILITY_INFO] == vmx.GUEST_INTR_STATE_NMI
    assert machine.vcpu.get_vcpu_events().nmi_masked


# ------------------------------------------------------------------------------------------------------------------ HLT


def test_an_l2_that_is_entered_halted_waits_for_an_interrupt(machine_with_apic: NestedMachine) -> None:
    machine = machine_with_apic
    machine.add({**EXITS_ON_INTERRUPT, F.VM_EXIT_CONTROLS: vmx.VM_EXIT_ACK_INTR_ON_EXIT})
    enable_apic_timer(machine, after=5_000_000)
    found = machine.launch("start: inc ebx", rbx=3, fields={F.GUEST_ACTIVITY_STATE: vmx.GUEST_ACTIVITY_HLT})
    assert (found.reason, found.label) == (ExitReason.EXTERNAL_INTERRUPT, "start")
    assert found[F.VM_EXIT_INTR_INFO] == VALID | vmx.INTR_TYPE_EXT_INTR | VECTOR
    assert found[F.GUEST_ACTIVITY_STATE] == vmx.GUEST_ACTIVITY_HLT
    assert found.registers.rbx == 3
    assert machine.vcpu.get_mp_state() is not None


@pytest.mark.parametrize("rflags", [0, RFLAGS_IF])
def test_a_timer_interrupt_takes_a_halted_l2_back_to_l1(
    machine_with_apic: NestedMachine, rflags: int
) -> None:
    machine = machine_with_apic
    machine.add(EXITS_ON_INTERRUPT)
    without_hlt_exiting(machine)
    enable_apic_timer(machine, after=5_000_000)
    found = machine.launch("hlt; next: inc ebx", rflags=rflags, rbx=3)
    assert (found.reason, found.label) == (ExitReason.EXTERNAL_INTERRUPT, "next")
    assert found[F.GUEST_ACTIVITY_STATE] == vmx.GUEST_ACTIVITY_HLT
    assert found.registers.rbx == 3


def test_an_event_that_is_injected_wakes_a_halted_l2(machine: NestedMachine) -> None:
    found = machine.launch(
        "start: nop",
        rflags=RFLAGS_IF,
        fields={
            F.GUEST_ACTIVITY_STATE: vmx.GUEST_ACTIVITY_HLT,
            F.VM_ENTRY_INTR_INFO_FIELD: VALID | vmx.INTR_TYPE_EXT_INTR | VECTOR,
        },
    )
    assert found.vector == VECTOR
    assert found[F.GUEST_ACTIVITY_STATE] == vmx.GUEST_ACTIVITY_ACTIVE


def test_without_interrupt_chips_the_vmm_hears_of_a_halted_l2(machine: NestedMachine) -> None:
    without_hlt_exiting(machine)
    found = machine.launch("hlt; next: cpuid", rbx=3)
    assert isinstance(found.exit, HltExit)
    assert machine.vcpu.get_regs().rip == found.program.labels["next"]
    assert machine.finish().reason is ExitReason.CPUID


def test_the_preemption_timer_takes_a_halted_l2_back_to_l1(machine_with_apic: NestedMachine) -> None:
    machine = machine_with_apic
    without_hlt_exiting(machine)
    machine.add({F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_VMX_PREEMPTION_TIMER})
    found = machine.launch("hlt; next: inc ebx", fields={F.VMX_PREEMPTION_TIMER_VALUE: 100_000})
    assert (found.reason, found.label) == (ExitReason.PREEMPTION_TIMER, "next")
    assert found[F.GUEST_ACTIVITY_STATE] == vmx.GUEST_ACTIVITY_HLT


def without_hlt_exiting(machine: NestedMachine) -> None:
    controls = machine.read()[F.CPU_BASED_VM_EXEC_CONTROL]
    machine.write({F.CPU_BASED_VM_EXEC_CONTROL: controls & ~vmx.CPU_BASED_HLT_EXITING})


def enable_apic_timer(machine: NestedMachine, after: int) -> None:
    """L1 switches x2APIC mode on, and its timer, which fires *after* as many ticks."""
    machine.step(
        f"""
        mov ecx, 0x1b; rdmsr; or eax, 0xc00; wrmsr
        mov ecx, 0x80f; mov eax, 0x1ff; xor edx, edx; wrmsr
        mov ecx, 0x83e; mov eax, 0xb; xor edx, edx; wrmsr
        mov ecx, 0x832; mov eax, {VECTOR:#x}; xor edx, edx; wrmsr
        mov ecx, 0x838; mov eax, {after}; xor edx, edx; wrmsr
        hlt
        """
    )


# -------------------------------------------------------------------------------- preemption timer, monitor trap, debug


def test_the_preemption_timer_ends_a_loop_and_saves_what_is_left(machine: NestedMachine) -> None:
    machine.add({F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_VMX_PREEMPTION_TIMER})
    machine.add({F.VM_EXIT_CONTROLS: vmx.VM_EXIT_SAVE_VMX_PREEMPTION_TIMER})
    found = machine.launch(LOOP, rcx=0, fields={F.VMX_PREEMPTION_TIMER_VALUE: 10_000})
    assert found.reason is ExitReason.PREEMPTION_TIMER
    assert found[F.VMX_PREEMPTION_TIMER_VALUE] == 0
    assert found.registers.rcx > 100
    # 32 ns a tick, 10 ns a block.
    assert abs(found.registers.rcx - 32_000) < 3_200


def test_a_timer_that_has_not_expired_is_saved_for_the_next_entry(machine: NestedMachine) -> None:
    machine.add({F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_VMX_PREEMPTION_TIMER})
    machine.add({F.VM_EXIT_CONTROLS: vmx.VM_EXIT_SAVE_VMX_PREEMPTION_TIMER})
    found = machine.launch(
        "mov ecx, 1000; a: dec ecx; jne a; cpuid", fields={F.VMX_PREEMPTION_TIMER_VALUE: 1 << 31}
    )
    assert found.reason is ExitReason.CPUID
    spent = (1 << 31) - found[F.VMX_PREEMPTION_TIMER_VALUE]
    assert 250 < spent < 1000


def test_a_timer_of_zero_exits_behind_the_injected_event_and_before_l2s_first_instruction(
    machine: NestedMachine,
) -> None:
    machine.add({F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_VMX_PREEMPTION_TIMER})
    found = machine.launch("start: inc ebx", rbx=3, fields={F.VMX_PREEMPTION_TIMER_VALUE: 0})
    assert (found.reason, found.label, found.registers.rbx) == (ExitReason.PREEMPTION_TIMER, "start", 3)
    found = machine.enter(
        resume=True,
        fields={
            F.GUEST_RFLAGS: 2 | RFLAGS_IF,
            F.VM_ENTRY_INTR_INFO_FIELD: VALID | vmx.INTR_TYPE_EXT_INTR | VECTOR,
        },
    )
    assert found.reason is ExitReason.PREEMPTION_TIMER
    assert found.rip == layout.HANDLERS + VECTOR * layout.HANDLER_BYTES


def test_the_monitor_trap_flag_exits_behind_each_instruction(machine: NestedMachine) -> None:
    machine.add({F.CPU_BASED_VM_EXEC_CONTROL: vmx.CPU_BASED_MONITOR_TRAP_FLAG})
    labels = []
    found = machine.launch("inc ebx; a: mov ecx, ebx; b: jmp c; nop; c: ud2", rbx=1)
    for _ in range(3):
        assert found.reason is ExitReason.MONITOR_TRAP_FLAG
        labels.append(found.label)
        found = machine.enter(resume=True, rbx=found.registers.rbx, rcx=found.registers.rcx)
    assert labels == ["a", "b", "c"]
    # The fault is delivered, and counts as an instruction.
    assert found.reason is ExitReason.MONITOR_TRAP_FLAG
    assert found.rip == layout.HANDLERS + UD * layout.HANDLER_BYTES


def test_the_monitor_trap_flag_stops_behind_each_iteration_of_a_string_instruction(
    machine: NestedMachine,
) -> None:
    machine.add({F.CPU_BASED_VM_EXEC_CONTROL: vmx.CPU_BASED_MONITOR_TRAP_FLAG})
    found = machine.launch("start: rep stosb", rcx=5, rdi=HIGH_SUPERVISOR)
    assert (found.reason, found.label) == (ExitReason.MONITOR_TRAP_FLAG, "start")
    assert found.registers.rcx == 4


def test_the_monitor_trap_flag_exits_behind_an_instruction_that_the_vmm_has_completed(
    machine: NestedMachine,
) -> None:
    machine.add({F.CPU_BASED_VM_EXEC_CONTROL: vmx.CPU_BASED_MONITOR_TRAP_FLAG})
    called = []
    machine.at_call = lambda: called.append(True)
    found = machine.launch(f"{CALL}; next: inc ebx; inc ebx", rbx=1)
    assert called
    assert (found.reason, found.label, found.registers.rbx) == (ExitReason.MONITOR_TRAP_FLAG, "next", 1)


def test_a_pending_monitor_trap_can_be_injected(machine: NestedMachine) -> None:
    found = machine.launch(
        "start: inc ebx", rbx=1, fields={F.VM_ENTRY_INTR_INFO_FIELD: VALID | vmx.INTR_TYPE_OTHER_EVENT}
    )
    assert (found.reason, found.label, found.registers.rbx) == (ExitReason.MONITOR_TRAP_FLAG, "start", 1)


def test_a_pending_debug_exception_is_delivered_before_l2s_first_instruction(machine: NestedMachine) -> None:
    found = machine.launch(
        "start: inc ebx",
        rbx=1,
        rflags=RFLAGS_TF,
        fields={F.GUEST_PENDING_DBG_EXCEPTIONS: vmx.PENDING_DEBUG_BS},
    )
    assert (found.vector, found.registers.rbx) == (DB, 1)
    assert machine.vcpu.get_debugregs().dr6 & vmx.PENDING_DEBUG_BS


# ------------------------------------------------------------------------------------------ INIT, shutdown, VMX abort


def test_an_init_signal_waits_while_l1_is_in_vmx_operation(machine: NestedMachine) -> None:
    machine.vcpu.init()
    assert machine.step("inc ebx; hlt", rbx=4).rbx == 5
    machine.begin()
    machine.guest.write(UPPER + 0x60000, bytes.fromhex("0f01c4 90 ebfe"))  # vmxoff; nop; jmp $
    for _ in range(3):
        machine.vcpu.run()
        if not machine.vcpu.init_pending:
            break
    regs, sregs = machine.vcpu.get_regs(), machine.vcpu.get_sregs()
    assert not machine.vcpu.init_pending
    assert sregs.cr0 & 1 == 0
    assert regs.rip < 0x1_0000


def test_an_init_signal_in_l2_is_an_exit(machine: NestedMachine) -> None:
    machine.at_call = machine.vcpu.init
    found = machine.launch(f"{CALL}; next: {LOOP}")
    assert (found.reason, found.label) == (ExitReason.INIT_SIGNAL, "next")
    assert not machine.vcpu.init_pending


def test_power_on_ends_l2_and_vmx_operation(machine: NestedMachine) -> None:
    machine.at_call = lambda: setattr(machine.vcpu, "immediate_exit", True)
    machine.place(f"{CALL}; next: {LOOP}")
    machine.begin()
    machine.vcpu.run()
    machine.vcpu.immediate_exit = True
    machine.vcpu.run()
    assert machine.vcpu.get_nested_state()[0] == 1
    machine.vcpu.reset()
    assert machine.vcpu.get_nested_state()[0:2] == b"\0\0"
    assert machine.vcpu.get_nested_state()[8:16] == b"\xff" * 8
    assert machine.vcpu.get_regs().rip == 0xFFF0
    # And everything can begin anew.
    assert machine.reset().launch("nop").completed


@pytest.mark.parametrize(
    ("spoil", "indicator"),
    [
        ({F.VM_EXIT_MSR_LOAD_COUNT: 1}, vmx.VmxAbort.LOAD_HOST_MSR_FAIL),
        ({F.VM_EXIT_MSR_STORE_COUNT: 1}, vmx.VmxAbort.SAVE_GUEST_MSR_FAIL),
    ],
)
def test_an_exit_that_cannot_load_l1_is_a_shutdown_with_its_reason_in_the_vmcs(
    machine: NestedMachine, spoil: dict[F, int], indicator: int
) -> None:
    machine.memory.store(MSR_LIST, 8, 0x1234_5678)
    lists = {F.VM_EXIT_MSR_LOAD_ADDR: MSR_LIST, F.VM_EXIT_MSR_STORE_ADDR: MSR_LIST}
    found = machine.launch("cpuid", fields=lists | spoil)
    assert isinstance(found.exit, ShutdownExit)
    assert machine.memory.load(VMCS + vmx.VMCS_ABORT_INDICATOR, 4) == indicator


def test_an_l2_that_never_ends_gives_the_vmm_its_turn(machine: NestedMachine) -> None:
    machine.place(LONG_LOOP)
    machine.begin()
    assert isinstance(machine.vcpu.run(), IntrExit)
    assert machine.vcpu.get_nested_state()[0] & 1
    assert machine.vcpu.get_mp_state() is MpState.RUNNABLE


def test_code_in_the_place_of_an_instruction_that_exits_is_executed_in_blocks() -> None:
    machine = nested_machine("emulator").reset()
    assert machine.launch("cpuid").reason is ExitReason.CPUID
    machine.place("again: dec ecx; jne again")
    before = machine.vcpu.interpreter.blocks
    assert machine.enter(resume=True, rcx=1_000).completed
    # Steps would count twice as many.
    assert machine.vcpu.interpreter.blocks - before < 1_900
