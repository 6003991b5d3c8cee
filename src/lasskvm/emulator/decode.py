"""Instruction fetch and decoding, and where an instruction's memory accesses go.

Decoding is iced-x86's. A decoded instruction is cached by its mode and bytes and knows nothing of the address
it was fetched from: everything relative to RIP is added when an address is asked for.

The helpers answer what direct execution cannot: it knows the linear address that faulted, but not whether the
access was a stack access (#SS instead of #GP), or the read half of a read-modify-write (the W bit of a #PF
error code).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

from iced_x86 import (
    CodeSize,
    Decoder,
    DecoderError,
    Instruction,
    InstructionInfoFactory,
    MemorySizeInfo,
    Mnemonic,
    OpAccess,
    OpKind,
    Register,
    RegisterInfo,
    UsedMemory,
)

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.faults import general_protection, invalid_opcode, raise_linear_fault
from lasskvm.emulator.linearize import linear_address, linearize
from lasskvm.emulator.mmu import next_linear, untagged
from lasskvm.emulator.modes import code_bits
from lasskvm.lass import FETCH, STACK
from lasskvm.memory import PAGE_SIZE
from lasskvm.state import CPL, RFLAGS, RIP, Words
from lasskvm.x86 import registers
from lasskvm.x86.registers import MASK32, MASK64

__all__ = [
    "MAX_INSTRUCTION_LENGTH",
    "SEGMENT_NUMBERS",
    "Decoded",
    "MemoryOperand",
    "decode",
    "effective_address",
    "fetch_instruction",
    "is_read_modify_write",
    "is_stack_access",
    "register_info",
    "stack_flag",
]

MAX_INSTRUCTION_LENGTH = 15
_CACHED_INSTRUCTIONS = 1 << 16
_MASK16 = 0xFFFF
_NO_WORD = -1

#: Segment registers: iced-x86's numbers to those of :mod:`lasskvm.x86.registers`.
SEGMENT_NUMBERS: dict[int, int] = {
    Register.ES: registers.ES,
    Register.CS: registers.CS,
    Register.SS: registers.SS,
    Register.DS: registers.DS,
    Register.FS: registers.FS,
    Register.GS: registers.GS,
}
_ADDRESS_MASKS = {CodeSize.CODE16: _MASK16, CodeSize.CODE32: MASK32, CodeSize.CODE64: MASK64}
_STACK_REGISTERS = frozenset(
    (Register.RSP, Register.ESP, Register.SP, Register.RBP, Register.EBP, Register.BP)
)
#: With a register as bit offset they access memory up to 2**60 bytes away from their operand's address.
_BIT_STRING_INSTRUCTIONS = frozenset((Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC))
_RIP_REGISTERS = frozenset((Register.RIP, Register.EIP))
_READS = frozenset((OpAccess.READ, OpAccess.COND_READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE))
_WRITES = frozenset((OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE))

_information = InstructionInfoFactory()


@dataclass(frozen=True, slots=True)
class MemoryOperand:
    """One memory operand, explicit or implied: ``segment:[base + index * scale + displacement]``.

    ``base`` and ``index`` are state-word indices, or -1; ``size`` is in bytes, 0 where it depends on the
    state (XSAVE, repeated string instructions). ``is_stack`` says whether it is a stack access in 64-bit
    mode.
    """

    segment: int
    base: int
    base_mask: int
    index: int
    index_mask: int
    scale: int
    displacement: int
    address_mask: int
    relative_to_rip: bool
    size: int
    reads: bool
    writes: bool
    is_stack: bool


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """A decoded instruction, at no particular address: ``instruction.ip`` is 0. Compared by identity.

    ``operand`` is the explicit memory operand, whether the instruction accesses it or only names it (INVLPG);
    ``accesses`` are all the memory accesses it makes, implied ones included.
    """

    instruction: Instruction
    length: int
    bits: int
    operand: MemoryOperand | None
    accesses: tuple[MemoryOperand, ...]


@cache
def register_info(register: int) -> RegisterInfo:
    """iced-x86's facts about *register* (``iced_x86.Register``)."""
    return RegisterInfo(register)  # type: ignore[arg-type]


@lru_cache(maxsize=_CACHED_INSTRUCTIONS)
def decode(bits: int, code: bytes) -> Decoded | int:
    """Decode the first instruction in *code* for 16-, 32- or 64-bit mode.

    Returns the ``iced_x86.DecoderError`` instead when there is none: ``NO_MORE_BYTES`` when *code* ends too
    early.
    """
    decoder = Decoder(bits, code, ip=0)
    instruction = decoder.decode()
    if decoder.last_error != DecoderError.NONE:
        # The instruction's length is needed to tell #GP (more than 15 bytes) from #UD.
        if instruction.len >= MAX_INSTRUCTION_LENGTH:
            return _TOO_LONG
        return int(decoder.last_error)
    operand = None
    if any(instruction.op_kind(number) == OpKind.MEMORY for number in range(instruction.op_count)):
        operand = _explicit_operand(instruction, bits)
    accesses = tuple(
        _accessed(memory, instruction) for memory in _information.info(instruction).used_memory()
    )
    return Decoded(instruction, instruction.len, bits, operand, accesses)


#: Returned by :func:`decode` beside the ``DecoderError`` values, all of which are small.
_TOO_LONG = 1 << 8


def fetch_instruction(ctx: Emulation) -> Decoded:
    """Fetch and decode the instruction at CS:RIP.

    Raises the fault of the fetch (a second page is only touched when the instruction reaches into it), #UD
    for what is no instruction, and #GP(0) for one of more than 15 bytes.
    """
    words = ctx.words
    bits = code_bits(words)
    if ctx.prefetched and bits == 64:
        decoded = decode(bits, ctx.prefetched)
        if isinstance(decoded, Decoded):
            return decoded
    start = linear_address(words, registers.CS, words[RIP])
    if bits != 64:
        linearize(ctx, registers.CS, words[RIP], 1, FETCH)
    head = min(MAX_INSTRUCTION_LENGTH, PAGE_SIZE - start % PAGE_SIZE)
    code = _fetch(ctx, start, head)
    decoded = decode(bits, code)
    if decoded == DecoderError.NO_MORE_BYTES and head < MAX_INSTRUCTION_LENGTH:
        code += _fetch(ctx, next_linear(words, start, head), MAX_INSTRUCTION_LENGTH - head)
        decoded = decode(bits, code)
    if isinstance(decoded, Decoded):
        if bits != 64:
            linearize(ctx, registers.CS, words[RIP], decoded.length, FETCH)
        return decoded
    if decoded == _TOO_LONG:
        raise general_protection()
    raise invalid_opcode()


def _fetch(ctx: Emulation, address: int, size: int) -> bytes:
    words = ctx.words
    # Translation applies the canonical rule and LASS too.
    gpa, _, vector, error_code = ctx.translate(
        words, ctx.memory, address, size, FETCH, words[CPL], words[RFLAGS]
    )
    raise_linear_fault(vector, error_code, address)
    return ctx.memory.read(gpa, size)


def effective_address(words: Words, operand: MemoryOperand) -> int:
    """The offset of *operand* in its segment, from the current registers and RIP."""
    offset = operand.displacement
    if operand.base != _NO_WORD:
        offset += words[operand.base] & operand.base_mask
    if operand.index != _NO_WORD:
        offset += (words[operand.index] & operand.index_mask) * operand.scale
    if operand.relative_to_rip:
        # The displacement already counts from the start of the instruction.
        offset += words[RIP]
    return offset & operand.address_mask


def stack_flag(decoded: Decoded) -> int:
    """``STACK`` when the explicit memory operand is a stack access in 64-bit mode, else 0."""
    operand = decoded.operand
    assert operand is not None
    return STACK if decoded.bits == 64 and operand.is_stack else 0


def is_stack_access(words: Words, decoded: Decoded, address: int) -> bool:
    """Whether what *decoded* accesses at linear *address* is the stack: faults are #SS and not #GP.

    In 64-bit mode: pushes, pops and operands based on RSP or RBP, unless FS or GS overrides; elsewhere,
    accesses through SS. An instruction like ``push [rax]`` makes both kinds, so the address decides.
    """
    operand = _access_at(words, decoded, address)
    if operand is None:
        return False
    if decoded.bits == 64:
        return operand.is_stack
    return operand.segment == registers.SS


def is_read_modify_write(words: Words, decoded: Decoded, address: int) -> bool:
    """Whether *decoded* reads linear *address* in order to write it: a #PF on the read reports a write."""
    operand = _access_at(words, decoded, address)
    return operand is not None and operand.reads and operand.writes


def _access_at(words: Words, decoded: Decoded, address: int) -> MemoryOperand | None:
    """The access that covers *address*, untagged; else the first one whose extent depends on the state.

    None for an access that the instruction does not make itself: reading a descriptor, say.
    """
    for operand in decoded.accesses:
        offset = effective_address(words, operand)
        start = untagged(words, linear_address(words, operand.segment, offset), 0)
        if (address - start) & MASK64 < max(operand.size, 1):
            return operand
    reaches_anywhere = decoded.instruction.mnemonic in _BIT_STRING_INSTRUCTIONS
    return next((operand for operand in decoded.accesses if reaches_anywhere or not operand.size), None)


def _explicit_operand(instruction: Instruction, bits: int) -> MemoryOperand:
    base = instruction.memory_base
    relative = base in _RIP_REGISTERS
    if relative:
        mask = MASK64 if base == Register.RIP else MASK32
    else:
        mask = _explicit_address_mask(instruction, bits)
    base_word, base_mask = (_NO_WORD, 0) if relative else _word_and_mask(base)
    index_word, index_mask = _word_and_mask(instruction.memory_index)
    segment = SEGMENT_NUMBERS[instruction.memory_segment]
    return MemoryOperand(
        segment=segment,
        base=base_word,
        base_mask=base_mask,
        index=index_word,
        index_mask=index_mask,
        scale=instruction.memory_index_scale,
        displacement=instruction.memory_displacement,
        address_mask=mask,
        relative_to_rip=relative,
        size=MemorySizeInfo(instruction.memory_size).size,
        reads=False,
        writes=False,
        is_stack=_is_stack_64(segment, base),
    )


def _explicit_address_mask(instruction: Instruction, bits: int) -> int:
    for register in (instruction.memory_base, instruction.memory_index):
        if register != Register.NONE:
            return (1 << 8 * register_info(register).size) - 1
    # Without registers the width of the displacement tells; iced-x86 gives 8 for a 64-bit address size.
    return {8: MASK64, 4: MASK32, 2: _MASK16}.get(instruction.memory_displ_size, (1 << bits) - 1)


def _accessed(memory: UsedMemory, instruction: Instruction) -> MemoryOperand:
    base_word, base_mask = _word_and_mask(memory.base)
    index_word, index_mask = _word_and_mask(memory.index)
    relative = (
        instruction.is_ip_rel_memory_operand
        and memory.base == Register.NONE
        and memory.index == Register.NONE
        and memory.displacement == instruction.ip_rel_memory_address
    )
    segment = SEGMENT_NUMBERS[memory.segment]
    return MemoryOperand(
        segment=segment,
        base=base_word,
        base_mask=base_mask,
        index=index_word,
        index_mask=index_mask,
        scale=memory.scale,
        displacement=memory.displacement,
        address_mask=_ADDRESS_MASKS[memory.address_size],
        relative_to_rip=relative,
        size=MemorySizeInfo(memory.memory_size).size,
        reads=memory.access in _READS,
        writes=memory.access in _WRITES,
        is_stack=_is_stack_64(segment, memory.base),
    )


def _is_stack_64(segment: int, base: int) -> bool:
    return base in _STACK_REGISTERS and segment not in (registers.FS, registers.GS)


def _word_and_mask(register: int) -> tuple[int, int]:
    """The state word that holds *register*, and the bits of it that an address uses."""
    if register == Register.NONE:
        return _NO_WORD, 0
    info = register_info(register)
    # AL, XLAT's index, is the only byte register in an address; it is the low byte of word 0.
    return info.full_register - Register.RAX, (1 << 8 * info.size) - 1
