"""The PC around a VM: memory layout, devices on their ports, and the VMM's run loop.

Devices that a guest talks to all the time (UART, RTC, the POST port) sit on the VM's own bus beside the
interrupt controller and timer, as KVM's in-kernel devices do, where the provider has such a bus. Those that end
or restart the machine are served here, from the exits of ``KVM_RUN``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Self

from lasskvm.errors import MemoryLayoutError, SnapshotError
from lasskvm.kvm import (
    Clock,
    ExecutionEngine,
    HltExit,
    InternalErrorExit,
    IntrExit,
    IoExit,
    MmioExit,
    PortBus,
    PortDevice,
    ShutdownExit,
    Vm,
)
from lasskvm.kvm.exits import Exit, FailEntryExit, SystemEventExit, UnknownExit
from lasskvm.kvm.providers import Provider
from lasskvm.kvm.snapshot import Document, open_snapshot
from lasskvm.kvm.snapshot_state import restore_vm, saved_clock
from lasskvm.machine.boot import LongModeEntry
from lasskvm.machine.devices import COM1_IRQ, RTC_IRQ
from lasskvm.machine.devices.debug_console import DebugConsole
from lasskvm.machine.devices.debug_exit import DebugExit
from lasskvm.machine.devices.i8042 import I8042
from lasskvm.machine.devices.port92 import Port92
from lasskvm.machine.devices.post_port import PostPort
from lasskvm.machine.devices.program_status import ProgramStatus
from lasskvm.machine.devices.rtc import Rtc
from lasskvm.machine.devices.uart16550 import Uart16550
from lasskvm.machine.provider import open_board
from lasskvm.machine.snapshot import device_states, machine_of, restore_devices, save_machine
from lasskvm.x86.cpu_models import CpuModel, parse_cpu

__all__ = ["End", "Ending", "Pc"]

MIB = 1 << 20
MINIMUM_MEMORY = 4 * MIB
#: RAM stops here and goes on at 4 GiB: the space between belongs to devices and firmware.
LOW_MEMORY_END = 0xC000_0000
HIGH_MEMORY_START = 1 << 32
_LOW_SLOT, _HIGH_SLOT = 0, 1
#: A guest that keeps the VMM busy with port I/O lets it look around after so many exits, or so much guest
#: time.
_TURN_EXITS = 1000
_TURN_NS = 20_000_000


class End(Enum):
    """Why a machine stopped."""

    PROGRAM = "the program ended"
    DEBUG_EXIT = "the guest wrote to the debug-exit port"
    RESET = "the guest asked for a reset"
    HALTED = "the guest halted with interrupts off"
    TRIPLE_FAULT = "the guest triple-faulted"
    INTERNAL_ERROR = "the guest executed something that cannot be executed"
    TIMEOUT = "the time limit was reached"
    STOPPED = "the run was stopped from the console"
    SAVED = "the machine was saved"


@dataclass(frozen=True)
class Ending:
    """How a machine stopped: *status* is the exit status for a shell, *detail* says more about errors."""

    end: End
    status: int
    detail: str = ""


#: Exit statuses, beside those that the guest chooses itself.
STATUS_CRASHED = 1
STATUS_TIMEOUT = 124
#: What a machine can be saved behind.
_RESUMABLE = (End.TIMEOUT, End.STOPPED, End.SAVED)


class Pc:
    """A PC with one processor.

    *memory_size* is in bytes, a multiple of 4 KiB. *output* gets what the guest writes to its serial port and
    to the debug console. *idle* is called when the guest has nothing to do, with the nanoseconds until its
    next timer (None: it waits for input for ever), and, with 0, now and then while it runs; it is where a
    console reads its input. *provider* says whose KVM runs it; *clock* and *engine* are for the soft one, and those
    of :class:`~lasskvm.kvm.Vm`.

    Raises :class:`MemoryLayoutError` for a memory size that is too small, or more than this host has, and
    :class:`~lasskvm.errors.HostError` when the host has no KVM for the host provider.
    """

    def __init__(
        self,
        memory_size: int,
        cpu: CpuModel,
        *,
        output: Callable[[bytes], None],
        idle: Callable[[int | None], None] | None = None,
        clock: Clock | None = None,
        engine: ExecutionEngine = "jit",
        provider: Provider = "soft",
    ) -> None:
        if memory_size < MINIMUM_MEMORY:
            raise MemoryLayoutError(
                f"{memory_size / MIB:g} MiB of memory is too little for a PC; "
                f"give at least {MINIMUM_MEMORY // MIB}"
            )
        if memory_size > _host_memory():
            raise MemoryLayoutError(
                f"the guest cannot have {memory_size // MIB} MiB of memory, "
                f"this host has {_host_memory() // MIB}; give it less"
            )
        self._slow_ports = PortBus()
        self._board = open_board(provider, self._slow_ports, engine=engine, clock=clock)
        self.vm = self._board.vm
        self.clock = self._board.clock
        self._idle = idle or _wait
        self._ending: Ending | None = None
        self._exits_since_turn = 0
        self._last_turn_ns = 0
        #: Where and at what time of its clock the machine is to be saved.
        self._save_at: tuple[Path, int] | None = None
        low = min(memory_size, LOW_MEMORY_END)
        self.vm.set_user_memory_region(_LOW_SLOT, 0, self.vm.allocate(low))
        if memory_size > low:
            self.vm.set_user_memory_region(_HIGH_SLOT, HIGH_MEMORY_START, self.vm.allocate(memory_size - low))
        self.vm.create_irqchip()
        self.vm.create_pit2()
        self.vcpu = self._board.create_vcpu(cpu)
        self.uart = Uart16550(partial(self.vm.irq_line, COM1_IRQ), output)
        devices: dict[str, PortDevice] = {
            "uart": self.uart,
            "rtc": Rtc(self.clock, partial(self.vm.irq_line, RTC_IRQ)),
            "post_port": PostPort(),
        }
        slow_devices: dict[str, PortDevice] = {
            "debug_console": DebugConsole(output),
            "debug_exit": DebugExit(self._debug_exit),
            "program_status": ProgramStatus(self._program_ended),
            "i8042": I8042(self._reset),
            "port92": Port92(self._reset),
        }
        for device in devices.values():
            self._board.ports.register(device)
        for device in slow_devices.values():
            self._slow_ports.register(device)
        self._board.connect_console(self.uart)
        self._devices = devices | slow_devices

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        output: Callable[[bytes], None],
        idle: Callable[[int | None], None] | None = None,
    ) -> Self:
        """The PC in the snapshot file *path*, on the soft provider, with the engine and kind of clock it had.

        Raises :class:`SnapshotError` for a file that is no snapshot of a PC, damaged, cut off or of a newer version.
        """
        path = Path(path)
        with open_snapshot(path) as snapshot:
            machine, vm_document = machine_of(snapshot.document, path), snapshot.document["vm"]
            pc = cls(
                machine["memory_size"],
                # The CPUID that the vCPU had follows with its state.
                parse_cpu("max"),
                output=output,
                idle=idle,
                clock=saved_clock(vm_document),
                engine=vm_document["engine"],
            )
            assert isinstance(pc.vm, Vm)
            snapshot.load_memory(pc.vm.memory)
            restore_vm(pc.vm, vm_document)
            pc._restore(machine)
        return pc

    def enter(self, entry: LongModeEntry) -> None:
        """Put the processor at the first instruction of a loaded image."""
        regs = self.vcpu.get_regs()
        regs.rip, regs.rsp, regs.rsi, regs.rdi = entry.rip, entry.rsp, entry.rsi, entry.rdi
        regs.rflags = entry.rflags
        self.vcpu.set_regs(regs)
        state = self.vcpu.get_sregs()
        state.cr0, state.cr3, state.cr4, state.efer = entry.cr0, entry.cr3, entry.cr4, entry.efer
        state.gdt = type(state.gdt)(entry.gdt_base, entry.gdt_limit)
        state.idt = type(state.idt)(0, 0)
        state.cs, state.tr = entry.code_segment, entry.task_segment
        state.ds = state.es = state.ss = state.fs = state.gs = entry.data_segment
        self.vcpu.set_sregs(state)

    def run(self, timeout: float | None = None) -> Ending:
        """Run until the guest ends, or for *timeout* seconds of the host's time.

        Raises only what *output* and *idle* raise, and :class:`~lasskvm.errors.HostError` when the host
        cannot run guests.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._ending is None:
            vm_exit = self._board.run()
            if isinstance(vm_exit, IntrExit):
                self._take_a_turn(vm_exit, deadline)
                continue
            self._answer(vm_exit)
            if isinstance(vm_exit, IoExit | MmioExit):
                self._turn_when_due(deadline)
        return self._ending

    def _answer(self, vm_exit: Exit) -> None:
        match vm_exit:
            case IoExit():
                self._port_io(vm_exit)
            case MmioExit():
                # Nobody answers: what is read stays all ones, what is written is dropped.
                pass
            case HltExit():
                self._ending = Ending(End.HALTED, 0)
            case ShutdownExit():
                self._ending = Ending(End.TRIPLE_FAULT, STATUS_CRASHED, self._where())
            case InternalErrorExit():
                self._ending = Ending(End.INTERNAL_ERROR, STATUS_CRASHED, _describe(vm_exit))
            case SystemEventExit():
                self._reset()
            case FailEntryExit() | UnknownExit():
                self._ending = Ending(End.INTERNAL_ERROR, STATUS_CRASHED, f"{vm_exit} at {self._where()}")

    def save_at(self, path: Path | str, guest_ns: int) -> None:
        """Save the machine to *path*, and end the run, at the first checkpoint from *guest_ns* on, of its clock.

        It goes on from there exactly as it would have without being saved.
        """
        self._save_at = Path(path), guest_ns

    def save(self, path: Path | str) -> None:
        """Write the machine to the snapshot file *path*, which is replaced at once or not at all.

        To be called before a run, or behind one that was stopped or that the time limit has ended. Raises
        :class:`SnapshotError` when the machine has ended otherwise, on /dev/kvm, or when the file cannot be written.
        """
        ending, self._ending = self._ending, None
        if isinstance(self.vm, Vm):
            self._complete_last_exit()
        self._ending = self._ending or ending
        if self._ending is not None and self._ending.end not in _RESUMABLE:
            raise SnapshotError(f"the machine cannot be saved, it is at its end: {self._ending.end.value}")
        machine = {
            "memory_size": sum(slot.size for slot in self.vm.memory),
            "devices": device_states(self._devices),
            "exits_since_turn": self._exits_since_turn,
            "last_turn_ns": self._last_turn_ns,
        }
        save_machine(self.vm, Path(path), machine)

    def _complete_last_exit(self) -> None:
        """Let the instruction that the last exit belongs to come to its end, and nothing else happen."""
        self.vcpu.immediate_exit = True
        try:
            while self._ending is None and not isinstance(vm_exit := self.vcpu.run(), IntrExit):
                self._answer(vm_exit)
        finally:
            self.vcpu.immediate_exit = False

    def _restore(self, machine: Document) -> None:
        restore_devices(self._devices, machine["devices"])
        self._exits_since_turn, self._last_turn_ns = machine["exits_since_turn"], machine["last_turn_ns"]

    def stop(self) -> None:
        """End the run at the next occasion; for a console."""
        self._ending = Ending(End.STOPPED, 0)

    def statistics(self) -> dict[str, int]:
        """What the run so far has cost, by name: guest time, and what the provider counts."""
        return self._board.statistics()

    def missing_features(self) -> list[str]:
        """The features of the CPU model that the provider could not give to this machine."""
        return self._board.missing_features()

    def close(self) -> None:
        """Give what the machine has to the host; nothing else is valid afterwards."""
        self._board.close()

    def _turn_when_due(self, deadline: float | None) -> None:
        """Take a turn now and then, though no run gets as far as an IntrExit.

        When is counted in what the guest did, not in the host's time, so that deterministic runs stay it.
        """
        self._exits_since_turn += 1
        if self._exits_since_turn >= _TURN_EXITS or self.clock.now() - self._last_turn_ns >= _TURN_NS:
            self._take_a_turn(IntrExit(), deadline)

    def _take_a_turn(self, vm_exit: IntrExit, deadline: float | None) -> None:
        self._exits_since_turn = 0
        self._last_turn_ns = self.clock.now()
        if self._ending is not None:
            return
        if self._save_at is not None and self.clock.now() >= self._save_at[1] and self._board.at_checkpoint:
            self.save(self._save_at[0])
            self._ending = Ending(End.SAVED, 0)
            return
        if deadline is not None and time.monotonic() >= deadline:
            self._ending = Ending(End.TIMEOUT, STATUS_TIMEOUT, self._where())
            return
        if not vm_exit.idle:
            self._idle(0)
            return
        limit = None if vm_exit.idle_until_ns is None else max(0, vm_exit.idle_until_ns - self.clock.now())
        if deadline is not None:
            remaining = max(0, int((deadline - time.monotonic()) * 1e9))
            limit = remaining if limit is None else min(limit, remaining)
        self._idle(limit)

    def _port_io(self, vm_exit: IoExit) -> None:
        if vm_exit.write:
            self._slow_ports.write(vm_exit.port, vm_exit.size, vm_exit.data)
        else:
            value = self._slow_ports.read(vm_exit.port, vm_exit.size)
            if value is not None:
                vm_exit.data = value

    def _debug_exit(self, value: int) -> None:
        self._ending = Ending(End.DEBUG_EXIT, value)

    def _program_ended(self, status: int) -> None:
        self._ending = Ending(End.PROGRAM, status)

    def _reset(self) -> None:
        self._ending = Ending(End.RESET, 0)

    def _where(self) -> str:
        regs = self.vcpu.get_regs()
        return f"RIP {regs.rip:#x}, RSP {regs.rsp:#x}, CR3 {self.vcpu.get_sregs().cr3:#x}"


def _describe(vm_exit: InternalErrorExit) -> str:
    if not vm_exit.instruction:
        return vm_exit.detail
    return f"{vm_exit.detail}; the instruction is {vm_exit.instruction.hex(' ')}"


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _wait(nanoseconds: int | None) -> None:
    time.sleep(0.01 if nanoseconds is None else min(nanoseconds / 1e9, 0.01))
