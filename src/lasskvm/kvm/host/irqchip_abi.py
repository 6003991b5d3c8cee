"""The structures of the kernel's interrupt chips and timer that go through /dev/kvm's ioctls, on x86-64.

Like those of :mod:`lasskvm.kvm.host.abi`; fields have the kernel's names.
"""

from __future__ import annotations

from ctypes import Structure, Union, c_int64, c_uint8, c_uint16, c_uint32, c_uint64

__all__ = [
    "IoapicState",
    "Irqchip",
    "IrqRouting",
    "IrqRoutingEntry",
    "LapicState",
    "Msi",
    "PicState",
    "PitState2",
]

_CHIP_BYTES = 512
_IOAPIC_PINS = 24
_LAPIC_BYTES = 1024
_PIT_CHANNELS = 3
_ROUTE_WORDS = 8


class PicState(Structure):
    """``struct kvm_pic_state``: one 8259A."""

    _fields_ = [
        (name, c_uint8)
        for name in (
            "last_irr", "irr", "imr", "isr", "priority_add", "irq_base", "read_reg_select", "poll",
            "special_mask", "init_state", "auto_eoi", "rotate_on_auto_eoi", "special_fully_nested_mode",
            "init4", "elcr", "elcr_mask",
        )
    ]  # fmt: skip


class IoapicState(Structure):
    """``struct kvm_ioapic_state``, with the entries of the redirection table as plain numbers."""

    _fields_ = [
        ("base_address", c_uint64),
        *((name, c_uint32) for name in ("ioregsel", "id", "irr", "pad")),
        ("redirtbl", c_uint64 * _IOAPIC_PINS),
    ]


class _Chip(Union):
    _fields_ = [("pic", PicState), ("ioapic", IoapicState), ("dummy", c_uint8 * _CHIP_BYTES)]


class Irqchip(Structure):
    """``struct kvm_irqchip``: the state of the chip with number ``chip_id``."""

    _fields_ = [("chip_id", c_uint32), ("pad", c_uint32), ("chip", _Chip)]


class _PitChannelState(Structure):
    _fields_ = [
        ("count", c_uint32),
        ("latched_count", c_uint16),
        *(
            (name, c_uint8)
            for name in (
                "count_latched", "status_latched", "status", "read_state", "write_state", "write_latch",
                "rw_mode", "mode", "bcd", "gate",
            )
        ),
        ("count_load_time", c_int64),
    ]  # fmt: skip


class PitState2(Structure):
    """``struct kvm_pit_state2``."""

    _fields_ = [
        ("channels", _PitChannelState * _PIT_CHANNELS),
        ("flags", c_uint32),
        ("reserved", c_uint32 * 9),
    ]


class LapicState(Structure):
    """``struct kvm_lapic_state``: the registers as they are in the local APIC's page."""

    _fields_ = [("regs", c_uint8 * _LAPIC_BYTES)]


class _RoutedPin(Structure):
    _fields_ = [("irqchip", c_uint32), ("pin", c_uint32)]


class _RoutedMsi(Structure):
    _fields_ = [(name, c_uint32) for name in ("address_lo", "address_hi", "data", "devid")]


class _RouteTarget(Union):
    _fields_ = [("irqchip", _RoutedPin), ("msi", _RoutedMsi), ("pad", c_uint32 * _ROUTE_WORDS)]


class IrqRoutingEntry(Structure):
    """``struct kvm_irq_routing_entry``; ``type`` says which part of ``u`` counts."""

    _fields_ = [
        *((name, c_uint32) for name in ("gsi", "type", "flags", "pad")),
        ("u", _RouteTarget),
    ]


class IrqRouting(Structure):
    """The head of ``struct kvm_irq_routing``."""

    _fields_ = [("nr", c_uint32), ("flags", c_uint32)]


class Msi(Structure):
    """``struct kvm_msi``."""

    _fields_ = [
        *((name, c_uint32) for name in ("address_lo", "address_hi", "data", "flags", "devid")),
        ("pad", c_uint8 * 12),
    ]
