"""The state of in-kernel devices: a chip that gets another one's state behaves like it from then on."""

from __future__ import annotations

import errno
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasskvm.kvm.clock import Clock, VirtualClock
from lasskvm.kvm.irqchip import Pic, Pit
from lasskvm.kvm.vm import Vm

PIC_PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)
PIT_PORTS = (0x40, 0x41, 0x42, 0x43, 0x61)

#: What a guest and the outside do to a chip: (place, value) pairs.
pic_actions = st.lists(
    st.tuples(st.sampled_from([*PIC_PORTS, "irq", "ack"]), st.integers(0, 255)), max_size=40
)
pit_actions = st.lists(st.tuples(st.sampled_from([*PIT_PORTS, "wait"]), st.integers(0, 255)), max_size=30)


def through_json(state: dict[str, object]) -> dict[str, object]:
    copy: dict[str, object] = json.loads(json.dumps(state))
    return copy


def drive_pic(pic: Pic, actions: list[tuple[int | str, int]]) -> list[object]:
    seen: list[object] = []
    for place, value in actions:
        if place == "irq":
            pic.set_irq(value & 15, bool(value & 16))
        elif place == "ack":
            seen.append(pic.acknowledge())
        else:
            assert isinstance(place, int)
            pic.write_port(place, 1, value)
            seen.append(pic.read_port(place, 1))
        seen.append(pic.pending())
    return seen


@settings(max_examples=200, deadline=None)
@given(pic_actions, pic_actions)
def test_interrupt_controllers_go_on_from_a_state(
    before: list[tuple[int | str, int]], after: list[tuple[int | str, int]]
) -> None:
    original, copy = Pic(), Pic()
    drive_pic(original, before)
    copy.set_state(through_json(original.get_state()))
    assert copy.pending() == original.pending()
    assert drive_pic(copy, after) == drive_pic(original, after)


class Machine:
    """A PIT on a clock of its own, and what it did to its line when."""

    def __init__(self) -> None:
        self.now = 0
        self.clock = Clock(lambda: self.now)
        self.edges: list[tuple[int, bool]] = []
        self.pit = Pit(self.clock, lambda level: self.edges.append((self.now, level)))

    def drive(self, actions: list[tuple[int | str, int]]) -> list[int]:
        seen = []
        for place, value in actions:
            if place == "wait":
                self.now += value * 100_000
                self.clock.run_due()
            else:
                assert isinstance(place, int)
                self.pit.write_port(place, 1, value)
                seen.append(self.pit.read_port(place, 1))
        return seen


@settings(max_examples=200, deadline=None)
@given(pit_actions, pit_actions)
def test_the_timer_goes_on_from_a_state(
    before: list[tuple[int | str, int]], after: list[tuple[int | str, int]]
) -> None:
    original, copy = Machine(), Machine()
    original.drive(before)
    original.edges.clear()
    copy.now = original.now
    copy.pit.set_state(through_json(original.pit.get_state()))
    assert copy.drive(after) == original.drive(after)
    assert copy.edges == original.edges


def test_timers_with_one_deadline_keep_their_order_whichever_is_restored_first() -> None:
    ran: list[str] = []
    clock = VirtualClock(lambda: 10)
    first, second = (
        clock.call_at(50, lambda: ran.append("first")),
        clock.call_at(50, lambda: ran.append("second")),
    )
    other = VirtualClock(lambda: 10)
    other.restore(second.state, lambda: ran.append("second"))
    other.restore(first.state, lambda: ran.append("first"))
    other.call_at(50, lambda: ran.append("third"))
    other.run_due()
    assert ran == ["first", "second", "third"]


def test_the_state_goes_through_the_vm_and_back_to_the_same_vm() -> None:
    vm = Vm()
    vm.create_irqchip()
    vm.create_pit2()
    vm.ports.write(0x43, 1, 0x34)
    for _ in range(2):
        vm.ports.write(0x40, 1, 0x20)
    state, deadline = vm.get_pit2(), vm.clock.next_deadline()
    vm.irq_line(1, True)
    chips = vm.get_irqchip()
    vm.irq_line(1, False)
    vm.set_irqchip(chips)
    vm.set_pit2(state)
    assert (vm.get_irqchip(), vm.get_pit2(), vm.clock.next_deadline()) == (chips, state, deadline)


@pytest.mark.parametrize("name", ["get_irqchip", "get_pit2"])
def test_what_is_not_there_has_no_state(name: str) -> None:
    with pytest.raises(OSError, match="KVM_GET_") as refusal:
        getattr(Vm(), name)()
    assert refusal.value.errno == errno.ENXIO
