"""One vCPU's architectural state.

The state is one flat array of 64-bit words, the software counterpart of a VMCS guest-state area: emulated instructions,
event delivery and exit handlers work on it, direct execution loads it at entry and stores it at exit. The constants of
this module are the word indices. Plain functions take the words as ``state`` and index them (``state[RIP]``); Python
sees integers through a ``memoryview``, compiled code sees the same memory as an array of ``uint64``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lasskvm.x86.registers import (
    AR_CODE,
    AR_LDT,
    AR_REAL_MODE,
    AR_TSS16_BUSY,
    CR0_CD,
    CR0_ET,
    CR0_NW,
    DR6_FIXED,
    DR7_FIXED,
    LDTR,
    RFLAGS_FIXED,
    TR,
)
from lasskvm.x86.registers import CS as SEG_CS

__all__ = ["STATE_WORDS", "Segment", "VcpuState", "Words"]

# General-purpose registers, in the order of their encodings
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 = range(16)
RIP = 16
RFLAGS = 17
#: Current privilege level. Kept beside SS.DPL because SYSRET and null SS make the two differ.
CPL = 18

CR0, CR2, CR3, CR4, CR8 = range(19, 24)
EFER = 24
#: The four PDPTE registers of PAE paging (SDM 4.4.1), loaded when CR3 is.
PDPTR0 = 25
DR0, DR1, DR2, DR3, DR6, DR7 = range(29, 35)
#: Protection-key rights: the PKRU register for user pages, IA32_PKRS for supervisor pages.
PKRU, PKRS = range(35, 37)

#: VMX non-root operation with EPT: the EPT pointer, else 0. Physical addresses of the guest are translated by it.
EPTP = 37
#: What the last EPT violation or misconfiguration was: the guest-physical address, and the outcome of the EPT walk.
EPT_FAULT_GPA, EPT_OUTCOME = range(38, 40)

#: Segment registers ES, CS, SS, DS, FS, GS, LDTR, TR: ``SEGMENTS + SEGMENT_WORDS * number``, then the fields.
SEGMENTS = 40
SEGMENT_WORDS = 4
SELECTOR, BASE, LIMIT, ATTRIBUTES = range(4)
GDT_BASE, GDT_LIMIT, IDT_BASE, IDT_LIMIT = range(72, 76)

# Model-specific registers that instructions use; the rest are kept by lasskvm.emulator.msrs
STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE, TSC_AUX = range(76, 82)
SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP = range(82, 85)
PAT, APIC_BASE, MISC_ENABLE, XCR0 = range(85, 89)

#: 1 while page faults may be VM exits of a nested guest, so that nobody delivers one without asking.
PF_INTERCEPTED = 89
#: 1 for the one instruction behind STI or MOV SS (SDM 7.8.3); MOV SS also holds back #DB.
INTERRUPT_SHADOW = 90
#: 1 from the delivery of an NMI until the next IRET.
NMI_BLOCKED = 91
#: Physical address width (CPUID 80000008H:EAX[7:0]).
MAXPHYADDR = 92
#: 1 asks direct execution to forget its translations at the next entry.
TLB_FLUSH = 93
#: CR4 bits that this guest's CPUID allows.
CR4_ALLOWED = 94
#: EFER bits that this guest's CPUID allows.
EFER_ALLOWED = 95

STATE_WORDS = 96


class Words(Protocol):
    """A flat array of 64-bit words: a ``memoryview`` here, an array of ``uint64`` in compiled code."""

    def __getitem__(self, index: int, /) -> int:
        """Word *index* as an unsigned integer."""
        ...

    def __setitem__(self, index: int, value: int, /) -> None:
        """Set word *index*; *value* is below 2**64."""
        ...


@dataclass(frozen=True)
class Segment:
    """A segment register: *attributes* as in :mod:`lasskvm.x86.registers` (``AR_*``), *limit* in bytes."""

    selector: int
    base: int
    limit: int
    attributes: int


def segment_word(number: int, field: int) -> int:
    """The word index of *field* (``SELECTOR`` ...) of segment register *number* (``x86.registers.CS`` ...)."""
    return SEGMENTS + SEGMENT_WORDS * number + field


class VcpuState:
    """The words of one vCPU, and conveniences for Python callers.

    ``words`` indexes as Python integers; ``array`` is the same memory for NumPy and compiled code.
    """

    def __init__(self) -> None:
        self.array: NDArray[np.uint64] = np.zeros(STATE_WORDS, np.uint64)
        self.words: memoryview[int] = self.array.data.cast("B").cast("Q")
        self.words[MAXPHYADDR] = 46
        self.reset()

    def reset(self) -> None:
        """The state after power-on or INIT: real mode at F000:FFF0 (SDM volume 3A, table 11-1)."""
        words = self.words
        kept = words[MAXPHYADDR], words[CR4_ALLOWED], words[EFER_ALLOWED]
        self.array[:] = 0
        words[MAXPHYADDR], words[CR4_ALLOWED], words[EFER_ALLOWED] = kept
        words[RIP] = 0xFFF0
        words[RDX] = 0x606A6
        words[RFLAGS] = RFLAGS_FIXED
        words[CR0] = CR0_CD | CR0_NW | CR0_ET
        words[DR6], words[DR7] = DR6_FIXED, DR7_FIXED
        for number in range(6):
            self.set_segment(number, Segment(0, 0, 0xFFFF, AR_REAL_MODE))
        self.set_segment(SEG_CS, Segment(0xF000, 0xFFFF0000, 0xFFFF, AR_REAL_MODE | AR_CODE))
        self.set_segment(LDTR, Segment(0, 0, 0xFFFF, AR_LDT))
        self.set_segment(TR, Segment(0, 0, 0xFFFF, AR_TSS16_BUSY))
        words[GDT_LIMIT] = words[IDT_LIMIT] = 0xFFFF
        words[PAT] = 0x0007040600070406
        words[APIC_BASE] = 0xFEE00900
        words[MISC_ENABLE] = 1
        words[XCR0] = 1
        words[TLB_FLUSH] = 1

    def segment(self, number: int) -> Segment:
        """Segment register *number* (``x86.registers.ES`` to ``TR``)."""
        first = segment_word(number, SELECTOR)
        return Segment(*self.words[first : first + SEGMENT_WORDS])

    def set_segment(self, number: int, segment: Segment) -> None:
        """Load segment register *number* as it is, without checks."""
        first = segment_word(number, SELECTOR)
        self.words[first + SELECTOR] = segment.selector
        self.words[first + BASE] = segment.base
        self.words[first + LIMIT] = segment.limit
        self.words[first + ATTRIBUTES] = segment.attributes

    def to_bytes(self) -> bytes:
        """The state in the byte order of the words, for snapshots."""
        return self.array.tobytes()

    def load_bytes(self, data: bytes) -> None:
        """The inverse of :meth:`to_bytes`; raises ValueError when the length is not that of a state."""
        if len(data) != self.array.nbytes:
            raise ValueError(f"a vCPU state has {self.array.nbytes} bytes, not {len(data)}")
        self.array[:] = np.frombuffer(data, np.uint64)
        self.words[TLB_FLUSH] = 1
