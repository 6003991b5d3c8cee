"""The KVM API: systems, virtual machines and vCPUs with the kernel's names and semantics.

There are two providers behind one interface (:mod:`lasskvm.kvm.interface`): :func:`open_system` gives either.
``"soft"`` is KVM's work, done in this process by :mod:`lasskvm.engine` and :mod:`lasskvm.emulator`; :class:`System`,
:class:`Vm` and :class:`Vcpu` are its classes. ``"host"`` is /dev/kvm (:mod:`lasskvm.kvm.host`).
"""

from collections.abc import Callable

from lasskvm.engine.code_cache import is_writable, location
from lasskvm.engine.native import compile_all, is_compiled
from lasskvm.kvm.clock import Clock, HostClock, VirtualClock
from lasskvm.kvm.exits import (
    DebugExit,
    Exit,
    FailEntryExit,
    HltExit,
    InternalErrorExit,
    IntrExit,
    IoExit,
    MmioExit,
    MsrExit,
    ShutdownExit,
    SystemEventExit,
    UnknownExit,
)
from lasskvm.kvm.iobus import DeviceState, IrqLine, MmioBus, MmioDevice, PortBus, PortDevice, StatefulDevice
from lasskvm.kvm.providers import Provider, open_system
from lasskvm.kvm.structures import (
    DebugRegs,
    DescriptorTable,
    Fpu,
    GuestDebug,
    MpState,
    MsrFilterRange,
    Regs,
    Segment,
    Sregs,
    Sregs2,
    Translation,
    VcpuEvents,
)
from lasskvm.kvm.system import System
from lasskvm.kvm.vcpu import Vcpu
from lasskvm.kvm.vm import ExecutionEngine, Vm

__all__ = [
    "Clock",
    "DebugExit",
    "DebugRegs",
    "DescriptorTable",
    "DeviceState",
    "ExecutionEngine",
    "Exit",
    "FailEntryExit",
    "Fpu",
    "GuestDebug",
    "HltExit",
    "HostClock",
    "InternalErrorExit",
    "IntrExit",
    "IoExit",
    "IrqLine",
    "MmioExit",
    "MpState",
    "MsrExit",
    "MsrFilterRange",
    "MmioBus",
    "MmioDevice",
    "PortBus",
    "PortDevice",
    "Provider",
    "Regs",
    "Segment",
    "ShutdownExit",
    "Sregs",
    "Sregs2",
    "StatefulDevice",
    "System",
    "SystemEventExit",
    "Translation",
    "UnknownExit",
    "Vcpu",
    "VcpuEvents",
    "VirtualClock",
    "Vm",
    "open_system",
    "prepare",
]


def prepare(progress: Callable[[str], None]) -> None:
    """Have the machine code of direct execution ready; *progress* gets a line when it must be compiled first."""
    if not is_compiled():
        progress(
            "compiling the engine for this machine (once, about half a minute) ..."
            if is_writable()
            else f"compiling the engine (about half a minute, for this process only: {location()} cannot be written; "
            "set XDG_CACHE_HOME to a folder that can) ..."
        )
    compile_all()
