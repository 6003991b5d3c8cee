"""KVM's paravirtual clock: what the guest finds in its memory, and which MSRs it has."""

from __future__ import annotations

import json
import mmap
import struct
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.msrs import MsrFile
from lasskvm.kvm.clock import Clock
from lasskvm.kvm.paravirt import ParavirtClock, time_scale
from lasskvm.memory import SLOT_READONLY, GuestMemory
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.exceptions import GP

WALL_CLOCK_OLD, SYSTEM_TIME_OLD = 0x11, 0x12
WALL_CLOCK, SYSTEM_TIME = 0x4B564D00, 0x4B564D01
ALL = (WALL_CLOCK_OLD, SYSTEM_TIME_OLD, WALL_CLOCK, SYSTEM_TIME)
ENABLE = 1
STABLE = 1

MEMORY_BYTES = 0x4000
READ_ONLY = 0x8000
STRUCTURE = 0x1040
#: 2027-01-15T08:00:00.123456789Z
EPOCH_NS = 1_800_000_000_123_456_789


class Machine:
    """A clock that stands still until it is told, and memory with a hole behind 16 KiB and a read-only page."""

    def __init__(self, cpu: str = "max") -> None:
        self.now = 5_000
        self.tsc_offset = 1_000_000
        self.memory = GuestMemory()
        self.memory.set_slot(0, 0, mmap.mmap(-1, MEMORY_BYTES))
        self.memory.set_slot(1, READ_ONLY, mmap.mmap(-1, 0x1000), SLOT_READONLY)
        cpuid = CpuidTable(parse_cpu(cpu).entries())
        self.clock = ParavirtClock(
            self.memory, Clock(lambda: self.now, EPOCH_NS), lambda: self.now + self.tsc_offset, cpuid
        )
        self.msrs = MsrFile(cpuid)
        self.clock.attach(self.msrs)

    def read(self, index: int) -> int:
        """RDMSR."""
        return self.msrs.attached[index].read()

    def write(self, index: int, value: int) -> None:
        """WRMSR."""
        self.msrs.attached[index].write(value)

    def guest_time(self, gpa: int = STRUCTURE) -> int:
        """Nanoseconds as a guest works them out, by the documentation of the structure."""
        info = time_info(self.memory, gpa)
        ticks = self.now + self.tsc_offset - info["tsc"]
        ticks = ticks << info["shift"] if info["shift"] >= 0 else ticks >> -info["shift"]
        return info["system_time"] + (ticks * info["mul"] >> 32)


def time_info(memory: GuestMemory, gpa: int) -> dict[str, int]:
    fields = struct.unpack("<IIQQIbBBB", memory.read(gpa, 32))
    names = ("version", "pad", "tsc", "system_time", "mul", "shift", "flags", "pad1", "pad2")
    return dict(zip(names, fields, strict=True))


# ------------------------------------------------------------------------------------------------ the system time


@pytest.mark.parametrize("index", [SYSTEM_TIME, SYSTEM_TIME_OLD])
def test_the_structure_says_what_the_time_is_and_how_the_counter_runs(index: int) -> None:
    machine = Machine()
    machine.write(index, STRUCTURE | ENABLE)
    assert time_info(machine.memory, STRUCTURE) == {
        "version": 2, "pad": 0, "tsc": 1_005_000, "system_time": 5_000, "mul": 1 << 31, "shift": 1, "flags": STABLE,
        "pad1": 0, "pad2": 0,
    }  # fmt: skip


def test_the_guest_reads_the_time_from_its_counter() -> None:
    machine = Machine()
    machine.write(SYSTEM_TIME, STRUCTURE | ENABLE)
    for now in (5_000, 5_001, 123_456_789, 10**15):
        machine.now = now
        assert machine.guest_time() == now


def test_the_stable_bit_follows_cpuid() -> None:
    machine = Machine("max,-kvmclock_stable_bit")
    machine.write(SYSTEM_TIME, STRUCTURE | ENABLE)
    assert time_info(machine.memory, STRUCTURE)["flags"] == 0
    machine.clock.cpuid = CpuidTable(parse_cpu("max").entries())
    machine.clock.republish()
    assert time_info(machine.memory, STRUCTURE)["flags"] == STABLE


def test_a_changed_counter_leaves_the_time_as_it_is_once_it_is_republished() -> None:
    machine = Machine()
    machine.write(SYSTEM_TIME, STRUCTURE | ENABLE)
    machine.now = 1_000_000
    machine.tsc_offset = -900_000
    assert machine.guest_time() != 1_000_000
    machine.clock.republish()
    assert machine.guest_time() == 1_000_000
    machine.now = 2_000_000
    assert machine.guest_time() == 2_000_000


@pytest.mark.parametrize(
    ("before", "after"),
    [(0, 2), (2, 4), (3, 6), (0x7FFF_FFFF, 0x8000_0002), (0xFFFF_FFFE, 0), (0xFFFF_FFFF, 2)],
)
def test_each_publication_has_another_even_version(before: int, after: int) -> None:
    machine = Machine()
    machine.memory.store(STRUCTURE, 4, before)
    machine.write(SYSTEM_TIME, STRUCTURE | ENABLE)
    assert time_info(machine.memory, STRUCTURE)["version"] == after
    machine.memory.store(STRUCTURE, 4, before)
    machine.write(WALL_CLOCK, STRUCTURE)
    assert machine.memory.load(STRUCTURE, 4) == after


def test_without_the_enable_bit_nothing_is_written() -> None:
    machine = Machine()
    machine.write(SYSTEM_TIME, STRUCTURE)
    machine.clock.republish()
    assert machine.memory.read(0, MEMORY_BYTES) == bytes(MEMORY_BYTES)
    assert machine.read(SYSTEM_TIME) == STRUCTURE


def test_a_cleared_enable_bit_ends_publication() -> None:
    machine = Machine()
    machine.write(SYSTEM_TIME, STRUCTURE | ENABLE)
    machine.write(SYSTEM_TIME, STRUCTURE)
    published = machine.memory.read(STRUCTURE, 32)
    machine.now += 1
    machine.clock.republish()
    assert machine.memory.read(STRUCTURE, 32) == published


# --------------------------------------------------------------------------------------------------- the wall clock


@pytest.mark.parametrize("index", [WALL_CLOCK, WALL_CLOCK_OLD])
def test_the_wall_clock_is_the_time_of_day_at_system_time_0(index: int) -> None:
    machine = Machine()
    machine.write(index, STRUCTURE)
    assert struct.unpack("<III", machine.memory.read(STRUCTURE, 12)) == (2, 1_800_000_000, 123_456_789)
    assert machine.memory.load(STRUCTURE + 12, 4) == 0


def test_the_wall_clock_is_written_when_asked_for_only() -> None:
    machine = Machine()
    machine.write(WALL_CLOCK, STRUCTURE)
    machine.memory.store(STRUCTURE + 4, 4, 0)
    machine.clock.republish()
    assert machine.memory.load(STRUCTURE + 4, 4) == 0


def test_address_0_is_no_wall_clock() -> None:
    machine = Machine()
    machine.write(WALL_CLOCK, 0)
    assert machine.memory.read(0, 16) == bytes(16)


# ------------------------------------------------------------------------------------------------------- the MSRs


def test_old_and_new_numbers_are_the_same_registers() -> None:
    machine = Machine()
    machine.write(WALL_CLOCK, 0x1000)
    machine.write(SYSTEM_TIME_OLD, 0x2001)
    assert [machine.read(index) for index in ALL] == [0x1000, 0x2001, 0x1000, 0x2001]


@pytest.mark.parametrize(
    ("cpu", "missing"),
    [
        ("max,-kvmclock", {WALL_CLOCK_OLD, SYSTEM_TIME_OLD}),
        ("max,-kvmclock2", {WALL_CLOCK, SYSTEM_TIME}),
        ("max,-hypervisor", set(ALL)),
    ],
)
def test_an_msr_whose_feature_cpuid_lacks_is_a_general_protection(cpu: str, missing: set[int]) -> None:
    machine = Machine(cpu)
    for index in ALL:
        if index not in missing:
            machine.write(index, 0)
            assert machine.read(index) == 0
            continue
        with pytest.raises(GuestFault) as read:
            machine.read(index)
        with pytest.raises(GuestFault) as written:
            machine.write(index, STRUCTURE | ENABLE)
        assert (
            (read.value.vector, read.value.error_code)
            == (written.value.vector, written.value.error_code)
            == (GP, 0)
        )
    assert machine.memory.read(STRUCTURE, 32) == bytes(32)


@pytest.mark.parametrize(
    "gpa",
    [MEMORY_BYTES, MEMORY_BYTES - 2, MEMORY_BYTES - 30, READ_ONLY, READ_ONLY - 4, 1 << 46, (1 << 64) - 2],
    ids=hex,
)
@pytest.mark.parametrize("index", ALL, ids=hex)
def test_a_structure_without_memory_gets_nothing(index: int, gpa: int) -> None:
    if index in (WALL_CLOCK, WALL_CLOCK_OLD) and gpa == MEMORY_BYTES - 30:
        gpa = MEMORY_BYTES - 10
    machine = Machine()
    value = gpa | ENABLE if index in (SYSTEM_TIME, SYSTEM_TIME_OLD) else gpa
    machine.write(index, value)
    machine.clock.republish()
    assert machine.read(index) == value
    assert machine.memory.read(0, MEMORY_BYTES) == bytes(MEMORY_BYTES)
    assert machine.memory.read(READ_ONLY, 0x1000) == bytes(0x1000)


@given(st.sampled_from(ALL), st.integers(0, (1 << 64) - 1))
def test_any_value_is_kept_and_harms_nobody(index: int, value: int) -> None:
    machine = Machine()
    machine.write(index, value)
    assert machine.read(index) == value


# -------------------------------------------------------------------------------------------------- state, reset


def test_a_restored_clock_goes_on_without_touching_memory() -> None:
    saved = Machine()
    saved.write(SYSTEM_TIME, STRUCTURE | ENABLE)
    saved.write(WALL_CLOCK, 0x2000)
    restored = Machine()
    restored.clock.set_state(json.loads(json.dumps(saved.clock.get_state())))
    assert restored.memory.read(STRUCTURE, 32) == bytes(32)
    assert [restored.read(index) for index in ALL] == [saved.read(index) for index in ALL]
    restored.clock.republish()
    assert restored.memory.read(STRUCTURE, 32) == saved.memory.read(STRUCTURE, 32)


@pytest.mark.parametrize("state", [{}, {"wall_clock": 0}, {"wall_clock": None, "system_time": 0}])
def test_what_is_no_state_is_refused(state: dict[str, object]) -> None:
    machine = Machine()
    with pytest.raises((KeyError, TypeError)):
        machine.clock.set_state(state)


def test_after_a_reset_nothing_is_published_any_more() -> None:
    machine = Machine()
    machine.write(SYSTEM_TIME, STRUCTURE | ENABLE)
    machine.write(WALL_CLOCK, 0x2000)
    machine.clock.reset()
    machine.memory.write(STRUCTURE, bytes(32))
    machine.clock.republish()
    assert [machine.read(index) for index in ALL] == [0, 0, 0, 0]
    assert machine.memory.read(STRUCTURE, 32) == bytes(32)


# ----------------------------------------------------------------------------------------------------- the scale


@pytest.mark.parametrize(
    ("tsc_khz", "scale"),
    [
        (1_000_000, (1 << 31, 1)),
        (500_000, (1 << 31, 2)),
        (2_000_000, (1 << 31, 0)),
        (2_400_000, (0xD555_5555, -1)),
    ],
)
def test_the_scale_of_some_frequencies(tsc_khz: int, scale: tuple[int, int]) -> None:
    assert time_scale(tsc_khz) == scale


@given(st.integers(1, 100_000_000))
def test_every_scale_is_exact_to_31_bits_and_fits_its_fields(tsc_khz: int) -> None:
    multiplier, shift = time_scale(tsc_khz)
    assert 1 << 31 <= multiplier < 1 << 32
    assert -128 <= shift < 128
    nanoseconds_per_tick = Fraction(multiplier, 1 << 32) * Fraction(2) ** shift
    exact = Fraction(1_000_000, tsc_khz)
    assert 0 <= 1 - nanoseconds_per_tick / exact < Fraction(1, 1 << 31)
