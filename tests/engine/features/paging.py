"""Features of paging: what is translated to what, with which tables; and of memory types, which are only kept."""

from __future__ import annotations

from features.probe import (
    HIGH_SUPERVISOR_PAGE,
    LOW_USER_PAGE,
    Probe,
    accepts_cr4,
    completed,
    faults,
    has_no_msr,
    in_protected_mode,
    is_undefined,
    refuses_cr4,
)
from lasskvm.conformance import layout
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import (
    HIGH_SUPERVISOR,
    KERNEL_CODE,
    LOW_USER,
    UPPER,
    PageTables,
)
from lasskvm.kvm import Regs
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86 import msr
from lasskvm.x86.exceptions import GP, PF, PF_I, PF_P, PF_RSVD, PF_U
from lasskvm.x86.paging import PTE_D, PTE_G, PTE_P, PTE_PS, PTE_U, PTE_W, PTE_XD
from lasskvm.x86.registers import (
    CR0_PG,
    CR4_LA57,
    CR4_PAE,
    CR4_PCIDE,
    CR4_PGE,
    CR4_PSE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    MASK32,
    MASK64,
    RFLAGS_AC,
)

SINCE_THE_PENTIUM_PRO = "every processor since the Pentium Pro has it, and firmware does not ask"
THE_WALK_HAS_IT = (
    "the page walk is that of a processor which has it, as under KVM with two-dimensional paging"
)

OLD, NEW = 0x1111, 0x2222
RET = b"\xc3"
PRESENT = PTE_P | PTE_W
#: Page tables of 32-bit code, and a page of its own to look at.
DIRECTORY, TABLE32, DIRECTORY_POINTERS = 0x200000, 0x201000, 0x202000
#: Guest-physical memory that takes more than 32 bits of address.
FAR_GPA, FAR_BYTES, FAR_SLOT = 1 << 32, 4 << 20, 7
#: Where a guest has the last-level tables that it changes.
TABLES_GVA = UPPER + 0x200000


def _remapped(guest: Guest, gva: int, gpa: int, flags: int = 0) -> dict[str, int]:
    """RDI and RSI for ``mov [rdi], rsi``, by which the guest maps the page at *gva* to *gpa*."""
    pages = (layout.TABLES_END - layout.TABLES_GPA) // PAGE_SIZE
    guest.tables.map(TABLES_GVA, layout.TABLES_GPA, pages=pages)
    entry = TABLES_GVA + guest.tables.entry_gpa(gva) - layout.TABLES_GPA
    return {"rdi": entry, "rsi": gpa | PRESENT | flags}


# ------------------------------------------------------------------------------------------ paging of 32-bit systems

SWITCH_ON = f"mov cr3, eax; mov eax, cr0; or eax, {CR0_PG:#x}; mov cr0, eax; "
#: Write at EBX by way of paging, and read it back.
TOUCH = "mov [ebx], edi; mov ecx, [ebx]; hlt"


def _touches(guest: Guest, root: int, gva: int, gpa: int, cr4: int) -> None:
    """With the tables at *root*, linear *gva* is *gpa*."""
    guest.memory.store(gpa, 4, 0)
    found = in_protected_mode(guest, SWITCH_ON + TOUCH, cr4=cr4, rax=root, rbx=gva, rdi=NEW)
    assert isinstance(found, Regs), found
    assert (found.rcx, guest.memory.load(gpa, 4)) == (NEW, NEW)


def _with_far_memory(guest: Guest) -> None:
    if FAR_SLOT not in (slot.number for slot in guest.memory):
        guest.vm.set_user_memory_region(FAR_SLOT, FAR_GPA, guest.vm.allocate(FAR_BYTES))


def _pse(guest: Guest) -> None:
    """4 MiB in one entry. Without CR4.PSE the bit means nothing, and the entry leads to a table."""
    large = PRESENT | PTE_PS
    for number, entry in enumerate((large, large, TABLE32 | large)):
        guest.memory.store(DIRECTORY + 4 * number, 4, entry)
    for page in range(1024):
        guest.memory.store(TABLE32 + 4 * page, 4, 0)
    _touches(guest, DIRECTORY, 0x400000 + 0x3F0008, 0x3F0008, CR4_PSE)
    assert guest.memory.load(DIRECTORY + 4, 4) & PTE_D
    guest.memory.store(DIRECTORY, 4, 0x203000 | PRESENT | PTE_PS)
    for page in range(1024):
        guest.memory.store(0x203000 + 4 * page, 4, page * PAGE_SIZE | PRESENT)
    guest.memory.store(TABLE32 + 4, 4, 0x345000 | PRESENT)
    _touches(guest, DIRECTORY, 0x801010, 0x345010, 0)


def _pse36(guest: Guest) -> None:
    """Bits 20:13 of the entry are bits 39:32 of the address."""
    _with_far_memory(guest)
    large = PRESENT | PTE_PS
    guest.memory.store(DIRECTORY, 4, large)
    guest.memory.store(DIRECTORY + 4, 4, large | (FAR_GPA >> 32) << 13)
    _touches(guest, DIRECTORY, 0x400000 + 0x3F0010, FAR_GPA + 0x3F0010, CR4_PSE)


def _pae(guest: Guest) -> None:
    """Entries of 8 bytes in three levels: 32-bit code reaches memory above 4 GiB."""
    _with_far_memory(guest)
    for number in range(4):
        guest.memory.store(DIRECTORY_POINTERS + 8 * number, 8, 0)
    guest.memory.store(DIRECTORY_POINTERS, 8, DIRECTORY | PTE_P)
    guest.memory.store(DIRECTORY_POINTERS + 3 * 8, 8, DIRECTORY | PTE_P)
    for number, gpa in enumerate((0, 0x200000, FAR_GPA)):
        guest.memory.store(DIRECTORY + 8 * number, 8, gpa | PRESENT | PTE_PS)
    _touches(guest, DIRECTORY_POINTERS, 0xC040_1008, FAR_GPA + 0x1008, CR4_PAE)
    # A reserved bit in a PDPTE is found when CR0.PG is set.
    guest.memory.store(DIRECTORY_POINTERS + 8, 8, DIRECTORY | PTE_P | PTE_W)
    assert in_protected_mode(guest, SWITCH_ON + TOUCH, cr4=CR4_PAE, rax=DIRECTORY_POINTERS) == GP


# ------------------------------------------------------------------------------------------- paging of 64-bit systems


def _lm(guest: Guest) -> None:
    found = completed(guest, "mov r15, -1; lea rbx, [rip + here]; here: rdmsr", rcx=msr.MSR_IA32_EFER)
    assert found.r15 == MASK64
    assert found.rbx // PAGE_SIZE == KERNEL_CODE // PAGE_SIZE
    assert found.rax & (EFER_LME | EFER_LMA) == EFER_LME | EFER_LMA


def _no_lm(guest: Guest) -> None:
    source = f"rdmsr; or eax, {EFER_LME:#x}; wrmsr; hlt"
    assert in_protected_mode(guest, source, rcx=msr.MSR_IA32_EFER) == GP
    assert in_protected_mode(guest, "rdmsr; hlt", rcx=msr.MSR_IA32_LSTAR) == GP


def _nx(guest: Guest) -> None:
    guest.memory.write(LOW_USER_PAGE, RET)
    completed(guest, "call rbx", cpl=3, rbx=LOW_USER)
    guest.tables.map(LOW_USER, LOW_USER_PAGE, PTE_U | PTE_XD)
    completed(guest, "inc byte [rbx + 8]", cpl=3, rbx=LOW_USER)
    outcome = guest.execute("jmp rbx", cpl=3, rbx=LOW_USER)
    assert (outcome.vector, outcome.error_code, outcome.rip) == (PF, PF_P | PF_U | PF_I, LOW_USER)
    guest.tables.map(HIGH_SUPERVISOR, HIGH_SUPERVISOR_PAGE, PTE_XD)
    outcome = guest.execute("jmp rbx", rbx=HIGH_SUPERVISOR)
    assert (outcome.vector, outcome.error_code, outcome.rip) == (PF, PF_P | PF_I, HIGH_SUPERVISOR)


def _no_nx(guest: Guest) -> None:
    """EFER.NXE cannot be set, and bit 63 of an entry is reserved."""
    faults(guest, f"rdmsr; or eax, {EFER_NXE:#x}; fault: wrmsr", GP, 0, rcx=msr.MSR_IA32_EFER)
    guest.tables.map(LOW_USER, LOW_USER_PAGE, PTE_U | PTE_XD)
    faults(guest, "mov al, [rbx]", PF, PF_P | PF_U | PF_RSVD, cpl=3, rbx=LOW_USER)


def _pdpe1gb(guest: Guest) -> None:
    tables = guest.tables
    pointers, tables.next_free = tables.next_free, tables.next_free + PAGE_SIZE
    region = UPPER + (1 << 39)
    guest.memory.store(tables.root + 8 * (region >> 39 & 0x1FF), 8, pointers | PRESENT)
    guest.memory.store(pointers, 8, PRESENT | PTE_PS)
    guest.memory.store(pointers + 8, 8, PRESENT | PTE_PS | 1 << 29)
    guest.memory.store(0x3F0000, 8, OLD)
    assert completed(guest, "mov rax, [rbx]; mov [rbx + 8], rcx", rbx=region + 0x3F0000, rcx=NEW).rax == OLD
    assert guest.memory.load(0x3F0008, 8) == NEW
    assert guest.memory.load(pointers, 8) & PTE_D
    faults(guest, "mov rax, [rbx]", PF, PF_P | PF_RSVD, rbx=region + (1 << 30))


FIVE_LEVEL_ADDRESS = 0x00FF_0000_0000_0000


def _la57(guest: Guest) -> None:
    assert guest.cr4 & CR4_LA57
    assert accepts_cr4(guest, CR4_LA57)
    guest.tables.map(FIVE_LEVEL_ADDRESS, LOW_USER_PAGE, PTE_U)
    guest.memory.store(LOW_USER_PAGE, 8, OLD)
    assert completed(guest, "mov rax, [rbx]", cpl=3, rbx=FIVE_LEVEL_ADDRESS).rax == OLD
    faults(guest, "mov rax, [rbx]", GP, 0, cpl=3, rbx=FIVE_LEVEL_ADDRESS << 1)


def _no_la57(guest: Guest) -> None:
    refuses_cr4(CR4_LA57)(guest)
    faults(guest, "mov rax, [rbx]", GP, 0, cpl=3, rbx=FIVE_LEVEL_ADDRESS)


def _pge(guest: Guest) -> None:
    """A change of CR3 may leave global translations alone, as direct execution does; one of CR4.PGE forgets them."""
    kept = OLD if guest.vm.engine == "jit" else NEW
    remap = "mov r8, [rbx]; mov [rdi], rsi; "
    reload_cr3 = "mov rax, cr3; mov cr3, rax; mov r9, [rbx]; "
    change_pge = f"mov rax, cr4; xor eax, {CR4_PGE:#x}; mov cr4, rax; mov r10, [rbx]"
    guest.memory.store(HIGH_SUPERVISOR_PAGE, 8, OLD)
    guest.memory.store(LOW_USER_PAGE, 8, NEW)
    for flags, behind_cr3 in ((PTE_G, kept), (0, NEW)):
        for source in (remap + reload_cr3 + change_pge, remap + change_pge):
            guest.tables.map(HIGH_SUPERVISOR, HIGH_SUPERVISOR_PAGE, flags)
            entry = _remapped(guest, HIGH_SUPERVISOR, LOW_USER_PAGE, flags)
            found = completed(guest, source, rbx=HIGH_SUPERVISOR, r9=behind_cr3, **entry)
            assert (found.r8, found.r9, found.r10) == (OLD, behind_cr3, NEW)


PAT_AT_RESET = 0x0007_0406_0007_0406
#: In a last-level entry; in others it is the bit that makes a page large.
PTE_PAT = 1 << 7


def _pat(guest: Guest) -> None:
    assert guest.vcpu.get_msr(msr.MSR_IA32_PAT) == PAT_AT_RESET
    found = completed(
        guest, "wrmsr; xor eax, eax; rdmsr", rcx=msr.MSR_IA32_PAT, rax=0x0007_0106, rdx=0x0007_0405
    )
    assert (found.rax, found.rdx) == (0x0007_0106, 0x0007_0405)
    for reserved in (0x0007_0206, 0x0307_0406, 0x0008_0406):
        faults(guest, "wrmsr", GP, 0, rcx=msr.MSR_IA32_PAT, rax=reserved, rdx=0)
    guest.tables.map(LOW_USER, LOW_USER_PAGE, PTE_U | PTE_PAT)
    guest.memory.store(LOW_USER_PAGE, 8, OLD)
    assert completed(guest, "mov rax, [rbx]", cpl=3, rbx=LOW_USER).rax == OLD


MTRR_ENABLED = 1 << 11 | 1 << 10
WRITE_BACK = 6
#: MTRRCAP: eight variable ranges, fixed ranges, write combining.
MTRR_CAPABILITIES = 8 | 1 << 8 | 1 << 10
RANGE_VALID = 1 << 11


def _mtrr(guest: Guest) -> None:
    """Ranges and their types are kept, and checked."""
    faults(guest, "rdmsr; fault: wrmsr", GP, 0, rcx=msr.MSR_IA32_MTRRCAP)
    assert guest.vcpu.get_msr(msr.MSR_IA32_MTRRCAP) == MTRR_CAPABILITIES
    written_back = "wrmsr; xor eax, eax; xor edx, edx; rdmsr; shl rdx, 32; or rax, rdx"
    for index, value in (
        (msr.MSR_IA32_MTRR_DEF_TYPE, MTRR_ENABLED | WRITE_BACK),
        (msr.MSR_IA32_MTRR_PHYSBASE0 + 14, 0xC000_0000 | WRITE_BACK),
        (msr.MSR_IA32_MTRR_PHYSMASK0 + 14, 0x3F_C000_0000 | RANGE_VALID),
        (msr.MSR_IA32_MTRR_FIX4K_C0000, 0x0605_0401_0006_0504),
    ):
        found = completed(guest, written_back, rcx=index, rax=value & MASK32, rdx=value >> 32)
        assert found.rax == value
        for reserved in (2, 3, 7):
            faults(guest, "wrmsr", GP, 0, rcx=index, rax=value & ~7 & MASK32 | reserved, rdx=0)
        guest.vcpu.set_msr(index, 0)


def _other_tables(guest: Guest) -> int:
    """The root of other page tables, whose lower half has nothing but ``LOW_USER``, with another page."""
    tables = PageTables(guest.memory)
    tables.root, tables.next_free = guest.tables.next_free, guest.tables.next_free + PAGE_SIZE
    guest.memory.write(tables.root, bytes(PAGE_SIZE // 2))
    guest.memory.write(
        tables.root + PAGE_SIZE // 2, guest.memory.read(guest.tables.root + PAGE_SIZE // 2, PAGE_SIZE // 2)
    )
    tables.map(LOW_USER, HIGH_SUPERVISOR_PAGE, PTE_U)
    guest.tables.next_free = tables.next_free
    return tables.root


def _pcid(guest: Guest) -> None:
    guest.memory.store(LOW_USER_PAGE, 8, OLD)
    guest.memory.store(HIGH_SUPERVISOR_PAGE, 8, NEW)
    enable = f"mov rax, cr4; or eax, {CR4_PCIDE:#x}; mov cr4, rax; "
    first, second = guest.tables.root | 1, _other_tables(guest) | 2
    for no_flush in (0, 1 << 63):
        found = completed(
            guest,
            f"{enable} mov cr3, rdi; mov r8, [rbx]; mov cr3, rsi; mov r9, [rbx]; mov cr3, rdi; mov r10, [rbx]; "
            "mov rdx, cr3",
            rflags=RFLAGS_AC, rbx=LOW_USER, rdi=first | no_flush, rsi=second | no_flush,
        )  # fmt: skip
        assert (found.r8, found.r9, found.r10, found.rdx) == (OLD, NEW, OLD, first)
    faults(
        guest, f"mov rax, cr3; or eax, 1; mov cr3, rax; {enable.replace('mov cr4', 'fault: mov cr4')}", GP, 0
    )


def _no_pcid(guest: Guest) -> None:
    faults(guest, f"mov rax, cr4; or eax, {CR4_PCIDE:#x}; fault: mov cr4, rax", GP, 0)
    faults(guest, "mov rax, cr3; bts rax, 63; fault: mov cr3, rax", GP, 0)


def _invpcid(guest: Guest) -> None:
    """Each of its types makes a changed entry seen; a fifth does not exist."""
    guest.memory.store(HIGH_SUPERVISOR_PAGE, 8, OLD)
    guest.memory.store(LOW_USER_PAGE, 8, NEW)
    source = "mov r8, [rbx]; mov [rdi], rsi; push rbx; push 0; fault: invpcid rcx, [rsp]; mov r9, [rbx]"
    for kind in range(4):
        guest.tables.map(HIGH_SUPERVISOR, HIGH_SUPERVISOR_PAGE)
        change = _remapped(guest, HIGH_SUPERVISOR, LOW_USER_PAGE)
        found = completed(guest, source, rbx=HIGH_SUPERVISOR, rcx=kind, **change)
        assert (found.r8, found.r9) == (OLD, NEW)
    faults(guest, source, GP, 0, rbx=HIGH_SUPERVISOR, rcx=4, **change)


PROBES = {
    "pse": Probe(_pse, only_cpuid=SINCE_THE_PENTIUM_PRO),
    "pse36": Probe(_pse36, only_cpuid=THE_WALK_HAS_IT),
    "pae": Probe(_pae, only_cpuid=SINCE_THE_PENTIUM_PRO),
    "pge": Probe(_pge, only_cpuid=SINCE_THE_PENTIUM_PRO),
    "pat": Probe(_pat, only_cpuid=SINCE_THE_PENTIUM_PRO),
    "mtrr": Probe(_mtrr, has_no_msr(msr.MSR_IA32_MTRRCAP, msr.MSR_IA32_MTRR_DEF_TYPE)),
    "pdpe1gb": Probe(_pdpe1gb, only_cpuid=THE_WALK_HAS_IT),
    "lm": Probe(_lm, _no_lm),
    "nx": Probe(_nx, _no_nx),
    "la57": Probe(_la57, _no_la57, levels=5),
    "pcid": Probe(_pcid, _no_pcid),
    "invpcid": Probe(_invpcid, is_undefined("invpcid rcx, [rbx]")),
}
