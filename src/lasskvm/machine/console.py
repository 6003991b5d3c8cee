"""The host's side of the serial line: a terminal, a pipe or a file joined to the guest's UART.

:class:`Console` is what a :class:`~lasskvm.machine.pc.Pc` gets as its output and as what it calls when it has
time. A person at a raw terminal types into the guest, Ctrl-C included; what belongs to the console itself
starts with Ctrl-A. Input that does not come from a terminal waits until the guest's driver listens, since a
UART keeps only 16 bytes for a guest that does not, and ends with the end-of-file character that a person
would type.

The terminal gets its settings back however a run ends: by return, by exception, by SIGINT, SIGTERM or SIGHUP.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType, TracebackType
from typing import Self

from lasskvm.errors import HostError
from lasskvm.machine.devices.uart16550 import IER_RECEIVED, Uart16550

__all__ = ["HINT", "Console", "is_terminal", "standard_input"]

#: What a person at a raw terminal has to know.
HINT = "Ctrl-A X leaves, Ctrl-A Ctrl-A sends Ctrl-A"

_ESCAPE = 0x01
_LEAVE_KEYS = b"xX"
#: End of transmission: Ctrl-D, the end-of-file character of a terminal in the guest.
_END_OF_INPUT = b"\x04"
#: A reader in the guest that came too late for one end of input gets another after this much guest time.
_END_REPEAT_NS = 1_000_000_000

#: Bytes sent at a time, and only when the guest has taken those before: its terminal buffers are small.
_CHUNK = 1024
_OUTPUT_BUFFER = 4096
#: The longest wait in one go: a signal that arrives just before one is noticed behind it.
_LONGEST_WAIT = 0.1
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SIGNAL_STATUS = 128


def standard_input() -> int | None:
    """The descriptor of standard input; None when this process was started without one."""
    try:
        return sys.__stdin__.fileno() if sys.__stdin__ is not None else None
    except ValueError:
        return None


def is_terminal(descriptor: int | None) -> bool:
    """Whether *descriptor* is a terminal that this process may read: one that has it in the foreground."""
    if descriptor is None or not os.isatty(descriptor):
        return False
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:
        # Not this process's controlling terminal: nobody else's job control is in the way.
        return True


class Console:
    """The host's end of a guest's serial line; as a context manager it holds the terminal meanwhile.

    *input_descriptor* is where input comes from, None for nowhere; *output_descriptor* takes what the guest
    writes, byte for byte. With *raw* a terminal hands every key to the guest, else whole lines, and Ctrl-C
    ends the run; in both cases the echo is the guest's.

    >>> console = Console(input_descriptor=None, output_descriptor=1, raw=False)
    """

    def __init__(self, *, input_descriptor: int | None, output_descriptor: int, raw: bool) -> None:
        self._input = input_descriptor
        self._output = output_descriptor
        self._is_terminal = is_terminal(input_descriptor)
        self._raw = raw and self._is_terminal
        if not self._is_terminal and input_descriptor is not None and os.isatty(input_descriptor):
            # A terminal whose foreground is another process: reading from it would stop this one.
            self._input = None
        self._buffer = bytearray()
        self._at_line_start = True
        self._uart: Uart16550 | None = None
        self._now: Callable[[], int] = lambda: 0
        self._stop: Callable[[], None] = lambda: None
        self._escaped = False
        self._ended = False
        self._end_due_ns: int | None = None
        self._signal = 0
        self._held = ExitStack()

    def connect(self, uart: Uart16550, now: Callable[[], int], stop: Callable[[], None]) -> None:
        """Join the line to *uart*; *now* is the guest's time in nanoseconds, *stop* ends the run."""
        self._uart, self._now, self._stop = uart, now, stop

    @property
    def is_raw(self) -> bool:
        """Whether a person types into the guest key by key."""
        return self._raw

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._signals_deferred())
            if self._is_terminal:
                assert self._input is not None
                stack.enter_context(_terminal_mode(self._input, self._raw))
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held:
            if kind is None or not issubclass(kind, BrokenPipeError | HostError):
                if self._raw and not self._at_line_start:
                    # What comes next on this terminal is not the guest's.
                    self._buffer += b"\r\n"
                self.flush()

    def write(self, data: bytes) -> None:
        """Take output of the guest, which appears at the end of a line or with the next :meth:`idle`."""
        self._buffer += data
        self._at_line_start = data.endswith(b"\n")
        if self._at_line_start or len(self._buffer) >= _OUTPUT_BUFFER:
            self.flush()

    def flush(self) -> None:
        """Let what the guest has written appear.

        Raises BrokenPipeError when nobody reads it any more, and :class:`HostError` when it cannot be
        written.
        """
        while self._buffer:
            try:
                written = os.write(self._output, self._buffer)
            except BlockingIOError:
                # The descriptor is shared with a program that made it non-blocking.
                select.select([], [self._output], [])
                continue
            except BrokenPipeError:
                raise
            except OSError as error:
                raise HostError(
                    f"the guest's output cannot be written ({error.strerror}); make room or send it elsewhere"
                ) from error
            del self._buffer[:written]

    def idle(self, nanoseconds: int | None) -> None:
        """Let output appear, then wait up to *nanoseconds* (None: for ever) for input for the guest.

        Returns early now and then. Raises KeyboardInterrupt or SystemExit for a signal that arrived during
        the run.
        """
        self._raise_signal()
        self.flush()
        seconds = _LONGEST_WAIT if nanoseconds is None else min(nanoseconds / 1e9, _LONGEST_WAIT)
        if self._ended:
            self._send_end()
        if self._is_listening():
            assert self._input is not None
            if select.select([self._input], [], [], seconds)[0]:
                self._read(self._input)
        elif seconds:
            time.sleep(seconds)

    def _is_listening(self) -> bool:
        """Whether to look for input: there can be some, and the guest wants it. A person can always leave."""
        if self._input is None or self._ended or self._uart is None:
            return False
        return self._raw or (bool(self._uart.ier & IER_RECEIVED) and not self._uart.backlog)

    def _read(self, descriptor: int) -> None:
        assert self._uart is not None
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            # A terminal that hung up, a folder as standard input: no input will come.
            data = b""
        if not data:
            self._ended = True
            self._end_due_ns = self._now()
        else:
            self._uart.receive(self._without_escapes(data) if self._raw else data)

    def _without_escapes(self, data: bytes) -> bytes:
        """*data* without what is meant for the console itself, which is done."""
        sent = bytearray()
        for key in data:
            if self._escaped:
                self._escaped = False
                if key == _ESCAPE:
                    sent.append(key)
                elif key in _LEAVE_KEYS:
                    self._stop()
            elif key == _ESCAPE:
                self._escaped = True
            else:
                sent.append(key)
        return bytes(sent)

    def _send_end(self) -> None:
        """Tell the guest that there is no more input, again and again: every later reader has to learn it."""
        uart = self._uart
        assert uart is not None
        assert self._end_due_ns is not None
        if self._now() >= self._end_due_ns and not uart.fifo and not uart.backlog:
            self._end_due_ns = self._now() + _END_REPEAT_NS
            uart.receive(_END_OF_INPUT)

    @contextmanager
    def _signals_deferred(self) -> Iterator[None]:
        """Note signals that end the process and obey them in :meth:`idle`: none gets lost in a callback."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.getsignal(number) for number in _ENDING_SIGNALS}
        for number, handler in former.items():
            # What is ignored, as nohup has it with SIGHUP, stays ignored.
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            # Whoever asks twice does not want to wait for the guest.
            raise KeyboardInterrupt
        self._signal = number

    def _raise_signal(self) -> None:
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal:
            raise SystemExit(_SIGNAL_STATUS + self._signal)


@contextmanager
def _terminal_mode(descriptor: int, raw: bool) -> Iterator[None]:
    """A terminal without echo, and with *raw* one that interprets no key at all; afterwards as it was."""
    settings = termios.tcgetattr(descriptor)
    try:
        if raw:
            tty.setraw(descriptor, termios.TCSADRAIN)
            # Output is still processed: many guests end a line by a line feed alone.
            processed = termios.tcgetattr(descriptor)
            processed[tty.OFLAG] |= settings[tty.OFLAG] & (termios.OPOST | termios.ONLCR)
            termios.tcsetattr(descriptor, termios.TCSADRAIN, processed)
        else:
            silent = termios.tcgetattr(descriptor)
            silent[tty.LFLAG] &= ~termios.ECHO
            termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
        yield
    finally:
        # A terminal that hung up has no settings any more.
        with suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, settings)
