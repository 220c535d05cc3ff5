"""Recorded tool calls against the calls a task accepts, by the rules of the Berkeley Function-Calling Leaderboard.

``hidden.ground_truth`` is a list of ``{function: {argument: [accepted values]}}``: exactly these calls, in any order.
``""`` among the accepted values means the argument may be left out. An empty list means that no call is right, and a
text answer is. Value rules (gorilla, ``ast_checker.py``): strings ignore case, spaces and ``,./-_*^``; an integer is
accepted for a float, nothing else changes type; lists are ordered; objects hold lists of accepted values per key.

Where ``public.functions`` gives the schemas, an argument declared ``float`` or ``number`` accepts either number type;
without schemas an argument does so if any accepted value is a float.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from agentopd.contracts import Sandbox
from agentopd.errors import TaskError
from agentopd.types import Episode, Task, VerdictStatus
from agentopd_verifiers.judge import Finding, JudgingVerifier, hidden_field
from agentopd_verifiers.steps import Call, Sign, Step, certify, malformed_steps, recorded_calls

_IGNORED = re.compile(r"[ ,./\-_*^]")
_OMITTED = ""
Accepted = Mapping[str, Sequence[Any]]


class CallsVerifier(JudgingVerifier):
    """Outcome 1 if the calls the environment recorded are exactly the accepted ones."""

    name: ClassVar[str] = "calls"
    version: ClassVar[str] = "1"

    async def judge(self, task: Task, episode: Episode, sandbox: Sandbox | None) -> Finding:
        """Match ``tool_call`` events one to one with ``hidden.ground_truth``."""
        expected = [_accepted_call(call) for call in hidden_field(task, "ground_truth", list)]
        recorded = recorded_calls(episode)
        made = [(str(call.event.data.get("name")), call.event.data.get("arguments") or {}) for call in recorded]
        malformed = sum(len(turn.malformed) for turn in episode.turns)
        components = {"calls": float(len(made)), "expected": float(len(expected)), "malformed": float(malformed)}
        if not made:
            finding = _without_calls(episode, bool(expected), malformed, components)
            return replace(finding, certificates=certify(episode, list(malformed_steps(episode))))
        floats = _float_arguments(task)
        agree = [[call_matches(call, accepted, floats) for call in made] for accepted in expected]
        pairs = assignment(agree)
        matched = len(pairs)
        steps = [*_steps(recorded, pairs, agree), *malformed_steps(episode)]
        components["matched"] = float(matched)
        right = matched == len(expected) == len(made) and not malformed
        detail = "" if right else f"{matched} of {len(expected)} expected calls matched, {len(made)} made"
        status = VerdictStatus.OK if right else VerdictStatus.WRONG
        certificates = certify(episode, steps)
        return Finding(float(right), status, components=components, certificates=certificates, detail=detail)


def _steps(calls: Sequence[Call], pairs: Mapping[int, int], agree: Sequence[Sequence[bool]]) -> Iterator[Step]:
    """A matched call is right and one that fits nothing is wrong; one too many of a right call is not known."""
    for index, call in enumerate(calls):
        sign: Sign = 0
        if index in pairs:
            sign = 1
        elif not any(row[index] for row in agree):
            sign = -1
        yield Step(call.event.turn, sign, "accepted_call" if sign > 0 else "unaccepted_call", call.span)


def _without_calls(episode: Episode, wanted: bool, malformed: int, components: dict[str, float]) -> Finding:
    if malformed:
        return Finding(0.0, VerdictStatus.FORMAT, components=components, detail="a tool call could not be parsed")
    if wanted or not episode.final_text.strip():
        detail = "no tool call" if wanted else "no answer"
        return Finding(0.0, VerdictStatus.NO_ANSWER, components=components, detail=detail)
    return Finding(1.0, VerdictStatus.OK, components=components)


def _accepted_call(call: Any) -> tuple[str, Accepted]:
    """The function and accepted arguments of one ground-truth entry, checked."""
    if not isinstance(call, dict) or len(call) != 1:
        raise TaskError(f"hidden.ground_truth holds {str(call)[:80]}; each entry is {{function: {{argument: [...]}}}}")
    ((name, arguments),) = call.items()
    if not isinstance(arguments, dict) or not all(isinstance(values, list) for values in arguments.values()):
        raise TaskError(f"hidden.ground_truth: the arguments of {name!r} are not lists of accepted values")
    return name, arguments


def _float_arguments(task: Task) -> frozenset[tuple[str, str]]:
    """(function, argument) pairs that the task's schemas declare as real numbers."""
    pairs = []
    for function in task.public.get("functions", []):
        for argument, schema in function.get("parameters", {}).get("properties", {}).items():
            if schema.get("type") in ("float", "number"):
                pairs.append((_plain_name(function["name"]), argument))
    return frozenset(pairs)


def _plain_name(name: str) -> str:
    """Dots and underscores are one: several chat formats cannot spell a dotted function name."""
    return name.replace(".", "_")


def call_matches(
    call: tuple[str, Any], accepted: tuple[str, Accepted], floats: frozenset[tuple[str, str]] = frozenset()
) -> bool:
    """Whether one call (name, arguments) is the accepted one."""
    (name, arguments), (wanted, values) = call, accepted
    if _plain_name(name) != _plain_name(wanted) or not isinstance(arguments, dict) or set(arguments) - set(values):
        return False
    return all(
        value_matches(arguments[key], options, (_plain_name(wanted), key) in floats)
        if key in arguments
        else _OMITTED in options
        for key, options in values.items()
    )


def value_matches(value: Any, accepted: Sequence[Any], real: bool = False) -> bool:
    """Whether a value equals one of the accepted ones; ``real``: the argument is declared a real number."""
    real = real or any(type(option) is float for option in accepted)
    return any(_same(value, option, real) for option in accepted)


def _same(value: Any, option: Any, real: bool) -> bool:
    if type(value) in (int, float) and type(option) in (int, float):
        return bool(value == option) and (real or type(value) is type(option) or type(option) is float)
    if type(value) is not type(option):
        return False
    if isinstance(value, str):
        return _standard(value) == _standard(option)
    if isinstance(value, list):
        return len(value) == len(option) and all(map(_same_item, value, option))
    if isinstance(value, dict):
        return _same_object(value, option)
    return bool(value == option)


def _same_item(value: Any, option: Any) -> bool:
    return _same(value, option, real=True)


def _same_object(value: dict[str, Any], option: dict[str, Any]) -> bool:
    if set(value) - set(option):
        return False
    lists = {key: options if isinstance(options, list) else [options] for key, options in option.items()}
    return all(value_matches(value[key], lists[key]) if key in value else _OMITTED in lists[key] for key in lists)


def _standard(text: str) -> str:
    return _IGNORED.sub("", text).lower().replace("'", '"')


def matching(agree: Sequence[Sequence[bool]]) -> int:
    """Size of a maximum one-to-one matching; ``agree[i][j]``: expected i and made j may pair."""
    return len(assignment(agree))


def assignment(agree: Sequence[Sequence[bool]]) -> dict[int, int]:
    """A maximum one-to-one matching: made j to expected i."""
    owner: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column, fits in enumerate(agree[row]):
            if fits and column not in seen:
                seen.add(column)
                if column not in owner or place(owner[column], seen):
                    owner[column] = row
                    return True
        return False

    for row in range(len(agree)):
        place(row, set())
    return owner
