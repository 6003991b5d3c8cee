"""Operands in XMM and MMX registers and 128-bit memory: their accessors, and the frame of instructions on them.

What is said of :mod:`lasskvm.emulator.accessors` goes for these too. A legacy SSE operand of 16 bytes in memory must be
aligned, unless the instruction is one that says otherwise.

Source: Intel SDM volume 2, table 2-18 and 24.25.3 in volume 3B (exceptions of SSE instructions with memory operands).
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import OpKind, Register

from lasskvm.emulator.accessors import (
    Reader,
    Writer,
    address_of,
    memory_loader,
    memory_storer,
    operand_bytes,
    register_reader,
    register_writer,
)
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import load, store
from lasskvm.emulator.decode import Decoded, stack_flag
from lasskvm.emulator.faults import general_protection
from lasskvm.emulator.fpu import enter_mmx, read_mmx, write_mmx
from lasskvm.emulator.instructions.availability import check_mmx, check_sse, check_sse_and_mmx
from lasskvm.emulator.lanes import Binary, Unary
from lasskvm.emulator.linearize import linear_address, linearize
from lasskvm.emulator.operation import Executor
from lasskvm.lass import WRITE
from lasskvm.memory import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from lasskvm.state import Words
from lasskvm.x86.registers import FS

__all__ = [
    "XMM_BITS",
    "binary",
    "check_aligned",
    "executor",
    "is_mmx",
    "is_xmm",
    "reader",
    "unary",
    "vector_bits",
    "writer",
]

XMM_BITS = 128
_MMX_BITS = 64
_XMM_BYTES = 16


def is_xmm(decoded: Decoded, number: int) -> bool:
    """Whether operand *number* is an XMM register."""
    return _is_register(decoded, number, Register.XMM0, Register.XMM15)


def is_mmx(decoded: Decoded, number: int) -> bool:
    """Whether operand *number* is an MMX register."""
    return _is_register(decoded, number, Register.MM0, Register.MM7)


def _is_register(decoded: Decoded, number: int, first: int, last: int) -> bool:
    instruction = decoded.instruction
    if instruction.op_kind(number) != OpKind.REGISTER:
        return False
    return bool(first <= instruction.op_register(number) <= last)


def vector_bits(decoded: Decoded) -> int:
    """The size of the vectors that *decoded* works on: 64 when operand 0 is an MMX register, else 128."""
    return _MMX_BITS if is_mmx(decoded, 0) else XMM_BITS


def executor(decoded: Decoded, body: Executor) -> Executor:
    """*body* behind the checks that the registers of *decoded* ask for; behind it, MMX state is entered if they are
    MMX registers."""
    numbers = range(decoded.instruction.op_count)
    uses_mmx = any(is_mmx(decoded, number) for number in numbers)
    uses_xmm = any(is_xmm(decoded, number) for number in numbers)
    if not uses_mmx:

        def run_sse(ctx: Emulation) -> None:
            check_sse(ctx)
            body(ctx)

        return run_sse
    check = check_sse_and_mmx if uses_xmm else check_mmx

    def run_mmx(ctx: Emulation) -> None:
        check(ctx)
        body(ctx)
        enter_mmx(ctx.fpu)

    return run_mmx


def binary(decoded: Decoded, operation: Binary) -> Executor:
    """Operand 0 becomes the *operation* of operands 0 and 1."""
    read, write, current = reader(decoded, 1), writer(decoded, 0), reader(decoded, 0)
    return executor(decoded, lambda ctx: write(ctx, operation(current(ctx), read(ctx))))


def unary(decoded: Decoded, operation: Unary) -> Executor:
    """Operand 0 becomes the *operation* of operand 1."""
    read, write = reader(decoded, 1), writer(decoded, 0)
    return executor(decoded, lambda ctx: write(ctx, operation(read(ctx))))


# ----------------------------------------------------------------------------------------------------- accessors


def reader(decoded: Decoded, number: int, *, aligned: bool = True) -> Reader:
    """Reads operand *number*: an XMM or MMX register as a whole, a general-purpose register, or memory.

    A 16-byte operand in memory must be *aligned*.
    """
    register = decoded.instruction.op_register(number)
    if is_xmm(decoded, number):
        place = register - Register.XMM0
        return lambda ctx: ctx.fpu.xmm[place]
    if is_mmx(decoded, number):
        place = register - Register.MM0
        return lambda ctx: read_mmx(ctx.fpu, place)
    if decoded.instruction.op_kind(number) == OpKind.MEMORY:
        size = operand_bytes(decoded, number)
        return _wide_loader(decoded, aligned) if size == _XMM_BYTES else memory_loader(decoded, size)
    return register_reader(register)


def writer(decoded: Decoded, number: int, *, aligned: bool = True) -> Writer:
    """Writes operand *number*, of the same kinds; the value must fit into it. Writing memory may fault."""
    register = decoded.instruction.op_register(number)
    if is_xmm(decoded, number):
        return _xmm_writer(register - Register.XMM0)
    if is_mmx(decoded, number):
        place = register - Register.MM0
        return lambda ctx, value: write_mmx(ctx.fpu, place, value)
    if decoded.instruction.op_kind(number) == OpKind.MEMORY:
        size = operand_bytes(decoded, number)
        return _wide_storer(decoded, aligned) if size == _XMM_BYTES else memory_storer(decoded, size)
    return register_writer(register)


def _xmm_writer(place: int) -> Writer:
    def write(ctx: Emulation, value: int) -> None:
        ctx.fpu.xmm[place] = value

    return write


def _wide_loader(decoded: Decoded, aligned: bool) -> Reader:
    segment, flags, offset_of, is_flat = _location(decoded)
    checked, limit = _quick_offsets(aligned)

    def read(ctx: Emulation) -> int:
        offset = offset_of(ctx.words)
        page = ctx.tlb.loads.get(offset >> PAGE_SHIFT) if is_flat else None
        if page is None or offset & checked > limit:
            if aligned:
                check_aligned(ctx, segment, offset, _XMM_BYTES, flags)
            return load(ctx, segment, offset, _XMM_BYTES, flags)
        start = offset + page[1]
        return int.from_bytes(page[0][start : start + _XMM_BYTES], "little")

    return read


def _wide_storer(decoded: Decoded, aligned: bool) -> Writer:
    segment, flags, offset_of, is_flat = _location(decoded)
    checked, limit = _quick_offsets(aligned)

    def write(ctx: Emulation, value: int) -> None:
        offset = offset_of(ctx.words)
        page = ctx.tlb.stores.get(offset >> PAGE_SHIFT) if is_flat else None
        if page is None or offset & checked > limit:
            if aligned:
                check_aligned(ctx, segment, offset, _XMM_BYTES, flags | WRITE)
            store(ctx, segment, offset, _XMM_BYTES, value, flags)
            return
        start = offset + page[1]
        page[0][start : start + _XMM_BYTES] = value.to_bytes(_XMM_BYTES, "little")

    return write


def _quick_offsets(aligned: bool) -> tuple[int, int]:
    """Bits of an offset, and their greatest value for which an access is aligned, or else on one page."""
    if aligned:
        return _XMM_BYTES - 1, 0
    return PAGE_MASK, PAGE_SIZE - _XMM_BYTES


def _location(decoded: Decoded) -> tuple[int, int, Callable[[Words], int], bool]:
    """Segment and access flags of the explicit memory operand, what gives its offset, and whether that is the linear
    address."""
    operand = decoded.operand
    assert operand is not None
    is_flat = decoded.bits == 64 and operand.segment < FS
    return operand.segment, stack_flag(decoded), address_of(decoded), is_flat


def check_aligned(
    ctx: Emulation, segment: int, offset: int, size: int, flags: int, alignment: int = _XMM_BYTES
) -> None:
    """#GP(0) when the linear address is no multiple of *alignment*; faults of segment and linear address come first."""
    if linear_address(ctx.words, segment, offset) % alignment:
        linearize(ctx, segment, offset, size, flags)
        raise general_protection()
