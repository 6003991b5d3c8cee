"""Operands of ENCLS that are wrong in more than one way: alignment comes first, then the canonical rule and LASS, then
paging, then whether the operand is in the EPC, and in the right kind of page.

One operand of each kind is enough: what is read, what is written, what has to be in the EPC, as a page and as a word.
"""

from __future__ import annotations

from lasskvm.conformance import enclaves as place
from lasskvm.conformance.case import Case, gp, pf
from lasskvm.conformance.cases.sgx_common import epc_fault
from lasskvm.conformance.cases.sgx_operands import OPERANDS, Operand
from lasskvm.conformance.enclaves import Side
from lasskvm.conformance.setup import ReadOnly
from lasskvm.x86.exceptions import PF_P, PF_W
from lasskvm.x86.registers import RFLAGS_AC

__all__ = ["CASES"]

_NOT_CANONICAL = 1 << 62
_LOOKED_AT = (
    "ecreate-pageinfo", "ecreate-srcpge", "eadd-secinfo", "eadd-page", "eadd-secs", "eextend-chunk", "einit-sigstruct",
    "einit-einittoken", "ewb-pcmd", "ewb-srcpge", "eldu-slot", "edbgrd-word",
)  # fmt: skip


def _wrong(operand: Operand) -> tuple[Case, ...]:
    low, high, low_user = (side.at(operand.distance) for side in (Side.LOW, Side.HIGH, Side.LOW_USER))
    absent_low, absent_high = Side.LOW.at(place.ABSENT), Side.HIGH.at(place.ABSENT)
    half = operand.alignment // 2
    written = PF_W if operand.is_written else 0
    done = operand.call.done(operand.effect)
    read_only = pf(PF_P | PF_W, high) if operand.is_written else done
    case = operand.case
    return (
        case("misaligned-high", "that is not aligned", high + half, gp(), gp()),
        case("misaligned-absent", "that is neither aligned nor mapped", absent_high + half, gp(), gp()),
        case("misaligned-low-ac1", "below the split that is not aligned, with AC=1", low + half, gp(), gp(),
             rflags=RFLAGS_AC),
        case("not-canonical", "at an address that is not canonical", _NOT_CANONICAL, gp(), gp(), operand=None),
        case("low-absent", "below the split that is not mapped", absent_low, gp(), pf(written, absent_low)),
        case("low-absent-ac1", "below the split that is not mapped, with AC=1", absent_low, pf(written, absent_low),
             pf(written, absent_low), rflags=RFLAGS_AC),
        case("high-absent", "above the split that is not mapped", absent_high, pf(written, absent_high),
             pf(written, absent_high)),
        case("low-user", "in a low user page: LASS comes before SMAP", low_user, gp(), pf(PF_P | written, low_user)),
        case("low-user-ac1", "in a low user page, with AC=1", low_user, done, done, rflags=RFLAGS_AC),
        case("read-only", "in a page that cannot be written", high, read_only, read_only, setup=(ReadOnly(high),)),
    )  # fmt: skip


def _outside(operand: Operand) -> tuple[Case, ...]:
    """What has to be in the EPC is not."""
    low, high = Side.LOW.at(place.ORDINARY), Side.HIGH.at(place.ORDINARY)
    fault_low = epc_fault(low, is_write=operand.is_written)
    fault_high = epc_fault(high, is_write=operand.is_written)
    # The access was fine for paging: the page has been accessed, so it is not watched.
    return tuple(
        operand.case(name, f"{words} the split, not in the EPC", address, lass, off, operand=None, **more)
        for name, words, address, lass, off, more in (
            ("low-outside", "below", low, gp(), fault_low, {}),
            ("low-outside-ac1", "with AC=1 below", low, fault_low, fault_low, {"rflags": RFLAGS_AC}),
            ("high-outside", "above", high, fault_high, fault_high, {}),
        )
    )


_OPERANDS = [operand for operand in OPERANDS if operand.id in _LOOKED_AT]
CASES: tuple[Case, ...] = (
    *(case for operand in _OPERANDS for case in _wrong(operand)),
    *(case for operand in OPERANDS if operand.in_epc for case in _outside(operand)),
)
