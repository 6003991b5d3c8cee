"""Running a guest on the emulator: blocks of compiled instructions, found by guest-physical address.

A block is a run of plain instructions on one page and the instruction that ends it. While nothing asks for more (a
trap flag, a breakpoint, an interrupt shadow, alignment checks), a block is executed without looking up between its
instructions; otherwise every instruction is executed by itself (:func:`lasskvm.emulator.execution.step`).

A block is only executed while memory holds the bytes it was made from, whoever has written there; a store to a page
with decoded code ends the block that makes it, so self-modifying code is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import checks_alignment
from lasskvm.emulator.decode import MAX_INSTRUCTION_LENGTH, Decoded, decode
from lasskvm.emulator.execution import compile_instruction, deliver_fault, step
from lasskvm.emulator.faults import GuestFault, Unhandleable, raise_linear_fault
from lasskvm.emulator.linearize import linear_address
from lasskvm.emulator.modes import code_bits, instruction_pointer_mask
from lasskvm.emulator.operation import Executor
from lasskvm.lass import FETCH
from lasskvm.memory import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from lasskvm.state import (
    CPL,
    DR7,
    INTERRUPT_SHADOW,
    LIMIT,
    NMI_BLOCKED,
    RFLAGS,
    RIP,
    TLB_FLUSH,
    segment_word,
)
from lasskvm.x86.registers import CS, RFLAGS_IF, RFLAGS_RF, RFLAGS_TF

__all__ = ["Interpreter"]

_BLOCK_INSTRUCTIONS = 64
_KEPT_BLOCKS = 1 << 16
_DR7_ENABLED = 0xFF
_STEPPED_FLAGS = RFLAGS_TF | RFLAGS_RF
_CS_LIMIT = segment_word(CS, LIMIT)


@dataclass(frozen=True, slots=True)
class _Block:
    """``steps``: what to call, and the distance from the block's start to the instruction behind. ``last`` ends it.

    Without ``instructions``, ``code`` begins with one that no block has.
    """

    code: bytes
    steps: tuple[tuple[Executor, int], ...]
    last: Executor | None
    instructions: int
    #: Whether it ends in a near branch, so that it may go on with itself.
    loops: bool


@dataclass(frozen=True, slots=True)
class _CodePage:
    """Where the code of a linear page is: in *view*, and guest-physically."""

    view: memoryview
    to_view: int
    to_gpa: int


class Interpreter:
    """Executes the guest of one :class:`Emulation`.

    ``blocks`` counts what has been executed in blocks, the unit of the virtual clock; ``instructions`` counts
    instructions, each element or batch of a repeated string instruction as one.
    """

    def __init__(self, ctx: Emulation) -> None:
        self._ctx = ctx
        self.blocks = 0
        self.instructions = 0
        #: Return as soon as the guest can take an interrupt.
        self.want_interrupt_window = False
        #: Return as soon as the guest can take an NMI.
        self.want_nmi_window = False
        self._stop = False
        self._blocks: dict[tuple[int, int, bool], _Block] = {}
        self._code_pages: dict[int, _CodePage] = {}
        self._code_cpl = 0

    def stop(self) -> None:
        """Let a run in progress end behind the current block."""
        self._stop = True

    def spend(self, blocks: int) -> None:
        """Let time go on as if *blocks* more blocks had been executed."""
        self.blocks += blocks

    def forget_translations(self) -> None:
        """Translations may have changed without a word: direct execution has run."""
        self._ctx.tlb.flush()
        self._code_pages.clear()

    def forget_code(self) -> None:
        """Forget all decoded code and all translations, as in a new interpreter; the counters go on."""
        self._blocks.clear()
        self._ctx.tlb.code_pages.clear()
        self.forget_translations()

    def step(self) -> None:
        """Execute one instruction exactly, as a block of its own; raises what :meth:`run` raises."""
        self.blocks += 1
        self._ctx.tlb.suspend()
        self._step()
        self._ctx.leave_block = False

    def run(self, blocks: int, may_go_on: Callable[[], bool] | None = None) -> None:
        """Execute up to *blocks* blocks.

        Ends early when the guest halts, can take a wanted interrupt, writes to a device that the VMM must hear of, when
        :meth:`stop` is called, or when *may_go_on* says no between two blocks. Raises what
        :func:`lasskvm.emulator.execution.emulate_instruction` raises, with RIP on the instruction in question.
        """
        ctx, words = self._ctx, self._ctx.words
        self._stop = False
        end = self.blocks + blocks
        try:
            while self.blocks < end and not self._stop:
                if words[TLB_FLUSH]:
                    words[TLB_FLUSH] = 0
                    self.forget_translations()
                try:
                    self._run_block(end)
                except GuestFault as fault:
                    deliver_fault(ctx, fault)
                if ctx.leave_block:
                    ctx.leave_block = False
                    if ctx.mmio.writes:
                        return
                if ctx.halted or self._is_wanted_window():
                    return
                if may_go_on is not None and not may_go_on():
                    return
        finally:
            ctx.tlb.suspend()

    def _is_wanted_window(self) -> bool:
        """Whether the guest takes what is waited for before its next instruction."""
        words = self._ctx.words
        if words[INTERRUPT_SHADOW]:
            return False
        if self.want_interrupt_window and words[RFLAGS] & RFLAGS_IF:
            return True
        return self.want_nmi_window and not words[NMI_BLOCKED]

    def _run_block(self, end: int) -> None:
        ctx, words = self._ctx, self._ctx.words
        self.blocks += 1
        if words[DR7] & _DR7_ENABLED or checks_alignment(ctx):
            ctx.tlb.suspend()
            self._step()
            return
        ctx.tlb.select(words)
        if words[RFLAGS] & _STEPPED_FLAGS or words[INTERRUPT_SHADOW]:
            self._step()
            return
        block = self._find_block()
        if block is None:
            self._step()
            return
        ctx.watch_hits = 0
        # Which instruction of the block has to be executed once more, if one has, only RIP tells.
        ctx.decoded = None
        start = words[RIP]
        try:
            self._run_steps(block, start, end)
        except GuestFault:
            self.instructions += 1 + sum(1 for _, distance in block.steps if start + distance <= words[RIP])
            raise

    def _run_steps(self, block: _Block, start: int, end: int) -> None:
        ctx, words = self._ctx, self._ctx.words
        while True:
            for run, distance in block.steps:
                run(ctx)
                words[RIP] = start + distance
                if ctx.leave_block:
                    ctx.mmio.commit()
                    self.instructions += 1
                    return
            if block.last is not None:
                block.last(ctx)
            ctx.mmio.commit()
            self.instructions += block.instructions
            # A loop onto itself needs no new look at anything that ends blocks.
            if words[RIP] != start or not block.loops or self.blocks >= end:
                return
            if ctx.leave_block or words[TLB_FLUSH]:
                return
            wants_window = self.want_interrupt_window or self.want_nmi_window
            if self._stop or wants_window or words[RFLAGS] & _STEPPED_FLAGS:
                return
            self.blocks += 1

    def _step(self) -> None:
        self.instructions += 1
        step(self._ctx)

    # ---------------------------------------------------------------------------------------------- finding code

    def _find_block(self) -> _Block | None:
        """The block at CS:RIP; None when only its first instruction, exactly executed, can tell what is there."""
        ctx, words = self._ctx, self._ctx.words
        bits = code_bits(words)
        address = linear_address(words, CS, words[RIP])
        page = self._code_page(address)
        if page is None:
            return None
        start = address + page.to_view
        key = address + page.to_gpa, bits, ctx.non_root is not None
        block = self._blocks.get(key)
        if block is None or page.view[start : start + len(block.code)] != block.code:
            block = self._make_block(
                bytes(page.view[start : start + PAGE_SIZE - (address & PAGE_MASK)]), bits
            )
            if len(self._blocks) >= _KEPT_BLOCKS:
                self._blocks.clear()
            self._blocks[key] = block
            ctx.tlb.mark_code(address + page.to_gpa)
        end = words[RIP] + len(block.code)
        if (
            not block.instructions
            or end > instruction_pointer_mask(words)
            or (bits != 64 and end - 1 > words[_CS_LIMIT])
        ):
            return None
        return block

    def _code_page(self, address: int) -> _CodePage | None:
        """The memory at linear *address*; None in the enclave page cache, which has no code for anybody outside."""
        ctx, words = self._ctx, self._ctx.words
        if self._code_cpl != words[CPL]:
            self._code_pages.clear()
            self._code_cpl = words[CPL]
        page = self._code_pages.get(address >> PAGE_SHIFT)
        if page is None:
            gpa, _, vector, error_code = ctx.translate(
                words, ctx.memory, address, 1, FETCH, words[CPL], words[RFLAGS]
            )
            raise_linear_fault(vector, error_code, address)
            slot = ctx.memory.find(gpa)
            if slot is None and ctx.sgx is not None and ctx.sgx.is_epc(gpa):
                return None
            if slot is None:
                raise Unhandleable(
                    f"instruction fetch from guest-physical {gpa:#x}, where there is no memory"
                )
            page = _CodePage(slot.view, gpa - slot.gpa - address, gpa - address)
            self._code_pages[address >> PAGE_SHIFT] = page
        return page

    def _is_sensitive(self, decoded: Decoded) -> bool:
        """Whether the nested guest that runs may not execute *decoded* without a look at what its hypervisor says."""
        non_root = self._ctx.non_root
        return non_root is not None and non_root.is_sensitive(decoded)

    def _make_block(self, code: bytes, bits: int) -> _Block:
        """The block at the start of *code*, the rest of its page."""
        steps: list[tuple[Executor, int]] = []
        position, last, loops = 0, None, False
        while len(steps) < _BLOCK_INSTRUCTIONS:
            decoded = decode(bits, code[position : position + MAX_INSTRUCTION_LENGTH])
            if not isinstance(decoded, Decoded) or self._is_sensitive(decoded):
                break
            try:
                operation = compile_instruction(decoded, self._ctx.cpuid)
            except Unhandleable:
                break
            position += decoded.length
            if not operation.is_plain:
                last, loops = operation.run, operation.is_near
                break
            steps.append((operation.run, position))
        if not position:
            # Other code in its place may make a block.
            return _Block(code[:MAX_INSTRUCTION_LENGTH], (), None, 0, loops)
        return _Block(code[:position], tuple(steps), last, len(steps) + (last is not None), loops)
