"""Features that say who may access what: SMEP, SMAP, LASS, protection keys, and masked pointers."""

from __future__ import annotations

from features.probe import (
    HIGH_SUPERVISOR_PAGE,
    LOW_USER_PAGE,
    Probe,
    accepts_cr4,
    all_of,
    completed,
    faults,
    has_no_msr,
    is_undefined,
    refuses_cr4,
)
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import (
    HIGH_SUPERVISOR,
    HIGH_USER,
    LOW_SUPERVISOR,
    LOW_USER,
)
from lasskvm.x86 import msr
from lasskvm.x86.exceptions import GP, PF, PF_I, PF_P, PF_PK, PF_U, PF_W
from lasskvm.x86.paging import PTE_KEY_SHIFT, PTE_U
from lasskvm.x86.registers import (
    CR3_LAM_U48,
    CR3_LAM_U57,
    CR4_LAM_SUP,
    CR4_LASS,
    CR4_PKE,
    CR4_PKS,
    CR4_SMAP,
    CR4_SMEP,
    MASK64,
    RFLAGS_AC,
)

RET = b"\xc3"
NEW = 0x2222


# ------------------------------------------------------------------------------------- what a supervisor may not touch


def _smep(guest: Guest) -> None:
    assert guest.cr4 & CR4_SMEP
    guest.write(HIGH_USER, RET)
    outcome = guest.execute("jmp rbx", rbx=HIGH_USER)
    assert (outcome.vector, outcome.error_code, outcome.rip) == (PF, PF_P | PF_I, HIGH_USER)
    guest.cr4 &= ~CR4_SMEP
    completed(guest, "call rbx", rbx=HIGH_USER)


def _no_smep(guest: Guest) -> None:
    refuses_cr4(CR4_SMEP)(guest)
    guest.reset()
    guest.cr4 &= ~CR4_SMEP
    guest.write(HIGH_USER, RET)
    completed(guest, "call rbx", rbx=HIGH_USER)


def _smap(guest: Guest) -> None:
    assert guest.cr4 & CR4_SMAP
    faults(guest, "mov al, [rbx]", PF, PF_P, rbx=HIGH_USER)
    faults(guest, "stac; mov [rbx], al; clac; fault: mov [rbx], al", PF, PF_P | PF_W, rbx=HIGH_USER)
    guest.cr4 &= ~CR4_SMAP
    completed(guest, "mov al, [rbx]", rbx=HIGH_USER)


def _lass(guest: Guest) -> None:
    assert guest.cr4 & CR4_LASS
    faults(guest, "mov al, [rbx]", GP, 0, rbx=LOW_SUPERVISOR)
    completed(guest, "stac; mov al, [rbx]", rbx=LOW_SUPERVISOR)
    outcome = guest.execute("fault: jmp rbx", rflags=RFLAGS_AC, rbx=LOW_SUPERVISOR)
    assert (outcome.vector, outcome.error_code) == (GP, 0)
    faults(guest, "mov al, [rbx]", GP, 0, cpl=3, rbx=HIGH_USER)
    guest.cr4 &= ~CR4_LASS
    completed(guest, "mov al, [rbx]", cpl=3, rbx=HIGH_USER)
    completed(guest, "mov al, [rbx]", rbx=LOW_SUPERVISOR)


def _no_lass(guest: Guest) -> None:
    refuses_cr4(CR4_LASS)(guest)
    completed(guest, "mov al, [rbx]", cpl=3, rbx=HIGH_USER)


# ----------------------------------------------------------------------------------------------------- protection keys

KEY = 5
ACCESS_DISABLE, WRITE_DISABLE = 1 << 2 * KEY, 2 << 2 * KEY


def _pku(guest: Guest) -> None:
    guest.cr4 |= CR4_PKE
    guest.tables.map(LOW_USER, LOW_USER_PAGE, PTE_U | KEY << PTE_KEY_SHIFT)
    set_rights = "inc byte [rbx]; xor ecx, ecx; xor edx, edx; wrpkru; "
    write_only = PF_P | PF_U | PF_PK
    faults(
        guest, f"{set_rights} fault: mov al, [rbx]", PF, write_only, cpl=3, rbx=LOW_USER, rax=ACCESS_DISABLE
    )
    faults(guest, f"{set_rights} mov cl, [rbx]; fault: mov [rbx], al", PF, write_only | PF_W, cpl=3, rbx=LOW_USER,
           rax=WRITE_DISABLE)  # fmt: skip
    others = MASK64 & 0xFFFF_FFFF & ~(ACCESS_DISABLE | WRITE_DISABLE | 3)
    found = completed(guest, f"{set_rights} inc byte [rbx]; rdpkru", cpl=3, rbx=LOW_USER, rax=others)
    assert (found.rax, found.rdx) == (others, 0)
    guest.memory.write(LOW_USER_PAGE + 8, RET)
    completed(guest, f"{set_rights} lea rbx, [rbx + 8]; call rbx", cpl=3, rbx=LOW_USER, rax=ACCESS_DISABLE)


def _pks(guest: Guest) -> None:
    guest.cr4 |= CR4_PKS
    guest.tables.map(HIGH_SUPERVISOR, HIGH_SUPERVISOR_PAGE, KEY << PTE_KEY_SHIFT)
    set_rights = f"inc byte [rbx]; mov ecx, {msr.MSR_IA32_PKRS:#x}; xor edx, edx; wrmsr; "
    faults(
        guest, f"{set_rights} fault: mov al, [rbx]", PF, PF_P | PF_PK, rbx=HIGH_SUPERVISOR, rax=ACCESS_DISABLE
    )
    faults(guest, f"{set_rights} mov cl, [rbx]; fault: mov [rbx], al", PF, PF_P | PF_W | PF_PK, rbx=HIGH_SUPERVISOR,
           rax=WRITE_DISABLE)  # fmt: skip
    assert (
        completed(guest, f"{set_rights} inc byte [rbx]; rdmsr", rbx=HIGH_SUPERVISOR, rax=3 << 2).rax == 3 << 2
    )


# ----------------------------------------------------------------------------------------------- linear-address masking

METADATA48, METADATA57 = 0x2A5A << 48, 0x2A << 57
LAM_BITS48, LAM_BITS57 = 0x7FFF << 48, 0x3F << 57


def _tagged(address: int, bits: int, metadata: int) -> int:
    return address & ~bits | metadata


def _lam(guest: Guest) -> None:
    assert accepts_cr4(guest, CR4_LAM_SUP)
    for page in (LOW_USER_PAGE, HIGH_SUPERVISOR_PAGE):
        guest.memory.store(page, 8, NEW)
    for lam, bits, metadata in ((CR3_LAM_U48, LAM_BITS48, METADATA48), (CR3_LAM_U57, LAM_BITS57, METADATA57)):
        pointer = _tagged(LOW_USER, bits, metadata)
        faults(guest, "mov rax, [rbx]", GP, 0, cpl=3, rbx=pointer)
        guest.sregs["cr3"] = guest.tables.root | lam
        assert completed(guest, "mov rax, [rbx]", cpl=3, rbx=pointer).rax == NEW
        faults(guest, "jmp rbx", GP, 0, cpl=3, rbx=pointer)
        guest.sregs.clear()
    completed(guest, f"mov rax, cr3; bts rax, {CR3_LAM_U57.bit_length() - 1}; mov cr3, rax")
    pointer = _tagged(HIGH_SUPERVISOR, LAM_BITS48, METADATA48)
    faults(guest, "mov rax, [rbx]", GP, 0, rbx=pointer)
    guest.cr4 |= CR4_LAM_SUP
    assert completed(guest, "mov rax, [rbx]", rbx=pointer).rax == NEW
    # The metadata do not reach bit 63, which says whose the address is.
    faults(guest, "mov rax, [rbx]", GP, 0, rbx=pointer & ~(1 << 63))


def _no_lam(guest: Guest) -> None:
    refuses_cr4(CR4_LAM_SUP)(guest)
    for bit in (61, 62):
        faults(guest, f"mov rax, cr3; bts rax, {bit}; fault: mov cr3, rax", GP, 0)


PROBES = {
    "smep": Probe(_smep, _no_smep),
    "smap": Probe(_smap, all_of(refuses_cr4(CR4_SMAP), is_undefined("stac", "clac"))),
    "lass": Probe(_lass, _no_lass),
    "pku": Probe(_pku, all_of(refuses_cr4(CR4_PKE), is_undefined("rdpkru", "wrpkru"))),
    "pks": Probe(_pks, all_of(refuses_cr4(CR4_PKS), has_no_msr(msr.MSR_IA32_PKRS))),
    "lam": Probe(_lam, _no_lam),
}
