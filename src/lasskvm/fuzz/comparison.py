"""Where two end states differ.

:func:`agree` is the quick answer that nearly all cases get; :func:`differences` lists what is not the same, by name,
without what the manual leaves undefined.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lasskvm import state as s
from lasskvm.fuzz import layout
from lasskvm.fuzz.case import Case
from lasskvm.fuzz.fpu_registers import names
from lasskvm.fuzz.paths import Ending, EndState
from lasskvm.fuzz.undefined import undefined_flags
from lasskvm.state import STATE_WORDS
from lasskvm.x86.registers import RFLAGS_FIXED

__all__ = ["Difference", "agree", "differences"]

#: Words that are no architectural state.
_IGNORED = (s.TLB_FLUSH, s.MAXPHYADDR, s.CR4_ALLOWED, s.EFER_ALLOWED)
_COMPARED = np.array([word for word in range(STATE_WORDS) if word not in _IGNORED])
_WORD_BYTES = 8
#: The sizes of FLAGS, EFLAGS and RFLAGS in memory, in bits, and bits that are 0 in all of them.
_FLAGS_SIZES = (64, 32, 16)
_ALWAYS_CLEAR = ~0x3F7FD7
_MOST_MEMORY_DIFFERENCES = 12


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same on both paths; ``name`` is that of a register or of a place in memory."""

    name: str
    first: str
    second: str

    @property
    def region(self) -> str:
        """The name without the place in a region of memory."""
        return self.name.partition("+")[0].rstrip("0123456789 ") if "+" in self.name else self.name


def agree(first: EndState, second: EndState) -> bool:
    """Whether nothing differs at all."""
    return (
        first.ending is second.ending
        and first.bus == second.bus
        and np.array_equal(first.words[_COMPARED], second.words[_COMPARED])
        and np.array_equal(first.memory.view(np.uint64), second.memory.view(np.uint64))
        and first.fpu == second.fpu
        and first.msrs == second.msrs
    )


def differences(case: Case, first: EndState, second: EndState) -> tuple[Difference, ...]:
    """What differs, but for what the manual leaves undefined."""
    found = list(_ending_differences(case, first, second))
    undefined = undefined_flags(case.mode.bits, case.code)
    found += _word_differences(first, second, undefined)
    found += _memory_differences(first, second, undefined)
    for name, ours, theirs in zip(names(), first.fpu, second.fpu, strict=True):
        if ours != theirs:
            found.append(Difference(name, hex(ours), hex(theirs)))
    for index in sorted(first.msrs.keys() | second.msrs.keys()):
        values = first.msrs.get(index), second.msrs.get(index)
        if values[0] != values[1]:
            found.append(Difference(f"MSR {index:#x}", *(str(value) for value in values)))
    return tuple(found)


def _ending_differences(case: Case, first: EndState, second: EndState) -> Iterator[Difference]:
    endings = describe_ending(case, first), describe_ending(case, second)
    if endings[0] != endings[1]:
        yield Difference("ending", *endings)
    if first.bus != second.bus:
        yield Difference("bus", *(", ".join(map(str, state.bus)) or "nothing" for state in (first, second)))


def describe_ending(case: Case, end: EndState) -> str:
    """How a case ended, in a few words: ``#PF(0x6)``, ``halted``, ``crashed: ...``."""
    vector = end.vector(case)
    if vector is not None:
        return f"vector {vector}"
    return f"{end.ending}: {end.detail}" if end.detail else str(end.ending)


def _word_differences(first: EndState, second: EndState, undefined: int) -> Iterator[Difference]:
    for index in _COMPARED[first.words[_COMPARED] != second.words[_COMPARED]]:
        values = int(first.words[index]), int(second.words[index])
        if index == s.RFLAGS and (values[0] ^ values[1]) & ~undefined == 0:
            continue
        if index == s.INTERRUPT_SHADOW and first.ending is second.ending is Ending.SHUTDOWN:
            # Nothing follows that it could hold back.
            continue
        yield Difference(_WORD_NAMES[int(index)], hex(values[0]), hex(values[1]))


def _memory_differences(first: EndState, second: EndState, undefined: int) -> Iterator[Difference]:
    ours, theirs = first.memory.view(np.uint64), second.memory.view(np.uint64)
    count = 0
    for index in np.flatnonzero(ours != theirs):
        values = int(ours[index]), int(theirs[index])
        if _are_saved_flags(*values, undefined):
            continue
        count += 1
        if count > _MOST_MEMORY_DIFFERENCES:
            yield Difference("memory, further", "", "")
            return
        yield Difference(layout.describe(int(index) * _WORD_BYTES), hex(values[0]), hex(values[1]))


def _are_saved_flags(first: int, second: int, undefined: int) -> bool:
    """Whether two words of memory are the same but for undefined flags in an image of RFLAGS, EFLAGS or FLAGS."""
    difference = first ^ second
    for size in _FLAGS_SIZES:
        for shift in range(0, 64, size):
            image = first >> shift & (1 << size) - 1
            if (
                difference & ~(undefined << shift) == 0
                and image & _ALWAYS_CLEAR == 0
                and image & RFLAGS_FIXED
            ):
                return True
    return False


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _word_names() -> list[str]:
    names = [f"word {index}" for index in range(STATE_WORDS)]
    for name in _NAMED_WORDS:
        names[getattr(s, name)] = name.lower()
    segments = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
    for number, segment in enumerate(segments):
        for field, part in enumerate(("selector", "base", "limit", "attributes")):
            names[s.segment_word(number, field)] = f"{segment}.{part}"
    return names


_NAMED_WORDS = _names("""
    RAX RCX RDX RBX RSP RBP RSI RDI R8 R9 R10 R11 R12 R13 R14 R15 RIP RFLAGS CPL CR0 CR2 CR3 CR4 CR8 EFER DR0 DR1
    DR2 DR3 DR6 DR7 GDT_BASE GDT_LIMIT IDT_BASE IDT_LIMIT STAR LSTAR CSTAR SFMASK KERNEL_GS_BASE TSC_AUX
    SYSENTER_CS SYSENTER_ESP SYSENTER_EIP PAT APIC_BASE MISC_ENABLE XCR0 INTERRUPT_SHADOW NMI_BLOCKED
""")
_WORD_NAMES = _word_names()
