"""What a test guest looks like: where things are in memory, its segments, gates and page tables.

The kernel lives in the upper half, where guest-physical memory is mapped from 0 on as supervisor pages; user programs
live in the lower half. Beside them there is a pair of pages of every kind (either half, user, supervisor or absent) to
make accesses to.
"""

from __future__ import annotations

from lasskvm.kvm import DescriptorTable, Sregs
from lasskvm.memory import PAGE_SIZE, GuestMemory
from lasskvm.state import Segment
from lasskvm.x86.descriptors import (
    SYS_INTERRUPT_GATE,
    TSS64_BYTES,
    TSS64_IO_MAP_BASE,
    TSS64_IST1,
    TSS64_RSP0,
    make_gate,
    make_segment,
)
from lasskvm.x86.paging import PTE_A, PTE_D, PTE_P, PTE_U, PTE_W
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_CODE64,
    AR_DATA,
    AR_DPL_SHIFT,
    AR_LDT,
    AR_P,
    AR_TSS64_BUSY,
    AR_UNUSABLE,
    CR0_ET,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LASS,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_PAE,
    CR4_PGE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    MASK32,
)

__all__ = ["PageTables", "code_selectors", "initial_sregs", "set_descriptor", "set_gate", "write_tables"]

MEMORY_BYTES = 4 << 20
#: A flag for :meth:`PageTables.map`: user programs may access the page.
USER_PAGE = PTE_U
#: Linear address of guest-physical 0 in the kernel's half.
UPPER = 0xFFFF_8000_0000_0000

# Guest-physical addresses
GDT_GPA, LDT_GPA, IDT_GPA, TSS_GPA, HANDLERS_GPA = 0x1000, 0x2000, 0x3000, 0x4000, 0x8000
KERNEL_CODE_GPA, USER_CODE_GPA = 0x10000, 0x20000
KERNEL_STACK_GPA, RING0_STACK_GPA, IST_STACK_GPA, USER_STACK_GPA = 0x30000, 0x34000, 0x38000, 0x3C000
DATA_GPA = 0x40000
TABLES_GPA, TABLES_END = 0x100000, 0x140000
#: Where pages are mapped to that are to be MMIO: neither memory nor anything of KVM's own.
MMIO_GPA = 0xD000_0000
#: What is mapped at ``UPPER``.
DIRECT_MAP_BYTES = 0x80000

# Linear addresses
KERNEL_CODE, HANDLERS = UPPER + KERNEL_CODE_GPA, UPPER + HANDLERS_GPA
GDT, LDT, IDT, TSS = UPPER + GDT_GPA, UPPER + LDT_GPA, UPPER + IDT_GPA, UPPER + TSS_GPA
KERNEL_STACK_TOP = UPPER + KERNEL_STACK_GPA + 0x2000
RING0_STACK_TOP = UPPER + RING0_STACK_GPA + 0x2000
IST_STACK_TOP = UPPER + IST_STACK_GPA + 0x2000
USER_CODE, USER_STACK = 0x400000, 0x410000
USER_STACK_TOP = USER_STACK + 0x2000

# Two pages of every kind to access; the absent ones have page tables, but their last-level entries are 0.
LOW_USER, LOW_SUPERVISOR, LOW_ABSENT = 0x500000, 0x600000, 0x700000
HIGH_USER, HIGH_SUPERVISOR, HIGH_ABSENT = (
    UPPER + 0x40000000 + low for low in (LOW_USER, LOW_SUPERVISOR, LOW_ABSENT)
)
_DATA_PAGES = (
    (LOW_USER, DATA_GPA, PTE_U),
    (LOW_SUPERVISOR, DATA_GPA + 0x4000, 0),
    (HIGH_USER, DATA_GPA + 0x8000, PTE_U),
    (HIGH_SUPERVISOR, DATA_GPA + 0xC000, 0),
)
#: The end of what is behind the pages to access.
DATA_END = DATA_GPA + 0x10000
#: Behind them, pages for cases to map where they like.
SPARE_GPA, CASE_MEMORY_END = DATA_END, DATA_END + 0x10000

# Selectors. Those of user mode stand in the order that SYSRET and SYSEXIT want.
KERNEL_CS, KERNEL_SS = 0x08, 0x10
USER_CS32, USER_SS, USER_CS = 0x1B, 0x23, 0x2B
TSS_SELECTOR, LDT_SELECTOR = 0x30, 0x40
KERNEL_CS32 = 0x50
RING1_CS, RING1_SS, RING2_CS, RING2_SS = 0x61, 0x69, 0x72, 0x7A
FREE_SELECTOR = 0x80
#: A data segment in the LDT that any privilege level may load.
LDT_DATA = 0x0F
GDT_BYTES, LDT_BYTES = 0x100, 0x20
IO_BITMAP = TSS64_BYTES
_IO_BITMAP_BYTES = 0x2001
TSS_LIMIT = TSS64_BYTES + _IO_BITMAP_BYTES - 1

SELECTOR_INDEX = 0xFFF8
_CODE_SEGMENTS = {
    (64, 0): (KERNEL_CS, KERNEL_SS), (64, 1): (RING1_CS, RING1_SS), (64, 2): (RING2_CS, RING2_SS),
    (64, 3): (USER_CS, USER_SS), (32, 0): (KERNEL_CS32, KERNEL_SS), (32, 3): (USER_CS32, USER_SS),
}  # fmt: skip

DEFAULT_CR0 = CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG
DEFAULT_CR4 = CR4_PAE | CR4_PGE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_SMEP | CR4_SMAP | CR4_LASS
DEFAULT_EFER = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE

#: Interrupt vectors have 16-byte IDT entries, and handlers of 16 bytes.
VECTORS = 256
GATE_BYTES = 16
HANDLER_BYTES = 16
#: A gate's IST field that makes its handler run on ``IST_STACK_TOP``.
IST = 1
#: Software may use these: INT3, INTO, and the vector that says "done".
DONE_VECTOR = 0x80
_SOFTWARE_VECTORS = (3, 4, DONE_VECTOR)

_PRESENT = PTE_P | PTE_W
_INDEX_MASK = 0x1FF
_ENTRY_BYTES = 8
_ENTRY_ADDRESS = (1 << 52) - PAGE_SIZE
#: Levels of page tables, and with CR4.LA57.
DEFAULT_LEVELS = 4
_LEVEL_SHIFTS = {4: (39, 30, 21), 5: (48, 39, 30, 21)}
_PAGE_SHIFT = 12


class PageTables:
    """4-level (or 5-level) page tables with 4 KiB pages, in guest memory from ``TABLES_GPA`` on."""

    def __init__(self, memory: GuestMemory, levels: int = DEFAULT_LEVELS) -> None:
        self._memory = memory
        self.levels = levels
        self._shifts = _LEVEL_SHIFTS[levels]
        self.root = TABLES_GPA
        #: Where the next table goes.
        self.next_free = TABLES_GPA + PAGE_SIZE

    def map(self, gva: int, gpa: int, flags: int = 0, pages: int = 1) -> None:
        """Map *pages* pages at *gva* to *gpa*: present and writable, and what *flags* (``PTE_*``) add."""
        for page in range(pages):
            self.set_entry(gva + page * PAGE_SIZE, gpa + page * PAGE_SIZE | _PRESENT | flags)

    def clear_accessed_and_dirty(self, gva: int) -> None:
        """Clear both bits in the last-level entry for *gva*."""
        self.set_entry(gva, self.entry(gva) & ~(PTE_A | PTE_D))

    def unmap(self, gva: int) -> None:
        """Make the page at *gva* absent."""
        self.set_entry(gva, 0)

    def entry(self, gva: int) -> int:
        """The last-level entry for *gva*; 0 where there is not even a table for it."""
        slot = self._find(gva, make_tables=False)
        return self._memory.load(slot, _ENTRY_BYTES) if slot else 0

    def frame(self, gva: int) -> int:
        """The guest-physical address of the page that *gva* is mapped to."""
        return self.entry(gva) & _ENTRY_ADDRESS

    def gpa(self, gva: int) -> int:
        """The guest-physical address that *gva* is mapped to."""
        return self.frame(gva) + gva % PAGE_SIZE

    def write(self, gva: int, data: bytes) -> None:
        """Write *data* at linear *gva* on behalf of the VMM: protection does not matter, the mapping must exist."""
        while data:
            length = min(len(data), PAGE_SIZE - gva % PAGE_SIZE)
            self._memory.write(self.gpa(gva), data[:length])
            gva, data = gva + length, data[length:]

    def set_entry(self, gva: int, entry: int) -> None:
        """Write the last-level entry for *gva*; tables on the way are made, and allow everything."""
        self._memory.store(self.entry_gpa(gva), _ENTRY_BYTES, entry)

    def entry_gpa(self, gva: int) -> int:
        """Where the last-level entry for *gva* is; tables on the way are made."""
        return self._find(gva, make_tables=True)

    def _find(self, gva: int, *, make_tables: bool) -> int:
        table = self.root
        for shift in self._shifts:
            slot = table + (gva >> shift & _INDEX_MASK) * _ENTRY_BYTES
            entry = self._memory.load(slot, _ENTRY_BYTES)
            if not entry & PTE_P:
                if not make_tables:
                    return 0
                entry = self._new_table()
                self._memory.store(slot, _ENTRY_BYTES, entry)
            table = entry & _ENTRY_ADDRESS
        return table + (gva >> _PAGE_SHIFT & _INDEX_MASK) * _ENTRY_BYTES

    def _new_table(self) -> int:
        if self.next_free == TABLES_END:
            raise ValueError("the guest has no room for more page tables")
        self.next_free += PAGE_SIZE
        return self.next_free - PAGE_SIZE | _PRESENT | PTE_U

    def map_layout(self) -> None:
        """Map everything that this module describes."""
        self.map(UPPER, 0, pages=DIRECT_MAP_BYTES // PAGE_SIZE)
        self.map(USER_CODE, USER_CODE_GPA, PTE_U, pages=4)
        self.map(USER_STACK, USER_STACK_GPA, PTE_U, pages=2)
        for gva, gpa, flags in _DATA_PAGES:
            self.map(gva, gpa, flags, pages=2)
        for gva in (LOW_ABSENT, HIGH_ABSENT):
            self.unmap(gva)


def code_selectors(bits: int, cpl: int) -> tuple[int, int]:
    """The code and stack selectors of *bits*-bit code (64, or 32) at *cpl*."""
    return _CODE_SEGMENTS[bits, cpl]


def write_tables(memory: GuestMemory) -> None:
    """Write GDT, LDT, IDT and TSS. Every vector leads to its handler, on the IST stack."""
    for (bits, cpl), (cs, ss) in _CODE_SEGMENTS.items():
        attributes = AR_CODE64 if bits == 64 else AR_CODE32
        set_descriptor(memory, cs, make_segment(0, MASK32, attributes | cpl << AR_DPL_SHIFT))
        set_descriptor(memory, ss, make_segment(0, MASK32, AR_DATA | cpl << AR_DPL_SHIFT))
    set_descriptor(memory, TSS_SELECTOR, make_segment(TSS & MASK32, TSS_LIMIT, AR_TSS64_BUSY), TSS >> 32)
    set_descriptor(memory, LDT_SELECTOR, make_segment(LDT & MASK32, LDT_BYTES - 1, AR_LDT), LDT >> 32)
    memory.store(LDT_GPA + (LDT_DATA & SELECTOR_INDEX), 8, ldt_data_descriptor())
    memory.store(TSS_GPA + TSS64_RSP0, 8, RING0_STACK_TOP)
    memory.store(TSS_GPA + TSS64_IST1, 8, IST_STACK_TOP)
    memory.store(TSS_GPA + TSS64_IO_MAP_BASE, 2, IO_BITMAP)
    memory.write(TSS_GPA + IO_BITMAP, b"\xff" * _IO_BITMAP_BYTES)
    for vector in range(VECTORS):
        set_gate(
            memory,
            vector,
            HANDLERS + vector * HANDLER_BYTES,
            dpl=3 if vector in _SOFTWARE_VECTORS else 0,
            ist=IST,
        )


def ldt_data_descriptor() -> int:
    """A flat data segment of DPL 3, accessed already."""
    return make_segment(0, MASK32, AR_DATA | 3 << AR_DPL_SHIFT)


def set_descriptor(memory: GuestMemory, selector: int, low: int, high: int | None = None) -> None:
    """Write a GDT entry of 8 bytes, or 16 with *high*."""
    gpa = GDT_GPA + (selector & SELECTOR_INDEX)
    memory.store(gpa, 8, low)
    if high is not None:
        memory.store(gpa + 8, 8, high)


def set_gate(
    memory: GuestMemory,
    vector: int,
    offset: int,
    *,
    selector: int = KERNEL_CS,
    gate_type: int = SYS_INTERRUPT_GATE,
    dpl: int = 0,
    ist: int = 0,
    present: bool = True,
) -> None:
    """Write a 16-byte IDT entry."""
    attributes = gate_type | dpl << AR_DPL_SHIFT | (AR_P if present else 0)
    gpa = IDT_GPA + vector * GATE_BYTES
    memory.store(gpa, 8, make_gate(offset, selector, attributes, ist))
    memory.store(gpa + 8, 8, offset >> 32)


def initial_sregs(template: Sregs, cpl: int, bits: int, cr3: int) -> Sregs:
    """The special registers of a guest that runs *bits*-bit code (64, or 32: compatibility mode) at *cpl*.

    Everything that protects is on: SMEP, SMAP, LASS, WP, NX. *template* gives what is left.
    """
    cs, ss = _CODE_SEGMENTS[bits, cpl]
    privilege = cpl << AR_DPL_SHIFT
    code = (AR_CODE64 if bits == 64 else AR_CODE32) | privilege
    # Null data segments are enough for 64-bit code; compatibility mode needs real ones.
    data = Segment(0, 0, 0, AR_UNUSABLE) if bits == 64 else Segment(ss, 0, MASK32, AR_DATA | privilege)
    return Sregs(
        cs=Segment(cs, 0, MASK32, code), ss=Segment(ss, 0, MASK32, AR_DATA | privilege), ds=data, es=data,
        fs=data, gs=data,
        tr=Segment(TSS_SELECTOR, TSS, TSS_LIMIT, AR_TSS64_BUSY),
        ldt=Segment(LDT_SELECTOR, LDT, LDT_BYTES - 1, AR_LDT),
        gdt=DescriptorTable(GDT, GDT_BYTES - 1), idt=DescriptorTable(IDT, VECTORS * GATE_BYTES - 1),
        cr0=DEFAULT_CR0, cr2=0, cr3=cr3, cr4=DEFAULT_CR4, cr8=0, efer=DEFAULT_EFER, apic_base=template.apic_base,
    )  # fmt: skip
