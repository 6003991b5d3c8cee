"""Guests of a few instructions on either provider of the KVM API, each of whose runs is bounded in time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from types import TracebackType
from typing import Self

from lasskvm.errors import HostError
from lasskvm.kvm import host
from lasskvm.kvm.exits import Exit, HltExit
from lasskvm.kvm.interface import SystemInterface, VcpuInterface, VmInterface
from lasskvm.kvm.providers import Provider, open_system
from lasskvm.kvm.structures import DescriptorTable, Regs
from lasskvm.machine.boot.entry import prepare_long_mode
from lasskvm.state import Segment
from lasskvm.x86.registers import AR_CODE32, AR_DATA, CR0_ET, CR0_NE, CR0_PE

MIB = 1 << 20
#: Where code in 32-bit and 64-bit mode begins, and where code in real mode does.
CODE = 0x10_0000
REAL_MODE_CODE = 0x1000
STACK = 0x8000
#: More than any of these guests takes.
PATIENCE = 20.0


@cache
def unusable(provider: Provider) -> str:
    """Why *provider* cannot be used here; empty when it can."""
    if provider == "soft":
        return "" if find_spec("lasskvm.kvm.system") else "the soft provider has no System yet"
    try:
        host.System().close()
    except HostError as error:
        return str(error)
    return ""


class Machine:
    """A VM with 2 MiB of memory, code at :data:`CODE` and nothing else."""

    def __init__(self, provider: Provider, *, irqchip: bool = False) -> None:
        self.provider = provider
        self.system: SystemInterface = open_system(provider)
        self.vm: VmInterface = self.system.create_vm()
        self.vm.set_user_memory_region(0, 0, self.vm.allocate(2 * MIB))
        if irqchip:
            self.vm.create_irqchip()
        self.vcpu: VcpuInterface = self.vm.create_vcpu()
        self.vcpu.set_cpuid2(self.system.get_supported_cpuid())

    @property
    def host_vcpu(self) -> host.Vcpu:
        assert isinstance(self.vcpu, host.Vcpu)
        return self.vcpu

    @property
    def host_vm(self) -> host.Vm:
        assert isinstance(self.vm, host.Vm)
        return self.vm

    def real_mode(self, code: bytes, **registers: int) -> None:
        """Stand at *code* in real mode, all segments at 0."""
        self.vm.memory.write(REAL_MODE_CODE, code)
        sregs = self.vcpu.get_sregs()
        sregs.cs = replace(sregs.cs, selector=0, base=0)
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(Regs(**{"rip": REAL_MODE_CODE, "rsp": STACK, **registers}))

    def protected_mode(self, code: bytes, **registers: int) -> None:
        """Stand at *code* in flat 32-bit protected mode without paging."""
        self.vm.memory.write(CODE, code)
        sregs = self.vcpu.get_sregs()
        sregs.cr0 = CR0_PE | CR0_ET | CR0_NE
        sregs.cs = Segment(0x8, 0, 0xFFFFFFFF, AR_CODE32)
        sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = Segment(0x10, 0, 0xFFFFFFFF, AR_DATA)
        sregs.idt = DescriptorTable(0, 0)
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(Regs(**{"rip": CODE, "rsp": STACK, **registers}))

    def long_mode(self, code: bytes, **registers: int) -> None:
        """Stand at *code* in 64-bit mode with the first 4 GiB mapped one to one."""
        self.vm.memory.write(CODE, code)
        entry = prepare_long_mode(self.vm.memory, CODE)
        sregs = self.vcpu.get_sregs()
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = entry.cr0, entry.cr3, entry.cr4, entry.efer
        sregs.gdt, sregs.idt = DescriptorTable(entry.gdt_base, entry.gdt_limit), DescriptorTable(0, 0)
        sregs.cs, sregs.tr = entry.code_segment, entry.task_segment
        sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = entry.data_segment
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(Regs(**{"rip": entry.rip, "rsp": entry.rsp, **registers}))

    def run(self, timeout: float = PATIENCE) -> Exit:
        """One run; on the host provider it ends after *timeout* seconds at the latest."""
        if isinstance(self.vcpu, host.Vcpu):
            return self.vcpu.run(timeout)
        return self.vcpu.run()

    def run_to_halt(self) -> Regs:
        """Run, see the guest halt, and return its registers."""
        assert isinstance(vm_exit := self.run(), HltExit), vm_exit
        return self.vcpu.get_regs()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.vm.close()
