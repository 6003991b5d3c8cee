"""Running a case on one execution path: direct execution, the emulator, or the emulator by force.

A path keeps a virtual machine for each CPU model and uses it for case after case: only what differs from the case's
image is written, and the state words are set as a whole. That is the part of the KVM API that the fuzzer goes around,
for speed; guests run through :meth:`~lasskvm.kvm.Vcpu.run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from lasskvm import state as s
from lasskvm.emulator.fpu import Fpu, copy_fpu
from lasskvm.fuzz import layout
from lasskvm.fuzz.case import Case
from lasskvm.fuzz.fpu_registers import FpuImage, fpu_image, start_fpu
from lasskvm.fuzz.image import FORCED_EMULATION_PREFIX, Image, case_image
from lasskvm.fuzz.start_state import start_words
from lasskvm.kvm import (
    Exit,
    HltExit,
    InternalErrorExit,
    IntrExit,
    IoExit,
    MmioExit,
    ShutdownExit,
    Vcpu,
    Vm,
)
from lasskvm.kvm.clock import NANOSECONDS_PER_BLOCK
from lasskvm.memory import PAGE_CODE
from lasskvm.x86.cpu_models import parse_cpu

__all__ = ["BusAccess", "EndState", "Path", "PathKind", "prepare"]

#: Exits to the VMM, and blocks of code, that a case may take before it counts as endless.
_MAX_EXITS = 80
_MAX_BLOCKS = 600
_NOT_IMPLEMENTED = "not implemented"


class PathKind(StrEnum):
    """The execution paths: what ``--paths`` takes."""

    JIT = "jit"
    EMULATOR = "emulator"
    #: Direct execution, with the forced emulation prefix in front of the case's first instruction.
    FORCED = "forced"


class Ending(StrEnum):
    """How a case ended."""

    HALTED = "halted"
    SHUTDOWN = "shut down"
    INTERNAL_ERROR = "internal error"
    #: Something that is missing, not wrong.
    UNIMPLEMENTED = "not implemented"
    #: The case went on for longer than the fuzzer waits.
    ENDLESS = "endless"
    #: ``run()`` raised an exception, which no guest may bring about.
    CRASHED = "crashed"


@dataclass(frozen=True)
class BusAccess:
    """A port or memory-mapped access that was left to the VMM."""

    kind: str
    address: int
    size: int
    write: bool
    data: int


@dataclass(frozen=True)
class EndState:
    """The machine at the end of a case. ``memory`` is that of the path itself, good until its next case."""

    ending: Ending
    detail: str
    words: NDArray[np.uint64]
    memory: Image
    bus: tuple[BusAccess, ...]
    msrs: dict[int, int]
    fpu: FpuImage

    @property
    def rip(self) -> int:
        """RIP."""
        return int(self.words[s.RIP])

    def vector(self, case: Case) -> int | None:
        """The vector whose handler was reached; None when the case ended elsewhere."""
        return layout.handler_of(case.mode, self.rip) if self.ending is Ending.HALTED else None


class _Endless(Exception):
    """The case has used up its time."""


def _end_case() -> None:
    raise _Endless


class _Machine:
    """A virtual machine of one CPU model."""

    def __init__(self, kind: PathKind, cpu: str) -> None:
        forced = kind is PathKind.FORCED
        self.vm = Vm("emulator" if kind is PathKind.EMULATOR else "jit", forced_emulation=forced)
        buffer = self.vm.allocate(layout.MEMORY_BYTES)
        self.vm.set_user_memory_region(0, 0, buffer)
        self.memory = np.frombuffer(buffer, np.uint8)
        (self._slot,) = self.vm.memory
        self._pages = self.memory.view(np.uint64).reshape(-1, layout.PAGE // 8)
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.set_cpuid2(parse_cpu(cpu).entries())
        self.vcpu.reset()
        self.power_on = self.vcpu.state.array.copy()
        msrs = self.vcpu.emulation.msrs
        self._pristine_msrs = dict(msrs.values)

    def load(self, image: Image, words: NDArray[np.uint64], fpu: Fpu) -> None:
        """Make memory and state those of a case."""
        pages = image.view(np.uint64).reshape(self._pages.shape)
        changed = (pages != self._pages).any(axis=1)
        # Direct execution has to hear of writes where it has translated code. The emulator compares code by itself.
        translated = changed & (self._slot.page_flags & PAGE_CODE != 0)
        for page in np.flatnonzero(translated):
            gpa = int(page) * layout.PAGE
            self.vm.memory.write(gpa, image[gpa : gpa + layout.PAGE].data)
        self._pages[changed] = pages[changed]
        self.vcpu.reset()
        self.vcpu.state.array[:] = words
        msrs = self.vcpu.emulation.msrs
        msrs.values.update(self._pristine_msrs)
        msrs.tsc_offset = msrs.tsc_adjust = 0
        copy_fpu(fpu, self.vcpu.emulation.fpu)

    def run(self) -> EndState:
        """Run until the case has ended."""
        bus: list[BusAccess] = []
        ending, detail = Ending.ENDLESS, ""
        clock = self.vm.clock
        limit = clock.call_at(clock.now() + _MAX_BLOCKS * NANOSECONDS_PER_BLOCK, _end_case)
        for _ in range(_MAX_EXITS):
            try:
                reason = self.vcpu.run()
            except _Endless:
                break
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what the fuzzer looks for
                ending, detail = Ending.CRASHED, f"{type(error).__name__}: {error}"
                break
            if isinstance(reason, IoExit):
                # Nothing answers: an IN finds all ones, which are there already.
                bus.append(BusAccess("port", reason.port, reason.size, reason.write, reason.data))
            elif isinstance(reason, MmioExit):
                bus.append(BusAccess("memory", reason.gpa, reason.size, reason.write, reason.data))
            else:
                ending, detail = _ending_of(reason)
                break
        limit.cancel()
        words = self.vcpu.state.array.copy()
        emulation = self.vcpu.emulation
        return EndState(
            ending, detail, words, self.memory, tuple(bus), emulation.msrs.values, fpu_image(emulation.fpu)
        )


def _ending_of(reason: Exit) -> tuple[Ending, str]:
    if isinstance(reason, HltExit):
        return Ending.HALTED, ""
    if isinstance(reason, ShutdownExit):
        return Ending.SHUTDOWN, ""
    if isinstance(reason, IntrExit):
        return Ending.ENDLESS, ""
    assert isinstance(reason, InternalErrorExit)
    missing = _NOT_IMPLEMENTED in reason.detail
    return Ending.UNIMPLEMENTED if missing else Ending.INTERNAL_ERROR, reason.detail


class Path:
    """One execution path, for any number of cases."""

    def __init__(self, kind: PathKind) -> None:
        self.kind = kind
        self._machines: dict[str, _Machine] = {}

    def run(self, case: Case, image: Image | None = None) -> EndState:
        """Execute *case*; *image* is its memory, if somebody has made it already."""
        machine = self._ready(case, case_image(case) if image is None else image)
        end = machine.run()
        if end.ending is Ending.CRASHED:
            # Nobody knows what state the machine is in.
            del self._machines[case.cpu]
        return end

    def vcpu(self, case: Case) -> Vcpu:
        """The vCPU, ready to execute *case*."""
        return self._ready(case, case_image(case)).vcpu

    def _ready(self, case: Case, image: Image) -> _Machine:
        machine = self._machines.get(case.cpu)
        if machine is None:
            machine = self._machines[case.cpu] = _Machine(self.kind, case.cpu)
        words = start_words(case, machine.power_on, image)
        if self.kind is PathKind.FORCED:
            words[s.RIP] -= np.uint64(len(FORCED_EMULATION_PREFIX))
        machine.load(image, words, start_fpu(case.data_seed))
        return machine


def prepare() -> None:
    """Have the machine code of direct execution ready, before worker processes all do it at once."""
    from lasskvm import kvm

    kvm.prepare(lambda message: None)
