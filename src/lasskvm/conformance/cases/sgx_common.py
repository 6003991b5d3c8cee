"""What the tables about SGX share: a leaf function with its operands, and a case made of it.

A :class:`Call` names each operand by its place on a :class:`~lasskvm.conformance.enclaves.Side`, the upper half unless
a case says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lasskvm.conformance import enclaves as place
from lasskvm.conformance import signing
from lasskvm.conformance.case import Case, Effect, Expected, completes, pf
from lasskvm.conformance.enclaves import Built, Enclaves, Side
from lasskvm.conformance.setup import Bytes, Step
from lasskvm.conformance.signing import MODE64BIT, NO_TOKEN, REG_R, SIGNER, Page, Signing, mrenclave
from lasskvm.x86.exceptions import PF_P, PF_W
from lasskvm.x86.msr import (
    FEATURE_CONTROL_LOCK,
    FEATURE_CONTROL_SGX_ENABLE,
    MSR_IA32_FEATURE_CONTROL,
    MSR_IA32_SGXLEPUBKEYHASH0,
)
from lasskvm.x86.sgx import PF_SGX, EnclsLeaf, PageType

__all__ = [
    "CALLS", "ENABLED", "GOOD_SIGSTRUCT", "GROUP", "MEASUREMENT", "SGX", "SIGNED_BY_US", "Call", "epc_fault", "other",
]  # fmt: skip

GROUP = "sgx"
SGX = frozenset({"sgx"})
#: What firmware leaves in IA32_FEATURE_CONTROL.
ENABLED = {MSR_IA32_FEATURE_CONTROL: FEATURE_CONTROL_LOCK | FEATURE_CONTROL_SGX_ENABLE}
#: The signer of the cases' enclaves may launch them.
SIGNED_BY_US = {
    MSR_IA32_SGXLEPUBKEYHASH0 + number: int.from_bytes(SIGNER.mrsigner[8 * number : 8 * number + 8], "little")
    for number in range(4)
}
#: MRENCLAVE of :attr:`Built.MEASURED`, and of what cases with less than that have.
MEASUREMENT = mrenclave(place.SIZE, 1, [place.MEMBER])
_UNMEASURED = mrenclave(place.SIZE, 1, [replace(place.MEMBER, is_measured=False)])
GOOD_SIGSTRUCT = Signing(MEASUREMENT, SIGNER, attributes=place.ATTRIBUTES).sigstruct()
#: A page to add.
ADDED = Page(0x3000, REG_R, bytes(range(255, -1, -1)) * 16)

_RESULT_OK = 0


def epc_fault(address: int, *, is_write: bool = True) -> Expected:
    """What the manual calls #PF(address): for paging the access was fine."""
    return pf(PF_P | PF_SGX | (PF_W if is_write else 0), address)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A leaf function that would complete: its operands, as addresses, and *content*, what they hold, by place.

    *linear_address* to *secs* are the PAGEINFO, for leaf functions that have one.
    """

    leaf: EnclsLeaf
    built: Built = Built.ADDED
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    linear_address: int = 0
    source: int = 0
    secinfo: int = 0
    secs: int = 0
    content: tuple[tuple[int, bytes], ...] = ()

    @property
    def has_result(self) -> bool:
        """Whether it leaves an error code in RAX, and clears the arithmetic flags."""
        without = (EnclsLeaf.ECREATE, EnclsLeaf.EADD, EnclsLeaf.EEXTEND, EnclsLeaf.EPA)
        return self.leaf not in without

    def done(self, effect: Effect | None = None) -> Expected:
        """It completes, and *effect* is what happens to the operand that is watched."""
        return (
            completes(effect, rax=_RESULT_OK, zf=0, cf=0)
            if self.has_result
            else completes(effect, rax=self.leaf)
        )

    def with_operand(self, name: str, address: int) -> Call:
        """The same with the operand *name*, one of the fields, at *address*."""
        changes: dict[str, Any] = {name: address}
        return replace(self, **changes)

    @property
    def setup(self) -> tuple[Step, ...]:
        """What puts the structures in their places."""
        steps: list[Step] = [Bytes(Side.HIGH.at(at), data) for at, data in self.content]
        if self.source:
            info = signing.pageinfo(self.linear_address, self.source, self.secinfo, self.secs)
            steps.append(Bytes(Side.HIGH.at(place.PAGEINFO), info))
        return tuple(steps)

    def case(self, name: str, words: str, lass: Expected, off: Expected | None, **more: Any) -> Case:
        """A case whose instruction under test this is."""
        registers = {"rax": self.leaf, "rbx": self.rbx, "rcx": self.rcx, "rdx": self.rdx}
        return Case(
            id=f"{GROUP}/{name}", group=GROUP, words=f"{self.leaf.name}: {words}", lass=lass, off=off,
            **{
                "program": "access: encls", "registers": registers, "needs": SGX, "msrs": ENABLED | SIGNED_BY_US,
                "sgx": Enclaves(self.built), **more, "setup": (*self.setup, *more.get("setup", ())),
            },
        )  # fmt: skip


def other(
    name: str, words: str, program: str, lass: Expected, off: Expected | None = None, **more: Any
) -> Case:
    """Any other case of the group."""
    defaults: dict[str, Any] = {"needs": SGX, "msrs": ENABLED, "sgx": Enclaves()}
    return Case(
        id=f"{GROUP}/{name}", group=GROUP, words=words, program=program, lass=lass, off=off, **{**defaults, **more}
    )  # fmt: skip


_high = Side.HIGH.at
_INFO, _SECINFO, _SOURCE = _high(place.PAGEINFO), _high(place.SECINFO), _high(place.SOURCE)
_SEALED: dict[str, Any] = {"source": _SOURCE, "secinfo": _high(place.PCMD)}
_COPIED: dict[str, Any] = {"source": _SOURCE, "secinfo": _SECINFO}
_SECS, _REGULAR, _SLOT, _FREE = (
    _high(place.SECS),
    _high(place.REGULAR),
    _high(place.SLOT),
    _high(place.FREE),
)

#: A call of each leaf function of SGX1 that completes.
CALLS = {
    call.leaf: call
    for call in (
        Call(
            leaf=EnclsLeaf.ECREATE, built=Built.NOTHING, rbx=_INFO, rcx=_FREE, **_COPIED,
            content=(
                (place.SOURCE, signing.secs_page(place.SIZE, place.BASE, attributes=MODE64BIT)),
                (place.SECINFO, signing.secinfo(PageType.SECS)),
            ),
        ),
        Call(
            leaf=EnclsLeaf.EADD, rbx=_INFO, rcx=_FREE, linear_address=place.BASE + ADDED.offset, secs=_SECS, **_COPIED,
            content=((place.SOURCE, ADDED.content), (place.SECINFO, signing.secinfo(ADDED.flags))),
        ),
        Call(leaf=EnclsLeaf.EEXTEND, rbx=_SECS, rcx=_REGULAR + 3 * signing.CHUNK),
        Call(
            leaf=EnclsLeaf.EINIT, rbx=_high(place.SIGSTRUCT), rcx=_SECS, rdx=_high(place.TOKEN),
            content=(
                (place.SIGSTRUCT, Signing(_UNMEASURED, SIGNER, attributes=place.ATTRIBUTES).sigstruct()),
                (place.TOKEN, NO_TOKEN),
            ),
        ),
        Call(leaf=EnclsLeaf.EPA, rbx=PageType.VA, rcx=_FREE),
        Call(leaf=EnclsLeaf.EREMOVE, rcx=_REGULAR),
        Call(leaf=EnclsLeaf.EBLOCK, rcx=_REGULAR),
        Call(leaf=EnclsLeaf.ETRACK, rcx=_SECS),
        Call(leaf=EnclsLeaf.EDBGRD, rcx=_REGULAR + 8),
        Call(leaf=EnclsLeaf.EDBGWR, rbx=0x1122_3344_5566_7788, rcx=_REGULAR + 8),
        Call(leaf=EnclsLeaf.EWB, built=Built.BLOCKED, rbx=_INFO, rcx=_REGULAR, rdx=_SLOT, **_SEALED),
        *(
            Call(
                leaf=leaf, built=Built.EVICTED, rbx=_INFO, rcx=_FREE, rdx=_SLOT,
                linear_address=place.BASE + place.MEMBER.offset, secs=_SECS, **_SEALED,
            )
            for leaf in (EnclsLeaf.ELDU, EnclsLeaf.ELDB)
        ),
    )
}  # fmt: skip
