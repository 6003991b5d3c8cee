"""What emulated instructions cost: in a guest that the emulator runs, and one at a time amid direct execution."""

from __future__ import annotations

import random
import time

from iced_x86 import Code, Decoder

from benchmarks.context import Context
from benchmarks.rows import BenchmarkError, Row, limited, measured, median
from lasskvm.conformance.assembler import FORCED_EMULATION
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import LOW_USER
from lasskvm.emulator.decode import Decoded, decode
from lasskvm.emulator.execution import compile_instruction, is_implemented
from lasskvm.kvm import HltExit, IntrExit, MmioExit
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable

__all__ = ["run"]

_MICROSECONDS = 1e6
#: The bars: 300,000 instructions a second, and the round trips of docs/architecture.md.
_INSTRUCTION_BAR = 1 / 0.3
_FORCED_BAR = 15.0
_MMIO_BAR = 20.0

_LOOP_TURNS = 100_000
_LOOP_INSTRUCTIONS = 8
_INTEGER_LOOP = (
    "again: add rax, rbx; xor rdx, rax; mov rdi, rdx; shr rdi, 3; lea r8, [rdi + rax * 4 + 1]; and r8d, 0xffff; "
    "dec rsi; jne again"
)
_MEMORY_LOOP_INSTRUCTIONS = 4
_MEMORY_LOOP = "again: mov [rsp - 16], rax; add rdx, [rsp - 8]; dec rsi; jne again"
_EXITS = 10_000
#: Guest-physical, and nothing is there.
_HOLE = 0xD000_0000
_COLD_INSTRUCTIONS = 3_000
_SEED = 1


def run(context: Context) -> list[Row]:
    """Rows for loops under the emulator, forced emulation, MMIO, and compiling instructions never seen before."""
    interpreted = Guest(engine="emulator")
    context.progress("emulator: loops")
    integer = [_instruction(interpreted, _INTEGER_LOOP, _LOOP_INSTRUCTIONS) for _ in range(context.runs)]
    memory = [_instruction(interpreted, _MEMORY_LOOP, _MEMORY_LOOP_INSTRUCTIONS) for _ in range(context.runs)]
    context.progress("emulator: instructions never seen before")
    cold = _cold_instruction()
    direct = Guest(forced_emulation=True)
    direct.execute("nop")
    context.progress("emulator: forced emulation")
    forced = [_forced_emulation(direct) for _ in range(context.runs)]
    context.progress("emulator: MMIO")
    mmio = [_mmio_read(direct) for _ in range(context.runs)]
    direct.vm.mmio.register(_Device())
    on_bus = [_mmio_read(direct) for _ in range(context.runs)]
    return [
        _loop_row("emulator, hot integer loop, per instruction", integer),
        _loop_row("emulator, hot loop on memory, per instruction", memory),
        measured("emulator, decoding and compiling a new instruction", cold, "us"),
        limited("forced-emulation NOP, exit and back", median(forced), "us", at_most=_FORCED_BAR),
        limited("MMIO read, a device of the VM answers", median(on_bus), "us", at_most=_MMIO_BAR),
        measured("MMIO read, Vcpu.run() and back", median(mmio), "us"),
    ]


class _Device:
    """A register that reads as zero."""

    base, size = _HOLE, 8

    def read_mmio(self, gpa: int, size: int) -> int:
        return 0

    def write_mmio(self, gpa: int, size: int, value: int) -> None:
        """Writes do nothing."""


def _loop_row(name: str, times: list[float]) -> Row:
    time_each = median(times)
    note = "" if time_each is None else f"{1000 / time_each:.0f} k instructions/s"
    return limited(name, time_each, "us", at_most=_INSTRUCTION_BAR, note=note)


def _timed(guest: Guest, program: str, turns: int, *, rflags: int = 0, **registers: int) -> float:
    """Seconds that *program*, which counts RSI down from *turns*, takes at CPL 0; MMIO reads get all ones."""
    guest.start(program, rflags=rflags, rsi=turns, **registers)  # type: ignore[arg-type]
    start = time.perf_counter()
    while isinstance(reason := guest.vcpu.run(), IntrExit | MmioExit):
        pass
    elapsed = time.perf_counter() - start
    if guest.vcpu.get_regs().rsi or not isinstance(reason, HltExit):
        raise BenchmarkError(f"a benchmark's guest program ended early: {reason}")
    return elapsed


def _instruction(guest: Guest, program: str, instructions: int) -> float:
    return _timed(guest, program, _LOOP_TURNS) / (_LOOP_TURNS * instructions) * _MICROSECONDS


def _difference(guest: Guest, instruction: str, **registers: int) -> float:
    """Microseconds that *instruction* takes beyond a NOP."""
    times = [
        _timed(guest, f"again: {body}; dec rsi; jne again", _EXITS, **registers)
        for body in ("nop", instruction)
    ]
    return (times[1] - times[0]) / _EXITS * _MICROSECONDS


def _forced_emulation(guest: Guest) -> float:
    return _difference(guest, f"{FORCED_EMULATION}; nop")


def _mmio_read(guest: Guest) -> float:
    """Microseconds of a read of device memory. What the VMM answers leaves ``Vcpu.run()`` and is emulated twice."""
    guest.tables.map(LOW_USER, _HOLE)
    return _difference(guest, "mov eax, [rbx]", rbx=LOW_USER, rflags=1 << 18)


def _cold_instruction() -> float:
    """Microseconds to decode and compile an instruction, over random ones that all differ."""
    rng = random.Random(_SEED)
    cpuid = CpuidTable(parse_cpu("max").entries())
    codes: list[bytes] = []
    while len(codes) < _COLD_INSTRUCTIONS:
        code = rng.randbytes(15)
        instruction = Decoder(64, code).decode()
        if instruction.code != Code.INVALID:
            codes.append(code)
    compiled = 0
    start = time.perf_counter()
    for code in codes:
        decoded = decode(64, code)
        if isinstance(decoded, Decoded) and is_implemented(decoded):
            compile_instruction(decoded, cpuid)
            compiled += 1
    elapsed = time.perf_counter() - start
    return elapsed / max(1, compiled) * _MICROSECONDS
