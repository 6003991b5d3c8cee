"""PCID, INVPCID, UMIP, FSGSBASE, RDPID and protection keys in a guest that runs directly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lasskvm.conformance import layout
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import (
    HIGH_ABSENT,
    HIGH_SUPERVISOR,
    KERNEL_CODE,
    LOW_SUPERVISOR,
    LOW_USER,
    TSS_SELECTOR,
    UPPER,
    PageTables,
)
from lasskvm.x86 import msr
from lasskvm.x86.exceptions import DB, GP, NM, PF, PF_P, PF_PK, PF_U, PF_W, UD
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.paging import PTE_G, PTE_KEY_SHIFT, PTE_U
from lasskvm.x86.registers import (
    CR0_TS,
    CR0_WP,
    CR4_FSGSBASE,
    CR4_PCIDE,
    CR4_PKE,
    CR4_PKS,
    CR4_SMAP,
    CR4_TSD,
    CR4_UMIP,
    RFLAGS_AC,
    RFLAGS_TF,
)

NOT_CANONICAL = 1 << 63
#: Where a test maps the page tables for its guest.
TABLES_GVA = UPPER + 0x200000
OLD, NEW = 0x1111, 0x2222


def page_of(gva: int) -> int:
    """The gpa of one of the layout's pages to access."""
    return {LOW_USER: layout.DATA_GPA, HIGH_SUPERVISOR: layout.DATA_GPA + 0xC000}[gva]


def entry_of(guest: Guest, gva: int) -> int:
    """Where the guest itself finds the last-level entry of *gva*."""
    pages = (layout.TABLES_END - layout.TABLES_GPA) // layout.PAGE_SIZE
    guest.tables.map(TABLES_GVA, layout.TABLES_GPA, pages=pages)
    return TABLES_GVA + guest.tables.entry_gpa(gva) - layout.TABLES_GPA


# ------------------------------------------------------------------------------------------------------- PCID


def second_root(guest: Guest) -> int:
    """The root of other page tables: as the layout's, but ``LOW_USER`` shows the page of ``HIGH_SUPERVISOR``."""
    tables = PageTables(guest.memory, guest.tables.levels)
    tables.root, tables.next_free = guest.tables.next_free, guest.tables.next_free + layout.PAGE_SIZE
    guest.memory.write(tables.root, bytes(layout.PAGE_SIZE))
    tables.map_layout()
    tables.map(LOW_USER, page_of(HIGH_SUPERVISOR), PTE_U)
    guest.tables.next_free = tables.next_free
    return tables.root


@pytest.mark.parametrize("no_flush", [0, 1 << 63])
def test_each_pcid_sees_its_own_page_tables(guest: Guest, no_flush: int) -> None:
    """Translations of one PCID are never used in another, whatever the no-flush bit permits to keep."""
    guest.cr4 |= CR4_PCIDE
    guest.cr4 &= ~CR4_SMAP
    first, second = guest.tables.root | 1 | no_flush, second_root(guest) | 2 | no_flush
    guest.memory.store(page_of(LOW_USER), 8, OLD)
    guest.memory.store(page_of(HIGH_SUPERVISOR), 8, NEW)
    outcome = guest.execute(
        "mov cr3, rax; mov r8, [rbx]; mov cr3, rcx; mov r9, [rbx]; mov cr3, rax; mov r10, [rbx]; mov rdx, cr3",
        rax=first, rbx=LOW_USER, rcx=second,
    )  # fmt: skip
    assert outcome.completed
    assert (outcome.registers.r8, outcome.registers.r9, outcome.registers.r10) == (OLD, NEW, OLD)
    assert outcome.registers.rdx == guest.tables.root | 1


def test_global_pages_stay_when_the_pcid_changes(guest: Guest) -> None:
    guest.cr4 |= CR4_PCIDE
    guest.tables.map(HIGH_ABSENT, page_of(HIGH_SUPERVISOR), PTE_G)
    guest.memory.store(page_of(HIGH_SUPERVISOR), 8, NEW)
    outcome = guest.execute(
        "mov rdx, [rbx]; mov cr3, rax; mov rdx, [rbx]", rax=second_root(guest) | 5, rbx=HIGH_SUPERVISOR
    )
    assert outcome.completed
    assert outcome.registers.rdx == NEW


@pytest.mark.parametrize(("pcide", "vector"), [(CR4_PCIDE, layout.DONE_VECTOR), (0, GP)])
def test_the_no_flush_bit_is_reserved_without_pcide(guest: Guest, pcide: int, vector: int) -> None:
    guest.cr4 |= pcide
    outcome = guest.execute("mov rax, cr3; bts rax, 63; mov cr3, rax")
    assert outcome.vector == vector


def test_the_guest_enables_pcids_while_the_pcid_is_zero(guest: Guest) -> None:
    enable = "mov rax, cr4; bts rax, 17; enable: mov cr4, rax; mov rbx, cr4"
    assert guest.execute(enable).registers.rbx & CR4_PCIDE
    outcome = guest.execute(f"mov rax, cr3; or rax, 8; mov cr3, rax; {enable}")
    assert (outcome.vector, outcome.label) == (GP, "enable")


# ---------------------------------------------------------------------------------------------------- INVPCID


@pytest.mark.parametrize("kind", range(4))
def test_invpcid_makes_a_changed_entry_seen(guest: Guest, kind: int) -> None:
    entry = entry_of(guest, HIGH_SUPERVISOR)
    guest.memory.store(page_of(HIGH_SUPERVISOR), 8, OLD)
    guest.memory.store(page_of(LOW_USER), 8, NEW)
    outcome = guest.execute(
        """
        mov r8, [rbx]
        mov rax, [rdi]; sub rax, 0xC000; mov [rdi], rax
        push rbx; push 0; invpcid rcx, [rsp]
        mov r9, [rbx]
        """,
        rbx=HIGH_SUPERVISOR, rcx=kind, rdi=entry,
    )  # fmt: skip
    assert outcome.completed
    assert (outcome.registers.r8, outcome.registers.r9) == (OLD, NEW)


def test_invpcid_in_direct_execution_is_checked(guest: Guest) -> None:
    invalid = guest.execute("push rax; push 0; fault: invpcid rcx, [rsp]", rax=NOT_CANONICAL)
    assert (invalid.vector, invalid.error_code, invalid.label) == (GP, 0, "fault")
    low = guest.execute("fault: invpcid rcx, [rbx]", rbx=LOW_SUPERVISOR, rcx=2)
    assert (low.vector, low.error_code, low.label) == (GP, 0, "fault")
    stack = guest.execute("fault: invpcid rcx, [rbp]", rbp=LOW_SUPERVISOR, rcx=2)
    assert (stack.vector, stack.error_code, stack.label) == (STACK_FAULT, 0, "fault")
    absent = guest.execute("fault: invpcid rcx, [rbx]", rbx=HIGH_ABSENT, rcx=2)
    assert (absent.vector, absent.error_code, absent.cr2) == (PF, 0, HIGH_ABSENT)
    user = guest.execute("fault: invpcid rcx, [rbx]", rbx=LOW_USER, rcx=2, cpl=3)
    assert (user.vector, user.error_code, user.label) == (GP, 0, "fault")


def test_invpcid_is_no_sse_instruction(guest: Guest) -> None:
    """CR0.TS does not concern it."""
    guest.cr0 |= CR0_TS
    assert guest.execute("push 0; push 0; invpcid rcx, [rsp]").completed
    assert guest.execute("movups xmm0, [rsp]").vector == NM


def test_the_address_in_an_invpcid_descriptor_is_only_named(guest: Guest) -> None:
    assert guest.execute("push rax; push 0; invpcid rcx, [rsp]", rax=LOW_SUPERVISOR).completed


# ------------------------------------------------------------------------------------------------------- UMIP

STORES = ("sgdt [rbx]", "sidt [rbx]", "sldt eax", "str eax", "smsw rax", "sldt word [rbx]", "smsw word [rbx]")


@pytest.mark.parametrize("source", STORES)
def test_umip_keeps_system_registers_from_users(guest: Guest, source: str) -> None:
    assert guest.execute(source, cpl=3, rbx=LOW_USER).completed
    guest.cr4 |= CR4_UMIP
    outcome = guest.execute(f"fault: {source}", cpl=3, rbx=LOW_USER)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
    assert guest.execute(source, rbx=HIGH_SUPERVISOR).completed


@pytest.mark.parametrize("source", STORES)
def test_umip_comes_before_the_memory_operand(guest: Guest, source: str) -> None:
    guest.cr4 |= CR4_UMIP
    outcome = guest.execute(source, cpl=3, rbx=HIGH_ABSENT)
    assert (outcome.vector, outcome.cr2) == (GP, 0xFFFF_8BAD_0000_0CE2)


def test_stored_system_registers_are_the_guests(guest: Guest) -> None:
    outcome = guest.execute("sgdt [rbx]; sidt [rbx + 16]; smsw rcx; str edx; sldt eax", rbx=HIGH_SUPERVISOR)
    assert outcome.completed
    page = page_of(HIGH_SUPERVISOR)
    assert guest.memory.load(page, 2) == 0xFF
    assert guest.memory.load(page + 2, 8) == layout.GDT
    assert guest.memory.load(page + 18, 8) == layout.IDT
    registers = outcome.registers
    assert (registers.rcx, registers.rdx, registers.rax) == (
        guest.cr0, TSS_SELECTOR, layout.LDT_SELECTOR
    )  # fmt: skip


def test_half_of_a_stored_descriptor_table_register_is_never_written(guest: Guest) -> None:
    guest.tables.unmap(HIGH_SUPERVISOR + 0x1000)
    guest.memory.store(page_of(HIGH_SUPERVISOR) + 0xFF8, 8, OLD)
    outcome = guest.execute("sgdt [rbx]", rbx=HIGH_SUPERVISOR + 0xFFC)
    assert (outcome.vector, outcome.error_code, outcome.cr2) == (PF, PF_W, HIGH_SUPERVISOR + 0x1000)
    assert guest.memory.load(page_of(HIGH_SUPERVISOR) + 0xFF8, 8) == OLD


# --------------------------------------------------------------------------------------------- FSGSBASE, RDPID


@pytest.mark.parametrize("cpl", [0, 3])
def test_segment_bases_are_read_and_written(guest: Guest, cpl: int) -> None:
    guest.cr4 |= CR4_FSGSBASE
    outcome = guest.execute(
        "wrfsbase rax; wrgsbase r8; rdfsbase rcx; rdgsbase r9; mov edx, -1; rdfsbase edx; mov r10, fs:[0]; nop",
        cpl=cpl, rax=LOW_USER if cpl else HIGH_SUPERVISOR, r8=0x7FFF_1234_5678,
    )  # fmt: skip
    assert outcome.completed
    registers = outcome.registers
    base = LOW_USER if cpl else HIGH_SUPERVISOR
    assert (registers.rcx, registers.r9, registers.rdx) == (base, 0x7FFF_1234_5678, base & 0xFFFF_FFFF)
    sregs = guest.vcpu.get_sregs()
    assert (sregs.fs.base, sregs.gs.base) == (base, 0x7FFF_1234_5678)


def test_a_32_bit_base_clears_the_upper_half(guest: Guest) -> None:
    guest.cr4 |= CR4_FSGSBASE
    assert guest.execute("wrgsbase eax; rdgsbase rbx", rax=NOT_CANONICAL | 0x1000).registers.rbx == 0x1000


@pytest.mark.parametrize("prefix", ["db 0x66", "db 0x3E"])
def test_ignored_prefixes_do_not_widen_a_base(guest: Guest, prefix: str) -> None:
    guest.cr4 |= CR4_FSGSBASE
    outcome = guest.execute(f"{prefix}; wrgsbase eax; rdgsbase rbx", rax=NOT_CANONICAL | 0x1000)
    assert outcome.completed
    assert outcome.registers.rbx == 0x1000


@pytest.mark.parametrize("source", ["wrfsbase rax", "wrgsbase rax"])
@pytest.mark.parametrize("cpl", [0, 3])
def test_a_base_that_is_not_canonical_is_a_general_protection(guest: Guest, source: str, cpl: int) -> None:
    guest.cr4 |= CR4_FSGSBASE
    outcome = guest.execute(f"fault: {source}", cpl=cpl, rax=NOT_CANONICAL)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


@pytest.mark.parametrize("source", ["rdfsbase rax", "rdgsbase eax", "wrfsbase rax", "wrgsbase eax"])
def test_base_instructions_need_cr4_and_64_bit_mode(guest: Guest, source: str) -> None:
    assert guest.execute(f"fault: {source}").vector == UD
    guest.cr4 |= CR4_FSGSBASE
    outcome = guest.execute("fault: db 0xF3, 0x0F, 0xAE, 0xC0", cpl=3, bits=32)
    assert (outcome.vector, outcome.label) == (UD, "fault")


def test_bases_survive_swapgs(guest: Guest) -> None:
    """As Linux reads the inactive base."""
    guest.cr4 |= CR4_FSGSBASE
    guest.msrs[msr.MSR_IA32_KERNEL_GS_BASE] = LOW_USER
    outcome = guest.execute("wrgsbase rax; swapgs; rdgsbase rcx; wrgsbase rdx; swapgs; rdgsbase rbx",
                            rax=KERNEL_CODE, rdx=0x1000)  # fmt: skip
    assert (outcome.registers.rcx, outcome.registers.rbx) == (LOW_USER, KERNEL_CODE)
    assert guest.vcpu.get_msr(msr.MSR_IA32_KERNEL_GS_BASE) == 0x1000


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("source", ["rdpid rbx", "rdpid r15", "db 0x3E; rdpid rbx"])
def test_rdpid_reads_tsc_aux(guest: Guest, cpl: int, source: str) -> None:
    guest.cr4 |= CR4_TSD
    guest.msrs[msr.MSR_IA32_TSC_AUX] = 0x1003
    outcome = guest.execute(source, cpl=cpl, rbx=-1 % (1 << 64), r15=-1 % (1 << 64))
    assert outcome.completed
    assert 0x1003 in (outcome.registers.rbx, outcome.registers.r15)


@pytest.mark.parametrize("source", ["rdpid rax", "rdgsbase rax", "wrgsbase rax"])
def test_single_steps_trap_behind_them(guest: Guest, source: str) -> None:
    guest.cr4 |= CR4_FSGSBASE
    outcome = guest.execute(f"{source}; after: nop", rflags=RFLAGS_TF)
    assert (outcome.vector, outcome.label) == (DB, "after")


# -------------------------------------------------------------------------------------------- protection keys

KEY = 3
ACCESS_DISABLE, WRITE_DISABLE = 1 << 2 * KEY, 2 << 2 * KEY
SET_PKRU = "xor ecx, ecx; xor edx, edx; wrpkru; "


@pytest.fixture(scope="module")
def guest_with_keys() -> Guest:
    return Guest("max")


@pytest.fixture
def keys(guest_with_keys: Guest) -> Iterator[Guest]:
    """A guest with CR4.PKE whose page ``LOW_USER`` has key ``KEY``."""
    guest_with_keys.reset()
    guest_with_keys.cr4 |= CR4_PKE
    guest_with_keys.tables.map(LOW_USER, page_of(LOW_USER), PTE_U | KEY << PTE_KEY_SHIFT)
    return guest_with_keys


@pytest.mark.parametrize(
    ("rights", "source", "error_code"),
    [
        (0, "mov [rbx], al", None),
        (WRITE_DISABLE, "mov al, [rbx]", None),
        (WRITE_DISABLE, "mov [rbx], al", PF_P | PF_W | PF_U | PF_PK),
        (WRITE_DISABLE, "inc byte [rbx]", PF_P | PF_W | PF_U | PF_PK),
        (ACCESS_DISABLE, "mov al, [rbx]", PF_P | PF_U | PF_PK),
        (ACCESS_DISABLE, "mov [rbx], al", PF_P | PF_W | PF_U | PF_PK),
        (ACCESS_DISABLE, "clflush [rbx]", PF_P | PF_U | PF_PK),
        (~(ACCESS_DISABLE | WRITE_DISABLE) & 0xFFFF_FFFC, "inc byte [rbx]", None),
    ],
)
def test_a_user_access_follows_pkru(keys: Guest, rights: int, source: str, error_code: int | None) -> None:
    """Also when the page has been accessed before."""
    outcome = keys.execute(f"inc byte [rbx]; {SET_PKRU} fault: {source}", cpl=3, rax=rights, rbx=LOW_USER)
    if error_code is None:
        assert outcome.completed
    else:
        assert (outcome.vector, outcome.error_code, outcome.label) == (PF, error_code, "fault")
        assert outcome.cr2 == LOW_USER


def test_a_key_that_is_given_back_allows_the_access_again(keys: Guest) -> None:
    outcome = keys.execute(
        f"{SET_PKRU} rdpkru; mov r8, rax; xor eax, eax; wrpkru; inc byte [rbx]",
        cpl=3, rax=ACCESS_DISABLE, rbx=LOW_USER,
    )  # fmt: skip
    assert outcome.completed
    assert outcome.registers.r8 == ACCESS_DISABLE


def test_code_is_fetched_whatever_its_key_says(keys: Guest) -> None:
    keys.memory.write(page_of(LOW_USER), b"\xc3")
    assert keys.execute(f"{SET_PKRU} call rbx", cpl=3, rax=ACCESS_DISABLE, rbx=LOW_USER).completed


@pytest.mark.parametrize(
    ("wp", "rights", "source", "error_code"),
    [
        (True, ACCESS_DISABLE, "mov al, [rbx]", PF_P | PF_PK),
        (True, WRITE_DISABLE, "mov [rbx], al", PF_P | PF_W | PF_PK),
        (False, WRITE_DISABLE, "mov [rbx], al", None),
        (False, ACCESS_DISABLE, "mov [rbx], al", PF_P | PF_W | PF_PK),
        (True, ACCESS_DISABLE, "mov al, [rdi]", None),
    ],
)
def test_keys_hold_the_kernel_off_user_pages_only(
    keys: Guest, wp: bool, rights: int, source: str, error_code: int | None
) -> None:
    if not wp:
        keys.cr0 &= ~CR0_WP
    outcome = keys.execute(
        f"{SET_PKRU} fault: {source}",
        rflags=RFLAGS_AC, rax=rights, rbx=LOW_USER, rdi=HIGH_SUPERVISOR,
    )  # fmt: skip
    if error_code is None:
        assert outcome.completed
    else:
        assert (outcome.vector, outcome.error_code, outcome.label) == (PF, error_code, "fault")


def test_keys_of_supervisor_pages_follow_pkrs() -> None:
    """Also when the page has been accessed before: the write to the MSR is what makes the difference."""
    guest = Guest("max,+pks")
    guest.cr4 |= CR4_PKS
    guest.tables.map(HIGH_SUPERVISOR, page_of(HIGH_SUPERVISOR), KEY << PTE_KEY_SHIFT)
    source = "inc byte [rbx]; mov ecx, 0x6E1; xor edx, edx; wrmsr; read: mov al, [rbx]; write: mov [rbx], al"
    assert guest.execute(source, rbx=HIGH_SUPERVISOR, rax=0).completed
    write_disabled = guest.execute(source, rbx=HIGH_SUPERVISOR, rax=WRITE_DISABLE)
    assert (write_disabled.vector, write_disabled.error_code, write_disabled.label) == (
        PF, PF_P | PF_W | PF_PK, "write"
    )  # fmt: skip
    access_disabled = guest.execute(source, rbx=HIGH_SUPERVISOR, rax=ACCESS_DISABLE)
    assert (access_disabled.vector, access_disabled.error_code, access_disabled.label) == (
        PF, PF_P | PF_PK, "read"
    )  # fmt: skip


def test_cpuid_shows_ospke_and_cr4_reads_as_written(keys: Guest) -> None:
    source = "mov eax, 7; xor ecx, ecx; cpuid; mov r8, cr4"
    outcome = keys.execute(source)
    assert outcome.registers.rcx >> 3 & 3 == 3
    assert outcome.registers.r8 == keys.cr4
    keys.cr4 &= ~CR4_PKE
    outcome = keys.execute(source)
    assert outcome.registers.rcx >> 3 & 3 == 1
    assert outcome.registers.r8 == keys.cr4


def test_pkru_instructions_fault_as_the_manual_says(keys: Guest) -> None:
    for source in ("mov ecx, 1; xor edx, edx; fault: wrpkru", "xor ecx, ecx; mov edx, 1; fault: wrpkru",
                   "mov ecx, 1; fault: rdpkru"):  # fmt: skip
        outcome = keys.execute(source, cpl=3)
        assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
    keys.cr4 &= ~CR4_PKE
    for source in ("rdpkru", "wrpkru"):
        assert keys.execute(source).vector == UD


def test_without_pku_in_cpuid_cr4_pke_is_reserved() -> None:
    guest = Guest("max,-pku")
    outcome = guest.execute("mov rax, cr4; bts rax, 22; fault: mov cr4, rax")
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
    assert guest.execute("rdpkru").vector == UD


# ---------------------------------------------------------------------------------------------- CPUID honesty


@pytest.fixture(scope="module")
def plain_guest() -> Guest:
    """A guest whose CPUID lacks all of this."""
    return Guest("max,-pcid,-invpcid,-umip,-fsgsbase,-rdpid,-3dnowprefetch,-wbnoinvd,-cldemote")


@pytest.mark.parametrize("bit", [11, 16, 17])
def test_cr4_bits_are_reserved_without_their_features(plain_guest: Guest, bit: int) -> None:
    outcome = plain_guest.execute(f"mov rax, cr4; bts rax, {bit}; mov cr4, rax")
    assert (outcome.vector, outcome.error_code) == (GP, 0)


@pytest.mark.parametrize("source", ["push 0; push 0; invpcid rcx, [rsp]", "rdpid rax", "rdgsbase rax"])
def test_instructions_are_undefined_without_their_features(plain_guest: Guest, source: str) -> None:
    assert plain_guest.execute(source).vector == UD


@pytest.mark.parametrize("source", ["prefetchw [rax]", "wbnoinvd", "cldemote [rax]", "prefetcht0 [rax]"])
def test_hints_and_ignored_prefixes_need_no_feature(plain_guest: Guest, source: str) -> None:
    assert plain_guest.execute(source, rax=NOT_CANONICAL).completed


@pytest.mark.parametrize(
    ("source", "expected"), [("lzcnt rax, rcx", 4), ("tzcnt rax, rcx", 4), ("tzcnt rax, rdx", 7)]
)
def test_lzcnt_and_tzcnt_are_bsr_and_bsf(guest: Guest, source: str, expected: int) -> None:
    assert guest.execute(source, rax=7, rcx=0x10).registers.rax == expected
