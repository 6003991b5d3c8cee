"""What LASS does, shown by a guest that switches it on: ``lasskvm demo``.

No download and no Linux: an upper-half kernel of a few hundred bytes and some user programs
(:mod:`lasskvm.conformance.demo_kernel`, :mod:`lasskvm.conformance.demo_cases`) run on a VM of a few megabytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import FORCED_EMULATION, Assembled, assemble
from lasskvm.conformance.demo_cases import (
    ACCESS,
    CASES,
    LOW_GDT_POINTER,
    LOW_LDT_SELECTOR,
    Case,
    Observation,
)
from lasskvm.conformance.demo_kernel import (
    CASE_WORDS,
    CASES_GPA,
    CR2_UNTOUCHED,
    FINAL_CR4,
    FINISHED,
    FOUND,
    RECORD_WORDS,
    RECORDS_GPA,
    VARIABLES_GPA,
    handled_vectors,
    kernel_source,
)
from lasskvm.conformance.layout import DONE_VECTOR, LOW_SUPERVISOR, PageTables
from lasskvm.kvm import ExecutionEngine, IntrExit, Regs, Vm
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.descriptors import make_segment
from lasskvm.x86.exceptions import GP, SS
from lasskvm.x86.registers import AR_LDT, CR4_LASS, RFLAGS_FIXED

__all__ = ["DemoResult", "DemoRow", "run_demo"]

_WORD = 8
#: Each program has this many bytes of its privilege level's code pages.
_PROGRAM_BYTES = 64
_PROGRAMS_OFFSET = 0x2000
_GDT_LIMIT = 0xFF
_LDT_DATA_OFFSET = 8
_LAST_PAGE = (1 << 64) - PAGE_SIZE
#: Behind the pages of the layout: what the last page and page 0 are mapped to.
_WRAP_GPA = layout.DATA_END
_MAX_RUNS = 100
NOT_REACHED = "not reached"


@dataclass(frozen=True)
class DemoRow:
    """One access: in words, what happened without LASS and with it, and whether LASS kept it from happening.

    ``as_documented`` says whether both outcomes are the manual's, down to error code, RIP and CR2.
    """

    access: str
    without_lass: str
    with_lass: str
    blocked: bool
    as_documented: bool


@dataclass(frozen=True)
class DemoResult:
    """The accesses in their order; whether the guest found LASS in CPUID, and whether it had it on at the end."""

    rows: tuple[DemoRow, ...]
    found: bool
    enabled: bool

    @property
    def as_documented(self) -> bool:
        """Whether every access had the outcome that the manual gives."""
        return self.found and self.enabled and all(row.as_documented for row in self.rows)


def run_demo(
    progress: Callable[[str], None] | None = None,
    *,
    engine: ExecutionEngine = "jit",
    forced_emulation: bool = False,
) -> DemoResult:
    """Run the demonstration on *engine* and return what the guest has seen.

    *progress* is told, in a few words, what is going on. With *forced_emulation* each access carries KVM's forced
    emulation prefix.
    """
    tell = progress or (lambda message: None)
    guest = _DemoGuest(engine, forced_emulation)
    tell(f"a guest makes {len(CASES)} accesses, switches LASS on, and makes them again")
    guest.run()
    return guest.result()


class _DemoGuest:
    """The VM of the demonstration."""

    def __init__(self, engine: ExecutionEngine, forced_emulation: bool) -> None:
        vm = Vm(engine, forced_emulation=forced_emulation)
        vm.set_user_memory_region(0, 0, vm.allocate(layout.MEMORY_BYTES))
        self._memory = vm.memory
        self._vcpu = vm.create_vcpu()
        self._vcpu.set_cpuid2(parse_cpu("max").entries())
        self._programs = [self._assemble(number, case, forced_emulation) for number, case in enumerate(CASES)]
        self._tables = PageTables(self._memory)
        self._build_memory()

    @staticmethod
    def _assemble(number: int, case: Case, forced_emulation: bool) -> Assembled:
        code = layout.USER_CODE if case.cpl == 3 else layout.KERNEL_CODE
        address = code + _PROGRAMS_OFFSET + number * _PROGRAM_BYTES
        program = case.program
        if forced_emulation:
            program = program.replace(f"{ACCESS}:", f"{FORCED_EMULATION}; {ACCESS}:")
        return assemble(f"{program}; int {DONE_VECTOR:#x}", address)

    def _build_memory(self) -> None:
        memory, tables = self._memory, self._tables
        tables.map_layout()
        tables.map(_LAST_PAGE, _WRAP_GPA)
        tables.map(0, _WRAP_GPA + PAGE_SIZE)
        layout.write_tables(memory)
        low_ldt = make_segment(LOW_SUPERVISOR, PAGE_SIZE - 1, AR_LDT)
        layout.set_descriptor(memory, LOW_LDT_SELECTOR, low_ldt, LOW_SUPERVISOR >> 32)
        kernel = assemble(kernel_source(len(CASES)), layout.KERNEL_CODE)
        tables.write(kernel.address, kernel.code)
        for vector, handler in handled_vectors(kernel.labels).items():
            layout.set_gate(memory, vector, handler, dpl=3 if vector == DONE_VECTOR else 0, ist=layout.IST)
        for number, (case, program) in enumerate(zip(CASES, self._programs, strict=True)):
            tables.write(program.address, program.code)
            memory.write(CASES_GPA + number * CASE_WORDS * _WORD, _words(*_entry_frame(case, program)))
        # What is found at the pages: code to jump to, which is an LDT as well, and an operand for LGDT.
        arrival = assemble(f"int {DONE_VECTOR:#x}", LOW_SUPERVISOR).code
        tables.write(LOW_SUPERVISOR, arrival)
        tables.write(LOW_SUPERVISOR + _LDT_DATA_OFFSET, _words(layout.ldt_data_descriptor()))
        tables.write(LOW_GDT_POINTER, _GDT_LIMIT.to_bytes(2, "little") + _words(layout.GDT))

    def run(self) -> None:
        """Run the guest to its end."""
        vcpu = self._vcpu
        sregs = layout.initial_sregs(vcpu.get_sregs(), 0, 64, self._tables.root)
        sregs.cr4 &= ~CR4_LASS
        vcpu.set_sregs(sregs)
        vcpu.set_regs(Regs(rip=layout.KERNEL_CODE, rsp=layout.KERNEL_STACK_TOP, rflags=RFLAGS_FIXED))
        for _ in range(_MAX_RUNS):
            if not isinstance(vcpu.run(), IntrExit):
                break

    def result(self) -> DemoResult:
        """What the guest has written to its memory."""
        rows = []
        for number, case in enumerate(CASES):
            without = self._observation(number, number)
            with_lass = self._observation(number + len(CASES), number)
            blocked = with_lass is not None and with_lass != without and with_lass.vector in (GP, SS)
            as_documented = (without, with_lass) == (case.without_lass, case.with_lass)
            rows.append(
                DemoRow(
                    case.words,
                    str(without or NOT_REACHED),
                    str(with_lass or NOT_REACHED),
                    blocked,
                    as_documented,
                )
            )
        return DemoResult(
            tuple(rows), found=bool(self._variable(FOUND)), enabled=bool(self._variable(FINAL_CR4) & CR4_LASS)
        )

    def _variable(self, number: int) -> int:
        return self._memory.load(VARIABLES_GPA + number * _WORD, _WORD)

    def _observation(self, record: int, case: int) -> Observation | None:
        if record >= self._variable(FINISHED):
            return None
        gpa = RECORDS_GPA + record * RECORD_WORDS * _WORD
        vector, error_code, rip, cr2 = (
            self._memory.load(gpa + word * _WORD, _WORD) for word in range(RECORD_WORDS)
        )
        if vector == DONE_VECTOR:
            return Observation()
        labels = {address: name for name, address in self._programs[case].labels.items()}
        return Observation(vector, error_code, labels.get(rip, rip), None if cr2 == CR2_UNTOUCHED else cr2)


def _entry_frame(case: Case, program: Assembled) -> tuple[int, int, int, int, int]:
    """The frame with which IRET enters *program*."""
    cs, ss = layout.code_selectors(64, case.cpl)
    # Kernel programs get a stack of their own: the kernel's holds its return address.
    stack = layout.USER_STACK_TOP - PAGE_SIZE if case.cpl == 3 else layout.RING0_STACK_TOP
    return program.address, cs, RFLAGS_FIXED, stack, ss


def _words(*values: int) -> bytes:
    return b"".join(value.to_bytes(_WORD, "little") for value in values)
