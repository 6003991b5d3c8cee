"""A guest that writes anything anywhere gets faults at most, and cannot stop time or fill the clock's queue."""

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasskvm.emulator.faults import GuestFault
from lasskvm.kvm.clock import MAX_CANCELLED
from lasskvm.kvm.irqchip.apic_registers import EOI, INITIAL_COUNT, LVT_TIMER, LVT_TIMER_PERIODIC, SPIV, TPR
from lasskvm.kvm.irqchip.lapic_timer import MAXIMUM_WAIT_NS, MINIMUM_PERIOD_NS
from lasskvm.kvm.irqchip.messages import DeliveryMode, InterruptMessage
from lasskvm.state import CR8

OPERATIONS = 20_000
BASES = [0xFEE00000 | enable << 11 | x2apic << 10 | 1 << 8 for enable in (0, 1) for x2apic in (0, 1)]


def any_value(random: Random, bits: int) -> int:
    """All bits, few bits, or none: uniform numbers alone would seldom pass a check."""
    value = random.getrandbits(bits)
    choice = random.randrange(4)
    if choice == 0:
        return value
    if choice == 1:
        return value & 0xFF
    if choice == 2:
        return 1 << random.randrange(bits) | value & 0x7FF
    return random.choice([0, (1 << bits) - 1, 0x1FF, LVT_TIMER_PERIODIC | 0x40, 1 << 18 | 0x41])


class Assault:
    """Random operations on a machine, as guest, devices and VMM do them."""

    def __init__(self, machine, random: Random) -> None:
        self.machine = machine
        self.random = random
        self.faults = 0
        self.vectors: list[int] = []
        self.operations = [
            self.load, self.store, self.store, self.rdmsr, self.wrmsr, self.wrmsr, self.base, self.deadline,
            self.tsc, self.message, self.take, self.cr8, self.wait, self.reset,
            self.settle,
        ]  # fmt: skip

    def step(self) -> None:
        operation = self.random.choice(self.operations)
        try:
            operation()
        except GuestFault:
            assert operation in (self.rdmsr, self.wrmsr, self.base)
            self.faults += 1

    def place(self) -> int:
        offset = self.random.choice([self.random.randrange(0x1000), self.random.randrange(0x40) << 4])
        return self.machine.lapic.base + offset

    def load(self) -> None:
        size = self.random.choice([1, 2, 3, 4, 8])
        assert 0 <= self.machine.lapic.read_mmio(self.place(), size) < 1 << 8 * size

    def store(self) -> None:
        size = self.random.choice([1, 2, 4, 4, 4, 4, 8])
        self.machine.lapic.write_mmio(self.place(), size, any_value(self.random, 8 * size))

    def rdmsr(self) -> None:
        assert 0 <= self.machine.lapic.read_msr(self.random.randrange(0x800, 0x900)) < 1 << 64

    def wrmsr(self) -> None:
        self.machine.lapic.write_msr(0x800 + self.random.randrange(0x40), any_value(self.random, 64))

    def base(self) -> None:
        anything = any_value(self.random, 64)
        self.machine.lapic.write_base(self.random.choice([*BASES, anything]), bool(self.random.randrange(2)))

    def deadline(self) -> None:
        self.machine.lapic.write_tsc_deadline(any_value(self.random, 64))
        assert 0 <= self.machine.lapic.read_tsc_deadline() < 1 << 64

    def tsc(self) -> None:
        self.machine.tsc_offset = any_value(self.random, 63) - self.machine.clock.now()
        self.machine.lapic.tsc_changed()

    def message(self) -> None:
        random = self.random
        self.machine.lapic.receive(
            InterruptMessage(
                random.randrange(256),
                DeliveryMode(random.randrange(8)),
                random.choice([0, 1, 0xFF, any_value(random, 32)]),
                bool(random.randrange(2)),
                bool(random.randrange(2)),
            )
        )

    def take(self) -> None:
        pending = self.machine.lapic.pending_vector()
        vector = self.machine.lapic.acknowledge()
        assert pending is None or vector == pending >= 16
        self.vectors.append(vector)

    def cr8(self) -> None:
        self.machine.words[CR8] = self.random.randrange(16)
        self.machine.lapic.cr8_written()

    def wait(self) -> None:
        clock = self.machine.clock
        clock.skip_to(clock.now() + self.random.choice([1, 1000, 10**9]))
        clock.run_due()

    def settle(self) -> None:
        """Enable everything again: a guest that is all chance does that too seldom to get far."""
        self.machine.lapic.write_base(self.random.choice([BASES[2], BASES[3]]), host_initiated=True)
        self.machine[SPIV] = 0x1FF
        self.machine[TPR] = self.machine[EOI] = 0

    def reset(self) -> None:
        if not self.random.randrange(20):
            self.random.choice([self.machine.lapic.reset, self.machine.lapic.init_reset])()


@pytest.mark.parametrize("seed", [1, 2])
def test_no_guest_raises_anything_but_faults_or_piles_up_timers(new_machine, seed: int) -> None:
    machine = new_machine()
    assault = Assault(machine, Random(seed))
    for _ in range(OPERATIONS):
        assault.step()
        machine.events.clear()
        machine.ended.clear()
        # One timer at most waits, the others are cancelled and will be swept.
        assert machine.clock.queue_length <= MAX_CANCELLED + 2
        deadline = machine.clock.next_deadline()
        assert deadline is None or deadline <= machine.clock.now() + MAXIMUM_WAIT_NS
    assert assault.faults > OPERATIONS // 100, "some operations were refused"
    assert len(set(assault.vectors)) > 50, "and some were not"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), steps=st.integers(0, 60))
def test_a_hostile_guest_goes_on_elsewhere_in_any_state(new_machine, seed: int, steps: int) -> None:
    original, random = new_machine(), Random(seed)
    assault = Assault(original, random)
    for _ in range(steps):
        assault.step()
    copy = new_machine(start_ns=original.clock.now())
    copy.words[:] = original.words
    copy.tsc_offset = original.tsc_offset
    copy.lapic.set_state(json.loads(json.dumps(original.lapic.get_state())))
    going_on = random.getrandbits(32)
    ends = []
    for machine in (original, copy):
        assault = Assault(machine, Random(going_on))
        for _ in range(40):
            assault.step()
        ends.append(
            (assault.vectors, assault.faults, machine.lapic.get_registers(), machine.clock.next_deadline())
        )
    assert ends[0] == ends[1]


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1024, max_size=1024))
def test_any_kvm_registers_leave_an_apic_that_works(new_machine, page: bytes) -> None:
    machine = new_machine()
    machine.lapic.set_registers(page)
    kept = machine.lapic.get_registers()
    machine.lapic.set_registers(kept)
    assert machine.lapic.get_registers() == kept
    machine.clock.skip_to(10**12)
    machine.clock.run_due()
    assert all(vector >= 16 for vector in machine.deliver())


def test_a_guest_that_asks_for_a_timer_storm_gets_one_at_the_least_period(machine) -> None:
    machine[LVT_TIMER] = LVT_TIMER_PERIODIC | 0x61
    machine[INITIAL_COUNT] = 1
    fired = 0
    while machine.clock.now() < 100 * MINIMUM_PERIOD_NS:
        machine.clock.skip_to(machine.clock.next_deadline())
        fired += machine.clock.run_due()
    assert fired == 100
