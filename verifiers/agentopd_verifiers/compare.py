"""Whether a value that came out of the sandbox is the expected one.

Comparison happens here, on plain data of exact built-in types, so no foreign ``__eq__``, ``__float__`` or ``__hash__``
is ever called. Every comparator keeps booleans apart from numbers (``True`` is not 1) and lets NaN match NaN.

- ``eq``: Python equality otherwise: ``1 == 1.0``, list is not tuple, ``set`` equals ``frozenset``;
- ``strict``: also the same type at every depth;
- ``approx``: ``eq``, with numbers allowed to differ by ``tolerance`` (absolute);
- ``list_eq``: any ordered iterable (list, tuple, str, dict keys) against a list of the same items;
- ``tuples_eq``: ``eq`` with list and tuple the same at every depth;
- ``set``: the same distinct members, in any iterable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

from agentopd.errors import TaskError

DEFAULT_TOLERANCE = 1e-6
_PLAIN = (type(None), bool, int, float, str, bytes, list, tuple, dict, set, frozenset)
_ORDERED = (list, tuple, str, dict)
_ATOMS = (str, int, bool, bytes, type(None))
"""Types whose ``==`` among themselves is what every comparator means."""


def matches(expected: Any, value: Any, compare: str = "eq", tolerance: float | None = None) -> bool:
    """Whether ``value`` equals ``expected`` under a comparator of the module docstring.

    Raises:
        TaskError: for an unknown comparator, or a negative ``tolerance``.

    """
    if compare not in COMPARATORS:
        raise TaskError(f"unknown comparator {compare!r}; choose one of {', '.join(sorted(COMPARATORS))}")
    allowed = DEFAULT_TOLERANCE if tolerance is None else tolerance
    if not allowed >= 0:
        raise TaskError(f"tolerance {tolerance} must be at least 0")
    try:
        return COMPARATORS[compare](expected, value, allowed)
    except (NotPlainError, RecursionError, OverflowError):
        return False


class NotPlainError(Exception):
    """A value holds something other than exact built-in types."""


def canonical(value: Any, typed: bool = False, sequences: bool = False) -> Hashable:
    """A hashable stand-in for a plain value; two values are equal exactly when their stand-ins are."""
    kind = type(value)
    if kind not in _PLAIN:
        raise NotPlainError(kind.__name__)
    if kind in (int, float):
        number: Hashable = "nan" if kind is float and math.isnan(value) else value
        return (kind.__name__ if typed else "number", number)
    if kind in (list, tuple):
        name = "sequence" if sequences else kind.__name__
        return (name, tuple(canonical(item, typed, sequences) for item in value))
    if kind in (set, frozenset):
        name = kind.__name__ if typed else "set"
        return (name, frozenset(canonical(item, typed, sequences) for item in value))
    if kind is dict:
        pairs = ((canonical(key, typed, sequences), canonical(item, typed, sequences)) for key, item in value.items())
        return ("dict", frozenset(pairs))
    return (kind.__name__, value)


def _eq(expected: Any, value: Any, _: float) -> bool:
    if type(expected) is type(value) and type(value) in _ATOMS:
        return bool(expected == value)
    return canonical(expected) == canonical(value)


def _strict(expected: Any, value: Any, _: float) -> bool:
    if type(expected) is type(value) and type(value) in _ATOMS:
        return bool(expected == value)
    return canonical(expected, typed=True) == canonical(value, typed=True)


def _tuples_eq(expected: Any, value: Any, _: float) -> bool:
    return canonical(expected, sequences=True) == canonical(value, sequences=True)


def _list_eq(expected: Any, value: Any, _: float) -> bool:
    if type(expected) not in _ORDERED or type(value) not in _ORDERED:
        return False
    return canonical(list(expected)) == canonical(list(value))


def _set(expected: Any, value: Any, _: float) -> bool:
    return _members(expected) == _members(value)


def _members(value: Any) -> frozenset[Hashable]:
    if type(value) not in (list, tuple, set, frozenset):
        raise NotPlainError(type(value).__name__)
    return frozenset(canonical(item) for item in value)


def _approx(expected: Any, value: Any, tolerance: float) -> bool:
    kinds = {type(expected), type(value)}
    if kinds <= {int, float}:
        if expected == value or (math.isnan(expected) and math.isnan(value)):
            return True
        return math.isfinite(expected) and math.isfinite(value) and abs(expected - value) <= tolerance
    if len(kinds) == 1 and isinstance(expected, list | tuple):
        pairs = zip(expected, value, strict=False)
        return len(expected) == len(value) and all(_approx(a, b, tolerance) for a, b in pairs)
    if kinds == {dict}:
        if {canonical(key) for key in expected} != {canonical(key) for key in value}:
            return False
        found = {canonical(key): item for key, item in value.items()}
        return all(_approx(item, found[canonical(key)], tolerance) for key, item in expected.items())
    return _eq(expected, value, tolerance)


COMPARATORS: dict[str, Callable[[Any, Any, float], bool]] = {
    "eq": _eq,
    "strict": _strict,
    "approx": _approx,
    "list_eq": _list_eq,
    "tuples_eq": _tuples_eq,
    "set": _set,
}
