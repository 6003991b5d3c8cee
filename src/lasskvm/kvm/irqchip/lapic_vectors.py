"""The vectors that a local APIC has been asked for and has in service, and which of them may interrupt what.

A vector's upper four bits are its priority class. The task priority (TPR) and the interrupts in service make the
processor priority (PPR); a request is delivered when its class is above that.

Source: Intel SDM volume 3A, 11.8.3 (priorities) to 11.8.6 (CR8); the KVM functions named below.
"""

from __future__ import annotations

from operator import index

from lasskvm.kvm.iobus import DeviceState
from lasskvm.kvm.irqchip.apic_registers import (
    FIRST_VECTOR,
    IRR,
    ISR,
    PRIORITY_CLASS_MASK,
    PRIORITY_CLASS_SHIFT,
    REGISTER_STEP,
    SUBCLASS_MASK,
    TMR,
    VECTOR_MASK,
    VECTORS,
    VECTORS_PER_REGISTER,
)
from lasskvm.state import CR8, Words
from lasskvm.x86.registers import MASK32

__all__ = ["VECTOR_REGISTERS", "VectorQueue"]

_REGISTERS_PER_BANK = VECTORS // VECTORS_PER_REGISTER
#: The offsets of the eight registers each of ISR, TMR and IRR.
VECTOR_REGISTERS = range(ISR, IRR + REGISTER_STEP * _REGISTERS_PER_BANK, REGISTER_STEP)
_BANK_SIZE = REGISTER_STEP * _REGISTERS_PER_BANK
_LEGAL_VECTORS = (1 << VECTORS) - (1 << FIRST_VECTOR)


class VectorQueue:
    """IRR, ISR and TMR, each as one integer with bit n for vector n, and TPR.

    Bits 7:4 of TPR are at home in the state word ``CR8``.
    """

    __slots__ = ("_words", "in_service", "level_triggered", "requested", "tpr_subclass")

    def __init__(self, words: Words) -> None:
        self._words = words
        self.reset()

    def reset(self) -> None:
        """Nothing requested, nothing in service, task priority 0."""
        self.requested = self.in_service = self.level_triggered = 0
        self.tpr = 0

    @property
    def tpr(self) -> int:
        """The task-priority register, 8 bits."""
        return self._words[CR8] << PRIORITY_CLASS_SHIFT & PRIORITY_CLASS_MASK | self.tpr_subclass

    @tpr.setter
    def tpr(self, value: int) -> None:
        """Set it, CR8 with it."""
        self._words[CR8] = (value & PRIORITY_CLASS_MASK) >> PRIORITY_CLASS_SHIFT
        #: What CR8 does not show of it, bits 3:0.
        self.tpr_subclass = value & SUBCLASS_MASK

    @property
    def ppr(self) -> int:
        """The processor-priority register, 8 bits. KVM: ``__apic_update_ppr``."""
        tpr = self.tpr
        in_service = max(0, self.in_service.bit_length() - 1) & PRIORITY_CLASS_MASK
        return tpr if tpr & PRIORITY_CLASS_MASK >= in_service else in_service

    def request(self, vector: int, level_triggered: bool) -> None:
        """Ask for *vector*, 16 to 255. A second request for one that waits is merged with it (11.8.4)."""
        bit = 1 << vector
        self.requested |= bit
        if level_triggered:
            self.level_triggered |= bit
        else:
            self.level_triggered &= ~bit

    def pending(self) -> int | None:
        """The highest requested vector, if it beats the processor priority. KVM: ``apic_has_interrupt_for_ppr``."""
        if not self.requested:
            return None
        vector = self.requested.bit_length() - 1
        return vector if vector & PRIORITY_CLASS_MASK > self.ppr & PRIORITY_CLASS_MASK else None

    def acknowledge(self, vector: int) -> None:
        """Move a requested vector into service. KVM: ``kvm_apic_ack_interrupt``."""
        bit = 1 << vector
        self.requested &= ~bit
        self.in_service |= bit

    def end(self) -> int | None:
        """End the highest interrupt in service and return its vector; None when there is none (11.8.5)."""
        if not self.in_service:
            return None
        vector = self.in_service.bit_length() - 1
        self.in_service &= ~(1 << vector)
        return vector

    def register(self, offset: int) -> int:
        """The 32 bits of the register at *offset*, one of :data:`VECTOR_REGISTERS`."""
        bank, place = divmod(offset - ISR, _BANK_SIZE)
        bits = (self.in_service, self.level_triggered, self.requested)[bank]
        return bits >> place // REGISTER_STEP * VECTORS_PER_REGISTER & MASK32

    def load(self, registers: dict[int, int]) -> None:
        """Set all registers, given by their offsets. Illegal vectors (0 to 15) are left out."""
        self.in_service, self.level_triggered, self.requested = (
            sum(
                registers[bank + REGISTER_STEP * number] << VECTORS_PER_REGISTER * number
                for number in range(_REGISTERS_PER_BANK)
            )
            & _LEGAL_VECTORS
            for bank in (ISR, TMR, IRR)
        )

    def get_state(self) -> DeviceState:
        """The registers as hexadecimal numbers, and the part of TPR that CR8 does not have."""
        return {
            "irr": f"{self.requested:x}",
            "isr": f"{self.in_service:x}",
            "tmr": f"{self.level_triggered:x}",
            "tpr_subclass": self.tpr_subclass,
        }

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`."""
        self.requested = int(state["irr"], 16) & _LEGAL_VECTORS
        self.in_service = int(state["isr"], 16) & _LEGAL_VECTORS
        self.level_triggered = int(state["tmr"], 16) & _LEGAL_VECTORS
        self.tpr_subclass = index(state["tpr_subclass"]) & VECTOR_MASK & SUBCLASS_MASK
