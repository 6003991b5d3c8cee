"""The accesses of the demonstration, and what the manual says becomes of each, without LASS and with it.

The programs are written for :mod:`lasskvm.conformance.assembler`; the label ``access`` marks the instruction that
matters. SMAP and SMEP are on. Source: the rule in :mod:`lasskvm.lass`; SDM volume 3A, 4.6 and 4.7 for page faults.
"""

from __future__ import annotations

from dataclasses import dataclass

from lasskvm.conformance.layout import (
    FREE_SELECTOR,
    HIGH_ABSENT,
    HIGH_SUPERVISOR,
    HIGH_USER,
    LDT_DATA,
    LOW_ABSENT,
    LOW_SUPERVISOR,
    LOW_USER,
)
from lasskvm.x86.exceptions import GP, PF, PF_I, PF_P, PF_U, PF_W, SS, vector_name

__all__ = ["CASES", "LOW_GDT_POINTER", "LOW_LDT_SELECTOR", "Case", "Observation"]

#: The label of the instruction that makes the access.
ACCESS = "access"
#: A pseudo-descriptor for LGDT in the lower half.
LOW_GDT_POINTER = LOW_SUPERVISOR + 0x200
#: Where in their pages accesses to data go; what is jumped to is at the start.
DATA = 0x800
#: A GDT entry for an LDT in the lower half.
LOW_LDT_SELECTOR = FREE_SELECTOR
_WRAPPING = (1 << 64) - 4


@dataclass(frozen=True)
class Observation:
    """What became of an access: the exception, or None when the program went on.

    ``rip`` is what the exception reports, as a label of the program or an address; ``cr2`` is None when CR2 was left
    alone.
    """

    vector: int | None = None
    error_code: int = 0
    rip: str | int | None = None
    cr2: int | None = None

    def __str__(self) -> str:
        if self.vector is None:
            return "goes through"
        return (
            f"{vector_name(self.vector)}({self.error_code:#x})"
            if self.error_code
            else f"{vector_name(self.vector)}(0)"
        )


GOES_THROUGH = Observation()


def page_fault(error_code: int, address: int, rip: str | int = ACCESS) -> Observation:
    """#PF at *address*."""
    return Observation(PF, error_code, rip, address)


def violation(rip: str | int = ACCESS, *, stack: bool = False) -> Observation:
    """A LASS violation: no error code but 0, and CR2 stays as it is."""
    return Observation(SS if stack else GP, 0, rip)


@dataclass(frozen=True)
class Case:
    """One access, in words and as a program at privilege level *cpl*."""

    words: str
    cpl: int
    program: str
    without_lass: Observation
    with_lass: Observation


def _user(words: str, program: str, without_lass: Observation, with_lass: Observation) -> Case:
    return Case(f"user mode {words}", 3, program, without_lass, with_lass)


def _kernel(words: str, program: str, without_lass: Observation, with_lass: Observation) -> Case:
    return Case(f"kernel {words}", 0, program, without_lass, with_lass)


_USER_READ, _USER_WRITE, _USER_FETCH = PF_P | PF_U, PF_P | PF_U | PF_W, PF_P | PF_U | PF_I
_KERNEL_DATA = HIGH_SUPERVISOR + DATA

CASES: tuple[Case, ...] = (
    _user(
        "reads kernel memory", f"mov rbx, {_KERNEL_DATA:#x}; access: mov rax, [rbx]",
        page_fault(_USER_READ, _KERNEL_DATA), violation(),
    ),
    _user(
        "reads an upper-half address that is not mapped", f"mov rbx, {HIGH_ABSENT:#x}; access: mov rax, [rbx]",
        page_fault(PF_U, HIGH_ABSENT), violation(),
    ),
    _user(
        "reads a page of its own in the upper half", f"mov rbx, {HIGH_USER + DATA:#x}; access: mov rax, [rbx]",
        GOES_THROUGH, violation(),
    ),
    _user(
        "writes kernel memory", f"mov rbx, {_KERNEL_DATA:#x}; access: mov [rbx], rax",
        page_fault(_USER_WRITE, _KERNEL_DATA), violation(),
    ),
    _user(
        "copies from kernel memory (REP MOVSB)",
        f"mov rsi, {_KERNEL_DATA:#x}; mov rdi, rsp; mov ecx, 8; access: rep movsb",
        page_fault(_USER_READ, _KERNEL_DATA), violation(),
    ),
    _user(
        "jumps into the kernel", f"mov rbx, {HIGH_SUPERVISOR:#x}; access: jmp rbx",
        page_fault(_USER_FETCH, HIGH_SUPERVISOR, HIGH_SUPERVISOR), violation(HIGH_SUPERVISOR),
    ),
    _user(
        "calls into the kernel", f"mov rbx, {HIGH_SUPERVISOR:#x}; access: call rbx",
        page_fault(_USER_FETCH, HIGH_SUPERVISOR, HIGH_SUPERVISOR), violation(HIGH_SUPERVISOR),
    ),
    _user(
        "pushes with RSP in the kernel half", f"mov rsp, {_KERNEL_DATA + 8:#x}; access: push rax",
        page_fault(_USER_WRITE, _KERNEL_DATA), violation(stack=True),
    ),
    _user(
        "reads through RBP in the kernel half", f"mov rbp, {_KERNEL_DATA:#x}; access: mov rax, [rbp]",
        page_fault(_USER_READ, _KERNEL_DATA), violation(stack=True),
    ),
    _user(
        "prefetches kernel memory", f"mov rbx, {_KERNEL_DATA:#x}; access: prefetcht0 [rbx]",
        GOES_THROUGH, GOES_THROUGH,
    ),
    _kernel(
        "reads user memory (AC=0)", f"mov rbx, {LOW_USER + DATA:#x}; access: mov rax, [rbx]",
        page_fault(PF_P, LOW_USER + DATA), violation(),
    ),
    _kernel(
        "reads user memory (AC=1, by STAC)", f"mov rbx, {LOW_USER + DATA:#x}; stac; access: mov rax, [rbx]",
        GOES_THROUGH, GOES_THROUGH,
    ),
    _kernel(
        "reads a lower-half address that is not mapped", f"mov rbx, {LOW_ABSENT:#x}; access: mov rax, [rbx]",
        page_fault(0, LOW_ABSENT), violation(),
    ),
    _kernel(
        "writes a page of its own in the lower half", f"mov rbx, {LOW_SUPERVISOR + DATA:#x}; access: mov [rbx], rax",
        GOES_THROUGH, violation(),
    ),
    _kernel(
        "pushes with RSP in the lower half", f"mov rsp, {LOW_SUPERVISOR + DATA:#x}; access: push rax",
        GOES_THROUGH, violation(stack=True),
    ),
    _kernel(
        "jumps to the lower half (AC=0)", f"mov rbx, {LOW_SUPERVISOR:#x}; access: jmp rbx",
        GOES_THROUGH, violation(LOW_SUPERVISOR),
    ),
    _kernel(
        "jumps to the lower half (AC=1 does not help)", f"mov rbx, {LOW_SUPERVISOR:#x}; stac; access: jmp rbx",
        GOES_THROUGH, violation(LOW_SUPERVISOR),
    ),
    _kernel(
        "uses an LDT in the lower half (AC=1 does not help)",
        f"mov eax, {LOW_LDT_SELECTOR:#x}; lldt ax; mov eax, {LDT_DATA:#x}; stac; access: mov fs, eax",
        GOES_THROUGH, violation(),
    ),
    _kernel(
        "loads GDTR from memory in the lower half", f"mov rbx, {LOW_GDT_POINTER:#x}; access: lgdt [rbx]",
        GOES_THROUGH, violation(),
    ),
    _kernel(
        "flushes a cache line of the lower half", f"mov rbx, {LOW_SUPERVISOR + DATA:#x}; access: clflush [rbx]",
        GOES_THROUGH, violation(),
    ),
    _kernel(
        "invalidates a lower-half translation (INVLPG)", f"mov rbx, {LOW_SUPERVISOR:#x}; access: invlpg [rbx]",
        GOES_THROUGH, GOES_THROUGH,
    ),
    _kernel(
        "reads 8 bytes that wrap from the top to address 0", f"mov rbx, {_WRAPPING:#x}; access: mov rax, [rbx]",
        GOES_THROUGH, violation(),
    ),
    _kernel(
        "reads its own memory", f"mov rbx, {_KERNEL_DATA:#x}; access: mov rax, [rbx]", GOES_THROUGH, GOES_THROUGH,
    ),
)  # fmt: skip
