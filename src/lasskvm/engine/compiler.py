"""Python to machine code: one source, two ways to run it.

:func:`compiled` turns a plain function of the compiled subset, and every function it calls, into Numba code for Python
callers; :func:`object_file` turns callbacks into code for C. The originals stay what they were. Python integers have no
width and Numba's literals are signed, so the compiler first rewrites the function: every integer literal and every
integer global becomes a ``uint64``.

Importing Numba takes longer than starting a guest, so nothing imports this module before there is something to compile.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from lasskvm.engine import code_cache, machine_code
from lasskvm.engine.native import PRIMITIVES, SUBSTITUTES, Callback, ForeignCall, Load, Store, WordsAt

__all__ = ["compiled", "object_file"]


def object_file(callbacks: Iterable[Callback]) -> bytes:
    """The machine code of *callbacks* and all they call, under the callbacks' names."""
    return machine_code.object_file(_module(callback) for callback in callbacks)


@cache
def compiled(function: Callable[..., Any]) -> Any:
    """*function*, a plain function of the compiled subset, as a Numba dispatcher over ``uint64`` for Python callers."""
    rewritten = _rewritten(function)
    # Numba's cache tells functions apart by their names: not to be taken for the form without Python wrappers.
    rewritten.__qualname__ += "_for_python"
    return numba.njit(rewritten, **_options())


@cache
def _callee(function: Callable[..., Any]) -> Any:
    """The same for calls from other compiled functions only, which takes less time to compile."""
    return numba.njit(_rewritten(function), no_cpython_wrapper=True, no_cfunc_wrapper=True, **_options())


@cache
def _options() -> dict[str, Any]:
    # Numba's own cache looks only at the file of the outermost function; a change in a callee would go unnoticed. In a
    # folder for one version of all files it is right.
    keeps = code_cache.is_writable()
    if keeps:
        numba.config.CACHE_DIR = str(code_cache.location())
    return {"cache": keeps, "nogil": True, "error_model": "numpy"}


_UNSIGNED = {8: types.uint8, 16: types.uint16, 32: types.uint32, 64: types.uint64}


def _module(callback: Callback) -> llvm.ModuleRef:
    """The optimized code of *callback* with what it calls, all under Numba's names but the callback itself."""
    result = _UNSIGNED[callback.result_bits] if callback.result_bits else types.void
    signature = result(*(_UNSIGNED[bits] for bits in callback.argument_bits))
    native = numba.cfunc(signature, error_model="numpy")(_rewritten(callback.function))
    module = llvm.parse_assembly(native.inspect_llvm())
    module.get_function(native.native_name).name = callback.name
    return module


# ----------------------------------------------------------------------------------------------------- rewriting


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


def _rewritten(function: Callable[..., Any]) -> FunctionType:
    """*function* over ``uint64``, with its callees likewise."""
    assert isinstance(function, FunctionType)
    definition = _definitions(function.__code__.co_filename)[function.__name__]
    tree = ast.Module([copy.deepcopy(definition)], [])
    tree = ast.fix_missing_locations(_Unsigned().visit(tree))
    namespace: dict[str, Any] = {"__name__": function.__module__, "_uint64": np.uint64}
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
        function = SUBSTITUTES.get(value, value)
        if function in PRIMITIVES:
            _teach(function)
            return function
        return _callee(function)
    return value


# ---------------------------------------------------------------------------------------------------- primitives


@cache
def _teach(function: Callable[..., Any]) -> None:
    """Tell Numba the instructions of a primitive."""
    primitive = PRIMITIVES[function]
    if isinstance(primitive, Load):
        native_load = _load(primitive.bits)
        overload(function)(lambda address: lambda address: native_load(address))
    elif isinstance(primitive, Store):
        native_store = _store(primitive.bits)
        overload(function)(lambda address, value: lambda address, value: native_store(address, value))
    elif isinstance(primitive, WordsAt):
        overload(function)(
            lambda address, count: lambda address, count: numba.carray(_pointer(address), (count,), np.uint64)
        )
    elif isinstance(primitive, ForeignCall):
        native_call = _foreign_call(primitive.result_bits, primitive.argument_bits)
        overload(function)(
            lambda function, *arguments: lambda function, *arguments: native_call(function, arguments)
        )


def _load(bits: int) -> Any:
    word = ir.IntType(bits)

    @intrinsic  # type: ignore[untyped-decorator]
    def native_load(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = builder.load(builder.inttoptr(arguments[0], word.as_pointer()))
            value.align = 1
            return builder.zext(value, ir.IntType(64)) if bits < 64 else value

        return types.uint64(types.uint64), generate

    return native_load


def _store(bits: int) -> Any:
    word = ir.IntType(bits)

    @intrinsic  # type: ignore[untyped-decorator]
    def native_store(typing_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            number = builder.trunc(arguments[1], word) if bits < 64 else arguments[1]
            store = builder.store(number, builder.inttoptr(arguments[0], word.as_pointer()))
            store.align = 1
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64), generate

    return native_store


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.uint64), generate


def _foreign_call(result_bits: int, argument_bits: tuple[int, ...]) -> Any:
    integers = [ir.IntType(bits) for bits in argument_bits]
    function_type = ir.FunctionType(ir.IntType(result_bits) if result_bits else ir.VoidType(), integers)
    result_type = types.uint64 if result_bits else types.void

    @intrinsic  # type: ignore[untyped-decorator]
    def native_call(typing_context: Any, function: Any, arguments: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            members = [builder.extract_value(values[1], index) for index in range(len(argument_bits))]
            narrowed = [
                builder.trunc(member, integer) if integer.width < 64 else member
                for member, integer in zip(members, integers, strict=True)
            ]
            result = builder.call(builder.inttoptr(values[0], function_type.as_pointer()), narrowed)
            if not result_bits:
                return context.get_dummy_value()
            return builder.zext(result, ir.IntType(64)) if result_bits < 64 else result

        return result_type(types.uint64, types.UniTuple(types.uint64, len(argument_bits))), generate

    return native_call
