"""Which instructions a case executes, found by stepping through it with the emulator.

Only asked for when something differs: what is known of a difference depends on the instruction that made it, and cases
branch, or run into data.
"""

from __future__ import annotations

from dataclasses import dataclass

from iced_x86 import Instruction

from lasskvm.emulator.decode import decode, fetch_instruction
from lasskvm.emulator.execution import step
from lasskvm.emulator.faults import GuestFault, TripleFault, Unhandleable
from lasskvm.emulator.linearize import linear_address
from lasskvm.emulator.mmio import MmioReadNeeded
from lasskvm.emulator.mmu import load_linear
from lasskvm.emulator.modes import code_bits
from lasskvm.emulator.port_io import PortAccessNeeded
from lasskvm.fuzz import layout
from lasskvm.fuzz.case import Case
from lasskvm.fuzz.encoding import code_in_memory, instructions_of
from lasskvm.kvm import Vcpu
from lasskvm.lass import FETCH
from lasskvm.state import CPL, RFLAGS, RIP
from lasskvm.x86.registers import CS

__all__ = ["Executed", "listed", "trace"]

_MOST_STEPS = 100
_LONGEST_INSTRUCTION = 15


@dataclass(frozen=True)
class Executed:
    """An instruction that was executed, or was to be: its bytes as far as they can be fetched, and what they mean."""

    rip: int
    bits: int
    code: bytes
    instruction: Instruction


def listed(case: Case) -> tuple[Executed, ...]:
    """The instructions that stand in *case*, in a line from the first."""
    code, _ = code_in_memory(case)
    found = []
    for instruction in instructions_of(case):
        start = instruction.ip - case.rip
        encoded = code[start : start + instruction.len]
        found.append(Executed(instruction.ip, case.mode.bits, encoded, instruction))
    return tuple(found)


def trace(case: Case, vcpu: Vcpu) -> tuple[Executed, ...]:
    """Step through *case*, which *vcpu* (of the emulator) has been made ready for, up to its handler or its end."""
    ctx, words = vcpu.emulation, vcpu.state.words
    ctx.tlb.flush()
    found: list[Executed] = []
    for _ in range(_MOST_STEPS):
        if layout.handler_of(case.mode, words[RIP] + 1) is not None:
            break
        executed = _at_rip(vcpu)
        if executed is not None and executed not in found:
            found.append(executed)
        try:
            step(ctx)
        except MmioReadNeeded as needed:
            ctx.mmio.answer((1 << 8 * needed.size) - 1)
        except (TripleFault, Unhandleable, PortAccessNeeded):
            break
        if ctx.halted:
            break
    return tuple(found)


def _at_rip(vcpu: Vcpu) -> Executed | None:
    words, memory = vcpu.state.words, vcpu.vm.memory
    bits = code_bits(words)
    start = linear_address(words, CS, words[RIP])
    code = b""
    for offset in range(_LONGEST_INSTRUCTION):
        value, *fault = load_linear(words, memory, start + offset, 1, FETCH, words[CPL], words[RFLAGS])
        if fault[0]:
            break
        code += bytes([value])
    try:
        length = fetch_instruction(vcpu.emulation).length
    except GuestFault:
        length = len(code)
    decoded = decode(bits, code[:length])
    instruction = Instruction() if isinstance(decoded, int) else decoded.instruction
    return Executed(words[RIP], bits, code[:length], instruction)
