"""Between the dataclasses of the KVM API and the kernel's structures, both ways."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from lasskvm.kvm import structures as api
from lasskvm.kvm.host import abi
from lasskvm.x86.cpuid import CpuidEntry
from lasskvm.x86.registers import (
    AR_AVL,
    AR_DB,
    AR_DPL,
    AR_DPL_SHIFT,
    AR_G,
    AR_L,
    AR_P,
    AR_S,
    AR_TYPE,
    AR_UNUSABLE,
)

__all__ = [
    "cpuid_entries",
    "cpuid_structure",
    "debugregs_from",
    "debugregs_to",
    "events_from",
    "events_to",
    "fpu_from",
    "fpu_to",
    "guest_debug_to",
    "regs_from",
    "regs_to",
    "sregs2_from",
    "sregs2_to",
    "sregs_from",
    "sregs_to",
    "xcrs_from",
    "xcrs_to",
]

_REGS = tuple(field.name for field in fields(api.Regs))
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_TABLES = ("gdt", "idt")
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
_SEGMENT_BITS = (
    ("s", AR_S), ("present", AR_P), ("avl", AR_AVL), ("l", AR_L), ("db", AR_DB), ("g", AR_G),
    ("unusable", AR_UNUSABLE),
)  # fmt: skip
_SREGS2_PDPTRS_VALID = 1 << 0

_ST_BYTES, _XMM_BYTES = 10, 16
_FPU_SCALARS = ("fcw", "fsw", "ftwx", "last_opcode", "last_ip", "last_dp", "mxcsr")

# KVM_VCPUEVENT_VALID_*
_VALID_NMI_PENDING = 1 << 0
_VALID_SIPI_VECTOR = 1 << 1
_VALID_SHADOW = 1 << 2
_VALID_PAYLOAD = 1 << 4
_VALID_TRIPLE_FAULT = 1 << 5

# KVM_GUESTDBG_*
_GUESTDBG_ENABLE = 1 << 0
_GUESTDBG_SINGLESTEP = 1 << 1
_GUESTDBG_USE_SW_BP = 1 << 16
_GUESTDBG_USE_HW_BP = 1 << 17
_DR7 = 7


def regs_from(raw: abi.Regs) -> api.Regs:
    """``struct kvm_regs`` as a dataclass."""
    return api.Regs(**{name: getattr(raw, name) for name in _REGS})


def regs_to(regs: api.Regs) -> abi.Regs:
    """A dataclass as ``struct kvm_regs``."""
    return abi.Regs(**vars(regs))


def _segment_from(raw: abi.Segment) -> api.Segment:
    attributes = raw.type & AR_TYPE | raw.dpl << AR_DPL_SHIFT & AR_DPL
    for name, bit in _SEGMENT_BITS:
        if getattr(raw, name):
            attributes |= bit
    return api.Segment(raw.selector, raw.base, raw.limit, attributes)


def _segment_to(segment: api.Segment) -> abi.Segment:
    attributes = segment.attributes
    return abi.Segment(
        base=segment.base,
        limit=segment.limit,
        selector=segment.selector,
        type=attributes & AR_TYPE,
        dpl=(attributes & AR_DPL) >> AR_DPL_SHIFT,
        **{name: int(bool(attributes & bit)) for name, bit in _SEGMENT_BITS},
    )


def _system_registers_from(raw: Any) -> dict[str, Any]:
    return {
        **{name: _segment_from(getattr(raw, name)) for name in _SEGMENTS},
        **{name: _table_from(getattr(raw, name)) for name in _TABLES},
        **{name: getattr(raw, name) for name in _CONTROL},
    }


def _table_from(raw: abi.DescriptorTable) -> api.DescriptorTable:
    return api.DescriptorTable(raw.base, raw.limit)


def _system_registers_to(sregs: api.Sregs) -> dict[str, Any]:
    tables = {name: getattr(sregs, name) for name in _TABLES}
    return {
        **{name: _segment_to(getattr(sregs, name)) for name in _SEGMENTS},
        **{name: abi.DescriptorTable(table.base, table.limit) for name, table in tables.items()},
        **{name: getattr(sregs, name) for name in _CONTROL},
    }


def sregs_from(raw: abi.Sregs) -> api.Sregs:
    """``struct kvm_sregs`` as a dataclass."""
    return api.Sregs(**_system_registers_from(raw))


def sregs_to(sregs: api.Sregs) -> abi.Sregs:
    """A dataclass as ``struct kvm_sregs``; the empty interrupt bitmap queues nothing."""
    return abi.Sregs(**_system_registers_to(sregs))


def sregs2_from(raw: abi.Sregs2) -> api.Sregs2:
    """``struct kvm_sregs2`` as a dataclass."""
    return api.Sregs2(
        **_system_registers_from(raw),
        pdptrs_valid=bool(raw.flags & _SREGS2_PDPTRS_VALID),
        pdptrs=tuple(raw.pdptrs),
    )


def sregs2_to(sregs: api.Sregs2) -> abi.Sregs2:
    """A dataclass as ``struct kvm_sregs2``."""
    return abi.Sregs2(
        **_system_registers_to(sregs),
        flags=_SREGS2_PDPTRS_VALID if sregs.pdptrs_valid else 0,
        pdptrs=tuple(sregs.pdptrs),
    )


def fpu_from(raw: abi.Fpu) -> api.Fpu:
    """``struct kvm_fpu`` as a dataclass."""
    return api.Fpu(
        fpr=[int.from_bytes(bytes(register)[:_ST_BYTES], "little") for register in raw.fpr],
        xmm=[int.from_bytes(bytes(register), "little") for register in raw.xmm],
        **{name: getattr(raw, name) for name in _FPU_SCALARS},
    )


def fpu_to(fpu: api.Fpu) -> abi.Fpu:
    """A dataclass as ``struct kvm_fpu``."""
    raw = abi.Fpu(**{name: getattr(fpu, name) for name in _FPU_SCALARS})
    for index, value in enumerate(fpu.fpr):
        raw.fpr[index][:_ST_BYTES] = value.to_bytes(_ST_BYTES, "little")
    for index, value in enumerate(fpu.xmm):
        raw.xmm[index][:] = value.to_bytes(_XMM_BYTES, "little")
    return raw


def xcrs_from(raw: abi.Xcrs) -> dict[int, int]:
    """``struct kvm_xcrs`` as XCR numbers and values."""
    return {entry.xcr: entry.value for entry in raw.xcrs[: raw.nr_xcrs]}


def xcrs_to(values: Iterable[tuple[int, int]]) -> abi.Xcrs:
    """XCR numbers and values as ``struct kvm_xcrs``."""
    raw = abi.Xcrs()
    for entry, (number, value) in zip(raw.xcrs, values, strict=False):
        entry.xcr, entry.value = number, value
        raw.nr_xcrs += 1
    return raw


def debugregs_from(raw: abi.DebugRegs) -> api.DebugRegs:
    """``struct kvm_debugregs`` as a dataclass."""
    return api.DebugRegs(db=tuple(raw.db), dr6=raw.dr6, dr7=raw.dr7)


def debugregs_to(registers: api.DebugRegs) -> abi.DebugRegs:
    """A dataclass as ``struct kvm_debugregs``."""
    return abi.DebugRegs(db=registers.db, dr6=registers.dr6, dr7=registers.dr7)


def events_from(raw: abi.VcpuEvents) -> api.VcpuEvents:
    """``struct kvm_vcpu_events`` as a dataclass."""
    exception, interrupt, nmi = raw.exception, raw.interrupt, raw.nmi
    some = exception.injected or exception.pending
    return api.VcpuEvents(
        exception=exception.nr if exception.injected else None,
        pending_exception=exception.nr if exception.pending else None,
        exception_error_code=exception.error_code if some and exception.has_error_code else None,
        exception_payload=raw.exception_payload if exception.pending and raw.exception_has_payload else None,
        interrupt=interrupt.nr if interrupt.injected else None,
        interrupt_soft=bool(interrupt.injected and interrupt.soft),
        interrupt_shadow=interrupt.shadow,
        nmi_injected=bool(nmi.injected),
        nmi_pending=bool(nmi.pending),
        nmi_masked=bool(nmi.masked),
        sipi_vector=raw.sipi_vector,
        triple_fault_pending=bool(raw.flags & _VALID_TRIPLE_FAULT and raw.triple_fault_pending),
    )


def events_to(events: api.VcpuEvents, *, irqchip: bool, payload: bool, triple_fault: bool) -> abi.VcpuEvents:
    """A dataclass as ``struct kvm_vcpu_events``.

    *irqchip* says whether the VM has one, *payload* and *triple_fault* whether it has these capabilities: the kernel
    takes no fields that belong to what is not there.
    """
    raw = abi.VcpuEvents(flags=_VALID_NMI_PENDING | _VALID_SHADOW)
    number = events.exception if events.exception is not None else events.pending_exception
    if number is not None:
        raw.exception.nr = number
        raw.exception.injected = events.exception is not None
        raw.exception.pending = events.exception is None
        raw.exception.has_error_code = events.exception_error_code is not None
        raw.exception.error_code = events.exception_error_code or 0
    if payload:
        raw.flags |= _VALID_PAYLOAD
        raw.exception_has_payload = events.exception_payload is not None
        raw.exception_payload = events.exception_payload or 0
    if events.interrupt is not None:
        raw.interrupt.injected, raw.interrupt.nr = 1, events.interrupt
        raw.interrupt.soft = events.interrupt_soft
    raw.interrupt.shadow = events.interrupt_shadow
    raw.nmi.injected, raw.nmi.pending = events.nmi_injected, events.nmi_pending
    raw.nmi.masked = events.nmi_masked
    if irqchip:
        raw.flags |= _VALID_SIPI_VECTOR
        raw.sipi_vector = events.sipi_vector
    if triple_fault:
        raw.flags |= _VALID_TRIPLE_FAULT
        raw.triple_fault_pending = events.triple_fault_pending
    return raw


def guest_debug_to(debug: api.GuestDebug) -> abi.GuestDebug:
    """A dataclass as ``struct kvm_guest_debug``."""
    raw = abi.GuestDebug()
    if not debug.enable:
        return raw
    raw.control = _GUESTDBG_ENABLE
    if debug.singlestep:
        raw.control |= _GUESTDBG_SINGLESTEP
    if debug.use_sw_bp:
        raw.control |= _GUESTDBG_USE_SW_BP
    if debug.breakpoints is not None:
        raw.control |= _GUESTDBG_USE_HW_BP
        raw.debugreg[: len(debug.breakpoints)] = debug.breakpoints
        raw.debugreg[_DR7] = debug.dr7
    return raw


def cpuid_structure(entries: Iterable[CpuidEntry]) -> ctypes.Structure:
    """*entries* as ``struct kvm_cpuid2``."""
    given = tuple(entries)
    raw = abi.with_entries(abi.Cpuid2, abi.CpuidEntry2, len(given))
    raw.nent = len(given)
    for place, entry in zip(raw.entries, given, strict=True):
        for name, value in vars(entry).items():
            setattr(place, name, value)
    structure: ctypes.Structure = raw
    return structure


def cpuid_entries(raw: Any) -> list[CpuidEntry]:
    """The entries of a ``struct kvm_cpuid2``."""
    return [
        CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in raw.entries[: raw.nent]
    ]
