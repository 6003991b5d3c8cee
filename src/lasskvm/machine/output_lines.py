"""One output for several consoles of a guest, with each one's lines whole.

Firmware shows what it does on a debug console and, at the same time, its screen on the serial port, byte by byte. A
console that has begun a line therefore keeps the output until the line is at its end, and what the others write
meanwhile waits. A line that is not going to end, a prompt, does not hold them up: see :meth:`OutputLines.settle`.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["OutputLines"]

_LINE_END = b"\n"
#: No console waits with more than this.
_MOST_WAITING = 4096


class OutputLines:
    """The common output of the consoles that :meth:`add_console` makes.

    >>> lines = OutputLines(lambda data: print(data))
    >>> serial, debug = lines.add_console(), lines.add_console()
    >>> serial(b"boot"); debug(b"POST\\n"); serial(b"ing\\n")
    b'boot'
    b'ing\\n'
    b'POST\\n'
    """

    def __init__(self, output: Callable[[bytes], None]) -> None:
        self._output = output
        #: What each console could not write yet.
        self._waiting: list[bytearray] = []
        #: The console that is within a line.
        self._holder: int | None = None
        self._written_since_settling = False

    def add_console(self) -> Callable[[bytes], None]:
        """A console: what it is called with is its output."""
        number = len(self._waiting)
        waiting = bytearray()
        self._waiting.append(waiting)

        def write(data: bytes) -> None:
            self._written_since_settling = True
            if self._holder in (None, number):
                self._holder = number
                self._output(data)
                if data.endswith(_LINE_END):
                    self._end_line()
                return
            waiting.extend(data)
            if len(waiting) >= _MOST_WAITING:
                self.flush()

        return write

    def settle(self) -> None:
        """Write what waits if no console has written anything since the last call: the line that it waits for is no
        more than begun."""
        if not self._written_since_settling:
            self.flush()
        self._written_since_settling = False

    def flush(self) -> None:
        """Write what waits, wherever the output is in a line."""
        while any(self._waiting):
            self._end_line()

    def _end_line(self) -> None:
        """Let those who wait write, until one of them begins a line in turn."""
        self._holder = None
        for number, waiting in enumerate(self._waiting):
            if waiting:
                data = bytes(waiting)
                waiting.clear()
                self._output(data)
                if not data.endswith(_LINE_END):
                    self._holder = number
                    return
