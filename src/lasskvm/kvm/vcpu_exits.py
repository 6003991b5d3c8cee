"""How a vCPU's run ends in an exit, and how the next one begins with the VMM's answer.

An instruction that needs the VMM ends the run by an exception of the emulator, with nothing of it done or all but what
is asked for; this makes an exit of it, and keeps what is to be done with the answer: KVM's ``complete_userspace_io``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from lasskvm.emulator.completion import complete
from lasskvm.emulator.decode import fetch_instruction
from lasskvm.emulator.execution import deliver_fault, resume_instruction
from lasskvm.emulator.faults import DebugReport, GuestFault, Interruption, debug_trap
from lasskvm.emulator.instructions.ports import finish_access
from lasskvm.emulator.instructions.registers import finish_rdmsr
from lasskvm.emulator.linearize import linear_address
from lasskvm.emulator.mmio import MmioReadNeeded
from lasskvm.emulator.msrs import MsrAccessNeeded
from lasskvm.emulator.port_io import PortAccess
from lasskvm.kvm.events import QueuedException
from lasskvm.kvm.exits import DebugExit, Exit, InternalErrorExit, IoExit, MmioExit, MsrExit
from lasskvm.kvm.vcpu_state import StatefulVcpu
from lasskvm.state import RIP
from lasskvm.x86.exceptions import BP, DB, GP
from lasskvm.x86.registers import CS, DR6_BS, DR6_FIXED

if TYPE_CHECKING:
    from lasskvm.kvm.vm import Vm

__all__ = ["ReportingVcpu"]

_INT3_BYTES = 1


class ReportingVcpu(StatefulVcpu):
    """The part of :class:`~lasskvm.kvm.vcpu.Vcpu` that makes exits and takes their answers."""

    def __init__(self, vm: Vm) -> None:
        #: What to do with the VMM's answer to the last exit, before the guest goes on.
        self._complete_userspace_io: Callable[[], None] | None = None
        #: An instruction has been single-stepped, and the VMM has not heard of it yet.
        self._stepped = False
        super().__init__(vm)

    @property
    def is_amid_instruction(self) -> bool:
        """Whether the instruction of the last exit is not complete yet: the next run takes the VMM's answer."""
        return self._complete_userspace_io is not None or bool(self.emulation.mmio.writes)

    def drop_last_exit(self) -> None:
        """Forget what the last exit has left open; the guest goes on as its registers say."""
        self._complete_userspace_io = None
        self._stepped = False
        self.emulation.mmio.writes.clear()

    def _take_answer(self) -> None:
        """Complete the instruction of the last exit, if it is open; raises what executing an instruction does."""
        finish, self._complete_userspace_io = self._complete_userspace_io, None
        if finish is not None:
            finish()
            self._stepped = self.debugger.singlestep
            self.nested.stepped()

    # ------------------------------------------------------------------------------------------- port I/O and MMIO

    def _port_exit(self, access: PortAccess) -> IoExit:
        ones = (1 << 8 * access.size) - 1
        io_exit = IoExit(access.port, access.size, access.write, access.value if access.write else ones)
        self._complete_userspace_io = partial(self._finish_port_io, access, io_exit)
        return io_exit

    def _finish_port_io(self, access: PortAccess, io_exit: IoExit) -> None:
        """Take the VMM's answer. A repeated instruction that is not done yet is executed again for its next element."""
        try:
            finish_access(self.emulation, access, io_exit.data)
            if self.emulation.watch_hits:
                raise debug_trap(self.emulation.watch_hits)
        except GuestFault as fault:
            deliver_fault(self.emulation, fault)

    def _mmio_read_exit(self, needed: MmioReadNeeded) -> MmioExit:
        ones = (1 << 8 * needed.size) - 1
        mmio_exit = MmioExit(needed.gpa, needed.size, write=False, data=ones)
        self._complete_userspace_io = partial(self._finish_mmio_read, mmio_exit)
        return mmio_exit

    def _finish_mmio_read(self, mmio_exit: MmioExit) -> None:
        """Take the VMM's answer, and execute the instruction at RIP once more with it."""
        self.emulation.mmio.answer(mmio_exit.data & (1 << 8 * mmio_exit.size) - 1)
        resume_instruction(self.emulation)

    def _mmio_write_exit(self) -> MmioExit:
        write = self.emulation.mmio.writes.pop(0)
        return MmioExit(write.gpa, write.size, write=True, data=write.value)

    # ------------------------------------------------------------------------------------------------- other exits

    def _msr_exit(self, needed: MsrAccessNeeded) -> MsrExit:
        msr_exit = MsrExit(needed.index, needed.value is not None, needed.value or 0)
        self._complete_userspace_io = partial(self._finish_msr_access, needed, msr_exit)
        return msr_exit

    def _finish_msr_access(self, needed: MsrAccessNeeded, msr_exit: MsrExit) -> None:
        """Take the VMM's answer; its refusal is a #GP(0) for the next entry (``complete_fast_msr()``)."""
        if msr_exit.error:
            self.events.queue_exception(QueuedException(GP, error_code=0))
            return
        try:
            if needed.value is None:
                finish_rdmsr(self.emulation, needed.decoded, msr_exit.data)
            else:
                complete(self.emulation, needed.decoded)
        except GuestFault as fault:
            deliver_fault(self.emulation, fault)

    def _step_exit(self) -> Exit:
        self._stepped = False
        return self._debug_exit(DebugReport(DB, DR6_BS | DR6_FIXED))

    def _debug_exit(self, report: DebugReport) -> DebugExit:
        words = self.state.words
        self.events.instruction_length = _INT3_BYTES if report.vector == BP else 0
        pc = linear_address(words, CS, words[RIP])
        return DebugExit(report.vector, pc, report.dr6, self.debugger.dr7)

    def _internal_error(self, detail: str) -> InternalErrorExit:
        words = self.state.words
        try:
            code = fetch_instruction(self.emulation)
        except Interruption:
            return InternalErrorExit(detail)
        place = self.translate(linear_address(words, CS, words[RIP]))
        instruction = self.vm.memory.read(place.physical_address, code.length) if place.valid else b""
        return InternalErrorExit(detail, instruction=instruction)
