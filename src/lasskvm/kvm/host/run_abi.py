"""``struct kvm_run`` as the x86-64 kernel lays it out; :mod:`lasskvm.kvm.host.run_page` reads and writes it."""

from __future__ import annotations

from ctypes import Structure, Union, c_uint8, c_uint16, c_uint32, c_uint64

__all__ = ["Run"]


class _Io(Structure):
    _fields_ = [
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    ]


class _DebugExit(Structure):
    _fields_ = [
        ("exception", c_uint32),
        ("pad", c_uint32),
        ("pc", c_uint64),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
    ]


class _Mmio(Structure):
    _fields_ = [("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8)]


class _FailEntry(Structure):
    _fields_ = [("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32)]


class _InternalError(Structure):
    _fields_ = [("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class _EmulationFailure(Structure):
    _fields_ = [
        ("suberror", c_uint32),
        ("ndata", c_uint32),
        ("flags", c_uint64),
        ("insn_size", c_uint8),
        ("insn_bytes", c_uint8 * 15),
    ]


class _SystemEvent(Structure):
    _fields_ = [("type", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class _Msr(Structure):
    _fields_ = [
        ("error", c_uint8),
        ("pad", c_uint8 * 7),
        ("reason", c_uint32),
        ("index", c_uint32),
        ("data", c_uint64),
    ]


class _ExitData(Union):
    _fields_ = [
        ("io", _Io),
        ("debug", _DebugExit),
        ("mmio", _Mmio),
        ("fail_entry", _FailEntry),
        ("internal", _InternalError),
        ("emulation_failure", _EmulationFailure),
        ("system_event", _SystemEvent),
        ("msr", _Msr),
        ("padding", c_uint8 * 256),
    ]


class Run(Structure):
    """``struct kvm_run`` up to what an exit says; the registers behind that are not used here."""

    _anonymous_ = ("exit",)
    _fields_ = [
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("exit", _ExitData),
    ]
