"""The I/O APIC: registers, edges and levels, masks, Remote IRR and the end of interrupts."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from lasskvm.kvm.irqchip.ioapic import IOAPIC_BASE, IOAPIC_PINS, Ioapic
from lasskvm.kvm.irqchip.messages import DeliveryMode, InterruptMessage

SELECT, WINDOW = IOAPIC_BASE, IOAPIC_BASE + 0x10
ID, VERSION, ARBITRATION = 0, 1, 2
PIN = 14
VECTOR = 0x81
EDGE, LEVEL = 0, 1 << 15
MASKED = 1 << 16
REMOTE_IRR = 1 << 14
DELIVERY_STATUS = 1 << 12


class Board:
    """An I/O APIC and a processor that takes every message, or none."""

    def __init__(self) -> None:
        self.messages: list[InterruptMessage] = []
        self.takes_messages = True
        self.ioapic = Ioapic(self._send)

    def _send(self, message: InterruptMessage) -> bool:
        self.messages.append(message)
        return self.takes_messages

    def read(self, register: int) -> int:
        self.ioapic.write_mmio(SELECT, 4, register)
        return self.ioapic.read_mmio(WINDOW, 4)

    def write(self, register: int, value: int) -> None:
        self.ioapic.write_mmio(SELECT, 4, register)
        self.ioapic.write_mmio(WINDOW, 4, value)

    def entry(self, pin: int = PIN) -> int:
        return self.read(0x10 + 2 * pin) | self.read(0x11 + 2 * pin) << 32

    def program(self, trigger: int, *, pin: int = PIN, vector: int = VECTOR, more: int = 0) -> None:
        entry = vector | trigger | more
        self.write(0x11 + 2 * pin, entry >> 32)
        self.write(0x10 + 2 * pin, entry & 0xFFFF_FFFF)

    def pulse(self, pin: int = PIN) -> None:
        self.ioapic.set_irq(pin, True)
        self.ioapic.set_irq(pin, False)

    def vectors(self) -> list[int]:
        return [message.vector for message in self.messages]


@pytest.fixture
def board() -> Board:
    return Board()


# ------------------------------------------------------------------------------------------------------- registers


def test_the_version_register_tells_version_11h_and_24_pins(board: Board) -> None:
    assert board.read(VERSION) == 0x0017_0011
    board.write(VERSION, 0)
    assert board.read(VERSION) == 0x0017_0011


def test_the_id_has_four_bits_and_is_the_arbitration_id_too(board: Board) -> None:
    board.write(ID, 0xFFFF_FFFF)
    assert (board.read(ID), board.read(ARBITRATION)) == (0x0F00_0000, 0x0F00_0000)
    board.write(ARBITRATION, 0x0300_0000)
    assert board.read(ID) == 0x0F00_0000


def test_behind_power_on_every_pin_is_masked(board: Board) -> None:
    assert [board.entry(pin) for pin in range(IOAPIC_PINS)] == [MASKED] * IOAPIC_PINS
    for pin in range(IOAPIC_PINS):
        board.pulse(pin)
    assert board.messages == []


@pytest.mark.parametrize("register", [0x03, 0x0F, 0x40, 0xFF])
def test_a_register_that_does_not_exist_reads_ones_and_takes_nothing(board: Board, register: int) -> None:
    before = board.ioapic.get_state()["entries"]
    board.write(register, 0)
    assert board.read(register) == 0xFFFF_FFFF
    assert board.ioapic.get_state()["entries"] == before


def test_the_select_register_has_eight_bits(board: Board) -> None:
    board.ioapic.write_mmio(SELECT, 4, 0xABCD_EF01)
    assert board.ioapic.read_mmio(SELECT, 4) == VERSION


def test_every_entry_is_its_own(board: Board) -> None:
    for pin in range(IOAPIC_PINS):
        board.program(EDGE, pin=pin, vector=0x30 + pin, more=MASKED | pin << 56)
    for pin in range(IOAPIC_PINS):
        assert board.entry(pin) == 0x30 + pin | MASKED | pin << 56


def test_delivery_status_and_remote_irr_cannot_be_written(board: Board) -> None:
    board.program(LEVEL, more=REMOTE_IRR | DELIVERY_STATUS)
    assert not board.entry() & (REMOTE_IRR | DELIVERY_STATUS)
    board.ioapic.set_irq(PIN, True)
    board.program(LEVEL, more=MASKED)
    assert board.entry() == VECTOR | LEVEL | MASKED | REMOTE_IRR


@pytest.mark.parametrize(("size", "read"), [(1, 0x11), (2, 0x0011), (4, 0x0017_0011), (8, 0x0017_0011)])
def test_a_register_is_read_from_its_lowest_byte_on(board: Board, size: int, read: int) -> None:
    board.ioapic.write_mmio(SELECT, 1, VERSION)
    assert board.ioapic.read_mmio(WINDOW, size) & (1 << 8 * size) - 1 == read


def test_a_short_store_clears_the_rest_of_the_register(board: Board) -> None:
    board.program(LEVEL, more=MASKED)
    board.ioapic.write_mmio(SELECT, 1, 0x10 + 2 * PIN)
    board.ioapic.write_mmio(WINDOW, 1, 0x42)
    assert board.entry() == 0x42


def test_a_long_store_is_its_lower_half(board: Board) -> None:
    board.ioapic.write_mmio(SELECT, 4, 0x10 + 2 * PIN)
    board.ioapic.write_mmio(WINDOW, 8, 0xDEAD_BEEF_0001_0042)
    assert board.entry() == MASKED | 0x42


@pytest.mark.parametrize("offset", [0x01, 0x04, 0x11, 0x20, 0x40, 0x100, 0xFFC])
def test_nothing_answers_beside_the_two_registers(board: Board, offset: int) -> None:
    before = board.ioapic.get_state()
    board.ioapic.write_mmio(IOAPIC_BASE + offset, 4, 0xFFFF_FFFF)
    assert board.ioapic.read_mmio(IOAPIC_BASE + offset, 4) == 0
    assert board.ioapic.get_state() == before


def test_an_access_of_an_odd_size_has_no_effect(board: Board) -> None:
    board.ioapic.write_mmio(SELECT, 3, VERSION)
    assert board.ioapic.read_mmio(SELECT, 4) == ID
    board.write(VERSION, 0)
    assert board.ioapic.read_mmio(WINDOW, 3) == 0


# -------------------------------------------------------------------------------------------------------- messages


def test_an_entry_says_what_the_message_is(board: Board) -> None:
    board.program(EDGE, more=0xA5 << 56 | 1 << 11 | DeliveryMode.LOWEST_PRIORITY << 8)
    board.pulse()
    assert board.messages == [
        InterruptMessage(VECTOR, DeliveryMode.LOWEST_PRIORITY, 0xA5, logical=True, level_triggered=False)
    ]


@pytest.mark.parametrize("mode", DeliveryMode)
def test_every_delivery_mode_reaches_the_processor(board: Board, mode: DeliveryMode) -> None:
    board.program(EDGE, more=mode << 8)
    board.pulse()
    assert [message.mode for message in board.messages] == [mode]


def test_a_level_triggered_message_says_so(board: Board) -> None:
    board.program(LEVEL)
    board.ioapic.set_irq(PIN, True)
    assert board.messages == [
        InterruptMessage(VECTOR, DeliveryMode.FIXED, 0, logical=False, level_triggered=True)
    ]


# ----------------------------------------------------------------------------------------------------------- edges


def test_each_edge_sends_a_message_and_a_line_that_stays_up_none(board: Board) -> None:
    board.program(EDGE)
    board.ioapic.set_irq(PIN, True)
    board.ioapic.set_irq(PIN, True)
    assert len(board.messages) == 1
    board.ioapic.set_irq(PIN, False)
    board.pulse()
    assert len(board.messages) == 2


def test_an_edge_does_not_wait_for_the_end_of_interrupt(board: Board) -> None:
    board.program(EDGE)
    board.pulse()
    assert not board.entry() & REMOTE_IRR
    board.pulse()
    assert board.vectors() == [VECTOR, VECTOR]


def test_a_masked_edge_is_lost(board: Board) -> None:
    board.program(EDGE, more=MASKED)
    board.pulse()
    board.program(EDGE)
    assert board.messages == []
    board.pulse()
    assert board.vectors() == [VECTOR]


def test_an_edge_on_a_line_that_was_up_while_masked_needs_a_new_edge(board: Board) -> None:
    board.program(EDGE, more=MASKED)
    board.ioapic.set_irq(PIN, True)
    board.program(EDGE)
    board.ioapic.set_irq(PIN, True)
    assert board.messages == []


# ---------------------------------------------------------------------------------------------------------- levels


def test_a_level_sends_one_message_until_its_end(board: Board) -> None:
    board.program(LEVEL)
    board.ioapic.set_irq(PIN, True)
    board.ioapic.set_irq(PIN, True)
    assert board.vectors() == [VECTOR]
    assert board.entry() & REMOTE_IRR


def test_a_level_that_is_still_up_at_its_end_is_sent_again(board: Board) -> None:
    board.program(LEVEL)
    board.ioapic.set_irq(PIN, True)
    board.ioapic.end_of_interrupt(VECTOR)
    assert board.vectors() == [VECTOR, VECTOR]
    board.ioapic.set_irq(PIN, False)
    board.ioapic.end_of_interrupt(VECTOR)
    assert board.vectors() == [VECTOR, VECTOR]
    assert not board.entry() & REMOTE_IRR


def test_a_level_that_drops_before_its_end_keeps_remote_irr(board: Board) -> None:
    board.program(LEVEL)
    board.pulse()
    board.ioapic.set_irq(PIN, True)
    assert board.vectors() == [VECTOR]
    board.ioapic.end_of_interrupt(VECTOR)
    assert board.vectors() == [VECTOR, VECTOR]


def test_the_end_of_another_vector_ends_nothing(board: Board) -> None:
    board.program(LEVEL)
    board.ioapic.set_irq(PIN, True)
    board.ioapic.end_of_interrupt(VECTOR + 1)
    assert board.entry() & REMOTE_IRR
    assert board.vectors() == [VECTOR]


def test_one_end_serves_every_level_with_its_vector_and_no_edge(board: Board) -> None:
    board.program(LEVEL, pin=3)
    board.program(LEVEL, pin=4)
    board.program(EDGE, pin=5)
    for pin in (3, 4, 5):
        board.ioapic.set_irq(pin, True)
    board.messages.clear()
    board.ioapic.end_of_interrupt(VECTOR)
    assert [message.level_triggered for message in board.messages] == [True, True]


def test_a_masked_level_is_sent_when_it_is_unmasked_and_still_up(board: Board) -> None:
    board.program(LEVEL, more=MASKED)
    board.ioapic.set_irq(PIN, True)
    assert board.messages == []
    board.program(LEVEL)
    assert board.vectors() == [VECTOR]


def test_a_masked_level_that_has_dropped_is_not_sent(board: Board) -> None:
    board.program(LEVEL, more=MASKED)
    board.pulse()
    board.program(LEVEL)
    assert board.messages == []


def test_a_level_that_is_masked_at_its_end_waits_for_the_mask(board: Board) -> None:
    board.program(LEVEL)
    board.ioapic.set_irq(PIN, True)
    board.program(LEVEL, more=MASKED)
    board.ioapic.end_of_interrupt(VECTOR)
    assert board.vectors() == [VECTOR]
    assert not board.entry() & REMOTE_IRR
    board.program(LEVEL)
    assert board.vectors() == [VECTOR, VECTOR]


def test_turning_a_pin_to_edges_and_back_ends_its_interrupt(board: Board) -> None:
    board.program(LEVEL)
    board.ioapic.set_irq(PIN, True)
    board.write(0x10 + 2 * PIN, VECTOR | EDGE | MASKED)
    assert not board.entry() & REMOTE_IRR
    board.write(0x10 + 2 * PIN, VECTOR | LEVEL)
    assert board.vectors() == [VECTOR, VECTOR]


def test_a_level_that_nobody_takes_does_not_wait_for_an_end(board: Board) -> None:
    board.takes_messages = False
    board.program(LEVEL)
    board.ioapic.set_irq(PIN, True)
    assert not board.entry() & REMOTE_IRR
    board.takes_messages = True
    board.ioapic.set_irq(PIN, True)
    assert board.entry() & REMOTE_IRR
    assert len(board.messages) == 2


# ------------------------------------------------------------------------------------------------- reset and state


def test_a_reset_masks_every_pin_and_leaves_the_lines(board: Board) -> None:
    board.write(ID, 0x0500_0000)
    board.program(LEVEL, more=MASKED)
    board.ioapic.set_irq(PIN, True)
    board.ioapic.reset()
    assert (board.read(ID), board.entry()) == (0, MASKED)
    assert board.messages == []
    board.program(LEVEL)
    assert board.vectors() == [VECTOR]


def test_a_line_is_a_wire_to_its_pin(board: Board) -> None:
    board.program(EDGE)
    board.ioapic.line(PIN)(True)
    assert board.vectors() == [VECTOR]


def drive(board: Board, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(400):
        match chance.randrange(4):
            case 0:
                board.ioapic.set_irq(chance.randrange(IOAPIC_PINS), chance.random() < 0.5)
            case 1:
                board.ioapic.end_of_interrupt(chance.randrange(4))
            case 2:
                board.write(chance.randrange(0x100), chance.getrandbits(32) & ~0xFC | chance.getrandbits(2))
            case _:
                board.ioapic.write_mmio(
                    IOAPIC_BASE + 4 * chance.randrange(8),
                    chance.choice((1, 2, 3, 4, 8)),
                    chance.getrandbits(64),
                )


@pytest.mark.parametrize("seed", range(5))
def test_a_copy_goes_on_as_the_original_does_and_sends_nothing_by_itself(seed: int) -> None:
    original, copy = Board(), Board()
    drive(original, seed)
    copy.ioapic.set_state(json.loads(json.dumps(original.ioapic.get_state())))
    assert copy.messages == []
    original.messages.clear()
    drive(original, seed + 100)
    drive(copy, seed + 100)
    assert original.messages
    assert (copy.messages, copy.ioapic.get_state()) == (original.messages, original.ioapic.get_state())


@pytest.mark.parametrize(
    "change", [{"entries": [0] * 23}, {"entries": ["0"] * 24}, {"select": None}, {"lines": "x"}]
)
def test_what_is_no_state_is_refused_and_changes_no_entry(board: Board, change: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        board.ioapic.set_state(board.ioapic.get_state() | change)
    assert board.entry() == MASKED
