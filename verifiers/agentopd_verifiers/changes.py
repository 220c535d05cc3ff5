"""What one step changed in a JSON state: recorded by the environment, played again by the judge.

A log entry is ``{"path": [key, ...], "value": ...}`` or ``{"path": [key, ...], "removed": true}``. Objects are compared
key by key; a list or a scalar changes as a whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agentopd_verifiers.compare import matches

Change = dict[str, Any]


def changes(before: Any, after: Any) -> list[Change]:
    """The log that leads from ``before`` to ``after``; [] if they are the same."""
    return list(_changes((), before, after))


def replay(state: Any, log: Sequence[Mapping[str, Any]]) -> Any:
    """The state after a log; ``state`` itself stays as it is.

    Raises:
        KeyError: if an entry names a place that the state does not have.
        TypeError: likewise.

    """
    root = {"": copy.deepcopy(state)}
    for entry in log:
        path: list[str] = ["", *entry["path"]]
        place: Any = root
        for key in path[:-1]:
            place = place[key]
        if entry.get("removed"):
            del place[path[-1]]
        else:
            place[path[-1]] = copy.deepcopy(entry["value"])
    return root[""]


def _changes(path: tuple[str, ...], before: Any, after: Any) -> Iterator[Change]:
    if not isinstance(before, dict) or not isinstance(after, dict):
        if not matches(before, after, "strict"):
            yield {"path": list(path), "value": copy.deepcopy(after)}
        return
    for key in before:
        if key not in after:
            yield {"path": [*path, key], "removed": True}
    for key, value in after.items():
        if key in before:
            yield from _changes((*path, key), before[key], value)
        else:
            yield {"path": [*path, key], "value": copy.deepcopy(value)}
