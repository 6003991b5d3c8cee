"""The checks of a VM entry on L2's segment registers, part of :mod:`lasskvm.vmx.guest_checks`.

In virtual-8086 mode, selectors prescribe everything about the six segments. In the other modes what a register holds
must be something that a descriptor can say and that loading it would have accepted; an unusable register may hold
anything. Selectors and privilege levels of an unrestricted guest need not fit together, because in real mode, and right
after it, they do not.

A guest is entered many thousand times a second, mostly with segments it was entered with before. So what has been found
about selectors, limits and access rights is remembered; bases, which differ from thread to thread, are looked at apart.

Source: Intel SDM volume 3C, 27.3.1.2 (checks on guest segment registers), table 25-2 (access rights).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple

from lasskvm.state import CR4_ALLOWED, Words
from lasskvm.vmx.guest_mode import (
    is_ia32e_guest,
    is_unrestricted_guest,
    is_virtual_8086_guest,
)
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86.address import is_canonical, linear_bits
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

_NAMES = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
_DATA_SEGMENTS = (ES, DS, FS, GS)
#: Their bases are wanted when the segments are not usable, too: FS and GS for 64-bit code.
_BASES_ALWAYS_USED = (CS, FS, GS, TR)
_BASES_OF_64_BITS = (FS, GS, LDTR, TR)

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

_REMEMBERED = 256

#: One value for each segment register, in the order of their numbers.
_Values = tuple[int, ...]


def _reader(part: str) -> Callable[[Mapping[int, int]], _Values]:
    """What gets the fields of all segment registers that end in *part*."""
    return itemgetter(*(int(VmcsField[f"GUEST_{name}_{part}"]) for name in _NAMES))


_SELECTORS, _BASES, _LIMITS, _RIGHTS = map(_reader, ("SELECTOR", "BASE", "LIMIT", "AR_BYTES"))


def segment_violations(vmcs: Vmcs12, words: Words) -> Iterator[str]:
    """What is wrong with the segment registers (27.3.1.2); *words* says how wide linear addresses are."""
    mode = _Mode(
        is_virtual_8086_guest(vmcs),
        is_ia32e_guest(vmcs),
        is_unrestricted_guest(vmcs),
        vmcs[VmcsField.GUEST_CR0] & CR0_PE != 0,
    )
    selectors, rights = _SELECTORS(vmcs), _RIGHTS(vmcs)
    yield from _descriptor_violations(mode, selectors, _LIMITS(vmcs), rights)
    yield from _base_violations(mode, selectors, _BASES(vmcs), rights, linear_bits(words[CR4_ALLOWED]))


def segment_dpl(rights: int) -> int:
    """The DPL in access rights; that of SS is the CPL of L2, even when SS is unusable."""
    return (rights & AR_DPL) >> AR_DPL_SHIFT


class _Mode(NamedTuple):
    """What the rules depend on."""

    is_virtual_8086: bool
    is_ia32e: bool
    is_unrestricted: bool
    is_protected: bool


class _Register(NamedTuple):
    """A segment register without its base."""

    name: str
    selector: int
    limit: int
    rights: int

    @property
    def is_usable(self) -> bool:
        return not self.rights & AR_UNUSABLE

    @property
    def kind(self) -> int:
        return self.rights & AR_TYPE

    @property
    def dpl(self) -> int:
        return segment_dpl(self.rights)

    @property
    def rpl(self) -> int:
        return self.selector & SELECTOR_RPL


@lru_cache(_REMEMBERED)
def _descriptor_violations(
    mode: _Mode, selectors: _Values, limits: _Values, rights: _Values
) -> tuple[str, ...]:
    registers = [_Register(*values) for values in zip(_NAMES, selectors, limits, rights, strict=True)]
    violations: list[str] = []
    if mode.is_virtual_8086:
        for register in registers[:LDTR]:
            violations += _virtual_8086_violations(register)
    else:
        violations += _code_violations(mode, registers[CS], registers[SS])
        violations += _stack_violations(mode, registers[CS], registers[SS])
        for number in _DATA_SEGMENTS:
            violations += _data_violations(mode, registers[number])
    violations += _task_register_violations(mode, registers[TR])
    violations += _local_table_violations(registers[LDTR])
    return tuple(violations)


def _virtual_8086_violations(register: _Register) -> Iterator[str]:
    if register.limit != _VIRTUAL_8086_LIMIT:
        yield f"the limit of {register.name} is not 64 KiB in virtual-8086 mode"
    if register.rights != _VIRTUAL_8086_RIGHTS:
        yield f"the access rights of {register.name} are not those of virtual-8086 mode"


def _code_violations(mode: _Mode, cs: _Register, ss: _Register) -> Iterator[str]:
    if cs.kind == _TYPE_DATA:
        # What real mode has in CS.
        if not mode.is_unrestricted:
            yield "CS is a data segment, and the guest is not unrestricted"
        if cs.dpl:
            yield "CS is a data segment with another DPL than 0"
    elif cs.kind & _ACCESSED_CODE != _ACCESSED_CODE:
        yield "CS is no accessed code segment"
    elif cs.kind & AR_CONFORMING:
        if cs.dpl > ss.dpl:
            yield "conforming CS is less privileged than SS"
    elif cs.dpl != ss.dpl:
        yield "CS and SS have different privilege levels"
    if mode.is_ia32e and cs.rights & AR_L and cs.rights & AR_DB:
        yield "CS has both L and D"
    yield from _form_violations(cs, AR_S)


def _stack_violations(mode: _Mode, cs: _Register, ss: _Register) -> Iterator[str]:
    if not mode.is_unrestricted:
        if ss.rpl != cs.rpl:
            yield "SS and CS have different RPLs"
        if ss.rpl != ss.dpl:
            yield "SS has another RPL than DPL"
    if ss.dpl and (cs.kind == _TYPE_DATA or not mode.is_protected):
        yield "SS has another DPL than 0 in real mode"
    if ss.is_usable:
        if ss.kind not in _STACK_TYPES:
            yield "SS is no accessed and writable data segment"
        yield from _form_violations(ss, AR_S)


def _data_violations(mode: _Mode, register: _Register) -> Iterator[str]:
    if not register.is_usable:
        return
    if not register.kind & AR_ACCESSED:
        yield f"{register.name} is not accessed"
    if register.kind & AR_CODE and not register.kind & AR_READABLE:
        yield f"{register.name} is a code segment that cannot be read"
    has_privilege = mode.is_unrestricted or register.kind & _CONFORMING_CODE == _CONFORMING_CODE
    if not has_privilege and register.dpl < register.rpl:
        yield f"{register.name} is more privileged than its RPL"
    yield from _form_violations(register, AR_S)


def _task_register_violations(mode: _Mode, tr: _Register) -> Iterator[str]:
    if tr.kind != SYS_TSS_BUSY and (mode.is_ia32e or tr.kind != SYS_TSS16_BUSY):
        yield "TR is no busy TSS of the guest's mode"
    if tr.selector & SELECTOR_TI:
        yield "TR is not in the GDT"
    if not tr.is_usable:
        yield "TR is unusable"
    yield from _form_violations(tr, 0)


def _local_table_violations(ldtr: _Register) -> Iterator[str]:
    if not ldtr.is_usable:
        return
    if ldtr.kind != SYS_LDT:
        yield "LDTR is no LDT"
    if ldtr.selector & SELECTOR_TI:
        yield "LDTR is not in the GDT"
    yield from _form_violations(ldtr, 0)


def _form_violations(register: _Register, s: int) -> Iterator[str]:
    """What no descriptor has, whatever its type; *s* is the S flag that it should have, ``AR_S`` or 0."""
    if register.rights & AR_S != s:
        yield f"{register.name} has the wrong S flag"
    if not register.rights & AR_P:
        yield f"{register.name} is not present"
    if register.rights & _AR_RESERVED:
        yield f"{register.name} has reserved access rights"
    if register.rights & AR_G:
        if register.limit & _PAGE_LIMIT_END != _PAGE_LIMIT_END:
            yield f"{register.name} has a limit in pages that does not end with one"
    elif register.limit >> _BYTE_LIMIT_BITS:
        yield f"{register.name} has a limit in bytes of more than 20 bits"


def _base_violations(
    mode: _Mode, selectors: _Values, bases: _Values, rights: _Values, linear_bits: int
) -> Iterator[str]:
    for number, base in enumerate(bases):
        if mode.is_virtual_8086 and number < LDTR and base != selectors[number] << _VIRTUAL_8086_BASE_SHIFT:
            yield f"the base of {_NAMES[number]} is not its selector times 16 in virtual-8086 mode"
        if rights[number] & AR_UNUSABLE and number not in _BASES_ALWAYS_USED:
            continue
        if number in _BASES_OF_64_BITS:
            if not is_canonical(base, linear_bits):
                yield f"the base of {_NAMES[number]} is not canonical"
        elif base >> _BASE_BITS:
            yield f"the base of {_NAMES[number]} has more than 32 bits"
