"""Events while L2 runs: who gets them, L1 by a VM exit or L2 through its IDT, and what L1 is told; on both engines."""

from __future__ import annotations

import pytest
from nested_machine import CALL, ENGINES, MSR_LIST, VMCS, NestedMachine, nested_machine

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.layout import HIGH_SUPERVISOR, LOW_USER, UPPER
from lasskvm.kvm import HltExit, IntrExit, MpState, ShutdownExit, VcpuEvents
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import BP, DB, DF, GP, NMI, NP, OF, PF, UD
from lasskvm.x86.registers import RFLAGS_AC, RFLAGS_IF, RFLAGS_RF, RFLAGS_TF
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField as F

VALID = vmx.INTR_INFO_VALID_MASK
VECTOR = 0x44
LOOP = "again: inc rcx; jmp again"
#: Longer than anything that is waited for.
LONG_LOOP = "mov ecx, 100000000; again: dec ecx; jne again"
#: The way into the handler of a vector on a stack that does not exist.
NO_STACK = 0x1000
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


# ------------------------------------------------------------------------------------------------------ event injection


INJECTED = {
    "external interrupt": (vmx.INTR_TYPE_EXT_INTR | 0x50, None, False),
    "NMI": (vmx.INTR_TYPE_NMI_INTR | NMI, None, False),
    "fault with an error code": (vmx.INTR_TYPE_HARD_EXCEPTION | GP, 0x1230, False),
    "fault without": (vmx.INTR_TYPE_HARD_EXCEPTION | UD, None, False),
    "page fault": (vmx.INTR_TYPE_HARD_EXCEPTION | PF, 6, False),
    "double fault": (vmx.INTR_TYPE_HARD_EXCEPTION | DF, 0, False),
    "INT n": (vmx.INTR_TYPE_SOFT_INTR | layout.DONE_VECTOR, None, True),
    "INT1": (vmx.INTR_TYPE_PRIV_SW_EXCEPTION | DB, None, True),
    "INT3": (vmx.INTR_TYPE_SOFT_EXCEPTION | BP, None, True),
    "INTO": (vmx.INTR_TYPE_SOFT_EXCEPTION | OF, None, True),
}


def injection(kind: str) -> dict[F, int]:
    information, error_code, is_instruction = INJECTED[kind]
    code = vmx.INTR_INFO_DELIVER_CODE_MASK if error_code is not None else 0
    return {
        F.VM_ENTRY_INTR_INFO_FIELD: VALID | information | code,
        F.VM_ENTRY_EXCEPTION_ERROR_CODE: error_code or 0,
        F.VM_ENTRY_INSTRUCTION_LEN: 2 if is_instruction else 0,
    }


@pytest.mark.parametrize("kind", INJECTED)
def test_an_injected_event_is_delivered_through_l2s_idt(machine: NestedMachine, kind: str) -> None:
    information, error_code, is_instruction = INJECTED[kind]
    # An injected event is not intercepted.
    machine.write({F.EXCEPTION_BITMAP: 0xFFFF_FFFF})
    found = machine.launch("start: nop; nop; next: ud2", rflags=RFLAGS_IF, fields=injection(kind), rbx=1)
    assert found.vector == information & 0xFF
    rsp = found[F.GUEST_RSP]
    if error_code is not None:
        assert machine.guest.read(rsp) == error_code
        rsp += 8
    assert machine.guest.read(rsp) == found.program.labels["next" if is_instruction else "start"]
    assert found[F.IDT_VECTORING_INFO_FIELD] == 0
    assert found[F.VM_ENTRY_INTR_INFO_FIELD] == injection(kind)[F.VM_ENTRY_INTR_INFO_FIELD] & ~VALID


@pytest.mark.parametrize("kind", INJECTED)
def test_an_exception_of_the_delivery_of_an_injected_event_tells_what_was_being_delivered(
    machine: NestedMachine, kind: str
) -> None:
    information, error_code, is_instruction = INJECTED[kind]
    vector = information & 0xFF
    machine.write({F.EXCEPTION_BITMAP: 1 << NP})
    layout.set_gate(machine.memory, vector, layout.HANDLERS, present=False, dpl=3)
    found = machine.launch("start: nop", rflags=RFLAGS_IF, fields=injection(kind))
    # Also where L2 would get a double fault, or shut down.
    assert (found.reason, found.label) == (ExitReason.EXCEPTION_NMI, "start")
    code = vmx.INTR_INFO_DELIVER_CODE_MASK
    assert found[F.VM_EXIT_INTR_INFO] == VALID | code | vmx.INTR_TYPE_HARD_EXCEPTION | NP
    external = 0 if kind in ("INT n", "INT3", "INTO") else 1
    assert found[F.VM_EXIT_INTR_ERROR_CODE] == vector << 3 | 2 | external
    vectoring = found[F.IDT_VECTORING_INFO_FIELD]
    assert vectoring == VALID | information | (code if error_code is not None else 0)
    assert found[F.VM_EXIT_INSTRUCTION_LEN] == (2 if is_instruction else 0)


# ---------------------------------------------------------------------------------------------------------- exceptions


@pytest.mark.parametrize(
    ("source", "vector", "error_code"),
    [
        ("bad: ud2", UD, None),
        ("xor ecx, ecx; bad: div ecx", 0, None),
        ("bad: mov rax, [rbx]", GP, 0),
        ("mov eax, 0xFFF8; bad: mov es, eax", GP, 0xFFF8),
    ],
)
def test_an_intercepted_exception_exits_with_rip_on_the_instruction(
    machine: NestedMachine, source: str, vector: int, error_code: int | None
) -> None:
    machine.write({F.EXCEPTION_BITMAP: 1 << vector})
    found = machine.launch(source, rbx=LOW_USER)
    assert (found.reason, found.label) == (ExitReason.EXCEPTION_NMI, "bad")
    code = vmx.INTR_INFO_DELIVER_CODE_MASK if error_code is not None else 0
    assert found[F.VM_EXIT_INTR_INFO] == VALID | vmx.INTR_TYPE_HARD_EXCEPTION | code | vector
    assert found[F.VM_EXIT_INTR_ERROR_CODE] == (error_code or 0)
    assert found[F.GUEST_RFLAGS] & RFLAGS_RF


@pytest.mark.parametrize("vector", [0, UD, GP])
def test_an_exception_that_is_not_intercepted_is_l2s(machine: NestedMachine, vector: int) -> None:
    machine.write({F.EXCEPTION_BITMAP: 0xFFFF_FFFF & ~(1 << vector)})
    source = {0: "xor ecx, ecx; div ecx", UD: "ud2", GP: "mov rax, [rbx]"}[vector]
    assert machine.launch(source, rbx=LOW_USER).vector == vector


def test_int3_and_int1_exit_as_software_exceptions_with_their_length(machine: NestedMachine) -> None:
    machine.write({F.EXCEPTION_BITMAP: 1 << BP | 1 << DB})
    found = machine.launch("bad: int3")
    assert (found.reason, found.label) == (ExitReason.EXCEPTION_NMI, "bad")
    assert found[F.VM_EXIT_INTR_INFO] == VALID | vmx.INTR_TYPE_SOFT_EXCEPTION | BP
    assert found[F.VM_EXIT_INSTRUCTION_LEN] == 1
    machine.place("bad: int1")
    found = machine.enter(resume=True)
    assert (found.reason, found.label) == (ExitReason.EXCEPTION_NMI, "bad")
    assert found[F.VM_EXIT_INTR_INFO] == VALID | vmx.INTR_TYPE_PRIV_SW_EXCEPTION | DB
    assert found[F.EXIT_QUALIFICATION] == 0


def test_a_single_step_exits_with_its_dr6_bit_and_dr6_stays(machine: NestedMachine) -> None:
    machine.write({F.EXCEPTION_BITMAP: 1 << DB})
    before = machine.vcpu.get_debugregs().dr6
    found = machine.launch("nop; next: nop", rflags=RFLAGS_TF)
    assert (found.reason, found.label) == (ExitReason.EXCEPTION_NMI, "next")
    assert found[F.EXIT_QUALIFICATION] == vmx.PENDING_DEBUG_BS
    assert machine.vcpu.get_debugregs().dr6 == before


def test_an_interrupt_of_l2s_software_is_no_exception(machine: NestedMachine) -> None:
    machine.write({F.EXCEPTION_BITMAP: 0xFFFF_FFFF})
    assert machine.launch("nop").completed


# error code of the access, bitmap bit, mask, match, whether it exits (SDM 26.2)
PAGE_FAULTS = [
    (True, 0, 0, True), (False, 0, 0, False),
    (True, 2, 2, True), (True, 2, 0, False), (False, 2, 0, True), (False, 2, 2, False),
    (True, 2, 1, False), (False, 2, 1, True),
    (True, 1, 1, False), (False, 1, 1, True),
]  # fmt: skip


@pytest.mark.parametrize(("bit", "mask", "match", "exits"), PAGE_FAULTS)
def test_mask_and_match_choose_among_page_faults(
    machine: NestedMachine, bit: bool, mask: int, match: int, exits: bool
) -> None:
    machine.write(
        {
            F.EXCEPTION_BITMAP: (1 << PF) * bit,
            F.PAGE_FAULT_ERROR_CODE_MASK: mask,
            F.PAGE_FAULT_ERROR_CODE_MATCH: match,
        }
    )
    # A write to a page that is absent has error code 2.
    found = machine.launch("xor eax, eax; bad: mov [rbx], rax", rbx=layout.HIGH_ABSENT + 0x18)
    if exits:
        assert (found.reason, found.label) == (ExitReason.EXCEPTION_NMI, "bad")
        code = vmx.INTR_INFO_DELIVER_CODE_MASK
        assert found[F.VM_EXIT_INTR_INFO] == VALID | vmx.INTR_TYPE_HARD_EXCEPTION | code | PF
        assert found[F.EXIT_QUALIFICATION] == layout.HIGH_ABSENT + 0x18
        assert found[F.VM_EXIT_INTR_ERROR_CODE] == 2
        assert machine.vcpu.get_sregs().cr2 != layout.HIGH_ABSENT + 0x18
    else:
        assert found.vector == PF
        assert machine.vcpu.get_sregs().cr2 == layout.HIGH_ABSENT + 0x18


def test_a_lass_violation_is_l2s_or_exits_as_gp_with_l2s_own_cr4(machine: NestedMachine) -> None:
    machine.write({F.EXCEPTION_BITMAP: 1 << GP})
    found = machine.launch("bad: mov rax, [rbx]", rbx=LOW_USER, rflags=0)
    assert (found.reason, found.label, found[F.VM_EXIT_INTR_ERROR_CODE]) == (
        ExitReason.EXCEPTION_NMI, "bad", 0,
    )  # fmt: skip
    # AC lifts it, for SMAP and for LASS.
    assert machine.enter(resume=True, rbx=LOW_USER, fields={F.GUEST_RFLAGS: 2 | RFLAGS_AC}).completed


def test_a_double_fault_exits_or_is_l2s(machine: NestedMachine) -> None:
    layout.set_gate(machine.memory, GP, layout.HANDLERS, present=False)
    found = machine.launch("bad: mov rax, [rbx]", rbx=LOW_USER)
    assert found.vector == DF
    machine.place("bad: mov rax, [rbx]", fields={F.EXCEPTION_BITMAP: 1 << DF})
    found = machine.enter(resume=True, rbx=LOW_USER)
    assert (found.reason, found.label) == (ExitReason.EXCEPTION_NMI, "bad")
    code = vmx.INTR_INFO_DELIVER_CODE_MASK
    assert found[F.VM_EXIT_INTR_INFO] == VALID | vmx.INTR_TYPE_HARD_EXCEPTION | code | DF


def test_a_triple_fault_is_an_exit_and_not_the_end_of_the_vm(machine: NestedMachine) -> None:
    for vector in (GP, DF):
        layout.set_gate(machine.memory, vector, layout.HANDLERS, present=False)
    found = machine.launch("bad: mov rax, [rbx]", rbx=LOW_USER)
    assert (found.reason, found.label) == (ExitReason.TRIPLE_FAULT, "bad")


def test_a_fault_in_l2s_delivery_tells_l1_of_the_first_event(machine: NestedMachine) -> None:
    machine.write({F.EXCEPTION_BITMAP: 1 << NP})
    layout.set_gate(machine.memory, UD, layout.HANDLERS, present=False)
    found = machine.launch("bad: ud2")
    assert (found.reason, found.label) == (ExitReason.EXCEPTION_NMI, "bad")
    assert found[F.IDT_VECTORING_INFO_FIELD] == VALID | vmx.INTR_TYPE_HARD_EXCEPTION | UD
    assert found[F.VM_EXIT_INTR_ERROR_CODE] == UD << 3 | 3


def test_an_exception_of_the_vmm_goes_the_way_of_l2s_own(machine: NestedMachine) -> None:
    machine.write({F.EXCEPTION_BITMAP: 1 << UD})
    machine.at_call = lambda: machine.vcpu.set_vcpu_events(VcpuEvents(pending_exception=UD))
    found = machine.launch(f"{CALL}; next: {LOOP}")
    assert (found.reason, found.label) == (ExitReason.EXCEPTION_NMI, "next")


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
