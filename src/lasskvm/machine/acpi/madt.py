"""The MADT: the processor's local APIC, the IOAPIC, and how ISA interrupts reach it.

Source: ACPI specification, "Multiple APIC Description Table (MADT)".
"""

from __future__ import annotations

import struct

from lasskvm.machine.devices.acpi_pm import SCI_IRQ

__all__ = ["MADT_REVISION", "madt"]

#: That of ACPI 4.0.
MADT_REVISION = 3

LOCAL_APIC_ADDRESS = 0xFEE0_0000
IO_APIC_ADDRESS = 0xFEC0_0000
#: The IDs of the only processor, of its local APIC and of the IOAPIC after reset.
PROCESSOR_UID = LOCAL_APIC_ID = IO_APIC_ID = 0
FIRST_GSI = 0
#: The timer's interrupt, and the pin of the IOAPIC that it is wired to.
TIMER_IRQ = 0
TIMER_GSI = 2
ISA_BUS = 0
EVERY_PROCESSOR = 0xFF
LINT1 = 1

#: The machine also has two 8259s, which must be masked when the APICs are used.
FLAG_PC_AT = 1 << 0
LOCAL_APIC_ENABLED = 1 << 0
#: Polarity and trigger mode of an interrupt: those of its bus, or active high and level-triggered.
CONFORMS = 0
ACTIVE_HIGH = 0b01
LEVEL_TRIGGERED = 0b11 << 2

_START = struct.Struct("<II")
#: Structures by type: each begins with the type and its length.
_LOCAL_APIC, _IO_APIC, _OVERRIDE, _LOCAL_NMI = (
    (0, struct.Struct("<BBBBI")),
    (1, struct.Struct("<BBBxII")),
    (2, struct.Struct("<BBBBIH")),
    (4, struct.Struct("<BBBHB")),
)


def madt() -> bytes:
    """The MADT's body."""
    return b"".join(
        (
            _START.pack(LOCAL_APIC_ADDRESS, FLAG_PC_AT),
            _structure(_LOCAL_APIC, PROCESSOR_UID, LOCAL_APIC_ID, LOCAL_APIC_ENABLED),
            _structure(_IO_APIC, IO_APIC_ID, IO_APIC_ADDRESS, FIRST_GSI),
            _structure(_OVERRIDE, ISA_BUS, TIMER_IRQ, TIMER_GSI, CONFORMS),
            _structure(_OVERRIDE, ISA_BUS, SCI_IRQ, SCI_IRQ, ACTIVE_HIGH | LEVEL_TRIGGERED),
            _structure(_LOCAL_NMI, EVERY_PROCESSOR, CONFORMS, LINT1),
        )
    )


def _structure(kind: tuple[int, struct.Struct], *fields: int) -> bytes:
    number, layout = kind
    return layout.pack(number, layout.size, *fields)
