"""Taking the place of two of Unicorn's internal functions, through the library's own jump table.

Unicorn calls its exported functions through the procedure linkage table, whose slots are words in its memory that the
dynamic linker fills in. Another function's address there takes the place of the original. Slots belong to the whole
process, so what is put there looks whose CPU it is called for.

:func:`look_at_instructions` lets :mod:`lasskvm.engine.translation` see each instruction before it is translated.

:func:`skip_dirty_reset` removes a scan of the whole TLB at each translated block. The scan makes stores to the block's
page take the slow path again; the W^X bookkeeping of :mod:`lasskvm.engine.fill` has seen to that already. It is an
optimization: where the slot cannot be found, things stay as they are.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from lasskvm.engine import private, translation
from lasskvm.engine.calibration import library_function, refusal
from lasskvm.engine.context import CODE_PAGE, FN_TRANSLATE_INSTRUCTION, NO_ADDRESS
from lasskvm.engine.machine_code import assembled

__all__ = ["look_at_instructions", "skip_dirty_reset"]

# ELF (System V ABI, chapters 4 and 5; x86-64 supplement 4.4)
_PROGRAM_HEADERS_OFFSET, _PROGRAM_HEADER_COUNT = 32, 56
_PROGRAM_HEADER = np.dtype(
    [("type", "<u4"), ("flags", "<u4"), ("offset", "<u8"), ("address", "<u8"), ("rest", "V32")]
)
_PT_DYNAMIC = 2
_DYNAMIC_ENTRY = np.dtype([("tag", "<u8"), ("value", "<u8")])
_DT_NULL, _DT_PLTRELSZ, _DT_SYMTAB, _DT_JMPREL = 0, 2, 6, 23
_RELOCATION = np.dtype([("offset", "<u8"), ("type", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])
_SYMBOL = np.dtype([("name", "<u4"), ("kind", "V4"), ("value", "<u8"), ("size", "<u8")])
_MOST_DYNAMIC_ENTRIES = 256

_WORD = ir.IntType(64)
_NUMBER = ir.IntType(32)


def look_at_instructions(tlb_fill: int) -> None:
    """Have :func:`lasskvm.engine.translation.translate_instruction` called for each instruction that is translated.

    Only CPUs whose ``tlb_fill`` is at *tlb_fill* take part. Raises :class:`HostError` when that cannot be arranged.
    """
    original = library_function("translator_loop")
    if not _replace(original, _translator_loop(original, tlb_fill)):
        raise refusal("the jump slot of translator_loop")


def skip_dirty_reset(tlb_fill: int) -> bool:
    """Skip the scan for CPUs whose ``tlb_fill`` is at *tlb_fill*; other Unicorn instances in the process keep it.

    Returns whether the slot was found.
    """
    original = library_function("tlb_reset_dirty_by_vaddr")
    return _replace(original, _dirty_reset(original, tlb_fill))


# ------------------------------------------------------------------------------------------------ the jump table


def _replace(original: int, replacement: int) -> bool:
    """Let the library call *replacement* for *original*; False where it has no slot that can be written."""
    slot = _jump_slot(original)
    if slot is None or not _is_writable(slot):
        return False
    ctypes.c_uint64.from_address(slot).value = replacement
    return True


@cache
def _jump_slot(function: int) -> int | None:
    """The address of the jump slot of the library's exported *function*; None without one."""
    base = _library_base(function)
    dynamic = _dynamic_section(base)
    if not {_DT_JMPREL, _DT_PLTRELSZ, _DT_SYMTAB} <= dynamic.keys():
        return None
    size = dynamic[_DT_PLTRELSZ]
    relocations = _array(_absolute(base, dynamic[_DT_JMPREL]), size // _RELOCATION.itemsize, _RELOCATION)
    highest = int(relocations["symbol"].max(initial=0))
    symbols = _array(_absolute(base, dynamic[_DT_SYMTAB]), highest + 1, _SYMBOL)
    slots = relocations["offset"][symbols["value"][relocations["symbol"]] == function - base]
    return base + int(slots[0]) if len(slots) == 1 else None


class _SymbolInformation(ctypes.Structure):
    """``Dl_info`` of ``dladdr()``."""

    _fields_ = (
        ("file_name", ctypes.c_char_p),
        ("file_base", ctypes.c_void_p),
        ("symbol_name", ctypes.c_char_p),
        ("symbol_address", ctypes.c_void_p),
    )


def _library_base(function: int) -> int:
    """Where the library that holds *function* is loaded."""
    information = _SymbolInformation()
    ctypes.CDLL(None).dladdr(ctypes.c_void_p(function), ctypes.byref(information))
    return information.file_base or 0


def _dynamic_section(base: int) -> dict[int, int]:
    """The dynamic section of the library at *base*: values by tag."""
    headers = base + ctypes.c_uint64.from_address(base + _PROGRAM_HEADERS_OFFSET).value
    count = ctypes.c_uint16.from_address(base + _PROGRAM_HEADER_COUNT).value
    for header in _array(headers, count, _PROGRAM_HEADER):
        if header["type"] == _PT_DYNAMIC:
            section = {}
            for index in range(_MOST_DYNAMIC_ENTRIES):
                address = base + int(header["address"]) + index * _DYNAMIC_ENTRY.itemsize
                entry = _array(address, 1, _DYNAMIC_ENTRY)[0]
                if entry["tag"] == _DT_NULL:
                    break
                section[int(entry["tag"])] = int(entry["value"])
            return section
    return {}


def _absolute(base: int, address: int) -> int:
    """The address of a table: some dynamic linkers leave it relative to *base*."""
    return address if address >= base else base + address


def _array(address: int, count: int, kind: np.dtype[np.void]) -> NDArray[np.void]:
    buffer = (ctypes.c_char * (count * kind.itemsize)).from_address(address)
    return np.ndarray((count,), kind, memoryview(buffer))


def _is_writable(address: int) -> bool:
    with open("/proc/self/maps") as maps:
        for line in maps:
            bounds, permissions, *_ = line.split()
            start, end = (int(part, 16) for part in bounds.split("-"))
            if start <= address < end:
                return "w" in permissions
    return False


# ------------------------------------------------------------------------------------------- what is put there


@cache
def _translator_loop(original: int, tlb_fill: int) -> int:
    """``translator_loop(operations, block, cpu, tb, max_instructions)`` with our own function for one instruction.

    The original gets a copy of the table *operations*; the function that stood in it goes to the context.
    """
    module = ir.Module("translator_loop")
    shape = ir.FunctionType(ir.VoidType(), [_WORD, _WORD, _WORD, _WORD, _NUMBER])
    function = ir.Function(module, shape, "translator_loop")
    operations, _, cpu, _, _ = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    table = builder.alloca(_WORD, private.TRANSLATOR_FUNCTIONS)
    chosen = builder.alloca(_WORD)
    builder.store(operations, chosen)
    with builder.if_then(_is_ours(builder, cpu, tlb_fill)):
        theirs = builder.inttoptr(operations, _WORD.as_pointer())
        for index in range(private.TRANSLATOR_FUNCTIONS):
            entry = builder.load(builder.gep(theirs, [_WORD(index)]))
            if index == private.TRANSLATE_INSTRUCTION:
                context = builder.inttoptr(_load(builder, cpu, private.CPU_CONTEXT), _WORD.as_pointer())
                builder.store(entry, builder.gep(context, [_WORD(FN_TRANSLATE_INSTRUCTION)]))
                builder.store(_WORD(NO_ADDRESS), builder.gep(context, [_WORD(CODE_PAGE)]))
                entry = _WORD(translation.translate_instruction.address)
            builder.store(entry, builder.gep(table, [_WORD(index)]))
        builder.store(builder.ptrtoint(table, _WORD), chosen)
    arguments = [builder.load(chosen), *function.args[1:]]
    builder.call(builder.inttoptr(_WORD(original), shape.as_pointer()), arguments)
    builder.ret_void()
    return assembled(module)


@cache
def _dirty_reset(original: int, tlb_fill: int) -> int:
    """A function that does nothing for our CPUs and calls *original* for others."""
    module = ir.Module("dirty_reset")
    shape = ir.FunctionType(ir.VoidType(), [_WORD, _WORD, _WORD])
    function = ir.Function(module, shape, "dirty_reset")
    builder = ir.IRBuilder(function.append_basic_block())
    with builder.if_then(builder.not_(_is_ours(builder, function.args[0], tlb_fill))):
        builder.call(builder.inttoptr(_WORD(original), shape.as_pointer()), function.args)
    builder.ret_void()
    return assembled(module)


def _is_ours(builder: ir.IRBuilder, cpu: ir.Value, tlb_fill: int) -> ir.Value:
    return builder.icmp_unsigned("==", _load(builder, cpu, private.CPU_TLB_FILL), _WORD(tlb_fill))


def _load(builder: ir.IRBuilder, base: ir.Value, offset: int) -> ir.Value:
    return builder.load(builder.inttoptr(builder.add(base, _WORD(offset)), _WORD.as_pointer()))
