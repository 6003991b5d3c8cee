"""Drawing segment registers: flat ones most of the time, odd ones in between."""

from __future__ import annotations

import random

from lasskvm.fuzz import layout
from lasskvm.fuzz.aiming import pointer
from lasskvm.fuzz.case import Case, Mode, Paging
from lasskvm.state import Segment
from lasskvm.x86.registers import (
    AR_CODE,
    AR_CODE32,
    AR_CODE64,
    AR_CONFORMING,
    AR_DATA,
    AR_DB,
    AR_DPL_SHIFT,
    AR_EXPAND_DOWN,
    AR_G,
    AR_READABLE,
    AR_REAL_MODE,
    AR_UNUSABLE,
    AR_WRITABLE,
    MASK32,
)

__all__ = ["draw_segments", "plain_segments"]

_LIMIT16 = 0xFFFF
_PARAGRAPH_SHIFT = 4
_REAL_MODES = (Mode.REAL, Mode.VIRTUAL8086)
_USER_DATA = AR_DATA | 3 << AR_DPL_SHIFT
#: Takes from attributes what makes a segment one of 32 bits.
_SIXTEEN_BITS = ~(AR_DB | AR_G)
_NULL = Segment(0, 0, 0, AR_UNUSABLE)
_LONG_SELECTORS = {
    0: (layout.KERNEL_CS, layout.KERNEL_SS), 1: (layout.RING1_CS, layout.RING1_SS),
    2: (layout.RING2_CS, layout.RING2_SS), 3: (layout.USER_CS, layout.USER_SS),
}  # fmt: skip


def plain_segments(case: Case) -> tuple[Segment, ...]:
    """The most ordinary ES, CS, SS, DS, FS and GS for the mode and CPL of *case*."""
    code, stack = _code_and_stack(case)
    if case.mode is Mode.LONG64:
        data = _NULL
    elif case.mode in _REAL_MODES:
        data = _real(layout.DATA_GPA, stack.attributes)
    else:
        data = Segment(layout.USER_SS, 0, MASK32, _USER_DATA)
    return data, code, stack, data, data, data


def draw_segments(rng: random.Random, case: Case) -> tuple[Segment, ...]:
    """ES, CS, SS, DS, FS and GS for *case*, whose mode, CPL and control registers are drawn already."""
    code, stack = _code_and_stack(case)
    if case.mode is Mode.LONG64:
        data = _draw_long_data(rng, case)
        if case.cpl < 3 and rng.random() < 0.1:
            # A null SS, as interrupts from an outer level leave it.
            stack = Segment(case.cpl, 0, 0, AR_UNUSABLE | case.cpl << AR_DPL_SHIFT)
    elif case.mode in _REAL_MODES:
        places = (layout.DATA_GPA, layout.DATA_GPA + 0x3000, 0xFFF0, 0)
        data = [_real(rng.choice(places), stack.attributes) for _ in range(4)]
    else:
        data = [_draw_protected_data(rng, case) for _ in range(4)]
        if rng.random() < 0.03:
            odd = code.attributes ^ rng.choice((AR_READABLE, AR_CONFORMING))
            code = Segment(code.selector, code.base, code.limit, odd)
    es, ds, fs, gs = data
    return es, code, stack, ds, fs, gs


def _code_and_stack(case: Case) -> tuple[Segment, Segment]:
    privilege = case.cpl << AR_DPL_SHIFT
    if case.mode is Mode.LONG64:
        cs, ss = _LONG_SELECTORS[case.cpl]
        return Segment(cs, 0, MASK32, AR_CODE64 | privilege), Segment(ss, 0, MASK32, AR_DATA | privilege)
    if case.mode in _REAL_MODES:
        attributes = AR_REAL_MODE | privilege
        code = attributes | AR_CODE if case.mode is Mode.REAL else attributes
        return _real(layout.CODE_GPA, code), _real(layout.KERNEL_STACK_GPA, attributes)
    user = case.cpl == 3
    if case.mode.bits == 32:
        cs = layout.USER_CS32 if user else layout.KERNEL_CS32 | case.cpl
        ss = layout.USER_SS if user else layout.KERNEL_SS | case.cpl
        return Segment(cs, 0, MASK32, AR_CODE32 | privilege), Segment(ss, 0, MASK32, AR_DATA | privilege)
    code_base = layout.code_base(case.mode, case.paging, user=user, upper=False)
    stack_base = layout.KERNEL_STACK_GPA
    if case.mode.is_ia32e or (user and case.paging is not Paging.NONE):
        stack_base = layout.USER_STACK
    cs = layout.USER_CS16 if user else layout.KERNEL_CS16 | case.cpl
    ss = layout.USER_SS16 if user else layout.KERNEL_SS16 | case.cpl
    return (
        Segment(cs, code_base, _LIMIT16, (AR_CODE32 | privilege) & _SIXTEEN_BITS),
        Segment(ss, stack_base, _LIMIT16, (AR_DATA | privilege) & _SIXTEEN_BITS),
    )


def _real(gpa: int, attributes: int) -> Segment:
    return Segment(gpa >> _PARAGRAPH_SHIFT, gpa, _LIMIT16, attributes)


def _draw_long_data(rng: random.Random, case: Case) -> list[Segment]:
    """DS and ES, of which nothing matters in 64-bit mode, and FS and GS, of which the base does."""
    data = rng.choice((_NULL, Segment(layout.USER_SS, 0, MASK32, _USER_DATA)))
    if rng.random() < 0.05:
        data = Segment(layout.SMALL_DATA, 0x1230, 0x7F, _USER_DATA & ~(AR_G | AR_WRITABLE))
    bases = [rng.choice((0, 0, pointer(rng, case))) for _ in range(2)]
    return [data, data, *(Segment(data.selector, base, data.limit, data.attributes) for base in bases)]


def _draw_protected_data(rng: random.Random, case: Case) -> Segment:
    """A data segment that code of any privilege can have: flat, or not quite."""
    kind = rng.random()
    if kind < 0.70:
        return Segment(layout.USER_SS, 0, MASK32, _USER_DATA)
    if kind < 0.75:
        return _NULL
    base = pointer(rng, case) & MASK32 & ~0xF
    if kind < 0.80:
        return Segment(layout.USER_SS, base, MASK32, _USER_DATA)
    if kind < 0.85:
        return Segment(layout.SMALL_DATA, base, rng.choice((0x7F, 0xFFF, 0)), _USER_DATA & ~AR_G)
    if kind < 0.90:
        limit, attributes = rng.choice((0xFFF, 0x7FFF, _LIMIT16)), _USER_DATA & ~AR_G | AR_EXPAND_DOWN
        attributes &= rng.choice((-1, ~AR_DB))
        return Segment(layout.EXPAND_DOWN_DATA, rng.choice((0, base)), limit, attributes)
    if kind < 0.94:
        return Segment(layout.READ_ONLY_DATA, 0, MASK32, _USER_DATA & ~AR_WRITABLE)
    attributes = AR_CODE32 | 3 << AR_DPL_SHIFT
    if kind < 0.97:
        attributes &= ~AR_READABLE
    return Segment(layout.EXECUTE_ONLY_CS, 0, MASK32, attributes)
