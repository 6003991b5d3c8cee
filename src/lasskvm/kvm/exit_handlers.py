"""What KVM does in the kernel about an exit of direct execution: intercepted instructions, faults, exceptions.

:func:`handle_exit` changes the state words so that the guest can go on: an instruction is executed, or an event
delivered. It raises :class:`TripleFault` and :class:`Unhandleable`, which the run loop turns into exits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lasskvm.emulator.branches import undo_near_branch
from lasskvm.emulator.completion import next_rip
from lasskvm.emulator.decode import fetch_instruction, is_read_modify_write, is_stack_access
from lasskvm.emulator.events import Event
from lasskvm.emulator.execution import (
    deliver_breakpoint,
    emulate_instruction,
    is_implemented,
    skip_forced_emulation_prefix,
)
from lasskvm.emulator.faults import EptFault, GuestFault, Interruption, Unhandleable
from lasskvm.emulator.linearize import linear_address
from lasskvm.emulator.mmu import next_linear, translate
from lasskvm.emulator.modes import linear_address_bits
from lasskvm.engine import context as c
from lasskvm.engine.engine import EngineExit
from lasskvm.lass import FETCH, IMPLICIT, WRITE
from lasskvm.memory import PAGE_SIZE
from lasskvm.state import CPL, DR6, EPT_FAULT_GPA, EPT_OUTCOME, RFLAGS, RIP
from lasskvm.x86.address import is_canonical
from lasskvm.x86.ept import EPT_EXIT, exit_reason
from lasskvm.x86.exceptions import DB, GP, NM, NP, PF, PF_W, SS, TS, UD, has_error_code
from lasskvm.x86.registers import CS, DR6_BS, DR6_FIXED, RFLAGS_TF
from lasskvm.x86.vmx_exits import EptViolation, ExitReason

if TYPE_CHECKING:
    from lasskvm.kvm.vcpu import Vcpu

__all__ = ["handle_exit"]

_DR6_HIT_BITS = 0xF
#: Exceptions by which the translator refuses an instruction.
_REFUSALS = (UD, NM, TS, NP, SS, GP)


def handle_exit(vcpu: Vcpu, engine_exit: EngineExit) -> None:
    """Deal with *engine_exit*."""
    _HANDLERS[engine_exit.reason](vcpu, engine_exit)


def _memory_fault(vcpu: Vcpu, engine_exit: EngineExit) -> None:
    """A fault that the TLB fill found and native delivery left to us: say exactly what it is, and deliver it."""
    words = vcpu.state.words
    vector, error_code, address = engine_exit.vector, engine_exit.error_code, engine_exit.address
    ept_fault = words[EPT_FAULT_GPA], words[EPT_OUTCOME]
    if engine_exit.flags & FETCH:
        if _runs_up_to_next_page(vcpu, address) or deliver_breakpoint(vcpu.emulation):
            return
        if vector == GP and not is_canonical(address, linear_address_bits(words)):
            undo_near_branch(vcpu.emulation, vcpu.engine.last_block)
    elif vector != EPT_EXIT and not engine_exit.flags & IMPLICIT:
        vector, error_code = _classify(vcpu, vector, error_code, address, bool(engine_exit.flags & WRITE))
    if vector == EPT_EXIT:
        gpa, outcome = ept_fault
        if not engine_exit.flags & (FETCH | IMPLICIT):
            outcome = _classify_violation(vcpu, outcome, address)
        # Looking at the code may have left another one there.
        words[EPT_FAULT_GPA], words[EPT_OUTCOME] = gpa, outcome
        raise EptFault(address)
    vcpu.deliver(Event(vector, error_code=error_code, cr2=address if vector == PF else None))


def _classify(vcpu: Vcpu, vector: int, error_code: int, address: int, write: bool) -> tuple[int, int]:
    """#GP becomes #SS for stack accesses; the #PF of a read-modify-write reports a write also for its read half."""
    words = vcpu.state.words
    try:
        decoded = fetch_instruction(vcpu.emulation)
    except Interruption:
        return vector, error_code
    if vector == GP and is_stack_access(words, decoded, address):
        return SS, error_code
    if vector == PF and not write and is_read_modify_write(words, decoded, address):
        return PF, error_code | PF_W
    return vector, error_code


def _classify_violation(vcpu: Vcpu, outcome: int, address: int) -> int:
    """An EPT violation of a read-modify-write reports a write also for its read half (SDM volume 3C, table 28-7)."""
    translated_read = EptViolation.GVA_TRANSLATED | EptViolation.ACC_READ
    if exit_reason(outcome) != ExitReason.EPT_VIOLATION or outcome & translated_read != translated_read:
        return outcome
    try:
        decoded = fetch_instruction(vcpu.emulation)
    except Interruption:
        return outcome
    if is_read_modify_write(vcpu.state.words, decoded, address):
        return outcome & ~EptViolation.ACC_READ | EptViolation.ACC_WRITE
    return outcome


def _runs_up_to_next_page(vcpu: Vcpu, address: int) -> bool:
    """A block ran into a page that cannot be fetched while it was translated, before its first instructions ran.

    Execute those that lie wholly in the first page. False when there are none: then the fault is due now.
    """
    words = vcpu.state.words
    start = linear_address(words, CS, words[RIP])
    if start // PAGE_SIZE == address // PAGE_SIZE:
        return False
    boundary = _first_straddling(vcpu, start)
    if boundary == start:
        return False
    engine_exit = vcpu.run_until(boundary)
    if engine_exit.reason not in (c.EXIT_STOPPED, c.EXIT_INTERRUPT_WINDOW, c.EXIT_PORT_IO):
        handle_exit(vcpu, engine_exit)
    return True


def _first_straddling(vcpu: Vcpu, start: int) -> int:
    """The linear address of the first instruction from *start* on that reaches into the next page."""
    words = vcpu.state.words
    rip = words[RIP]
    linear = start
    try:
        while linear // PAGE_SIZE == start // PAGE_SIZE:
            decoded = fetch_instruction(vcpu.emulation)
            if next_linear(words, linear, decoded.length - 1) // PAGE_SIZE != start // PAGE_SIZE:
                break
            words[RIP] = next_rip(words, decoded)
            linear = next_linear(words, linear, decoded.length)
    except Interruption:
        # The instruction that reaches into the missing page, or one that is no instruction.
        return linear
    finally:
        words[RIP] = rip
    return linear


def _exception(vcpu: Vcpu, engine_exit: EngineExit) -> None:
    """An exception of the translator.

    Where it refuses an instruction, the emulator has the last word: it executes it, or finds the exact fault.
    """
    vector = engine_exit.vector
    if vector == DB:
        _debug_exception(vcpu)
        return
    if vector in _REFUSALS and _emulate_refused(vcpu, engine_exit):
        return
    error_code = engine_exit.error_code if has_error_code(vector) else None
    vcpu.deliver(Event(vector, error_code=error_code))


def _emulate_refused(vcpu: Vcpu, engine_exit: EngineExit) -> bool:
    """Emulate the instruction that the translator has refused; False when the emulator does not know it either."""
    ctx = vcpu.emulation
    ctx.prefetched = engine_exit.instruction
    try:
        if not (engine_exit.vector == UD and skip_forced_emulation_prefix(ctx)):
            try:
                if not is_implemented(fetch_instruction(ctx)):
                    return False
            except GuestFault:
                return False
        emulate_instruction(ctx)
    finally:
        ctx.prefetched = b""
    return True


def _debug_exception(vcpu: Vcpu) -> None:
    """#DB from single-stepping or a breakpoint; data breakpoints are trapped by a TF that may be ours."""
    words = vcpu.state.words
    hits, borrowed = vcpu.engine.take_watch_hit()
    dr6 = words[DR6]
    if borrowed:
        words[RFLAGS] &= ~RFLAGS_TF
        dr6 &= ~DR6_BS
    words[DR6] = dr6 & ~DR6_BS | DR6_FIXED
    dr6 = dr6 & (DR6_BS | _DR6_HIT_BITS) | hits
    if vcpu.debugger.has_breakpoints:
        vcpu.debugger.undo_dr6()
        dr6 = vcpu.debugger.filter_debug_trap(dr6)
    vcpu.deliver(Event(DB, dr6=dr6))


def _emulate(vcpu: Vcpu, engine_exit: EngineExit) -> None:
    ctx = vcpu.emulation
    ctx.prefetched = engine_exit.instruction
    try:
        emulate_instruction(ctx)
    finally:
        ctx.prefetched = b""


def _fetch_from_hole(vcpu: Vcpu, engine_exit: EngineExit) -> None:
    words = vcpu.state.words
    start = linear_address(words, CS, words[RIP])
    gpa, *_ = translate(words, vcpu.vm.memory, start, 1, FETCH, words[CPL], words[RFLAGS])
    if gpa // PAGE_SIZE != engine_exit.address // PAGE_SIZE:
        next_page = next_linear(words, start, PAGE_SIZE - start % PAGE_SIZE)
        if _runs_up_to_next_page(vcpu, next_page):
            return
    sgx = vcpu.emulation.sgx
    if sgx is not None and sgx.is_epc(engine_exit.address):
        # All ones, which are no instruction.
        emulate_instruction(vcpu.emulation)
        return
    raise Unhandleable(
        f"instruction fetch from guest-physical {engine_exit.address:#x}, where there is no memory "
        f"(RIP {words[RIP]:#x}, CPL {words[CPL]})"
    )


_HANDLERS: dict[int, Callable[[Vcpu, EngineExit], None]] = {
    c.EXIT_MEMORY_FAULT: _memory_fault,
    c.EXIT_EXCEPTION: _exception,
    c.EXIT_INTERCEPT: _emulate,
    c.EXIT_FETCH_FROM_HOLE: _fetch_from_hole,
    c.EXIT_MMIO: _emulate,
}
