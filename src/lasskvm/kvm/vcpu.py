"""A virtual processor: the run loop; KVM's vCPU file descriptor.

:meth:`Vcpu.run` is ``KVM_RUN``: it enters direct execution again and again, deals with what KVM would deal with in the
kernel (:mod:`lasskvm.kvm.exit_handlers`), injects events, and returns what only the VMM can answer
(:mod:`lasskvm.kvm.vcpu_exits`). The vCPU's state, which the other ioctls get and set, is in
:mod:`lasskvm.kvm.vcpu_state`.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING

from lasskvm.emulator.events import Event, EventKind
from lasskvm.emulator.execution import emulate_instruction
from lasskvm.emulator.faults import DebugReport, EptFault, TripleFault, Unhandleable
from lasskvm.emulator.mmio import MmioReadNeeded
from lasskvm.emulator.msrs import MsrAccessNeeded, visible_tsc, visible_tsc_offset
from lasskvm.emulator.port_io import PortAccessNeeded
from lasskvm.engine import context as c
from lasskvm.engine.engine import EngineExit
from lasskvm.kvm.clock import NANOSECONDS_PER_BLOCK, VirtualClock
from lasskvm.kvm.emulation_required import emulation_required
from lasskvm.kvm.events import EntryFailed
from lasskvm.kvm.exit_handlers import handle_exit
from lasskvm.kvm.exits import (
    Exit,
    FailEntryExit,
    HltExit,
    IntrExit,
    ShutdownExit,
)
from lasskvm.kvm.vcpu_exits import ReportingVcpu
from lasskvm.state import (
    APIC_BASE,
    CR0,
    CSTAR,
    INTERRUPT_SHADOW,
    KERNEL_GS_BASE,
    LSTAR,
    MISC_ENABLE,
    NMI_BLOCKED,
    PAT,
    PKRS,
    PKRU,
    RDX,
    RFLAGS,
    SFMASK,
    STAR,
    SYSENTER_CS,
    SYSENTER_EIP,
    SYSENTER_ESP,
    TLB_FLUSH,
    TSC_AUX,
    XCR0,
)
from lasskvm.vmx.exit_record import VmExit
from lasskvm.x86.cpuid import EAX, LEAF_FEATURES
from lasskvm.x86.exceptions import NMI
from lasskvm.x86.registers import CR0_CD, CR0_NW, RFLAGS_IF

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
#: The state words that INIT leaves alone.
_KEPT_BY_INIT = (
    STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE, TSC_AUX, SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP, PAT, APIC_BASE,
    MISC_ENABLE, XCR0, PKRU, PKRS,
)  # fmt: skip
#: Idle periods that one run skips on the virtual clock before the VMM gets its turn.
_IDLE_SKIPS = 64
#: How much time of the virtual clock is between two checkpoints.
CHECKPOINT_NS = 100_000_000


class Vcpu(ReportingVcpu):
    """The vCPU of a :class:`~lasskvm.kvm.vm.Vm`; made by ``Vm.create_vcpu()``."""

    def __init__(self, vm: Vm) -> None:
        self._immediate_exit = False
        #: Whether the emulator ran last: the two paths keep translations of their own.
        self._interpreted = False
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
    def immediate_exit(self) -> bool:
        """``kvm_run.immediate_exit``: while it is set, runs only complete what the last exit began."""
        return self._immediate_exit

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        """Set or clear it; a run in progress ends behind the current block."""
        self._immediate_exit = value
        if value:
            self.kick()

    @property
    def executed_blocks(self) -> int:
        """Blocks of guest code executed so far: what the virtual clock counts."""
        direct = 0 if self._engine is None else self._engine.blocks
        return self.blocks_before + direct + self.interpreter.blocks

    def counters(self) -> dict[str, int]:
        """How often what happened, by name."""
        direct = {} if self._engine is None else self._engine.counters()
        return {**direct, "interpreted_instructions": self.interpreter.instructions}

    def reset(self) -> None:
        """Registers as at power-on, nothing pending. CPUID, the time-stamp counter and other MSRs stay."""
        self.state.reset()
        self._drop_what_is_pending()
        self.devices.reset()
        self.nested.reset()

    def _drop_what_is_pending(self) -> None:
        self.drop_last_exit()
        self.events.clear()
        self.emulation.halted = self._waits_for_startup = self.init_pending = False

    def _take_init(self) -> None:
        """Start anew at the reset vector; MSRs, FPU and cache control stay (SDM volume 3A, table 10-1)."""
        words = self.state.words
        kept = {index: words[index] for index in _KEPT_BY_INIT}
        cache_control = words[CR0] & (CR0_CD | CR0_NW)
        self.state.reset()
        for index, value in kept.items():
            words[index] = value
        words[CR0] = words[CR0] & ~(CR0_CD | CR0_NW) | cache_control
        words[RDX] = self.cpuid.word(LEAF_FEATURES, 0, EAX)
        self._drop_what_is_pending()
        if self.devices.lapic is not None:
            self.devices.lapic.init_reset()

    def forget_caches(self) -> None:
        """Go on as a vCPU does that has just been loaded: translations and the emulator's code are found anew.

        What direct execution has translated stays: it depends on nothing but the code.
        """
        self.state.words[TLB_FLUSH] = 1
        self.interpreter.forget_code()

    def close(self) -> None:
        """Let the vCPU run no more."""
        self._closed = True

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
            try:
                self._take_answer()
            except (VmExit, EptFault, TripleFault) as end:
                self.nested.exit(end)
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
        is_late = self._checkpoint_is_due()
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
            if self.init_pending and not self.nested.blocks_init:
                self._take_init()
            if self._immediate_exit:
                return IntrExit()
            if is_late:
                return self._end_of_slice()
            self.vm.clock.run_due()
            if self.init_pending and not self.nested.blocks_init:
                continue
            try:
                wanted = self._inject_events()
                if self.emulation.halted or self._waits_for_startup:
                    idle = self._idle(skips)
                    if idle is not None:
                        return idle
                    skips += 1
                    slice_end = min(slice_end, self._slice_end())
                elif self.debugger.singlestep:
                    self._stepped = True
                    self._step()
                elif self.nested.is_stepping:
                    self._step()
                elif self._is_interpreted():
                    self._interpret(min(interpreted_end, self._interpreted_blocks_at(slice_end)), wanted)
                else:
                    self._execute(slice_end, wanted)
            except (VmExit, EptFault, TripleFault) as end:
                self.nested.exit(end)
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
        if self._checkpoint_is_due():
            self.next_checkpoint_ns = (self.vm.clock.now() // CHECKPOINT_NS + 1) * CHECKPOINT_NS
            self.forget_caches()
            self.at_checkpoint = True
        return IntrExit()

    def _checkpoint_is_due(self) -> bool:
        clock = self.vm.clock
        return isinstance(clock, VirtualClock) and clock.now() >= self.next_checkpoint_ns

    def _interpreted_blocks_at(self, slice_end: int) -> int:
        """The interpreter's count of blocks at the end of a slice, if it runs until then."""
        if not isinstance(self.vm.clock, VirtualClock):
            return self.interpreter.blocks + _SLICE_INTERPRETED_BLOCKS
        return self.interpreter.blocks + slice_end - self.executed_blocks

    def _port_accesses_are_used_up(self) -> bool:
        return self._engine is not None and not self._engine.port_accesses_left

    def _is_interpreted(self) -> bool:
        return self.vm.engine == "emulator" or emulation_required(self.state.words)

    def _may_go_on_interpreting(self) -> bool:
        """Whether the interpreter may: VMXOFF lets an INIT signal through that has waited for it."""
        return self._is_interpreted() and not (self.init_pending and not self.nested.blocks_init)

    def _enter_interpreter(self) -> None:
        if not self._interpreted:
            self._interpreted = True
            self.interpreter.forget_translations()

    def _interpret(self, end: int, wanted: bool) -> None:
        """Let the emulator run the guest, up to block *end* of the interpreter or until it need not."""
        interpreter, clock = self.interpreter, self.vm.clock
        self._enter_interpreter()
        self.emulation.stepping = False
        blocks = end - interpreter.blocks
        deadline = clock.next_deadline()
        if isinstance(clock, VirtualClock):
            if deadline is not None:
                blocks = min(blocks, clock.blocks_until(deadline))
        else:
            blocks = min(blocks, _HOST_POLL_INTERPRETED_BLOCKS)
        interpreter.want_interrupt_window = wanted
        interpreter.want_nmi_window = self.events.nmi_pending or self.nested.wants_nmi_window
        interpreter.run(max(1, blocks), self._may_go_on_interpreting)

    def _step(self) -> None:
        """Execute one instruction: for the VMM's debugger, or for a hypervisor that traps each one."""
        self._enter_interpreter()
        self.emulation.stepping = True
        self.interpreter.step()
        self.nested.stepped()

    def _execute(self, slice_end: int, wanted: bool) -> None:
        """Let direct execution run the guest, and deal with its exit."""
        if self._interpreted:
            self._interpreted = self.emulation.stepping = False
            self.state.words[TLB_FLUSH] = 1
        engine = self.engine
        engine.want_interrupt_window(wanted)
        self._set_deadline(slice_end)
        if self.debugger.has_breakpoints:
            self.debugger.note_dr6()
        engine_exit = engine.run()
        if engine_exit.reason == c.EXIT_PORT_IO:
            emulate_instruction(self.emulation)
        elif engine_exit.reason not in (c.EXIT_STOPPED, c.EXIT_INTERRUPT_WINDOW):
            handle_exit(self, engine_exit)

    def _set_deadline(self, slice_end: int) -> None:
        """Tell direct execution when to stop and what RDTSC gives; only when something about them has changed."""
        clock, engine = self.vm.clock, self.engine
        deadline = clock.next_deadline()
        skipped = clock.skipped_ns if isinstance(clock, VirtualClock) else 0
        offset = visible_tsc_offset(self.emulation)
        programmed = deadline, slice_end, skipped, offset, self.interpreter.blocks
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
        engine.set_time_stamp(visible_tsc(self.emulation), NANOSECONDS_PER_BLOCK)

    # ------------------------------------------------------------------------------------------------ events

    def _inject_events(self) -> bool:
        """Deliver what is queued, then an NMI or an external interrupt if the guest takes it now.

        Returns whether another interrupt waits for a window in which the guest takes it.
        """
        if self.nested.non_root is not None:
            return self.nested.boundary()
        words, events = self.state.words, self.events
        events.waiting |= events.interrupt_is_held
        while events.waiting:
            event = events.next_event()
            if event is not None:
                self.deliver(event)
        if events.nmi_pending and not words[NMI_BLOCKED] and not words[INTERRUPT_SHADOW]:
            events.nmi_pending = False
            self.deliver(Event(NMI, EventKind.NMI))
        chips = self.vm.irqchip
        if chips is None or not chips.has_interrupt():
            return events.interrupt_is_held
        if not words[RFLAGS] & RFLAGS_IF or words[INTERRUPT_SHADOW]:
            return True
        self.deliver(Event(chips.acknowledge(), EventKind.EXTERNAL))
        return chips.has_interrupt()

    def _idle(self, skips: int) -> Exit | None:
        """Pass the time of a halted guest; an exit when the VMM has to."""
        interrupts_enabled = bool(self.state.words[RFLAGS] & RFLAGS_IF) or self.nested.is_awaited
        if self.vm.irqchip is None:
            # Without an irqchip the VMM decides what wakes the guest: the next run goes on behind HLT.
            self.emulation.halted = False
            return HltExit(interrupts_enabled)
        if not interrupts_enabled and not self._waits_for_startup:
            return HltExit(interrupts_enabled)
        clock = self.vm.clock
        deadline = clock.next_deadline()
        if not isinstance(clock, VirtualClock) or deadline is None:
            return IntrExit(idle=True, idle_until_ns=deadline)
        if self._checkpoint_is_due() or skips >= _IDLE_SKIPS:
            return self._end_of_slice()
        clock.skip_to(deadline)
        return None

    def run_until(self, linear: int) -> EngineExit:
        """Direct execution up to the instruction at *linear*, for the handling of an exit."""
        if self.debugger.has_breakpoints:
            self.debugger.note_dr6()
        return self.engine.run_until(linear)
