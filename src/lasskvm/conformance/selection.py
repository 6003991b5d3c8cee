"""Expressions that select runs by name, as pytest's ``-k`` does.

``stack and not mmio`` takes runs in whose name (id, group or variant) ``stack`` occurs and ``mmio`` does not; there are
``and``, ``or``, ``not`` and parentheses, and case does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from lasskvm.errors import LassKvmError

__all__ = ["Selector", "SelectionError", "parse_selection"]

Selector = Callable[[str], bool]

_TOKEN = re.compile(r"\s*(?:(?P<bracket>[()])|(?P<word>[^\s()]+))")
_OPERATORS = ("and", "or", "not")


class SelectionError(LassKvmError):
    """An expression that is none."""


def parse_selection(expression: str) -> Selector:
    """A predicate over names. An empty expression takes everything.

    Raises :class:`SelectionError`.

    >>> parse_selection("stack and not (mmio or off)")("stack/push [lass] stack lass")
    True
    """
    tokens = [match["bracket"] or match["word"] for match in _TOKEN.finditer(expression)]
    if not tokens:
        return lambda name: True
    parser = _Parser(expression, tokens)
    selector = parser.disjunction()
    parser.expect_end()
    return lambda name: selector(name.lower())


class _Parser:
    """Recursive descent: ``or`` binds weakest, ``not`` strongest."""

    def __init__(self, expression: str, tokens: list[str]) -> None:
        self._expression = expression
        self._tokens = tokens
        self._position = 0

    def disjunction(self) -> Selector:
        parts = [self._conjunction()]
        while self._take("or"):
            parts.append(self._conjunction())
        return parts[0] if len(parts) == 1 else lambda name: any(part(name) for part in parts)

    def _conjunction(self) -> Selector:
        parts = [self._negation()]
        while self._take("and"):
            parts.append(self._negation())
        return parts[0] if len(parts) == 1 else lambda name: all(part(name) for part in parts)

    def _negation(self) -> Selector:
        if self._take("not"):
            inner = self._negation()
            return lambda name: not inner(name)
        if self._take("("):
            inner = self.disjunction()
            if not self._take(")"):
                raise self._error('a ")" is missing')
            return inner
        word = self._next()
        if word is None or word in ("(", ")") or word.lower() in _OPERATORS:
            place = "at the end" if word is None else f'before "{word}"'
            raise self._error(f"a name is missing {place}")
        self._position += 1
        wanted = word.lower()
        return lambda name: wanted in name

    def expect_end(self) -> None:
        """Nothing is left."""
        word = self._next()
        if word is not None:
            raise self._error(f'"and" or "or" is missing before "{word}"')

    def _next(self) -> str | None:
        return self._tokens[self._position] if self._position < len(self._tokens) else None

    def _take(self, token: str) -> bool:
        word = self._next()
        if word is None or word.lower() != token:
            return False
        self._position += 1
        return True

    def _error(self, problem: str) -> SelectionError:
        return SelectionError(
            f'"{self._expression}" selects nothing that makes sense: {problem}; '
            f'write it like "stack and not mmio"'
        )
