"""Addresses in model-specific registers and segment bases: they must be canonical; LASS does not look at them."""

from __future__ import annotations

from typing import Any

from lasskvm.conformance.case import Case, Expected, completes, gp
from lasskvm.conformance.cases.common import HIGH_USER, LOW_SUPERVISOR
from lasskvm.x86.msr import (
    MSR_IA32_FS_BASE,
    MSR_IA32_GS_BASE,
    MSR_IA32_KERNEL_GS_BASE,
    MSR_IA32_LSTAR,
    MSR_IA32_SYSENTER_EIP,
    MSR_IA32_SYSENTER_ESP,
)
from lasskvm.x86.registers import CR4_FSGSBASE, MASK32

__all__ = ["CASES"]

_GROUP = "msr"
_NOT_CANONICAL = 1 << 47
_REGISTERS = {
    "lstar": (MSR_IA32_LSTAR, "syscall"),
    "fs-base": (MSR_IA32_FS_BASE, "lm"),
    "gs-base": (MSR_IA32_GS_BASE, "lm"),
    "kernel-gs-base": (MSR_IA32_KERNEL_GS_BASE, "lm"),
    "sysenter-eip": (MSR_IA32_SYSENTER_EIP, "sep"),
    "sysenter-esp": (MSR_IA32_SYSENTER_ESP, "sep"),
}
_WRITE_AND_READ = "access: wrmsr; rdmsr; shl rdx, 32; or rax, rdx"


def _write(index: int, value: int, feature: str) -> dict[str, Any]:
    return {
        "registers": {"rcx": index, "rax": value & MASK32, "rdx": value >> 32},
        "needs": frozenset({feature}),
    }


def _case(name: str, words: str, program: str, outcome: Expected, **more: Any) -> Case:
    return Case(
        id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, lass=outcome, off=outcome, **more
    )


def _wrmsr() -> list[Case]:
    found = []
    for name, (index, feature) in _REGISTERS.items():
        found += [
            _case(f"{name}-low", f"WRMSR of an address below the split: {name}", _WRITE_AND_READ,
                  completes(rax=LOW_SUPERVISOR), **_write(index, LOW_SUPERVISOR, feature)),
            _case(f"{name}-high", f"WRMSR of an address above the split: {name}",
                  _WRITE_AND_READ, completes(rax=HIGH_USER),
                  **_write(index, HIGH_USER, feature)),
            _case(f"{name}-not-canonical", f"WRMSR of an address that is not canonical is #GP(0): {name}",
                  _WRITE_AND_READ, gp(),
                  **_write(index, _NOT_CANONICAL, feature)),
        ]  # fmt: skip
    return found


_FSGSBASE = {"cr4": CR4_FSGSBASE, "needs": frozenset({"fsgsbase"})}
_BASES = (
    _case("wrmsr-user", "WRMSR at CPL 3 is #GP(0)", "access: wrmsr", gp(), cpl=3,
          **_write(MSR_IA32_FS_BASE, LOW_SUPERVISOR, "lm")),
    _case("wrfsbase-low", "WRFSBASE of an address below the split", "access: wrfsbase rbx",
          completes(fs_base=LOW_SUPERVISOR), registers={"rbx": LOW_SUPERVISOR}, **_FSGSBASE),
    _case("wrgsbase-user-high", "WRGSBASE by a user program of one above it", "access: wrgsbase rbx",
          completes(gs_base=HIGH_USER), registers={"rbx": HIGH_USER}, cpl=3, **_FSGSBASE),
    _case("wrfsbase-not-canonical", "WRFSBASE of an address in the hole", "access: wrfsbase rbx", gp(),
          registers={"rbx": _NOT_CANONICAL}, **_FSGSBASE),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_wrmsr(), *_BASES)
