"""32-bit protected mode without paging for a :class:`emulator_guest.Guest`: flat segments, a GDT, a 32-bit TSS."""

from __future__ import annotations

from emulator_guest import DPL3, KERNEL_CS32, KERNEL_SS, TSS_SELECTOR, USER_CS32, USER_SS, Guest

from lasskvm.state import CPL, CR0, CR4, EFER, GDT_BASE, GDT_LIMIT, RFLAGS, RIP, RSP, Segment
from lasskvm.x86.descriptors import SYS_TSS_BUSY, TSS32_BYTES, TSS32_ESP0, make_gate, make_segment
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_DATA,
    AR_DB,
    AR_P,
    CR0_ET,
    CR0_PE,
    CS,
    DS,
    ES,
    FS,
    GS,
    RFLAGS_FIXED,
    SS,
    TR,
)

GDT, TSS = 0x1000, 0x4000
START, STACK, RING0_STACK, DATA = 0x5000, 0x20000, 0x30000, 0x40000
FLAT = 0xFFFFFFFF
#: Free GDT entries: the first is for gates; the others are 16-bit segments.
GATE, CODE16, DATA16 = 0x78, 0x80, 0x88
GDT_BYTES = 0x90


def enter_flat_mode(guest: Guest, cpl: int = 0) -> None:
    """Kernel code at CPL 0, or user code at CPL 3."""
    words, set_segment = guest.words, guest.state.set_segment
    words[CR0], words[CR4], words[EFER], words[CPL] = CR0_PE | CR0_ET, 0, 0, cpl
    words[GDT_BASE], words[GDT_LIMIT], words[RFLAGS] = GDT, GDT_BYTES - 1, RFLAGS_FIXED
    dpl = DPL3 if cpl else 0
    set_segment(CS, Segment(USER_CS32 if cpl else KERNEL_CS32, 0, FLAT, AR_CODE32 | dpl))
    for number in (SS, DS, ES, FS, GS):
        set_segment(number, Segment(USER_SS if cpl else KERNEL_SS, 0, FLAT, AR_DATA | dpl))
    set_segment(TR, Segment(TSS_SELECTOR, TSS, TSS32_BYTES - 1, AR_P | SYS_TSS_BUSY))
    words[RIP], words[RSP] = START, STACK
    guest.store(TSS + TSS32_ESP0, 4, RING0_STACK)
    guest.store(TSS + TSS32_ESP0 + 4, 4, KERNEL_SS)
    guest.set_descriptor(CODE16, make_segment(0, 0xFFFF, AR_CODE32 & ~AR_DB))
    guest.set_descriptor(DATA16, make_segment(0, 0xFFFF, AR_DATA & ~AR_DB))


def set_gate(guest: Guest, selector: int, offset: int, attributes: int, parameters: int = 0) -> None:
    """Put a call gate (or another one) into the GDT entry ``GATE``."""
    guest.set_descriptor(GATE, make_gate(offset, selector, attributes, parameters))


def frame32(guest: Guest, count: int, size: int = 4) -> list[int]:
    """The *count* values of *size* bytes at ESP, lowest first."""
    return [guest.load(guest.words[RSP] + size * number, size) for number in range(count)]
