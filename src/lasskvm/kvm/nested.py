"""Nested virtualization of one vCPU: L2 between its VM entry and its VM exit, as the run loop sees it.

What VMX means is in :mod:`lasskvm.vmx`; this connects it with what a vCPU consists of: the emulator and direct
execution, which are told that L2 runs; the event queue, the interrupt chips and the clock, whose events may belong to
L1; and the run loop, which asks :meth:`NestedOperation.boundary` before it lets L2 run, and
:meth:`NestedOperation.exit` when an exception has ended what it did with L2.

Source: KVM's ``vmx_check_nested_events()``, ``nested_vmx_enter_non_root_mode()``, ``__nested_vmx_vmexit()``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NoReturn

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.events import Event, EventKind
from lasskvm.emulator.faults import EptFault, TripleFault, general_protection
from lasskvm.engine import context as c
from lasskvm.engine.engine import Engine
from lasskvm.kvm.clock import Timer, TimerState
from lasskvm.state import EPTP, INTERRUPT_SHADOW, PF_INTERCEPTED, RFLAGS
from lasskvm.vmx.capabilities import VmxCapabilities
from lasskvm.vmx.exit_record import NestedExit, VmExit
from lasskvm.vmx.guest_time import timer_deadline
from lasskvm.vmx.host_state import VmxAborted
from lasskvm.vmx.injection import event_to_deliver, has_pending_monitor_trap, pending_debug_trap
from lasskvm.vmx.instructions import VmxInstructions
from lasskvm.vmx.intercepts_events import L2Event, PendingEvents, interrupt_exit
from lasskvm.vmx.nested import NestedVmx
from lasskvm.vmx.non_root import NonRootOperation, ept_exit
from lasskvm.vmx.repeated_checks import RepeatedChecks
from lasskvm.vmx.transitions import enter_guest, fail_entry, leave_guest
from lasskvm.vmx.vmcs import Vmcs12, set_abort_indicator
from lasskvm.x86 import vmx
from lasskvm.x86.cpuid import CpuidTable, cr4_allowed
from lasskvm.x86.exceptions import DB, NMI
from lasskvm.x86.msr import MSR_IA32_VMX_BASIC, MSR_IA32_VMX_VMFUNC
from lasskvm.x86.registers import RFLAGS_IF
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField

if TYPE_CHECKING:
    from lasskvm.kvm.vcpu_state import StatefulVcpu

__all__ = ["NestedOperation"]

_CAPABILITY_MSRS = range(MSR_IA32_VMX_BASIC, MSR_IA32_VMX_VMFUNC + 1)


class NestedOperation:
    """VMX of one vCPU. ``vmx`` is None while its CPUID does not offer VMX.

    ``run_pending`` says that a VM entry has loaded L2 and not yet delivered what it is to inject
    (``KVM_STATE_NESTED_RUN_PENDING``), ``monitor_trap_pending`` that L2 exits with the monitor trap flag at the next
    boundary (``KVM_STATE_NESTED_MTF_PENDING``).
    """

    def __init__(self, vcpu: StatefulVcpu) -> None:
        self._vcpu = vcpu
        self._words = vcpu.state.words
        self.vmx: NestedVmx | None = None
        self.non_root: NonRootOperation | None = None
        self.run_pending = False
        self.monitor_trap_pending = False
        self._timer: Timer | None = None
        self._capabilities: dict[int, int] = {}
        self._checks = RepeatedChecks()
        #: L2 as it ran last, and the fields that decide what it is like.
        self._last: NonRootOperation | None = None
        self._last_controls: tuple[int, ...] | None = None

    # -------------------------------------------------------------------------------------------------- set-up

    def use_cpuid(self, cpuid: CpuidTable) -> None:
        """Offer VMX, or not, as *cpuid* has it."""
        if not cpuid.has("vmx"):
            self.vmx, self._capabilities = None, {}
            return
        capabilities = VmxCapabilities.of(cpuid, cr4_allowed(cpuid))
        self._capabilities = capabilities.msrs()
        if self.vmx is None:
            self.vmx = NestedVmx(capabilities)
        else:
            self.vmx.capabilities = capabilities

    def attach(self, ctx: Emulation) -> None:
        """Execute VMX instructions in *ctx*, and answer for the capability MSRs."""
        ctx.vmx = None if self.vmx is None else VmxInstructions(self.vmx, self._enter, self._checks)
        ctx.non_root = self.non_root
        for index in _CAPABILITY_MSRS:
            ctx.msrs.attach(
                index,
                partial(self._read_capability, index),
                self._write_capability,
                partial(self._set_capability, index),
            )

    def _read_capability(self, index: int) -> int:
        if index not in self._capabilities:
            raise general_protection()
        return self._capabilities[index]

    def _write_capability(self, value: int) -> None:
        """The registers are read-only."""
        raise general_protection()

    def _set_capability(self, index: int, value: int) -> None:
        """A VMM may say again what is so already."""
        if self._read_capability(index) != value:
            raise general_protection()

    def reset(self) -> None:
        """Power on: outside VMX operation."""
        self._stop_running()
        if self.vmx is not None:
            self.vmx = NestedVmx(self.vmx.capabilities)
            self.attach(self._vcpu.emulation)

    # -------------------------------------------------------------------------------------------- L1 and L2 change

    def _enter(self, ctx: Emulation, launch: bool) -> None:
        """VMLAUNCH and VMRESUME, behind the checks of controls and host state."""
        vmcs, capabilities = self._current, self._offered
        assert self.vmx is not None
        try:
            gpa = self.vmx.current_gpa
            violation = self._checks.guest_state(vmcs, capabilities, ctx.memory, ctx.words, gpa)
            if violation is not None:
                reason, qualification = ExitReason.INVALID_STATE, violation.qualification
                fail_entry(ctx, vmcs, capabilities, reason, qualification)
                return
            if not enter_guest(ctx, vmcs, capabilities):
                return
        except VmxAborted as abort:
            self._abort(abort)
        self.start_running()
        self.run_pending = True
        deadline = timer_deadline(vmcs, capabilities, ctx.read_tsc())
        if deadline is not None:
            self.start_timer(deadline)
        # The run loop has to look at what is to be injected before L2's first instruction.
        self._vcpu.interpreter.stop()

    def start_running(self) -> None:
        """L2 of the current VMCS is in the state words: let everybody know."""
        vmcs = self._current
        assert self.vmx is not None
        self.vmx.in_guest = True
        ctx = self._vcpu.emulation
        self.non_root = ctx.non_root = self._non_root_operation(vmcs)
        uses_ept = self.non_root.secondary & vmx.SECONDARY_EXEC_ENABLE_EPT
        self._words[EPTP] = vmcs[VmcsField.EPT_POINTER] if uses_ept else 0
        self._words[PF_INTERCEPTED] = int(self.non_root.page_faults_may_exit)
        self.monitor_trap_pending = False
        self._vcpu.apply_intercepts()

    def _non_root_operation(self, vmcs: Vmcs12) -> NonRootOperation:
        """L2 of *vmcs*: what the last one was, when the controls are the same."""
        controls = self._checks.controls_and_host
        last = self._last
        if (
            last is not None
            and last.vmcs is vmcs
            and controls is not None
            and self._last_controls is controls
        ):
            last.begin()
            return last
        self._last_controls = controls
        memory = self._vcpu.vm.memory
        self._last = NonRootOperation(vmcs, self._words, memory, trap_is_due=self._vcpu.kick)
        return self._last

    def _stop_running(self) -> int | None:
        """L2 does not run any more; when its preemption timer would have expired, if it has one."""
        if self.vmx is not None:
            self.vmx.in_guest = False
        self.non_root = self._vcpu.emulation.non_root = None
        self._words[EPTP] = self._words[PF_INTERCEPTED] = 0
        self.run_pending = self.monitor_trap_pending = False
        self._vcpu.apply_intercepts()
        self._vcpu.interpreter.stop()
        timer, self._timer = self._timer, None
        if timer is None:
            return None
        timer.cancel()
        return timer.deadline_ns

    def leave(self, record: NestedExit) -> None:
        """A VM exit: L1 goes on at its handler. Raises :class:`TripleFault` when that fails."""
        ctx = self._vcpu.emulation
        ctx.mmio.commit()
        deadline = self._stop_running()
        try:
            leave_guest(ctx, self._current, self._offered, record, timer_deadline=deadline)
        except VmxAborted as abort:
            self._abort(abort)

    def exit(self, end: VmExit | EptFault | TripleFault) -> None:
        """What was done on behalf of L2 has ended in *end*: a VM exit. Raises a triple fault again that is L1's."""
        if isinstance(end, VmExit):
            self.leave(end.record)
        elif isinstance(end, EptFault):
            self.leave(ept_exit(self._words, end))
        elif self.non_root is not None and not isinstance(end, VmxAborted):
            self.leave(NestedExit(ExitReason.TRIPLE_FAULT))
        else:
            raise end

    def _abort(self, abort: VmxAborted) -> NoReturn:
        """A VMX abort leaves its indicator in the VMCS region, and the processor in shutdown."""
        assert self.vmx is not None
        set_abort_indicator(self._vcpu.vm.memory, self.vmx.current_gpa, abort.indicator)
        raise abort

    @property
    def _current(self) -> Vmcs12:
        assert self.vmx is not None
        assert self.vmx.current is not None
        return self.vmx.current

    @property
    def _offered(self) -> VmxCapabilities:
        assert self.vmx is not None
        return self.vmx.capabilities

    # ------------------------------------------------------------------------------------------------ while L2 runs

    def start_timer(self, deadline: int) -> None:
        """Let the preemption timer expire at *deadline*, a tick of ``Emulation.read_tsc``."""
        self._timer = self._vcpu.vm.clock.call_at(deadline, self._vcpu.kick)

    def restore_timer(self, state: TimerState) -> None:
        """Let the preemption timer of a saved vCPU run again: :attr:`timer_state`."""
        self._timer = self._vcpu.vm.clock.restore(state, self._vcpu.kick)

    @property
    def timer_state(self) -> TimerState | None:
        """The preemption timer for snapshots, if it runs or has expired."""
        return None if self._timer is None else self._timer.state

    @property
    def preemption_deadline(self) -> int | None:
        """When the preemption timer expires, if it runs."""
        return None if self._timer is None else self._timer.deadline_ns

    @property
    def _timer_has_expired(self) -> bool:
        """Whether its time has come. That may be now, after the clock was last asked for what is due."""
        deadline = self.preemption_deadline
        return deadline is not None and deadline <= self._vcpu.vm.clock.now()

    @property
    def blocks_init(self) -> bool:
        """Whether INIT signals have to wait: in VMX root operation. In L2 they cause VM exits."""
        return self.vmx is not None and self.vmx.in_vmx_operation

    @property
    def is_stepping(self) -> bool:
        """Whether L2 is to execute one instruction and no more: for the monitor trap flag, or while a shadow hides
        something that waits for its end."""
        if self.non_root is None:
            return False
        primary = self.non_root.primary
        if primary & vmx.CPU_BASED_MONITOR_TRAP_FLAG:
            return True
        waiting = self._vcpu.events.nmi_pending or primary & vmx.CPU_BASED_NMI_WINDOW_EXITING
        return bool(waiting and self._words[INTERRUPT_SHADOW])

    @property
    def wants_nmi_window(self) -> bool:
        """Whether L1 wants to know when L2 can take an NMI."""
        return self.non_root is not None and bool(self.non_root.primary & vmx.CPU_BASED_NMI_WINDOW_EXITING)

    @property
    def is_awaited(self) -> bool:
        """Whether L1 takes a halted L2 back, whatever L2's RFLAGS.IF says: when an interrupt or the timer comes."""
        if self.non_root is None:
            return False
        exits = vmx.PIN_BASED_EXT_INTR_MASK | vmx.PIN_BASED_VMX_PREEMPTION_TIMER
        return bool(self.non_root.pin_based & exits)

    def stepped(self) -> None:
        """L2 has executed an instruction by itself."""
        if self.non_root is not None and self.non_root.primary & vmx.CPU_BASED_MONITOR_TRAP_FLAG:
            self.monitor_trap_pending = True

    def boundary(self) -> bool:
        """L2 is between two instructions: deliver what is due, or raise :class:`VmExit`.

        Returns whether the run loop has to come back as soon as L2 can take an interrupt.
        """
        vcpu, words = self._vcpu, self._words
        assert self.non_root is not None
        if self.run_pending:
            self.run_pending = False
            self._deliver_entry_events()
        if self.non_root.trap_exit is not None:
            raise VmExit(self.non_root.trap_exit)
        vcpu.deliver_queued_exceptions()
        vmcs = self._current
        while True:
            has_interrupt = vcpu.has_interrupt()
            pending = PendingEvents(
                init=vcpu.init_pending,
                monitor_trap=self.monitor_trap_pending,
                preemption_timer=self._timer_has_expired,
                nmi=vcpu.events.nmi_pending,
                interrupt=has_interrupt,
            )
            due = interrupt_exit(words, vmcs, pending, vcpu.acknowledge_interrupt)
            if isinstance(due, NestedExit):
                self._take_event_of(due)
                raise VmExit(due)
            if due is L2Event.NMI:
                vcpu.events.nmi_pending = False
                vcpu.deliver(Event(NMI, EventKind.NMI))
            elif due is L2Event.INTERRUPT:
                vcpu.deliver(Event(vcpu.acknowledge_interrupt(), EventKind.EXTERNAL))
            else:
                break
        blocked = not words[RFLAGS] & RFLAGS_IF or words[INTERRUPT_SHADOW]
        waiting = has_interrupt or self.non_root.primary & vmx.CPU_BASED_INTR_WINDOW_EXITING
        return bool(blocked and waiting)

    def _deliver_entry_events(self) -> None:
        """What the VM entry has brought along for L2 (27.6, 27.7.3)."""
        vmcs, words = self._current, self._words
        event = event_to_deliver(vmcs, words)
        if event is not None:
            self._vcpu.deliver(event, injected=True)
            self.stepped()
        elif has_pending_monitor_trap(vmcs):
            self.monitor_trap_pending = True
        elif bits := pending_debug_trap(vmcs):
            self._vcpu.deliver(Event(DB, dr6=bits))
            self.stepped()

    def _take_event_of(self, record: NestedExit) -> None:
        """What has caused the exit *record* is not pending any more, or waits for L1."""
        if record.reason is ExitReason.EXTERNAL_INTERRUPT:
            self._vcpu.events.hold_interrupt()
        elif record.reason is ExitReason.INIT_SIGNAL:
            self._vcpu.init_pending = False
        elif record.reason is ExitReason.EXCEPTION_NMI:
            self._vcpu.events.nmi_pending = False

    # ----------------------------------------------------------------------------------------- direct execution

    def equip(self, engine: Engine, kinds: int) -> None:
        """Tell *engine* what L2 may not do natively, beside *kinds*, what the guest may not in any case."""
        if self.non_root is None:
            engine.leave_to_emulator(kinds)
            return
        primary, secondary = self.non_root.primary, self.non_root.secondary
        kinds |= c.LEAVE_MSRS | c.LEAVE_PORTS
        if primary & vmx.CPU_BASED_CR3_LOAD_EXITING:
            kinds |= c.LEAVE_CR3
        if primary & vmx.CPU_BASED_RDTSC_EXITING:
            kinds |= c.LEAVE_RDTSC | c.LEAVE_RDTSCP
        if not secondary & vmx.SECONDARY_EXEC_ENABLE_RDTSCP:
            kinds |= c.LEAVE_RDTSCP | c.LEAVE_RDPID
        engine.leave_to_emulator(
            kinds,
            cr3_reads=bool(primary & vmx.CPU_BASED_CR3_STORE_EXITING),
            pauses=bool(primary & vmx.CPU_BASED_PAUSE_EXITING),
        )
