"""Hostile guests: random accesses to every port, register and MSR, while time runs, never raise, hang or pile up."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest

from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.mmio import MmioReadNeeded
from lasskvm.emulator.msrs import read_msr, write_msr
from lasskvm.kvm import IntrExit, MmioBus, PortBus, PortDevice, Vcpu, Vm
from lasskvm.kvm.clock import VirtualClock
from lasskvm.kvm.irqchip.ioapic import IOAPIC_BASE
from lasskvm.machine.description import describe
from lasskvm.machine.devices.uart16550 import BACKLOG_LIMIT, FIFO_SIZE
from lasskvm.machine.hardware import Hardware
from lasskvm.machine.optional_devices import DeviceRequest
from lasskvm.machine.provider import SoftBoard
from lasskvm.state import APIC_BASE, CR8
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.exceptions import GP
from lasskvm.x86.msr import APIC_BASE_ENABLE, APIC_BASE_X2APIC, MSR_IA32_APIC_BASE

ROUNDS = 100_000
#: For one device alone.
FEWER_ROUNDS = 50_000
SIZES = (1, 2, 4)
MMIO_SIZES = (1, 2, 4, 8)
MEMORY_SIZE = 1 << 20
#: More timers than this in the queue would mean that cancelled ones pile up.
QUEUE_LIMIT = 200
#: All devices' states together as text, without the test memory; input that waits is most of it.
STATE_LIMIT = 30_000 + 6 * BACKLOG_LIMIT
WAITING_LIMIT = 10_000
PAGE = 0x1000
LAPIC_PAGE = 0xFEE0_0000
TEST_MEMORY = range(0xFF00_0000, 0xFF01_0000)
#: The clocks', the local APIC's, KVM's.
MSRS = (0x10, 0x3B, 0x6E0, *range(0x800, 0x900), *range(0x4B56_4D00, 0x4B56_4D08), 0x11, 0x12)
FW_CFG_DMA = 0x514


class Machine:
    """A machine whose guest is a random generator. It counts what comes out."""

    def __init__(self, seed: object) -> None:
        self.chance = random.Random(str(seed))
        self.blocks = 0
        #: The vectors of what MSRs have raised.
        self.faults: set[int] = set()
        self.output_count = self.resets = self.exits = self.power_offs = self.programs = 0
        self.clock = VirtualClock(lambda: self.blocks)
        board = SoftBoard("emulator", self.clock)
        assert isinstance(board.vm, Vm)
        self.vm = board.vm
        self.vm.set_user_memory_region(0, 0, self.vm.allocate(MEMORY_SIZE))
        self.vm.create_irqchip()
        self.vm.create_pit2()
        vcpu = board.create_vcpu(parse_cpu("max"))
        assert isinstance(vcpu, Vcpu)
        self.vcpu = vcpu
        self.exit_ports = PortBus()
        self.hardware = Hardware(
            board,
            self.exit_ports,
            self,
            self._output,
            [DeviceRequest("pc-testdev"), DeviceRequest("isa-debugcon", 0x402)],
        )
        describe(self.hardware, MEMORY_SIZE, 0)
        chips = self.vm.irqchip
        assert chips is not None
        assert self.vm.pit is not None
        self.chips = chips
        self.devices: dict[str, PortDevice] = {**self.hardware.devices, "pic": chips.pic, "pit": self.vm.pit}

    # What devices tell

    def debug_exit(self, status: int) -> None:
        assert status & 1
        self.exits += 1

    def program_ended(self, status: int) -> None:
        self.programs += 1

    def power_off(self) -> None:
        self.power_offs += 1

    def reset_machine(self) -> None:
        self.resets += 1

    def _output(self, data: bytes) -> None:
        self.output_count += len(data)

    # What the guest does

    def touch_port(self, port: int) -> None:
        size = self.chance.choice(SIZES)
        bus = self.chance.choice((self.vm.ports, self.exit_ports))
        if self.chance.random() < 0.5:
            value = bus.read(port, size)
            assert value is None or 0 <= value < 1 << 8 * size
        else:
            assert bus.write(port, size, self.chance.getrandbits(8 * size)) in (True, False)

    def touch_memory(self, gpa: int) -> None:
        """A load or store of a guest, as the emulator makes it; aligned 32-bit ones are those that do something."""
        mmio = self.vcpu.emulation.mmio
        size = 4 if self.chance.random() < 0.7 else self.chance.choice(MMIO_SIZES)
        if size == 4 and self.chance.random() < 0.9:
            gpa &= ~0xF
        mmio.begin()
        if self.chance.random() < 0.5:
            try:
                assert 0 <= mmio.read(gpa, size) < 1 << 8 * size
            except MmioReadNeeded:
                mmio.answer(0)
        else:
            mmio.write(gpa, size, self.value(8 * size))
        mmio.commit()
        mmio.writes.clear()

    def touch_msr(self, index: int) -> None:
        try:
            if self.chance.random() < 0.5:
                assert 0 <= read_msr(self.vcpu.emulation, index) < 1 << 64
            else:
                write_msr(self.vcpu.emulation, index, self.value(64))
        except GuestFault as fault:
            self.faults.add(fault.vector)

    def change_apic_mode(self) -> None:
        """Every change of mode that there is, at the usual place mostly."""
        base = LAPIC_PAGE if self.chance.random() < 0.9 else self.chance.getrandbits(45)
        mode = self.chance.choice(
            (0, APIC_BASE_ENABLE, APIC_BASE_ENABLE, APIC_BASE_ENABLE | APIC_BASE_X2APIC)
        )
        try:
            write_msr(self.vcpu.emulation, MSR_IA32_APIC_BASE, base | mode | self.chance.choice((0, 0x100)))
        except GuestFault as fault:
            self.faults.add(fault.vector)

    def change_priority(self) -> None:
        self.vcpu.state.words[CR8] = self.chance.randrange(16)
        self.vcpu.emulation.task_priority_written()

    def value(self, bits: int) -> int:
        """A value to write: small ones, times to come and single bits are those that mean something."""
        kind = self.chance.randrange(4)
        if kind == 0:
            return self.chance.getrandbits(bits)
        if kind == 1:
            return self.chance.getrandbits(min(bits, self.chance.randrange(1, 33)))
        if kind == 2:
            return 1 << self.chance.randrange(bits)
        return self.clock.now() + self.chance.getrandbits(24) & (1 << bits) - 1

    def pass_time(self) -> None:
        before = self.clock.now()
        self.blocks += self.chance.randrange(1, 2_000)
        if self.chance.random() < 0.01:
            deadline = self.clock.next_deadline()
            self.clock.skip_to(deadline if deadline is not None else before + 10**9)
        self.clock.run_due()
        assert self.clock.now() > before

    def take_interrupt(self) -> int | None:
        """The vector of an interrupt; an INIT that has come is taken, too."""
        if self.vcpu.init_pending:
            self.vcpu.immediate_exit = True
            assert isinstance(self.vcpu.run(), IntrExit)
            assert not self.vcpu.init_pending
        return self.chips.acknowledge() if self.chips.has_interrupt() else None

    def look_for_what_grows(self) -> None:
        assert self.clock.queue_length < QUEUE_LIMIT
        assert len(self.hardware.uart.fifo) <= FIFO_SIZE
        assert len(self.hardware.uart.backlog) <= BACKLOG_LIMIT
        assert sum(map(len, self.hardware.output_lines._waiting)) < WAITING_LIMIT
        assert not self.vcpu.emulation.mmio.writes
        assert self.faults <= {GP}

    def states(self) -> dict[str, object]:
        named = {
            name: device.get_state() for name, device in self.hardware.saved.items() if name != "test_memory"
        }
        return named | {
            "irqchip": self.vm.get_irqchip(),
            "pit": self.vm.get_pit2(),
            "vcpu": self.vcpu.devices.get_state(),
        }


DEVICES = tuple(Machine(0).devices)


@pytest.mark.parametrize("name", DEVICES)
def test_each_device_survives_random_accesses(name: str) -> None:
    machine = Machine(name)
    device = machine.devices[name]
    ports = [port for span in device.ports for port in range(max(0, span.start - 3), span.stop)]
    for number in range(FEWER_ROUNDS):
        machine.touch_port(machine.chance.choice(ports))
        machine.pass_time()
        if number % 1_000 == 0:
            machine.look_for_what_grows()
    device.reset()
    values = (bus.read(device.ports[0].start, 1) for bus in (machine.vm.ports, machine.exit_ports))
    assert any(value is not None for value in values)


def test_everything_survives_random_accesses_while_interrupts_are_taken_and_a_user_types() -> None:
    machine = Machine(2027)
    chance = machine.chance
    ports = sorted(
        {port for device in machine.devices.values() for span in device.ports for port in span}
        | {span.start - 3 for device in machine.devices.values() for span in device.ports}
    )
    actions: list[Callable[[], None]] = [
        lambda: machine.touch_port(chance.choice(ports)),
        lambda: machine.touch_port(chance.choice(ports)),
        lambda: machine.touch_memory((machine.vcpu.state.words[APIC_BASE] & -PAGE) + chance.randrange(0x400)),
        lambda: machine.touch_memory(IOAPIC_BASE + chance.choice((0, 0x10, chance.randrange(PAGE)))),
        lambda: machine.touch_memory(chance.choice(TEST_MEMORY)),
        lambda: machine.touch_msr(chance.choice(MSRS)),
        machine.change_priority,
    ]
    vectors = set()
    modes = set()
    for number in range(ROUNDS):
        chance.choice(actions)()
        if number % 500 == 0:
            machine.change_apic_mode()
        machine.pass_time()
        if chance.random() < 0.5 and (vector := machine.take_interrupt()) is not None:
            assert 0 <= vector <= 255
            vectors.add(vector)
        if chance.random() < 0.05:
            machine.hardware.uart.receive(chance.randbytes(chance.randrange(40)))
            machine.hardware.uart.receive_break()
        if number % 1_000 == 0:
            machine.look_for_what_grows()
            modes.add(machine.vcpu.state.words[APIC_BASE] & (APIC_BASE_ENABLE | APIC_BASE_X2APIC))
        if number % 10_000 == 0:
            assert len(json.dumps(machine.states())) < STATE_LIMIT
    assert vectors, "interrupts got through"
    assert len(modes) == 3
    assert machine.output_count
    assert machine.resets
    assert machine.exits
    assert machine.programs
    assert machine.power_offs


def test_the_state_behind_random_accesses_can_be_saved_and_restored() -> None:
    machine, other = Machine("saved"), Machine("other")
    ports = [port for device in machine.devices.values() for span in device.ports for port in span]
    for _ in range(5_000):
        machine.touch_port(machine.chance.choice(ports))
        machine.touch_memory(LAPIC_PAGE + machine.chance.randrange(0x400))
        machine.touch_memory(IOAPIC_BASE + machine.chance.choice((0, 0x10)))
        machine.pass_time()
    states = json.loads(json.dumps(machine.states()))
    other.blocks = machine.blocks
    other.clock.restore_skipped(machine.clock.skipped_ns)
    for name, device in other.hardware.saved.items():
        if name != "test_memory":
            device.set_state(states[name])
    other.vm.set_irqchip(states["irqchip"])
    other.vm.set_pit2(states["pit"])
    other.vcpu.devices.set_state(states["vcpu"])
    assert json.loads(json.dumps(other.states())) == states
    assert other.clock.next_deadline() == machine.clock.next_deadline()


def test_firmware_dma_survives_any_command() -> None:
    machine = Machine("dma")
    chance = machine.chance
    memory = machine.vm.memory
    for number in range(5_000):
        # The command's place, its length and the place of the data are near the end of memory now and then.
        command = chance.choice((0x1000, MEMORY_SIZE - chance.randrange(32), chance.getrandbits(64)))
        address = chance.choice((0x2000, MEMORY_SIZE - chance.randrange(64), chance.getrandbits(64)))
        length = chance.choice((0, chance.randrange(64), chance.getrandbits(32)))
        control = chance.choice((chance.getrandbits(32), chance.randrange(0x30) << 16 | chance.randrange(32)))
        fields = control.to_bytes(4, "big") + length.to_bytes(4, "big") + address.to_bytes(8, "big")
        memory.store_bytes(command, fields)
        for half in range(2):
            value = int.from_bytes(command.to_bytes(8, "big")[4 * half : 4 * half + 4], "little")
            machine.vm.ports.write(FW_CFG_DMA + 4 * half, 4, value)
        if command == 0x1000 and not 0x1000 - length < address < 0x1010:
            assert memory.load(command, 4) in (0, 1 << 24)
        if number % 1_000 == 0:
            machine.look_for_what_grows()
            assert len(json.dumps(machine.hardware.fw_cfg.get_state())) < 200


def test_a_guest_that_only_reprograms_timers_leaves_no_timers_behind() -> None:
    machine = Machine("timers")
    bus, exit_bus, mmio = machine.vm.ports, machine.exit_ports, machine.vcpu.emulation.mmio
    for number in range(10_000):
        bus.write(0x43, 1, 0x34)
        bus.write(0x40, 1, number & 0xFF)
        bus.write(0x40, 1, 0xFF)
        bus.write(0x70, 1, 0x0B)
        bus.write(0x71, 1, 0x72)
        bus.write(0x70, 1, 0x0C)
        bus.read(0x71, 1)
        exit_bus.write(0x602, 2, number & 1)
        mmio.write(LAPIC_PAGE + 0x320, 4, number % 3 << 17)
        mmio.write(LAPIC_PAGE + 0x380, 4, number + 1)
        write_msr(machine.vcpu.emulation, 0x6E0, 1 << 50)
        if number % 1_000 == 0:
            machine.look_for_what_grows()
    assert machine.clock.queue_length < QUEUE_LIMIT


def test_a_bus_without_devices_answers_nobody() -> None:
    assert PortBus().read(0x80, 4) is None
    assert MmioBus().read(LAPIC_PAGE, 4) is None
