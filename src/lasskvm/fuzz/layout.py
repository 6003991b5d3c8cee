"""Where things are in a fuzzed guest: memory map, data pages, descriptors, gates.

All cases share one guest-physical layout: system tables, a page of handlers (each vector has one of its own, which
halts), two pages of code, stacks, and the frames of the data pages. The linear side depends on the mode: data pages lie
on both sides of bit 63, at the ends of the address space and of its canonical halves, one after another so that an
access can reach from one kind of page into another. Behind the memory there is a hole, where accesses are MMIO.
"""

from __future__ import annotations

from lasskvm.fuzz.case import Case, Mode, Paging
from lasskvm.x86.paging import PTE_A, PTE_D, PTE_P, PTE_PS, PTE_U, PTE_W, PTE_XD
from lasskvm.x86.registers import CS

__all__ = ["code_base", "data_pages", "page_entry"]

PAGE = 0x1000

#: Guest memory; what is above is a hole.
MEMORY_BYTES = 0x60000
HOLE_GPA = 0x200000

# Guest-physical addresses
IVT_GPA, GDT_GPA, LEGACY_GDT_GPA, LDT_GPA = 0x0, 0x1000, 0x2000, 0x3000
IDT_GPA, SHARED_STACK_IDT_GPA, LEGACY_IDT_GPA = 0x4000, 0x5000, 0x6000
TSS32_GPA, TSS64_GPA, HANDLERS_GPA = 0x7000, 0xA000, 0xE000
CODE_GPA = 0x10000
KERNEL_STACK_GPA, RING0_STACK_GPA, IST_STACK_GPA, USER_STACK_GPA = 0x14000, 0x16000, 0x18000, 0x1A000
DATA_GPA, TABLES_GPA = 0x20000, 0x40000
CODE_BYTES = 2 * PAGE
STACK_BYTES = 2 * PAGE
HANDLER_BYTES = 16
VECTORS = 256
#: What is where nothing else is: HLT, so that a case that jumps there ends.
FREE_MEMORY = 0xF4
#: Frames of data pages; each data page has its own, but large pages, which map all of memory.
DATA_FRAMES = 0x18

#: Where guest-physical 0 is mapped in the upper half: supervisor pages, as everything of the kernel's.
UPPER = 0xFFFF_9000_0000_0000
#: In the lower half of IA-32e mode, and in protected mode: user code, supervisor code, user stack.
USER_CODE, LOW_KERNEL_CODE, USER_STACK = 0x4000_0000, 0x4010_0000, 0x4020_0000

# Attributes of data pages. Those that entries have too carry their bits.
PAGE_PRESENT, PAGE_WRITABLE, PAGE_USER, PAGE_ACCESSED, PAGE_DIRTY = PTE_P, PTE_W, PTE_U, PTE_A, PTE_D
#: The page lies in the hole.
PAGE_HOLE = 1 << 9
#: A reserved bit of the entry is set.
PAGE_RESERVED = 1 << 10
PAGE_NX = 1 << 11
#: Four bits: the protection key.
PAGE_KEY_SHIFT = 12
PAGE_KEY = 0xF << PAGE_KEY_SHIFT
#: What a page of an ordinary program has.
PAGE_PLAIN = PAGE_PRESENT | PAGE_WRITABLE | PAGE_USER | PAGE_ACCESSED | PAGE_DIRTY

_ENTRY_BITS = PAGE_PRESENT | PAGE_WRITABLE | PAGE_USER | PAGE_ACCESSED | PAGE_DIRTY
#: Reserved whatever the processor is: MAXPHYADDR is below 51 (8-byte entries); 4-byte entries have no reserved bit, but
#: bit 21 of a large one is.
_RESERVED_BIT = 1 << 51
_RESERVED_BIT_LARGE32 = 1 << 21
_ENTRY_KEY_SHIFT = 59

# Selectors. Those of user mode stand in the order that SYSRET and SYSEXIT want.
KERNEL_CS, KERNEL_SS = 0x08, 0x10
USER_CS32, USER_SS, USER_CS = 0x1B, 0x23, 0x2B
TSS_SELECTOR, LDT_SELECTOR = 0x30, 0x40
KERNEL_CS32, KERNEL_CS16 = 0x50, 0x58
RING1_CS, RING1_SS, RING2_CS, RING2_SS = 0x61, 0x69, 0x72, 0x7A
USER_CS16, USER_SS16, KERNEL_SS16 = 0x83, 0x8B, 0x90
CONFORMING_CS, EXECUTE_ONLY_CS, READ_ONLY_DATA, EXPAND_DOWN_DATA = 0x98, 0xA3, 0xAB, 0xB3
ABSENT_DATA, UNTOUCHED_DATA, SMALL_DATA = 0xBB, 0xC3, 0xCB
CALL_GATE, KERNEL_CALL_GATE, AVAILABLE_TSS, CALL_GATE16, TASK_GATE = 0xD3, 0xE0, 0xF0, 0x103, 0x10B
GDT_BYTES = 0x120
LDT_BYTES = 0x20
LDT_DATA, LDT_CODE = 0x0F, 0x17
#: Every selector that leads somewhere, null and one beyond the limit.
SELECTORS = (
    0, 3, KERNEL_CS, KERNEL_SS, USER_CS32, USER_SS, USER_CS, TSS_SELECTOR, LDT_SELECTOR, KERNEL_CS32, KERNEL_CS16,
    RING1_CS, RING1_SS, RING2_CS, RING2_SS, USER_CS16, USER_SS16, KERNEL_SS16, CONFORMING_CS, CONFORMING_CS | 3,
    EXECUTE_ONLY_CS, READ_ONLY_DATA, EXPAND_DOWN_DATA, ABSENT_DATA, UNTOUCHED_DATA, SMALL_DATA, CALL_GATE,
    KERNEL_CALL_GATE, AVAILABLE_TSS, CALL_GATE16, TASK_GATE, LDT_DATA, LDT_CODE, GDT_BYTES,
)  # fmt: skip

#: Interrupt vectors with gates that are not like the others.
ABSENT_GATE, TRAP_GATE, USER_CODE_GATE, NOT_A_GATE = 0x81, 0x82, 0x83, 0x84
#: Software may use these.
SOFTWARE_VECTORS = (3, 4, 0x80, ABSENT_GATE, TRAP_GATE, USER_CODE_GATE, NOT_A_GATE)

IO_BITMAP_BYTES = 0x2001
#: The I/O permission bitmap repeats: eight ports allowed, eight not, then a mixture.
IO_BITMAP_PATTERN = bytes((0x00, 0xFF, 0x0F, 0xF0, 0x00, 0x00, 0xAA, 0x55))

_LOW_DATA, _HIGH_DATA = 0x5000_0000, 0xFFFF_8000_5000_0000
_LOW_LARGE, _HIGH_LARGE = 0x6000_0000, 0xFFFF_8000_6000_0000
_RUN = 6
_MIDDLE_DATA32 = 0x8000_0000 - 3 * PAGE
_LARGE_OFFSET = DATA_GPA


def _run(start: int, pages: int = _RUN) -> tuple[int, ...]:
    return tuple(start + number * PAGE for number in range(pages))


#: Page 0, the page below 4 GiB, the last of the lower half, the first of the upper half, and the last of all.
_ENDS64 = (0, 0xFFFF_F000, 0x7FFF_FFFF_F000, 0xFFFF_8000_0000_0000, 0xFFFF_FFFF_FFFF_F000)
_ENDS57 = (0, 0xFFFF_F000, 0x00FF_FFFF_FFFF_F000, 0xFF00_0000_0000_0000, 0xFFFF_FFFF_FFFF_F000)
_LARGE64 = (_LOW_LARGE, _HIGH_LARGE)
_PAGES: dict[Paging, tuple[int, ...]] = {
    Paging.LEVEL4: _run(_LOW_DATA) + _run(_HIGH_DATA) + _ENDS64 + _LARGE64,
    Paging.LEVEL5: _run(_LOW_DATA) + _run(_HIGH_DATA) + _ENDS57 + _LARGE64,
    Paging.PAE: _run(_LOW_DATA) + _run(_MIDDLE_DATA32) + (0, 0xFFFF_F000, _LOW_LARGE),
    Paging.BITS32: _run(_LOW_DATA) + _run(_MIDDLE_DATA32) + (0, 0xFFFF_F000, _LOW_LARGE),
    Paging.NONE: (*_run(DATA_GPA), HOLE_GPA, MEMORY_BYTES - PAGE),
}
#: How many data pages a case has attributes for; not every kind of paging uses them all.
DATA_PAGES = max(len(pages) for pages in _PAGES.values())


def data_pages(paging: Paging) -> tuple[int, ...]:
    """The linear addresses of the data pages, in the order of ``Case.pages``."""
    return _PAGES[paging]


def is_large(gva: int) -> bool:
    """Whether the data page at *gva* is a large one, which maps guest-physical memory from 0 on."""
    return gva in _LARGE64


def interesting_address(gva: int) -> int:
    """Where in the data page at *gva* there is data: its start, or in a large page the first frame."""
    return gva + _LARGE_OFFSET if is_large(gva) else gva


def frame_of(number: int) -> int:
    """The guest-physical address of the frame of data page *number*."""
    return DATA_GPA + number * PAGE


def page_entry(number: int, gva: int, attributes: int, entry_bytes: int) -> int:
    """The paging-structure entry that maps data page *number* at *gva*, with *attributes* (``PAGE_*``).

    *entry_bytes* is 4 for 32-bit paging, else 8.
    """
    large = is_large(gva)
    entry = attributes & _ENTRY_BITS
    if large:
        entry |= PTE_PS
    else:
        entry |= HOLE_GPA + number * PAGE if attributes & PAGE_HOLE else frame_of(number)
    if entry_bytes == 4:
        return entry | _RESERVED_BIT_LARGE32 if large and attributes & PAGE_RESERVED else entry
    if attributes & PAGE_RESERVED:
        entry |= _RESERVED_BIT
    if attributes & PAGE_NX:
        entry |= PTE_XD
    return entry | (attributes & PAGE_KEY) >> PAGE_KEY_SHIFT << _ENTRY_KEY_SHIFT


def code_base(mode: Mode, paging: Paging, *, user: bool, upper: bool) -> int:
    """The linear address of the code pages: those for CPL 3 (*user*), or the kernel's, in IA-32e mode in one half.

    In real and virtual-8086 mode it is the base of CS, which is ``CODE_GPA``.
    """
    if mode in (Mode.REAL, Mode.VIRTUAL8086) or paging is Paging.NONE:
        return CODE_GPA
    if user:
        return USER_CODE
    return UPPER + CODE_GPA if upper else LOW_KERNEL_CODE


def code_offset(case: Case) -> int:
    """Where in the two code pages the code of *case* begins."""
    base = 0 if case.mode is Mode.LONG64 else case.segments[CS].base
    return (base + case.rip) % CODE_BYTES


def handlers_base(mode: Mode) -> int:
    """The offset (in IA-32e mode the linear address) of the first handler."""
    if mode.is_ia32e:
        return UPPER + HANDLERS_GPA
    return 0 if mode is Mode.REAL else HANDLERS_GPA


def handler_of(mode: Mode, rip: int) -> int | None:
    """The vector whose handler has halted with *rip* behind its HLT; None where that is no handler."""
    vector, rest = divmod(rip - 1 - handlers_base(mode), HANDLER_BYTES)
    return vector if not rest and 0 <= vector < VECTORS else None


def describe(gpa: int) -> str:
    """What lies at guest-physical *gpa*, in words."""
    for start, end, name in _REGIONS:
        if start <= gpa < end:
            return f"{name}+{gpa - start:#x}"
    return f"{gpa:#x}"


_REGIONS = (
    (IVT_GPA, GDT_GPA, "vectors"),
    (GDT_GPA, LEGACY_GDT_GPA, "GDT"),
    (LEGACY_GDT_GPA, LDT_GPA, "GDT"),
    (LDT_GPA, IDT_GPA, "LDT"),
    (IDT_GPA, TSS32_GPA, "IDT"),
    (TSS32_GPA, HANDLERS_GPA, "TSS"),
    (HANDLERS_GPA, CODE_GPA, "handlers"),
    (CODE_GPA, CODE_GPA + CODE_BYTES, "code"),
    (KERNEL_STACK_GPA, RING0_STACK_GPA, "kernel stack"),
    (RING0_STACK_GPA, IST_STACK_GPA, "ring-0 stack"),
    (IST_STACK_GPA, USER_STACK_GPA, "IST stack"),
    (USER_STACK_GPA, DATA_GPA, "user stack"),
    *((frame_of(number), frame_of(number) + PAGE, f"data page {number}") for number in range(DATA_FRAMES)),
    (TABLES_GPA, MEMORY_BYTES, "page tables"),
)
