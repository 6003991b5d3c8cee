"""The host's end of the serial line: terminals, pipes, what reaches the guest and what stays here."""

from __future__ import annotations

import os
import pty
import select
import signal
import termios
import threading
import tty
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from lasskvm.errors import HostError
from lasskvm.machine.console import Console, is_terminal
from lasskvm.machine.devices.uart16550 import COM1_PORT, FCR, FCR_ENABLE, IER, IER_RECEIVED, Uart16550

CTRL_A, CTRL_D = b"\x01", b"\x04"
SECOND_NS = 1_000_000_000


class Guest:
    """A UART, the guest's time, and whether the run was stopped."""

    def __init__(self, *, listening: bool = True) -> None:
        self.uart = Uart16550(lambda level: None, lambda data: None)
        self.uart.write_port(COM1_PORT + FCR, 1, FCR_ENABLE)
        self.time_ns = 0
        self.stopped = False
        if listening:
            self.listen()

    def listen(self) -> None:
        self.uart.write_port(COM1_PORT + IER, 1, IER_RECEIVED)

    def stop(self) -> None:
        self.stopped = True

    def take(self) -> bytes:
        """What the guest reads until its receiver is empty."""
        taken = bytearray()
        while self.uart.fifo:
            taken.append(self.uart.read_port(COM1_PORT, 1))
        return bytes(taken)

    def join(self, console: Console) -> None:
        console.connect(self.uart, lambda: self.time_ns, self.stop)


class Ends:
    """Both ends of a descriptor pair: *host* goes to the console, *far* is the test's."""

    def __init__(self, host: int, far: int) -> None:
        self.host, self.far = host, far

    def send(self, data: bytes) -> None:
        os.write(self.far, data)

    def close_far(self) -> None:
        if self.far >= 0:
            os.close(self.far)
        self.far = -1

    def close(self) -> None:
        os.close(self.host)
        self.close_far()


@pytest.fixture
def pipe() -> Iterator[Ends]:
    ends = Ends(*os.pipe())
    yield ends
    ends.close()


@pytest.fixture
def terminal() -> Iterator[Ends]:
    far, host = pty.openpty()
    ends = Ends(host, far)
    yield ends
    ends.close()


@pytest.fixture
def sink() -> Iterator[Ends]:
    """Where output goes: *host* is written to, *far* is read."""
    far, host = os.pipe()
    ends = Ends(host, far)
    yield ends
    ends.close()


def local_flags(terminal: Ends) -> int:
    return int(termios.tcgetattr(terminal.host)[tty.LFLAG])


def joined(guest: Guest, source: Ends, sink: Ends, *, raw: bool = False) -> Console:
    console = Console(input_descriptor=source.host, output_descriptor=sink.host, raw=raw)
    guest.join(console)
    return console


# ------------------------------------------------------------------------------------------------------ pipes


def test_piped_bytes_wait_until_the_guests_driver_listens(pipe: Ends, sink: Ends) -> None:
    guest = Guest(listening=False)
    pipe.send(b"ls\n")
    with joined(guest, pipe, sink) as console:
        console.idle(0)
        assert guest.take() == b""
        guest.listen()
        console.idle(0)
        assert guest.take() == b"ls\n"


def test_control_a_from_a_pipe_is_a_byte_like_any_other(pipe: Ends, sink: Ends) -> None:
    guest = Guest()
    pipe.send(CTRL_A + b"x")
    with joined(guest, pipe, sink, raw=True) as console:
        console.idle(0)
    assert guest.take() == CTRL_A + b"x"
    assert not guest.stopped


def test_more_input_waits_until_the_guest_has_taken_what_there_was(pipe: Ends, sink: Ends) -> None:
    guest = Guest()
    pipe.send(b"a" * 3000)
    with joined(guest, pipe, sink) as console:
        console.idle(0)
        first = len(guest.uart.fifo) + len(guest.uart.backlog)
        console.idle(0)
        assert len(guest.uart.fifo) + len(guest.uart.backlog) == first < 3000
        taken = b""
        while piece := guest.take():
            taken += piece
            console.idle(0)
    assert taken == b"a" * 3000


def test_the_end_of_a_pipe_is_the_end_of_file_character(pipe: Ends, sink: Ends) -> None:
    guest = Guest()
    pipe.send(b"exit")
    pipe.close_far()
    with joined(guest, pipe, sink) as console:
        console.idle(0)
        assert guest.take() == b"exit"
        console.idle(0)
        console.idle(0)
        assert guest.take() == CTRL_D


def test_every_reader_learns_of_the_end_but_none_is_flooded(pipe: Ends, sink: Ends) -> None:
    guest = Guest()
    pipe.close_far()
    with joined(guest, pipe, sink) as console:
        for _ in range(3):
            console.idle(0)
        assert guest.take() == CTRL_D
        console.idle(0)
        assert guest.take() == b""
        guest.time_ns += SECOND_NS
        console.idle(0)
        guest.time_ns += SECOND_NS
        console.idle(0)
        assert guest.take() == CTRL_D


@pytest.mark.parametrize("ended", [False, True])
def test_input_that_is_not_wanted_or_over_is_not_waited_for(
    ended: bool, sink: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    guest = Guest(listening=ended)
    with joined(guest, Ends(null, -1), sink) as console:
        console.idle(0)
        # /dev/null is always readable: a select() on it would turn every wait into none.
        waited: list[int] = []
        monkeypatch.setattr(select, "select", lambda *arguments: waited.append(1))
        console.idle(1000)
    os.close(null)
    assert waited == []


def test_without_standard_input_the_guest_gets_nothing(sink: Ends) -> None:
    guest = Guest()
    console = Console(input_descriptor=None, output_descriptor=sink.host, raw=True)
    guest.join(console)
    with console:
        console.idle(1000)
    assert guest.take() == b""


# -------------------------------------------------------------------------------------------------- terminals


def test_a_terminal_is_one_and_a_pipe_is_none(terminal: Ends, pipe: Ends) -> None:
    assert is_terminal(terminal.host)
    assert not is_terminal(pipe.host)
    assert not is_terminal(None)


def test_a_raw_terminal_still_returns_the_carriage_at_a_line_feed(terminal: Ends, sink: Ends) -> None:
    with joined(Guest(), terminal, sink, raw=True):
        output_modes = termios.tcgetattr(terminal.host)[tty.OFLAG]
    assert output_modes & (termios.OPOST | termios.ONLCR) == termios.OPOST | termios.ONLCR


def test_a_raw_terminal_hands_every_key_to_the_guest(terminal: Ends, sink: Ends) -> None:
    guest = Guest()
    with joined(guest, terminal, sink, raw=True) as console:
        assert console.is_raw
        assert not local_flags(terminal) & (termios.ICANON | termios.ISIG | termios.ECHO)
        terminal.send(b"a\x03\x1a\r")
        console.idle(SECOND_NS)
    assert guest.take() == b"a\x03\x1a\r"


def test_a_person_can_type_before_the_guest_listens(terminal: Ends, sink: Ends) -> None:
    guest = Guest(listening=False)
    with joined(guest, terminal, sink, raw=True) as console:
        terminal.send(b"q")
        console.idle(SECOND_NS)
    assert guest.take() == b"q"


@pytest.mark.parametrize("key", [b"x", b"X"])
def test_control_a_x_leaves_even_a_guest_that_does_not_listen(key: bytes, terminal: Ends, sink: Ends) -> None:
    guest = Guest(listening=False)
    with joined(guest, terminal, sink, raw=True) as console:
        terminal.send(CTRL_A)
        console.idle(SECOND_NS)
        assert not guest.stopped
        terminal.send(key)
        console.idle(SECOND_NS)
    assert guest.stopped
    assert guest.take() == b""


def test_control_a_twice_sends_it_once_and_other_keys_behind_it_are_dropped(
    terminal: Ends, sink: Ends
) -> None:
    guest = Guest()
    with joined(guest, terminal, sink, raw=True) as console:
        terminal.send(b"a" + CTRL_A + CTRL_A + b"b" + CTRL_A + b"c" + b"d")
        console.idle(SECOND_NS)
    assert guest.take() == b"a" + CTRL_A + b"bd"
    assert not guest.stopped


def test_a_terminal_that_is_not_raw_sends_lines_and_keeps_its_signals(terminal: Ends, sink: Ends) -> None:
    guest = Guest()
    with joined(guest, terminal, sink) as console:
        flags = local_flags(terminal)
        assert not console.is_raw
        assert flags & termios.ISIG
        assert flags & termios.ICANON
        assert not flags & termios.ECHO
        terminal.send(b"no line yet")
        console.idle(0)
        assert guest.take() == b""
        terminal.send(b"\n")
        console.idle(SECOND_NS)
    assert guest.take() == b"no line yet\n"


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_terminal_is_as_before_however_the_run_ends(
    raw: bool, error: type[BaseException] | None, terminal: Ends, sink: Ends
) -> None:
    before = termios.tcgetattr(terminal.host)
    expected = pytest.raises(error) if error is not None else nullcontext()
    with expected, joined(Guest(), terminal, sink, raw=raw):
        assert termios.tcgetattr(terminal.host) != before
        if error is not None:
            raise error
    assert termios.tcgetattr(terminal.host) == before


# ---------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)],
)
def test_a_signal_ends_the_run_between_two_instructions(
    number: signal.Signals, error: type[BaseException], terminal: Ends, sink: Ends
) -> None:
    before, handler = termios.tcgetattr(terminal.host), signal.getsignal(number)
    with joined(Guest(), terminal, sink, raw=True) as console:
        os.kill(os.getpid(), number)
        with pytest.raises(error) as raised:
            console.idle(0)
    if error is SystemExit:
        assert raised.value.args == (128 + number,)
    assert termios.tcgetattr(terminal.host) == before
    assert signal.getsignal(number) == handler


def test_a_signal_that_was_ignored_stays_ignored(pipe: Ends, sink: Ends) -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with joined(Guest(), pipe, sink) as console:
            os.kill(os.getpid(), signal.SIGHUP)
            console.idle(0)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_second_signal_does_not_wait_for_the_guest(pipe: Ends, sink: Ends) -> None:
    with joined(Guest(), pipe, sink):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# ----------------------------------------------------------------------------------------------------- output


def received(sink: Ends) -> bytes:
    return os.read(sink.far, 1 << 16) if select.select([sink.far], [], [], 0)[0] else b""


def test_output_appears_line_by_line_and_prompts_when_the_guest_waits(pipe: Ends, sink: Ends) -> None:
    with joined(Guest(), pipe, sink) as console:
        for byte in b"one\ntwo":
            console.write(bytes([byte]))
        assert received(sink) == b"one\n"
        console.idle(0)
        assert received(sink) == b"two"
        console.write(b"end")
    assert received(sink) == b"end"


def test_what_the_guest_wrote_last_appears_also_behind_an_error(pipe: Ends, sink: Ends) -> None:
    def fail(console: Console) -> None:
        with console:
            console.write(b"last words")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(joined(Guest(), pipe, sink))
    assert received(sink) == b"last words"


def test_a_prompt_on_a_raw_terminal_is_not_continued_by_others(terminal: Ends, sink: Ends) -> None:
    with joined(Guest(), terminal, sink, raw=True) as console:
        console.write(b"/ # ")
    assert received(sink) == b"/ # \r\n"


def test_a_reader_that_left_is_a_broken_pipe(pipe: Ends, sink: Ends) -> None:
    sink.close_far()
    with pytest.raises(BrokenPipeError), joined(Guest(), pipe, sink) as console:
        console.write(b"anybody?\n")


def test_a_full_disk_is_an_error_of_the_host(pipe: Ends) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(HostError, match="No space left"), joined(Guest(), pipe, Ends(full, -1)) as console:
        console.write(b"line\n")
    os.close(full)


def test_a_slow_reader_behind_a_non_blocking_descriptor_gets_everything(pipe: Ends, sink: Ends) -> None:
    os.set_blocking(sink.host, False)
    size, counted = 1 << 18, []

    def read_all() -> None:
        count = 0
        while count < size:
            count += len(os.read(sink.far, 1 << 12))
        counted.append(count)

    reader = threading.Thread(target=read_all)
    reader.start()
    with joined(Guest(), pipe, sink) as console:
        console.write(b"x" * size)
    reader.join()
    assert counted == [size]
