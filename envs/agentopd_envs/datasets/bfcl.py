"""BFCL single turn: functions on offer, and the calls (or the absence of one) that answer a request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from agentopd.types import JSON, Limits, Message, Privileged, Source, Split, Task, ToolCall, ToolSchema
from agentopd_envs.datasets.reading import Row, select

FILE = "bfcl_single_turn_dev.jsonl"
LIMITS = Limits(max_turns=1, max_tokens=512)
SOURCE = Source(dataset="bfcl_single_turn", revision="6ea57973c7a6097fd7c5915698c54c17c5b1b6c8", licence="Apache-2.0")
REFUSAL = "None of the functions can do this."

_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
_SCHEMA_KEYS = ("type", "description", "enum", "default", "format", "minimum", "maximum")


class BfclFunction(BaseModel):
    """A function in BFCL's dialect of JSON schema."""

    name: str
    description: str = ""
    parameters: JSON


class BfclRow(Row):
    """``ground_truth`` is a list of {function: {argument: [accepted values]}}; [] means no call is right."""

    category: str
    messages: tuple[Message, ...]
    functions: tuple[BfclFunction, ...]
    ground_truth: list[dict[str, dict[str, list[Any]]]]


def tasks(split: Split, limit: int | None, seed: int) -> Iterator[Task]:
    """All rows (see the package), shuffled by ``seed``, ``limit`` of them at most."""
    for row in select(FILE, BfclRow, limit, seed):
        yield _task(row, split, seed)


def json_schema(schema: JSON) -> JSON:
    """BFCL's schema dialect as JSON schema: ``dict``, ``float`` and ``tuple`` renamed, ``any`` left open."""
    mapped: JSON = {key: schema[key] for key in _SCHEMA_KEYS if key in schema}
    if "type" in mapped:
        mapped["type"] = _TYPES.get(mapped["type"], mapped["type"])
        if mapped["type"] == "any":
            del mapped["type"]
    if "items" in schema:
        mapped["items"] = json_schema(schema["items"])
    if "properties" in schema:
        mapped["properties"] = {name: json_schema(inner) for name, inner in schema["properties"].items()}
        mapped["required"] = list(schema.get("required", ()))
    return mapped


def gold_call(truth: dict[str, dict[str, list[Any]]]) -> ToolCall:
    """The call made of each argument's first accepted value; one whose first choice is "" is left out."""
    ((name, arguments),) = truth.items()
    chosen = {argument: _first(accepted) for argument, accepted in arguments.items() if accepted[0] != ""}
    return ToolCall(name=name, arguments=chosen)


def _first(accepted: list[Any]) -> Any:
    """The first accepted value; inside dictionaries each field lists its own accepted values."""
    value = accepted[0]
    if isinstance(value, dict):
        return {key: _first(inner) for key, inner in value.items() if inner[0] != ""}
    if isinstance(value, list):
        return [_first([item]) if isinstance(item, dict) else item for item in value]
    return value


def _task(row: BfclRow, split: Split, seed: int) -> Task:
    functions = [
        ToolSchema(name=function.name, description=function.description, parameters=json_schema(function.parameters))
        for function in row.functions
    ]
    calls = tuple(gold_call(truth) for truth in row.ground_truth)
    gold = Message(role="assistant", content="" if calls else REFUSAL, tool_calls=calls)
    return Task(
        id=row.id,
        env="tool_use",
        split=split,
        prompt=row.messages,
        public={"functions": [function.model_dump() for function in functions]},
        hidden={"ground_truth": row.ground_truth},
        privileged=Privileged(
            hint=f"Call {', then '.join(call.name for call in calls)}." if calls else REFUSAL, trajectory=(gold,)
        ),
        limits=LIMITS,
        seed=seed,
        source=SOURCE.model_copy(update={"row": row.id}),
    )
