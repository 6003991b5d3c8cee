"""The local APIC's registers: where they are, which bits software may write, and what the bits mean.

:data:`REGISTERS` describes both ways to reach a register: by MMIO at its offset in the APIC page (xAPIC mode) and by
RDMSR and WRMSR (x2APIC mode), where it is MSR ``MSR_IA32_X2APIC_FIRST + (offset >> 4)``.

Source: Intel SDM volume 3A, table 11-1 (xAPIC addresses), table 11-6 (x2APIC MSRs), and the sections named below.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from lasskvm.kvm.irqchip.messages import DeliveryMode
from lasskvm.x86.msr import APIC_BASE_ENABLE, APIC_BASE_X2APIC
from lasskvm.x86.registers import MASK32

__all__ = [
    "APIC_PAGE_SIZE",
    "LVT_REGISTERS",
    "NO_REGISTER",
    "REGISTERS",
    "REGISTER_STEP",
    "STORED_REGISTERS",
    "Register",
    "Shorthand",
    "delivery_mode",
    "x2apic_logical_id",
]

APIC_PAGE_SIZE = 0x1000
#: ``KVM_GET_LAPIC`` and ``KVM_SET_LAPIC`` carry this much of the page.
KVM_LAPIC_STATE_SIZE = 0x400
#: Registers are this far apart; 32 bits of each step are used.
REGISTER_STEP = 0x10
REGISTER_BYTES = 4

# The modes, as IA32_APIC_BASE encodes them (table 11-5)
MODE_BITS = APIC_BASE_ENABLE | APIC_BASE_X2APIC
MODE_DISABLED = 0
MODE_XAPIC = APIC_BASE_ENABLE
MODE_INVALID = APIC_BASE_X2APIC
MODE_X2APIC = MODE_BITS

# Offsets in the APIC page
ID = 0x20
VERSION = 0x30
TPR = 0x80
APR = 0x90
PPR = 0xA0
EOI = 0xB0
LDR = 0xD0
DFR = 0xE0
SPIV = 0xF0
#: ISR, TMR and IRR are eight registers each, of 32 vectors.
ISR = 0x100
TMR = 0x180
IRR = 0x200
ESR = 0x280
ICR = 0x300
ICR2 = 0x310
LVT_TIMER = 0x320
LVT_THERMAL = 0x330
LVT_PERFORMANCE = 0x340
LVT_LINT0 = 0x350
LVT_LINT1 = 0x360
LVT_ERROR = 0x370
INITIAL_COUNT = 0x380
CURRENT_COUNT = 0x390
DIVIDE_CONFIGURATION = 0x3E0
#: Of x2APIC mode only.
SELF_IPI = 0x3F0

LVT_REGISTERS = (LVT_TIMER, LVT_THERMAL, LVT_PERFORMANCE, LVT_LINT0, LVT_LINT1, LVT_ERROR)

VECTOR_MASK = 0xFF
#: The first vector that an interrupt may have; those below belong to exceptions (11.5.2).
FIRST_VECTOR = 16
VECTORS = 256
VECTORS_PER_REGISTER = 32
#: Bits 7:4 of a vector, TPR or PPR: the priority class (11.8.3).
PRIORITY_CLASS_MASK = 0xF0
PRIORITY_CLASS_SHIFT = 4
SUBCLASS_MASK = 0x0F

#: Version 0x14 with entries 0 to 5 of the local vector table, and no way to suppress the broadcast of EOIs (11.4.8):
#: that is what KVM says beside an IOAPIC of its own (``kvm_apic_set_version``).
VERSION_VALUE = 0x14 | (len(LVT_REGISTERS) - 1) << 16

#: An xAPIC's ID, its logical ID and the destination of its ICR are bits 31:24.
XAPIC_ID_SHIFT = 24
XAPIC_ID_BITS = 0xFF << XAPIC_ID_SHIFT
XAPIC_BROADCAST = 0xFF
X2APIC_BROADCAST = MASK32

#: The model that logical destinations of an xAPIC follow (11.6.2.2): all other bits of DFR read as 1.
DFR_MODEL = 0xF << 28
DFR_FIXED = MASK32 & ~DFR_MODEL
DFR_FLAT = DFR_MODEL | DFR_FIXED
DFR_CLUSTER = DFR_FIXED
CLUSTER_SHIFT = 4
CLUSTER_MEMBERS = 0xF
X2APIC_CLUSTER_SHIFT = 16
X2APIC_CLUSTER_MEMBERS = 0xFFFF
X2APIC_CLUSTER_SIZE_SHIFT = 4

#: Spurious-interrupt vector register (11.9). Focus processor checking has no effect, but reads back as in KVM.
SPIV_ENABLE = 1 << 8
SPIV_FOCUS_DISABLED = 1 << 9
SPIV_RESET = 0xFF

# Error status register (11.5.3)
ESR_SEND_ILLEGAL_VECTOR = 1 << 5
ESR_RECEIVE_ILLEGAL_VECTOR = 1 << 6
ESR_ILLEGAL_REGISTER = 1 << 7
ESR_BITS = ESR_SEND_ILLEGAL_VECTOR | ESR_RECEIVE_ILLEGAL_VECTOR | ESR_ILLEGAL_REGISTER

# Interrupt command register (11.6.1) and, as far as there is the same, the local vector table (11.5.1)
DELIVERY_MODE_SHIFT = 8
DELIVERY_MODE_MASK = 7
DELIVERY_MODE_BITS = DELIVERY_MODE_MASK << DELIVERY_MODE_SHIFT
DELIVERY_PENDING = 1 << 12
ICR_LOGICAL = 1 << 11
ICR_ASSERT = 1 << 14
ICR_LEVEL_TRIGGERED = 1 << 15
ICR_SHORTHAND_SHIFT = 18
ICR_SHORTHAND_MASK = 3
ICR_BITS = (
    VECTOR_MASK
    | DELIVERY_MODE_BITS
    | ICR_LOGICAL
    | ICR_ASSERT
    | ICR_LEVEL_TRIGGERED
    | ICR_SHORTHAND_MASK << ICR_SHORTHAND_SHIFT
)
#: The upper half of an x2APIC's ICR is the destination.
X2APIC_DESTINATION_SHIFT = 32

LVT_POLARITY = 1 << 13
LVT_REMOTE_IRR = 1 << 14
LVT_LEVEL_TRIGGERED = 1 << 15
LVT_MASKED = 1 << 16
LVT_TIMER_MODE_SHIFT = 17
LVT_TIMER_MODE_MASK = 3
LVT_TIMER_PERIODIC = 1 << 17
LVT_TIMER_TSC_DEADLINE = 1 << 18
#: LINT0 behind a reset of the boot processor: the 8259A's wire, open, as firmware would leave it. KVM's quirk
#: ``KVM_X86_QUIRK_LINT0_REENABLED``; the manual has the entry masked.
LVT_LINT0_RESET = DeliveryMode.EXTINT << DELIVERY_MODE_SHIFT

#: Bits 3, 1 and 0 select the divisor of the timer (11.5.4, figure 11-10).
DIVIDE_BITS = 0b1011


# Whether software may read and write a register; without either it is not there. Plain integers, for speed.
ABSENT, READ, WRITE, READ_WRITE = range(4)


class Shorthand(IntEnum):
    """Bits 19:18 of an ICR: destinations that need no ID (11.6.1)."""

    NONE = 0
    SELF = 1
    ALL = 2
    OTHERS = 3


@dataclass(frozen=True, slots=True)
class Register:
    """One register: *mmio* is what xAPIC mode allows, *msr* what x2APIC mode does; ``READ``, ``WRITE`` or both.

    *bits* are those that software can set. In xAPIC mode it may write any other, without effect; in x2APIC mode
    only the *ignored* ones, and a further one is #GP(0) (11.12.1.3).
    """

    mmio: int
    msr: int
    bits: int = MASK32
    ignored: int = 0


_LVT_BITS = VECTOR_MASK | LVT_MASKED
_LVT_LINT_BITS = _LVT_BITS | DELIVERY_MODE_BITS | LVT_POLARITY | LVT_LEVEL_TRIGGERED
_LVT_TIMER_BITS = _LVT_BITS | LVT_TIMER_PERIODIC | LVT_TIMER_TSC_DEADLINE


def _lvt(bits: int, read_only: int = DELIVERY_PENDING) -> Register:
    return Register(READ_WRITE, READ_WRITE, bits, read_only)


#: Every register by its offset.
REGISTERS = {
    ID: Register(READ_WRITE, READ, XAPIC_ID_BITS),
    VERSION: Register(READ, READ),
    TPR: Register(READ_WRITE, READ_WRITE, VECTOR_MASK),
    APR: Register(READ, ABSENT),
    PPR: Register(READ, READ),
    EOI: Register(WRITE, WRITE, 0),
    LDR: Register(READ_WRITE, READ, XAPIC_ID_BITS),
    DFR: Register(READ_WRITE, ABSENT, DFR_MODEL),
    SPIV: Register(READ_WRITE, READ_WRITE, VECTOR_MASK | SPIV_ENABLE | SPIV_FOCUS_DISABLED),
    **{
        first + REGISTER_STEP * number: Register(READ, READ)
        for first in (ISR, TMR, IRR)
        for number in range(VECTORS // VECTORS_PER_REGISTER)
    },
    ESR: Register(READ_WRITE, READ_WRITE, 0),
    # KVM's kvm_x2apic_icr_write: the delivery status is not among the bits that fault.
    ICR: Register(READ_WRITE, READ_WRITE, ICR_BITS, DELIVERY_PENDING),
    ICR2: Register(READ_WRITE, ABSENT, XAPIC_ID_BITS),
    LVT_TIMER: _lvt(_LVT_TIMER_BITS),
    LVT_THERMAL: _lvt(_LVT_BITS | DELIVERY_MODE_BITS),
    LVT_PERFORMANCE: _lvt(_LVT_BITS | DELIVERY_MODE_BITS),
    LVT_LINT0: _lvt(_LVT_LINT_BITS, DELIVERY_PENDING | LVT_REMOTE_IRR),
    LVT_LINT1: _lvt(_LVT_LINT_BITS, DELIVERY_PENDING | LVT_REMOTE_IRR),
    LVT_ERROR: _lvt(_LVT_BITS),
    INITIAL_COUNT: Register(READ_WRITE, READ_WRITE),
    CURRENT_COUNT: Register(READ, READ),
    DIVIDE_CONFIGURATION: Register(READ_WRITE, READ_WRITE, DIVIDE_BITS),
    SELF_IPI: Register(ABSENT, WRITE, VECTOR_MASK),
}
#: What stands for every other offset.
NO_REGISTER = Register(ABSENT, ABSENT)

#: The registers that are nothing but the bits last written, with their names in a saved state.
STORED_REGISTERS = {
    "id": ID,
    "ldr": LDR,
    "dfr": DFR,
    "spiv": SPIV,
    "esr": ESR,
    "icr": ICR,
    "icr2": ICR2,
    "lvt_timer": LVT_TIMER,
    "lvt_thermal": LVT_THERMAL,
    "lvt_performance": LVT_PERFORMANCE,
    "lvt_lint0": LVT_LINT0,
    "lvt_lint1": LVT_LINT1,
    "lvt_error": LVT_ERROR,
}


_DELIVERY_MODES = tuple(DeliveryMode)


def delivery_mode(command: int) -> DeliveryMode:
    """The delivery mode that an ICR or an entry of the local vector table asks for (11.5.1, 11.6.1)."""
    return _DELIVERY_MODES[command >> DELIVERY_MODE_SHIFT & DELIVERY_MODE_MASK]


def x2apic_logical_id(apic_id: int) -> int:
    """The LDR of the x2APIC with *apic_id*: its cluster and its bit in there (SDM volume 3A, 11.12.10.2).

    >>> hex(x2apic_logical_id(0x23))
    '0x20008'
    """
    cluster = apic_id >> X2APIC_CLUSTER_SIZE_SHIFT
    member = apic_id & (1 << X2APIC_CLUSTER_SIZE_SHIFT) - 1
    return cluster << X2APIC_CLUSTER_SHIFT | 1 << member
