"""What direct execution costs by itself, in this process: TLB fills, exits, and the first start.

The guest is that of :mod:`lasskvm.conformance.guest`; each number is the difference that one kind of event makes, by
the host's clock.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from benchmarks.context import Context
from benchmarks.rows import BenchmarkError, Row, limited, measured, median
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import UPPER
from lasskvm.kvm import HltExit, IntrExit, IoExit

__all__ = ["run"]

#: The bar of docs/architecture.md for an exit to a Python handler and back, in microseconds.
_EXIT_BAR = 15.0
_MICROSECONDS = 1e6

_EXITS = 20_000
_EMPTY_LOOP = "nop"
#: What exits once in each turn of a loop that counts RSI down.
_EXITING = {
    "CPUID": "cpuid",
    "MOV to CR4": "mov cr4, rdi",
}
#: A port that nobody on the VM's bus claims, so that the access is an exit of ``Vcpu.run()``.
_VMM_PORT = 0x5C0
_VMM_EXITS = 5_000

_ROUNDS = 2_000
_PAGES = 64
_PAGE_SIZE = 0x1000

#: What a new process does until its first guest instruction has run.
_START = (
    "from lasskvm import kvm; kvm.prepare(lambda line: None); "
    "vm = kvm.Vm(); vm.set_user_memory_region(0, 0, vm.allocate(1 << 20)); vm.memory.write(0, b'\\xf4'); "
    "vcpu = vm.create_vcpu(); vcpu.set_regs(kvm.Regs(rip=0x10)); vcpu.run()"
)


def run(context: Context) -> list[Row]:
    """Rows for the start of a process, TLB fills, and the round trips of exits."""
    cold_cache = context.folder / "cold"
    context.progress("engine: start without a cache")
    cold = _start(cold_cache)
    context.progress("engine: start with a cache")
    warm = [_start(cold_cache) for _ in range(context.runs)]
    guest = Guest()
    context.progress("engine: TLB fills")
    fills = [_tlb_fill(guest) for _ in range(context.runs)]
    rows = [
        measured("first start on a machine, compiling", cold, "s"),
        measured("later starts, to the first guest instruction", median(warm), "s"),
        measured("TLB fill", median(fills), "us"),
    ]
    for name, instruction in _EXITING.items():
        context.progress(f"engine: {name}")
        trips = [_exit(guest, instruction) for _ in range(context.runs)]
        rows.append(limited(f"{name}, exit and back", median(trips), "us", at_most=_EXIT_BAR))
    context.progress("engine: OUT to the VMM")
    rows.append(
        measured("OUT, Vcpu.run() and back", median([_port_exit(guest) for _ in range(context.runs)]), "us")
    )
    return rows


def _start(cache: os.PathLike[str]) -> float:
    """Seconds of a process with *cache* as its cache folder that runs one guest instruction."""
    environment = {**os.environ, "XDG_CACHE_HOME": os.fspath(cache)}
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", _START], env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise BenchmarkError(f"direct execution does not start: {result.stderr.strip()}")
    return time.perf_counter() - start


def _timed(guest: Guest, program: str, rsi: int, rdi: int) -> float:
    """Seconds that *program*, which counts RSI down to 0, takes at CPL 0 with these registers."""
    guest.start(program, rsi=rsi, rdi=rdi)
    start = time.perf_counter()
    while isinstance(reason := guest.vcpu.run(), IntrExit):
        pass
    elapsed = time.perf_counter() - start
    if guest.vcpu.get_regs().rsi:
        raise BenchmarkError(f"a benchmark's guest program ended early: {reason}")
    return elapsed


def _exit(guest: Guest, instruction: str) -> float:
    """Microseconds that *instruction* takes beyond a NOP."""
    times = [
        _timed(guest, f"again: {body}; dec rsi; jne again", rsi=_EXITS, rdi=guest.cr4)
        for body in (_EMPTY_LOOP, instruction)
    ]
    return (times[1] - times[0]) / _EXITS * _MICROSECONDS


def _tlb_fill(guest: Guest) -> float:
    """Microseconds of one fill: reads of pages behind a flush of the TLB, against the flush alone."""
    flush = "again: mov rax, cr3; mov cr3, rax"
    touch = f"mov rbx, rdi; mov ecx, {_PAGES}; page: mov rax, [rbx]; add rbx, {_PAGE_SIZE}; dec ecx; jne page"
    times, fills = [], []
    for body in (flush, f"{flush}; {touch}"):
        before = guest.vcpu.engine.counters()["fills"]
        times.append(_timed(guest, f"{body}; dec rsi; jne again", rsi=_ROUNDS, rdi=UPPER))
        fills.append(guest.vcpu.engine.counters()["fills"] - before)
    return (times[1] - times[0]) / (fills[1] - fills[0]) * _MICROSECONDS


def _port_exit(guest: Guest) -> float:
    """Microseconds of one ``IoExit``: out of ``Vcpu.run()`` and in again."""
    guest.start("again: out dx, al; dec rsi; jne again", rsi=_VMM_EXITS, rdx=_VMM_PORT)
    exits = 0
    start = time.perf_counter()
    while not isinstance(reason := guest.vcpu.run(), HltExit):
        exits += isinstance(reason, IoExit)
    elapsed = time.perf_counter() - start
    if exits != _VMM_EXITS:
        raise BenchmarkError(f"{exits} port exits came, {_VMM_EXITS} were expected")
    return elapsed / exits * _MICROSECONDS
