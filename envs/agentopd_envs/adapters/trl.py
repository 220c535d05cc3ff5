"""Export to TRL: a tool environment as the ``environment_factory`` of its ``GRPOTrainer``.

TRL calls the tools itself and reads the reward from the instance, so what can be exported is what is judged by state or
by calls. Whatever cannot be judged has no reward there: ``get_reward`` raises, it does not return 0.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Coroutine
from functools import cache
from typing import Any, TypeVar

from agentopd.contracts import Sandbox
from agentopd.errors import ConfigError, InfraError, ToolError
from agentopd.registry import environments
from agentopd.types import Split, Task, ToolCall, ToolSchema
from agentopd_envs.adapters.messages import MessageEpisode
from agentopd_envs.authoring import ToolEnvironment

T = TypeVar("T")
_TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict}


def to_trl(env: str, source: str = "micro", split: Split = "train", limit: int = 1000, seed: int = 0,
           sandbox: Sandbox | None = None) -> tuple[type, list[dict[str, Any]]]:  # fmt: skip
    """The class to pass as ``environment_factory``, and the rows (``prompt``, ``task``) of its data set.

    Raises ``ConfigError`` for an environment whose episodes are more than tool calls on one set of tools.
    """
    env_cls = environments.get(env)
    tasks = list(env_cls.load_tasks(split, source, limit, seed))
    schemas = env_cls.tool_schemas(tasks[0].student_view())
    if not issubclass(env_cls, ToolEnvironment) or any("user_turns" in task.public for task in tasks):
        raise ConfigError(f"environment {env!r} cannot be exported to TRL: its episodes are more than tool calls")
    if any(env_cls.tool_schemas(task.student_view()) != schemas for task in tasks):
        raise ConfigError(f"environment {env!r}, source {source!r}: TRL needs the same tools on every task")
    members: dict[str, Any] = {schema.name: _method(schema) for schema in schemas}
    made = type(f"{env_cls.__name__}ForTRL", (_Exported,), {**members, "_env_cls": env_cls, "_sandbox": sandbox})
    rows = [
        {
            "prompt": [{"role": message.role, "content": message.content} for message in task.prompt],
            "task": task.model_dump_json(),
        }
        for task in tasks
    ]
    return made, rows


class _Exported:
    """What TRL sees: ``reset``, ``get_reward``, and the tools, which subclasses add."""

    _env_cls: Any
    _sandbox: Sandbox | None
    _episode: MessageEpisode | None = None

    def reset(self, **row: Any) -> None:
        """Start on the task of a row; the prompt is the row's own."""
        if self._episode is not None:
            _await(self._episode.close())
        task = Task.model_validate_json(row["task"])
        self._episode = MessageEpisode(self._env_cls, task, self._sandbox, task.seed)
        _await(self._episode.open())

    def get_reward(self) -> float:
        """The reward of what was done since ``reset``."""
        assert self._episode is not None, "TRL calls reset first"
        if not self._episode.done:
            _await(self._episode.act(""))
        verdict = _await(self._episode.verdict())
        if verdict.reward is None:
            raise InfraError(f"no verdict ({verdict.status}): {verdict.detail}")
        return verdict.reward

    def _call(self, name: str, arguments: dict[str, Any]) -> str:
        assert self._episode is not None, "TRL calls reset first"
        if self._episode.done:
            raise ToolError("the episode is over")
        answers = _await(self._episode.act("", [ToolCall(name=name, arguments=arguments)]))
        return answers[-1].content if answers else "ok"


def _method(schema: ToolSchema) -> Any:
    """A method with the signature and the docstring from which TRL makes a schema again."""

    def call(self: _Exported, *args: Any, **kwargs: Any) -> str:
        bound = signature.bind(self, *args, **kwargs).arguments
        return self._call(schema.name, {key: value for key, value in bound.items() if key != "self"})

    properties, required = schema.parameters.get("properties", {}), schema.parameters.get("required", ())
    ordered = sorted(properties, key=lambda name: name not in required)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", kind)]
    for name in ordered:
        hint = _TYPES.get(str(properties[name].get("type", "string")), str)
        default = inspect.Parameter.empty if name in required else properties[name].get("default")
        parameters.append(inspect.Parameter(name, kind, annotation=hint, default=default))
    signature = inspect.Signature(parameters, return_annotation=str)
    notes = "\n".join(f"    {name}: {properties[name].get('description', name)}" for name in ordered)
    call.__name__ = call.__qualname__ = schema.name
    call.__doc__ = f"{schema.description or schema.name}\n\nArgs:\n{notes}" if notes else schema.description
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__annotations__ = {item.name: item.annotation for item in parameters[1:]} | {"return": str}
    return call


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The loop of all exported environments, in a thread of its own: TRL calls from wherever it likes."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="agentopd-trl", daemon=True).start()
    return loop


def _await(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(coroutine, _loop()).result()
