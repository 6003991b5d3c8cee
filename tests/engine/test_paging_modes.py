"""Every paging mode, each with a load, a store, a fetch, and a fault, executed directly."""

from __future__ import annotations

import pytest
from legacy_machine import LegacyMachine

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.guest import Guest
from lasskvm.kvm import HltExit
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.exceptions import GP, PF, PF_P, PF_RSVD, PF_W
from lasskvm.x86.paging import PTE_A, PTE_D, PTE_G, PTE_P, PTE_PS, PTE_U, PTE_W
from lasskvm.x86.registers import CR0_PG, CR4_LA57, CR4_PAE, CR4_PSE

HALTED = HltExit(interrupts_enabled=False)
PRESENT = PTE_P | PTE_W
#: Guest-physical places for tables and for what they map.
DIRECTORY, TABLE, PDPT, UPPER_DIRECTORY = 0x140000, 0x141000, 0x142000, 0x143000
PAGE, FUNCTION = 0x50000, 0x51000
#: 32-bit linear addresses for them, in the upper quarter.
PAGE_GVA, FUNCTION_GVA = 0xC0000000, 0xC0001000
#: The PDPTE for them.
PDPTE = PDPT + 8 * (PAGE_GVA >> 30)
EXERCISE = f"""
    mov ebx, {PAGE_GVA:#x}; mov eax, [ebx]; mov dword [ebx + 4], 0x5678; mov edi, {FUNCTION_GVA:#x}; call edi; hlt
"""


@pytest.fixture
def machine(guest: Guest) -> LegacyMachine:
    legacy = LegacyMachine(guest)
    legacy.memory.write(PAGE, (0x1234).to_bytes(8, "little"))
    legacy.place("mov ecx, 0x9ABC; ret", FUNCTION, 32)
    for table in (DIRECTORY, TABLE, PDPT, UPPER_DIRECTORY):
        legacy.memory.write(table, bytes(PAGE_SIZE))
    return legacy


def paging_on(cr3: int, source: str) -> str:
    return f"mov eax, {cr3:#x}; mov cr3, eax; mov eax, cr0; or eax, {CR0_PG:#x}; mov cr0, eax; {source}"


def check_exercise(machine: LegacyMachine) -> None:
    assert (machine.regs.rax, machine.regs.rcx) == (0x1234, 0x9ABC)
    assert machine.memory.load(PAGE + 4, 4) == 0x5678


def two_level_tables(machine: LegacyMachine) -> None:
    """32-bit paging: the first 4 MiB one to one by a large page, the two pages by a table."""
    machine.memory.store(DIRECTORY, 4, PRESENT | PTE_PS)
    machine.memory.store(DIRECTORY + (PAGE_GVA >> 22) * 4, 4, TABLE | PRESENT)
    machine.memory.store(TABLE, 4, PAGE | PRESENT)
    machine.memory.store(TABLE + 4, 4, FUNCTION | PRESENT)


def test_32_bit_paging(machine: LegacyMachine) -> None:
    two_level_tables(machine)
    assert machine.run_protected(paging_on(DIRECTORY, EXERCISE), cr4=CR4_PSE) == HALTED
    check_exercise(machine)
    assert machine.memory.load(TABLE, 4) == PAGE | PRESENT | PTE_A | PTE_D
    assert machine.memory.load(TABLE + 4, 4) == FUNCTION | PRESENT | PTE_A


def test_32_bit_paging_fault(machine: LegacyMachine) -> None:
    two_level_tables(machine)
    machine.run_protected(
        paging_on(DIRECTORY, f"mov ebx, {PAGE_GVA + 0x2004:#x}; mov [ebx], eax"), cr4=CR4_PSE
    )
    assert machine.vector == PF
    assert machine.stacked(4, 1) == [PF_W]
    assert machine.vcpu.get_sregs().cr2 == PAGE_GVA + 0x2004


@pytest.fixture
def pae(machine: LegacyMachine) -> LegacyMachine:
    """PAE paging tables: the first 2 MiB one to one by a large page, the two pages by a table."""
    machine.memory.store(PDPT, 8, DIRECTORY | PTE_P)
    machine.memory.store(PDPTE, 8, UPPER_DIRECTORY | PTE_P)
    machine.memory.store(DIRECTORY, 8, PRESENT | PTE_PS)
    machine.memory.store(UPPER_DIRECTORY, 8, TABLE | PRESENT)
    machine.memory.store(TABLE, 8, PAGE | PRESENT)
    machine.memory.store(TABLE + 8, 8, FUNCTION | PRESENT)
    return machine


def test_pae_paging(pae: LegacyMachine) -> None:
    assert pae.run_protected(paging_on(PDPT, EXERCISE), cr4=CR4_PAE) == HALTED
    check_exercise(pae)
    assert pae.memory.load(TABLE, 8) == PAGE | PRESENT | PTE_A | PTE_D


def test_pae_pdptes_are_registers(pae: LegacyMachine) -> None:
    """Changing a PDPTE in memory has no effect until CR3 is loaded again."""
    source = f"""
        mov ebx, {PAGE_GVA:#x}; mov dword [{PDPTE:#x}], 0; invlpg [ebx]; mov ecx, [ebx]
        mov eax, cr3; mov cr3, eax; mov edx, [ebx]
    """
    pae.run_protected(paging_on(PDPT, source), cr4=CR4_PAE)
    assert pae.vector == PF
    assert (pae.regs.rcx, pae.vcpu.get_sregs().cr2) == (0x1234, PAGE_GVA)


def test_pae_pdpte_with_a_reserved_bit_is_gp(pae: LegacyMachine) -> None:
    pae.memory.store(PDPT, 8, DIRECTORY | PTE_P | PTE_W)
    pae.run_protected(paging_on(PDPT, "nop"), cr4=CR4_PAE)
    assert pae.vector == GP


@pytest.mark.parametrize("shift", [21, 30], ids=("2MiB", "1GiB"))
def test_large_pages_in_4_level_paging(guest: Guest, shift: int) -> None:
    base = layout.UPPER + 0x80000000
    tables = guest.tables
    tables.entry_gpa(base)
    table = guest.memory.load(tables.root + 8 * (base >> 39 & 0x1FF), 8) & -PAGE_SIZE
    slot = table + 8 * (base >> 30 & 0x1FF)
    if shift == 21:
        table = guest.memory.load(slot, 8) & ((1 << 52) - PAGE_SIZE)
        slot = table + 8 * (base >> 21 & 0x1FF)
    guest.memory.store(slot, 8, PRESENT | PTE_PS | PTE_G)
    guest.memory.write(PAGE, (0x1234).to_bytes(8, "little") + assemble("ret", 0).code)
    outcome = guest.execute(
        "mov rax, [rbx]; mov [rbx + 16], rax; call rdi", rbx=base + PAGE, rdi=base + PAGE + 8
    )
    assert outcome.completed
    assert outcome.registers.rax == guest.memory.load(PAGE + 16, 8) == 0x1234
    assert guest.memory.load(slot, 8) == PRESENT | PTE_PS | PTE_G | PTE_A | PTE_D
    guest.memory.store(slot, 8, PRESENT | PTE_PS | 1 << 13)
    outcome = guest.execute("fault: mov rax, [rbx]", rbx=base + PAGE)
    assert (outcome.vector, outcome.error_code, outcome.label) == (PF, PF_P | PF_RSVD, "fault")


@pytest.fixture(scope="module")
def five_level_guest() -> Guest:
    return Guest("max,+la57", levels=5)


def test_5_level_paging(five_level_guest: Guest) -> None:
    guest = five_level_guest
    guest.reset()
    assert guest.cr4 & CR4_LA57
    user, kernel = 1 << 55, 0xFF00_0000_0000_0000
    guest.tables.map(user, PAGE, PTE_U)
    guest.tables.map(kernel, PAGE)
    guest.memory.write(PAGE, (0x1234).to_bytes(8, "little") + assemble("ret", 0).code)
    for cpl, page in ((3, user), (0, kernel)):
        outcome = guest.execute(
            "mov rax, [rbx]; mov [rbx + 16], rax; call rdi", cpl=cpl, rbx=page, rdi=page + 8
        )
        assert outcome.completed
        assert outcome.registers.rax == 0x1234


def test_lass_splits_57_bit_addresses_by_bit_63_too(five_level_guest: Guest) -> None:
    guest = five_level_guest
    guest.reset()
    outcome = guest.execute("fault: mov rax, [rbx]", cpl=3, rbx=0xFF00_0000_0000_0000)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
    outcome = guest.execute("fault: mov rax, [rbx]", rbx=1 << 55)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
    outcome = guest.execute("fault: mov rax, [rbx]", cpl=3, rbx=1 << 56)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


def test_la57_cannot_be_switched_in_long_mode(five_level_guest: Guest) -> None:
    five_level_guest.reset()
    outcome = five_level_guest.execute("mov rax, cr4; btr rax, 12; fault: mov cr4, rax")
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
