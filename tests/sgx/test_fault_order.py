"""The order in which an operand of a leaf function is judged: alignment, canonical rule and LASS, paging, EPC.

Each operand of each leaf function is put wrong in two ways at once, and the fault tells which of them was looked at
first. The other operands are right, so that what is seen is this operand's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import signing
from emulator_guest import UPPER
from sgx_guest import (
    BASE,
    EPC,
    GENERAL_PROTECTION,
    NON_CANONICAL,
    OUTSIDE,
    PAGEINFO,
    PCMD,
    SECINFO,
    SIGSTRUCT,
    SIZE,
    SOURCE,
    TOKEN,
    UNMAPPED,
    SgxGuest,
    epc_fault,
)
from signing import DEBUG, MODE64BIT, PAGE, REG_R, SIGNER, Page, Signing

from lasskvm.state import CR4
from lasskvm.x86.exceptions import PF, PF_P, PF_W
from lasskvm.x86.paging import PTE_W
from lasskvm.x86.registers import CR4_LASS, CR4_SMAP
from lasskvm.x86.sgx import EnclsLeaf

#: Memory that is mapped and no EPC.
ORDINARY = OUTSIDE
SECS, REGULAR, VA, FREE = EPC, EPC + PAGE, EPC + 2 * PAGE, EPC + 9 * PAGE
#: Where a page is mapped once more.
ALIAS = FREE + PAGE
SLOT = VA + 64
ADDED = Page(0x1000, REG_R, is_measured=False)
#: What an access does to memory.
READS, WRITES = 0, PF_W


@dataclass(frozen=True)
class Call:
    """A leaf function with its registers, and the PAGEINFO that is at :data:`PAGEINFO`."""

    leaf: int
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    linear_address: int = 0
    source: int = SOURCE
    secinfo: int = SECINFO
    secs: int = 0


def put(guest: SgxGuest, call: Call) -> tuple[int, int, int, int]:
    guest.put_pageinfo(call.linear_address, call.source, call.secinfo, call.secs)
    return call.leaf, call.rbx, call.rcx, call.rdx


def fault_of(guest: SgxGuest, call: Call) -> tuple[int, int | None, int | None]:
    return guest.fault(*put(guest, call))


def completes(guest: SgxGuest, call: Call) -> None:
    guest.done(*put(guest, call))


# ------------------------------------------------------------------------------------- leaf functions that would work


def _enclave(guest: SgxGuest) -> None:
    guest.build([ADDED], MODE64BIT | DEBUG)
    guest.version_array(2)


def _ecreate(guest: SgxGuest) -> Call:
    guest.put_create()
    return Call(EnclsLeaf.ECREATE, PAGEINFO, FREE)


def _eadd(guest: SgxGuest) -> Call:
    _enclave(guest)
    guest.put_add(replace(ADDED, offset=0x2000))
    return Call(EnclsLeaf.EADD, PAGEINFO, FREE, linear_address=BASE + 0x2000, secs=SECS)


def _eextend(guest: SgxGuest) -> Call:
    _enclave(guest)
    return Call(EnclsLeaf.EEXTEND, SECS, REGULAR + 0x300)


def _einit(guest: SgxGuest) -> Call:
    _enclave(guest)
    guest.allow_signer(SIGNER)
    guest.write(SIGSTRUCT, EINIT_SIGSTRUCT)
    guest.write(TOKEN, signing.NO_TOKEN)
    return Call(EnclsLeaf.EINIT, SIGSTRUCT, SECS, TOKEN)


def _epa(guest: SgxGuest) -> Call:
    return Call(EnclsLeaf.EPA, 3, FREE)


def _on_page(leaf: int, page: int) -> Callable[[SgxGuest], Call]:
    def prepare(guest: SgxGuest) -> Call:
        _enclave(guest)
        return Call(leaf, 0, page)

    return prepare


def _ewb(guest: SgxGuest) -> Call:
    _enclave(guest)
    guest.done(EnclsLeaf.EBLOCK, rcx=REGULAR)
    guest.done(EnclsLeaf.ETRACK, rcx=SECS)
    return Call(EnclsLeaf.EWB, PAGEINFO, REGULAR, SLOT, source=SOURCE, secinfo=PCMD)


def _eldu(guest: SgxGuest) -> Call:
    completes(guest, _ewb(guest))
    return Call(EnclsLeaf.ELDU, PAGEINFO, FREE, SLOT, BASE + ADDED.offset, SOURCE, PCMD, SECS)


EINIT_SIGSTRUCT = Signing(
    signing.mrenclave(SIZE, 1, [ADDED]), SIGNER, attributes=MODE64BIT | DEBUG
).sigstruct()  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """One operand: the field of :class:`Call` that holds its address."""

    prepare: Callable[[SgxGuest], Call]
    field: str
    alignment: int
    access: int = READS
    in_epc: bool = False

    def call(self, guest: SgxGuest, address: int | None = None, *, move: int = 0) -> Call:
        """The call with *address* as the operand, or with the right address moved by so much."""
        right = self.prepare(guest)
        address = getattr(right, self.field) if address is None else address
        if self.field == "rbx" and right.rbx == PAGEINFO:
            # A PAGEINFO that is looked for elsewhere is read nowhere else.
            return replace(right, rbx=address + move)
        return replace(right, **{self.field: address + move})


def _epc_operand(
    prepare: Callable[[SgxGuest], Call], field: str, alignment: int = PAGE, access: int = WRITES
) -> Operand:
    return Operand(prepare, field, alignment, access, in_epc=True)


OPERANDS = {
    "ECREATE PAGEINFO": Operand(_ecreate, "rbx", 32),
    "ECREATE page": _epc_operand(_ecreate, "rcx"),
    "ECREATE SRCPGE": Operand(_ecreate, "source", PAGE),
    "ECREATE SECINFO": Operand(_ecreate, "secinfo", 64),
    "EADD PAGEINFO": Operand(_eadd, "rbx", 32),
    "EADD page": _epc_operand(_eadd, "rcx"),
    "EADD SRCPGE": Operand(_eadd, "source", PAGE),
    "EADD SECINFO": Operand(_eadd, "secinfo", 64),
    "EADD SECS": _epc_operand(_eadd, "secs"),
    "EEXTEND SECS": _epc_operand(_eextend, "rbx"),
    "EEXTEND chunk": _epc_operand(_eextend, "rcx", 256, READS),
    "EINIT SIGSTRUCT": Operand(_einit, "rbx", PAGE),
    "EINIT SECS": _epc_operand(_einit, "rcx"),
    "EINIT EINITTOKEN": Operand(_einit, "rdx", 512),
    "EPA page": _epc_operand(_epa, "rcx"),
    "EREMOVE page": _epc_operand(_on_page(EnclsLeaf.EREMOVE, REGULAR), "rcx"),
    "EBLOCK page": _epc_operand(_on_page(EnclsLeaf.EBLOCK, REGULAR), "rcx"),
    "ETRACK SECS": _epc_operand(_on_page(EnclsLeaf.ETRACK, SECS), "rcx"),
    "EDBGRD operand": _epc_operand(_on_page(EnclsLeaf.EDBGRD, REGULAR), "rcx", 8, READS),
    "EDBGWR operand": _epc_operand(_on_page(EnclsLeaf.EDBGWR, REGULAR), "rcx", 8),
    "EWB PAGEINFO": Operand(_ewb, "rbx", 32, WRITES),
    "EWB page": _epc_operand(_ewb, "rcx"),
    "EWB slot": _epc_operand(_ewb, "rdx", 8),
    "EWB SRCPGE": Operand(_ewb, "source", PAGE, WRITES),
    "EWB PCMD": Operand(_ewb, "secinfo", 128, WRITES),
    "ELDU PAGEINFO": Operand(_eldu, "rbx", 32),
    "ELDU page": _epc_operand(_eldu, "rcx"),
    "ELDU slot": _epc_operand(_eldu, "rdx", 8),
    "ELDU SRCPGE": Operand(_eldu, "source", PAGE),
    "ELDU PCMD": Operand(_eldu, "secinfo", 128),
    "ELDU SECS": _epc_operand(_eldu, "secs"),
}
each_operand = pytest.mark.parametrize("operand", OPERANDS.values(), ids=OPERANDS.keys())
each_epc_operand = pytest.mark.parametrize(
    "operand",
    [operand for operand in OPERANDS.values() if operand.in_epc],
    ids=[name for name, operand in OPERANDS.items() if operand.in_epc],
)


@each_operand
def test_the_call_works_as_it_is(guest: SgxGuest, operand: Operand) -> None:
    completes(guest, operand.call(guest))


@each_operand
def test_alignment_comes_before_paging(guest: SgxGuest, operand: Operand) -> None:
    """Misaligned, and not mapped."""
    call = operand.call(guest, UNMAPPED, move=operand.alignment // 2)
    assert fault_of(guest, call) == GENERAL_PROTECTION


@each_operand
def test_a_misaligned_operand_that_is_fine_otherwise_is_gp(guest: SgxGuest, operand: Operand) -> None:
    call = operand.call(guest, move=operand.alignment // 2)
    assert fault_of(guest, call) == GENERAL_PROTECTION


@each_operand
def test_the_canonical_rule_applies(guest: SgxGuest, operand: Operand) -> None:
    assert fault_of(guest, operand.call(guest, NON_CANONICAL)) == GENERAL_PROTECTION


@each_operand
def test_lass_comes_before_paging(guest: SgxGuest, operand: Operand) -> None:
    """In the user's half, and not mapped: #GP without RFLAGS.AC; the page fault shows with it."""
    user = UNMAPPED - UPPER
    call = operand.call(guest, user)
    guest.unmap(user)
    assert fault_of(guest, call) == GENERAL_PROTECTION
    guest.set_ac(True)
    assert fault_of(guest, call) == (PF, operand.access, user)


@each_operand
def test_the_users_half_is_for_those_who_set_ac(guest: SgxGuest, operand: Operand) -> None:
    """The same bytes under their user address."""
    call = operand.call(guest, move=-UPPER)
    assert fault_of(guest, call) == GENERAL_PROTECTION
    guest.set_ac(True)
    completes(guest, call)


@each_operand
def test_lass_has_no_say_without_smap(guest: SgxGuest, operand: Operand) -> None:
    call = operand.call(guest, move=-UPPER)
    guest.words[CR4] &= ~CR4_SMAP
    completes(guest, call)


@each_operand
def test_smap_without_lass_is_a_page_fault(guest: SgxGuest, operand: Operand) -> None:
    call = operand.call(guest, move=-UPPER)
    guest.words[CR4] &= ~CR4_LASS
    assert fault_of(guest, call) == (PF, PF_P | operand.access, getattr(call, operand.field))


@each_operand
def test_paging_says_whether_an_operand_can_be_written(guest: SgxGuest, operand: Operand) -> None:
    call = operand.call(guest)
    address = getattr(call, operand.field)
    if operand.alignment < PAGE and operand.in_epc:
        # The page is also that of other operands; look at this one alone.
        guest.map(ALIAS, guest.gpa(address & ~(PAGE - 1)), PTE_W)
        address = ALIAS | address & PAGE - 1
        call = replace(call, **{operand.field: address})
    put(guest, call)
    guest.write_protect(address)
    if operand.access == WRITES:
        expected = (PF, PF_P | PF_W, address)
        assert guest.fault(call.leaf, call.rbx, call.rcx, call.rdx) == expected
    else:
        guest.done(call.leaf, call.rbx, call.rcx, call.rdx)


@each_epc_operand
def test_what_has_to_be_in_the_epc_and_is_not_is_a_page_fault_with_the_sgx_bit(
    guest: SgxGuest, operand: Operand
) -> None:
    call = operand.call(guest, ORDINARY)
    assert fault_of(guest, call) == epc_fault(ORDINARY, is_write=operand.access == WRITES)


@each_epc_operand
def test_paging_comes_before_the_epc(guest: SgxGuest, operand: Operand) -> None:
    """Not in the EPC, and not mapped: no SGX bit."""
    assert fault_of(guest, operand.call(guest, UNMAPPED)) == (PF, operand.access, UNMAPPED)


@each_epc_operand
def test_lass_comes_before_the_epc(guest: SgxGuest, operand: Operand) -> None:
    user = ORDINARY - UPPER
    call = operand.call(guest, user)
    assert fault_of(guest, call) == GENERAL_PROTECTION
    guest.set_ac(True)
    assert fault_of(guest, call) == epc_fault(user, is_write=operand.access == WRITES)
