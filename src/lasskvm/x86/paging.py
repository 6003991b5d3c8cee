"""The page walk: from a linear address to a guest-physical one, in every paging mode.

There is no other walk than this. The emulator calls it as plain Python, the TLB fill calls the same
source compiled; so it is written over plain integers, in the compiled subset (``docs/architecture.md``), and
touches guest memory only through :func:`load_physical` and :func:`store_physical`.

With an EPTP, CR3 and the entries hold addresses that :func:`lasskvm.x86.ept.ept_walk` translates, whenever an entry
is read or marked, and at the end.

It knows nothing of LASS or canonical addresses: both are judged before paging. Shadow stacks are not part of
it. 1 GiB pages and PSE-36 exist whatever CPUID says, as on a processor that has them.

Accessed and dirty bits: an entry that leads to another table gets its accessed bit as soon as it is used,
even when the walk faults further down; the entry that maps the page gets accessed and dirty bits only when
the access is allowed. The manual lets processors do either for the former (SDM 4.8) and they do the latter.

Source: Intel SDM volume 3A, chapter 4 (paging), 4.6 (access rights and, in 4.6.2, protection keys), 4.7 (page
faults), 4.8 (accessed and dirty flags); volume 3C, 29.3.3.3 (what comes first of page faults and EPT); KVM's
``walk_addr_generic()``, ``permission_fault()`` and ``reset_guest_rsvds_bits_mask()``.
"""

from __future__ import annotations

from lasskvm.lass import FETCH, WRITE
from lasskvm.x86.ept import EPT_VIOLATION, GPA_OF_LINEAR, GPA_OF_TABLE, ept_walk
from lasskvm.x86.exceptions import PF_I, PF_P, PF_PK, PF_RSVD, PF_U, PF_W
from lasskvm.x86.physical import (
    PERM_ALL,
    PERM_R,
    PERM_W,
    PERM_X,
    PhysicalMemory,
    load_physical,
    store_physical,
)
from lasskvm.x86.registers import (
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PGE,
    CR4_PKE,
    CR4_PKS,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
    MASK32,
    MASK64,
)

__all__ = [
    "PERM_GLOBAL",
    "PERM_R",
    "PERM_W",
    "PERM_X",
    "PTE_A",
    "PTE_D",
    "PTE_G",
    "PTE_KEY_SHIFT",
    "PTE_P",
    "PTE_PS",
    "PTE_U",
    "PTE_W",
    "PTE_XD",
    "PhysicalMemory",
    "load_physical",
    "pdpte_reserved",
    "store_physical",
    "walk",
]

#: Beside the other ``PERM_*``: the translation is global and survives a change of CR3 (SDM 4.10.2.4).
PERM_GLOBAL = 1 << 3

# Paging-structure entries
PTE_P = 1 << 0
PTE_W = 1 << 1
PTE_U = 1 << 2
PTE_PWT = 1 << 3
PTE_PCD = 1 << 4
PTE_A = 1 << 5
PTE_D = 1 << 6
PTE_PS = 1 << 7
PTE_G = 1 << 8
#: Bits 62:59 of the entry that maps the page, with 4-level and 5-level paging: its protection key.
PTE_KEY_SHIFT = 59
PTE_XD = 1 << 63

#: Bits 51:12, the address in an entry or in CR3; MAXPHYADDR decides how many of them exist.
_ADDRESS = (1 << 52) - (1 << 12)
_ADDRESS32 = (1 << 32) - (1 << 12)
#: Bits 62:52: ignored with 4-level and 5-level paging, reserved with PAE paging.
_PAE_RESERVED_HIGH = (1 << 63) - (1 << 52)
#: PDPTE registers of PAE paging: bits 2:1 and 8:5 are reserved whatever MAXPHYADDR is, and so are bits 63:52.
_PDPTE_RESERVED = 0x1E6 | ((1 << 64) - (1 << 52))

# A table's entry is selected by the address bits from its shift on; a page of the entry's own has 1 << shift
# bytes.
_SHIFT_4K = 12
_SHIFT_2M = 21
_SHIFT_4M = 22
_SHIFT_1G = 30
_SHIFT_PML4 = 39
_SHIFT_PML5 = 48
_SHIFT_PER_LEVEL = 9
_INDEX = 0x1FF
_INDEX32 = 0x3FF
_ENTRY_BYTES = 8
_ENTRY_BYTES32 = 4
_OFFSET_4K = (1 << _SHIFT_4K) - 1
_OFFSET_4M = (1 << _SHIFT_4M) - 1
#: Bit 12 of an entry that maps a large page is PAT; address bits below the page size start at bit 13.
_LARGE_PAGE_LOW_BIT = 13

# PSE-36: bits 20:13 of a PDE for a 4 MiB page are physical address bits 39:32; bit 21 is reserved.
_PSE36_FIELD = ((1 << 21) - 1) & ~((1 << 13) - 1)
_PSE36_SHIFT = 19
_PSE36_ADDRESS_BITS = 40
_PSE36_RESERVED_END = 1 << 22

# Protection keys: a key selects two bits of PKRU or IA32_PKRS
_KEYS = 0xF
_KEY_ACCESS_DISABLE = 1 << 0
_KEY_WRITE_DISABLE = 1 << 1


def walk(
    memory: PhysicalMemory,
    address: int,
    flags: int,
    user: bool,
    cr0: int,
    cr3: int,
    cr4: int,
    efer: int,
    ac: bool,
    maxphyaddr: int,
    pdpte: int,
    pkru: int,
    pkrs: int,
    eptp: int,
) -> tuple[int, int, int, int]:
    """Translate linear *address* for one access: ``(gpa, permissions, error_code, outcome)``.

    *flags* is ``lass.WRITE``, ``lass.FETCH`` or 0 for a data read; other flags make no difference here.
    *user* says that the access is a user-mode one (CPL 3 and not implicit), *ac* that RFLAGS.AC is set; both
    are False for an implicit access. *maxphyaddr* counts physical address bits (32 to 52). *pdpte* is the
    PDPTE register that address bits 31:30 select, used by PAE paging only. *pkru* and *pkrs* are the rights of
    protection keys, which CR4.PKE and CR4.PKS put in force. With *eptp* 0 there is no EPT.

    When the access is allowed, *gpa* is the physical address and *permissions* says what accesses of the same
    kind (same *user*, same *ac*) may do to the page from now on without another walk: ``PERM_W`` is there
    only when the page is dirty already, so that the first write comes back to set the dirty bit. When it is
    not, *permissions* is 0 and *error_code* is the #PF error code.

    Under EPT, *gpa* is what EPT makes of it, and *permissions* are those that page tables and EPT both give.
    *outcome* is 0 unless an access of the walk, or the access itself, ends in an EPT violation or misconfiguration;
    then it is that of :func:`lasskvm.x86.ept.ept_walk`, *permissions* and *error_code* are 0, and the address returned
    is the guest-physical one that could not be translated. In the order of SDM 29.3.3.3: for each paging-structure
    entry first EPT, then what the entry says; the access rights of the page; and only then EPT for the page.
    """
    gpa, permissions, error_code, outcome = _walk(
        memory, address, flags, user, cr0, cr3, cr4, efer, ac, maxphyaddr, pdpte, pkru, pkrs, eptp
    )
    if eptp == 0 or permissions == 0:
        return gpa, permissions, error_code, outcome
    hpa, ept_permissions, outcome = ept_walk(memory, gpa, flags, eptp, maxphyaddr, GPA_OF_LINEAR)
    if outcome != 0:
        return gpa, 0, 0, outcome
    return hpa, permissions & (ept_permissions | PERM_GLOBAL), 0, 0


def pdpte_reserved(pdpte: int, maxphyaddr: int) -> bool:
    """Whether *pdpte* has a reserved bit set, so that loading it into a PDPTE register is #GP(0) (SDM 4.4.1).

    A PDPTE that is not present has no reserved bits.
    """
    reserved = _PDPTE_RESERVED | (_ADDRESS & ~((1 << maxphyaddr) - 1))
    return (pdpte & PTE_P) != 0 and (pdpte & reserved) != 0


def _walk(
    memory: PhysicalMemory,
    address: int,
    flags: int,
    user: bool,
    cr0: int,
    cr3: int,
    cr4: int,
    efer: int,
    ac: bool,
    maxphyaddr: int,
    pdpte: int,
    pkru: int,
    pkrs: int,
    eptp: int,
) -> tuple[int, int, int, int]:
    """The page walk as such, to a guest-physical address, with its tables under EPT: as :func:`walk`."""
    if (cr0 & CR0_PG) == 0:
        return address & MASK32, PERM_ALL, 0, 0
    entry_bytes = _ENTRY_BYTES
    if (efer & EFER_LMA) != 0:
        top_shift = _SHIFT_PML4
        if (cr4 & CR4_LA57) != 0:
            top_shift = _SHIFT_PML5
        reserved = _reserved(maxphyaddr, efer)
        entry_gpa, entry, frame, offset, rights, cause = _descend(
            memory, address, cr3, top_shift, reserved, eptp, maxphyaddr
        )
    elif (cr4 & CR4_PAE) != 0:
        if (pdpte & PTE_P) == 0:
            return 0, 0, _error_code(flags, user, cr4, efer, 0), 0
        reserved = _reserved(maxphyaddr, efer) | _PAE_RESERVED_HIGH
        entry_gpa, entry, frame, offset, rights, cause = _descend(
            memory, address, pdpte, _SHIFT_2M, reserved, eptp, maxphyaddr
        )
    else:
        entry_bytes = _ENTRY_BYTES32
        entry_gpa, entry, frame, offset, rights, cause = _descend32(
            memory, address, cr3, cr4, eptp, maxphyaddr
        )
    if offset == 0:
        if cause >= EPT_VIOLATION:
            return entry_gpa, 0, 0, cause
        return 0, 0, _error_code(flags, user, cr4, efer, cause), 0

    denied = 0
    if (cr4 & (CR4_PKE | CR4_PKS)) != 0 and (efer & EFER_LMA) != 0:
        denied = _denied_by_key(entry, rights, user, cr0, cr4, pkru, pkrs)
    permissions = _permissions(rights, user, cr0, cr4, ac) & (denied ^ PERM_ALL)
    needed, marked = PERM_R, entry | PTE_A
    if (flags & FETCH) != 0:
        needed = PERM_X
    elif (flags & WRITE) != 0:
        needed = PERM_W
        marked = entry | PTE_A | PTE_D
    if (permissions & needed) == 0:
        cause = PF_P
        if (denied & needed) != 0:
            cause = PF_P | PF_PK
        return 0, 0, _error_code(flags, user, cr4, efer, cause), 0
    if marked != entry:
        outcome = _store_entry(memory, entry_gpa, entry_bytes, marked, eptp, maxphyaddr)
        if outcome != 0:
            return entry_gpa, 0, 0, outcome
    if (marked & PTE_D) == 0:
        permissions = permissions & (PERM_R | PERM_X)
    if (marked & PTE_G) != 0 and (cr4 & CR4_PGE) != 0:
        permissions = permissions | PERM_GLOBAL
    return frame | (address & offset), permissions, 0, 0


def _descend(
    memory: PhysicalMemory, address: int, table: int, shift: int, reserved: int, eptp: int, maxphyaddr: int
) -> tuple[int, int, int, int, int, int]:
    """Follow 8-byte entries down from *table* to the one that maps the page.

    Returns its gpa, the entry, the page's gpa, the mask of the offset within the page, the rights of all
    levels (bits as in an entry, except that ``PTE_XD`` means "no level has XD set"), and 0. Without a page,
    the mask is 0 and the last is the cause. ``PF_P | PF_RSVD`` for a reserved bit and 0 for "not present" are
    what the error code says about it; more is an outcome of EPT at the entry whose gpa comes first.
    """
    rights = MASK64
    while True:
        entry_gpa = (table & _ADDRESS) | (((address >> shift) & _INDEX) * _ENTRY_BYTES)
        entry, outcome = _load_entry(memory, entry_gpa, _ENTRY_BYTES, eptp, maxphyaddr)
        if (entry & PTE_P) == 0:
            return entry_gpa, 0, 0, 0, 0, outcome
        rights = rights & (entry ^ PTE_XD)
        large = shift != _SHIFT_4K and (entry & PTE_PS) != 0
        offset = (1 << shift) - 1
        forbidden = reserved
        if large:
            if shift > _SHIFT_1G:
                forbidden = reserved | PTE_PS
            else:
                forbidden = reserved | ((1 << shift) - (1 << _LARGE_PAGE_LOW_BIT))
        if (entry & forbidden) != 0:
            return 0, 0, 0, 0, 0, PF_P | PF_RSVD
        if large or shift == _SHIFT_4K:
            return entry_gpa, entry, entry & _ADDRESS & ~offset, offset, rights, 0
        if (entry & PTE_A) == 0:
            outcome = _store_entry(memory, entry_gpa, _ENTRY_BYTES, entry | PTE_A, eptp, maxphyaddr)
            if outcome != 0:
                return entry_gpa, 0, 0, 0, 0, outcome
        table = entry
        shift = shift - _SHIFT_PER_LEVEL


def _descend32(
    memory: PhysicalMemory, address: int, cr3: int, cr4: int, eptp: int, maxphyaddr: int
) -> tuple[int, int, int, int, int, int]:
    """The same for the two levels of 4-byte entries of 32-bit paging (SDM 4.3)."""
    pde_gpa = (cr3 & _ADDRESS32) | (((address >> _SHIFT_4M) & _INDEX32) * _ENTRY_BYTES32)
    pde, outcome = _load_entry(memory, pde_gpa, _ENTRY_BYTES32, eptp, maxphyaddr)
    if (pde & PTE_P) == 0:
        return pde_gpa, 0, 0, 0, 0, outcome
    rights = pde | PTE_XD
    if (pde & PTE_PS) != 0 and (cr4 & CR4_PSE) != 0:
        address_bits = _PSE36_ADDRESS_BITS
        if maxphyaddr < address_bits:
            address_bits = maxphyaddr
        if (pde & (_PSE36_RESERVED_END - (1 << (address_bits - _PSE36_SHIFT)))) != 0:
            return 0, 0, 0, 0, 0, PF_P | PF_RSVD
        frame = (pde & MASK32 & ~_OFFSET_4M) | ((pde & _PSE36_FIELD) << _PSE36_SHIFT)
        return pde_gpa, pde, frame, _OFFSET_4M, rights, 0
    if (pde & PTE_A) == 0:
        outcome = _store_entry(memory, pde_gpa, _ENTRY_BYTES32, pde | PTE_A, eptp, maxphyaddr)
        if outcome != 0:
            return pde_gpa, 0, 0, 0, 0, outcome
    pte_gpa = (pde & _ADDRESS32) | (((address >> _SHIFT_4K) & _INDEX32) * _ENTRY_BYTES32)
    pte, outcome = _load_entry(memory, pte_gpa, _ENTRY_BYTES32, eptp, maxphyaddr)
    if (pte & PTE_P) == 0:
        return pte_gpa, 0, 0, 0, 0, outcome
    return pte_gpa, pte, pte & _ADDRESS32, _OFFSET_4K, rights & (pte | PTE_XD), 0


def _load_entry(
    memory: PhysicalMemory, entry_gpa: int, size: int, eptp: int, maxphyaddr: int
) -> tuple[int, int]:
    """A paging-structure entry and 0; 0 (not present) and an outcome when EPT does not let it be read."""
    entry_hpa = entry_gpa
    if eptp != 0:
        entry_hpa, _, outcome = ept_walk(memory, entry_gpa, 0, eptp, maxphyaddr, GPA_OF_TABLE)
        if outcome != 0:
            return 0, outcome
    return load_physical(memory, entry_hpa, size), 0


def _store_entry(
    memory: PhysicalMemory, entry_gpa: int, size: int, entry: int, eptp: int, maxphyaddr: int
) -> int:
    """Mark a paging-structure entry as accessed or dirty; 0, or an outcome when EPT does not let it be written."""
    entry_hpa = entry_gpa
    if eptp != 0:
        entry_hpa, _, outcome = ept_walk(memory, entry_gpa, WRITE, eptp, maxphyaddr, GPA_OF_TABLE)
        if outcome != 0:
            return outcome
    store_physical(memory, entry_hpa, size, entry)
    return 0


def _reserved(maxphyaddr: int, efer: int) -> int:
    """The bits that are reserved in 8-byte entries of every level."""
    reserved = _ADDRESS & ~((1 << maxphyaddr) - 1)
    if (efer & EFER_NXE) == 0:
        reserved = reserved | PTE_XD
    return reserved


def _permissions(rights: int, user: bool, cr0: int, cr4: int, ac: bool) -> int:
    """The ``PERM_*`` that the combined *rights* of all levels give to a kind of access (SDM 4.6.1)."""
    user_page = (rights & PTE_U) != 0
    if user and not user_page:
        return 0
    data = True
    execute = (rights & PTE_XD) != 0
    if user_page and not user:
        data = ac or (cr4 & CR4_SMAP) == 0
        execute = execute and (cr4 & CR4_SMEP) == 0
    permissions = 0
    if data:
        permissions = PERM_R
        if (rights & PTE_W) != 0 or (not user and (cr0 & CR0_WP) == 0):
            permissions = PERM_R | PERM_W
    if execute:
        permissions = permissions | PERM_X
    return permissions


def _denied_by_key(entry: int, rights: int, user: bool, cr0: int, cr4: int, pkru: int, pkrs: int) -> int:
    """The ``PERM_*`` that the protection key in *entry* takes away; fetches know no keys (SDM 4.6.2)."""
    keys = pkru
    in_force = cr4 & CR4_PKE
    if (rights & PTE_U) == 0:
        keys = pkrs
        in_force = cr4 & CR4_PKS
    if in_force == 0:
        return 0
    key_rights = keys >> (2 * ((entry >> PTE_KEY_SHIFT) & _KEYS))
    if (key_rights & _KEY_ACCESS_DISABLE) != 0:
        return PERM_R | PERM_W
    if (key_rights & _KEY_WRITE_DISABLE) != 0 and (user or (cr0 & CR0_WP) != 0):
        return PERM_W
    return 0


def _error_code(flags: int, user: bool, cr4: int, efer: int, cause: int) -> int:
    """The #PF error code: *cause* (``PF_P``, ``PF_RSVD``, ``PF_PK``) and what the access was (SDM 4.7)."""
    error_code = cause
    if user:
        error_code = error_code | PF_U
    if (flags & FETCH) != 0:
        if (cr4 & CR4_SMEP) != 0 or ((cr4 & CR4_PAE) != 0 and (efer & EFER_NXE) != 0):
            error_code = error_code | PF_I
    elif (flags & WRITE) != 0:
        error_code = error_code | PF_W
    return error_code
