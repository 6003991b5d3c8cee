"""The KVM API: systems, virtual machines and vCPUs with the kernel's names and semantics.

This is the soft provider: KVM's work, done in this process by :mod:`lasskvm.engine` and :mod:`lasskvm.emulator`.
"""

from collections.abc import Callable

from lasskvm.engine.native import compile_all, is_compiled
from lasskvm.kvm.clock import Clock, HostClock, VirtualClock
from lasskvm.kvm.exits import (
    Exit,
    HltExit,
    InternalErrorExit,
    IntrExit,
    IoExit,
    MmioExit,
    ShutdownExit,
)
from lasskvm.kvm.iobus import IrqLine, PortBus, PortDevice
from lasskvm.kvm.structures import DescriptorTable, Regs, Sregs
from lasskvm.kvm.vcpu import Vcpu
from lasskvm.kvm.vm import ExecutionEngine, Vm

__all__ = [
    "Clock",
    "DescriptorTable",
    "ExecutionEngine",
    "Exit",
    "HltExit",
    "HostClock",
    "InternalErrorExit",
    "IntrExit",
    "IoExit",
    "IrqLine",
    "MmioExit",
    "PortBus",
    "PortDevice",
    "Regs",
    "ShutdownExit",
    "Sregs",
    "Vcpu",
    "VirtualClock",
    "Vm",
    "prepare",
]


def prepare(progress: Callable[[str], None]) -> None:
    """Have the machine code of direct execution ready; *progress* gets a line when it must be compiled first."""
    if not is_compiled():
        progress("compiling the engine for this machine (once, about half a minute) ...")
    compile_all()
