"""A virtual processor of the host's KVM: its state, ioctl by ioctl, and ``KVM_RUN``."""

from __future__ import annotations

import errno
import math
import mmap
import signal
import time
from collections.abc import Iterable, Mapping
from ctypes import c_uint8
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from lasskvm.kvm.exits import Exit, IntrExit
from lasskvm.kvm.host import abi, conversion
from lasskvm.kvm.host import ioctls as ioctl
from lasskvm.kvm.host import irqchip_abi as chips
from lasskvm.kvm.host.alarm import KICK, Alarm
from lasskvm.kvm.host.cpuid import read_cpuid
from lasskvm.kvm.host.descriptor import Descriptor
from lasskvm.kvm.host.ioctls import KvmIoctlError
from lasskvm.kvm.host.run_page import RunPage
from lasskvm.kvm.structures import (
    DebugRegs,
    Fpu,
    GuestDebug,
    MpState,
    Regs,
    Sregs,
    Sregs2,
    Translation,
    VcpuEvents,
)
from lasskvm.x86.cpuid import CpuidEntry

__all__ = ["Vcpu", "VcpuTraits"]

_XSAVE_BYTES = 4096
#: MSRs that one ``KVM_GET_MSRS`` or ``KVM_SET_MSRS`` takes.
_MSRS_PER_CALL = 255
#: The guest is left, and entered again, after this long. A signal that Python notes just before the guest is entered,
#: or in another thread, interrupts nothing; its handler runs then.
_TURN_SECONDS = 0.1
_NO_NESTED = "the KVM of this host offers no nested virtualization"


@dataclass(frozen=True)
class VcpuTraits:
    """What a vCPU has to know of its VM and of this KVM."""

    #: ``KVM_GET_VCPU_MMAP_SIZE``.
    run_size: int
    irqchip: bool
    #: Whether ``KVM_CAP_EXCEPTION_PAYLOAD`` and ``KVM_CAP_X86_TRIPLE_FAULT_EVENT`` are on.
    payload: bool
    triple_fault: bool
    #: ``KVM_CAP_XSAVE2`` and ``KVM_CAP_NESTED_STATE``: bytes, 0 without.
    xsave_size: int
    nested_size: int


class Vcpu:
    """The vCPU of a :class:`~lasskvm.kvm.host.vm.Vm`; made by ``Vm.create_vcpu()``.

    It has no CPUID until :meth:`set_cpuid2`: without, it is a processor without any feature.
    """

    def __init__(self, descriptor: Descriptor, traits: VcpuTraits) -> None:
        self._descriptor = descriptor
        self._traits = traits
        self._pages = mmap.mmap(descriptor.number, traits.run_size)
        self._page: RunPage | None = RunPage(self._pages)
        self._alarm = Alarm()
        #: ``KVM_RUN`` has returned an exit, but a signal's handler has raised an exception before it was reported.
        self._unreported = False
        self._set_signal_mask()

    def _set_signal_mask(self) -> None:
        """``KVM_SET_SIGNAL_MASK``: while the guest runs, what this thread blocks now, without the alarm's signal."""
        mask = 0
        for number in signal.pthread_sigmask(signal.SIG_BLOCK, ()) - {KICK}:
            mask |= 1 << int(number) - 1
        raw = abi.SignalMask()
        raw.len = len(raw.sigset)
        raw.sigset[:] = mask.to_bytes(raw.len, "little")
        self._do(ioctl.KVM_SET_SIGNAL_MASK, raw)

    def _do(self, request: ioctl.Ioctl, argument: Any = 0) -> Any:
        request(self._descriptor.number, argument)
        return argument

    # ------------------------------------------------------------------------------------------------------- CPUID

    def set_cpuid2(self, entries: Iterable[CpuidEntry]) -> None:
        """``KVM_SET_CPUID2``; EINVAL once the vCPU has run, unless nothing changes."""
        self._do(ioctl.KVM_SET_CPUID2, conversion.cpuid_structure(entries))

    def get_cpuid2(self) -> list[CpuidEntry]:
        """``KVM_GET_CPUID2``."""
        return read_cpuid(ioctl.KVM_GET_CPUID2, self._descriptor.number)

    def get_tsc_khz(self) -> int:
        """``KVM_GET_TSC_KHZ``: how fast the guest's time-stamp counter runs."""
        return ioctl.KVM_GET_TSC_KHZ(self._descriptor.number)

    # --------------------------------------------------------------------------------------------------- registers

    def get_regs(self) -> Regs:
        """``KVM_GET_REGS``. Behind an I/O, MMIO or MSR exit the instruction may still be in progress."""
        return conversion.regs_from(self._do(ioctl.KVM_GET_REGS, abi.Regs()))

    def set_regs(self, regs: Regs) -> None:
        """``KVM_SET_REGS``; a pending exception is dropped.

        What an I/O, MMIO or MSR exit has left open is still completed by the next run, over these registers. Who does
        not want that completes it before: runs with :attr:`immediate_exit` set, until one returns an IntrExit.
        """
        self._do(ioctl.KVM_SET_REGS, conversion.regs_to(regs))

    def get_sregs(self) -> Sregs:
        """``KVM_GET_SREGS``."""
        return conversion.sregs_from(self._do(ioctl.KVM_GET_SREGS, abi.Sregs()))

    def set_sregs(self, sregs: Sregs) -> None:
        """``KVM_SET_SREGS``; EINVAL for CR0, CR4 and EFER that CPUID or the host does not allow."""
        self._do(ioctl.KVM_SET_SREGS, conversion.sregs_to(sregs))

    def get_sregs2(self) -> Sregs2:
        """``KVM_GET_SREGS2``."""
        return conversion.sregs2_from(self._do(ioctl.KVM_GET_SREGS2, abi.Sregs2()))

    def set_sregs2(self, sregs: Sregs2) -> None:
        """``KVM_SET_SREGS2``; EINVAL as with :meth:`set_sregs`, and for PDPTRs where there are none."""
        self._do(ioctl.KVM_SET_SREGS2, conversion.sregs2_to(sregs))

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """``KVM_GET_MSRS``: those before the first that does not exist."""
        wanted = list(indices)
        values: dict[int, int] = {}
        for start in range(0, len(wanted), _MSRS_PER_CALL):
            batch = wanted[start : start + _MSRS_PER_CALL]
            raw = _msr_structure((index, 0) for index in batch)
            done = ioctl.KVM_GET_MSRS(self._descriptor.number, raw)
            values.update((entry.index, entry.data) for entry in raw.entries[:done])
            if done < len(batch):
                break
        return values

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """``KVM_SET_MSRS``: how many were set, in order; it stops at the first that cannot be."""
        given = list(values.items())
        done = 0
        for start in range(0, len(given), _MSRS_PER_CALL):
            batch = given[start : start + _MSRS_PER_CALL]
            done += ioctl.KVM_SET_MSRS(self._descriptor.number, _msr_structure(batch))
            if done < start + len(batch):
                break
        return done

    def get_fpu(self) -> Fpu:
        """``KVM_GET_FPU``. The kernel leaves MXCSR out, which is 0 here; :meth:`get_xsave` has it."""
        return conversion.fpu_from(self._do(ioctl.KVM_GET_FPU, abi.Fpu()))

    def set_fpu(self, fpu: Fpu) -> None:
        """``KVM_SET_FPU``, all but MXCSR."""
        self._do(ioctl.KVM_SET_FPU, conversion.fpu_to(fpu))

    def get_xsave(self) -> bytes:
        """``KVM_GET_XSAVE``, or ``KVM_GET_XSAVE2`` where the state is larger: 4096 bytes or more, standard format."""
        raw = self._xsave_structure()
        large = self._traits.xsave_size > _XSAVE_BYTES
        return bytes(self._do(ioctl.KVM_GET_XSAVE2 if large else ioctl.KVM_GET_XSAVE, raw))

    def set_xsave(self, region: bytes) -> None:
        """``KVM_SET_XSAVE``: *region* as :meth:`get_xsave` gives it; what is missing at its end is zero."""
        raw = self._xsave_structure()
        size = min(len(region), len(bytes(raw)))
        memoryview(raw).cast("B")[:size] = region[:size]
        self._do(ioctl.KVM_SET_XSAVE, raw)

    def _xsave_structure(self) -> Any:
        more = max(0, self._traits.xsave_size - _XSAVE_BYTES)
        return abi.with_entries(abi.Xsave, c_uint8, more)

    def get_xcrs(self) -> dict[int, int]:
        """``KVM_GET_XCRS``."""
        return conversion.xcrs_from(self._do(ioctl.KVM_GET_XCRS, abi.Xcrs()))

    def set_xcrs(self, values: Mapping[int, int]) -> None:
        """``KVM_SET_XCRS``."""
        self._do(ioctl.KVM_SET_XCRS, conversion.xcrs_to(values.items()))

    def get_debugregs(self) -> DebugRegs:
        """``KVM_GET_DEBUGREGS``."""
        return conversion.debugregs_from(self._do(ioctl.KVM_GET_DEBUGREGS, abi.DebugRegs()))

    def set_debugregs(self, registers: DebugRegs) -> None:
        """``KVM_SET_DEBUGREGS``."""
        self._do(ioctl.KVM_SET_DEBUGREGS, conversion.debugregs_to(registers))

    # ------------------------------------------------------------------------------------------ events and the rest

    def get_vcpu_events(self) -> VcpuEvents:
        """``KVM_GET_VCPU_EVENTS``."""
        return conversion.events_from(self._do(ioctl.KVM_GET_VCPU_EVENTS, abi.VcpuEvents()))

    def set_vcpu_events(self, events: VcpuEvents) -> None:
        """``KVM_SET_VCPU_EVENTS``."""
        traits = self._traits
        raw = conversion.events_to(
            events, irqchip=traits.irqchip, payload=traits.payload, triple_fault=traits.triple_fault
        )
        self._do(ioctl.KVM_SET_VCPU_EVENTS, raw)

    def get_mp_state(self) -> MpState:
        """``KVM_GET_MP_STATE``."""
        return MpState(self._do(ioctl.KVM_GET_MP_STATE, abi.MpState()).mp_state)

    def set_mp_state(self, state: MpState) -> None:
        """``KVM_SET_MP_STATE``; without an irqchip there is RUNNABLE only."""
        self._do(ioctl.KVM_SET_MP_STATE, abi.MpState(state))

    def get_lapic(self) -> bytes:
        """``KVM_GET_LAPIC``: the 1024 bytes of the local APIC's register page; EINVAL without an irqchip."""
        return bytes(self._do(ioctl.KVM_GET_LAPIC, chips.LapicState()))

    def set_lapic(self, registers: bytes) -> None:
        """``KVM_SET_LAPIC`` of what :meth:`get_lapic` gave; a timer that runs is started again.

        The mode of the local APIC (IA32_APIC_BASE) is not among it; set that before, with :meth:`set_sregs`.
        """
        raw = chips.LapicState()
        if len(registers) != len(raw.regs):
            raise KvmIoctlError(ioctl.KVM_SET_LAPIC.name, errno.EINVAL, f"it takes {len(raw.regs)} bytes")
        raw.regs[:] = registers
        self._do(ioctl.KVM_SET_LAPIC, raw)

    def get_nested_state(self) -> bytes:
        """``KVM_GET_NESTED_STATE``; OSError with ENOTTY without nested virtualization."""
        if not self._traits.nested_size:
            raise KvmIoctlError(ioctl.KVM_GET_NESTED_STATE.name, errno.ENOTTY, _NO_NESTED)
        raw = self._nested_structure()
        raw.size = self._traits.nested_size
        self._do(ioctl.KVM_GET_NESTED_STATE, raw)
        return bytes(raw)[: raw.size]

    def set_nested_state(self, state: bytes) -> None:
        """``KVM_SET_NESTED_STATE`` of what :meth:`get_nested_state` gave; OSError with ENOTTY without."""
        if not self._traits.nested_size:
            raise KvmIoctlError(ioctl.KVM_SET_NESTED_STATE.name, errno.ENOTTY, _NO_NESTED)
        raw = self._nested_structure()
        memoryview(raw).cast("B")[: len(state)] = state
        self._do(ioctl.KVM_SET_NESTED_STATE, raw)

    def _nested_structure(self) -> Any:
        head = len(bytes(abi.NestedState()))
        return abi.with_entries(abi.NestedState, c_uint8, max(0, self._traits.nested_size - head))

    def set_guest_debug(self, debug: GuestDebug) -> None:
        """``KVM_SET_GUEST_DEBUG``; what it catches are :class:`~lasskvm.kvm.exits.DebugExit`."""
        self._do(ioctl.KVM_SET_GUEST_DEBUG, conversion.guest_debug_to(debug))

    def translate(self, gva: int) -> Translation:
        """``KVM_TRANSLATE``, for a supervisor read. What the access rights are, the kernel does not say."""
        raw = self._do(ioctl.KVM_TRANSLATE, abi.Translation(linear_address=gva))
        return Translation(raw.physical_address, bool(raw.valid), bool(raw.writeable), bool(raw.usermode))

    def interrupt(self, vector: int) -> None:
        """``KVM_INTERRUPT``: inject an external interrupt at the next entry; without an irqchip only.

        The guest must be able to take it: RFLAGS.IF is 1 and no instruction holds interrupts off.
        """
        self._do(ioctl.KVM_INTERRUPT, abi.Interrupt(vector))

    def nmi(self) -> None:
        """``KVM_NMI``."""
        self._do(ioctl.KVM_NMI)

    # ----------------------------------------------------------------------------------------------------- running

    @property
    def _run_page(self) -> RunPage:
        if self._page is None:
            raise KvmIoctlError(ioctl.KVM_RUN.name, errno.EBADF, "the vCPU has been closed")
        return self._page

    @property
    def immediate_exit(self) -> bool:
        """``kvm_run.immediate_exit``: while it is set, runs only complete what the last exit began."""
        return self._run_page.immediate_exit

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        """Set or clear it; any thread may."""
        self._run_page.immediate_exit = value

    def run(self, timeout: float | None = None) -> Exit:
        """``KVM_RUN``, for *timeout* seconds at most; then, and when a signal arrives, it returns an IntrExit.

        The handlers of signals, Ctrl-C's KeyboardInterrupt among them, run before it returns. String I/O that the
        kernel reports at once comes as one exit for each element.
        """
        page = self._run_page
        end = math.inf if timeout is None else time.monotonic() + timeout
        if self._unreported:
            self._unreported = False
            vm_exit = page.exit()
            if not isinstance(vm_exit, IntrExit):
                return vm_exit
        following = page.answer()
        if following is not None:
            return following
        while True:
            turn_ends = min(time.monotonic() + _TURN_SECONDS, end)
            alarm_rang = self._enter(turn_ends)
            vm_exit = page.exit()
            if not isinstance(vm_exit, IntrExit) or not alarm_rang or turn_ends == end or page.immediate_exit:
                return vm_exit

    def _enter(self, deadline: float) -> bool:
        """``KVM_RUN`` until *deadline*; the page then says why it ended. Returns whether the deadline has come."""
        # Should a signal's handler raise behind KVM_RUN, the exit is still there for the next run.
        self._run_page.expect_interruption()
        self._unreported = True
        self._alarm.set(deadline)
        try:
            ioctl.KVM_RUN(self._descriptor.number)
        except KvmIoctlError as error:
            if error.errno != errno.EINTR:
                self._unreported = False
                raise
        finally:
            alarm_rang = self._alarm.cancel()
        self._unreported = False
        return alarm_rang

    def close(self) -> None:
        """Give the vCPU back to the host."""
        self._alarm.close()
        if self._page is not None:
            self._page.release()
            self._page = None
            self._pages.close()
        self._descriptor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _msr_structure(values: Iterable[tuple[int, int]]) -> Any:
    given = list(values)
    raw = abi.with_entries(abi.Msrs, abi.MsrEntry, len(given))
    raw.nmsrs = len(given)
    for entry, (index, value) in zip(raw.entries, given, strict=True):
        entry.index, entry.data = index, value
    return raw
