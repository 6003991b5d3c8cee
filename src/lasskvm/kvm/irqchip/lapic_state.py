"""What a local APIC holds, apart from what it does: its registers, and its mode, which IA32_APIC_BASE has.

Source: Intel SDM volume 3A, 11.4 (local APIC), 11.6.2 (destinations), 11.12 (x2APIC); the KVM functions named below.
"""

from __future__ import annotations

from operator import index
from struct import pack_into, unpack_from

from lasskvm.kvm.iobus import DeviceState
from lasskvm.kvm.irqchip import apic_registers as apic
from lasskvm.kvm.irqchip.apic_registers import REGISTERS, STORED_REGISTERS
from lasskvm.kvm.irqchip.lapic_timer import ApicTimer, TimerMode
from lasskvm.kvm.irqchip.lapic_vectors import VECTOR_REGISTERS, VectorQueue
from lasskvm.state import APIC_BASE, Words
from lasskvm.x86.registers import MASK32

__all__ = ["APIC_ID", "ApicState"]

#: The ID of the only processor.
APIC_ID = 0


class ApicState:
    """The registers of a local APIC.

    ``stored`` has those of :data:`STORED_REGISTERS` by their offsets, always with the ID and the halves of the ICR
    where xAPIC mode has them; ``errors`` is what the next write to ESR will show.
    """

    __slots__ = ("_words", "errors", "stored", "timer", "vectors")

    def __init__(self, words: Words, timer: ApicTimer) -> None:
        self._words = words
        self.timer = timer
        self.vectors = VectorQueue(words)
        self.stored = dict.fromkeys(STORED_REGISTERS.values(), 0)
        self.init_reset()

    def init_reset(self) -> None:
        """Everything as INIT leaves it (11.4.7.3); ID, and LDR in x2APIC mode, stay."""
        stored = self.stored
        for offset in stored.keys() - {apic.ID}:
            stored[offset] = 0
        for offset in apic.LVT_REGISTERS:
            stored[offset] = apic.LVT_MASKED
        stored[apic.LVT_LINT0] = apic.LVT_LINT0_RESET
        stored[apic.DFR] = apic.DFR_FLAT
        stored[apic.SPIV] = apic.SPIV_RESET
        if self.mode == apic.MODE_X2APIC:
            stored[apic.LDR] = apic.x2apic_logical_id(APIC_ID)
        self.errors = 0
        self.vectors.reset()
        self.timer.reset()

    @property
    def mode(self) -> int:
        """``MODE_DISABLED``, ``MODE_XAPIC`` or ``MODE_X2APIC`` of :mod:`~lasskvm.kvm.irqchip.apic_registers`."""
        return self._words[APIC_BASE] & apic.MODE_BITS

    def set_base(self, value: int) -> None:
        """Set IA32_APIC_BASE, checked before. Enabling gives the ID back, as KVM's ``__kvm_apic_set_base`` does."""
        before = self.mode
        self._words[APIC_BASE] = value
        if self.mode == before:
            return
        if self.mode != apic.MODE_DISABLED:
            self.stored[apic.ID] = APIC_ID << apic.XAPIC_ID_SHIFT
        if self.mode == apic.MODE_X2APIC:
            self.stored[apic.LDR] = apic.x2apic_logical_id(APIC_ID)
        else:
            for offset in (apic.LDR, apic.ICR2):
                self.stored[offset] &= REGISTERS[offset].bits

    @property
    def enabled(self) -> bool:
        """Enabled both in IA32_APIC_BASE and in the spurious-interrupt vector register (11.4.3, 11.9)."""
        return self.mode != apic.MODE_DISABLED and bool(self.stored[apic.SPIV] & apic.SPIV_ENABLE)

    @property
    def timer_mode(self) -> TimerMode:
        """The mode that the timer's entry in the local vector table asks for."""
        entry = self.stored[apic.LVT_TIMER]
        return TimerMode(entry >> apic.LVT_TIMER_MODE_SHIFT & apic.LVT_TIMER_MODE_MASK)

    def is_destination(self, destination: int, logical: bool) -> bool:
        """Whether a message to *destination* goes to this APIC (11.6.2, 11.12.9).

        KVM: ``kvm_apic_match_physical_addr``, ``kvm_apic_match_logical_addr``.
        """
        x2apic = self.mode == apic.MODE_X2APIC
        if destination == (apic.X2APIC_BROADCAST if x2apic else apic.XAPIC_BROADCAST):
            return True
        if not logical:
            return destination == (APIC_ID if x2apic else self.stored[apic.ID] >> apic.XAPIC_ID_SHIFT)
        own, shift, members = self.stored[apic.LDR], apic.CLUSTER_SHIFT, apic.CLUSTER_MEMBERS
        if x2apic:
            shift, members = apic.X2APIC_CLUSTER_SHIFT, apic.X2APIC_CLUSTER_MEMBERS
        else:
            own >>= apic.XAPIC_ID_SHIFT
            model = self.stored[apic.DFR]
            if model == apic.DFR_FLAT:
                return own & destination != 0
            if model != apic.DFR_CLUSTER:
                return False
        return own >> shift == destination >> shift and own & destination & members != 0

    def read(self, offset: int) -> int:
        """The 32-bit register at *offset*, one that can be read in the present mode. KVM: ``__apic_read``."""
        stored = self.stored.get(offset)
        if stored is not None:
            return APIC_ID if offset == apic.ID and self.mode == apic.MODE_X2APIC else stored
        if offset in VECTOR_REGISTERS:
            return self.vectors.register(offset)
        if offset == apic.VERSION:
            return apic.VERSION_VALUE
        if offset == apic.TPR:
            return self.vectors.tpr
        if offset == apic.PPR:
            return self.vectors.ppr
        if offset == apic.INITIAL_COUNT:
            return self.timer.initial_count
        if offset == apic.CURRENT_COUNT:
            return self.timer.current_count()
        if offset == apic.DIVIDE_CONFIGURATION:
            return self.timer.divide_configuration
        # The arbitration priority, for a bus that is no more.
        return 0

    def get_page(self) -> bytes:
        """The first KiB of the APIC page as xAPIC mode has it. KVM: ``kvm_apic_get_state``."""
        page = bytearray(apic.KVM_LAPIC_STATE_SIZE)
        for offset, register in REGISTERS.items():
            if register.mmio & apic.READ:
                pack_into("<I", page, offset, self.stored.get(offset, self.read(offset)))
        return bytes(page)

    def set_page(self, page: bytes) -> None:
        """The inverse of :meth:`get_page`; ValueError for another length. KVM: ``kvm_apic_set_state``.

        A countdown goes on from the current count. ID and LDR stay in x2APIC mode, where they are fixed.
        """
        if len(page) != apic.KVM_LAPIC_STATE_SIZE:
            raise ValueError(f"local APIC registers are {apic.KVM_LAPIC_STATE_SIZE} bytes, not {len(page)}")
        values = {offset: int(unpack_from("<I", page, offset)[0]) for offset in REGISTERS}
        self._load(values)
        self.errors = 0
        self.vectors.load(values)
        self.vectors.tpr = values[apic.TPR]
        self.timer.set_mode(self.timer_mode)
        self.timer.write_divide_configuration(values[apic.DIVIDE_CONFIGURATION])
        self.timer.restart(values[apic.INITIAL_COUNT], values[apic.CURRENT_COUNT])

    def get_state(self) -> DeviceState:
        """Everything but IA32_APIC_BASE and CR8, which are the processor's."""
        return {
            "registers": {name: self.stored[offset] for name, offset in STORED_REGISTERS.items()},
            "errors": self.errors,
            "vectors": self.vectors.get_state(),
            "timer": self.timer.get_state(),
        }

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`; KeyError, TypeError or ValueError for what is no such state."""
        registers = state["registers"]
        self._load({offset: index(registers[name]) for name, offset in STORED_REGISTERS.items()})
        self.errors = index(state["errors"]) & apic.ESR_BITS
        self.vectors.set_state(state["vectors"])
        self.timer.set_state(state["timer"])

    def _load(self, values: dict[int, int]) -> None:
        """Set the stored registers from *values*, by offset, without what writing them would do."""
        stored = self.stored
        for offset in stored:
            stored[offset] = values[offset] & REGISTERS[offset].bits
        stored[apic.DFR] |= apic.DFR_FIXED
        stored[apic.ESR] = values[apic.ESR] & apic.ESR_BITS
        if self.mode == apic.MODE_X2APIC:
            stored[apic.ID] = APIC_ID << apic.XAPIC_ID_SHIFT
            stored[apic.LDR] = apic.x2apic_logical_id(APIC_ID)
            stored[apic.ICR2] = values[apic.ICR2] & MASK32
