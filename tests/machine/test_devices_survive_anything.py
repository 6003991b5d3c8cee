"""Hostile guests: random accesses to every port, while time runs, never raise, hang or pile anything up."""

import random
from collections.abc import Callable

import pytest

from lasskvm.kvm.clock import VirtualClock
from lasskvm.kvm.iobus import PortBus, PortDevice
from lasskvm.kvm.irqchip import Pic, Pit
from lasskvm.machine.devices import I8042, DebugConsole, DebugExit, Port92, PostPort, Rtc, Uart16550
from lasskvm.machine.devices.uart16550 import BACKLOG_LIMIT, FIFO_SIZE

ACCESSES = 100_000
SIZES = (1, 2, 4)
#: More timers than this in the queue would mean that cancelled ones pile up.
QUEUE_LIMIT = 200


class Board:
    """All devices, with the output thrown away and counted."""

    def __init__(self) -> None:
        self.blocks = 0
        self.output_count = 0
        self.resets = 0
        self.exits = 0
        self.clock = VirtualClock(lambda: self.blocks)
        self.pic = Pic()
        self.uart = Uart16550(self.pic.line(4), self._output)
        self.devices: dict[str, PortDevice] = {
            "pic": self.pic,
            "pit": Pit(self.clock, self.pic.line(0)),
            "uart16550": self.uart,
            "rtc": Rtc(self.clock, self.pic.line(8)),
            "i8042": I8042(self._reset),
            "port92": Port92(self._reset),
            "debug_exit": DebugExit(self._exit),
            "debug_console": DebugConsole(self._output),
            "post_port": PostPort(),
        }

    def bus(self, *names: str) -> PortBus:
        bus = PortBus()
        for name in names:
            bus.register(self.devices[name])
        return bus

    def _output(self, data: bytes) -> None:
        self.output_count += len(data)

    def _reset(self) -> None:
        self.resets += 1

    def _exit(self, status: int) -> None:
        assert status & 1
        self.exits += 1


DEVICES = tuple(Board().devices)


def torment(board: Board, bus: PortBus, chance: random.Random, between: Callable[[], None]) -> None:
    """Throw accesses at the ports in and around the devices; let time pass; look for what grows."""
    ports = sorted(
        {
            port + near
            for device in board.devices.values()
            for span in device.ports
            for port in span
            for near in (-3, 0)
        }
    )
    for number in range(ACCESSES):
        port = chance.choice(ports)
        size = chance.choice(SIZES)
        if chance.random() < 0.5:
            value = bus.read(port, size)
            assert value is None or 0 <= value < 1 << 8 * size
        else:
            assert bus.write(port, size, chance.getrandbits(8 * size)) in (True, False)
        before = board.clock.now()
        board.blocks += chance.randrange(1, 2_000)
        if chance.random() < 0.01:
            deadline = board.clock.next_deadline()
            board.clock.skip_to(deadline if deadline is not None else before + 10**9)
        board.clock.run_due()
        between()
        assert board.clock.now() > before
        if number % 1_000 == 0:
            assert board.clock.queue_length < QUEUE_LIMIT
            assert len(board.uart.fifo) <= FIFO_SIZE
            assert len(board.uart.backlog) <= BACKLOG_LIMIT


@pytest.mark.parametrize("name", DEVICES)
def test_each_device_survives_random_accesses(name):
    board = Board()
    bus = board.bus(name)
    torment(board, bus, random.Random(name), lambda: None)
    device = board.devices[name]
    device.reset()
    assert bus.read(device.ports[0].start, 1) is not None


def test_all_devices_survive_random_accesses_while_interrupts_are_served_and_a_user_types():
    board = Board()
    chance = random.Random(2027)
    vectors = set()

    def serve_and_type() -> None:
        if board.pic.pending() and chance.random() < 0.5:
            vector = board.pic.acknowledge()
            assert 0 <= vector <= 255
            vectors.add(vector)
        if chance.random() < 0.1:
            board.uart.receive(chance.randbytes(chance.randrange(40)))
            board.uart.receive_break()

    torment(board, board.bus(*DEVICES), chance, serve_and_type)
    assert vectors, "interrupts got through"
    assert board.output_count
    assert board.resets
    assert board.exits


def test_a_guest_that_only_reprograms_timers_leaves_no_timers_behind():
    board = Board()
    bus = board.bus("pit", "rtc")
    for number in range(10_000):
        bus.write(0x43, 1, 0x34)
        bus.write(0x40, 1, number & 0xFF)
        bus.write(0x40, 1, 0xFF)
        bus.write(0x70, 1, 0x0B)
        bus.write(0x71, 1, 0x72)
        bus.write(0x70, 1, 0x0C)
        bus.read(0x71, 1)
    assert board.clock.queue_length < QUEUE_LIMIT
