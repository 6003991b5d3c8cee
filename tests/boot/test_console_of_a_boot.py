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
CTRL_C = b"\x03"


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


def test_shell_answers_ctrl_c_interrupts_its_program_and_ctrl_a_x_leaves(terminal: Terminal) -> None:
    terminal.wait_for(PROMPT)
    assert termios.tcgetattr(terminal.slave) != terminal.settings
    # A shell of its own for the program: Ctrl-C ends either, whichever runs when it arrives.
    terminal.type(b"sh -c 'echo answer $((6 * 7)); exec sleep 1000' && echo never\r")
    terminal.wait_for(b"\nanswer 42\n")
    terminal.type(CTRL_C)
    terminal.wait_for(PROMPT)
    # The machine has not been interrupted, and the shell has not gone on behind its program.
    terminal.type(b"echo still $((6 * 8))\r")
    terminal.wait_for(b"still $((6 * 8))\nstill 48\n")
    terminal.type(CTRL_A + b"x")
    assert terminal.process.wait(PATIENCE) == 0
    assert termios.tcgetattr(terminal.slave) == terminal.settings
