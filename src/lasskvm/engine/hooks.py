"""Native callbacks other than the TLB fill: events, system calls, ports, time.

:func:`on_event` is Unicorn's interrupt hook. Everything that interrupts direct execution arrives there: SVM-style
intercepts, exceptions the translator raises, and the memory faults of the fill. The frequent ones are dealt with on the
spot, by compiled versions of the emulator's own functions on the state words: page faults, system calls, CR3 writes,
writes of segment-base MSRs. All others end the run with an exit reason for Python.
"""

from typing import Any

from numba import types

from lasskvm.emulator.control import set_cr3
from lasskvm.emulator.delivery import EXCEPTION, deliver64
from lasskvm.emulator.io_permission import check_port_access
from lasskvm.emulator.mmu import translate
from lasskvm.emulator.msrs import write_base_msr
from lasskvm.emulator.syscalls import syscall64, sysenter, sysret
from lasskvm.engine.context import (
    BLOCK_DEADLINE,
    BLOCKS,
    COALESCED_BUFFER,
    COALESCED_BYTES,
    COALESCED_COUNT,
    COALESCED_READ_PORT,
    COALESCED_READ_VALUE,
    COALESCED_WRITE_PORT,
    COUNT_EVENTS,
    COUNT_EXITS,
    COUNT_SYSCALLS,
    CPU,
    ENV,
    EVENT_FETCH_FROM_HOLE,
    EVENT_MEMORY_FAULT,
    EVENT_PORT,
    EVENT_SYSCALL,
    EVENT_SYSENTER,
    EXIT_ADDRESS,
    EXIT_ERROR_CODE,
    EXIT_EXCEPTION,
    EXIT_FETCH_FROM_HOLE,
    EXIT_FLAGS,
    EXIT_INTERCEPT,
    EXIT_INTERRUPT_WINDOW,
    EXIT_MEMORY_FAULT,
    EXIT_PORT_IO,
    EXIT_REASON,
    EXIT_VECTOR,
    FAULT_ADDRESS,
    FAULT_ERROR_CODE,
    FAULT_FLAGS,
    FAULT_VECTOR,
    FN_CC_COMPUTE_ALL,
    FN_EMU_STOP,
    FN_LOOP_EXIT_RESTORE,
    FN_MONOTONIC,
    FN_PORT_READ,
    FN_PORT_WRITE,
    HOST_DEADLINE,
    HOST_POLL_BLOCKS,
    HOST_TIME,
    INSTRUCTION,
    INSTRUCTION_BYTES,
    MEMORY,
    PORT_CLAIMED,
    STATE,
    SVM_EXIT_BASE,
    SVM_EXIT_CR_WRITE,
    SVM_EXIT_EXCEPTION,
    SVM_EXIT_INTR,
    SVM_EXIT_MSR,
    TSC_BASE,
    TSC_PER_BLOCK,
    WATCH_BORROWED_TF,
    WATCH_HIT,
)
from lasskvm.engine.fill import flush_local, forget_stored_code
from lasskvm.engine.native import callback, foreign_function, load64, store8, store64
from lasskvm.engine.native import words_at as words
from lasskvm.engine.opcode import TWO_BYTE, opcode_at_rip
from lasskvm.engine.physical import load_physical
from lasskvm.engine.private import (
    clear_interrupt_window,
    clear_single_step,
    exception_error_code,
    forget_exception,
    guest_cpl,
    guest_linear_rip,
    guest_rflags,
    load_state,
    save_state,
    set_exception_index,
    set_guest_rax_rdx,
    set_guest_rcx,
)
from lasskvm.lass import FETCH, IMPLICIT, WRITE
from lasskvm.memory import TABLE_CODE_STORES
from lasskvm.state import (
    CR2,
    CR4,
    EFER,
    INTERRUPT_SHADOW,
    R8,
    R11,
    RAX,
    RCX,
    RDX,
    RFLAGS,
    RIP,
    STATE_WORDS,
    TLB_FLUSH,
    TSC_AUX,
    Words,
)
from lasskvm.x86.exceptions import DB, GP, PF, UD
from lasskvm.x86.opcodes import ONE_BYTE_RMW, TWO_BYTE_RMW, is_rmw_opcode
from lasskvm.x86.registers import CR4_TSD, EFER_LMA, MASK32, RFLAGS_RF, RFLAGS_TF

__all__ = [
    "on_deadline",
    "on_event",
    "on_port_read",
    "on_port_write",
    "on_rdtsc",
    "on_rdtscp",
    "on_syscall",
    "on_sysenter",
]

_PAGE_SHIFT = 12
_PAGE_SIZE = 0x1000
_LONGEST_INSTRUCTION = 15
_WORD_BYTES = 8
_REX_W_SHIFT = 3
_REX_B = 1
_OPCODE_MOV_TO_CR = TWO_BYTE + 0x22
_OPCODE_WRMSR = TWO_BYTE + 0x30
_OPCODE_SYSRET = TWO_BYTE + 0x07
_MODRM_REGISTER_SHIFT = 3
_CR3_NUMBER = 3
_CLOCK_MONOTONIC = 1
_NANOSECONDS_PER_SECOND = 1_000_000_000

_EVENT_EXCEPTION_FIRST = SVM_EXIT_BASE + SVM_EXIT_EXCEPTION
_EVENT_EXCEPTION_END = SVM_EXIT_BASE + SVM_EXIT_EXCEPTION + 32
_EVENT_UD = _EVENT_EXCEPTION_FIRST + UD
_EVENT_DB = _EVENT_EXCEPTION_FIRST + DB
_EVENT_CR3_WRITE = SVM_EXIT_BASE + SVM_EXIT_CR_WRITE + 3
_EVENT_MSR = SVM_EXIT_BASE + SVM_EXIT_MSR
_EVENT_INTR = SVM_EXIT_BASE + SVM_EXIT_INTR

_emu_stop = foreign_function(32, 64)
_loop_exit_restore = foreign_function(0, 64, 64)
_port_read = foreign_function(64, 32, 32)
_port_write = foreign_function(64, 32, 32, 32)
_clock_gettime = foreign_function(32, 32, 64)

# ------------------------------------------------------------------------------------------------------- events


@callback(types.void, types.uint64, types.uint32, types.uint64)
def on_event(uc, number, context):  # type: ignore[no-untyped-def]
    """``UC_HOOK_INTR``: *number* is an SVM exit code + 0x100, or one of our ``EVENT_*`` numbers."""
    event(number & 0xFFFF, context)


def event(number: int, context: int) -> None:
    """The body of :func:`on_event`."""
    env = load64(context + 8 * ENV)
    error_code = exception_error_code(env)
    forget_exception(env)
    if load64(context + 8 * WATCH_HIT) != 0 and number != _EVENT_DB:
        cancel_watch(context, env)
    if number == EVENT_MEMORY_FAULT:
        _memory_fault(context, env)
    elif number == EVENT_SYSCALL or number == EVENT_SYSENTER:
        _system_call(context, env, number)
    elif number == EVENT_FETCH_FROM_HOLE:
        end_run(context, EXIT_FETCH_FROM_HOLE, 0, 0, load64(context + 8 * FAULT_ADDRESS), 0)
    elif number == EVENT_PORT:
        end_run(context, EXIT_PORT_IO, 0, 0, 0, 0)
    elif number == _EVENT_INTR:
        clear_interrupt_window(load64(context + 8 * CPU))
        end_run(context, EXIT_INTERRUPT_WINDOW, 0, 0, 0, 0)
    elif number == _EVENT_CR3_WRITE or number == _EVENT_MSR or number == _EVENT_UD:
        if not _frequent_instruction(context, env, number):
            _exit_event(context, number, error_code)
    else:
        _exit_event(context, number, error_code)


def end_run(context: int, reason: int, vector: int, error_code: int, address: int, flags: int) -> None:
    """Leave ``uc_emu_start`` behind the current block, with this exit record (``EXIT_*``)."""
    store64(context + 8 * COUNT_EXITS, load64(context + 8 * COUNT_EXITS) + 1)
    store64(context + 8 * EXIT_REASON, reason)
    store64(context + 8 * EXIT_VECTOR, vector)
    store64(context + 8 * EXIT_ERROR_CODE, error_code)
    store64(context + 8 * EXIT_ADDRESS, address)
    store64(context + 8 * EXIT_FLAGS, flags)
    _emu_stop(load64(context + 8 * FN_EMU_STOP), load64(context))


def _exit_event(context: int, number: int, error_code: int) -> None:
    if number >= _EVENT_EXCEPTION_FIRST and number < _EVENT_EXCEPTION_END:
        end_run(context, EXIT_EXCEPTION, number - _EVENT_EXCEPTION_FIRST, error_code, 0, 0)
    elif number >= SVM_EXIT_BASE:
        _note_instruction(context)
        end_run(context, EXIT_INTERCEPT, number - SVM_EXIT_BASE, error_code, 0, 0)
    else:
        end_run(context, EXIT_EXCEPTION, number, error_code, 0, 0)


def _note_instruction(context: int) -> None:
    """Leave the bytes at RIP in the context, up to the page's end, so that Python need not walk the page tables."""
    env = load64(context + 8 * ENV)
    state = words(load64(context + 8 * STATE), STATE_WORDS)
    memory: Any = load64(context + 8 * MEMORY)
    rip = guest_linear_rip(env)
    size = _PAGE_SIZE - (rip & (_PAGE_SIZE - 1))
    if size > _LONGEST_INSTRUCTION:
        size = _LONGEST_INSTRUCTION
    gpa, _, vector, _ = translate(state, memory, rip, size, FETCH, guest_cpl(env), 0)
    store64(context + 8 * INSTRUCTION_BYTES, 0)
    if vector != 0:
        return
    first = size
    if size > _WORD_BYTES:
        first = _WORD_BYTES
        rest = load_physical(memory, gpa + _WORD_BYTES, size - _WORD_BYTES)
        store64(context + 8 * (INSTRUCTION + 1), rest)
    store64(context + 8 * INSTRUCTION, load_physical(memory, gpa, first))
    store64(context + 8 * INSTRUCTION_BYTES, size)


def cancel_watch(context: int, env: int) -> None:
    """The instruction that hit a data breakpoint did not end; it will hit it again when it is executed again."""
    store64(context + 8 * WATCH_HIT, 0)
    if load64(context + 8 * WATCH_BORROWED_TF) != 0:
        clear_single_step(env, RFLAGS_TF)


def _memory_fault(context: int, env: int) -> None:
    vector = load64(context + 8 * FAULT_VECTOR)
    error_code = load64(context + 8 * FAULT_ERROR_CODE)
    address = load64(context + 8 * FAULT_ADDRESS)
    flags = load64(context + 8 * FAULT_FLAGS)
    state = words(load64(context + 8 * STATE), STATE_WORDS)
    if (
        vector != PF
        or state[EFER] & EFER_LMA == 0
        or (flags & FETCH != 0 and guest_linear_rip(env) >> _PAGE_SHIFT != address >> _PAGE_SHIFT)
        or (flags & (FETCH | WRITE | IMPLICIT) == 0 and _may_modify(context, env, state))
    ):
        end_run(context, EXIT_MEMORY_FAULT, vector, error_code, address, flags)
        return
    save_state(env, state, load64(context + 8 * FN_CC_COMPUTE_ALL))
    memory: Any = load64(context + 8 * MEMORY)
    cr2 = state[CR2]
    state[CR2] = address
    failed, _, _ = deliver64(state, memory, PF, error_code, 1, EXCEPTION, state[RIP])
    if failed != 0:
        state[CR2] = cr2
        end_run(context, EXIT_MEMORY_FAULT, vector, error_code, address, flags)
        return
    store64(context + 8 * COUNT_EVENTS, load64(context + 8 * COUNT_EVENTS) + 1)
    load_state(env, state)
    if load64(memory + 8 * TABLE_CODE_STORES) != 0:
        forget_stored_code(load64(context + 8 * CPU), context, memory)
    # A handler that faults at its first instruction would otherwise keep this going without a block between.
    count = load64(context + 8 * BLOCKS) + 1
    store64(context + 8 * BLOCKS, count)
    if count >= load64(context + 8 * BLOCK_DEADLINE):
        deadline_reached(context)


def _may_modify(context: int, env: int, state: Words) -> bool:
    """Whether the instruction may write what it failed to read, so that the error code must say W=1."""
    opcode, _, _, _ = opcode_at_rip(env, state, load64(context + 8 * MEMORY))
    if opcode >= TWO_BYTE:
        return is_rmw_opcode(TWO_BYTE_RMW, opcode - TWO_BYTE)
    return is_rmw_opcode(ONE_BYTE_RMW, opcode)


def _frequent_instruction(context: int, env: int, number: int) -> bool:
    """MOV to CR3, WRMSR of a segment base, and SYSRET in their plain forms; False leaves the instruction to Python."""
    state = words(load64(context + 8 * STATE), STATE_WORDS)
    memory: Any = load64(context + 8 * MEMORY)
    if state[EFER] & EFER_LMA == 0 or guest_cpl(env) != 0 or guest_rflags(env) & RFLAGS_TF != 0:
        return False
    opcode, modrm, length, rex = opcode_at_rip(env, state, memory)
    if number == _EVENT_CR3_WRITE and opcode == _OPCODE_MOV_TO_CR:
        if (modrm >> _MODRM_REGISTER_SHIFT) & 7 != _CR3_NUMBER or length > 3 or (length == 3 and rex == 0):
            return False
        save_state(env, state, load64(context + 8 * FN_CC_COMPUTE_ALL))
        source = (modrm & 7) + R8 * (rex & _REX_B)
        if set_cr3(state, memory, state[source]) != 0:
            return False
        if state[TLB_FLUSH] != 0:
            state[TLB_FLUSH] = 0
            flush_local(load64(context + 8 * CPU), context)
        _complete(env, state, length + 1)
        return True
    if number == _EVENT_MSR and opcode == _OPCODE_WRMSR:
        save_state(env, state, load64(context + 8 * FN_CC_COMPUTE_ALL))
        value = (state[RAX] & MASK32) | ((state[RDX] & MASK32) << 32)
        if write_base_msr(state, state[RCX] & MASK32, value) != 0:
            return False
        _complete(env, state, length)
        return True
    if number == _EVENT_UD and opcode == _OPCODE_SYSRET:
        save_state(env, state, load64(context + 8 * FN_CC_COMPUTE_ALL))
        # When SYSRET sets TF, a single-step trap is due right behind it, which Python raises.
        if state[R11] & RFLAGS_TF != 0 or sysret(state, (rex >> _REX_W_SHIFT) & 1) != 0:
            return False
        load_state(env, state)
        return True
    return False


def _complete(env: int, state: Words, length: int) -> None:
    state[RIP] = state[RIP] + length
    state[INTERRUPT_SHADOW] = 0
    state[RFLAGS] = state[RFLAGS] & (MASK32 ^ RFLAGS_RF)
    load_state(env, state)


# ------------------------------------------------------------------------------------------------- system calls


@callback(types.void, types.uint64, types.uint64)
def on_syscall(uc, context):  # type: ignore[no-untyped-def]
    """SYSCALL, which Unicorn leaves to its hook: go on in the event hook, where RIP is that of the instruction."""
    _leave_instruction(context, EVENT_SYSCALL)


@callback(types.void, types.uint64, types.uint64)
def on_sysenter(uc, context):  # type: ignore[no-untyped-def]
    """SYSENTER, likewise."""
    _leave_instruction(context, EVENT_SYSENTER)


def _leave_instruction(context: int, number: int) -> None:
    cpu = load64(context + 8 * CPU)
    set_exception_index(cpu, number)
    _loop_exit_restore(load64(context + 8 * FN_LOOP_EXIT_RESTORE), cpu, 0)


def _system_call(context: int, env: int, number: int) -> None:
    state = words(load64(context + 8 * STATE), STATE_WORDS)
    store64(context + 8 * COUNT_SYSCALLS, load64(context + 8 * COUNT_SYSCALLS) + 1)
    save_state(env, state, load64(context + 8 * FN_CC_COMPUTE_ALL))
    if state[RFLAGS] & RFLAGS_TF != 0:
        # Single-stepping may be due behind the instruction; #UD has the emulator execute it.
        end_run(context, EXIT_EXCEPTION, UD, 0, 0, 0)
        return
    if number == EVENT_SYSCALL:
        _, _, length, _ = opcode_at_rip(env, state, load64(context + 8 * MEMORY))
        vector = syscall64(state, length)
    else:
        vector = sysenter(state)
    if vector != 0:
        end_run(context, EXIT_EXCEPTION, vector, 0, 0, 0)
        return
    load_state(env, state)


# -------------------------------------------------------------------------------------------------------- ports


@callback(types.uint32, types.uint64, types.uint32, types.uint32, types.uint64)
def on_port_read(uc, port, size, context):  # type: ignore[no-untyped-def]
    """IN and INS, once for each element."""
    return types.uint32(port_read(context, port & 0xFFFF, size & 7) & MASK32)


@callback(types.void, types.uint64, types.uint32, types.uint32, types.uint32, types.uint64)
def on_port_write(uc, port, size, value, context):  # type: ignore[no-untyped-def]
    """OUT and OUTS, once for each element."""
    port_write(context, port & 0xFFFF, size & 7, value & MASK32)


def port_read(context: int, port: int, size: int) -> int:
    """The body of :func:`on_port_read`: the value from the bus, or an exit that leaves the instruction undone."""
    _check_port(context, port, size)
    if size == 1 and port == load64(context + 8 * COALESCED_READ_PORT):
        return load64(context + 8 * COALESCED_READ_VALUE) | PORT_CLAIMED
    answer: int = _port_read(load64(context + 8 * FN_PORT_READ), port, size)
    if answer & PORT_CLAIMED == 0:
        _leave_instruction(context, EVENT_PORT)
    return answer


def port_write(context: int, port: int, size: int, value: int) -> None:
    """The body of :func:`on_port_write`."""
    _check_port(context, port, size)
    if size == 1 and port == load64(context + 8 * COALESCED_WRITE_PORT):
        count = load64(context + 8 * COALESCED_COUNT)
        if count < COALESCED_BYTES:
            store8(load64(context + 8 * COALESCED_BUFFER) + count, value)
            store64(context + 8 * COALESCED_COUNT, count + 1)
            return
    answer = _port_write(load64(context + 8 * FN_PORT_WRITE), port, size, value)
    if answer & PORT_CLAIMED == 0:
        _leave_instruction(context, EVENT_PORT)


def _check_port(context: int, port: int, size: int) -> None:
    """Raise the fault of an I/O access that IOPL and the TSS forbid, from within the instruction."""
    env = load64(context + 8 * ENV)
    state = words(load64(context + 8 * STATE), STATE_WORDS)
    memory: Any = load64(context + 8 * MEMORY)
    vector, error_code, address = check_port_access(
        state, memory, port, size, guest_cpl(env), guest_rflags(env)
    )
    if vector == 0:
        return
    store64(context + 8 * FAULT_VECTOR, vector)
    store64(context + 8 * FAULT_ERROR_CODE, error_code)
    store64(context + 8 * FAULT_ADDRESS, address)
    store64(context + 8 * FAULT_FLAGS, IMPLICIT)
    _leave_instruction(context, EVENT_MEMORY_FAULT)


# --------------------------------------------------------------------------------------------------------- time


@callback(types.void, types.uint64)
def on_deadline(context):  # type: ignore[no-untyped-def]
    """The block deadline has come (:mod:`lasskvm.engine.block_hook`)."""
    deadline_reached(context)


def deadline_reached(context: int) -> None:
    """End the run; with a host deadline, only when the host's clock says so, and else ask again some blocks later."""
    deadline = load64(context + 8 * HOST_DEADLINE)
    if deadline != 0 and host_nanoseconds(context) < deadline:
        count = load64(context + 8 * BLOCKS)
        store64(context + 8 * BLOCK_DEADLINE, count + load64(context + 8 * HOST_POLL_BLOCKS))
        return
    _emu_stop(load64(context + 8 * FN_EMU_STOP), load64(context))


def host_nanoseconds(context: int) -> int:
    """The host's monotonic clock."""
    buffer = context + 8 * HOST_TIME
    _clock_gettime(load64(context + 8 * FN_MONOTONIC), _CLOCK_MONOTONIC, buffer)
    return load64(buffer) * _NANOSECONDS_PER_SECOND + load64(buffer + 8)


@callback(types.int32, types.uint64, types.uint64)
def on_rdtsc(uc, context):  # type: ignore[no-untyped-def]
    """RDTSC; returns 1 to keep the translator from reading the host's counter."""
    time_stamp(context)
    return types.int32(1)


@callback(types.int32, types.uint64, types.uint64)
def on_rdtscp(uc, context):  # type: ignore[no-untyped-def]
    """RDTSCP, likewise."""
    time_stamp(context)
    state = words(load64(context + 8 * STATE), STATE_WORDS)
    set_guest_rcx(load64(context + 8 * ENV), state[TSC_AUX] & MASK32)
    return types.int32(1)


def time_stamp(context: int) -> None:
    """Load EDX:EAX with the guest's time-stamp counter; #GP(0) where CR4.TSD forbids it."""
    env = load64(context + 8 * ENV)
    state = words(load64(context + 8 * STATE), STATE_WORDS)
    if state[CR4] & CR4_TSD != 0 and guest_cpl(env) != 0:
        store64(context + 8 * FAULT_VECTOR, GP)
        store64(context + 8 * FAULT_ERROR_CODE, 0)
        store64(context + 8 * FAULT_FLAGS, IMPLICIT)
        _leave_instruction(context, EVENT_MEMORY_FAULT)
    if load64(context + 8 * HOST_DEADLINE) != 0:
        counter = load64(context + 8 * TSC_BASE) + host_nanoseconds(context)
    else:
        # Two readings in one block must not be equal: reading the counter counts as a block.
        blocks = load64(context + 8 * BLOCKS) + 1
        store64(context + 8 * BLOCKS, blocks)
        counter = load64(context + 8 * TSC_BASE) + blocks * load64(context + 8 * TSC_PER_BLOCK)
    set_guest_rax_rdx(env, counter & MASK32, (counter >> 32) & MASK32)
