"""Where L1 keeps what VMX needs: its regions, code and stack, and EPT tables.

All of it lies behind the guest of :mod:`lasskvm.conformance.layout`, is mapped at ``UPPER`` like the rest of the
kernel, and is not put back between cases: nothing there belongs to a case.
"""

from __future__ import annotations

from lasskvm.conformance import layout
from lasskvm.conformance.layout import PageTables
from lasskvm.conformance.nested import Ept
from lasskvm.memory import PAGE_SIZE, GuestMemory
from lasskvm.x86.ept import EPT_PS, EPT_R, EPT_TYPE_SHIFT, EPT_W, EPT_X
from lasskvm.x86.vmx import MEMORY_TYPE_WB, VMX_EPTP_PWL_4

__all__ = ["EptTables", "map_areas"]

#: Behind the page tables, and the tables of other modes that follow them.
_AREA_GPA, _AREA_END = 0x150000, 0x1C0000
#: The VMXON region, the VMCS of L2, and one for cases about VMX instructions.
VMXON_GPA, VMCS_GPA, OTHER_VMCS_GPA = _AREA_GPA, _AREA_GPA + 0x1000, _AREA_GPA + 0x2000
#: Neither of them: no VMCS has been there.
FREE_VMCS_GPA = _AREA_GPA + 0x3000
#: No MSR access exits.
MSR_BITMAP_GPA = _AREA_GPA + 0x4000
CODE_GPA, PROGRAM_GPA = _AREA_GPA + 0x5000, _AREA_GPA + 0x6000
_STACK_GPA = _AREA_GPA + 0x7000
FIELDS_GPA, POINTERS_GPA, SCRATCH_GPA = _AREA_GPA + 0x8000, _AREA_GPA + 0x9000, _AREA_GPA + 0x9800
_EPT_GPA = _AREA_GPA + 0x10000

CODE, PROGRAM = layout.UPPER + CODE_GPA, layout.UPPER + PROGRAM_GPA
FIELDS, POINTERS, SCRATCH = layout.UPPER + FIELDS_GPA, layout.UPPER + POINTERS_GPA, layout.UPPER + SCRATCH_GPA
STACK_TOP = layout.UPPER + _STACK_GPA + PAGE_SIZE

_ENTRY_BYTES = 8
_ALL = EPT_R | EPT_W | EPT_X
_MEMORY_TYPE = MEMORY_TYPE_WB << EPT_TYPE_SHIFT
_LARGE_PAGE = 2 << 20
_GIB = 1 << 30
_ENTRIES = PAGE_SIZE // _ENTRY_BYTES


def map_areas(tables: PageTables) -> None:
    """Map L1's areas, and the page tables, at ``UPPER``."""
    for start, end in ((_AREA_GPA, _AREA_END), (layout.TABLES_GPA, layout.TABLES_END)):
        tables.map(layout.UPPER + start, start, pages=(end - start) // PAGE_SIZE)


class EptTables:
    """EPT tables in L1's memory, one set for each :class:`Ept`.

    A set is written once, before it is used, and not touched again by the VMM: a KVM notices what changes in its
    guest's tables only where the guest itself changes it.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._next = _EPT_GPA
        self._roots: dict[Ept, int] = {}
        #: The page tables of each root: where the entries of L2's first megabytes begin.
        self._leaves: dict[Ept, int] = {}

    def pointer(self, ept: Ept) -> int:
        """The EPT pointer of *ept*'s tables."""
        if ept not in self._roots:
            self._build(ept)
        return self._roots[ept] | MEMORY_TYPE_WB | VMX_EPTP_PWL_4

    def entry(self, ept: Ept, gpa: int) -> int:
        """The linear address in L1 of the last-level entry for L2's *gpa*, which is memory."""
        return layout.UPPER + self._leaves[ept] + gpa // PAGE_SIZE * _ENTRY_BYTES

    def pristine_entry(self, ept: Ept, gpa: int) -> int:
        """What :meth:`entry` holds at first."""
        permissions = dict(ept.pages).get(gpa, _ALL)
        return gpa | _MEMORY_TYPE | permissions if permissions else 0

    def _build(self, ept: Ept) -> None:
        """4 KiB pages where memory is, 2 MiB ones in the gigabyte of the testbed's devices."""
        root, pointers = self._page(), self._page()
        low, devices = self._page(), self._page()
        self._store(root, 0, pointers | _ALL)
        self._store(pointers, 0, low | _ALL)
        self._store(pointers, layout.MMIO_GPA // _GIB, devices | _ALL)
        first = layout.MMIO_GPA & -_GIB
        for number in range(_ENTRIES):
            self._store(devices, number, first + number * _LARGE_PAGE | EPT_PS | _MEMORY_TYPE | _ALL)
        tables = [self._page() for _ in range(layout.MEMORY_BYTES // _LARGE_PAGE)]
        self._leaves[ept] = tables[0]
        for number, table in enumerate(tables):
            self._store(low, number, table | _ALL)
            for index in range(_ENTRIES):
                gpa = number * _LARGE_PAGE + index * PAGE_SIZE
                self._store(table, index, self.pristine_entry(ept, gpa))
        self._roots[ept] = root

    def _page(self) -> int:
        gpa, self._next = self._next, self._next + PAGE_SIZE
        if self._next > _AREA_END:
            raise ValueError("L1 has no room for more EPT tables")
        self._memory.write(gpa, bytes(PAGE_SIZE))
        return gpa

    def _store(self, table: int, index: int, entry: int) -> None:
        self._memory.store(table + index * _ENTRY_BYTES, _ENTRY_BYTES, entry)
