"""Trajectories that must not pass: random valid calls, other tasks' solutions, near misses of the right one."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from agentopd.contracts import Environment
from agentopd.types import JSON, Message, Task, ToolCall, ToolSchema

Trajectory = tuple[Message, ...]
_MAX_RANDOM_CALLS = 6


def random_turns(env: type[Environment], task: Task, rng: random.Random) -> Trajectory:
    """Valid calls with arguments drawn from their schemas and from the words of the task; without tools, a guess."""
    tools, words = env.tool_schemas(task.student_view()), words_of(task)
    if not tools:
        guess = rng.choice((str(rng.randint(-50, 50)), rng.choice(words), task.prompt[-1].content, "\\boxed{1}"))
        return (Message(role="assistant", content=guess),)
    room = min(task.limits.max_turns, task.limits.max_tool_calls, _MAX_RANDOM_CALLS)
    calls = [_random_call(rng.choice(tools), rng, words) for _ in range(rng.randint(1, max(room, 1)))]
    return (
        *(Message(role="assistant", tool_calls=(call,)) for call in calls),
        Message(role="assistant", content="Ok."),
    )


def words_of(task: Task) -> list[str]:
    """What a student could name: words of the prompt, keys and short strings of the public state."""
    words = [word for message in task.prompt for word in re.findall(r"\w+", message.content)]
    return [*words, *(leaf for leaf in leaves(task.public, keys=True) if len(leaf) < 200)] or ["thing"]


def leaves(value: Any, keys: bool = False) -> Iterator[str]:
    """Every string inside plain data, with the keys of objects if asked for."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        if keys:
            yield from map(str, value)
        for item in value.values():
            yield from leaves(item, keys)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item, keys)


def near_misses(env: type[Environment], task: Task, gold: Trajectory) -> dict[str, list[Trajectory]]:
    """Small changes to the gold trajectory by kind; the right verdict on most of them is 0."""
    found: dict[str, list[Trajectory]] = {"number": [], "argument": [], "dropped": []}
    counts = getattr(env, "mutating_tools", lambda: None)()
    for index, turn in enumerate(gold):
        if not turn.tool_calls and (changed := _next_number(turn.content)) != turn.content:
            found["number"].append(_replaced(gold, index, turn.model_copy(update={"content": changed})))
        for position, call in enumerate(turn.tool_calls):
            if counts is not None and call.name not in counts:
                continue
            rest = (*turn.tool_calls[:position], *turn.tool_calls[position + 1 :])
            found["dropped"].append(_replaced(gold, index, turn.model_copy(update={"tool_calls": rest})))
            for key, value in call.arguments.items():
                other = ToolCall(name=call.name, arguments={**call.arguments, key: _other(value)})
                calls = (*turn.tool_calls[:position], other, *turn.tool_calls[position + 1 :])
                found["argument"].append(_replaced(gold, index, turn.model_copy(update={"tool_calls": calls})))
    return found


def sample_value(schema: JSON, rng: random.Random, words: Sequence[str], defs: JSON | None = None) -> Any:
    """A value that fits a JSON schema as ``@tool`` makes them."""
    defs = schema.get("$defs", {}) if defs is None else defs
    if "$ref" in schema:
        return sample_value(defs[schema["$ref"].rpartition("/")[2]], rng, words, defs)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return sample_value(rng.choice(schema[key]), rng, words, defs)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    kind = schema.get("type", "string")
    kind = rng.choice(kind) if isinstance(kind, list) else kind
    if kind == "object":
        fields = schema.get("properties", {})
        return {key: sample_value(fields[key], rng, words, defs) for key in schema.get("required", ()) if key in fields}
    if kind == "array":
        count = rng.randint(schema.get("minItems", 0), min(schema.get("maxItems", 3), schema.get("minItems", 0) + 3))
        return [sample_value(schema.get("items", {}), rng, words, defs) for _ in range(count)]
    simple = {"boolean": rng.random() < 0.5, "null": None, "string": rng.choice(words)}
    return simple[kind] if kind in simple else _number(schema, rng, kind == "integer")


def _random_call(tool: ToolSchema, rng: random.Random, words: Sequence[str]) -> ToolCall:
    properties, required = tool.parameters.get("properties", {}), tool.parameters.get("required", ())
    defs = tool.parameters.get("$defs", {})
    chosen = [key for key in properties if key in required or rng.random() < 0.3]
    return ToolCall(name=tool.name, arguments={key: sample_value(properties[key], rng, words, defs) for key in chosen})


def _number(schema: JSON, rng: random.Random, whole: bool) -> int | float:
    low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
    high = schema.get("maximum", schema.get("exclusiveMaximum", low + 101) - 1)
    return rng.randint(int(low), max(int(high), int(low))) if whole else rng.uniform(low, max(high, low))


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        changed = _next_number(value)
        return changed if changed != value else f"{value}x"
    return None if isinstance(value, list | dict) and value else json.dumps(value)


def _next_number(text: str) -> str:
    """The text with its last whole number one larger."""
    head, number, tail = re.fullmatch(r"(?s)(.*?)(\d*)(\D*)", text).groups()  # type: ignore[union-attr]
    return f"{head}{int(number) + 1}{tail}" if number else text


def _replaced(turns: Trajectory, index: int, turn: Message) -> Trajectory:
    return (*turns[:index], turn, *turns[index + 1 :])
