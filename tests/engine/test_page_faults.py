"""Page faults: exact error codes, exact CR2, and nothing done by an instruction that faults."""

from __future__ import annotations

import pytest

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.guest import CR2_UNTOUCHED, Guest
from lasskvm.conformance.layout import (
    HIGH_SUPERVISOR,
    HIGH_USER,
    KERNEL_CODE,
    LOW_USER,
    UPPER,
)
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.exceptions import PF, PF_I, PF_P, PF_RSVD, PF_U, PF_W
from lasskvm.x86.paging import PTE_P, PTE_U, PTE_W, PTE_XD
from lasskvm.x86.registers import CR0_WP, CR4_LASS, CR4_SMEP, EFER_NXE

FRAME = layout.DATA_GPA
RESERVED_BIT = 1 << 50
READ_MODIFY_WRITES = (
    "add [rbx], rax", "inc qword [rbx]", "not qword [rbx]", "xchg [rbx], rax", "lock xadd [rbx], rax",
    "cmpxchg [rbx], rcx", "shl qword [rbx], 3", "bts [rbx], rcx", "shld [rbx], rax, 4", "lock inc dword [rbx]",
    "cmpxchg8b [rbx]",
)  # fmt: skip


def page_fault(guest: Guest, source: str, *, cpl: int = 0, **registers: int) -> tuple[int, int]:
    """The error code and CR2 of the #PF that the last instruction of *source* must raise."""
    outcome = guest.execute(f"fault: {source}", cpl=cpl, **registers)
    assert outcome.vector == PF, str(outcome)
    assert outcome.label == "fault"
    assert outcome.error_code is not None
    return outcome.error_code, outcome.cr2


@pytest.mark.parametrize(
    ("source", "access"), [("mov rax, [rbx]", 0), ("mov [rbx], rax", PF_W), ("push qword [rbx]", 0)]
)
@pytest.mark.parametrize("cpl", [0, 3])
def test_reserved_bit(guest: Guest, source: str, access: int, cpl: int) -> None:
    page = LOW_USER if cpl == 3 else HIGH_SUPERVISOR
    guest.tables.set_entry(page, FRAME | PTE_P | PTE_W | PTE_U * (cpl == 3) | RESERVED_BIT)
    user = PF_U if cpl == 3 else 0
    assert page_fault(guest, source, cpl=cpl, rbx=page + 8) == (PF_P | PF_RSVD | access | user, page + 8)


def test_nx_is_a_reserved_bit_without_efer_nxe(guest: Guest) -> None:
    guest.tables.map(HIGH_SUPERVISOR, FRAME, PTE_XD)
    assert guest.execute("mov rax, [rbx]", rbx=HIGH_SUPERVISOR).completed
    guest.efer &= ~EFER_NXE
    assert page_fault(guest, "mov rax, [rbx]", rbx=HIGH_SUPERVISOR) == (PF_P | PF_RSVD, HIGH_SUPERVISOR)


@pytest.mark.parametrize("cpl", [0, 3])
def test_fetch_from_an_nx_page(guest: Guest, cpl: int) -> None:
    page = LOW_USER if cpl == 3 else HIGH_SUPERVISOR
    guest.tables.map(page, FRAME, PTE_XD | PTE_U * (cpl == 3))
    outcome = guest.execute("jmp rbx", cpl=cpl, rbx=page)
    assert (outcome.vector, outcome.error_code, outcome.rip, outcome.cr2) == (
        PF, PF_P | PF_I | PF_U * (cpl == 3), page, page,
    )  # fmt: skip


def test_fetch_reports_no_i_bit_without_nx_and_smep(guest: Guest) -> None:
    guest.efer &= ~EFER_NXE
    guest.cr4 &= ~CR4_SMEP
    outcome = guest.execute("jmp rbx", rbx=layout.HIGH_ABSENT)
    assert (outcome.vector, outcome.error_code, outcome.cr2) == (PF, 0, layout.HIGH_ABSENT)


def test_supervisor_write_to_a_read_only_page_obeys_wp(guest: Guest) -> None:
    guest.tables.set_entry(HIGH_SUPERVISOR, FRAME | PTE_P)
    assert page_fault(guest, "mov [rbx], rax", rbx=HIGH_SUPERVISOR) == (PF_P | PF_W, HIGH_SUPERVISOR)
    guest.cr0 &= ~CR0_WP
    assert guest.execute("mov [rbx], rax", rbx=HIGH_SUPERVISOR).completed


def test_user_write_to_a_read_only_page_does_not(guest: Guest) -> None:
    guest.tables.set_entry(LOW_USER, FRAME | PTE_P | PTE_U)
    guest.cr0 &= ~CR0_WP
    assert page_fault(guest, "mov [rbx], rax", cpl=3, rbx=LOW_USER) == (PF_P | PF_W | PF_U, LOW_USER)


@pytest.mark.parametrize("source", READ_MODIFY_WRITES)
@pytest.mark.parametrize("cpl", [0, 3])
def test_read_modify_write_of_an_absent_page_reports_a_write(guest: Guest, source: str, cpl: int) -> None:
    page = layout.LOW_ABSENT if cpl == 3 else layout.HIGH_ABSENT
    assert page_fault(guest, source, cpl=cpl, rbx=page) == (PF_W | PF_U * (cpl == 3), page)


@pytest.mark.parametrize("source", READ_MODIFY_WRITES)
def test_read_modify_write_of_a_read_only_page_changes_nothing(guest: Guest, source: str) -> None:
    guest.tables.set_entry(LOW_USER, FRAME | PTE_P | PTE_U)
    outcome = guest.execute(f"fault: {source}", cpl=3, rbx=LOW_USER, rax=5, rcx=1)
    assert (outcome.vector, outcome.error_code, outcome.label) == (PF, PF_P | PF_W | PF_U, "fault")
    assert guest.read(LOW_USER) == 0
    assert (outcome.registers.rax, outcome.registers.rcx) == (5, 1)


@pytest.mark.parametrize(
    "source", ["cmp [rbx], rax", "test [rbx], rax", "bt [rbx], rcx", "cmp qword [rbx], 5", "mul qword [rbx]"]
)
def test_instructions_that_share_opcodes_with_read_modify_writes_report_a_read(
    guest: Guest, source: str
) -> None:
    assert page_fault(guest, source, cpl=3, rbx=layout.LOW_ABSENT) == (PF_U, layout.LOW_ABSENT)


def test_bit_string_far_from_its_operand_reports_a_write(guest: Guest) -> None:
    code, cr2 = page_fault(
        guest, "bts [rbx], rcx", cpl=3, rbx=LOW_USER, rcx=(layout.LOW_ABSENT - LOW_USER) * 8
    )
    assert (code, cr2) == (PF_W | PF_U, layout.LOW_ABSENT)


@pytest.fixture
def half_mapped(guest: Guest) -> Guest:
    """A guest whose second page at ``HIGH_SUPERVISOR`` is absent; the first is full of 55H."""
    guest.write(HIGH_SUPERVISOR, b"\x55" * PAGE_SIZE)
    guest.tables.unmap(HIGH_SUPERVISOR + PAGE_SIZE)
    return guest


@pytest.mark.parametrize(
    ("source", "offset", "access"),
    [
        ("mov rax, [rbx]", 4, 0),
        ("mov [rbx], rax", 4, PF_W),
        ("mov [rbx], ax", 1, PF_W),
        ("add [rbx], rax", 4, PF_W),
        ("lock xadd [rbx], rax", 4, PF_W),
        ("movups xmm0, [rbx]", 8, 0),
        ("movups [rbx], xmm0", 8, PF_W),
        ("fld qword [rbx]", 1, 0),
        ("fstp qword [rbx]", 7, PF_W),
    ],
)
def test_access_into_an_absent_second_page_reports_that_page(
    half_mapped: Guest, source: str, offset: int, access: int
) -> None:
    second = HIGH_SUPERVISOR + PAGE_SIZE
    code, cr2 = page_fault(half_mapped, source, rbx=second - offset, rax=0x1122334455667788)
    assert (code, cr2) == (access, second)
    assert half_mapped.read(second - 8) == 0x5555555555555555


def test_push_into_a_read_only_first_page_leaves_both_pages_alone(guest: Guest) -> None:
    second = HIGH_SUPERVISOR + PAGE_SIZE
    guest.tables.set_entry(HIGH_SUPERVISOR, guest.tables.frame(HIGH_SUPERVISOR) | PTE_P)
    assert page_fault(guest, "push rax", rsp=second + 4, rax=2**64 - 1) == (PF_P | PF_W, second - 4)
    assert guest.read(second - 8) == guest.read(second) == 0


def test_repeated_string_store_stops_where_it_faults(half_mapped: Guest) -> None:
    second = HIGH_SUPERVISOR + PAGE_SIZE
    outcome = half_mapped.execute("fault: rep stosb", rdi=second - 3, rcx=10, rax=0xAA)
    assert (outcome.vector, outcome.error_code, outcome.cr2, outcome.label) == (PF, PF_W, second, "fault")
    assert (outcome.registers.rcx, outcome.registers.rdi) == (7, second)
    assert half_mapped.read(second - 4, 4) == 0xAAAAAA55


def test_repeated_move_stops_where_its_source_faults(half_mapped: Guest) -> None:
    second = HIGH_SUPERVISOR + PAGE_SIZE
    outcome = half_mapped.execute("fault: rep movsw", rsi=second - 4, rdi=UPPER + 0x60000, rcx=5)
    assert (outcome.vector, outcome.error_code, outcome.cr2) == (PF, 0, second)
    assert (outcome.registers.rcx, outcome.registers.rsi, outcome.registers.rdi) == (
        3,
        second,
        UPPER + 0x60004,
    )


def test_pop_to_memory_that_faults_leaves_rsp(guest: Guest) -> None:
    outcome = guest.execute("push 5; fault: pop qword [rbx]", rbx=layout.HIGH_ABSENT)
    assert (outcome.vector, outcome.error_code, outcome.cr2) == (PF, PF_W, layout.HIGH_ABSENT)
    assert outcome.rsp == layout.KERNEL_STACK_TOP - 8


def test_accessed_then_dirty(guest: Guest) -> None:
    guest.execute("mov rax, [rbx]", cpl=3, rbx=LOW_USER)
    assert guest.accessed_and_dirty(LOW_USER) == (True, False)
    guest.execute("mov rax, [rbx]; mov [rbx], rax", cpl=3, rbx=LOW_USER)
    assert guest.accessed_and_dirty(LOW_USER) == (True, True)


def test_write_after_a_read_of_a_clean_page_sets_the_dirty_bit_in_one_run(guest: Guest) -> None:
    assert guest.execute("mov rax, [rbx]; mov [rbx], rax", rbx=HIGH_SUPERVISOR).completed
    assert guest.accessed_and_dirty(HIGH_SUPERVISOR) == (True, True)


def test_handler_that_maps_the_page_lets_the_instruction_run_again(guest: Guest) -> None:
    entry = guest.tables.entry_gpa(layout.LOW_ABSENT)
    guest.tables.map(HIGH_SUPERVISOR, entry & -PAGE_SIZE)
    guest.place(assemble("mov [rdi], rsi; add rsp, 8; iretq", KERNEL_CODE))
    layout.set_gate(guest.memory, PF, KERNEL_CODE, ist=layout.IST)
    outcome = guest.execute(
        "mov [rbx], r8", cpl=3, rbx=layout.LOW_ABSENT, r8=0x77,
        rdi=HIGH_SUPERVISOR + entry % PAGE_SIZE, rsi=FRAME | PTE_P | PTE_W | PTE_U,
    )  # fmt: skip
    assert outcome.completed
    assert guest.memory.load(FRAME, 8) == 0x77


def test_invlpg_makes_a_changed_entry_valid(guest: Guest) -> None:
    entry = guest.tables.entry_gpa(HIGH_SUPERVISOR)
    window = HIGH_USER + PAGE_SIZE
    guest.tables.map(window, entry & -PAGE_SIZE)
    guest.memory.write(FRAME, (0x1111).to_bytes(8, "little"))
    guest.memory.write(FRAME + 0x3000, (0x2222).to_bytes(8, "little"))
    guest.tables.map(HIGH_SUPERVISOR, FRAME)
    outcome = guest.execute(
        "mov rax, [rbx]; mov [rdi], rsi; invlpg [rbx]; mov rcx, [rbx]",
        rbx=HIGH_SUPERVISOR, rdi=window + entry % PAGE_SIZE, rsi=FRAME + 0x3000 | PTE_P | PTE_W,
    )  # fmt: skip
    assert outcome.completed
    assert (outcome.registers.rax, outcome.registers.rcx) == (0x1111, 0x2222)


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("split", [False, True])
def test_fetch_into_an_absent_page_comes_after_the_instructions_before_it(
    guest: Guest, cpl: int, split: bool
) -> None:
    """Straight: the next instruction begins on the absent page. Split: it begins before it and reaches into it."""
    page = LOW_USER if cpl == 3 else HIGH_SUPERVISOR
    guest.tables.unmap(page + PAGE_SIZE)
    code = assemble("mov rbx, 0; inc rbx; inc rbx; inc rbx", page).code + (b"\x48" if split else b"")
    start = page + PAGE_SIZE - len(code)
    guest.write(start, code)
    outcome = guest.execute("jmp r8", cpl=cpl, r8=start)
    assert (outcome.vector, outcome.error_code) == (PF, PF_I | PF_U * (cpl == 3))
    assert outcome.cr2 == page + PAGE_SIZE
    assert outcome.rip == page + PAGE_SIZE - split
    assert outcome.registers.rbx == 3


def test_fetch_into_a_supervisor_page_comes_after_the_instructions_before_it(guest: Guest) -> None:
    guest.tables.map(LOW_USER + PAGE_SIZE, FRAME)
    code = assemble("inc rbx; inc rbx", LOW_USER).code
    guest.write(LOW_USER + PAGE_SIZE - len(code), code)
    outcome = guest.execute("jmp r8", cpl=3, r8=LOW_USER + PAGE_SIZE - len(code))
    assert (outcome.vector, outcome.error_code, outcome.rip) == (PF, PF_P | PF_U | PF_I, LOW_USER + PAGE_SIZE)
    assert outcome.registers.rbx == 2


def test_instruction_across_two_pages_runs(guest: Guest) -> None:
    code = assemble("mov rax, 0x1122334455667788; int 0x80", LOW_USER).code
    guest.write(LOW_USER + PAGE_SIZE - 5, code)
    outcome = guest.execute("jmp r8", cpl=3, r8=LOW_USER + PAGE_SIZE - 5)
    assert outcome.completed
    assert outcome.registers.rax == 0x1122334455667788


def test_fault_in_an_earlier_instruction_wins_over_the_missing_page_behind_it(guest: Guest) -> None:
    guest.tables.unmap(LOW_USER + PAGE_SIZE)
    code = assemble("mov rax, [rbx]; nop", LOW_USER).code
    start = LOW_USER + PAGE_SIZE - len(code)
    guest.write(start, code)
    outcome = guest.execute("jmp r8", cpl=3, r8=start, rbx=layout.LOW_ABSENT)
    assert (outcome.vector, outcome.error_code, outcome.cr2, outcome.rip) == (
        PF,
        PF_U,
        layout.LOW_ABSENT,
        start,
    )


def test_execution_at_address_zero_is_nothing_special(guest: Guest) -> None:
    guest.cr4 &= ~CR4_LASS
    guest.tables.map(0, FRAME)
    guest.write(0, assemble("mov ecx, 0x77; int 0x80", 0).code)
    outcome = guest.execute("xor eax, eax; jmp rax")
    assert outcome.completed
    assert outcome.registers.rcx == 0x77


def test_cr2_is_not_touched_by_other_faults(guest: Guest) -> None:
    outcome = guest.execute("ud2", cpl=3)
    assert outcome.cr2 == CR2_UNTOUCHED
