"""Machine code on disk: what is there is taken, what is wrong there is made again, and Numba is not asked."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from llvmlite import binding as llvm
from llvmlite import ir

from lasskvm.engine import code_cache, machine_code, native
from lasskvm.engine.code_cache import CodeFile

NAMES = ("one.function", "another.function")
CODE = b"machine code"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code_cache.location.cache_clear()
    yield tmp_path
    code_cache.location.cache_clear()


def kept(names: tuple[str, ...] = NAMES, code: bytes = CODE) -> Path:
    """The file in which *code* has been kept just now."""
    before = set(code_cache.location().glob("*.o"))
    assert CodeFile(names).renew(lambda: code) == code
    (path,) = set(code_cache.location().glob("*.o")) - before
    return path


def unexpected() -> bytes:
    raise AssertionError("this was to be read, not made")


# --------------------------------------------------------------------------------------------------------- files


def test_what_was_kept_is_there_for_the_next_process() -> None:
    assert CodeFile(NAMES).read() is None
    kept()
    assert CodeFile(NAMES).read() == CODE


def test_the_order_of_the_callbacks_does_not_matter_but_which_they_are() -> None:
    kept()
    assert CodeFile(NAMES[::-1]).read() == CODE
    assert CodeFile(NAMES[:1]).read() is None


@pytest.mark.parametrize("damage", ["truncated", "emptied", "changed", "longer", "folder"])
def test_damaged_file_is_not_taken_and_made_again(damage: str) -> None:
    path = kept()
    content = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(
            {
                "truncated": content[:-1],
                "emptied": b"",
                "changed": content[:-1] + bytes([content[-1] ^ 1]),
                "longer": content + b"\0",
            }[damage]
        )
    assert CodeFile(NAMES).read() is None
    assert CodeFile(NAMES).renew(lambda: b"new") == b"new"


def test_file_under_the_name_of_another_is_not_taken() -> None:
    theirs, ours = kept(NAMES[:1], b"theirs"), kept()
    theirs.replace(ours)
    assert CodeFile(NAMES).read() is None


def test_other_sources_versions_or_processors_have_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    kept()
    monkeypatch.setattr(code_cache.machine_code, "host", lambda: "another processor")
    code_cache._version.cache_clear()
    code_cache.location.cache_clear()
    try:
        assert CodeFile(NAMES).read() is None
    finally:
        code_cache._version.cache_clear()


def test_only_the_folders_of_a_few_versions_stay(home: Path) -> None:
    root = home / "lasskvm" / "native"
    for age in range(6):
        (root / f"version{age}").mkdir(parents=True)
        os.utime(root / f"version{age}", (10_000 - age, 10_000 - age))
    assert code_cache.is_writable()
    assert sorted(path.name for path in root.iterdir()) == sorted(
        [code_cache.location().name, "version0", "version1"]
    )


def test_nothing_but_the_whole_file_and_the_lock_is_left() -> None:
    path = kept()
    assert {path.name, "lock"} == {entry.name for entry in code_cache.location().iterdir()}


def test_cache_that_cannot_be_written_only_costs_time(home: Path) -> None:
    (home / "lasskvm").write_text("a file is in the way of the folder")
    assert not code_cache.is_writable()
    assert CodeFile(NAMES).renew(lambda: CODE) == CODE
    assert CodeFile(NAMES).read() is None


def test_second_process_waits_and_takes_what_the_first_has_made() -> None:
    results: list[bytes] = []
    begun, finish = threading.Event(), threading.Event()

    def make() -> bytes:
        begun.set()
        assert finish.wait(60)
        return CODE

    first = threading.Thread(target=lambda: results.append(CodeFile(NAMES).renew(make)))
    first.start()
    assert begun.wait(60)
    second = threading.Thread(target=lambda: results.append(CodeFile(NAMES).renew(unexpected)))
    second.start()
    time.sleep(0.05)
    assert second.is_alive()
    finish.set()
    first.join(60)
    second.join(60)
    assert results == [CODE, CODE]


# ------------------------------------------------------------------------------------------------------- linking


def a_module(calls: str | None = None) -> llvm.ModuleRef:
    """A function ``seven`` that returns 7; behind a condition that never holds, it calls *calls*."""
    word = ir.IntType(64)
    module = ir.Module("test")
    function = ir.Function(module, ir.FunctionType(word, [word]), "seven")
    builder = ir.IRBuilder(function.append_basic_block())
    if calls is not None:
        callee = ir.Function(module, ir.FunctionType(ir.VoidType(), []), calls)
        with builder.if_then(builder.icmp_unsigned("==", function.args[0], word(1))):
            builder.call(callee, [])
    builder.ret(word(7))
    return llvm.parse_assembly(str(module))


def test_object_file_is_linked_into_the_process() -> None:
    address = machine_code.linked(machine_code.object_file([a_module()]), ["seven"])["seven"]
    assert ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64)(address)(0) == 7


def test_bytes_that_are_no_object_file_are_an_error_and_no_crash() -> None:
    code = machine_code.object_file([a_module()])
    for wrong in (b"", b"text", code[: len(code) // 2], code[:64]):
        with pytest.raises(machine_code.CodeError):
            machine_code.linked(wrong, ["seven"])


def test_object_file_without_a_callback_is_an_error_and_no_crash() -> None:
    with pytest.raises(machine_code.CodeError, match="eight"):
        machine_code.linked(machine_code.object_file([a_module()]), ["eight"])


def test_exceptions_in_compiled_code_end_the_process_with_a_message() -> None:
    """Numba's code for them asks for functions that only Numba has."""
    code = machine_code.object_file([a_module(calls="numba_gil_ensure")])
    program = (
        "import sys, ctypes; from lasskvm.engine import machine_code\n"
        "address = machine_code.linked(sys.stdin.buffer.read(), ['seven'])['seven']\n"
        "function = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64)(address)\n"
        "print(function(0), flush=True); function(1)"
    )
    ended = subprocess.run([sys.executable, "-c", program], input=code, capture_output=True, check=False)
    assert ended.stdout == b"7\n"
    assert ended.returncode < 0
    assert b"compiled code of lasskvm raised an exception" in ended.stderr


def test_code_that_cannot_be_linked_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept(("seven",), b"this is no object file")
    compiled: list[tuple[str, ...]] = []

    def compile_them(names: tuple[str, ...]) -> bytes:
        compiled.append(names)
        return machine_code.object_file([a_module()])

    monkeypatch.setattr(native, "_compiled", compile_them)
    assert set(native._addresses(("seven",))) == {"seven"}
    native._addresses.cache_clear()
    assert set(native._addresses(("seven",))) == {"seven"}
    native._addresses.cache_clear()
    assert compiled == [("seven",)]
