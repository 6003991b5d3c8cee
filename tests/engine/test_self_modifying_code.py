"""Code that changes: the next execution of a changed instruction executes what memory holds."""

from __future__ import annotations

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import HIGH_SUPERVISOR, KERNEL_CODE, LOW_USER, UPPER
from lasskvm.kvm import IoExit
from lasskvm.memory import CODE_STORES_KEPT, PAGE_SIZE, TABLE_CODE_STORES
from lasskvm.state import TLB_FLUSH
from lasskvm.x86.exceptions import GP, PF, UD
from lasskvm.x86.paging import PTE_P, PTE_U

#: MOV EAX, imm32; RET: the immediate is at offset 1.
RETURN_1 = assemble("mov eax, 1; ret", 0).code
ALIAS = LOW_USER + 0x10000
HANDLER = KERNEL_CODE + 0x1000
READ_ONLY = PTE_P | PTE_U


def test_function_rewritten_between_two_calls(guest: Guest) -> None:
    guest.write(LOW_USER, RETURN_1)
    outcome = guest.execute("call rbx; mov r8, rax; mov byte [rbx + 1], 2; call rbx", cpl=3, rbx=LOW_USER)
    assert outcome.completed
    assert (outcome.registers.r8, outcome.registers.rax) == (1, 2)


def test_function_rewritten_many_times(guest: Guest) -> None:
    guest.write(LOW_USER, RETURN_1)
    outcome = guest.execute(
        "xor r8, r8; again: mov [rbx + 1], ecx; call rbx; add r8, rax; dec ecx; jne again",
        cpl=3,
        rbx=LOW_USER,
        rcx=100,
    )
    assert outcome.completed
    assert outcome.registers.r8 == 5050


def test_instruction_rewritten_by_the_one_before_it(guest: Guest) -> None:
    """Within one block: the store and the changed instruction are neighbours."""
    guest.write(
        LOW_USER, assemble("mov byte [rip + changed + 1], 7; changed: mov eax, 1; int 0x80", LOW_USER).code
    )
    outcome = guest.execute("jmp rbx", cpl=3, rbx=LOW_USER)
    assert outcome.completed
    assert outcome.registers.rax == 7


def test_loop_that_rewrites_its_own_body(guest: Guest) -> None:
    loop = (
        "again: inc byte [rip + changed + 1]; changed: mov eax, 0; add r8, rax; dec ecx; jne again; int 0x80"
    )
    guest.write(LOW_USER, assemble(loop, LOW_USER).code)
    outcome = guest.execute("jmp rbx", cpl=3, rbx=LOW_USER, rcx=20)
    assert outcome.completed
    assert outcome.registers.r8 == 210


def test_store_through_a_writable_alias_of_an_executable_page(guest: Guest) -> None:
    guest.tables.set_entry(LOW_USER, layout.DATA_GPA | READ_ONLY)
    guest.tables.map(ALIAS, layout.DATA_GPA, PTE_U)
    guest.memory.write(layout.DATA_GPA, RETURN_1)
    outcome = guest.execute(
        "again: mov [rdi + 1], ecx; call rbx; add r8, rax; dec ecx; jne again",
        cpl=3,
        rbx=LOW_USER,
        rdi=ALIAS,
        rcx=50,
    )
    assert outcome.completed
    assert outcome.registers.r8 == 1275


def test_two_executable_aliases_of_a_page(guest: Guest) -> None:
    guest.tables.map(ALIAS, layout.DATA_GPA, PTE_U)
    guest.memory.write(layout.DATA_GPA, RETURN_1)
    outcome = guest.execute(
        "call rbx; call rdi; mov byte [rbx + 1], 5; call rdi; mov r8, rax; mov byte [rdi + 1], 6; call rbx",
        cpl=3, rbx=LOW_USER, rdi=ALIAS,
    )  # fmt: skip
    assert outcome.completed
    assert (outcome.registers.r8, outcome.registers.rax) == (5, 6)


def test_kernel_writes_code_that_user_mode_has_executed(guest: Guest) -> None:
    """Through the kernel's own mapping, as a debugger inserts a breakpoint."""
    guest.memory.write(layout.DATA_GPA, RETURN_1)
    guest.place(assemble("mov byte [rsi], 9; iretq", KERNEL_CODE))
    layout.set_gate(guest.memory, 3, KERNEL_CODE, dpl=3)
    outcome = guest.execute(
        "call rbx; mov r8, rax; int3; call rbx", cpl=3, rbx=LOW_USER, rsi=UPPER + layout.DATA_GPA + 1
    )
    assert outcome.completed
    assert (outcome.registers.r8, outcome.registers.rax) == (1, 9)


def test_code_written_across_a_page_boundary(guest: Guest) -> None:
    start = LOW_USER + PAGE_SIZE - 3
    guest.write(start, RETURN_1)
    outcome = guest.execute(
        "call rbx; mov r8, rax; mov dword [rbx + 1], 0x01020304; call rbx", cpl=3, rbx=start
    )
    assert outcome.completed
    assert (outcome.registers.r8, outcome.registers.rax) == (1, 0x01020304)


def test_string_instruction_that_copies_code(guest: Guest) -> None:
    guest.write(LOW_USER, RETURN_1)
    guest.write(LOW_USER + 0x800, assemble("mov eax, 42; ret", 0).code)
    outcome = guest.execute(
        "call rbx; mov r8, rax; mov ecx, 6; rep movsb; call rbx",
        cpl=3, rbx=LOW_USER, rsi=LOW_USER + 0x800, rdi=LOW_USER,
    )  # fmt: skip
    assert outcome.completed
    assert (outcome.registers.r8, outcome.registers.rax) == (1, 42)


def test_locked_and_sse_stores_reach_code(guest: Guest) -> None:
    guest.write(LOW_USER, RETURN_1)
    guest.write(LOW_USER + 0x800, assemble("mov eax, 8; ret", 0).code.ljust(16, b"\x90"))
    outcome = guest.execute(
        "call rbx; lock inc byte [rbx + 1]; call rbx; mov r8, rax; movups xmm0, [rsi]; movups [rbx], xmm0; call rbx",
        cpl=3, rbx=LOW_USER, rsi=LOW_USER + 0x800,
    )  # fmt: skip
    assert outcome.completed
    assert (outcome.registers.r8, outcome.registers.rax) == (2, 8)


def test_page_table_change_brings_other_code(guest: Guest) -> None:
    """The same linear address, another physical page: no store to code is involved."""
    entry = guest.tables.entry_gpa(HIGH_SUPERVISOR)
    window = layout.HIGH_USER
    guest.tables.map(window, entry & -PAGE_SIZE)
    for number in (1, 2):
        gpa = layout.DATA_GPA + 0x1000 * number
        guest.memory.write(gpa, assemble(f"mov eax, {number}; ret", 0).code)
    guest.tables.map(HIGH_SUPERVISOR, layout.DATA_GPA + 0x1000)
    outcome = guest.execute(
        "call rbx; mov r8, rax; mov [rdi], rsi; invlpg [rbx]; call rbx",
        rbx=HIGH_SUPERVISOR, rdi=window + entry % PAGE_SIZE, rsi=layout.DATA_GPA + 0x2000 | 3,
    )  # fmt: skip
    assert outcome.completed
    assert (outcome.registers.r8, outcome.registers.rax) == (1, 2)


def test_vmm_writes_code_between_two_runs(guest: Guest) -> None:
    guest.write(HIGH_SUPERVISOR, RETURN_1)
    guest.start("again: call rbx; out 0x99, al; jmp again", rbx=HIGH_SUPERVISOR)
    for value in (1, 3, 4, 5):
        guest.write(HIGH_SUPERVISOR, assemble(f"mov eax, {value}; ret", 0).code)
        assert guest.vcpu.run() == IoExit(port=0x99, size=1, write=True, data=value)


def test_exception_frame_on_a_page_with_executed_code(guest: Guest) -> None:
    """Delivery pushes its frame over code that has been executed; what runs there afterwards is the frame's bytes."""
    top = HIGH_SUPERVISOR + 0x800
    slot = top - 8 * 5
    guest.write(slot, RETURN_1)
    guest.place(assemble("call rbx; ud2", HANDLER))
    layout.set_gate(guest.memory, 3, HANDLER)
    outcome = guest.execute("call rbx; mov rsp, rcx; int3; after: nop", rbx=slot, rcx=top)
    assert guest.read(slot) == outcome.program.labels["after"]
    assert outcome.rip in range(slot, slot + 8)


def test_page_fault_frame_on_a_page_with_executed_code(guest: Guest) -> None:
    """The same where delivery does not leave native code: the error code, 0, lies at the slot (ADD [RAX], AL)."""
    top = HIGH_SUPERVISOR + 0x800
    slot = top - 8 * 6
    guest.write(slot, RETURN_1)
    guest.place(assemble("call rbx; ud2", HANDLER))
    layout.set_gate(guest.memory, PF, HANDLER)
    program = "call rbx; xor eax, eax; mov rsp, rcx; mov rdx, [rsi]"
    outcome = guest.execute(program, rbx=slot, rcx=top, rsi=layout.HIGH_ABSENT)
    assert guest.read(slot) == 0
    assert (outcome.vector, outcome.rip, outcome.registers.rax) == (GP, slot, 0)


def test_undefined_instruction_made_valid_by_its_own_handler(guest: Guest) -> None:
    guest.place(assemble("mov word [rsi], 0x9090; iretq", KERNEL_CODE))
    layout.set_gate(guest.memory, UD, KERNEL_CODE)
    guest.write(LOW_USER, bytes((0x0F, 0x0B)) + assemble("mov eax, 5; int 0x80", 0).code)
    outcome = guest.execute("jmp rbx", cpl=3, rbx=LOW_USER, rsi=UPPER + guest.gpa(LOW_USER))
    assert outcome.completed
    assert outcome.registers.rax == 5


def test_when_more_stores_than_are_kept_have_hit_code_all_of_it_is_forgotten() -> None:
    """Stores of walks and event delivery are noted, up to a number, until the next fill."""
    guest = Guest()
    program = guest.start("mov eax, 1")
    start = guest.vcpu.get_regs()
    assert guest.run().registers.rax == 1
    gpa = guest.gpa(program.address) + 1
    slot = guest.memory.find(gpa)
    assert slot is not None
    # As such a store does it, which nobody else hears of.
    slot.view[gpa - slot.gpa] = 2
    guest.memory.table[TABLE_CODE_STORES] = CODE_STORES_KEPT + 1
    guest.vcpu.state.words[TLB_FLUSH] = 1
    guest.vcpu.set_regs(start)
    assert guest.run().registers.rax == 2
    assert guest.memory.table[TABLE_CODE_STORES] == 0
