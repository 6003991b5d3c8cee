"""Why ``KVM_RUN`` returned: one dataclass for each ``KVM_EXIT_*``, with the data inside."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "Exit",
    "HltExit",
    "InternalErrorExit",
    "IntrExit",
    "IoExit",
    "MmioExit",
    "ShutdownExit",
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


Exit = IoExit | MmioExit | HltExit | ShutdownExit | InternalErrorExit | IntrExit
