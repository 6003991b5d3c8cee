"""Interrupt messages: what IOAPIC, MSIs and local APICs send to a local APIC.

Source: Intel SDM volume 3A, 11.6.1 (interrupt command register), 11.11 (message-signalled interrupts).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["DeliveryMode", "InterruptMessage"]


class DeliveryMode(IntEnum):
    """Bits 10:8 of an ICR, an LVT entry, a redirection-table entry or MSI data."""

    FIXED = 0
    LOWEST_PRIORITY = 1
    SMI = 2
    RESERVED = 3
    NMI = 4
    INIT = 5
    #: Of an ICR only; what it is elsewhere is reserved.
    STARTUP = 6
    EXTINT = 7


@dataclass(frozen=True, slots=True)
class InterruptMessage:
    """One message. *destination* is an APIC ID, or with *logical* a set as the receiver's mode has it."""

    vector: int
    mode: DeliveryMode
    destination: int
    logical: bool = False
    level_triggered: bool = False
