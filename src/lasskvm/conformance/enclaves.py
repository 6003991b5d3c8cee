"""How SGX comes into a conformance case, as data: the EPC, where its pages and structures are, and what is in it.

Before a case with an :class:`Enclaves` starts, :class:`~lasskvm.conformance.sgx_testbed.SgxTestbed` empties the EPC by
EREMOVE and has the guest build in it what the case wants. Structures and EPC are mapped several times, as
:class:`Side` says, so that an operand can be had in either half without anything else being different.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lasskvm.conformance import layout
from lasskvm.conformance.signing import DEBUG, MODE64BIT, PAGE, REG_RW, Page

__all__ = ["Built", "Enclaves", "Side"]

#: Where no memory is, and nothing of KVM's own.
EPC_GPA, EPC_PAGES = 0xE000_0000, 8

#: Pages of structures, by the distance from the start of a side. What is there is the case's, but for the sealed page
#: and its PCMD of :attr:`Built.EVICTED`.
PAGEINFO, SECINFO, SOURCE, SIGSTRUCT, TOKEN, PCMD, ORDINARY = (PAGE * number for number in range(7))
#: Nothing is mapped here.
ABSENT = 7 * PAGE
STRUCTURES_GPA, STRUCTURE_PAGES = layout.SPARE_GPA, 7
#: The pages of the EPC on each side.
EPC = 8 * PAGE
#: What has a fixed place in the EPC; :data:`FREE` and what follows is free.
SECS, REGULAR, VERSIONS, FREE = (EPC + PAGE * number for number in range(4))
#: The slot of the version array that the evicted page has its version in.
SLOT = VERSIONS + 64

#: The enclave: its range is in the users' half, where nothing is mapped, and nobody accesses it.
BASE, SIZE = 0x7000_0000_0000, 0x10_0000
ATTRIBUTES = MODE64BIT | DEBUG
#: Its page, at :data:`REGULAR`.
CONTENT = bytes(range(256)) * (PAGE // 256)
MEMBER = Page(0x1000, REG_RW, CONTENT)


class Side(Enum):
    """A mapping of structures and EPC; the value is the linear address of its start."""

    #: Supervisor pages above the split.
    HIGH = layout.UPPER + 0x4090_0000
    #: Supervisor pages below it: LASS alone can stop a kernel.
    LOW = 0x90_0000
    #: User pages below it: SMAP can, too.
    LOW_USER = 0xB0_0000
    #: As ``HIGH``, for what goes before the case, so that accessed and dirty bits elsewhere are the case's own.
    PREPARATION = layout.UPPER + 0x40B0_0000

    def at(self, distance: int) -> int:
        """The linear address *distance* bytes from the start."""
        return self.value + distance


class Built(Enum):
    """What the EPC holds when a case starts."""

    NOTHING = "nothing"
    #: An SECS, a page of its enclave that is not measured, and an empty version array.
    ADDED = "an enclave"
    #: The same, and the page is measured.
    MEASURED = "a measured enclave"
    #: As ``ADDED``; the page is blocked, and ETRACK has been executed since.
    BLOCKED = "an enclave with a blocked page"
    #: The page is out of the EPC: sealed at :data:`SOURCE`, its metadata at :data:`PCMD`, its version in :data:`SLOT`.
    EVICTED = "an enclave whose page is sealed"


@dataclass(frozen=True)
class Enclaves:
    """The part of SGX in a case."""

    built: Built = Built.NOTHING
