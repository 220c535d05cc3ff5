"""What one step changed in a JSON state: recorded by the environment, played again by the judge.

A log entry is ``{"path": [key, ...], "value": ...}`` or ``{"path": [key, ...], "removed": true}``. Objects are compared
key by key; a list or a scalar changes as a whole.
"""

from __future__ import annotations

import copy
import marshal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from agentopd_verifiers.compare import matches

Change = dict[str, Any]


def changes(before: Any, after: Any) -> list[Change]:
    """The log that leads from ``before`` to ``after``; [] if they are the same."""
    return list(_changes((), before, after))


def since(before: Any) -> Callable[[Any], list[Change]]:
    """Copy a state now; what is returned gives the log from there to the state it is called with."""
    packed = _packed(before)
    if packed is None:
        kept = copy.deepcopy(before)
        return lambda after: changes(kept, after)
    return lambda after: [] if packed == _packed(after) else changes(marshal.loads(packed), after)


def identical(*values: Any) -> bool:
    """Whether all are the same plain value, of the same types and in the same order; False may also mean unknown."""
    first = _packed(values[0])
    return first is not None and all(first == _packed(value) for value in values[1:])


def replay(state: Any, log: Sequence[Mapping[str, Any]]) -> Any:
    """The state after a log; ``state`` itself stays as it is, and what the log does not touch is shared with it.

    Raises:
        KeyError: if an entry names a place that the state does not have.
        TypeError: likewise.

    """
    for entry in log:
        state = _replayed(state, entry["path"], entry)
    return state


def _replayed(place: Any, path: Sequence[str], entry: Mapping[str, Any]) -> Any:
    if not path:
        return copy.deepcopy(entry["value"])
    if not isinstance(place, dict):
        raise TypeError(f"{path[0]!r} is looked up in a {type(place).__name__}")
    key, *rest = path
    changed = dict(place)
    if not rest and entry.get("removed"):
        del changed[key]
    elif not rest:
        changed[key] = copy.deepcopy(entry["value"])
    else:
        changed[key] = _replayed(place[key], rest, entry)
    return changed


def _packed(value: Any) -> bytes | None:
    """A plain value in bytes, each type apart from every other; None for what is not plain.

    In the format of version 2, which writes a value alike whoever else refers to its parts. Most calls change little of
    a large state: comparing bytes, and copying by them, takes a tenth of the time that Python code does.
    """
    try:
        return marshal.dumps(value, 2)
    except ValueError:
        return None


def _changes(path: tuple[str, ...], before: Any, after: Any) -> Iterator[Change]:
    if not isinstance(before, dict) or not isinstance(after, dict):
        if not matches(before, after, "strict"):
            yield {"path": list(path), "value": copy.deepcopy(after)}
        return
    if identical(before, after):
        return
    for key in before:
        if key not in after:
            yield {"path": [*path, key], "removed": True}
    for key, value in after.items():
        if key in before:
            yield from _changes((*path, key), before[key], value)
        else:
            yield {"path": [*path, key], "value": copy.deepcopy(value)}
