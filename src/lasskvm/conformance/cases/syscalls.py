"""SYSCALL, SYSRET, SYSENTER and SYSEXIT across the split: their targets are loaded, the fetches there are judged."""

from __future__ import annotations

from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Expected, Mode, Value, completes, fault, gp
from lasskvm.conformance.cases.common import HIGH_SUPERVISOR
from lasskvm.x86.exceptions import UD
from lasskvm.x86.msr import (
    MSR_IA32_LSTAR,
    MSR_IA32_SFMASK,
    MSR_IA32_STAR,
    MSR_IA32_SYSENTER_CS,
    MSR_IA32_SYSENTER_EIP,
    MSR_IA32_SYSENTER_ESP,
)
from lasskvm.x86.registers import RFLAGS_AC, RFLAGS_FIXED

__all__ = ["CASES"]

_GROUP = "syscalls"
_READ = Effect.READ
_LOW, _HIGH = layout.LOW_SUPERVISOR, layout.HIGH_SUPERVISOR
_USER_LOW, _USER_HIGH = layout.LOW_USER, layout.HIGH_USER
#: SYSRET's base lies 16 below 64-bit user code, which is also what SYSEXIT wants of IA32_SYSENTER_CS.
_STAR = (layout.USER_CS32 << 48) | (layout.KERNEL_CS << 32)
_KERNEL_SYSENTER = layout.KERNEL_CS


def _case(
    name: str, words: str, program: str, target: int, lass: Expected, off: Expected, **more: Any
) -> Case:
    return Case(
        id=f"{_GROUP}/{name}",
        group=_GROUP,
        words=words,
        program=program,
        operand=target,
        lass=lass,
        off=off,
        **more,
    )


def _syscall(target: int, mask: int = 0) -> dict[str, Any]:
    return {
        "cpl": 3,
        "msrs": {MSR_IA32_STAR: _STAR, MSR_IA32_LSTAR: target, MSR_IA32_SFMASK: mask},
        "needs": frozenset({"syscall"}),
    }


_IN_KERNEL: dict[str, Value] = {"cs": layout.KERNEL_CS, "ss": layout.KERNEL_SS, "rcx": "next"}
_SYSCALL = (
    _case(
        "syscall-low", "SYSCALL with a target below the split completes; the kernel's first fetch faults",
        "access: syscall; next: nop", _LOW, gp(_LOW, **_IN_KERNEL), completes(_READ, **_IN_KERNEL), **_syscall(_LOW),
    ),
    _case(
        "syscall-low-ac1", "SYSCALL with a target below the split and AC=1",
        "access: syscall; next: nop", _LOW, gp(_LOW, ac=1, **_IN_KERNEL),
        completes(_READ), rflags=RFLAGS_AC, **_syscall(_LOW),
    ),
    _case(
        "syscall-high", "SYSCALL with a target above the split", "access: syscall; next: nop", _HIGH,
        completes(_READ, rsp=layout.USER_STACK_TOP, **_IN_KERNEL), completes(_READ), **_syscall(_HIGH),
    ),
    _case(
        "syscall-low-user-page", "a target on a user page below the split: violation before SMEP's page fault",
        "access: syscall; next: nop", _USER_LOW, gp(_USER_LOW, **_IN_KERNEL), completes(_READ), smep=False,
        **_syscall(_USER_LOW),
    ),
)  # fmt: skip


def _sysret(target: int) -> dict[str, Any]:
    return {
        "msrs": {MSR_IA32_STAR: _STAR},
        "registers": {"rcx": target, "r11": RFLAGS_FIXED},
        "needs": frozenset({"syscall"}),
    }


_IN_USER: dict[str, int] = {"cs": layout.USER_CS, "ss": layout.USER_SS}
_NOT_CANONICAL = 1 << 47
_SYSRET = (
    _case(
        "sysret-high", "SYSRET to an address above the split completes; the user's first fetch faults",
        "access: sysretq", _USER_HIGH, gp(_USER_HIGH, **_IN_USER), completes(_READ, **_IN_USER), **_sysret(_USER_HIGH),
    ),
    _case(
        "sysret-low", "SYSRET to where user programs are", "access: sysretq", _USER_LOW, completes(_READ, **_IN_USER),
        completes(_READ), **_sysret(_USER_LOW),
    ),
    _case(
        "sysret-32-bit", "SYSRET to a 32-bit program", "access: sysret", _USER_LOW,
        completes(_READ, cs=layout.USER_CS32), completes(_READ), **_sysret(_USER_LOW),
    ),
    _case(
        "sysret-not-canonical", "SYSRET to an address that is not canonical is #GP(0) of its own", "access: sysretq",
        _USER_LOW, gp(cs=layout.KERNEL_CS), gp(cs=layout.KERNEL_CS), **_sysret(_NOT_CANONICAL),
    ),
    _case(
        "sysret-user", "SYSRET at CPL 3 is #GP(0)", "access: sysretq", _USER_LOW, gp(), gp(), cpl=3,
        **_sysret(_USER_LOW),
    ),
)  # fmt: skip


def _sysenter(target: int) -> dict[str, Any]:
    return {
        "cpl": 3,
        "msrs": {
            MSR_IA32_SYSENTER_CS: _KERNEL_SYSENTER,
            MSR_IA32_SYSENTER_EIP: target,
            MSR_IA32_SYSENTER_ESP: layout.RING0_STACK_TOP,
        },
        "needs": frozenset({"sep"}),
    }


#: SYSEXIT to 64-bit code: IA32_SYSENTER_CS plus 32 and plus 40.
_BEHIND_SYSEXIT: dict[str, int] = {"cs": layout.USER_CS, "ss": layout.KERNEL_CS + 40 | 3}


def _sysexit(target: int, stack: int = layout.USER_STACK_TOP) -> dict[str, Any]:
    return {
        "msrs": {MSR_IA32_SYSENTER_CS: layout.KERNEL_CS},
        "registers": {"rdx": target, "rcx": stack},
        "needs": frozenset({"sep"}),
    }


_SYSENTER = (
    _case(
        "sysenter-low", "SYSENTER with a target below the split", "access: sysenter", _LOW,
        gp(_LOW, cs=layout.KERNEL_CS), completes(_READ), **_sysenter(_LOW),
    ),
    _case(
        "sysenter-low-compatibility", "SYSENTER of a 32-bit program with a target below the split",
        "access: sysenter", _LOW,
        gp(_LOW, cs=layout.KERNEL_CS), completes(_READ), mode=Mode.COMPATIBILITY, **_sysenter(_LOW),
    ),
    _case(
        "sysenter-high", "SYSENTER with a target above the split", "access: sysenter", _HIGH,
        completes(_READ, cs=layout.KERNEL_CS, rsp=layout.RING0_STACK_TOP), completes(_READ), **_sysenter(_HIGH),
    ),
    _case(
        "sysenter-low-stack", "a stack pointer below the split is loaded without a check", "access: sysenter",
        _HIGH, completes(_READ, rsp=_LOW), completes(_READ),
        **{**_sysenter(_HIGH), "msrs": {**_sysenter(_HIGH)["msrs"], MSR_IA32_SYSENTER_ESP: _LOW}},
    ),
    _case(
        "sysexit-high", "SYSEXIT to an address above the split", "access: sysexitq", _USER_HIGH,
        gp(_USER_HIGH, **_BEHIND_SYSEXIT), completes(_READ, **_BEHIND_SYSEXIT), **_sysexit(_USER_HIGH),
    ),
    _case(
        "sysexit-low", "SYSEXIT to where user programs are", "access: sysexitq", _USER_LOW,
        completes(_READ, **_BEHIND_SYSEXIT), completes(_READ), **_sysexit(_USER_LOW),
    ),
    _case(
        "sysexit-high-stack", "a user stack pointer above the split is loaded without a check", "access: sysexitq",
        _USER_LOW, completes(_READ, rsp=HIGH_SUPERVISOR), completes(_READ), **_sysexit(_USER_LOW, HIGH_SUPERVISOR),
    ),
)  # fmt: skip

_OTHER = (
    _case(
        "syscall-compatibility", "SYSCALL of a 32-bit program is #UD on Intel processors", "access: syscall", _LOW,
        fault(UD), fault(UD), mode=Mode.COMPATIBILITY, forced=False, **_syscall(_LOW),
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_SYSCALL, *_SYSRET, *_SYSENTER, *_OTHER)
