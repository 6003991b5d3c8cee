"""``struct kvm_run``, the pages that a vCPU shares with its VMM: exits come out of it, answers go into it."""

from __future__ import annotations

import mmap
from collections.abc import Callable

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
from lasskvm.kvm.host.run_abi import Run

__all__ = ["RunPage"]

# KVM_EXIT_*
_EXIT_IO = 2
_EXIT_DEBUG = 4
_EXIT_HLT = 5
_EXIT_MMIO = 6
_EXIT_SHUTDOWN = 8
_EXIT_FAIL_ENTRY = 9
_EXIT_INTR = 10
_EXIT_INTERNAL_ERROR = 17
_EXIT_SYSTEM_EVENT = 24
_EXIT_X86_RDMSR = 29
_EXIT_X86_WRMSR = 30

_IO_OUT = 1
#: ``KVM_INTERNAL_ERROR_EMULATION``, and ``KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES``.
_SUBERROR_EMULATION = 1
_FLAG_INSTRUCTION_BYTES = 1 << 0
_SUBERRORS = {
    _SUBERROR_EMULATION: "KVM cannot emulate the instruction",
    2: "an exception occurred while another one was emulated",
    3: "the delivery of an event led to an exit that KVM cannot handle",
    4: "the processor left the guest for a reason that KVM does not know",
}


class RunPage:
    """The ``struct kvm_run`` in *pages*, which the kernel fills when ``KVM_RUN`` returns."""

    def __init__(self, pages: mmap.mmap) -> None:
        self._pages = pages
        self._run = Run.from_buffer(pages)
        #: The exit that the VMM has been given last and may have answered.
        self._reported: Exit | None = None
        self._element = 0

    @property
    def immediate_exit(self) -> bool:
        """``kvm_run.immediate_exit``."""
        return bool(self._run.immediate_exit)

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        """Set or clear it."""
        self._run.immediate_exit = value

    def release(self) -> None:
        """Let go of the pages, so that they can be unmapped."""
        del self._run
        self._reported = None

    def exit(self) -> Exit:
        """What the ``KVM_RUN`` that has just returned says."""
        self._element = 0
        self._reported = self._decode()
        return self._reported

    def expect_interruption(self) -> None:
        """Have :meth:`exit` tell of an interruption unless ``KVM_RUN`` writes something else."""
        self._run.exit_reason = _EXIT_INTR

    def answer(self) -> IoExit | None:
        """Hand the VMM's answer to the last exit to the kernel.

        Returns the next element when the exit was string I/O of several elements, each of which is an exit here; the
        kernel wants to hear of them all at once.
        """
        reported, self._reported = self._reported, None
        match reported:
            case IoExit():
                return self._answer_element(reported)
            case MmioExit(write=False):
                self._run.mmio.data[:] = (reported.data & _ones(8)).to_bytes(8, "little")
            case MsrExit():
                self._run.msr.error = reported.error
                self._run.msr.data = reported.data
        return None

    def _answer_element(self, reported: IoExit) -> IoExit | None:
        io = self._run.io
        if not reported.write:
            start = io.data_offset + self._element * io.size
            data = (reported.data & _ones(io.size)).to_bytes(io.size, "little")
            self._pages[start : start + io.size] = data
        self._element += 1
        if self._element == io.count:
            return None
        following = self._io_element()
        self._reported = following
        return following

    def _io_element(self) -> IoExit:
        io = self._run.io
        if io.direction != _IO_OUT:
            return IoExit(io.port, io.size, write=False, data=_ones(io.size))
        start = io.data_offset + self._element * io.size
        return IoExit(
            io.port, io.size, write=True, data=int.from_bytes(self._pages[start : start + io.size], "little")
        )

    def _decode(self) -> Exit:
        reason = self._run.exit_reason
        if reason == _EXIT_IO:
            return self._io_element()
        decoder = _DECODERS.get(reason)
        return UnknownExit(reason) if decoder is None else decoder(self._run)


def _ones(size: int) -> int:
    return (1 << 8 * size) - 1


def _mmio(run: Run) -> MmioExit:
    mmio = run.mmio
    if not mmio.is_write:
        return MmioExit(mmio.phys_addr, mmio.len, write=False, data=_ones(mmio.len))
    return MmioExit(
        mmio.phys_addr, mmio.len, write=True, data=int.from_bytes(bytes(mmio.data[: mmio.len]), "little")
    )


def _debug(run: Run) -> DebugExit:
    debug = run.debug
    return DebugExit(debug.exception, debug.pc, debug.dr6, debug.dr7)


def _rdmsr(run: Run) -> MsrExit:
    return MsrExit(run.msr.index, write=False, data=0)


def _wrmsr(run: Run) -> MsrExit:
    return MsrExit(run.msr.index, write=True, data=run.msr.data)


def _system_event(run: Run) -> SystemEventExit:
    event = run.system_event
    return SystemEventExit(event.type, tuple(event.data[: event.ndata]))


def _internal_error(run: Run) -> InternalErrorExit:
    suberror, failure = run.internal.suberror, run.emulation_failure
    detail = _SUBERRORS.get(suberror, f"KVM's internal error {suberror}")
    if suberror != _SUBERROR_EMULATION:
        words = ", ".join(f"{word:#x}" for word in run.internal.data[: run.internal.ndata])
        return InternalErrorExit(f"{detail} ({words})" if words else detail, suberror)
    instruction = b""
    if failure.ndata and failure.flags & _FLAG_INSTRUCTION_BYTES:
        instruction = bytes(failure.insn_bytes[: failure.insn_size])
    return InternalErrorExit(detail, suberror, instruction)


_DECODERS: dict[int, Callable[[Run], Exit]] = {
    _EXIT_DEBUG: _debug,
    _EXIT_HLT: lambda run: HltExit(bool(run.if_flag)),
    _EXIT_MMIO: _mmio,
    _EXIT_SHUTDOWN: lambda _: ShutdownExit(),
    _EXIT_FAIL_ENTRY: lambda run: FailEntryExit(run.fail_entry.hardware_entry_failure_reason),
    _EXIT_INTR: lambda _: IntrExit(),
    _EXIT_INTERNAL_ERROR: _internal_error,
    _EXIT_SYSTEM_EVENT: _system_event,
    _EXIT_X86_RDMSR: _rdmsr,
    _EXIT_X86_WRMSR: _wrmsr,
}
