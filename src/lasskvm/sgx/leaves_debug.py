"""Leaf functions that look into an enclave and change it, if it allows debugging: EDBGRD and EDBGWR.

The permissions of the page do not matter. Of a version array EDBGRD tells only which slots are in use.

Source: Intel SDM volume 3D, 38.3 (EDBGRD, EDBGWR).
"""

from __future__ import annotations

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.faults import general_protection
from lasskvm.emulator.modes import in_64bit_mode
from lasskvm.sgx.epc import EpcmEntry
from lasskvm.sgx.leaves_common import SUCCESS, Leaf, Outcome, SgxUnit, register
from lasskvm.sgx.operands import EpcOperand, require_aligned
from lasskvm.state import RBX, RCX
from lasskvm.x86 import sgx
from lasskvm.x86.sgx import EnclsLeaf, PageType, SgxError

__all__ = ["LEAVES"]

_QUADWORD, _DOUBLEWORD = 8, 4
#: Where the fields of a TCS end.
_TCS_LIMIT = sgx.TCS_RESERVED[0][0]


def _edbgrd(ctx: Emulation, unit: SgxUnit) -> Outcome:
    """RCX: what to read; the value goes to RBX."""
    operand, entry = _operand(ctx, unit, PageType.REG, PageType.TCS, PageType.VA, is_written=False)
    if entry.pending or entry.modified:
        return Outcome.failed(SgxError.PAGE_NOT_DEBUGGABLE)
    if entry.page_type == PageType.TCS and operand.gpa - operand.page >= _TCS_LIMIT:
        raise general_protection()
    if entry.page_type == PageType.VA:
        is_occupied = unit.epc.version(operand.gpa & ~(sgx.VA_SLOT_SIZE - 1)) != 0
        ctx.words[RBX] = (1 << 8 * operand.size) - 1 if is_occupied else 0
        return SUCCESS
    _require_debug(unit, entry)
    ctx.words[RBX] = int.from_bytes(unit.epc.read(operand.gpa, operand.size), "little")
    return SUCCESS


def _edbgwr(ctx: Emulation, unit: SgxUnit) -> Outcome:
    """RCX: where to write the value of RBX."""
    operand, entry = _operand(ctx, unit, PageType.REG, PageType.TCS, is_written=True)
    if entry.pending or entry.modified:
        return Outcome.failed(SgxError.PAGE_NOT_DEBUGGABLE)
    offset = operand.gpa - operand.page
    if entry.page_type == PageType.TCS and offset & ~(_QUADWORD - 1) != sgx.TCS_FLAGS:
        raise general_protection()
    _require_debug(unit, entry)
    unit.epc.write(operand.gpa, register(ctx, RBX).to_bytes(operand.size, "little"))
    return SUCCESS


def _operand(
    ctx: Emulation, unit: SgxUnit, *page_types: PageType, is_written: bool
) -> tuple[EpcOperand, EpcmEntry]:
    """What RCX points to, in a valid page of one of *page_types*, and the entry of that page."""
    size = _QUADWORD if in_64bit_mode(ctx.words) else _DOUBLEWORD
    operand = EpcOperand(ctx, register(ctx, RCX), size, is_written=is_written)
    require_aligned(operand)
    operand.resolve(unit.epc)
    entry = unit.epc.entry(operand.page)
    if entry is None or entry.page_type not in page_types:
        raise operand.fault()
    return operand, entry


def _require_debug(unit: SgxUnit, entry: EpcmEntry) -> None:
    """#GP(0) unless the enclave of the page allows debugging."""
    assert entry.secs is not None
    if not unit.epc.secs(entry.secs).is_debug:
        raise general_protection()


#: The leaf functions of this module, by what selects them.
LEAVES: dict[int, Leaf] = {EnclsLeaf.EDBGRD: _edbgrd, EnclsLeaf.EDBGWR: _edbgwr}
