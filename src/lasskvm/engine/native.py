"""What compiled functions may do beyond integers, and the callbacks that they become.

The architecture's rules are plain functions over integers, which the emulator and the tests call as they are. A
:class:`Callback` is such a function as C code: :mod:`lasskvm.engine.compiler` makes it and every function it calls into
machine code, once for a machine; :mod:`lasskvm.engine.code_cache` keeps that, and then Numba is not even imported. What
such functions may use is listed in ``docs/architecture.md`` ("the compiled subset").

This module also holds the primitives that only the engine needs: loads and stores at host addresses and calls of C
functions. They are plain Python over ctypes here, so that functions using them run, and are tested, both ways;
:data:`PRIMITIVES` tells the compiler what they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from lasskvm.engine import code_cache, machine_code

__all__ = [
    "PRIMITIVES", "SUBSTITUTES", "Callback", "ForeignCall", "Load", "Store", "WordsAt", "callback", "compile_all",
    "foreign_function", "is_compiled", "load8", "load16", "load32", "load64", "store8", "store16", "store32", "store64",
    "substitute", "words_at",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------- callbacks

#: What takes the place of plain functions in compiled code (:func:`substitute`).
SUBSTITUTES: dict[Callable[..., Any], Callable[..., Any]] = {}


def substitute(function: Callable[..., Any], native: Callable[..., Any]) -> None:
    """Compile calls of *function* as calls of *native*: the seam where plain functions meet guest memory."""
    SUBSTITUTES[function] = native


@dataclass(frozen=True, eq=False)
class Callback:
    """A plain function that C code calls. Its machine code is there when its address is first asked for."""

    function: Callable[..., Any]
    #: The widths of the C function's result (0 for void) and arguments, all unsigned integers.
    result_bits: int
    argument_bits: tuple[int, ...]

    @property
    def name(self) -> str:
        """What the C function is called in object files."""
        return f"{self.function.__module__}.{self.function.__qualname__}"

    @cached_property
    def address(self) -> int:
        """The address of the C function."""
        return _addresses(tuple(sorted(_callbacks)))[self.name]


_callbacks: dict[str, Callback] = {}


def callback(result_bits: int, *argument_bits: int) -> Callable[[Callable[..., Any]], Callback]:
    """Decorate a function of the compiled subset as a C function over unsigned integers of these widths.

    *result_bits* 0 means void. The function gets narrow arguments as they are, and its result is truncated.
    """

    def decorate(function: Callable[..., Any]) -> Callback:
        made = Callback(function, result_bits, argument_bits)
        _callbacks[made.name] = made
        return made

    return decorate


def is_compiled() -> bool:
    """Whether the machine code of all callbacks is in the cache, so that it only has to be loaded."""
    return code_cache.CodeFile(tuple(_callbacks)).read() is not None


def compile_all() -> None:
    """Compile, or load from the cache, all callbacks of the modules imported so far."""
    for one in _callbacks.values():
        _ = one.address


@cache
def _addresses(names: tuple[str, ...]) -> dict[str, int]:
    """The addresses of the callbacks *names*, whose code is loaded now."""
    file = code_cache.CodeFile(names)
    code = file.read()
    if code is not None:
        # If compiling it again does not help, the same error comes from below.
        with suppress(machine_code.CodeError):
            return machine_code.linked(code, names)
    return machine_code.linked(file.renew(lambda: _compiled(names)), names)


def _compiled(names: tuple[str, ...]) -> bytes:
    from lasskvm.engine.compiler import object_file

    return object_file([_callbacks[name] for name in names])


# --------------------------------------------------------------------------------------------------- primitives


@dataclass(frozen=True)
class Load:
    """A load of an unsigned word from a host address, zero-extended."""

    bits: int


@dataclass(frozen=True)
class Store:
    """A store of the low bits of a word to a host address."""

    bits: int


@dataclass(frozen=True)
class WordsAt:
    """A view of 64-bit words."""


@dataclass(frozen=True)
class ForeignCall:
    """A call of a C function over unsigned integers; *result_bits* is 0 for void."""

    result_bits: int
    argument_bits: tuple[int, ...]


#: The functions that the compiler has instructions of its own for.
PRIMITIVES: dict[Callable[..., Any], Load | Store | WordsAt | ForeignCall] = {}

_C_INTEGERS: dict[int, Any] = {
    8: ctypes.c_uint8,
    16: ctypes.c_uint16,
    32: ctypes.c_uint32,
    64: ctypes.c_uint64,
}


def _make_load(bits: int) -> Callable[[int], int]:
    word = _C_INTEGERS[bits]

    def load(address: int) -> int:
        return int(word.from_address(address).value)

    load.__name__ = load.__qualname__ = f"load{bits}"
    load.__doc__ = f"The unsigned {bits}-bit word at host *address*, as 64 bits."
    PRIMITIVES[load] = Load(bits)
    return load


def _make_store(bits: int) -> Callable[[int, int], None]:
    word = _C_INTEGERS[bits]

    def store(address: int, value: int) -> None:
        word.from_address(address).value = value

    store.__name__ = store.__qualname__ = f"store{bits}"
    store.__doc__ = f"Store the low {bits} bits of *value* at host *address*."
    PRIMITIVES[store] = Store(bits)
    return store


load8, load16, load32, load64 = (_make_load(bits) for bits in (8, 16, 32, 64))
store8, store16, store32, store64 = (_make_store(bits) for bits in (8, 16, 32, 64))


def words_at(address: int, count: int) -> Any:
    """The *count* 64-bit words at host *address*, indexable: the form in which plain functions take a vCPU's state."""
    return (ctypes.c_uint64 * count).from_address(address)


PRIMITIVES[words_at] = WordsAt()


def foreign_function(result_bits: int, *argument_bits: int) -> Any:
    """A caller for C functions of one shape: ``call(function_address, *arguments)``, all as ``uint64``.

    *result_bits* 0 means void. Narrow arguments are truncated, a narrow result is zero-extended.
    """
    prototype = ctypes.CFUNCTYPE(
        _C_INTEGERS[result_bits] if result_bits else None, *(_C_INTEGERS[bits] for bits in argument_bits)
    )

    def call(function: int, *arguments: int) -> Any:
        return prototype(function)(*arguments)

    PRIMITIVES[call] = ForeignCall(result_bits, argument_bits)
    return call
