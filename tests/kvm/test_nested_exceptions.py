"""Exceptions of L2 and events that are injected into it: delivery, interception, and faults of the delivery."""

from __future__ import annotations

import pytest
from nested_machine import CALL, ENGINES, NestedMachine, nested_machine

from lasskvm.conformance import layout
from lasskvm.conformance.layout import LOW_USER
from lasskvm.kvm import VcpuEvents
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import BP, DB, DF, GP, NMI, NP, OF, PF, UD
from lasskvm.x86.registers import RFLAGS_AC, RFLAGS_IF, RFLAGS_RF, RFLAGS_TF
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField as F

VALID = vmx.INTR_INFO_VALID_MASK
LOOP = "again: inc rcx; jmp again"


@pytest.fixture(params=ENGINES)
def machine(request: pytest.FixtureRequest) -> NestedMachine:
    return nested_machine(request.param).reset()


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
