"""A virtual processor: registers, CPUID, MSRs, and the run loop; KVM's vCPU file descriptor.

:meth:`Vcpu.run` is ``KVM_RUN``: it enters direct execution again and again, deals with what KVM would deal with in the
kernel (:mod:`lasskvm.kvm.exit_handlers`), injects interrupts, and returns what only the VMM can answer.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.control import load_pdptes
from lasskvm.emulator.decode import fetch_instruction
from lasskvm.emulator.events import Event, EventKind, deliver_event
from lasskvm.emulator.execution import deliver_fault, emulate_instruction, resume_instruction
from lasskvm.emulator.faults import GuestFault, TripleFault, Unhandleable, debug_trap
from lasskvm.emulator.instructions.ports import finish_access
from lasskvm.emulator.interpreter import Interpreter
from lasskvm.emulator.mmio import MmioReadNeeded
from lasskvm.emulator.mmu import translate
from lasskvm.emulator.msrs import MsrFile, guest_tsc, read_msr, write_msr
from lasskvm.emulator.port_io import PortAccess, PortAccessNeeded
from lasskvm.engine import context as c
from lasskvm.engine.engine import Engine
from lasskvm.engine.fpu_access import FpuAccess
from lasskvm.kvm import registers
from lasskvm.kvm.clock import NANOSECONDS_PER_BLOCK, VirtualClock
from lasskvm.kvm.emulation_required import emulation_required
from lasskvm.kvm.exit_handlers import handle_exit
from lasskvm.kvm.exits import Exit, HltExit, InternalErrorExit, IntrExit, IoExit, MmioExit, ShutdownExit
from lasskvm.kvm.structures import Regs, Sregs
from lasskvm.state import (
    CR4_ALLOWED,
    EFER_ALLOWED,
    INTERRUPT_SHADOW,
    MAXPHYADDR,
    NMI_BLOCKED,
    RFLAGS,
    RIP,
    TLB_FLUSH,
    VcpuState,
)
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import (
    FEATURE_WORDS,
    CpuidEntry,
    CpuidTable,
    cr4_allowed,
    efer_allowed,
    feature_word,
)
from lasskvm.x86.exceptions import NMI
from lasskvm.x86.registers import CR0_PG, CR4_PAE, EFER_LMA, RFLAGS_IF

if TYPE_CHECKING:
    from lasskvm.kvm.vm import Vm

__all__ = ["Vcpu"]

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


class Vcpu:
    """The vCPU of a :class:`~lasskvm.kvm.vm.Vm`; made by ``Vm.create_vcpu()``.

    Its CPUID is that of the CPU model ``max`` until :meth:`set_cpuid2` says otherwise.
    """

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.state = VcpuState()
        self._ran = False
        self._engine: Engine | None = None
        #: Whether the emulator ran last: the two paths keep translations of their own.
        self._interpreted = False
        #: What to do with the VMM's answer to the last exit, before the guest goes on.
        self._complete_userspace_io: Callable[[], None] | None = None
        self._nmi_pending = False
        #: What the engine's deadline and time stamp were computed from.
        self._programmed: tuple[int | None, int, int, int, int] | None = None
        self._use_cpuid(CpuidTable(parse_cpu("max").entries()))

    # ---------------------------------------------------------------------------------------- configuration

    def set_cpuid2(self, entries: Iterable[CpuidEntry]) -> None:
        """``KVM_SET_CPUID2``: what CPUID shows to the guest, which decides what CR4, EFER and MSRs it may use.

        Raises OSError with EINVAL once the vCPU has run, as KVM does.
        """
        if self._ran:
            raise OSError(errno.EINVAL, "KVM_SET_CPUID2: the CPUID of a vCPU that has run cannot change")
        self._use_cpuid(CpuidTable(entries))

    def _use_cpuid(self, table: CpuidTable) -> None:
        words = self.state.words
        words[MAXPHYADDR] = table.maxphyaddr
        words[CR4_ALLOWED], words[EFER_ALLOWED] = cr4_allowed(table), efer_allowed(table)
        self.cpuid = table
        self.emulation = Emulation(words, self.vm.memory, table, MsrFile(table), self.vm.clock.now)
        self.emulation.forced_emulation = self.vm.forced_emulation
        self.emulation.read_port, self.emulation.write_port = self.vm.ports.read, self.vm.ports.write
        self.interpreter = Interpreter(self.emulation)
        if self._engine is not None:
            self._equip(self._engine)

    @property
    def engine(self) -> Engine:
        """Direct execution, built when it is first needed: it compiles machine code on a machine's first use."""
        if self._engine is None:
            self._engine = Engine(self.state, self.vm.memory, (self.vm.ports.read, self.vm.ports.write))
            self._equip(self._engine)
        return self._engine

    def _equip(self, engine: Engine) -> None:
        self.emulation.translate = engine.translate
        self.emulation.fpu = FpuAccess(engine, self.emulation.fpu)
        engine.transmitter = self.vm.transmitter
        engine.set_features(tuple(feature_word(self.cpuid, place) for place in FEATURE_WORDS))

    @property
    def executed_blocks(self) -> int:
        """Blocks of guest code executed so far: what the virtual clock counts."""
        direct = 0 if self._engine is None else self._engine.blocks
        return direct + self.interpreter.blocks

    def counters(self) -> dict[str, int]:
        """How often what happened, by name."""
        direct = {} if self._engine is None else self._engine.counters()
        return {**direct, "interpreted_instructions": self.interpreter.instructions}

    # --------------------------------------------------------------------------------------------- registers

    def get_regs(self) -> Regs:
        """``KVM_GET_REGS``."""
        return registers.get_regs(self.state)

    def set_regs(self, regs: Regs) -> None:
        """``KVM_SET_REGS``."""
        registers.set_regs(self.state, regs)

    def get_sregs(self) -> Sregs:
        """``KVM_GET_SREGS``."""
        return registers.get_sregs(self.state)

    def set_sregs(self, sregs: Sregs) -> None:
        """``KVM_SET_SREGS``; OSError with EINVAL for what the guest's CPUID does not allow."""
        registers.set_sregs(self.state, sregs)
        if sregs.cr0 & CR0_PG and sregs.cr4 & CR4_PAE and not sregs.efer & EFER_LMA:
            load_pdptes(self.state.words, self.vm.memory, sregs.cr3)

    def get_msr(self, index: int) -> int:
        """``KVM_GET_MSRS`` of one register; OSError with EINVAL when there is none of that index."""
        try:
            return read_msr(self.emulation, index, host_initiated=True)
        except GuestFault:
            raise OSError(errno.EINVAL, f"KVM_GET_MSRS: there is no MSR {index:#x}") from None

    def set_msr(self, index: int, value: int) -> None:
        """``KVM_SET_MSRS`` of one register; OSError with EINVAL for an unknown one or a value that it cannot hold."""
        try:
            write_msr(self.emulation, index, value, host_initiated=True)
        except GuestFault:
            raise OSError(errno.EINVAL, f"KVM_SET_MSRS: MSR {index:#x} cannot be set to {value:#x}") from None

    def translate(self, gva: int) -> int | None:
        """``KVM_TRANSLATE``: the gpa of linear *gva* for a supervisor data read; None if it is not mapped."""
        gpa, _, vector, _ = translate(self.state.words, self.vm.memory, gva, 1, 0, 0, 0)
        return None if vector else gpa

    def inject_nmi(self) -> None:
        """``KVM_NMI``: queue a non-maskable interrupt."""
        self._nmi_pending = True
        self.kick()

    def reset(self) -> None:
        """The state after INIT: registers as at power-on, nothing pending. CPUID and the time-stamp counter stay."""
        self.state.reset()
        self._complete_userspace_io = None
        self.emulation.mmio.writes.clear()
        self._nmi_pending = False
        self.emulation.halted = False

    # ------------------------------------------------------------------------------------------------ running

    def kick(self) -> None:
        """Let a run in progress look at its interrupts behind the current block."""
        self.interpreter.stop()
        if self._engine is not None:
            self._engine.stop()

    def run(self) -> Exit:
        """``KVM_RUN``: execute the guest until something needs the VMM.

        Whatever the guest does, the result is one of the exits of :mod:`lasskvm.kvm.exits`.
        """
        self._ran = True
        try:
            complete, self._complete_userspace_io = self._complete_userspace_io, None
            if complete is not None:
                complete()
            return self._run()
        except PortAccessNeeded as needed:
            return self._port_exit(needed.access)
        except MmioReadNeeded as needed:
            return self._mmio_read_exit(needed)
        except TripleFault:
            return ShutdownExit()
        except Unhandleable as error:
            return self._internal_error(str(error))

    def _run(self) -> Exit:
        virtual = isinstance(self.vm.clock, VirtualClock)
        slice_end = self.executed_blocks + _SLICE_BLOCKS if virtual else time.monotonic_ns() + _SLICE_NS
        interpreted_end = self.interpreter.blocks + _SLICE_INTERPRETED_BLOCKS
        if self.vm.engine == "jit":
            self.engine.port_accesses_left = _SLICE_PORT_ACCESSES
        skips = 0
        for _ in range(_SLICE_EXITS):
            if self.emulation.mmio.writes:
                return self._mmio_write_exit()
            self.vm.clock.run_due()
            wanted = self._inject_events()
            if self.emulation.halted:
                idle = self._idle(skips)
                if idle is not None:
                    return idle
                skips += 1
            elif self._is_interpreted():
                self._interpret(interpreted_end, wanted)
            else:
                self._execute(slice_end, wanted)
            if (self.executed_blocks if virtual else time.monotonic_ns()) >= slice_end:
                break
            if self.interpreter.blocks >= interpreted_end or self._port_accesses_are_used_up():
                break
        return IntrExit()

    def _port_accesses_are_used_up(self) -> bool:
        return self._engine is not None and not self._engine.port_accesses_left

    def _is_interpreted(self) -> bool:
        return self.vm.engine == "emulator" or emulation_required(self.state.words)

    def _interpret(self, end: int, wanted: bool) -> None:
        """Let the emulator run the guest, up to block *end* of the interpreter or until it need not."""
        interpreter, clock = self.interpreter, self.vm.clock
        if not self._interpreted:
            self._interpreted = True
            interpreter.forget_translations()
        blocks = end - interpreter.blocks
        deadline = clock.next_deadline()
        if isinstance(clock, VirtualClock):
            if deadline is not None:
                blocks = min(blocks, clock.blocks_until(deadline))
        else:
            blocks = min(blocks, _HOST_POLL_INTERPRETED_BLOCKS)
        interpreter.want_interrupt_window = wanted
        interpreter.run(max(1, blocks), self._is_interpreted)

    def _execute(self, slice_end: int, wanted: bool) -> None:
        """Let direct execution run the guest, and deal with its exit."""
        if self._interpreted:
            self._interpreted = False
            self.state.words[TLB_FLUSH] = 1
        engine = self.engine
        engine.want_interrupt_window(wanted)
        self._set_deadline(slice_end)
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

    def _inject_events(self) -> bool:
        """Deliver an NMI or an external interrupt if the guest takes it now.

        Returns whether another interrupt waits for a window in which the guest takes it.
        """
        words = self.state.words
        if self._nmi_pending and not words[NMI_BLOCKED] and not words[INTERRUPT_SHADOW]:
            self._nmi_pending = False
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
        if skips >= _IDLE_SKIPS:
            return IntrExit()
        clock.skip_to(deadline)
        return None

    # ------------------------------------------------------------------------------------- port I/O and MMIO

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

    def _internal_error(self, detail: str) -> InternalErrorExit:
        try:
            code = fetch_instruction(self.emulation)
            gpa = self.translate(self.state.words[RIP])
            instruction = b"" if gpa is None else self.vm.memory.read(gpa, code.length)
        except GuestFault:
            instruction = b""
        return InternalErrorExit(detail, instruction=instruction)
