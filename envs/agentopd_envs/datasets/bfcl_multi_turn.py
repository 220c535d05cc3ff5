"""BFCL multi turn: requests that follow one another, over simulated APIs with a state."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from agentopd.errors import ConfigError, TaskError
from agentopd.types import JSON, Limits, Message, Privileged, Source, Split, Task, ToolCall, ToolSchema
from agentopd_envs.datasets.bfcl import SOURCE, BfclFunction, json_schema
from agentopd_envs.datasets.reading import Row, locate, select

FILE = "bfcl_multi_turn_dev.jsonl"
FUNCTIONS = "bfcl_multi_turn_functions.json"
LIMITS = Limits(max_turns=40, max_tokens=8192, max_tool_calls=80)


class BfclMultiTurnRow(Row):
    """``ground_truth``: calls per turn, as Python; ``ground_truth_results`` and ``final_state``: what they lead to."""

    turns: list[list[Message]]
    initial_config: dict[str, JSON]
    involved_classes: list[str]
    ground_truth: list[list[str]]
    ground_truth_results: list[list[str]]
    final_state: dict[str, JSON]


def tasks(split: Split, limit: int | None, seed: int) -> Iterator[Task]:
    """All rows (see the package), shuffled by ``seed``, ``limit`` of them at most."""
    functions = _functions(locate(FUNCTIONS))
    for row in select(FILE, BfclMultiTurnRow, limit, seed):
        yield _task(row, functions, split, seed)


def digest(value: Any) -> str:
    """Names a result that the task need not hold: SHA-256 of its JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def parse_call(text: str, parameters: Mapping[str, list[str]]) -> ToolCall:
    """A call written as Python with literal arguments; never evaluated. ``parameters``: names by function, in order."""
    node = ast.parse(text, mode="eval").body
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise TaskError(f"{text!r} is not a call")
    names = parameters[node.func.id]
    try:
        positional = {name: ast.literal_eval(value) for name, value in zip(names, node.args, strict=False)}
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    except ValueError as exc:
        raise TaskError(f"{text!r}: {exc}") from exc
    return ToolCall(name=node.func.id, arguments=positional | named)


@cache
def _functions(path: Path) -> dict[str, list[ToolSchema]]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ConfigError(f"{path} is not JSON: {exc}") from None
    return {name: [_schema(BfclFunction.model_validate(item)) for item in items] for name, items in raw.items()}


def _schema(function: BfclFunction) -> ToolSchema:
    return ToolSchema(name=function.name, description=function.description, parameters=json_schema(function.parameters))


def _task(row: BfclMultiTurnRow, functions: Mapping[str, list[ToolSchema]], split: Split, seed: int) -> Task:
    offered = {name: functions[name] for name in row.involved_classes}
    parameters = {
        schema.name: list(schema.parameters["properties"]) for schemas in offered.values() for schema in schemas
    }
    truth = [tuple(parse_call(text, parameters) for text in turn) for turn in row.ground_truth]
    gold: list[Message] = []
    for calls in truth:
        gold += [Message(role="assistant", tool_calls=calls)] if calls else []
        gold.append(Message(role="assistant", content="Done."))
    opening, *later = ([message.content for message in turn] for turn in row.turns)
    return Task(
        id=row.id,
        env="bfcl_multi_turn",
        split=split,
        prompt=tuple(Message(role="user", content=text) for text in opening),
        public={
            "apis": {name: [schema.model_dump() for schema in schemas] for name, schemas in offered.items()},
            "config": {name: row.initial_config.get(name, {}) for name in row.involved_classes},
            "user_turns": ["\n".join(texts) for texts in later],
        },
        hidden={
            "ground_truth": [[call.model_dump() for call in calls] for calls in truth],
            "results": digest(row.ground_truth_results),
            "final_state": digest(row.final_state),
        },
        privileged=Privileged(
            hint="\n".join(f"Request {index + 1}: {', '.join(turn)}." for index, turn in enumerate(row.ground_truth)),
            trajectory=tuple(gold),
        ),
        limits=LIMITS,
        seed=seed,
        source=Source(dataset="bfcl_multi_turn", revision=SOURCE.revision, licence=SOURCE.licence, row=row.id),
    )
