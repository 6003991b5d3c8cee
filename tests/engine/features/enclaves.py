"""SGX: the enclave page cache and who may launch enclaves. What enclaves are is tested in ``tests/sgx``."""

from __future__ import annotations

from features.probe import Probe, completed, faults, has_no_msr, is_undefined
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import HIGH_SUPERVISOR
from lasskvm.sgx.epc import Epc
from lasskvm.x86.exceptions import GP, UD
from lasskvm.x86.msr import MSR_IA32_SGXLEPUBKEYHASH0, MSR_IA32_SGXLEPUBKEYHASH3
from lasskvm.x86.registers import RFLAGS_CF, RFLAGS_ZF
from lasskvm.x86.sgx import EnclsLeaf, PageType

#: Behind all memory.
EPC_GPA, EPC_BYTES = 0x1_0000_0000, 0x10000
LAUNCH_KEY_MSRS = range(MSR_IA32_SGXLEPUBKEYHASH0, MSR_IA32_SGXLEPUBKEYHASH3 + 1)
NO_LEAF = 0x30


def _give_epc(guest: Guest) -> Epc:
    """An empty EPC, whose first page is mapped for the kernel."""
    epc = guest.vm.epc or guest.vm.create_epc(EPC_GPA, EPC_BYTES)
    epc.reset()
    guest.tables.map(HIGH_SUPERVISOR, EPC_GPA, 0)
    return epc


def _sgx(guest: Guest) -> None:
    _give_epc(guest)
    faults(guest, "encls", GP, 0, rax=NO_LEAF)
    faults(guest, "encls", UD, cpl=3, rax=EnclsLeaf.EREMOVE)
    faults(guest, "enclu", GP, 0, cpl=3)


def _sgx1(guest: Guest) -> None:
    epc = _give_epc(guest)
    completed(guest, "encls", rax=EnclsLeaf.EPA, rbx=PageType.VA, rcx=HIGH_SUPERVISOR)
    entry = epc.entry(EPC_GPA)
    assert entry is not None
    assert entry.page_type == PageType.VA
    found = completed(
        guest, "stc; encls; pushfq; pop rdx", rax=EnclsLeaf.EREMOVE, rcx=HIGH_SUPERVISOR, rflags=RFLAGS_ZF
    )
    assert (found.rax, found.rdx & (RFLAGS_ZF | RFLAGS_CF)) == (0, 0)
    assert epc.entry(EPC_GPA) is None


def _sgx_lc(guest: Guest) -> None:
    for index in LAUNCH_KEY_MSRS:
        found = completed(guest, "wrmsr; xor eax, eax; xor edx, edx; rdmsr", rcx=index, rax=index, rdx=7)
        assert (found.rax, found.rdx) == (index, 7)


PROBES = {
    "sgx": Probe(_sgx, is_undefined("encls")),
    "sgx1": Probe(_sgx1, is_undefined("encls", registers={"rax": EnclsLeaf.EREMOVE})),
    "sgx_lc": Probe(_sgx_lc, has_no_msr(*LAUNCH_KEY_MSRS)),
}
