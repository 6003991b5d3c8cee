"""The devices that belong to a vCPU: its local APIC and its paravirtual clock, with their MSRs and addresses."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from lasskvm.emulator import msr_checks
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.mmio import Mmio
from lasskvm.kvm.iobus import DeviceState
from lasskvm.kvm.irqchip.lapic import ApicEvents, LocalApic
from lasskvm.kvm.paravirt import ParavirtClock, emulate_hypercall
from lasskvm.memory import PAGE_SHIFT
from lasskvm.state import APIC_BASE, Words
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.msr import APIC_BASE_ENABLE, MSR_IA32_APIC_BASE, MSR_IA32_TSC_DEADLINE

if TYPE_CHECKING:
    from lasskvm.kvm.vm import Vm

__all__ = ["VcpuDevices"]

_X2APIC_MSRS = range(0x800, 0x900)


class VcpuDevices:
    """The devices of one vCPU. ``lapic`` is None without an irqchip."""

    def __init__(self, words: Words, vm: Vm, guest_tsc: Callable[[], int], events: ApicEvents) -> None:
        """*events* gets what the local APIC has to say."""
        self._words = words
        self._bus = vm.mmio
        self.lapic = None if vm.irqchip is None else LocalApic(words, vm.clock, guest_tsc, events)
        if vm.irqchip is not None and self.lapic is not None:
            vm.irqchip.connect(self.lapic)
        self.paravirt_clock = ParavirtClock(vm.memory, vm.clock, guest_tsc, CpuidTable(()))

    def use_cpuid(self, cpuid: CpuidTable) -> None:
        """Be the devices of a processor with *cpuid*."""
        self.paravirt_clock.cpuid = cpuid
        if self.lapic is not None:
            self.lapic.has_x2apic = cpuid.has("x2apic")
            self.lapic.has_tsc_deadline = cpuid.has("tsc_deadline_timer")
        self._disable_apic_unless_offered()

    def attach(self, ctx: Emulation) -> None:
        """Answer for MSRs, addresses and hypercalls in *ctx*."""
        msrs = ctx.msrs
        ctx.mmio = Mmio(self._read_mmio, self._write_mmio)
        ctx.hypercall = emulate_hypercall if ctx.cpuid.has("hypervisor") else None
        msrs.tsc_changed = self._tsc_changed
        self.paravirt_clock.attach(msrs)
        lapic = self.lapic
        if lapic is None:
            return
        ctx.task_priority_written = lapic.cr8_written
        msrs.attach(
            MSR_IA32_APIC_BASE,
            lambda: self._words[APIC_BASE],
            lapic.write_base,
            partial(lapic.write_base, host_initiated=True),
        )
        msrs.attach(MSR_IA32_TSC_DEADLINE, lapic.read_tsc_deadline, lapic.write_tsc_deadline)
        for index in _X2APIC_MSRS:
            msrs.attach(index, partial(lapic.read_msr, index), partial(lapic.write_msr, index))

    def _tsc_changed(self) -> None:
        if self.lapic is not None:
            self.lapic.tsc_changed()
        self.paravirt_clock.republish()

    def check_apic_base(self, value: int, ioctl: str) -> None:
        """OSError with EINVAL when IA32_APIC_BASE cannot hold *value*."""
        lapic = self.lapic
        valid = msr_checks.apic_base(self._words, value) if lapic is None else lapic.is_valid_base(value)
        if not valid:
            raise OSError(errno.EINVAL, f"{ioctl}: APIC base {value:#x} has reserved bits")

    def set_apic_base(self, value: int) -> None:
        """Set what :meth:`check_apic_base` has found right. CR8 has been set from without, too."""
        if self.lapic is None:
            self._words[APIC_BASE] = value
        else:
            self.lapic.write_base(value, host_initiated=True)
            self.lapic.cr8_written()

    def reset(self) -> None:
        """Power on."""
        if self.lapic is not None:
            self.lapic.reset()
        self.paravirt_clock.reset()
        self._disable_apic_unless_offered()

    def _disable_apic_unless_offered(self) -> None:
        if not self.paravirt_clock.cpuid.has("apic"):
            self._words[APIC_BASE] &= ~APIC_BASE_ENABLE

    def get_state(self) -> DeviceState:
        """For snapshots."""
        return {
            "lapic": None if self.lapic is None else self.lapic.get_state(),
            "paravirt_clock": self.paravirt_clock.get_state(),
        }

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`."""
        if self.lapic is not None:
            self.lapic.set_state(state["lapic"])
        self.paravirt_clock.set_state(state["paravirt_clock"])

    def _is_lapic(self, gpa: int) -> bool:
        # In other modes than xAPIC nothing is there, which it says itself.
        return (gpa ^ self._words[APIC_BASE]) >> PAGE_SHIFT == 0

    def _read_mmio(self, gpa: int, size: int) -> int | None:
        if self.lapic is not None and self._is_lapic(gpa):
            return self.lapic.read_mmio(gpa, size)
        return self._bus.read(gpa, size)

    def _write_mmio(self, gpa: int, size: int, value: int) -> bool:
        if self.lapic is not None and self._is_lapic(gpa):
            self.lapic.write_mmio(gpa, size, value)
            return True
        return self._bus.write(gpa, size, value)
