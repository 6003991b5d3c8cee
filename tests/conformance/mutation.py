"""Mutants of plain functions: one condition, constant or flag changed at a time, by rewriting their source.

A mutant takes the place of its original by its code object, so whoever has imported the function calls the mutant.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Add: ast.Sub, ast.Sub: ast.Add,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One changed function: where, what was there, and what is."""

    function: Callable[..., object]
    line: int
    before: str
    after: str
    code: CodeType

    @property
    def name(self) -> str:
        return f"{self.function.__name__}: {self.before} -> {self.after}"

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The original's callers call the mutant."""
        function = self.function
        assert isinstance(function, FunctionType)
        original = function.__code__
        function.__code__ = self.code
        try:
            yield
        finally:
            function.__code__ = original


def mutants(function: Callable[..., object], *, dropped: tuple[str, ...] = ()) -> Iterator[Mutant]:
    """Every mutant of *function*.

    Comparisons are negated, ``and`` and ``or``, ``&`` and ``|``, ``+`` and ``-`` are exchanged, ``not`` is left out,
    numbers are off by one, and each of the names *dropped* (flags, arguments) becomes 0 where it is used.
    """
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list, definition.returns = [], None
    for argument in definition.args.args:
        argument.annotation = None
    # The docstring is not to be mutated.
    del definition.body[0]
    for number, node in enumerate(ast.walk(definition)):
        for change in _changes(node, dropped):
            changed = copy.deepcopy(definition)
            target = list(ast.walk(changed))[number]
            replacement = change(copy.deepcopy(target))
            _Replace(target, replacement).visit(changed)
            yield Mutant(
                function,
                getattr(node, "lineno", 0),
                ast.unparse(node),
                ast.unparse(replacement),
                _compiled(function, changed),
            )


_Change = Callable[[ast.AST], ast.AST]


def _changes(node: ast.AST, dropped: tuple[str, ...]) -> Iterator[_Change]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield _negated
    elif isinstance(node, ast.BoolOp):
        yield _exchanged_bool
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield _exchanged
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield _affirmed
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield _off_by_one
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in dropped:
        yield lambda name: ast.Constant(0)


def _negated(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.Compare)
    node.ops = [COMPARISONS[type(node.ops[0])]()]
    return node


def _exchanged_bool(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.BoolOp)
    node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    return node


def _exchanged(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.BinOp)
    node.op = OPERATORS[type(node.op)]()
    return node


def _affirmed(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.UnaryOp)
    return node.operand


def _off_by_one(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.Constant)
    value = node.value
    assert isinstance(value, int)
    return ast.Constant(value - 1 if value else 1)


class _Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, replacement: ast.AST) -> None:
        self._target = target
        self._replacement = replacement

    def visit(self, node: ast.AST) -> ast.AST:
        return self._replacement if node is self._target else super().visit(node)


def _compiled(function: Callable[..., object], definition: ast.FunctionDef) -> CodeType:
    assert isinstance(function, FunctionType)
    namespace = dict(function.__globals__)
    tree = ast.fix_missing_locations(ast.Module([definition], []))
    exec(compile(tree, "<mutant>", "exec", dont_inherit=True), namespace)
    mutant = namespace[definition.name]
    assert isinstance(mutant, FunctionType)
    return mutant.__code__
