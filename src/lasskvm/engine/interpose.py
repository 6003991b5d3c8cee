"""Taking the place of one of Unicorn's internal functions, through the library's own jump table.

Unicorn calls its exported functions through the procedure linkage table, whose slots are ordinary writable memory.
Where a slot holds the address of a function, the function can be replaced by another. Everything here is an
optimization: when the slot is not found, things stay as they are.

:func:`skip_dirty_reset` removes a scan of the whole TLB at each translated block. The scan makes stores to the block's
page take the slow path again; the W^X bookkeeping of :mod:`lasskvm.engine.fill` has seen to that already.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
from llvmlite import ir

from lasskvm.engine import private
from lasskvm.engine.calibration import library_function
from lasskvm.engine.native import assembled

__all__ = ["skip_dirty_reset"]

_WORD_BYTES = 8
_LIBRARY = "libunicorn"


def skip_dirty_reset(tlb_fill: int) -> bool:
    """Skip the scan for CPUs whose ``tlb_fill`` is at *tlb_fill*; other Unicorn instances in the process keep it.

    The library must have translated a block before, so that the dynamic linker has filled the slot. Returns whether the
    slot was found.
    """
    original = library_function("tlb_reset_dirty_by_vaddr")
    slot = _jump_slot(original)
    if slot is None:
        return False
    ctypes.c_uint64.from_address(slot).value = _selective_function(original, tlb_fill)
    return True


@cache
def _jump_slot(function: int) -> int | None:
    """The address of the only word in the library's writable memory that holds *function*; None without one."""
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            if _LIBRARY not in line or "rw-" not in line:
                continue
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            words = np.ctypeslib.as_array(
                (ctypes.c_uint64 * ((end - start) // _WORD_BYTES)).from_address(start)
            )
            found += [start + _WORD_BYTES * int(index) for index in np.flatnonzero(words == function)]
    return found[0] if len(found) == 1 else None


@cache
def _selective_function(original: int, tlb_fill: int) -> int:
    """A function that does nothing for our CPUs and calls *original* for others."""
    word = ir.IntType(64)
    module = ir.Module("interpose")
    shape = ir.FunctionType(ir.VoidType(), [word, word, word])
    function = ir.Function(module, shape, "dirty_reset")
    builder = ir.IRBuilder(function.append_basic_block())
    slot = builder.add(function.args[0], word(private.CPU_TLB_FILL))
    ours = builder.icmp_unsigned(
        "==", builder.load(builder.inttoptr(slot, word.as_pointer())), word(tlb_fill)
    )
    with builder.if_then(builder.not_(ours)):
        builder.call(builder.inttoptr(word(original), shape.as_pointer()), function.args)
    builder.ret_void()
    return assembled(module)
