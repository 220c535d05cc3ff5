"""Environment classes in TRL's style as environments: ``reset``, public methods as tools, ``get_reward``.

The instance owns the reward, and what a tool raises is shown to the student, as TRL does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from agentopd.contracts import AssistantTurn, EpisodeContext, StepResult
from agentopd.errors import ConfigError, EnvironmentFault, ToolError, boundary
from agentopd.types import JSON, Message, Split, Task
from agentopd_envs.adapters.foreign import ForeignEnvironment, Gold, adapted, by_content
from agentopd_envs.authoring import ToolEnvironment
from agentopd_envs.tools import tool


def from_trl(cls: type, rows: Sequence[JSON], name: str, gold: Gold | None = None) -> type[ToolEnvironment]:
    """An environment of a TRL-style class, with a task for each row of its data set.

    A row holds ``prompt`` (a text or messages) and whatever else ``reset`` takes; ``None`` for an environment that
    writes its own prompt. Rows are divided by their content. Raises ``ConfigError`` for a class that lacks a method.
    """
    methods = dict(inspect.getmembers(cls, predicate=inspect.isfunction))
    for needed in ("reset", "get_reward"):
        if needed not in methods:
            raise ConfigError(f"{cls.__qualname__} has no method {needed!r}, which an environment in TRL's style needs")
    tools = [key for key in methods if not key.startswith("_") and key not in ("reset", "get_reward")]
    members: JSON = {key: tool(mutates=True)(_tool(methods[key])) for key in tools}
    return adapted(_FromTRL, name, cls, gold, _factory=cls, _data=tuple(rows), **members)


class _FromTRL(ForeignEnvironment, ToolEnvironment):
    _factory: ClassVar[type]
    _data: ClassVar[tuple[JSON, ...]]

    @classmethod
    def _rows(cls, split: Split) -> Iterator[tuple[int, JSON]]:
        return by_content(cls._data, split, lambda row: row)

    @classmethod
    def _task(cls, index: int, row: JSON) -> Task:
        said = row.get("prompt") or ""
        prompt = [{"role": "user", "content": said}] if isinstance(said, str) else said
        return cls._asking((Message.model_validate(message) for message in prompt), {"row": row})

    async def reset(self, task: Task, ctx: EpisodeContext) -> tuple[Message, ...]:
        """A new instance; what its ``reset`` returns follows the last message."""
        opening = await super().reset(task, ctx)
        with boundary(EnvironmentFault, f"{self.name}: reset"):
            self._theirs = self._factory()
            added = await _awaited(self._theirs.reset(**task.public["row"]))
        *before, last = opening
        return (*before, last.model_copy(update={"content": last.content + (added or "")}))

    async def step(self, action: AssistantTurn) -> StepResult:
        """Answer the calls; the reward is asked for once the episode is over."""
        result = await super().step(action)
        if result.done or self._turn >= self.task.limits.max_turns:
            with boundary(EnvironmentFault, f"{self.name}: get_reward"):
                self._reward = float(await _awaited(self._theirs.get_reward()))
        return result


def _tool(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    async def call(self: _FromTRL, **arguments: Any) -> Any:
        try:
            return await _awaited(getattr(self._theirs, method.__name__)(**arguments))
        except Exception as exc:
            raise ToolError(str(exc) or type(exc).__name__) from exc

    return call


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
