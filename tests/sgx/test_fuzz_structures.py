"""Whatever an operating system hands to ENCLS, it gets a fault or an error code, and the EPC stays in order."""

from __future__ import annotations

import json
import random

import pytest
import signing
from sgx_guest import (
    BASE,
    ENCLS,
    EPC,
    EPC_GPA,
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
    USER_EPC,
    SgxGuest,
)
from signing import DEBUG, MODE64BIT, PAGE, REG_RW, SIGNER, TCS, Page, Signing

from lasskvm.emulator.decode import fetch_instruction
from lasskvm.emulator.execution import execute
from lasskvm.emulator.faults import GuestFault
from lasskvm.sgx.epc import Epc
from lasskvm.state import RAX, RBX, RCX, RDX, RFLAGS, RIP
from lasskvm.x86.exceptions import GP, PF
from lasskvm.x86.registers import MASK64, RFLAGS_CF, RFLAGS_ZF
from lasskvm.x86.sgx import SGX1_ENCLS_LEAVES, EnclsLeaf, PageType, SgxError

PAGES = 12
ROUNDS = 1500
ADDRESSES = (
    *(EPC + number * PAGE for number in range(PAGES)), EPC + PAGE + 256, EPC + 3 * PAGE + 8, USER_EPC + PAGE,
    PAGEINFO, SECINFO, SOURCE, SIGSTRUCT, TOKEN, PCMD, OUTSIDE, SOURCE - (EPC - USER_EPC),
    UNMAPPED, NON_CANONICAL, 0, 3, MASK64 & ~0xFFF, MASK64, BASE,
)  # fmt: skip
WITHOUT_RESULT = (EnclsLeaf.ECREATE, EnclsLeaf.EADD, EnclsLeaf.EEXTEND, EnclsLeaf.EPA)
SIGNED = Signing(signing.mrenclave(SIZE, 1, []), SIGNER).sigstruct()


def is_orderly(epc: Epc) -> bool:
    """Every page of an enclave has a valid SECS, and a snapshot of the EPC goes through JSON and loads again."""
    for _, entry in epc.entries():
        if entry.is_enclave_page:
            assert entry.secs is not None
            epc.secs(entry.secs)
    state = json.loads(json.dumps(epc.get_state()))
    copy = Epc(epc.base, epc.size)
    copy.set_state(state)
    return copy.get_state() == epc.get_state()


def fault_of(guest: SgxGuest) -> GuestFault | None:
    """Execute the instruction at RIP: the fault that it raises, if any."""
    try:
        execute(guest.ctx, fetch_instruction(guest.ctx))
    except GuestFault as fault:
        return fault
    return None


def encls(guest: SgxGuest, leaf: int, rbx: int, rcx: int, rdx: int) -> str:
    """Execute a leaf function: what became of it."""
    words, rip = guest.words, guest.words[RIP]
    words[RAX], words[RBX], words[RCX], words[RDX] = leaf, rbx, rcx, rdx
    guest.write_code(bytes.fromhex(ENCLS))
    fault = fault_of(guest)
    if fault is not None:
        assert fault.vector in (GP, PF)
        assert (fault.vector == PF) == (fault.cr2 is not None)
        assert (words[RAX], words[RIP]) == (leaf, rip)
        return "fault"
    words[RIP] = rip
    if leaf in WITHOUT_RESULT:
        assert words[RAX] == leaf
        return "done"
    assert bool(words[RAX]) == bool(words[RFLAGS] & (RFLAGS_ZF | RFLAGS_CF))
    return SgxError(words[RAX]).name


class Kernel:
    """An operating system that mostly knows what it does, and errs here and there."""

    def __init__(self, guest: SgxGuest, rng: random.Random) -> None:
        self.guest = guest
        self.rng = rng

    def some_page(self, *kinds: PageType | None) -> int:
        """An EPC page of one of *kinds* (None: a free one), if there is one."""
        pages = [EPC + number * PAGE for number in range(PAGES)]
        fitting = [page for page in pages if self._kind(page) in kinds]
        return self.rng.choice(fitting or pages)

    def _kind(self, page: int) -> PageType | None:
        entry = self.guest.epc.entry(self.guest.gpa(page))
        return None if entry is None else entry.page_type

    def execute(self) -> tuple[str, str]:
        """One leaf function and its outcome."""
        leaf = self.rng.choice(sorted(SGX1_ENCLS_LEAVES))
        rbx, rcx, rdx = PAGEINFO, self.some_page(PageType.REG, PageType.TCS), self.some_page(PageType.VA) + 8
        if leaf == EnclsLeaf.ECREATE:
            self.guest.put_create(attributes=MODE64BIT | self.rng.choice((0, DEBUG)))
            rcx = self.some_page(None)
        elif leaf == EnclsLeaf.EADD:
            page = Page(PAGE * self.rng.randrange(8), self.rng.choice((TCS, REG_RW)))
            self.guest.put_add(page, self.some_page(PageType.SECS))
            rcx = self.some_page(None)
        elif leaf == EnclsLeaf.EEXTEND:
            rbx, rcx = self.some_page(PageType.SECS), rcx + 256 * self.rng.randrange(16)
        elif leaf == EnclsLeaf.EPA:
            rbx, rcx = PageType.VA, self.some_page(None)
        elif leaf == EnclsLeaf.ETRACK:
            rcx = self.some_page(PageType.SECS)
        elif leaf == EnclsLeaf.EREMOVE:
            rcx = self.some_page(*PageType)
        elif leaf == EnclsLeaf.EINIT:
            put_random_signature(self.guest, self.rng)
            rbx, rcx, rdx = SIGSTRUCT, self.some_page(PageType.SECS), TOKEN
        elif leaf == EnclsLeaf.EWB:
            self.guest.put_pageinfo(0, OUTSIDE, PCMD, 0)
        elif leaf in (EnclsLeaf.ELDB, EnclsLeaf.ELDU):
            linear_address = int.from_bytes(self.guest.read(PAGEINFO, 8), "little")
            self.guest.put_pageinfo(linear_address, OUTSIDE, PCMD, self.some_page(PageType.SECS))
            rcx = self.some_page(None)
        self._err()
        operands = [self._perhaps_another(value) for value in (rbx, rcx, rdx)]
        return EnclsLeaf(leaf).name, encls(self.guest, leaf, *operands)

    def _err(self) -> None:
        """One time in five, a random value in one of the structures."""
        if self.rng.random() < 0.2:
            place, size = self.rng.choice(((PAGEINFO, 32), (SECINFO, 64), (SOURCE, 512), (PCMD, 128)))
            value = self.rng.choice((*ADDRESSES, self.rng.getrandbits(64)))
            self.guest.write(place + 8 * self.rng.randrange(size // 8), value.to_bytes(8, "little"))

    def _perhaps_another(self, address: int) -> int:
        return address if self.rng.random() < 0.95 else self.rng.choice(ADDRESSES)


def put_random_signature(guest: SgxGuest, rng: random.Random) -> None:
    signed, token = bytearray(SIGNED), bytearray(304)
    if rng.random() < 0.5:
        signed[rng.randrange(len(signed))] ^= 1 << rng.randrange(8)
    if rng.random() < 0.5:
        token[rng.choice((0, 1, 4, 48, 240, 288))] ^= 1
    guest.write(SIGSTRUCT, bytes(signed))
    guest.write(TOKEN, bytes(token))


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_leaf_functions_faults_or_reports(seed: int) -> None:
    guest = SgxGuest(pages=PAGES)
    guest.allow_signer(SIGNER)
    kernel = Kernel(guest, random.Random(seed))
    outcomes = {kernel.execute() for _ in range(ROUNDS)}
    assert is_orderly(guest.epc)
    leaves = {name for name, outcome in outcomes if outcome in ("done", "SUCCESS")}
    assert {"ECREATE", "EADD", "EEXTEND", "EPA", "EBLOCK", "ETRACK", "EWB", "EREMOVE"} <= leaves
    assert {name for name, outcome in outcomes if outcome == "fault"} == {
        leaf.name for leaf in SGX1_ENCLS_LEAVES
    }


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_are_no_structure(seed: int) -> None:
    """All structures at once; the processor has been told where they are."""
    rng = random.Random(f"bytes {seed}")
    guest = SgxGuest(pages=PAGES)
    guest.build([Page(0, TCS), Page(PAGE, REG_RW)], MODE64BIT | DEBUG)
    guest.version_array(3)
    before = guest.epc_state()
    for _ in range(40):
        for place, size in ((SECINFO, 64), (SOURCE, PAGE), (SIGSTRUCT, 1808), (TOKEN, 304), (PCMD, 128)):
            guest.write(place, rng.randbytes(size))
        for linear_address, secs, secinfo in ((0, 0, SECINFO), (BASE, EPC, SECINFO), (BASE, EPC, PCMD)):
            guest.put_pageinfo(linear_address, secinfo=secinfo, secs=secs)
            for leaf in (EnclsLeaf.ECREATE, EnclsLeaf.EADD, EnclsLeaf.ELDU, EnclsLeaf.ELDB):
                assert encls(guest, leaf, PAGEINFO, EPC + 5 * PAGE, EPC + 3 * PAGE) in (
                    "fault",
                    "MAC_COMPARE_FAIL",
                )
        assert encls(guest, EnclsLeaf.EINIT, SIGSTRUCT, EPC, TOKEN) == "INVALID_SIG_STRUCT"
    assert guest.epc_state() == before


@pytest.mark.parametrize("seed", range(4))
def test_random_registers_are_no_operands(seed: int) -> None:
    rng = random.Random(f"registers {seed}")
    guest = SgxGuest(pages=PAGES)
    guest.build([Page(0, TCS)])
    for _ in range(500):
        guest.set_ac(rng.random() < 0.5)
        values = [rng.choice((*ADDRESSES, rng.getrandbits(64), rng.getrandbits(32))) for _ in range(3)]
        encls(guest, rng.choice(sorted(SGX1_ENCLS_LEAVES)), *values)
    assert is_orderly(guest.epc)


def test_a_full_epc_has_no_page_to_give() -> None:
    guest = SgxGuest(pages=4)
    guest.build([Page(0, REG_RW, is_measured=False), Page(PAGE, REG_RW, is_measured=False)])
    guest.version_array(3)
    assert guest.epc.free_pages == 0
    guest.put_add(Page(2 * PAGE, REG_RW))
    for number in range(4):
        assert guest.fault(EnclsLeaf.EADD, PAGEINFO, EPC + number * PAGE)[0] == PF
        assert guest.fault(EnclsLeaf.EPA, PageType.VA, EPC + number * PAGE)[0] == PF
    # Behind the last page there is nothing.
    guest.map(UNMAPPED, EPC_GPA + 4 * PAGE, 2)
    assert guest.fault(EnclsLeaf.EPA, PageType.VA, UNMAPPED)[0] == PF
    guest.done(EnclsLeaf.EREMOVE, rcx=EPC + 3 * PAGE)
    guest.done(EnclsLeaf.EADD, PAGEINFO, EPC + 3 * PAGE)
