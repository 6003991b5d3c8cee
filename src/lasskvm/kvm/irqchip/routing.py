"""Where the interrupt lines of a VM lead: the routing table of ``KVM_SET_GSI_ROUTING``, and MSIs as messages.

A line has a number, its global system interrupt (GSI). A GSI leads to a pin of each interrupt chip at most, or is a
message-signalled interrupt (MSI) of its own.

Source: ``Documentation/virt/kvm/api.rst`` 4.52; KVM's ``kvm_set_irq_routing()`` and ``kvm_set_msi_irq()``; Intel SDM
volume 3A, 11.11 for addresses and data of MSIs.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

from lasskvm.kvm.iobus import DeviceState, IrqLine
from lasskvm.kvm.irqchip.ioapic import IOAPIC_PINS, Ioapic
from lasskvm.kvm.irqchip.messages import DeliveryMode, InterruptMessage
from lasskvm.kvm.irqchip.pic import Pic

__all__ = [
    "MAX_GSIS",
    "ChipRoute",
    "GsiRouter",
    "IrqChip",
    "MsiRoute",
    "Route",
    "check_routes",
    "default_routes",
    "message_of_msi",
    "pc_routes",
]

#: GSIs are below this, and a table has at most so many routes (``KVM_MAX_IRQ_ROUTES``).
MAX_GSIS = 4096

_PIC_PINS = 8
_ISA_LINES = 2 * _PIC_PINS
#: The input of the I/O APIC that a PC's timer is wired to, and the ISA line that it has on the 8259As. The cascade of
#: these, IRQ 2, is no line of the I/O APIC.
_TIMER_LINE, _TIMER_PIN = 0, 2
_CASCADE_LINE = 2

# An MSI's address and data
_ADDRESS_DESTINATION_SHIFT = 12
_ADDRESS_DESTINATION_MASK = 0xFF
_ADDRESS_LOGICAL = 1 << 2
_DATA_VECTOR = 0xFF
_DATA_MODE_SHIFT = 8
_DATA_MODE_MASK = 0b111
_DATA_LEVEL_TRIGGERED = 1 << 15


class IrqChip(IntEnum):
    """``KVM_IRQCHIP_*``."""

    PIC_MASTER = 0
    PIC_SLAVE = 1
    IOAPIC = 2


_PINS = {IrqChip.PIC_MASTER: _PIC_PINS, IrqChip.PIC_SLAVE: _PIC_PINS, IrqChip.IOAPIC: IOAPIC_PINS}


@dataclass(frozen=True, slots=True)
class ChipRoute:
    """*gsi* is wired to *pin* of *chip* (``KVM_IRQ_ROUTING_IRQCHIP``)."""

    gsi: int
    chip: IrqChip
    pin: int


@dataclass(frozen=True, slots=True)
class MsiRoute:
    """Raising *gsi* sends the MSI of *address* and *data* (``KVM_IRQ_ROUTING_MSI``); lowering it does nothing."""

    gsi: int
    address: int
    data: int


Route = ChipRoute | MsiRoute


def default_routes() -> tuple[Route, ...]:
    """The table of a VM whose VMM sets none: GSI n is IRQ n of the 8259As and pin n of the I/O APIC.

    >>> [route for route in default_routes() if route.gsi == 9]
    [ChipRoute(gsi=9, chip=<IrqChip.IOAPIC: 2>, pin=9), ChipRoute(gsi=9, chip=<IrqChip.PIC_SLAVE: 1>, pin=1)]
    """
    routes: list[Route] = []
    for gsi in range(IOAPIC_PINS):
        routes.append(ChipRoute(gsi, IrqChip.IOAPIC, gsi))
        if gsi < _ISA_LINES:
            routes.append(_isa_route(gsi))
    return tuple(routes)


def pc_routes() -> tuple[Route, ...]:
    """The table of a PC: as :func:`default_routes`, but the timer, IRQ 0, is pin 2 of the I/O APIC.

    The firmware tells the guest so (an interrupt source override in the MADT).
    """
    routes: list[Route] = [_isa_route(line) for line in range(_ISA_LINES)]
    for gsi in range(IOAPIC_PINS):
        if gsi != _CASCADE_LINE:
            routes.append(ChipRoute(gsi, IrqChip.IOAPIC, _TIMER_PIN if gsi == _TIMER_LINE else gsi))
    return tuple(routes)


def _isa_route(line: int) -> ChipRoute:
    chip = IrqChip.PIC_MASTER if line < _PIC_PINS else IrqChip.PIC_SLAVE
    return ChipRoute(line, chip, line % _PIC_PINS)


def check_routes(routes: Iterable[Route]) -> tuple[Route, ...]:
    """*routes*, if they make a table.

    OSError with EINVAL for a GSI or a pin that does not exist, for a GSI that leads to a chip twice or to an MSI and
    something else, and for more than :data:`MAX_GSIS` routes.
    """
    checked = tuple(routes)
    if len(checked) > MAX_GSIS:
        raise _invalid(f"a table has at most {MAX_GSIS} routes, not {len(checked)}")
    targets: dict[int, set[IrqChip | None]] = {}
    for route in checked:
        if not 0 <= route.gsi < MAX_GSIS:
            raise _invalid(f"there is no GSI {route.gsi}, they end at {MAX_GSIS - 1}")
        if isinstance(route, ChipRoute) and not 0 <= route.pin < _PINS[route.chip]:
            raise _invalid(f"{route.chip.name} has no pin {route.pin}, its last is {_PINS[route.chip] - 1}")
        target = route.chip if isinstance(route, ChipRoute) else None
        taken = targets.setdefault(route.gsi, set())
        if target in taken or (taken and None in (target, *taken)):
            raise _invalid(f"GSI {route.gsi} may lead to each chip once, or else be one MSI")
        taken.add(target)
    return checked


def _invalid(reason: str) -> OSError:
    return OSError(errno.EINVAL, f"KVM_SET_GSI_ROUTING: {reason}")


def message_of_msi(address: int, data: int) -> InterruptMessage:
    """The message that a store of *data* at *address* (FEExxxxxH) is.

    With one processor the redirection hint (bit 3 of the address) makes no difference. The level bit (14) of the data
    counts as set, as in KVM.

    >>> message_of_msi(0xFEE0_1000, 0x4031)
    InterruptMessage(vector=49, mode=<DeliveryMode.FIXED: 0>, destination=1, logical=False, level_triggered=False)
    """
    return InterruptMessage(
        vector=data & _DATA_VECTOR,
        mode=DeliveryMode(data >> _DATA_MODE_SHIFT & _DATA_MODE_MASK),
        destination=address >> _ADDRESS_DESTINATION_SHIFT & _ADDRESS_DESTINATION_MASK,
        logical=bool(address & _ADDRESS_LOGICAL),
        level_triggered=bool(data & _DATA_LEVEL_TRIGGERED),
    )


class GsiRouter:
    """The routing table of a VM with its chips *pic* and *ioapic*; *send* is where MSIs go.

    It begins with :func:`default_routes`.
    """

    __slots__ = ("_ioapic", "_lines", "_pic", "_send", "routes")

    def __init__(self, pic: Pic, ioapic: Ioapic, send: Callable[[InterruptMessage], bool]) -> None:
        self._pic = pic
        self._ioapic = ioapic
        self._send = send
        #: The table as it was set.
        self.routes: tuple[Route, ...] = ()
        self._lines: dict[int, list[IrqLine]] = {}
        self.set_routes(default_routes())

    def set_routes(self, routes: Iterable[Route]) -> None:
        """``KVM_SET_GSI_ROUTING``: have these *routes* and no other.

        The pins keep their levels. OSError with EINVAL as of :func:`check_routes`, with nothing changed.
        """
        self.routes = check_routes(routes)
        self._lines = {}
        for route in self.routes:
            self._lines.setdefault(route.gsi, []).append(self._target(route))

    def set_line(self, gsi: int, level: bool) -> None:
        """``KVM_IRQ_LINE``: drive *gsi*; nothing happens where it leads nowhere."""
        for line in self._lines.get(gsi, ()):
            line(level)

    def line(self, gsi: int) -> IrqLine:
        """Return *gsi* as a wire to hand to a device; it leads where the table says at the time of use."""
        return partial(self.set_line, gsi)

    def get_state(self) -> DeviceState:
        """The routes: numbers in the order of their fields; chips by name, None for an MSI."""
        return {
            "routes": [
                [route.gsi, route.chip.name, route.pin]
                if isinstance(route, ChipRoute)
                else [route.gsi, None, route.address, route.data]
                for route in self.routes
            ]
        }

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`; KeyError, TypeError, ValueError or OSError for what is no such state."""
        self.set_routes(
            MsiRoute(gsi, *target) if chip is None else ChipRoute(gsi, IrqChip[chip], *target)
            for gsi, chip, *target in state["routes"]
        )

    def _target(self, route: Route) -> IrqLine:
        if isinstance(route, MsiRoute):
            return partial(self._signal, message_of_msi(route.address, route.data))
        if route.chip is IrqChip.IOAPIC:
            return self._ioapic.line(route.pin)
        first = _PIC_PINS if route.chip is IrqChip.PIC_SLAVE else 0
        return self._pic.line(first + route.pin)

    def _signal(self, message: InterruptMessage, level: bool) -> None:
        if level:
            self._send(message)
