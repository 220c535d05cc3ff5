"""The difference between the environment's final state and the goal, with a frame condition: nothing else changed.

Everything is read from the environment's own snapshot and event log, never from what the student wrote. A task that
asks for nothing (goal equal to the initial state, no required call) would be passed by doing nothing, so it is a
task error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from agentopd.contracts import Sandbox
from agentopd.errors import InfraError, TaskError
from agentopd.types import Episode, Event, Flag, Task, VerdictStatus
from agentopd_verifiers.changes import identical, replay
from agentopd_verifiers.compare import matches
from agentopd_verifiers.judge import Finding, JudgingVerifier, hidden_field
from agentopd_verifiers.steps import Call, Sign, Step, certify, malformed_steps, recorded_calls

_ABSENT = object()
Path = tuple[str, ...]
Comparators = Sequence[tuple[str, Callable[[Any, Any], bool]]]


def _casefold(a: Any, b: Any) -> bool:
    both = isinstance(a, str) and isinstance(b, str)
    return " ".join(a.casefold().split()) == " ".join(b.casefold().split()) if both else matches(a, b)


def _numeric(a: Any, b: Any) -> bool:
    numbers = all(type(x) in (int, float) for x in (a, b))
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) if numbers else matches(a, b)


def _set(a: Any, b: Any) -> bool:
    return matches(a, b, "set") if isinstance(a, list) and isinstance(b, list) else matches(a, b)


COMPARATORS: dict[str, Callable[[Any, Any], bool]] = {
    "exact": matches,
    "casefold": _casefold,
    "numeric": _numeric,
    "set": _set,
    "ignore": lambda a, b: True,
}


@dataclass(frozen=True)
class StateDiff:
    """Dotted paths: ``goals`` had to change, ``unmet`` are goals not reached, ``broken`` moved without being a goal."""

    goals: tuple[str, ...]
    unmet: tuple[str, ...]
    broken: tuple[str, ...]


class StateVerifier(JudgingVerifier):
    """Outcome 1 if every goal holds, nothing else changed, required calls were made and forbidden ones were not.

    ``hidden``: ``initial``, ``goal`` (databases); optional ``comparators`` ({dotted path, ``*`` allowed: comparator}),
    ``required_calls`` and ``forbidden_calls`` ([{name, arguments?}], arguments matched as a subset).
    """

    name: ClassVar[str] = "state"
    version: ClassVar[str] = "1"

    async def judge(self, task: Task, episode: Episode, sandbox: Sandbox | None) -> Finding:
        """Compare ``final_state.db`` and the ``tool_call`` events with the hidden goal."""
        initial, goal = hidden_field(task, "initial", dict), hidden_field(task, "goal", dict)
        comparators = _comparators(task.hidden.get("comparators") or {})
        required, forbidden = (_patterns(task, key) for key in ("required_calls", "forbidden_calls"))
        if "db" not in episode.final_state:
            raise InfraError(f"episode {episode.id}: the environment recorded no final database")
        found = state_diff(initial, goal, episode.final_state["db"], comparators)
        if not required and not found.goals:
            raise TaskError("the goal equals the initial state and no call is required: doing nothing would pass")
        made = recorded_calls(episode)
        calls = [call.event for call in made]
        missing = [pattern for pattern in required if not any(_is_call(event, pattern) for event in calls)]
        crossed = [event for event in calls if any(_is_call(event, pattern) for pattern in forbidden)]
        right = not (found.unmet or found.broken or missing or crossed)
        asked = _Goal(initial, goal, comparators, required, forbidden)
        return Finding(
            float(right),
            _status(right, episode, calls),
            components=_components(found, len(missing), len(crossed), calls),
            certificates=certify(episode, _steps(episode, made, asked, found)),
            flags=[Flag(code="forbidden_call", detail=str(event.data.get("name"))) for event in crossed],
            detail=_detail(found, missing),
        )


def _comparators(declared: Mapping[str, str]) -> list[tuple[str, Callable[[Any, Any], bool]]]:
    unknown = sorted(set(declared.values()) - set(COMPARATORS))
    if unknown:
        raise TaskError(f"hidden.comparators: unknown {unknown[0]!r}; choose one of {', '.join(sorted(COMPARATORS))}")
    return [(pattern, COMPARATORS[name]) for pattern, name in declared.items()]


def _patterns(task: Task, key: str) -> list[Mapping[str, Any]]:
    patterns = task.hidden.get(key) or []
    if not all(isinstance(pattern, dict) and "name" in pattern for pattern in patterns):
        raise TaskError(f"hidden.{key}: each entry is {{name, arguments?}}")
    return list(patterns)


def state_diff(initial: Any, goal: Any, final: Any, comparators: Comparators = ()) -> StateDiff:
    """Compare three databases field by field; a comparator on a path governs the whole subtree there."""
    goals: list[str] = []
    unmet: list[str] = []
    broken: list[str] = []
    for path, (before, wanted, found) in _fields((), (initial, goal, final), [pattern for pattern, _ in comparators]):
        name = ".".join(path)
        equal = next((same for pattern, same in comparators if fnmatchcase(name, pattern)), matches)
        to_change = not _equal(before, wanted, equal)
        reached = _equal(wanted, found, equal)
        if to_change:
            goals.append(name)
        if not reached:
            (unmet if to_change else broken).append(name)
    return StateDiff(tuple(goals), tuple(unmet), tuple(broken))


def _equal(a: Any, b: Any, equal: Callable[[Any, Any], bool]) -> bool:
    if a is _ABSENT or b is _ABSENT:
        return a is b or equal is COMPARATORS["ignore"]
    return equal(a, b)


def _fields(path: Path, values: tuple[Any, ...], stops: Sequence[str]) -> Iterator[tuple[Path, tuple[Any, ...]]]:
    """Every field in which the values are not all identical; objects are entered, lists and scalars are fields."""
    stop = any(fnmatchcase(".".join(path), pattern) for pattern in stops)
    if identical(*values):  # Neither a goal nor broken, whatever the comparator.
        return
    objects = [value for value in values if isinstance(value, dict)]
    if stop or not objects or any(not isinstance(value, dict) and value is not _ABSENT for value in values):
        yield path, values
        return
    if not all(objects) and any(value is _ABSENT for value in values):  # no key tells an empty object from none
        yield path, tuple(_ABSENT if value is _ABSENT else {} for value in values)
    for key in {key: None for value in objects for key in value}:
        inner = tuple(value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT for value in values)
        yield from _fields((*path, str(key)), inner, stops)


def _is_call(event: Event, pattern: Mapping[str, Any]) -> bool:
    """A call that the environment carried out, with at least the arguments of the pattern.

    What counts is what the tool was given: its validated arguments, where the environment recorded them.
    """
    made = event.data.get("validated") or event.data.get("arguments") or {}
    wanted = pattern.get("arguments") or {}
    same = all(key in made and matches(value, made[key]) for key, value in wanted.items())
    return bool(event.data.get("ok")) and event.data.get("name") == pattern["name"] and same


def _status(right: bool, episode: Episode, calls: Sequence[Event]) -> VerdictStatus:
    if right:
        return VerdictStatus.OK
    if calls:
        return VerdictStatus.WRONG
    return VerdictStatus.FORMAT if any(turn.malformed for turn in episode.turns) else VerdictStatus.NO_ANSWER


def _components(found: StateDiff, missing: int, crossed: int, calls: Sequence[Event]) -> dict[str, float]:
    met = len(found.goals) - len(found.unmet)
    return {
        "goals_met": met / len(found.goals) if found.goals else 1.0,
        "unmet": float(len(found.unmet)),
        "broken": float(len(found.broken)),
        "missing_calls": float(missing),
        "forbidden_calls": float(crossed),
        "failed_calls": float(sum(not event.data.get("ok") for event in calls)),
    }


@dataclass(frozen=True)
class _Goal:
    """What the task asks of the database and of the calls."""

    initial: Mapping[str, Any]
    goal: Mapping[str, Any]
    comparators: Comparators
    required: Sequence[Mapping[str, Any]]
    forbidden: Sequence[Mapping[str, Any]]

    def wrong(self, db: Any) -> frozenset[str]:
        """The fields of a database that are not as the goal wants them."""
        found = state_diff(self.initial, self.goal, db, self.comparators)
        return frozenset((*found.unmet, *found.broken))


def _steps(episode: Episode, calls: Sequence[Call], goal: _Goal, found: StateDiff) -> list[Step]:
    """What the event log says of each call; a call without a known effect stays unknown."""
    wrong = _wrong_fields(episode, calls, goal, found)
    steps = []
    for index, call in enumerate(calls):
        sign, kind = _judge_call(call, goal, *(wrong[index : index + 2] or (frozenset(), frozenset())))
        steps.append(Step(call.event.turn, sign, kind, call.span))
    return [*steps, *malformed_steps(episode)]


def _judge_call(call: Call, goal: _Goal, before: frozenset[str], after: frozenset[str]) -> tuple[Sign, str]:
    """Sign and kind; ``before`` and ``after`` are the fields that are wrong around the call."""
    if not call.ok:
        return -1, "failed_call"
    if any(_is_call(call.event, pattern) for pattern in goal.forbidden):
        return -1, "forbidden_call"
    towards, away = bool(before - after), bool(after - before)
    if away:
        return (0, "mixed") if towards else (-1, "away_from_goal")
    if towards:
        return 1, "towards_goal"
    if any(_is_call(call.event, pattern) for pattern in goal.required):
        return 1, "required_call"
    return 0, "call"


def _wrong_fields(episode: Episode, calls: Sequence[Call], goal: _Goal, found: StateDiff) -> list[frozenset[str]]:
    """The fields that are wrong before the first call and after each; [] if the log of changes does not add up.

    It does not where an environment keeps no such log, or changes its state outside of calls.
    """
    logs = [_database_log(call) for call in calls]
    if any(log is None for log in logs):
        return []
    last = max((index for index, log in enumerate(logs) if log), default=-1)
    state: Any = {"db": goal.initial}
    wrong = [frozenset(found.goals)]
    for index, log in enumerate(logs):
        if not log:
            wrong.append(wrong[-1])
            continue
        try:
            state = replay(state, log)
        except (KeyError, TypeError):
            return []
        wrong.append(frozenset((*found.unmet, *found.broken)) if index == last else goal.wrong(state["db"]))
    final, logged = episode.final_state["db"], state["db"]
    return wrong if identical(final, logged) or matches(final, logged, "strict") else []


def _database_log(call: Call) -> list[Any] | None:
    """The changes of one call to the database; None where none were recorded."""
    changes = call.event.data.get("changes")
    return None if changes is None else [entry for entry in changes if entry["path"][:1] == ["db"]]


def _detail(found: StateDiff, missing: Sequence[Mapping[str, Any]]) -> str:
    parts = [("not reached", found.unmet), ("changed without need", found.broken)]
    parts.append(("call not made", tuple(str(pattern["name"]) for pattern in missing)))
    return "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in parts if names)
