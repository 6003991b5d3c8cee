"""A person at the console: a terminal on standard input, a shell in the guest."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from typing import Any

import pytest

PATIENCE = 100
PROMPT = b"# "
CTRL_A = b"\x01"


class Terminal:
    """A terminal with ``lasskvm run debian`` at its other end."""

    def __init__(self, *words: str) -> None:
        self.master, self.slave = pty.openpty()
        self.settings = termios.tcgetattr(self.slave)
        self.shown = bytearray()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lasskvm", "run", "debian", *words],
            stdin=self.slave, stdout=self.slave, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def wait_for(self, text: bytes) -> None:
        """Read until *text* has appeared behind what was waited for before; carriage returns do not count."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.shown:
            assert select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))[0], bytes(
                self.shown
            )
            self.shown += os.read(self.master, 4096).replace(b"\r", b"")
        del self.shown[: self.shown.index(text) + len(text)]

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(debian: Any) -> Iterator[Terminal]:
    terminal = Terminal("-q")
    try:
        yield terminal
    finally:
        terminal.close()


def test_shell_answers_what_is_typed_and_ctrl_a_x_leaves(terminal: Terminal) -> None:
    terminal.wait_for(PROMPT)
    assert termios.tcgetattr(terminal.slave) != terminal.settings
    terminal.type(b"echo answer $((6 * 7))\r")
    terminal.wait_for(b"\nanswer 42\n")
    terminal.type(CTRL_A + b"x")
    assert terminal.process.wait(PATIENCE) == 0
    assert termios.tcgetattr(terminal.slave) == terminal.settings


def test_ctrl_c_interrupts_the_guests_program_and_not_the_machine(terminal: Terminal) -> None:
    terminal.wait_for(PROMPT)
    terminal.type(b"echo begin; sleep 1000; echo never\r")
    terminal.wait_for(b"\nbegin\n")
    terminal.type(b"\x03")
    terminal.wait_for(PROMPT)
    terminal.type(b"exit 9\r")
    assert terminal.process.wait(PATIENCE) == 9
