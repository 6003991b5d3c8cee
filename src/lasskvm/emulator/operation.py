"""Threaded code: a decoded instruction, compiled once into a function that executes it.

There are three ways to implement an instruction, by what it has to do with RIP:

- a *plain* instruction computes something and the next one follows. Its builder takes the decoded instruction and
  returns a function of the context; whoever executes it steps over it (``completion.complete()``, or the interpreter
  for a whole block at once). It neither reads nor writes CPL, the mode, RFLAGS.TF, RF, IF and AC, or the interrupt
  shadow, and does not touch RIP;
- a *transfer* is built the same way, but sets RIP and completes itself;
- a *handler* is called with the context and the decoded instruction and completes itself: the way for what is rare.

:mod:`lasskvm.emulator.instructions` has the tables. Whatever it is, it raises :class:`GuestFault` with the state as it
was (accessed and dirty bits aside).

Source: KVM's ``struct opcode`` tables and ``x86_emulate_insn()``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded

__all__ = ["Builder", "Executor", "Handler", "Operation"]

Executor = Callable[[Emulation], None]
#: Makes the executor of a plain instruction or a transfer.
Builder = Callable[[Decoded], Executor]
#: Executes one instruction and completes it; only a #DB trap is raised after completion.
Handler = Callable[[Emulation, Decoded], None]


@dataclass(frozen=True, slots=True)
class Operation:
    """An instruction ready to be executed.

    ``is_plain``: somebody else steps over it. ``is_near``: a transfer, which leaves CPL and mode as they are.
    """

    decoded: Decoded
    run: Executor
    is_plain: bool
    is_near: bool = False
