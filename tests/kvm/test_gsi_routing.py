"""GSI routing: where lines lead by default, on a PC and as the VMM says; MSIs as messages."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest

from lasskvm.kvm.irqchip.ioapic import Ioapic
from lasskvm.kvm.irqchip.messages import DeliveryMode, InterruptMessage
from lasskvm.kvm.irqchip.pic import Pic
from lasskvm.kvm.irqchip.routing import (
    MAX_GSIS,
    ChipRoute,
    GsiRouter,
    IrqChip,
    MsiRoute,
    Route,
    default_routes,
    message_of_msi,
    pc_routes,
)

MSI_ADDRESS = 0xFEE0_0000


class Board:
    """A router, its chips, and what it has sent as MSIs."""

    def __init__(self) -> None:
        self.messages: list[InterruptMessage] = []
        self.pic = Pic()
        self.ioapic = Ioapic(self._send)
        self.router = GsiRouter(self.pic, self.ioapic, self._send)

    def _send(self, message: InterruptMessage) -> bool:
        self.messages.append(message)
        return True

    def pins_up(self) -> tuple[int, int]:
        """The lines that are up at the 8259As, and at the I/O APIC, as masks."""
        return self.pic.master.levels | self.pic.slave.levels << 8, self.ioapic.lines

    def pins_of(self, gsi: int) -> tuple[list[int], list[int]]:
        """The IRQs and pins that *gsi* raises, with all other lines down."""
        self.router.set_line(gsi, True)
        pic, ioapic = self.pins_up()
        self.router.set_line(gsi, False)
        assert self.pins_up() == (0, 0)
        return [pin for pin in range(16) if pic >> pin & 1], [pin for pin in range(24) if ioapic >> pin & 1]


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.mark.parametrize("gsi", range(24))
def test_by_default_a_gsi_is_the_pin_of_its_number(board: Board, gsi: int) -> None:
    assert board.pins_of(gsi) == ([gsi] if gsi < 16 else [], [gsi])


@pytest.mark.parametrize("gsi", range(24))
def test_on_a_pc_the_timer_is_pin_2_of_the_ioapic(board: Board, gsi: int) -> None:
    board.router.set_routes(pc_routes())
    pins = {0: [2], 2: []}.get(gsi, [gsi])
    assert board.pins_of(gsi) == ([gsi] if gsi < 16 else [], pins)


@pytest.mark.parametrize("gsi", [24, MAX_GSIS, 1 << 31, -1])
def test_a_gsi_without_a_route_leads_nowhere(board: Board, gsi: int) -> None:
    assert board.pins_of(gsi) == ([], [])
    assert board.messages == []


def test_a_table_takes_the_place_of_the_former_one(board: Board) -> None:
    board.router.set_routes([ChipRoute(7, IrqChip.IOAPIC, 20), ChipRoute(9, IrqChip.PIC_SLAVE, 3)])
    assert (board.pins_of(7), board.pins_of(9), board.pins_of(4)) == (([], [20]), ([11], []), ([], []))


def test_a_gsi_may_lead_to_each_of_the_three_chips(board: Board) -> None:
    board.router.set_routes(ChipRoute(5, chip, 6) for chip in IrqChip)
    assert board.pins_of(5) == ([6, 14], [6])


def test_a_wire_follows_the_table(board: Board) -> None:
    wire = board.router.line(3)
    board.router.set_routes([ChipRoute(3, IrqChip.IOAPIC, 19)])
    wire(True)
    assert board.pins_up() == (0, 1 << 19)


def test_raising_a_gsi_of_an_msi_sends_it_each_time_and_lowering_it_nothing(board: Board) -> None:
    board.router.set_routes([MsiRoute(30, MSI_ADDRESS, 0x55)])
    for level in (True, True, False):
        board.router.set_line(30, level)
    assert board.messages == [message_of_msi(MSI_ADDRESS, 0x55)] * 2


@pytest.mark.parametrize(
    ("routes", "sentence"),
    [
        ([ChipRoute(0, IrqChip.IOAPIC, 24)], "IOAPIC has no pin 24"),
        ([ChipRoute(0, IrqChip.PIC_MASTER, 8)], "PIC_MASTER has no pin 8"),
        ([ChipRoute(0, IrqChip.PIC_SLAVE, -1)], "PIC_SLAVE has no pin -1"),
        ([MsiRoute(MAX_GSIS, MSI_ADDRESS, 0)], "there is no GSI 4096"),
        ([ChipRoute(-1, IrqChip.IOAPIC, 0)], "there is no GSI -1"),
        (
            [ChipRoute(1, IrqChip.IOAPIC, 0), ChipRoute(1, IrqChip.IOAPIC, 1)],
            "GSI 1 may lead to each chip once",
        ),
        ([ChipRoute(1, IrqChip.IOAPIC, 0), MsiRoute(1, MSI_ADDRESS, 0)], "or else be one MSI"),
        ([MsiRoute(1, MSI_ADDRESS, 0), ChipRoute(1, IrqChip.IOAPIC, 0)], "or else be one MSI"),
        ([MsiRoute(1, MSI_ADDRESS, 0), MsiRoute(1, MSI_ADDRESS, 1)], "or else be one MSI"),
        ([ChipRoute(0, IrqChip.IOAPIC, 0)] * (MAX_GSIS + 1), "at most 4096 routes"),
    ],
)
def test_a_table_that_contradicts_itself_is_einval_and_changes_nothing(
    board: Board, routes: list[Route], sentence: str
) -> None:
    with pytest.raises(OSError, match=sentence) as refusal:
        board.router.set_routes(routes)
    assert refusal.value.errno == errno.EINVAL
    assert board.router.routes == default_routes()
    assert board.pins_of(4) == ([4], [4])


def test_an_empty_table_disconnects_every_line(board: Board) -> None:
    board.router.set_routes([])
    assert all(board.pins_of(gsi) == ([], []) for gsi in range(24))


def test_the_table_survives_being_saved(board: Board) -> None:
    routes = (*pc_routes(), MsiRoute(40, MSI_ADDRESS | 0x3000, 0xC1))
    board.router.set_routes(routes)
    copy = Board()
    copy.router.set_state(json.loads(json.dumps(board.router.get_state())))
    assert copy.router.routes == routes
    copy.router.set_line(40, True)
    assert copy.messages == [message_of_msi(MSI_ADDRESS | 0x3000, 0xC1)]


@pytest.mark.parametrize(
    "state", [{}, {"routes": 3}, {"routes": [[1]]}, {"routes": [[1, "HPET", 2]]}, {"routes": [[1, None, 2]]}]
)
def test_what_is_no_table_is_refused(board: Board, state: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        board.router.set_state(state)
    assert board.router.routes == default_routes()


@pytest.mark.parametrize(
    ("address", "data", "message"),
    [
        (MSI_ADDRESS, 0x31, InterruptMessage(0x31, DeliveryMode.FIXED, 0)),
        (0xFEEA_5000, 0x4031, InterruptMessage(0x31, DeliveryMode.FIXED, 0xA5)),
        (0xFEE0_1004, 0x31, InterruptMessage(0x31, DeliveryMode.FIXED, 1, logical=True)),
        (0xFEE0_1008, 0x31, InterruptMessage(0x31, DeliveryMode.FIXED, 1)),
        (0xFEEF_F00C, 0x131, InterruptMessage(0x31, DeliveryMode.LOWEST_PRIORITY, 0xFF, logical=True)),
        (MSI_ADDRESS, 0xC431, InterruptMessage(0x31, DeliveryMode.NMI, 0, level_triggered=True)),
        (MSI_ADDRESS, 0xFFFF_00FF, InterruptMessage(0xFF, DeliveryMode.FIXED, 0)),
    ],
)
def test_address_and_data_of_an_msi_are_the_message(
    address: int, data: int, message: InterruptMessage
) -> None:
    assert message_of_msi(address, data) == message
