"""Time while the guest runs: the deadline of a run, and the time-stamp counter."""

from lasskvm.engine.context import (
    BLOCK_DEADLINE,
    BLOCKS,
    ENV,
    FN_MONOTONIC,
    HOST_DEADLINE,
    HOST_POLL_BLOCKS,
    HOST_TIME,
    LEAVE_RDTSC,
    LEAVE_RDTSCP,
    LEFT_TO_EMULATOR,
    STATE,
    SVM_EXIT_BASE,
    SVM_EXIT_RDTSC,
    SVM_EXIT_RDTSCP,
    TSC_BASE,
    TSC_PER_BLOCK,
)
from lasskvm.engine.leaving import leave_instruction, raise_fault, stop
from lasskvm.engine.native import callback, foreign_function, load64, store64
from lasskvm.engine.native import words_at as words
from lasskvm.engine.private import guest_cpl, set_guest_rax_rdx, set_guest_rcx
from lasskvm.lass import IMPLICIT
from lasskvm.state import CR4, STATE_WORDS, TSC_AUX
from lasskvm.x86.exceptions import GP
from lasskvm.x86.registers import CR4_TSD, MASK32

__all__ = ["deadline_reached", "host_nanoseconds", "on_deadline", "on_rdtsc", "on_rdtscp"]

_CLOCK_MONOTONIC = 1
_NANOSECONDS_PER_SECOND = 1_000_000_000

_clock_gettime = foreign_function(32, 32, 64)


@callback(0, 64)
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
    stop(context)


def host_nanoseconds(context: int) -> int:
    """The host's monotonic clock."""
    buffer = context + 8 * HOST_TIME
    _clock_gettime(load64(context + 8 * FN_MONOTONIC), _CLOCK_MONOTONIC, buffer)
    return load64(buffer) * _NANOSECONDS_PER_SECOND + load64(buffer + 8)


@callback(32, 64, 64)
def on_rdtsc(uc, context):  # type: ignore[no-untyped-def]
    """RDTSC; returns 1 to keep the translator from reading the host's counter."""
    if load64(context + 8 * LEFT_TO_EMULATOR) & LEAVE_RDTSC != 0:
        leave_instruction(context, SVM_EXIT_BASE + SVM_EXIT_RDTSC, 0)
    time_stamp(context)
    return 1


@callback(32, 64, 64)
def on_rdtscp(uc, context):  # type: ignore[no-untyped-def]
    """RDTSCP, likewise."""
    if load64(context + 8 * LEFT_TO_EMULATOR) & LEAVE_RDTSCP != 0:
        leave_instruction(context, SVM_EXIT_BASE + SVM_EXIT_RDTSCP, 0)
    time_stamp(context)
    state = words(load64(context + 8 * STATE), STATE_WORDS)
    set_guest_rcx(load64(context + 8 * ENV), state[TSC_AUX] & MASK32)
    return 1


def time_stamp(context: int) -> None:
    """Load EDX:EAX with the guest's time-stamp counter; #GP(0) where CR4.TSD forbids it."""
    env = load64(context + 8 * ENV)
    state = words(load64(context + 8 * STATE), STATE_WORDS)
    if state[CR4] & CR4_TSD != 0 and guest_cpl(env) != 0:
        raise_fault(context, GP, 0, 0, IMPLICIT, 0)
    if load64(context + 8 * HOST_DEADLINE) != 0:
        counter = load64(context + 8 * TSC_BASE) + host_nanoseconds(context)
    else:
        # Two readings in one block must not be equal: reading the counter counts as a block.
        blocks = load64(context + 8 * BLOCKS) + 1
        store64(context + 8 * BLOCKS, blocks)
        counter = load64(context + 8 * TSC_BASE) + blocks * load64(context + 8 * TSC_PER_BLOCK)
    set_guest_rax_rdx(env, counter & MASK32, (counter >> 32) & MASK32)
