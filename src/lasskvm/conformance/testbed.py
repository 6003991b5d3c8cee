"""One VM in which conformance cases run, one after the other, driven through the KVM API alone.

:class:`Testbed` builds the guest of :mod:`lasskvm.conformance.layout` once, for one CPUID. For each run it puts back
what the one before has changed, applies the case's setup, sets registers, runs the vCPU until the outcome is there, and
reads that from exit, registers and memory. Where an operand is to be in MMIO, the testbed itself is the device: it
answers as the memory that was there would have.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import FORCED_EMULATION, Assembled, assemble
from lasskvm.conformance.backends import Backend
from lasskvm.conformance.case import ACCESS, COMPLETION, COMPLETION_CODE, Case, Effect, Ending
from lasskvm.conformance.layout import PageTables
from lasskvm.conformance.modes import (
    event_frame,
    handler_vector,
    initial_state,
    program_place,
    write_legacy_tables,
)
from lasskvm.conformance.observation import CR2_UNTOUCHED, Observed
from lasskvm.conformance.setup import Site
from lasskvm.kvm.exits import Exit, HltExit, InternalErrorExit, IoExit, MmioExit, ShutdownExit
from lasskvm.kvm.structures import DebugRegs, Regs, Sregs
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.cpuid import CpuidEntry
from lasskvm.x86.exceptions import UD
from lasskvm.x86.paging import PTE_A, PTE_D, PTE_P
from lasskvm.x86.registers import (
    CR0_PE,
    CR3_PWT,
    CR4_LA57,
    CR4_LASS,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    RFLAGS_FIXED,
)

__all__ = ["Device", "NotOfferedError", "ProviderError", "Testbed", "assemble_case"]

_HLT = b"\xf4"
#: What cases can change, as guest-physical ranges that are compared and written back in blocks.
_RESTORED = ((0, layout.CASE_MEMORY_END), (layout.TABLES_GPA, layout.TABLES_END))
_BLOCK = 0x10000
#: More exits than any case needs: FXSAVE to MMIO is 64.
_MAX_EXITS = 400
_WORD_BYTES = 8


def assemble_case(case: Case, *, forced: bool = False) -> Assembled:
    """The program of *case*, its completion behind it; *forced*: the instruction under test has KVM's prefix."""
    source = case.program
    if forced:
        source = source.replace(f"{ACCESS}:", f"{FORCED_EMULATION}; {ACCESS}:")
    at = program_place(case.mode, case.cpl)[0] if case.at is None else case.at
    return assemble(f"{source}\n{COMPLETION}", at, case.bits)


class ProviderError(Exception):
    """The provider could not execute a case; *str(error)* says what happened. The VM is of no use any more."""


class NotOfferedError(Exception):
    """The provider lacks what a case needs, beyond what its CPUID tells; *str(error)* says what."""


def _page_pattern(gpa: int) -> bytes:
    """What the page at *gpa* holds at first: no byte is 0, no word is another page's."""
    return bytes(0x11 * (1 + (number + gpa // PAGE_SIZE) % 7) for number in range(PAGE_SIZE))


@dataclass
class Device:
    """The MMIO pages of a run: guest-physical page to what it holds."""

    pages: dict[int, bytearray] = field(default_factory=dict)
    #: How often each was accessed.
    accesses: dict[int, int] = field(default_factory=dict)

    def answer(self, mmio: MmioExit) -> bool:
        """Answer an access; False when it is none of ours."""
        frame = mmio.gpa & -PAGE_SIZE
        page = self.pages.get(frame)
        offset = mmio.gpa % PAGE_SIZE
        if page is None or offset + mmio.size > PAGE_SIZE:
            return False
        self.accesses[frame] += 1
        if mmio.write:
            page[offset : offset + mmio.size] = mmio.data.to_bytes(mmio.size, "little")
        else:
            mmio.data = int.from_bytes(page[offset : offset + mmio.size], "little")
        return True


class Testbed:
    """A VM of *backend* whose processor has the CPUID *entries*, with *levels* levels of page tables.

    *timeout* is how many seconds a run may take.
    """

    #: pytest is not to take it for a test.
    __test__ = False

    def __init__(
        self,
        backend: Backend,
        entries: Iterable[CpuidEntry],
        *,
        levels: int = layout.DEFAULT_LEVELS,
        timeout: float,
    ) -> None:
        self._backend = backend
        self._timeout = timeout
        self._vm = backend.create_vm()
        self._vm.set_user_memory_region(0, 0, self._vm.allocate(layout.MEMORY_BYTES))
        self._memory = self._vm.memory
        self._vcpu = self._vm.create_vcpu()
        self._vcpu.set_cpuid2(self._processor(list(entries)))
        self._power_on = self._vcpu.get_sregs()
        self._tables = PageTables(self._memory, levels)
        self._build_memory()
        self._cr3 = self._tables.root
        self._debug_registers_used = True

    def _processor(self, entries: list[CpuidEntry]) -> list[CpuidEntry]:
        """The CPUID of a processor with *entries* in this VM, which may get what belongs to it."""
        return entries

    def _build_memory(self) -> None:
        """Everything that the guest has before the first case."""
        memory = self._memory
        layout.write_tables(memory)
        write_legacy_tables(memory)
        for vector in range(layout.VECTORS):
            memory.write(layout.HANDLERS_GPA + vector * layout.HANDLER_BYTES, _HLT)
        for gpa in range(layout.DATA_GPA, layout.CASE_MEMORY_END, PAGE_SIZE):
            memory.write(gpa, COMPLETION_CODE + _page_pattern(gpa)[len(COMPLETION_CODE) :])
        self._tables.map_layout()
        self._pristine_tables = self._tables.next_free
        self._pristine = [
            (gpa, memory.read(gpa, _BLOCK)) for start, end in _RESTORED for gpa in range(start, end, _BLOCK)
        ]

    def close(self) -> None:
        """Give the VM back."""
        close = getattr(self._vm, "close", None)
        if close is not None:
            close()

    # ------------------------------------------------------------------------------------------------- one run

    def run(self, case: Case, *, lass: bool, forced: bool = False, mmio: bool = False) -> Observed:
        """Run *case* with CR4.LASS as *lass* says, and tell how it ended.

        Raises :class:`ProviderError`; then this testbed must not be used again. Raises :class:`NotOfferedError` when
        the case cannot be made here.
        """
        program = assemble_case(case, forced=forced)
        self._restore()
        self._prepare(case)
        site = Site(self._memory, self._tables, program.labels)
        for step in case.setup:
            step.apply(site)
        if case.mode.is_ia32e:
            self._tables.write(program.address, program.code)
        else:
            self._memory.write(program.address, program.code)
        device = self._map_device(case.mmio if mmio else ())
        before = None if case.operand is None else self._page(case.operand, device)
        observed = self._execute(case, program, lass, device)
        if case.operand is not None and before is not None:
            effect, text = self._effect(case.operand, before, device)
            accesses = device.accesses.get(self._tables.frame(case.operand))
            observed = replace(observed, effect=effect, page=text, mmio_accesses=accesses)
        return observed

    def _prepare(self, case: Case) -> None:
        """What the guest has to do before *case*, on memory as it is at first."""

    def _execute(self, case: Case, program: Assembled, lass: bool, device: Device) -> Observed:
        """Set the registers, run, and look at what has become of it; memory is ready."""
        start = self._registers(case, program)
        reason = self._run(device) if self._start(case, program, start, lass) else None
        regs, sregs = self._vcpu.get_regs(), self._vcpu.get_sregs()
        return self._observe(case, program, start, reason, device, regs, sregs)

    def _restore(self) -> None:
        for gpa, content in self._pristine:
            if self._memory.read(gpa, _BLOCK) == content:
                continue
            for offset in range(0, _BLOCK, PAGE_SIZE):
                page = content[offset : offset + PAGE_SIZE]
                if self._memory.read(gpa + offset, PAGE_SIZE) != page:
                    self._memory.write(gpa + offset, page)
        self._tables.next_free = self._pristine_tables

    def _map_device(self, pages: tuple[int, ...]) -> Device:
        device = Device()
        for number, gva in enumerate(pages):
            entry, gpa = self._tables.entry(gva), layout.MMIO_GPA + number * PAGE_SIZE
            frame = self._tables.frame(gva)
            device.pages[gpa] = bytearray(self._memory.read(frame, PAGE_SIZE))
            device.accesses[gpa] = 0
            self._tables.set_entry(gva, entry - frame + gpa)
        return device

    def _registers(self, case: Case, program: Assembled) -> Regs:
        stack = program_place(case.mode, case.cpl)[1]
        registers = {"rip": program.address, "rsp": stack, "rflags": case.rflags | RFLAGS_FIXED}
        registers |= {name: self._value(value, program) for name, value in case.registers.items()}
        return Regs(**registers)

    def _start(self, case: Case, program: Assembled, start: Regs, lass: bool) -> bool:
        """Set the registers; False when KVM_SET_SREGS is refused with EINVAL."""
        vcpu = self._vcpu
        sregs = self._sregs(case, lass)
        try:
            vcpu.set_sregs(sregs)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        taken = vcpu.get_sregs()
        for name in ("cr0", "cr4", "efer"):
            if getattr(taken, name) != getattr(sregs, name):
                raise ProviderError(
                    f"KVM_SET_SREGS made {name.upper()} {getattr(taken, name):#x} of {getattr(sregs, name):#x}: "
                    f"this provider cannot run a guest in {case.mode.value} with it"
                )
        self._set_msrs(case, program)
        vcpu.set_debugregs(DebugRegs())
        vcpu.set_regs(start)
        return True

    def _set_msrs(self, case: Case, program: Assembled) -> None:
        if not case.msrs:
            return
        msrs = {index: self._value(value, program) for index, value in case.msrs.items()}
        if self._vcpu.set_msrs(msrs) != len(msrs):
            raise ProviderError(f"KVM_SET_MSRS does not take all of {', '.join(map(hex, msrs))}")

    @staticmethod
    def _value(value: int | str, program: Assembled) -> int:
        return program.labels[value] if isinstance(value, str) else value

    def _sregs(self, case: Case, lass: bool) -> Sregs:
        # KVM forgets the guest's translations when CR3 has changed; the tables have been written behind its back.
        self._cr3 ^= CR3_PWT
        sregs = initial_state(case.mode, self._power_on, case.cpl, self._cr3)
        sregs.cr2 = CR2_UNTOUCHED
        sregs.cr4 &= ~(CR4_SMAP | CR4_SMEP | CR4_LASS)
        if self._tables.levels > layout.DEFAULT_LEVELS:
            sregs.cr4 |= CR4_LA57
        if case.mode.is_ia32e:
            sregs.cr3 |= case.cr3
        sregs.cr4 |= CR4_SMAP * case.smap | CR4_SMEP * case.smep | CR4_LASS * lass | case.cr4
        return replace(sregs, **case.sregs)  # type: ignore[arg-type]

    def _run(self, device: Device) -> Exit:
        for _ in range(_MAX_EXITS):
            # Whatever a provider raises is a result: it is what is being tested.
            try:
                reason = self._backend.run(self._vcpu, self._timeout)
            except Exception as error:
                raise ProviderError(f"KVM_RUN raised {type(error).__name__}: {error}") from error
            if reason is None:
                raise ProviderError(f"timeout: the guest was still running after {self._timeout:g} s")
            if isinstance(reason, HltExit | ShutdownExit):
                return reason
            if isinstance(reason, InternalErrorExit):
                raise ProviderError(f"internal error: {reason.detail}")
            if isinstance(reason, IoExit):
                continue
            if not isinstance(reason, MmioExit) or not device.answer(reason):
                raise ProviderError(f"unexpected exit: {reason}")
        raise ProviderError(f"the guest exited {_MAX_EXITS} times without an end")

    # --------------------------------------------------------------------------------------------- the outcome

    def _observe(
        self,
        case: Case,
        program: Assembled,
        start: Regs,
        reason: Exit | None,
        device: Device,
        regs: Regs,
        sregs: Sregs,
    ) -> Observed:
        """What *reason*, registers and memory say."""
        frame = (regs.rip, sregs.cs.selector, regs.rflags, regs.rsp, sregs.ss.selector)
        ending = Ending.HALTS
        vector = error_code = None
        if reason is None:
            ending = Ending.REFUSED
        elif isinstance(reason, ShutdownExit):
            ending = Ending.SHUTDOWN
        else:
            long_mode = bool(sregs.efer & EFER_LMA)
            vector = handler_vector(regs.rip, 0 if long_mode else sregs.cs.base, long_mode=long_mode)
            if vector is not None:
                ending = Ending.EVENT
                error_code, frame = self._frame(vector, regs, sregs)
                if vector == UD and self._is_completion(frame[0], long_mode=long_mode):
                    ending, vector = Ending.COMPLETES, None
        asked = {*case.lass.memory, *(case.off.memory if case.off else ())}
        return Observed(
            ending, vector, error_code, *frame, regs=regs, sregs=sregs,
            dr6=self._vcpu.get_debugregs().dr6, labels=program.labels, start=start,
            is_first=case.program.lstrip().startswith(f"{ACCESS}:"),
            memory={gva: self._load(gva, _WORD_BYTES, device) for gva in asked},
        )  # fmt: skip

    def _frame(
        self, vector: int, regs: Regs, sregs: Sregs
    ) -> tuple[int | None, tuple[int, int, int, int, int]]:
        long_mode, real_mode = bool(sregs.efer & EFER_LMA), not sregs.cr0 & CR0_PE
        sp = regs.rsp if long_mode else regs.rsp + sregs.ss.base
        read = self._load if long_mode else self._memory.load
        error_code, frame = event_frame(read, vector, sp, long_mode=long_mode, real_mode=real_mode)
        rip, cs, rflags, rsp, ss = frame
        return error_code, (
            rip, cs, rflags, regs.rsp if rsp is None else rsp, sregs.ss.selector if ss is None else ss
        )  # fmt: skip

    def _is_completion(self, rip: int, *, long_mode: bool) -> bool:
        if not long_mode:
            # All segments that cases use begin at 0.
            return self._memory.read(rip, len(COMPLETION_CODE)) == COMPLETION_CODE
        code = self._load(rip, len(COMPLETION_CODE))
        return code.to_bytes(len(COMPLETION_CODE), "little") == COMPLETION_CODE

    def _load(self, gva: int, size: int, device: Device | None = None) -> int:
        """*size* bytes at linear *gva*, which may cross the end of a page; zeros where nothing is mapped."""
        value = 0
        for number in range(size):
            address = (gva + number) % (1 << 64)
            page = self._page(address, device)
            value |= page[address % PAGE_SIZE] << 8 * number
        return value

    def _page(self, gva: int, device: Device | None) -> bytes:
        """What the page at *gva* holds; zeros where nothing is mapped."""
        if not self._tables.entry(gva) & PTE_P:
            return bytes(PAGE_SIZE)
        frame = self._tables.frame(gva)
        if device is not None and frame in device.pages:
            return bytes(device.pages[frame])
        return self._memory.read(frame, PAGE_SIZE)

    def _effect(self, gva: int, before: bytes, device: Device) -> tuple[Effect | None, str]:
        """What has happened to the page at *gva*, and the same in words."""
        entry = self._tables.entry(gva)
        accessed, dirty = bool(entry & PTE_A), bool(entry & PTE_D)
        changed = self._page(gva, device) != before
        bits = [name for name, is_set in (("A", accessed), ("D", dirty)) if is_set]
        text = f"{'+'.join(bits) or 'neither A nor D'}{', changed' if changed else ''}"
        effects = {
            (False, False, False): Effect.NONE,
            (True, False, False): Effect.READ,
            (True, True, True): Effect.WRITTEN,
            (True, True, False): Effect.REWRITTEN,
        }
        effect = effects.get((accessed, dirty, changed))
        return effect, text if effect is None else effect.value
