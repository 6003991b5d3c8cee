"""Direct execution: one vCPU on Unicorn's translator, the part that a processor plays in KVM.

:meth:`Engine.run` executes guest code from the state words until something needs the VMM, and says what in an
:class:`EngineExit`. What is legal, what faults and where events go is decided by the functions of
:mod:`lasskvm.emulator`, compiled or not; this class builds the instance, its hooks and its memory map.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import unicorn
from unicorn import x86_const
from unicorn.unicorn_py3.unicorn import uclib

from lasskvm.engine import context as c
from lasskvm.engine import entry, fill, hooks, ports, private, timing
from lasskvm.engine.block_hook import block_hook
from lasskvm.engine.calibration import calibrate, library_function
from lasskvm.engine.intercepts import Intercepts
from lasskvm.engine.interpose import look_at_instructions, skip_dirty_reset
from lasskvm.errors import HostError
from lasskvm.memory import PAGE_CODE, PAGE_SHIFT, PAGE_SIZE, SLOT_WORDS, TABLE_FIRST, GuestMemory, Slot
from lasskvm.state import NMI_BLOCKED, VcpuState, Words
from lasskvm.x86.paging import PhysicalMemory

__all__ = ["Engine", "EngineExit", "PortHandler", "Transmitter"]

#: ``(port, size) -> value`` and ``(port, size, value) -> claimed``; None and False mean that nobody answers.
PortHandler = tuple[Callable[[int, int], int | None], Callable[[int, int, int], bool]]

# Guest-physical pages of the engine's own, where no slot can be
_PRIVATE_GPA = 1 << 51
_ONES_PAGE, _SINK_PAGE, _VMCB_PAGE, _MSR_MAP_PAGE = range(4)
_PRIVATE_PAGES = 6
_VMCB_MSR_MAP = 0x48

_TCG_BUFFER_BYTES = 192 << 20


class EngineExit(NamedTuple):
    """Why a run ended: an ``EXIT_*`` reason of :mod:`lasskvm.engine.context` with its details."""

    reason: int
    vector: int = 0
    error_code: int = 0
    address: int = 0
    flags: int = 0
    #: What is known of the bytes at RIP where an instruction is to be emulated.
    instruction: bytes = b""


_STOPPED = EngineExit(c.EXIT_STOPPED)


class Transmitter(Protocol):
    """A device whose output can be coalesced, as with ``KVM_CAP_COALESCED_PIO``."""

    def coalescible(self) -> tuple[int, int, int] | None:
        """``(data_port, status_port, status)`` while a byte written to the data port has no effect but to be
        transmitted and the status port reads as *status*; None when that is not so."""

    def transmit(self, data: bytes) -> None:
        """Take the bytes that were written to the data port meanwhile."""


class Engine:
    """Direct execution of one vCPU.

    *ports* is called for port I/O that IOPL and the TSS allow. Raises :class:`HostError` when the installed Unicorn is
    not the pinned one.
    """

    def __init__(self, state: VcpuState, memory: GuestMemory, ports: PortHandler) -> None:
        self.state = state
        self.memory = memory
        self._ports = ports
        self._error: BaseException | None = None
        #: The device whose output is collected without a call for each byte.
        self.transmitter: Transmitter | None = None
        #: A run ends when the port handlers have been called this often; 0 means no limit.
        self.port_accesses_left = 0
        self._uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self._uc.ctl_set_cpu_model(x86_const.UC_CPU_X86_ICELAKE_SERVER)
        self._uc.ctl_set_tcg_buffer_size(_TCG_BUFFER_BYTES)
        self._private = mmap.mmap(-1, _PRIVATE_PAGES * PAGE_SIZE)
        self._map(_PRIVATE_GPA, self._private, len(self._private))
        self._uc.ctl_set_tlb_mode(unicorn.UC_TLB_VIRTUAL)
        self._uc.ctl_exits_enabled(True)
        calibrate(self._uc)
        self._handle: int = self._uc._uch.value
        self._cpu = private.cpu_of(self._handle)
        self._env = self._cpu + private.CPU_ENV
        self.context = np.zeros(c.CONTEXT_WORDS, np.uint64)
        self._context_address = int(self.context.ctypes.data)
        self._context_words = memoryview(self.context.data).cast("B").cast("Q")
        first = 8 * c.INSTRUCTION
        self._instruction = memoryview(self.context.data).cast("B")[first : first + 16]
        self._mapped: dict[int, tuple[int, int]] = {}
        self._hooks: list[ctypes.c_size_t] = []
        self._fill_context()
        self._take_over()
        self._enter = ctypes.CFUNCTYPE(None, ctypes.c_uint64)(entry.enter.address)
        self._forget_code = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)(
            entry.forget_code.address
        )
        self._translate = ctypes.CFUNCTYPE(None, *[ctypes.c_uint64] * 6)(entry.translate_linear.address)
        self._remap()
        memory.on_layout_change = self._remap
        memory.on_code_store = self._code_stored

    def translate(
        self, words: Words, memory: PhysicalMemory, address: int, size: int, flags: int, cpl: int, rflags: int
    ) -> tuple[int, int, int, int]:
        """:func:`lasskvm.emulator.mmu.translate`, compiled; *words* and *memory* must be this engine's."""
        del words, memory
        self._translate(self._context_address, address, size, flags, cpl, rflags)
        gpa, permissions, vector, error_code = self._context_words[c.RESULT : c.RESULT + 4]
        return gpa, permissions, vector, error_code

    # ---------------------------------------------------------------------------------------------- running

    def run(self) -> EngineExit:
        """Execute guest code from the state words until an exit; the words then hold the state at the exit."""
        self._offer_coalescing()
        self._intercepts.follow(nmis_are_blocked=bool(self.state.words[NMI_BLOCKED]))
        self._enter(self._context_address)
        self._take_coalesced()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        words = self._context_words
        if words[c.EMU_RESULT] and words[c.EXIT_REASON] == c.EXIT_STOPPED:
            raise HostError(
                f"Unicorn stopped with error {words[c.EMU_RESULT]} ({unicorn.UcError(words[c.EMU_RESULT])}); "
                "please report this with the guest that caused it"
            )
        reason = words[c.EXIT_REASON]
        if reason == c.EXIT_STOPPED:
            return _STOPPED
        vector = words[c.EXIT_VECTOR]
        instruction = bytes(self._instruction[: words[c.INSTRUCTION_BYTES]])
        return EngineExit(
            reason,
            vector,
            words[c.EXIT_ERROR_CODE],
            words[c.EXIT_ADDRESS],
            words[c.EXIT_FLAGS],
            instruction,
        )

    def run_until(self, rip: int) -> EngineExit:
        """Like :meth:`run`, but also end (``EXIT_STOPPED``) before the instruction at linear address *rip*."""
        self._uc.ctl_set_exits([rip])
        self._context_words[c.RUN_UNTIL] = rip
        try:
            result = self.run()
        finally:
            self._uc.ctl_set_exits([])
            self._context_words[c.RUN_UNTIL] = c.NO_ADDRESS
        if result.reason == c.EXIT_INTERCEPT and result.vector == c.SVM_EXIT_HLT and self._at(rip):
            # Unicorn ends a run at an address by a HLT of its own, which is intercepted like any other.
            return _STOPPED
        return result

    def _at(self, linear: int) -> bool:
        return bool(private.guest_linear_rip(self._env) == linear)

    def stop_after(self, blocks: int) -> None:
        """Let the next runs end when *blocks* more blocks have been executed."""
        self._context_words[c.BLOCK_DEADLINE] = self._context_words[c.BLOCKS] + blocks
        self._context_words[c.HOST_DEADLINE] = 0

    def stop_at_host_time(self, monotonic_ns: int, poll_blocks: int) -> None:
        """Let the next runs end at a time of the host's monotonic clock, asked every *poll_blocks* blocks."""
        self._context_words[c.BLOCK_DEADLINE] = self._context_words[c.BLOCKS] + poll_blocks
        self._context_words[c.HOST_DEADLINE] = max(1, monotonic_ns)
        self._context_words[c.HOST_POLL_BLOCKS] = poll_blocks

    def stop(self) -> None:
        """Let the run in progress end behind the current block; for use in port handlers."""
        uclib.uc_emu_stop(self._uc._uch)

    @property
    def blocks(self) -> int:
        """Blocks of guest code executed so far."""
        return self._context_words[c.BLOCKS]

    def spend(self, blocks: int) -> None:
        """Let time go on as if *blocks* more blocks had been executed; for use in port handlers."""
        self._context_words[c.BLOCKS] += blocks

    @property
    def last_block(self) -> int:
        """The linear address at which the block executed last begins."""
        return self._context_words[c.LAST_BLOCK]

    def set_time_stamp(self, counter: int, per_block: int) -> None:
        """Set what RDTSC gives: *counter* now, and *per_block* more for each block, or the host's nanoseconds."""
        words = self._context_words
        elapsed = (
            timing.host_nanoseconds(self._context_address)
            if words[c.HOST_DEADLINE]
            else self.blocks * per_block
        )
        words[c.TSC_BASE] = (counter - elapsed) % (1 << 64)
        words[c.TSC_PER_BLOCK] = per_block

    def want_interrupt_window(self, wanted: bool) -> None:
        """Ask for ``EXIT_INTERRUPT_WINDOW`` as soon as the guest can take an interrupt; valid until taken back."""
        self._context_words[c.WANT_INTERRUPT_WINDOW] = int(wanted)

    def take_watch_hit(self) -> tuple[int, bool]:
        """The data breakpoints that the instruction behind a #DB exit has hit, and whether TF was set only for them."""
        words = self._context_words
        hit, borrowed = words[c.WATCH_HIT], bool(words[c.WATCH_BORROWED_TF])
        words[c.WATCH_HIT] = words[c.WATCH_BORROWED_TF] = 0
        return hit, borrowed

    def leave_to_emulator(self, kinds: int, *, cr3_reads: bool = False, pauses: bool = False) -> None:
        """From the next run on, let the emulator execute what is one of *kinds*, ``LEAVE_*`` of the context.

        Reads of CR3 and PAUSE, for which there are intercepts, only if asked for.
        """
        self._context_words[c.LEFT_TO_EMULATOR] = kinds
        self._intercepts.add(cr3_reads=cr3_reads, pauses=pauses)

    def transient_state(self) -> list[int]:
        """What lasts from one run to the next beside the state words and the FPU, for snapshots."""
        return [self._context_words[index] for index in _TRANSIENT_STATE]

    def load_transient_state(self, values: list[int]) -> None:
        """The inverse of :meth:`transient_state`."""
        for index, value in zip(_TRANSIENT_STATE, values, strict=True):
            self._context_words[index] = value

    def set_features(self, features: tuple[int, ...]) -> None:
        """Gate the translator by the guest's CPUID: what is missing there is #UD in the guest.

        *features* are eight words in the order of ``env->features`` (leaf 1 EDX, 1 ECX, 7.0 EBX, 7.0 ECX, 7.0 EDX,
        7.1 EAX, 80000001H EDX, ECX). Instructions that the translator gets wrong stay gated off.
        """
        for word, (guest, hidden) in enumerate(zip(features, _EMULATED_FEATURES, strict=True)):
            private.set_feature(self._env, word, self._native_features[word] & guest & ~hidden)
        self._context_words[c.OFFERS_RDPID] = features[_RDPID_WORD] >> _RDPID_BIT & 1

    def counters(self) -> dict[str, int]:
        """How often what happened natively, by name."""
        return {
            name.removeprefix("COUNT_").lower(): self._context_words[index]
            for name, index in vars(c).items()
            if name.startswith("COUNT_")
        }

    # ----------------------------------------------------------------------------------------------- set-up

    def _fill_context(self) -> None:
        words = self._context_words
        words[c.UC], words[c.CPU], words[c.ENV] = self._handle, self._cpu, self._env
        words[c.STATE] = int(self.state.array.ctypes.data)
        words[c.MEMORY] = int(self.memory.table.ctypes.data)
        words[c.FN_EMU_START] = _address(uclib.uc_emu_start)
        words[c.FN_EMU_STOP] = _address(uclib.uc_emu_stop)
        words[c.FN_MONOTONIC] = _address(ctypes.CDLL(None).clock_gettime)
        for index, name in _LIBRARY_FUNCTIONS.items():
            words[index] = library_function(name)
        self._port_read_callback = _PORT_READ(self._port_read)
        self._port_write_callback = _PORT_WRITE(self._port_write)
        words[c.FN_PORT_READ] = _address(self._port_read_callback)
        words[c.FN_PORT_WRITE] = _address(self._port_write_callback)
        words[c.ONES_GPA] = _PRIVATE_GPA + _ONES_PAGE * PAGE_SIZE
        words[c.SINK_GPA] = _PRIVATE_GPA + _SINK_PAGE * PAGE_SIZE
        self._coalesced = np.zeros(c.COALESCED_BYTES, np.uint8)
        words[c.COALESCED_BUFFER] = int(self._coalesced.ctypes.data)
        words[c.EPOCH] = 1
        words[c.BLOCK_DEADLINE] = (1 << 64) - 1
        words[c.RUN_UNTIL] = c.NO_ADDRESS

    def _take_over(self) -> None:
        """Put our TLB fill and hooks in place, and enter SVM guest mode for the intercepts."""
        private.set_context(self._cpu, self._context_address)
        private.set_no_exit_request(self._handle)
        private.replace_tlb_fill(self._cpu, fill.tlb_fill.address)
        look_at_instructions(fill.tlb_fill.address)
        skip_dirty_reset(fill.tlb_fill.address)
        self._hook(unicorn.UC_HOOK_INTR, hooks.on_event.address)
        self._hook(unicorn.UC_HOOK_BLOCK, block_hook())
        for instruction, hook in _INSTRUCTION_HOOKS.items():
            self._hook(unicorn.UC_HOOK_INSN, hook.address, instruction)
        self._native_features = tuple(
            private.feature(self._env, word) for word in range(private.FEATURE_WORDS)
        )
        ones = _ONES_PAGE * PAGE_SIZE
        self._private[ones : ones + PAGE_SIZE] = b"\xff" * PAGE_SIZE
        msr_map = _MSR_MAP_PAGE * PAGE_SIZE
        self._private[msr_map : msr_map + 2 * PAGE_SIZE] = b"\xff" * (2 * PAGE_SIZE)
        vmcb = _VMCB_PAGE * PAGE_SIZE
        self._private[vmcb + _VMCB_MSR_MAP : vmcb + _VMCB_MSR_MAP + 8] = (_PRIVATE_GPA + msr_map).to_bytes(
            8, "little"
        )
        self._intercepts = Intercepts(self._env, _PRIVATE_GPA + vmcb)

    def _hook(self, kind: int, callback: int, instruction: int = 0) -> None:
        handle = ctypes.c_size_t()
        # An empty address range means everywhere. The instruction is a variadic argument, read for UC_HOOK_INSN only.
        status = _HOOK_ADD(_address(uclib.uc_hook_add))(
            self._handle, ctypes.addressof(handle), kind, callback, self._context_address, 1, 0, instruction
        )
        if status:
            raise HostError(f"Unicorn refused a hook: {unicorn.UcError(status)}; reinstall unicorn")
        self._hooks.append(handle)

    # ----------------------------------------------------------------------------------------------- memory

    def _map(self, gpa: int, buffer: mmap.mmap, size: int) -> None:
        host = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        self._uc.mem_map_ptr(gpa, size, unicorn.UC_PROT_ALL, host)

    def _remap(self) -> None:
        """Make Unicorn's physical memory map that of the slots."""
        wanted = {slot.gpa: (slot.host_address, slot.size) for slot in self.memory}
        for gpa, (host, size) in list(self._mapped.items()):
            if wanted.get(gpa) != (host, size):
                self._uc.mem_unmap(gpa, size)
                del self._mapped[gpa]
        for gpa, (host, size) in wanted.items():
            if gpa not in self._mapped:
                self._uc.mem_map_ptr(gpa, size, unicorn.UC_PROT_ALL, host)
                self._mapped[gpa] = (host, size)
        self._find_ram_addresses()
        self._uc.ctl_flush_tb()

    def _find_ram_addresses(self) -> None:
        """Learn Unicorn's own numbering of the slots' memory, in which translated code is looked up."""
        page_address = _GET_PAGE_ADDRESS(library_function("get_page_addr_code"))
        flush = _FLUSH(library_function("tlb_flush"))
        words = self._context_words
        words[c.IDENTITY_FILL] = 1
        try:
            for index, slot in enumerate(self.memory):
                flush(self._cpu)
                words[c.SLOT_RAM_ADDRESS + index] = page_address(self._env, slot.gpa)
        finally:
            words[c.IDENTITY_FILL] = 0
            flush(self._cpu)

    def _code_stored(self, gpa: int, size: int) -> None:
        slot = self.memory.find(gpa)
        assert slot is not None
        row = int(self.memory.table.ctypes.data) + 8 * (TABLE_FIRST + SLOT_WORDS * self._index(slot))
        first, last = gpa - slot.gpa >> PAGE_SHIFT, gpa + size - 1 - slot.gpa >> PAGE_SHIFT
        for page in range(first, last + 1):
            if slot.page_flags[page] & PAGE_CODE:
                self._forget_code(self._context_address, row, page)

    def _index(self, slot: Slot) -> int:
        return next(index for index, other in enumerate(self.memory) if other is slot)

    # ------------------------------------------------------------------------------------------------ ports

    def _count_port_access(self) -> None:
        if self.port_accesses_left:
            self.port_accesses_left -= 1
            if not self.port_accesses_left:
                self.stop()

    def _offer_coalescing(self) -> None:
        words = self._context_words
        offer = None if self.transmitter is None else self.transmitter.coalescible()
        data_port, status_port, status = offer or (c.NO_PORT, c.NO_PORT, 0)
        words[c.COALESCED_WRITE_PORT], words[c.COALESCED_READ_PORT] = data_port, status_port
        words[c.COALESCED_READ_VALUE] = status

    def _take_coalesced(self) -> None:
        count = self._context_words[c.COALESCED_COUNT]
        if count and self.transmitter is not None:
            self._context_words[c.COALESCED_COUNT] = 0
            self.transmitter.transmit(self._coalesced[:count].tobytes())

    def _port_read(self, port: int, size: int) -> int:
        self._count_port_access()
        try:
            self._take_coalesced()
            value = self._ports[0](port, size)
            self._offer_coalescing()
        except BaseException as error:  # noqa: BLE001 -- ctypes would drop it; run() raises it again
            self._error = error
            value = None
        return 0 if value is None else value & ((1 << 8 * size) - 1) | c.PORT_CLAIMED

    def _port_write(self, port: int, size: int, value: int) -> int:
        self._count_port_access()
        try:
            self._take_coalesced()
            claimed = self._ports[1](port, size, value & ((1 << 8 * size) - 1))
            self._offer_coalescing()
        except BaseException as error:  # noqa: BLE001 -- as above
            self._error = error
            claimed = False
        return c.PORT_CLAIMED if claimed else 0


def _address(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


#: The binding's own prototype lacks the trailing instruction.
_HOOK_ADD = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64,
    ctypes.c_uint64, ctypes.c_int,
)  # fmt: skip
_PORT_READ = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32)
_PORT_WRITE = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32)
_GET_PAGE_ADDRESS = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)
_FLUSH = ctypes.CFUNCTYPE(None, ctypes.c_uint64)

#: The branch that a fault at its target undoes, and a data breakpoint that is being stepped over.
_TRANSIENT_STATE = (c.LAST_BLOCK, c.WATCH_HIT, c.WATCH_BORROWED_TF)

_LIBRARY_FUNCTIONS = {
    c.FN_TLB_SET_PAGE: "tlb_set_page",
    c.FN_TLB_FLUSH: "tlb_flush",
    c.FN_TLB_FLUSH_PAGE: "tlb_flush_page_by_mmuidx",
    c.FN_TLB_FLUSH_INDEXES: "tlb_flush_by_mmuidx",
    c.FN_TLB_SET_DIRTY: "tlb_set_dirty",
    c.FN_LOOP_EXIT_RESTORE: "cpu_loop_exit_restore",
    c.FN_RESTORE_STATE: "cpu_restore_state",
    c.FN_LOOP_EXIT_NOEXC: "cpu_loop_exit_noexc",
    c.FN_CC_COMPUTE_ALL: "cpu_cc_compute_all",
    c.FN_UPDATE_DR7: "cpu_x86_update_dr7",
    c.FN_INVALIDATE_RANGE: "tb_invalidate_phys_range",
    c.FN_CODE_PAGE: "get_page_addr_code_hostp",
}

_INSTRUCTION_HOOKS = {
    x86_const.UC_X86_INS_SYSCALL: hooks.on_syscall,
    x86_const.UC_X86_INS_SYSENTER: hooks.on_sysenter,
    x86_const.UC_X86_INS_IN: ports.on_port_read,
    x86_const.UC_X86_INS_OUT: ports.on_port_write,
    x86_const.UC_X86_INS_RDTSC: timing.on_rdtsc,
    x86_const.UC_X86_INS_RDTSCP: timing.on_rdtscp,
}

# Instructions that the translator executes without their memory access (the CLFLUSH family): gated off, so that
# the #UD lets the emulator execute them.
_CLFLUSH = 1 << 19
_CLFLUSHOPT_CLWB = 1 << 23 | 1 << 24
_EMULATED_FEATURES = (_CLFLUSH, 0, _CLFLUSHOPT_CLWB, 0, 0, 0, 0, 0)
_RDPID_WORD, _RDPID_BIT = 3, 22
