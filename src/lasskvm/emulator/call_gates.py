"""Call gates: the checks on them and on the code segments they lead to, and the stack switch of a call through one.

Gates are 16-bit or 32-bit, and 64-bit (of 16 bytes) in IA-32e mode; there, nothing else of a system descriptor can be
called or jumped to. Elsewhere it can be a task gate or a TSS, but task switches are not implemented: they raise
:class:`Unhandleable`, which ends in an internal-error exit, as in KVM's emulator.

Source: Intel SDM volume 2A, CALL and JMP (far; CALL-GATE, TASK-GATE, TASK-STATE-SEGMENT); volume 3A, 6.8.3 to 6.8.5.
"""

from __future__ import annotations

from dataclasses import dataclass

from lasskvm.emulator.code_segments import CodeTarget, fetch_target_descriptor
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.delivery import gate_code_segment
from lasskvm.emulator.entry_stacks import EntryStack, current_stack, stack_from_tss, stack_from_tss64
from lasskvm.emulator.faults import GuestFault, Unhandleable, general_protection, raise_linear_fault
from lasskvm.emulator.modes import in_ia32e_mode
from lasskvm.emulator.segments import descriptor_privilege_level
from lasskvm.emulator.stack import Stack
from lasskvm.emulator.tables import load_system_pair, locate_descriptor, selector_error_code
from lasskvm.state import CPL, RSP, SELECTOR, Words, segment_word
from lasskvm.x86.descriptors import (
    DESCRIPTOR_BYTES64,
    SELECTOR_RPL,
    SYS_CALL_GATE,
    SYS_CALL_GATE16,
    SYS_TASK_GATE,
    SYS_TSS16_AVAILABLE,
    SYS_TSS_AVAILABLE,
    gate_offset16,
    gate_offset32,
    gate_offset64,
    gate_parameters,
    gate_selector,
    high_is_valid,
    segment_attributes,
)
from lasskvm.x86.exceptions import NP
from lasskvm.x86.paging import PhysicalMemory
from lasskvm.x86.registers import AR_CONFORMING, AR_P, AR_TYPE, CS, SS

__all__ = ["CallGate", "call_on_gate_stack", "call_target", "jump_target", "read_call_gate"]

_TASK_TYPES = (SYS_TASK_GATE, SYS_TSS16_AVAILABLE, SYS_TSS_AVAILABLE)
_LEGACY_TYPES = (SYS_CALL_GATE16, SYS_CALL_GATE, *_TASK_TYPES)
_IA32E_TYPES = (SYS_CALL_GATE,)
_GATE16_BYTES, _GATE32_BYTES, _GATE64_BYTES = 2, 4, 8
#: Pushes of a return address: CS and RIP.
_RETURN_ADDRESS = 2


@dataclass(frozen=True, slots=True)
class CallGate:
    """A call gate that may be used: its operand size in bytes, where it leads, how many parameters it copies."""

    size: int
    selector: int
    entry: int
    parameters: int


def read_call_gate(words: Words, memory: PhysicalMemory, selector: int, descriptor: int) -> CallGate:
    """The call gate of *selector*, whose *descriptor* is a system descriptor.

    Raises :class:`GuestFault`: #GP with the selector for other descriptors, and when the gate's DPL forbids it to CPL
    or RPL; #NP with the selector.
    """
    error_code = selector_error_code(selector)
    attributes = segment_attributes(descriptor)
    gate_type = attributes & AR_TYPE
    ia32e = in_ia32e_mode(words)
    if gate_type not in (_IA32E_TYPES if ia32e else _LEGACY_TYPES):
        raise general_protection(error_code)
    if descriptor_privilege_level(attributes) < max(words[CPL], selector & SELECTOR_RPL):
        raise general_protection(error_code)
    if not attributes & AR_P:
        raise GuestFault(NP, error_code)
    if gate_type in _TASK_TYPES:
        raise Unhandleable("a far transfer to a task, and task switches are not implemented")
    code_selector, parameters = gate_selector(descriptor), gate_parameters(descriptor)
    if ia32e:
        entry = gate_offset64(descriptor, _upper_half(words, memory, selector))
        return CallGate(_GATE64_BYTES, code_selector, entry, 0)
    if gate_type == SYS_CALL_GATE16:
        return CallGate(_GATE16_BYTES, code_selector, gate_offset16(descriptor), parameters)
    return CallGate(_GATE32_BYTES, code_selector, gate_offset32(descriptor), parameters)


def jump_target(words: Words, memory: PhysicalMemory, gate: CallGate) -> CodeTarget:
    """The code that JMP through *gate* enters, at the current privilege level."""
    descriptor = fetch_target_descriptor(words, memory, gate.selector)
    attributes = segment_attributes(descriptor)
    changes_level = not attributes & AR_CONFORMING and descriptor_privilege_level(attributes) != words[CPL]
    if changes_level:
        raise general_protection(selector_error_code(gate.selector))
    return call_target(words, memory, gate)


def call_target(words: Words, memory: PhysicalMemory, gate: CallGate) -> CodeTarget:
    """The code that CALL through *gate* enters, in IA-32e mode 64-bit code. It may be more privileged."""
    descriptor, cpl, *fault = gate_code_segment(words, memory, gate.selector, 0)
    raise_linear_fault(*fault)
    return CodeTarget.of(words, gate.selector, descriptor, cpl)


def call_on_gate_stack(ctx: Emulation, gate: CallGate, target: CodeTarget, return_rip: int) -> int:
    """Call *target* through *gate* on a stack that is not the caller's; CS, SS, CPL and RSP change.

    That is the stack which the TSS has for a more privileged level, or for a 64-bit gate in compatibility mode the
    current one without its segment. Returns the new RIP; raises :class:`GuestFault` with nothing of the state changed.
    """
    words, memory = ctx.words, ctx.memory
    frame = []
    parameters = 0
    if target.cpl == words[CPL]:
        stack = current_stack(words, is_64bit=True)
    else:
        stack = _inner_stack(ctx, gate, target.cpl)
        frame = [words[segment_word(SS, SELECTOR)], words[RSP]]
        parameters = gate.parameters
    stack.check_room(words, gate.size, len(frame) + parameters + _RETURN_ADDRESS)
    rip = target.instruction_pointer(words, gate.entry)
    # The last parameter is pushed first, so that they lie as they lay; read at the caller's privilege level.
    caller = Stack(ctx)
    frame += reversed([caller.peek(gate.size, gate.size * number) for number in range(parameters)])
    frame += [words[segment_word(CS, SELECTOR)], return_rip]
    segment = target.accessed_segment(ctx)
    stack.push(words, memory, gate.size, frame)
    stack.commit(words)
    target.enter(words, segment)
    return rip


def _inner_stack(ctx: Emulation, gate: CallGate, cpl: int) -> EntryStack:
    if gate.size == _GATE64_BYTES:
        return stack_from_tss64(ctx.words, ctx.memory, cpl)
    return stack_from_tss(ctx.words, ctx.memory, cpl)


def _upper_half(words: Words, memory: PhysicalMemory, selector: int) -> int:
    """The second 8 bytes of the 64-bit gate of *selector*."""
    address, vector = locate_descriptor(words, selector, DESCRIPTOR_BYTES64)
    if vector:
        raise general_protection(selector_error_code(selector))
    _, high, *fault = load_system_pair(words, memory, address)
    raise_linear_fault(*fault)
    if not high_is_valid(high):
        raise general_protection(selector_error_code(selector))
    return high
