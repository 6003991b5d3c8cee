"""The checks of a VM entry on L2's segment registers, part of :mod:`lasskvm.vmx.guest_checks`.

In virtual-8086 mode, selectors prescribe everything about the six segments. In the other modes what a register holds
must be something that a descriptor can say and that loading it would have accepted; an unusable register may hold
anything. Selectors and privilege levels of an unrestricted guest need not fit together, because they do not in real mode
and right after it.

Source: Intel SDM volume 3C, 27.3.1.2 (checks on guest segment registers), table 25-2 (access rights).
"""

from __future__ import annotations

from collections.abc import Iterator

from lasskvm.state import Segment, Words
from lasskvm.vmx.guest_mode import (
    guest_segment,
    is_ia32e_guest,
    is_unrestricted_guest,
    is_virtual_8086_guest,
    processor_linear_bits,
)
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86.address import is_canonical
from lasskvm.x86.descriptors import SELECTOR_RPL, SELECTOR_TI, SYS_LDT, SYS_TSS16_BUSY, SYS_TSS_BUSY
from lasskvm.x86.registers import (
    AR_ACCESSED,
    AR_CODE,
    AR_CONFORMING,
    AR_DB,
    AR_DPL,
    AR_DPL_SHIFT,
    AR_EXPAND_DOWN,
    AR_G,
    AR_L,
    AR_P,
    AR_READABLE,
    AR_S,
    AR_TYPE,
    AR_UNUSABLE,
    AR_WRITABLE,
    CR0_PE,
    CS,
    DS,
    ES,
    FS,
    GS,
    LDTR,
    MASK32,
    SS,
    TR,
)
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["segment_dpl", "segment_violations"]

_SEGMENT_NAMES = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
_DATA_SEGMENTS = (ES, DS, FS, GS)

#: Bits 11:8 and 31:17 of access rights.
_AR_RESERVED = 0xF00 | MASK32 & -(AR_UNUSABLE << 1)
_TYPE_DATA = AR_WRITABLE | AR_ACCESSED
_STACK_TYPES = (_TYPE_DATA, _TYPE_DATA | AR_EXPAND_DOWN)
_ACCESSED_CODE = AR_CODE | AR_ACCESSED
_CONFORMING_CODE = AR_CODE | AR_CONFORMING
#: A limit without granularity has at most 20 bits, one with granularity ends in 12 ones.
_BYTE_LIMIT_BITS = 20
_PAGE_LIMIT_END = 0xFFF
_BASE_BITS = 32

_VIRTUAL_8086_LIMIT = 0xFFFF
_VIRTUAL_8086_RIGHTS = AR_P | AR_DPL | AR_S | _TYPE_DATA
_VIRTUAL_8086_BASE_SHIFT = 4


def segment_violations(vmcs: Vmcs12, words: Words) -> Iterator[str]:
    """What is wrong with the segment registers (27.3.1.2)."""
    segments = [guest_segment(vmcs, number) for number in range(len(_SEGMENT_NAMES))]
    if is_virtual_8086_guest(vmcs):
        for name, segment in zip(_SEGMENT_NAMES[:LDTR], segments[:LDTR], strict=True):
            yield from _virtual_8086_violations(name, segment)
    else:
        yield from _code_violations(vmcs, segments[CS], segments[SS])
        yield from _stack_violations(vmcs, segments[CS], segments[SS])
        for number in _DATA_SEGMENTS:
            yield from _data_violations(vmcs, _SEGMENT_NAMES[number], segments[number])
    yield from _task_register_violations(vmcs, segments[TR])
    yield from _local_table_violations(segments[LDTR])
    yield from _base_violations(segments, words)


def segment_dpl(segment: Segment) -> int:
    """The DPL among its attributes; that of SS is the CPL."""
    return (segment.attributes & AR_DPL) >> AR_DPL_SHIFT


def _is_usable(segment: Segment) -> bool:
    return not segment.attributes & AR_UNUSABLE


def _virtual_8086_violations(name: str, segment: Segment) -> Iterator[str]:
    if segment.base != segment.selector << _VIRTUAL_8086_BASE_SHIFT:
        yield f"the base of {name} is not its selector times 16 in virtual-8086 mode"
    if segment.limit != _VIRTUAL_8086_LIMIT:
        yield f"the limit of {name} is not 64 KiB in virtual-8086 mode"
    if segment.attributes != _VIRTUAL_8086_RIGHTS:
        yield f"the access rights of {name} are not those of virtual-8086 mode"


def _code_violations(vmcs: Vmcs12, cs: Segment, ss: Segment) -> Iterator[str]:
    kind = cs.attributes & AR_TYPE
    if kind == _TYPE_DATA:
        # What real mode has in CS.
        if not is_unrestricted_guest(vmcs):
            yield "CS is a data segment, and the guest is not unrestricted"
        if segment_dpl(cs):
            yield "CS is a data segment with another DPL than 0"
    elif kind & _ACCESSED_CODE != _ACCESSED_CODE:
        yield "CS is no accessed code segment"
    elif kind & AR_CONFORMING:
        if segment_dpl(cs) > segment_dpl(ss):
            yield "conforming CS is less privileged than SS"
    elif segment_dpl(cs) != segment_dpl(ss):
        yield "CS and SS have different privilege levels"
    if is_ia32e_guest(vmcs) and cs.attributes & AR_L and cs.attributes & AR_DB:
        yield "CS has both L and D"
    yield from _descriptor_violations("CS", cs, AR_S)


def _stack_violations(vmcs: Vmcs12, cs: Segment, ss: Segment) -> Iterator[str]:
    rpl = ss.selector & SELECTOR_RPL
    if not is_unrestricted_guest(vmcs):
        if rpl != cs.selector & SELECTOR_RPL:
            yield "SS and CS have different RPLs"
        # Also of an unusable SS: its DPL is the CPL of L2.
        if rpl != segment_dpl(ss):
            yield "SS has another RPL than DPL"
    real = cs.attributes & AR_TYPE == _TYPE_DATA or not vmcs[VmcsField.GUEST_CR0] & CR0_PE
    if real and segment_dpl(ss):
        yield "SS has another DPL than 0 in real mode"
    if _is_usable(ss):
        if ss.attributes & AR_TYPE not in _STACK_TYPES:
            yield "SS is no accessed and writable data segment"
        yield from _descriptor_violations("SS", ss, AR_S)


def _data_violations(vmcs: Vmcs12, name: str, segment: Segment) -> Iterator[str]:
    if not _is_usable(segment):
        return
    kind = segment.attributes & AR_TYPE
    if not kind & AR_ACCESSED:
        yield f"{name} is not accessed"
    if kind & AR_CODE and not kind & AR_READABLE:
        yield f"{name} is a code segment that cannot be read"
    needs_privilege = kind & _CONFORMING_CODE != _CONFORMING_CODE and not is_unrestricted_guest(vmcs)
    if needs_privilege and segment_dpl(segment) < segment.selector & SELECTOR_RPL:
        yield f"{name} is more privileged than its RPL"
    yield from _descriptor_violations(name, segment, AR_S)


def _task_register_violations(vmcs: Vmcs12, tr: Segment) -> Iterator[str]:
    kind = tr.attributes & AR_TYPE
    if kind != SYS_TSS_BUSY and (is_ia32e_guest(vmcs) or kind != SYS_TSS16_BUSY):
        yield "TR is no busy TSS of the guest's mode"
    if tr.selector & SELECTOR_TI:
        yield "TR is not in the GDT"
    if not _is_usable(tr):
        yield "TR is unusable"
    yield from _descriptor_violations("TR", tr, 0)


def _local_table_violations(ldtr: Segment) -> Iterator[str]:
    if not _is_usable(ldtr):
        return
    if ldtr.attributes & AR_TYPE != SYS_LDT:
        yield "LDTR is no LDT"
    if ldtr.selector & SELECTOR_TI:
        yield "LDTR is not in the GDT"
    yield from _descriptor_violations("LDTR", ldtr, 0)


def _descriptor_violations(name: str, segment: Segment, s: int) -> Iterator[str]:
    """What no segment may have, whatever its type; *s* is the S flag that it should have, ``AR_S`` or 0."""
    if segment.attributes & AR_S != s:
        yield f"{name} has the wrong S flag"
    if not segment.attributes & AR_P:
        yield f"{name} is not present"
    if segment.attributes & _AR_RESERVED:
        yield f"{name} has reserved access rights"
    if segment.attributes & AR_G:
        if segment.limit & _PAGE_LIMIT_END != _PAGE_LIMIT_END:
            yield f"{name} has a limit in pages that does not end with one"
    elif segment.limit >> _BYTE_LIMIT_BITS:
        yield f"{name} has a limit in bytes of more than 20 bits"


def _base_violations(segments: list[Segment], words: Words) -> Iterator[str]:
    for number, (name, segment) in enumerate(zip(_SEGMENT_NAMES, segments, strict=True)):
        # The bases of FS and GS are there for 64-bit code even when the segments are not usable.
        if number not in (CS, FS, GS, TR) and not _is_usable(segment):
            continue
        if number in (FS, GS, LDTR, TR):
            if not is_canonical(segment.base, processor_linear_bits(words)):
                yield f"the base of {name} is not canonical"
        elif segment.base >> _BASE_BITS:
            yield f"the base of {name} has more than 32 bits"
