"""A local APIC on a processor of which there are only the state words, with a clock that moves by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lasskvm.kvm.clock import VirtualClock
from lasskvm.kvm.irqchip.apic_registers import ESR, REGISTER_STEP, SPIV
from lasskvm.kvm.irqchip.lapic import LocalApic
from lasskvm.kvm.irqchip.messages import DeliveryMode, InterruptMessage
from lasskvm.state import APIC_BASE, VcpuState
from lasskvm.x86.msr import APIC_BASE_X2APIC, MSR_IA32_X2APIC_FIRST

SOFTWARE_ENABLED = 0x1FF


class Machine:
    """The local APIC, enabled by software in xAPIC mode, or in x2APIC mode; and what it has told others.

    ``machine[offset]`` is a register, by MMIO or by MSR as the mode wants it.
    """

    def __init__(self, start_ns: int = 0, x2apic: bool = False) -> None:
        self.words = VcpuState().words
        self.clock = VirtualClock(lambda: 0)
        self.clock.skip_to(start_ns)
        self.tsc_offset = 0
        self.events: list[object] = []
        self.ended: list[int] = []
        self.lapic = LocalApic(self.words, self.clock, lambda: self.clock.now() + self.tsc_offset, self)
        self.lapic.has_x2apic = self.lapic.has_tsc_deadline = True
        self.lapic.on_eoi = self.ended.append
        if x2apic:
            self.lapic.write_base(self.words[APIC_BASE] | APIC_BASE_X2APIC)
        self[SPIV] = SOFTWARE_ENABLED
        self.events.clear()

    def __getitem__(self, offset: int) -> int:
        if self.words[APIC_BASE] & APIC_BASE_X2APIC:
            return self.lapic.read_msr(MSR_IA32_X2APIC_FIRST + offset // REGISTER_STEP)
        return self.lapic.read_mmio(self.lapic.base + offset, 4)

    def __setitem__(self, offset: int, value: int) -> None:
        if self.words[APIC_BASE] & APIC_BASE_X2APIC:
            self.lapic.write_msr(MSR_IA32_X2APIC_FIRST + offset // REGISTER_STEP, value)
        else:
            self.lapic.write_mmio(self.lapic.base + offset, 4, value)

    def kick(self) -> None:
        self.events.append("kick")

    def nmi(self) -> None:
        self.events.append("nmi")

    def init(self) -> None:
        self.events.append("init")

    def startup(self, vector: int) -> None:
        self.events.append(("startup", vector))

    def send(self, vector: int, level_triggered: bool = False) -> bool:
        return self.lapic.receive(
            InterruptMessage(vector, DeliveryMode.FIXED, 0, level_triggered=level_triggered)
        )

    def deliver(self) -> list[int]:
        """The vectors that the processor takes while no handler ends its interrupt."""
        vectors = []
        while self.lapic.pending_vector() is not None:
            vectors.append(self.lapic.acknowledge())
        return vectors

    def errors(self) -> int:
        self[ESR] = 0
        return self[ESR]


@pytest.fixture(scope="session")
def new_machine() -> Callable[..., Machine]:
    """Makes machines: ``new_machine(start_ns=0, x2apic=False)``."""
    return Machine


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def lapic(machine: Machine) -> LocalApic:
    return machine.lapic
