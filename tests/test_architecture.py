"""The house stands: layers, one place for each rule and each secret, modules that fit in a head."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lasskvm"
MODULES = sorted(PACKAGE.rglob("*.py"))
#: Modules are about 400 lines; one that has outgrown this has a second subject.
LONGEST_MODULE = 480

LAYERS = [
    "cli",
    "(conformance) | (audit) | (fuzz) | images",
    "machine",
    "kvm",
    "engine | (vmx) | (sgx)",
    "emulator",
    "memory | state",
    "x86",
    "lass",
]

#: The primitives of engine/native.py that read and write host memory.
HOST_ACCESSES = {f"{verb}{bits}" for verb in ("load", "store") for bits in (8, 16, 32, 64)}
#: What the addresses of Unicorn's own structures are called.
UNICORN_STRUCTURES = {"env", "cpu", "uc"}
#: Offsets in Unicorn's structures that other modules may use: to find one structure from the other, and the
#: slot that is replaced.
PUBLIC_OFFSETS = {"CPU_ENV", "CPU_TLB_FILL"}
#: Smaller numbers are too common to tell anything.
SMALLEST_TELLING_OFFSET = 0x200


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def names_in(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Each call of a function in *path*, with the function's name."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.func.id, node
            elif isinstance(node.func, ast.Attribute):
                yield node.func.attr, node


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """The ``(module, name)`` pairs of ``from module import name`` in *path*."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.module or "", alias.name


def modules_that_call(function: str) -> set[str]:
    return {name_of(path) for path in MODULES if any(called == function for called, _ in calls(path))}


# ------------------------------------------------------------------------------------------------------- layers


def test_imports_keep_the_contracts() -> None:
    program = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_contract_is_the_layer_order_of_the_documentation() -> None:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(contract for contract in configuration["contracts"] if contract["type"] == "layers")
    assert layers["layers"] == LAYERS
    assert layers["exhaustive"]
    assert not any(contract.get("ignore_imports") for contract in configuration["contracts"])


def test_every_room_has_its_place_in_the_contract() -> None:
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    rooms -= {"__pycache__", "__init__", "__main__", "errors"}
    placed = {room.strip(" ()") for layer in LAYERS for room in layer.split("|")}
    assert rooms <= placed


# ---------------------------------------------------------------------------------------------- one rule, one walk


def test_the_rule_and_the_page_walk_are_defined_once() -> None:
    for function, home in (("is_lass_violation", "lass.py"), ("walk", "x86/paging.py"), ("translate", None)):
        homes = [
            name_of(path)
            for path in MODULES
            for node in syntax(path).body
            if isinstance(node, ast.FunctionDef) and node.name == function
        ]
        assert homes == [home or "emulator/mmu.py"], function


def test_rule_and_walk_meet_in_one_module() -> None:
    # `lasskvm explain` asks the rule about an access that nobody makes.
    assert modules_that_call("is_lass_violation") == {"lass.py", "emulator/mmu.py", "cli/explanation.py"}
    walkers = {name_of(path) for path in MODULES if ("lasskvm.x86.paging", "walk") in imports(path)}
    assert walkers == {"emulator/mmu.py"}


def test_fill_and_emulator_call_the_same_translation() -> None:
    for module in ("engine/fill.py", "engine/entry.py", "emulator/context.py", "emulator/delivery.py"):
        assert ("lasskvm.emulator.mmu", "translate") in imports(PACKAGE / module), module


def test_cr4_lass_is_tested_nowhere_but_in_the_rule() -> None:
    """Others may set the bit, allow it and say that translations depend on it; they do not ask for it."""
    for path in MODULES:
        # The conformance guests look at what a guest has done to its CR4.
        if name_of(path) == "lass.py" or name_of(path).startswith("conformance/"):
            continue
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
                operands = names_in(node.left) | names_in(node.right)
                operands |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
                assert "CR4_LASS" not in operands, f"{name_of(path)}:{node.lineno}"


def test_page_table_entries_are_read_by_the_walk_alone() -> None:
    """Whoever else imports their bits builds tables; rights are combined in one place."""
    readers = {
        name_of(path)
        for path in MODULES
        if {name for module, name in imports(path) if module == "lasskvm.x86.paging"} & {"PTE_U", "PTE_XD"}
    }
    assert readers <= {
        "conformance/layout.py",
        "conformance/demo_kernel.py",
        "conformance/demo.py",
        "fuzz/layout.py",
    }


# --------------------------------------------------------------------------------------------- Unicorn's secrets


def private_offsets() -> dict[int, str]:
    """The numbers that engine/private.py gives names of Unicorn's structures to."""
    found = {}
    for node in syntax(PACKAGE / "engine" / "private.py").body:
        if not isinstance(node, ast.Assign):
            continue
        (target,) = node.targets
        targets = target.elts if isinstance(target, ast.Tuple) else [target]
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        for name, value in zip(targets, values, strict=False):
            if (
                isinstance(name, ast.Name)
                and isinstance(value, ast.Constant)
                and isinstance(value.value, int)
            ):
                found[value.value] = name.id
    return found


def test_offsets_of_private_fields_are_written_in_one_module() -> None:
    offsets = {value: name for value, name in private_offsets().items() if value >= SMALLEST_TELLING_OFFSET}
    offsets = {value: name for value, name in offsets.items() if value & (value + 1) and value & (value - 1)}
    assert len(offsets) > 10
    for path in sorted((PACKAGE / "engine").glob("*.py")):
        if path.name == "private.py":
            continue
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.Constant) and type(node.value) is int:
                assert node.value not in offsets, f"{name_of(path)}:{node.lineno} has {offsets[node.value]}"


def test_only_private_reads_and_writes_unicorns_structures() -> None:
    for path in MODULES:
        if path == PACKAGE / "engine" / "private.py":
            continue
        for called, node in calls(path):
            if called in HOST_ACCESSES:
                found = names_in(node.args[0]) & UNICORN_STRUCTURES
                assert not found, f"{name_of(path)}:{node.lineno} accesses {found}"


def test_host_memory_is_accessed_by_the_engine_only() -> None:
    for path in MODULES:
        if path.parent != PACKAGE / "engine":
            taken = {name for module, name in imports(path) if module == "lasskvm.engine.native"}
            assert not taken & HOST_ACCESSES, name_of(path)


def test_private_names_stay_private() -> None:
    for path in MODULES:
        taken = {name for module, name in imports(path) if module == "lasskvm.engine.private"}
        offsets = {name for name in taken if name in private_offsets().values()}
        assert offsets <= PUBLIC_OFFSETS | {"MMU_KERNEL", "MMU_USER", "MMU_KERNEL_NO_SMAP", "FEATURE_WORDS"}
        assert not [name for name in taken if name.startswith("_")], name_of(path)
        for node in ast.walk(syntax(path)):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "private"
            ):
                assert not node.attr.startswith("_"), f"{name_of(path)}:{node.lineno}"


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_fits_in_a_head_and_says_what_it_is_for(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_MODULE
    assert ast.get_docstring(syntax(path))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_functions_and_classes_are_documented(path: Path) -> None:
    for owner in (syntax(path), *(node for node in syntax(path).body if isinstance(node, ast.ClassDef))):
        if isinstance(owner, ast.ClassDef) and owner.name.startswith("_"):
            continue
        for node in owner.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name_of(path)}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_functions_are_typed(path: Path) -> None:
    """Callbacks have no annotations: their C signature stands in the decorator."""
    for node in syntax(path).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            if any(
                isinstance(mark, ast.Call) and names_in(mark.func) == {"callback"}
                for mark in node.decorator_list
            ):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            missing = [argument.arg for argument in arguments if argument.annotation is None]
            assert not missing, f"{name_of(path)}:{node.lineno} {node.name}: {missing}"
            assert node.returns is not None, f"{name_of(path)}:{node.lineno} {node.name}"
