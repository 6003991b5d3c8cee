"""Machine code in this process: LLVM modules and object files become functions that have addresses.

llvmlite alone does this; Numba takes part only where Python is compiled (:mod:`lasskvm.engine.compiler`). Code stays in
memory for the life of the process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache
from itertools import count
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

__all__ = ["CodeError", "assembled", "host", "linked", "object_file"]


class CodeError(Exception):
    """An object file that cannot be linked into this process; ``str(error)`` says what LLVM says."""


def host() -> str:
    """The processor that :func:`object_file` makes code for: its name and its features."""
    return f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"


def object_file(modules: Iterable[llvm.ModuleRef]) -> bytes:
    """One object file with the code of *modules*, which are used up; it is good for :func:`host` only.

    Functions that are neither in the modules nor exported by this process take the program down with a message. Those
    are Numba's: it has code for exceptions in every callback, and what this package compiles raises none.
    """
    whole, *others = modules
    for module in others:
        whole.link_in(module)
    if missing := [function.name for function in whole.functions if _is_missing(function)]:
        whole.link_in(llvm.parse_assembly(str(_stubs(missing))))
    # As Numba's own code generator has it: static relocation, and addresses of 64 bits, because nobody knows where
    # the code will be.
    machine = _target().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static",
        codemodel="jitdefault",
        jit=True,
    )
    return bytes(machine.emit_object(whole))


def linked(code: bytes, names: Iterable[str]) -> dict[str, int]:
    """The addresses of the functions *names* of the object file *code*, which is linked into this process.

    :raises CodeError: when it is no object file, when something is missing in it, or when it needs something that this
        process has not.
    """
    library = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    for name in names:
        library.export_symbol(name)
    loaded = _link(library)
    return {name: int(loaded[name]) for name in names}


def assembled(module: ir.Module) -> int:
    """The address of the machine code of the only function in *module*."""
    (function,) = module.functions
    return int(_link(llvm.JITLibraryBuilder().add_ir(module).export_symbol(function.name))[function.name])


# -------------------------------------------------------------------------------------------------- what is missing


def _is_missing(function: Any) -> bool:
    if not function.is_declaration or function.name.startswith("llvm."):
        return False
    return not hasattr(ctypes.pythonapi, function.name)


def _stubs(names: Iterable[str]) -> ir.Module:
    """Functions *names*, each of which ends the process by ``Py_FatalError()``, which needs no GIL."""
    module = ir.Module("stubs")
    text = bytearray(b"compiled code of lasskvm raised an exception\0")
    message = ir.GlobalVariable(module, ir.ArrayType(ir.IntType(8), len(text)), "fatal_message")
    message.linkage, message.global_constant = "internal", True
    message.initializer = ir.Constant(message.value_type, text)
    pointer = ir.IntType(8).as_pointer()
    fatal_error = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer]), "Py_FatalError")
    for name in names:
        stub = ir.Function(module, ir.FunctionType(ir.VoidType(), []), name)
        builder = ir.IRBuilder(stub.append_basic_block())
        builder.call(fatal_error, [builder.bitcast(message, pointer)])
        builder.unreachable()
    return module


# ------------------------------------------------------------------------------------------------------------- LLVM


@cache
def _target() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


@cache
def _jit() -> Any:
    machine = _target().create_target_machine(opt=2, jit=True)
    return llvm.create_lljit_compiler(machine, suppress_errors=True)


_libraries: list[Any] = []
_numbers = count()


def _link(library: Any) -> Any:
    try:
        loaded = library.link(_jit(), f"lasskvm{next(_numbers)}")
    except RuntimeError as error:
        raise CodeError(str(error)) from None
    _libraries.append(loaded)
    return loaded
