"""The PC around a VM: memory, boot, power-on and reset, and the VMM's run loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Self

from lasskvm.errors import SnapshotError
from lasskvm.kvm import (
    Clock,
    ExecutionEngine,
    HltExit,
    InternalErrorExit,
    IntrExit,
    IoExit,
    MmioBus,
    MmioExit,
    PortBus,
    ShutdownExit,
    Vm,
)
from lasskvm.kvm.exits import Exit, FailEntryExit, SystemEventExit, UnknownExit
from lasskvm.kvm.irqchip.routing import pc_routes
from lasskvm.kvm.providers import Provider
from lasskvm.kvm.snapshot import Document, open_snapshot
from lasskvm.kvm.snapshot_state import memory_regions, restore_vm, saved_clock, saved_cpuid
from lasskvm.machine.boot import Entry, place_firmware, shadow_firmware
from lasskvm.machine.boot.e820 import E820Entry, E820Map, E820Type
from lasskvm.machine.description import describe, leave_as_firmware
from lasskvm.machine.ending import STATUS_CRASHED, STATUS_TIMEOUT, End, Ending
from lasskvm.machine.hardware import Hardware
from lasskvm.machine.optional_devices import DeviceRequest
from lasskvm.machine.power_on import PowerOnState
from lasskvm.machine.provider import open_board
from lasskvm.machine.ram import HIGH_MEMORY_START, RAM_SLOTS, epc_base, place_ram
from lasskvm.machine.snapshot import device_states, machine_of, restore_devices, save_machine
from lasskvm.x86.cpu_models import CpuModel, parse_cpu

__all__ = ["End", "Ending", "OnEvent", "Pc"]

_FIRMWARE_SLOT = RAM_SLOTS
#: A guest that keeps the VMM busy with port I/O lets it look around after so many exits, or so much guest
#: time.
_TURN_EXITS = 1000
_TURN_NS = 20_000_000


#: What becomes of a machine that is reset, or whose processor shuts down: it starts again, or its run ends.
OnEvent = Literal["reset", "exit"]
#: What a machine can be saved behind.
_RESUMABLE = (End.TIMEOUT, End.STOPPED, End.SAVED)


class Pc:
    """A PC with one processor.

    *memory_size* is in bytes, a multiple of 4 KiB. *output* gets what the guest writes to its serial port and
    to the debug console. *idle* is called when the guest has nothing to do, with the nanoseconds until its
    next timer (None: it waits for input for ever), and, with 0, now and then while it runs; it is where a
    console reads its input. *provider* says whose KVM runs it; *clock* and *engine* are for the soft one, and those
    of :class:`~lasskvm.kvm.Vm`.

    *firmware* is a ROM for the reset vector; without it, :meth:`boot` or :meth:`enter` says what runs. *devices* are
    those beyond the usual ones. *epc_size* bytes behind all RAM are an enclave page cache, for a *cpu* with SGX.
    *on_reset* and *on_shutdown* say what follows a reset that the guest asks for, and a triple fault. A machine that
    was started by :meth:`enter` ends in any case: nothing is there to start again.

    Raises :class:`~lasskvm.errors.MemoryLayoutError` for memory or an EPC that is too small or more than this host has,
    :class:`~lasskvm.errors.DeviceError` for devices that contradict each other, and
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
        firmware: bytes | None = None,
        devices: Iterable[DeviceRequest] = (),
        epc_size: int = 0,
        on_reset: OnEvent = "reset",
        on_shutdown: OnEvent = "exit",
    ) -> None:
        self._exit_ports, self._exit_mmio = PortBus(), MmioBus()
        self._board = open_board(provider, self._exit_ports, self._exit_mmio, engine=engine, clock=clock)
        self.vm = self._board.vm
        self.clock = self._board.clock
        self._idle = idle or _wait
        self._on_reset, self._on_shutdown = on_reset, on_shutdown
        self._firmware = firmware
        self._requests = tuple(devices)
        self._memory_size, self._epc_size = memory_size, epc_size
        self._ending: Ending | None = None
        self._reset_wanted = False
        self._exits_since_turn = 0
        self._last_turn_ns = 0
        #: Where and at what time of its clock the machine is to be saved.
        self._save_at: tuple[Path, int] | None = None
        #: Puts into memory what the machine starts with, and says how to enter it.
        self._load_image: Callable[[int], Entry] | None = None
        low, high = place_ram(self.vm, memory_size)
        self.vm.create_irqchip()
        self.vm.create_pit2()
        self.vm.set_gsi_routing(pc_routes())
        self._epc = None
        if epc_size:
            self._epc = self._board.create_epc(epc_base(high, epc_size, cpu.maxphyaddr), epc_size)
        self.vcpu = self._board.create_vcpu(cpu)
        self.hardware = Hardware(self._board, self._exit_ports, self, output, self._requests)
        self.uart = self.hardware.uart
        if firmware is not None:
            place_firmware(self.vm, firmware, _FIRMWARE_SLOT)
        describe(self.hardware, low, high, self._reserved)
        self._power_on = PowerOnState.capture(self.vm, self.vcpu)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        output: Callable[[bytes], None],
        idle: Callable[[int | None], None] | None = None,
    ) -> Self:
        """The PC in the snapshot file *path*, on the soft provider, with the engine and kind of clock it had.

        With firmware it starts again at a reset; an image is not in the file, so that a reset ends the run otherwise.
        Raises :class:`SnapshotError` for a file that is no snapshot of a PC, damaged, cut off or of a newer version.
        """
        path = Path(path)
        with open_snapshot(path) as snapshot:
            machine, vm_document = machine_of(snapshot.document, path), snapshot.document["vm"]
            pc = cls(
                machine["memory_size"],
                # The CPUID that the vCPU had follows.
                parse_cpu("max"),
                output=output,
                idle=idle,
                clock=saved_clock(vm_document),
                engine=vm_document["engine"],
                # What the ROM holds comes with the memory.
                firmware=bytes(machine["firmware_bytes"]) or None,
                devices=[DeviceRequest(*request) for request in machine["requests"]],
                epc_size=machine["epc_size"],
                on_reset=machine["on_reset"],
                on_shutdown=machine["on_shutdown"],
            )
            assert isinstance(pc.vm, Vm)
            pc.vcpu.set_cpuid2(saved_cpuid(vm_document))
            pc._power_on = PowerOnState.capture(pc.vm, pc.vcpu)
            snapshot.load_memory(memory_regions(pc.vm))
            restore_vm(pc.vm, vm_document)
            pc._restore(machine)
        return pc

    @property
    def _reserved(self) -> list[E820Entry]:
        """What no memory is at and no device may be put to."""
        epc = self._epc
        return [] if epc is None else [E820Entry(epc.base, epc.base + epc.size, E820Type.RESERVED)]

    @property
    def memory_map(self) -> E820Map:
        """What an image is told of the guest-physical address space."""
        return E820Map.of_memory(self.vm.memory, self._reserved)

    def boot(self, load_image: Callable[[int], Entry]) -> None:
        """Start with what *load_image* puts into memory, now and after each reset.

        It is given the gpa of ACPI's RSDP.
        """
        self._load_image = load_image
        self._start_image()

    def _start_image(self) -> None:
        if self._load_image is not None:
            self._load_image(leave_as_firmware(self.vm.memory, self.vcpu)).apply(self.vcpu)

    def enter(self, entry: Entry) -> None:
        """Put the processor at the first instruction of an image that lies in memory; a reset ends the run then."""
        entry.apply(self.vcpu)

    def run(self, timeout: float | None = None) -> Ending:
        """Run until the guest ends, or for *timeout* seconds of the host's time.

        Raises only what *output*, *idle* and, at a reset, the loading of the image raise, and
        :class:`~lasskvm.errors.HostError` when the host cannot run guests.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._ending is None:
            if self._reset_wanted:
                self._reset()
                # A guest that does nothing but start again gets no other.
                self._take_a_turn(IntrExit(), deadline)
                continue
            self.vcpu.immediate_exit = False
            vm_exit = self._board.run()
            if isinstance(vm_exit, IntrExit):
                self._take_a_turn(vm_exit, deadline)
                continue
            # A device on the VM's own bus can have ended the guest just before what it exits for.
            if self._ending is None and not self._reset_wanted:
                self._answer(vm_exit)
            if isinstance(vm_exit, IoExit | MmioExit) and not self._reset_wanted:
                self._turn_when_due(deadline)
        self.hardware.output_lines.flush()
        return self._ending

    def _answer(self, vm_exit: Exit) -> None:
        match vm_exit:
            case IoExit():
                self._port_io(vm_exit)
            case MmioExit():
                self._mmio(vm_exit)
            case HltExit():
                self._ending = Ending(End.HALTED, 0)
            case ShutdownExit():
                self._shut_down()
            case InternalErrorExit():
                self._ending = Ending(End.INTERNAL_ERROR, STATUS_CRASHED, _describe(vm_exit))
            case SystemEventExit():
                self.reset_machine()
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
            if self._reset_wanted:
                self._reset()
        self._ending = self._ending or ending
        if self._ending is not None and self._ending.end not in _RESUMABLE:
            raise SnapshotError(f"the machine cannot be saved, it is at its end: {self._ending.end.value}")
        machine = {
            "memory_size": self._memory_size,
            "epc_size": self._epc_size,
            "devices": device_states(self.hardware.saved),
            "firmware_bytes": 0 if self._firmware is None else len(self._firmware),
            "requests": [tuple(vars(request).values()) for request in self._requests],
            "on_reset": self._on_reset,
            "on_shutdown": self._on_shutdown,
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
        restore_devices(self.hardware.saved, machine["devices"])
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
        self.hardware.output_lines.settle()
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
            self._exit_ports.write(vm_exit.port, vm_exit.size, vm_exit.data)
        else:
            value = self._exit_ports.read(vm_exit.port, vm_exit.size)
            if value is not None:
                vm_exit.data = value

    def _mmio(self, vm_exit: MmioExit) -> None:
        """Where nobody answers, what is read stays all ones, and what is written is dropped."""
        if vm_exit.write:
            self._exit_mmio.write(vm_exit.gpa, vm_exit.size, vm_exit.data)
        else:
            value = self._exit_mmio.read(vm_exit.gpa, vm_exit.size)
            if value is not None:
                vm_exit.data = value

    # ------------------------------------------------------------------------------------- what the devices tell

    def debug_exit(self, status: int) -> None:
        """The guest has written to a debug-exit port."""
        self._ending = Ending(End.DEBUG_EXIT, status)

    def program_ended(self, status: int) -> None:
        """The guest's program has ended."""
        self._ending = Ending(End.PROGRAM, status)

    def power_off(self) -> None:
        """The guest has switched the machine off."""
        self._ending = Ending(End.POWER_OFF, 0)
        self._end_run()

    def reset_machine(self) -> None:
        """The guest has pulled the RESET line, or someone from without has."""
        if self._on_reset == "reset" and self._can_start_again:
            self._reset_wanted = True
        else:
            self._ending = Ending(End.RESET, 0)
        self._end_run()

    def _end_run(self) -> None:
        """Let the guest not go on behind the instruction that has told the machine something."""
        self.vcpu.immediate_exit = True

    def _shut_down(self) -> None:
        if self._on_shutdown == "reset" and self._can_start_again:
            self._reset_wanted = True
        else:
            self._ending = Ending(End.TRIPLE_FAULT, STATUS_CRASHED, self._where())

    @property
    def _can_start_again(self) -> bool:
        return self._firmware is not None or self._load_image is not None

    def _reset(self) -> None:
        """Start again as behind power-on, with memory as it is, but for what is loaded anew."""
        self._reset_wanted = False
        self.hardware.reset()
        if self._epc is not None:
            self._epc.reset()
        self._power_on.restore(self.vm, self.vcpu)
        if self._firmware is not None:
            # As it lies in memory: of a machine that was loaded, nothing else is known.
            size = len(self._firmware)
            shadow_firmware(self.vm.memory, self.vm.memory.read(HIGH_MEMORY_START - size, size))
        self._start_image()

    def _where(self) -> str:
        regs = self.vcpu.get_regs()
        return f"RIP {regs.rip:#x}, RSP {regs.rsp:#x}, CR3 {self.vcpu.get_sregs().cr3:#x}"


def _describe(vm_exit: InternalErrorExit) -> str:
    if not vm_exit.instruction:
        return vm_exit.detail
    return f"{vm_exit.detail}; the instruction is {vm_exit.instruction.hex(' ')}"


def _wait(nanoseconds: int | None) -> None:
    time.sleep(0.01 if nanoseconds is None else min(nanoseconds / 1e9, 0.01))
