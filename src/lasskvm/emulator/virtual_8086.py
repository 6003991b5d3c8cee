"""Virtual-8086 mode: the instructions that RFLAGS.IOPL gives to the program, or keeps for its monitor; and the virtual
interrupt flag, by which CR4.VME and CR4.PVI let a program have them all the same.

With CR4.VME, INT n also goes to the program's own vector table where the TSS's redirection bitmap says so.

Source: Intel SDM volume 3A, 21.2.5 and 21.2.7 (sensitive instructions), 21.3 (CR4.VME; table 21-2), 21.4 (CR4.PVI);
volume 2, CLI, STI, PUSHF, POPF, IRET and INT n (operation).
"""

from __future__ import annotations

from lasskvm.emulator.entry_stacks import current_stack, load_structure
from lasskvm.emulator.faults import general_protection
from lasskvm.emulator.modes import in_virtual_8086_mode
from lasskvm.emulator.segments import set_segment, virtual_8086_segment
from lasskvm.state import (
    BASE,
    CR4,
    INTERRUPT_SHADOW,
    LIMIT,
    RFLAGS,
    RIP,
    SELECTOR,
    Words,
    segment_word,
)
from lasskvm.x86.paging import PhysicalMemory
from lasskvm.x86.registers import (
    CR4_VME,
    CS,
    MASK32,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VIF,
    RFLAGS_VIP,
    TR,
)

__all__ = [
    "flags_with_virtual_interrupts",
    "has_virtual_interrupts",
    "is_redirected",
    "redirect_interrupt",
    "set_virtual_interrupts",
]

_WORD16_BYTES = 2
_MASK16 = 0xFFFF
_SELECTOR_SHIFT = 16
_VECTOR_BYTES = 4
_TR_BASE, _TR_LIMIT = segment_word(TR, BASE), segment_word(TR, LIMIT)
#: Offset of the 16-bit I/O map base in a TSS; the redirection bitmap, one bit for each vector, is just below the map.
_IO_MAP_BASE = 0x66
_REDIRECTION_BYTES = 32
_TSS_LIMIT = 103


def has_virtual_interrupts(words: Words, size: int) -> bool:
    """Whether an instruction that IOPL guards, with an operand of *size* bytes, acts on VIF where it would on IF.

    That is the case in virtual-8086 mode with IOPL below 3 and CR4.VME. Without CR4.VME, or with 32-bit operands, such
    an instruction is #GP(0) there (:class:`GuestFault`).
    """
    if not in_virtual_8086_mode(words) or words[RFLAGS] & RFLAGS_IOPL == RFLAGS_IOPL:
        return False
    if not words[CR4] & CR4_VME or size != _WORD16_BYTES:
        raise general_protection()
    return True


def flags_with_virtual_interrupts(words: Words) -> int:
    """RFLAGS as a program with the virtual interrupt flag sees them: VIF for IF, and IOPL 3."""
    flags = words[RFLAGS] & ~RFLAGS_IF | RFLAGS_IOPL
    return flags | RFLAGS_IF if flags & RFLAGS_VIF else flags


def set_virtual_interrupts(words: Words, image: int) -> None:
    """Let VIF become what IF is in *image*, flags that a program loads.

    #GP(0) as :class:`GuestFault`, with nothing changed, where the monitor has to know about it: when a virtual
    interrupt is pending (VIP) and would be enabled, or when *image* has TF.
    """
    if image & RFLAGS_TF or (image & RFLAGS_IF and words[RFLAGS] & RFLAGS_VIP):
        raise general_protection()
    if image & RFLAGS_IF:
        words[RFLAGS] |= RFLAGS_VIF
    else:
        words[RFLAGS] &= ~RFLAGS_VIF


def is_redirected(words: Words, memory: PhysicalMemory, vector: int) -> bool:
    """Whether INT *vector* goes to the vector table of the program in virtual-8086 mode, as CR4.VME lets it.

    #GP(0) as :class:`GuestFault` when the TSS has no redirection bitmap.
    """
    if not words[CR4] & CR4_VME or not in_virtual_8086_mode(words):
        return False
    if words[_TR_LIMIT] < _TSS_LIMIT:
        raise general_protection()
    map_base = load_structure(words, memory, words[_TR_BASE] + _IO_MAP_BASE & MASK32, _WORD16_BYTES, 0)
    offset = map_base - _REDIRECTION_BYTES + vector // 8
    if not 0 <= offset <= words[_TR_LIMIT]:
        raise general_protection()
    bits = load_structure(words, memory, words[_TR_BASE] + offset & MASK32, 1, 0)
    return not bits >> vector % 8 & 1


def redirect_interrupt(words: Words, memory: PhysicalMemory, vector: int, return_rip: int) -> None:
    """Deliver INT *vector* as an 8086 would, through the table at linear address 0; the program stays where it is."""
    entry = load_structure(words, memory, vector * _VECTOR_BYTES, _VECTOR_BYTES, 0)
    has_iopl = words[RFLAGS] & RFLAGS_IOPL == RFLAGS_IOPL
    flags = words[RFLAGS] if has_iopl else flags_with_virtual_interrupts(words)
    stack = current_stack(words, 0)
    frame = [flags & _MASK16, words[segment_word(CS, SELECTOR)], return_rip]
    stack.push(words, memory, _WORD16_BYTES, frame)
    stack.commit(words)
    set_segment(words, CS, virtual_8086_segment(entry >> _SELECTOR_SHIFT))
    words[RIP] = entry & _MASK16
    words[RFLAGS] &= ~(RFLAGS_TF | RFLAGS_RF | (RFLAGS_IF if has_iopl else RFLAGS_VIF))
    words[INTERRUPT_SHADOW] = 0
