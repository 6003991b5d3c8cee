"""What leaf functions of ENCLS are given and what they give back, and the PAGEINFO that several of them take.

Source: Intel SDM volume 3D, 35.10 (PAGEINFO), 35.11 (SECINFO), 38.1.3 (information and error codes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.faults import general_protection
from lasskvm.emulator.modes import in_64bit_mode
from lasskvm.sgx.epc import Epc, EpcmEntry
from lasskvm.sgx.fields import is_zero, u64
from lasskvm.sgx.launch import LaunchControl
from lasskvm.sgx.operands import EpcOperand
from lasskvm.sgx.paging_crypto import PagingCrypto
from lasskvm.x86 import sgx
from lasskvm.x86.registers import MASK32, RFLAGS_CF, RFLAGS_ZF
from lasskvm.x86.sgx import PageType, SgxError

__all__ = ["SUCCESS", "Leaf", "Outcome", "PageInfo", "SgxUnit", "check_secinfo", "register", "secs_entry"]


@dataclass(frozen=True, slots=True)
class SgxUnit:
    """The part of one VM's processor that leaf functions work on."""

    epc: Epc
    launch: LaunchControl
    paging: PagingCrypto


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a leaf function leaves in RAX and the arithmetic flags, of which at most one is set."""

    error: SgxError
    flag: int

    @classmethod
    def failed(cls, error: SgxError) -> Outcome:
        """*error*, reported by ZF: nothing has been done."""
        return cls(error, RFLAGS_ZF)

    @classmethod
    def noted(cls, error: SgxError) -> Outcome:
        """*error*, reported by CF."""
        return cls(error, RFLAGS_CF)


SUCCESS = Outcome(SgxError.SUCCESS, 0)

#: Executes one leaf function: reads its operands, checks them, and does the work when nothing can fault any more.
#: None: RAX and the flags stay as they are. Raises :class:`GuestFault` with nothing changed.
Leaf = Callable[[Emulation, SgxUnit], Outcome | None]


@dataclass(frozen=True, slots=True)
class PageInfo:
    """The fields of a PAGEINFO: a linear address that is only named, and three effective addresses in DS."""

    linear_address: int
    source_page: int
    #: SECINFO, or PCMD.
    secinfo: int
    secs: int

    @classmethod
    def parse(cls, data: bytes) -> PageInfo:
        """The fields of the 32 bytes *data*."""
        return cls(
            u64(data, sgx.PAGEINFO_LINADDR),
            u64(data, sgx.PAGEINFO_SRCPGE),
            u64(data, sgx.PAGEINFO_SECINFO),
            u64(data, sgx.PAGEINFO_SECS),
        )


def register(ctx: Emulation, word: int) -> int:
    """A register operand, a state word: 64 bits in 64-bit mode, else 32."""
    value = ctx.words[word]
    return value if in_64bit_mode(ctx.words) else value & MASK32


def check_secinfo(secinfo: bytes, *allowed: PageType) -> int:
    """The flags of the 64 bytes *secinfo*; #GP(0) for reserved bits, or a page type that is not among *allowed*."""
    flags = u64(secinfo, sgx.SECINFO_FLAGS)
    page_type = (flags & sgx.SECINFO_PAGE_TYPE_MASK) >> sgx.SECINFO_PAGE_TYPE_SHIFT
    if flags & ~sgx.SECINFO_DEFINED or not is_zero(secinfo, sgx.SECINFO_RESERVED) or page_type not in allowed:
        raise general_protection()
    return flags


def secs_entry(epc: Epc, operand: EpcOperand) -> EpcmEntry:
    """The EPCM entry of *operand*, which has been resolved; #PF(address) unless it is a valid SECS page."""
    entry = epc.entry(operand.page)
    if entry is None or entry.page_type != PageType.SECS:
        raise operand.fault()
    return entry
