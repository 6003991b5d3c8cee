"""Leaf functions that build an enclave: ECREATE, EADD, EEXTEND, EINIT.

Each follows the order of the manual's operation. A processor locks pages and measurements against others that use them;
there is nobody else here. EINIT does not look for interrupts while it verifies the signature, so it never ends in
SGX_UNMASKED_EVENT.

Source: Intel SDM volume 3D, 38.3 (the leaf functions by name), 39.7.2 and 39.7.3 (XFRM and the size of SSA frames);
KVM's ``__handle_encls_ecreate()``.
"""

from __future__ import annotations

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.faults import general_protection
from lasskvm.emulator.modes import linear_address_bits
from lasskvm.emulator.msrs import read_msr
from lasskvm.sgx import measurement
from lasskvm.sgx.enumeration import Limits
from lasskvm.sgx.epc import EpcmEntry
from lasskvm.sgx.fields import is_zero, u32, u64
from lasskvm.sgx.launch import EinitToken, hash_of_msrs, initialize
from lasskvm.sgx.leaves_common import (
    SUCCESS,
    Leaf,
    Outcome,
    PageInfo,
    SgxUnit,
    check_secinfo,
    register,
    secs_entry,
)
from lasskvm.sgx.operands import EpcOperand, MemoryOperand, is_aligned, require_aligned, source_page
from lasskvm.sgx.secs import Secs, secs_reserved_is_zero
from lasskvm.sgx.sigstruct import Sigstruct
from lasskvm.state import RBX, RCX, RDX
from lasskvm.x86 import sgx
from lasskvm.x86.address import is_canonical
from lasskvm.x86.msr import MSR_IA32_SGXLEPUBKEYHASH0
from lasskvm.x86.registers import MASK32
from lasskvm.x86.sgx import EnclsLeaf, PageType, SgxError

__all__ = ["LEAVES"]

_TCS_STAGE_BYTES, _TCS_AEP_BYTES, _TCS_CSSA_BYTES = 8, 8, 4


def _ecreate(ctx: Emulation, unit: SgxUnit) -> None:
    """RBX: PAGEINFO; RCX: a free EPC page, which becomes the SECS."""
    target, info = _target_and_pageinfo(ctx, unit)
    source = source_page(ctx, info.source_page)
    secinfo = MemoryOperand(ctx, info.secinfo, sgx.SECINFO_SIZE)
    require_aligned(source, secinfo)
    if info.linear_address or info.secs:
        raise general_protection()
    check_secinfo(secinfo.load(), PageType.SECS)
    if unit.epc.entry(target.page) is not None:
        raise target.fault()
    page = source.load()
    if not _is_acceptable(ctx, page):
        raise general_protection()
    secs = Secs.created(page, unit.epc.next_eid())
    measurement.measure_create(secs)
    unit.epc.add(target.page, EpcmEntry(PageType.SECS), secs.pack())


def _target_and_pageinfo(ctx: Emulation, unit: SgxUnit) -> tuple[EpcOperand, PageInfo]:
    """The EPC page in RCX, resolved, and what the PAGEINFO in RBX says."""
    pageinfo = MemoryOperand(ctx, register(ctx, RBX), sgx.PAGEINFO_SIZE)
    target = EpcOperand(ctx, register(ctx, RCX))
    require_aligned(pageinfo, target)
    target.resolve(unit.epc)
    return target, PageInfo.parse(pageinfo.load())


def _is_acceptable(ctx: Emulation, page: bytes) -> bool:
    """Whether an enclave can be made of the SECS in *page*, as ECREATE checks it."""
    secs, limits = Secs.parse(page), Limits.of(ctx.cpuid)
    if secs.xfrm & sgx.XFRM_REQUIRED != sgx.XFRM_REQUIRED or secs.xfrm & ~limits.xfrm:
        return False
    if secs.miscselect & ~limits.miscselect or secs.attributes & ~limits.attributes:
        return False
    frame = ctx.cpuid.xsave_bytes(secs.xfrm) + sgx.GPRSGX_SIZE
    if secs.miscselect & sgx.MISC_EXINFO:
        frame += sgx.EXINFO_SIZE
    if secs.ssa_frame_size * sgx.EPC_PAGE_SIZE < frame:
        return False
    if secs.is_64bit and not is_canonical(secs.base, linear_address_bits(ctx.words)):
        return False
    if not secs.is_64bit and secs.base & ~MASK32:
        return False
    return (
        sgx.MIN_ENCLAVE_SIZE <= secs.size < limits.enclave_size(secs.is_64bit)
        and secs.size.bit_count() == 1
        and is_aligned(secs.base, secs.size)
        and secs_reserved_is_zero(page)
    )


def _eadd(ctx: Emulation, unit: SgxUnit) -> None:
    """RBX: PAGEINFO; RCX: a free EPC page, which becomes a page of the enclave."""
    target, info = _target_and_pageinfo(ctx, unit)
    source = source_page(ctx, info.source_page)
    secs_page = EpcOperand(ctx, info.secs)
    secinfo_operand = MemoryOperand(ctx, info.secinfo, sgx.SECINFO_SIZE)
    require_aligned(source, secs_page, secinfo_operand)
    if not is_aligned(info.linear_address, sgx.EPC_PAGE_SIZE):
        raise general_protection()
    secs_page.resolve(unit.epc)
    secinfo = secinfo_operand.load()
    flags = check_secinfo(secinfo, PageType.REG, PageType.TCS)
    if unit.epc.entry(target.page) is not None:
        raise target.fault()
    secs_entry(unit.epc, secs_page)
    secs = unit.epc.secs(secs_page.page)
    page = source.load()
    is_tcs = (flags & sgx.SECINFO_PAGE_TYPE_MASK) >> sgx.SECINFO_PAGE_TYPE_SHIFT == PageType.TCS
    if is_tcs:
        _check_tcs(page, secs)
    elif flags & sgx.SECINFO_W and not flags & sgx.SECINFO_R:
        raise general_protection()
    if not secs.covers(info.linear_address) or secs.is_initialized:
        raise general_protection()
    if is_tcs:
        # Threads enter, nobody reads or writes; and nobody debugs it unless EDBGWR says so.
        flags &= ~sgx.SECINFO_RWX
        page = _initial_tcs(page)
    measured = flags.to_bytes(8, "little") + secinfo[sgx.SECINFO_FLAGS + 8 :]
    measurement.measure_add(secs, info.linear_address - secs.base, measured)
    entry = EpcmEntry(
        PageType.TCS if is_tcs else PageType.REG,
        permissions=flags & sgx.SECINFO_RWX,
        secs=secs_page.page,
        linear_address=info.linear_address,
    )
    unit.epc.add(target.page, entry, page)
    unit.epc.store_secs(secs_page.page, secs)


def _check_tcs(page: bytes, secs: Secs) -> None:
    """#GP(0) for a TCS with reserved bits, or with limits that no segment of 32-bit code can have."""
    low_bits = sgx.TCS_LIMIT_LOW_BITS
    if not is_zero(page, sgx.TCS_RESERVED) or u64(page, sgx.TCS_FLAGS) & ~sgx.TCS_FLAGS_DBGOPTIN:
        raise general_protection()
    limits = u32(page, sgx.TCS_FSLIMIT) & u32(page, sgx.TCS_GSLIMIT)
    if not secs.is_64bit and limits & low_bits != low_bits:
        raise general_protection()


def _initial_tcs(page: bytes) -> bytes:
    """The TCS with its state, CSSA, AEP and FLAGS.DBGOPTIN cleared."""
    tcs = bytearray(page)
    flags = u64(page, sgx.TCS_FLAGS) & ~sgx.TCS_FLAGS_DBGOPTIN
    tcs[sgx.TCS_STAGE : sgx.TCS_STAGE + _TCS_STAGE_BYTES] = bytes(_TCS_STAGE_BYTES)
    tcs[sgx.TCS_FLAGS : sgx.TCS_FLAGS + 8] = flags.to_bytes(8, "little")
    tcs[sgx.TCS_CSSA : sgx.TCS_CSSA + _TCS_CSSA_BYTES] = bytes(_TCS_CSSA_BYTES)
    tcs[sgx.TCS_AEP : sgx.TCS_AEP + _TCS_AEP_BYTES] = bytes(_TCS_AEP_BYTES)
    return bytes(tcs)


def _eextend(ctx: Emulation, unit: SgxUnit) -> None:
    """RBX: the SECS; RCX: 256 bytes of a page of its enclave, which are measured."""
    secs_page = EpcOperand(ctx, register(ctx, RBX))
    require_aligned(secs_page)
    secs_page.resolve(unit.epc)
    chunk = EpcOperand(ctx, register(ctx, RCX), sgx.EEXTEND_CHUNK, is_written=False)
    require_aligned(chunk)
    chunk.resolve(unit.epc)
    entry = unit.epc.entry(chunk.page)
    if entry is None or entry.page_type not in (PageType.REG, PageType.TCS):
        raise chunk.fault()
    if entry.secs != secs_page.page:
        raise general_protection()
    secs = unit.epc.secs(secs_page.page)
    if secs.is_initialized:
        raise general_protection()
    offset = entry.linear_address - secs.base + (chunk.gpa - chunk.page)
    measurement.measure_extend(secs, offset, unit.epc.read(chunk.gpa, sgx.EEXTEND_CHUNK))
    unit.epc.store_secs(secs_page.page, secs)


def _einit(ctx: Emulation, unit: SgxUnit) -> Outcome:
    """RBX: SIGSTRUCT; RCX: the SECS; RDX: EINITTOKEN."""
    signed = MemoryOperand(ctx, register(ctx, RBX), sgx.SIGSTRUCT_SIZE, sgx.SIGSTRUCT_ALIGNMENT)
    secs_page = EpcOperand(ctx, register(ctx, RCX))
    permit = MemoryOperand(ctx, register(ctx, RDX), sgx.EINITTOKEN_SIZE, sgx.EINITTOKEN_ALIGNMENT)
    require_aligned(signed, secs_page, permit)
    secs_page.resolve(unit.epc)
    sigstruct, token = Sigstruct.parse(signed.load()), EinitToken.parse(permit.load())
    error = sigstruct.check()
    if error:
        return Outcome.failed(error)
    secs_entry(unit.epc, secs_page)
    secs = unit.epc.secs(secs_page.page)
    if secs.is_initialized:
        raise general_protection()
    error = unit.launch.check(secs, sigstruct, token, _launch_key_hash(ctx))
    if error != SgxError.SUCCESS:
        return Outcome.failed(error)
    initialize(secs, sigstruct)
    unit.epc.store_secs(secs_page.page, secs)
    return SUCCESS


def _launch_key_hash(ctx: Emulation) -> bytes:
    first, second, third, fourth = (
        read_msr(ctx, MSR_IA32_SGXLEPUBKEYHASH0 + number, host_initiated=True) for number in range(4)
    )
    return hash_of_msrs((first, second, third, fourth))


#: The leaf functions of this module, by what selects them.
LEAVES: dict[int, Leaf] = {
    EnclsLeaf.ECREATE: _ecreate,
    EnclsLeaf.EADD: _eadd,
    EnclsLeaf.EEXTEND: _eextend,
    EnclsLeaf.EINIT: _einit,
}
