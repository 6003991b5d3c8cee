"""The EPT walk: from a guest-physical address of a nested guest to a physical one of the guest that runs it.

:func:`ept_walk` is the only EPT walk there is; :func:`lasskvm.x86.paging.walk_nested` calls it for each entry of a
paging structure that it reads or marks, and for the address that the page walk ends at. Like the page walk it is
written in the compiled subset (``docs/architecture.md``).

In this module *gpa* is the address that EPT translates and *hpa* what it becomes. *memory* holds the EPT tables, by
hpa. 4-level EPT with pages of 4 KiB, 2 MiB and 1 GiB, execute-only pages, accessed and dirty flags; mode-based
execute control, sub-page permissions and supervisor shadow stacks are not part of it. The EPTP itself is checked at
VM entry, not here.

Every walk reads at most four entries, so tables that lead back to themselves end like any others. An entry where
there is no memory reads as all ones, which is a misconfiguration at every level by the manual's own rules: reserved
bits in a PML4E and in a PDPTE or PDE (where bit 7 makes it a large page), a reserved memory type in a PTE.

Accessed and dirty flags: as in the page walk, an entry that leads to another table is marked as soon as it is used,
the one that maps the page only when the access is allowed.

Source: Intel SDM volume 3C, 29.3 (28.3 in older editions): 29.3.2 (entry formats), 29.3.3 (violations,
misconfigurations and which comes first), 29.3.5 (accessed and dirty flags); table 28-7 (exit qualification); KVM's
``FNAME(walk_addr_generic)`` for EPT tables and ``ept_access_*`` of kvm-unit-tests for what processors report.
"""

from __future__ import annotations

from lasskvm.lass import FETCH, WRITE
from lasskvm.x86.physical import (
    PERM_ALL,
    PERM_R,
    PERM_W,
    PERM_X,
    PhysicalMemory,
    load_physical,
    store_physical,
)
from lasskvm.x86.vmx import VMX_EPTP_AD_ENABLE_BIT
from lasskvm.x86.vmx_exits import EptViolation, ExitReason

__all__ = [
    "EPT_A",
    "EPT_D",
    "EPT_EXIT",
    "EPT_MISCONFIGURATION",
    "EPT_PS",
    "EPT_R",
    "EPT_TYPE_SHIFT",
    "EPT_VIOLATION",
    "EPT_W",
    "EPT_X",
    "GPA_OF_LINEAR",
    "GPA_OF_PDPTES",
    "GPA_OF_TABLE",
    "ept_walk",
    "exit_qualification",
    "exit_reason",
]

# EPT entries. What the first three allow is said by the same bits of PERM_*, and by bits 2:0 and 5:3 of the exit
# qualification.
EPT_R = PERM_R
EPT_W = PERM_W
EPT_X = PERM_X
#: Bits 5:3 of the entry that maps the page: its memory type, 0 (UC) or 6 (WB), say.
EPT_TYPE_SHIFT = 3
EPT_PS = 1 << 7
EPT_A = 1 << 8
EPT_D = 1 << 9

# What an access to a guest-physical address is for: bits 8:7 of the exit qualification.
#: The gpa is what a linear address translates to.
GPA_OF_LINEAR = EptViolation.GVA_IS_VALID | EptViolation.GVA_TRANSLATED
#: The gpa is that of a paging-structure entry, read or marked on behalf of a linear address.
GPA_OF_TABLE = int(EptViolation.GVA_IS_VALID)
#: PDPTE registers are loaded from the gpa (MOV to CR): no linear address, a read even with dirty flags.
GPA_OF_PDPTES = 0

# Outcomes of a walk: the basic exit reason in bits 31:16, the exit qualification in bits 11:0. 0 is no exit.
_REASON_SHIFT = 16
_QUALIFICATION = 0xFFF
#: An entry is not present, or the access is not allowed; the qualification comes on top.
EPT_VIOLATION = ExitReason.EPT_VIOLATION << _REASON_SHIFT
#: An entry holds what no entry may hold. It has no qualification.
EPT_MISCONFIGURATION = ExitReason.EPT_MISCONFIG << _REASON_SHIFT

#: Where functions return the vector of a fault: the access ends in a VM exit, by EPT. No vector is this large.
EPT_EXIT = 1 << 9

#: Bits 5:3 of the qualification: what all levels together allow.
_QUALIFICATION_RIGHTS_SHIFT = 3

_ADDRESS = (1 << 52) - (1 << 12)
_GPA_BITS = 48
_SHIFT_4K = 12
_SHIFT_PML4 = 39
_SHIFT_PER_LEVEL = 9
_INDEX = 0x1FF
_ENTRY_BYTES = 8
#: Bits 7:3 are reserved in an entry that leads to another table; with bit 7, a PDPTE or PDE is none of these.
_TABLE_RESERVED = 0xF8
_TYPE = 7
#: Bit *t* is set when memory type *t* is reserved: 2, 3 and 7.
_RESERVED_TYPES = 1 << 2 | 1 << 3 | 1 << 7


def exit_reason(outcome: int) -> int:
    """The basic exit reason of an *outcome* of :func:`ept_walk`: 48, 49, or 0 when there is no exit."""
    return outcome >> _REASON_SHIFT


def exit_qualification(outcome: int) -> int:
    """The exit qualification of an *outcome* of :func:`ept_walk`; 0 unless it is a violation."""
    return outcome & _QUALIFICATION


def ept_walk(
    memory: PhysicalMemory, gpa: int, flags: int, eptp: int, maxphyaddr: int, purpose: int
) -> tuple[int, int, int]:
    """Translate *gpa* for one access: ``(hpa, permissions, outcome)``.

    *flags* is ``lass.WRITE``, ``lass.FETCH`` or 0 for a data read; other flags make no difference here. *purpose* is
    one of ``GPA_OF_*``. *maxphyaddr* counts physical address bits (32 to 52).

    When the access is allowed, *outcome* is 0 and *permissions* says what may be done to the page from now on without
    another walk: ``PERM_W`` is there only when the page is dirty already, or dirty flags are off. When it is not,
    *hpa* and *permissions* are 0 and *outcome* is ``EPT_MISCONFIGURATION``, or ``EPT_VIOLATION`` with the exit
    qualification: the access in bits 2:0, what the entries allow in bits 5:3, *purpose* in bits 8:7.

    A *gpa* of more than 48 bits, which 4-level EPT cannot translate, is a violation that no entry was read for.
    """
    # Bit 6 of the EPTP turns accessed and dirty flags on, and with them makes a write of every access to a table.
    has_flags = (eptp & VMX_EPTP_AD_ENABLE_BIT) != 0
    access = PERM_R
    if (flags & FETCH) != 0:
        access = PERM_X
    elif (flags & WRITE) != 0:
        access = PERM_W
    if purpose == GPA_OF_TABLE and (has_flags or access == PERM_W):
        # An entry is read before it is marked, and processors report both.
        access = PERM_R | PERM_W
    if (gpa >> _GPA_BITS) != 0:
        return 0, 0, EPT_VIOLATION | purpose | access

    beyond = _ADDRESS & ~((1 << maxphyaddr) - 1)
    table, shift, rights = eptp, _SHIFT_PML4, PERM_ALL
    while True:
        entry_hpa = (table & _ADDRESS) | (((gpa >> shift) & _INDEX) * _ENTRY_BYTES)
        entry = load_physical(memory, entry_hpa, _ENTRY_BYTES)
        if (entry & PERM_ALL) == 0:
            return 0, 0, EPT_VIOLATION | purpose | access
        rights = rights & entry
        maps_page = shift == _SHIFT_4K or (shift != _SHIFT_PML4 and (entry & EPT_PS) != 0)
        forbidden = beyond | _TABLE_RESERVED
        if maps_page:
            forbidden = beyond | ((1 << shift) - (1 << _SHIFT_4K))
            if (_RESERVED_TYPES >> ((entry >> EPT_TYPE_SHIFT) & _TYPE)) & 1 != 0:
                return 0, 0, EPT_MISCONFIGURATION
        if (entry & forbidden) != 0 or (entry & (EPT_R | EPT_W)) == EPT_W:
            return 0, 0, EPT_MISCONFIGURATION
        if maps_page:
            break
        if has_flags and (entry & EPT_A) == 0:
            store_physical(memory, entry_hpa, _ENTRY_BYTES, entry | EPT_A)
        table = entry
        shift = shift - _SHIFT_PER_LEVEL

    # A misconfiguration further down comes before what a level above denies: rights count only now.
    if (rights & access) != access:
        return 0, 0, EPT_VIOLATION | purpose | (rights << _QUALIFICATION_RIGHTS_SHIFT) | access
    if has_flags:
        marked = entry | EPT_A
        if (access & PERM_W) != 0:
            marked = marked | EPT_D
        if marked != entry:
            store_physical(memory, entry_hpa, _ENTRY_BYTES, marked)
        if (marked & EPT_D) == 0:
            rights = rights & (PERM_R | PERM_X)
    offset = (1 << shift) - 1
    return (entry & _ADDRESS & ~offset) | (gpa & offset), rights, 0
