"""Python to machine code: one source, two ways to run it.

The architecture's rules are plain functions over integers. :func:`compiled` turns such a function, and every function
it calls, into Numba code; the originals stay what they were, so the emulator and the tests call the same source as
plain Python. Python integers have no width and Numba's literals are signed, so the compiler first rewrites the
function: every integer literal and every integer global becomes a ``uint64``. What such functions may use is listed in
``docs/architecture.md`` ("the compiled subset").

This module also holds the primitives that only the engine needs: loads and stores at host addresses and calls of C
functions. Each is a Numba intrinsic with a plain-Python counterpart over ctypes, so that functions using them run, and
are tested, both ways.
"""

from __future__ import annotations

import ast
import copy
import ctypes
import hashlib
import inspect
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar, cast

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

import lasskvm

__all__ = [
    "Callback", "assembled", "callback", "compile_all", "compiled", "foreign_function", "is_compiled", "load8",
    "load16", "load32", "load64", "store8", "store16", "store32", "store64", "substitute", "words_at",
]  # fmt: skip

_PACKAGE = Path(lasskvm.__file__).parent
#: The sources whose text decides whether cached machine code is still right.
_NATIVE_SOURCES = ("lass.py", "memory.py", "state.py", "x86", "emulator", "engine")
_KEPT_CACHES = 3
#: Stands in a cache folder that has everything.
_COMPLETE = "complete"

# ---------------------------------------------------------------------------------------------------- compiling

_substitutes: dict[Callable[..., Any], Callable[..., Any]] = {}


def substitute(function: Callable[..., Any], native: Callable[..., Any]) -> None:
    """Compile calls of *function* as calls of *native*: the seam where plain functions meet guest memory."""
    _substitutes[function] = native


@cache
def compiled(function: Callable[..., Any]) -> Any:
    """*function*, a plain function of the compiled subset, as a Numba dispatcher over ``uint64`` for Python callers."""
    rewritten = _rewritten(function, with_callees=True)
    # Numba's cache tells functions apart by their names: not to be taken for the form without Python wrappers.
    rewritten.__qualname__ += "_for_python"
    return numba.njit(rewritten, **_OPTIONS)


@cache
def _callee(function: Callable[..., Any]) -> Any:
    """The same for calls from other compiled functions only, which takes less time to compile."""
    rewritten = _rewritten(function, with_callees=True)
    return numba.njit(rewritten, no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)


_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}


class Callback:
    """A plain function that C code calls. Compiled when its address is first asked for."""

    _all: ClassVar[list[Callback]] = []

    def __init__(self, function: Callable[..., Any], signature: Any) -> None:
        self.function = function
        self._signature = signature
        self._all.append(self)

    @cached_property
    def address(self) -> int:
        """The address of the C function."""
        self._native = self._load_or_compile()
        return int(self._native.address)

    def _load_or_compile(self) -> Any:
        compiler = numba.cfunc(self._signature, cache=True, error_model="numpy")
        try:
            # Machine code in the cache needs no callees, and preparing them for the compiler takes longer than loading.
            return compiler(_rewritten(self.function, with_callees=False))
        except numba.core.errors.TypingError:
            return compiler(_rewritten(self.function, with_callees=True))


def callback(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Callback]:
    """Decorate a function of the compiled subset as a C function with these Numba types."""
    return lambda function: Callback(function, result(*arguments))


class _Unsigned(ast.NodeTransformer):
    """Makes every integer literal a ``uint64`` and drops what Numba does not need."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if type(node.value) is not int:
            return node
        return ast.copy_location(ast.Call(ast.Name("_uint64", ast.Load()), [node], []), node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        # Python's comparisons count as 0 and 1; Numba would make the sum of one and a uint64 signed.
        self.generic_visit(node)
        if isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
            node.left, node.right = _counted(node.left), _counted(node.right)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list, node.returns = [], None
        for argument in node.args.args:
            argument.annotation = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        assignment = ast.Assign([node.target], node.value)
        self.generic_visit(assignment)
        return ast.copy_location(assignment, node)


def _counted(operand: ast.expr) -> ast.expr:
    if isinstance(operand, ast.Compare):
        return ast.copy_location(ast.Call(ast.Name("_uint64", ast.Load()), [operand], []), operand)
    return operand


def _rewritten(function: Callable[..., Any], *, with_callees: bool) -> FunctionType:
    """*function* over ``uint64``; without callees it can be looked up in Numba's cache, but not compiled."""
    assert isinstance(function, FunctionType)
    definition = _definitions(function.__code__.co_filename)[function.__name__]
    tree = ast.Module([copy.deepcopy(definition)], [])
    tree = ast.fix_missing_locations(_Unsigned().visit(tree))
    namespace: dict[str, Any] = {"__name__": function.__module__, "_uint64": np.uint64}
    if with_callees:
        for name in _names(function.__code__):
            if name in function.__globals__:
                namespace[name] = _native_global(function.__globals__[name])
    exec(compile(tree, function.__code__.co_filename, "exec"), namespace)
    rewritten = namespace[function.__name__]
    rewritten.__qualname__ = function.__qualname__
    return rewritten  # type: ignore[no-any-return]


@cache
def _definitions(path: str) -> dict[str, ast.FunctionDef]:
    """The top-level functions in a source file."""
    body = ast.parse(Path(path).read_bytes()).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def _names(code: Any) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if inspect.iscode(constant):
            names |= _names(constant)
    return names


def _native_global(value: Any) -> Any:
    if type(value) is int:
        return np.uint64(value)
    if isinstance(value, tuple) and all(type(item) is int for item in value):
        return tuple(np.uint64(item) for item in value)
    if isinstance(value, FunctionType):
        if value in _substitutes:
            value = _substitutes[value]
        if isinstance(value, FunctionType) and not hasattr(value, "is_primitive"):
            return _callee(value)
    return value


def is_compiled() -> bool:
    """Whether the machine code of all callbacks is in the cache, so that it only has to be loaded."""
    return (Path(numba.config.CACHE_DIR) / _COMPLETE).exists()


def compile_all() -> None:
    """Compile, or load from the cache, all callbacks of the modules imported so far."""
    for one in Callback._all:
        _ = one.address
    (Path(numba.config.CACHE_DIR) / _COMPLETE).touch()


def _prepare_cache() -> None:
    """Point Numba's cache at a folder named after everything that decides the machine code.

    Numba itself looks only at the file of the outermost function; a change in a callee would go unnoticed.
    """
    digest = hashlib.sha256(f"{numba.__version__} {np.__version__} {sys.version}".encode())
    for name in _NATIVE_SOURCES:
        path = _PACKAGE / name
        for source in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(source.read_bytes())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lasskvm" / "native"
    folder = root / digest.hexdigest()[:16]
    if not folder.exists():
        folder.mkdir(parents=True)
        former = sorted(root.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in former[_KEPT_CACHES:]:
            shutil.rmtree(old, ignore_errors=True)
    numba.config.CACHE_DIR = str(folder)


_prepare_cache()

# --------------------------------------------------------------------------------------------------- primitives


def _primitive(function: Any) -> Any:
    function.is_primitive = True
    return function


def _make_load(bits: int) -> Callable[[int], int]:
    word = ir.IntType(bits)
    python_type = getattr(ctypes, f"c_uint{bits}")

    @intrinsic  # type: ignore[untyped-decorator]
    def native_load(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = builder.load(builder.inttoptr(arguments[0], word.as_pointer()))
            value.align = 1
            return builder.zext(value, ir.IntType(64)) if bits < 64 else value

        return types.uint64(types.uint64), generate

    @_primitive
    def load(address: int) -> int:
        return int(python_type.from_address(address).value)

    load.__name__ = load.__qualname__ = f"load{bits}"
    load.__doc__ = f"The unsigned {bits}-bit word at host *address*, as 64 bits."
    overload(load)(lambda address: lambda address: native_load(address))
    return cast("Callable[[int], int]", load)


def _make_store(bits: int) -> Callable[[int, int], None]:
    word = ir.IntType(bits)
    python_type = getattr(ctypes, f"c_uint{bits}")

    @intrinsic  # type: ignore[untyped-decorator]
    def native_store(typing_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            number = builder.trunc(arguments[1], word) if bits < 64 else arguments[1]
            store = builder.store(number, builder.inttoptr(arguments[0], word.as_pointer()))
            store.align = 1
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64), generate

    @_primitive
    def store(address: int, value: int) -> None:
        python_type.from_address(address).value = value

    store.__name__ = store.__qualname__ = f"store{bits}"
    store.__doc__ = f"Store the low {bits} bits of *value* at host *address*."
    overload(store)(lambda address, value: lambda address, value: native_store(address, value))
    return cast("Callable[[int, int], None]", store)


load8, load16, load32, load64 = (_make_load(bits) for bits in (8, 16, 32, 64))
store8, store16, store32, store64 = (_make_store(bits) for bits in (8, 16, 32, 64))


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.uint64), generate


@_primitive
def words_at(address: int, count: int) -> Any:
    """The *count* 64-bit words at host *address*, indexable: the form in which plain functions take a vCPU's state."""
    return (ctypes.c_uint64 * count).from_address(address)


overload(words_at)(
    lambda address, count: lambda address, count: numba.carray(_pointer(address), (count,), np.uint64)
)


@cache
def _machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(opt=2, jit=True)


def assembled(module: ir.Module) -> int:
    """The address of the machine code of the only function in *module*; it stays for the life of the process."""
    (function,) = module.functions
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), _machine())
    engine.finalize_object()
    _assembled.append(engine)
    return int(engine.get_function_address(function.name))


_assembled: list[llvm.ExecutionEngine] = []


def foreign_function(result_bits: int, *argument_bits: int) -> Any:
    """A caller for C functions of one shape: ``call(function_address, *arguments)``, all as ``uint64``.

    *result_bits* 0 means void. Narrow arguments are truncated, a narrow result is zero-extended.
    """
    integer = {bits: ir.IntType(bits) for bits in (8, 32, 64)}
    result_type = integer[result_bits] if result_bits else ir.VoidType()
    function_type = ir.FunctionType(result_type, [integer[bits] for bits in argument_bits])
    numba_result = types.uint64 if result_bits else types.void
    ctypes_integer = {8: ctypes.c_uint8, 32: ctypes.c_uint32, 64: ctypes.c_uint64}
    prototype = ctypes.CFUNCTYPE(
        ctypes_integer[result_bits] if result_bits else None,
        *(ctypes_integer[bits] for bits in argument_bits),
    )

    @intrinsic  # type: ignore[untyped-decorator]
    def native_call(typing_context: Any, function: Any, arguments: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            members = [builder.extract_value(values[1], index) for index in range(len(argument_bits))]
            narrowed = [
                builder.trunc(member, integer[bits]) if bits < 64 else member
                for member, bits in zip(members, argument_bits, strict=True)
            ]
            result = builder.call(builder.inttoptr(values[0], function_type.as_pointer()), narrowed)
            if not result_bits:
                return context.get_dummy_value()
            return builder.zext(result, ir.IntType(64)) if result_bits < 64 else result

        return numba_result(types.uint64, types.UniTuple(types.uint64, len(argument_bits))), generate

    @_primitive
    def call(function: int, *arguments: int) -> Any:
        return prototype(function)(*arguments)

    overload(call)(lambda function, *arguments: lambda function, *arguments: native_call(function, arguments))
    return call
