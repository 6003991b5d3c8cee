"""Every operand of every ENCLS leaf function, on both sides of the split.

KVM intercepts some of the leaf functions and reads their operands itself; whoever does it, each operand is a
supervisor-mode data access of its own size: those in registers, and those that a PAGEINFO points to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lasskvm.conformance.case import Case, Effect, Expected, gp
from lasskvm.conformance.cases.sgx_common import CALLS, Call
from lasskvm.conformance.enclaves import Side
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.registers import RFLAGS_AC
from lasskvm.x86.sgx import EnclsLeaf

__all__ = ["CASES", "OPERANDS", "Operand"]

#: What the MMIO variant can hold: no more than a few words.
_MOST_MMIO_BYTES = 128


@dataclass(frozen=True)
class Operand:
    """An operand of *leaf*: *field* of its :class:`Call` is the address."""

    leaf: EnclsLeaf
    name: str
    field: str
    alignment: int
    is_written: bool = False
    in_epc: bool = False

    @property
    def id(self) -> str:
        """How the ids of its cases begin."""
        return f"{self.leaf.name.lower()}-{self.name}"

    @property
    def call(self) -> Call:
        """A call that completes, all operands in the upper half."""
        return CALLS[self.leaf]

    @property
    def distance(self) -> int:
        """Where it is on its side."""
        return int(getattr(self.call, self.field)) - Side.HIGH.value

    @property
    def effect(self) -> Effect:
        """What becomes of its page when the leaf function completes; what the EPC holds is not seen."""
        if not self.is_written:
            return Effect.READ
        return Effect.REWRITTEN if self.in_epc else Effect.WRITTEN

    def case(self, name: str, words: str, address: int, lass: Expected, off: Expected, **more: Any) -> Case:
        """The call with the operand at *address*, which is watched; *words* say what is different about it."""
        return self.call.with_operand(self.field, address).case(
            f"{self.id}-{name}", f"{self.name.upper()} {words}", lass, off, **{"operand": address, **more}
        )


def _ordinary(leaf: EnclsLeaf, name: str, field: str, alignment: int, *, is_written: bool = False) -> Operand:
    return Operand(leaf, name, field, alignment, is_written)


def _in_epc(
    leaf: EnclsLeaf, name: str, field: str, alignment: int = PAGE_SIZE, *, is_written: bool = True
) -> Operand:
    return Operand(leaf, name, field, alignment, is_written, in_epc=True)


_L = EnclsLeaf
OPERANDS = (
    _ordinary(_L.ECREATE, "pageinfo", "rbx", 32),
    _in_epc(_L.ECREATE, "page", "rcx"),
    _ordinary(_L.ECREATE, "srcpge", "source", PAGE_SIZE),
    _ordinary(_L.ECREATE, "secinfo", "secinfo", 64),
    _ordinary(_L.EADD, "pageinfo", "rbx", 32),
    _in_epc(_L.EADD, "page", "rcx"),
    _ordinary(_L.EADD, "srcpge", "source", PAGE_SIZE),
    _ordinary(_L.EADD, "secinfo", "secinfo", 64),
    _in_epc(_L.EADD, "secs", "secs"),
    _in_epc(_L.EEXTEND, "secs", "rbx"),
    _in_epc(_L.EEXTEND, "chunk", "rcx", 256, is_written=False),
    _ordinary(_L.EINIT, "sigstruct", "rbx", PAGE_SIZE),
    _in_epc(_L.EINIT, "secs", "rcx"),
    _ordinary(_L.EINIT, "einittoken", "rdx", 512),
    _in_epc(_L.EPA, "page", "rcx"),
    _in_epc(_L.EREMOVE, "page", "rcx"),
    _in_epc(_L.EBLOCK, "page", "rcx"),
    _in_epc(_L.ETRACK, "secs", "rcx"),
    _in_epc(_L.EDBGRD, "word", "rcx", 8, is_written=False),
    _in_epc(_L.EDBGWR, "word", "rcx", 8),
    _ordinary(_L.EWB, "pageinfo", "rbx", 32, is_written=True),
    _in_epc(_L.EWB, "page", "rcx"),
    _in_epc(_L.EWB, "slot", "rdx", 8),
    _ordinary(_L.EWB, "srcpge", "source", PAGE_SIZE, is_written=True),
    _ordinary(_L.EWB, "pcmd", "secinfo", 128, is_written=True),
    _ordinary(_L.ELDU, "pageinfo", "rbx", 32),
    _in_epc(_L.ELDU, "page", "rcx"),
    _in_epc(_L.ELDU, "slot", "rdx", 8),
    _ordinary(_L.ELDU, "srcpge", "source", PAGE_SIZE),
    _ordinary(_L.ELDU, "pcmd", "secinfo", 128),
    _in_epc(_L.ELDU, "secs", "secs"),
    _ordinary(_L.ELDB, "pageinfo", "rbx", 32),
)


def _sides(operand: Operand) -> tuple[Case, ...]:
    low, high = Side.LOW.at(operand.distance), Side.HIGH.at(operand.distance)
    done = operand.call.done(operand.effect)
    mmio = not operand.in_epc and operand.alignment <= _MOST_MMIO_BYTES
    case = operand.case
    return (
        case("low", "below the split", low, gp(), done, mmio=(low,) if mmio else ()),
        case("low-ac1", "below the split with AC=1", low, done, done, rflags=RFLAGS_AC),
        case("low-no-smap", "below the split without SMAP", low, done, done, smap=False),
        case("high", "above the split", high, done, done, mmio=(high,) if mmio else ()),
    )


CASES: tuple[Case, ...] = tuple(case for operand in OPERANDS for case in _sides(operand))
