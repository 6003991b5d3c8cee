"""The state of a virtual processor, ioctl by ioctl: everything of a vCPU but ``KVM_RUN``.

Structures go in and out here; what they mean to the guest is known by :mod:`lasskvm.emulator`, and how they are laid
out in the state words by :mod:`lasskvm.kvm.registers`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.interpreter import Interpreter
from lasskvm.emulator.mmu import translate
from lasskvm.emulator.msrs import MsrFile, guest_tsc, read_msr, write_msr
from lasskvm.engine import context as c
from lasskvm.engine.engine import Engine
from lasskvm.engine.fpu_access import FpuAccess
from lasskvm.kvm import registers
from lasskvm.kvm.events import EventQueue
from lasskvm.kvm.guest_debug import GuestDebugger
from lasskvm.kvm.irqchip.lapic import LocalApic
from lasskvm.kvm.nested import NestedOperation
from lasskvm.kvm.nested_state import get_nested_state, set_nested_state
from lasskvm.kvm.port_time import TimedPorts
from lasskvm.kvm.structures import (
    GuestDebug,
    MpState,
    Regs,
    Sregs,
    Sregs2,
    Translation,
    VcpuEvents,
)
from lasskvm.kvm.vcpu_devices import VcpuDevices
from lasskvm.kvm.vcpu_events import InterruptibleVcpu
from lasskvm.kvm.vcpu_extended import ExtendedRegisters
from lasskvm.kvm.vendor import VendorOps, vendor_ops
from lasskvm.lass import INVLPG
from lasskvm.memory import PAGE_SHIFT
from lasskvm.state import (
    CPL,
    CR4,
    CR4_ALLOWED,
    EFER,
    EFER_ALLOWED,
    MAXPHYADDR,
    RFLAGS,
    RIP,
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
    without_features,
)
from lasskvm.x86.registers import CS, RFLAGS_AC

if TYPE_CHECKING:
    from lasskvm.kvm.vm import Vm

__all__ = ["StatefulVcpu"]

_BREAKPOINTS = 4
_XCR0_X87, _XCR0_SSE = 1 << 0, 1 << 1
_SIPI_SELECTOR_SHIFT = 8


class StatefulVcpu(ExtendedRegisters, InterruptibleVcpu):
    """The part of :class:`~lasskvm.kvm.vcpu.Vcpu` that holds its state.

    Its CPUID is that of the CPU model ``max`` until :meth:`set_cpuid2` says otherwise.
    """

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.state = VcpuState()
        #: Whether the vCPU has ever run: its CPUID is settled then.
        self.has_run = False
        self._engine: Engine | None = None
        self.events = EventQueue(self.state.words)
        self.debugger = GuestDebugger(self.state.words, self.events)
        #: An INIT signal has come, and is taken before the guest goes on.
        self.init_pending = False
        #: The vCPU waits for a startup message, as an application processor does behind INIT.
        self._waits_for_startup = False
        self.devices = VcpuDevices(self.state.words, vm, self._guest_tsc, self)
        self.nested = NestedOperation(self)
        self._use_cpuid(parse_cpu("max").entries())

    def _guest_tsc(self) -> int:
        return guest_tsc(self.emulation)

    # ------------------------------------------------------------------------------------------------------- CPUID

    def set_cpuid2(self, entries: Iterable[CpuidEntry]) -> None:
        """``KVM_SET_CPUID2``: what CPUID shows to the guest, which decides what CR4, EFER and MSRs it may use.

        The vendor in leaf 0 chooses the vendor operations (:mod:`lasskvm.kvm.vendor`): an AMD processor has no LASS.
        Raises OSError with EINVAL once the vCPU has run, unless nothing changes.
        """
        given = tuple(entries)
        if not self.has_run:
            self._use_cpuid(given)
        elif self._offered(given) != self.cpuid.entries:
            raise OSError(errno.EINVAL, "KVM_SET_CPUID2: the CPUID of a vCPU that has run cannot change")

    def get_cpuid2(self) -> list[CpuidEntry]:
        """``KVM_GET_CPUID2``."""
        return list(self.cpuid.entries)

    def _use_cpuid(self, entries: Iterable[CpuidEntry]) -> None:
        entries = tuple(entries)
        self.vendor: VendorOps = vendor_ops(entries)
        table = CpuidTable(self._offered(entries))
        words = self.state.words
        words[MAXPHYADDR] = table.maxphyaddr
        words[CR4_ALLOWED], words[EFER_ALLOWED] = cr4_allowed(table), efer_allowed(table)
        self.cpuid = table
        self._make_emulation(table)
        if self._engine is not None:
            self._equip(self._engine)

    def _offered(self, entries: tuple[CpuidEntry, ...]) -> tuple[CpuidEntry, ...]:
        """Of the CPUID *entries*, what a vCPU of this VM can have."""
        offered = vendor_ops(entries).offered(entries)
        return offered if self.vm.nested else without_features(offered, ("vmx",))

    def _make_emulation(self, table: CpuidTable) -> None:
        """A context for a processor with this CPUID; the registers that it holds itself stay as they are."""
        former = getattr(self, "emulation", None)
        vm = self.vm
        self.emulation = Emulation(self.state.words, vm.memory, table, MsrFile(table), vm.clock.now)
        if former is not None:
            self.emulation.fpu, self.emulation.msrs = former.fpu, former.msrs
            self.emulation.msrs.use_cpuid(table)
        self.emulation.forced_emulation = vm.forced_emulation
        self.emulation.sgx = vm.sgx
        self.devices.use_cpuid(table)
        self.devices.attach(self.emulation)
        self.nested.use_cpuid(table)
        self.nested.attach(self.emulation)
        self.interpreter = Interpreter(self.emulation)
        ports = TimedPorts(vm.ports, self.interpreter.spend, unanswered=True)
        self.emulation.read_port, self.emulation.write_port = ports.read, ports.write
        self.apply_msr_filter()
        self._apply_guest_debug()

    @property
    def engine(self) -> Engine:
        """Direct execution, built when it is first needed: it compiles machine code on a machine's first use."""
        if self._engine is None:
            # What no device claims is made again by the emulator.
            ports = TimedPorts(self.vm.ports, self._spend_in_engine, unanswered=False)
            self._engine = Engine(self.state, self.vm.memory, (ports.read, ports.write))
            self._equip(self._engine)
        return self._engine

    def _spend_in_engine(self, blocks: int) -> None:
        self.engine.spend(blocks)

    def _equip(self, engine: Engine) -> None:
        self.emulation.translate = engine.translate
        self.emulation.fpu = FpuAccess(engine, self.emulation.fpu)
        engine.transmitter = self.vm.transmitter
        self.apply_intercepts()
        engine.set_features(tuple(feature_word(self.cpuid, place) for place in FEATURE_WORDS))

    def is_lass_violation(self, address: int, size: int, flags: int) -> bool:
        """Whether an access of *size* bytes at linear *address* would violate LASS now (``kvm_x86_ops``).

        *flags* are those of :mod:`lasskvm.lass`. Never, where the vendor has no such operation.

        >>> from lasskvm.kvm import Vm
        >>> Vm().create_vcpu().is_lass_violation(0x1000, 8, 0)  # CR4.LASS is clear
        False
        """
        operation, words = self.vendor.is_lass_violation, self.state.words
        if operation is None:
            return False
        return bool(operation(address, size, flags, words[CPL], words[CR4], words[EFER], words[RFLAGS]))

    # --------------------------------------------------------------------------------------------------- registers

    def get_regs(self) -> Regs:
        """``KVM_GET_REGS``. Behind an I/O, MMIO or MSR exit the instruction is still in progress."""
        return registers.get_regs(self.state)

    def set_regs(self, regs: Regs) -> None:
        """``KVM_SET_REGS``; a pending exception is dropped.

        What an I/O, MMIO or MSR exit has left open is still completed by the next run, over these registers. Who does
        not want that completes it before: runs with ``immediate_exit`` set, until one returns an IntrExit.
        """
        registers.set_regs(self.state, regs)
        self.events.drop_pending_exception()

    def get_sregs(self) -> Sregs:
        """``KVM_GET_SREGS``."""
        return registers.get_sregs(self.state)

    def set_sregs(self, sregs: Sregs) -> None:
        """``KVM_SET_SREGS``; OSError with EINVAL for what the guest's CPUID does not allow, or contradicts itself."""
        self.devices.check_apic_base(sregs.apic_base, "KVM_SET_SREGS")
        registers.set_sregs(self.state, self.vm.memory, sregs)
        self.devices.set_apic_base(sregs.apic_base)

    def get_sregs2(self) -> Sregs2:
        """``KVM_GET_SREGS2``."""
        return registers.get_sregs2(self.state)

    def set_sregs2(self, sregs: Sregs2) -> None:
        """``KVM_SET_SREGS2``; EINVAL as with :meth:`set_sregs`, and for PDPTEs where there are none."""
        self.devices.check_apic_base(sregs.apic_base, "KVM_SET_SREGS2")
        registers.set_sregs2(self.state, self.vm.memory, sregs)
        self.devices.set_apic_base(sregs.apic_base)

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

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """``KVM_GET_MSRS``: those before the first that does not exist. The VM's filter is for the guest only."""
        values: dict[int, int] = {}
        for index in indices:
            try:
                values[index] = self.get_msr(index)
            except OSError:
                break
        return values

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """``KVM_SET_MSRS``: how many were set, in order; it stops at the first that cannot be."""
        for done, (index, value) in enumerate(values.items()):
            try:
                self.set_msr(index, value)
            except OSError:
                return done
        return len(values)

    def apply_msr_filter(self) -> None:
        """Take the MSR filter that the VM has now."""
        wanted = self.vm.msr_filter
        self.emulation.msr_permission = None if wanted is None else wanted.allows
        self.apply_intercepts()

    def apply_intercepts(self) -> None:
        """Tell direct execution what it is to leave to the emulator."""
        if self._engine is not None:
            self.nested.equip(self._engine, c.LEAVE_MSRS if self.vm.msr_filter is not None else 0)

    # ------------------------------------------------------------------------------------------- events and the rest

    def get_vcpu_events(self) -> VcpuEvents:
        """``KVM_GET_VCPU_EVENTS``. A shadow of interrupts is reported as either kind's, as KVM does on AMD."""
        return self.events.get()

    def set_vcpu_events(self, events: VcpuEvents) -> None:
        """``KVM_SET_VCPU_EVENTS``: what is to be delivered at the next entry; OSError with EINVAL for bad vectors."""
        self.events.set(events)

    def get_mp_state(self) -> MpState:
        """``KVM_GET_MP_STATE``."""
        if self._waits_for_startup:
            return MpState.INIT_RECEIVED
        return MpState.HALTED if self.emulation.halted else MpState.RUNNABLE

    def set_mp_state(self, state: MpState) -> None:
        """``KVM_SET_MP_STATE``; OSError with EINVAL for SIPI_RECEIVED, and without an irqchip for all but RUNNABLE."""
        if state is MpState.SIPI_RECEIVED:
            raise OSError(
                errno.EINVAL, "KVM_SET_MP_STATE: SIPI_RECEIVED says no vector; set the registers instead"
            )
        if state is not MpState.RUNNABLE and self.vm.irqchip is None:
            raise OSError(errno.EINVAL, "KVM_SET_MP_STATE: without an irqchip a vCPU is always RUNNABLE")
        self.emulation.halted = state is MpState.HALTED
        self._waits_for_startup = state in (MpState.INIT_RECEIVED, MpState.UNINITIALIZED)

    def get_lapic(self) -> bytes:
        """``KVM_GET_LAPIC``: the 1024 bytes of the register page; OSError with EINVAL without an irqchip."""
        return self._lapic("KVM_GET_LAPIC").get_registers()

    def set_lapic(self, registers: bytes) -> None:
        """``KVM_SET_LAPIC`` of what :meth:`get_lapic` gave."""
        self._lapic("KVM_SET_LAPIC").set_registers(registers)

    def _lapic(self, ioctl: str) -> LocalApic:
        if self.devices.lapic is None:
            raise OSError(
                errno.EINVAL, f"{ioctl}: there is no local APIC; create the irqchip before the vCPU"
            )
        return self.devices.lapic

    def get_nested_state(self) -> bytes:
        """``KVM_GET_NESTED_STATE``: KVM's structure; with a current VMCS its page follows, in a format of our own."""
        return get_nested_state(self)

    def set_nested_state(self, state: bytes) -> None:
        """``KVM_SET_NESTED_STATE`` of what :meth:`get_nested_state` gave; EINVAL for what can be no such state.

        L2's registers come with it; general-purpose and other registers that are in no VMCS do not.
        """
        set_nested_state(self, state)

    def set_guest_debug(self, debug: GuestDebug) -> None:
        """``KVM_SET_GUEST_DEBUG``; what it catches are :class:`~lasskvm.kvm.exits.DebugExit`. The guest sees nothing.

        Single steps are made by the emulator, whatever the engine. Behind a breakpoint on execution the next run stops
        at it again, unless RFLAGS.RF is set or the breakpoint is gone.
        """
        self.debugger.configure(debug)
        self._apply_guest_debug()

    def _apply_guest_debug(self) -> None:
        self.emulation.debugger = self.debugger if self.debugger.is_active else None

    def translate(self, gva: int) -> Translation:
        """``KVM_TRANSLATE``: where linear *gva* is mapped to, for a supervisor read with RFLAGS.AC set.

        So neither SMAP nor LASS hides what is mapped. The address is taken as it is, without masking by LAM.
        """
        gpa, _, vector, _ = translate(self.state.words, self.vm.memory, gva, 1, INVLPG, 0, RFLAGS_AC)
        return Translation(0 if vector else gpa, valid=not vector)

    def interrupt(self, vector: int) -> None:
        """``KVM_INTERRUPT``: inject an external interrupt at the next entry; without an irqchip only.

        The guest must be able to take it then: RFLAGS.IF is 1 and no instruction holds interrupts off; otherwise the
        entry fails (:class:`~lasskvm.kvm.exits.FailEntryExit`). OSError with ENXIO beside an irqchip, EEXIST while
        another one waits, and EINVAL for what is no vector.
        """
        if self.vm.irqchip is not None:
            raise OSError(
                errno.ENXIO, "KVM_INTERRUPT: interrupts come from the irqchip of this VM; use irq_line()"
            )
        self.events.queue_interrupt(vector)

    def nmi(self) -> None:
        """``KVM_NMI``: queue a non-maskable interrupt."""
        self.events.nmi_pending = True
        self.kick()

    def init(self) -> None:
        """An INIT signal: the guest starts anew at the reset vector, as the bootstrap processor does."""
        self.init_pending = True
        self.kick()

    def startup(self, vector: int) -> None:
        """A startup message (SIPI) for code at *vector* * 4096; without INIT before, nothing comes of it."""
        if not self._waits_for_startup:
            return
        self._waits_for_startup = False
        self.state.set_segment(
            CS,
            replace(
                self.state.segment(CS), selector=vector << _SIPI_SELECTOR_SHIFT, base=vector << PAGE_SHIFT
            ),
        )
        self.state.words[RIP] = 0
        self.kick()

    def kick(self) -> None:
        """Let a run in progress look at its interrupts behind the current block."""
        self.interpreter.stop()
        if self._engine is not None:
            self._engine.stop()
