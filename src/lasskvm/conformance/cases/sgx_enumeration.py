"""What SGX there is: CPUID leaf 12H, IA32_FEATURE_CONTROL, leaf functions, and when ENCLS and ENCLU are undefined."""

from __future__ import annotations

from lasskvm.conformance import enclaves as place
from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Mode, completes, fault, gp
from lasskvm.conformance.cases.sgx_common import CALLS, GROUP, other
from lasskvm.conformance.enclaves import Side
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.exceptions import NM, UD
from lasskvm.x86.msr import (
    FEATURE_CONTROL_LOCK,
    FEATURE_CONTROL_SGX_ENABLE,
    FEATURE_CONTROL_SGX_LAUNCH_CONTROL,
    MSR_IA32_FEATURE_CONTROL,
    MSR_IA32_SGXLEPUBKEYHASH0,
)
from lasskvm.x86.registers import CR0_TS, MASK32
from lasskvm.x86.sgx import EnclsLeaf

__all__ = ["CASES"]

_EPC_SECTION = 1
_EPC_BYTES = place.EPC_PAGES * PAGE_SIZE
_UNDEFINED = fault(UD)
_FREE = Side.HIGH.at(place.FREE)
_LOW_FREE = Side.LOW.at(place.FREE)
_EPA = {"rax": EnclsLeaf.EPA, "rbx": CALLS[EnclsLeaf.EPA].rbx, "rcx": _FREE}


_HASH = {"rcx": MSR_IA32_SGXLEPUBKEYHASH0, "rax": 0x1234}


def _cpuid(name: str, words: str, subleaf: int, **expected: int) -> Case:
    done = completes(None, **expected)
    return other(
        f"cpuid-{name}", words, "access: cpuid", done, done, registers={"rax": 0x12, "rcx": subleaf}, forced=False
    )  # fmt: skip


_ENUMERATED = (
    _cpuid("capabilities", "CPUID.12H.0: SGX1 and no more; no MISCSELECT", 0, rax=1, rbx=0),
    _cpuid("attributes", "CPUID.12H.1: DEBUG, MODE64BIT, PROVISIONKEY and EINITTOKENKEY", 1, rax=0x36, rbx=0),
    _cpuid("epc", "CPUID.12H.2: the EPC", 2, rax=place.EPC_GPA | _EPC_SECTION, rbx=0, rcx=_EPC_BYTES | _EPC_SECTION,
           rdx=0),
    _cpuid("no-more-epc", "CPUID.12H.3: no other EPC section", 3, rax=0),
    other("launch-key-hash", "IA32_SGXLEPUBKEYHASH0 can be written where firmware allows it",
          "access: wrmsr; xor eax, eax; rdmsr", completes(rax=0x1234), registers=_HASH,
          msrs={MSR_IA32_FEATURE_CONTROL: FEATURE_CONTROL_LOCK | FEATURE_CONTROL_SGX_LAUNCH_CONTROL}, forced=False),
    other("launch-key-hash-locked", "IA32_SGXLEPUBKEYHASH0 cannot be written where firmware does not allow it",
          "access: wrmsr", gp(), registers=_HASH, forced=False),
)  # fmt: skip


def _no_leaf(leaf: int, name: str) -> Case:
    return other(
        f"no-leaf-{name}", f"ENCLS with EAX = {leaf:#x}, which is no leaf function of SGX1, is #GP(0)",
        "access: encls", gp(), gp(), registers={**_EPA, "rax": leaf},
    )  # fmt: skip


_LEAVES = (
    *(_no_leaf(leaf, leaf.name.lower()) for leaf in (EnclsLeaf.EAUG, EnclsLeaf.EMODPR, EnclsLeaf.EMODT)),
    _no_leaf(0x10, "10h"),
    _no_leaf(MASK32, "highest"),
    other("leaf-is-eax", "the high half of RAX is no part of the number of the leaf function", "access: encls",
          completes(Effect.REWRITTEN), completes(Effect.REWRITTEN), operand=_FREE,
          registers={**_EPA, "rax": 1 << 32 | EnclsLeaf.EPA}),
)  # fmt: skip

_CONDITIONS = (
    Case(
        id=f"{GROUP}/no-sgx", group=GROUP, words="ENCLS without SGX in CPUID is #UD", program="access: encls",
        registers={**_EPA, "rcx": layout.LOW_SUPERVISOR}, without=frozenset({"sgx"}), lass=_UNDEFINED, off=_UNDEFINED,
    ),
    other("encls-user", "ENCLS at CPL 3 is #UD, whatever its operand", "access: encls", _UNDEFINED, _UNDEFINED, cpl=3,
          registers=_EPA),
    other("encls-disabled", "ENCLS that firmware has not enabled is #GP(0)", "access: encls", gp(), gp(),
          registers=_EPA, msrs={MSR_IA32_FEATURE_CONTROL: FEATURE_CONTROL_LOCK}),
    other("encls-not-locked", "ENCLS with IA32_FEATURE_CONTROL not locked is #GP(0)", "access: encls", gp(), gp(),
          registers=_EPA, msrs={MSR_IA32_FEATURE_CONTROL: FEATURE_CONTROL_SGX_ENABLE}),
    other("encls-no-paging", "ENCLS in protected mode without paging is #GP(0)", "nop; access: encls", gp(), gp(),
          mode=Mode.PROTECTED, registers={**_EPA, "rcx": 0}),
    other("encls-real-mode", "ENCLS in real mode is #UD", "nop; access: encls", _UNDEFINED, _UNDEFINED, mode=Mode.REAL,
          registers={"rax": EnclsLeaf.EPA}),
    other("encls-undefined-first", "ENCLS at CPL 3 with an operand that LASS forbids is #UD", "access: encls",
          _UNDEFINED, _UNDEFINED, cpl=3, registers={**_EPA, "rax": EnclsLeaf.EREMOVE}),
    other("encls-no-leaf-first", "a leaf function that is none is #GP(0), not the page fault of its operand",
          "access: encls", gp(), gp(), registers={**_EPA, "rax": EnclsLeaf.EMODT, "rcx": layout.HIGH_ABSENT}),
    other("enclu-user", "ENCLU has no leaf function outside an enclave: #GP(0)", "access: enclu", gp(), gp(), cpl=3,
          registers={"rax": 0, "rcx": _LOW_FREE}),
    other("enclu-eenter", "EENTER is not offered: #GP(0)", "access: enclu", gp(), gp(), cpl=3,
          registers={"rax": 2, "rbx": layout.HIGH_USER}),
    other("enclu-supervisor", "ENCLU at CPL 0 is #UD", "access: enclu", _UNDEFINED, _UNDEFINED,
          registers={"rax": 2, "rbx": layout.LOW_SUPERVISOR}),
    other("enclu-task-switched", "ENCLU with CR0.TS is #NM", "access: enclu", fault(NM), fault(NM), cpl=3,
          sregs={"cr0": layout.DEFAULT_CR0 | CR0_TS}),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_ENUMERATED, *_LEAVES, *_CONDITIONS)
