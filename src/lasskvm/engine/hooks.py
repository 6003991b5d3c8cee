"""Events while the guest runs: intercepts, exceptions, memory faults, system calls.

:func:`on_event` is Unicorn's interrupt hook. Everything that interrupts direct execution arrives there: SVM-style
intercepts, exceptions the translator raises, and the memory faults of the fill. The frequent ones are dealt with on the
spot, by compiled versions of the emulator's own functions on the state words: page faults, system calls, CR3 writes,
segment bases, RDPID. All others end the run with an exit reason for Python.
"""

from typing import Any

from lasskvm.emulator.control import set_cr3, set_segment_base
from lasskvm.emulator.delivery import EXCEPTION, deliver64
from lasskvm.emulator.mmu import translate
from lasskvm.emulator.msrs import write_base_msr
from lasskvm.emulator.syscalls import syscall64, sysenter, sysret
from lasskvm.engine.context import (
    BLOCK_DEADLINE,
    BLOCKS,
    COUNT_EVENTS,
    COUNT_SYSCALLS,
    CPU,
    ENV,
    EVENT_FETCH_FROM_HOLE,
    EVENT_MEMORY_FAULT,
    EVENT_MMIO,
    EVENT_PORT,
    EVENT_SYSCALL,
    EVENT_SYSENTER,
    EXIT_EXCEPTION,
    EXIT_FETCH_FROM_HOLE,
    EXIT_INTERCEPT,
    EXIT_INTERRUPT_WINDOW,
    EXIT_MEMORY_FAULT,
    EXIT_MMIO,
    EXIT_PORT_IO,
    FAULT_ADDRESS,
    FAULT_ERROR_CODE,
    FAULT_FLAGS,
    FAULT_VECTOR,
    FN_CC_COMPUTE_ALL,
    INSTRUCTION,
    INSTRUCTION_BYTES,
    LEAVE_CR3,
    LEAVE_MSRS,
    LEAVE_RDPID,
    LEFT_TO_EMULATOR,
    MEMORY,
    OFFERS_RDPID,
    STATE,
    SVM_EXIT_BASE,
    SVM_EXIT_CR_WRITE,
    SVM_EXIT_EXCEPTION,
    SVM_EXIT_INTR,
    SVM_EXIT_MSR,
    WATCH_BORROWED_TF,
    WATCH_HIT,
)
from lasskvm.engine.fill import flush_local, flush_tlb, forget_stored_code
from lasskvm.engine.leaving import end_run, leave_instruction
from lasskvm.engine.native import callback, load64, store64
from lasskvm.engine.native import words_at as words
from lasskvm.engine.opcode import TWO_BYTE, begins_with_rep, opcode_at_rip
from lasskvm.engine.physical import load_physical
from lasskvm.engine.private import (
    clear_interrupt_window,
    clear_single_step,
    exception_error_code,
    forget_exception,
    guest_cpl,
    guest_linear_rip,
    guest_rflags,
    guest_runs_64bit_code,
    load_state,
    save_state,
)
from lasskvm.engine.timing import deadline_reached
from lasskvm.lass import FETCH, IMPLICIT, WRITE
from lasskvm.memory import TABLE_CODE_STORES
from lasskvm.state import (
    CR2,
    CR3,
    CR4,
    DR7,
    EFER,
    INTERRUPT_SHADOW,
    PF_INTERCEPTED,
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
from lasskvm.x86.exceptions import DB, PF, UD
from lasskvm.x86.opcodes import ONE_BYTE_RMW, TWO_BYTE_RMW, has_opcode
from lasskvm.x86.registers import (
    CR3_LAM_U48,
    CR3_LAM_U57,
    CR4_FSGSBASE,
    EFER_LMA,
    FS,
    MASK32,
    MASK64,
    RFLAGS_RF,
    RFLAGS_TF,
)

__all__ = ["on_event", "on_syscall", "on_sysenter"]

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
_CR3_LAM = CR3_LAM_U48 | CR3_LAM_U57
_DR7_ENABLED = 0xFF
_MODRM_REGISTER_FORM = 0xC0
#: With F3 and a register: 0F AE /2 is WRFSBASE, /3 WRGSBASE; 0F C7 /7 is RDPID.
_OPCODE_WRITE_BASE = TWO_BYTE + 0xAE
_WRFSBASE, _WRGSBASE = 2, 3
_OPCODE_RDPID = TWO_BYTE + 0xC7
_RDPID_EXTENSION = 7

_EVENT_EXCEPTION_FIRST = SVM_EXIT_BASE + SVM_EXIT_EXCEPTION
_EVENT_EXCEPTION_END = SVM_EXIT_BASE + SVM_EXIT_EXCEPTION + 32
_EVENT_UD = _EVENT_EXCEPTION_FIRST + UD
_EVENT_DB = _EVENT_EXCEPTION_FIRST + DB
_EVENT_CR3_WRITE = SVM_EXIT_BASE + SVM_EXIT_CR_WRITE + 3
_EVENT_MSR = SVM_EXIT_BASE + SVM_EXIT_MSR
_EVENT_INTR = SVM_EXIT_BASE + SVM_EXIT_INTR


# ------------------------------------------------------------------------------------------------------- events


@callback(0, 64, 32, 64)
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
    elif number == EVENT_MMIO:
        _note_instruction(context)
        end_run(
            context, EXIT_MMIO, 0, 0, load64(context + 8 * FAULT_ADDRESS), load64(context + 8 * FAULT_FLAGS)
        )
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


def _exit_event(context: int, number: int, error_code: int) -> None:
    if number >= _EVENT_EXCEPTION_FIRST and number < _EVENT_EXCEPTION_END:
        if number == _EVENT_UD:
            _note_instruction(context)
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
        or state[PF_INTERCEPTED] != 0
        or state[EFER] & EFER_LMA == 0
        or (flags & FETCH != 0 and guest_linear_rip(env) >> _PAGE_SHIFT != address >> _PAGE_SHIFT)
        or (flags & FETCH != 0 and state[DR7] & _DR7_ENABLED != 0)
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
        return has_opcode(TWO_BYTE_RMW, opcode - TWO_BYTE)
    return has_opcode(ONE_BYTE_RMW, opcode)


def _frequent_instruction(context: int, env: int, number: int) -> bool:
    """MOV to CR3, WRMSR of a segment base, SYSRET, WRFSBASE, WRGSBASE and RDPID in their plain forms.

    False leaves the instruction to Python.
    """
    state = words(load64(context + 8 * STATE), STATE_WORDS)
    memory: Any = load64(context + 8 * MEMORY)
    if state[EFER] & EFER_LMA == 0 or guest_rflags(env) & RFLAGS_TF != 0:
        return False
    opcode, modrm, length, rex = opcode_at_rip(env, state, memory)
    if number == _EVENT_UD and (opcode == _OPCODE_WRITE_BASE or opcode == _OPCODE_RDPID):
        # F3, REX or not, 0F and the opcode, then a register.
        plain = (length == 3 and rex == 0) or (length == 4 and rex != 0)
        if not plain or modrm < _MODRM_REGISTER_FORM or not guest_runs_64bit_code(env):
            return False
        return begins_with_rep(env, state, memory) and _base_or_rdpid(
            context, env, state, opcode, modrm, length, rex
        )
    if guest_cpl(env) != 0:
        return False
    left = load64(context + 8 * LEFT_TO_EMULATOR)
    if number == _EVENT_CR3_WRITE and opcode == _OPCODE_MOV_TO_CR and left & LEAVE_CR3 == 0:
        if (modrm >> _MODRM_REGISTER_SHIFT) & 7 != _CR3_NUMBER or length > 3 or (length == 3 and rex == 0):
            return False
        save_state(env, state, load64(context + 8 * FN_CC_COMPUTE_ALL))
        source = (modrm & 7) + R8 * (rex & _REX_B)
        former = state[CR3]
        if set_cr3(state, memory, state[source]) != 0:
            return False
        if state[TLB_FLUSH] != 0:
            state[TLB_FLUSH] = 0
            if (former ^ state[CR3]) & _CR3_LAM != 0:
                # What a pointer means changes for global pages, too.
                flush_tlb(load64(context + 8 * CPU), context)
            else:
                flush_local(load64(context + 8 * CPU), context)
        _complete(env, state, length + 1)
        return True
    if number == _EVENT_MSR and opcode == _OPCODE_WRMSR and left & LEAVE_MSRS == 0:
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


def _base_or_rdpid(
    context: int, env: int, state: Words, opcode: int, modrm: int, length: int, rex: int
) -> bool:
    """WRFSBASE, WRGSBASE or RDPID, unless it is to fault."""
    operation = (modrm >> _MODRM_REGISTER_SHIFT) & 7
    register = (modrm & 7) + R8 * (rex & _REX_B)
    left = load64(context + 8 * LEFT_TO_EMULATOR)
    if opcode == _OPCODE_RDPID:
        if (
            operation != _RDPID_EXTENSION
            or load64(context + 8 * OFFERS_RDPID) == 0
            or left & LEAVE_RDPID != 0
        ):
            return False
        save_state(env, state, load64(context + 8 * FN_CC_COMPUTE_ALL))
        state[register] = state[TSC_AUX] & MASK32
        _complete(env, state, length + 1)
        return True
    if (operation != _WRFSBASE and operation != _WRGSBASE) or state[CR4] & CR4_FSGSBASE == 0:
        return False
    save_state(env, state, load64(context + 8 * FN_CC_COMPUTE_ALL))
    mask = MASK32
    if (rex >> _REX_W_SHIFT) & 1 != 0:
        mask = MASK64
    if set_segment_base(state, FS + operation - _WRFSBASE, state[register] & mask) != 0:
        return False
    _complete(env, state, length + 1)
    return True


def _complete(env: int, state: Words, length: int) -> None:
    state[RIP] = state[RIP] + length
    state[INTERRUPT_SHADOW] = 0
    state[RFLAGS] = state[RFLAGS] & (MASK32 ^ RFLAGS_RF)
    load_state(env, state)


# ------------------------------------------------------------------------------------------------- system calls


@callback(0, 64, 64)
def on_syscall(uc, context):  # type: ignore[no-untyped-def]
    """SYSCALL, which Unicorn leaves to its hook: go on in the event hook, where RIP is that of the instruction."""
    leave_instruction(context, EVENT_SYSCALL, 0)


@callback(0, 64, 64)
def on_sysenter(uc, context):  # type: ignore[no-untyped-def]
    """SYSENTER, likewise."""
    leave_instruction(context, EVENT_SYSENTER, 0)


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
