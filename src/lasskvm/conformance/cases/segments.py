"""Segment bases and overrides: it is the linear address that counts, not the offset."""

from __future__ import annotations

from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Expected, completes, gp
from lasskvm.conformance.cases.common import (
    HIGH_SUPERVISOR,
    HIGH_USER,
    LAST_PAGE,
    LOW_SUPERVISOR,
    LOW_USER,
    last_and_first_page,
)
from lasskvm.kvm.structures import Segment
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.msr import MSR_IA32_KERNEL_GS_BASE
from lasskvm.x86.registers import AR_DATA, AR_DPL_SHIFT, MASK32, MASK64, RFLAGS_AC

__all__ = ["CASES"]

_GROUP = "segments"
_R, _W = Effect.READ, Effect.WRITTEN


def _segment(base: int) -> Segment:
    return Segment(layout.USER_SS, base, MASK32, AR_DATA | 3 << AR_DPL_SHIFT)


def _case(
    name: str, words: str, program: str, operand: int, lass: Expected, off: Expected, **more: Any
) -> Case:
    return Case(
        id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, operand=operand,
        mmio=more.pop("mmio", (operand,)), lass=lass, off=off, **more,
    )  # fmt: skip


_BASES = (
    _case(
        "fs-base-low", "an FS base below the split makes a kernel access one of the lower half",
        "access: mov rax, fs:[rbx]", LOW_SUPERVISOR, gp(), completes(_R),
        sregs={"fs": _segment(LOW_SUPERVISOR)}, registers={"rbx": 0},
    ),
    _case(
        "gs-base-low", "a GS base likewise", "access: mov gs:[rbx + 0x10], rax", LOW_SUPERVISOR, gp(),
        completes(_W), sregs={"gs": _segment(LOW_SUPERVISOR - 0x10)}, registers={"rbx": 0},
    ),
    _case(
        "gs-base-low-ac1", "RFLAGS.AC allows it as it allows all supervisor data", "access: mov rax, gs:[rbx]",
        LOW_SUPERVISOR, completes(_R), completes(_R), sregs={"gs": _segment(LOW_SUPERVISOR)}, rflags=RFLAGS_AC,
    ),
    _case(
        "fs-base-high", "an FS base above the split makes a low offset a kernel address",
        "access: mov rax, fs:[rbx]", HIGH_SUPERVISOR, completes(_R), completes(_R),
        sregs={"fs": _segment(HIGH_SUPERVISOR - 0x18)}, registers={"rbx": 0x18},
    ),
    _case(
        "fs-base-high-user", "a user program with an FS base above the split", "access: mov rax, fs:[rbx]",
        HIGH_USER, gp(), completes(_R), cpl=3, sregs={"fs": _segment(HIGH_USER)},
    ),
    _case(
        "gs-base-high-user", "a user program with a GS base above the split", "access: add gs:[rbx], rcx",
        HIGH_USER, gp(), completes(_W), cpl=3, sregs={"gs": _segment(HIGH_USER)}, registers={"rcx": 5},
    ),
    _case(
        "fs-base-low-offset-high", "base below and offset above the split: the sum counts, and it is above",
        "access: mov rax, fs:[rbx]", HIGH_SUPERVISOR, completes(_R), completes(_R),
        sregs={"fs": _segment(0x1000)}, registers={"rbx": HIGH_SUPERVISOR - 0x1000},
    ),
    _case(
        "fs-base-high-offset-negative", "base above the split, the sum below it: a violation",
        "access: mov rax, fs:[rbx]", LOW_SUPERVISOR, gp(), completes(_R),
        sregs={"fs": _segment(HIGH_SUPERVISOR)}, registers={"rbx": (LOW_SUPERVISOR - HIGH_SUPERVISOR) & MASK64},
    ),
    _case(
        "gs-base-high-offset-negative-user", "the same by a user program: allowed",
        "access: mov rax, gs:[rbx]", LOW_USER, completes(_R), completes(_R), cpl=3,
        sregs={"gs": _segment(HIGH_USER)}, registers={"rbx": (LOW_USER - HIGH_USER) & MASK64},
    ),
    _case(
        "fs-base-last-page", "base in the last page, the sum wraps past 2^64: a violation",
        "access: mov rax, fs:[rbx]", 0x10, gp(), completes(_R), setup=last_and_first_page(),
        sregs={"fs": _segment(LAST_PAGE)}, registers={"rbx": PAGE_SIZE + 0x10},
    ),
    _case(
        "swapgs", "behind SWAPGS the other base counts", "swapgs; access: mov rax, gs:[rbx]", LOW_SUPERVISOR,
        gp(gs_base=LOW_SUPERVISOR), completes(_R), sregs={"gs": _segment(HIGH_SUPERVISOR)},
        msrs={MSR_IA32_KERNEL_GS_BASE: LOW_SUPERVISOR},
    ),
    _case(
        "swapgs-back", "behind two SWAPGS the first GS base counts again",
        "swapgs; swapgs; access: mov rax, gs:[rbx]", HIGH_SUPERVISOR, completes(_R), completes(_R),
        sregs={"gs": _segment(HIGH_SUPERVISOR)}, msrs={MSR_IA32_KERNEL_GS_BASE: LOW_SUPERVISOR},
    ),
    _case(
        "ds-base-ignored", "in 64-bit mode a DS base does not count", "access: mov rax, [rbx]", HIGH_SUPERVISOR,
        completes(_R), completes(_R), sregs={"ds": _segment(0x1000)}, registers={"rbx": HIGH_SUPERVISOR},
    ),
    _case(
        "es-base-ignored", "in 64-bit mode an ES base does not count",
        "access: mov rax, es:[rbx]", LOW_SUPERVISOR, gp(), completes(_R),
        sregs={"es": _segment(0x10000)}, registers={"rbx": LOW_SUPERVISOR},
    ),
)  # fmt: skip


def _overrides() -> list[Case]:
    """ES, CS, SS and DS overrides change nothing; FS and GS with a base of 0 neither."""
    found = []
    for segment in ("es", "cs", "ss", "ds", "fs", "gs"):
        program = f"access: mov rax, {segment}:[rbx]"
        found += [
            _case(
                f"{segment}-override-supervisor", f"{segment.upper()} override, supervisor, lower half", program,
                LOW_SUPERVISOR, gp(), completes(_R), registers={"rbx": LOW_SUPERVISOR},
            ),
            _case(
                f"{segment}-override-user", f"{segment.upper()} override, user, upper half", program,
                HIGH_USER, gp(), completes(_R), registers={"rbx": HIGH_USER}, cpl=3,
            ),
        ]  # fmt: skip
    return found


_ADDRESSING = (
    _case(
        "32-bit-address-supervisor", "a 32-bit address size makes any address one of the lower half",
        "access: mov rax, [ebx]", LOW_SUPERVISOR, gp(), completes(_R),
        registers={"rbx": 0xFFFF_8000_0000_0000 | LOW_SUPERVISOR},
    ),
    _case(
        "32-bit-address-user", "user programs may use 32-bit addresses", "access: mov rax, [ebx]", LOW_USER,
        completes(_R), completes(_R), registers={"rbx": 0xFFFF_8000_0000_0000 | LOW_USER}, cpl=3,
    ),
    _case(
        "32-bit-address-fs", "a 64-bit base is added behind the truncation", "access: mov rax, fs:[ebx]",
        HIGH_SUPERVISOR, completes(_R), completes(_R), registers={"rbx": 0xABCD_0000_0000_0008},
        sregs={"fs": _segment(HIGH_SUPERVISOR - 8)},
    ),
    _case(
        "index-wraps", "base and scaled index wrap before they are judged", "access: mov rax, [rbx + rcx * 8]",
        LOW_SUPERVISOR, gp(), completes(_R),
        registers={"rbx": HIGH_SUPERVISOR, "rcx": ((LOW_SUPERVISOR - HIGH_SUPERVISOR) & MASK64) >> 3},
    ),
    _case(
        "moffs-supervisor", "the 64-bit absolute address of MOV RAX", f"access: db 0x48, 0xa1; dq {LOW_SUPERVISOR:#x}",
        LOW_SUPERVISOR, gp(), completes(_R),
    ),
    _case(
        "moffs-user", "the 64-bit absolute address of MOV RAX at CPL 3",
        f"access: db 0x48, 0xa3; dq {HIGH_USER:#x}", HIGH_USER, gp(),
        completes(_W), cpl=3,
    ),
    _case(
        "absolute-32-bit-supervisor", "a sign-extended 32-bit absolute address, positive",
        f"access: mov rax, [{LOW_SUPERVISOR:#x}]", LOW_SUPERVISOR, gp(), completes(_R),
    ),
    _case(
        "absolute-32-bit-user", "a sign-extended 32-bit absolute address, negative: the last page",
        f"access: mov rax, [{LAST_PAGE + 0x800 - (1 << 64)}]", LAST_PAGE + 0x800, gp(), completes(_R), cpl=3,
        setup=last_and_first_page(user=True),
    ),
    _case(
        "rip-relative-supervisor", "RIP-relative data of the kernel",
        "access: mov rax, [rip + data]; jmp end; data: dq 5; end: nop",
        layout.KERNEL_CODE, completes(_R, rax=5), completes(_R, rax=5), mmio=(),
    ),
    _case(
        "rip-relative-user", "RIP-relative data of a user program",
        "access: mov rax, [rip + data]; jmp end; data: dq 5; end: nop", layout.USER_CODE,
        completes(_R, rax=5), completes(_R, rax=5), mmio=(), cpl=3,
    ),
    _case(
        "rip-relative-wraps-up", "RIP-relative from the last page to the first: a violation",
        "access: mov rax, [rip + 0x800]", 0x800, gp(), completes(_R), at=LAST_PAGE + 0x100,
        setup=last_and_first_page(),
    ),
    _case(
        "rip-relative-wraps-down", "RIP-relative from the first page to the last, by a user program: a violation",
        "access: mov rax, [rip + 0xfffffffffffff800]", LAST_PAGE + 0x800, gp(), completes(_R), at=0x100, cpl=3,
        setup=last_and_first_page(user=True),
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_BASES, *_overrides(), *_ADDRESSING)
