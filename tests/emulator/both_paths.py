"""A small program by direct execution, and by the emulator one instruction at a time: do both end up the same?"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from lasskvm.conformance import layout
from lasskvm.conformance.guest import Guest, Outcome
from lasskvm.emulator.execution import emulate_instruction
from lasskvm.kvm import Regs
from lasskvm.state import RIP

#: What programs write to: stacks and data.
_WRITTEN = layout.KERNEL_STACK_GPA, layout.DATA_END
_MAX_INSTRUCTIONS = 2000
_HANDLERS_BYTES = layout.VECTORS * layout.HANDLER_BYTES


@dataclass(frozen=True)
class Result:
    """Where a program has led to; ``memory`` is a digest."""

    event: str
    error_code: int | None
    rip: int
    rflags: int
    rsp: int
    cr2: int
    registers: Regs
    memory: str


def run_on_both_paths(
    guest: Guest, source: str, *, cpl: int = 0, bits: int = 64, rflags: int = 0, **registers: int
) -> tuple[Result, Result]:
    """What *source* comes to, by direct execution and by the emulator."""
    results = []
    for emulated in (False, True):
        guest.reset()
        start, end = _WRITTEN
        rng = random.Random(1)
        guest.memory.write(start, rng.randbytes(layout.DATA_GPA - start))
        guest.memory.write(layout.DATA_GPA, rng.randbytes(end - layout.DATA_GPA))
        guest.start(source, cpl=cpl, bits=bits, rflags=rflags, **registers)
        if emulated:
            _emulate(guest)
        results.append(_result(guest, guest.run()))
    return results[0], results[1]


def _emulate(guest: Guest) -> None:
    words = guest.vcpu.state.words
    for _ in range(_MAX_INSTRUCTIONS):
        if 0 <= words[RIP] - layout.HANDLERS < _HANDLERS_BYTES:
            return
        emulate_instruction(guest.vcpu.emulation)
    raise AssertionError("the program does not end")


def _result(guest: Guest, outcome: Outcome) -> Result:
    start, end = _WRITTEN
    memory = hashlib.sha256(guest.memory.read(start, end - start)).hexdigest()
    return Result(
        str(outcome.vector), outcome.error_code, outcome.rip, outcome.rflags, outcome.rsp, outcome.cr2,
        outcome.registers, memory,
    )  # fmt: skip
