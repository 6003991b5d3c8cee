"""What KVM has that no processor has: its paravirtual clock, and hypercalls.

The clock is two structures in guest memory, whose addresses the guest writes to MSRs. One says how to turn the
time-stamp counter into nanoseconds since the machine's start, the other what time of day that start was. A guest reads
the time from them without any exit.

An MSR whose feature CPUID does not have is #GP(0), for the guest and for the VMM, as in a KVM told to be strict about
it (``KVM_CAP_ENFORCE_PV_FEATURE_CPUID``).

Source: KVM's ``kvm_write_system_time()``, ``kvm_write_wall_clock()``, ``kvm_guest_time_update()``,
``kvm_get_time_scale()`` and ``kvm_emulate_hypercall()``; Linux's documentation of paravirtual clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.faults import general_protection
from lasskvm.emulator.modes import in_64bit_mode
from lasskvm.emulator.msrs import MsrFile
from lasskvm.kvm.clock import NANOSECONDS_PER_SECOND, Clock
from lasskvm.kvm.iobus import DeviceState
from lasskvm.memory import GuestMemory
from lasskvm.state import CPL, RAX
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.kvm_para import (
    KVM_ENOSYS,
    KVM_EPERM,
    KVM_HC_VAPIC_POLL_IRQ,
    PVCLOCK_TIME_INFO,
    PVCLOCK_TSC_STABLE_BIT,
    PVCLOCK_VERSION_BYTES,
    PVCLOCK_WALL_CLOCK,
    SYSTEM_TIME_ENABLE,
)
from lasskvm.x86.msr import (
    MSR_KVM_SYSTEM_TIME,
    MSR_KVM_SYSTEM_TIME_NEW,
    MSR_KVM_WALL_CLOCK,
    MSR_KVM_WALL_CLOCK_NEW,
)
from lasskvm.x86.registers import MASK32, MASK64

__all__ = ["ParavirtClock", "emulate_hypercall", "time_scale"]

#: The feature that each MSR belongs to.
_FEATURES = {
    MSR_KVM_WALL_CLOCK: "kvmclock",
    MSR_KVM_SYSTEM_TIME: "kvmclock",
    MSR_KVM_WALL_CLOCK_NEW: "kvmclock2",
    MSR_KVM_SYSTEM_TIME_NEW: "kvmclock2",
}
_SYSTEM_TIME_MSRS = (MSR_KVM_SYSTEM_TIME, MSR_KVM_SYSTEM_TIME_NEW)
_HERTZ_PER_KHZ = 1000
#: The multiplier is a fraction with this many bits behind the point.
_FRACTION_BITS = 32


class ParavirtClock:
    """kvmclock for one vCPU. The old and the new number of an MSR are the same register.

    An address where there is no writable memory, or not in one piece, gets nothing.
    """

    def __init__(
        self,
        memory: GuestMemory,
        clock: Clock,
        guest_tsc: Callable[[], int],
        cpuid: CpuidTable,
        tsc_khz: int = NANOSECONDS_PER_SECOND // _HERTZ_PER_KHZ,
    ) -> None:
        """*guest_tsc* gives the time-stamp counter as the guest reads it, which runs at *tsc_khz* on *clock*."""
        self._memory = memory
        self._clock = clock
        self._guest_tsc = guest_tsc
        #: What the guest's CPUID is now: whoever changes that changes this.
        self.cpuid = cpuid
        self._multiplier, self._shift = time_scale(tsc_khz)
        self._wall_clock = 0
        self._system_time = 0

    def attach(self, msrs: MsrFile) -> None:
        """Answer for KVM's clock MSRs in *msrs*."""
        for index in _FEATURES:
            msrs.attach(index, partial(self.read_msr, index), partial(self.write_msr, index))

    def read_msr(self, index: int) -> int:
        """RDMSR of ``MSR_KVM_WALL_CLOCK*`` or ``MSR_KVM_SYSTEM_TIME*``: what was written. #GP(0) if CPUID lacks it."""
        self._check(index)
        return self._system_time if index in _SYSTEM_TIME_MSRS else self._wall_clock

    def write_msr(self, index: int, value: int) -> None:
        """WRMSR of one of them: the structure at the address *value* is filled in. #GP(0) if CPUID lacks it."""
        self._check(index)
        if index in _SYSTEM_TIME_MSRS:
            self._system_time = value
            self.republish()
        else:
            self._wall_clock = value
            self._write_wall_clock()

    def republish(self) -> None:
        """Say anew what the time is: the guest's time-stamp counter has been changed, or it has got the structure."""
        if not self._system_time & SYSTEM_TIME_ENABLE:
            return
        gpa = self._system_time & ~SYSTEM_TIME_ENABLE
        flags = PVCLOCK_TSC_STABLE_BIT if self.cpuid.has("kvmclock_stable_bit") else 0
        information = PVCLOCK_TIME_INFO.pack(
            self._next_version(gpa),
            0,
            self._guest_tsc(),
            self._clock.now(),
            self._multiplier,
            self._shift,
            flags,
        )
        self._memory.store_bytes(gpa, information)

    def reset(self) -> None:
        """Write to guest memory no more, as after power-on."""
        self._wall_clock = self._system_time = 0

    def get_state(self) -> DeviceState:
        """The two registers; what is in guest memory belongs to that."""
        return {"wall_clock": self._wall_clock, "system_time": self._system_time}

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`. Nothing is written to guest memory."""
        self._wall_clock, self._system_time = int(state["wall_clock"]), int(state["system_time"])

    def _check(self, index: int) -> None:
        if not self.cpuid.has(_FEATURES[index]):
            raise general_protection()

    def _write_wall_clock(self) -> None:
        gpa = self._wall_clock
        if not gpa:
            return
        seconds, nanoseconds = divmod(self._clock.epoch_ns, NANOSECONDS_PER_SECOND)
        wall_clock = PVCLOCK_WALL_CLOCK.pack(self._next_version(gpa), seconds & MASK32, nanoseconds)
        self._memory.store_bytes(gpa, wall_clock)

    def _next_version(self, gpa: int) -> int:
        """The next even version of the structure at *gpa*. The odd one before it would be seen by nobody: the guest
        does not run while the structure is written."""
        version = self._memory.load(gpa, PVCLOCK_VERSION_BYTES)
        return (version + 1 | 1) + 1 & MASK32


def time_scale(tsc_khz: int) -> tuple[int, int]:
    """Multiplier and shift that turn ticks of a *tsc_khz* counter into nanoseconds: ``(ticks << shift) * mul >> 32``.

    A negative shift is one to the right. The multiplier has its highest bit set, so that none is lost.

    >>> time_scale(1_000_000) == (1 << 31, 1)
    True
    """
    hertz = tsc_khz * _HERTZ_PER_KHZ
    shift = NANOSECONDS_PER_SECOND.bit_length() - hertz.bit_length()
    if (NANOSECONDS_PER_SECOND << _FRACTION_BITS - shift) // hertz > MASK32:
        shift += 1
    return (NANOSECONDS_PER_SECOND << _FRACTION_BITS - shift) // hertz, shift


def emulate_hypercall(ctx: Emulation) -> None:
    """What VMCALL and VMMCALL ask KVM for: the number is in RAX, and so is the result. For ``Emulation.hypercall``.

    Outside 64-bit mode both have 32 bits. -KVM_EPERM above CPL 0; -KVM_ENOSYS for what is not offered, which is all
    but KVM_HC_VAPIC_POLL_IRQ: the other calls are for guests with more processors, or belong to features that CPUID
    does not have.
    """
    words = ctx.words
    mask = MASK64 if in_64bit_mode(words) else MASK32
    if words[CPL]:
        result = -KVM_EPERM
    elif words[RAX] & mask == KVM_HC_VAPIC_POLL_IRQ:
        # Interrupts that the processor may take now are looked for behind each instruction anyway.
        result = 0
    else:
        result = -KVM_ENOSYS
    words[RAX] = result & mask
