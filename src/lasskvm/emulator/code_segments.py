"""Code segments as targets of far transfers: which may be entered from here, at which privilege level, and where.

The functions that name a transfer raise :class:`GuestFault` with nothing changed, in the manual's order: #GP(0) for a
null selector, #GP with the selector for what the transfer may not enter, #NP with the selector for what is absent.

Source: Intel SDM volume 2A, JMP and CALL (far), volume 2B, RET (far); volume 3A, 6.8 (privilege levels).
"""

from __future__ import annotations

from dataclasses import dataclass

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.faults import GuestFault, general_protection
from lasskvm.emulator.modes import in_ia32e_mode, linear_address_bits
from lasskvm.emulator.segments import (
    descriptor_privilege_level,
    fetch_descriptor,
    segment_from_descriptor,
    set_accessed,
    set_segment,
)
from lasskvm.emulator.tables import is_null_selector, selector_error_code
from lasskvm.state import CPL, Segment, Words
from lasskvm.x86.address import is_canonical
from lasskvm.x86.descriptors import SELECTOR_RPL, segment_attributes, segment_limit
from lasskvm.x86.exceptions import NP
from lasskvm.x86.paging import PhysicalMemory
from lasskvm.x86.registers import AR_CODE, AR_CONFORMING, AR_DB, AR_L, AR_P, AR_S, CS, MASK32

__all__ = ["CodeTarget", "direct_target", "fetch_target_descriptor", "return_target"]


@dataclass(frozen=True, slots=True)
class CodeTarget:
    """A code segment that may be entered, and the privilege level that it will run at."""

    selector: int
    descriptor: int
    cpl: int
    #: Whether it is 64-bit code; else its limit counts.
    is_64bit: bool

    @classmethod
    def of(cls, words: Words, selector: int, descriptor: int, cpl: int) -> CodeTarget:
        """The code segment of *descriptor*, which somebody else has checked."""
        is_64bit = in_ia32e_mode(words) and segment_attributes(descriptor) & AR_L != 0
        return cls(selector, descriptor, cpl, is_64bit)

    def instruction_pointer(self, words: Words, rip: int) -> int:
        """*rip* as far as the segment uses it; #GP(0) beyond the limit, or not canonical. LASS is not asked."""
        if self.is_64bit:
            if not is_canonical(rip, linear_address_bits(words)):
                raise general_protection()
            return rip
        rip &= MASK32
        if rip > segment_limit(self.descriptor):
            raise general_protection()
        return rip

    def accessed_segment(self, ctx: Emulation) -> Segment:
        """What CS will be. Sets the accessed bit in the descriptor table, which can fault."""
        descriptor = set_accessed(ctx.words, ctx.memory, self.selector, self.descriptor)
        return segment_from_descriptor(self.selector & ~SELECTOR_RPL | self.cpl, descriptor)

    def enter(self, words: Words, segment: Segment) -> None:
        """Load CS with *segment*, and CPL. Nothing can fault any more."""
        set_segment(words, CS, segment)
        words[CPL] = self.cpl


def fetch_target_descriptor(words: Words, memory: PhysicalMemory, selector: int) -> int:
    """The descriptor that the selector of a far pointer or a return frame names: a code segment, or a gate."""
    if is_null_selector(selector):
        raise general_protection()
    return fetch_descriptor(words, memory, selector)


def direct_target(words: Words, selector: int, descriptor: int) -> CodeTarget:
    """The target of a far JMP or CALL without a gate: code of the current privilege level, or conforming code."""
    cpl = words[CPL]
    attributes = _code_attributes(selector, descriptor)
    dpl = descriptor_privilege_level(attributes)
    if attributes & AR_CONFORMING:
        is_allowed = dpl <= cpl
    else:
        is_allowed = selector & SELECTOR_RPL <= cpl and dpl == cpl
    return _checked(words, selector, descriptor, cpl, is_allowed)


def return_target(words: Words, memory: PhysicalMemory, selector: int) -> CodeTarget:
    """The target of a far RET or IRET: code of the privilege level in the selector, which is not a higher one."""
    descriptor = fetch_target_descriptor(words, memory, selector)
    attributes = _code_attributes(selector, descriptor)
    rpl, dpl = selector & SELECTOR_RPL, descriptor_privilege_level(attributes)
    matches = dpl <= rpl if attributes & AR_CONFORMING else dpl == rpl
    return _checked(words, selector, descriptor, rpl, matches and rpl >= words[CPL])


def _code_attributes(selector: int, descriptor: int) -> int:
    attributes = segment_attributes(descriptor)
    if attributes & (AR_S | AR_CODE) != AR_S | AR_CODE:
        raise general_protection(selector_error_code(selector))
    return attributes


def _checked(words: Words, selector: int, descriptor: int, cpl: int, is_allowed: bool) -> CodeTarget:
    attributes = segment_attributes(descriptor)
    is_both = in_ia32e_mode(words) and attributes & (AR_L | AR_DB) == AR_L | AR_DB
    if not is_allowed or is_both:
        raise general_protection(selector_error_code(selector))
    if not attributes & AR_P:
        raise GuestFault(NP, selector_error_code(selector))
    return CodeTarget.of(words, selector, descriptor, cpl)
