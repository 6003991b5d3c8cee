"""Canonical rule, LASS and paging in their order, at the edges of the address space."""

from __future__ import annotations

import pytest

from lasskvm.conformance import layout
from lasskvm.conformance.guest import CR2_UNTOUCHED, Guest
from lasskvm.conformance.layout import HIGH_SUPERVISOR, LOW_SUPERVISOR, LOW_USER
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.exceptions import GP, PF, PF_P, PF_RSVD, SS
from lasskvm.x86.paging import PTE_P, PTE_U, PTE_W
from lasskvm.x86.registers import CR4_LASS, RFLAGS_AC

FIRST_NOT_CANONICAL = 1 << 47
LAST_PAGE = (1 << 64) - PAGE_SIZE
WRAPPING = (1 << 64) - 4
#: A page-table bit beyond the 46 physical address bits of the model.
RESERVED_BIT = 1 << 50


@pytest.mark.parametrize("lass", [False, True])
@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize(
    "address", [FIRST_NOT_CANONICAL, 1 << 62, 1 << 63, (1 << 64) - FIRST_NOT_CANONICAL - 8]
)
def test_address_that_is_not_canonical_is_gp(guest: Guest, address: int, cpl: int, lass: bool) -> None:
    guest.cr4 = guest.cr4 & ~CR4_LASS | CR4_LASS * lass
    outcome = guest.execute("fault: mov rax, [rbx]", cpl=cpl, rbx=address, rflags=RFLAGS_AC)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
    assert outcome.cr2 == CR2_UNTOUCHED


@pytest.mark.parametrize("source", ["push rax", "pop rax", "mov rax, [rbp]", "call rax", "ret"])
@pytest.mark.parametrize("cpl", [0, 3])
def test_stack_access_that_is_not_canonical_is_ss(guest: Guest, source: str, cpl: int) -> None:
    address = 1 << 62
    outcome = guest.execute(f"fault: {source}", cpl=cpl, rsp=address, rbp=address)
    assert (outcome.vector, outcome.error_code, outcome.label) == (SS, 0, "fault")
    assert outcome.rsp == address


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("mapped", [False, True])
def test_access_across_the_canonical_boundary_is_gp_even_if_its_page_is_absent(
    guest: Guest, cpl: int, mapped: bool
) -> None:
    page = FIRST_NOT_CANONICAL - PAGE_SIZE
    if mapped:
        guest.tables.map(page, layout.DATA_GPA, PTE_U)
    outcome = guest.execute("fault: mov rax, [rbx]", cpl=cpl, rbx=FIRST_NOT_CANONICAL - 4, rflags=RFLAGS_AC)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
    assert outcome.cr2 == CR2_UNTOUCHED


def test_last_canonical_bytes_of_the_lower_half_can_be_read(guest: Guest) -> None:
    guest.tables.map(FIRST_NOT_CANONICAL - PAGE_SIZE, layout.DATA_GPA, PTE_U)
    assert guest.execute("mov rax, [rbx]", cpl=3, rbx=FIRST_NOT_CANONICAL - 8).completed


@pytest.fixture
def wrapping(guest: Guest) -> Guest:
    """A guest with the last page and the first one mapped, and 11223344_55667788H across the wrap."""
    guest.tables.map(LAST_PAGE, layout.DATA_GPA)
    guest.tables.map(0, layout.DATA_GPA + PAGE_SIZE)
    guest.write(LAST_PAGE + PAGE_SIZE - 4, (0x55667788).to_bytes(4, "little"))
    guest.write(0, (0x11223344).to_bytes(4, "little"))
    return guest


def test_access_that_wraps_into_the_lower_half_violates_lass(wrapping: Guest) -> None:
    outcome = wrapping.execute("fault: mov rax, [rbx]", rbx=WRAPPING)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
    assert outcome.cr2 == CR2_UNTOUCHED
    assert wrapping.accessed_and_dirty(LAST_PAGE) == (False, False)


def test_wrapping_store_leaves_the_upper_bytes_alone(wrapping: Guest) -> None:
    outcome = wrapping.execute("fault: mov [rbx], rax", rbx=WRAPPING)
    assert (outcome.vector, outcome.label) == (GP, "fault")
    assert wrapping.read(LAST_PAGE + PAGE_SIZE - 4, 4) == 0x55667788


def test_wrapping_stack_access_is_ss(wrapping: Guest) -> None:
    outcome = wrapping.execute("fault: pop rax", rsp=WRAPPING)
    assert (outcome.vector, outcome.error_code, outcome.label) == (SS, 0, "fault")


@pytest.mark.parametrize(("lass", "rflags"), [(False, 0), (True, RFLAGS_AC)])
def test_wrapping_access_that_lass_allows_reads_both_ends(wrapping: Guest, lass: bool, rflags: int) -> None:
    wrapping.cr4 = wrapping.cr4 & ~CR4_LASS | CR4_LASS * lass
    outcome = wrapping.execute("mov rax, [rbx]", rbx=WRAPPING, rflags=rflags)
    assert outcome.completed
    assert outcome.registers.rax == 0x11223344_55667788


def test_lass_comes_before_reserved_bits(guest: Guest) -> None:
    guest.tables.set_entry(LOW_SUPERVISOR, layout.DATA_GPA | PTE_P | PTE_W | RESERVED_BIT)
    outcome = guest.execute("fault: mov rax, [rbx]", rbx=LOW_SUPERVISOR)
    assert (outcome.vector, outcome.error_code) == (GP, 0)
    guest.cr4 &= ~CR4_LASS
    outcome = guest.execute("fault: mov rax, [rbx]", rbx=LOW_SUPERVISOR)
    assert (outcome.vector, outcome.error_code, outcome.cr2) == (PF, PF_P | PF_RSVD, LOW_SUPERVISOR)


@pytest.mark.parametrize("branch", ["jmp rbx", "call rbx", "push rbx; fault: ret", "push rbx; fault: ret 16"])
@pytest.mark.parametrize("cpl", [0, 3])
def test_near_branch_to_an_address_that_is_not_canonical_faults_itself(
    guest: Guest, branch: str, cpl: int
) -> None:
    """RIP is the branch, and RSP what it was before it."""
    source = branch if "fault" in branch else f"fault: {branch}"
    outcome = guest.execute(source, cpl=cpl, rbx=FIRST_NOT_CANONICAL)
    top = layout.USER_STACK_TOP if cpl == 3 else layout.KERNEL_STACK_TOP
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
    assert outcome.rsp == (top - 8 if "push" in branch else top)


def test_call_to_a_low_address_completes_and_its_target_faults(guest: Guest) -> None:
    outcome = guest.execute("call rbx; after: nop", rbx=LOW_USER, rflags=RFLAGS_AC)
    assert (outcome.vector, outcome.error_code, outcome.rip) == (GP, 0, LOW_USER)
    assert outcome.rsp == layout.KERNEL_STACK_TOP - 8
    assert guest.read(outcome.rsp) == outcome.program.labels["after"]


def test_execution_that_runs_off_the_upper_half_stops_at_address_zero(guest: Guest) -> None:
    guest.tables.map(LAST_PAGE, layout.DATA_GPA)
    guest.tables.map(0, layout.DATA_GPA + PAGE_SIZE)
    guest.write(LAST_PAGE + PAGE_SIZE - 3, bytes((0x48, 0xFF, 0xC0)))  # INC RAX
    outcome = guest.execute("jmp rbx", rbx=LAST_PAGE + PAGE_SIZE - 3)
    assert (outcome.vector, outcome.error_code, outcome.rip) == (GP, 0, 0)
    assert outcome.registers.rax == 1


def test_instruction_that_reaches_across_the_canonical_boundary_faults(guest: Guest) -> None:
    guest.tables.map(FIRST_NOT_CANONICAL - PAGE_SIZE, layout.DATA_GPA, PTE_U)
    guest.write(FIRST_NOT_CANONICAL - 4, bytes((0x90, 0x90, 0x48, 0xFF)))  # two NOPs and the start of INC RAX
    outcome = guest.execute("jmp rbx", cpl=3, rbx=FIRST_NOT_CANONICAL - 4)
    assert (outcome.vector, outcome.error_code, outcome.rip) == (GP, 0, FIRST_NOT_CANONICAL - 2)


def test_upper_half_data_is_the_kernels(guest: Guest) -> None:
    outcome = guest.execute("mov [rbx], rax; mov rcx, [rbx]", rbx=HIGH_SUPERVISOR, rax=0x1234)
    assert outcome.completed
    assert outcome.registers.rcx == 0x1234
