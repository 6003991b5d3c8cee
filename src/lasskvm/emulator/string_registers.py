"""What string instructions do with RSI, RDI, RCX and RIP, whether they move memory or port data.

The address size decides how much of the registers they use. A repeated instruction may end before its count does: RIP
then stays on it (:func:`pause`), and it is executed again for the rest.

Source: Intel SDM volume 1, 7.3.9 (string operations); volume 2, REP; KVM's ``string_registers_quirk()``.
"""

from __future__ import annotations

from iced_x86 import OpKind

from lasskvm.emulator.completion import trap_if_single_stepping
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.state import INTERRUPT_SHADOW, RCX, RFLAGS, Words
from lasskvm.x86.registers import MASK32, MASK64, RFLAGS_DF, RFLAGS_RF

__all__ = [
    "add_to_register",
    "address_mask",
    "element_step",
    "is_repeated",
    "kept_bits",
    "pause",
    "skip_repetition",
]

_MASK16 = 0xFFFF
_INDEX_MASKS = {
    OpKind.MEMORY_SEG_SI: _MASK16,
    OpKind.MEMORY_SEG_ESI: MASK32,
    OpKind.MEMORY_SEG_RSI: MASK64,
    OpKind.MEMORY_ESDI: _MASK16,
    OpKind.MEMORY_ESEDI: MASK32,
    OpKind.MEMORY_ESRDI: MASK64,
}


def address_mask(decoded: Decoded) -> int:
    """The bits of RSI, RDI and RCX that string instruction *decoded* uses."""
    instruction = decoded.instruction
    kinds = (instruction.op_kind(number) for number in range(instruction.op_count))
    return next(_INDEX_MASKS[kind] for kind in kinds if kind in _INDEX_MASKS)


def is_repeated(decoded: Decoded) -> bool:
    """Whether *decoded* has a REP prefix. Both are one where no comparison is made."""
    return bool(decoded.instruction.has_rep_prefix or decoded.instruction.has_repne_prefix)


def kept_bits(mask: int) -> int:
    """The bits of a register that stay when those of *mask* are written: 32 bits clear the upper half."""
    return MASK64 ^ mask if mask == _MASK16 else 0


def add_to_register(words: Words, register: int, addend: int, mask: int) -> None:
    """Add *addend* to the part of *register* (a state word) that *mask* tells; a 32-bit one clears the upper half."""
    words[register] = words[register] & kept_bits(mask) | words[register] + addend & mask


def element_step(words: Words, size: int) -> int:
    """How far an element of *size* bytes moves the index registers: backwards when RFLAGS.DF is set."""
    return -size if words[RFLAGS] & RFLAGS_DF else size


def skip_repetition(words: Words, mask: int, indices: tuple[int, ...] = ()) -> None:
    """The registers after a repeated instruction whose count was 0 to begin with.

    Nothing is accessed. With 32-bit addresses Intel processors clear the upper halves nevertheless: of RCX always, of
    *indices* where fast string operation exists.
    """
    if mask == MASK32:
        words[RCX] = 0
        for register in indices:
            words[register] &= MASK32


def pause(ctx: Emulation) -> None:
    """End one execution of a repeated instruction that has more to do.

    RF is set, so that what comes in between returns to it past an instruction breakpoint; the interrupt shadow ends.
    Raises #DB with DR6.BS when RFLAGS.TF is set.
    """
    words = ctx.words
    words[RFLAGS] |= RFLAGS_RF
    words[INTERRUPT_SHADOW] = 0
    trap_if_single_stepping(words)
