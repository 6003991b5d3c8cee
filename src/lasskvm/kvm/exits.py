"""Why ``KVM_RUN`` returned: one dataclass for each ``KVM_EXIT_*``, with the data inside."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "DebugExit",
    "Exit",
    "FailEntryExit",
    "HltExit",
    "InternalErrorExit",
    "IntrExit",
    "IoExit",
    "MmioExit",
    "MsrExit",
    "ShutdownExit",
    "SystemEventExit",
    "UnknownExit",
]


@dataclass
class IoExit:
    """``KVM_EXIT_IO``: port I/O that no in-kernel device claims, one element at a time.

    For an IN (``write`` is False) the caller puts the value into ``data`` before the next run; all ones, what an empty
    bus reads, is there already.
    """

    port: int
    size: int
    write: bool
    data: int


@dataclass
class MmioExit:
    """``KVM_EXIT_MMIO``: an access to guest-physical memory that is not there; ``data`` as in :class:`IoExit`."""

    gpa: int
    size: int
    write: bool
    data: int


@dataclass(frozen=True)
class HltExit:
    """``KVM_EXIT_HLT``: the guest halted and no interrupt can wake it: RFLAGS.IF is 0, or there is no irqchip."""

    interrupts_enabled: bool


@dataclass(frozen=True)
class ShutdownExit:
    """``KVM_EXIT_SHUTDOWN``: a triple fault. The registers are those at the event that could not be delivered."""

    reason: str = "triple fault"


@dataclass(frozen=True)
class InternalErrorExit:
    """``KVM_EXIT_INTERNAL_ERROR``: something that cannot be executed.

    ``suberror`` is KVM's ``KVM_INTERNAL_ERROR_*``; ``detail`` says what it was, ``instruction`` holds the bytes at RIP
    when they can be read.
    """

    detail: str
    suberror: int = 1
    instruction: bytes = field(default=b"")


@dataclass(frozen=True)
class IntrExit:
    """``KVM_EXIT_INTR``: the run was interrupted for the VMM's sake and can simply be continued.

    ``idle_until_ns`` is set when the guest is halted and follows the host's clock: nothing happens before that time of
    the VM's clock (None: no timer is pending) unless a device raises an interrupt.
    """

    idle: bool = False
    idle_until_ns: int | None = None


@dataclass(frozen=True)
class DebugExit:
    """``KVM_EXIT_DEBUG``: what :meth:`set_guest_debug` asked for has happened at linear address *pc*."""

    exception: int
    pc: int
    dr6: int
    dr7: int


@dataclass
class MsrExit:
    """``KVM_EXIT_X86_RDMSR`` and ``KVM_EXIT_X86_WRMSR``: an access that the VM's MSR filter denies.

    The caller puts what RDMSR reads into ``data``, or sets ``error`` to have the guest get #GP(0), which it does unless
    the caller clears it.
    """

    index: int
    write: bool
    data: int
    error: bool = True


@dataclass(frozen=True)
class FailEntryExit:
    """``KVM_EXIT_FAIL_ENTRY``: the host's processor refused to run the guest."""

    hardware_entry_failure_reason: int


@dataclass(frozen=True)
class SystemEventExit:
    """``KVM_EXIT_SYSTEM_EVENT``: the guest asked KVM itself for a shutdown or reset, or told it of its crash.

    *type* is ``KVM_SYSTEM_EVENT_*``; *data* what came with it.
    """

    type: int
    data: tuple[int, ...] = ()


@dataclass(frozen=True)
class UnknownExit:
    """An exit of the host's KVM that this program does not know; *reason* is ``KVM_EXIT_*``'s number."""

    reason: int


Exit = (
    IoExit
    | MmioExit
    | HltExit
    | ShutdownExit
    | InternalErrorExit
    | IntrExit
    | DebugExit
    | MsrExit
    | FailEntryExit
    | SystemEventExit
    | UnknownExit
)
