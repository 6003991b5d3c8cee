"""Counting executed blocks: the one callback that is too hot for Numba's calling convention.

Unicorn calls it at every block, and in every round of a repeated string instruction. Numba wraps each callback into two
functions that save registers and pass a status, which costs more than the counting; so this one is built from LLVM
instructions. It counts, remembers where the block begins, and calls the Numba callback when the deadline has come.
"""

from __future__ import annotations

from llvmlite import ir

from lasskvm.engine.context import BLOCK_DEADLINE, BLOCKS, LAST_BLOCK
from lasskvm.engine.machine_code import assembled
from lasskvm.engine.timing import on_deadline

__all__ = ["block_hook"]

_WORD_BITS = 64


def block_hook() -> int:
    """The address of ``UC_HOOK_BLOCK``'s callback ``(uc, address, size, context)``."""
    return assembled(_module(on_deadline.address))


def _module(deadline_callback: int) -> ir.Module:
    word, half = ir.IntType(_WORD_BITS), ir.IntType(32)
    module = ir.Module("block_hook")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [word, word, half, word]), "on_block")
    _, address, _, context = function.args
    counting = ir.IRBuilder(function.append_basic_block("count"))
    late = ir.IRBuilder(function.append_basic_block("deadline"))
    done = ir.IRBuilder(function.append_basic_block("done"))

    words = counting.inttoptr(context, word.as_pointer())
    counter = counting.gep(words, [word(BLOCKS)])
    count = counting.add(counting.load(counter), word(1))
    counting.store(count, counter)
    counting.store(address, counting.gep(words, [word(LAST_BLOCK)]))
    deadline = counting.load(counting.gep(words, [word(BLOCK_DEADLINE)]))
    counting.cbranch(counting.icmp_unsigned(">=", count, deadline), late.block, done.block)

    callback = ir.FunctionType(ir.VoidType(), [word]).as_pointer()
    late.call(late.inttoptr(word(deadline_callback), callback), [context], tail=True)
    late.ret_void()
    done.ret_void()
    return module
