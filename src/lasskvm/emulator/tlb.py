"""The translations that the interpreter keeps: a software TLB over guest memory.

A processor asks LASS, canonical rule and page tables once and remembers the answer for the page; so does this. There
is one set of pages for each way of asking (user or supervisor, with or without RFLAGS.AC), and in each set one table
for loads and one for stores, keyed by linear page number. Only pages that lie wholly in a memory slot get in; stores to
read-only slots and to pages that hold decoded code never do, so the slow path sees them.

Pages are known by the addresses that programs form. With LAM a page has as many of those as there are tags, so whoever
forgets one page has to forget all; INVLPG does.

Source: Intel SDM volume 3A, 5.10 (caching translation information).
"""

from __future__ import annotations

from lasskvm.memory import PAGE_CODE, PAGE_DIRTY, PAGE_SHIFT, SLOT_READONLY, GuestMemory
from lasskvm.state import CPL, RFLAGS, Words
from lasskvm.x86.registers import RFLAGS_AC

__all__ = ["Page", "Pages", "Tlb"]

#: A slot's memory, and what to add to a linear address to get its place there.
Page = tuple[memoryview, int]
Pages = dict[int, Page]

_USER_CPL = 3
_WAYS = 4


class Tlb:
    """The pages of one vCPU. ``loads`` and ``stores`` are the tables for the current CPL and RFLAGS.AC.

    Suspended, as it is at first, nothing is kept: the way for single instructions amid direct execution, which changes
    page tables and CR3 without telling.
    """

    def __init__(self) -> None:
        self.enabled = False
        self._loads: list[Pages] = [{} for _ in range(_WAYS)]
        self._stores: list[Pages] = [{} for _ in range(_WAYS)]
        self.loads: Pages = {}
        self.stores: Pages = {}
        #: Guest-physical page numbers with decoded code.
        self.code_pages: set[int] = set()

    def suspend(self) -> None:
        """Keep nothing and find nothing until :meth:`select`: every access shall go the long way."""
        self.enabled = False
        self.loads, self.stores = {}, {}

    def select(self, words: Words) -> None:
        """Use the tables of the current CPL and RFLAGS.AC; needed after either has changed."""
        self.enabled = True
        way = (words[CPL] == _USER_CPL) << 1 | (words[RFLAGS] & RFLAGS_AC != 0)
        self.loads, self.stores = self._loads[way], self._stores[way]

    def flush(self) -> None:
        """Forget everything."""
        for pages in self._loads:
            pages.clear()
        self.flush_stores()

    def flush_stores(self) -> None:
        """Forget the store translations: a page has become code, or the dirty log begins anew."""
        for pages in self._stores:
            pages.clear()

    def mark_code(self, gpa: int) -> None:
        """Code on the page of *gpa* has been decoded: stores to it take the long way from now on."""
        if gpa >> PAGE_SHIFT not in self.code_pages:
            self.code_pages.add(gpa >> PAGE_SHIFT)
            self.flush_stores()

    def keep(self, memory: GuestMemory, address: int, gpa: int, is_store: bool) -> None:
        """Remember that the page of linear *address* lies at that of *gpa*, after an access that was allowed."""
        slot = memory.find(gpa)
        if not self.enabled or slot is None:
            return
        page = (slot.view, gpa - slot.gpa - address)
        if not is_store:
            self.loads[address >> PAGE_SHIFT] = page
            return
        number = gpa - slot.gpa >> PAGE_SHIFT
        is_code = slot.page_flags[number] & PAGE_CODE or gpa >> PAGE_SHIFT in self.code_pages
        if slot.flags & SLOT_READONLY or is_code:
            return
        slot.page_flags[number] |= PAGE_DIRTY
        self.stores[address >> PAGE_SHIFT] = page
