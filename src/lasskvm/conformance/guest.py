"""A small 64-bit guest to ask one question at a time: what does the machine do with this program?

The guest is built as :mod:`lasskvm.conformance.layout` says, and driven through the KVM API. Each exception and
interrupt vector has a handler of its own that halts; which one the vCPU halts in, and the frame on its stack, say what
happened. A program that runs to its end ends in a handler too: ``INT 80H`` follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import Assembled, assemble
from lasskvm.conformance.layout import DONE_VECTOR, PageTables
from lasskvm.kvm import ExecutionEngine, Exit, HltExit, IntrExit, Regs, Sregs, Vm
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.exceptions import has_error_code, vector_name
from lasskvm.x86.paging import PTE_A, PTE_D
from lasskvm.x86.registers import CR4_LA57, RFLAGS_FIXED

__all__ = ["Guest", "Outcome"]

#: CR2 before each program, so that a test sees whether it was written.
CR2_UNTOUCHED = 0xFFFF_8BAD_0000_0CE2

_HLT = b"\xf4"
_WORD_BYTES = 8
_FRAME_WORDS = 5
_FRAME_BYTES = _FRAME_WORDS * _WORD_BYTES
#: What a program can change and the next one relies on, as guest-physical ranges.
_RESTORED = (
    (0, layout.HANDLERS_GPA),
    (layout.DATA_GPA, layout.DATA_END),
    (layout.TABLES_GPA, layout.TABLES_END),
)
#: Runs that a program gets: an exit for the VMM's own sake is no outcome.
_MAX_RUNS = 4


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    ``vector`` is that of the event whose handler was reached; None when the run ended otherwise, which ``exit`` tells.
    ``rip`` to ``ss`` are the interrupted program's, from the handler's frame (without an event: the vCPU's own), and
    ``registers`` the vCPU's at the exit.
    """

    exit: Exit
    vector: int | None
    error_code: int | None
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int
    cr2: int
    registers: Regs
    program: Assembled

    @property
    def completed(self) -> bool:
        """Whether the program ran to its end."""
        return self.vector == DONE_VECTOR

    @property
    def label(self) -> str | None:
        """The program's label at ``rip``, which names the place where something happened."""
        return next((name for name, address in self.program.labels.items() if address == self.rip), None)

    def __str__(self) -> str:
        if self.completed:
            return "completed"
        if self.vector is None:
            return f"{self.exit} at {self.rip:#x}"
        code = "" if self.error_code is None else f"({self.error_code:#x})"
        return f"{vector_name(self.vector)}{code} at {self.label or hex(self.rip)}"


class Guest:
    """One guest, used for many programs.

    *cpu* is a CPU model as ``--cpu`` takes it, *levels* those of the page tables; *engine* and *forced_emulation* are
    those of :class:`~lasskvm.kvm.Vm`, and *irqchip* says whether it has interrupt chips. :meth:`reset` makes everything
    as it was at the start. In between, memory and ``tables`` may be changed at will, and so may these attributes, which
    count for the programs started next:

    ``cr0``, ``cr4``, ``efer``
        Control registers; LASS, SMAP and SMEP are on to begin with.
    ``sregs``
        Fields of ``Sregs`` to replace, by name.
    ``msrs``
        Model-specific registers to set, by index.

    >>> outcome = Guest().execute("fault: mov rax, [rbx]", cpl=3, rbx=0xFFFF_8000_0000_0000)
    >>> str(outcome)
    '#GP(0x0) at fault'
    """

    def __init__(
        self,
        cpu: str = "max",
        *,
        levels: int = 4,
        engine: ExecutionEngine = "jit",
        forced_emulation: bool = False,
        irqchip: bool = False,
    ) -> None:
        self.vm = Vm(engine, forced_emulation=forced_emulation)
        if irqchip:
            self.vm.create_irqchip()
        self.vm.set_user_memory_region(0, 0, self.vm.allocate(layout.MEMORY_BYTES))
        self.memory = self.vm.memory
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.set_cpuid2(parse_cpu(cpu).entries())
        self._power_on = self.vcpu.get_sregs()
        layout.write_tables(self.memory)
        for vector in range(layout.VECTORS):
            self.memory.write(layout.HANDLERS_GPA + vector * layout.HANDLER_BYTES, _HLT)
        self.tables = PageTables(self.memory, levels)
        self.tables.map_layout()
        self._pristine_tables = self.tables.next_free
        self._pristine = [(start, self.memory.read(start, end - start)) for start, end in _RESTORED]
        self._program = Assembled(0, b"", {})
        self.reset()

    def reset(self) -> None:
        """Make the guest as it was when it was made."""
        for start, content in self._pristine:
            self.memory.write(start, content)
        self.tables.next_free = self._pristine_tables
        self.cr0, self.cr4, self.efer = layout.DEFAULT_CR0, layout.DEFAULT_CR4, layout.DEFAULT_EFER
        if self.tables.levels > layout.DEFAULT_LEVELS:
            self.cr4 |= CR4_LA57
        self.sregs: dict[str, object] = {}
        self.msrs: dict[int, int] = {}

    # ------------------------------------------------------------------------------------------------ running

    def execute(
        self,
        source: str,
        *,
        cpl: int = 0,
        bits: int = 64,
        at: int | None = None,
        rflags: int = 0,
        handlers: Mapping[int, str] | None = None,
        **registers: int,
    ) -> Outcome:
        """Run the program *source* and say what became of it; :meth:`start` and :meth:`run` in one."""
        self.start(source, cpl=cpl, bits=bits, at=at, rflags=rflags, handlers=handlers, **registers)
        return self.run()

    def start(
        self,
        source: str,
        *,
        cpl: int = 0,
        bits: int = 64,
        at: int | None = None,
        rflags: int = 0,
        handlers: Mapping[int, str] | None = None,
        **registers: int,
    ) -> Assembled:
        """Place the program *source*, followed by ``INT 80H``, and make the vCPU ready to run it.

        *cpl* is the privilege level, *bits* 64 or 32 (compatibility mode), *at* the linear address when it is not the
        usual one of that level. *rflags* are added to the fixed ones, *registers* set by name. With *handlers*, labels
        of the program are the handlers of vectors, on the IST stack.
        """
        if at is None:
            at = layout.USER_CODE if cpl == 3 or bits == 32 else layout.KERNEL_CODE
        program = assemble(f"{source}\nint {DONE_VECTOR:#x}", at, bits)
        self.place(program)
        for vector, label in (handlers or {}).items():
            layout.set_gate(self.memory, vector, program.labels[label], ist=layout.IST)
        self.vcpu.reset()
        self.vcpu.set_sregs(self._sregs(cpl, bits))
        for index, value in self.msrs.items():
            self.vcpu.set_msr(index, value)
        stack = layout.USER_STACK_TOP if cpl == 3 or bits == 32 else layout.KERNEL_STACK_TOP
        self.vcpu.set_regs(Regs(**{"rip": at, "rsp": stack, "rflags": rflags | RFLAGS_FIXED} | registers))
        self._program = program
        return program

    def run(self) -> Outcome:
        """Run the vCPU until something has become of the program."""
        for _ in range(_MAX_RUNS):
            reason = self.vcpu.run()
            if not isinstance(reason, IntrExit):
                break
        return self._outcome(reason)

    def _sregs(self, cpl: int, bits: int) -> Sregs:
        sregs = layout.initial_sregs(self._power_on, cpl, bits, self.tables.root)
        sregs.cr0, sregs.cr2, sregs.cr4, sregs.efer = self.cr0, CR2_UNTOUCHED, self.cr4, self.efer
        return replace(sregs, **self.sregs)  # type: ignore[arg-type]

    def _outcome(self, reason: Exit) -> Outcome:
        regs, sregs = self.vcpu.get_regs(), self.vcpu.get_sregs()
        vector = error_code = None
        frame = (regs.rip, sregs.cs.selector, regs.rflags, regs.rsp, sregs.ss.selector)
        offset = regs.rip - len(_HLT) - layout.HANDLERS
        in_handler = (
            offset % layout.HANDLER_BYTES == 0 and 0 <= offset < layout.VECTORS * layout.HANDLER_BYTES
        )
        if isinstance(reason, HltExit) and in_handler:
            vector = offset // layout.HANDLER_BYTES
            error_code, frame = self._frame(vector, regs.rsp)
        return Outcome(
            reason, vector, error_code, *frame, cr2=sregs.cr2, registers=regs, program=self._program
        )

    def _frame(self, vector: int, rsp: int) -> tuple[int | None, tuple[int, int, int, int, int]]:
        """The error code and RIP, CS, RFLAGS, RSP and SS that delivery has pushed at *rsp*.

        On the IST stack the number of words tells whether there is an error code; elsewhere the vector does, which is
        wrong for INT *n* of an exception's vector.
        """
        pushed = layout.IST_STACK_TOP - rsp
        on_ist_stack = pushed in (_FRAME_BYTES, _FRAME_BYTES + _WORD_BYTES)
        with_code = pushed > _FRAME_BYTES if on_ist_stack else has_error_code(vector)
        error_code = self.read(rsp) if with_code else None
        rip, cs, rflags, old_rsp, ss = self.stack(rsp + _WORD_BYTES * with_code, _FRAME_WORDS)
        return error_code, (rip, cs, rflags, old_rsp, ss)

    # ------------------------------------------------------------------------------------------------- memory

    def place(self, program: Assembled) -> None:
        """Write *program* into memory, through the page tables."""
        self.write(program.address, program.code)

    def write(self, gva: int, data: bytes) -> None:
        """Write *data* at linear *gva* on behalf of the VMM: protection does not matter, the mapping must exist."""
        self.tables.write(gva, data)

    def read(self, gva: int, size: int = _WORD_BYTES) -> int:
        """The little-endian value of *size* bytes at linear *gva*, which must not cross a page."""
        return self.memory.load(self.gpa(gva), size)

    def gpa(self, gva: int) -> int:
        """The guest-physical address that *gva* is mapped to."""
        return self.tables.gpa(gva)

    def stack(self, rsp: int, words: int) -> list[int]:
        """The *words* 64-bit words at linear *rsp*, lowest first."""
        return [self.read(rsp + _WORD_BYTES * number) for number in range(words)]

    def accessed_and_dirty(self, gva: int) -> tuple[bool, bool]:
        """The accessed and dirty bits of the page at *gva*."""
        entry = self.tables.entry(gva)
        return bool(entry & PTE_A), bool(entry & PTE_D)
