"""Literals of the test cases that a patch introduced: a sign of hard-coded answers. A diagnostic, never a verdict."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from typing import Any

_SMALL = 10
"""Integers up to this size occur in honest code for many reasons."""


def copied_literals(program: str, honest: Sequence[str], cases: Iterable[Any]) -> int:
    """How many distinct telling literals of ``cases`` are in ``program`` but in none of the ``honest`` programs.

    ``cases`` may nest plain data; strings that parse as Python also count by the literals in them.
    """
    added = _source_literals(program) - set[Any]().union(*map(_source_literals, honest))
    if not added:
        return 0
    known: set[Any] = set()
    for case in cases:
        known |= _data_literals(case)
    return len(added & known)


def _source_literals(source: str) -> set[Any]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    values = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {_key(value) for value in values if _telling(value)}


def _data_literals(value: Any) -> set[Any]:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return set[Any]().union(*map(_data_literals, value))
    inside = _source_literals(value) if isinstance(value, str) else set()
    return inside | ({_key(value)} if _telling(value) else set())


def _key(value: Any) -> tuple[str, Any]:
    """Negative numbers appear in source as a sign and a positive literal."""
    return (type(value).__name__, abs(value) if isinstance(value, int | float) else value)


def _telling(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str | bytes):
        return False
    return len(value) > 2 if isinstance(value, str | bytes) else abs(value) > _SMALL
