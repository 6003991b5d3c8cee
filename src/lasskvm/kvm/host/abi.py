"""The structures that go through /dev/kvm's ioctls, as the x86-64 kernel lays them out.

Fields have the kernel's names. Structures that end in an array of any length (``kvm_cpuid2``, ``kvm_msrs``) are the
head alone, which is what a request number counts; :func:`with_entries` makes one with entries behind it.
"""

from __future__ import annotations

from ctypes import Structure, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

__all__ = [
    "Address",
    "ClockData",
    "Cpuid2",
    "CpuidEntry2",
    "DebugRegs",
    "DescriptorTable",
    "DirtyLog",
    "EnableCap",
    "Fpu",
    "GuestDebug",
    "Interrupt",
    "IrqLevel",
    "MpState",
    "MsrEntry",
    "MsrFilter",
    "MsrFilterRange",
    "MsrList",
    "Msrs",
    "NestedState",
    "PitConfig",
    "Regs",
    "Segment",
    "SignalMask",
    "SignalMaskHeader",
    "Sregs",
    "Sregs2",
    "Translation",
    "UserspaceMemoryRegion",
    "VcpuEvents",
    "Xcrs",
    "Xsave",
    "with_entries",
]

_NR_INTERRUPTS = 256
_MAX_XCRS = 16
_MAX_FILTER_RANGES = 16
_XSAVE_BYTES = 4096
_SIGSET_BYTES = 8

_Entry = type[Structure] | type[c_uint8] | type[c_uint32]


@cache
def _type_with_entries(head: type[Structure], entry: _Entry, count: int) -> type[Structure]:
    return type(
        f"{head.__name__}With{count}",
        (Structure,),
        {"_anonymous_": ("head",), "_fields_": [("head", head), ("entries", entry * count)]},
    )


def with_entries(head: type[Structure], entry: _Entry, count: int) -> Any:
    """A zeroed *head* with the array ``entries`` of *count* times *entry* behind it; head fields are its own."""
    return _type_with_entries(head, entry, count)()


# ------------------------------------------------------------------------------------------------------ registers


class Regs(Structure):
    """``struct kvm_regs``."""

    _fields_ = [
        (name, c_uint64)
        for name in (
            "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
            "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
        )
    ]  # fmt: skip


class Segment(Structure):
    """``struct kvm_segment``: a descriptor cache with its attributes taken apart."""

    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        *(
            (name, c_uint8)
            for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding")
        ),
    ]


class DescriptorTable(Structure):
    """``struct kvm_dtable``."""

    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


_SYSTEM_REGISTERS = [
    *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
    *((name, DescriptorTable) for name in ("gdt", "idt")),
    *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
]


class Sregs(Structure):
    """``struct kvm_sregs``."""

    _fields_ = [*_SYSTEM_REGISTERS, ("interrupt_bitmap", c_uint64 * (_NR_INTERRUPTS // 64))]


class Sregs2(Structure):
    """``struct kvm_sregs2``."""

    _fields_ = [*_SYSTEM_REGISTERS, ("flags", c_uint64), ("pdptrs", c_uint64 * 4)]


class Fpu(Structure):
    """``struct kvm_fpu``."""

    _fields_ = [
        ("fpr", c_uint8 * 16 * 8),
        ("fcw", c_uint16),
        ("fsw", c_uint16),
        ("ftwx", c_uint8),
        ("pad1", c_uint8),
        ("last_opcode", c_uint16),
        ("last_ip", c_uint64),
        ("last_dp", c_uint64),
        ("xmm", c_uint8 * 16 * 16),
        ("mxcsr", c_uint32),
        ("pad2", c_uint32),
    ]


class Xsave(Structure):
    """``struct kvm_xsave``; ``KVM_GET_XSAVE2`` may write more, see :func:`with_entries`."""

    _fields_ = [("region", c_uint8 * _XSAVE_BYTES)]


class Xcr(Structure):
    """``struct kvm_xcr``."""

    _fields_ = [("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64)]


class Xcrs(Structure):
    """``struct kvm_xcrs``."""

    _fields_ = [
        ("nr_xcrs", c_uint32),
        ("flags", c_uint32),
        ("xcrs", Xcr * _MAX_XCRS),
        ("padding", c_uint64 * 16),
    ]


class DebugRegs(Structure):
    """``struct kvm_debugregs``."""

    _fields_ = [
        ("db", c_uint64 * 4),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
        ("flags", c_uint64),
        ("reserved", c_uint64 * 9),
    ]


class MsrEntry(Structure):
    """``struct kvm_msr_entry``."""

    _fields_ = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


class Msrs(Structure):
    """The head of ``struct kvm_msrs``."""

    _fields_ = [("nmsrs", c_uint32), ("pad", c_uint32)]


class MsrList(Structure):
    """The head of ``struct kvm_msr_list``."""

    _fields_ = [("nmsrs", c_uint32)]


class CpuidEntry2(Structure):
    """``struct kvm_cpuid_entry2``."""

    _fields_ = [
        *((name, c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", c_uint32 * 3),
    ]


class Cpuid2(Structure):
    """The head of ``struct kvm_cpuid2``."""

    _fields_ = [("nent", c_uint32), ("padding", c_uint32)]


# --------------------------------------------------------------------------------------- events, debugging, state


class _Exception(Structure):
    _fields_ = [
        *((name, c_uint8) for name in ("injected", "nr", "has_error_code", "pending")),
        ("error_code", c_uint32),
    ]


class _Interrupt(Structure):
    _fields_ = [(name, c_uint8) for name in ("injected", "nr", "soft", "shadow")]


class _Nmi(Structure):
    _fields_ = [(name, c_uint8) for name in ("injected", "pending", "masked", "pad")]


class _Smi(Structure):
    _fields_ = [(name, c_uint8) for name in ("smm", "pending", "smm_inside_nmi", "latched_init")]


class VcpuEvents(Structure):
    """``struct kvm_vcpu_events``."""

    _fields_ = [
        ("exception", _Exception),
        ("interrupt", _Interrupt),
        ("nmi", _Nmi),
        ("sipi_vector", c_uint32),
        ("flags", c_uint32),
        ("smi", _Smi),
        ("triple_fault_pending", c_uint8),
        ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    ]


class MpState(Structure):
    """``struct kvm_mp_state``."""

    _fields_ = [("mp_state", c_uint32)]


class GuestDebug(Structure):
    """``struct kvm_guest_debug``."""

    _fields_ = [("control", c_uint32), ("pad", c_uint32), ("debugreg", c_uint64 * 8)]


class Translation(Structure):
    """``struct kvm_translation``."""

    _fields_ = [
        ("linear_address", c_uint64),
        ("physical_address", c_uint64),
        ("valid", c_uint8),
        ("writeable", c_uint8),
        ("usermode", c_uint8),
        ("pad", c_uint8 * 5),
    ]


class Interrupt(Structure):
    """``struct kvm_interrupt``."""

    _fields_ = [("irq", c_uint32)]


class NestedState(Structure):
    """The head of ``struct kvm_nested_state``."""

    _fields_ = [("flags", c_uint16), ("format", c_uint16), ("size", c_uint32), ("hdr", c_uint8 * 120)]


class SignalMaskHeader(Structure):
    """The head of ``struct kvm_signal_mask``."""

    _fields_ = [("len", c_uint32)]


class SignalMask(Structure):
    """``struct kvm_signal_mask`` with the kernel's signal set behind it, which follows unaligned."""

    _fields_ = [("len", c_uint32), ("sigset", c_uint8 * _SIGSET_BYTES)]


# -------------------------------------------------------------------------------------------------------------- VM


class UserspaceMemoryRegion(Structure):
    """``struct kvm_userspace_memory_region``."""

    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


class DirtyLog(Structure):
    """``struct kvm_dirty_log``."""

    _fields_ = [("slot", c_uint32), ("padding", c_uint32), ("dirty_bitmap", c_void_p)]


class Address(Structure):
    """The ``__u64`` that ``KVM_SET_IDENTITY_MAP_ADDR`` takes."""

    _fields_ = [("address", c_uint64)]


class IrqLevel(Structure):
    """``struct kvm_irq_level``."""

    _fields_ = [("irq", c_uint32), ("level", c_uint32)]


class PitConfig(Structure):
    """``struct kvm_pit_config``."""

    _fields_ = [("flags", c_uint32), ("pad", c_uint32 * 15)]


class ClockData(Structure):
    """``struct kvm_clock_data``."""

    _fields_ = [
        ("clock", c_uint64),
        ("flags", c_uint32),
        ("pad0", c_uint32),
        ("realtime", c_uint64),
        ("host_tsc", c_uint64),
        ("pad", c_uint32 * 4),
    ]


class EnableCap(Structure):
    """``struct kvm_enable_cap``."""

    _fields_ = [("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64)]


class MsrFilterRange(Structure):
    """``struct kvm_msr_filter_range``."""

    _fields_ = [("flags", c_uint32), ("nmsrs", c_uint32), ("base", c_uint32), ("bitmap", c_void_p)]


class MsrFilter(Structure):
    """``struct kvm_msr_filter``."""

    _fields_ = [("flags", c_uint32), ("ranges", MsrFilterRange * _MAX_FILTER_RANGES)]
