"""The time that port I/O takes on the virtual clock: about a microsecond for each access, as on a PC.

Guests rely on it. They delay by reading a port that nobody uses, and give up waiting for a timer after so many looks at
it. Output that direct execution collects without asking a device takes none.
"""

from __future__ import annotations

from collections.abc import Callable

from lasskvm.kvm.clock import NANOSECONDS_PER_BLOCK
from lasskvm.kvm.iobus import PortBus

__all__ = ["BLOCKS_PER_PORT_ACCESS", "TimedPorts"]

_NANOSECONDS_PER_ACCESS = 1000
#: The same as a number of blocks, in which the virtual clock counts.
BLOCKS_PER_PORT_ACCESS = _NANOSECONDS_PER_ACCESS // NANOSECONDS_PER_BLOCK


class TimedPorts:
    """*bus* as one of the execution paths uses it; *spend* lets it seem that so many more blocks were executed.

    With *unanswered*, an access that no device claims takes its time, too; without, whoever makes it again pays for it.
    """

    def __init__(self, bus: PortBus, spend: Callable[[int], None], *, unanswered: bool) -> None:
        self._read, self._write = bus.read, bus.write
        self._spend = spend
        self._unanswered = unanswered

    def read(self, port: int, size: int) -> int | None:
        """As :meth:`PortBus.read`."""
        value = self._read(port, size)
        if value is not None or self._unanswered:
            self._spend(BLOCKS_PER_PORT_ACCESS)
        return value

    def write(self, port: int, size: int, value: int) -> bool:
        """As :meth:`PortBus.write`."""
        is_claimed = self._write(port, size, value)
        if is_claimed or self._unanswered:
            self._spend(BLOCKS_PER_PORT_ACCESS)
        return is_claimed
