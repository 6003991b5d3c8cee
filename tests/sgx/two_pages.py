"""An enclave of two pages and a version array: what the tests of leaf functions that manage the EPC have in common."""

from __future__ import annotations

from sgx_guest import EPC, SgxGuest
from signing import PAGE, REG_RW, REG_RX, Page

from lasskvm.sgx.epc import EpcmEntry
from lasskvm.x86.sgx import EnclsLeaf

EPA, EREMOVE, EBLOCK, ETRACK, EWB, ELDB, ELDU = (
    EnclsLeaf.EPA, EnclsLeaf.EREMOVE, EnclsLeaf.EBLOCK, EnclsLeaf.ETRACK, EnclsLeaf.EWB, EnclsLeaf.ELDB, EnclsLeaf.ELDU,
)  # fmt: skip
CODE = Page(0x1000, REG_RX, bytes(range(256)) * 16, is_measured=False)
DATA = Page(0x2000, REG_RW, b"data" * 1024, is_measured=False)
SECS, FIRST, SECOND = EPC, EPC + PAGE, EPC + 2 * PAGE
#: The version array and its slots.
VA_PAGE = 10
VA = EPC + VA_PAGE * PAGE
SLOT, OTHER_SLOT = VA + 8, VA + 0xFF8


def build_two_pages(guest: SgxGuest) -> SgxGuest:
    """Build it in *guest*, which is given back."""
    guest.build([CODE, DATA])
    guest.version_array(VA_PAGE)
    return guest


def entry_of(guest: SgxGuest, address: int) -> EpcmEntry:
    """The EPCM entry of the valid page at *address*."""
    entry = guest.epc.entry(guest.gpa(address))
    assert entry is not None
    return entry
