"""A guest with an enclave page cache: an operating system that executes ENCLS, and its view of memory.

The EPC lies behind the guest's memory, and is mapped in both halves of the linear address space: at :data:`EPC` for the
kernel, at :data:`USER_EPC` as user pages. The structures that leaf functions take lie in the kernel's half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import signing
from emulator_guest import MAPPED, PML4, UPPER, Guest
from signing import NO_TOKEN, PAGE, SIGNER, Page, Signing

from lasskvm.emulator.decode import fetch_instruction
from lasskvm.emulator.execution import execute
from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.mmio import Mmio
from lasskvm.sgx.encls import Encls
from lasskvm.sgx.enumeration import with_epc
from lasskvm.sgx.epc import Epc
from lasskvm.state import CR3, RAX, RBX, RCX, RDX, RFLAGS, RIP, TLB_FLUSH
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.exceptions import GP, PF, PF_P, PF_W
from lasskvm.x86.msr import MSR_IA32_SGXLEPUBKEYHASH0
from lasskvm.x86.paging import PTE_P, PTE_U, PTE_W
from lasskvm.x86.registers import RFLAGS_AC, RFLAGS_ARITHMETIC, RFLAGS_CF, RFLAGS_ZF
from lasskvm.x86.sgx import PF_SGX, EnclsLeaf

SECRET = b"this VM's secret"
ENCLS, ENCLU, ENCLV = "0f01cf", "0f01d7", "0f01c0"
EPC_GPA, EPC_PAGES = 0x1_0000_0000, 24
#: Where the EPC is mapped.
USER_EPC = 0x100000
EPC = UPPER + USER_EPC
#: An address in the kernel's half with nothing there.
UNMAPPED = UPPER + 0x1F0000
NON_CANONICAL = 1 << 62

# The structures
PAGEINFO, SECINFO, SOURCE, SIGSTRUCT, TOKEN, PCMD, OUTSIDE = (
    UPPER + 0x70000 + PAGE * number for number in range(7)
)

#: The enclave of the tests.
BASE, SIZE = 0x7000_0000_0000, 0x10_0000

SECS_FLAGS = 0x000
TCS_CONTENT = bytes(64) + b"\xff\xff\xff\xff\xff\xff\xff\xff" + bytes(PAGE - 72)
GENERAL_PROTECTION = (GP, 0, None)
#: What RFLAGS has after a leaf function, of the arithmetic flags.
NONE, CARRY, ZERO = 0, RFLAGS_CF, RFLAGS_ZF


def epc_fault(address: int, *, is_write: bool = True) -> tuple[int, int, int]:
    """What the manual calls #PF(address)."""
    return PF, PF_P | PF_SGX | (PF_W if is_write else 0), address


@dataclass(frozen=True)
class Left:
    """RAX and the arithmetic flags behind a leaf function."""

    rax: int
    flags: int


class SgxGuest(Guest):
    """A 64-bit kernel with LASS and SMAP on, and SGX."""

    def __init__(self, cpu: str = "max,+sgx", pages: int = EPC_PAGES, secret: bytes = SECRET) -> None:
        super().__init__()
        self.epc = Epc(EPC_GPA, pages * PAGE)
        self.cpuid = CpuidTable(with_epc(parse_cpu(cpu).entries(), self.epc))
        self.ctx.cpuid = self.cpuid
        self.ctx.msrs.use_cpuid(self.cpuid)
        self.encls_unit = Encls(self.epc, secret)
        self.ctx.sgx = self.encls_unit
        self.ctx.mmio = Mmio(self._read_bus, self._write_bus)
        for number in range(pages):
            for address, flags in ((EPC, 0), (USER_EPC, PTE_U)):
                self.map(address + number * PAGE, EPC_GPA + number * PAGE, PTE_W | flags)
        self.unmap(UNMAPPED)
        self.words[TLB_FLUSH] = 0

    def _read_bus(self, gpa: int, size: int) -> int | None:
        return self.epc.read_mmio(gpa, size) if self.epc.contains(gpa) else None

    def _write_bus(self, gpa: int, size: int, value: int) -> bool:
        if not self.epc.contains(gpa):
            return False
        self.epc.write_mmio(gpa, size, value)
        return True

    def map(self, address: int, gpa: int, flags: int) -> None:
        """Map the page at *address* to *gpa*."""
        self.memory.store(self.page_entry(address), 8, gpa | PTE_P | flags)

    # ------------------------------------------------------------------------------------------------------- memory

    def write(self, address: int, data: bytes) -> None:
        """Put *data* at a kernel or user address, unchecked."""
        self.memory.write(address & MAPPED - 1, data)

    def read(self, address: int, size: int) -> bytes:
        """What is at a kernel or user address, unchecked."""
        return self.memory.read(address & MAPPED - 1, size)

    def put_pageinfo(
        self,
        linear_address: int = 0,
        source: int = SOURCE,
        secinfo: int = SECINFO,
        secs: int = 0,
        at: int = PAGEINFO,
    ) -> None:
        """A PAGEINFO; the addresses are those of this module unless given."""
        self.write(at, signing.pageinfo(linear_address, source, secinfo, secs))

    def set_ac(self, on: bool) -> None:
        """STAC or CLAC."""
        self.words[RFLAGS] = self.words[RFLAGS] & ~RFLAGS_AC | (RFLAGS_AC if on else 0)

    # -------------------------------------------------------------------------------------------------------- ENCLS

    def _begin(self, leaf: int, rbx: int, rcx: int, rdx: int, code: str) -> None:
        words = self.words
        words[RAX], words[RBX], words[RCX], words[RDX] = leaf, rbx, rcx, rdx
        self.write_code(bytes.fromhex(code))

    def encls(self, leaf: int, rbx: int = 0, rcx: int = 0, rdx: int = 0, code: str = ENCLS) -> Left:
        """Execute a leaf function, which completes; the arithmetic flags were all set before."""
        words, rip = self.words, self.words[RIP]
        self._begin(leaf, rbx, rcx, rdx, code)
        words[RFLAGS] |= RFLAGS_ARITHMETIC
        execute(self.ctx, fetch_instruction(self.ctx))
        assert words[RIP] == rip + len(code) // 2
        words[RIP] = rip
        return Left(words[RAX], words[RFLAGS] & RFLAGS_ARITHMETIC)

    def done(self, leaf: int, rbx: int = 0, rcx: int = 0, rdx: int = 0) -> None:
        """Execute a leaf function, which must not fault or fail."""
        left = self.encls(leaf, rbx, rcx, rdx)
        has_result = leaf not in (EnclsLeaf.ECREATE, EnclsLeaf.EADD, EnclsLeaf.EEXTEND, EnclsLeaf.EPA)
        assert left == (Left(0, NONE) if has_result else Left(leaf, RFLAGS_ARITHMETIC)), f"{leaf!r}: {left}"

    def fault(
        self, leaf: int, rbx: int = 0, rcx: int = 0, rdx: int = 0, code: str = ENCLS
    ) -> tuple[int, int | None, int | None]:
        """Vector, error code and CR2 of the fault of a leaf function, which must not change anything."""
        self._begin(leaf, rbx, rcx, rdx, code)
        before = self._everything()
        with pytest.raises(GuestFault) as caught:
            execute(self.ctx, fetch_instruction(self.ctx))
        assert self._everything() == before, "a faulting leaf function changed something"
        fault = caught.value
        return fault.vector, fault.error_code, fault.cr2

    def _everything(self) -> tuple[object, ...]:
        """State words, EPC, and memory up to the page tables, whose accessed and dirty bits may change."""
        return self.snapshot(), self.epc_state(), self.memory.read(0, PML4)

    def epc_state(self) -> tuple[dict[str, Any], bytes]:
        """All that is known of the EPC's pages, and what they hold."""
        return self.epc.get_state(), bytes(self.epc.view)

    # ---------------------------------------------------------------------------------------------------- enclaves

    def put_create(
        self, size: int = SIZE, base: int = BASE, attributes: int = signing.MODE64BIT, **fields: int
    ) -> None:
        """The operands of ECREATE."""
        self.write(SOURCE, signing.secs_page(size, base, attributes=attributes, **fields))
        self.write(SECINFO, signing.secinfo(SECS_FLAGS))
        self.put_pageinfo()

    def create(self, size: int = SIZE, base: int = BASE, attributes: int = signing.MODE64BIT) -> int:
        """ECREATE in the first EPC page; gives its address."""
        self.put_create(size, base, attributes)
        self.done(EnclsLeaf.ECREATE, PAGEINFO, EPC)
        return EPC

    def put_add(self, page: Page, secs: int = EPC, base: int = BASE) -> None:
        """The operands of EADD."""
        self.write(SOURCE, page.content)
        self.write(SECINFO, signing.secinfo(page.flags))
        self.put_pageinfo(linear_address=base + page.offset, secs=secs)

    def add(self, number: int, page: Page, secs: int = EPC, base: int = BASE) -> int:
        """EADD as EPC page *number*, and the EEXTENDs if it is measured; gives its address."""
        self.put_add(page, secs, base)
        target = self.page(number)
        self.done(EnclsLeaf.EADD, PAGEINFO, target)
        for start in range(0, PAGE if page.is_measured else 0, signing.CHUNK):
            self.done(EnclsLeaf.EEXTEND, secs, target + start)
        return target

    def build(self, pages: Sequence[Page], attributes: int = signing.MODE64BIT) -> int:
        """ECREATE, and EADD of *pages* from EPC page 1 on; gives the address of the SECS."""
        secs = self.create(attributes=attributes)
        for number, page in enumerate(pages, 1):
            self.add(number, page, secs)
        return secs

    def allow_signer(self, key: signing.Key) -> None:
        """Put the hash of *key* into IA32_SGXLEPUBKEYHASH0 to 3."""
        for number in range(4):
            part = int.from_bytes(key.mrsigner[8 * number : 8 * number + 8], "little")
            self.ctx.msrs.values[MSR_IA32_SGXLEPUBKEYHASH0 + number] = part

    def initialize(self, signed: Signing | bytes, secs: int = EPC, token: bytes = NO_TOKEN) -> Left:
        """EINIT."""
        self.write(SIGSTRUCT, signed if isinstance(signed, bytes) else signed.sigstruct())
        self.write(TOKEN, token)
        return self.encls(EnclsLeaf.EINIT, SIGSTRUCT, secs, TOKEN)

    def initialized(self, pages: Sequence[Page], attributes: int = signing.MODE64BIT) -> int:
        """An enclave of *pages*, built, signed and initialized; gives the address of its SECS."""
        secs = self.build(pages, attributes)
        self.allow_signer(SIGNER)
        signed = Signing(signing.mrenclave(SIZE, 1, pages), SIGNER, attributes=attributes)
        assert self.initialize(signed) == Left(0, NONE)
        return secs

    def version_array(self, number: int) -> int:
        """EPA in EPC page *number*; gives its address."""
        address = self.page(number)
        self.done(EnclsLeaf.EPA, 3, address)
        return address

    @staticmethod
    def page(number: int) -> int:
        """The address of EPC page *number*."""
        return EPC + number * PAGE

    @staticmethod
    def gpa(address: int) -> int:
        """The guest-physical address of an address in the EPC."""
        return EPC_GPA + (address - EPC)

    def use_five_levels(self) -> None:
        """Page tables for CR4.LA57: the usual ones below a table of their own."""
        root = PML4 - PAGE
        for entry in (0, 511):
            self.memory.store(root + 8 * entry, 8, PML4 | PTE_P | PTE_W | PTE_U)
        self.words[CR3] = root
