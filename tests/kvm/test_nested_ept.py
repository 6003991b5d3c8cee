"""EPT below L2: violations and misconfigurations of every kind of access, flags, large pages, unrestricted guests."""

from __future__ import annotations

import pytest
from nested_machine import (
    ENGINES,
    EPT_PD,
    EPT_PDPT,
    EPT_PML4,
    EPT_PT,
    EPT_RWX,
    EPT_WB,
    EPTP,
    NestedMachine,
    nested_machine,
)

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.layout import HIGH_SUPERVISOR, UPPER
from lasskvm.x86 import vmx
from lasskvm.x86.ept import EPT_A, EPT_D, EPT_PS, EPT_R, EPT_W, EPT_X
from lasskvm.x86.exceptions import PF, UD
from lasskvm.x86.registers import CR0_NE, CR0_PE, CR0_PG
from lasskvm.x86.vmx_exits import EptViolation, ExitReason
from lasskvm.x86.vmx_fields import VmcsField as F

PAGE = 0x1000
VALID = vmx.INTR_INFO_VALID_MASK
DATA_GPA = layout.DATA_GPA + 0xC000
READ, WRITE, FETCH = EptViolation.ACC_READ, EptViolation.ACC_WRITE, EptViolation.ACC_INSTR
LINEAR = EptViolation.GVA_IS_VALID | EptViolation.GVA_TRANSLATED
OF_TABLES = EptViolation.GVA_IS_VALID
#: Where another copy of a page is, for mappings that are not the identity.
ELSEWHERE = 0x3F0000


def allowed(entry: int) -> int:
    return (entry & 7) << 3


@pytest.fixture(params=ENGINES)
def machine(request: pytest.FixtureRequest) -> NestedMachine:
    machine = nested_machine(request.param).reset()
    machine.use_ept()
    return machine


@pytest.mark.parametrize(
    ("entry", "source", "access"),
    [
        (0, "mov rax, [rbx]", READ),
        (0, "mov [rbx], rax", WRITE),
        (EPT_R, "mov [rbx], rax", WRITE),
        (EPT_R | EPT_X, "mov [rbx], rax", WRITE),
        (EPT_R, "inc dword [rbx]", WRITE),
        (0, "inc dword [rbx]", WRITE),
        (0, "lock xadd [rbx], eax", WRITE),
        (EPT_X, "cmpxchg [rbx], rax", WRITE),
        (EPT_X, "mov rax, [rbx]", READ),
    ],
)
def test_a_data_access_that_ept_does_not_allow_exits_with_both_addresses(
    machine: NestedMachine, entry: int, source: str, access: int
) -> None:
    machine.set_ept(DATA_GPA, DATA_GPA | EPT_WB | entry if entry else 0)
    found = machine.launch(f"start: {source}", rbx=HIGH_SUPERVISOR + 0x28)
    assert (found.reason, found.label) == (ExitReason.EPT_VIOLATION, "start")
    assert found[F.GUEST_PHYSICAL_ADDRESS] == DATA_GPA + 0x28
    assert found[F.GUEST_LINEAR_ADDRESS] == HIGH_SUPERVISOR + 0x28
    qualification = found[F.EXIT_QUALIFICATION]
    assert qualification == LINEAR | allowed(entry) | access
    # Once L1 has mapped it, L2 goes on as if nothing had happened.
    machine.set_ept(DATA_GPA, DATA_GPA | EPT_WB | EPT_RWX)
    assert machine.enter(resume=True, rbx=HIGH_SUPERVISOR + 0x28).completed


def test_a_fetch_from_a_page_without_execute_permission_exits(machine: NestedMachine) -> None:
    machine.set_ept(DATA_GPA, DATA_GPA | EPT_WB | EPT_R | EPT_W)
    machine.memory.write(DATA_GPA, assemble("jmp rcx", HIGH_SUPERVISOR).code)
    found = machine.launch("mov rcx, back; jmp rbx; back: nop", rbx=HIGH_SUPERVISOR)
    assert (found.reason, found.rip) == (ExitReason.EPT_VIOLATION, HIGH_SUPERVISOR)
    assert found[F.EXIT_QUALIFICATION] == LINEAR | FETCH | allowed(EPT_R | EPT_W)
    assert found[F.GUEST_PHYSICAL_ADDRESS] == DATA_GPA
    machine.set_ept(DATA_GPA, DATA_GPA | EPT_WB | EPT_RWX)
    regs = found.registers
    assert machine.enter(resume=True, rcx=regs.rcx, rbx=regs.rbx).completed


def test_code_runs_from_an_execute_only_page(machine: NestedMachine) -> None:
    machine.set_ept(DATA_GPA, DATA_GPA | EPT_WB | EPT_X)
    machine.memory.write(DATA_GPA, assemble("inc edx; jmp rcx", HIGH_SUPERVISOR).code)
    found = machine.launch("mov rcx, back; jmp rbx; back: nop", rbx=HIGH_SUPERVISOR, rdx=1)
    assert found.completed
    assert found.registers.rdx == 2


def test_an_instruction_that_reaches_into_an_absent_page_exits_there(machine: NestedMachine) -> None:
    machine.set_ept(DATA_GPA + PAGE, 0)
    start = HIGH_SUPERVISOR + PAGE - 4
    machine.memory.write(DATA_GPA + PAGE - 4, bytes.fromhex("ffc2 48b8 0102030405060708 f4"))
    found = machine.launch("jmp rbx", rbx=start, rdx=1)
    assert (found.reason, found.rip, found.registers.rdx) == (ExitReason.EPT_VIOLATION, start + 2, 2)
    assert found[F.GUEST_PHYSICAL_ADDRESS] == DATA_GPA + PAGE
    assert found[F.EXIT_QUALIFICATION] & FETCH


def test_a_page_table_that_ept_does_not_map_is_a_violation_of_the_walk(machine: NestedMachine) -> None:
    slot = machine.guest.tables.entry_gpa(HIGH_SUPERVISOR)
    machine.set_ept(slot & ~0xFFF, 0)
    found = machine.launch("start: mov rax, [rbx]", rbx=HIGH_SUPERVISOR + 8)
    assert (found.reason, found.label) == (ExitReason.EPT_VIOLATION, "start")
    assert found[F.GUEST_PHYSICAL_ADDRESS] == slot
    assert found[F.GUEST_LINEAR_ADDRESS] == HIGH_SUPERVISOR + 8
    qualification = found[F.EXIT_QUALIFICATION]
    assert qualification & (LINEAR | READ) == OF_TABLES | READ


def test_setting_an_accessed_bit_needs_write_permission_for_the_table(machine: NestedMachine) -> None:
    machine.guest.tables.clear_accessed_and_dirty(HIGH_SUPERVISOR)
    slot = machine.guest.tables.entry_gpa(HIGH_SUPERVISOR)
    table = slot & ~0xFFF
    machine.set_ept(table, table | EPT_WB | EPT_R)
    found = machine.launch("start: mov rax, [rbx]", rbx=HIGH_SUPERVISOR)
    assert (found.reason, found.label) == (ExitReason.EPT_VIOLATION, "start")
    assert found[F.EXIT_QUALIFICATION] & (LINEAR | WRITE) == OF_TABLES | WRITE
    assert machine.guest.accessed_and_dirty(HIGH_SUPERVISOR) == (False, False)


def test_the_idt_during_a_delivery_is_told_with_the_event(machine: NestedMachine) -> None:
    machine.set_ept(layout.IDT_GPA, 0)
    found = machine.launch("start: ud2")
    assert (found.reason, found.label) == (ExitReason.EPT_VIOLATION, "start")
    assert found[F.IDT_VECTORING_INFO_FIELD] == VALID | vmx.INTR_TYPE_HARD_EXCEPTION | UD
    assert found[F.GUEST_LINEAR_ADDRESS] == layout.IDT + UD * layout.GATE_BYTES
    assert found[F.GUEST_PHYSICAL_ADDRESS] == layout.IDT_GPA + UD * layout.GATE_BYTES
    machine.set_ept(layout.IDT_GPA, layout.IDT_GPA | EPT_WB | EPT_RWX)
    # L1 injects what was lost.
    again = {F.VM_ENTRY_INTR_INFO_FIELD: found[F.IDT_VECTORING_INFO_FIELD]}
    assert machine.enter(resume=True, fields=again).vector == UD


def test_the_stack_during_the_delivery_of_int_n_is_told_with_its_length(machine: NestedMachine) -> None:
    stack = layout.IST_STACK_GPA + PAGE
    machine.set_ept(stack, stack | EPT_WB | EPT_R)
    found = machine.launch("start: int 0x80")
    assert (found.reason, found.label) == (ExitReason.EPT_VIOLATION, "start")
    assert found[F.IDT_VECTORING_INFO_FIELD] == VALID | vmx.INTR_TYPE_SOFT_INTR | 0x80
    assert found[F.VM_EXIT_INSTRUCTION_LEN] == 2
    assert found[F.EXIT_QUALIFICATION] & WRITE
    machine.set_ept(stack, stack | EPT_WB | EPT_RWX)
    again = {
        F.VM_ENTRY_INTR_INFO_FIELD: found[F.IDT_VECTORING_INFO_FIELD],
        F.VM_ENTRY_INSTRUCTION_LEN: 2,
    }
    assert machine.enter(resume=True, fields=again).completed


def test_the_delivery_of_a_page_fault_that_exits_has_cr2_set(machine: NestedMachine) -> None:
    machine.set_ept(layout.IDT_GPA, 0)
    found = machine.launch("start: mov rax, [rbx]", rbx=layout.HIGH_ABSENT)
    assert found.reason is ExitReason.EPT_VIOLATION
    code = vmx.INTR_INFO_DELIVER_CODE_MASK
    assert found[F.IDT_VECTORING_INFO_FIELD] == VALID | vmx.INTR_TYPE_HARD_EXCEPTION | code | PF
    assert found[F.IDT_VECTORING_ERROR_CODE] == 0
    assert machine.vcpu.get_sregs().cr2 == layout.HIGH_ABSENT


@pytest.mark.parametrize(
    "entry",
    [
        DATA_GPA | EPT_WB | EPT_W,
        DATA_GPA | EPT_WB | EPT_W | EPT_X,
        DATA_GPA | 2 << 3 | EPT_RWX,
        DATA_GPA | EPT_WB | EPT_RWX | 1 << 50,
    ],
    ids=["write-only", "write and execute", "memory type 2", "beyond physical memory"],
)
@pytest.mark.parametrize("source", ["mov rax, [rbx]", "mov [rbx], rax"])
def test_an_entry_that_means_nothing_is_a_misconfiguration(
    machine: NestedMachine, entry: int, source: str
) -> None:
    machine.set_ept(DATA_GPA, entry)
    found = machine.launch(f"start: {source}", rbx=HIGH_SUPERVISOR)
    assert (found.reason, found.label) == (ExitReason.EPT_MISCONFIG, "start")
    assert found[F.GUEST_PHYSICAL_ADDRESS] == DATA_GPA


def test_ept_marks_what_was_accessed_and_written_only_when_asked(machine: NestedMachine) -> None:
    read, written = layout.DATA_GPA + 0xC000, layout.DATA_GPA + 0xD000
    found = machine.launch("mov rax, [rbx]; mov [rcx], rax", rbx=HIGH_SUPERVISOR, rcx=HIGH_SUPERVISOR + PAGE)
    assert found.completed
    assert not (machine.get_ept(read) | machine.get_ept(written)) & (EPT_A | EPT_D)
    machine.place("mov rax, [rbx]; mov [rcx], rax", fields={F.EPT_POINTER: EPTP | vmx.VMX_EPTP_AD_ENABLE_BIT})
    assert machine.enter(resume=True, rbx=HIGH_SUPERVISOR, rcx=HIGH_SUPERVISOR + PAGE).completed
    flags = EPT_A | EPT_D
    assert (machine.get_ept(read) & flags, machine.get_ept(written) & flags) == (EPT_A, flags)
    # Accesses to the guest's tables count as writes then (SDM 29.3.5).
    root = machine.guest.tables.root
    assert machine.get_ept(root) & flags == flags
    for table in (EPT_PML4, EPT_PDPT, EPT_PD):
        assert machine.memory.load(table, 8) & flags == EPT_A
    assert not machine.get_ept(layout.DATA_GPA) & flags


def test_translations_are_those_of_ept_and_not_of_l1(machine: NestedMachine) -> None:
    machine.memory.store(DATA_GPA, 8, 0x1111)
    machine.memory.store(ELSEWHERE, 8, 0x2222)
    machine.set_ept(DATA_GPA, ELSEWHERE | EPT_WB | EPT_RWX)
    found = machine.launch("mov rax, [rbx]; cpuid; mov rcx, [rbx]", rbx=HIGH_SUPERVISOR)
    assert (found.reason, found.registers.rax) == (ExitReason.CPUID, 0x2222)
    assert machine.step("mov rax, [rbx]; hlt", rbx=HIGH_SUPERVISOR).rax == 0x1111
    # L1 changes the entry, and says so.
    machine.set_ept(DATA_GPA, DATA_GPA | EPT_WB | EPT_RWX)
    machine.memory.store(0x6E000, 8, EPTP)
    machine.step("mov eax, 1; invept rax, xmmword [rbx]; hlt", rbx=UPPER + 0x6E000)
    found = machine.enter(resume=True, rbx=HIGH_SUPERVISOR, fields={F.GUEST_RIP: found.rip + 2})
    assert found.completed
    assert found.registers.rcx == 0x1111


def test_pages_of_2_mib_and_1_gib_map_what_they_say(machine: NestedMachine) -> None:
    machine.memory.store(DATA_GPA, 8, 0x77)
    machine.memory.store(EPT_PD, 8, EPT_PS | EPT_WB | EPT_RWX)
    found = machine.launch("mov rax, [rbx]", rbx=HIGH_SUPERVISOR)
    assert found.completed
    assert found.registers.rax == 0x77
    machine.place("mov rax, [rbx]")
    machine.memory.store(EPT_PDPT, 8, EPT_PS | EPT_WB | EPT_RWX)
    found = machine.enter(resume=True, rbx=HIGH_SUPERVISOR)
    assert found.completed
    assert found.registers.rax == 0x77


@pytest.mark.parametrize("table", [EPT_PD, EPT_PDPT])
def test_a_large_page_with_an_address_that_is_not_aligned_is_a_misconfiguration(
    machine: NestedMachine, table: int
) -> None:
    machine.memory.store(table, 8, 0x3000 | EPT_PS | EPT_WB | EPT_RWX)
    assert machine.launch("nop").reason is ExitReason.EPT_MISCONFIG


def test_permissions_of_upper_levels_count(machine: NestedMachine) -> None:
    machine.memory.store(EPT_PD, 8, EPT_PT | EPT_R | EPT_X)
    found = machine.launch("start: mov [rbx], rax", rbx=HIGH_SUPERVISOR)
    assert found.reason is ExitReason.EPT_VIOLATION
    assert found[F.EXIT_QUALIFICATION] & (7 << 3 | WRITE) == allowed(EPT_R | EPT_X) | WRITE


@pytest.mark.parametrize("engine", ENGINES)
def test_l2_reads_what_l1_has_no_memory_for_as_an_access_of_the_vmms(engine: str) -> None:
    machine = nested_machine(engine).reset()  # type: ignore[arg-type]
    machine.use_ept()
    machine.set_ept(DATA_GPA, 0x4000_0000 | EPT_WB | EPT_RWX)
    machine.place("mov eax, [rbx]; nop")
    machine.begin(rbx=HIGH_SUPERVISOR + 0x10)
    found = machine.vcpu.run()
    assert type(found).__name__ == "MmioExit"
    assert found.gpa == 0x4000_0010  # type: ignore[union-attr]
    found.data = 0x1234  # type: ignore[union-attr]
    assert machine.finish().registers.rax == 0x1234


# ------------------------------------------------------------------------------------------------- unrestricted guests


def real_mode(cs: int) -> dict[F, int]:
    fields: dict[F, int] = {
        F.GUEST_CR0: CR0_NE,
        F.GUEST_CR4: 1 << 13,
        F.GUEST_RFLAGS: 2,
        F.GUEST_IA32_EFER: 0,
    }
    for name in ("ES", "CS", "SS", "DS", "FS", "GS"):
        base = cs if name == "CS" else 0
        fields |= {
            F[f"GUEST_{name}_SELECTOR"]: base >> 4,
            F[f"GUEST_{name}_BASE"]: base,
            F[f"GUEST_{name}_LIMIT"]: 0xFFFF,
            F[f"GUEST_{name}_AR_BYTES"]: 0x9B if name == "CS" else 0x93,
        }
    fields |= {F.GUEST_TR_AR_BYTES: 0x8B, F.GUEST_TR_LIMIT: 0x67, F.GUEST_LDTR_AR_BYTES: 0x10000}
    return fields | {F.GUEST_IDTR_BASE: 0, F.GUEST_IDTR_LIMIT: 0x3FF, F.GUEST_GDTR_BASE: 0x1000}


def start_in_real_mode(machine: NestedMachine, source: str) -> None:
    machine.use_ept(vmx.SECONDARY_EXEC_UNRESTRICTED_GUEST)
    fields = machine.read()
    machine.memory.write(0x7C00, assemble(source, 0x7C00, 16).code)
    controls = fields[F.VM_ENTRY_CONTROLS] & ~vmx.VM_ENTRY_IA32E_MODE
    machine.write(real_mode(0) | {F.GUEST_RIP: 0x7C00, F.GUEST_RSP: 0x7000, F.VM_ENTRY_CONTROLS: controls})


def test_an_unrestricted_guest_runs_in_real_mode(machine: NestedMachine) -> None:
    start_in_real_mode(machine, "mov ax, 0x1234; mov [0x7e00], ax; cpuid")
    found = machine.enter()
    assert found.reason is ExitReason.CPUID
    assert machine.memory.load(0x7E00, 2) == 0x1234
    assert not found[F.GUEST_CR0] & (CR0_PE | CR0_PG)


def test_an_interrupt_in_real_mode_goes_through_the_vector_table(machine: NestedMachine) -> None:
    start_in_real_mode(machine, "int 0x21; hlt")
    machine.memory.store(0x21 * 4, 4, 0x7D00)
    machine.memory.write(0x7D00, bytes.fromhex("f4"))
    found = machine.enter()
    assert (found.reason, found.rip) == (ExitReason.HLT, 0x7D00)
    assert machine.memory.load(found[F.GUEST_RSP], 2) == 0x7C02


def test_an_unrestricted_guest_enters_protected_mode_by_itself(machine: NestedMachine) -> None:
    start_in_real_mode(machine, "mov eax, cr0; or al, 1; mov cr0, eax; mov ebx, eax; cpuid")
    found = machine.enter()
    assert found.reason is ExitReason.CPUID
    assert found[F.GUEST_CR0] & (CR0_PE | CR0_PG) == CR0_PE
    assert found.registers.rbx & 1
    # What it has become can be entered again.
    assert machine.enter(resume=True, fields={F.GUEST_RIP: found.rip}).reason is ExitReason.CPUID


def test_a_violation_in_real_mode_has_the_physical_address(machine: NestedMachine) -> None:
    start_in_real_mode(machine, "mov ax, [0x7e00]; cpuid")
    machine.set_ept(0x7000, 0x7000 | EPT_WB | EPT_X)
    found = machine.enter()
    assert (found.reason, found.rip) == (ExitReason.EPT_VIOLATION, 0x7C00)
    assert found[F.GUEST_PHYSICAL_ADDRESS] == found[F.GUEST_LINEAR_ADDRESS] == 0x7E00
