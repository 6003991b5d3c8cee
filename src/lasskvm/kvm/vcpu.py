"""A virtual processor: the run loop; KVM's vCPU file descriptor.

:meth:`Vcpu.run` is ``KVM_RUN``: it enters direct execution again and again, deals with what KVM would deal with in the
kernel (:mod:`lasskvm.kvm.exit_handlers`), injects events, and returns what only the VMM can answer. The vCPU's state,
which the other ioctls get and set, is in :mod:`lasskvm.kvm.vcpu_state`.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from lasskvm.emulator import port_io
from lasskvm.emulator.completion import complete
from lasskvm.emulator.decode import fetch_instruction
from lasskvm.emulator.events import Event, EventKind, deliver_event
from lasskvm.emulator.execution import deliver_fault, emulate_instruction
from lasskvm.emulator.faults import DebugReport, GuestFault, TripleFault, Unhandleable
from lasskvm.emulator.instructions.registers import finish_rdmsr
from lasskvm.emulator.linearize import linear_address
from lasskvm.emulator.mmio import MmioReadNeeded
from lasskvm.emulator.msrs import MsrAccessNeeded, guest_tsc
from lasskvm.emulator.port_io import PortAccess, PortAccessNeeded
from lasskvm.engine import context as c
from lasskvm.engine.engine import EngineExit
from lasskvm.kvm.clock import NANOSECONDS_PER_BLOCK, VirtualClock
from lasskvm.kvm.emulation_required import emulation_required
from lasskvm.kvm.events import EntryFailed, QueuedException
from lasskvm.kvm.exit_handlers import handle_exit
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
)
from lasskvm.kvm.vcpu_state import StatefulVcpu
from lasskvm.state import INTERRUPT_SHADOW, NMI_BLOCKED, RFLAGS, RIP, TLB_FLUSH
from lasskvm.x86.exceptions import BP, DB, GP, NMI
from lasskvm.x86.registers import CS, DR6_BS, DR6_FIXED, RFLAGS_IF

if TYPE_CHECKING:
    from lasskvm.kvm.vm import Vm

__all__ = ["CHECKPOINT_NS", "Vcpu"]

#: A run returns to the VMM at least this often, so that it can look at its console and its timeouts. All but the host's
#: time are counts of what the guest does, so that a deterministic run stays one.
_SLICE_BLOCKS = 2_000_000
_SLICE_INTERPRETED_BLOCKS = 10_000
_SLICE_EXITS = 1_000
_SLICE_PORT_ACCESSES = 5_000
_SLICE_NS = 20_000_000
#: How often the host's clock is asked while the guest follows it.
_HOST_POLL_BLOCKS = 2_000
_HOST_POLL_INTERPRETED_BLOCKS = 500
#: Idle periods that one run skips on the virtual clock before the VMM gets its turn.
_IDLE_SKIPS = 64
#: How much time of the virtual clock is between two checkpoints.
CHECKPOINT_NS = 100_000_000
_INT3_BYTES = 1


class Vcpu(StatefulVcpu):
    """The vCPU of a :class:`~lasskvm.kvm.vm.Vm`; made by ``Vm.create_vcpu()``."""

    def __init__(self, vm: Vm) -> None:
        #: ``kvm_run.immediate_exit``: while it is set, runs only complete what the last exit began.
        self.immediate_exit = False
        #: Whether the emulator ran last: the two paths keep translations of their own.
        self._interpreted = False
        #: What to do with the VMM's answer to the last exit, before the guest goes on.
        self._complete_userspace_io: Callable[[], None] | None = None
        #: An instruction has been single-stepped, and the VMM has not heard of it yet.
        self._stepped = False
        #: What the engine's deadline and time stamp were computed from.
        self._programmed: tuple[int | None, int, int, int, int] | None = None
        self._closed = False
        #: Blocks that were executed before the snapshot that this vCPU was loaded from.
        self.blocks_before = 0
        #: When the next checkpoint is due, on the virtual clock.
        self.next_checkpoint_ns = CHECKPOINT_NS
        #: Whether the last run ended at a checkpoint.
        self.at_checkpoint = False
        super().__init__(vm)

    @property
    def executed_blocks(self) -> int:
        """Blocks of guest code executed so far: what the virtual clock counts."""
        direct = 0 if self._engine is None else self._engine.blocks
        return self.blocks_before + direct + self.interpreter.blocks

    def counters(self) -> dict[str, int]:
        """How often what happened, by name."""
        direct = {} if self._engine is None else self._engine.counters()
        return {**direct, "interpreted_instructions": self.interpreter.instructions}

    @property
    def is_amid_instruction(self) -> bool:
        """Whether the instruction of the last exit is not complete yet: the next run takes the VMM's answer."""
        return self._complete_userspace_io is not None or bool(self.emulation.mmio.writes)

    def reset(self) -> None:
        """The state after INIT: registers as at power-on, nothing pending. CPUID and the time-stamp counter stay."""
        self.state.reset()
        self._complete_userspace_io = None
        self._stepped = False
        self.emulation.mmio.writes.clear()
        self.events.clear()
        self.emulation.halted = False

    def forget_caches(self) -> None:
        """Go on as a vCPU does that has just been loaded: translations and the emulator's code are found anew.

        What direct execution has translated stays: it depends on nothing but the code.
        """
        self.state.words[TLB_FLUSH] = 1
        self.interpreter.forget_code()

    def close(self) -> None:
        """Let go of the translator; the vCPU cannot run any more."""
        self._closed = True
        self._engine = None

    # ------------------------------------------------------------------------------------------------ running

    def run(self) -> Exit:
        """``KVM_RUN``: execute the guest until something needs the VMM.

        Whatever the guest does, the result is one of the exits of :mod:`lasskvm.kvm.exits`.
        """
        if self._closed:
            raise OSError(errno.EBADF, "KVM_RUN: the vCPU has been closed")
        self.has_run = True
        self.at_checkpoint = False
        self.debugger.enter()
        try:
            finish, self._complete_userspace_io = self._complete_userspace_io, None
            if finish is not None:
                finish()
                self._stepped = self.debugger.singlestep
            return self._run()
        except PortAccessNeeded as needed:
            return self._port_exit(needed.access)
        except MmioReadNeeded as needed:
            return self._mmio_read_exit(needed)
        except MsrAccessNeeded as needed:
            return self._msr_exit(needed)
        except DebugReport as report:
            return self._debug_exit(report)
        except EntryFailed as failure:
            return FailEntryExit(failure.reason)
        except TripleFault:
            return ShutdownExit()
        except Unhandleable as error:
            return self._internal_error(str(error))
        finally:
            self.debugger.leave()

    def _run(self) -> Exit:
        virtual = isinstance(self.vm.clock, VirtualClock)
        slice_end = self._slice_end()
        interpreted_end = self.interpreter.blocks + _SLICE_INTERPRETED_BLOCKS
        if self.vm.engine == "jit":
            self.engine.port_accesses_left = _SLICE_PORT_ACCESSES
        skips = 0
        for _ in range(_SLICE_EXITS):
            if self.emulation.mmio.writes:
                return self._mmio_write_exit()
            if self._stepped:
                return self._step_exit()
            if self.immediate_exit:
                return IntrExit()
            self.vm.clock.run_due()
            wanted = self._inject_events()
            if self.emulation.halted:
                idle = self._idle(skips)
                if idle is not None:
                    return idle
                skips += 1
                slice_end = min(slice_end, self._slice_end())
            elif self.debugger.singlestep:
                self._single_step()
            elif self._is_interpreted():
                self._interpret(min(interpreted_end, self._interpreted_blocks_at(slice_end)), wanted)
            else:
                self._execute(slice_end, wanted)
            if (self.executed_blocks if virtual else time.monotonic_ns()) >= slice_end:
                break
            if self.interpreter.blocks >= interpreted_end or self._port_accesses_are_used_up():
                break
        return self._end_of_slice()

    def _slice_end(self) -> int:
        """When the run has to return to the VMM: a number of executed blocks, or the host's time."""
        clock = self.vm.clock
        if not isinstance(clock, VirtualClock):
            return time.monotonic_ns() + _SLICE_NS
        return self.executed_blocks + min(_SLICE_BLOCKS, clock.blocks_until(self.next_checkpoint_ns))

    def _end_of_slice(self) -> Exit:
        """Return to the VMM, from a checkpoint when one is due.

        At a checkpoint every cache is empty that a vCPU loaded from a snapshot has to start without, so that the two
        go on alike: a translation that the guest has not asked to be forgotten is forgotten at the same time.
        """
        clock = self.vm.clock
        if isinstance(clock, VirtualClock) and clock.now() >= self.next_checkpoint_ns:
            self.next_checkpoint_ns = (clock.now() // CHECKPOINT_NS + 1) * CHECKPOINT_NS
            self.forget_caches()
            self.at_checkpoint = True
        return IntrExit()

    def _interpreted_blocks_at(self, slice_end: int) -> int:
        """The interpreter's count of blocks at the end of a slice, if it runs until then."""
        if not isinstance(self.vm.clock, VirtualClock):
            return self.interpreter.blocks + _SLICE_INTERPRETED_BLOCKS
        return self.interpreter.blocks + slice_end - self.executed_blocks

    def _port_accesses_are_used_up(self) -> bool:
        return self._engine is not None and not self._engine.port_accesses_left

    def _is_interpreted(self) -> bool:
        return self.vm.engine == "emulator" or emulation_required(self.state.words)

    def _enter_interpreter(self) -> None:
        if not self._interpreted:
            self._interpreted = True
            self.interpreter.forget_translations()

    def _interpret(self, end: int, wanted: bool) -> None:
        """Let the emulator run the guest, up to block *end* of the interpreter or until it need not."""
        interpreter, clock = self.interpreter, self.vm.clock
        self._enter_interpreter()
        blocks = end - interpreter.blocks
        deadline = clock.next_deadline()
        if isinstance(clock, VirtualClock):
            if deadline is not None:
                blocks = min(blocks, clock.blocks_until(deadline))
        else:
            blocks = min(blocks, _HOST_POLL_INTERPRETED_BLOCKS)
        interpreter.want_interrupt_window = wanted
        interpreter.run(max(1, blocks), self._is_interpreted)

    def _single_step(self) -> None:
        """Execute one instruction for the VMM's debugger."""
        self._enter_interpreter()
        self.interpreter.step()
        self._stepped = True

    def _execute(self, slice_end: int, wanted: bool) -> None:
        """Let direct execution run the guest, and deal with its exit."""
        if self._interpreted:
            self._interpreted = False
            self.state.words[TLB_FLUSH] = 1
        engine = self.engine
        engine.want_interrupt_window(wanted)
        self._set_deadline(slice_end)
        if self.debugger.has_breakpoints:
            self.debugger.note_dr6()
        engine_exit = engine.run()
        if engine_exit.reason == c.EXIT_PORT_IO:
            self._begin_port_io()
        elif engine_exit.reason not in (c.EXIT_STOPPED, c.EXIT_INTERRUPT_WINDOW):
            handle_exit(self, engine_exit)

    def _set_deadline(self, slice_end: int) -> None:
        """Tell direct execution when to stop and what RDTSC gives; only when something about them has changed."""
        clock, engine = self.vm.clock, self.engine
        deadline = clock.next_deadline()
        skipped = clock.skipped_ns if isinstance(clock, VirtualClock) else 0
        programmed = deadline, slice_end, skipped, self.emulation.msrs.tsc_offset, self.interpreter.blocks
        if programmed == self._programmed:
            return
        self._programmed = programmed
        if isinstance(clock, VirtualClock):
            blocks = max(1, slice_end - self.executed_blocks)
            if deadline is not None:
                blocks = min(blocks, clock.blocks_until(deadline))
            engine.stop_after(blocks)
        else:
            host_end = slice_end
            if deadline is not None:
                host_end = min(slice_end, time.monotonic_ns() + deadline - clock.now())
            engine.stop_at_host_time(host_end, _HOST_POLL_BLOCKS)
        engine.set_time_stamp(guest_tsc(self.emulation), NANOSECONDS_PER_BLOCK)

    # ------------------------------------------------------------------------------------------------ events

    def _inject_events(self) -> bool:
        """Deliver what is queued, then an NMI or an external interrupt if the guest takes it now.

        Returns whether another interrupt waits for a window in which the guest takes it.
        """
        words, events = self.state.words, self.events
        while events.waiting:
            event = events.next_event()
            if event is not None:
                self._deliver(event)
        if events.nmi_pending and not words[NMI_BLOCKED] and not words[INTERRUPT_SHADOW]:
            events.nmi_pending = False
            self._deliver(Event(NMI, EventKind.NMI))
        pic = self.vm.pic
        pending = pic is not None and pic.pending()
        if pending and words[RFLAGS] & RFLAGS_IF and not words[INTERRUPT_SHADOW]:
            assert pic is not None
            self._deliver(Event(pic.acknowledge(), EventKind.EXTERNAL))
            pending = pic.pending()
        return pending

    def _deliver(self, event: Event) -> None:
        self.emulation.halted = False
        deliver_event(self.state.words, self.vm.memory, event)

    def _idle(self, skips: int) -> Exit | None:
        """Pass the time of a halted guest; an exit when the VMM has to."""
        interrupts_enabled = bool(self.state.words[RFLAGS] & RFLAGS_IF)
        if self.vm.pic is None:
            # Without an irqchip the VMM decides what wakes the guest: the next run goes on behind HLT.
            self.emulation.halted = False
            return HltExit(interrupts_enabled)
        if not interrupts_enabled:
            return HltExit(interrupts_enabled)
        clock = self.vm.clock
        deadline = clock.next_deadline()
        if not isinstance(clock, VirtualClock) or deadline is None:
            return IntrExit(idle=True, idle_until_ns=deadline)
        if clock.now() >= self.next_checkpoint_ns or skips >= _IDLE_SKIPS:
            return self._end_of_slice()
        clock.skip_to(deadline)
        return None

    # ------------------------------------------------------------------------------------------- port I/O and MMIO

    def _begin_port_io(self) -> None:
        """The port instruction at RIP has left direct execution, which has checked its permission."""
        try:
            access = port_io.begin(self.emulation)
        except GuestFault as fault:
            deliver_fault(self.emulation, fault)
        else:
            raise PortAccessNeeded(access)

    def _port_exit(self, access: PortAccess) -> IoExit:
        ones = (1 << 8 * access.size) - 1
        io_exit = IoExit(access.port, access.size, access.write, access.value if access.write else ones)
        self._complete_userspace_io = partial(self._finish_port_io, access, io_exit)
        return io_exit

    def _finish_port_io(self, access: PortAccess, io_exit: IoExit) -> None:
        """Take the VMM's answer. A repeated instruction that is not done yet is executed again for its next element."""
        try:
            if port_io.finish_element(self.emulation, access, io_exit.data):
                complete(self.emulation, access.decoded)
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
        emulate_instruction(self.emulation)

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
        except GuestFault:
            return InternalErrorExit(detail)
        place = self.translate(linear_address(words, CS, words[RIP]))
        instruction = self.vm.memory.read(place.physical_address, code.length) if place.valid else b""
        return InternalErrorExit(detail, instruction=instruction)

    def run_until(self, linear: int) -> EngineExit:
        """Direct execution up to the instruction at *linear*, for the handling of an exit."""
        if self.debugger.has_breakpoints:
            self.debugger.note_dr6()
        return self.engine.run_until(linear)
