"""ENCLS of L2: L1's ENCLS-exiting bitmap says which leaf functions exit; the others are executed, and LASS is L2's."""

from __future__ import annotations

from typing import Any

from lasskvm.conformance import enclaves as place
from lasskvm.conformance.case import Case, Effect, Expected, fault, gp, vm_exit
from lasskvm.conformance.cases.nested_common import IDENTITY
from lasskvm.conformance.cases.sgx_common import CALLS, ENABLED, SIGNED_BY_US, Call
from lasskvm.conformance.enclaves import Side
from lasskvm.conformance.nested import Nested
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import UD
from lasskvm.x86.msr import FEATURE_CONTROL_VMX_OUTSIDE_SMX, MSR_IA32_FEATURE_CONTROL
from lasskvm.x86.registers import MASK64, RFLAGS_AC
from lasskvm.x86.sgx import EnclsLeaf
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["CASES"]

_NEEDS = frozenset({"sgx", "vmx"})
_MSRS = ENABLED | SIGNED_BY_US
_MSRS[MSR_IA32_FEATURE_CONTROL] |= FEATURE_CONTROL_VMX_OUTSIDE_SMX
_EXITING = vmx.SECONDARY_EXEC_ENCLS_EXITING
_EXIT = vm_exit(ExitReason.ENCLS, exit_qualification=0, vm_exit_instruction_len=3).but(effect=Effect.NONE)
_EPA, _CREATE = CALLS[EnclsLeaf.EPA], CALLS[EnclsLeaf.ECREATE]
_PAGE, _LOW_INFO = Side.HIGH.at(place.FREE), Side.LOW.at(place.PAGEINFO)
_EPA_DONE = _EPA.done(Effect.REWRITTEN)
#: Bit 63 is for all leaf functions from 63 on.
_LAST_BIT = 1 << 63
_FAR_LEAF = 0x40


def _bit(leaf: EnclsLeaf) -> int:
    return 1 << leaf


def _case(
    call: Call,
    name: str,
    words: str,
    bitmap: int,
    lass: Expected,
    off: Expected,
    *,
    control: bool = True,
    **more: Any,
) -> tuple[Case, Case]:
    """Without EPT, and with EPT that maps everything one to one, the EPC included."""

    def made(suffix: str, **nesting: Any) -> Case:
        nested = Nested(
            secondary=_EXITING if control else 0, fields={VmcsField.ENCLS_EXITING_BITMAP: bitmap}, **nesting
        )
        return call.case(
            f"l2-{name}{suffix}", f"{words}{' (EPT)' if suffix else ''}", lass, off, nested=nested,
            **{"needs": _NEEDS, "msrs": _MSRS, "operand": _PAGE, **more},
        )  # fmt: skip

    return made(""), made("-ept", ept=IDENTITY)


_CASES = (
    _case(_EPA, "exits", "L1 intercepts the leaf function", _bit(EnclsLeaf.EPA), _EXIT, _EXIT),
    _case(_EPA, "other-leaf-exits", "L1 intercepts other leaf functions only", MASK64 ^ _bit(EnclsLeaf.EPA), _EPA_DONE,
          _EPA_DONE),
    _case(_EPA, "no-exiting", "without the control the bitmap does not matter", MASK64, _EPA_DONE, _EPA_DONE,
          control=False),
    _case(_EPA, "far-leaf-exits", "bit 63 is for leaf functions from 63 on, those that do not exist, too", _LAST_BIT,
          _EXIT, _EXIT, registers={"rax": _FAR_LEAF}),
    _case(_EPA, "far-leaf", "a leaf function that does not exist and is not intercepted is L2's #GP(0)",
          MASK64 ^ _LAST_BIT, gp(), gp(), registers={"rax": _FAR_LEAF}),
    _case(_EPA, "user", "at CPL 3 it is #UD in L2, before any exit", MASK64, fault(UD), fault(UD), cpl=3,
          operand=None),
    _case(_CREATE.with_operand("rbx", _LOW_INFO), "exit-before-violation", "the exit comes before the operand",
          MASK64, _EXIT, _EXIT, operand=_LOW_INFO),
    _case(_CREATE.with_operand("rbx", _LOW_INFO), "violation", "PAGEINFO below the split", 0, gp(),
          _CREATE.done(Effect.READ), operand=_LOW_INFO),
    _case(_CREATE.with_operand("rbx", _LOW_INFO), "violation-ac1", "PAGEINFO below the split with AC=1", 0,
          _CREATE.done(Effect.READ), _CREATE.done(Effect.READ), operand=_LOW_INFO, rflags=RFLAGS_AC),
)  # fmt: skip

CASES: tuple[Case, ...] = tuple(case for pair in _CASES for case in pair)
