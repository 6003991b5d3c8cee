"""The state of a machine's processor and interrupt hardware behind power-on, taken once and set again at each reset.

A reset is more than INIT: every register, MSR and interrupt chip begins anew. KVM has no ioctl for that, so a VMM sets
the state again that it has found behind creation, through the same ioctls that save and restore a machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from lasskvm.kvm import DeviceState, IntrExit, System
from lasskvm.kvm.interface import VcpuInterface, VmInterface
from lasskvm.kvm.structures import DebugRegs, Fpu, MpState, Regs, Sregs2, VcpuEvents
from lasskvm.x86.msr import (
    MSR_IA32_TSC,
    MSR_IA32_TSC_DEADLINE,
    MSR_KVM_MIGRATION_CONTROL,
    MSR_KVM_SYSTEM_TIME,
    MSR_KVM_WALL_CLOCK,
    MSR_KVM_WALL_CLOCK_NEW,
)

__all__ = ["PowerOnState"]

#: MSRs that not every KVM has in its list of those to save: what belongs to the local APIC, and KVM's own.
_FURTHER_MSRS = (
    MSR_IA32_TSC_DEADLINE,
    MSR_KVM_WALL_CLOCK,
    MSR_KVM_SYSTEM_TIME,
    *range(MSR_KVM_WALL_CLOCK_NEW, MSR_KVM_MIGRATION_CONTROL + 1),
)


@dataclass(frozen=True)
class PowerOnState:
    """All that a guest can have changed in its processor, interrupt chips and timer; not memory, not other devices.

    >>> from lasskvm.kvm import Vm
    >>> vm = Vm("emulator")
    >>> vm.create_irqchip()
    >>> vm.create_pit2()
    >>> vcpu = vm.create_vcpu()
    >>> power_on = PowerOnState.capture(vm, vcpu)
    >>> regs = vcpu.get_regs()
    >>> regs.rip = 0x1000
    >>> vcpu.set_regs(regs)
    >>> power_on.restore(vm, vcpu)
    >>> hex(vcpu.get_regs().rip)
    '0xfff0'
    """

    regs: Regs
    sregs: Sregs2
    xcrs: Mapping[int, int]
    fpu: Fpu
    xsave: bytes
    msrs: Mapping[int, int]
    debugregs: DebugRegs
    events: VcpuEvents
    mp_state: MpState
    lapic: bytes
    irqchip: DeviceState
    pit: DeviceState

    @classmethod
    def capture(cls, vm: VmInterface, vcpu: VcpuInterface) -> Self:
        """The state of *vm* and its *vcpu*, which has its CPUID and has not run yet; *vm* has an irqchip and a PIT."""
        # A host has more MSRs, which no guest of this package is offered; its own list lacks the MTRRs.
        indices = {*System().get_msr_index_list(), *_FURTHER_MSRS} - {MSR_IA32_TSC}
        return cls(
            regs=vcpu.get_regs(),
            sregs=vcpu.get_sregs2(),
            xcrs=vcpu.get_xcrs(),
            fpu=vcpu.get_fpu(),
            xsave=vcpu.get_xsave(),
            msrs=_read_msrs(vcpu, sorted(indices)),
            debugregs=vcpu.get_debugregs(),
            events=vcpu.get_vcpu_events(),
            mp_state=vcpu.get_mp_state(),
            lapic=vcpu.get_lapic(),
            irqchip=vm.get_irqchip(),
            pit=vm.get_pit2(),
        )

    def restore(self, vm: VmInterface, vcpu: VcpuInterface) -> None:
        """Put *vm* and *vcpu* back into this state; what the last exit has left open is given up.

        The time-stamp counter restarts at 0, as far as the provider lets it: KVM takes a 0 for a wish to keep
        processors in step, and may count on from the VM's creation. Devices that drive interrupt lines are to be reset
        before: the levels of the lines are part of this state.
        """
        _give_up_instruction(vcpu)
        # What could still interrupt goes first; the local APIC, which collects it, comes behind.
        vm.set_pit2(self.pit)
        vm.set_irqchip(self.irqchip)
        vcpu.set_sregs2(self.sregs)
        vcpu.set_regs(self.regs)
        vcpu.set_xcrs(self.xcrs)
        # The second has MXCSR, and may say of registers no more than that they are as at first.
        vcpu.set_fpu(self.fpu)
        vcpu.set_xsave(self.xsave)
        present = _read_msrs(vcpu, self.msrs)
        _write_msrs(vcpu, {index: value for index, value in self.msrs.items() if present.get(index) != value})
        vcpu.set_debugregs(self.debugregs)
        vcpu.set_vcpu_events(self.events)
        vcpu.set_lapic(self.lapic)
        vcpu.set_mp_state(self.mp_state)
        vcpu.set_msrs({MSR_IA32_TSC: 0})


def _read_msrs(vcpu: VcpuInterface, indices: Iterable[int]) -> dict[int, int]:
    """Those MSRs among *indices* that *vcpu* has."""
    values: dict[int, int] = {}
    rest = list(indices)
    while rest:
        found = vcpu.get_msrs(rest)
        values.update(found)
        # It has stopped at one that does not exist.
        rest = rest[len(found) + 1 :]
    return values


def _write_msrs(vcpu: VcpuInterface, values: Mapping[int, int]) -> None:
    """Set *values*; what cannot be set is nothing that a guest could have changed: counters, constants of the host."""
    rest = list(values.items())
    while rest:
        done = vcpu.set_msrs(dict(rest))
        rest = rest[done + 1 :]


def _give_up_instruction(vcpu: VcpuInterface) -> None:
    """Bring the instruction to an end that the last exit has left open, without answers.

    Otherwise the next run would complete it over other registers. A repeated string instruction ends with the element
    that is due.
    """
    vcpu.immediate_exit = True
    try:
        if isinstance(vcpu.run(), IntrExit):
            return
        regs = vcpu.get_regs()
        regs.rcx = 1
        vcpu.set_regs(regs)
        while not isinstance(vcpu.run(), IntrExit):
            pass
    finally:
        vcpu.immediate_exit = False
