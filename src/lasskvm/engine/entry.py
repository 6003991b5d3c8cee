"""VM entry and exit: the state words into the translator, a run, and back."""

from typing import Any

from lasskvm.emulator.mmu import translate
from lasskvm.emulator.watch import translated_dr7
from lasskvm.engine.context import (
    CPU,
    EMU_RESULT,
    ENV,
    EXIT_REASON,
    EXIT_STOPPED,
    FN_CC_COMPUTE_ALL,
    FN_EMU_START,
    FN_UPDATE_DR7,
    INSTRUCTION_BYTES,
    MEMORY,
    RESULT,
    STATE,
    UC,
    WANT_INTERRUPT_WINDOW,
)
from lasskvm.engine.fill import flush_tlb, invalidate_page
from lasskvm.engine.native import callback, foreign_function, load64, store64
from lasskvm.engine.native import words_at as words
from lasskvm.engine.private import (
    breakpoints_differ,
    clear_interrupt_window,
    load_breakpoints,
    load_state,
    request_interrupt_window,
    save_state,
    set_flags_for_entry,
    tables_moved,
)
from lasskvm.state import DR7, RIP, STATE_WORDS, TLB_FLUSH

__all__ = ["enter", "forget_code", "translate_linear"]

_emu_start = foreign_function(32, 64, 64, 64, 64, 64)


@callback(0, 64)
def enter(context):  # type: ignore[no-untyped-def]
    """Run the guest until something ends the run; the exit record and the state words tell what it was."""
    run(context)


def run(context: int) -> None:
    """The body of :func:`enter`."""
    cpu = load64(context + 8 * CPU)
    env = load64(context + 8 * ENV)
    state = words(load64(context + 8 * STATE), STATE_WORDS)
    moved = tables_moved(env, state)
    dr7 = translated_dr7(state[DR7])
    watched = breakpoints_differ(env, state, dr7)
    load_state(env, state)
    set_flags_for_entry(env, state)
    if watched:
        load_breakpoints(env, state, dr7, load64(context + 8 * FN_UPDATE_DR7))
    if moved or watched or state[TLB_FLUSH] != 0:
        state[TLB_FLUSH] = 0
        flush_tlb(cpu, context)
    if load64(context + 8 * WANT_INTERRUPT_WINDOW) != 0:
        request_interrupt_window(cpu)
    else:
        clear_interrupt_window(cpu)
    store64(context + 8 * EXIT_REASON, EXIT_STOPPED)
    store64(context + 8 * INSTRUCTION_BYTES, 0)
    result = _emu_start(load64(context + 8 * FN_EMU_START), load64(context + 8 * UC), state[RIP], 0, 0, 0)
    store64(context + 8 * EMU_RESULT, result)
    save_state(env, state, load64(context + 8 * FN_CC_COMPUTE_ALL))


@callback(0, 64, 64, 64, 64, 64, 64)
def translate_linear(context, address, size, flags, cpl, rflags):  # type: ignore[no-untyped-def]
    """:func:`lasskvm.emulator.mmu.translate` for Python; its results are left in the ``RESULT`` words."""
    state = words(load64(context + 8 * STATE), STATE_WORDS)
    memory: Any = load64(context + 8 * MEMORY)
    gpa, permissions, vector, error_code = translate(state, memory, address, size, flags, cpl, rflags)
    store64(context + 8 * RESULT, gpa)
    store64(context + 8 * (RESULT + 1), permissions)
    store64(context + 8 * (RESULT + 2), vector)
    store64(context + 8 * (RESULT + 3), error_code)


@callback(0, 64, 64, 64)
def forget_code(context, slot, page):  # type: ignore[no-untyped-def]
    """Forget the translated code of page *page* of the slot whose table row is at *slot*: somebody stored to it."""
    invalidate_page(load64(context + 8 * CPU), context, load64(context + 8 * MEMORY), slot, page)
