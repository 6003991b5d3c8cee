"""Far pointers: a selector and an offset, in the instruction itself or in memory.

Source: Intel SDM volume 2A, 2.1.5 and 3.1.1.3 (ptr16:16 to m16:64); volume 3A, table 7-7 (the selector and the offset
are aligned each for itself).
"""

from __future__ import annotations

from iced_x86 import OpKind

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import load
from lasskvm.emulator.decode import Decoded, effective_address, stack_flag
from lasskvm.x86.registers import MASK64

__all__ = ["far_pointer", "offset_bytes"]

_SELECTOR_BYTES = 2


def far_pointer(ctx: Emulation, decoded: Decoded) -> tuple[int, int]:
    """The far pointer that *decoded* has as its operand: ``(selector, offset)``; raises :class:`GuestFault`.

    The offset lies before the selector, and is zero-extended.
    """
    instruction = decoded.instruction
    operand = decoded.operand
    if operand is None:
        is_short = instruction.op0_kind == OpKind.FAR_BRANCH16
        offset = instruction.far_branch16 if is_short else instruction.far_branch32
        return instruction.far_branch_selector, offset
    address = effective_address(ctx.words, operand)
    flags = stack_flag(decoded)
    size = offset_bytes(decoded)
    offset = load(ctx, operand.segment, address, size, flags)
    selector = load(ctx, operand.segment, address + size & MASK64, _SELECTOR_BYTES, flags)
    return selector, offset


def offset_bytes(decoded: Decoded) -> int:
    """The size of the offset of *decoded*'s far pointer, which is the operand size: 2, 4 or 8."""
    if decoded.operand is None:
        return 2 if decoded.instruction.op0_kind == OpKind.FAR_BRANCH16 else 4
    return decoded.operand.size - _SELECTOR_BYTES
