"""Operands of leaf functions: from an effective address in DS to bytes, or to a page of the EPC.

All operands of ENCLS come through here, those in registers and those that a PAGEINFO points to. Each is checked in a
processor's order: alignment (#GP), then the limit of DS or, in 64-bit mode, the canonical rule and LASS (#GP), then
paging (#PF), then whether it is in the EPC (#PF with the SGX bit). The checks in between are those of any other data
access of as many bytes, and are made by :mod:`lasskvm.emulator.data_access`. A linear address that is only named, such
as PAGEINFO.LINADDR, is none of this module's business.

Source: Intel SDM volume 3D, 38.1 and the leaf functions in 38.3; volume 3A, 5.7 (page-fault error code); KVM's
``sgx_get_encls_gva()``.
"""

from __future__ import annotations

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import Pieces, load_bytes, load_located, locate, store_located
from lasskvm.emulator.faults import GuestFault, general_protection
from lasskvm.emulator.linearize import linear_address
from lasskvm.emulator.mmu import untagged
from lasskvm.emulator.modes import in_64bit_mode
from lasskvm.lass import WRITE
from lasskvm.sgx.epc import Epc
from lasskvm.state import Words
from lasskvm.x86.exceptions import PF, PF_P, PF_W
from lasskvm.x86.registers import DS, MASK32
from lasskvm.x86.sgx import EPC_PAGE_MASK, EPC_PAGE_SIZE, PF_SGX

__all__ = ["EpcOperand", "MemoryOperand", "UpdatedOperand", "is_aligned", "require_aligned", "source_page"]


def is_aligned(address: int, alignment: int) -> bool:
    """Whether *address* is a multiple of *alignment*, a power of two."""
    return not address & (alignment - 1)


def require_aligned(*operands: MemoryOperand) -> None:
    """#GP(0) as :class:`GuestFault` unless all *operands* are aligned: the first check of every leaf function."""
    for operand in operands:
        if not is_aligned(operand.address, operand.alignment):
            raise general_protection()


class MemoryOperand:
    """*size* bytes at DS:*offset*, which a leaf function reads; they need not be in the EPC.

    ``address`` is the linear address as the program forms it. *alignment*, which is *size* unless given, is not checked
    here, because leaf functions check that of several operands before they look at the first
    (:func:`require_aligned`).
    """

    #: Flags of :mod:`lasskvm.lass` that describe the access.
    access = 0

    def __init__(self, ctx: Emulation, offset: int, size: int, alignment: int = 0) -> None:
        self._ctx = ctx
        # Outside 64-bit mode effective addresses are 32 bits wide, in PAGEINFO, too.
        self._offset = offset if in_64bit_mode(ctx.words) else offset & MASK32
        self.size = size
        self.alignment = alignment or size
        self.address = linear_address(ctx.words, DS, self._offset)

    def load(self) -> bytes:
        """All bytes of the operand. Raises :class:`GuestFault`.

        In the EPC they are all ones, as for every access that is not made by an enclave.
        """
        return load_bytes(self._ctx, DS, self._offset, self.size, self.access)

    def _locate(self) -> Pieces:
        return locate(self._ctx, DS, self._offset, self.size, self.access)


def source_page(ctx: Emulation, offset: int) -> MemoryOperand:
    """PAGEINFO.SRCPGE of a leaf function that copies a page into the EPC."""
    return MemoryOperand(ctx, offset, EPC_PAGE_SIZE)


class UpdatedOperand(MemoryOperand):
    """A memory operand that a leaf function writes, perhaps after it has read it.

    Call :meth:`prepare` first: it makes all checks, so that nothing is left to go wrong when :meth:`store` writes. What
    is written into the EPC is dropped.
    """

    access = WRITE

    def prepare(self) -> None:
        """Check that all bytes of the operand can be written. Raises :class:`GuestFault`."""
        self._pieces = self._locate()

    def load(self) -> bytes:
        """All bytes of the operand, after :meth:`prepare`."""
        return load_located(self._ctx, self._pieces, 0, self.size)

    def store(self, data: bytes, start: int = 0) -> None:
        """Write *data*, *start* bytes into the operand, after :meth:`prepare`."""
        store_located(self._ctx, self._pieces, start, data)


class EpcOperand(MemoryOperand):
    """*size* bytes at DS:*offset* that have to be in the EPC, all in one page.

    After :meth:`resolve`, ``gpa`` is where they are and ``page`` the address of their page. The EPC itself is not
    accessed: that is for leaf functions to do, through :class:`~lasskvm.sgx.epc.Epc`.
    """

    def __init__(
        self,
        ctx: Emulation,
        offset: int,
        size: int = EPC_PAGE_SIZE,
        *,
        is_written: bool = True,
    ) -> None:
        super().__init__(ctx, offset, size)
        self.access = WRITE if is_written else 0
        self.gpa = 0

    @property
    def page(self) -> int:
        """The guest-physical address of the page, which is how :class:`~lasskvm.sgx.epc.Epc` names it."""
        return self.gpa & ~EPC_PAGE_MASK

    def resolve(self, epc: Epc) -> EpcOperand:
        """Find the operand in *epc*, and give it back.

        Raises :class:`GuestFault`; :meth:`fault` when the operand is not there.
        """
        [(gpa, _)] = self._locate()
        if not epc.contains(gpa, self.size):
            raise self.fault()
        self.gpa = gpa
        return self

    def fault(self) -> GuestFault:
        """What the manual writes as #PF(address): a page fault that paging has no part in.

        The error code tells a write apart from a read, and the privilege level, as for other page faults.
        """
        words: Words = self._ctx.words
        error_code = PF_P | (PF_W if self.access & WRITE else 0) | PF_SGX
        return GuestFault(PF, error_code, cr2=untagged(words, self.address, self.access))
