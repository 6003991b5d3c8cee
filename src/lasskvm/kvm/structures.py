"""The structures of the KVM API as dataclasses; field names are the kernel's (``struct kvm_*`` in ``linux/kvm.h``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from lasskvm.state import Segment

__all__ = [
    "DebugRegs",
    "DescriptorTable",
    "Fpu",
    "GuestDebug",
    "MpState",
    "MsrFilterRange",
    "Regs",
    "Segment",
    "Sregs",
    "Sregs2",
    "Translation",
    "VcpuEvents",
]


@dataclass
class Regs:
    """``struct kvm_regs``: the general-purpose registers, RIP and RFLAGS."""

    rax: int = 0
    rcx: int = 0
    rdx: int = 0
    rbx: int = 0
    rsp: int = 0
    rbp: int = 0
    rsi: int = 0
    rdi: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2


@dataclass(frozen=True)
class DescriptorTable:
    """``struct kvm_dtable``: GDTR or IDTR."""

    base: int
    limit: int


@dataclass
class Sregs:
    """``struct kvm_sregs``: segment, descriptor-table and control registers, without the interrupt bitmap."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: DescriptorTable
    idt: DescriptorTable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int


@dataclass
class Sregs2(Sregs):
    """``struct kvm_sregs2``: with the PDPTE registers of PAE paging, which count when ``pdptrs_valid`` is set."""

    pdptrs_valid: bool = False
    pdptrs: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass
class Fpu:
    """``struct kvm_fpu``. ``fpr`` are ST0 to ST7 (80 bits each), ``xmm`` XMM0 to XMM15 (128 bits each)."""

    fpr: list[int] = field(default_factory=lambda: [0] * 8)
    fcw: int = 0x37F
    fsw: int = 0
    #: The abridged tag word: a bit is set for each register in use.
    ftwx: int = 0
    last_opcode: int = 0
    last_ip: int = 0
    last_dp: int = 0
    xmm: list[int] = field(default_factory=lambda: [0] * 16)
    mxcsr: int = 0x1F80


@dataclass
class DebugRegs:
    """``struct kvm_debugregs``."""

    db: tuple[int, int, int, int] = (0, 0, 0, 0)
    dr6: int = 0xFFFF0FF0
    dr7: int = 0x400


@dataclass
class VcpuEvents:
    """``struct kvm_vcpu_events``, flattened. ``None`` vectors mean that nothing of the kind is there.

    *exception* is being delivered (``injected``), *pending_exception* is to be delivered at the next entry.
    """

    exception: int | None = None
    pending_exception: int | None = None
    exception_error_code: int | None = None
    #: CR2 of a pending #PF, or what a pending #DB adds to DR6 (``exception.payload``).
    exception_payload: int | None = None
    interrupt: int | None = None
    interrupt_soft: bool = False
    #: 1 behind MOV SS, 2 behind STI (``KVM_X86_SHADOW_INT_MOV_SS``, ``KVM_X86_SHADOW_INT_STI``).
    interrupt_shadow: int = 0
    nmi_injected: bool = False
    nmi_pending: bool = False
    nmi_masked: bool = False
    sipi_vector: int = 0
    triple_fault_pending: bool = False


class MpState(IntEnum):
    """``KVM_MP_STATE_*``."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4


@dataclass(frozen=True)
class Translation:
    """``struct kvm_translation``: where a linear address is mapped to."""

    physical_address: int
    valid: bool
    writeable: bool = True
    usermode: bool = False


@dataclass
class GuestDebug:
    """``struct kvm_guest_debug``: the VMM's own breakpoints and single-stepping."""

    enable: bool = False
    singlestep: bool = False
    #: Report INT3 of the guest instead of delivering it.
    use_sw_bp: bool = False
    #: DR0 to DR3 and DR7 of the VMM, in force instead of the guest's; None: the guest's own.
    breakpoints: tuple[int, int, int, int] | None = None
    dr7: int = 0x400


@dataclass(frozen=True)
class MsrFilterRange:
    """``struct kvm_msr_filter_range``: a bit of *bitmap* for each of *nmsrs* MSRs from *base*, set to allow."""

    base: int
    nmsrs: int
    bitmap: bytes
    read: bool = True
    write: bool = True
