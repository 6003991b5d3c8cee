"""Making a failing case small: simpler code, simpler registers, an ordinary machine, as long as it still fails.

What is left is what matters. Steps are tried in an order that gets rid of much early, again and again until none helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from lasskvm.fuzz import layout
from lasskvm.fuzz.case import Case, Mode
from lasskvm.fuzz.encoding import decode_at
from lasskvm.fuzz.segments import plain_segments
from lasskvm.x86.registers import (
    CR0_AM,
    CR0_EM,
    CR0_MP,
    CR0_NE,
    CR0_TS,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    EFER_NXE,
    EFER_SCE,
    RFLAGS_FIXED,
    RFLAGS_VM,
)

__all__ = ["shrink"]

#: Bits that a case can be without; the others make its mode.
_OPTIONAL_CR0 = CR0_MP | CR0_EM | CR0_TS | CR0_NE | CR0_WP | CR0_AM
_OPTIONAL_EFER = EFER_NXE | EFER_SCE
_MODE_CR4 = CR4_PAE | CR4_PSE | CR4_LA57
_MODE_RFLAGS = RFLAGS_VM | RFLAGS_FIXED
_MOST_RUNS = 600
_SIMPLE_VALUES = (0, 1)
_PREFIXES = frozenset((0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65))
_PLAIN_CPU = "max"


def shrink(case: Case, fails: Callable[[Case], bool]) -> Case:
    """The simplest case found from *case* on for which *fails* still holds."""
    runs = 0
    progress = True
    while progress:
        progress = False
        for step in _STEPS:
            for candidate in step(case):
                if candidate == case:
                    continue
                runs += 1
                if runs > _MOST_RUNS:
                    return case
                if fails(candidate):
                    case, progress = candidate, True
                    break
    return case


def _shorter_code(case: Case) -> Iterator[Case]:
    """Only the first instructions, only the last ones, no prefixes."""
    lengths = _instruction_lengths(case)
    end = sum(lengths)
    for length in lengths[::-1]:
        end -= length
        if end > 0:
            yield replace(case, code=case.code[:end])
    if len(lengths) > 1:
        yield replace(case, code=case.code[lengths[0] :])
    if len(lengths) == 1 and lengths[0] < len(case.code):
        yield replace(case, code=case.code[: lengths[0]])
    for position, byte in enumerate(case.code):
        if byte not in _PREFIXES and not (case.mode.bits == 64 and byte >> 4 == 4):
            break
        yield replace(case, code=case.code[:position] + case.code[position + 1 :])


def _instruction_lengths(case: Case) -> list[int]:
    lengths, position = [], 0
    while position < len(case.code):
        instruction = decode_at(case.mode.bits, case.code[position:])
        length = instruction.len if instruction is not None else len(case.code) - position
        lengths.append(length)
        position += length
    return lengths


def _ordinary_machine(case: Case) -> Iterator[Case]:
    if case.cpu != _PLAIN_CPU and not case.cr4 & CR4_LA57:
        yield replace(case, cpu=_PLAIN_CPU)
    yield replace(case, own_stacks=True)
    yield replace(case, filler=0xF4)
    yield replace(case, kernel_gs_base=0)
    yield replace(case, data_seed=0)
    yield replace(case, segments=plain_segments(case))


def _fewer_bits(case: Case) -> Iterator[Case]:
    yield replace(case, cr4=case.cr4 & _MODE_CR4)
    yield replace(case, rflags=case.rflags & _MODE_RFLAGS)
    for name, kept in (
        ("cr4", _MODE_CR4), ("rflags", _MODE_RFLAGS), ("cr0", ~_OPTIONAL_CR0), ("efer", ~_OPTIONAL_EFER),
    ):  # fmt: skip
        value = getattr(case, name)
        for bit in range(value.bit_length()):
            if value >> bit & 1 and not kept >> bit & 1:
                yield replace(case, **{name: value & ~(1 << bit)})


def _plain_pages(case: Case) -> Iterator[Case]:
    yield replace(case, pages=(layout.PAGE_PLAIN,) * len(case.pages))
    for number, attributes in enumerate(case.pages):
        for simpler in (layout.PAGE_PLAIN, attributes | layout.PAGE_ACCESSED | layout.PAGE_DIRTY):
            if attributes != simpler:
                pages = (*case.pages[:number], simpler, *case.pages[number + 1 :])
                yield replace(case, pages=pages)


def _plain_registers(case: Case) -> Iterator[Case]:
    for number, value in enumerate(case.registers):
        for simpler in _SIMPLE_VALUES:
            if value not in _SIMPLE_VALUES or value > simpler:
                registers = (*case.registers[:number], simpler, *case.registers[number + 1 :])
                yield replace(case, registers=registers)


def _plain_segments(case: Case) -> Iterator[Case]:
    plain = plain_segments(case)
    for number, segment in enumerate(case.segments):
        if segment != plain[number]:
            yield replace(
                case, segments=(*case.segments[:number], plain[number], *case.segments[number + 1 :])
            )


def _usual_place(case: Case) -> Iterator[Case]:
    if case.mode is Mode.LONG64:
        start = case.rip & ~(layout.CODE_BYTES - 1)
        yield replace(case, rip=start + 0x100)


_STEPS: tuple[Callable[[Case], Iterator[Case]], ...] = (
    _shorter_code,
    _ordinary_machine,
    _plain_pages,
    _fewer_bits,
    _usual_place,
    _plain_segments,
    _plain_registers,
)
