"""Plain Python values as JSON, exactly: tuples stay tuples, NaN stays NaN, dict order is kept.

Scalars, lists and dicts with ordinary string keys are their own JSON, so task files stay readable. Everything else is
an object with one ``$`` key: ``{"$tuple": [...]}``, ``{"$set": [...]}``, ``{"$frozenset": [...]}``,
``{"$bytes": base64}``, ``{"$float": "nan" | "inf" | "-inf"}``, ``{"$dict": [[key, value], ...]}``.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

from agentopd.errors import TaskError

_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_SCALARS = (type(None), bool, int, str)


def encode_plain(value: Any) -> Any:
    """JSON for a value made of exact built-in types.

    Raises:
        TypeError: if any part is of another type; a subclass of a built-in counts as another type.

    """
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is list:
        return [encode_plain(item) for item in value]
    if kind is tuple:
        return {"$tuple": [encode_plain(item) for item in value]}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if kind is set or kind is frozenset:
        return {f"${kind.__name__}": _sorted(encode_plain(item) for item in value)}
    if kind is dict:
        return _encode_dict(value)
    raise TypeError(f"{kind.__module__}.{kind.__qualname__} is not plain data")


def decode_plain(encoded: Any) -> Any:
    """The value that ``encode_plain`` encoded.

    Raises:
        TaskError: on an unknown tag, a tag with the wrong contents, or a set with unhashable or repeated members.

    """
    if isinstance(encoded, list):
        return [decode_plain(item) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    tags = [key for key in encoded if key.startswith("$")]
    if not tags:
        return {key: decode_plain(value) for key, value in encoded.items()}
    if len(encoded) > 1:
        raise TaskError(f"tagged value with keys {sorted(encoded)}: a tag must be the only key")
    try:
        return _DECODERS[tags[0]](encoded[tags[0]])
    except (TypeError, ValueError, KeyError, binascii.Error) as exc:
        raise TaskError(f"malformed tagged value {str(encoded)[:80]}: {exc}") from exc


def _encode_dict(value: dict[Any, Any]) -> Any:
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: encode_plain(item) for key, item in value.items()}
    return {"$dict": [[encode_plain(key), encode_plain(item)] for key, item in value.items()]}


def _sorted(items: Iterable[Any]) -> list[Any]:
    """Sets have no order; their encoding must, so that equal tasks hash equally."""
    return sorted(items, key=json.dumps)


def _items(encoded: Any) -> list[Any]:
    if not isinstance(encoded, list):
        raise ValueError("expected a list")
    return [decode_plain(item) for item in encoded]


def _distinct(encoded: Any) -> frozenset[Any]:
    items = _items(encoded)
    members = frozenset(items)
    if len(members) != len(items):
        raise ValueError("repeated members")
    return members


def _pairs(encoded: Any) -> dict[Any, Any]:
    pairs = _items(encoded)
    decoded = dict(pairs)
    if len(decoded) != len(pairs):
        raise ValueError("repeated keys")
    return decoded


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$float": lambda name: _FLOATS[name],
    "$tuple": lambda items: tuple(_items(items)),
    "$set": lambda items: set(_distinct(items)),
    "$frozenset": _distinct,
    "$bytes": lambda text: base64.b64decode(text, validate=True),
    "$dict": _pairs,
}
