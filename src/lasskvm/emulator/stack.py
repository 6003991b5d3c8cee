"""The stack of emulated instructions: where it is, pushing and popping.

An instruction works on a :class:`Stack`, a view that starts at SS:RSP. Nothing of the machine changes until
:meth:`Stack.commit`: pushed values are kept and stored there, after all of them have been checked, and only then does
RSP move. So an instruction that faults has pushed nothing::

    stack = Stack(ctx)
    stack.push(8, value)      # or stack.pop(8), stack.peek(8, 16), stack.skip(imm16)
    ...                       # checks that may fault
    stack.commit()

For the hot instructions that push or pop one value, :func:`pusher` and :func:`top_loader` settle the mode when the
instruction is compiled.

Source: Intel SDM volume 1, 6.2 (stacks; 6.2.3: address-size attribute of the stack); volume 3A, 6.15 (#SS).
"""

from __future__ import annotations

from collections.abc import Callable

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.data_access import load, store, touch
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.modes import in_64bit_mode
from lasskvm.lass import STACK, WRITE
from lasskvm.memory import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from lasskvm.state import ATTRIBUTES, RSP, Words, segment_word
from lasskvm.x86.registers import AR_DB, MASK32, MASK64, SS

__all__ = [
    "Stack",
    "pusher",
    "set_stack_pointer",
    "set_stack_register",
    "stack_flags",
    "stack_loader",
    "stack_mask",
    "top_loader",
]

_SS_ATTRIBUTES = segment_word(SS, ATTRIBUTES)
_MASK16 = 0xFFFF


def stack_mask(words: Words) -> int:
    """The bits of RSP that address the stack: 64 in 64-bit mode, elsewhere 32 or 16 by SS.B."""
    if in_64bit_mode(words):
        return MASK64
    return MASK32 if words[_SS_ATTRIBUTES] & AR_DB else _MASK16


def stack_flags(words: Words) -> int:
    """The access flags of a stack access: in 64-bit mode it is not the segment that makes a fault #SS."""
    return STACK if in_64bit_mode(words) else 0


def set_stack_pointer(words: Words, pointer: int) -> None:
    """Set the part of RSP that addresses the stack; a 16-bit stack keeps the bits above."""
    set_stack_register(words, RSP, pointer)


def set_stack_register(words: Words, register: int, value: int) -> None:
    """Set the part of *register* (a state word) that would address the stack: ENTER makes RBP such a register too."""
    mask = stack_mask(words)
    kept = words[register] & (MASK64 ^ mask) if mask == _MASK16 else 0
    words[register] = kept | value & mask


class Stack:
    """The current stack (SS, at the current CPL) as an instruction in progress sees it.

    ``pointer`` is where the stack pointer will be; instructions that move it otherwise set it before pushing or
    popping on. Sizes are in bytes. All methods but :meth:`skip` raise :class:`GuestFault` with nothing changed.
    """

    __slots__ = ("_checked", "_ctx", "_flags", "_mask", "_pushed", "pointer")

    def __init__(self, ctx: Emulation) -> None:
        words = ctx.words
        self._ctx = ctx
        self._mask, self._flags = stack_mask(words), stack_flags(words)
        self._pushed: list[tuple[int, int, int]] = []
        self._checked = 0
        self.pointer = words[RSP] & self._mask

    def push(self, size: int, value: int) -> None:
        """Push the low *size* bytes of *value*; memory is neither checked nor changed yet."""
        self.skip(-size)
        self._pushed.append((self.pointer, size, value & (1 << 8 * size) - 1))

    def pop(self, size: int) -> int:
        """Load *size* bytes and move the pointer behind them."""
        value = self.peek(size)
        self.skip(size)
        return value

    def peek(self, size: int, distance: int = 0) -> int:
        """Load *size* bytes *distance* bytes above the pointer, without moving it."""
        return self.load(self.pointer + distance, size)

    def load(self, offset: int, size: int) -> int:
        """Load *size* bytes at SS:*offset* (of the stack's width); sees what has been pushed before."""
        offset &= self._mask
        value = load(self._ctx, SS, offset, size, self._flags)
        for start, length, pushed in self._pushed:
            value = _overlay(value, offset, size, start, length, pushed)
        return value

    def skip(self, count: int) -> None:
        """Move the pointer by *count* bytes, up when positive; nothing is accessed."""
        self.pointer = self.pointer + count & self._mask

    def check(self) -> None:
        """Make the checks of all pushes so far, in their order: a :meth:`commit` behind it does not fault."""
        for offset, size, _ in self._pushed[self._checked :]:
            touch(self._ctx, SS, offset, size, self._flags | WRITE)
        self._checked = len(self._pushed)

    def commit(self) -> None:
        """Store what was pushed and set RSP: all of it, or a fault and nothing."""
        if len(self._pushed) > 1:
            self.check()
        for offset, size, value in self._pushed:
            store(self._ctx, SS, offset, size, value, self._flags)
        self._pushed.clear()
        self._checked = 0
        set_stack_pointer(self._ctx.words, self.pointer)


def _overlay(value: int, offset: int, size: int, start: int, length: int, pushed: int) -> int:
    """*value*, loaded at *offset*, with the bytes replaced that *pushed* is about to be stored over."""
    for number in range(max(offset, start), min(offset + size, start + length)):
        shift = 8 * (number - offset)
        byte = pushed >> 8 * (number - start) & 0xFF
        value = value & ~(0xFF << shift) | byte << shift
    return value


def pusher(decoded: Decoded, size: int) -> Callable[[Emulation, int], None]:
    """A function that pushes a value of *size* bytes; it raises :class:`GuestFault` with nothing changed."""
    if decoded.bits != 64:
        return lambda ctx, value: _push(ctx, size, value)
    last_start = PAGE_SIZE - size

    def push(ctx: Emulation, value: int) -> None:
        words = ctx.words
        pointer = words[RSP] - size & MASK64
        page = ctx.tlb.stores.get(pointer >> PAGE_SHIFT)
        if page is None or pointer & PAGE_MASK > last_start:
            store(ctx, SS, pointer, size, value, STACK)
        else:
            start = pointer + page[1]
            page[0][start : start + size] = value.to_bytes(size, "little")
        words[RSP] = pointer

    return push


def top_loader(decoded: Decoded, size: int) -> Callable[[Emulation], int]:
    """A function that loads the *size* bytes on the top of the stack; RSP stays where it is."""
    return stack_loader(decoded, size, RSP)


def stack_loader(decoded: Decoded, size: int, register: int) -> Callable[[Emulation], int]:
    """A function that loads *size* bytes from the stack where *register* (a state word) points."""
    if decoded.bits != 64:
        return lambda ctx: Stack(ctx).load(ctx.words[register], size)
    last_start = PAGE_SIZE - size

    def load_flat(ctx: Emulation) -> int:
        pointer = ctx.words[register]
        page = ctx.tlb.loads.get(pointer >> PAGE_SHIFT)
        if page is None or pointer & PAGE_MASK > last_start:
            return load(ctx, SS, pointer, size, STACK)
        start = pointer + page[1]
        return int.from_bytes(page[0][start : start + size], "little")

    return load_flat


def _push(ctx: Emulation, size: int, value: int) -> None:
    stack = Stack(ctx)
    stack.push(size, value)
    stack.commit()
