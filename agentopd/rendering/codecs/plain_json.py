"""Strict JSON, as tool calls need it: no duplicate keys, no NaN, nothing too large, and a reason for every refusal."""

from __future__ import annotations

import json
from typing import Any, NoReturn


def refuse_constant(text: str) -> NoReturn:
    """NaN and the infinities are Python's JSON, not JSON."""
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"number {text[:20]} is too large")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"number {text[:20]}… is too large") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key {twice!r}")
    return table


DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=refuse_constant, parse_float=_finite, parse_int=_integer
)


def dump(value: Any) -> str:
    """One line of JSON, characters as they are. Raises ``ValueError`` for NaN and infinities."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def reason(exc: Exception) -> str:
    """What was wrong with a text that did not decode, for the student."""
    if isinstance(exc, RecursionError | MemoryError):
        return "nested too deeply"
    if isinstance(exc, json.JSONDecodeError):
        return f"invalid JSON: {exc.msg} at character {exc.pos}"
    return str(exc)


def check_plain(value: Any, max_depth: int) -> None:
    """Raises ``ValueError`` for what is nested too deeply, or holds half of a surrogate pair."""
    _check_depth(value, max_depth)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a string holds half of a surrogate pair") from None


def kind(value: Any) -> str:
    """``an object``, ``null``, …"""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _check_depth(value: Any, left: int) -> None:
    if left < 0:
        raise ValueError("nested too deeply")
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        _check_depth(item, left - 1)
