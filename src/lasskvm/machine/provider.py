"""What a PC needs to know of the provider of its VM, beyond the KVM API that both have.

The soft provider has a bus of its own for devices, like those that KVM keeps in the kernel, a clock that the machine
lives by, and a console whose output needs no exit. With /dev/kvm all devices but the interrupt controllers and the
timer are answered from exits, time is the host's, and a run comes back when one of the machine's timers is due.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from lasskvm.errors import MemoryLayoutError
from lasskvm.kvm import Clock, ExecutionEngine, Exit, HltExit, HostClock, IntrExit, MmioBus, PortBus, Vm, host
from lasskvm.kvm.clock import NANOSECONDS_PER_SECOND
from lasskvm.kvm.interface import VcpuInterface, VmInterface
from lasskvm.kvm.providers import Provider
from lasskvm.kvm.structures import MpState
from lasskvm.machine.devices.uart16550 import Uart16550
from lasskvm.sgx.enumeration import with_epc
from lasskvm.sgx.epc import Epc
from lasskvm.x86.cpu_models import CpuModel
from lasskvm.x86.cpuid import FEATURES, LEAF_FEATURES, LEAF_MAX_BASIC, CpuidEntry, CpuidTable
from lasskvm.x86.registers import RFLAGS_IF

__all__ = ["Board", "HostBoard", "SoftBoard", "offered_cpu", "open_board"]

#: How long a run on /dev/kvm may take before the machine looks at its console and its time limit.
_TURN_SECONDS = 0.02
_EAX, _EBX, _ECX, _EDX = range(4)


class Board(Protocol):
    """A VM and what surrounds it on one of the providers."""

    vm: VmInterface
    #: The machine's time.
    clock: Clock
    #: Where devices go that a guest talks to all the time.
    ports: PortBus
    #: The same in memory space.
    mmio: MmioBus

    def create_epc(self, base: int, size: int) -> Epc:
        """An enclave page cache, before the vCPU is made; :class:`MemoryLayoutError` where it cannot be."""

    def create_vcpu(self, cpu: CpuModel) -> VcpuInterface:
        """The vCPU, with the CPUID of *cpu* as far as this provider can give it."""

    def missing_features(self) -> list[str]:
        """The features of the CPU model that this provider has not given to the vCPU."""

    def connect_console(self, uart: Uart16550) -> None:
        """Tell of the console, which is on the bus already."""

    @property
    def at_checkpoint(self) -> bool:
        """Whether the last run ended where saving the machine changes nothing."""

    def run(self) -> Exit:
        """Run the vCPU until it needs the machine."""

    def statistics(self) -> dict[str, int]:
        """What the run so far has cost, by name."""

    def close(self) -> None:
        """Give everything back."""


def open_board(
    provider: Provider,
    exit_ports: PortBus,
    exit_mmio: MmioBus,
    *,
    engine: ExecutionEngine = "jit",
    clock: Clock | None = None,
) -> Board:
    """A board of *provider*.

    *exit_ports* and *exit_mmio* are the buses that the machine answers from exits. *engine* and *clock* are for the
    soft provider only; it has a deterministic clock unless *clock* is given. Raises
    :class:`~lasskvm.errors.HostError` when there is no KVM.
    """
    return HostBoard(exit_ports, exit_mmio) if provider == "host" else SoftBoard(engine, clock)


class SoftBoard:
    """A board around the soft provider."""

    def __init__(self, engine: ExecutionEngine, clock: Clock | None) -> None:
        self._vm = Vm(engine)
        if clock is not None:
            self._vm.set_clock(clock)
        self.vm: VmInterface = self._vm
        self.clock = self._vm.clock
        self.ports, self.mmio = self._vm.ports, self._vm.mmio

    def create_epc(self, base: int, size: int) -> Epc:
        """An EPC on the VM's bus, which :meth:`create_vcpu` then tells the guest of."""
        return self._vm.create_epc(base, size)

    def create_vcpu(self, cpu: CpuModel) -> VcpuInterface:
        """The vCPU; this provider gives every feature that a model can have."""
        self._vcpu = self._vm.create_vcpu()
        entries = cpu.entries()
        self._vcpu.set_cpuid2(entries if self._vm.epc is None else with_epc(entries, self._vm.epc))
        return self._vcpu

    def missing_features(self) -> list[str]:
        """None."""
        return []

    def connect_console(self, uart: Uart16550) -> None:
        """Have output to *uart* collected and handed over without exits."""
        self._vm.transmitter = uart

    @property
    def at_checkpoint(self) -> bool:
        """Whether the last run ended at a checkpoint of the deterministic clock, or the clock is the host's."""
        return self._vcpu.at_checkpoint or isinstance(self.clock, HostClock)

    def run(self) -> Exit:
        """Run the vCPU; it deals with the timers by itself."""
        return self._vcpu.run()

    def statistics(self) -> dict[str, int]:
        """Blocks, guest time, and what direct execution counts."""
        return {
            "executed_blocks": self._vcpu.executed_blocks,
            "guest_nanoseconds": self.clock.now(),
            **self._vcpu.counters(),
        }

    def close(self) -> None:
        """Nothing: the memory goes with its last reference."""


class HostBoard:
    """A board around /dev/kvm."""

    def __init__(self, exit_ports: PortBus, exit_mmio: MmioBus) -> None:
        with host.System() as system:
            self._supported = system.get_supported_cpuid()
            self._vm = system.create_vm()
        self.vm: VmInterface = self._vm
        self.clock: Clock = HostClock()
        self.ports, self.mmio = exit_ports, exit_mmio
        self._missing: list[str] = []
        self._exits = 0

    def create_epc(self, base: int, size: int) -> Epc:
        """Never: :class:`MemoryLayoutError`."""
        raise MemoryLayoutError(
            "enclaves on /dev/kvm are not supported; use --backend soft, or leave --epc out"
        )

    def create_vcpu(self, cpu: CpuModel) -> VcpuInterface:
        """The vCPU, with what this host's processor and KVM have of *cpu*."""
        self._vcpu = self._vm.create_vcpu()
        offered = offered_cpu(cpu, self._supported, self._vcpu.get_tsc_khz())
        self._missing = sorted(cpu.features - offered.features)
        self._vcpu.set_cpuid2(offered.entries())
        return self._vcpu

    def missing_features(self) -> list[str]:
        """What this host lacks, by name."""
        return self._missing

    def connect_console(self, uart: Uart16550) -> None:
        """Nothing: the kernel reports each byte."""

    @property
    def at_checkpoint(self) -> bool:
        """Never: these machines are not saved."""
        return False

    def run(self) -> Exit:
        """Run due timers, then the vCPU, until the next of them at the latest."""
        self.clock.run_due()
        self._exits += 1
        vm_exit = self._vcpu.run(self._turn())
        if isinstance(vm_exit, IntrExit) and self._is_halted_for_good():
            return HltExit(interrupts_enabled=False)
        return vm_exit

    def _turn(self) -> float:
        deadline = self.clock.next_deadline()
        if deadline is None:
            return _TURN_SECONDS
        return min(_TURN_SECONDS, max(0, deadline - self.clock.now()) / NANOSECONDS_PER_SECOND)

    def _is_halted_for_good(self) -> bool:
        """With an irqchip, a guest that halts with interrupts off waits in the kernel, for ever."""
        vcpu = self._vcpu
        return vcpu.get_mp_state() is MpState.HALTED and not vcpu.get_regs().rflags & RFLAGS_IF

    def statistics(self) -> dict[str, int]:
        """Exits, and guest time."""
        return {"exits": self._exits, "guest_nanoseconds": self.clock.now()}

    def close(self) -> None:
        """Give the VM back to the host."""
        self._vm.close()


def offered_cpu(cpu: CpuModel, supported: Iterable[CpuidEntry], tsc_khz: int) -> CpuModel:
    """*cpu* as a host gives it whose KVM supports the CPUID entries *supported*.

    The features are those that both have. Vendor, signature and physical addresses are the host's, since a guest goes
    by them for what the processor does without asking CPUID; the counter runs at *tsc_khz*.
    """
    table = CpuidTable(supported)
    vendor = b"".join(
        table.word(LEAF_MAX_BASIC, 0, register).to_bytes(4, "little") for register in (_EBX, _EDX, _ECX)
    )
    return replace(
        cpu,
        features=frozenset(name for name in cpu.features if name in FEATURES and table.has(name)),
        vendor=vendor.decode("latin-1"),
        signature=table.word(LEAF_FEATURES, 0, _EAX),
        maxphyaddr=min(cpu.maxphyaddr, table.maxphyaddr),
        tsc_khz=tsc_khz,
    )
