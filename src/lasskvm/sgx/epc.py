"""The enclave page cache: a range of guest-physical memory that only ENCLS reaches, and what is known of its pages.

Each page has an entry in the EPCM when it is valid, and none when it is free. Pages are named by the guest-physical
address of their first byte. For everybody else the range is a device that answers with all ones and drops what is
written, which is what the processor's abort page does.

With a single logical processor that is never inside an enclave, nothing is ever in use by someone else, and a tracking
cycle is complete as soon as ETRACK starts it. What remains of tracking is the order: a page has to be blocked before
the ETRACK that lets EWB have it.

Source: Intel SDM volume 3D, 35.5 (access control), 35.18 (version arrays), 35.19 (EPCM), 36.5 (management of pages).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lasskvm.errors import MemoryLayoutError
from lasskvm.memory import allocate
from lasskvm.sgx.secs import Secs
from lasskvm.x86 import sgx
from lasskvm.x86.sgx import PageType

__all__ = ["Epc", "EpcmEntry"]

#: A page that came back blocked (ELDB) has no translations to be tracked: blocked before the first epoch.
_BEFORE_ALL_EPOCHS = -1
_MAX_GPA = 1 << 52
_BITS_PER_BYTE = 8


@dataclass(slots=True)
class EpcmEntry:
    """The EPCM entry of a valid page (35.19)."""

    page_type: PageType
    #: ``SECINFO_R``, ``SECINFO_W`` and ``SECINFO_X``.
    permissions: int = 0
    #: The guest-physical address of the SECS page it belongs to; None for SECS and VA pages.
    secs: int | None = None
    #: Where in the enclave the page is (ENCLAVEADDRESS).
    linear_address: int = 0
    blocked: bool = False
    pending: bool = False
    modified: bool = False
    permissions_restricted: bool = False
    #: The tracking epoch of the enclave when the page was blocked.
    blocked_epoch: int = _BEFORE_ALL_EPOCHS

    @property
    def is_enclave_page(self) -> bool:
        """Whether the page is part of an enclave's range: a regular, a TCS or a trimmed page."""
        return self.page_type in (PageType.REG, PageType.TCS, PageType.TRIM)

    @property
    def secinfo_flags(self) -> int:
        """SECINFO.FLAGS that describe the page, as EWB writes them."""
        return (
            self.permissions
            | self.page_type << sgx.SECINFO_PAGE_TYPE_SHIFT
            | (sgx.SECINFO_PENDING if self.pending else 0)
            | (sgx.SECINFO_MODIFIED if self.modified else 0)
            | (sgx.SECINFO_PR if self.permissions_restricted else 0)
        )

    @classmethod
    def from_secinfo_flags(
        cls, flags: int, linear_address: int = 0, secs: int | None = None, blocked: bool = False
    ) -> EpcmEntry:
        """The inverse of :attr:`secinfo_flags`, as EADD and ELDB/ELDU make an entry.

        Raises ValueError for a page type that SGX1 does not have.
        """
        return cls(
            page_type=PageType((flags & sgx.SECINFO_PAGE_TYPE_MASK) >> sgx.SECINFO_PAGE_TYPE_SHIFT),
            permissions=flags & sgx.SECINFO_RWX,
            secs=secs,
            linear_address=linear_address,
            blocked=blocked,
            pending=flags & sgx.SECINFO_PENDING != 0,
            modified=flags & sgx.SECINFO_MODIFIED != 0,
            permissions_restricted=flags & sgx.SECINFO_PR != 0,
        )


class Epc:
    """The EPC of one VM: ``size`` bytes from guest-physical ``base`` on, both multiples of 4096.

    >>> epc = Epc(0x1_0000_0000, 0x10000)
    >>> epc.add(0x1_0000_1000, EpcmEntry(PageType.VA))
    >>> epc.contains(0x1_0000_1FF8, 8), epc.entry(0x1_0000_1FF8).page_type.name, epc.entry(0x1_0000_2000)
    (True, 'VA', None)
    >>> hex(epc.read_mmio(0x1_0000_1000, 4))
    '0xffffffff'
    """

    def __init__(self, base: int, size: int) -> None:
        if (
            base % sgx.EPC_PAGE_SIZE
            or size % sgx.EPC_PAGE_SIZE
            or size <= 0
            or not 0 <= base <= _MAX_GPA - size
        ):
            raise MemoryLayoutError(
                f"an EPC of {size:#x} bytes at {base:#x} cannot be: give it a positive multiple of 4 KiB below 4 PiB"
            )
        self.base, self.size = base, size
        #: What the pages hold; those that are not valid hold zeros.
        self.view = memoryview(allocate(size))
        self._entries: dict[int, EpcmEntry] = {}
        self._last_eid = 0
        self._last_version = 0

    # ------------------------------------------------------------------------------------------- pages and their bytes

    @property
    def gpa(self) -> int:
        """``base``, as memory slots call it."""
        return self.base

    def contains(self, gpa: int, size: int = 1) -> bool:
        """Whether all *size* bytes at *gpa* are in the EPC."""
        return self.base <= gpa and gpa + size <= self.base + self.size

    def entry(self, gpa: int) -> EpcmEntry | None:
        """The EPCM entry of the page that holds *gpa*; None when the page is not valid, or no page of the EPC."""
        return self._entries.get(gpa & ~sgx.EPC_PAGE_MASK)

    def entries(self) -> Iterator[tuple[int, EpcmEntry]]:
        """All valid pages, with their addresses, in ascending order."""
        return iter(sorted(self._entries.items()))

    @property
    def free_pages(self) -> int:
        """How many pages are not valid."""
        return self.size // sgx.EPC_PAGE_SIZE - len(self._entries)

    def add(self, gpa: int, entry: EpcmEntry, content: bytes = bytes(sgx.EPC_PAGE_SIZE)) -> None:
        """Make the free page at *gpa* valid, with 4096 bytes of *content*.

        Raises ValueError when the page is valid already, is none of the EPC, or names an SECS that is not there:
        the leaf functions check all that first.
        """
        if len(content) != sgx.EPC_PAGE_SIZE:
            raise ValueError(f"an EPC page has {sgx.EPC_PAGE_SIZE} bytes, not {len(content)}")
        self._check(self._entries, gpa, entry)
        self._entries[gpa] = entry
        self.write(gpa, content)

    def _check(self, entries: dict[int, EpcmEntry], gpa: int, entry: EpcmEntry) -> None:
        """ValueError unless the page at *gpa* can become *entry* beside the valid pages *entries*."""
        if gpa & sgx.EPC_PAGE_MASK or not self.contains(gpa, sgx.EPC_PAGE_SIZE) or gpa in entries:
            raise ValueError(f"{gpa:#x} is no free page of the EPC")
        if entry.is_enclave_page:
            _require_secs(entries, entry.secs)
        elif entry.secs is not None:
            raise ValueError("SECS and VA pages belong to no enclave")

    def remove(self, gpa: int) -> None:
        """Free the valid page at *gpa*, and forget its bytes.

        Raises KeyError when it is not valid, ValueError for an SECS whose enclave has pages in the EPC.
        """
        if self._entries[gpa].page_type == PageType.SECS and self.children(gpa):
            raise ValueError(f"the enclave of the SECS at {gpa:#x} has pages in the EPC")
        del self._entries[gpa]
        self.write(gpa, bytes(sgx.EPC_PAGE_SIZE))

    def read(self, gpa: int, size: int = sgx.EPC_PAGE_SIZE) -> bytes:
        """*size* bytes at *gpa*, which are in the EPC."""
        offset = self._offset(gpa, size)
        return bytes(self.view[offset : offset + size])

    def write(self, gpa: int, data: bytes) -> None:
        """Put *data* at *gpa*; all of it falls into the EPC."""
        offset = self._offset(gpa, len(data))
        self.view[offset : offset + len(data)] = data

    def _offset(self, gpa: int, size: int) -> int:
        if not self.contains(gpa, size):
            raise ValueError(f"{size} bytes at {gpa:#x} are not in the EPC")
        return gpa - self.base

    # -------------------------------------------------------------------------------------------------------- enclaves

    def secs(self, gpa: int) -> Secs:
        """A copy of the SECS in the page at *gpa*. ValueError when that is no SECS page."""
        _require_secs(self._entries, gpa)
        return Secs.parse(self.read(gpa))

    def store_secs(self, gpa: int, secs: Secs) -> None:
        """Put *secs* into the SECS page at *gpa*. ValueError when that is no SECS page."""
        _require_secs(self._entries, gpa)
        self.write(gpa, secs.pack())

    def children(self, secs_gpa: int) -> int:
        """How many pages of the enclave whose SECS is at *secs_gpa* are in the EPC, the SECS not counted."""
        return sum(entry.secs == secs_gpa for entry in self._entries.values())

    def next_eid(self) -> int:
        """A new enclave identifier (CR_NEXT_EID); never zero, which is what pages outside enclaves have."""
        self._last_eid += 1
        return self._last_eid

    # ------------------------------------------------------------------------------------- blocking, tracking, versions

    def block(self, gpa: int) -> None:
        """EBLOCK: mark the enclave page at *gpa* blocked, in the enclave's present epoch."""
        entry = self._entries[gpa]
        if entry.secs is None:
            raise ValueError(f"the page at {gpa:#x} is not of a type that can be blocked")
        entry.blocked = True
        entry.blocked_epoch = self.secs(entry.secs).tracking_epoch

    def track(self, secs_gpa: int) -> None:
        """ETRACK: begin a new epoch of the enclave whose SECS is at *secs_gpa*; it is complete at once."""
        secs = self.secs(secs_gpa)
        secs.tracking_epoch += 1
        self.store_secs(secs_gpa, secs)

    def is_tracked(self, gpa: int) -> bool:
        """Whether an ETRACK came after the enclave page at *gpa* was blocked: no translation to it is left."""
        entry = self._entries[gpa]
        return (
            entry.blocked
            and entry.secs is not None
            and entry.blocked_epoch < self.secs(entry.secs).tracking_epoch
        )

    def next_version(self) -> int:
        """A version for a page that EWB writes out; never zero, which is what an empty slot holds."""
        self._last_version += 1
        return self._last_version

    def version(self, slot_gpa: int) -> int:
        """What the version-array slot (8 bytes) at *slot_gpa* holds; zero when it is empty."""
        return int.from_bytes(self.read(slot_gpa, sgx.VA_SLOT_SIZE), "little")

    def store_version(self, slot_gpa: int, version: int) -> None:
        """Put *version* into the version-array slot at *slot_gpa*; zero empties it."""
        self.write(slot_gpa, version.to_bytes(sgx.VA_SLOT_SIZE, "little"))

    # ------------------------------------------------------------------------------------- everybody else's view, state

    def read_mmio(self, gpa: int, size: int) -> int:
        """Loads that are not ENCLS's own read all ones, whatever the page."""
        return (1 << _BITS_PER_BYTE * size) - 1

    def write_mmio(self, gpa: int, size: int, value: int) -> None:
        """Stores that are not ENCLS's own are dropped."""

    def reset(self) -> None:
        """Free all pages, as when the processor is reset. Identifiers and versions go on, so that none comes twice."""
        for gpa in self._entries:
            self.write(gpa, bytes(sgx.EPC_PAGE_SIZE))
        self._entries.clear()

    def get_state(self) -> dict[str, Any]:
        """What is known of the pages, and counters, as names and values that JSON can hold.

        What the pages hold is in ``view``, and is to be saved and brought back like the memory of a slot.
        """
        return {
            "base": self.base,
            "size": self.size,
            "last_eid": self._last_eid,
            "last_version": self._last_version,
            "pages": [
                {
                    "gpa": gpa,
                    "secinfo": entry.secinfo_flags,
                    "secs": entry.secs,
                    "linear_address": entry.linear_address,
                    "blocked": entry.blocked,
                    "blocked_epoch": entry.blocked_epoch,
                }
                for gpa, entry in self.entries()
            ],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on as the EPC that *state* comes from; it has to have the same base and size, and ``view`` its content.

        Raises KeyError, TypeError or ValueError for what is no such state, and has changed nothing then.
        """
        if (state["base"], state["size"]) != (self.base, self.size):
            raise ValueError("the saved EPC is at another place or of another size")
        last_eid, last_version = int(state["last_eid"]), int(state["last_version"])
        entries: dict[int, EpcmEntry] = {}
        # SECS pages first: the others name them.
        for page in sorted(state["pages"], key=lambda page: page["secs"] is not None):
            gpa = page["gpa"]
            entry = EpcmEntry.from_secinfo_flags(page["secinfo"], page["linear_address"], page["secs"])
            entry.blocked, entry.blocked_epoch = bool(page["blocked"]), int(page["blocked_epoch"])
            self._check(entries, gpa, entry)
            entries[gpa] = entry
        self._entries, self._last_eid, self._last_version = entries, last_eid, last_version


def _require_secs(entries: dict[int, EpcmEntry], gpa: int | None) -> None:
    """ValueError unless the valid page at *gpa* is an SECS."""
    entry = None if gpa is None else entries.get(gpa)
    if entry is None or entry.page_type != PageType.SECS:
        raise ValueError("there is no SECS page" if gpa is None else f"{gpa:#x} is no SECS page")
