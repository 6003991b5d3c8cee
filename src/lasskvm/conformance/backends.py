"""Providers of the KVM API that the suite can run on, by the names of ``lasskvm verify --backend``.

A :class:`Backend` makes VMs, says what its processor offers, and runs a vCPU for a bounded time. The suite asks it for
nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol, cast

from lasskvm import kvm
from lasskvm.errors import HostError
from lasskvm.kvm import ExecutionEngine
from lasskvm.kvm.exits import Exit, IntrExit
from lasskvm.kvm.interface import SystemInterface, VcpuInterface, VmInterface
from lasskvm.kvm.providers import open_system
from lasskvm.sgx.enumeration import with_epc
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import FEATURES, CpuidEntry, CpuidTable

__all__ = ["Backend", "BackendName", "HostBackend", "SoftBackend", "missing_features", "open_backend"]

BackendName = Literal["jit", "emulator", "kvm"]

#: Where KVM says whether it knows the forced emulation prefix.
_FORCED_EMULATION_PARAMETER = Path("/sys/module/kvm/parameters/force_emulation_prefix")
_REGISTERS = ("eax", "ebx", "ecx", "edx")


class Backend(Protocol):
    """One provider, as the suite needs it."""

    @property
    def name(self) -> str:
        """As in ``--backend``."""

    @property
    def emulates_like_kvm(self) -> bool:
        """Whether instructions that KVM's emulator does not know cannot be emulated here."""

    def create_vm(self) -> VmInterface:
        """A VM without memory."""

    def cpuid(self, needs: frozenset[str], without: frozenset[str]) -> list[CpuidEntry]:
        """The CPUID of a processor that has *needs*, as far as the provider has them, and not *without*."""

    def why_not_forced(self) -> str:
        """Why there is no forced emulation; empty when there is."""

    def why_no_epc(self) -> str:
        """Why a guest cannot have an enclave page cache here; empty when it can."""

    def give_epc(self, vm: VmInterface, entries: list[CpuidEntry], base: int, size: int) -> list[CpuidEntry]:
        """Give *vm* an EPC of *size* bytes at gpa *base*; the CPUID *entries* that tell of it.

        Not to be called when :meth:`why_no_epc` has a reason.
        """

    def run(self, vcpu: VcpuInterface, seconds: float) -> Exit | None:
        """Run *vcpu* until an exit that is more than an interruption; None when that takes longer than *seconds*."""


class SoftBackend:
    """The software KVM of this package on one of its execution engines."""

    emulates_like_kvm = False

    def __init__(self, engine: ExecutionEngine) -> None:
        self.name: str = engine
        self._engine: ExecutionEngine = engine

    def create_vm(self) -> VmInterface:
        """A VM that knows the forced emulation prefix."""
        return cast("VmInterface", kvm.Vm(self._engine, forced_emulation=True))

    def cpuid(self, needs: frozenset[str], without: frozenset[str]) -> list[CpuidEntry]:
        """The CPU model ``max`` with changes; what cannot be had is left out."""
        changes = [f"-{name}" for name in sorted(without)]
        entries = parse_cpu(",".join(["max", *changes])).entries()
        from lasskvm.x86.cpu_models import SUPPORTED

        added = [name for name in sorted(needs) if name in SUPPORTED and not CpuidTable(entries).has(name)]
        return list(parse_cpu(",".join(["max", *changes, *(f"+{name}" for name in added)])).entries())

    def why_not_forced(self) -> str:
        """It is always there."""
        return ""

    def why_no_epc(self) -> str:
        """It always can."""
        return ""

    def give_epc(self, vm: VmInterface, entries: list[CpuidEntry], base: int, size: int) -> list[CpuidEntry]:
        """As :meth:`Backend.give_epc`."""
        assert isinstance(vm, kvm.Vm)
        return list(with_epc(entries, vm.create_epc(base, size)))

    def run(self, vcpu: VcpuInterface, seconds: float) -> Exit | None:
        """As :meth:`Backend.run`; the provider comes back to its VMM by itself from time to time."""
        return _run_until(vcpu.run, seconds)


class HostBackend:
    """The KVM of the host's kernel.

    Raises :class:`~lasskvm.errors.HostError` when there is none that can be used.
    """

    name = "kvm"
    emulates_like_kvm = True

    def __init__(self, parameter: Path = _FORCED_EMULATION_PARAMETER) -> None:
        self._system: SystemInterface = open_system("host")
        self._supported = self._system.get_supported_cpuid()
        self._parameter = parameter

    def create_vm(self) -> VmInterface:
        """A VM of /dev/kvm."""
        return self._system.create_vm()

    def cpuid(self, needs: frozenset[str], without: frozenset[str]) -> list[CpuidEntry]:
        """What this KVM supports, but for *without*."""
        entries = {(entry.function, entry.index): entry for entry in self._supported}
        for name in without:
            feature = FEATURES[name]
            place = feature.leaf, feature.subleaf
            if place in entries:
                register = _REGISTERS[feature.register]
                fields = vars(entries[place]).copy()
                fields[register] &= ~(1 << feature.bit)
                entries[place] = CpuidEntry(**fields)
        return list(entries.values())

    def why_not_forced(self) -> str:
        """KVM knows the prefix when its module parameter says so."""
        try:
            value = self._parameter.read_text().strip()
        except OSError:
            return f"this KVM has no forced emulation prefix ({self._parameter} cannot be read)"
        if value in ("0", "N"):
            return f"forced emulation is switched off; write 1 to {self._parameter} to have it"
        return ""

    def why_no_epc(self) -> str:
        """An EPC is memory of another device, which this package does not open."""
        return "this provider does not use /dev/sgx_vepc, so its guests have no enclave page cache"

    def give_epc(self, vm: VmInterface, entries: list[CpuidEntry], base: int, size: int) -> list[CpuidEntry]:
        """Never called."""
        raise HostError(self.why_no_epc())

    def run(self, vcpu: VcpuInterface, seconds: float) -> Exit | None:
        """As :meth:`Backend.run`; the kernel is interrupted when the time is up."""
        from lasskvm.kvm.host import Vcpu

        assert isinstance(vcpu, Vcpu)
        return _run_until(lambda: vcpu.run(timeout=seconds), seconds)


def _run_until(run: Callable[[], Exit], seconds: float) -> Exit | None:
    end = time.monotonic() + seconds
    while True:
        reason = run()
        if not isinstance(reason, IntrExit):
            return reason
        if time.monotonic() >= end:
            return None


def missing_features(entries: list[CpuidEntry], wanted: frozenset[str]) -> list[str]:
    """Those of *wanted* that a processor with these CPUID entries lacks, in alphabetical order."""
    table = CpuidTable(entries)
    return [name for name in sorted(wanted) if not table.has(name)]


def open_backend(name: BackendName) -> Backend:
    """The backend of that name; raises :class:`~lasskvm.errors.HostError` when this host has no KVM to use."""
    return HostBackend() if name == "kvm" else SoftBackend(name)
