"""Leaf functions that manage the EPC: EPA, EREMOVE, EBLOCK, ETRACK, EWB, ELDB and ELDU.

Each follows the order of the manual's operation. A processor locks pages against others that use them, and waits for
those that are inside an enclave; there is nobody else here.

Source: Intel SDM volume 3D, 36.5 (management of EPC pages), 38.3 (the leaf functions by name).
"""

from __future__ import annotations

from functools import partial

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.faults import general_protection
from lasskvm.sgx.epc import Epc, EpcmEntry
from lasskvm.sgx.leaves_common import SUCCESS, Leaf, Outcome, PageInfo, SgxUnit, register, secs_entry
from lasskvm.sgx.operands import EpcOperand, MemoryOperand, UpdatedOperand, require_aligned, source_page
from lasskvm.sgx.paging_crypto import MacHeader, Pcmd
from lasskvm.state import RBX, RCX, RDX
from lasskvm.x86 import sgx
from lasskvm.x86.sgx import EnclsLeaf, PageType, SgxError

__all__ = ["LEAVES"]

_ENCLAVE_PAGES = (PageType.REG, PageType.TCS, PageType.TRIM)
#: The enclave identifier of pages that belong to no enclave.
_NO_ENCLAVE = 0


def _epa(ctx: Emulation, unit: SgxUnit) -> None:
    """RBX: the page type PT_VA; RCX: a free EPC page, which becomes an empty version array."""
    target = EpcOperand(ctx, register(ctx, RCX))
    if register(ctx, RBX) != PageType.VA:
        raise general_protection()
    require_aligned(target)
    target.resolve(unit.epc)
    if unit.epc.entry(target.page) is not None:
        raise target.fault()
    unit.epc.add(target.page, EpcmEntry(PageType.VA))


def _eremove(ctx: Emulation, unit: SgxUnit) -> Outcome:
    """RCX: an EPC page, which becomes free."""
    page, entry = _only_operand(ctx, unit)
    if entry is None:
        return SUCCESS
    if entry.page_type == PageType.SECS and unit.epc.children(page.page):
        return Outcome.failed(SgxError.CHILD_PRESENT)
    unit.epc.remove(page.page)
    return SUCCESS


def _eblock(ctx: Emulation, unit: SgxUnit) -> Outcome:
    """RCX: a page of an enclave, which nobody can access from now on."""
    page, entry = _only_operand(ctx, unit)
    if entry is None:
        return Outcome.failed(SgxError.PG_INVLD)
    if entry.page_type not in _ENCLAVE_PAGES:
        is_secs = entry.page_type == PageType.SECS
        return Outcome.noted(SgxError.PG_IS_SECS if is_secs else SgxError.NOTBLOCKABLE)
    if entry.blocked:
        return Outcome.noted(SgxError.BLKSTATE)
    unit.epc.block(page.page)
    return SUCCESS


def _etrack(ctx: Emulation, unit: SgxUnit) -> Outcome:
    """RCX: an SECS. Nobody is inside its enclave, so what has been blocked before has no translation left."""
    page, _ = _only_operand(ctx, unit)
    secs_entry(unit.epc, page)
    unit.epc.track(page.page)
    return SUCCESS


def _only_operand(ctx: Emulation, unit: SgxUnit) -> tuple[EpcOperand, EpcmEntry | None]:
    """The EPC page in RCX and its entry."""
    page = EpcOperand(ctx, register(ctx, RCX))
    require_aligned(page)
    page.resolve(unit.epc)
    return page, unit.epc.entry(page.page)


# --------------------------------------------------------------------------------------------- out of the EPC and back


def _ewb(ctx: Emulation, unit: SgxUnit) -> Outcome:
    """RBX: PAGEINFO; RCX: the EPC page to write out; RDX: the slot of a version array for its version.

    A slot that is in use is overwritten, and that is noted: the manual has the page written out nevertheless.
    """
    epc = unit.epc
    pageinfo = UpdatedOperand(ctx, register(ctx, RBX), sgx.PAGEINFO_SIZE)
    page = EpcOperand(ctx, register(ctx, RCX))
    require_aligned(pageinfo, page)
    page.resolve(epc)
    slot = _version_slot(ctx, epc)
    if slot.page == page.page:
        raise general_protection()
    pageinfo.prepare()
    info = PageInfo.parse(pageinfo.load())
    if info.linear_address or info.secs:
        raise general_protection()
    pcmd = UpdatedOperand(ctx, info.secinfo, sgx.PCMD_SIZE)
    destination = UpdatedOperand(ctx, info.source_page, sgx.EPC_PAGE_SIZE)
    require_aligned(pcmd, destination)
    entry = epc.entry(page.page)
    if entry is None:
        raise page.fault()
    _check_version_array(epc, slot)
    error = _obstacle_to_eviction(epc, page.page, entry)
    if error:
        return Outcome.failed(error)
    destination.prepare()
    pcmd.prepare()
    eid, enclave_id = _identities(epc, page.page, entry)
    version = epc.next_version()
    header = MacHeader(entry.secinfo_flags, entry.linear_address, eid)
    ciphertext, mac = unit.paging.seal(epc.read(page.page), version, header)
    destination.store(ciphertext)
    pcmd.store(Pcmd(entry.secinfo_flags, enclave_id, mac).pack())
    pageinfo.store(entry.linear_address.to_bytes(8, "little"), sgx.PAGEINFO_LINADDR)
    was_occupied = epc.version(slot.gpa) != 0
    epc.store_version(slot.gpa, version)
    epc.remove(page.page)
    return Outcome.noted(SgxError.VA_SLOT_OCCUPIED) if was_occupied else SUCCESS


def _obstacle_to_eviction(epc: Epc, page: int, entry: EpcmEntry) -> SgxError:
    if entry.page_type == PageType.SECS and epc.children(page):
        return SgxError.CHILD_PRESENT
    if entry.page_type not in _ENCLAVE_PAGES:
        return SgxError.SUCCESS
    if not entry.blocked:
        return SgxError.PAGE_NOT_BLOCKED
    return SgxError.SUCCESS if epc.is_tracked(page) else SgxError.NOT_TRACKED


def _identities(epc: Epc, page: int, entry: EpcmEntry) -> tuple[int, int]:
    """The enclave that the page is bound to, and the one that software is told."""
    if entry.secs is not None:
        eid = epc.secs(entry.secs).eid
        return eid, eid
    if entry.page_type == PageType.SECS:
        return _NO_ENCLAVE, epc.secs(page).eid
    return _NO_ENCLAVE, _NO_ENCLAVE


def _eld(is_blocked: bool, ctx: Emulation, unit: SgxUnit) -> Outcome:
    """RBX: PAGEINFO; RCX: a free EPC page; RDX: the slot with the version. ELDB loads the page blocked."""
    epc = unit.epc
    pageinfo = MemoryOperand(ctx, register(ctx, RBX), sgx.PAGEINFO_SIZE)
    target = EpcOperand(ctx, register(ctx, RCX))
    require_aligned(pageinfo, target)
    target.resolve(epc)
    slot = _version_slot(ctx, epc)
    info = PageInfo.parse(pageinfo.load())
    pcmd_operand = MemoryOperand(ctx, info.secinfo, sgx.PCMD_SIZE)
    source = source_page(ctx, info.source_page)
    require_aligned(pcmd_operand, source)
    if epc.entry(target.page) is not None:
        raise target.fault()
    _check_version_array(epc, slot)
    data = pcmd_operand.load()
    pcmd = Pcmd.parse(data)
    page_type = (pcmd.flags & sgx.SECINFO_PAGE_TYPE_MASK) >> sgx.SECINFO_PAGE_TYPE_SHIFT
    secs, eid = None, _NO_ENCLAVE
    if page_type in _ENCLAVE_PAGES:
        secs = _parent(ctx, epc, info.secs)
        eid = epc.secs(secs).eid
    elif info.secs:
        raise general_protection()
    header = MacHeader(pcmd.flags, info.linear_address, eid)
    content = unit.paging.open(source.load(), pcmd.mac, epc.version(slot.gpa), header)
    # The MAC covers the reserved fields, too, which EWB has left zero.
    if content is None or not Pcmd.reserved_is_zero(data):
        return Outcome.failed(SgxError.MAC_COMPARE_FAIL)
    epc.store_version(slot.gpa, 0)
    blocked = is_blocked and secs is not None
    epc.add(
        target.page, EpcmEntry.from_secinfo_flags(pcmd.flags, info.linear_address, secs, blocked), content
    )
    return SUCCESS


def _parent(ctx: Emulation, epc: Epc, offset: int) -> int:
    """The SECS page at DS:*offset*, PAGEINFO.SECS."""
    operand = EpcOperand(ctx, offset)
    require_aligned(operand)
    operand.resolve(epc)
    secs_entry(epc, operand)
    return operand.page


def _version_slot(ctx: Emulation, epc: Epc) -> EpcOperand:
    """The operand in RDX, in the EPC; :func:`_check_version_array` looks at its page later."""
    slot = EpcOperand(ctx, register(ctx, RDX), sgx.VA_SLOT_SIZE)
    require_aligned(slot)
    return slot.resolve(epc)


def _check_version_array(epc: Epc, slot: EpcOperand) -> None:
    entry = epc.entry(slot.page)
    if entry is None or entry.page_type != PageType.VA:
        raise slot.fault()


#: The leaf functions of this module, by what selects them.
LEAVES: dict[int, Leaf] = {
    EnclsLeaf.EPA: _epa,
    EnclsLeaf.EREMOVE: _eremove,
    EnclsLeaf.EBLOCK: _eblock,
    EnclsLeaf.ETRACK: _etrack,
    EnclsLeaf.EWB: _ewb,
    EnclsLeaf.ELDB: partial(_eld, True),
    EnclsLeaf.ELDU: partial(_eld, False),
}
